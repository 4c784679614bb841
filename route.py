"""Which way to an answer is worth its tokens? A router that weighs them at a price, replayed on stored candidates.

    python route.py c.refined.jsonl --out runs/route                            one refined file of refine.py
    python route.py seed0.refined.jsonl,seed1.refined.jsonl --out runs/route    several seeds of the same problems

Writes budget.json and budget.png, and samples nothing: candidates are replayed in shuffled orders, as if they came one
by one. Compared are operators (arXiv 2605.09121), ways from samples to an answer, and a router that chooses among them.

    one sample               the first candidate
    vote of k                what most of the first k candidates say; a tie shares the credit
    adaptive vote            one candidate after another, until an answer leads with 95% (Beta criterion of 2305.11860)
    refine                   a refinement, after all candidates that were drawn for its prompt
    refine if they disagree  the same, but where these candidates all give one answer, that one
    router                   after a pilot of two candidates, that of the others of which the most is expected: credit
                             less tokens times the price of a token, its knob: 13 prices from 0 up are tried
    oracle router            the same, but it knows what each of them would give: no router gets beyond it

The router's only rivals are these operators and their hull. The vote that stops at 95% cannot stop before four votes,
while the router may stop after two, so part of its gain is earlier stopping. The router learns from the right answers
of other problems (four fifths at a time), never from that of the problem that it decides on. All that looks at answers
to decide, when a vote stops or who disagrees, sees classes of equal answers made without the right one.

Tokens are all that were generated, those of the pilot and of outvoted candidates too, and in a second account prompts
as well: the problem's, computed once for all its samples, and the refinement's, where there is one.

The hull is what two operators reach when a coin is tossed for each problem. Intervals redraw problems, and points,
operators and hull are computed from the same draw. The hull is the best of noisy points, in each draw again, so it is
too good, and the intervals err against the router. The router itself is not fitted anew in a draw. "Cheaper at equal
accuracy" is claimed only by an interval that excludes 0 and allows for the choice among all prices (Bonferroni).
"""

import argparse
import itertools
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluate import bootstrap, grade_files, interval, read_file, say
from figures import BLUE, GREY, as_text, cell, gap_of, panels
from files import InputError, command_line, disk_errors, write_json
from grade import Grader
from vote import classes, decided, distinct

REPLAYS = 16  # orders of a problem's candidates, about
DRAWS = 10_000  # of the bootstrap
FOLDS = 5  # of cross-fitting
PRIOR = 2  # the mean of all bins counts like this many problems in a bin
RIDGE = 10  # slopes of zero count like this many problems
KINDS = {"generated": "generated tokens", "with_prompts": "generated tokens and prompts"}

# ------------------------------------------------------------------------------------------------
# Reading and replays: P problems, N candidates, K refinements, S files (seeds), R replays of a problem


def read(paths, grader):
    """Refined files of the same problems -> ids, Outcomes, and classes [S, P, N] made without right answers."""
    files = [dict(sorted(read_file(path).items())) for path in paths]  # the order of the lines changes nothing
    for path, problems in zip(paths, files):
        rows = [*files[0].values(), *problems.values()]
        sizes = {(len(row[key]), len(row["refinements"])) for row in rows for key in ("answers", "tokens")}
        N, K = min(sizes)
        if any(row.get("rounds") for row in rows):
            raise InputError(f"{path}: of several rounds; give the file of the first, or refine once")
        if problems.keys() != files[0].keys():
            raise InputError(f"{path}: other problems than in {paths[0]}; give seeds of the same problems")
        if len(sizes) > 1:
            raise InputError(f"{path}: unequal numbers of candidates or refinements; sample with -n, not --adaptive")
        if K == 0:
            raise InputError(f"{path}: no refinements; make them with refine.py --candidates {path}")
        if N < 3:
            raise InputError(f"{path}: {N} candidates leave nothing to decide after a pilot of two; try sample.py -n 4")
        if len(problems) < FOLDS:
            raise InputError(f"{path}: {len(problems)} problems; it takes at least {FOLDS} to learn from the others")
        counts = ("tokens", "prompt_tokens", "refined_tokens", "refined_prompt_tokens")
        if not all(sum(row[key].sum() for row in problems.values()) > 0 for key in counts):  # 0, or nan
            raise InputError(f"{path}: no n_tokens or n_prompt_tokens in it; make it with sample.py and refine.py")
    outcomes = grade_files(files, grader, "answers")
    answers = [[problems[identity]["answers"] for identity in files[0]] for problems in files]  # [S][P][N]
    different = (distinct(some).values() for some in itertools.chain(*answers))
    grader.grade((pair for some in different for pair in itertools.permutations(some, 2)), "agreement")
    return list(files[0]), outcomes, np.array([[classes(None, some, grader) for some in rows] for rows in answers])


