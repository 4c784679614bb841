"""evaluate.py: answers, grading, voting, the gap."""

import itertools
import json
import time

import numpy as np
import pytest

import evaluate as e


@pytest.fixture(scope="module")
def grader():
    grader = e.Grader(limit=3.0)
    yield grader
    grader.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{27}", "27"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{x : \{1\}\right\}} and a } after", r"\left\{x : \{1\}\right\}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"an earlier \boxed{3}, cut off: \boxed{\frac{1}{2", None),
        (r"\boxed{}", None),
        ("no box, the answer is 5", None),
        (r"<think>maybe \boxed{3}</think> \boxed{4}", "4"),
        (r"<think>maybe \boxed{3}</think> hmm", None),
        (r"<think>cut off \boxed{3}", None),
        (r"template opened it \boxed{3}</think>\boxed{4}", "4"),
    ],
)
def test_answers_are_found(text, answer):
    """Guards against: falling back to an earlier box or to a thought, and braces counted wrongly."""
    assert e.answer_of({"text": text}) == answer


def test_thought_opened_by_the_template():
    """Guards against: a thought that the prompt opened and the length limit cut off, read as an answer."""
    assert e.answer_of({"text": r"so \boxed{3}"}, prompt="...assistant\n<think>\n") is None
    assert e.answer_of({"text": r"so</think> \boxed{3}"}, prompt="...assistant\n<think>\n") == "3"


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac{1}{2}", "1/2", True),
        ("-0.5", r"-\frac{1}{2}", True),
        ("27.0", "27", True),
        ("1,000", "1000", True),
        ("10000", "10001", False),
        ("2", "-2", False),
        (r"\frac{1}{2}", "2", False),
        (r"\sqrt{2}", r"2^{1/2}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        (r"x^2+2x+1", r"(x+1)^2", True),
        (r"x^2+2x+1", r"(x-1)^2", False),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"\text{Evelyn}", "Carla", False),
        ("5", None, False),
        ("1/0", "0", False),
    ],
)
def test_equal_answers(gold, answer, equal, grader):
    assert grader.equal(gold, answer) is equal


@pytest.mark.parametrize("hostile", [r"10^{10^{10}}", "(" * 100_000, "9" * 100_000, r"\frac{" * 20_000, "x^{" * 33_333])
def test_hostile_answers_cost_their_time_limit_and_no_more(hostile, grader):
    """Guards against: one expression that keeps the algebra system, and with it the whole run, busy for ever."""
    started = time.time()
    assert grader.equal("5", hostile) is False
    assert time.time() - started < grader.limit + 2
    assert grader.equal(r"\sqrt{4}", "2") is True  # and the next answer is graded as ever


def test_crashing_worker_is_replaced(grader):
    assert grader.equal("x+1", "1+x") is True
    grader.worker.kill()
    grader.worker.wait()
    grader.equal("x+2", "2+x")  # may be lost with the worker
    assert grader.equal("x+3", "3+x") is True


def test_votes_are_cast_for_classes(grader):
    """Guards against: a vote on raw strings, which splits equal answers."""
    answers = ["1/2", "0.5", "3", "3", r"\frac12", None]
    number = e.classes(answers, grader)
    assert number[0] == number[1] == number[4] != number[2] == number[3] and number[5] is None
    right = [grader.equal("0.5", a) for a in answers]
    assert e.majority(number, right) == 1.0
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 37):
        votes = e.classes([answers[i] for i in order], grader)
        assert e.majority(votes, [right[i] for i in order]) == 1.0


