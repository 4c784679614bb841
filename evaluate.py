"""Grade answers, vote over them, and measure the Refinement Gap.

    python evaluate.py runs/tiny/before.refined.jsonl runs/tiny/after.refined.jsonl --out runs/tiny

Each file (made by refine.py) becomes one row of the table, of `report.json` and of `figure.png`.
Reading order: files, answers, grading, voting, the gap, the report. The other four files import the
grading and the file reading from here; this file imports none of them.

What is measured, for problems with N candidates each, on the same candidates throughout:

    pass@1    the share of candidates that are right: what one sample is worth
    pass@N    at least one of the N is right: what a perfect judge of candidates would reach
    maj@N     the answer that most candidates gave is right, where answers that mean the same are one
              (1/2 = 0.5); a tie shares the credit, a candidate without an answer casts no vote
    refined   the refinement is right (the mean, where a problem has several)
    gap       refined - maj@N, and the same relative to maj@N (the paper's Refinement Gap), with a 95%
              paired bootstrap interval over problems

Voting on raw strings instead would split equal answers, understate voting and flatter the gap.
"""

import argparse
import contextlib
import json
import math
import os
import re
import select
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

# ------------------------------------------------------------------------------------------------
# Files and errors, shared by all stages


class InputError(Exception):
    """Something that the user gave cannot be used. The message is one line: the thing, its value, the next step."""


def command_line(main):
    """Run main(): exit code 2 and one line for an InputError, 130 for Ctrl-C, a traceback for our own mistakes."""
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def read_jsonl(path, keys=()):
    """Rows of a JSONL file, as dicts that have all of `keys` and, if they have one, a unique id."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})")
    rows, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise InputError(f"{path}, line {number}: not valid JSON ({e})")
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: not a JSON object but {line.strip()[:40]!r}")
        for key in keys:
            if key not in row:
                raise InputError(f"{path}, line {number}: no {key!r} in it, only {', '.join(row)}")
        if row.get("id") is not None and seen.setdefault(str(row["id"]), number) != number:
            raise InputError(f"{path}, line {number}: id {row['id']!r} already stands on line {seen[str(row['id'])]}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return rows


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})")


def meta_path(out):
    """The record beside an output: x.candidates.jsonl -> x.candidates.meta.json, folder -> folder.meta.json."""
    return Path(str(out).removesuffix(".jsonl") + ".meta.json")


def write_json(path, data):
    """Write `data` to `path` so that a reader sees the old file or the new one, never half of it."""
    partial = Path(f"{path}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); choose another --out")


# ------------------------------------------------------------------------------------------------
# From a text to its answer


def strip_thinking(text, prompt=""):
    """The part of a completion that is meant for the reader: without <think>...</think>.

    Some templates open the thought themselves, at the end of `prompt`. A thought that was cut off before
    </think> takes all that follows with it.
    """
    if prompt.rstrip().endswith("<think>"):
        text = "<think>" + text
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    text = text.partition("<think>")[0]  # a thought never closed
    return text.rpartition("</think>")[2].strip()  # one never opened


def extract_answer(text):
    r"""The content of the last \boxed{...} of a text, or None.

    A last box that is not closed (cut off by the length limit) is no answer: an earlier box held some
    intermediate result, and taking it would turn accidents into answers.
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, i = 0, start + len("\\boxed")
    while i < len(text):
        if text[i] == "\\":  # \{ and \} are characters of the answer
            i += 1
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start + len("\\boxed{") : i].strip() or None
        i += 1
    return None


def answer_of(completion, prompt=""):
    """The answer in a candidate or a refinement (a dict with "text"), or None."""
    return extract_answer(strip_thinking(completion["text"], prompt))


# ------------------------------------------------------------------------------------------------
# Grading


NUMBER = re.compile(
    r"([+-]?)(?:(\d{1,40})(?:\.(\d{1,40}))?"  # 27, 27.0
    r"|\\[dt]?frac\{(\d{1,40})\}\{(\d{1,40})\}|(\d{1,40})/(\d{1,40}))"  # \frac{1}{2}, 1/2
)