@dataclass
class Replays:
    """Replays of P problems, of all seeds, so R is S * R from here on: N candidates as they come, and a refinement."""

    classes: np.ndarray  # [P, R, N] equal answers, made without the right one: 1, 2, ..., or -1 for none
    right: np.ndarray  # [P, R, N] is it right? Only credits may depend on it
    tokens: np.ndarray  # [P, R, N]
    logprob: np.ndarray  # [P, R, N] of the whole candidate; nan where it is not known
    certainty: np.ndarray  # [P, R, N]; likewise
    prompt: np.ndarray  # [P, R] tokens of the problem's prompt
    drawn: np.ndarray  # [P, R] the first so many candidates were drawn for the refinement
    refined: np.ndarray  # [P, R] is the refinement right? Only credits may depend on it
    refined_tokens: np.ndarray  # [P, R]
    refined_prompt: np.ndarray  # [P, R]


def draw_orders(ids, outcomes, seed):
    """-> the folds of the problems [P], orders of their candidates [S, P, R, N], and which refinement [S, P, R].

    Random orders, each with all its rotations (16 at most), so that every candidate is first equally often; and so many
    of them that every refinement is used equally often. They depend on the seed and the id, whatever else is in a file.
    """
    S, P, K, N = outcomes.order.shape
    keyed = [np.random.default_rng([seed, *identity.encode(errors="surrogatepass")]) for identity in ids]
    folds = np.argsort(np.argsort([rng.random() for rng in keyed])) % FOLDS  # dealt out, so that none is empty
    rotations = (np.arange(N)[:REPLAYS, None] + np.arange(N)) % N  # [16 or fewer, N]
    shuffles = -(-REPLAYS // N)  # rounded up
    while shuffles * len(rotations) % K:
        shuffles += 1
    orders = np.stack([rng.permuted(np.tile(np.arange(N), (S, shuffles, 1)), axis=2) for rng in keyed], 1)
    orders = orders[..., rotations].reshape(S, P, -1, N)  # [S, P, R, N]
    return folds, orders, np.broadcast_to(np.arange(orders.shape[2]) % K, orders.shape[:3])


def replay(x, seen, orders, which):
    """Outcomes and classes `seen` [S, P, N], in orders [S, P, R, N], with refinements `which` [S, P, R] -> Replays."""
    drawn = np.take_along_axis(x.drawn, which, 2).astype(int)  # [S, P, R]
    shown = (np.take_along_axis(x.order, which[..., None], 2)[..., None] == np.arange(seen.shape[2])).any(3)
    # Sort key of a candidate: 0 in the prompt, 1 maybe drawn but left out (no answer, cut off), 2 not drawn.
    key = np.where(shown, 0, np.where((seen < 0) | (x.cut == 1), 1, 2)[:, :, None])  # [S, P, R, N]
    key = np.take_along_axis(key, orders, 3)
    rank = np.argsort(np.argsort(key, kind="stable"), kind="stable")
    is_drawn = rank < drawn[..., None]  # for the refinement; they come first, in the order that they had
    orders = np.take_along_axis(orders, np.argsort(~is_drawn, kind="stable"), 3)

    def lay(values):  # [S, P, R, ...] -> [P, S * R, ...]
        return values.swapaxes(0, 1).reshape(values.shape[1], -1, *values.shape[3:])

    of_candidates = (seen, x.votes == 0, x.tokens, x.logprob, x.certainty)  # [S, P, N]
    of_refinements = (x.refined == 0, x.refined_tokens, x.refined_prompt_tokens)  # [S, P, K]
    return Replays(
        *(lay(np.take_along_axis(values[:, :, None], orders, 3)) for values in of_candidates),
        *(lay(np.broadcast_to(x.prompt_tokens, which.shape)), lay(drawn)),
        *(lay(np.take_along_axis(values, which, 2)) for values in of_refinements),
    )


# ------------------------------------------------------------------------------------------------
# Operators


@dataclass
class Operator:
    """What a way to an answer gives and costs in each replay."""

    name: str
    credit: np.ndarray  # [P, R]
    tokens: np.ndarray  # [P, R, 2] generated; generated and prompts
    price: float | None = None  # of a token, for a router
    chosen: dict | None = None  # name of an operator -> [P, R] did the router choose it?


def running_votes(r):
    """Replays -> the vote after each candidate: credit, first and second most votes [P, R, N], tokens [P, R, N, 2]."""
    member = r.classes[..., None] == np.arange(1, max(2, r.classes.max()) + 1)  # [P, R, N, C] of this class?
    votes = member.cumsum(2, dtype=np.int16)  # [P, R, N, C] of the candidates up to this one
    right = (member & r.right[..., None]).cumsum(2, dtype=np.int16)
    *_, second, first = np.moveaxis(np.sort(votes, 3), 3, 0)
    leads = (votes == first[..., None]) & (votes > 0)
    credit = (leads * right).sum(3) / np.maximum(first * leads.sum(3), 1)
    spent = r.tokens.cumsum(2)
    return credit, first, second, np.stack([spent, spent + r.prompt[..., None]], 3)


def operators(r, least=1):
    """Replays -> the fixed operators that use at least so many candidates."""
    N, (credit, first, second, spent) = r.classes.shape[2], running_votes(r)

    def after(values, n):  # [P, R, N, ...], [P, R] -> [P, R, ...], after n candidates
        return values[np.arange(len(n))[:, None], np.arange(n.shape[1]), n - 1]

    # Votes of all k up to 8; of more candidates, those of 1, 2, 3, 4, 6, 8, 12, ... and N.
    sizes = {N, *(k for k in range(1, N + 1) if N <= 8 or k in (2**i * j for i in range(N) for j in (1, 3)))}
    names = {k: f"vote of {k}" if k > 1 else "one sample" for k in sorted(sizes) if k >= least}
    found = [Operator(name, credit[..., k - 1], spent[:, :, k - 1]) for k, name in names.items()]
    enough = [[b <= a and a + b <= N and decided(a, b) for b in range(N + 1)] for a in range(N + 1)]
    stops = np.array(enough)[first, second] | (np.arange(N) == N - 1)  # [P, R, N]
    stop, drawn = np.maximum(stops.argmax(2) + 1, least), np.maximum(r.drawn, least)  # [P, R]
    found.append(Operator("adaptive vote", after(credit, stop), after(spent, stop)))
    refined = np.stack([r.refined_tokens, r.refined_tokens + r.refined_prompt], 2)  # [P, R, 2]
    found.append(Operator("refine", r.refined.astype(float), after(spent, drawn) + refined))
    differ = after(first, drawn) < drawn  # [P, R]
    mixed = np.where(differ, r.refined, after(credit, drawn)), after(spent, drawn) + differ[..., None] * refined
    return [*found, Operator("refine if they disagree", *mixed)]


# ------------------------------------------------------------------------------------------------
# The router: O operators to choose from, which all begin with the pilot; F features of the pilot


def after_pilot(r):
    """Replays -> what is seen after two candidates: bins [P, R] and features [P, R, F].

    Bin 0: they agree, 1: they disagree, 2: one has no answer, 3: both have none. Features that files lack are left out.
    """
    seen, tokens = r.classes[..., :2], r.tokens[..., :2]
    bins = np.where((seen > 0).all(2), seen[..., 0] != seen[..., 1], 1 + (seen < 0).sum(2))
    features = np.stack([np.log1p(tokens), r.logprob[..., :2] / np.maximum(tokens, 1), r.certainty[..., :2]], 3).mean(2)
    return bins, features[..., np.isfinite(features).all((0, 1))]


def expectations(bins, features, values, folds):
    """What values [P, R, V] can be expected from what is seen after the pilot, learned from the other folds alone.

    Ridge regression in each bin: its mean is shrunk to that of all bins (PRIOR), its slopes to zero (RIDGE). The
    replays of one problem count as one problem.
    """
    expected, replays = np.empty(values.shape), bins.shape[1]
    for fold, number in itertools.product(range(FOLDS), range(4)):
        test, train = ((bins == number) & at[:, None] for at in (folds == fold, folds != fold))  # [P, R]
        train |= (folds != fold)[:, None] & ~train.any()  # all of the others, where none of them is in this bin
        x, y, overall = features[train], values[train], values[folds != fold].mean((0, 1))  # [Q, F], [Q, V], [V]
        z, asked = (((f - x.mean(0)) / np.maximum(x.std(0), 1e-9)).clip(-3, 3) for f in (x, features[test]))
        slopes = np.linalg.solve(z.T @ z + RIDGE * replays * np.eye(z.shape[1]), z.T @ (y - y.mean(0)))  # [F, V]
        expected[test] = (y.sum(0) + PRIOR * replays * overall) / (len(y) + PRIOR * replays) + asked @ slopes
    return expected


def route(r, options, folds, prices, kind):
    """Replays -> routers among these operators for all prices of a token of kind 0 or 1, and then oracle routers."""
    found = []
    credit = np.stack([option.credit for option in options], 2)  # [P, R, O]
    tokens = np.stack([option.tokens for option in options], 2)  # [P, R, O, 2]
    values = np.concatenate([credit, tokens[..., kind]], 2)  # [P, R, 2 * O]
    expected = expectations(*after_pilot(r), values, folds)
    for (name, known), price in itertools.product((("router", expected), ("oracle router", values)), prices):
        credit_known, tokens_known = np.split(known, 2, 2)
        choice = (credit_known - price * tokens_known).argmax(2)[..., None]  # [P, R, 1]; of equal ones the first
        given = np.take_along_axis(credit, choice, 2)[..., 0], np.take_along_axis(tokens, choice[..., None], 2)[:, :, 0]
        found.append(Operator(name, *given, price, {o.name: choice[..., 0] == i for i, o in enumerate(options)}))
    return found


# ------------------------------------------------------------------------------------------------
# The hull and the report: D draws of the bootstrap, O operators, M points


def hull(cost, value, at):
    """The most value at a cost, by a coin tossed between two operators: cost, value [D, O]; at [D, M] -> [D, M]."""
    most = np.full(at.shape, -np.inf)  # before the cheapest operator
    for a, b in itertools.product(range(cost.shape[1]), repeat=2):
        (cost_a, value_a), (cost_b, value_b) = ((cost[:, [i]], value[:, [i]]) for i in (a, b))  # [D, 1]
        width = np.where(cost_b > cost_a, cost_b - cost_a, np.inf)  # inf: a alone, as beyond the best operator
        mixed = value_a + np.clip((at - cost_a) / width, 0, 1) * (value_b - value_a)
        most = np.maximum(most, np.where(at >= cost_a, mixed, -np.inf))
    return most


def compare(found, fixed, kind, seed):
    """Operators, of which the first `fixed` make the hull -> their points for budget.json, in tokens of kind 0 or 1."""
    means = np.stack([o.credit.mean(1) for o in found] + [o.tokens[..., kind].mean(1) for o in found], 1)  # [P, 2 * M]
    draws = np.concatenate([means.mean(0)[None], bootstrap(means, DRAWS, seed)])  # [1 + D, 2 * M], the data first
    accuracy, tokens = np.split(draws, 2, 1)
    to_hull = accuracy - hull(tokens[:, :fixed], accuracy[:, :fixed], tokens)
    equal = np.minimum(accuracy, accuracy[:, :fixed].max(1, keepdims=True))  # above all operators: that of the best
    least = -hull(-accuracy[:, :fixed], -tokens[:, :fixed], -equal)  # axes swapped: the fewest tokens for an accuracy
    saved = 1 - tokens / least
    tail, points = 0.025 / sum(o.name == "router" for o in found), []
    for i, o in enumerate(found):
        point = {"name": o.name, "kind": list(KINDS)[kind], "cost": o.price, "tokens": float(tokens[0, i])}
        point |= {"accuracy": float(accuracy[0, i]), "ci95": interval(accuracy[1:, i])}
        point["to_hull"] = {"points": float(to_hull[0, i]), "ci95": interval(to_hull[1:, i])}
        point["saved"] = {"share": float(saved[0, i]), "ci95": interval(saved[1:, i])}
        point["saved"]["corrected"] = [float(end) for end in np.quantile(saved[1:, i], [tail, 1 - tail])]
        if o.price is not None:
            point["chosen"] = {name: float(chosen.mean()) for name, chosen in o.chosen.items()}
        points.append(point)
    return points


def table(points, what):
    """Operators and routers, for the terminal, and a sentence: is a router cheaper than the hull at equal accuracy?"""
    lines = [["", "price", "tokens", "% solved [95%]", "to the hull [95%]", "% saved [95%]"]]
    for p in (point for point in points if point["name"] != "oracle router"):
        solved = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (p["accuracy"], *p["ci95"])))
        saved = "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * x for x in (p["saved"]["share"], *p["saved"]["ci95"])))
        line = [p["name"], cell("{:.2g}", p["cost"]), f"{p['tokens']:,.1f}", solved, gap_of(p["to_hull"]), saved]
        lines.append(line if p["name"] == "router" else [*line[:-1], "-"])
    routers = [p for p in points if p["name"] == "router"]
    best = max(routers, key=lambda p: p["saved"]["corrected"][0])
    (low, high), at = best["saved"]["corrected"], f"at {best['accuracy']:.1%} and price {best['cost']:.2g}"
    sentence = f"The router is {'' if low > 0 else 'not shown to be '}cheaper than the hull at equal accuracy: it saves"
    sentence += f" {best['saved']['share']:.0%} {at}, [{low:.0%}, {high:.0%}] for the best of {len(routers)} prices."
    note = "to the hull: in points, at equal tokens; saved: of the hull's tokens, at equal accuracy"
    return as_text(f"Operators and router, in {what}", lines, note), *textwrap.wrap(sentence, 100)


