"""evaluate.py: answers, grading, voting, the gap."""

import itertools
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import evaluate as e
import figures
from files import InputError, read_jsonl
from grade import Grader


@pytest.fixture(scope="module")
def grader():
    grader = e.Grader(limit=3.0)
    yield grader
    grader.close()


@pytest.mark.slow
def test_twenty_thousand_answers_take_less_than_a_minute(tmp_path):
    """Answers as they come from sampling: 500 problems, 40 answers each, of which about ten are different texts."""
    rng = np.random.default_rng(0)
    problems = {}
    for i in range(500):
        a, b, c = (int(x) for x in rng.integers(2, 30, 3))
        right = [rf"\frac{{{a}\sqrt{{{b}}}}}{{{c}}}", rf"{a}\sqrt{{{b}}}/{c}", rf"\dfrac{{{a} \sqrt{{{b}}}}}{{{c}}}"]
        wrong = [rf"\frac{{{a + j}\sqrt{{{b}}}}}{{{c}}}" for j in range(1, 5)] + [str(a), f"{a}x+{b}", rf"\sqrt{{{b}}}"]
        answers = [str(rng.choice(right if rng.random() < 0.5 else wrong)) for _ in range(40)]
        problem = outcome_arrays(39, 1)
        texts = {"answers": answers[:39], "rounds": [], "refinements": answers[39:], "sizes": (39, 0, 0, 1)}
        problems[str(i)] = {"answer": right[0], **texts, **problem}
    grader = e.Grader(cache=tmp_path / "grades.jsonl")
    # Seconds of two processors, so that other work on the machine does not count.
    started = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    outcomes = e.grade_files([problems], grader)
    grader.close()  # its processes have ended, so that their time is known
    ended = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    assert ended - started < 2 * 60 and 0.45 < (outcomes.votes == 0).mean() < 0.55 and not grader.stuck


# ------------------------------------------------------------------------------------------------
# Voting


def test_votes_are_cast_for_classes(grader):
    """Guards against: a vote on raw strings, which splits equal answers; an outcome that depends on their order."""
    answers = ["1/2", "0.5", "3", "3.0", r"\frac12", None, r"\sqrt{2}", r"2^{1/2}", r"\frac{1+2}{1}"]
    number = e.classes("0.5", answers, grader)
    assert number == [0, 0, 2, 2, 0, -1, 1, 1, 2]
    for order in itertools.islice(itertools.permutations(range(9)), 0, 362880, 20011):
        assert e.classes("0.5", [answers[i] for i in order], grader) == [number[i] for i in order]
    assert e.classes("0.5", answers, grader, ["7", r"\sqrt2", "1", None, ".5"]) == [*number, 4, 1, 3, -1, 0]


def test_right_answers_are_one_class(grader):
    """Guards against: right answers that the algebra does not find equal to each other, and that split their vote."""
    assert e.classes("x=5", ["x=5", "5"], grader) == [0, 0]


@pytest.mark.parametrize(
    ("votes", "credit"),
    [
        ([0, 0, 1, 1], 0.5),
        ([0, 1, 2, 3], 0.25),
        ([0, 0, 1, -1], 1.0),
        ([-1, -1, -1, 0], 1.0),
        ([-1, -1, -1, -1], 0.0),
        ([0, 1, 1, 2], 0.0),
    ],
)
def test_ties_share_and_no_answer_casts_no_vote(votes, credit):
    assert e.vote(np.array([votes, votes])).tolist() == [credit, credit] == [slow_vote(votes)] * 2


def slow_vote(votes, weights=None):
    """The credit of one vote, in plain Python."""
    sums = {}
    for vote, weight in zip(votes, weights or [1] * len(votes)):
        if vote >= 0:
            sums[vote] = sums.get(vote, 0) + weight
    top = [vote for vote, total in sums.items() if total == max(sums.values())]
    return (0 in top) / len(top) if top else 0.0


def some_votes(n, rows, seed=0):
    """Random class numbers: some rows are dominated by one class, some are all different, some have no answers."""
    rng = np.random.default_rng(seed)
    votes = np.minimum(rng.geometric(rng.uniform(0.15, 0.9, (rows, 1)), (rows, n)) - 1, n)
    votes = rng.permuted(np.arange(n + 1), out=None)[votes] if rng.random() < 0.5 else votes
    return np.where(rng.random((rows, n)) < rng.choice([0, 0.3]), -1, votes)


def test_weighted_votes_equal_the_slow_way():
    rng = np.random.default_rng(2)
    for seed in range(20):
        votes = some_votes(6, 10, seed)
        weights = rng.integers(1, 4, votes.shape).astype(float)  # whole numbers: there are ties
        expected = [slow_vote(v, w) for v, w in zip(votes.tolist(), weights.tolist())]
        assert e.vote(votes, weights).tolist() == pytest.approx(expected)


def test_weights_do_not_vanish_beside_a_candidate_without_an_answer():
    """Guards against: e^-1000 relative to a short candidate without an answer, which is 0, and so no vote at all."""
    arrays = {key: value[None, None] for key, value in outcome_arrays(3, 1).items()}
    arrays["logprob"], arrays["tokens"] = np.array([[[-2.0, -1000.0, -1001.0]]]), np.zeros((1, 1, 3))
    none = np.zeros((1, 1, 0, 0), int)
    x = e.Outcomes(votes=np.array([[[-1, 0, 1]]]), refined=np.zeros((1, 1, 1), int), rounds=none, **arrays)
    found = {method.name: method.credit(x).tolist() for method in e.methods_of(x)}
    assert found["weighted"] == found["logprob"] == [[1.0]]  # nor does a candidate of no tokens lose to nan


def test_a_method_defined_once_is_in_every_table_and_figure(tmp_path, monkeypatch):
    """Guards against: a new method that is forgotten in a table, or drawn as another one."""
    new = e.Method("first", "first candidate", lambda x: (x.votes[..., 0] == 0).astype(float), marker="*")
    monkeypatch.setattr(e, "METHODS", [*e.METHODS, new])
    drawn = []
    monkeypatch.setattr(
        figures, "look", lambda method, row, look=figures.look, **m: drawn.append(method) or look(method, row, **m)
    )
    [row] = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", KNOWN))["rows"]
    assert row["methods"]["first"]["accuracy"] == 0.5 and row["methods"]["first"]["tokens"] == 20.0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| first |" in text and "first: first candidate" in text
    assert drawn.count(new) == 2  # in figure.png and frontier.png; outcomes.png is about two methods alone
    assert len({method.marker for method in e.METHODS}) == len({method.name for method in e.METHODS}) == len(e.METHODS)


