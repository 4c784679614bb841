"""evaluate.py: candidates shown, rounds, candidates sampled in waves, and rows beside each other."""

import itertools
import shlex

import numpy as np
import pytest
from conftest import ROOT
from test_evaluate import refined_row, report_of, slow_vote, write_rows

import evaluate as e
import figures
import sample
from files import InputError


def text(answer, tokens=10, **more):
    box = "I do not know." if answer is None else f"It is \\boxed{{{answer}}}."
    return {"text": box, "n_tokens": tokens, "logprob": -1.0, "finish_reason": "stop", **more}


def credit(answers):
    return slow_vote([-1 if a is None else int(a) - 1 for a in answers])


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_refinements_by_the_number_shown(tmp_path):
    """Guards against: a refinement of two of six candidates charged with all six, or compared with a vote of six."""
    rng, rows = np.random.default_rng(0), []
    for i in range(30):
        answers, refined = ([("1", "2", "3", None)[j] for j in rng.integers(0, 4, n)] for n in (6, 3))
        shown = [rng.permutation(6)[:2].tolist() for _ in refined]
        refinements = [text(a, 7, drawn=2, order=some) for a, some in zip(refined, shown)]
        refinements[0]["order"] = shown[0][:1]  # the other was empty
        rows.append({"id": i, "problem": "?", "answer": "1", "candidates": list(map(text, answers)),
                     "refinements": refinements, "answers": answers, "refined": refined})  # fmt: skip
    [row] = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", rows))["rows"]
    [line] = row["by_shown"]
    refined = mean(mean(a == "1" for a in r["refined"]) for r in rows)
    voted = mean(mean(map(credit, itertools.combinations(r["answers"], 2))) for r in rows)
    assert (line["shown"], line["problems"], line["tokens"]) == (2, 30, 2 * 10 + 7)
    assert line["refined"] == pytest.approx(refined) == row["refined"] and line["maj"] == pytest.approx(voted)
    assert line["gap"]["points"] == pytest.approx(refined - voted)
    assert line["gap"]["ci95"][0] < line["gap"]["points"] < line["gap"]["ci95"][1]
    assert row["methods"]["refined"]["tokens"] == 27 and row["methods"]["union"]["tokens"] == 60 + 21
    assert row["equal_cost"]["generated"]["k"] == pytest.approx(2.7) and row["rounds"][0]["tokens"] == 27
    assert row["left_out"] == pytest.approx(1 / 6) and [n for _, n in row["order"]["at_place"]][0] > 0
    note = "x: 16.7% of the candidates that were drawn are not in the refinement prompts"
    assert note in (tmp_path / "out" / "report.md").read_text()
    for bad in ([0, True], [0, 1, 2], [0, 0], 5):  # of two that were drawn
        rows[0]["refinements"][0]["order"] = bad
        with pytest.raises(InputError, match="id 0: the order .* is not one of its 6 candidates"):
            report_of(tmp_path, write_rows(tmp_path / "y.jsonl", rows))
    for bad in (0, 7, 1.5):
        rows[0]["refinements"][0]["drawn"] = bad
        with pytest.raises(InputError, match=f"id 0: its refinements were drawn .{float(bad)}"):
            report_of(tmp_path, write_rows(tmp_path / "y.jsonl", rows))


def test_the_number_shown_is_drawn(tmp_path):
    """Guards against: files of the same candidates in panels of their own, a figure where nothing was varied."""
    rng, files = np.random.default_rng(0), []
    answers = [[str(a) for a in rng.integers(1, 4, 4)] for _ in range(20)]
    for shown in (1, 2, 4):
        rows = [refined_row(i, some, [str(rng.integers(1, 3))], seen=shown) for i, some in enumerate(answers)]
        for row in rows:
            row["refinements"][0] |= {"drawn": shown, "order": list(range(shown))}
        files.append(write_rows(tmp_path / f"shown{shown}.jsonl", rows))
    found = report_of(tmp_path, *files)["rows"]
    assert [row["by_shown"][0]["shown"] for row in found] == [1, 2, 4]
    assert (tmp_path / "out" / "shown.png").exists()
    assert "| shown2 | 2 |" in (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "out" / "shown.png").unlink()
    report_of(tmp_path, files[2])
    assert not (tmp_path / "out" / "shown.png").exists()
    assert "By the number" not in (tmp_path / "out" / "report.md").read_text()


def rounds_row(i, answers, rounds, last, order=(0, 1)):
    refinements = [[text(a, 5 + r, n_prompt_tokens=50, order=[0]) for a in some] for r, some in enumerate(rounds)]
    final = [text(a, 9, n_prompt_tokens=60, drawn=2, order=list(order)) for a in last]
    about = {"id": i, "problem": "?", "answer": "1", "prompt": "", "n_prompt_tokens": 20}
    return {**about, "candidates": list(map(text, answers)), "rounds": refinements, "refinements": final}


