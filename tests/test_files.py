"""files.py: rows, outputs that can be stopped and go on, one command at a time; and which file imports which."""

import ast
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import files
from files import InputError, Output, as_written, check_id, read_json, read_jsonl, write_text

ROWS = [{"id": i, "problem": "x"} for i in ("a", "b", 7)]


def output(path, rows=ROWS, **made_by):
    files.write_json(files.meta_path(path), made_by) if made_by else None
    return Output(path, rows, made_by)


def done(row):
    return {**row, "candidates": []}


@pytest.mark.parametrize("name", ["out.jsonl", "run[1].candidates.jsonl", "a*?.jsonl"])
def test_output_goes_on_where_it_was(name, tmp_path):
    """Guards against: rows that are made again after a kill, a torn last line, names read as patterns."""
    path = tmp_path / name
    (tmp_path / "run1.candidates.jsonl.part0").write_text("of another run")
    first = output(path, n=1)
    first.append([done(ROWS[1])])
    with open(first.part, "a") as file:
        file.write('{"id": "a", "probl')  # killed while it wrote
    files.unlock(path)
    again = Output(path, ROWS, {"n": 1})
    assert again.done == {"b": done(ROWS[1])}
    again.append([done(ROWS[0])])
    again.append([done(ROWS[2])])
    assert again.finish() == list(map(done, ROWS)) == read_jsonl(path)
    files.unlock(path)
    assert sorted(p.name for p in tmp_path.iterdir() if name in p.name) == [name]
    assert (tmp_path / "run1.candidates.jsonl.part0").exists()


def test_outputs_of_other_commands_are_left_alone(tmp_path):
    """Guards against: two settings mixed in one file, a folder, device or strange file replaced by the output."""
    path = tmp_path / "out.jsonl"
    output(path, n=1).append([done(ROWS[0])])
    files.unlock(path)
    with pytest.raises(InputError, match="made with n 1, not 2"):
        Output(path, ROWS, {"n": 2})
    files.unlock(path)
    with pytest.raises(InputError, match="other or more problems"):
        Output(path, [{"id": "a", "problem": "y"}], {"n": 1})
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(InputError, match="not a file"):
            Output(tmp_path / name, ROWS, {})
    (tmp_path / "new.jsonl.partial").write_text("mine")
    with pytest.raises(InputError, match="new.jsonl.partial is in the way"):
        Output(tmp_path / "new.jsonl", ROWS, {})
    path.write_text('{"id": oops\n')
    files.unlock(path)
    with pytest.raises(InputError, match="out.jsonl, line 1: damaged"):
        Output(path, ROWS, {"n": 1})


def test_one_command_at_a_time(tmp_path):
    """Guards against: two commands that write one output together, and a lock that outlives a killed process."""
    path = tmp_path / "out.jsonl"
    program = f"import files, time; files.lock({str(path)!r}); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {holder.pid} on .*; wait, or choose another --out"):
        files.lock(path)
    holder.kill()
    holder.wait()
    with pytest.raises(InputError, match="mine.jsonl.lock is in the way"):
        (tmp_path / "mine.jsonl.lock").write_text("a lock of another program")
        files.lock(tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl.lock").read_text() == "a lock of another program"
    files.lock(path)
    files.lock(path)  # by the same process: a stage that another stage runs
    files.unlock(path)
    assert not (tmp_path / "out.jsonl.lock").exists()


def test_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    """Guards against: a traceback, and a half written row that stays in front of the rows after it."""
    path, real = tmp_path / "out.jsonl", os.fsync
    out = output(path, n=1)
    out.append([done(ROWS[0])])

    def full(descriptor):
        os.write(descriptor, b'{"half')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match="out.jsonl: cannot be written .No space left on device.*goes on"):
        out.append([done(ROWS[1])])
    monkeypatch.setattr(files.os, "fsync", real)
    files.unlock(path)
    again = Output(path, ROWS, {"n": 1})
    again.append([done(row) for row in ROWS if row["id"] not in again.done])
    assert again.finish() == list(map(done, ROWS))


def test_values_that_json_does_not_have():
    """Guards against: rows that fail when they are written, after hours of sampling."""
    for value in (b"x", {"at": {1, 2}}, float("nan"), "\ud83d", 1j):
        with pytest.raises(InputError, match="row 3: 'note' cannot be written as JSON"):
            as_written({"id": "a", "note": value}, "data.jsonl, row 3")
    assert as_written({"pairs": [("a", 1)]}, "") == {"pairs": [["a", 1]]}  # as it will be read again


