"""Grade answers, compare ways to aggregate candidates, and measure the Refinement Gap.

    python evaluate.py before.refined.jsonl after.refined.jsonl --out runs/tiny    one row a file
    python evaluate.py mine=seed0.refined.jsonl,seed1.refined.jsonl                several seeds, one row
    python evaluate.py --show test-7 after.refined.jsonl                           one problem, on the terminal
    python evaluate.py --suite math --model qwen-1.5b --n 8 --limit 100            sample, refine and report

Writes report.json, report.md and figures. Reading order: files, answers, grading, voting, estimators, the
gap, the report, figures, the suite. The other four files import the grading and the file reading from
here; this file imports none of them.

What is compared, for problems with N candidates and K refinements each, on the same candidates throughout:

    pass@k     at least one of k candidates is right: what a perfect judge of k would reach
    maj@k      the answer that most of k candidates gave is right, where answers that mean the same are one
               (1/2 = 0.5); a tie shares the credit, a candidate without an answer casts no vote
    weighted   the same for all N, and each vote counts as much as the candidate is probable
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
import functools
import itertools
import json
import math
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections import deque
from dataclasses import dataclass
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


def each_row(path, keys=()):
    """The rows of a JSONL file, one at a time: dicts that have all of `keys` and, if they have one, a unique id."""
    seen, rows = {}, 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode())
                except UnicodeDecodeError as e:
                    raise InputError(f"{path}, line {number}: not UTF-8 text ({e.reason} at byte {e.start})")
                except ValueError as e:
                    torn = "" if line.endswith(b"\n") else "; the file ends in the middle of it"
                    raise InputError(f"{path}, line {number}: not valid JSON ({e}){torn}")
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: not a JSON object but {line.decode().strip()[:40]!r}")
                for key in keys:
                    if key not in row or (key == "id" and row["id"] is None):
                        raise InputError(f"{path}, line {number}: no {key!r} in it, only {', '.join(row)}")
                name = row.get("id")
                if name is not None and (first := seen.setdefault(str(name), number)) != number:
                    raise InputError(f"{path}, line {number}: id {name!r} already stands on line {first}")
                rows += 1
                yield row
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})")
    if not rows:
        raise InputError(f"{path}: no rows in it")


def read_jsonl(path, keys=()):
    """All rows of a JSONL file, as `each_row` gives them."""
    return list(each_row(path, keys))


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


TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)"
NUMBER = re.compile(
    r"([+-]?)(?:(?=\.?\d)(\d{0,40})\.?(\d{0,40})"  # 27, 27.0, .5
    r"(?:(?:[eE]|\s*(?:\\times|\\cdot)\s*10\s*\^\s*)(\{[+-]?\d{1,3}\}|[+-]?\d{1,3}))?"  # 1e-5, 1 \times 10^{-5}
    r"|\\frac\{([+-]?\d{1,40})\}\{(\d{1,40})\}|\\frac\s*(\d)\s*(\d)|(\d{1,40})/(\d{1,40}))"  # \frac{1}{2}, \frac12, 1/2
)
# What math-verify misreads -> something that it does not. E and gamma become numbers and functions and take what
# stands around them along; in the derivative of an unknown, 0 = 0 is left of both sides of an equation.
MISREAD = (
    (re.compile(r"(?<![A-Za-z\\])E(?=\s*_)"), r"\\Xi"),
    (re.compile(r"\\gamma(?![a-z])"), r"\\Upsilon"),
    (re.compile(r"\\frac\{\s*d\s*(\\?[A-Za-z]+)\s*\}\{\s*d\s*(\\?[A-Za-z]+)\s*\}"), r"\\Theta_{\1,\2}"),
)


@functools.lru_cache(1 << 16)
def tidy(text):
    """An answer without what changes nothing about it: dollar signs, sizes of brackets, thin spaces, a last period."""
    text = re.sub(r"\\?\$|\\(?:left|right)(?![a-z])|(?<!\\)\\[!,;:]|\\displaystyle|\\limits", "", str(text))
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text).replace("{,}", ",")
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").strip()


@functools.lru_cache(1 << 16)
def plain_number(text):
    """An integer, a decimal or a fraction as an exact Fraction, else None: `27.0`, `1/2`, `\\frac{1}{2}`, `1,000`."""
    text = tidy(text)
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    match = NUMBER.fullmatch(text)
    if not match:
        return None
    sign, whole, decimals, power, *fraction = match.groups()
    if whole is not None:
        value = Fraction(f"{whole or 0}.{decimals or 0}") * Fraction(10) ** int((power or "0").strip("{}"))
    else:
        top, bottom = (int(part) for part in fraction if part is not None)
        if bottom == 0:
            return None
        value = Fraction(top, bottom)
    return -value if sign == "-" else value


def truths(text):
    r"""A truth assignment, `A: knight, \text{B} is a knave` -> {"a": "knight", "b": "knave"}, else None."""
    plain = re.sub(TEXT + r"|\\quad|\\[ \\]|[{}~&()]", " ", text).lower()
    found = re.findall(r"(\w+)\s*(?:[:=]|is an?\b|is\b)\s*(knight|knave)\b", plain)
    rest = re.sub(r"(\w+)\s*(?:[:=]|is an?\b|is\b)\s*(knight|knave)\b", "", plain)
    kinds = dict(found)
    return kinds if found and set(found) == set(kinds.items()) and not re.sub(r"and|[\s,;.]", "", rest) else None


def choice(text):
    r"""The letter of a multiple choice, `C`, `(C)`, `\text{C.}`, `(C) 12`, else None."""
    text = re.sub(TEXT + r"\s*\{(.*?)\}", r"\1", text).strip()
    match = re.fullmatch(r"\(?([A-J])[).:]?|\(([A-J])\)\s.*", text)
    return match and (match[1] or match[2])


@functools.lru_cache(1 << 18)
def by_form(gold, answer):
    """True or False where the form of two tidy answers decides whether they are equal, None where algebra must."""
    if gold == answer:
        return True
    if max(len(gold), len(answer)) > 2000:  # babble, and a strain on all that follows
        return False
    a, b = plain_number(gold), plain_number(answer)
    if a is not None and b is not None:
        return a == b
    if kinds := truths(gold):
        return kinds == truths(answer)
    if (letter := choice(gold)) and (other := choice(answer)):
        return letter == other
    lists = [[plain_number(part) for part in re.split(r"[,;]", text)] for text in (gold, answer)]
    if all(len(numbers) > 1 and None not in numbers for numbers in lists):
        return sorted(lists[0]) == sorted(lists[1])
    # math-verify reads 52_8 as 52 and cm^3 as cm^2: the base and the power must be the same where both have one.
    for mark in (r"\d\s*_\s*\{?(\d+)\}?", TEXT + r"\s*\{[^{}]*\}\s*\^\s*\{?(\d)\}?"):
        ends = [re.search(mark + r"$", text) for text in (gold, answer)]
        if all(ends) and ends[0][1] != ends[1][1]:
            return False
    return None


class Grader:
    """Says whether two answers mean the same: by their form where that decides it, else by math-verify.

    math-verify hands the answer to a computer algebra system, which `10^{10^{10}}` keeps busy for ever, or
    which crashes. So it runs in processes of its own, one a core, that the system kills after `limit`
    seconds; another takes the place of a dead one. Such an answer is not equal; `stuck` holds these pairs.
    `cache` is a file to which each grade is added as it comes; the next report grades nothing twice.
    """

    def __init__(self, limit=5.0, cache=None):
        self.limit, self.known, self.stuck, self.workers = limit, {}, set(), []
        self.file = None
        if cache is not None:
            self.open(Path(cache))

    def open(self, cache):
        from importlib.metadata import version

        header = ["math-verify", version("math-verify"), "seconds", self.limit]
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(cache, "a+b", buffering=0)  # a line is one write: whole or not at all
            self.file.seek(0)
            content = self.file.read()
            whole = content[: content.rfind(b"\n") + 1]
            lines = whole.decode().split("\n")[:-1]
            if content and not content.startswith(b'["math-verify"'):
                raise ValueError("not made by evaluate.py")
            if not lines or json.loads(lines[0]) != header:  # of another version or limit
                whole, lines = (json.dumps(header) + "\n").encode(), [""]
                self.file.truncate(0)
                self.file.write(whole)
            self.file.truncate(len(whole))
            self.known = {(gold, answer): grade for gold, answer, grade in map(json.loads, lines[1:])}
        except (OSError, ValueError) as e:
            raise InputError(f"{cache}: cannot be used for grades ({e}); delete it or choose another --out")

    def equal(self, gold, answer):
        """Is `answer` right, given the right answer `gold`? The order matters to math-verify. None is never right."""
        if gold is None or answer is None:
            return False
        gold, answer = tidy(gold), tidy(answer)
        if (decided := by_form(gold, answer)) is not None:
            return decided
        if (gold, answer) not in self.known:
            self.grade([(gold, answer)])
        if self.known[gold, answer] is None:
            self.stuck.add((gold, answer))
        return bool(self.known[gold, answer])

    def grade(self, pairs, progress=None):
        """Ask math-verify about all `pairs` of (gold, answer) that it has not been asked about, in parallel."""
        pairs = {(tidy(gold), tidy(answer)) for gold, answer in pairs}
        todo = deque(sorted(pair for pair in pairs if pair not in self.known and by_form(*pair) is None))
        total, busy = len(todo), {}  # file descriptor -> (worker, pair)
        while todo or busy:
            while todo and len(busy) < (os.cpu_count() or 1):
                worker, pair = self.workers.pop() if self.workers else self.start(), todo.popleft()
                try:
                    worker.stdin.write(json.dumps(pair).encode() + b"\n")
                    busy[worker.stdout.fileno()] = worker, pair
                except BrokenPipeError:  # it died before it saw this pair
                    self.stop(worker)
                    todo.appendleft(pair)
            for descriptor in select.select(list(busy), [], [])[0]:
                worker, pair = busy.pop(descriptor)
                reply = worker.stdout.readline()
                self.known[pair] = {b"1\n": True, b"0\n": False}.get(reply)
                if self.known[pair] is None:  # too slow, out of memory, or crashed
                    self.stop(worker)
                else:
                    self.workers.append(worker)
                if self.file:
                    self.file.write((json.dumps([*pair, self.known[pair]]) + "\n").encode())
                if progress:
                    progress(total - len(todo) - len(busy), total)

    def start(self):
        command = [sys.executable, __file__, "--grading-worker", str(self.limit)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        if worker.stdout.readline() != b"ready\n":
            self.stop(worker)
            raise RuntimeError("a grading process did not start; is math-verify installed?")
        return worker

    def stop(self, worker):
        worker.kill()
        worker.wait()
        worker.stdin.close()
        worker.stdout.close()

    def close(self):
        while self.workers:
            self.stop(self.workers.pop())
        if self.file:
            self.file.close()


def grading_worker(limit):
    """The other end of Grader.grade: reads a line [gold, answer], writes 1 or 0."""
    import logging
    import resource

    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, UnevaluatedExpr

    logging.disable()
    # An expression that wants the whole memory gets a MemoryError instead, where the system allows a limit.
    try:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    except (ValueError, OSError):
        pass
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing else that is printed may look like a reply

    @functools.lru_cache(4096)
    def read(text):
        for pattern, replacement in MISREAD:
            text = pattern.sub(replacement, text)
        # LaTeX only: its other reader takes the last number of what it cannot read for the whole.
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)

    @functools.lru_cache(4096)
    def value(text):
        """Of what is a number and no percentage, its size; else nan."""
        first = (read(text) or [None])[0]
        number = isinstance(first, Expr) and first.is_number and not first.has(UnevaluatedExpr)
        try:
            return complex(first) if number else math.nan
        except Exception:  # sympy raises many kinds
            return math.nan

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # Nobody handles this alarm, so the system ends the process, C code and all. math-verify's own time limit
        # is a Python handler, which C code never comes back to run, and fails in silence outside the main thread.
        signal.setitimer(signal.ITIMER_REAL, limit)
        pair = json.loads(line)
        a, b = map(value, pair)
        # Numbers that differ this much need no algebra, which takes its time to fail.
        far = abs(a - b) > 1e-3 * max(1, abs(a), abs(b))
        equal = not far and verify(*map(read, pair), timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(equal), file=replies, flush=True)


# ------------------------------------------------------------------------------------------------
# Voting


def canonical(answer):
    """What stands for an answer and for those that are plainly equal to it: an exact number or a tidy text."""
    number = plain_number(answer)
    return tidy(answer) if number is None else number


def classes(gold, answers, grader, more=()):
    """Number the classes of equal answers: gold "1/2", ["0.5", "3", None, "3.0", "4"] -> [0, 1, -1, 1, 2].

    Class 0 is right, -1 casts no vote. Wrong answers are compared in sorted order with one member of each
    class, so that neither the order of the candidates nor an equality that is not quite transitive changes
    the outcome. `more`: answers (of refinements) that are numbered after these, and do not change their classes.
    """
    number, members = {}, []
    for answer in itertools.chain(*(sorted(set(group) - {None}) for group in (answers, more))):
        if (key := canonical(answer)) in number:
            continue
        if grader.equal(gold, answer):
            number[key] = 0
            continue
        same = (i for i, m in enumerate(members, 1) if grader.equal(m, answer) or grader.equal(answer, m))
        number[key] = next(same, len(members) + 1)
        if number[key] > len(members):
            members.append(answer)
    return [-1 if a is None else number[canonical(a)] for a in (*answers, *more)]


def class_sums(votes, weights):
    """votes [R, N] class numbers, weights [R, N] -> [R, classes], what each class gets; -1 gets nothing."""
    rows, width = len(votes), max(int(votes.max()), 0) + 1
    row, _ = cast = (votes >= 0).nonzero()
    sums = np.bincount(row * width + votes[cast], weights=weights[cast], minlength=rows * width)
    return sums.reshape(rows, width)


def vote(votes, weights=None):
    """The credit of voting: votes [R, N] are class numbers -> [R], 1 where class 0 (right) gets the most.

    With several classes at the top each gets its share, which is what a coin toss would get on average.
    """
    sums = class_sums(votes, np.ones(votes.shape) if weights is None else weights)
    most = sums.max(1, keepdims=True)
    top = (sums >= most * (1 - 1e-9)) & (most > 0)  # equal up to rounding
    return top[:, 0] / np.maximum(top.sum(1), 1)


def best(votes, scores):
    """The credit of the candidate with the highest score, of those with an answer; equal scores share. -> [R]"""
    scores = np.where(votes >= 0, scores, -np.inf)
    top = (scores == scores.max(1, keepdims=True)) & (votes >= 0)
    return (top & (votes == 0)).sum(1) / np.maximum(top.sum(1), 1)


def borda(certainty, power=0.5):
    """Votes by rank, arXiv 2502.18581: certainty [R, N] -> [R, N], (N - rank + 1)^power, rank 1 the most certain.

    Power 0 is the plain vote; 0.5 is the default of the paper's code. Equal certainties share their ranks.
    """
    below = (certainty[:, None, :] < certainty[:, :, None]).sum(2)  # [R, N]
    same = (certainty[:, None, :] == certainty[:, :, None]).sum(2)
    return (below + (same + 1) / 2) ** power


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
    return (result[:, 1:] / ways[n, 1:])[where.reshape(-1)]


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
        times = np.bincount(index.ravel(), minlength=size * problems).reshape(size, problems)
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
    term, tail, total = 1, 0, better + worse
    for i in range(min(better, worse) + 1):  # C(total, 0) + C(total, 1) + ...
        tail += term
        term = term * (total - i) // (i + 1)
    return better, worse, min(1.0, float(Fraction(2 * tail, 2**total)))


def spearman(x, y):
    """Rank correlation of x and y [n] and its 95% interval (Bonett and Wright 2000), over models as a sample.

    None for fewer than 3, or where one of them is constant; no interval for fewer than 4. A perfect order
    counts as half a swap of neighbours less in the interval, which would have no width otherwise.
    """

    def ranks(values):  # equal values share the mean of their ranks
        values = np.asarray(values, dtype=float)
        return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) + 1) / 2

    n, a, b = len(x), ranks(x), ranks(y)
    if n < 3 or a.std() == 0 or b.std() == 0:
        return {"models": n, "spearman": None, "ci95": None}
    r = float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
    if n < 4:
        return {"models": n, "spearman": r, "ci95": None}
    bound = 1 - 6 / (n**3 - n)
    z = math.atanh(min(max(r, -bound), bound))
    half = 1.96 * math.sqrt((1 + r * r / 2) / (n - 3))
    return {"models": n, "spearman": r, "ci95": [min(r, math.tanh(z - half)), max(r, math.tanh(z + half))]}


# ------------------------------------------------------------------------------------------------
# The gap


@dataclass
class Outcomes:
    """What counts about the answers of S files (seeds) to the same P problems, N candidates and K refinements each.

    A number that a file does not have is nan.
    """

    votes: np.ndarray  # [S, P, N] classes of equal answers: 0 right, -1 none
    refined: np.ndarray  # [S, P, K] in the same classes
    tokens: np.ndarray  # [S, P, N] generated
    logprob: np.ndarray  # [S, P, N] of the whole candidate
    certainty: np.ndarray  # [S, P, N]
    score: np.ndarray  # [S, P, N]
    cut: np.ndarray  # [S, P, N] ended by the length limit
    prompt_tokens: np.ndarray  # [S, P, 1]
    refined_tokens: np.ndarray  # [S, P, K]
    refined_cut: np.ndarray  # [S, P, K]
    refined_prompt_tokens: np.ndarray  # [S, P, K]
    order: np.ndarray  # [S, P, K, N]: which candidate stood at which place of the prompt, -1 for none


def read_refined(path):
    """A refined file -> {id: what counts about the problem}, for problems that can be graded.

    Texts are let go as soon as their answers are found: files are larger than memory. InputError names the
    file and the row where it is not such a file, is mixed, or has unequal numbers of candidates or refinements.
    """
    problems, skipped, sizes = {}, 0, None
    for row in each_row(path, keys=("id", "problem", "answer", "candidates", "refinements")):
        where, candidates, refinements = f"{path}, id {row['id']!r}", row["candidates"], row["refinements"]
        for key in ("candidates", "refinements"):
            items = row[key] if isinstance(row[key], list) else []
            if not items or not all(isinstance(x, dict) and {"text", "n_tokens"} <= x.keys() for x in items):
                raise InputError(f"{where}: its {key!r} are empty or lack text and n_tokens")
        size = f"{len(candidates)} candidates and {len(refinements)} refinements"
        if (sizes := sizes or size) != size:
            first = f"{size}, but {sizes} in the first row"
            raise InputError(f"{where}: {first}; pass@k and maj@k need the same numbers for all")
        if row["answer"] is None:
            skipped += 1
            continue

        def numbers(items, *keys, where=where):
            values = [[item.get(key) for key in keys] for item in items]  # a missing one, None, becomes nan
            try:
                return np.array(values, dtype=float).T
            except (TypeError, ValueError):
                raise InputError(f"{where}: not all of its {', '.join(keys)} are numbers")

        order = np.full((len(refinements), len(candidates)), -1, dtype=np.int16)
        for places, refinement in zip(order, refinements):
            shown = refinement.get("order", [])
            if not set(shown) <= set(range(len(candidates))) or len(set(shown)) < len(shown):
                raise InputError(f"{where}: the order {shown} is not one of its {len(candidates)} candidates")
            places[: len(shown)] = shown
        ends = [[{"length": 1, "stop": 0}.get(x.get("finish_reason")) for x in y] for y in (candidates, refinements)]
        tokens, logprob, certainty, score = numbers(candidates, "n_tokens", "logprob", "self_certainty", "score")
        refined_tokens, refined_prompt_tokens = numbers(refinements, "n_tokens", "n_prompt_tokens")
        problems[str(row["id"])] = {
            "answer": str(row["answer"]),
            "answers": [answer_of(c, row.get("prompt", "")) for c in candidates],
            "refinements": [answer_of(r, r.get("prompt", "")) for r in refinements],
            "tokens": tokens,
            "logprob": logprob,
            "certainty": certainty,
            "score": score,
            "cut": np.array(ends[0], dtype=float),
            "prompt_tokens": numbers([row], "n_prompt_tokens")[0],
            "refined_tokens": refined_tokens,
            "refined_cut": np.array(ends[1], dtype=float),
            "refined_prompt_tokens": refined_prompt_tokens,
            "order": order,
        }
    if skipped:
        print(f"{path}: {skipped} of {skipped + len(problems)} problems have no answer to grade against, left out")
    if not problems:
        raise InputError(f"{path}: no problem has an answer to grade against")
    return problems


def check_same_problems(files):
    """InputError unless the files of one row, a list of (path, what read_refined gave), can be averaged over."""
    (first_path, first), *others = files
    for path, problems in others:
        for identity in problems.keys() ^ first.keys():
            raise InputError(f"{path}: id {identity!r} is not in both this file and {first_path}; one row needs both")
        for identity, problem in problems.items():
            if any(len(problem[key]) != len(first[identity][key]) for key in ("answers", "refinements")):
                raise InputError(f"{path}, id {identity!r}: more or fewer candidates or refinements than {first_path}")
            if problem["answer"] != first[identity]["answer"]:
                raise InputError(f"{path}, id {identity!r}: another right answer than in {first_path}")


def grade_files(files, grader, progress=None):
    """Several files about the same problems: a list of what read_refined gave -> Outcomes."""
    first, found = files[0], {}
    for i in first:
        both = ([a for problems in files for a in problems[i][key]] for key in ("answers", "refinements"))
        found[i] = (first[i]["answer"], *both)
    # math-verify is asked in two rounds, so that its processes have all there is to do at once: which answers are
    # right, and which of the wrong ones are the same.
    distinct = {
        i: {canonical(a): a for a in answers + more if a is not None} for i, (_, answers, more) in found.items()
    }
    grader.grade([(found[i][0], a) for i in first for a in distinct[i].values()], progress)
    wrong = [[a for a in distinct[i].values() if not grader.equal(found[i][0], a)] for i in first]
    grader.grade((pair for some in wrong for pair in itertools.permutations(some, 2)), progress)

    number = np.array([classes(gold, answers, grader, more) for gold, answers, more in found.values()], dtype=np.int16)
    _, answers, _ = next(iter(found.values()))  # number is [P, S * N + S * K]
    votes, refined = np.split(number, [len(answers)], 1)
    votes, refined = (part.reshape(len(first), len(files), -1).swapaxes(0, 1) for part in (votes, refined))
    arrays = {
        field.name: np.stack([np.stack([problems[i][field.name] for i in first]) for problems in files])
        for field in dataclasses.fields(Outcomes)[2:]
    }
    return Outcomes(votes=votes, refined=refined, **arrays)


def methods_of(x):
    """Outcomes -> {method: (credit [S, P], tokens generated for it [S, P])}; this file's docstring explains them."""
    (S, P, N), K = x.votes.shape, x.refined.shape[2]

    def rows(values):  # [S, P, n] -> [S * P, n]
        return values.reshape(S * P, -1)

    votes, refined, logprob = rows(x.votes), rows(x.refined), rows(x.logprob)
    candidates, refining = x.tokens.sum(2), x.refined_tokens.sum(2)
    found = {"pass@1": ((votes == 0).mean(1), candidates / N), "maj@N": (vote(votes), candidates)}
    if np.isfinite(logprob).all():
        found["weighted"] = vote(votes, np.exp(logprob - logprob.max(1, keepdims=True))), candidates
        found["logprob"] = best(votes, logprob / rows(x.tokens)), candidates
    if np.isfinite(x.certainty).all():
        found["certainty"] = vote(votes, borda(rows(x.certainty))), candidates
    if np.isfinite(x.score).all():
        found["score"] = best(votes, rows(x.score)), candidates
    found["refined"] = (refined == 0).mean(1), candidates + refining / K
    if K > 1:
        found["refmaj"] = vote(refined), candidates + refining
    found["union"] = vote(np.concatenate([votes, refined], 1)), candidates + refining
    found["pass@N"] = (votes == 0).any(1).astype(float), candidates
    return {method: (credit.reshape(S, P), tokens) for method, (credit, tokens) in found.items()}


