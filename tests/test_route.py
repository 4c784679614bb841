"""route.py: operators, the hull, and a router that never sees the right answer."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import evaluate
import route
from files import InputError
from grade import Grader
from vote import decided


def item(answer, tokens, **more):
    """A candidate or a refinement, as sample.py and refine.py write them."""
    text = "I do not know." if answer is None else rf"The answer is \boxed{{{answer}}}."
    return {"text": text, "n_tokens": tokens, "finish_reason": "stop", **more}


def row(identity, gold, answers, refinements, tokens=None, prompt=7, order=None, drawn=None):
    """A problem with candidates of some answers, and refinements that saw all of them or those in `order`."""
    N = len(answers)
    tokens = tokens or [10 + 3 * i for i in range(N)]
    refined = [
        item(answer, 20 + 5 * j, n_prompt_tokens=100 + j, order=order or list(range(N)), drawn=drawn or N)
        for j, answer in enumerate(refinements)
    ]
    sampled = [item(a, t, logprob=-0.1 * t, self_certainty=10.0 + t) for a, t in zip(answers, tokens)]
    problem = {"id": identity, "problem": "?", "answer": gold, "prompt": "?", "n_prompt_tokens": prompt}
    return {**problem, "candidates": sampled, "refinements": refined}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def grader():
    grader = Grader(limit=3.0)
    yield grader
    grader.close()


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(route, "DRAWS", 2000)


KNOWN = [
    row("a", "1/2", ["0.5", "1/2", "3", None], ["0.5", "4"], [10, 20, 30, 41]),
    row("b", "2", ["3", "3.0", "3", "3"], ["2", "3"], [11, 12, 13, 14], prompt=9),
    row("c", "5", [None, None, None, None], ["5", None], [5, 6, 7, 8]),
    row("d", "6", ["6", "6", "7", "7"], ["7", "6"], [1, 2, 4, 8]),
    row("e", "8", ["9", "8", "10", "8"], ["8", "8"], [100, 50, 25, 12]),
]


def some_rows(P, N=5, K=2, seed=0):
    """Problems of all kinds of difficulty: agreement says something about being right."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(P):
        skill, gold = rng.random(), str(rng.integers(10, 99))
        wrong = [str(x) for x in rng.integers(100, 104, N + K)]
        answers = [gold if rng.random() < skill else None if rng.random() < 0.1 else w for w in wrong[:N]]
        refined = [gold if rng.random() < skill + 0.2 else w for w in wrong[N:]]
        tokens = [int(t) for t in rng.integers(20, 120, N)]
        rows.append(row(f"p{i}", gold, answers, refined, tokens, prompt=int(rng.integers(5, 30))))
    return rows


def replays_of(paths, grader, seed=0):
    """A file's problems as main replays them -> ids, folds, Replays."""
    ids, outcomes, seen = route.read(paths, grader)
    folds, orders, which = route.draw_orders(ids, outcomes, seed)
    return ids, folds, route.replay(outcomes, seen, orders, which)


def points_of(argv, out):
    route.main([*argv, "--out", str(out)])
    return json.loads((out / "budget.json").read_text())["points"]


# ------------------------------------------------------------------------------------------------
# Operators


def leads_for_sure(first, second):
    """The Beta criterion by integrating the density of the leader's share."""
    share = np.linspace(0, 1, 20_001)
    density = share**first * (1 - share) ** second
    return density[10_000:].sum() / density.sum() > 0.95


def slow_vote(answers, gold):
    """The credit of a vote of numbers, in plain Python."""
    counts = {a: answers.count(a) for a in answers if a is not None}
    top = [a for a in counts if counts[a] == max(counts.values())]
    return (gold in top) / len(top) if top else 0.0


def slow_adaptive(answers):
    """How many candidates the adaptive vote asks for."""
    for k in range(1, len(answers)):
        counts = sorted((answers[:k].count(a) for a in {*answers[:k]} - {None}), reverse=True)
        if leads_for_sure(*[*counts, 0, 0][:2]):
            return k
    return len(answers)


