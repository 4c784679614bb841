"""Grade answers, compare ways to aggregate candidates, and measure the Refinement Gap.

    python evaluate.py before.refined.jsonl after.refined.jsonl --out runs/tiny    one row a file
    python evaluate.py mine=seed0.refined.jsonl,seed1.refined.jsonl                several seeds, one row
    python evaluate.py --show test-7 after.refined.jsonl                           one problem, on the terminal
    python evaluate.py --suite math --model qwen-1.5b --n 8 --limit 100            sample, refine and report

Writes report.json, report.md and figures. Reading order: voting, estimators, the gap, the report, figures,
the suite. Which answers mean the same is what grade.py says.

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
import itertools
import math
import shlex
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from files import InputError, command_line, each_row, meta_path, read_json, write_json
from grade import Grader, answer_of, as_fraction, gold_answer, normalise, strip_thinking

# ------------------------------------------------------------------------------------------------
# Voting


def canonical(answer):
    """What stands for an answer and for those that are plainly equal to it: an exact number or its one spelling."""
    text = normalise(answer)
    value = as_fraction(text)
    return text if value is None else value


def distinct(answers, more=()):
    """The answers that are not plainly equal, by what stands for them; in an order that is not the candidates'."""
    found = {}
    for answer in itertools.chain(*(sorted(set(group) - {None}) for group in (answers, more))):
        found.setdefault(canonical(answer), answer)
    return found


def classes(gold, answers, grader, more=()):
    """Number the classes of equal answers: gold "1/2", ["0.5", "3", None, "3.0", "4"] -> [0, 1, -1, 1, 2].

    Class 0 is right, -1 casts no vote. Wrong answers are compared in sorted order with one member of each
    class, so that neither the order of the candidates nor an equality that is not quite transitive changes
    the outcome. `more`: answers (of refinements) that are numbered after these, and do not change their classes.
    """
    number, members = {}, []
    for key, answer in distinct(answers, more).items():
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
    return sums.reshape(rows, width)  # [R, classes]


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
    same = (certainty[:, None, :] == certainty[:, :, None]).sum(2)  # [R, N]
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

    n, a, b, r, ends = len(x), ranks(x), ranks(y), None, None
    if n >= 3 and a.std() > 0 and b.std() > 0:
        r = float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
    if r is not None and n >= 4:
        bound = 1 - 6 / (n**3 - n)
        z, half = math.atanh(min(max(r, -bound), bound)), 1.96 * math.sqrt((1 + r * r / 2) / (n - 3))
        ends = [min(r, math.tanh(z - half)), max(r, math.tanh(z + half))]
    return {"models": n, "spearman": r, "ci95": ends}


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


# What a file calls these numbers about each candidate and about each refinement.
CANDIDATE = dict(tokens="n_tokens", logprob="logprob", certainty="self_certainty", score="score", cut="finish_reason")
REFINEMENT = dict(refined_tokens="n_tokens", refined_cut="finish_reason", refined_prompt_tokens="n_prompt_tokens")


def completions(row, key, where):
    """The candidates or refinements of a row; InputError where there are none, or they are something else."""
    items = row[key] if isinstance(row[key], list) else []
    kinds = [(type(x.get("text")), type(x.get("n_tokens"))) for x in items if isinstance(x, dict)]
    if not items or kinds != [(str, int)] * len(items):
        raise InputError(f"{where}: its {key!r} are empty or lack text and n_tokens")
    return items


def numbers(items, key, where):
    """A number about each of some candidates or refinements; a missing one is nan."""
    values = [item.get(key) for item in items]
    if key == "finish_reason":
        values = [{"length": 1, "stop": 0}.get(value) for value in values]
    try:
        return np.array(values, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"{where}: not all of its {key} are numbers")


