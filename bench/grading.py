r"""How often grade.py judges right, beside plain math-verify, on answers made by rule from those of benchmarks.

    python bench/grading.py FOLDER    math500.jsonl, amc23.jsonl, aime24.jsonl, minerva_math.jsonl, gsm8k.jsonl in it

Respellings mean the same as the right answer: another form of a fraction, a unit, separated thousands,
Unicode, a sentence around it, another box. Near misses do not: another sign or digit, parts swapped,
another unit, letters in another order, an open bracket for a closed one. All that a rule can be used
on is used. math-verify gets both sides as its own README has it: parse, then verify.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grade as g  # noqa: E402
from files import command_line, read_jsonl  # noqa: E402

SETS = ("math500", "amc23", "aime24", "minerva_math", "gsm8k")
POWERS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
FULL_WIDTH = str.maketrans("0123456789(),+=", "０１２３４５６７８９（），＋＝")


def right_answers(folder):
    """The different right answers of the files in `folder` that there are."""
    answers = {}
    for path in (Path(folder) / f"{name}.jsonl" for name in SETS):
        for row in read_jsonl(path) if path.exists() else ():
            answer = row["answer"] if "answer" in row else g.extract_answer(row["solution"])
            if isinstance(answer, float) and answer.is_integer():
                answer = int(answer)
            if g.gold_answer(answer):
                answers[str(answer)] = True
    return list(answers)


def respellings(gold):
    """(rule, text) of texts whose answer means the same as `gold`."""
    box, number = r"\boxed{%s}", g.as_fraction(gold)
    if fraction := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold):
        sign, top, bottom = fraction[1], int(fraction[2]), int(fraction[3])
        forms = ["%d/%d" % (top, bottom), r"\dfrac{%d}{%d}" % (top, bottom), r"\tfrac{%d}{%d}" % (2 * top, 2 * bottom)]
        if top > bottom and top % bottom:
            whole = top // bottom, top % bottom, bottom
            forms += [r"%d\frac{%d}{%d}" % whole, "%d %d/%d" % whole]
        if 10**6 * top % bottom == 0:
            forms.append(str(float(Fraction(top, bottom))))
        yield from (("fraction", box % (sign + form)) for form in forms)
    if number is not None and "text" not in gold:
        for unit in (r"\text{ cm}", r" \text{ dollars}", r"\mathrm{~km}", r" \text{ units}", " apples"):
            yield "unit", box % (gold + unit)
    if re.fullmatch(r"-?\d{4,}", gold):
        for separator in (",", "{,}", r"\,", ",\\!", " ", "~"):
            yield "thousands", box % f"{int(gold):,}".replace(",", separator)
    halves = {"2": "½", "4": "¼", "8": "⅛"}
    for pattern, sign in (
        ("-", "−"),
        (r"\\pi(?![a-z])", "π"),
        (r"\^\{?\\circ\}?", "°"),
        (r"\\infty", "∞"),
        (r"(?<!\{)\\sqrt(?:\{(\d+)\}|(\d))", r"√\1\2"),
        (r"\^(\d)", lambda m: m[1].translate(POWERS)),
        (r"(?<!\d)\\d?frac\{1\}\{([248])\}", lambda m: halves[m[1]]),
        (r"^[^\\]*$", lambda m: m[0].translate(FULL_WIDTH)),
    ):
        if re.search(pattern, gold):
            yield "unicode", box % re.sub(pattern, sign, gold)
    if "text" not in gold and "mbox" not in gold:
        for sentence in (r"\text{The answer is } %s", "%s.", "**%s**", r"\text{So the final answer is: }%s"):
            yield "sentence", box % (sentence % gold)
    boxes = r"\boxed {%s}", r"so $\boxed{%s}$.", r"\fbox{%s}", r"\boxed{\boxed{%s}}", r"\boxed{\displaystyle %s}"
    boxes += r"\boxed{$%s$}", r"\boxed{\mathbf{%s}}", r"\boxed{\color{blue}{%s}}", r"first \boxed{17}. Then \boxed{%s}"
    yield from (("box", other % gold) for other in boxes)


def near_misses(gold):
    """(rule, right answer, text) of texts whose answer does not mean the same as the right answer."""
    box, number = r"\boxed{%s}", g.as_fraction(gold)
    if number != 0 and re.match(r"-?(\d|\.|\\d?frac|\\sqrt|\\pi)", gold) and "_" not in gold and "pm" not in gold:
        yield "sign", gold, box % (gold[1:] if gold[0] == "-" else f"-{gold}")
    for digit in re.finditer(r"\d", gold):
        yield "digit", gold, box % (gold[: digit.start()] + str((int(digit[0]) + 1) % 10) + gold[digit.end() :])
    fraction = re.search(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}", gold)
    if fraction and fraction[1] != fraction[2]:
        swapped = r"\frac{%s}{%s}" % (fraction[2], fraction[1])
        yield "swapped", gold, box % (gold[: fraction.start()] + swapped + gold[fraction.end() :])
    pair = re.fullmatch(r"((?:\\left)?[(\[] ?)([^,]*),([^,]*?)( ?(?:\\right)?[)\]])", gold)
    if pair and pair[2].strip() != pair[3].strip():
        yield "swapped", gold, box % f"{pair[1]}{pair[3]}, {pair[2]}{pair[4]}"
    if number and "text" not in gold:
        for right, other in (("cm", "m"), ("km", "m"), ("hours", "minutes"), ("dollars", "cents"), ("apples", "pears")):
            yield "unit", r"%s \text{ %s}" % (gold, right), box % (r"%s \text{ %s}" % (gold, other))
    name = re.fullmatch(r"\\text\{(\w{4,})\}", gold)
    letters = name[1] if name else "".join("ABCDEFGHIJ"[int(x)] for x in gold) if re.fullmatch(r"\d{3,}", gold) else ""
    for i in range(len(letters) - 1):  # names, and orders of letters made of digits
        other = letters[:i] + letters[i + 1] + letters[i] + letters[i + 2 :]
        if other != letters:
            yield "letters", r"\text{%s}" % letters, box % (r"\text{%s}" % other)
    if interval := re.fullmatch(r"(?:\\left)?([(\[])(?!-\\infty)(.*,.*?)(?:\\right)?([)\]])", gold):
        yield "bracket", gold, box % ("(["[interval[1] == "("] + interval[2] + interval[3])


def plain_math_verify(gold, text):
    from math_verify import parse, verify

    try:
        return bool(verify(parse(f"${gold}$"), parse(text)))
    except Exception:  # it is to be compared, whatever it raises
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with some of these: " + ", ".join(f"{name}.jsonl" for name in SETS))
    parser.add_argument("--show", action="store_true", help="print each pair that grade.py judges wrongly")
    args = parser.parse_args()
    import logging

    logging.disable()
    golds = right_answers(args.folder)
    cases = [("respelling", rule, gold, text, True) for gold in golds for rule, text in respellings(gold)]
    cases += [("near miss", rule, right, text, False) for gold in golds for rule, right, text in near_misses(gold)]
    grader, counts, uneven = g.Grader(), defaultdict(lambda: [0, 0, 0]), 0
    pairs = [(gold, g.extract_answer(text)) for _, _, gold, text, _ in cases]
    grader.grade([*pairs, *((b, a) for a, b in pairs)], "both ways")
    for (kind, rule, gold, text, expected), (a, b) in zip(tqdm(cases, "math-verify"), pairs):
        ours, theirs = grader.equal(a, b) == expected, plain_math_verify(gold, text) == expected
        uneven += grader.equal(a, b) != grader.equal(b, a)
        for key in ((kind, rule), (kind, "all")):
            counts[key] = [n + x for n, x in zip(counts[key], (1, ours, theirs))]
        if args.show and not ours:
            print(json.dumps([kind, rule, gold, text], ensure_ascii=False))
    grader.close()
    print(f"{len(golds)} right answers; judged rightly by     grade.py  math-verify")
    for (kind, rule), (n, ours, theirs) in sorted(counts.items(), key=lambda item: (item[0][0], item[0][1] == "all")):
        print(f"{kind:10} {rule:10} {n:8,} {ours / n:20.2%} {theirs / n:12.2%}")
    print(f"{uneven} of {len(cases):,} pairs are judged otherwise in the other order; {len(grader.stuck)} were stuck")


if __name__ == "__main__":
    command_line(main)
