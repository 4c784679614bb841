"""Grade answers, compare ways to aggregate candidates, and measure the Refinement Gap.

    python evaluate.py before.refined.jsonl after.refined.jsonl --out runs/tiny    one row a file
    python evaluate.py mine=seed0.refined.jsonl,seed1.refined.jsonl                several seeds, one row
    python evaluate.py x.candidates.jsonl                                          before anything is refined
    python evaluate.py --show test-7 after.refined.jsonl                           one problem, on the terminal
    python evaluate.py --suite math --model qwen-1.5b --n 8 --limit 100            sample, refine and report

Writes report.json, report.md and figures. Only texts and right answers are needed: what a file does not say (tokens,
log-probabilities, refinements) is a dash in the tables. Reading order: estimators, reading files, methods, the gap,
more questions, the report, the suite. grade.py says which answers mean the same, vote.py counts votes, figures.py draws
and prints the report.

What is compared, for problems with N candidates and K refinements each, on the same candidates throughout:

    pass@k     at least one of k candidates is right: what a perfect judge of k would reach
    maj@k      the answer that most of k candidates gave is right, where answers that mean the same are one
               (1/2 = 0.5); a tie shares the credit, a candidate without an answer casts no vote
    weighted   the same for all N, and each vote weighs the candidate's probability
    logprob    the candidate with the highest mean log-probability a token (Best-of-N)
    certainty  votes by the rank of the self-certainty (Borda votes, arXiv 2502.18581)
    score      the candidate with the highest "score", whatever wrote it into the file (Best-of-N)
    refined    one refinement is right (the mean, where a problem has several)
    refmaj     the vote of the K refinements
    union      the vote of candidates and refinements together
    gap        refined - maj@N, and the same relative to maj@N (the paper's Refinement Gap)

pass@k and maj@k are exact expectations over all subsets of size k, for every k: nothing is drawn. Intervals
are 95% and come from drawing problems again with replacement, for all methods at once, so that they are
paired. A vote on raw strings would split equal answers, understate voting and flatter the gap.
"""

import argparse
import dataclasses
import itertools
import math
import reprlib
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from figures import BLUE, GREY, as_markdown, as_text, checklist, details, draw, notes, say, scaling, shorten, tables_of
from files import InputError, command_line, disk_errors, each_row, meta_path, read_json, write_json, write_text
from grade import Grader, extract_answer, gold_answer, strip_thinking
from vote import best, borda, class_sums, classes, distinct, vote

# ------------------------------------------------------------------------------------------------
# Estimators


def binomials(n):
    """[n + 1, n + 1]: in row a and column b, the ways to draw b of a."""
    return np.array([[math.comb(a, b) for b in range(n + 1)] for a in range(n + 1)], dtype=float)


def pass_at_k(n, right):
    """right [R], of n candidates each -> [R, n]: the chance that k = 1..n of them, drawn without putting back,
    hold a right one, 1 - C(n - right, k) / C(n, k) (arXiv 2107.03374)."""
    ways = binomials(n)
    return 1 - ways[n - right, 1:] / ways[n, 1:]


def majority_at_k(votes):
    """votes [R, N] class numbers -> [R, N]: the expected credit of the vote of k = 1..N of them, over all subsets.

    Exact, without going through the subsets. Say that j of the drawn votes are right. Then the other k - j
    must hold at most j of each rival class (a wrong one), and with t rivals at exactly j the credit is
    1 / (t + 1). Classes of less than j votes, and candidates without one, can be drawn as it comes. The ways
    to draw m votes from several classes are the product of polynomials in which x^m stands for m votes.
    """
    n = votes.shape[1]
    counts = class_sums(votes, np.ones(votes.shape)).astype(int)
    counts[:, 1:] = -np.sort(-counts[:, 1:])
    counts, where = np.unique(counts, axis=0, return_inverse=True)  # only how many votes each class has matters
    ways = binomials(n)
    result = np.zeros((len(counts), n + 1))
    for start in range(0, len(counts), 500):
        right, wrong = counts[start : start + 500, 0], counts[start : start + 500, 1:]
        for j in range(1, right.max() + 1):
            rows = (right >= j).nonzero()[0]  # [R]
            rivals = np.where(wrong[rows] >= j, wrong[rows], 0)
            rivals = rivals[:, : (rivals > 0).sum(1).max(initial=0)]  # [R, T]
            drawn = np.zeros((len(rows), rivals.shape[1] + 1, n + 1))  # ways to draw m others with t rivals at j
            drawn[:, 0] = ways[n - right[rows] - rivals.sum(1)]
            for size in rivals.T:  # [R]; a rival of 0 votes changes nothing
                tied = drawn[:, :-1, : n + 1 - j] * ways[size, j][:, None, None]
                window = np.lib.stride_tricks.sliding_window_view(np.pad(drawn, ((0, 0), (0, 0), (j - 1, 0))), j, 2)
                drawn = np.einsum("rtmi,ri->rtm", window, ways[size, :j][:, ::-1])  # fewer than j of this rival
                drawn[:, 1:, j:] += tied
            credit = (drawn / np.arange(1, drawn.shape[1] + 1)[:, None]).sum(1)  # [R, n + 1]
            result[start + rows, j:] += ways[right[rows], j][:, None] * credit[:, : n + 1 - j]
    return (result[:, 1:] / ways[n, 1:])[where.reshape(-1)]  # [R, N]