def number(completion):
    """The answer of a completion as a number, or None."""
    return eval(completion["text"].split("{")[1].split("}")[0]) if "{" in completion["text"] else None


def slow_operators(one, order, j):
    """All operators on one problem in one order with refinement j -> {name: (credit, generated, prompts)}."""
    gold, right = eval(one["answer"]), number(one["refinements"][j]) == eval(one["answer"])
    candidates = [one["candidates"][i] for i in order]
    answers, tokens = [number(c) for c in candidates], [c["n_tokens"] for c in candidates]
    N, prompt = len(answers), one["n_prompt_tokens"]
    found = {"one sample": (slow_vote(answers[:1], gold), tokens[0], prompt)}
    for k in range(2, N + 1):
        found[f"vote of {k}"] = slow_vote(answers[:k], gold), sum(tokens[:k]), prompt
    k = slow_adaptive(answers)
    found["adaptive vote"] = slow_vote(answers[:k], gold), sum(tokens[:k]), prompt
    found["refine"] = float(right), sum(tokens) + 20 + 5 * j, prompt + 100 + j
    same = len({*answers}) == 1 and answers[0] is not None
    found["refine if they disagree"] = (float(answers[0] == gold), sum(tokens), prompt) if same else found["refine"]
    return found


def test_operators_equal_enumeration_over_all_orders(tmp_path, grader):
    """Guards against: a forgotten cost, a prompt that counts twice, a tie that the first answer wins, equal answers
    that do not agree (1/2 and 0.5), candidates without an answer that do."""
    ids, outcomes, seen = route.read([write(tmp_path / "x.jsonl", KNOWN)], grader)
    both = list(itertools.product(itertools.permutations(range(4)), range(2)))
    orders = np.broadcast_to(np.array([order for order, _ in both]), (1, 5, 48, 4))
    which = np.broadcast_to(np.array([j for _, j in both]), (1, 5, 48))
    found = route.operators(route.replay(outcomes, seen, orders, which))
    slow = [[slow_operators(problem, *how) for how in both] for problem in KNOWN]  # [P][R]
    assert ids == list("abcde") and [o.name for o in found] == list(slow[0][0])
    for o in found:
        expected = np.array([[of[o.name] for of in rows] for rows in slow])  # [P, R, 3]
        np.testing.assert_allclose(o.credit, expected[..., 0], err_msg=o.name)
        np.testing.assert_allclose(o.tokens[..., 0], expected[..., 1], err_msg=o.name)
        np.testing.assert_allclose(o.tokens[..., 1], expected[..., 1] + expected[..., 2], err_msg=o.name)
    exact = evaluate.majority_at_k(outcomes.votes[0])  # [P, N], over all subsets
    np.testing.assert_allclose(np.stack([o.credit.mean(1) for o in found[:4]], 1), exact)


def test_report_and_budget_say_the_same(tmp_path, grader):
    """Guards against: one sample, the vote of all and the refinement with other accuracies here than in report.json."""
    path = write(tmp_path / "x.jsonl", some_rows(20, N=5, K=3))
    points = {p["name"]: p for p in points_of([path], tmp_path / "out") if p["kind"] == "generated"}
    evaluate.report([path], tmp_path / "report", 5.0)
    methods = json.loads((tmp_path / "report" / "report.json").read_text())["rows"][0]["methods"]
    for name, method in (("one sample", "pass@1"), ("vote of 5", "maj@N"), ("refine", "refined")):
        assert points[name]["accuracy"] == pytest.approx(methods[method]["accuracy"]), name
        assert points[name]["tokens"] == pytest.approx(methods[method]["tokens"]), name


