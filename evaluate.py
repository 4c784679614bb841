"""Grade answers, compare ways to aggregate candidates, and measure the Refinement Gap.

    python evaluate.py before.refined.jsonl after.refined.jsonl --out runs/tiny    one row a file
    python evaluate.py mine=seed0.refined.jsonl,seed1.refined.jsonl                several seeds, one row
    python evaluate.py --show test-7 after.refined.jsonl                           one problem, on the terminal
    python evaluate.py --suite math --model qwen-1.5b --n 8 --limit 100            sample, refine and report

Writes report.json, report.md and figures. Reading order: files, answers, grading, voting, estimators, the
gap, the report, figures, the suite. The other four files import the grading and the file reading from
here; this file imports none of them.

What is compared, for problems with N candidates and K refinements each, on the same candidates throughout:

    pass@k       at least one of k candidates is right: what a perfect judge of k would reach
    maj@k        the answer that most of k candidates gave is right, where answers that mean the same are one
                 (1/2 = 0.5); a tie shares the credit, a candidate without an answer casts no vote
    weighted@N   the same, and each vote counts as much as the sequence is probable
    logprob@N    the candidate with the highest mean log-probability a token (Best-of-N)
    certainty@N  votes by the rank of the self-certainty (Borda votes, arXiv 2502.18581)
    score@N      the candidate with the highest "score", whatever wrote it into the file
    refined      one refinement is right (the mean, where a problem has several)
    refmaj@K     the vote of the K refinements
    union@N+K    the vote of candidates and refinements together
    gap          refined - maj@N, and the same relative to maj@N (the paper's Refinement Gap)

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
    seen, number = {}, 0
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
                    if key not in row:
                        raise InputError(f"{path}, line {number}: no {key!r} in it, only {', '.join(row)}")
                name = row.get("id")
                if name is not None and (first := seen.setdefault(str(name), number)) != number:
                    raise InputError(f"{path}, line {number}: id {name!r} already stands on line {first}")
                yield row
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})")
    if not number:
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
    for mark in (r"\d\s*_\s*\{?(\d+)\}?", r".*" + TEXT + r"\s*\{[^{}]*\}\s*\^\s*\{?(\d)\}?"):
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
                busy[worker.stdout.fileno()] = worker, pair
                try:
                    worker.stdin.write(json.dumps(pair).encode() + b"\n")
                except BrokenPipeError:
                    pass  # it died; its end of the other pipe says so too
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

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # Nobody handles this alarm, so the system ends the process, C code and all. math-verify's own time limit
        # is a Python handler, which C code never comes back to run, and fails in silence outside the main thread.
        signal.setitimer(signal.ITIMER_REAL, limit)
        gold, answer = map(read, json.loads(line))
        equal = verify(gold, answer, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(equal), file=replies, flush=True)


# ------------------------------------------------------------------------------------------------
# Voting


def wrong_classes(answers):
    """The texts to compare among wrong answers: one for each number and each text, in an order of their own."""
    distinct = {}
    for answer in sorted({tidy(a) for a in answers}):
        number = plain_number(answer)
        distinct.setdefault(answer if number is None else number, answer)
    return list(distinct.values())


def classes(gold, answers, grader, more=()):
    """Number the classes of equal answers: gold "1/2", ["0.5", "3", None, "3.0", "4"] -> [0, 1, -1, 1, 2].

    Class 0 is right, -1 casts no vote. Wrong answers are compared in sorted order with one member of each
    class, so that neither the order of the candidates nor an equality that is not quite transitive changes
    the outcome. `more`: answers (of refinements) that are numbered after these, and do not change their classes.
    """
    number, members = {None: -1}, []
    for group in (answers, more):
        new = {a for a in group if a not in number}
        number.update({a: 0 for a in new if grader.equal(gold, a)})
        keys = {}
        for text in wrong_classes(new - number.keys()):
            exact = plain_number(text)
            for i, member in enumerate(members):
                if exact is not None and plain_number(member) is not None:
                    same = exact == plain_number(member)
                else:
                    same = grader.equal(member, text) or grader.equal(text, member)
                if same:
                    keys[text if exact is None else exact] = i + 1
                    break
            else:
                members.append(text)
                keys[text if exact is None else exact] = len(members)
        for a in new - number.keys():
            exact = plain_number(a)
            number[a] = keys[tidy(a) if exact is None else exact]
    return [number[a] for a in [*answers, *more]]


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
    """What is known of the answers of S files (seeds) about the same P problems, N candidates and K refinements."""

    votes: np.ndarray  # [S, P, N] classes of equal answers: 0 right, -1 none
    refined: np.ndarray  # [S, P, K] in the same classes
    tokens: np.ndarray  # [S, P, N] generated
    refined_tokens: np.ndarray  # [S, P, K]
    prompt_tokens: np.ndarray  # [S, P, 1], nan where the file does not say
    refined_prompt_tokens: np.ndarray  # [S, P, K]
    cut: np.ndarray  # [S, P, N] ended by the length limit, nan where the file does not say
    refined_cut: np.ndarray  # [S, P, K]
    logprob: np.ndarray  # [S, P, N] of the whole sequence
    certainty: np.ndarray  # [S, P, N]
    score: np.ndarray  # [S, P, N]
    order: np.ndarray  # [S, P, K, N]: which candidate stood at which place of the prompt, -1 for none


# field of Outcomes -> the key of the file that it holds, in candidates or in refinements
CANDIDATE_KEYS = {"tokens": "n_tokens", "logprob": "logprob", "certainty": "self_certainty", "score": "score"}
REFINEMENT_KEYS = {"refined_tokens": "n_tokens", "refined_prompt_tokens": "n_prompt_tokens"}


def read_refined(path):
    """A refined file -> {id: what counts about the problem}, for problems that can be graded.

    Texts are let go as soon as their answers are found: files are larger than memory. InputError names the
    file and the row where it is not such a file, is mixed, or has unequal numbers of candidates or refinements.
    """
    problems, skipped, sizes = {}, 0, None
    for row in each_row(path, keys=("id", "problem", "answer", "candidates", "refinements")):
        for key in ("candidates", "refinements"):
            items = row[key]
            if (
                not isinstance(items, list)
                or not items
                or not all(
                    isinstance(x, dict) and isinstance(x.get("text"), str) and isinstance(x.get("n_tokens"), int)
                    for x in items
                )
            ):
                raise InputError(f"{path}, id {row['id']!r}: its {key!r} are empty or lack text and n_tokens")
        candidates, refinements = row["candidates"], row["refinements"]
        sizes = sizes or (len(candidates), len(refinements))
        if (len(candidates), len(refinements)) != sizes:
            raise InputError(
                f"{path}, id {row['id']!r}: {len(candidates)} candidates and {len(refinements)} refinements, but "
                f"{sizes[0]} and {sizes[1]} in the first row; pass@k and maj@k need the same numbers for all"
            )
        if row["answer"] is None:
            skipped += 1
            continue
        problem = problems[str(row["id"])] = {"answer": str(row["answer"])}
        problem["answers"] = [answer_of(c, row.get("prompt", "")) for c in candidates]
        problem["refined"] = [answer_of(r, r.get("prompt", "")) for r in refinements]
        for field, key in CANDIDATE_KEYS.items():
            problem[field] = np.array([c.get(key) for c in candidates], dtype=float)  # None becomes nan
        for field, key in REFINEMENT_KEYS.items():
            problem[field] = np.array([r.get(key) for r in refinements], dtype=float)
        problem["prompt_tokens"] = np.array([row.get("n_prompt_tokens")], dtype=float)
        for field, items in (("cut", candidates), ("refined_cut", refinements)):
            reasons = [x.get("finish_reason") for x in items]
            problem[field] = np.array([None if x is None else x == "length" for x in reasons], dtype=float)
        orders = [r.get("order", [])[: len(candidates)] for r in refinements]
        problem["order"] = np.array([order + [-1] * (len(candidates) - len(order)) for order in orders], dtype=np.int16)
    if skipped:
        print(f"{path}: {skipped} of {skipped + len(problems)} problems have no answer to grade against, left out")
    if not problems:
        raise InputError(f"{path}: no problem has an answer to grade against")
    return problems


def read_meta(path):
    """What the record beside a refined file says: model, parameters, and seconds a problem of both stages."""
    meta = read_json(meta_path(path)) if meta_path(path).exists() else {}
    if not meta.get("complete", True):
        print(f"{path}: not complete yet; run the command that makes it again for the whole")
    found = {"model": meta.get("model"), "parameters": meta.get("parameters"), "refine_seconds": meta.get("seconds")}
    sampled = meta_path(meta["data"]) if meta.get("data") else Path("-")
    found["sample_seconds"] = read_json(sampled).get("seconds") if sampled.exists() else None
    return found


def grade_files(files, grader, progress=None):
    """Several files about the same problems: a list of (path, what read_refined gave) -> Outcomes."""
    first_path, first = files[0]
    shapes = [(path, len(p["answers"]), len(p["refined"])) for path, ps in files for p in list(ps.values())[:1]]
    for (path, problems), (_, *shape) in zip(files, shapes):
        if shape != list(shapes[0][1:]):
            raise InputError(f"{path}: {shape[0]} candidates and {shape[1]} refinements, {first_path} has others")
        for identity in problems.keys() ^ first.keys():
            raise InputError(f"{path}: id {identity!r} is not in both this file and {first_path}; one row needs both")
        for identity in first:
            if problems[identity]["answer"] != first[identity]["answer"]:
                raise InputError(f"{path}, id {identity!r}: another right answer than in {first_path}")

    # Math-verify is asked in two rounds, so that its processes have all there is to do at once: which answers are
    # right, and which of the wrong ones are the same.
    everything = {i: [a for _, ps in files for a in ps[i]["answers"] + ps[i]["refined"]] for i in first}
    distinct = {i: {a for a in answers if a is not None} for i, answers in everything.items()}
    grader.grade([(first[i]["answer"], a) for i in first for a in distinct[i]], progress)
    pairs = []
    for i in first:
        wrong = wrong_classes(a for a in distinct[i] if not grader.equal(first[i]["answer"], a))
        pairs += itertools.permutations(wrong, 2) if any(plain_number(a) is None for a in wrong) else []
    grader.grade(pairs, progress)

    votes, refined = [], []
    for i in first:
        candidates = [a for _, ps in files for a in ps[i]["answers"]]
        number = classes(first[i]["answer"], candidates, grader, [a for _, ps in files for a in ps[i]["refined"]])
        votes.append(np.reshape(number[: len(candidates)], (len(files), -1)))
        refined.append(np.reshape(number[len(candidates) :], (len(files), -1)))
    arrays = {
        field.name: np.stack([np.stack([problems[i][field.name] for i in first]) for _, problems in files])
        for field in dataclasses.fields(Outcomes)[2:]
    }
    return Outcomes(votes=np.stack(votes, 1), refined=np.stack(refined, 1), **arrays)


def methods_of(x):
    """Outcomes -> {method: (credit [S, P], tokens generated for it [S, P])}. See the docstring of this file."""
    S, P, N = x.votes.shape
    K = x.refined.shape[2]
    credits, generated, refining = {}, x.tokens.sum(2), x.refined_tokens.sum(2)

    def rows(values):  # [S, P, ...] -> [S * P, ...]
        return values.reshape(S * P, -1)

    votes, refined = rows(x.votes), rows(x.refined)
    credits["pass@1"] = (votes == 0).mean(1), generated / N
    credits[f"maj@{N}"] = vote(votes), generated
    logprob, certainty, score = rows(x.logprob), rows(x.certainty), rows(x.score)
    if np.isfinite(logprob).all():
        credits[f"weighted@{N}"] = vote(votes, np.exp(logprob - logprob.max(1, keepdims=True))), generated
        credits[f"logprob@{N}"] = best(votes, logprob / rows(x.tokens)), generated
    if np.isfinite(certainty).all():
        credits[f"certainty@{N}"] = vote(votes, borda(certainty)), generated
    if np.isfinite(score).all():
        credits[f"score@{N}"] = best(votes, score), generated
    credits["refined"] = (refined == 0).mean(1), generated + refining / K
    if K > 1:
        credits[f"refmaj@{K}"] = vote(refined), generated + refining
    credits[f"union@{N + K}"] = vote(np.concatenate([votes, refined], 1)), generated + refining
    credits[f"pass@{N}"] = (votes == 0).any(1).astype(float), generated
    return {name: (credit.reshape(S, P), tokens) for name, (credit, tokens) in credits.items()}


def equal_cost(x, refined, maj_at_k):
    """The vote of so many candidates as cost what N candidates and one refinement do.

    Counted in generated tokens, and together with the prompts, each read once for all of its samples. With
    one file there are only N candidates: the vote of more is then continued in a line from the last two steps
    of maj@k, which errs for the vote, as the curve flattens. Several files have the candidates that it takes.
    """
    N, found = x.votes.shape[2], {}
    prompts = x.refined_prompt_tokens.mean()
    for name, more in (("generated", x.refined_tokens.mean()), ("with_prompts", x.refined_tokens.mean() + prompts)):
        k = N + more / x.tokens.mean()
        if not np.isfinite(k):
            found[name] = None
            continue
        there = len(maj_at_k)
        if k <= there:
            maj = np.interp(k, np.arange(1, there + 1), maj_at_k)
        else:
            slope = max(0.0, (maj_at_k[-1] - maj_at_k[max(0, there - 3)]) / min(2, there - 1)) if there > 1 else 0.0
            maj = min(1.0, maj_at_k[-1] + slope * (k - there))
        found[name] = {"k": float(k), "maj": float(maj), "gap": float(refined - maj), "extrapolated": bool(k > there)}
    return found


def order_sensitivity(x):
    """Does the refined answer depend on the order of the candidates? None with one refinement a problem.

    `changed`: of two refinements of a problem in different orders, how often their answers differ. `at_place`:
    where some candidates are right and some wrong, the refined accuracy if the one at that place is right
    (orders are drawn, so the places are comparable), and over how many refinements.
    """
    S, P, K = x.refined.shape
    N = x.votes.shape[2]
    right = np.take_along_axis(np.broadcast_to((x.votes == 0)[:, :, None], x.order.shape), x.order.clip(0), 3)
    shown = (x.order >= 0).all(3) & ~right.all(3) & right.any(3)  # [S, P, K]
    refined = x.refined == 0
    at_place = []
    for place in range(N):
        chosen = refined[shown & right[..., place]]
        at_place.append([float(chosen.mean()) if len(chosen) else None, len(chosen)])
    pairs = list(itertools.combinations(range(K), 2))
    other = [(x.order[:, :, a] != x.order[:, :, b]).any(2) for a, b in pairs]  # [S, P] each
    differ = [x.refined[:, :, a] != x.refined[:, :, b] for a, b in pairs]
    total = int(np.sum(other))
    return {
        "changed": float(np.sum(np.logical_and(other, differ)) / total) if total else None,
        "pairs": total,
        "at_place": at_place,
    }


def by_correct(x, maj, refined):
    """By the number of right candidates: problems, accuracy of vote and refinement; and what became of them."""
    right = (x.votes == 0).sum(2).ravel()
    maj, refined = maj.ravel(), refined.ravel()
    lines = []
    for c in range(x.votes.shape[2] + 1):
        at = right == c
        mean = (float(maj[at].mean()), float(refined[at].mean())) if at.any() else (None, None)
        lines.append({"correct": c, "problems": int(at.sum()), "maj": mean[0], "refined": mean[1]})

    def count(values, at):
        return [round(float(values[at].sum()), 6), int(at.sum())]

    rescued = {
        "all_wrong": count(refined, right == 0),
        "minority_right": count(refined, (right > 0) & (maj == 0)),
        "tied": count(refined, (maj > 0) & (maj < 1)),
        "majority_right_broken": count(1 - refined, maj == 1),
    }
    return lines, rescued


def report_row(name, x, metas=({},)):
    """All statistics of one row -> (a dict for report.json, bootstrap draws for the figures)."""
    S, P, N = x.votes.shape
    K = x.refined.shape[2]
    methods = methods_of(x)
    credit = {method: values.mean(0) for method, (values, _) in methods.items()}  # [P] each, over seeds
    names = list(credit)
    draws = bootstrap(np.stack([credit[method] for method in names], 1))  # [draws, M]
    maj, refined = credit[f"maj@{N}"], credit["refined"]
    maj_draws, refined_draws = draws[:, names.index(f"maj@{N}")], draws[:, names.index("refined")]
    points = float((refined - maj).mean())
    better, worse, p = mcnemar(refined - maj)
    seeds = (methods["refined"][0] - methods[f"maj@{N}"][0]).mean(1)  # [S]
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = (refined_draws - maj_draws) / maj_draws

    votes = x.votes.reshape(S * P, N)
    pass_at = pass_at_k(N, (votes == 0).sum(1)).mean(0)
    pool = np.moveaxis(x.votes, 0, 1).reshape(P, S * N)  # the candidates of all seeds
    maj_at = majority_at_k(votes).mean(0)
    maj_of_pool = maj_at if S == 1 else majority_at_k(pool).mean(0)
    lines, rescued = by_correct(x, methods[f"maj@{N}"][0], methods["refined"][0])

    def mean(values):  # None for what the file does not say
        return float(values.mean()) if np.isfinite(values).all() else None

    def seconds(key):
        known = [meta.get(key) for meta in metas]
        return None if None in known else sum(known) / (S * P)

    row = {
        "name": name,
        "problems": P,
        "n": N,
        "k": K,
        "seeds": S,
        "model": metas[0].get("model"),
        "parameters": metas[0].get("parameters"),
        **{f"pass@{k}": float(value) for k, value in enumerate(pass_at, 1)},
        **{f"maj@{k}": float(value) for k, value in enumerate(maj_at, 1)},
        "refined": float(refined.mean()),
        "gap": {
            "points": points,
            "relative": points / float(maj.mean()) if maj.any() else None,
            "ci95": interval(refined_draws - maj_draws),
            "relative_ci95": interval(relative),
            "mcnemar": {"better": better, "worse": worse, "p": p},
            "seed_se": float(seeds.std(ddof=1) / math.sqrt(S)) if S > 1 else None,
        },
        "methods": {
            method: {
                "accuracy": float(credit[method].mean()),
                "ci95": interval(draws[:, i]),
                "tokens": float(methods[method][1].mean()),
            }
            for i, method in enumerate(names)
        },
        "equal_cost": equal_cost(x, float(refined.mean()), maj_of_pool),
        "by_correct": lines,
        "rescued": rescued,
        "order": order_sensitivity(x) if K > 1 else None,
        "unanimous": float(((votes == votes[:, :1]).all(1) & (votes[:, 0] >= 0)).mean()),
        "answered": {"candidates": float((x.votes >= 0).mean()), "refinements": float((x.refined >= 0).mean())},
        "cut_off": {"candidates": mean(x.cut), "refinements": mean(x.refined_cut)},
        "length": {"candidate": mean(x.tokens), "refinement": mean(x.refined_tokens)},
        "tokens": {
            "candidates": mean(x.tokens.sum(2)),
            "refinement": mean(x.refined_tokens.sum(2)),
            "prompt": mean(x.prompt_tokens),
            "refinement_prompt": mean(x.refined_prompt_tokens.sum(2)),
        },
        "seconds": {"candidates": seconds("sample_seconds"), "refinement": seconds("refine_seconds")},
    }
    return row


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


def percent(value, digits=1):
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def points(value, ci=None):
    text = f"{100 * value:+.1f}"
    return text if ci is None else f"{text} [{100 * ci[0]:+.1f}, {100 * ci[1]:+.1f}]"


def tables(rows):
    """The rows as tables: a list of (title, head, lines, note)."""
    same = len({(row["n"], row["k"]) for row in rows}) == 1
    n, k = rows[0]["n"], rows[0]["k"]

    def general(method):  # rows with different N share a column
        kind = method.partition("@")[0]
        size = {"pass": "N", "union": "N+K", "refmaj": "K"}.get(kind, "N")
        return method if same or "@" not in method or method == "pass@1" else f"{kind}@{size}"

    columns = list(dict.fromkeys(general(method) for row in rows for method in row["methods"]))
    columns.append(columns.pop(columns.index(general(f"pass@{n}"))))
    accuracy = []
    for row in rows:
        found = {general(method): percent(value["accuracy"]) for method, value in row["methods"].items()}
        accuracy.append([row["name"], str(row["problems"]), *(found.get(column, "-") for column in columns)])

    gap = []
    for row in rows:
        g, (cost, whole) = row["gap"], (row["equal_cost"][key] for key in ("generated", "with_prompts"))

        def at(cost):
            return "-" if cost is None else f"{'~' * cost['extrapolated']}{percent(cost['maj'])} @{cost['k']:.1f}"

        test = g["mcnemar"]
        gap.append(
            [row["name"], points(g["points"], g["ci95"]), "-" if g["relative"] is None else points(g["relative"]) + "%"]
        )
        gap[-1] += [f"{test['p']:.2g} ({test['better']}:{test['worse']})"]
        gap[-1] += (
            ["-" if g["seed_se"] is None else f"{100 * g['seed_se']:.1f}"] if any(r["seeds"] > 1 for r in rows) else []
        )
        gap[-1] += [percent(row["refined"]), at(cost), at(whole)]
    head = [
        "",
        "gap, points [95%]",
        "relative",
        "p (better:worse)",
        *(["seed se"] if any(r["seeds"] > 1 for r in rows) else []),
    ]
    head += ["refined", "maj, same tokens", "with prompts"]

    became = []
    for row in rows:
        became.append([row["name"], *(f"{a:g}/{b}" for a, b in row["rescued"].values()), percent(row["unanimous"])])
        changed = row["order"] and row["order"]["changed"]
        became[-1].append(percent(changed))
        became[-1] += [
            f"{percent(row[key]['candidates'])} / {percent(row[key]['refinements'])}" for key in ("answered", "cut_off")
        ]

    cost = []
    for row in rows:
        pairs = [(row["tokens"]["candidates"], row["tokens"]["refinement"])]
        pairs += [(row["tokens"]["prompt"], row["tokens"]["refinement_prompt"])]
        cost.append([row["name"], *(("-" if None in pair else f"{pair[0]:,.0f} + {pair[1]:,.0f}") for pair in pairs)])
        cost[-1].append(f"{row['length']['candidate']:,.0f} / {row['length']['refinement']:,.0f}")
        pair = list(row["seconds"].values())
        cost[-1].append("-" if None in pair else f"{pair[0]:.2f} + {pair[1]:.2f}")
        cost[-1].append("-" if not row["parameters"] else f"{row['parameters'] / 1e6:,.1f} M")
    return [
        ("Accuracy", ["", "problems", *columns], accuracy, f"N = {n}, K = {k}" if same else "N and K differ by row"),
        (
            "Refinement against the vote on the same candidates, and against a vote at equal cost",
            head,
            gap,
            "p: exact McNemar test. @k: the vote of so many candidates as cost the same as the candidates and one "
            "refinement, in generated tokens, and with prompts; ~ continued in a line beyond the candidates there are",
        ),
        (
            "What became of them",
            ["", "all wrong", "minority", "tied", "broken", "unanimous", "order", "answered", "cut off"],
            became,
            "refined right where all candidates are wrong, where right ones are outvoted, where the vote is tied; "
            "refined wrong where the vote is right; order: the answer changes with the order of the candidates; "
            "answered, cut off: candidates / refinements",
        ),
        (
            "Cost of a problem",
            ["", "tokens generated", "prompt tokens", "length of one", "seconds", "parameters"],
            cost,
            "candidates + refinements; length: candidate / refinement; each prompt is read once for all its samples",
        ),
    ]


def as_text(title, head, lines, note, width=100):
    """A table for the terminal, `width` columns at most: long names lose their middle."""
    lines = [head, *lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    gap = 2 if sum(widths) + 2 * len(widths) - 2 <= width else 1
    widths[0] = max(6, min(widths[0], width - sum(widths[1:]) - gap * (len(widths) - 1)))
    text = [title]
    for name, *cells in lines:
        if len(name) > widths[0]:
            name = name[: widths[0] // 2 - 1] + "…" + name[len(name) - (widths[0] - widths[0] // 2) :]
        text.append(
            (" " * gap).join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:]))]).rstrip()
        )
    return "\n".join([*text, *textwrap.wrap(f"({note})", width)])


def as_markdown(title, head, lines, note):
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join([f"## {title}", "", *("| " + " | ".join(row) + " |" for row in rows), "", f"{note}."])


def notes(rows, found, grader):
    """What the tables do not say, a sentence each."""
    text = [
        "pass@k and maj@k are exact expectations over subsets; intervals: 10,000 bootstrap draws of problems, seed 0."
    ]
    for key, values in (found or {}).items():
        if values["spearman"] is not None:
            ci = (
                "no interval for so few" if values["ci95"] is None else "95% [{:+.2f}, {:+.2f}]".format(*values["ci95"])
            )
            what = key.replace("_and_", " against ")
            text.append(f"{what}: rank correlation {values['spearman']:+.2f} over {values['models']} rows ({ci}).")
    if grader.stuck:
        text.append(
            f"{len(grader.stuck)} comparisons took longer than {grader.limit:g} s or crashed, and count as unequal."
        )
    return text


def show(identity, path):
    """One problem of a candidates or refined file on the terminal: answers, votes and refinement side by side."""
    row = next(
        (row for row in each_row(path, keys=("id", "problem", "candidates")) if str(row["id"]) == identity), None
    )
    if row is None:
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
STYLES = {  # method, without its @ -> marker, colour
    "pass@1": ("o", "0.75"),
    "maj": ("s", "0.35"),
    "weighted": ("<", "white"),
    "logprob": ("v", "white"),
    "certainty": (">", "0.75"),
    "score": ("p", "0.75"),
    "refined": ("D", BLUE),
    "refmaj": ("P", BLUE),
    "union": ("X", BLUE),
    "pass": ("^", "black"),
}


def style(method):
    marker, colour = STYLES.get(method) or STYLES[method.partition("@")[0]]
    return {"marker": marker, "color": colour, "markeredgecolor": "black", "markeredgewidth": 0.6, "linestyle": "none"}


def finish(fig, axes, path, plt, legend=()):
    """What all figures have in common. `legend`: the axes whose labelled lines it explains, above all panels."""
    for axis in axes:
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {label: line for axis in legend for line, label in zip(*axis.get_legend_handles_labels())}
    if handles:
        fig.legend(handles.values(), handles, loc="outside upper center", ncols=int(fig.get_figwidth() / 1.7), frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def draw_methods(rows, path, plt):
    """On the left the accuracy of each method with its interval, on the right the gap."""
    most = max(len(row["methods"]) for row in rows)
    size = (9, 1.4 + len(rows) * (0.3 + 0.13 * most))
    fig, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=(3, 2), sharey=True, layout="constrained")
    for y, row in enumerate(rows):
        for i, (method, found) in enumerate(row["methods"].items()):
            at = y + 0.8 * ((i + 0.5) / len(row["methods"]) - 0.5)
            left.plot([100 * x for x in found["ci95"]], [at, at], color="0.6", linewidth=1.2, zorder=1)
            general = method if len({row["n"] for row in rows}) == 1 or method == "pass@1" else method.partition("@")[0]
            left.plot(100 * found["accuracy"], at, label=general, markersize=7, **style(method))
        gap, (low, high) = 100 * row["gap"]["points"], (100 * x for x in row["gap"]["ci95"])
        right.errorbar(gap, y, xerr=[[gap - low], [high - gap]], fmt="D", color=BLUE, capsize=4, markersize=7)
        right.annotate(f"{gap:+.1f}", (gap, y), (0, 8), textcoords="offset points", ha="center", fontsize=9)
        if y:
            for axis in (left, right):
                axis.axhline(y - 0.5, color="0.8", linewidth=0.8)
    left.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], ylim=(len(rows) - 0.5, -0.5))
    left.set(xlabel="problems solved (%), 95% interval", xlim=(-2, 102))
    at_n = f"@{rows[0]['n']}" if len({row["n"] for row in rows}) == 1 else "@N"
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel=f"Refinement Gap: refined - maj{at_n}\n(points, 95% interval)")
    right.margins(x=0.15)
    finish(fig, [left, right], path, plt, legend=[left])


def panels(rows, plt, height, parts=1, **options):
    """A panel (of `parts` axes above each other) for each row, four beside each other -> figure, axes [parts, rows]."""
    across = min(len(rows), 4)
    down = -(-len(rows) // across)
    size = (max(4.5, 3.1 * across), 0.6 + height * down)
    fig, axes = plt.subplots(parts * down, across, figsize=size, squeeze=False, layout="constrained", **options)
    axes = axes.reshape(down, parts, across).swapaxes(0, 1).reshape(parts, -1)
    for column in range(len(rows), axes.shape[1]):
        for axis in axes[:, column]:
            axis.remove()
    for axis, row in zip(axes[0], rows):
        axis.set_title(row["name"], fontsize=10)
    return fig, axes[:, : len(rows)]


def draw_frontier(rows, path, plt):
    """Accuracy against tokens: votes and a perfect judge of 1..N candidates, and the methods that cost more."""
    fig, [axes] = panels(rows, plt, 3.0, sharey=True)
    for axis, row in zip(axes, rows):
        numbers = range(1, row["n"] + 1)
        tokens = [row["tokens"]["candidates"] * k / row["n"] for k in numbers]
        for kind, line in (("maj", "-"), ("pass", ":")):
            look = {**style(kind), "linestyle": line, "markersize": 4 if row["n"] <= 16 else 0}
            axis.plot(
                tokens,
                [100 * row[f"{kind}@{k}"] for k in numbers],
                label=f"{kind}@k, k = 1..N",
                **look | {"color": "0.35"},
            )
        for method, found in row["methods"].items():
            if method.partition("@")[0] not in ("pass", "maj"):
                look = {**style(method), "markersize": 8 if method == "refined" else 6}
                axis.plot(found["tokens"], 100 * found["accuracy"], label=method.partition("@")[0], **look)
                if method == "refined":
                    axis.vlines(found["tokens"], *(100 * x for x in found["ci95"]), color=BLUE, linewidth=1.2)
        axis.set_xlim(left=0)
        axis.set_xlabel("tokens generated a problem")
    for axis in axes[::4]:
        axis.set_ylabel("problems solved (%)")
    finish(fig, axes, path, plt, legend=axes)


def draw_outcomes(rows, path, plt):
    """By the number of right candidates: how many problems, and how often vote and refinement are right."""
    fig, (above, below) = panels(rows, plt, 3.6, parts=2, height_ratios=(1, 2) * -(-len(rows) // 4))
    for top, axis, row in zip(above, below, rows):
        lines = row["by_correct"]
        numbers, problems = [line["correct"] for line in lines], [line["problems"] for line in lines]
        top.bar(
            numbers, [100 * count / sum(problems) for count in problems], color="0.7", edgecolor="0.3", linewidth=0.6
        )
        there = [line for line in lines if line["problems"]]
        for key, kind, line in (("maj", "maj", "-"), ("refined", "refined", "--")):
            look = {**style(kind), "linestyle": line, "markersize": 6}
            label = "vote of the candidates" if key == "maj" else "refined"
            axis.plot([x["correct"] for x in there], [100 * x[key] for x in there], label=label, **look)
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
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
    for row in (row for row in rows if row["parameters"]):
        gap, (low, high) = 100 * row["gap"]["points"], (100 * x for x in row["gap"]["ci95"])
        for axis, x in zip(axes, (row["parameters"], 100 * row["pass@1"])):
            axis.errorbar(x, gap, yerr=[[gap - low], [high - gap]], fmt="D", color=BLUE, capsize=3, markersize=6)
            axis.annotate(row["name"], (x, gap), (6, 4), textcoords="offset points", fontsize=8)
    for axis, what in zip(axes, ("parameters", "pass@1 (%)")):
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel(what)
        axis.margins(x=0.25)
    axes[0].set_xscale("log")
    axes[0].set_ylabel("Refinement Gap (points, 95%)")
    finish(fig, axes, path, plt)


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
    sets, out = SUITES.get(args.suite) or args.suite.split(","), Path(args.out)
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
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="[NAME=]FILE[,FILE...]", help="refined files; one table row each")
    parser.add_argument("--out", default=".", help="folder for report.json, report.md, figures and grades.jsonl")
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds for the comparison of two answers")
    parser.add_argument("--show", metavar="ID", help="show one problem of one file, and stop")
    group = parser.add_argument_group("suite (other flags are given to sample.py and refine.py)")
    group.add_argument("--suite", help=f"sample, refine and report: {', '.join(SUITES)}, or sets and files with commas")
    group.add_argument("--model", default="tiny", help="short name, hub id or folder")
    group.add_argument("--n", type=int, default=8, help="candidates a problem")
    group.add_argument("--k", type=int, default=1, help="refinements a problem")
    group.add_argument("--limit", type=int, help="only the first so many problems of each set")
    args, flags = parser.parse_known_args(argv)
    if flags and not args.suite:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if bool(args.suite) == bool(args.files):
        parser.error("give refined files, or --suite")

    if args.show:
        if len(args.files) != 1:
            raise InputError(f"--show {args.show}: give one file, not {len(args.files)}")
        return show(args.show, args.files[0])
    files = run_suite(args, flags) if args.suite else args.files
    report(files, Path(args.out), args.time_limit)


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
    rows = [(name, [(path, read_refined(path)) for path in paths]) for name, paths in names.items()]
    grader, done = Grader(limit, out / "grades.jsonl"), []
    for name, read in rows:
        with tqdm(desc=f"grade {name}", unit=" comparisons") as bar:

            def progress(number, total, bar=bar):
                bar.total = total
                bar.update(number - bar.n)

            outcomes = grade_files(read, grader, progress)
        read.clear()
        done.append(report_row(name, outcomes, [read_meta(path) for path in names[name]]))
    grader.close()
    rows, found = done, scaling(done)
    grading = {"asked": len(grader.known), "stuck": len(grader.stuck), "limit": limit}
    write_json(out / "report.json", {"rows": rows, "scaling": found, "grading": grading})
    figures = draw(rows, found, out)
    parts, sentences = tables(rows), notes(rows, found, grader)
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
