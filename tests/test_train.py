"""train.py: which rows are learned, the loss, and what comes out."""

import argparse
import math

import pytest
import torch
from conftest import make_folder
from test_evaluate import refined_row, write_rows
from test_model import theirs

import evaluate
import model as m
import sample
import train
from evaluate import InputError, read_json, read_jsonl


def completion(text, reason="stop"):
    return {"text": text, "n_tokens": 9, "logprob": -1.0, "finish_reason": reason}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A solve file and a refine file with a few rows of every kind that is dropped."""
    folder = tmp_path_factory.mktemp("data")
    solutions, refined = [], []
    for i in range(6):
        right, problem = f"{i} and {i} make \\boxed{{{2 * i}}}.", f"What is {i} + {i}?"
        row = {"id": i, "problem": problem, "answer": str(2 * i), "prompt": ""}
        wrong, again = completion(f"It is \\boxed{{{2 * i + 1}}}."), completion(right)
        solutions.append({**row, "candidates": [completion(right), wrong, again, completion(right + "!", "length")]})
        candidates = [
            completion("perhaps \\boxed{1}"),
            completion(f"or \\boxed{{{2 * i}}}"),
            completion("I do not know"),
        ]
        refinements = [{**completion(f"Better: \\boxed{{{2 * i}}}"), "order": [2, 0, 1], "prompt": ""}]
        refinements.append({**completion("Worse: \\boxed{77}"), "order": [0, 1, 2], "prompt": ""})
        refined.append({**row, "candidates": candidates, "refinements": refinements})
    return write_rows(folder / "s.candidates.jsonl", solutions), write_rows(folder / "r.refined.jsonl", refined)


def test_rows(data, random_model):
    """Guards against: wrong, cut-off or doubled texts being learned; another order than the teacher's; no stop id."""
    _, tokenizer = m.load(random_model)
    grader = evaluate.Grader()
    dropped = {"wrong": 0, "cut off": 0, "twice": 0, "too long": 0}
    rows = train.solve_rows(data[0], tokenizer, 1024, grader, dropped)
    assert len(rows) == 6 and dropped == {"wrong": 6, "cut off": 6, "twice": 6, "too long": 0}
    assert rows[3].prompt == tokenizer.encode_chat(sample.SOLVE_PROMPT.format(problem="What is 3 + 3?"))[1]
    assert tokenizer.decode(rows[3].completion) == "3 and 3 make \\boxed{6}." and rows[3].completion[-1] == 2

    rows = train.refine_rows(data[1], tokenizer, 1024, grader, dropped)
    assert len(rows) == 6 and dropped["wrong"] == 12
    text = tokenizer.tokenizer.decode(rows[3].prompt, skip_special_tokens=False)
    assert text.index("I do not know") < text.index("perhaps") < text.index("or \\boxed{6}")
    assert tokenizer.decode(rows[3].completion) == "Better: \\boxed{6}"

    assert train.refine_rows(data[1], tokenizer, 300, grader, dropped) == [] and dropped["too long"] == 6


def rows_of(*lengths):
    rows, generator = [], torch.Generator().manual_seed(3)
    for i, (prompt, length) in enumerate(lengths):
        ids = torch.randint(3, 300, (prompt + length,), generator=generator).tolist()
        rows.append(train.Row(i % 2, ids[:prompt], ids[prompt:]))
    return rows


def test_loss_is_that_of_each_row_alone(random_model):
    """Guards against: padding or the prompt in the loss, labels off by one, tasks mixed up. Oracle: row by row."""
    model, _ = m.load(random_model)
    rows = rows_of((5, 9), (30, 4), (12, 1), (3, 20))
    expected = [0.0, 0.0]
    for row in rows:
        logits = model.logits(model(torch.tensor([row.prompt + row.completion])))[0].log_softmax(-1)
        for i, token in enumerate(row.completion):
            expected[row.task] -= logits[len(row.prompt) + i - 1, token].item()
    losses = train.task_losses(model, rows, torch.device("cpu"))
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    [only] = train.task_losses(model, rows[1:2], torch.device("cpu"))[1:].tolist()
    assert only > 0 and train.task_losses(model, rows[1:2], torch.device("cpu"))[0] == 0  # no solve row: 0, not NaN