def equal_cost(x, maj_at_k):
    """How many candidates cost the same as N candidates and one refinement, and their vote: maj_at_k [P, M].

    -> {"generated": (k, votes [P] or None, is M too few?), "with_prompts": the same}: counted in generated tokens,
    and together with prompts, each of which is read once for all its samples. Where M is too few, the curve is
    continued in a line through its last steps, up to 2 M: as it flattens, that errs for the vote. With several
    seeds M is the number of all their candidates.
    """
    there, found = maj_at_k.shape[1], {}
    more = x.refined_tokens.mean()
    for name, cost in (("generated", more), ("with_prompts", more + x.refined_prompt_tokens.mean())):
        k = x.votes.shape[2] + cost / x.tokens.mean()
        low, back = min(math.floor(k), there) if k <= 2 * there else None, max(0, there - 3)
        if low is None:  # too far, or unknown
            maj = None
        elif k <= there:  # so often k rounded down, so often rounded up
            maj = maj_at_k[:, low - 1] + (k - low) * (maj_at_k[:, min(low, there - 1)] - maj_at_k[:, low - 1])
        else:  # two steps, as a vote of 2m is one of 2m - 1
            last, slope = maj_at_k[:, -1], (maj_at_k[:, -1] - maj_at_k[:, back]) / 2
            rising = slope.mean() > 1e-9  # and not beyond 100%
            maj = last + slope * (min(k - there, (1 - last.mean()) / slope.mean()) if rising else 0)
        found[name] = float(k) if np.isfinite(k) else None, maj, bool(k > there)
    return found