def read_refined(path):
    """A refined file -> {id: what counts about the problem}, for problems that can be graded.

    Texts are let go as soon as their answers are found: files are larger than memory. InputError names the
    file and the row where it is not such a file, is mixed, or has unequal numbers of candidates or refinements.
    """
    problems, skipped, sizes = {}, 0, None
    for row in each_row(path, keys=("id", "problem", "answer", "candidates", "refinements")):
        where = f"{path}, id {row['id']!r}"
        candidates, refinements = (completions(row, key, where) for key in ("candidates", "refinements"))
        size = f"{len(candidates)} candidates and {len(refinements)} refinements"
        if (sizes := sizes or size) != size:
            first = f"{size}, but {sizes} in the first row"
            raise InputError(f"{where}: {first}; pass@k and maj@k need the same numbers for all")
        if (gold := gold_answer(row["answer"])) is None:
            skipped += 1
            continue
        order = np.full((len(refinements), len(candidates)), -1, dtype=np.int16)
        for places, refinement in zip(order, refinements):
            shown = refinement.get("order") or []
            if not set(shown) <= set(range(len(candidates))) or len(set(shown)) < len(shown):
                raise InputError(f"{where}: the order {shown} is not one of its {len(candidates)} candidates")
            places[: len(shown)] = shown
        problems[str(row["id"])] = {
            "answer": gold,
            "answers": [answer_of(c, row.get("prompt", "")) for c in candidates],
            "refinements": [answer_of(r, r.get("prompt", "")) for r in refinements],
            "prompt_tokens": numbers([row], "n_prompt_tokens", where),
            **{field: numbers(candidates, key, where) for field, key in CANDIDATE.items()},
            **{field: numbers(refinements, key, where) for field, key in REFINEMENT.items()},
            "order": order,
        }
    if skipped:
        print(f"{path}: {skipped} of {skipped + len(problems)} problems have no answer to grade against, left out")
    if not problems:
        raise InputError(f"{path}: no problem has an answer to grade against")
    return problems


def check_same_problems(paths, files):
    """InputError unless the files of one row, what read_refined gave for `paths`, can be averaged over."""
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
    """Several files about the same problems: a list of what read_refined gave -> Outcomes."""
    S, P = len(files), len(files[0])
    found = []  # of each problem: the right answer, all candidates' [S * N], all refinements' [S * K]
    for i, problem in files[0].items():
        both = ([a for problems in files for a in problems[i][key]] for key in ("answers", "refinements"))
        found.append((problem["answer"], *both))
    # math-verify is asked in two rounds, so that its processes have all there is to do at once: which answers are
    # right, and which of the wrong ones are the same.
    pairs = [[(gold, a) for a in distinct(answers, more).values()] for gold, answers, more in found]
    grader.grade(itertools.chain(*pairs), what)
    wrong = [[a for gold, a in some if not grader.equal(gold, a)] for some in pairs]
    grader.grade((pair for some in wrong for pair in itertools.permutations(some, 2)), what)

    number = np.array([classes(gold, answers, grader, more) for gold, answers, more in found], dtype=np.int16)
    parts = np.split(number, [len(found[0][1])], 1)  # [P, S * N], [P, S * K]
    votes, refined = (part.reshape(P, S, -1).swapaxes(0, 1) for part in parts)  # [S, P, N], [S, P, K]
    names = [field.name for field in dataclasses.fields(Outcomes)[2:]]
    arrays = {name: np.array([[problems[i][name] for i in files[0]] for problems in files]) for name in names}
    return Outcomes(votes=votes, refined=refined, **arrays)


def mean(values):
    """The mean for report.json: None of no values, and where one is not known."""
    return float(values.mean()) if values.size and np.isfinite(values).all() else None


