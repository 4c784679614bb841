"""The README's commands, run as they stand there; and the demo's numbers, where the demo has been run."""

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, make_folder, write_tokenizer
from test_train import data  # noqa: F401  a fixture

import evaluate
import figures
import hub
from files import read_json

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.splitlines()]
COMMANDS += [shlex.split(line) for _, _, made_by in figures.CHECKLIST for line in made_by]  # they stand in a table


def test_readme_commands_run(data, tmp_path, monkeypatch):  # noqa: F811
    """Guards against: a README that names a flag or a file that is not there. Short names stand for random models."""
    monkeypatch.chdir(tmp_path)
    student = make_folder(tmp_path / "student", max_position_embeddings=2048)
    teacher = make_folder(tmp_path / "teacher", seed=1, max_position_embeddings=2048)
    # It often stops, and with an answer: what the length limit cuts off and what is wrong is not learned.
    write_tokenizer(teacher, eos_ids=range(2, 60), answer="1")
    rows = [{"id": i, "problem": f"{i}?", "answer": "1"} for i in range(6)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, folder in (("qwen-1.5b", student), ("qwen-7b", teacher)):
        monkeypatch.setitem(hub.ALIASES, name, (str(folder), *hub.ALIASES[name][1:]))
    for name in ("gsm8k", "gsm8k-train", *evaluate.SUITES["math"][:-1]):
        monkeypatch.setitem(hub.BENCHMARKS, name, (None, "problems.jsonl"))

    def in_this_process(command):  # the suite's own commands, which else would know the real names
        importlib.import_module(Path(command[1]).stem).main(command[2:])
        return SimpleNamespace(returncode=0)

    instead = SimpleNamespace(run=in_this_process, Popen=subprocess.Popen, PIPE=subprocess.PIPE)
    monkeypatch.setattr(evaluate, "subprocess", instead)
    for name, path in zip(("s.candidates.jsonl", "r.refined.jsonl"), data):
        (tmp_path / name).write_bytes(open(path, "rb").read())
    ran = 0
    for command in COMMANDS:
        if command[0] == "source":
            assert command[1] == ".venv/bin/activate"
        elif command[0] == "make":  # CI runs these, and test_tiny.py the study, made small
            assert f"\n{command[1]}:" in (ROOT / "Makefile").read_text()
        elif command[0] == "torchrun":  # test_stages.py and test_parallel.py start several; here, what each is given
            script = command[2:]
            if "--tensor-parallel" in script:
                del script[(at := script.index("--tensor-parallel")) : at + 2]
            importlib.import_module(script[0].removesuffix(".py")).main(script[1:])
        else:
            assert command[0] == "python"
            importlib.import_module(command[1].removesuffix(".py")).main(command[2:])
            ran += 1
    assert ran >= 5 + len(figures.CHECKLIST) and (tmp_path / "runs" / "report.json").exists()
    assert (tmp_path / "runs" / "qwen-1.5b" / "trained" / "model.safetensors").exists()


def test_demo_shows_what_the_readme_says():
    """Merely prompted, the student refines worse than it votes; joint training turns that around and keeps pass@1.

    Also at equal tokens and against the likeliest candidate, and it solves problems on which every candidate is wrong.
    """
    path = ROOT / "runs" / "tiny" / "report.json"
    if not path.exists():
        pytest.skip("run `make demo` first")
    before, after = read_json(path)["rows"]
    assert after["problems"] == before["problems"] >= 500
    assert before["gap"]["points"] < 0 < after["gap"]["ci95"][0] and before["gap"]["ci95"][1] < 0.05
    assert after["equal_cost"]["generated"]["ci95"][0] > 0 and after["refined"] > after["methods"]["logprob"]["ci95"][1]
    rescued, wrong = after["rescued"]["all_wrong"]
    assert after["pass@1"] >= before["pass@1"] and rescued >= wrong / 5 > 0