def order_sensitivity(x):
    """Does the refined answer depend on the order of the candidates? -> dict for report.json

    `changed`: of two refinements of a problem in different orders, how often their answers differ (None where
    there are no such pairs); at a temperature above 0 part of that is chance. `at_place`: where some candidates
    are right and some wrong, the refined accuracy if the one at that place is right, and over how many
    refinements; orders are drawn, so places are comparable.
    """
    N, K = x.order.shape[3], x.order.shape[2]
    first, second = (list(part) for part in np.triu_indices(K, 1))
    other = (x.order[:, :, first] != x.order[:, :, second]).any(3)  # [S, P, pairs]
    differ = x.refined[:, :, first] != x.refined[:, :, second]
    right = np.broadcast_to((x.votes == 0)[:, :, None], x.order.shape)
    right = np.take_along_axis(right, x.order.clip(0).astype(int), 3)  # [S, P, K, N] by place
    mixed = (x.order >= 0).all(3) & ~right.all(3)  # [S, P, K]
    chosen = [(x.refined == 0)[mixed & right[..., place]] for place in range(N)]
    return {
        "changed": float(differ[other].mean()) if other.any() else None,
        "pairs": int(other.sum()),
        "at_place": [[float(r.mean()) if len(r) else None, len(r)] for r in chosen],
    }