def methods_of(x):
    """Outcomes -> {method: (credit [S, P], tokens generated for it [S, P])}; this file's docstring explains them."""
    (S, P, N), K = x.votes.shape, x.refined.shape[2]
    flat = (values.reshape(S * P, -1) for values in (x.votes, x.refined, x.tokens, x.logprob, x.certainty, x.score))
    votes, refined, tokens, logprob, certainty, score = flat  # [S * P, N], [S * P, K] and [S * P, N]
    candidates, refining = x.tokens.sum(2), x.refined_tokens.sum(2)
    found = {"pass@1": ((votes == 0).mean(1), candidates / N), "maj@N": (vote(votes), candidates)}
    if np.isfinite(logprob).all():
        # Relative to the most probable that has a vote: relative to one without, all votes could round to 0.
        most = logprob.max(1, keepdims=True, where=votes >= 0, initial=-np.inf)
        found["weighted"] = vote(votes, np.exp(np.minimum(logprob - most, 0))), candidates
        found["logprob"] = best(votes, logprob / np.maximum(tokens, 1)), candidates
    if np.isfinite(certainty).all():
        found["certainty"] = vote(votes, borda(certainty)), candidates
    if np.isfinite(score).all():
        found["score"] = best(votes, score), candidates
    found["refined"] = (refined == 0).mean(1), candidates + refining / K
    if K > 1:
        found["refmaj"] = vote(refined), candidates + refining
    found["union"] = vote(np.concatenate([votes, refined], 1)), candidates + refining
    found["pass@N"] = (votes == 0).any(1).astype(float), candidates
    return {method: (credit.reshape(S, P), tokens) for method, (credit, tokens) in found.items()}  # [S * P] -> [S, P]


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
        k = x.votes.shape[2] + cost / max(x.tokens.mean(), 1)
        maj = None  # too far, or unknown
        if k <= there:  # so often k rounded down, so often rounded up
            low = math.floor(k)
            maj = maj_at_k[:, low - 1] + (k - low) * (maj_at_k[:, min(low, there - 1)] - maj_at_k[:, low - 1])
        elif k <= 2 * there:  # two steps, as a vote of 2m is one of 2m - 1
            last, slope = maj_at_k[:, -1], (maj_at_k[:, -1] - maj_at_k[:, max(0, there - 3)]) / 2
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
    maj, refined = methods["maj@N"][0], methods["refined"][0]  # [S, P]
    right = (x.votes == 0).sum(2)  # [S, P]
    pass_at = pass_at_k(N, right.ravel())  # [S * P, N]
    maj_at = majority_at_k(x.votes.reshape(S * P, N))  # [S * P, N]
    pool = x.votes.swapaxes(0, 1).reshape(P, S * N)  # [S, P, N] -> [P, S * N], the candidates of all seeds
    same_cost = equal_cost(x, maj_at if S == 1 else majority_at_k(pool))

    columns = {method: credit.mean(0) for method, (credit, _) in methods.items()}  # [P] each, over seeds
    columns |= {cost: credit for cost, (_, credit, _) in same_cost.items() if credit is not None}
    draws = dict(zip(columns, bootstrap(np.stack(list(columns.values()), 1)).T))  # [draws] each
    difference, of_seeds = columns["refined"] - columns["maj@N"], (refined - maj).mean(1)  # [P], [S]
    better, worse, p = mcnemar(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = (draws["refined"] - draws["maj@N"]) / draws["maj@N"]

    def against(other):  # the gap between the refinement and some vote
        return {"points": mean(columns["refined"] - columns[other]), "ci95": interval(draws["refined"] - draws[other])}

    def count(values, at):  # [how many of them, of how many]
        total = round(float(values[at].sum()), 6)
        return [int(total) if total.is_integer() else total, int(at.sum())]

    def both(of_candidates, of_refinements):
        return {"candidates": mean(of_candidates), "refinements": mean(of_refinements)}

    known = zip(*(meta["seconds"] for meta in metas))  # of sampling, of refining
    sampling, refining = (None if None in seconds else sum(seconds) / (S * P) for seconds in known)
    generated, prompts = (x.tokens, x.refined_tokens), (x.prompt_tokens, x.refined_prompt_tokens)
    spent = [mean(tokens.sum(2)) for tokens in (*generated, *prompts)]
    return {
        "name": name,
        "model": metas[0]["model"],
        "parameters": metas[0]["parameters"],
        **{"problems": P, "n": N, "k": K, "seeds": S},
        **{f"pass@{k}": float(value) for k, value in enumerate(pass_at.mean(0), 1)},
        **{f"maj@{k}": float(value) for k, value in enumerate(maj_at.mean(0), 1)},
        "refined": mean(refined),
        "gap": {
            **against("maj@N"),
            "relative": mean(difference) / mean(maj) if maj.any() else None,
            "relative_ci95": interval(relative),
            "mcnemar": {"better": better, "worse": worse, "p": p},
            "seed_se": float(of_seeds.std(ddof=1) / math.sqrt(S)) if S > 1 else None,
        },
        "methods": {
            method: {"accuracy": mean(credit), "ci95": interval(draws[method]), "tokens": mean(tokens)}
            for method, (credit, tokens) in methods.items()
        },
        "equal_cost": {
            cost: {"k": k, "extrapolated": guessed, "maj": mean(credit), **against(cost)} if cost in draws else {"k": k}
            for cost, (k, credit, guessed) in same_cost.items()
        },
        "by_correct": [
            {"correct": c, "problems": int(at.sum()), "maj": mean(maj[at]), "refined": mean(refined[at])}
            for c, at in enumerate(right == np.arange(N + 1)[:, None, None])  # [N + 1, S, P]
        ],
        "rescued": {
            "all_wrong": count(refined, right == 0),
            "minority_right": count(refined, (right > 0) & (maj == 0)),
            "tied": count(refined, (maj > 0) & (maj < 1)),
            "majority_right_broken": count(1 - refined, maj == 1),
        },
        "order": order_sensitivity(x),
        "unanimous": mean((x.votes == x.votes[:, :, :1]).all(2) & (x.votes[:, :, 0] >= 0)),
        "answered": both(x.votes >= 0, x.refined >= 0),
        "cut_off": both(x.cut, x.refined_cut),
        "length": both(x.tokens, x.refined_tokens),
        "tokens": dict(zip(("candidates", "refinement", "prompt", "refinement_prompt"), spent)),
        "seconds": {"candidates": sampling, "refinement": refining},
    }


def scaling(rows):
    """Over the rows of several models: does the gap go with the model's size, and with what one sample is worth?"""
    rows = [row for row in rows if row["parameters"]]
    if len({row["parameters"] for row in rows}) < 2:
        return None
    gap = [row["gap"]["points"] for row in rows]
    return {f"gap_and_{key}": spearman([row[key] for row in rows], gap) for key in ("parameters", "pass@1")}


# ------------------------------------------------------------------------------------------------
# The report


def cell(layout, *values, between=" / "):
    return "-" if None in values else between.join(layout.format(value) for value in values)


def gap_of(found):
    """A gap in points with its interval."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in (found["points"], *found["ci95"])))


def shorten(name, width):
    """A name without its middle where it is too long: names of one family differ at their ends."""
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[len(name) - (width - width // 2) :]}"


TABLES = """\
Accuracy
problems, N, K
refined: the mean of K refinements

Refinement Gap: refined - maj@N, on the same candidates
points [95%], relative, [95%], better : worse, p, s.e. of seeds
better : worse: problems on which they differ; p: exact McNemar test

At equal cost: refined - maj@k, where k candidates cost what N and one refinement do
refined, k, maj@k, gap [95%], k, maj@k, gap [95%]
first in generated tokens, then with prompts; ~: more than there are, continued in a line, which errs
for the vote; -: too many for that, or prompt tokens unknown

What became of them
all wrong, minority, tied, broken, order, first / last
refined right where all candidates are wrong, where right ones are outvoted, where the vote is tied;
refined wrong where the vote is right; order: the answer differs in another order, chance included;
first / last: refined right, where some are, if the first or the last candidate shown is right

Answers, candidates / refinements
unanimous, answered, cut off, tokens of one
unanimous: all candidates of a problem give the same answer

Cost of a problem, candidates + refinements
tokens generated, prompt tokens, seconds, parameters
a prompt is read once for all its samples"""


def cells(row, methods):
    """What stands in a row of each of the TABLES."""
    gap, test, tokens, order = row["gap"], row["gap"]["mcnemar"], row["tokens"], row["order"]
    accuracy = [str(row[key]) for key in ("problems", "n", "k")]
    accuracy += [cell("{:.1%}", row["methods"].get(method, {}).get("accuracy")) for method in methods]
    gaps = [gap_of(gap), cell("{:+.1%}", gap["relative"]), cell("[{0[0]:+.0%}, {0[1]:+.0%}]", gap["relative_ci95"])]
    gaps += [f"{test['better']} : {test['worse']}", f"{test['p']:.2g}", cell("{:.1%}", gap["seed_se"]).rstrip("%")]
    cost = [f"{row['refined']:.1%}"]
    for at in row["equal_cost"].values():
        cost += [cell("{:.1f}", at["k"])]
        cost += [f"{'~' * at['extrapolated']}{at['maj']:.1%}", gap_of(at)] if "maj" in at else ["-", "-"]
    became = [f"{share:.4g} / {of}" for share, of in row["rescued"].values()]
    became += [cell("{:.1%}", order["changed"]), cell("{:.1%}", *(order["at_place"][i][0] for i in (0, -1)))]
    kinds = [cell("{:.1%}", row["unanimous"]), *(cell("{:.1%}", *row[key].values()) for key in ("answered", "cut_off"))]
    kinds += [cell("{:,.0f}", *row["length"].values())]
    spent = [cell("{:,.0f}", tokens["candidates"], tokens["refinement"], between=" + ")]
    spent += [cell("{:,.0f}", tokens["prompt"], tokens["refinement_prompt"], between=" + ")]
    spent += [cell("{:.2f}", *row["seconds"].values(), between=" + ")]
    spent += [cell("{:,.1f} M", row["parameters"] and row["parameters"] / 1e6)]
    return accuracy, gaps, cost, became, kinds, spent


def tables(rows):
    """The rows as tables: a list of (title, lines of cells with the headings first, note)."""
    methods, found = [method for method in STYLES if any(method in row["methods"] for row in rows)], []
    for text, lines in zip(TABLES.split("\n\n"), zip(*(cells(row, methods) for row in rows))):
        title, headings, *note = text.split("\n")
        head = ["", *headings.split(", "), *(() if found else methods)]  # the first table has a column for each method
        found.append((title, [head, *([row["name"], *line] for row, line in zip(rows, lines))], " ".join(note)))
    return found


def as_text(title, lines, note, width=100):
    """A table for the terminal, `width` columns at most: long names lose their middle."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    gap = 2 if sum(widths) + 2 * len(widths) - 2 <= width else 1
    widths[0] = max(6, min(widths[0], width - sum(widths[1:]) - gap * (len(widths) - 1)))
    text = [title]
    for name, *others in lines:
        padded = (other.rjust(size) for other, size in zip(others, widths[1:]))
        text.append((" " * gap).join([shorten(name, widths[0]).ljust(widths[0]), *padded]).rstrip())
    return "\n".join([*text, *textwrap.wrap(f"({note})", width)])


def as_markdown(title, lines, note):
    head, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([f"## {title}", "", head, "| --- |" + " ---: |" * (len(lines[0]) - 1), *rest, "", f"{note}."])


def correlations(found):
    """What `scaling` found, a sentence each."""
    text = []
    for key, values in (found or {}).items():
        if values["spearman"] is not None:
            low_high = values["ci95"] and "95% [{:+.2f}, {:+.2f}]".format(*values["ci95"])
            what = f"{key.replace('_and_', ' against ')}: rank correlation {values['spearman']:+.2f}"
            text.append(f"{what} over {values['models']} rows ({low_high or 'too few for an interval'}).")
    return text


def notes(found, grader):
    """What the tables do not say, a sentence each."""
    text = ["pass@k and maj@k are exact expectations over subsets; 95% intervals: 10,000 bootstrap draws, seed 0."]
    text += correlations(found)
    if n := len(grader.stuck):
        text.append(f"{n} comparisons took longer than {grader.limit:g} s or crashed, and count as unequal.")
    return text


def show(identity, path):
    """One problem of a candidates or refined file on the terminal: answers, votes and refinement side by side."""
    rows = each_row(path, keys=("id", "problem", "candidates"))
    if (row := next((row for row in rows if str(row["id"]) == identity), None)) is None:
        raise InputError(f"{path}: no problem with id {identity!r} in it")
    where = f"{path}, id {identity!r}"
    candidates = completions(row, "candidates", where)
    refinements = completions(row, "refinements", where) if "refinements" in row else []
    answers = [answer_of(c, row.get("prompt", "")) for c in candidates]
    refined = [answer_of(r, r.get("prompt", "")) for r in refinements]
    grader, gold = Grader(), gold_answer(row.get("answer"))
    number = classes(gold, answers, grader, refined)
    grader.close()
    lines = [["", "", "answer", "votes", "tokens", "logprob", "certainty", "ended", "order"]]
    for i, (item, answer, own) in enumerate(zip(candidates + refinements, answers + refined, number)):
        kind = f"candidate {i}" if i < len(answers) else f"refinement {i - len(answers)}"
        mark = "right" if own == 0 else "no answer" if own < 0 else "wrong"
        shown = "-" if answer is None else answer if len(answer) <= 30 else answer[:29] + "…"
        votes = "-" if own < 0 else str(number[: len(answers)].count(own))
        logprob = item.get("logprob") and item["logprob"] / max(item["n_tokens"], 1)
        details = [str(item["n_tokens"]), *(cell("{:.2f}", x) for x in (logprob, item.get("self_certainty")))]
        order = " ".join(map(str, item.get("order") or []))
        lines.append([kind, mark, shown, votes, *details, item.get("finish_reason") or "-", order])
    print(f"{textwrap.fill(row['problem'], 100, replace_whitespace=False)}\n\nright answer: {gold}")
    print(as_text("", lines, "votes: candidates with the same answer; logprob: mean a token"))
    for (kind, mark, *_), item in zip(lines[1:], candidates + refinements):
        print(f"\n--- {kind}: {mark}\n{strip_thinking(item['text'])}")


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


def look(method, linestyle="none", **more):
    """How the points of a method are drawn: arguments of plot."""
    marker, colour = STYLES[method]
    style = {"label": method, "marker": marker, "color": colour, "markerfacecolor": colour, "linestyle": linestyle}
    return {**style, **more}


def in_percent(found, value):
    """An accuracy or a gap and its interval, for a figure -> (value, [low, high])."""
    return 100 * found[value], [100 * x for x in found["ci95"]]


def legend(fig, axes, width=1.7):
    """One legend for `axes`, above all, `width` inches an entry."""
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    columns = int(fig.get_figwidth() / width)
    fig.legend(handles.values(), handles, loc="outside upper center", ncols=columns, frameon=False)


def draw_methods(rows, fig):
    """On the left the accuracy of each method with its interval, on the right the gap."""
    fig.set_size_inches(9, 1.4 + sum(0.3 + 0.13 * len(row["methods"]) for row in rows))
    left, right = fig.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    for y, row in enumerate(rows):
        places = y + 0.8 * ((np.arange(len(row["methods"])) + 0.5) / len(row["methods"]) - 0.5)
        for at, (method, found) in zip(places, row["methods"].items()):
            accuracy, ends = in_percent(found, "accuracy")
            left.plot(ends, [at, at], color="0.6", linewidth=1.2, zorder=1)
            left.plot(accuracy, at, **look(method))
        gap, ends = in_percent(row["gap"], "points")
        right.plot(ends, [y, y], "|-", color=BLUE, markersize=9, markeredgecolor=BLUE, markeredgewidth=1)
        right.plot(gap, y, "D", color=BLUE)
        right.annotate(f"{gap:+.1f}", (gap, y), (0, 8), textcoords="offset points", ha="center", fontsize=9)
        for axis in (left, right):
            axis.axhline(y + 0.5, color="0.8", linewidth=0.8)
    sizes = ", ".join(str(n) for n in sorted({row["n"] for row in rows}))
    left.set(xlabel=f"problems solved (%), N = {sizes}; 95% interval", xlim=(-2, 102), ylim=(len(rows) - 0.5, -0.5))
    left.set_yticks(range(len(rows)), [shorten(row["name"], 28) for row in rows])
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="Refinement Gap: refined - maj@N\n(points, 95% interval)")
    right.margins(x=0.15)
    legend(fig, [left])