def bootstrap(values, draws=10_000, seed=0):
    """values [P, M], M numbers about each problem -> [draws, M], their means over problems drawn with replacement.

    The columns of one draw are of the same problems, so differences and ratios of columns are paired, which
    takes out what makes problems hard for all methods.
    """
    rng, (problems, _), means = np.random.default_rng(seed), values.shape, []
    step = max(1, min(draws, 1_000_000 // problems))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        index = rng.integers(0, problems, (size, problems), dtype=np.int32)
        index += np.arange(size, dtype=np.int32)[:, None] * problems
        times = np.bincount(index.ravel(), minlength=size * problems).reshape(size, problems)  # [draws, P]
        means.append(times @ values / problems)
    return np.concatenate(means)


def interval(draws):
    """The middle 95% of bootstrap draws -> [low, high], or None where they are not all numbers."""
    return [float(x) for x in np.quantile(draws, [0.025, 0.975])] if np.isfinite(draws).all() else None


def mcnemar(differences):
    """The exact McNemar test of paired outcomes: differences [P] -> (better, worse, two-sided p).

    Under the null hypothesis each problem on which the two differ goes either way with chance 1/2. Where a
    vote is tied or several refinements are averaged, the sign of the difference counts.
    """
    better, worse = int((differences > 1e-9).sum()), int((differences < -1e-9).sum())
    tail = sum(math.comb(better + worse, i) for i in range(min(better, worse) + 1))
    return better, worse, min(1.0, float(Fraction(2 * tail, 2 ** (better + worse))))


# ------------------------------------------------------------------------------------------------
# Reading files


@dataclass
class Outcomes:
    """What counts about the answers of S files (seeds) to the same P problems, N candidates and K refinements each.

    A number that a file does not have is nan. In a file of candidates K is 0.
    """

    votes: np.ndarray  # [S, P, N] classes of equal answers: 0 right, -1 none, -2 not sampled (sample.py --adaptive)
    refined: np.ndarray  # [S, P, K] in the same classes, of the last round
    rounds: np.ndarray  # [S, P, R, M] likewise, of the R rounds before; of the last of them are the candidates shown
    tokens: np.ndarray  # [S, P, N] generated
    logprob: np.ndarray  # [S, P, N] of the whole candidate
    certainty: np.ndarray  # [S, P, N]
    score: np.ndarray  # [S, P, N]
    cut: np.ndarray  # [S, P, N] ended by the length limit
    prompt_tokens: np.ndarray  # [S, P, 1]
    refined_tokens: np.ndarray  # [S, P, K]
    refined_cut: np.ndarray  # [S, P, K]
    refined_prompt_tokens: np.ndarray  # [S, P, K]
    copied: np.ndarray  # [S, P, K] has the text of one of the candidates that it saw
    drawn: np.ndarray  # [S, P, K]: how many candidates were drawn to be shown
    left_out: np.ndarray  # [S, P, K]: the share of them that the prompt lacks
    order: np.ndarray  # [S, P, K, N or M]: which of the candidates stood at which place of the prompt, -1 for none
    rounds_tokens: np.ndarray  # [S, P, R, M]
    rounds_prompt_tokens: np.ndarray  # [S, P, R, M]


# What a file calls these numbers about each candidate and about each refinement.
CANDIDATE = dict(tokens="n_tokens", logprob="logprob", certainty="self_certainty", score="score", cut="finish_reason")
REFINEMENT = dict(refined_tokens="n_tokens", refined_cut="finish_reason", refined_prompt_tokens="n_prompt_tokens")
ROUNDS = dict(rounds_tokens="n_tokens", rounds_prompt_tokens="n_prompt_tokens")


def completions(items, key, where, kind=dict):
    """Candidates or refinements of a row, under `key`; InputError where there are none, or one of them has no text."""
    if not isinstance(items, list) or not items:
        raise InputError(f"{where}: its {key!r} are empty or no list, but {reprlib.repr(items)}")
    for i, item in enumerate(items):
        if not isinstance(item, kind) or (kind is dict and not isinstance(item.get("text"), str)):
            raise InputError(f"{where}: its {key!r} lack text: number {i} is {reprlib.repr(item)}")
    return items


def numbers(items, key, where):
    """A number about each of some candidates or refinements; nan where it is missing or not finite."""
    values = [item.get(key) for item in items]
    if key == "finish_reason":
        values = [1 if value == "length" else 0 if value == "stop" else None for value in values]
    try:
        found = np.array(values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is None or found.ndim > 1:
        raise InputError(f"{where}: not all of its {key} are numbers of a usual size")
    if key.startswith("n_") and (found < 0).any():
        raise InputError(f"{where}: one of its {key} is below 0")
    return np.where(np.abs(found) < 1e100, found, np.nan)  # sums of larger ones are not finite


def read_problem(row, where):
    """What counts about a row of a candidates or refined file, without its texts: files are larger than memory."""
    candidates = completions(row["candidates"], "candidates", where)
    refinements = completions(row["refinements"], "refinements", where) if "refinements" in row else []
    rounds = completions(row["rounds"], "rounds", where, list) if row.get("rounds") else []
    rounds = [completions(some, "rounds", where) for some in rounds]
    if len(set(map(len, rounds))) > 1:
        raise InputError(f"{where}: its rounds have more and fewer refinements")
    if isinstance(row.get("answer"), (list, dict)):
        raise InputError(f"{where}: its answer is no text but {reprlib.repr(row['answer'])}")
    N, R, M = row.get("adaptive") or len(candidates), len(rounds), len(rounds[0]) if rounds else 0
    if type(N) is not int or not len(candidates) <= N <= 10_000:
        raise InputError(f"{where}: 'adaptive' is {N!r}, not the most candidates that it could have")
    earlier = [item for some in rounds for item in some]
    texts = [strip_thinking(item["text"], str(row.get("prompt") or "")) for item in candidates]
    before, refined = (
        [strip_thinking(x["text"], str(x.get("prompt") or "")) for x in some] for some in (earlier, refinements)
    )
    found = {field: numbers(candidates, key, where) for field, key in CANDIDATE.items()}
    for field, values in found.items():  # nothing was generated for candidates that were not sampled
        missing = 0 if field == "tokens" else np.nan
        found[field] = np.pad(values, (0, N - len(candidates)), constant_values=missing)
    return {
        "answer": gold_answer(row.get("answer")),
        "answers": [extract_answer(text) for text in texts],
        "rounds": [extract_answer(text) for text in before],
        "refinements": [extract_answer(text) for text in refined],
        "sizes": (N, R, M, len(refinements)),
        "prompt_tokens": numbers([row], "n_prompt_tokens", where),
        **found,
        **{field: numbers(refinements, key, where) for field, key in REFINEMENT.items()},
        **{field: numbers(earlier, key, where).reshape(R, M) for field, key in ROUNDS.items()},
        **what_was_shown(refinements, refined, before[-M:] if R else texts, M or N, where),
    }


def what_was_shown(refinements, texts, sources, width, where):
    """Of refinements with these texts, made from `sources`, texts too: `drawn`, `order`, `left_out` and `copied`."""
    K, n, drawn = len(refinements), len(sources), numbers(refinements, "drawn", where)
    drawn = np.where(np.isnan(drawn), n, drawn)
    if not np.isin(drawn, np.arange(1, n + 1)).all():
        raise InputError(f"{where}: its refinements were drawn {drawn.tolist()} of {n} candidates")
    copied, left_out, order = np.zeros(K), np.full(K, np.nan), np.full((K, width), -1, dtype=np.int16)
    for k, (refinement, text) in enumerate(zip(refinements, texts)):
        shown = refinement.get("order")
        if shown is not None:
            good = isinstance(shown, list) and all(type(i) is int and 0 <= i < n for i in shown)
            if not good or len(set(shown)) < len(shown) or len(shown) > drawn[k]:
                raise InputError(f"{where}: the order {reprlib.repr(shown)} is not one of its {n} candidates")
            order[k, : len(shown)], left_out[k] = shown, 1 - len(shown) / drawn[k]
        # Nobody copies a candidate that is all thought: no prompt shows it.
        copied[k] = text != "" and text in {sources[i] for i in (range(n) if shown is None else shown)}
    return {"drawn": drawn, "order": order, "left_out": left_out, "copied": copied}


def read_file(path):
    """A candidates or refined file -> {id: what read_problem says}, for problems that can be graded.

    InputError names the file and the row where it is something else, or where there are more or fewer candidates
    or refinements than in the first row.
    """
    problems, skipped, first = {}, 0, None
    for row in each_row(path, keys=("id", "problem", "answer", "candidates")):
        problem = read_problem(row, where := f"{path}, id {row['id']!r}")
        N, R, M, K = problem["sizes"]
        size = f"{N} candidates and {K} refinements" + (f" after {R} rounds of {M}" if R else "")
        if (first := first or size) != size:
            raise InputError(f"{where}: {size}, but {first} in the first row; pass@k and maj@k need equal numbers")
        if problem["answer"] is not None:
            problems[str(row["id"])] = problem
        skipped += problem["answer"] is None
    if not problems:
        raise InputError(f"{path}: no problem has an answer to grade against")
    if skipped:
        print(f"{path}: {skipped} of {skipped + len(problems)} problems have no answer to grade against, left out")
    return problems


def check_same_problems(paths, files):
    """InputError unless the files of one row, what read_file gave for `paths`, can be averaged over."""
    first = files[0]
    for path, problems in zip(paths[1:], files[1:]):
        for identity in problems.keys() ^ first.keys():
            raise InputError(f"{path}: id {identity!r} is not in both this file and {paths[0]}; one row needs both")
        for identity, problem in problems.items():
            if problem["sizes"] != first[identity]["sizes"]:
                raise InputError(f"{path}, id {identity!r}: more or fewer candidates or refinements than {paths[0]}")
            if problem["answer"] != first[identity]["answer"]:
                raise InputError(f"{path}, id {identity!r}: another right answer than in {paths[0]}")


def grade_files(files, grader, what=None):
    """Several files about the same problems: a list of what read_file gave -> Outcomes."""
    S, first = len(files), files[0]
    N, R, M, K = next(iter(first.values()))["sizes"]
    golds = [problem["answer"] for problem in first.values()]
    answers = [[a for problems in files for a in problems[i]["answers"]] for i in first]  # [P][S * N]
    refined = [[a for problems in files for key in ("rounds", "refinements") for a in problems[i][key]] for i in first]
    # math-verify is asked in two rounds, so that its processes have all there is to do at once: which answers are
    # right, and which of the wrong ones are the same.
    different = [list(distinct(*both).values()) for both in zip(answers, refined)]
    grader.grade(((gold, a) for gold, some in zip(golds, different) for a in some), what)
    wrong = [[a for a in some if not grader.equal(gold, a)] for gold, some in zip(golds, different)]
    grader.grade((pair for some in wrong for pair in itertools.permutations(some, 2)), what)

    P = len(first)
    votes, later = np.full((S, P, N), -2, dtype=np.int16), np.empty((S, P, R * M + K), dtype=np.int16)
    for p, (identity, gold, some, more) in enumerate(zip(first, golds, answers, refined)):
        number = iter(classes(gold, some, grader, more))
        for of_file, problems in zip(votes[:, p], files):
            n = len(problems[identity]["answers"])
            of_file[:n] = list(itertools.islice(number, n))
        later[:, p] = np.reshape(list(number), (S, R * M + K))
    rounds, refined = later[..., : R * M].reshape(S, P, R, M), later[..., R * M :]
    names = {field.name for field in dataclasses.fields(Outcomes)} - {"votes", "refined", "rounds"}
    arrays = {name: np.array([[problems[i][name] for i in first] for problems in files]) for name in names}
    return Outcomes(votes=votes, refined=refined, rounds=rounds, **arrays)


def read_meta(path, refined):
    """What the record beside a candidates or a refined file says: model, parameters, and seconds of both stages."""

    def number(record, key):
        return record[key] if type(record.get(key)) in (int, float) else None

    meta = read_json(meta_path(path)) if meta_path(path).exists() else {}
    if not meta.get("complete", True):
        print(f"{path}: not complete yet; run the command that makes it again for the whole")
    of_candidates = meta_path(meta.get("data") or "-") if refined else meta_path(path)
    before = number(read_json(of_candidates), "seconds") if of_candidates.exists() else None
    after = number(meta, "seconds") if refined else None
    after = None if after is None else after + (number(meta, "seconds_before") or 0)  # of the rounds before
    seconds = {"candidates": before, "refinement": after}
    return {"model": meta.get("model"), "parameters": number(meta, "parameters"), "seconds": seconds}


# ------------------------------------------------------------------------------------------------
# Methods


def sampled(x):
    """[S, P, N], False where --adaptive stopped before it."""
    return x.votes > -2


# What is generated for a method, Outcomes -> [S, P] tokens.


def all_candidates(x):
    return x.tokens.sum(-1)


def one_candidate(x):
    return x.tokens.sum(-1) / sampled(x).sum(-1)


def one_refinement(x):
    """Itself and what it was made from: the candidates that were drawn for it, or all rounds before it."""
    made_from = all_candidates(x) if x.rounds.shape[2] else one_candidate(x) * x.drawn.mean(-1)
    return made_from + x.rounds_tokens.sum((2, 3)) + x.refined_tokens.mean(-1)


def everything(x):
    return all_candidates(x) + x.rounds_tokens.sum((2, 3)) + x.refined_tokens.sum(-1)


@dataclass
class Method:
    """A way from candidates and refinements to an answer. The top of this file explains each."""

    name: str  # in tables and in report.json
    label: str  # in words, with {n} candidates and {k} refinements
    credit: Callable  # Outcomes -> [S, P], the share of a right answer
    needs: tuple = ()  # the fields of Outcomes that it cannot do without
    tokens: Callable = all_candidates  # Outcomes -> [S, P], generated for it
    marker: str = "o"  # in figures
    colour: str = GREY  # the refinement and the vote that it is measured against stand out


def probabilities(x):
    """The candidates' own, relative to the likeliest with an answer: relative to one without, all could round to 0."""
    most = x.logprob.max(-1, keepdims=True, where=x.votes >= 0, initial=-np.inf)
    return np.exp(np.minimum(x.logprob - most, 0))


def mean_logprob(x):
    return x.logprob / np.maximum(x.tokens, 1)


def one_sample(x):
    """[S, P]; of the first candidates, as many as all problems have: which problems have more is no accident."""
    return (x.votes[..., : sampled(x).sum(-1).min()] == 0).mean(-1)


METHODS = [
    Method("pass@1", "one sample", one_sample, tokens=one_candidate),
    Method("maj@N", "majority vote of {n}", lambda x: vote(x.votes), marker="s", colour="black"),
    Method("weighted", "vote by probability", lambda x: vote(x.votes, probabilities(x)), ("logprob",), marker="<"),
    Method(
        "logprob", "likeliest candidate", lambda x: best(x.votes, mean_logprob(x)), ("logprob", "tokens"), marker="v"
    ),
    Method(
        "certainty", "vote by self-certainty", lambda x: vote(x.votes, borda(x.certainty)), ("certainty",), marker=">"
    ),
    Method("score", "highest score", lambda x: best(x.votes, x.score), ("score",), marker="p"),
    Method("refined", "refined", lambda x: (x.refined == 0).mean(-1), ("refined",), one_refinement, "D", BLUE),
    Method("refmaj", "vote of {k} refinements", lambda x: vote(x.refined), ("refined",), everything, "P"),
    Method(
        "union", "vote of all, refined too", lambda x: vote(np.dstack([x.votes, x.refined])),
        ("refined",), everything, "X",
    ),  # fmt: skip
    Method("pass@N", "any right of {n}", lambda x: (x.votes == 0).any(-1).astype(float), marker="^"),
]


def mean(values):
    """The mean for report.json: None of no values, and where one is not known."""
    return float(values.mean()) if values.size and np.isfinite(values).all() else None


def methods_of(x):
    """The methods for which the files have what they need."""
    found = [method for method in METHODS if None not in [mean(getattr(x, field)) for field in method.needs]]
    return [method for method in found if method.name != "refmaj" or x.refined.shape[-1] > 1]  # one is no vote


# ------------------------------------------------------------------------------------------------
# The gap


def equal_cost(x, maj_at_k):
    """How many candidates cost what a refinement and all that it is made from do, and their vote, from maj_at_k [P, M].

    -> {"generated": counted in generated tokens, "with_prompts": together with the refinement prompts (the problem's
    own counts once for either)}, and of each {"k": that many, "credit": their vote [P], "extrapolated": is M too few?}.
    k is None where tokens are not known. With several seeds M is the number of all their candidates. Where M is too
    few, the curve is continued in a straight line through its last steps, which overestimates the vote, as the true
    curve flattens; there is no credit beyond k = 2 M.
    """
    most, found = maj_at_k.shape[1], {}
    a_candidate = max(one_candidate(x).mean(), 1)
    generated = one_refinement(x).mean()
    prompts = (x.rounds_prompt_tokens.sum((2, 3)) + x.refined_prompt_tokens.mean(-1)).mean()
    for name, cost in (("generated", generated), ("with_prompts", generated + prompts)):
        k = max(cost / a_candidate, 1)
        found[name] = {"k": float(k) if np.isfinite(k) else None}
        if k <= most:  # between two whole numbers, in a straight line
            low = math.floor(k)
            step = maj_at_k[:, min(low, most - 1)] - maj_at_k[:, low - 1]
            found[name] |= {"extrapolated": False, "credit": maj_at_k[:, low - 1] + (k - low) * step}
        elif k <= 2 * most:  # two steps, as a vote of 2m is worth what one of 2m - 1 is
            last, slope = maj_at_k[:, -1], (maj_at_k[:, -1] - maj_at_k[:, max(0, most - 3)]) / 2
            rising = slope.mean() > 1e-9  # and not beyond 100%
            steps = min(k - most, (1 - last.mean()) / slope.mean()) if rising else 0
            found[name] |= {"extrapolated": True, "credit": last + slope * steps}
    return found


def order_sensitivity(x):
    """Does the refined answer depend on the order of the candidates? -> dict for report.json

    `changed`: of pairs of refinements of a problem in different orders, how many differ in their answers; at a
    temperature above 0 part of that is chance. `at_place`: where some candidates are right and some wrong, the
    refined accuracy if the one at that place is right, and over how many refinements; orders are drawn, so places
    are comparable.
    """
    K, sources = x.order.shape[2], x.rounds[:, :, -1] if x.rounds.shape[2] else x.votes  # [S, P, N] or [S, P, M]
    order = x.order[..., : int(x.drawn.max())]  # of the places that a prompt has
    first, second = np.triu_indices(K, 1)
    other = (order[:, :, first] != order[:, :, second]).any(3)  # [S, P, pairs]
    differ = x.refined[:, :, first] != x.refined[:, :, second]
    right = np.broadcast_to((sources == 0)[:, :, None], (*sources.shape[:2], K, sources.shape[2]))
    right = np.take_along_axis(right, order.clip(0).astype(int), 3)  # [S, P, K, places]
    mixed = (order >= 0).all(3) & ~right.all(3)  # [S, P, K]
    chosen = [(x.refined == 0)[mixed & right[..., place]] for place in range(order.shape[3])]
    at_place = [[mean(values), len(values)] for values in chosen]
    return {"changed": mean(differ[other]), "pairs": int(other.sum()), "at_place": at_place}


def agreement(votes):
    """How far candidates agree: votes [..., N] -> {name: [...]}, of which one is true of each problem.

    Of the candidates that were sampled, those without an answer are in no class: all in one class, more than half,
    some votes, none.
    """
    N, most = (votes > -2).sum(-1), class_sums(votes, np.ones(votes.shape)).max(-1)
    above = {"unanimous": most == N, "majority": (most < N) & (2 * most > N)}
    return above | {"split": (most > 0) & (2 * most <= N), "none": most == 0}


def count(values, at, every=1):
    """values, at of one shape -> [how many of them, of how many] where `at` is true; `every` of them are a problem."""
    total, of = (round(float(x), 6) for x in (values[at].sum() / every, at.sum() / every))
    return [int(total) if total.is_integer() else total, int(of) if of.is_integer() else of]


def turned(before, after, at=True, every=1):
    """How many answers become right and wrong, where `at` is true: the credits before and after -> two counts."""
    kept = {"wrong_to_right": count(after, at & (before == 0), every)}
    return kept | {"right_to_wrong": count(1 - after, at & (before == 1), every)}


def flips(x, maj, refined):
    """What the refinement turns around of the vote, credits [S, P], beside what one more candidate does."""
    right, N = (x.votes == 0).sum(2), x.votes.shape[2]  # [S, P]
    found = turned(maj, refined)
    found["by_agreement"] = {name: turned(maj, refined, at) for name, at in agreement(x.votes).items()}
    found["by_correct"] = [{"correct": c, **turned(maj, refined, right == c)} for c in range(N + 1)]
    found["one_more"] = None
    if N > 1 and sampled(x).all():  # from N - 1 to N, each candidate being the last in turn
        others = [np.delete(x.votes, i, 2) for i in range(N)]
        before, groups = np.stack([vote(some) for some in others]), [agreement(some) for some in others]  # [N, S, P]
        after = np.broadcast_to(maj, before.shape)
        by = {name: turned(before, after, np.stack([some[name] for some in groups]), N) for name in groups[0]}
        found["one_more"] = {**turned(before, after, every=N), "by_agreement": by}
    return found


def about_refinement(x, credits, columns, draws, costs):
    """What report.json says about refinements, from the methods' credits [S, P], means over seeds and their draws."""
    maj, refined, right = credits["maj@N"], credits["refined"], (x.votes == 0).sum(2)  # [S, P]
    difference, of_seeds = columns["refined"] - columns["maj@N"], (refined - maj).mean(1)  # [P], [S]
    better, worse, p = mcnemar(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = (draws["refined"] - draws["maj@N"]) / draws["maj@N"]

    def against(other):  # the gap between the refinement and some vote
        return {"points": mean(columns["refined"] - columns[other]), "ci95": interval(draws["refined"] - draws[other])}

    for name, cost in costs.items():
        if "credit" in cost:
            cost |= {"maj": mean(cost.pop("credit")), **against(name)}
    return {
        "refined": mean(refined),
        "gap": {
            **against("maj@N"),
            "relative": mean(difference) / mean(maj) if maj.any() else None,
            "relative_ci95": interval(relative),
            "mcnemar": {"better": better, "worse": worse, "p": p},
            "seed_se": float(of_seeds.std(ddof=1) / math.sqrt(len(maj))) if len(maj) > 1 else None,
        },
        "equal_cost": costs if costs["generated"]["k"] else None,
        "rescued": {
            "all_wrong": count(refined, right == 0),
            "minority_right": count(refined, (right > 0) & (maj == 0)),
            "tied": count(refined, (maj > 0) & (maj < 1)),
            "majority_right_broken": count(1 - refined, maj == 1),
        },
        "flips": flips(x, maj, refined),
        "order": order_sensitivity(x),
    }


# ------------------------------------------------------------------------------------------------
# More questions


def with_interval(name, values):
    """A number about each problem, [P] -> its mean under this name, and the interval of it."""
    return {name: mean(values), "ci95": interval(bootstrap(values[:, None])[:, 0])}


def by_shown(x, maj_at):
    """Refinement by the number of candidates drawn to be shown, beside the vote of as many, in maj_at [S, P, N]."""
    found = []
    for shown in map(int, np.unique(x.drawn)):
        at = x.drawn == shown  # [S, P, K]
        these = at.any((0, 2))  # [P], problems with such a refinement
        refined = ((x.refined == 0) & at).sum((0, 2))[these] / at.sum((0, 2))[these]
        voted = maj_at[:, these, shown - 1].mean(0)
        line = {"shown": shown, "problems": int(these.sum()), **with_interval("refined", refined)}
        line |= {"maj": mean(voted), "gap": with_interval("points", refined - voted)}
        found.append({**line, "tokens": mean(shown * x.tokens[:, these].mean() + x.refined_tokens[at].mean())})
    return found


def by_round(x, maj):
    """The rounds of a file, the last one too: refined accuracy, vote and gap to the candidates' vote maj [S, P]."""
    spent, found = all_candidates(x), []
    rounds = [(x.rounds[:, :, r], x.rounds_tokens[:, :, r]) for r in range(x.rounds.shape[2])]  # [S, P, M] each
    for number, (votes, tokens) in enumerate([*rounds, (x.refined, x.refined_tokens)], 1):
        refined = (votes == 0).mean((0, 2))  # [P]
        cost = spent + tokens.mean(2) if number <= len(rounds) else one_refinement(x)
        line = {"round": number, **with_interval("refined", refined)}
        line |= {"gap": with_interval("points", refined - maj.mean(0)), "vote": mean(vote(votes))}
        found.append({**line, "any_right": mean((votes == 0).any(2)), "tokens": mean(cost)})
        spent = spent + tokens.sum(2)
    return found


def to_first(read, outcomes):
    """Paired differences of each row's Outcomes to the first's; None where its files, `read`, have other problems."""
    first, keys, found = outcomes[0], [(i, problem["answer"]) for i, problem in read[0][0].items()], [None]
    for x, (problems, *_) in zip(outcomes[1:], read[1:]):
        place = {(i, problem["answer"]): at for at, (i, problem) in enumerate(problems.items())}
        if place.keys() != set(keys):
            found.append(None)
            continue
        names, order = ("pass@1", "maj@N", "refined"), [place[key] for key in keys]
        known = names if x.refined.size and first.refined.size else names[:2]
        credits = {m.name: (m.credit(x).mean(0)[order], m.credit(first).mean(0)) for m in METHODS if m.name in known}
        found.append({name: with_interval("points", after - before) for name, (after, before) in credits.items()})
    return found


def report_row(name, x, metas):
    """All statistics of one row, for report.json; `metas` are the read_meta of its files."""
    (S, P, N), K = x.votes.shape, x.refined.shape[2]
    methods = methods_of(x)
    credits = {method.name: method.credit(x) for method in methods}  # [S, P] each
    maj, refined = credits["maj@N"], credits.get("refined", np.full((S, P), np.nan))
    there, right = sampled(x), (x.votes == 0).sum(2)  # [S, P, N], [S, P]
    least = int(there.sum(2).min())  # every problem has so many candidates; only with --adaptive less than N
    votes = x.votes[..., :least]
    pass_at = pass_at_k(least, (votes == 0).sum(2).ravel())  # [S * P, least]
    maj_at = majority_at_k(votes.reshape(S * P, least))  # [S * P, least]
    pool = votes.swapaxes(0, 1).reshape(P, S * least)  # [S, P, N] -> [P, S * N], the candidates of all seeds
    costs = equal_cost(x, maj_at if S == 1 else majority_at_k(pool)) if K else {}
    columns = {method: credit.mean(0) for method, credit in credits.items()}  # [P] each, over seeds
    columns |= {kind: cost["credit"] for kind, cost in costs.items() if "credit" in cost}
    draws = dict(zip(columns, bootstrap(np.stack(list(columns.values()), 1)).T))  # [draws] each
    unknown = dict.fromkeys(("refined", "gap", "equal_cost", "rescued", "flips", "order"))
    spent = {"candidates": x.tokens, "refinement": x.refined_tokens}
    spent |= {"prompt": x.prompt_tokens, "refinement_prompt": x.refined_prompt_tokens}
    spent |= {"rounds": x.rounds_tokens.reshape(S, P, -1)}

    def both(of_candidates, of_refinements):
        return {"candidates": mean(of_candidates), "refinements": mean(of_refinements)}

    def seconds(stage):  # a problem
        known = [meta["seconds"][stage] for meta in metas]
        return None if None in known else sum(known) / (S * P)

    return {
        "name": name,
        "model": metas[0]["model"],
        "parameters": metas[0]["parameters"],
        **{"problems": P, "n": N, "k": K, "seeds": S, "sampled": mean(there.sum(2))},
        **{f"pass@{k}": float(value) for k, value in enumerate(pass_at.mean(0), 1)},
        **{f"maj@{k}": float(value) for k, value in enumerate(maj_at.mean(0), 1)},
        **(about_refinement(x, credits, columns, draws, costs) if K else unknown),
        "methods": {
            m.name: dict(accuracy=mean(credits[m.name]), ci95=interval(draws[m.name]), tokens=mean(m.tokens(x)))
            for m in methods
        },
        "by_correct": [
            {"correct": c, "problems": int(at.sum()), "maj": mean(maj[at]), "refined": mean(refined[at])}
            for c, at in enumerate(right == np.arange(N + 1)[:, None, None])  # [N + 1, S, P]
        ],
        "by_shown": by_shown(x, maj_at.reshape(S, P, N)) if K and least == N and not x.rounds.shape[2] else None,
        "rounds": by_round(x, maj) if K else None,
        "unanimous": mean(agreement(x.votes)["unanimous"]),
        "copied": mean(x.copied),
        "left_out": mean(x.left_out),
        "answered": both((x.votes >= 0)[there], x.refined >= 0),
        "cut_off": both(x.cut[there], x.refined_cut),
        "unboxed": both((x.votes < 0)[x.cut == 0], (x.refined < 0)[x.refined_cut == 0]),  # of those that ended
        "length": both(x.tokens[there], x.refined_tokens),
        "tokens": {key: mean(tokens.sum(2)) if tokens.size else None for key, tokens in spent.items()},
        "seconds": {stage: seconds(stage) for stage in ("candidates", "refinement")},
    }


# ------------------------------------------------------------------------------------------------
# The report


def show(identity, path, limit):
    """One problem of a candidates or refined file on the terminal: answers, votes and refinement side by side."""
    rows = each_row(path, keys=("id", "problem", "candidates"))
    if (row := next((row for row in rows if str(row["id"]) == identity), None)) is None:
        raise InputError(f"{path}: no problem with id {identity!r} in it")
    problem, grader = read_problem(row, where := f"{path}, id {identity!r}"), Grader(limit)
    gold, refined = problem["answer"], problem["rounds"] + problem["refinements"]
    number = classes(gold, problem["answers"], grader, refined)
    grader.close()
    rounds = [(f"round {r},", some) for r, some in enumerate(row.get("rounds") or [], 1)]
    groups = [("candidate", row["candidates"]), *rounds, ("refinement", row.get("refinements", []))]
    items = [(f"{kind} {i}", item) for kind, some in groups for i, item in enumerate(some)]
    lines = [["", "", "answer", "votes", "tokens", "logprob", "certainty", "ended", "order"]]
    for (kind, item), answer, own in zip(items, problem["answers"] + refined, number):
        mark = "no answer" if own < 0 else "-" if gold is None else "right" if own == 0 else "wrong"
        votes = "-" if own < 0 else str(number[: len(row["candidates"])].count(own))
        about = (mean(numbers([item], key, where)) for key in ("n_tokens", "logprob", "self_certainty"))
        lines.append([kind, mark, shorten(answer or "-", 30), votes, *details(item, *about)])
    parts = [textwrap.fill(row["problem"], 100, replace_whitespace=False), f"\nright answer: {gold}"]
    parts.append(as_text("", lines, "votes: candidates with the same answer; logprob: mean a token"))
    for (kind, mark, *_), (_, item) in zip(lines[1:], items):
        parts.append(f"\n--- {kind}: {mark}\n{strip_thinking(item['text'])}")
    say(*parts)


def named_files(words):
    """[NAME=]FILE[,FILE...] of the command line -> {name of a row: its files}."""
    found = {}
    for word in words:
        name, paths = word.split("=", 1) if "=" in word and not Path(word).exists() else ("", word)
        files = [paths] if Path(paths).exists() else paths.split(",")
        name = name or Path(files[0]).name.removesuffix(".jsonl").removesuffix(".refined")
        while name in found:  # two folders may have files of one name
            name += "'"
        found[name] = files
    return found


def report(words, out, limit):
    """Read and grade the files that `words` name, and write everything about them to the folder `out`."""
    started, files = time.time(), named_files(words)
    read = {name: [read_file(path) for path in paths] for name, paths in files.items()}
    for name, paths in files.items():
        check_same_problems(paths, read[name])
    grader, rows, outcomes = Grader(limit, out / "grades.jsonl"), [], []
    for name, paths in files.items():
        outcomes.append(x := grade_files(read[name], grader, name))
        rows.append(report_row(name, x, [read_meta(path, x.refined.size) for path in paths]))
    grader.close()
    for row, differences in zip(rows, to_first(list(read.values()), outcomes)):
        row["to_first"] = differences
    found = scaling(rows)
    grading = {"asked": len(grader.known), "stuck": len(grader.stuck), "limit": limit}
    write_json(out / "report.json", {"rows": rows, "scaling": found, "grading": grading})
    tables, sentences = tables_of(rows, METHODS), notes(rows, found, len(grader.stuck), limit)
    with disk_errors(out):
        figures = draw(rows, METHODS, found, out)
    parts = ["# Report", *(as_markdown(*table) for table in tables), *(f"- {sentence}" for sentence in sentences)]
    parts += [f"![{name}]({name})" for name in figures]
    write_text(out / "report.md", "\n\n".join([*parts, as_markdown(*checklist())]) + "\n")
    say("", *(as_text(*table) for table in tables), sep="\n\n")
    say("", *itertools.chain(*(textwrap.wrap(sentence, 100) for sentence in sentences)))
    print(f"{out}: report.json, report.md, {', '.join(figures)} written ({time.time() - started:.0f} s)")


# ------------------------------------------------------------------------------------------------
# The suite, and the command line

SUITES = {"math": ["aime24", "aime25", "amc23", "math500", "olympiadbench", "knights"]}


def run_suite(args, flags):
    """Sample and refine each set with the other two files, one command after another -> the refined files.

    The commands keep what they have, so the suite goes on where it was stopped. `flags` are given to both.
    """
    from hub import BENCHMARKS  # here, since it loads torch, which takes seconds

    commands, files = [], []
    for name in SUITES.get(args.suite) or args.suite.split(","):
        if name not in BENCHMARKS and not Path(name).is_file():
            known = ", ".join(BENCHMARKS)
            raise InputError(f"--suite {args.suite}: no file and no benchmark {name!r}; there are {known}")
        stem = str(Path(args.out, Path(name).stem))
        candidates, refined = f"{stem}.candidates.jsonl", f"{stem}.refined.jsonl"
        if refined in files:
            raise InputError(f"--suite {args.suite}: two sets of the name {Path(name).stem}; rename one of them")
        limit = ["--limit", str(args.limit)] if args.limit else []
        commands.append(["sample.py", "--data", name, *limit, "--n", str(args.n), "--out", candidates])
        commands.append(["refine.py", "--candidates", candidates, "--k", str(args.k), "--out", refined])
        files.append(refined)
    started = time.time()
    for number, (script, *given) in enumerate(commands, 1):
        given += ["--model", args.model, *flags]
        at = f"[{number} of {len(commands)}, {time.time() - started:.0f} s]"
        print(f"{at} python {shlex.join([script, *given])}", flush=True)
        if code := subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *given]).returncode:
            sys.exit(code)  # it has said why
    return files


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    suite = any(word.partition("=")[0] == "--suite" for word in argv)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    if not suite:
        help = "refined files (of refine.py) or candidates (of sample.py), a row each; seeds of one row with commas"
        parser.add_argument("files", nargs="+", metavar="[NAME=]FILE[,FILE...]", help=help)
    parser.add_argument("--out", default=".", help="folder for report.json, report.md, figures and grades.jsonl")
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds for one comparison (default: 5)")
    parser.add_argument("--show", metavar="ID", help="show one problem of one file, and stop")
    group = parser.add_argument_group("suite (flags of sampling and machine are given to sample.py and refine.py)")
    group.add_argument("--suite", help=f"sample, refine and report: {', '.join(SUITES)}, or sets and files with commas")
    group.add_argument("--model", default="tiny", help="short name, hub id or folder (default: tiny)")
    group.add_argument("-n", "--n", type=int, default=8, help="candidates a problem (default: 8)")
    group.add_argument("-k", "--k", type=int, default=1, help="refinements a problem (default: 1)")
    group.add_argument("--limit", type=int, help="only the first so many problems of each set")
    args, flags = parser.parse_known_args(argv)
    if flags and not suite:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if not 0 < args.time_limit <= 86_400:  # also where it is nan
        raise InputError(f"--time-limit {args.time_limit:g}: must be above 0 seconds, and a day at most")
    for flag in ("n", "k", "limit"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if args.show and (suite or len(args.files) != 1):
        raise InputError(f"--show {args.show}: give one file, and no --suite")
    if args.show:
        return show(args.show, args.files[0], args.time_limit)
    report(run_suite(args, flags) if suite else args.files, Path(args.out), args.time_limit)


if __name__ == "__main__":
    command_line(main)
