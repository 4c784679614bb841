"""sample.py and refine.py: prompts, files, resuming, and what bad input gets."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, make_folder

import evaluate
import model as m
import refine
import sample
from files import InputError, meta_path, read_json, read_jsonl


def run(script, *flags, code=0, **environment):
    """Run one of the five files as a user does -> what it printed."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def candidates(random_model, tmp_path_factory):
    """A candidates file of seven problems, four candidates each."""
    folder = tmp_path_factory.mktemp("stage")
    rows = [
        {"id": f"p{i}", "problem": f"What is {i} + {i * i}?", "answer": str(i + i * i), "level": i} for i in range(7)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "x.candidates.jsonl"
    sample.main(flags(random_model, folder / "problems.jsonl", out))
    return out


def flags(model, data, out, *more):
    return ["--model", str(model), "--data", str(data), "--out", str(out), "--batch-size", "8", *more]


def test_files_hold_what_the_contract_says(candidates, random_model):
    rows = read_jsonl(candidates)
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(7)]
    for row in rows:
        # `level` is unknown, and kept
        assert list(row) == ["id", "problem", "answer", "level", "prompt", "n_prompt_tokens", "candidates"]
        assert row["problem"] in row["prompt"] and row["prompt"].endswith("<|im_start|>assistant\n")
        assert len(row["candidates"]) == 4
        for c in row["candidates"]:
            assert list(c) == ["text", "n_tokens", "logprob", "self_certainty", "finish_reason"]
            assert c["self_certainty"] > 0
            assert 1 <= c["n_tokens"] <= 24 and c["logprob"] < 0 and c["finish_reason"] in ("stop", "length")
    meta = read_json(evaluate.meta_path(candidates))
    assert meta["complete"] and meta["sampling"]["max_new_tokens"] == 24  # from the generation config
    assert meta["tokens"]["generated"] == sum(c["n_tokens"] for row in rows for c in row["candidates"])
    assert meta["flags"]["n"] == 4 and meta["versions"]["torch"] and meta["seconds"] > 0

    refine.main(["--model", str(random_model), "--candidates", str(candidates), "--k", "2"])
    refined = read_jsonl(str(candidates).replace("candidates", "refined"))
    for row, before in zip(refined, rows):
        assert {**before, "refinements": row["refinements"]} == row and len(row["refinements"]) == 2
        for r in row["refinements"]:
            assert list(r) == [*c, "drawn", "order", "prompt", "n_prompt_tokens"] and r["drawn"] == 4
            texts = [evaluate.strip_thinking(before["candidates"][i]["text"]) for i in r["order"]]
            shown = [r["prompt"].index(text) for text in texts]
            assert shown == sorted(shown)  # `order` is the order in the prompt
    assert len({tuple(r["order"]) for row in refined for r in row["refinements"]}) > 3


def test_a_finished_command_changes_nothing(candidates, random_model, capsys):
    """Guards against: a second run that marks a finished file unfinished, or forgets what it cost."""
    meta = evaluate.meta_path(candidates).read_text()
    sample.main(flags(random_model, candidates.parent / "problems.jsonl", candidates, "--memory", "0.00001"))
    assert "complete already" in capsys.readouterr().out and evaluate.meta_path(candidates).read_text() == meta


def test_samples_do_not_depend_on_batches(candidates, random_model, tmp_path):
    """Guards against: --batch-size, --limit or the order of the problems changing what a problem gets."""
    data = candidates.parent / "problems.jsonl"
    expected = {row["id"]: row for row in read_jsonl(candidates)}
    sample.main(flags(random_model, data, tmp_path / "a.jsonl", "--batch-size", "100"))
    (tmp_path / "reversed.jsonl").write_text("".join(data.read_text().splitlines(keepends=True)[::-1]))
    sample.main(flags(random_model, tmp_path / "reversed.jsonl", tmp_path / "b.jsonl", "--limit", "3"))
    for row in read_jsonl(tmp_path / "a.jsonl") + read_jsonl(tmp_path / "b.jsonl"):
        texts = [c["text"] for c in expected[row["id"]]["candidates"]]
        assert [c["text"] for c in row["candidates"]] == texts
    sample.main(flags(random_model, data, tmp_path / "c.jsonl", "--seed", "1"))
    assert [r["candidates"] for r in read_jsonl(tmp_path / "c.jsonl")] != [r["candidates"] for r in expected.values()]