def test_adaptive_vote_stops_as_a_plain_loop_does():
    """Guards against: a criterion that counts a candidate too many or too few, or one without an answer as a vote."""
    for first, second in itertools.product(range(16), repeat=2):
        assert decided(first, second) == leads_for_sure(first, second), (first, second)
    rng, N = np.random.default_rng(0), 14
    classes = rng.choice([-1, 1, 2, 3], p=[0.1, 0.6, 0.2, 0.1], size=(40, 6, N))
    ones = np.ones((40, 6))
    right, tokens = classes == 1, np.ones(classes.shape)
    r = route.Replays(classes, right, tokens, tokens, tokens, ones, (N * ones).astype(int), ones > 0, ones, ones)
    adaptive = next(o for o in route.operators(r) if o.name == "adaptive vote")
    for p, i in itertools.product(range(40), range(6)):
        answers = [None if c < 0 else int(c) for c in classes[p, i]]
        k = slow_adaptive(answers)
        assert (adaptive.tokens[p, i, 0], adaptive.credit[p, i]) == (k, pytest.approx(slow_vote(answers[:k], 1)))
    assert 4 in adaptive.tokens[..., 0] and N in adaptive.tokens[..., 0]


def test_refinement_of_some_candidates_costs_those(tmp_path, grader):
    """Guards against: a refinement of two that costs all six; a drawn candidate that is not shown and costs nothing;
    candidates in the replay before those that the refinement was made from."""
    answers, tokens = ["1", None, "2", "3", "4", "5"], [1, 10, 100, 1000, 10000, 100000]
    rows = [row(f"p{i}", "1", answers, ["1"], tokens, order=[4, 2], drawn=3) for i in range(4)]
    rows.append(row("all", "1", answers, ["1"], tokens, order=[0, 2, 3, 4, 5], drawn=6))
    ids, _, r = replays_of([write(tmp_path / "x.jsonl", rows)], grader)
    refine = next(o for o in route.operators(r) if o.name == "refine")
    some, everything = refine.tokens[1:, :, 0], refine.tokens[0, :, 0]  # "all" is the first id
    assert ids[0] == "all" and set(some.ravel()) == {100 + 10000 + 10 + 20} and set(everything) == {111111 + 20}
    firsts = [{*r.tokens[p, :, k]} for p, k in itertools.product(range(1, 5), range(3))]
    assert all(first == {10, 100, 10000} for first in firsts)
    assert {*r.tokens[0, :, 0]} == {*tokens}  # where all were drawn, any candidate can come first


# ------------------------------------------------------------------------------------------------
# The hull


def dual(cost, value, at):
    """The upper hull by its tangents: the least, over all prices of a token, of what the best operator then leaves."""
    pairs = itertools.permutations(range(len(cost)), 2)
    prices = {0.0, *((value[b] - value[a]) / (cost[b] - cost[a]) for a, b in pairs if cost[b] > cost[a])}
    return min(max(value - price * cost) + price * at for price in prices if price >= 0)