def test_rounds(tmp_path, capsys):
    """Guards against: a later round charged for itself alone, its order read as one of the first candidates."""
    rng, rows, all_answers = np.random.default_rng(1), [], []
    for i in range(40):
        some = [[("1", "2", "3", None)[j] for j in rng.integers(0, 4, n)] for n in (2, 3, 3, 3)]
        all_answers.append(some)
        rows.append(rounds_row(i, some[0], some[1:3], some[3], order=(2, 0)))
    path = write_rows(tmp_path / "x.round3.refined.jsonl", rows)
    [row] = report_of(tmp_path, path)["rows"]
    assert (row["n"], row["k"], row["by_shown"], [line["round"] for line in row["rounds"]]) == (2, 3, None, [1, 2, 3])
    voted, spent = [credit(some[0]) for some in all_answers], 2 * 10
    for r, (line, tokens) in enumerate(zip(row["rounds"], (5, 6, 9)), 1):
        refined = [mean(a == "1" for a in some[r]) for some in all_answers]
        assert line["refined"] == pytest.approx(mean(refined)) and line["tokens"] == spent + tokens
        assert line["vote"] == pytest.approx(mean(credit(some[r]) for some in all_answers))
        assert line["any_right"] == pytest.approx(mean("1" in some[r] for some in all_answers))
        assert line["gap"]["points"] == pytest.approx(mean(refined) - mean(voted))
        spent += 3 * tokens
    assert row["refined"] == row["rounds"][2]["refined"] and row["gap"]["points"] == row["rounds"][2]["gap"]["points"]
    assert row["methods"]["refined"]["tokens"] == 20 + 15 + 18 + 9 and row["methods"]["refmaj"]["tokens"] == 80
    assert row["equal_cost"]["generated"]["k"] == pytest.approx(6.2)
    assert row["equal_cost"]["with_prompts"]["k"] == pytest.approx((62 + 6 * 50 + 60) / 10)
    mixed = [some for some in all_answers if not some[2][2] == some[2][0] == "1"]  # the prompt shows 2 and 0 of round 2
    chosen = [mean(a == "1" for a in some[3]) for some in mixed if some[2][2] == "1"]
    assert row["order"]["at_place"][0] == [pytest.approx(mean(chosen)), 3 * len(chosen)]
    written = (tmp_path / "out" / "report.md").read_text()
    assert written.count("| x.round3 | 1 |") == 1 and written.count("| x.round3 | 3 |") >= 1
    capsys.readouterr()
    e.main(["--show", "7", path])
    printed = capsys.readouterr().out
    assert "round 1, 0" in printed and "round 2, 2" in printed and "refinement 2" in printed

    for bad, message in ((5, "'rounds' are empty or no list"), ([[]], "'rounds' are empty"), ([[{}]], "lack text")):
        with pytest.raises(InputError, match=f"id 0: its .*{message}"):
            report_of(tmp_path, write_rows(tmp_path / "bad.jsonl", [{**rows[0], "rounds": bad}]))
    uneven = [rows[0]["rounds"][0], rows[0]["rounds"][1][:2]]
    with pytest.raises(InputError, match="id 0: its rounds have more and fewer refinements"):
        report_of(tmp_path, write_rows(tmp_path / "bad.jsonl", [{**rows[0], "rounds": uneven}]))
    with pytest.raises(InputError, match="id 1: 2 candidates and 3 refinements, but .* after 2 rounds of 3 in the fir"):
        report_of(tmp_path, write_rows(tmp_path / "bad.jsonl", [rows[0], rounds_row(1, ["1"] * 2, [], ["1"] * 3)]))


def test_a_file_of_waves(tmp_path):
    """Guards against: candidates that were never sampled taken for wrong ones, or charged; curves that go by who
    stopped early, and early stopping is no accident."""
    rows, answers = [], [list("1111"), list("21111231"), ["2", None], list("2211")]
    for i, some in enumerate(answers):
        candidates = [text(a, 10, self_certainty=1.0) for a in some]
        rows.append({"id": i, "problem": "?", "answer": "1", "adaptive": 8, "candidates": candidates})
        rows[-1]["refinements"] = [text("1", 7, order=[0, 1])]
    [row] = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", rows))["rows"]
    assert (row["n"], row["sampled"]) == (8, 18 / 4)
    first = [some[:2] for some in answers]
    assert row["pass@1"] == mean(mean(a == "1" for a in some) for some in first) and row["pass@2"] == 0.5
    assert row["maj@2"] == mean(map(credit, first)) and "maj@3" not in row and "pass@8" not in row
    methods = {name: found["accuracy"] for name, found in row["methods"].items()}
    assert list(methods) == ["pass@1", "maj@N", "refined", "union", "pass@N"]  # others need what was not sampled
    assert methods["maj@N"] == mean(map(credit, answers)) and methods["pass@N"] == 0.75
    assert row["methods"]["maj@N"]["tokens"] == 45 == row["tokens"]["candidates"]
    assert row["methods"]["pass@1"]["tokens"] == 10 and row["methods"]["refined"]["tokens"] == 45 + 7
    assert row["answered"]["candidates"] == 17 / 18 and row["length"]["candidates"] == 10
    assert row["cut_off"]["candidates"] == 0 and row["unboxed"]["candidates"] == 1 / 18
    assert row["unanimous"] == 0.25 and row["flips"]["one_more"] is None and row["by_shown"] is None
    assert row["equal_cost"]["generated"]["k"] == pytest.approx(5.2)
    written = (tmp_path / "out" / "report.md").read_text()
    assert "x: until the vote was decided, 4.5 candidates a problem were sampled of 8 at most" in written
    assert (tmp_path / "out" / "frontier.png").exists()
    problem = {"id": 9, "problem": "?", "answer": "1"}
    for value in (1, True, "8", 10**9):  # the last one would be padded to gigabytes
        bad = write_rows(tmp_path / "bad.jsonl", [{**problem, "adaptive": value, "candidates": [text("1")] * 2}])
        with pytest.raises(InputError, match="id 9: 'adaptive' is .*, not the most candidates"):
            report_of(tmp_path, bad)