def test_best_of_n():
    """Guards against: a candidate without an answer that wins, and a tie that the first one wins."""
    votes = np.array([[0, 1, -1], [0, 1, -1], [1, 0, 0], [-1, -1, -1]])
    scores = np.array([[2.0, 1.0, 9.0], [1.0, 1.0, 9.0], [3.0, 3.0, 3.0], [1.0, 2.0, 3.0]])
    assert e.best(votes, scores).tolist() == [1.0, 0.5, pytest.approx(2 / 3), 0.0]


def test_borda_votes():
    """(N - rank + 1)^p by falling certainty, as in arXiv 2502.18581; p = 0 is the plain vote."""
    certainty = np.array([[3.0, 9.0, 1.0, 5.0]])
    assert e.borda(certainty, power=2).tolist() == [[4.0, 16.0, 1.0, 9.0]]
    assert e.borda(certainty).tolist() == [pytest.approx([2**0.5, 2.0, 1.0, 3**0.5])]
    assert e.borda(np.array([[1.0, 1.0, 0.0]]), power=1).tolist() == [[2.5, 2.5, 1.0]]  # equal ones share
    votes = some_votes(8, 50)
    certainty = np.random.default_rng(0).random(votes.shape)
    assert (e.vote(votes, e.borda(certainty, 0)) == e.vote(votes)).all()


# ------------------------------------------------------------------------------------------------
# Estimators


def test_pass_at_k_equals_enumeration():
    for n in range(1, 7):
        estimates = e.pass_at_k(n, np.arange(n + 1))
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert estimates[c, k - 1] == pytest.approx(np.mean([any(s) for s in subsets]))


def test_majority_at_k_equals_enumeration():
    """Guards against: ties counted wrongly, rivals that may win unseen, candidates without an answer forgotten."""
    for n, seed in itertools.product((1, 2, 3, 5, 8), range(6)):
        votes = some_votes(n, 12, seed)
        estimates = e.majority_at_k(votes)
        for row, k in itertools.product(range(12), range(1, n + 1)):
            subsets = list(itertools.combinations(votes[row].tolist(), k))
            assert estimates[row, k - 1] == pytest.approx(np.mean([slow_vote(s) for s in subsets]), abs=1e-12)


def test_majority_of_many_candidates():
    """The ends of the curve are known for any N, and random subsets say what is between."""
    votes = some_votes(64, 40, seed=3)
    estimates = e.majority_at_k(votes)
    assert estimates[:, 0] == pytest.approx((votes == 0).mean(1))
    assert estimates[:, -1] == pytest.approx(e.vote(votes))
    rng = np.random.default_rng(0)
    for k in (7, 32, 50):
        drawn = np.stack([e.vote(rng.permuted(votes, axis=1)[:, :k]) for _ in range(400)])  # [400, R]
        assert estimates[:, k - 1].mean() == pytest.approx(drawn.mean(), abs=4 * drawn.mean(1).std() / 20)


def test_bootstrap_interval_has_the_textbook_width():
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], 400, p=[0.1, 0.6, 0.3])
    [low, high] = e.interval(e.bootstrap(differences[:, None])[:, 0])
    half = 1.96 * differences.std() / 20
    assert low == pytest.approx(differences.mean() - half, abs=0.01)
    assert high == pytest.approx(differences.mean() + half, abs=0.01)


def test_bootstrap_is_paired():
    """Guards against: columns that are drawn apart, which would make the interval of a constant difference wide."""
    values = np.random.default_rng(0).random((50, 1))
    draws = e.bootstrap(np.concatenate([values, values + 0.25], 1))
    assert draws.shape == (10_000, 2) and np.allclose(draws[:, 1] - draws[:, 0], 0.25) and draws[:, 0].std() > 0.01
    assert (e.bootstrap(values) == e.bootstrap(values)).all()


def test_mcnemar_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for better, worse in [(0, 0), (3, 0), (5, 9), (40, 22), (1000, 1100), (4000, 300)]:
        differences = np.array([1.0] * better + [-1.0] * worse + [0.0] * 7)
        found = e.mcnemar(np.random.default_rng(0).permutation(differences))
        expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
        assert found == (better, worse, pytest.approx(expected, rel=1e-9))


def test_rank_correlation_equals_scipy():
    stats, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(0)
    for n in (3, 4, 7, 30):
        for _ in range(10):
            x, y = rng.integers(0, 6, n).astype(float), rng.random(n)
            if len(set(x)) == 1:
                continue
            found, expected = figures.spearman(x, y), stats.spearmanr(x, y).statistic
            assert found["spearman"] == pytest.approx(expected)
            assert (found["ci95"] is None) == (n < 4)
            if n >= 4:
                assert found["ci95"][0] <= found["spearman"] <= found["ci95"][1]
    assert figures.spearman([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])["spearman"] is None
    perfect = figures.spearman(range(5), range(5))
    assert perfect["spearman"] == pytest.approx(1) and perfect["ci95"][1] <= 1 and perfect["ci95"][0] < 0.5
    # Bonett and Wright: tanh(atanh(r) +- 1.96 sqrt((1 + r^2 / 2) / (n - 3)))
    x = list(range(28))
    y = x[:]
    y[3], y[20] = y[20], y[3]
    r = stats.spearmanr(x, y).statistic
    half = 1.96 * ((1 + r**2 / 2) / 25) ** 0.5
    ends = [np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half)]
    assert figures.spearman(x, y)["ci95"] == pytest.approx(ends)


def outcome_arrays(N, K):
    """The numbers about one problem, besides its answers."""
    order = np.stack([np.random.default_rng(k).permutation(N) for k in range(K)])
    return {
        "tokens": np.full(N, 10.0),
        "logprob": np.full(N, -1.0),
        "certainty": np.full(N, np.nan),
        "score": np.full(N, np.nan),
        "cut": np.zeros(N),
        "prompt_tokens": np.array([5.0]),
        "refined_tokens": np.full(K, 20.0),
        "refined_cut": np.zeros(K),
        "refined_prompt_tokens": np.full(K, 30.0),
        "copied": np.zeros(K),
        "drawn": np.full(K, float(N)),
        "left_out": np.zeros(K),
        "rounds_tokens": np.zeros((0, 0)),
        "rounds_prompt_tokens": np.zeros((0, 0)),
        "order": order.astype(np.int16),
    }