def plain_number(text):
    """An integer, a decimal or a fraction as an exact Fraction, else None: `27.0`, `1/2`, `\\frac{1}{2}`, `1,000`."""
    text = text.strip().strip("$").strip()
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    match = NUMBER.fullmatch(text)
    if not match:
        return None
    sign, whole, decimals, *fraction = match.groups()
    if whole is not None:
        value = Fraction(f"{whole}.{decimals or 0}")
    else:
        top, bottom = [int(part) for part in fraction if part is not None]
        if bottom == 0:
            return None
        value = Fraction(top, bottom)
    return -value if sign == "-" else value


class Grader:
    """Says whether two answers mean the same. Plain numbers are compared exactly, all else by math-verify.

    math-verify hands the answer to a computer algebra system, which `10^{10^{10}}` keeps busy for ever; its
    own time limit needs signals and cannot stop C code. So it runs in a process of its own, which is
    killed when `limit` seconds have passed, and started again for the next answer. An answer that costs
    its time limit is not equal; `timeouts` counts them.
    """

    def __init__(self, limit=5.0):
        self.limit, self.timeouts, self.worker, self.known = limit, 0, None, {}

    def equal(self, gold, answer):
        """Is `answer` right, given the right answer `gold`? The order matters to math-verify. None is never right."""
        if gold is None or answer is None:
            return False
        gold, answer = str(gold).strip(), str(answer).strip()
        if gold == answer:
            return True
        a, b = plain_number(gold), plain_number(answer)
        if a is not None and b is not None:
            return a == b
        if (gold, answer) not in self.known:
            self.known[gold, answer] = self.ask(gold, answer)
        return self.known[gold, answer]

    def ask(self, gold, answer):
        if self.worker is None:
            command = [sys.executable, __file__, "--grading-worker"]
            self.worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            if self.reply(60) != b"ready\n":
                self.close()
                raise RuntimeError("the grading process did not start; is math-verify installed?")
        try:
            self.worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            reply = self.reply(self.limit)
        except BrokenPipeError:
            reply = None
        if reply not in (b"1\n", b"0\n"):  # too slow, out of memory, or crashed
            self.timeouts += 1
            self.close()
        return reply == b"1\n"

    def reply(self, seconds):
        ready, _, _ = select.select([self.worker.stdout], [], [], seconds)
        return self.worker.stdout.readline() if ready else None

    def close(self):
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()
            self.worker.stdin.close()
            self.worker.stdout.close()
            self.worker = None


def grading_worker():
    """The other end of Grader.ask: reads a line [gold, answer], writes 1 or 0."""
    import logging
    import resource

    from math_verify import parse, verify

    logging.disable()
    # An expression that wants the whole memory gets a MemoryError instead.
    with contextlib.suppress(ValueError, OSError):  # where the system allows a limit
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing else that is printed may look like a reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # The parent process keeps the time: SIGALRM, math-verify's own way, fails in silence.
        gold, answer = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line))
        print(int(verify(gold, answer, timeout_seconds=None)), file=replies, flush=True)


# ------------------------------------------------------------------------------------------------
# Voting


def classes(answers, grader):
    """Number the classes of equal answers: ["0.5", "1/2", None, "3"] -> [0, 0, None, 1].

    Answers are compared in sorted order with one member of each class, so that neither the order of the
    candidates nor an equality that is not quite transitive changes the outcome.
    """
    members, number = [], {}
    for answer in sorted({a for a in answers if a is not None}):
        for i, member in enumerate(members):
            if grader.equal(member, answer) or grader.equal(answer, member):
                number[answer] = i
                break
        else:
            number[answer] = len(members)
            members.append(answer)
    return [None if a is None else number[a] for a in answers]


def majority(votes, right):
    """The credit of majority voting: votes are class numbers or None, right[i] says whether vote i is right.

    With several classes at the top each gets its share, which is what a coin toss would get on average.
    """
    cast = [v for v in votes if v is not None]
    if not cast:
        return 0.0
    most = max(cast.count(v) for v in set(cast))
    top = [v for v in set(cast) if cast.count(v) == most]
    # A class is right if its members are; should the grader see them differently, it is right in part.
    return sum(r for v, r in zip(votes, right) if v in top) / (most * len(top))


