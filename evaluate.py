"""Grade answers, compare ways to aggregate candidates, and measure the Refinement Gap.

    python evaluate.py before.refined.jsonl after.refined.jsonl --out runs/tiny    one row a file
    python evaluate.py mine=seed0.refined.jsonl,seed1.refined.jsonl                several seeds, one row
    python evaluate.py x.candidates.jsonl                                          before anything is refined
    python evaluate.py --show test-7 after.refined.jsonl                           one problem, on the terminal
    python evaluate.py --suite math --model qwen-1.5b --n 8 --limit 100            sample, refine and report

Writes report.json, report.md and figures. Only texts and right answers are needed: what a file does not say (tokens,
log-probabilities, refinements) is a dash in the tables. Reading order: voting, estimators, reading files, methods, the
gap, the report, the suite. grade.py says which answers mean the same, figures.py draws and prints the report.

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

from figures import BLUE, GREY, as_markdown, as_text, cell, correlations, draw, tables_of
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


def spearman(x, y):
    """Rank correlation of x and y [n] and its 95% interval (Bonett and Wright 2000), over models as a sample.

    None for fewer than 3, or where one of them is constant; no interval for fewer than 4. A perfect order
    counts as half a swap of neighbours less in the interval, which would have no width otherwise.
    """
    both, n, r, ends = np.array([x, y], dtype=float), len(x), None, None
    above, equal = both[:, :, None] > both[:, None], both[:, :, None] == both[:, None]
    ranks = above.sum(2) + (equal.sum(2) + 1) / 2  # equal values share the mean of their ranks
    if n >= 3 and ranks.std(1).min() > 0:
        r = float(np.clip(np.corrcoef(ranks)[0, 1], -1, 1))
    if r is not None and n >= 4:
        bound = 1 - 6 / (n**3 - n)
        z, half = math.atanh(min(max(r, -bound), bound)), 1.96 * math.sqrt((1 + r * r / 2) / (n - 3))
        ends = [min(r, math.tanh(z - half)), max(r, math.tanh(z + half))]
    return {"models": n, "spearman": r, "ci95": ends}


# ------------------------------------------------------------------------------------------------
# Reading files


@dataclass
class Outcomes:
    """What counts about the answers of S files (seeds) to the same P problems, N candidates and K refinements each.

    A number that a file does not have is nan. In a file of candidates K is 0.
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
    copied: np.ndarray  # [S, P, K] has the text of one of the candidates
    order: np.ndarray  # [S, P, K, N]: which candidate stood at which place of the prompt, -1 for none


# What a file calls these numbers about each candidate and about each refinement.
CANDIDATE = dict(tokens="n_tokens", logprob="logprob", certainty="self_certainty", score="score", cut="finish_reason")
REFINEMENT = dict(refined_tokens="n_tokens", refined_cut="finish_reason", refined_prompt_tokens="n_prompt_tokens")


def completions(row, key, where):
    """The candidates or refinements of a row; InputError where there are none, or one of them has no text."""
    if not isinstance(row[key], list) or not row[key]:
        raise InputError(f"{where}: its {key!r} are empty or no list, but {reprlib.repr(row[key])}")
    for i, item in enumerate(row[key]):
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise InputError(f"{where}: its {key!r} lack text: number {i} is {reprlib.repr(item)}")
    return row[key]


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
    candidates = completions(row, "candidates", where)
    refinements = completions(row, "refinements", where) if "refinements" in row else []
    if isinstance(row.get("answer"), (list, dict)):
        raise InputError(f"{where}: its answer is no text but {reprlib.repr(row['answer'])}")
    order = np.full((len(refinements), len(candidates)), -1, dtype=np.int16)
    for places, refinement in zip(order, refinements):
        shown = refinement.get("order") or []
        if not isinstance(shown, list) or not all(i in range(len(places)) and shown.count(i) == 1 for i in shown):
            raise InputError(f"{where}: the order {reprlib.repr(shown)} is not one of its {len(places)} candidates")
        places[: len(shown)] = shown
    texts = [strip_thinking(item["text"], str(row.get("prompt") or "")) for item in candidates]
    refined = [strip_thinking(item["text"], str(item.get("prompt") or "")) for item in refinements]
    originals = set(texts) - {""}  # nobody copies a candidate that is all thought: no prompt shows it
    return {
        "answer": gold_answer(row.get("answer")),
        "answers": [extract_answer(text) for text in texts],
        "refinements": [extract_answer(text) for text in refined],
        "copied": np.array([text in originals for text in refined], dtype=float),
        "prompt_tokens": numbers([row], "n_prompt_tokens", where),
        **{field: numbers(candidates, key, where) for field, key in CANDIDATE.items()},
        **{field: numbers(refinements, key, where) for field, key in REFINEMENT.items()},
        "order": order,
    }