def settings(**changes):
    names = {"lr": 1e-3, "batch_size": 4, "epochs": 1, "steps": None, "seed": 0, "weight": 0.5}
    return argparse.Namespace(**{**names, "micro_batch_tokens": 8192, **changes})


def test_accumulation_does_not_change_the_step(random_model, tmp_path):
    """Guards against: a mean of means, which weighs the tokens of small micro-batches more."""
    rows, weights = rows_of((5, 9), (30, 4), (12, 1), (3, 20)), []
    for tokens in (8192, 40, 1):
        model, _ = m.load(random_model)
        with open(tmp_path / f"{tokens}.jsonl", "w") as log:
            train.train(model, rows, settings(micro_batch_tokens=tokens, steps=3), torch.device("cpu"), log)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, atol=2e-5, rtol=0)
    lines = read_jsonl(tmp_path / "1.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["loss_solve"] > 0 and lines[0]["loss_refine"] > 0


def test_joint_loss_is_the_weighted_sum(random_model, tmp_path):
    """L = L_solve + weight * L_refine, each a mean over its own tokens: checked by the gradient of the first step."""
    rows = rows_of((5, 9), (30, 4))
    model, _ = m.load(random_model)
    solve, refine = train.task_losses(model, rows, torch.device("cpu"))
    (solve / 9 + 0.5 * refine / 4).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    model, _ = m.load(random_model)
    with open(tmp_path / "log.jsonl", "w") as log:
        train.train(model, rows, settings(steps=1), torch.device("cpu"), log)
    [line] = read_jsonl(tmp_path / "log.jsonl")
    assert line["grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert line["loss_solve"] == pytest.approx(solve.item() / 9) and line["loss_refine"] == pytest.approx(
        refine.item() / 4
    )


def test_epochs_hold_every_row_once_and_both_tasks_in_each_step():
    rows = [train.Row(int(i >= 30), [i], [i]) for i in range(50)]
    steps = train.epoch_of(rows, 8, 0, 0)
    assert sorted(row.prompt[0] for step in steps for row in step) == list(range(50))
    assert all({row.task for row in step} == {0, 1} and 7 <= len(step) <= 10 for step in steps)
    assert steps != train.epoch_of(rows, 8, 0, 1) and steps == train.epoch_of(rows, 8, 0, 0)


def test_schedule():
    rates = [train.learning_rate(step, 100, 1.0, 5) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and max(rates) == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=0.01)


def test_trained_folder(data, tmp_path, capsys):
    """It learns its rows, transformers loads the result with the same logits, and a second run leaves it alone."""
    student, out = (
        make_folder(tmp_path / "student", "qwen2", scale=0.5, max_position_embeddings=1024),
        tmp_path / "trained",
    )
    flags = ["--model", str(student), "--solve", data[0], "--refine", data[1], "--out", str(out), "--lr", "3e-3"]
    flags += ["--batch-size", "12", "--steps", "60", "--device", "cpu"]
    train.main(flags)
    printed = capsys.readouterr().out
    assert (
        "6 solve rows; dropped: 6 wrong, 6 cut off, 6 twice" in printed and "6 refine rows; dropped: 6 wrong" in printed
    )
    lines = read_jsonl(f"{out}.metrics.jsonl")
    assert lines[-1]["loss_solve"] < 0.3 * lines[0]["loss_solve"]
    assert lines[-1]["loss_refine"] < 0.3 * lines[0]["loss_refine"]
    assert read_json(f"{out}.meta.json")["complete"] and read_json(f"{out}.meta.json")["spent"]["steps"] == 60

    model, tokenizer = m.load(out)
    ids = torch.tensor([tokenizer.encode_chat("What is 2 + 2?")[1]])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(ids)), theirs(out)(ids).logits, atol=1e-4, rtol=0)
    before = (out / "model.safetensors").read_bytes()
    train.main(flags)
    assert "trained already" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists, and was made with lr"):
        train.main([*flags, "--lr", "1e-4"])
    assert (out / "model.safetensors").read_bytes() == before