def test_waves_of_problems_that_differ_in_length(tmp_path):
    """Guards against: a cost counted by the tokens of the problems with the most candidates, so that k is below 1."""
    rows = []
    for i, (n, tokens) in enumerate([(64, 200), *[(4, 5)] * 5]):
        row = {"id": i, "problem": "?", "answer": "1", "adaptive": 64, "candidates": [text("1", tokens)] * n}
        rows.append({**row, "refinements": [text("1", 5, drawn=1, order=[0])]})
    [row] = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", rows))["rows"]
    mean_tokens = (200 + 5 * 5) / 6
    assert row["equal_cost"]["generated"]["k"] == pytest.approx((mean_tokens + 5) / mean_tokens)


def test_files_that_say_no_more_than_they_must(tmp_path, capsys):
    """Guards against: candidates taken for left out where a file does not say what was shown; keys that others use."""
    rows = [refined_row(i, ["1", "2"], ["1"]) for i in range(3)]
    for row in rows:
        del row["refinements"][0]["order"]
        row["candidates"][0]["order"], row["rounds"] = 5, None
    path = write_rows(tmp_path / "x.jsonl", rows)
    [row] = report_of(tmp_path, path)["rows"]
    assert row["left_out"] is None and "not in the refinement prompts" not in (tmp_path / "out/report.md").read_text()
    assert row["copied"] == 1.0
    e.main(["--show", "1", path])
    assert "candidate 0" in capsys.readouterr().out


def test_rows_beside_the_first(tmp_path):
    """Guards against: differences of problems that are not the same ones, or that stand in another order."""
    rng = np.random.default_rng(2)
    base = [refined_row(i, *(rng.integers(1, 3, n).astype(str) for n in (2, 1))) for i in range(30)]
    other = [refined_row(i, *(rng.integers(1, 3, n).astype(str) for n in (2, 1))) for i in rng.permutation(30).tolist()]
    strange = [refined_row(i, ["1", "1"], ["1"]) for i in range(40)]
    bare = [{key: value for key, value in row.items() if key != "refinements"} for row in other]
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in zip("abcd", (base, other, strange, bare))]
    first, second, third, fourth = report_of(tmp_path, *files)["rows"]
    assert first["to_first"] is third["to_first"] is None
    for name, key in (("pass@1", "pass@1"), ("maj@N", "maj@2"), ("refined", "refined")):
        found = second["to_first"][name]
        assert found["points"] == pytest.approx(second[key] - first[key]) and found["ci95"][0] < found["ci95"][1]
    right = [{str(row["id"]): row["refinements"][0]["text"] == "\\boxed{1}" for row in rows} for rows in (base, other)]
    differences = np.array([float(right[1][i]) - right[0][i] for i in right[0]])
    half = 1.96 * differences.std() / 30**0.5
    ends = second["to_first"]["refined"]["ci95"]
    assert ends == pytest.approx([differences.mean() - half, differences.mean() + half], abs=0.04)
    assert list(fourth["to_first"]) == ["pass@1", "maj@N"]


def test_checklist_is_in_the_readme(tmp_path):
    """Guards against: a question without a command, a flag or a key of the report that is not there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    report = report_of(tmp_path, write_rows(tmp_path / "x.jsonl", [refined_row("a", ["1", "2"], ["1"])]))
    written = (tmp_path / "out" / "report.md").read_text()
    for question, key, made_by in figures.CHECKLIST:
        line = f"| {question} | `{key}` | " + "; ".join(f"`{command}`" for command in made_by) + " |"
        assert key in report["rows"][0] and line in readme and line in written
        assert all((ROOT / shlex.split(command)[1]).exists() for command in made_by)


def test_problems_of_an_earlier_output_lose_what_was_added(tmp_path):
    """Guards against: a file of waves or rounds as --data, whose marks then describe candidates that are not there."""
    row = {**rounds_row(1, ["1"], [["1"]], ["1"], order=()), "adaptive": 4, "level": 3}
    [problem] = sample.load_problems(write_rows(tmp_path / "x.jsonl", [row]))
    assert problem == {"id": 1, "problem": "?", "answer": "1", "level": 3}