def panels(rows, fig, ylabel):
    """A panel for each row, four beside each other -> axes, as many as rows."""
    across = min(len(rows), 4)
    down = -(-len(rows) // across)
    fig.set_size_inches(max(5, 3 * across), 0.6 + 3 * down)
    axes = fig.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axis, row in zip(axes, rows):
        axis.set_title(shorten(row["name"], 28), fontsize=10)
    for axis in axes[::across]:
        axis.set_ylabel(ylabel)
    for axis in axes[len(rows) :]:
        axis.remove()
    return axes[: len(rows)]


def draw_frontier(rows, fig):
    """Accuracy against tokens: votes and a perfect judge of 1..N candidates, and the other methods."""
    axes = panels(rows, fig, "problems solved (%)")
    for axis, row in zip(axes, rows):
        k = np.arange(1, row["n"] + 1)
        size = 4 if row["n"] <= 16 else 0  # no markers where they would run into each other
        for kind, line in (("maj", "-"), ("pass", ":")):
            more = {"markersize": size, "color": "0.35", "label": f"{kind}@k, k = 1 to N"}
            curve = [100 * row[f"{kind}@{i}"] for i in k]
            axis.plot(row["tokens"]["candidates"] * k / row["n"], curve, **look(f"{kind}@N", line, **more))
        for method, found in row["methods"].items():
            if "@" not in method:
                axis.plot(found["tokens"], 100 * found["accuracy"], **look(method))
        refined = row["methods"]["refined"]
        axis.vlines(refined["tokens"], *in_percent(refined, "accuracy")[1], color=BLUE, linewidth=1.2)
        axis.set(xlim=(0, 1.08 * row["methods"]["union"]["tokens"]), xlabel="tokens generated a problem")
    legend(fig, axes)


def draw_outcomes(rows, fig):
    """By the number of right candidates: how many problems (bars), and how often vote and refinement are right."""
    axes = panels(rows, fig, "problems (%)")
    for axis, row in zip(axes, rows):
        there = [list(line.values()) for line in row["by_correct"] if line["problems"]]
        right, problems, maj, refined = np.array(there).T
        shares = 100 * problems / problems.sum()
        axis.bar(right, shares, color="0.85", edgecolor="0.6", linewidth=0.6, label="share of all problems")
        for method, line, solved in (("maj@N", "-", maj), ("refined", "--", refined)):
            axis.plot(right, 100 * solved, **look(method, line, markersize=6, label=f"of these, solved by {method}"))
        axis.set(xlim=(-0.7, row["n"] + 0.7), ylim=(-5, 105), xlabel=f"right candidates of {row['n']}")
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend(fig, axes, 2.8)


def draw_scaling(rows, fig):
    """The gap against the model's parameters, and against what one sample is worth."""
    rows = [row for row in rows if row["parameters"]]
    fig.set_size_inches(8, 3.8 + 0.07 * len(rows))
    axes = fig.subplots(1, 2, sharey=True)
    for i, row in enumerate(rows):
        gap, ends = in_percent(row["gap"], "points")
        style = {"color": (BLUE, "white", "0.6")[i // 8 % 3], "marker": "osD^v<>p"[i % 8], "linestyle": "none"}
        for axis, x in zip(axes, (row["parameters"], 100 * row["pass@1"])):
            axis.vlines(x, *ends, color="0.6", linewidth=1.2, zorder=1)
            axis.plot(x, gap, label=shorten(row["name"], 24), **style)
    for axis, what in zip(axes, ("parameters", "pass@1 (%)")):
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel(what)
        axis.margins(x=0.15)
    axes[0].set(xscale="log", ylabel="Refinement Gap (points, 95% interval)")
    legend(fig, axes[:1], 2.8)


def draw(rows, found, out):
    """Draw all figures -> their names."""
    import matplotlib
    from matplotlib.figure import Figure

    figures = {"figure.png": draw_methods, "frontier.png": draw_frontier, "outcomes.png": draw_outcomes}
    if found:
        figures["scaling.png"] = draw_scaling
    with matplotlib.rc_context():
        matplotlib.rc("figure.constrained_layout", use=True)
        matplotlib.rc("axes", grid=True, axisbelow=True)
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("grid", color="0.92")
        matplotlib.rc("lines", markersize=7, markeredgecolor="black", markeredgewidth=0.6)
        for name, function in figures.items():
            fig = Figure()
            function(rows, fig)
            fig.savefig(out / name, dpi=150)
    return list(figures)


# ------------------------------------------------------------------------------------------------
# The suite, and the command line

SUITES = {"math": ["aime24", "aime25", "amc23", "math500", "olympiadbench", "knights"]}


def run_suite(args, flags):
    """Sample and refine each set with the other two files, one command after another -> the refined files.

    The commands keep what they have, so the suite goes on where it was stopped. `flags` are given to both.
    """
    from sample import BENCHMARKS

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


def report(files, out, limit):
    """Read and grade `files`, and write everything about them to the folder `out`."""
    started, names = time.time(), {}
    for text in files:
        name, _, paths = text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text)
        paths = [paths] if Path(paths).exists() else paths.split(",")
        name = name or Path(paths[0]).name.removesuffix(".jsonl").removesuffix(".refined")
        while name in names:  # two folders may have files of one name
            name += "'"
        names[name] = paths
    read = {name: [read_refined(path) for path in paths] for name, paths in names.items()}
    for name, paths in names.items():
        check_same_problems(paths, read[name])
    grader, rows = Grader(limit, out / "grades.jsonl"), []
    for name, paths in names.items():
        outcomes = grade_files(read[name], grader, name)
        rows.append(report_row(name, outcomes, [read_meta(path) for path in paths]))
    grader.close()
    found = scaling(rows)
    grading = {"asked": len(grader.known), "stuck": len(grader.stuck), "limit": limit}
    write_json(out / "report.json", {"rows": rows, "scaling": found, "grading": grading})
    parts, sentences = tables(rows), notes(found, grader)
    try:
        figures = draw(rows, found, out)
        text = ["# Report", *(as_markdown(*part) for part in parts), *(f"- {text}" for text in sentences)]
        text += [f"![{name}]({name})" for name in figures]
        (out / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    except OSError as e:
        raise InputError(f"{e.filename or out}: cannot be written ({e.strerror}); choose another --out")
    print("", *(as_text(*part) for part in parts), sep="\n\n")
    print("", *itertools.chain(*(textwrap.wrap(text, 100) for text in sentences)), sep="\n")
    print(f"{out}: report.json, report.md, {', '.join(figures)} written ({time.time() - started:.0f} s)")


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


if __name__ == "__main__":
    command_line(main)
