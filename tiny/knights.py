"""Make knights.jsonl: puzzles about who tells the truth, the benchmark `knights`.

    python tiny/knights.py        writes tiny/knights.jsonl again, the same file
"""

import itertools
import json
import random
from pathlib import Path

PEOPLE = ("Ava", "Ben", "Cleo", "Dan", "Eve")


def holds(statement, knights):
    """Is `statement` true, where knights[i] says whether person i is a knight?"""
    kind, *parts = statement
    if kind == "knight":
        return knights[parts[0]]
    if kind == "count":
        return sum(knights) == parts[0]
    if kind == "says":  # what a knight says is true, what a knave says is not
        return holds(parts[1], knights) == knights[parts[0]]
    first, *second = (holds(part, knights) for part in parts)
    if kind == "not":
        return not first
    return {"and": first and second[0], "or": first or second[0], "if": not first or second[0]}[kind]


def phrase(statement):
    """A statement in English, without a period."""
    kind, *parts = statement
    if kind == "knight":
        return f"{PEOPLE[parts[0]]} is a knight"
    if kind == "not":
        return f"{PEOPLE[parts[0][1]]} is a knave"  # `parts` says who is a knight, no more
    if kind == "count":
        return f"exactly {parts[0]} of us {'is a knight' if parts[0] == 1 else 'are knights'}"
    if kind == "says":
        return f"{PEOPLE[parts[0]]} would say that {phrase(parts[1])}"
    first, second = map(phrase, parts)
    return {"and": f"{first} and {second}", "or": f"{first} or {second}, or both", "if": f"if {first}, then {second}"}[
        kind
    ]


def knights_and_knaves(n=200, seed=0):
    """Puzzles of 3 to 5 people who are knights, whose statements are true, or knaves, whose statements are false.

    Statements are drawn at random, and a puzzle is kept if exactly one of all 2^people assignments fits.
    """
    rng, puzzles = random.Random(seed), {}
    while len(puzzles) < n:
        people, said = 3 + len(puzzles) % 3, []
        for _ in range(people):
            who = rng.sample(range(people), 2)
            first, second = (rng.choice((("knight", i), ("not", ("knight", i)))) for i in who)
            kinds = [first, ("count", rng.randrange(1, people)), ("says", who[1], first)]
            said.append(rng.choice([*kinds, ("and", first, second), ("or", first, second), ("if", first, second)]))
        fits = []
        for knights in itertools.product((True, False), repeat=people):
            if all(holds(statement, knights) == knight for statement, knight in zip(said, knights)):
                fits.append(knights)
        if len(fits) != 1:
            continue
        names, text = PEOPLE[:people], [phrase(statement) for statement in said]
        lines = "".join(f'\n{name} says: "{words[0].upper()}{words[1:]}."' for name, words in zip(names, text))
        problem = (
            "On an island live knights, whose statements are always true, and knaves, whose statements are always "
            f"false. You meet {', '.join(names[:-1])} and {names[-1]}.{lines}\nWho is a knight and who is a knave? "
            f'Give the answer in the form "{names[0]}: knight, {names[1]}: knave, ..." with all {people} names.'
        )
        answer = ", ".join(f"{name}: {'knight' if knight else 'knave'}" for name, knight in zip(names, fits[0]))
        puzzles.setdefault(problem, answer)
    return [{"problem": problem, "answer": answer} for problem, answer in puzzles.items()]


if __name__ == "__main__":
    with open(Path(__file__).with_name("knights.jsonl"), "w", encoding="utf-8") as file:
        for number, puzzle in enumerate(knights_and_knaves()):
            file.write(json.dumps({"id": f"knights-{number}", **puzzle}, ensure_ascii=False) + "\n")