def test_missing_data_are_made_and_kept(random_model, tmp_path, monkeypatch, capsys):
    """train.py without --solve and --refine: makes candidates, solutions and refinements, says so, and reuses them."""
    monkeypatch.chdir(tmp_path)
    teacher = make_folder(tmp_path / "teacher", seed=1, max_position_embeddings=1024)
    rows = [{"id": i, "problem": f"{i}?", "answer": "1"} for i in range(3)]
    write_rows(tmp_path / "problems.jsonl", rows)
    flags = ["--model", str(random_model), "--teacher", str(teacher), "--data", "problems.jsonl", "--n", "2"]
    with pytest.raises(InputError, match="no right solution"):  # random models are right about nothing
        train.main(flags)
    folder = tmp_path / "runs" / "random"
    assert len(read_jsonl(folder / "train.candidates.jsonl")[0]["candidates"]) == 2
    assert (
        len(read_jsonl(folder / "teacher.candidates.jsonl")) == len(read_jsonl(folder / "teacher.refined.jsonl")) == 3
    )
    assert capsys.readouterr().out.count("python sample.py --model") == 2
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    with pytest.raises(InputError, match="no right solution"):
        train.main(flags)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")} == times
    assert "complete already" in capsys.readouterr().out


def test_training_on_one_task_alone(data, tmp_path, capsys):
    """And, without --steps, a second run finds the first: the steps taken are not the steps asked for."""
    student = make_folder(tmp_path / "student", max_position_embeddings=1024)
    flags = ["--model", str(student), "--solve", data[0], "--out", str(tmp_path / "t"), "--epochs", "1"]
    train.main(flags)
    train.main(flags)
    assert "trained already" in capsys.readouterr().out
    [line] = read_jsonl(tmp_path / "t.metrics.jsonl")
    assert line["loss_refine"] is None and math.isfinite(line["loss_solve"])


def test_refined_files_of_the_evaluation_tests_are_valid_training_data(tmp_path, random_model):
    """One format for all stages: what evaluate.py reads, train.py reads."""
    path = write_rows(tmp_path / "x.refined.jsonl", [refined_row("a", ["1", "2"], ["1"])])
    dropped = {"wrong": 0, "cut off": 0, "twice": 0, "too long": 0}
    assert len(train.refine_rows(path, m.load(random_model)[1], 1024, evaluate.Grader(), dropped)) == 1


def test_real_model_trains(real_model, problem_files, tmp_path):
    """A few steps of the real model on SVAMP; the trained folder has the same logits in transformers."""
    solve, refined = [], []
    for row in read_jsonl(problem_files / "svamp.jsonl")[:8]:
        right, wrong = completion(f"The answer is \\boxed{{{row['answer']}}}."), completion("It is \\boxed{-1}.")
        solve.append({**row, "candidates": [right, wrong]})
        refined.append({**row, "candidates": [right, wrong], "refinements": [{**right, "order": [1, 0]}]})
    files = ["--solve", write_rows(tmp_path / "s.jsonl", solve), "--refine", write_rows(tmp_path / "r.jsonl", refined)]
    train.main(["--model", real_model, *files, "--out", str(tmp_path / "t"), "--steps", "4", "--batch-size", "8"])
    lines = read_jsonl(tmp_path / "t.metrics.jsonl")
    assert lines[-1]["loss_solve"] < lines[0]["loss_solve"] and lines[-1]["loss_refine"] < lines[0]["loss_refine"]
    model, tokenizer = m.load(tmp_path / "t")
    ids = torch.tensor([tokenizer.encode_chat("What is 2 + 2?")[1]])
    with torch.no_grad():
        ours, reference = model.logits(model(ids)), theirs(tmp_path / "t")(ids).logits
        before, _ = m.load(real_model)
        assert (ours - before.logits(before(ids))).abs().max() > 0.05  # what was learned was not rounded away
    # Rounding: logits of up to 30 have been seen to differ by 1.3e-4, a hundred of two million.
    torch.testing.assert_close(ours, reference, atol=5e-4, rtol=0)