def by_correct(x, maj, refined):
    """By the number of right candidates: problems, accuracy of vote and refinement; and what became of them."""
    right, maj, refined = (x.votes == 0).sum(2).ravel(), maj.ravel(), refined.ravel()

    def mean(values):
        return float(values.mean()) if len(values) else None

    def count(values, at):
        total = round(float(values[at].sum()), 6)
        return [int(total) if total.is_integer() else total, int(at.sum())]

    lines = []
    for c in range(x.votes.shape[2] + 1):
        at = right == c
        lines.append({"correct": c, "problems": int(at.sum()), "maj": mean(maj[at]), "refined": mean(refined[at])})
    return lines, {
        "all_wrong": count(refined, right == 0),
        "minority_right": count(refined, (right > 0) & (maj == 0)),
        "tied": count(refined, (maj > 0) & (maj < 1)),
        "majority_right_broken": count(1 - refined, maj == 1),
    }


def read_meta(path):
    """What the record beside a refined file says: model, parameters, and seconds of both stages."""
    meta = read_json(meta_path(path)) if meta_path(path).exists() else {}
    if not meta.get("complete", True):
        print(f"{path}: not complete yet; run the command that makes it again for the whole")
    sampled = meta_path(meta.get("data") or "-")
    before = read_json(sampled).get("seconds") if sampled.exists() else None
    return {"model": meta.get("model"), "parameters": meta.get("parameters"), "seconds": (before, meta.get("seconds"))}