def read_file(path):
    """A candidates or refined file -> {id: what read_problem says}, for problems that can be graded.

    InputError names the file and the row where it is something else, or where there are more or fewer candidates
    or refinements than in the first row.
    """
    problems, skipped, first = {}, 0, None
    for row in each_row(path, keys=("id", "problem", "answer", "candidates")):
        problem = read_problem(row, where := f"{path}, id {row['id']!r}")
        size = f"{len(problem['answers'])} candidates and {len(problem['refinements'])} refinements"
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
            if any(len(problem[key]) != len(first[identity][key]) for key in ("answers", "refinements")):
                raise InputError(f"{path}, id {identity!r}: more or fewer candidates or refinements than {paths[0]}")
            if problem["answer"] != first[identity]["answer"]:
                raise InputError(f"{path}, id {identity!r}: another right answer than in {paths[0]}")


def grade_files(files, grader, what=None):
    """Several files about the same problems: a list of what read_file gave -> Outcomes."""
    S, first = len(files), files[0]
    golds = [problem["answer"] for problem in first.values()]
    answers = [[a for problems in files for a in problems[i]["answers"]] for i in first]  # [P][S * N]
    refined = [[a for problems in files for a in problems[i]["refinements"]] for i in first]  # [P][S * K]
    # math-verify is asked in two rounds, so that its processes have all there is to do at once: which answers are
    # right, and which of the wrong ones are the same.
    different = [list(distinct(*both).values()) for both in zip(answers, refined)]
    grader.grade(((gold, a) for gold, some in zip(golds, different) for a in some), what)
    wrong = [[a for a in some if not grader.equal(gold, a)] for gold, some in zip(golds, different)]
    grader.grade((pair for some in wrong for pair in itertools.permutations(some, 2)), what)

    number = [classes(gold, some, grader, more) for gold, some, more in zip(golds, answers, refined)]
    parts = np.split(np.array(number, dtype=np.int16), [len(answers[0])], 1)  # [P, S * N], [P, S * K]
    votes, refined_votes = (part.reshape(len(part), S, part.shape[1] // S).swapaxes(0, 1) for part in parts)
    names = [field.name for field in dataclasses.fields(Outcomes)[2:]]
    arrays = {name: np.array([[problems[i][name] for i in first] for problems in files]) for name in names}
    return Outcomes(votes=votes, refined=refined_votes, **arrays)


def read_meta(path, refined):
    """What the record beside a candidates or a refined file says: model, parameters, and seconds of both stages."""

    def number(record, key):
        return record[key] if type(record.get(key)) in (int, float) else None

    meta = read_json(meta_path(path)) if meta_path(path).exists() else {}
    if not meta.get("complete", True):
        print(f"{path}: not complete yet; run the command that makes it again for the whole")
    sampled = meta_path(meta.get("data") or "-") if refined else meta_path(path)
    before = number(read_json(sampled), "seconds") if sampled.exists() else None
    seconds = {"candidates": before, "refinement": number(meta, "seconds") if refined else None}
    return {"model": meta.get("model"), "parameters": number(meta, "parameters"), "seconds": seconds}


# ------------------------------------------------------------------------------------------------
# Methods

ALL, ONE = np.sum, np.mean  # the tokens of all candidates or refinements of a problem, or of one of them


@dataclass
class Method:
    """A way from candidates and refinements to an answer. The top of this file explains each."""

    name: str  # in tables and in report.json
    label: str  # in words, with {n} candidates and {k} refinements
    credit: Callable  # Outcomes -> [S, P], the share of a right answer
    needs: tuple = ()  # the fields of Outcomes that it cannot do without
    candidates: Callable = ALL  # what it costs: ALL or ONE of the candidates
    refinements: Callable | None = None  # and ALL, ONE or none of the refinements
    marker: str = "o"  # in figures
    colour: str = GREY  # the refinement and the vote that it is measured against stand out

    def tokens(self, x):
        """Outcomes -> [S, P], the tokens generated for it."""
        of_refinements = self.refinements(x.refined_tokens, -1) if self.refinements else 0
        return self.candidates(x.tokens, -1) + of_refinements


def probabilities(x):
    """The candidates' own, relative to the likeliest with an answer: relative to one without, all could round to 0."""
    most = x.logprob.max(-1, keepdims=True, where=x.votes >= 0, initial=-np.inf)
    return np.exp(np.minimum(x.logprob - most, 0))


def mean_logprob(x):
    return x.logprob / np.maximum(x.tokens, 1)


def together(x):
    return np.concatenate([x.votes, x.refined], -1)


METHODS = [
    Method("pass@1", "one sample", lambda x: (x.votes == 0).mean(-1), candidates=ONE),
    Method("maj@N", "majority vote of {n}", lambda x: vote(x.votes), marker="s", colour="black"),
    Method("weighted", "vote by probability", lambda x: vote(x.votes, probabilities(x)), ("logprob",), marker="<"),
    Method(
        "logprob", "likeliest candidate", lambda x: best(x.votes, mean_logprob(x)), ("logprob", "tokens"), marker="v"
    ),
    Method(
        "certainty", "vote by self-certainty", lambda x: vote(x.votes, borda(x.certainty)), ("certainty",), marker=">"
    ),
    Method("score", "highest score", lambda x: best(x.votes, x.score), ("score",), marker="p"),
    Method("refined", "refined", lambda x: (x.refined == 0).mean(-1), ("refined",), ALL, ONE, "D", BLUE),
    Method("refmaj", "vote of {k} refinements", lambda x: vote(x.refined), ("refined",), ALL, ALL, "P"),
    Method("union", "vote of all, refined too", lambda x: vote(together(x)), ("refined",), ALL, ALL, "X"),
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
    """How many candidates cost the same as N candidates and one refinement, and their vote, from maj_at_k [P, M].

    -> {"generated": counted in generated tokens, "with_prompts": together with the prompts, each of which is computed
    once for all its samples}, and of each {"k": that many, "credit": their vote [P], "extrapolated": is M too few?}.
    k is None where tokens are not known. With several seeds M is the number of all their candidates. Where M is too
    few, the curve is continued in a straight line through its last steps, up to k = 2 M; there is no credit beyond.
    The true curve flattens, so the straight line overestimates the vote.
    """
    most, found = maj_at_k.shape[1], {}
    generated = x.refined_tokens.mean()
    for name, cost in (("generated", generated), ("with_prompts", generated + x.refined_prompt_tokens.mean())):
        k = x.votes.shape[2] + cost / max(x.tokens.mean(), 1)
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
    K, N = x.order.shape[2:]
    first, second = np.triu_indices(K, 1)
    other = (x.order[:, :, first] != x.order[:, :, second]).any(3)  # [S, P, pairs]
    differ = x.refined[:, :, first] != x.refined[:, :, second]
    right = np.broadcast_to((x.votes == 0)[:, :, None], x.order.shape)
    right = np.take_along_axis(right, x.order.clip(0).astype(int), 3)  # [S, P, K, N] by place
    mixed = (x.order >= 0).all(3) & ~right.all(3)  # [S, P, K]
    chosen = [(x.refined == 0)[mixed & right[..., place]] for place in range(N)]
    at_place = [[mean(values), len(values)] for values in chosen]
    return {"changed": mean(differ[other]), "pairs": int(other.sum()), "at_place": at_place}


def agreement(votes):
    """How far candidates agree: votes [S, P, N] -> {name: [S, P]}, of which one is true of each problem.

    Of N candidates, those without an answer are in no class: all in one class, more than half, some votes, none.
    """
    N, most = votes.shape[2], class_sums(votes, np.ones(votes.shape)).max(2)  # [S, P]
    above = {"unanimous": most == N, "majority": (most < N) & (2 * most > N)}
    return above | {"split": (most > 0) & (2 * most <= N), "none": most == 0}


def count(values, at):
    """values, at [S, P] -> [how many of them, of how many] where `at` is true."""
    total = round(float(values[at].sum()), 6)
    return [int(total) if total.is_integer() else total, int(at.sum())]


def flips(maj, refined, at=True):
    """How many votes the refinement turns around, where `at` is true: credits maj, refined [S, P] -> two counts."""
    return {"wrong_to_right": count(refined, at & (maj == 0)), "right_to_wrong": count(1 - refined, at & (maj == 1))}


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
        "flips": {
            **flips(maj, refined),
            "by_agreement": {name: flips(maj, refined, at) for name, at in agreement(x.votes).items()},
        },
        "order": order_sensitivity(x),
    }


def report_row(name, x, metas):
    """All statistics of one row, for report.json; `metas` are the read_meta of its files."""
    (S, P, N), K = x.votes.shape, x.refined.shape[2]
    methods = methods_of(x)
    credits = {method.name: method.credit(x) for method in methods}  # [S, P] each
    maj, refined = credits["maj@N"], credits.get("refined", np.full((S, P), np.nan))
    right = (x.votes == 0).sum(2)  # [S, P]
    pass_at = pass_at_k(N, right.ravel())  # [S * P, N]
    maj_at = majority_at_k(x.votes.reshape(S * P, N))  # [S * P, N]
    pool = x.votes.swapaxes(0, 1).reshape(P, S * N)  # [S, P, N] -> [P, S * N], the candidates of all seeds
    costs = equal_cost(x, maj_at if S == 1 else majority_at_k(pool)) if K else {}
    columns = {method: credit.mean(0) for method, credit in credits.items()}  # [P] each, over seeds
    columns |= {kind: cost["credit"] for kind, cost in costs.items() if "credit" in cost}
    draws = dict(zip(columns, bootstrap(np.stack(list(columns.values()), 1)).T))  # [draws] each
    unknown = dict.fromkeys(("refined", "gap", "equal_cost", "rescued", "flips", "order"))
    spent = {"candidates": x.tokens, "refinement": x.refined_tokens}
    spent |= {"prompt": x.prompt_tokens, "refinement_prompt": x.refined_prompt_tokens}

    def both(of_candidates, of_refinements):
        return {"candidates": mean(of_candidates), "refinements": mean(of_refinements)}

    def seconds(stage):  # a problem
        known = [meta["seconds"][stage] for meta in metas]
        return None if None in known else sum(known) / (S * P)

    return {
        "name": name,
        "model": metas[0]["model"],
        "parameters": metas[0]["parameters"],
        **{"problems": P, "n": N, "k": K, "seeds": S},
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
        "unanimous": mean(agreement(x.votes)["unanimous"]),
        "copied": mean(x.copied),
        "answered": both(x.votes >= 0, x.refined >= 0),
        "cut_off": both(x.cut, x.refined_cut),
        "unboxed": both((x.votes < 0)[x.cut == 0], (x.refined < 0)[x.refined_cut == 0]),  # of those that ended
        "length": both(x.tokens, x.refined_tokens),
        "tokens": {key: mean(tokens.sum(2)) if tokens.size else None for key, tokens in spent.items()},
        "seconds": {stage: seconds(stage) for stage in ("candidates", "refinement")},
    }


def scaling(rows):
    """Over the rows of several models: does the gap go with the model's size, and with what one sample is worth?"""
    rows = [row for row in rows if row["parameters"] and row["gap"]]
    if len({row["parameters"] for row in rows}) < 2:
        return None
    gap = [row["gap"]["points"] for row in rows]
    return {f"gap_and_{key}": spearman([row[key] for row in rows], gap) for key in ("parameters", "pass@1")}


# ------------------------------------------------------------------------------------------------
# The report


def notes(rows, found, grader):
    """What the tables do not say, a sentence each."""
    text = ["pass@k and maj@k are exact expectations over subsets; 95% intervals: 10,000 bootstrap draws, seed 0."]
    text += correlations(found)
    if bare := [row["name"] for row in rows if not row["k"]]:
        text.append(f"No Refinement Gap for {', '.join(bare)}: there are no refinements; refine.py makes them.")
    makers = {"candidates": "sample.py", "refinements": "refine.py"}
    for row, (kind, script) in itertools.product(rows, makers.items()):
        cut, unboxed = row["cut_off"][kind] or 0, row["unboxed"][kind] or 0
        if cut >= 0.1:
            what = f"{row['name']}: {cut:.0%} of the {kind} were cut off by the length limit"
            text.append(f"{what}, and a cut-off one seldom has an answer; give {script} a larger --max-new-tokens.")
        if unboxed >= 0.1:
            what = f"{row['name']}: {unboxed:.0%} of the {kind} that were not cut off have no answer"
            text.append(rf"{what}: the model does not put it in a box, \boxed{{...}}, so that grading sees none.")
    if n := len(grader.stuck):
        text.append(f"{n} comparisons took longer than {grader.limit:g} s or crashed, and count as unequal.")
    return text


def say(*parts, sep="\n"):
    """Print texts, with a ? for what this terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(sep.join(parts).encode(encoding, "replace").decode(encoding))


def show(identity, path, limit):
    """One problem of a candidates or refined file on the terminal: answers, votes and refinement side by side."""
    rows = each_row(path, keys=("id", "problem", "candidates"))
    if (row := next((row for row in rows if str(row["id"]) == identity), None)) is None:
        raise InputError(f"{path}: no problem with id {identity!r} in it")
    problem, grader = read_problem(row, where := f"{path}, id {identity!r}"), Grader(limit)
    gold, N = problem["answer"], len(problem["answers"])
    number = classes(gold, problem["answers"], grader, problem["refinements"])
    grader.close()
    items, answers = row["candidates"] + row.get("refinements", []), problem["answers"] + problem["refinements"]
    lines = [["", "", "answer", "votes", "tokens", "logprob", "certainty", "ended", "order"]]
    for i, (item, answer, own) in enumerate(zip(items, answers, number)):
        kind = f"candidate {i}" if i < N else f"refinement {i - N}"
        mark = "no answer" if own < 0 else "-" if gold is None else "right" if own == 0 else "wrong"
        shown = "-" if answer is None else answer if len(answer) <= 30 else answer[:29] + "…"
        votes = "-" if own < 0 else str(number[:N].count(own))
        tokens, total, certainty = (
            mean(numbers([item], key, where)) for key in ("n_tokens", "logprob", "self_certainty")
        )
        logprob = None if None in (tokens, total) else total / max(tokens, 1)
        details = [cell("{:.0f}", tokens), cell("{:.2f}", logprob), cell("{:.2f}", certainty)]
        ended, order = str(item.get("finish_reason") or "-")[:12], " ".join(map(str, item.get("order") or []))
        lines.append([kind, mark, shown, votes, *details, ended, order])
    parts = [textwrap.fill(row["problem"], 100, replace_whitespace=False), f"\nright answer: {gold}"]
    parts.append(as_text("", lines, "votes: candidates with the same answer; logprob: mean a token"))
    for (kind, mark, *_), item in zip(lines[1:], items):
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
    grader, rows = Grader(limit, out / "grades.jsonl"), []
    for name, paths in files.items():
        outcomes = grade_files(read[name], grader, name)
        rows.append(report_row(name, outcomes, [read_meta(path, outcomes.refined.size) for path in paths]))
    grader.close()
    found = scaling(rows)
    grading = {"asked": len(grader.known), "stuck": len(grader.stuck), "limit": limit}
    write_json(out / "report.json", {"rows": rows, "scaling": found, "grading": grading})
    tables, sentences = tables_of(rows, METHODS), notes(rows, found, grader)
    with disk_errors(out):
        figures = draw(rows, METHODS, found, out)
    parts = ["# Report", *(as_markdown(*table) for table in tables), *(f"- {sentence}" for sentence in sentences)]
    write_text(out / "report.md", "\n\n".join([*parts, *(f"![{name}]({name})" for name in figures)]) + "\n")
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
    group = parser.add_argument_group("suite (all other flags are given to sample.py and refine.py)")
    group.add_argument("--suite", help=f"sample, refine and report: {', '.join(SUITES)}, or sets and files with commas")
    group.add_argument("--model", default="tiny", help="short name, hub id or folder (default: tiny)")
    group.add_argument("-n", "--n", type=int, default=8, help="candidates a problem (default: 8)")
    group.add_argument("--k", type=int, default=1, help="refinements a problem (default: 1)")
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