def test_hull_is_the_best_mixture_of_two_operators():
    """Guards against: a hull that misses a mixture, falls beyond its best operator, or starts before its cheapest."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        cost, value = rng.integers(1, 30, 6).astype(float), rng.random(6)
        at = np.sort(rng.uniform(cost.min(), 40, 20))
        found = route.hull(cost[None], value[None], at[None])[0]
        np.testing.assert_allclose(found, [dual(cost, value, x) for x in at])
        mixtures = [
            share * value[b] + (1 - share) * value[a]
            for a, b, share in itertools.product(range(6), range(6), np.linspace(0, 1, 101))
            if share * cost[b] + (1 - share) * cost[a] <= at[7]
        ]
        assert max(mixtures) - 1e-9 <= found[7] < max(mixtures) + 0.02
        assert route.hull(cost[None], value[None], np.array([[cost.min() - 0.1]]))[0, 0] == -np.inf
        reached = np.unique(np.minimum(found, value.max()))
        least = -route.hull(-value[None], -cost[None], -reached[None])
        np.testing.assert_allclose(route.hull(cost[None], value[None], least)[0], reached)  # there and back


def test_hull_of_each_draw_is_its_own():
    """Guards against: operators of one draw that make the hull of another."""
    rng = np.random.default_rng(1)
    cost, value, at = rng.uniform(1, 9, (7, 4)), rng.random((7, 4)), rng.uniform(9, 12, (7, 3))
    alone = [route.hull(cost[[i]], value[[i]], at[[i]])[0] for i in range(7)]
    np.testing.assert_array_equal(route.hull(cost, value, at), alone)


# ------------------------------------------------------------------------------------------------
# The router


PRICES = [0.0, 3e-4, 1e-3, 3e-3]


def routers(r, folds, prices, kind):
    return route.route(r, route.operators(r, least=2), folds, prices, kind)


def choices(router):
    """The numbers [P, R] of the operators that a router chose, one in each replay."""
    chosen = np.stack([*router.chosen.values()])  # [O, P, R]
    assert (chosen.sum(0) == 1).all()
    return chosen.argmax(0)


def test_router_never_reads_the_right_answer(tmp_path, grader):
    """Guards against: a choice that depends on the right answers of the problems that are decided, by classes of equal
    answers, a stopping rule or a fit that saw them."""
    rows = some_rows(40)
    ids, folds, r = replays_of([write(tmp_path / "x.jsonl", rows)], grader)
    fold_of = dict(zip(ids, folds))
    rng, changed = np.random.default_rng(3), []
    for one in rows:
        answers = {str(number(candidate)) for candidate in one["candidates"]} - {"None", one["answer"]}
        wrong = [*sorted(answers), "-1"]  # one of the wrong answers is right now
        changed.append({**one, "answer": str(rng.choice(wrong))} if fold_of[one["id"]] == 2 else one)
    ids, again, other = replays_of([write(tmp_path / "y.jsonl", changed)], grader)
    here = folds == 2
    assert (again == folds).all() and (r.right[here] != other.right[here]).mean() > 0.2
    elsewhere = 0
    for kind in range(2):
        pairs = list(zip(routers(r, folds, PRICES, kind), routers(other, folds, PRICES, kind)))
        changes = [(choices(before) != choices(after)).any(1) for before, after in pairs]  # [P] each
        assert all(before.name == "router" for before, _ in pairs[: len(PRICES)])
        assert not any(moved[here].any() for moved in changes[: len(PRICES)])
        elsewhere += sum(moved[~here].sum() for moved in changes[: len(PRICES)])
        assert any(moved[here].any() for moved in changes[len(PRICES) :])
    assert elsewhere > 0  # credits do change what other problems are decided by; without this the test is empty


class Lenient:
    """A grader that finds two answers right that are not equal to each other."""

    def equal(self, gold, answer):
        return gold is not None and (gold == answer or (gold == "5" and answer in ("5.01", "4.99")))

    def grade(self, pairs, what=None):
        assert all(answer is not None for _, answer in pairs)


def test_who_agrees_is_seen_without_the_right_answer(tmp_path):
    """Guards against: right answers that agree because they are right, which nobody can see at test time."""
    answers = ["5.01", "4.99", "5.01", None]
    paths = [write(tmp_path / gold, [row(f"p{i}", gold, answers, ["1"]) for i in range(5)]) for gold in ("5", "6")]
    (ids, right, seen), (_, wrong, same) = (route.read([path], Lenient()) for path in paths)
    assert right.votes[0, 0].tolist() == [0, 0, 0, -1] and wrong.votes[0, 0].max() > 0
    np.testing.assert_array_equal(seen, same)
    _, orders, which = route.draw_orders(ids, right, 0)
    r = route.replay(right, seen, orders, which)
    first, second, third, none = np.take_along_axis(r.classes[0], np.argsort(orders[0, 0]), 1).T  # [R] each
    assert (first == third).all() and (first != second).all() and (none == -1).all() and first.min() > 0


def test_bins_of_the_pilot():
    """Guards against: candidates without an answer that agree or disagree with anything."""
    classes = np.array([[[1, 1, 2], [2, 1, 1], [-1, 1, 1], [1, -1, 1], [-1, -1, 1]]])
    tokens, ones = np.array([[[3.0, 5, 9]] * 5]), np.ones((1, 5))
    r = route.Replays(classes, classes > 9, tokens, -tokens, 2 * tokens, ones, ones.astype(int), ones > 0, ones, ones)
    bins, features = route.after_pilot(r)
    assert bins.tolist() == [[0, 1, 2, 2, 3]]  # agree, disagree, one has an answer, none
    np.testing.assert_allclose(features[0, 0], [(np.log(4) + np.log(6)) / 2, -1, 8])  # of two candidates, not three


def test_expectations_are_of_other_problems(tmp_path, grader):
    """Guards against: a problem whose own credits, in this or another replay, are in the fit that decides on it."""
    _, folds, r = replays_of([write(tmp_path / "x.jsonl", some_rows(30))], grader)
    bins, features = route.after_pilot(r)
    assert np.bincount(folds).tolist() == [6] * 5 and features.shape[2] == 3 and {*bins.ravel()} >= {0, 1, 2}
    values = np.random.default_rng(0).random((*bins.shape, 3))
    expected = route.expectations(bins, features, values, folds)
    for p in range(30):
        changed = values.copy()
        changed[p] += 5
        moved = (route.expectations(bins, features, changed, folds) != expected).any((1, 2))  # [P]
        assert not moved[folds == folds[p]].any() and moved[folds != folds[p]].any()


def test_expectations_are_means_of_bins(tmp_path):
    """Guards against: slopes that move the mean, a bin that nobody else is in, features that are all the same."""
    rng, P, R = np.random.default_rng(0), 500, 2
    folds, bins = np.arange(P) % 5, np.repeat(rng.choice([0, 1], size=(P, 1)), R, 1)
    bins[0], features = 3, np.stack([rng.normal(size=(P, R)), np.ones((P, R))], 2)
    values = (0.3 + 0.5 * bins + 0.2 * bins * features[..., 0] + 0.01 * rng.normal(size=(P, R)))[..., None]
    expected = route.expectations(bins, features, values, folds)
    one = bins == 1
    assert abs(expected[bins == 0] - 0.3).max() < 0.02 and abs(expected[one] - values[one]).mean() < 0.03
    assert expected[0] == pytest.approx(values[1:].mean(), abs=0.1)  # problem 0, alone in its bin


def simulated(P, informative, seed):
    """Informative: on easy problems all agree and are right, on hard ones nobody does and only a refinement helps.
    Otherwise a coin decides who has an answer, which is wrong, and a refinement is as good whatever the pilot shows."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(P):
        easy = rng.random() < 0.6
        answers = ["1"] * 6 if easy else [str(x) for x in range(10, 16)]
        refined = "1" if easy or rng.random() < 0.9 else "2"
        if not informative:
            answers = [None if rng.random() < 0.5 else "2" for _ in range(6)]
            refined = "1" if rng.random() < 0.7 else "2"
        rows.append(row(f"p{i}", "1", answers, [refined], [int(t) for t in rng.integers(80, 120, 6)]))
    return rows