def test_ids():
    """Guards against: ids that differ in the file and are the same where they make random numbers or a JSON key."""
    seen = {}
    for identity in ("a", 1, None, None, "b"):
        check_id(identity, seen, f"f, line {len(seen) + 1}")
    for identity, message in (("1", "stands on line 2"), (True, "neither"), ([1], "neither"), (1.0, "neither")):
        with pytest.raises(InputError, match=message):
            check_id(identity, seen, "f, line 9")


def test_files_of_other_shapes(tmp_path):
    """Guards against: tracebacks for JSON that is no object, nested too deeply, or has no text as its problem."""
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="holds no JSON object"):
        read_json(tmp_path / "list.json")
    for line in ("[" * 100_000, '{"problem": 5}', '{"problem": null}', "\x00"):
        (tmp_path / "bad.jsonl").write_text(line + "\n")
        with pytest.raises(InputError, match="bad.jsonl, line 1"):
            read_jsonl(tmp_path / "bad.jsonl", keys=("problem",))
    (tmp_path / "other.jsonl").write_text('{"question": "x"}\n')
    assert read_jsonl(tmp_path / "other.jsonl", keys=("problem",)) == [{"problem": "x"}]


def test_a_reader_never_sees_half_a_file(tmp_path):
    """Guards against: a file that a kill leaves half written under its own name."""
    write_text(tmp_path / "a.json", "old")
    kill = "import files, os; files.os.replace = lambda *_: os._exit(9)"
    program = f"{kill}; files.write_text({str(tmp_path / 'a.json')!r}, 'new')"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 9
    assert (tmp_path / "a.json").read_text() == "old"


def start(arguments):
    """A Python process that heeds SIGINT, which shells make background jobs ignore, and their children too."""
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True, preexec_fn=heed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_with_a_word(number, code, tmp_path):
    """Guards against: a process that ends in silence or with a traceback when it is asked to."""
    work = f"files.lock({str(tmp_path / 'out')!r}), print('up', flush=True), time.sleep(60)"
    program = f"import files, time; files.command_line(lambda: ({work}))"
    process = start(["-c", program])
    assert process.stdout.readline() == "up\n"
    time.sleep(0.1)
    process.send_signal(number)
    assert "goes on from here" in process.communicate()[1] and process.returncode == code
    assert not list(tmp_path.iterdir())  # no lock is left


def test_ctrl_c_while_torch_is_imported():
    """Guards against: a traceback from the middle of an import, since main() has not been reached yet."""
    process = start([ROOT / "sample.py", "--limit", "1"])
    maps = Path(f"/proc/{process.pid}/maps")
    for _ in range(200):  # until it is at torch's libraries, on Linux
        time.sleep(0.02)
        if not maps.exists() or "libtorch" in maps.read_text():
            break
    process.send_signal(signal.SIGINT)
    printed = process.communicate()[1]
    assert "Traceback" not in printed and "goes on from here" in printed and process.returncode in (-2, 130)


def test_readers_that_have_seen_enough():
    """Guards against: a BrokenPipe traceback behind `| head -1`."""
    program = "import files; files.command_line(lambda: [print(i) for i in range(100_000)])"
    command = f"{sys.executable} -c '{program}' | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "0\n" and done.stderr == ""


def test_imports_run_one_way():
    """Guards against: a file at the bottom that imports one above it, and so is loaded twice when run as a script."""
    order = ("files", "grade", "vote", "model", "hub", "parallel", "sample", "refine", "train")
    above = {name: set(order[i + 1 :]) | {"evaluate"} for i, name in enumerate(order)}
    above["model"] |= {"grade", "vote"}
    above |= {"evaluate": {"model", "refine", "train"}, "figures": {*order, "evaluate"}}
    above["route"] = {"model", "sample", "refine", "train"}  # a report and its figures need no torch
    for name, forbidden in above.items():
        forbidden |= set() if name == "route" else {"route"}
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & set(modules), (name, modules)


def test_files_and_functions_stay_short():
    """Guards against: files that nobody reads in one sitting, and functions that do not fit on a screen."""
    lines = {"model": 1000, "sample": 390, "files": 300, "hub": 210, "parallel": 300, "route": 350}
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= lines.get(path.stem, 800), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                most = 7 if path.stem == "train" else 11
                assert node.end_lineno - node.lineno < 60 and len(node.args.args) <= most, (path, node.name)


def test_everything_that_a_row_can_hold_is_read_again(tmp_path):
    """Guards against: line ends inside a text that cut a row in two for other readers."""
    row = {"id": "a", "problem": "x\u2028y\x85z\r\n\t\\ \"é\" \U0001f600"}
    out = output(tmp_path / "o.jsonl", [row])
    out.append([row])
    assert out.finish() == read_jsonl(tmp_path / "o.jsonl") == [row]
    assert len(json.loads((tmp_path / "o.jsonl").read_bytes().split(b"\n")[0])) == 2