@pytest.mark.parametrize(
    ("votes", "right", "credit"),
    [
        ([0, 0, 1, 1], [True, True, False, False], 0.5),
        ([0, 1, 2, 3], [True, False, False, False], 0.25),
        ([0, 0, 1, None], [True, True, False, False], 1.0),
        ([None, None, None, 0], [False, False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        ([0, 1, 1, 2], [True, False, False, False], 0.0),
    ],
)
def test_ties_share_and_no_answer_casts_no_vote(votes, right, credit):
    assert e.majority(votes, right) == credit


def test_pass_at_k_equals_enumeration():
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if c <= n:
                subsets = list(itertools.combinations([i < c for i in range(n)], k))
                assert e.pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_bootstrap_interval_has_the_textbook_width():
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], 400, p=[0.1, 0.6, 0.3])
    low, high = e.bootstrap_interval(differences)
    half = 1.96 * differences.std() / 20
    assert low == pytest.approx(differences.mean() - half, abs=0.01)
    assert high == pytest.approx(differences.mean() + half, abs=0.01)


def refined_row(i, answers, refined, gold="1", **more):
    box = [{"text": f"\\boxed{{{a}}}", "n_tokens": 10, "logprob": -1.0, "finish_reason": "stop"} for a in answers]
    done = [{"text": f"\\boxed{{{a}}}", "n_tokens": 7, "logprob": -1.0, "order": [0, 1]} for a in refined]
    return {"id": i, "problem": "?", "answer": gold, "prompt": "", "candidates": box, "refinements": done, **more}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_report_of_known_numbers(tmp_path, capsys):
    rows = [
        refined_row("all wrong, rescued", ["2", "3"], ["1"]),
        refined_row("all wrong, lost", ["2", "2"], ["2"]),
        refined_row("a tie", ["1", "2"], ["1.0"]),
        refined_row("broken", ["1", "1"], ["3"]),
        refined_row("no answer known", ["1", "1"], ["3"], gold=None),
    ]
    e.main([write_rows(tmp_path / "x.refined.jsonl", rows), "--out", str(tmp_path / "out")])
    [row] = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    interval = row["gap"].pop("ci95")
    assert row == {
        "name": "x",
        "problems": 4,
        "n": 2,
        "pass@1": 3 / 8,
        "pass@2": 0.5,
        "maj@2": 1.5 / 4,
        "refined": 0.5,
        "gap": {"points": 0.125, "relative": pytest.approx(1 / 3)},
        "rescued": {"all_wrong": [1, 2]},
        "tokens": {"candidates": 20.0, "refinement": 7.0},
    }
    assert interval[0] < 0.125 < interval[1]
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "1 of 5 problems have no answer" in printed and "37.5%" in printed and "1/2" in printed
    assert max(map(len, printed.splitlines()[1:6])) <= 110


def test_several_refinements_count_with_their_mean(tmp_path):
    rows = [refined_row("a", ["2", "2"], ["1", "2"]), refined_row("b", ["1", "1"], ["1", "1"])]
    e.main([write_rows(tmp_path / "x.jsonl", rows), "--out", str(tmp_path)])
    [row] = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["refined"] == 0.75 and row["rescued"]["all_wrong"] == [0.5, 1] and row["tokens"]["refinement"] == 14


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('{"id": 1}\n', "line 1: no 'problem'"),
        (json.dumps(refined_row("a", ["1"], ["1"])) + "\n{oops\n", "line 2: not valid JSON"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"id": 1, "a": 2}\n\n{"id": "1"}\n', "line 3: id '1' already stands on line 1"),
        (json.dumps(refined_row("a", [], ["1"])) + "\n", "its 'candidates' are empty"),
        (json.dumps(refined_row("a", ["1"], [])) + "\n", "its 'refinements' are empty"),
    ],
)
def test_unusable_files_are_named(content, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(e.InputError, match="bad.jsonl") as caught:
        e.read_refined(path) if "line 3" not in message else e.read_jsonl(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unequal_numbers_of_candidates_are_refused(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [refined_row("a", ["1", "1"], ["1"]), refined_row("b", ["1"], ["1"])])
    with pytest.raises(e.InputError, match="1 candidates, but 2"):
        e.read_refined(path)