def report_row(name, x, metas):
    """All statistics of one row, for report.json; `metas` are the read_meta of its files."""
    (S, P, N), K = x.votes.shape, x.refined.shape[2]
    methods = methods_of(x)
    credit = {method: values.mean(0) for method, (values, _) in methods.items()}  # [P] each, over seeds
    pass_at = pass_at_k(N, (x.votes == 0).sum(2).ravel()).mean(0)  # [N]
    maj_at = majority_at_k(x.votes.reshape(S * P, N))
    pool = x.votes.swapaxes(0, 1).reshape(P, S * N)  # the candidates of all seeds
    same_cost = equal_cost(x, maj_at if S == 1 else majority_at_k(pool))
    votes_at_cost = {name: maj for name, (_, maj, _) in same_cost.items() if maj is not None}
    columns = {**credit, **votes_at_cost}
    draws = dict(zip(columns, bootstrap(np.stack(list(columns.values()), 1)).T))  # [draws] each
    refined, maj = credit["refined"], credit["maj@N"]
    better, worse, p = mcnemar(refined - maj)
    of_seeds = (methods["refined"][0] - methods["maj@N"][0]).mean(1)  # [S]
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = (draws["refined"] - draws["maj@N"]) / draws["maj@N"]
    lines, rescued = by_correct(x, methods["maj@N"][0], methods["refined"][0])

    def against(other):  # the gap between the refinement and some vote
        return {"points": mean(refined - columns[other]), "ci95": interval(draws["refined"] - draws[other])}

    def mean(values):  # None for what the file does not say
        return float(values.mean()) if np.isfinite(values).all() else None

    def seconds(stage):
        known = [meta["seconds"][stage] for meta in metas]
        return None if None in known else sum(known) / (S * P)

    return {
        "name": name,
        "model": metas[0]["model"],
        "parameters": metas[0]["parameters"],
        "problems": P,
        "n": N,
        "k": K,
        "seeds": S,
        **{f"pass@{k}": float(value) for k, value in enumerate(pass_at, 1)},
        **{f"maj@{k}": float(value) for k, value in enumerate(maj_at.mean(0), 1)},
        "refined": mean(refined),
        "gap": {
            **against("maj@N"),
            "relative": mean(refined - maj) / mean(maj) if maj.any() else None,
            "relative_ci95": interval(relative),
            "mcnemar": {"better": better, "worse": worse, "p": p},
            "seed_se": float(of_seeds.std(ddof=1) / math.sqrt(S)) if S > 1 else None,
        },
        "methods": {
            method: {"accuracy": mean(values), "ci95": interval(draws[method]), "tokens": mean(tokens)}
            for method, (values, tokens) in methods.items()
        },
        "equal_cost": {
            name: {"k": k, "extrapolated": guessed, "maj": mean(maj), **against(name)} if name in draws else {"k": k}
            for name, (k, maj, guessed) in same_cost.items()
        },
        "by_correct": lines,
        "rescued": rescued,
        "order": order_sensitivity(x),
        "unanimous": mean((x.votes == x.votes[:, :, :1]).all(2) & (x.votes[:, :, 0] >= 0)),
        "answered": {"candidates": mean(x.votes >= 0), "refinements": mean(x.refined >= 0)},
        "cut_off": {"candidates": mean(x.cut), "refinements": mean(x.refined_cut)},
        "length": {"candidates": mean(x.tokens), "refinements": mean(x.refined_tokens)},
        "tokens": {
            "candidates": mean(x.tokens.sum(2)),
            "refinement": mean(x.refined_tokens.sum(2)),
            "prompt": mean(x.prompt_tokens),
            "refinement_prompt": mean(x.refined_prompt_tokens.sum(2)),
        },
        "seconds": {"candidates": seconds(0), "refinement": seconds(1)},
    }


def scaling(rows):
    """Over the rows of several models: does the gap go with the model's size, and with what one sample is worth?"""
    rows = [row for row in rows if row["parameters"]]
    if len({row["parameters"] for row in rows}) < 2:
        return None
    gap = [row["gap"]["points"] for row in rows]
    return {
        "gap_and_parameters": spearman([row["parameters"] for row in rows], gap),
        "gap_and_pass@1": spearman([row["pass@1"] for row in rows], gap),
    }


# ------------------------------------------------------------------------------------------------
# The report


def percent(*values):
    return "-" if None in values else " / ".join(f"{100 * value:.1f}%" for value in values)


def plus(values, layout="{:,.0f}"):
    return "-" if None in values else " + ".join(layout.format(value) for value in values)