def draw(points, path):
    """Accuracy against tokens of each kind: operators with their hull, the router with intervals, the oracle router."""
    from matplotlib.figure import Figure  # here, since it takes a second

    fig, votes = Figure(layout="constrained"), "one sample, votes"
    for axis, (kind, what) in panels(fig, list(KINDS.items()), "problems solved (%)", 3.3):
        some = sorted((p for p in points if p["kind"] == kind), key=lambda p: p["tokens"])
        edge = [(p["tokens"], 100 * (p["accuracy"] - p["to_hull"]["points"])) for p in some if p["cost"] is None]
        axis.plot(*zip(*edge), color="0.7", linewidth=1, label="hull of the operators")  # it bends only at operators
        for label, style, colour, fill in (
            ("oracle router", ":", GREY, GREY),
            (votes, "s-", "black", "black"),
            ("router", "o-", BLUE, BLUE),
            ("adaptive vote", "^", "black", "white"),
            ("refine", "D", BLUE, BLUE),
            ("refine if they disagree", "D", BLUE, "white"),
        ):
            line = [p for p in some if label == (votes if p["name"].startswith(("one", "vote")) else p["name"])]
            tokens, solved = [p["tokens"] for p in line], [100 * p["accuracy"] for p in line]
            axis.plot(tokens, solved, style, color=colour, mfc=fill, markersize=5, linewidth=1.2, label=label)
            if label == "router":
                axis.vlines(tokens, *(100 * np.array([p["ci95"] for p in line]).T), color=BLUE, linewidth=0.7)
        axis.set(xlabel=f"{what} for a problem", xlim=(0, None), axisbelow=True)
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("file", metavar="FILE[,FILE...]", help="refined file of refine.py; seeds of it with commas")
    parser.add_argument("--out", default=".", help="folder for budget.json, budget.png and grades.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of orders, folds and bootstrap (default: 0)")
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds for one comparison (default: 5)")
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: must be at least 0")
    paths, out = [args.file] if Path(args.file).exists() else args.file.split(","), Path(args.out)
    grader = Grader(args.time_limit, out / "grades.jsonl")
    ids, outcomes, seen = read(paths, grader)
    grader.close()
    folds, orders, which = draw_orders(ids, outcomes, args.seed)
    r = replay(outcomes, seen, orders, which)
    # Prices of a token: from 0 to where one more candidate of the usual length must earn 0.3 of a problem.
    prices = [0.0, *(float(f"{price:.2g}") for price in np.geomspace(3e-4, 0.3, 12) / r.tokens.mean())]
    fixed, options, points = operators(r), operators(r, least=2), []
    for kind, what in enumerate(KINDS.values()):
        found = compare(fixed + route(r, options, folds, prices, kind), len(fixed), kind, args.seed)
        say("", *table(found, what))
        points += found
    write_json(out / "budget.json", {"points": points, "files": paths, "seed": args.seed, "replays": orders.shape[2]})
    with disk_errors(out):
        draw(points, out / "budget.png")
    say("", f"{out}: budget.json, budget.png written")


if __name__ == "__main__":
    command_line(main)