def test_equal_cost():
    """4 candidates of 10 tokens and a refinement of 20: as many tokens as 6; with its prompt of 30, as 9."""
    arrays = {key: value[None, None] for key, value in outcome_arrays(4, 1).items()}
    votes, none = np.zeros((1, 1, 4), int), np.zeros((1, 1, 0, 0), int)
    x = e.Outcomes(votes=votes, refined=np.zeros((1, 1, 1), int), rounds=none, **arrays)

    def found(curve, kind="generated"):
        cost = e.equal_cost(x, np.array(curve))[kind]
        return cost["k"], cost.get("credit"), cost.get("extrapolated")

    assert found([[0.5, 0.5, 0.6, 0.6]]) == (6.0, pytest.approx(np.array([0.7])), True)
    assert found([[0.5, 0.5, 0.6, 0.6]], "with_prompts") == (9.0, None, None)  # too far to guess
    of_two_seeds = [[0.5, 0.5, 0.6, 0.6, 0.65, 0.66, 0.7, 0.72]]
    assert found(of_two_seeds) == (6.0, pytest.approx(np.array([0.66])), False)
    assert found(of_two_seeds, "with_prompts") == (9.0, pytest.approx(np.array([0.75])), True)
    x.refined_tokens[:] = 24.0
    assert found(of_two_seeds) == (6.4, pytest.approx(np.array([0.676])), False)
    falling = found([[0.6, 0.6, 0.5, 0.4]])
    assert falling == (6.4, pytest.approx(np.array([0.4])), True)  # a vote that gets worse is not continued
    steep = found([[0.5, 0.5, 0.6, 0.7], [1.0, 1.0, 1.0, 1.0]])[1]
    assert steep == pytest.approx(np.array([0.94, 1.0]))
    steep = found([[0.1, 0.1, 0.5, 0.9], [1.0, 1.0, 1.0, 1.0]])[1]
    assert steep.mean() == pytest.approx(1.0)  # nor beyond what there is to solve
    x.refined_prompt_tokens[:] = np.nan
    assert found(of_two_seeds, "with_prompts") == (None, None, None)


# ------------------------------------------------------------------------------------------------
# Files and reports


def refined_row(i, answers, refined, gold="1", **more):
    box = [{"text": f"\\boxed{{{a}}}", "n_tokens": 10, "logprob": -1.0, "finish_reason": "stop"} for a in answers]
    done = [{"text": f"\\boxed{{{a}}}", "n_tokens": 7, "logprob": -1.0, "order": [0, 1]} for a in refined]
    return {"id": i, "problem": "?", "answer": gold, "prompt": "", "candidates": box, "refinements": done, **more}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def report_of(tmp_path, *files):
    e.main([*map(str, files), "--out", str(tmp_path / "out")])
    return json.loads((tmp_path / "out" / "report.json").read_text())


KNOWN = [
    refined_row("all wrong, rescued", ["2", "3"], ["1"]),
    refined_row("all wrong, lost", ["2", "2"], ["2"]),
    refined_row("a tie", ["1", "2"], ["1.0"]),
    refined_row("broken", ["1", "1"], ["3"]),
]