def gap_of(found):
    """A gap in points with its interval."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in (found["points"], *found["ci95"])))


def shorten(name, width):
    """A name without its middle where it is too long: names of one family differ at their ends."""
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[len(name) - (width - width // 2) :]}"


def tables(rows):
    """The rows as tables: a list of (title, head, lines, note)."""
    columns = [method for method in STYLES if any(method in row["methods"] for row in rows)]
    lines = [[], [], [], [], [], []]
    for row in rows:
        accuracy, gap, cost, became, kinds, spent = ([row["name"]] for _ in lines)
        accuracy += [str(row[key]) for key in ("problems", "n", "k")]
        accuracy += [percent(row["methods"].get(method, {}).get("accuracy")) for method in columns]
        test, relative, error = (row["gap"][key] for key in ("mcnemar", "relative", "seed_se"))
        inside = row["gap"]["relative_ci95"]
        gap += [gap_of(row["gap"]), "-" if relative is None else f"{100 * relative:+.1f}%"]
        gap += ["-" if inside is None else "[{:+.0%}, {:+.0%}]".format(*inside)]
        gap += [f"{test['better']} : {test['worse']}", f"{test['p']:.2g}"]
        gap += ["-" if error is None else f"{100 * error:.1f}"]
        cost.append(percent(row["refined"]))
        for at in row["equal_cost"].values():
            cost += ["-" if at["k"] is None else f"{at['k']:.1f}"]
            cost += [f"{'~' * at['extrapolated']}{percent(at['maj'])}", gap_of(at)] if "maj" in at else ["-", "-"]
        became += [f"{share:.4g} / {of}" for share, of in row["rescued"].values()]
        became += [percent(row["order"]["changed"]), percent(*(row["order"]["at_place"][i][0] for i in (0, -1)))]
        kinds += [percent(row["unanimous"]), *(percent(*row[key].values()) for key in ("answered", "cut_off"))]
        kinds += [plus(row["length"].values()).replace("+", "/")]
        tokens = row["tokens"]
        spent += [plus([tokens["candidates"], tokens["refinement"]])]
        spent += [plus([tokens["prompt"], tokens["refinement_prompt"]]), plus(row["seconds"].values(), "{:.2f}")]
        spent += ["-" if not row["parameters"] else f"{row['parameters'] / 1e6:,.1f} M"]
        for table, line in zip(lines, (accuracy, gap, cost, became, kinds, spent)):
            table.append(line)
    text = (
        ("Accuracy", ["problems", "N", "K", *columns], "refined: the mean of K refinements"),
        (
            "Refinement Gap: refined - maj@N, on the same candidates",
            ["points [95%]", "relative", "[95%]", "better : worse", "p", "s.e. of seeds"],
            "better : worse: problems on which they differ; p: exact McNemar test",
        ),
        (
            "At equal cost: refined - maj@k, where k candidates cost what N and one refinement do",
            ["refined", "k", "maj@k", "gap [95%]", "k", "maj@k", "gap [95%]"],
            "first in generated tokens, then with prompts; ~: more than there are, continued in a line, which errs "
            "for the vote; -: too many for that, or prompt tokens unknown",
        ),
        (
            "What became of them",
            ["all wrong", "minority", "tied", "broken", "order", "first / last"],
            "refined right where all candidates are wrong, where right ones are outvoted, where the vote is tied; "
            "refined wrong where the vote is right; order: the answer differs in another order, chance included; "
            "first / last: refined right, where some are, if the first or the last candidate shown is right",
        ),
        (
            "Answers, candidates / refinements",
            ["unanimous", "answered", "cut off", "tokens of one"],
            "unanimous: all candidates of a problem give the same answer",
        ),
        (
            "Cost of a problem, candidates + refinements",
            ["tokens generated", "prompt tokens", "seconds", "parameters"],
            "a prompt is read once for all its samples",
        ),
    )
    return [(title, ["", *head], table, note) for (title, head, note), table in zip(text, lines)]


def as_text(title, head, lines, note, width=100):
    """A table for the terminal, `width` columns at most: long names lose their middle."""
    lines = [head, *lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    gap = 2 if sum(widths) + 2 * len(widths) - 2 <= width else 1
    widths[0] = max(6, min(widths[0], width - sum(widths[1:]) - gap * (len(widths) - 1)))
    text = [title]
    for name, *cells in lines:
        cells = (cell.rjust(width) for cell, width in zip(cells, widths[1:]))
        text.append((" " * gap).join([shorten(name, widths[0]).ljust(widths[0]), *cells]).rstrip())
    return "\n".join([*text, *textwrap.wrap(f"({note})", width)])


def as_markdown(title, head, lines, note):
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join([f"## {title}", "", *("| " + " | ".join(row) + " |" for row in rows), "", f"{note}."])


def notes(found, grader):
    """What the tables do not say, a sentence each."""
    text = [
        "pass@k and maj@k are exact expectations over subsets; 95% intervals are of 10,000 bootstrap draws, seed 0."
    ]
    for key, values in (found or {}).items():
        if values["spearman"] is not None:
            ci = (
                "too few for an interval"
                if values["ci95"] is None
                else "95% [{:+.2f}, {:+.2f}]".format(*values["ci95"])
            )
            what = key.replace("_and_", " against ")
            text.append(f"{what}: rank correlation {values['spearman']:+.2f} over {values['models']} rows ({ci}).")
    if n := len(grader.stuck):
        text.append(f"{n} comparisons took longer than {grader.limit:g} s or crashed, and count as unequal.")
    return text


def show(identity, path):
    """One problem of a candidates or refined file on the terminal: answers, votes and refinement side by side."""
    rows = each_row(path, keys=("id", "problem", "candidates"))
    if (row := next((row for row in rows if str(row["id"]) == identity), None)) is None:
        raise InputError(f"{path}: no problem with id {identity!r} in it")
    grader, gold, refinements = Grader(), row.get("answer"), row.get("refinements", [])
    answers = [answer_of(c, row.get("prompt", "")) for c in row["candidates"]]
    refined = [answer_of(r, r.get("prompt", "")) for r in refinements]
    number = classes(gold, answers, grader, refined)
    grader.close()
    print(f"{textwrap.fill(row['problem'], 100, replace_whitespace=False)}\n\nright answer: {gold}\n")
    lines = []
    for i, (item, answer, vote) in enumerate(zip(row["candidates"] + refinements, answers + refined, number)):
        kind = f"candidate {i}" if i < len(answers) else f"refinement {i - len(answers)}"
        mark = "right" if vote == 0 else "no answer" if vote < 0 else "wrong"
        shown = "-" if answer is None else answer if len(answer) <= 30 else answer[:29] + "…"
        votes = "-" if vote < 0 else str(number[: len(answers)].count(vote))
        details = [f"{item['logprob'] / item['n_tokens']:.2f}" if "logprob" in item else "-"]
        details += [f"{item['self_certainty']:.2f}" if "self_certainty" in item else "-"]
        lines.append([kind, mark, shown, votes, str(item["n_tokens"]), *details, item.get("finish_reason", "-")])
        lines[-1].append(" ".join(map(str, item.get("order", []))))
    head = ["", "", "answer", "votes", "tokens", "logprob", "certainty", "ended", "order"]
    print(as_text("", head, lines, "votes: candidates with the same answer; logprob: mean a token").lstrip("\n"))
    for i, item in enumerate(row["candidates"] + refinements):
        print(f"\n--- {lines[i][0]}: {lines[i][1]}\n{strip_thinking(item['text'])}")


# ------------------------------------------------------------------------------------------------
# Figures: greys and one blue, a marker for each method, so that they can be read in print and without colours

BLUE = "#0b5fa5"
STYLES = {  # method -> marker, colour
    "pass@1": ("o", "0.75"),
    "maj@N": ("s", "0.35"),
    "weighted": ("<", "white"),
    "logprob": ("v", "white"),
    "certainty": (">", "0.75"),
    "score": ("p", "0.75"),
    "refined": ("D", BLUE),
    "refmaj": ("P", BLUE),
    "union": ("X", BLUE),
    "pass@N": ("^", "black"),
}


def look(method, **more):
    marker, colour = STYLES[method]
    edge = {"markeredgecolor": "black", "markeredgewidth": 0.6}
    return {"marker": marker, "markerfacecolor": colour, "color": colour, "linestyle": "none", **edge, **more}


def finish(fig, axes, path, plt, legend=(), width=1.7):
    """What all figures have in common. `legend`: the axes whose labels it explains, `width` inches each, above all."""
    for axis in axes:
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {label: line for axis in legend for line, label in zip(*axis.get_legend_handles_labels())}
    if handles:
        columns = int(fig.get_figwidth() / width)
        fig.legend(handles.values(), handles, loc="outside upper center", ncols=columns, frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def draw_methods(rows, path, plt):
    """On the left the accuracy of each method with its interval, on the right the gap."""
    size = (9, 1.4 + sum(0.3 + 0.13 * len(row["methods"]) for row in rows))
    fig, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=(3, 2), sharey=True, layout="constrained")
    for y, row in enumerate(rows):
        for i, (method, found) in enumerate(row["methods"].items()):
            at = y + 0.8 * ((i + 0.5) / len(row["methods"]) - 0.5)
            left.plot([100 * x for x in found["ci95"]], [at, at], color="0.6", linewidth=1.2, zorder=1)
            left.plot(100 * found["accuracy"], at, label=method, **look(method, markersize=7))
        gap, (low, high) = 100 * row["gap"]["points"], (100 * x for x in row["gap"]["ci95"])
        right.plot([low, high], [y, y], "|-", color=BLUE, markersize=9)
        right.plot(gap, y, "D", color=BLUE, markersize=7)
        right.annotate(f"{gap:+.1f}", (gap, y), (0, 8), textcoords="offset points", ha="center", fontsize=9)
        for axis in (left, right):
            axis.axhline(y + 0.5, color="0.8", linewidth=0.8)
    sizes = ", ".join(str(n) for n in sorted({row["n"] for row in rows}))
    left.set(xlabel=f"problems solved (%), N = {sizes}; 95% interval", xlim=(-2, 102), ylim=(len(rows) - 0.5, -0.5))
    left.set_yticks(range(len(rows)), [shorten(row["name"], 28) for row in rows])
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="Refinement Gap: refined - maj@N\n(points, 95% interval)")
    right.margins(x=0.15)
    finish(fig, [left, right], path, plt, legend=[left])


def panels(rows, plt, height, parts=1, **options):
    """A panel (of `parts` axes above each other) for each row, four beside each other -> figure, axes [parts, rows]."""
    across = min(len(rows), 4)
    down = -(-len(rows) // across)
    size = (max(5, 3 * across), 0.6 + height * down)
    fig, axes = plt.subplots(parts * down, across, figsize=size, squeeze=False, layout="constrained", **options)
    axes = axes.reshape(down, parts, across).swapaxes(0, 1).reshape(parts, -1)
    for axis in axes[:, len(rows) :].ravel():
        axis.remove()
    for axis, row in zip(axes[0], rows):
        axis.set_title(shorten(row["name"], 28), fontsize=10)
    return fig, axes[:, : len(rows)]


def draw_frontier(rows, path, plt):
    """Accuracy against tokens: votes and a perfect judge of 1..N candidates, and the other methods."""
    fig, [axes] = panels(rows, plt, 3.0, sharey=True)
    for axis, row in zip(axes, rows):
        numbers = range(1, row["n"] + 1)
        tokens = [row["tokens"]["candidates"] * k / row["n"] for k in numbers]
        size = 4 if row["n"] <= 16 else 0  # no markers where they would run into each other
        for kind, line in (("maj", "-"), ("pass", ":")):
            more = {"linestyle": line, "color": "0.35", "markersize": size, "label": f"{kind}@k, k = 1 to N"}
            axis.plot(tokens, [100 * row[f"{kind}@{k}"] for k in numbers], **look(f"{kind}@N", **more))
        for method, found in row["methods"].items():
            if "@" not in method:
                axis.plot(found["tokens"], 100 * found["accuracy"], label=method, **look(method, markersize=7))
        refined = row["methods"]["refined"]
        axis.vlines(refined["tokens"], *(100 * x for x in refined["ci95"]), color=BLUE, linewidth=1.2)
        axis.set_xlim(left=0)
        axis.set_xlabel("tokens generated a problem")
    for axis in axes[::4]:
        axis.set_ylabel("problems solved (%)")
    finish(fig, axes, path, plt, legend=axes)


def draw_outcomes(rows, path, plt):
    """By the number of right candidates: how many problems, and how often vote and refinement are right."""
    fig, (above, below) = panels(rows, plt, 3.6, parts=2, height_ratios=(1, 2) * -(-len(rows) // 4))
    for top, axis, row in zip(above, below, rows):
        there = [line for line in row["by_correct"] if line["problems"]]
        numbers = [line["correct"] for line in there]
        total = sum(line["problems"] for line in there)
        shares = [100 * line["problems"] / total for line in there]
        top.bar(numbers, shares, color="0.7", edgecolor="0.3", linewidth=0.6)
        for key, method, line in (("maj", "maj@N", "-"), ("refined", "refined", "--")):
            values = [100 * line[key] for line in there]
            axis.plot(numbers, values, label=method, **look(method, linestyle=line, markersize=6))
        axis.set(ylim=(-5, 105), xlabel=f"right candidates of {row['n']}")
        for each in (top, axis):
            each.set_xlim(-0.7, row["n"] + 0.7)
            each.xaxis.get_major_locator().set_params(integer=True)
        top.tick_params(labelbottom=False)
    for top, axis in zip(above[::4], below[::4]):
        top.set_ylabel("problems (%)")
        axis.set_ylabel("solved (%)")
    finish(fig, [*above, *below], path, plt, legend=below)


def draw_scaling(rows, path, plt):
    """The gap against the model's parameters, and against what one sample is worth."""
    rows = [row for row in rows if row["parameters"]]
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.8 + 0.07 * len(rows)), sharey=True, layout="constrained")
    for i, row in enumerate(rows):
        gap, (low, high) = 100 * row["gap"]["points"], (100 * x for x in row["gap"]["ci95"])
        for axis, x in zip(axes, (row["parameters"], 100 * row["pass@1"])):
            axis.vlines(x, low, high, color="0.6", linewidth=1.2, zorder=1)
            style = {"color": (BLUE, "white", "0.6")[i // 8 % 3], "markeredgecolor": "black", "markersize": 7}
            axis.plot(x, gap, "osD^v<>p"[i % 8], label=shorten(row["name"], 24), **style)
    for axis, what in zip(axes, ("parameters", "pass@1 (%)")):
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel(what)
        axis.margins(x=0.15)
    axes[0].set_xscale("log")
    axes[0].set_ylabel("Refinement Gap (points, 95% interval)")
    finish(fig, axes, path, plt, legend=axes[:1], width=2.8)


def draw(rows, found, out):
    """Draw all figures -> their names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {"figure.png": draw_methods, "frontier.png": draw_frontier, "outcomes.png": draw_outcomes}
    if found:
        figures["scaling.png"] = draw_scaling
    for name, function in figures.items():
        try:
            function(rows, out / name, plt)
        except OSError as e:
            raise InputError(f"{out / name}: cannot be written ({e.strerror}); choose another --out")
    return list(figures)


# ------------------------------------------------------------------------------------------------
# The suite, and the command line

SUITES = {"math": ["aime24", "aime25", "amc23", "math500", "olympiadbench", "knights"]}


def run_suite(args, flags):
    """Sample and refine each set with the other two files, one command after another -> the refined files.

    The commands keep what they have, so the suite goes on where it was stopped. `flags` are given to both.
    """
    from sample import BENCHMARKS

    sets, out = SUITES.get(args.suite) or args.suite.split(","), Path(args.out)
    for name in sets:
        if name not in BENCHMARKS and not Path(name).is_file():
            known = ", ".join(BENCHMARKS)
            raise InputError(f"--suite {args.suite}: no file and no benchmark {name!r}; there are {known}")
    common = ["--model", args.model, *flags]
    commands, files = [], []
    for name in sets:
        candidates, refined = (str(out / f"{Path(name).stem}.{kind}.jsonl") for kind in ("candidates", "refined"))
        limit = ["--limit", str(args.limit)] if args.limit else []
        commands.append(["sample.py", "--data", name, *limit, "--n", str(args.n), "--out", candidates, *common])
        commands.append(["refine.py", "--candidates", candidates, "--k", str(args.k), "--out", refined, *common])
        if refined in files:
            raise InputError(f"--suite {args.suite}: two sets of the name {Path(name).stem}; rename one of them")
        files.append(refined)
    started = time.time()
    for number, command in enumerate(commands, 1):
        print(f"[{number} of {len(commands)}, {time.time() - started:.0f} s] python {shlex.join(command)}", flush=True)
        code = subprocess.run([sys.executable, str(Path(__file__).with_name(command[0])), *command[1:]]).returncode
        if code:
            sys.exit(code)  # it has said why
    return files


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    suite = any(word.partition("=")[0] == "--suite" for word in argv)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    if not suite:
        help = "refined files, made by refine.py: a row each; several seeds of one row with commas"
        parser.add_argument("files", nargs="+", metavar="[NAME=]FILE[,FILE...]", help=help)
    parser.add_argument("--out", default=".", help="folder for report.json, report.md, figures and grades.jsonl")
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds for one comparison (default: 5)")
    parser.add_argument("--show", metavar="ID", help="show one problem of one file, and stop")
    group = parser.add_argument_group("suite (all other flags are given to sample.py and refine.py)")
    group.add_argument("--suite", help=f"sample, refine and report: {', '.join(SUITES)}, or sets and files with commas")
    group.add_argument("--model", default="tiny", help="short name, hub id or folder (default: tiny)")
    group.add_argument("--n", type=int, default=8, help="candidates a problem (default: 8)")
    group.add_argument("--k", type=int, default=1, help="refinements a problem (default: 1)")
    group.add_argument("--limit", type=int, help="only the first so many problems of each set")
    args, flags = parser.parse_known_args(argv)
    if flags and not suite:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if args.show:
        if suite or len(args.files) != 1:
            raise InputError(f"--show {args.show}: give one file, and no --suite")
        return show(args.show, args.files[0])
    report(run_suite(args, flags) if suite else args.files, Path(args.out), args.time_limit)


def report(files, out, limit):
    """Read and grade `files`, and write everything about them to the folder `out`."""
    from tqdm import tqdm

    started, names = time.time(), {}
    for text in files:
        name, _, paths = text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text)
        paths = [paths] if Path(paths).exists() else paths.split(",")
        name = name or Path(paths[0]).name.removesuffix(".jsonl").removesuffix(".refined")
        while name in names:  # two folders may have files of one name
            name += "'"
        names[name] = paths
    files = {name: [(path, read_refined(path)) for path in paths] for name, paths in names.items()}
    for read in files.values():
        check_same_problems(read)
    grader, rows = Grader(limit, out / "grades.jsonl"), []
    for name, read in files.items():
        with tqdm(desc=f"grade {name}", unit=" comparisons") as bar:

            def progress(number, total, bar=bar):
                bar.total = total
                bar.update(number - bar.n)

            outcomes = grade_files([problems for _, problems in read], grader, progress)
        rows.append(report_row(name, outcomes, [read_meta(path) for path in names[name]]))
    grader.close()
    found = scaling(rows)
    grading = {"asked": len(grader.known), "stuck": len(grader.stuck), "limit": limit}
    write_json(out / "report.json", {"rows": rows, "scaling": found, "grading": grading})
    figures = draw(rows, found, out)
    parts, sentences = tables(rows), notes(found, grader)
    markdown = ["# Report", *(as_markdown(*part) for part in parts), *(f"- {text}" for text in sentences)]
    markdown += [f"![{name}]({name})" for name in figures]
    (out / "report.md").write_text("\n\n".join(markdown) + "\n", encoding="utf-8")
    print("", *(as_text(*part) for part in parts), sep="\n\n")
    print("", *itertools.chain(*(textwrap.wrap(text, 100) for text in sentences)), sep="\n")
    print(f"{out}: report.json, report.md, {', '.join(figures)} written ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--grading-worker"]:
        grading_worker(float(sys.argv[2]))
    else:
        command_line(main)
