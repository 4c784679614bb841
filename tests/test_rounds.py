"""sample.py --adaptive and refine.py --shown, --rounds, --skip-cut-off: the same samples, only fewer or again."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_stages import candidates, flags, without_last_digits  # noqa: F401  a fixture

import evaluate
import model as m
import refine
import sample
import train
from files import InputError, Output, meta_path, read_json, read_jsonl
from vote import decided

# Random models box no answers: here the length of a text is one, so that votes are decided sooner or later.
PARITY = "lambda candidate, prompt='': str(len(candidate['text'].encode()) % 8 // 6)"


def texts(path, key="candidates"):
    return [[c["text"] for c in row[key]] for row in read_jsonl(path)]


def test_criterion_is_the_tail_of_a_beta_distribution():
    """Guards against: a tail off by one vote. Oracle: the density, integrated."""
    x = np.linspace(0, 1, 100_001)
    for first, second in itertools.product(range(20), range(20)):
        density = x**first * (1 - x) ** second
        above = density[50_000:].sum() / density.sum()
        assert abs(above - 0.95) < 1e-3 or decided(first, second) == (above > 0.95), (first, second)
    assert [decided(n, 0) for n in range(6)] == [False, False, False, False, True, True]


def stops_at(texts, n):
    """How many candidates a problem gets: an independent account of waves and criterion, from all its texts."""
    for size in (2, 4, 8, 16):  # after two nothing is decided
        answers = [eval(PARITY)({"text": text}) for text in texts[: min(size, n)]]
        if size >= n or decided(*sorted((answers.count("0"), answers.count("1")), reverse=True)):
            return min(size, n)


def test_waves_are_the_same_samples_only_fewer(candidates, random_model, tmp_path, monkeypatch):  # noqa: F811
    """Guards against: samples that depend on the wave, a decided problem that goes on, one that stops undecided."""
    monkeypatch.setattr(sample, "answer_of", eval(PARITY))
    data, whole = candidates.parent / "problems.jsonl", tmp_path / "whole.jsonl"
    sample.main(flags(random_model, data, whole, "-n", "12"))
    for name, more in (("a", []), ("b", ["--batch-size", "3"])):
        sample.main(flags(random_model, data, tmp_path / f"{name}.jsonl", "-n", "12", "--adaptive", *more))
        found, all_of_them = texts(tmp_path / f"{name}.jsonl"), texts(whole)
        assert found == [some[: stops_at(some, 12)] for some in all_of_them]
    assert len({len(some) for some in found}) > 1  # some leave early, some do not
    record = read_json(meta_path(tmp_path / "a.jsonl"))
    assert record["complete"] and record["adaptive"] is True
    assert record["tokens"]["generated"] == sum(c["n_tokens"] for row in read_jsonl(whole) for c in row["candidates"][
        : stops_at([c["text"] for c in row["candidates"]], 12)])  # fmt: skip
    with pytest.raises(InputError, match="was made with adaptive True, not None"):
        sample.main(flags(random_model, data, tmp_path / "a.jsonl", "-n", "12"))
    sample.main(flags(random_model, data, tmp_path / "one.jsonl", "-n", "1", "--adaptive"))
    assert texts(tmp_path / "one.jsonl") == [some[:1] for some in all_of_them]


def test_killed_between_and_within_waves(candidates, random_model, tmp_path, monkeypatch):  # noqa: F811
    """Guards against: a resume that starts problems anew, loses a wave, or takes a first wave for the whole."""
    monkeypatch.setattr(sample, "answer_of", eval(PARITY))
    data, append = candidates.parent / "problems.jsonl", Output.append
    sample.main(flags(random_model, data, tmp_path / "whole.jsonl", "-n", "12", "--adaptive"))
    command = flags(random_model, data, tmp_path / "x.jsonl", "-n", "12", "--adaptive", "--batch-size", "3")
    for stop in (1, 2, 3, 4):

        def stopped(self, rows, left=[stop]):  # noqa: B006  so many writes, then Ctrl-C
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            append(self, rows)

        monkeypatch.setattr(Output, "append", stopped)
        with pytest.raises(KeyboardInterrupt):
            sample.main(command)
        sample.files.unlock(tmp_path / "x.jsonl")
    monkeypatch.setattr(Output, "append", append)
    os.rename(tmp_path / "x.jsonl.part0", tmp_path / "x.jsonl.part3")  # of another process, and read after ours
    asked = []
    monkeypatch.setattr(sample.Progress, "expect", lambda self, requests: asked.append(requests))
    sample.main(command)
    assert without_last_digits(tmp_path / "x.jsonl") == without_last_digits(tmp_path / "whole.jsonl")
    assert any(keys[0][2] >= 4 for [(_, keys)] in asked[0].values())  # some went on at their second wave


@pytest.mark.parametrize("share", ["1", "2"])
def test_waves_on_two_processes(share, candidates, random_model, tmp_path):  # noqa: F811
    """Guards against: processes that decide apart, or wait for each other between waves for ever."""
    program = tmp_path / "waves.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport sample\nsample.answer_of = {PARITY}\n"
                       "sample.main()\n")  # fmt: skip
    out = {name: tmp_path / f"{name}.jsonl" for name in ("alone", "together")}
    common = ["--model", random_model, "--data", candidates.parent / "problems.jsonl", "-n", "12", "--adaptive"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    more = ["--tensor-parallel", share, "--device", "cpu"]
    for start, given in (([sys.executable], []), (torchrun, more)):
        command = [*start, program, *common, *given, "--out", out["together" if given else "alone"]]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
    assert texts(out["alone"]) == texts(out["together"]) and len({len(some) for some in texts(out["alone"])}) > 1


def test_shown_is_a_subset_drawn_by_key(candidates, random_model, tmp_path):  # noqa: F811
    """Guards against: a refinement that sees more, always the first ones, or other ones in another batch."""
    command = ["--model", str(random_model), "--candidates", str(candidates), "-k", "3", "--shown", "2"]
    refine.main([*command, "--out", str(tmp_path / "a.jsonl")])
    refine.main([*command, "--out", str(tmp_path / "b.jsonl"), "--batch-size", "2", "--limit", "4"])
    rows = read_jsonl(tmp_path / "a.jsonl")
    assert texts(tmp_path / "b.jsonl", "refinements") == texts(tmp_path / "a.jsonl", "refinements")[:4]
    for row in rows:
        for r in row["refinements"]:
            assert r["drawn"] == len(r["order"]) == 2 and "2 candidate solutions" in r["prompt"]
    subsets = [frozenset(r["order"]) for row in rows for r in row["refinements"]]
    assert len(set(subsets)) == 6  # all pairs of four occur
    with pytest.raises(InputError, match="--shown 5: .* has 4 candidates a problem"):
        refine.main([*command[:-1], "5", "--out", str(tmp_path / "c.jsonl")])
    with pytest.raises(InputError, match="--shown 0: must be at least 1"):
        refine.main([*command[:-1], "0", "--out", str(tmp_path / "c.jsonl")])


def test_rounds_refine_the_refinements(candidates, random_model, tmp_path):  # noqa: F811
    """Guards against: rounds that all see the first candidates, draw the same numbers, or lose what was before."""
    command = ["--model", str(random_model), "--candidates", str(candidates), "-k", "3", "--shown", "2"]
    command += ["--max-new-tokens", "12", "--out", str(tmp_path / "x.refined.jsonl")]
    refine.main(command)
    once = (tmp_path / "x.refined.jsonl").read_bytes()
    refine.main([*command, "--rounds", "3"])  # goes on from the first
    assert (tmp_path / "x.refined.jsonl").read_bytes() == once
    first, second, third = (read_jsonl(tmp_path / f"x{name}.refined.jsonl") for name in ("", ".round2", ".round3"))
    for one, two, three in zip(first, second, third):
        assert one["candidates"] == two["candidates"] == three["candidates"]
        assert two["rounds"] == [one["refinements"]] and three["rounds"] == [one["refinements"], two["refinements"]]
        for before, after in ((one, two), (two, three)):
            for r in after["refinements"]:
                assert r["drawn"] == 2 >= len(r["order"])  # an empty one is not shown
                shown = [evaluate.strip_thinking(before["refinements"][i]["text"]) for i in r["order"]]
                assert all(text in r["prompt"] for text in shown)
    orders = [[r["order"] for row in rows for r in row["refinements"]] for rows in (second, third)]
    assert orders[0] != orders[1]
    records = [read_json(meta_path(tmp_path / f"x.round{i}.refined.jsonl")) for i in (2, 3)]
    assert [record["round"] for record in records] == [2, 3]
    assert records[0]["candidates_by"] == records[0]["weights"]
    before = read_json(meta_path(tmp_path / "x.refined.jsonl"))["seconds"]
    assert records[0]["seconds_before"] == before
    assert records[1]["seconds_before"] == before + records[0]["seconds"]
    with pytest.raises(InputError, match="--rounds 2: a later round refines the --k of the one before"):
        refine.main(["--candidates", str(candidates), "--rounds", "2"])


def test_a_round_goes_on_where_it_was(candidates, random_model, tmp_path):  # noqa: F811
    """Guards against: a kill in the second round that costs the first, or makes other refinements."""
    command = ["--model", str(random_model), "--candidates", str(candidates), "-k", "2", "--rounds", "2"]
    command += ["--max-new-tokens", "12", "--out"]
    refine.main([*command, str(tmp_path / "x.refined.jsonl")])
    refine.main([*command, str(tmp_path / "y.refined.jsonl")])
    second = tmp_path / "y.round2.refined.jsonl"
    second.write_bytes(second.read_bytes()[:-300])
    record = meta_path(second)
    record.write_text(json.dumps({**read_json(record), "complete": False}))
    first = meta_path(tmp_path / "y.refined.jsonl").read_bytes()
    refine.main([*command, str(tmp_path / "y.refined.jsonl"), "--batch-size", "1"])
    assert without_last_digits(second) == without_last_digits(tmp_path / "x.round2.refined.jsonl")
    assert meta_path(tmp_path / "y.refined.jsonl").read_bytes() == first


def test_training_on_a_later_round(candidates, random_model, tmp_path):  # noqa: F811
    """Guards against: orders of refinements read as orders of the first candidates, so that prompts are made up."""
    command = ["--model", str(random_model), "--candidates", str(candidates), "-k", "3", "--shown", "2"]
    refine.main([*command, "--rounds", "2", "--max-new-tokens", "12", "--out", str(tmp_path / "x.refined.jsonl")])
    path, rows = str(tmp_path / "x.round2.refined.jsonl"), []
    for row in read_jsonl(path):
        box = f"\\boxed{{{row['answer']}}}"  # random models are right about nothing
        right = [{**r, "finish_reason": "stop", "text": r["text"] + box} for r in row["refinements"]]
        rows.append({**row, "refinements": right})
    tokenizer = m.Tokenizer(random_model, m.read_config(random_model))
    with open(path, "w") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    args = train.read_flags(["--model", str(random_model), "--refine", path, "--balance", "1", "1", "1"])
    args.max_length = 1000
    made, _ = train.make_rows(train.read_examples(path, 1), 1, tokenizer, lambda text: False, args)
    assert len(made) > 10
    for row in made:
        [line] = [line for line in rows if line["id"] == row.problem["id"]]
        assert len(row.prompt) == line["refinements"][row.number]["n_prompt_tokens"]
        before = [evaluate.strip_thinking(line["rounds"][0][i]["text"]) for i in row.order]
        assert all(text in tokenizer.decode(row.prompt) for text in before)
    for bad in (5, [5], [[]], [[{"text": 1}]]):
        with open(path, "w") as file:
            file.write(json.dumps({**rows[0], "rounds": bad}) + "\n")
        with pytest.raises(InputError, match="no candidates with a text"):
            train.read_examples(path, 1)


def test_cut_off_candidates_can_be_left_out(random_model, tmp_path):
    """Guards against: a prompt with what never came to an answer; none at all where nothing is left to show."""
    good, cut = {"text": "so \\boxed{1}", "finish_reason": "stop"}, {"text": "and so", "finish_reason": "length"}
    late = {"text": "first \\boxed{7}, and then", "finish_reason": "length"}  # the box may be of a part of the way
    bare = {"text": "it is 5", "finish_reason": "stop"}
    rows = [[good, cut, late, bare], [cut, cut, late, bare], [good, {"text": "\\boxed{2}"}, good, good]]
    rows = [{"id": i, "problem": "What?", "answer": "1", "candidates": some} for i, some in enumerate(rows)]
    path = tmp_path / "x.candidates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refine.main(["--model", str(random_model), "--candidates", str(path), "--skip-cut-off", "--max-new-tokens", "4"])
    some, none, whole = (row["refinements"][0] for row in read_jsonl(tmp_path / "x.refined.jsonl"))
    assert [r["drawn"] for r in (some, none, whole)] == [4, 4, 4]
    assert some["order"] == [0] and "1 candidate" in some["prompt"] and "and so" not in some["prompt"]
    assert none["order"] == [] and "Candidate" not in none["prompt"]
    assert sorted(whole["order"]) == [0, 1, 2, 3]  # what does not say how it ended did not end early
    _, tokenizer = m.load(random_model)
    assert none["prompt"] == tokenizer.encode_chat(sample.SOLVE_PROMPT.format(problem="What?"))[0]