def pass_at_k(n, n_right, k):
    """The chance that k of n candidates, drawn without putting back, hold a right one (arXiv 2107.03374)."""
    return 1.0 - math.comb(n - n_right, k) / math.comb(n, k)


# ------------------------------------------------------------------------------------------------
# The gap


def bootstrap_interval(differences, draws=10_000, seed=0):
    """95% interval of the mean of `differences` [P], one a problem: problems are drawn again with replacement.

    The differences are paired, refined minus vote on the same candidates, which takes out what makes
    problems hard for both.
    """
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, draws, 100):
        means.append(differences[rng.integers(0, len(differences), (100, len(differences)))].mean(1))  # [100]
    return [float(x) for x in np.quantile(np.concatenate(means), [0.025, 0.975])]


def grade(problem, grader):
    """One row of a refined file -> what counts about it, as a dict of numbers."""
    candidates, refinements = problem["candidates"], problem["refinements"]
    answers = [answer_of(c, problem.get("prompt", "")) for c in candidates]
    right = [grader.equal(problem["answer"], a) for a in answers]
    refined = [grader.equal(problem["answer"], answer_of(r, r.get("prompt", ""))) for r in refinements]
    return {
        "right": sum(right),
        "maj": majority(classes(answers, grader), right),
        "refined": sum(refined) / len(refined),
        "candidate_tokens": sum(c["n_tokens"] for c in candidates),
        "refinement_tokens": sum(r["n_tokens"] for r in refinements),
    }


def read_refined(path):
    """The problems of a refined file that can be graded. InputError where it is not such a file, or of unequal N."""
    rows = read_jsonl(path, keys=("id", "problem", "answer", "candidates", "refinements"))
    for row in rows:
        for key in ("candidates", "refinements"):
            if not row[key] or not all({"text", "n_tokens"} <= set(x) for x in row[key]):
                raise InputError(f"{path}, id {row['id']!r}: its {key!r} are empty or lack text and n_tokens")
        if len(row["candidates"]) != len(rows[0]["candidates"]):
            raise InputError(
                f"{path}, id {row['id']!r}: {len(row['candidates'])} candidates, but {len(rows[0]['candidates'])} "
                "in the first row; pass@N and maj@N need the same N for all"
            )
    graded = [row for row in rows if row["answer"] is not None]
    if len(graded) < len(rows):
        print(f"{path}: {len(rows) - len(graded)} of {len(rows)} problems have no answer to grade against, left out")
    if not graded:
        raise InputError(f"{path}: no problem has an answer to grade against")
    meta = meta_path(path)
    if meta.exists() and not read_json(meta).get("complete", True):
        print(f"{path}: not complete yet, {len(rows)} problems so far; run the command that makes it again")
    return graded


def report_row(name, graded, n):
    """The statistics of one file: `graded` is a list of grade()'s dicts."""
    right, maj, refined = (np.array([g[key] for g in graded], dtype=float) for key in ("right", "maj", "refined"))
    all_wrong = right == 0
    rescued = float(refined[all_wrong].sum())
    points = float((refined - maj).mean())
    return {
        "name": name,
        "problems": len(graded),
        "n": n,
        "pass@1": float(right.mean() / n),
        f"pass@{n}": float(np.mean([pass_at_k(n, int(c), n) for c in right])),
        f"maj@{n}": float(maj.mean()),
        "refined": float(refined.mean()),
        "gap": {
            "points": points,
            "relative": points / float(maj.mean()) if maj.any() else None,
            "ci95": bootstrap_interval(refined - maj),
        },
        "rescued": {"all_wrong": [int(rescued) if rescued.is_integer() else rescued, int(all_wrong.sum())]},
        "tokens": {
            "candidates": float(np.mean([g["candidate_tokens"] for g in graded])),
            "refinement": float(np.mean([g["refinement_tokens"] for g in graded])),
        },
    }


# ------------------------------------------------------------------------------------------------
# The report