def without_last_digits(path):
    """The rows of an output; log-probabilities to one decimal: their last digits follow the batch's rounding."""
    return re.sub(
        r'"(logprob|self_certainty)": (-?[0-9.]+)',
        lambda m: f'"{m[1]}": {float(m[2]) + 1e-5:.1f}',
        Path(path).read_text(encoding="utf-8"),
    )


def test_interrupted_file_is_finished_to_the_same_rows(candidates, random_model, tmp_path):
    """Guards against: lost, doubled or changed rows after a kill in the middle of a line."""
    data, whole = candidates.parent / "problems.jsonl", candidates.read_bytes()
    meta = read_json(evaluate.meta_path(candidates))
    out = tmp_path / "x.candidates.jsonl"
    lines = whole.splitlines(keepends=True)
    for kept in (b"", b"".join(lines[:3]), b"".join(lines[:4]) + lines[4][:50], whole[:-1], whole):
        out.write_bytes(kept)
        evaluate.write_json(evaluate.meta_path(out), {**meta, "complete": False})
        sample.main(flags(random_model, data, out))
        assert without_last_digits(out) == without_last_digits(candidates)
        after = read_json(evaluate.meta_path(out))
        assert after["tokens"]["generated"] == meta["tokens"]["generated"] and after["complete"]
        assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, evaluate.meta_path(out).name]
    refined = tmp_path / "x.refined.jsonl"
    refine.main(["--model", str(random_model), "--candidates", str(out), "--batch-size", "3"])
    whole, expected = refined.read_bytes(), without_last_digits(refined)
    refined.write_bytes(whole[: len(whole) // 2])
    refine.main(["--model", str(random_model), "--candidates", str(out), "--batch-size", "3"])
    assert without_last_digits(refined) == expected


def test_texts_with_unicode_line_ends_are_one_line(random_model, tmp_path):
    """Guards against: str.splitlines, which also cuts at U+2028 and U+0085, when an output is read again."""
    rows = [{"id": i, "problem": f"a\u2028b\u0085c {i}", "answer": "1"} for i in range(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "problems.jsonl").write_text(text, encoding="utf-8")
    sample.main(flags(random_model, tmp_path / "problems.jsonl", tmp_path / "out.jsonl"))
    whole, expected = (tmp_path / "out.jsonl").read_bytes(), without_last_digits(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").write_bytes(whole[:-10])
    sample.main(flags(random_model, tmp_path / "problems.jsonl", tmp_path / "out.jsonl"))
    assert without_last_digits(tmp_path / "out.jsonl") == expected


def test_killed_process_goes_on(random_model, tmp_path):
    """The same with a real SIGKILL, at a moment that nobody chose."""
    rows = [{"id": i, "problem": f"Count to {i}.", "answer": "1"} for i in range(60)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("sample.py", *flags(random_model, tmp_path / "problems.jsonl", tmp_path / "whole.jsonl", "--n", "1"))
    command = flags(random_model, tmp_path / "problems.jsonl", tmp_path / "out.jsonl", "--n", "1")
    process = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *command], stderr=subprocess.DEVNULL)
    part = tmp_path / "out.jsonl.part0"
    while not part.exists() or part.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(part.read_text().splitlines()) < 60 and not (tmp_path / "out.jsonl").exists()
    assert "are there already" in run("sample.py", *command)
    assert without_last_digits(tmp_path / "out.jsonl") == without_last_digits(tmp_path / "whole.jsonl")
    assert "complete already" in run("sample.py", *command)
    assert not list(tmp_path.glob("*.lock"))  # also where there was nothing to do


def test_ranks_share_the_work_and_write_the_same_file(candidates, random_model, tmp_path):
    """Guards against: ranks that sample the same rows, parts out of order, a resume that needs as many ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    whole, data = candidates.read_bytes(), candidates.parent / "problems.jsonl"
    meta = read_json(evaluate.meta_path(candidates))
    lines = whole.splitlines(keepends=True)
    texts = [[c["text"] for c in row["candidates"]] for row in map(json.loads, lines)]
    out = tmp_path / "x.candidates.jsonl"
    # From nothing with two; then from what two ranks had when they were killed, with one and with three.
    for ranks, parts in ((2, []), (1, [lines[0], lines[3] + lines[1][:40]]), (3, [lines[4], lines[5][:-1]])):
        for rank, content in enumerate(parts):
            Path(f"{out}.part{rank}").write_bytes(content)
        if parts:
            out.unlink()
            evaluate.write_json(evaluate.meta_path(out), {**meta, "complete": False})
        command = [*torchrun, str(ranks), str(ROOT / "sample.py"), *flags(random_model, data, out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = read_jsonl(out)
        assert [[c["text"] for c in row["candidates"]] for row in rows] == texts
        assert [row["id"] for row in rows] == [f"p{i}" for i in range(7)]
        after = read_json(evaluate.meta_path(out))
        assert after["complete"] and after["tokens"]["generated"] == meta["tokens"]["generated"]
        if not parts:  # together they have read each prompt once, but for the last token: its samples begin with that
            assert after["tokens"]["prompt_read"] == meta["tokens"]["prompt"] - 7
        assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, evaluate.meta_path(out).name]

    refined = tmp_path / "x.refined.jsonl"
    command = [*torchrun, "2", str(ROOT / "refine.py"), "--model", str(random_model), "--candidates", str(out)]
    subprocess.run([*command, "--k", "2"], check=True, capture_output=True, cwd=ROOT, timeout=100)
    together = read_jsonl(refined)
    refined.unlink()
    evaluate.meta_path(refined).unlink()
    refine.main(["--model", str(random_model), "--candidates", str(out), "--k", "2"])
    for ours, alone in zip(together, read_jsonl(refined)):
        assert [r["text"] for r in ours["refinements"]] == [r["text"] for r in alone["refinements"]]


def test_nothing_is_overwritten(candidates, random_model, tmp_path):
    """Guards against: a second command with other settings mixing its rows into a file."""
    data, before = candidates.parent / "problems.jsonl", candidates.read_bytes()
    for more in (["--seed", "5"], ["--n", "2"], ["--temperature", "0.5"]):
        with pytest.raises(InputError, match="exists, and was made with"):
            sample.main(flags(random_model, data, candidates, *more))
    with pytest.raises(InputError, match="other or more problems"):
        sample.main(flags(random_model, data, candidates, "--limit", "3"))
    stranger = tmp_path / "notes.txt"
    stranger.write_text("not ours\n")
    with pytest.raises(InputError, match="choose another --out"):
        sample.main(flags(random_model, data, stranger))
    assert candidates.read_bytes() == before and stranger.read_text() == "not ours\n"


def row_of(*texts, prompt=""):
    return {"id": "a", "problem": "What?", "prompt": prompt, "candidates": [{"text": t} for t in texts]}


def test_refinement_prompt(random_model):
    """Guards against: thoughts in the prompt, empty candidates, a cut that loses the answer or the instruction."""
    _, tokenizer = m.load(random_model)
    order = [2, 0, 3, 1]
    row = row_of("first", "<think>secret</think>second", "third <|im_end|>", "<think>cut off")
    text, ids, shown = refine.refinement_prompt(row, order, tokenizer, 2000, 100)
    assert shown == [2, 0, 1] and "secret" not in text and "cut off" not in text
    assert "problem and 3 candidate" in text
    assert text.index("third") < text.index("first") < text.index("second") < text.index("Write one better solution")
    assert ids.count(2) == 1  # only the template's <|im_end|>

    long = row_of(
        "x" * 900 + " so \\boxed{1}", "short \\boxed{2}", "y" * 700 + " so \\boxed{3}", "z" * 90 + "\\boxed{4}"
    )
    text, ids, shown = refine.refinement_prompt(long, order, tokenizer, 1300, 100)
    assert 1150 < len(ids) <= 1200  # the room is used
    assert all(f"\\boxed{{{i}}}" in text for i in (1, 2, 3, 4)) and "z" * 90 in text
    assert 150 < text.count("x") - text.count("y") + 300 < 450  # long candidates are cut to about the same length
    assert text.endswith("\\boxed{}.<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(InputError, match="do not fit the context of 540"):
        refine.refinement_prompt(long, order, tokenizer, 540, 100)

    nothing = row_of("", "<think>")
    text, _, shown = refine.refinement_prompt(nothing, [1, 0], tokenizer, 2000, 100)
    assert shown == [] and text == tokenizer.encode_chat(sample.SOLVE_PROMPT.format(problem="What?"))[0]


def test_problem_files(tmp_path):
    """Guards against: GSM8K's worked answers, lists and floats as gold answers; ids that are missing or numbers."""
    path = tmp_path / "set.jsonl"
    rows = [
        {"question": "a", "answer": "We add.\n#### 12"},
        {"problem": "b", "answer": 27.0, "id": 60},
        {"question": "c", "final_answer": ["1", "2"]},
        {"problem": "d", "answer": None, "source": "d"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sample.load_problems(str(path)) == [
        {"id": "set-0", "problem": "a", "answer": "12"},
        {"id": 60, "problem": "b", "answer": "27.0"},
        {"id": "set-2", "problem": "c", "answer": "1, 2"},
        {"id": "set-3", "problem": "d", "answer": None, "source": "d"},
    ]
    assert [row["id"] for row in sample.load_problems(str(path), limit=2)] == ["set-0", 60]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "a", "prompt": "p"}], "row 1: 'prompt' is what the output calls something else"),
        ([{"problem": "a", "n_prompt_tokens": 1}], "'n_prompt_tokens' is what"),
        ([{"problem": "a"}, {"id": "set-0", "problem": "b"}], "row 2: id 'set-0' already stands on row 1"),
        ([{"id": 1, "problem": "a"}, {"id": "1", "problem": "b"}], "line 2: id '1' already stands on line 1"),
        ([{"id": True, "problem": "a"}], "line 1: its id is neither a string nor an integer"),
        ([{"problem": "a \ud83d"}], "row 1: 'problem' cannot be written as JSON"),
        ([{"problem": "a", "level": float("nan")}], "row 1: 'level' cannot be written as JSON"),
        ([{"problem": ["a"]}], "line 1: its problem is not a text"),
        ([{"problem": None, "source": "x"}], "line 1: its problem is not a text"),
        ([{"source": "x"}], "row 1: no text under 'problem' or 'question', only source"),
        ([{"problem": "a", "solution": "It is 5."}], "row 1: no 'answer', and no .*boxed.* in its 'solution'"),
    ],
)
def test_problems_that_would_fail_at_the_end(rows, message, tmp_path):
    """Guards against: hours of sampling before a row turns out not to fit into the output."""
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=f"set.jsonl, {message}" if message[:3] in ("row", "lin") else message):
        sample.load_problems(str(path))