def test_router_wins_where_agreement_tells(tmp_path, capsys):
    """Guards against: a router that leaves lying what anybody could see, or an interval that hides it."""
    points = points_of([write(tmp_path / "x.jsonl", simulated(150, True, 0))], tmp_path / "out")
    for kind in route.KINDS:
        some = [p for p in points if p["kind"] == kind and p["cost"] is not None]
        routers, oracles = ([p for p in some if p["name"] == name] for name in ("router", "oracle router"))
        best = max(routers, key=lambda p: p["to_hull"]["points"])
        oracle = oracles[routers.index(best)]
        assert best["to_hull"]["ci95"][0] > 0.05 and best["saved"]["corrected"][0] > 0.1
        assert best["accuracy"] == pytest.approx(oracle["accuracy"], abs=0.02)
        assert oracle["tokens"] <= best["tokens"] < 1.15 * oracle["tokens"]
    assert capsys.readouterr().out.count("The router is cheaper than the hull at equal accuracy") == 2


@pytest.mark.parametrize("seed", range(4))
def test_router_claims_nothing_where_nothing_tells(tmp_path, capsys, seed):
    """Guards against: noise sold as a saving, the best of many costs by chance."""
    points = points_of([write(tmp_path / "x.jsonl", simulated(100, False, seed))], tmp_path / "out")
    routers = [p for p in points if p["name"] == "router"]
    assert all(p["to_hull"]["ci95"][0] <= 0 and p["saved"]["corrected"][0] <= 0 for p in routers)
    assert capsys.readouterr().out.count("The router is not shown to be cheaper") == 2


