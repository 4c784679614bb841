"""The tiny world: its files, its shipped models against the numbers in tiny/README.md, and its study, made small."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_model import theirs

import hub
import model as m
import refine
import sample
from evaluate import report
from files import read_json, read_jsonl

TINY = ROOT / "tiny"
MODELS = sorted(str(path.parent.relative_to(TINY)) for path in TINY.rglob("model.safetensors"))


def test_tiny_world_is_ordinary():
    """The tiny models are Hugging Face folders like any other, and no problem is in two of its files."""
    for name in MODELS:
        model, tokenizer = m.load(str(TINY / name))
        ids = torch.tensor([tokenizer.encode_chat("Naïve text, {braces} and 123 ☃")[1]])
        with torch.no_grad():
            torch.testing.assert_close(model.lm_head(model(ids)), theirs(TINY / name)(ids).logits, atol=1e-4, rtol=0)
        assert tokenizer.decode(tokenizer.encode("Naïve ☃ \\boxed{12}")) == "Naïve ☃ \\boxed{12}"
    names = ("test", "train", "valid", "first", "first-train", "slips/test", "slips/train")
    files = {name: read_jsonl(TINY / f"{name}.jsonl") for name in names}
    problems = [row["problem"] for rows in files.values() for row in rows]
    assert len(files["test"]) >= 500 and len(set(problems)) == len(problems)
    for row in files["test"][:50] + files["first"][:50]:  # the answers, worked out again: one sign fits, and one only
        lines = [(int(a), int(b)) for a, b in re.findall(r"[a-h]\) (\d+),(\d+)", row["problem"])]
        [(kind, total)] = re.findall(r"The (last|first) digits add up to #(\d) ", row["problem"])
        results = [[a + sign * b for a, b in lines] for sign in (1, -1)]
        sums = [sum(int(str(result)[-1 if kind == "last" else 0]) for result in some) % 10 for some in results]
        assert len(lines) == 8 and sorted(total == some for some in map(str, sums)) == [False, True]
        assert row["answer"] == "".join(map(str, results[str(sums[1]) == total]))
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 20e6


def claimed():
    """{model: accuracies in percent} of the untrained models, from the tables in tiny/README.md."""
    found = {}
    for line in (TINY / "README.md").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.removeprefix("| ").partition(" | ")
        name = name.removesuffix(", before")
        percents = [float(number) for number in re.findall(r"([\d.]+)%", numbers)]
        if name in MODELS and len(percents) == 5:  # pass@1, pass@N, maj@N, likeliest, refined
            pass_1, _, maj, _, refined = percents
            found[name] = {"pass@1": pass_1, "maj@4": maj, "refined": refined}
    return found


@pytest.mark.parametrize("name", claimed())
def test_shipped_models_do_what_is_claimed(name, tmp_path):
    """Guards against: other weights, or another sampler, than those whose numbers tiny/README.md has.

    The first 200 test problems with one seed, where the table has 500 with three: 4 standard errors apart at most.
    """
    candidates, refined = str(tmp_path / "candidates.jsonl"), str(tmp_path / "refined.jsonl")
    folder, data = str(TINY / name), str((TINY / name).with_name("test.jsonl"))
    sample.main(["--model", folder, "--data", data, "--n", "4", "--limit", "200", "--out", candidates])
    refine.main(["--model", folder, "--candidates", candidates, "--out", refined])
    report([refined], tmp_path, 5.0)
    [row] = read_json(tmp_path / "report.json")["rows"]
    for key, percent in claimed()[name].items():
        error = max(2.0, 100 * (row[key] * (1 - row[key]) / 200) ** 0.5)
        assert abs(100 * row[key] - percent) < 4 * error, f"{key} {100 * row[key]:.1f}%, {percent}% in the table"
    if TINY / name == Path(hub.find_model("tiny-teacher")):
        assert row["gap"]["ci95"][0] > 0  # there is something to learn from it


def test_study_makes_what_it_reads(monkeypatch):
    """Guards against: an hour of commands, and then one that fails: for a file that nothing has made, or that another
    seed has made, or for a row's name that evaluate.py takes apart at its "="."""
    monkeypatch.syspath_prepend(str(TINY))
    import study

    for claim, (_, rows) in study.CLAIMS.items():
        made, folders = set(), []
        for row in study.rows_to_make([claim]):
            for commands in (study.commands_of(row, seed) for seed in row.seeds):
                for command in commands:
                    read = {word for word in command[1:-1] if word.startswith(f"{study.RUNS}/")}
                    assert read <= made, f"claim {claim}: {study.as_typed(command)}"
                    made |= {command[-1], study.result_of(command)}
                    if command[0] == "train.py" and "--rounds" in command:
                        folders.append(Path(command[-1]).parent)
        reported = [path for row in rows.values() for path in study.results_of(row)]
        assert {*reported, *(study.results_of(study.ROUTED) if claim == 7 else [])} <= made
        assert len({*folders}) == len(folders) and not [name for name in rows if "=" in name]


def test_study_goes_on_where_it_was(tmp_path):
    """Guards against: a study that cannot be run, runs a command twice, or trains before its data are there."""
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tiny").mkdir()
    for name in ("qwen3-w96", "teacher-w160"):
        (tmp_path / "tiny" / name).symlink_to(TINY / name)
    for name, size in (("test", 8), ("train", 40)):
        lines = (TINY / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "tiny" / f"{name}.jsonl").write_text("".join(lines[:size]), encoding="utf-8")
    study = (TINY / "study.py").read_text(encoding="utf-8")
    for there, small in (("STEPS, LR, WEIGHT = 60", "STEPS, LR, WEIGHT = 2"), ("= (0, 1, 2)", "= (0,)")):
        assert there in study
        study = study.replace(there, small)
    (tmp_path / "tiny" / "study.py").write_text(study, encoding="utf-8")

    def run(code=0, claims=("1", "3")):
        words = [sys.executable, "tiny/study.py", "--claims", *claims]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    first = run()
    assert first.count(" min] python ") == 3 + 2 * 4 + 2  # the data, four rows, of which two are trained
    (tmp_path / "runs" / "study" / "claim3" / "report.json").unlink()
    assert " min] python " not in run()
    report = tmp_path / "runs" / "study" / "study.md"
    text = report.read_text(encoding="utf-8")
    assert text.count("| joint |") == 3 and text.count("\n## ") == 2
    (tmp_path / "tiny" / "study.py").write_text(study.replace("WEIGHT = 2", "WEIGHT = 3"), encoding="utf-8")
    assert "made with steps 2, not 3" in run(2)  # not the results of other settings as those of these
    run(claims=["1"])
    assert report.read_text(encoding="utf-8").count("\n## ") == 1  # nor their tables