def test_report_of_known_numbers(tmp_path, capsys):
    rows = [*KNOWN, refined_row("no answer known", ["1", "1"], ["3"], gold=None)]
    [row] = report_of(tmp_path, write_rows(tmp_path / "x.refined.jsonl", rows))["rows"]
    expected = {
        "name": "x",
        "problems": 4,
        "n": 2,
        "pass@1": 3 / 8,
        "pass@2": 0.5,
        "maj@1": 3 / 8,
        "maj@2": 1.5 / 4,
        "refined": 0.5,
        "rescued": {"all_wrong": [1, 2], "minority_right": [0, 0], "tied": [1, 1], "majority_right_broken": [1, 1]},
        "flips": {
            "wrong_to_right": [1, 2],
            "right_to_wrong": [1, 1],
            "by_agreement": {
                "unanimous": {"wrong_to_right": [0, 1], "right_to_wrong": [1, 1]},
                "majority": {"wrong_to_right": [0, 0], "right_to_wrong": [0, 0]},
                "split": {"wrong_to_right": [1, 1], "right_to_wrong": [0, 0]},
                "none": {"wrong_to_right": [0, 0], "right_to_wrong": [0, 0]},
            },
            "by_correct": [
                {"correct": 0, "wrong_to_right": [1, 2], "right_to_wrong": [0, 0]},
                {"correct": 1, "wrong_to_right": [0, 0], "right_to_wrong": [0, 0]},
                {"correct": 2, "wrong_to_right": [0, 0], "right_to_wrong": [1, 1]},
            ],
            "one_more": {
                "wrong_to_right": [0.25, 2.5],
                "right_to_wrong": [0.25, 1.5],
                "by_agreement": {
                    "unanimous": {"wrong_to_right": [0.25, 2.5], "right_to_wrong": [0.25, 1.5]},
                    **dict.fromkeys(
                        ("majority", "split", "none"), {"wrong_to_right": [0, 0], "right_to_wrong": [0, 0]}
                    ),
                },
            },
        },
        "sampled": 2.0,
        "left_out": 0.0,
        "to_first": None,
        "copied": 0.25,
        "by_correct": [
            {"correct": 0, "problems": 2, "maj": 0.0, "refined": 0.5},
            {"correct": 1, "problems": 1, "maj": 0.5, "refined": 1.0},
            {"correct": 2, "problems": 1, "maj": 1.0, "refined": 0.0},
        ],
        "unanimous": 0.5,
        "answered": {"candidates": 1.0, "refinements": 1.0},
        "cut_off": {"candidates": 0.0, "refinements": None},
        "unboxed": {"candidates": 0.0, "refinements": None},
        "tokens": {
            "candidates": 20.0, "refinement": 7.0, "prompt": None, "refinement_prompt": None, "rounds": None
        },
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    gap = {"points": 0.125, "ci95": row["gap"]["ci95"]}
    ends = row["methods"]["refined"]["ci95"]
    shown = {"shown": 2, "problems": 4, "maj": 0.375, "refined": 0.5, "ci95": ends, "gap": gap, "tokens": 27.0}
    once = {"round": 1, "vote": 0.5, "any_right": 0.5, "refined": 0.5, "ci95": ends, "gap": gap, "tokens": 27.0}
    assert (row["by_shown"], row["rounds"]) == ([shown], [once])
    gap = row["gap"]
    assert gap["points"] == 0.125 and gap["relative"] == pytest.approx(1 / 3) and gap["seed_se"] is None
    assert gap["mcnemar"] == {"better": 2, "worse": 1, "p": 1.0} and gap["ci95"][0] < 0.125 < gap["ci95"][1]
    accuracy = {method: found["accuracy"] for method, found in row["methods"].items()}
    weighted = {"weighted": 0.375, "logprob": 0.375}  # equal log-probabilities: a vote, and a draw
    union = pytest.approx((0 + 0 + 1 + 1 + 1 / 3) / 4)
    assert accuracy == {"pass@1": 0.375, "maj@N": 0.375, **weighted, "refined": 0.5, "union": union, "pass@N": 0.5}
    printed = capsys.readouterr().out
    assert "1 of 5 problems have no answer" in printed and "37.5%" in printed and "1 / 2" in printed
    assert (tmp_path / "out" / "report.md").read_text().count("\n| x |") == 8


def test_a_file_of_candidates(tmp_path, capsys):
    """What people look at first: pass@k, maj@k and Best-of-N, without a gap; alone and beside a refined file."""
    rows = [{key: value for key, value in row.items() if key != "refinements"} for row in KNOWN]
    path = write_rows(tmp_path / "x.candidates.jsonl", rows)
    e.write_json(e.meta_path(path), {"parameters": 10, "seconds": 8.0, "model": "m"})
    [row] = report_of(tmp_path, path)["rows"]
    assert (row["name"], row["n"], row["k"], row["pass@2"], row["maj@2"]) == ("x.candidates", 2, 0, 0.5, 0.375)
    assert list(row["methods"]) == ["pass@1", "maj@N", "weighted", "logprob", "pass@N"]
    assert row["gap"] is row["refined"] is row["equal_cost"] is row["rescued"] is row["order"] is None
    assert row["flips"] is row["copied"] is None
    assert row["answered"] == {"candidates": 1.0, "refinements": None} and row["tokens"]["refinement"] is None
    assert row["seconds"] == {"candidates": 2.0, "refinement": None} and row["by_correct"][0]["refined"] is None
    printed = capsys.readouterr().out
    assert "No Refinement Gap for x.candidates" in printed and "At equal cost" not in printed
    assert "What becomes of the vote" not in printed
    assert "37.5% / 50.0%" in printed and (tmp_path / "out" / "frontier.png").exists()
    both = report_of(tmp_path, path, write_rows(tmp_path / "x.refined.jsonl", KNOWN))
    assert both["rows"][0] == row and both["rows"][1]["gap"]["points"] == 0.125 and both["scaling"] is None
    assert capsys.readouterr().out.count("\nx.candidates ") == 3  # not in the four tables about refinement
    with pytest.raises(InputError, match="more or fewer candidates or refinements"):
        e.main([f"{path},{tmp_path / 'x.refined.jsonl'}", "--out", str(tmp_path)])


def test_texts_are_enough(tmp_path, capsys):
    """Guards against: a file of another program that is refused for want of what is only a cost; guessed costs."""
    rows = []
    for row in KNOWN:
        texts = {key: [{"text": item["text"]} for item in row[key]] for key in ("candidates", "refinements")}
        rows.append({"id": row["id"], "question": "?", "answer": row["answer"], **texts})
    rows[0] |= {"prompt": None, "n_prompt_tokens": None}  # none of these says anything, none does harm
    rows[1]["candidates"][0] |= {"finish_reason": ["stop"], "logprob": float("nan"), "score": None}
    rows[2]["refinements"][0] |= {"order": None, "prompt": [{"role": "user"}], "n_tokens": None}
    path = write_rows(tmp_path / "x.jsonl", rows)
    [row] = report_of(tmp_path, path)["rows"]
    accuracy = {name: found["accuracy"] for name, found in row["methods"].items()}
    union = pytest.approx((0 + 0 + 1 + 1 + 1 / 3) / 4)
    assert accuracy == {"pass@1": 0.375, "maj@N": 0.375, "refined": 0.5, "union": union, "pass@N": 0.5}
    assert row["gap"]["points"] == 0.125 and row["equal_cost"] is None and row["order"]["pairs"] == 0
    assert set(row["tokens"].values()) == {None} and row["methods"]["maj@N"]["tokens"] is None
    printed = capsys.readouterr().out
    assert "At equal cost" not in printed and " nan" not in printed
    assert not (tmp_path / "out" / "frontier.png").exists() and (tmp_path / "out" / "figure.png").exists()
    for row in rows:  # what it cost is known of some: no mean of these is shown as if it were of all
        row["candidates"][0]["n_tokens"] = 10
    [row] = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", rows))["rows"]
    assert row["tokens"]["candidates"] is None and row["length"]["candidates"] is None
    e.main(["--show", "a tie", path])
    assert "candidate 1" in capsys.readouterr().out


def test_numbers_beyond_all_sums_are_missing(tmp_path):
    """Guards against: warnings and nan in a report because of one number, 1e308 or Infinity."""
    rows = [json.loads(json.dumps(row)) for row in KNOWN]
    rows[0]["candidates"][0] |= {"logprob": 1e308, "score": float("inf")}
    [row] = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", rows))["rows"]
    assert not {"weighted", "logprob", "score"} & set(row["methods"])


@pytest.mark.parametrize("limit", ["-1", "nan", "0", "inf", "1e9"])
def test_time_limits_that_are_none(limit, tmp_path):
    """Guards against: all comparisons stuck (-1), a hang (nan), no limit at all (0)."""
    path = write_rows(tmp_path / "x.jsonl", KNOWN)
    with pytest.raises(InputError, match=f"--time-limit {'1e.09' if limit == '1e9' else limit}: must be above 0"):
        e.main([path, "--out", str(tmp_path), "--time-limit", limit])


def test_records_that_are_not_ours(tmp_path):
    """Guards against: a traceback for a meta.json whose numbers are texts."""
    path = write_rows(tmp_path / "x.refined.jsonl", KNOWN)
    e.write_json(e.meta_path(path), {"parameters": "7B", "seconds": [1], "data": 5, "model": None})
    [row] = report_of(tmp_path, path)["rows"]
    assert row["parameters"] is None and row["seconds"] == {"candidates": None, "refinement": None}


def test_names_of_files(tmp_path):
    """NAME=FILE,FILE; but a file may have these signs in its name, and two folders files of one name."""
    odd = tmp_path / "a=b,c.refined.jsonl"
    odd.write_text("")
    words = [str(odd), "x/m.refined.jsonl", "y/m.refined.jsonl", "two=s0.jsonl,s1.jsonl", f"n={odd}"]
    assert e.named_files(words) == {
        "a=b,c": [str(odd)],
        "m": ["x/m.refined.jsonl"],
        "m'": ["y/m.refined.jsonl"],
        "two": ["s0.jsonl", "s1.jsonl"],
        "n": [str(odd)],
    }


def test_names_in_figures_do_not_overlap():
    """Names are moved as little as it takes, up as much as down, and stay inside."""
    assert figures.spread(np.array([0.2, 0.5, 0.8]), 0.1) == pytest.approx([0.2, 0.5, 0.8])
    assert figures.spread(np.array([0.5, 0.5, 0.5]), 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert figures.spread(np.array([0.97, 0.98, 1.0]), 0.1) == pytest.approx([0.8, 0.9, 1.0])
    places = figures.spread(np.sort(np.random.default_rng(0).random(9)), 0.08)
    assert np.diff(places).min() > 0.0799 and 0 <= places.min() and places.max() <= 1


def test_figures_are_drawn_and_tables_fit(tmp_path, capsys):
    """Guards against: an empty panel, a legend that covers everything, a table wider than a terminal."""
    from matplotlib.image import imread

    for i in range(5):
        rng = np.random.default_rng(i)
        rows = [refined_row(j, rng.integers(0, 3, 5).tolist(), rng.integers(0, 2, 2).tolist()) for j in range(20)]
        path = tmp_path / f"a rather long name of a model, number {i}.refined.jsonl"
        e.write_json(e.meta_path(write_rows(path, rows)), {"parameters": 10**i, "seconds": 40.0 * 10**i, "model": "m"})
    report = report_of(tmp_path, *sorted(tmp_path.glob("*.jsonl")))
    assert report["scaling"]["gap_and_parameters"]["models"] == 5 and report["rows"][1]["parameters"] == 10
    for name in ("figure", "frontier", "outcomes", "scaling"):
        image = imread(tmp_path / "out" / f"{name}.png")[:, :, :3]
        ink = (image.min(2) < 0.95).mean()
        assert 0.01 < ink < 0.5 and min(image.shape[:2]) > 300, name
        assert image[:3].min() == image[-3:].min() == image[:, :3].min() == image[:, -3:].min() == 1, "cut off"
    *printed, _ = capsys.readouterr().out.splitlines()  # the last line names the folder, whatever its length
    assert max(map(len, printed)) <= 100


def test_external_scores_and_certainties_are_used(tmp_path):
    rows = [refined_row(i, ["1", "2", "2"], ["2"]) for i in range(3)]
    for row in rows:
        for candidate, score, certainty in zip(row["candidates"], (9.0, 1.0, 2.0), (30.0, 1.0, 2.0)):
            candidate.update(score=score, self_certainty=certainty)
    rows[1]["candidates"][0]["score"] = 0.0
    [row] = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", rows))["rows"]
    assert row["methods"]["score"]["accuracy"] == pytest.approx(2 / 3)
    assert row["methods"]["certainty"]["accuracy"] == 0.0  # 3^0.5 votes against 1 + 2^0.5
    del rows[2]["candidates"][1]["score"]
    [row] = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", rows))["rows"]
    assert "score" not in row["methods"] and "certainty" in row["methods"]


def test_several_refinements_count_with_their_mean(tmp_path):
    rows = [refined_row("a", ["2", "2"], ["1", "2"]), refined_row("b", ["1", "1"], ["1", "1"])]
    [row] = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", rows))["rows"]
    assert row["refined"] == 0.75 and row["rescued"]["all_wrong"] == [0.5, 1] and row["tokens"]["refinement"] == 14
    assert row["methods"]["refmaj"]["accuracy"] == 0.75  # "a" is a tie
    assert row["methods"]["union"] == {**row["methods"]["union"], "accuracy": 0.5, "tokens": 34.0}
    assert row["methods"]["refined"]["tokens"] == 27.0


def slow_flips(problems):
    """The counts of `flips`, in plain Python, of some (answers, refined answers) to problems whose answer is "1"."""
    found = {"wrong_to_right": [0, 0], "right_to_wrong": [0, 0]}
    for answers, refined in problems:
        credit = slow_vote([-1 if a is None else int(a) - 1 for a in answers])
        if credit in (0, 1):  # else it is a tie
            pair = found["right_to_wrong" if credit else "wrong_to_right"]
            pair[0] += sum((a == "1") != (credit == 1) for a in refined) / len(refined)
            pair[1] += 1
    return found


def slow_agreement(answers):
    votes = [a for a in answers if a is not None]
    most, n = max(map(votes.count, votes), default=0), len(answers)
    kinds = (("none", most == 0), ("unanimous", most == n), ("majority", most > n / 2), ("split", True))
    return next(kind for kind, true in kinds if true)


def test_votes_that_the_refinement_turns_around(tmp_path):
    """Guards against: a tie taken for a right or a wrong vote, seeds left out, a problem under two kinds of agreement
    or none, a class of half the candidates taken for a majority, a share counted without the candidates of no answer.
    """
    rng, seeds, every = np.random.default_rng(0), [], {}
    for seed in range(2):
        rows = []
        for i, votes in enumerate(itertools.product(("1", "2", "3", None), repeat=4)):  # all there are
            refined = [("1", "2", None)[j] for j in rng.integers(0, 3, 2)]
            row = refined_row(i, votes, refined)
            for item, answer in zip(row["candidates"] + row["refinements"], [*votes, *refined]):
                item["text"] = "I do not know." if answer is None else item["text"]
            rows.append(row)
            every.setdefault(slow_agreement(votes), []).append((votes, refined))
        seeds.append(write_rows(tmp_path / f"s{seed}.jsonl", rows))
    [row] = report_of(tmp_path, ",".join(seeds))["rows"]
    by, by_correct, one_more = (row["flips"].pop(key) for key in ("by_agreement", "by_correct", "one_more"))
    everything = list(itertools.chain(*every.values()))
    assert row["flips"] == slow_flips(everything)
    for c, line in enumerate(by_correct):
        assert line == {"correct": c, **slow_flips([pair for pair in everything if pair[0].count("1") == c])}
    fewer = [(answers[:i] + answers[i + 1 :], answers) for answers, _ in everything for i in range(4)]
    parts = one_more.pop("by_agreement")
    for found, some in ((one_more, fewer), *((parts[kind], [x for x in fewer if slow_agreement(x[0]) == kind])
                                             for kind in parts)):  # fmt: skip
        expected = {"wrong_to_right": np.zeros(2), "right_to_wrong": np.zeros(2)}
        for before, after in some:
            first, then = (slow_vote([-1 if a is None else int(a) - 1 for a in x]) for x in (before, after))
            if first in (0, 1):
                pair = expected["right_to_wrong" if first else "wrong_to_right"]
                pair += np.array([abs(then - first), 1]) / 4
        assert all(found[way] == pytest.approx(expected[way], abs=1e-5) for way in expected)
    assert by == {kind: slow_flips(every[kind]) for kind in ("unanimous", "majority", "split", "none")}
    assert by["none"]["right_to_wrong"] == [0, 0] and by["none"]["wrong_to_right"][1]
    ties = 2 * 4**4 - sum(of for _, of in row["flips"].values())
    for name, (turned, of) in row["flips"].items():
        parts = [pairs[name] for pairs in by.values()]
        assert (turned, of) == (sum(p[0] for p in parts), sum(p[1] for p in parts)) and 0 < turned < of
    assert ties == row["rescued"]["tied"][1] > 0 and row["unanimous"] == 3 / 4**4
    shown = "| {:.4g} / {} | {:.4g} / {} |".format(*row["flips"]["wrong_to_right"], *row["flips"]["right_to_wrong"])
    assert shown in (tmp_path / "out" / "report.md").read_text()


def test_refinements_that_copy_a_candidate(tmp_path):
    """Guards against: thoughts and white space compared, too; the same answer in other words taken for a copy; two
    texts that are all thought, of which no prompt shows the one that would have been copied."""
    row = refined_row("a", ["1", "2"], ["1"] * 6)
    texts = ["<think>so</think>\n It is \\boxed{1}. ", "<think>cut off"]
    for candidate, text in zip(row["candidates"], texts):
        candidate["text"] = text
    texts = ["It is \\boxed{1}.", "<think>hm</think> It is \\boxed{1}.\n", "hm</think>It is \\boxed{1}.", "<think>so"]
    for refinement, text in zip(row["refinements"], [*texts, "It is  \\boxed{1}.", "\\boxed{1}"]):
        refinement["text"] = text
    row["refinements"][2]["prompt"] = "...\n<think>\n"
    [found] = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", [row]))["rows"]
    assert found["copied"] == 0.5 and "| 50.0% |" in (tmp_path / "out" / "report.md").read_text()


def test_notes_on_what_was_cut_off_and_what_has_no_box(tmp_path):
    """Guards against: a report of a real model that scores 0 and does not say why; a note where there is no reason;
    a cut-off text without an answer blamed on the model; a reason guessed that the file does not name."""
    rows = [refined_row(i, ["1", "2"], ["1"]) for i in range(20)]
    for row in rows:
        row["refinements"][0]["finish_reason"] = "stop"

    def noted():
        report_of(tmp_path, write_rows(tmp_path / "x.jsonl", rows))
        lines = (tmp_path / "out" / "report.md").read_text().splitlines()
        return [line[2:] for line in lines if line.startswith("- x: ")]

    assert noted() == []
    for row, kind, text in (
        (0, "candidates", "a"),
        (1, "candidates", "b"),
        (2, "candidates", "c"),
        (3, "refinements", ""),
    ):
        rows[row][kind][0] |= {"text": text, "finish_reason": "length"}
        rows[row + 9][kind][0]["text"] = text
    assert noted() == []  # 3 of 40 and 1 of 20, cut off or not
    rows[4]["candidates"][0]["finish_reason"] = rows[5]["refinements"][0]["finish_reason"] = "length"
    seldom = "were cut off by the length limit, and a cut-off one seldom has an answer; give"
    cut = [
        f"x: 10% of the candidates {seldom} sample.py a larger --max-new-tokens.",
        f"x: 10% of the refinements {seldom} refine.py a larger --max-new-tokens.",
    ]
    assert noted() == cut
    rows[13]["refinements"][0]["text"] = "It is 1."
    box = "that were not cut off have no answer: "
    box += "the model does not put it in a box, \\boxed{...}, so that grading sees none."
    assert noted() == [*cut, f"x: 11% of the refinements {box}"]  # 2 of 18
    rows[15]["candidates"][0]["text"] = "It is 1."
    assert noted() == [cut[0], f"x: 11% of the candidates {box}", cut[1], f"x: 11% of the refinements {box}"]  # 4 of 36
    for item in itertools.chain(*(row["candidates"] + row["refinements"] for row in rows)):
        del item["finish_reason"]
    assert noted() == []


def test_tables_on_a_terminal_without_arrows(tmp_path):
    """Guards against: a UnicodeEncodeError in place of the tables where the terminal's signs are few."""
    command = [sys.executable, "evaluate.py", write_rows(tmp_path / "x.jsonl", KNOWN), "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "wrong ? right" in done.stdout, done.stderr
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| wrong → right | right → wrong | copied | one more: w → r | r → w |" in written


def test_order_sensitivity(tmp_path):
    """Guards against: pairs in the same order counted, places taken for candidates."""
    rows = [
        refined_row("a", ["1", "2"], ["1", "2"]),
        refined_row("b", ["1", "2"], ["1", "1"]),
        refined_row("c", ["2", "1"], ["1", "2"]),  # the same order twice
        refined_row("d", ["1", "1"], ["1", "2"]),
    ]
    for row in rows:
        if row["id"] != "c":
            row["refinements"][1]["order"] = [1, 0]
    [row] = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", rows))["rows"]
    assert row["order"]["changed"] == pytest.approx(2 / 3) and row["order"]["pairs"] == 3
    # The right candidate stands first in a.0 (right) and b.0 (right), second in a.1 (wrong), b.1, c.0 (right), c.1.
    assert row["order"]["at_place"] == [[1.0, 2], [0.5, 4]]


def test_seeds_of_one_row(tmp_path):
    """Several files for one row: values are averaged over seeds before problems are drawn, and seeds have an error."""
    second = [refined_row(row["id"], ["1", "1"], ["1"]) for row in KNOWN[::-1]]  # another order of the problems
    first, second = write_rows(tmp_path / "s0.jsonl", KNOWN), write_rows(tmp_path / "s1.jsonl", second)
    one, two, both = report_of(tmp_path, first, second, f"both={first},{second}")["rows"]
    assert both["name"] == "both" and both["seeds"] == 2 and both["problems"] == 4
    for key in ("pass@1", "maj@2", "refined"):
        assert both[key] == pytest.approx((one[key] + two[key]) / 2)
    gaps = [one["gap"]["points"], two["gap"]["points"]]
    assert both["gap"]["points"] == pytest.approx(np.mean(gaps))
    assert both["gap"]["seed_se"] == pytest.approx(np.std(gaps, ddof=1) / 2**0.5)
    assert not both["equal_cost"]["generated"]["extrapolated"]  # 2.7 candidates of the four there are
    for changes, message in (
        ([refined_row("new", ["1", "1"], ["1"])], "is not in both this file and"),
        ([refined_row("broken", ["1", "1"], ["1"], gold="7"), *KNOWN[:3]], "another right answer than in"),
        ([refined_row(row["id"], ["1", "1", "1"], ["1"]) for row in KNOWN], "more or fewer candidates or refinements"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            e.main([f"r={first},{write_rows(tmp_path / 'other.jsonl', changes)}", "--out", str(tmp_path)])
        assert "other.jsonl" in str(caught.value)


def test_report_does_not_depend_on_what_must_not_matter(tmp_path):
    """The order of the candidates, the order of the problems, and the form in which an answer is written."""
    rng = np.random.default_rng(0)
    forms = {1: ["1", "1.0", r"\frac{2}{2}"], 2: ["2", "$2$"], 3: ["3", r"\frac62"], 4: [r"\sqrt2", r"\sqrt{2}"]}
    base, renamed, moved = [], [], []
    for i in range(40):
        answers, refined = rng.integers(1, 5, 6), rng.integers(1, 5, 2)
        numbers = [{"logprob": float(-x), "self_certainty": float(y)} for x, y in rng.random((6, 2))]
        place = rng.permutation(6)
        order = [rng.permutation(6).tolist() for _ in range(2)]
        for rows, write, at in (
            (base, lambda a: forms[a][0], range(6)),
            (renamed, lambda a: str(rng.choice(forms[a])), range(6)),
            (moved, lambda a: forms[a][0], place),
        ):
            row = refined_row(i, [write(answers[j]) for j in at], map(write, refined))
            for candidate, j in zip(row["candidates"], at):
                candidate.update(numbers[j])
            for refinement, shown in zip(row["refinements"], order):
                refinement["order"] = [list(at).index(j) for j in shown]
            rows.append(row)
    moved = [moved[i] for i in rng.permutation(40)]
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in zip("abc", (base, renamed, moved))]
    first, *others = report_of(tmp_path, *files)["rows"]
    nothing = {name: {"points": 0.0, "ci95": [0.0, 0.0]} for name in ("pass@1", "maj@N", "refined")}
    assert first.pop("to_first") is None and [row.pop("to_first") for row in others] == [nothing, nothing]

    def without_draws(value):
        if isinstance(value, dict):
            return {k: without_draws(v) for k, v in value.items() if k not in ("name", "ci95", "relative_ci95")}
        if isinstance(value, list):
            return [without_draws(v) for v in value]
        return pytest.approx(value) if isinstance(value, float) else value

    assert 0.1 < first["maj@6"] < 0.9 and first["order"]["changed"] > 0.1
    copied = others[0]["copied"]  # it compares texts; another name for an answer changes nothing else at all
    assert copied < first["copied"] and others[0] == {**first, "name": "b", "copied": copied}
    assert without_draws(others[1]) == without_draws(first)  # other problems come up in a draw of the bootstrap
    assert others[1]["gap"]["ci95"] == pytest.approx(first["gap"]["ci95"], abs=0.02)


def test_show(tmp_path, capsys):
    rows = [refined_row("p1", ["1", "2", "2.0"], ["1"]), refined_row("p2", ["1", "1", "1"], ["2"])]
    rows[0]["candidates"][1]["text"] = "no box"
    e.main(["--show", "p1", write_rows(tmp_path / "x.jsonl", rows)])
    printed = capsys.readouterr().out
    lines = {line[:12].strip(): line.split() for line in printed.splitlines() if line.startswith(("cand", "refine"))}
    assert lines["candidate 0"][2:5] == ["right", "1", "1"] and lines["candidate 2"][2:5] == ["wrong", "2.0", "1"]
    assert lines["candidate 1"][2:4] == ["no", "answer"] and lines["refinement 0"][2:5] == ["right", "1", "1"]
    assert "--- candidate 1: no answer\nno box" in printed and max(map(len, printed.splitlines())) <= 100
    with pytest.raises(InputError, match="no problem with id 'p3'"):
        e.main(["--show", "p3", str(tmp_path / "x.jsonl")])
    del rows[0]["refinements"], rows[0]["answer"]  # of candidates, and without a right answer
    e.main(["--show", "p1", write_rows(tmp_path / "x.jsonl", rows), "--time-limit", "1"])
    printed = capsys.readouterr().out
    assert "right answer: None" in printed and "refinement 0" not in printed and "wrong" not in printed


def test_show_of_half_a_surrogate_pair(tmp_path):
    """Guards against: a UnicodeEncodeError for a text that JSON can hold and a terminal cannot show."""
    row = {"id": "a", "problem": "x\ud800", "answer": "1", "candidates": [{"text": "\ud800 \\boxed{1}"}]}
    command = [sys.executable, "evaluate.py", "--show", "a", write_rows(tmp_path / "x.jsonl", [row])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "x?" in done.stdout and "? \\boxed{1}" in done.stdout, done.stderr


def test_show_has_a_time_limit(tmp_path, monkeypatch):
    """Guards against: --show that waits as long as it likes for one comparison."""
    limits = []
    monkeypatch.setattr(e, "Grader", lambda limit: limits.append(limit) or Grader(limit))
    e.main(["--show", "broken", write_rows(tmp_path / "x.jsonl", KNOWN), "--time-limit", "0.5"])
    assert limits == [0.5]


def test_output_that_nobody_reads_to_its_end(tmp_path):
    """Guards against: a BrokenPipe traceback behind `| head -1`, or a report that is then not written."""
    rows = [refined_row(f"problem {i}", ["1"] * 50, ["1"]) for i in range(3)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    for options in ("--show 'problem 1'", f"--out '{tmp_path}'"):
        command = f"'{sys.executable}' evaluate.py {options} '{path}' | head -1"
        done = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True)
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert (tmp_path / "report.md").exists()


def test_suite(random_model, tmp_path):
    """The whole command on local files, with a random model; stopped in between, it goes on where it was."""
    for name in ("one", "two"):
        rows = [{"id": i, "problem": f"{name} {i}?", "answer": str(i)} for i in range(3)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    command = [sys.executable, str(ROOT / "evaluate.py"), "--suite", f"{tmp_path / 'one.jsonl'},knights,three.jsonl"]
    command += ["--model", str(random_model), "--n", "3", "--k", "2", "--limit", "2", "--out", "out"]
    command += ["--max-new-tokens", "8", "--batch-size", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "no file and no benchmark 'three.jsonl'" in done.stderr  # before time is spent
    command[3] = command[3].replace("three.jsonl", str(tmp_path / "two.jsonl"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("python sample.py") == done.stdout.count("python refine.py") == 3
    assert "[6 of 6" in done.stdout and "--max-new-tokens 8" in done.stdout
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [(row["name"], row["problems"], row["n"], row["k"]) for row in rows] == [
        ("one", 2, 3, 2),
        ("knights", 2, 3, 2),
        ("two", 2, 3, 2),
    ]
    assert rows[0]["parameters"] > 1000 and rows[0]["seconds"]["refinement"] > 0 and rows[0]["tokens"]["prompt"] > 20
    assert rows[0]["methods"].keys() >= {"certainty", "logprob", "weighted", "union", "refmaj"}
    (tmp_path / "out" / "two.refined.jsonl").unlink()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("complete already") == 5
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"][1] == rows[1]


@pytest.mark.slow
def test_large_report_takes_little_time_and_memory(tmp_path):
    """10,000 problems with 64 candidates that have been graded: 30 seconds of two cores, 2 GiB."""
    rng = np.random.default_rng(0)
    with open(tmp_path / "big.refined.jsonl", "w") as file:
        for i in range(10_000):
            right = rng.random(65) < rng.random()
            answers = [
                "17" if ok else [r"\frac{3}{7}", r"\sqrt{3}", str(a)][min(a, 2)]
                for ok, a in zip(right.tolist(), rng.geometric(0.15, 65).tolist())
            ]
            row = refined_row(i, answers[:64], answers[64:], gold="17")
            for candidate, number in zip(row["candidates"], rng.random(64).tolist()):
                candidate.update(text="Some steps. " * 20 + candidate["text"], logprob=-number, self_certainty=number)
            file.write(json.dumps(row) + "\n")
    code = (
        "import resource, evaluate as e\n"
        f"e.main(['{tmp_path}/big.refined.jsonl', '--out', '{tmp_path}'])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss)"
    )
    for again in (False, True):
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        seconds, kilobytes = map(float, done.stdout.split()[-2:])
        if again:  # seconds of the processor: other work on the machine does not count
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime < 30
            assert seconds < 30 and kilobytes < 2 << 20
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["problems"] == 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("\n  \n", "no rows"),
        ('{"id": 1}\n', "line 1: no 'problem'"),
        (json.dumps({"id": 1, "problem": "?", "answer": "5"}) + "\n", "line 1: no 'candidates'"),
        (json.dumps(refined_row("a", ["1", "1"], ["1"])) + "\n{oops\n", "line 2: not valid JSON"),
        (json.dumps(refined_row("a", ["1", "1"], ["1"])) + '\n{"id": "b", "probl', "the file ends in the middle of it"),
        (json.dumps(refined_row("a", ["1", "1"], ["1"])) + '\n{"id": "b", "problem": "?"}\n', "line 2: no 'answer'"),
        (
            json.dumps(refined_row("a", ["1", "1"], ["1"]))
            + "\n"
            + json.dumps(refined_row("b", ["1", "1"], ["1", "2"])),
            "id 'b': 2",
        ),
        (json.dumps(refined_row("a", ["1", "1"], ["1"], gold=None)) + "\n", "no problem has an answer"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"id": 1, "a": 2}\n\n{"id": "1"}\n', "line 3: id '1' already stands"),
        (json.dumps(refined_row("a", [], ["1"])) + "\n", "its 'candidates' are empty"),
        (
            json.dumps(refined_row("a", ["1", "1"], ["1"])).replace(": 7", ": -7"),
            "id 'a': one of its n_tokens is below 0",
        ),
        (json.dumps(refined_row("a", ["1", "1"], ["1"], problem=["?"])), "line 1: its problem is not a text"),
        (json.dumps(refined_row("a", ["1", "1"], ["1"], problem=None)), "line 1: no 'problem'"),
        (json.dumps(refined_row("a", ["1", "1"], ["1"], gold=["1"])), "id 'a': its answer is no text but ['1']"),
        (
            json.dumps(refined_row("a", ["1", "1"], ["1"], refinements=5)),
            "its 'refinements' are empty or no list, but 5",
        ),
        (json.dumps(refined_row("a", ["1", "1"], ["1"], candidates=["1"])), "lack text: number 0 is '1'"),
        (json.dumps(refined_row("a", ["1", "1"], ["1"], candidates=[{"text": None}])), "lack text: number 0 is"),
        (json.dumps(refined_row("a", ["1", "1"], ["1"])).replace("[0, 1]", "5"), "id 'a': the order 5 is not one of"),
        (json.dumps(refined_row("a", ["1", "1"], ["1"])).replace("[0, 1]", "[[0]]"), "the order [[0]] is not one of"),
        (json.dumps(refined_row("a", ["1", "1"], ["1"])).replace("[0, 1]", "[1, 1]"), "the order [1, 1] is not one of"),
        (
            json.dumps(refined_row("a", ["1", "1"], ["1"])).replace("-1.0", "1" * 400),
            "not all of its logprob are numbers",
        ),
        (json.dumps(refined_row("a", ["1", "1"], ["1"])).replace("-1.0", "[1]"), "not all of its logprob are numbers"),
        (f'{{"id": 1, "problem": "?", "answer": {"[" * 100_000}', "line 1: not valid JSON"),
        (
            json.dumps(refined_row("a", ["1"], ["1"])).replace(r'"\\boxed{1}"', "1"),
            "its 'candidates' lack text: number 0 is",
        ),
        (json.dumps({**refined_row("a", ["1", "1"], ["1"]), "candidates": None}) + "\n", "its 'candidates' are empty"),
        (
            json.dumps(refined_row("a", ["1", "1"], ["1"])).replace("-1.0", '"?"'),
            "id 'a': not all of its logprob are numbers",
        ),
        (json.dumps(refined_row("a", ["1"], ["1"])), "id 'a': the order [0, 1] is not one of its 1 candidates"),
        (json.dumps(refined_row(None, ["1", "1"], ["1"])), "line 1: no 'id' in it"),
        (json.dumps(refined_row("a", ["1"], [])) + "\n", "its 'refinements' are empty"),
    ],
)
def test_unusable_files_are_named(content, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="bad.jsonl") as caught:
        e.read_file(path) if "line 3" not in message else read_jsonl(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unequal_numbers_of_candidates_are_refused(tmp_path):
    rows = [refined_row("a", ["1", "1"], ["1"]), refined_row("b", ["1"], ["1"])]
    rows[1]["refinements"][0]["order"] = [0]
    path = write_rows(tmp_path / "x.jsonl", rows)
    with pytest.raises(InputError, match="'b': 1 candidates and 1 refinements, but 2"):
        e.read_file(path)