def test_pilot_and_prompts_are_paid_for(tmp_path, grader):
    """Guards against: a router that stops for less than its two candidates, prompts that cost nothing, an oracle
    that a router beats."""
    _, folds, r = replays_of([write(tmp_path / "x.jsonl", some_rows(30))], grader)
    for kind in range(2):
        found = routers(r, folds, PRICES, kind)
        for o, oracle in zip(found[: len(PRICES)], found[len(PRICES) :]):
            assert (o.tokens[..., 0] >= r.tokens[..., :2].sum(2)).all()
            prompts = o.tokens[..., 1] - o.tokens[..., 0]
            refined = prompts == r.prompt + r.refined_prompt
            assert (refined | (prompts == r.prompt)).all() and (r.prompt > 0).all()
            gain, most = (x.credit - x.price * x.tokens[..., kind] for x in (o, oracle))
            assert o.price == oracle.price and (gain <= most + 1e-9).all()
    stops = routers(r, folds, [9.0], 0)[0]  # where tokens cost too much for anything else
    np.testing.assert_array_equal(stops.tokens[..., 0], r.tokens[..., :2].sum(2))


def test_points_have_what_budget_json_promises(tmp_path, grader):
    """Guards against: points without names, costs or intervals; a hull that an operator is above."""
    points = points_of([write(tmp_path / "x.jsonl", some_rows(30))], tmp_path / "out")
    assert (tmp_path / "out" / "budget.png").stat().st_size > 10_000 and (tmp_path / "out" / "grades.jsonl").exists()
    names = ["one sample", *(f"vote of {k}" for k in range(2, 6)), "adaptive vote", "refine", "refine if they disagree"]
    names += ["router"] * 13 + ["oracle router"] * 13
    assert [(p["kind"], p["name"]) for p in points] == list(itertools.product(("generated", "with_prompts"), names))
    for p in points:
        low, high = p["ci95"]
        assert low <= p["accuracy"] <= high and p["tokens"] > 0
        assert (p["cost"] is None) == ("router" not in p["name"]) and len(p["to_hull"]["ci95"]) == 2
        if p["cost"] is None:
            assert p["to_hull"]["points"] < 1e-9 and p["to_hull"]["ci95"][1] < 1e-9
        else:
            assert sum(p["chosen"].values()) == pytest.approx(1) and list(p["chosen"]) == names[1:8]
            assert p["saved"]["corrected"][0] <= p["saved"]["ci95"][0] <= p["saved"]["ci95"][1]
    routers = [p for p in points if p["name"] == "router"]
    assert routers[0]["cost"] == 0 and any(p["saved"]["corrected"][0] < p["saved"]["ci95"][0] for p in routers)


# ------------------------------------------------------------------------------------------------
# Files


def test_order_of_the_lines_changes_nothing(tmp_path):
    """Guards against: replays, folds or draws that depend on where a problem stands in its file."""
    rows = some_rows(25)
    write(tmp_path / "x.jsonl", rows)
    first = points_of([str(tmp_path / "x.jsonl")], tmp_path / "out")
    write(tmp_path / "x.jsonl", [rows[i] for i in np.random.default_rng(5).permutation(25)])
    assert points_of([str(tmp_path / "x.jsonl")], tmp_path / "again") == first