def test_problems_from_parquet(tmp_path):
    """Guards against: bytes, dates and maps of a parquet file, which JSON does not have or reads as something else."""
    import datetime

    import pyarrow as pa
    import pyarrow.parquet

    def load(**columns):
        pyarrow.parquet.write_table(pa.table({"problem": ["a"], **columns}), tmp_path / "set.parquet")
        return sample.load_problems(str(tmp_path / "set.parquet"))

    pairs = pa.array([[("x", 1)]], type=pa.map_(pa.string(), pa.int64()))
    assert load(solution=["so \\boxed{5}"], pairs=pairs)[0] | {"solution": ""} == {
        "id": "set-0", "problem": "a", "answer": "5", "solution": "", "pairs": [["x", 1]]
    }  # fmt: skip
    with pytest.raises(InputError, match="row 1: its answer is not a text but"):
        load(answer=[b"5"])
    with pytest.raises(InputError, match="no rows in it"):
        pyarrow.parquet.write_table(pa.table({"problem": pa.array([], pa.string())}), tmp_path / "set.parquet")
        sample.load_problems(str(tmp_path / "set.parquet"))
    for value in (b"x", datetime.date(2024, 1, 1)):
        with pytest.raises(InputError, match="set.parquet, row 1: 'extra' cannot be written as JSON"):
            load(extra=[value])
    (tmp_path / "set.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="set.parquet: cannot be read as parquet"):
        sample.load_problems(str(tmp_path / "set.parquet"))


def test_outputs_as_inputs(candidates, random_model, tmp_path):
    """Guards against: a candidates file as --data, a refined file as --candidates, whose own keys stopped the run."""
    sample.main(flags(random_model, candidates, tmp_path / "again.jsonl", "--seed", "3"))
    first, again = read_jsonl(candidates), read_jsonl(tmp_path / "again.jsonl")
    assert [row["id"] for row in first] == [row["id"] for row in again] and first[0].keys() == again[0].keys()
    assert first[0]["candidates"] != again[0]["candidates"]
    common = ["--model", str(random_model), "--max-new-tokens", "8", "--limit", "2"]
    refine.main(["--candidates", str(candidates), "--out", str(tmp_path / "r.refined.jsonl"), *common])
    more = ["--candidates", str(tmp_path / "r.refined.jsonl"), *common, "--seed", "5"]
    with pytest.raises(InputError, match="say with --out where"):
        refine.main(more)
    refine.main([*more, "--out", str(tmp_path / "r2.jsonl"), "-k", "2"])
    rows = read_jsonl(tmp_path / "r2.jsonl")
    metas = [read_json(tmp_path / f"{name}.meta.json") for name in ("r.refined", "r2")]
    assert metas[0]["candidates_by"] == metas[1]["candidates_by"] == read_json(meta_path(candidates))["weights"]
    assert [len(row["refinements"]) for row in rows] == [2, 2] and rows[0]["candidates"] == first[0]["candidates"]


def test_candidates_of_another_program(random_model, tmp_path):
    """Guards against: files that hold no more than texts, and answers or prompts of a wrong type in them."""
    row = {"id": "a", "question": "x", "answer": 5, "candidates": [{"text": "\\boxed{5}"}]}
    path = tmp_path / "vllm.jsonl"
    path.write_text(json.dumps(row) + "\n")
    refine.main(["--candidates", str(path), "--model", str(random_model), "--max-new-tokens", "4"])
    assert read_jsonl(tmp_path / "vllm.refined.jsonl")[0]["problem"] == "x"
    for key, value in (("answer", ["5"]), ("prompt", 5), ("candidates", [{"text": None}]), ("candidates", [])):
        path.write_text(json.dumps({**row, key: value}) + "\n")
        with pytest.raises(InputError, match="vllm.jsonl, id 'a': .*" + ("text" if key == "candidates" else key)):
            refine.read_candidates(path)



def test_knights_and_knaves():
    """Each puzzle, read again from its English, has one solution, the answer; and they are the same each time."""
    puzzles = sample.load_problems("knights")
    assert len(puzzles) == len({p["problem"] for p in puzzles}) == 200 and puzzles == sample.load_problems("knights")
    assert puzzles[:7] == sample.load_problems("knights", limit=7) and puzzles[3]["id"] == "knights-3"

    def true(text, world):
        text = text.removesuffix(", or both")
        if text.lower().startswith("if "):
            first, second = text[3:].split(", then ")
            return not true(first, world) or true(second, world)
        if match := re.fullmatch(r"exactly (\d) of us (is a|are) knights?", text, re.IGNORECASE):
            return sum(world.values()) == int(match[1])
        if match := re.fullmatch(r"(\w+) would say that (.*)", text):
            return true(match[2], world) == world[match[1]]
        for word, function in ((" and ", all), (" or ", any)):
            if word in text:
                return function([true(part, world) for part in text.split(word)])
        name, kind = re.fullmatch(r"(\w+) is a (knight|knave)", text).groups()
        return world[name] == (kind == "knight")

    kinds = set()
    for puzzle in puzzles:
        said = re.findall(r'^(\w+) says: "(.*)\."$', puzzle["problem"], re.MULTILINE)
        assert 3 <= len(said) <= 5
        kinds |= {
            word for _, text in said for word in ("if", "exactly", "would", " and ", " or ") if word in text.lower()
        }
        worlds = [dict(zip(dict(said), world)) for world in itertools.product((True, False), repeat=len(said))]
        [world] = [w for w in worlds if all(true(text, w) == w[name] for name, text in said)]
        answer = ", ".join(f"{name}: {'knight' if knight else 'knave'}" for name, knight in world.items())
        assert puzzle["answer"] == answer
    assert len(kinds) == 5


def test_bad_input_gets_one_line_and_exit_code_2(candidates, random_model, tmp_path):
    """Each mistake as a user makes it: one line on stderr that names the thing, exit code 2, no traceback."""
    data = candidates.parent / "problems.jsonl"
    (tmp_path / "bad.jsonl").write_text('{"problem": "a", "answer": "1"}\n{"problem": "b", \n')
    (tmp_path / "twice.jsonl").write_text('{"id": 1, "problem": "a"}\n{"id": 1, "problem": "b"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "long one", "problem": "a" * 1300}) + "\n")
    (tmp_path / "none.jsonl").write_text('{"id": 1, "problem": "a", "answer": "1", "candidates": []}\n')
    (tmp_path / "folder").mkdir()
    out = tmp_path / "out.jsonl"
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    cases = [
        ("sample.py", flags("qwn-1.5b", data, out), "did you mean qwen-1.5b", {}),
        ("sample.py", flags("./nowhere", data, out), "no such folder", {}),
        ("sample.py", flags("someone/some-model", data, out), "check the network", offline),
        ("sample.py", flags(tmp_path / "folder", data, out), "no config.json", {}),
        ("sample.py", flags(random_model, "gsm9k", out), "no such benchmark", {}),
        ("sample.py", flags(random_model, "gsm8k", out), "check the network", offline),
        ("sample.py", flags(random_model, tmp_path / "bad.jsonl", out), "bad.jsonl, line 2", {}),
        ("sample.py", flags(random_model, tmp_path / "twice.jsonl", out), "line 2: id 1 already stands on line 1", {}),
        ("sample.py", flags(random_model, tmp_path / "long.jsonl", out), "id 'long one': a prompt of", {}),
        ("sample.py", flags(random_model, data, "/proc/nope/out.jsonl"), "cannot be written", {}),
        ("sample.py", flags(random_model, data, out, "--n", "0"), "--n 0: must be at least 1", {}),
        ("sample.py", flags(random_model, data, out, "--top-p", "1.5"), "--top-p 1.5: out of range", {}),
        ("sample.py", flags(random_model, data, out, "--device", "cuda:9"), "--device cuda:9: not usable", {}),
        ("refine.py", ["--model", random_model, "--candidates", data], "no 'candidates' in it", {}),
        ("refine.py", ["--model", random_model, "--candidates", tmp_path / "none.jsonl"], "no candidates with a", {}),
        ("evaluate.py", [tmp_path / "nothing.jsonl"], "cannot be read", {}),
        ("train.py", ["--model", random_model], "give --teacher", {}),
        ("train.py", ["--model", random_model, "--solve", candidates, "--out", out], "no right solution", {}),
    ]
    for script, arguments, message, environment in cases:
        printed = run(script, *arguments, code=2, **environment)
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0] and "Traceback" not in printed, (arguments, printed)
        assert not out.exists()


def test_real_model_through_all_stages(real_model, problem_files, tmp_path):
    """The issue's own example: 8 GSM8K problems, 4 candidates, a few training steps, the trained folder again."""
    common = ["--max-new-tokens", "48"]  # cut off: this is about the stages, not about the answers
    out = tmp_path / "gsm8k.candidates.jsonl"
    data = ["--data", str(problem_files / "gsm8k.jsonl"), "--limit", "8", "--n", "4", "--out", str(out)]
    sample.main(["--model", real_model, *data, *common])
    refine.main(["--model", real_model, "--candidates", str(out), *common])
    evaluate.main([str(tmp_path / "gsm8k.refined.jsonl"), "--out", str(tmp_path)])
    [row] = read_json(tmp_path / "report.json")["rows"]
    assert row["problems"] == 8 and row["n"] == 4 and {"pass@1", "pass@4", "maj@4", "refined"} <= set(row)
    assert "ducks" in read_jsonl(out)[0]["prompt"]


def test_prompts_with_braces_and_templates_stay_as_they_are(tmp_path):
    """Guards against: str.format reading the braces of a problem, jinja those of a candidate."""
    folder = make_folder(tmp_path / "model")
    _, tokenizer = m.load(folder)
    problem = r"Find {x} in \frac{1}{2}{{ 7 * 7 }} {% raw %} {n}"
    text, _, _ = refine.refinement_prompt(
        {"id": 1, "problem": problem, "candidates": [{"text": problem}]}, [0], tokenizer, 2000, 10
    )
    assert text.count(problem) == 2 and tokenizer.encode_chat(sample.SOLVE_PROMPT.format(problem=problem))[0].count(
        problem
    )