def table(rows):
    """The rows as text, a line each."""
    n = str(rows[0]["n"]) if len({row["n"] for row in rows}) == 1 else "N"
    head = ["", "problems", "pass@1", f"pass@{n}", f"maj@{n}", "refined", "gap, points [95%]", "relative", "rescued"]
    lines = [[*head, "tokens"]]
    for row in rows:
        gap, (rescued, all_wrong) = row["gap"], row["rescued"]["all_wrong"]
        low, high = gap["ci95"]
        rates = (row["pass@1"], row[f"pass@{row['n']}"], row[f"maj@{row['n']}"], row["refined"])
        lines.append([row["name"], str(row["problems"]), *(f"{rate:.1%}" for rate in rates)])
        lines[-1].append(f"{100 * gap['points']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        lines[-1].append("-" if gap["relative"] is None else f"{gap['relative']:+.1%}")
        lines[-1].append(f"{rescued:g}/{all_wrong}")
        lines[-1].append(f"{row['tokens']['candidates']:.0f} + {row['tokens']['refinement']:.0f}")
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)
    note = "rescued: refined right where all candidates are wrong; tokens: candidates + refinement, a problem"
    return f"{text}\n({note})"


def figure(rows, path):
    """Draw the rows: on the left the four accuracies, on the right the gap with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = rows[0]["n"]
    at_n = f"@{n}" if all(row["n"] == n for row in rows) else "@N"
    # Grey to black, and a shape each: readable in print and without colours; the refined one stands out.
    styles = {
        "pass@1": ("o", "0.65"),
        f"maj{at_n}": ("s", "0.35"),
        f"pass{at_n}": ("^", "0.8"),
        "refined": ("D", "#0b5fa5"),
    }
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1.9 + 0.62 * len(rows)), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    for y, row in enumerate(rows):
        values = [row["pass@1"], row[f"maj@{row['n']}"], row[f"pass@{row['n']}"], row["refined"]]
        left.plot([100 * min(values), 100 * max(values)], [y, y], color="0.85", linewidth=1, zorder=1)
        for (label, (marker, colour)), value in zip(styles.items(), values):
            left.plot(
                100 * value,
                y,
                marker,
                color=colour,
                markersize=9,
                markeredgecolor="black",
                markeredgewidth=0.6,
                label=label if y == 0 else None,
                linestyle="none",
                zorder=3 if label == "refined" else 2,
            )
        low, high = (100 * x for x in row["gap"]["ci95"])
        points = 100 * row["gap"]["points"]
        right.errorbar(
            points, y, xerr=[[points - low], [high - points]], fmt="D", color="#0b5fa5", capsize=4, markersize=7
        )
        right.annotate(f"{points:+.1f}", (points, y), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    left.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], xlim=(-2, 102))
    left.set(xlabel="problems solved (%)", ylim=(len(rows) - 0.4, -0.6), title="Accuracy")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.12), ncols=4, frameon=False, columnspacing=1.2)
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel=f"refined - maj{at_n} (points, 95% interval)", title="Refinement Gap")
    for axis in (left, right):
        axis.grid(axis="x", color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="a refined file, made by refine.py; one table row each"
    )
    parser.add_argument("--out", default=".", help="folder for report.json and figure.png")
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds for the comparison of two answers")
    args = parser.parse_args(argv)

    from tqdm import tqdm

    problems = {path: read_refined(path) for path in args.files}
    grader, rows, started = Grader(args.time_limit), [], time.time()
    for path in args.files:
        graded = [grade(problem, grader) for problem in tqdm(problems[path], desc=f"grade {Path(path).name}")]
        name = Path(path).name.removesuffix(".jsonl").removesuffix(".refined")
        rows.append(report_row(name, graded, len(problems[path][0]["candidates"])))
    grader.close()
    write_json(Path(args.out) / "report.json", {"rows": rows})
    try:
        figure(rows, Path(args.out) / "figure.png")
    except OSError as e:
        raise InputError(f"{args.out}/figure.png: cannot be written ({e.strerror}); choose another --out")
    print(f"\n{table(rows)}\n")
    if grader.timeouts:
        print(f"{grader.timeouts} comparisons took longer than {args.time_limit:g} s or crashed, and count as unequal")
    print(f"{args.out}/report.json and {args.out}/figure.png written ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    if sys.argv[1:] == ["--grading-worker"]:
        grading_worker()
    else:
        command_line(main)