def test_same_bytes_from_another_process_without_torch(tmp_path):
    """Guards against: Python's hash, which differs from process to process; seconds of waiting for torch."""
    write(tmp_path / "x.jsonl", some_rows(12))
    points_of([str(tmp_path / "x.jsonl")], tmp_path / "a")
    code = "import sys, route; route.DRAWS = 2000; route.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "b")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"}, check=True, capture_output=True)
    assert (tmp_path / "a" / "budget.json").read_bytes() == (tmp_path / "b" / "budget.json").read_bytes()


def test_seeds_are_averaged(tmp_path, grader):
    """Guards against: candidates of one seed in a replay of another."""
    paths = [write(tmp_path / f"{seed}.jsonl", some_rows(10, seed=0)) for seed in range(2)]
    other = [{**one, "candidates": two["candidates"]} for one, two in zip(some_rows(10), some_rows(10, seed=1))]
    write(tmp_path / "1.jsonl", other)
    _, _, both = replays_of(paths, grader)
    alone = [replays_of([path], grader)[2] for path in paths]
    R = alone[0].tokens.shape[1]
    assert both.tokens.shape[1] == 2 * R
    for s in range(2):
        sums = both.tokens[:, s * R : (s + 1) * R].sum(2)
        np.testing.assert_array_equal(sums, alone[s].tokens.sum(2))
    votes = [next(o for o in route.operators(r) if o.name == "vote of 5").credit.mean() for r in (both, *alone)]
    assert votes[0] == pytest.approx(np.mean(votes[1:]))


def without(rows, key, of):
    return [{**one, of: [{k: v for k, v in thing.items() if k != key} for thing in one[of]]} for one in rows]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (without(some_rows(6), "n_tokens", "candidates"), "no n_tokens"),
        (without(some_rows(6), "n_prompt_tokens", "refinements"), "no n_tokens or n_prompt_tokens"),
        ([{k: v for k, v in one.items() if k != "refinements"} for one in some_rows(6)], "no refinements; make them"),
        ([{**one, "rounds": [one["candidates"]]} for one in some_rows(6)], "several rounds"),
        (some_rows(6, N=2), "2 candidates leave nothing to decide"),
        (some_rows(4), "4 problems; it takes at least 5"),
        ([*some_rows(5), row("x", "1", ["1"] * 4, ["1", "1"])], "candidates"),
        ([{**one, "adaptive": 9} for one in some_rows(6)], "not --adaptive"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_routed_are_one_line(tmp_path, rows, words):
    """Guards against: tracebacks, or costs of nothing, for files of other programs."""
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(InputError) as error:
        route.main([path, "--out", str(tmp_path / "out")])
    assert words in str(error.value) and "\n" not in str(error.value) and path in str(error.value)


def test_errors_end_with_code_2(tmp_path):
    """Guards against: a traceback where a seed, a file or other problems are the user's mistake."""
    a, b = write(tmp_path / "a.jsonl", some_rows(6)), write(tmp_path / "b.jsonl", some_rows(7))
    for argv in ([f"{a},{b}"], [a, "--seed", "-1"], [a, "--time-limit", "0"], [str(tmp_path / "none.jsonl")]):
        with pytest.raises(InputError):
            route.main([*argv, "--out", str(tmp_path / "out")])
    command = [sys.executable, "route.py", f"{a},{b}", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_texts_without_log_probabilities_will_do(tmp_path, grader):
    """Guards against: log-probability and self-certainty, which other programs do not write, as nan in the fit."""
    rows = without(without(some_rows(10), "logprob", "candidates"), "self_certainty", "candidates")
    _, folds, r = replays_of([write(tmp_path / "x.jsonl", rows)], grader)
    _, features = route.after_pilot(r)
    assert features.shape[2] == 1
    values = np.ones((*features.shape[:2], 2))
    np.testing.assert_allclose(route.expectations(route.after_pilot(r)[0], features, values, folds), 1)
