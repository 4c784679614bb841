"""parallel.py: a model on several processes draws what one process draws, and does not start where it does not fit."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_folder

import model as m
import parallel
import sample
from files import InputError, meta_path, read_json, read_jsonl

# Shapes of large models, as their config.json has them.
QWEN_32B = {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40, "intermediate_size": 27648}
QWEN_72B = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 29568}
LARGE = {"model_type": "qwen2", "vocab_size": 152064, "num_key_value_heads": 8}


def run(script, processes, *flags):
    """A stage under torchrun -> (exit code, what it printed)."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes else []), str(ROOT / script), *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def texts(path):
    return [[c["text"] for c in row.get("refinements", row["candidates"])] for row in read_jsonl(path)]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("qwen2", {}), ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True})],
)
def test_a_model_in_two_parts_draws_the_same(kind, changes, tmp_path, problems):
    """Guards against: a wrong slice, a bias that is added twice, sums that are missing, processes that decide apart.

    Oracle: one process. Then four processes, which are two groups, and a refinement, which goes on after a kill.
    """
    folder = make_folder(tmp_path / "model", kind, max_position_embeddings=1024, **changes)
    flags = ["--model", folder, "--data", problems, "-n", 3, "--max-new-tokens", 20, "--device", "cpu"]
    for processes, share in ((0, 1), (2, 2), (4, 2)):
        out = tmp_path / f"{processes}.candidates.jsonl"
        code, printed = run("sample.py", processes, *flags, "--tensor-parallel", share, "--out", out)
        assert code == 0, printed
        assert texts(out) == texts(tmp_path / "0.candidates.jsonl")
    record = read_json(meta_path(tmp_path / "4.candidates.jsonl"))
    assert record["tokens"] == read_json(meta_path(tmp_path / "0.candidates.jsonl"))["tokens"]
    assert not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob("*.lock"))

    for processes, share in ((0, 1), (2, 2)):
        out = tmp_path / f"{processes}.refined.jsonl"
        if processes:  # as if it had been stopped in the middle
            rows = (tmp_path / "0.refined.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / "2.refined.jsonl.part0").write_text("".join(rows[:3]))
            made = read_json(meta_path(tmp_path / "0.refined.jsonl"))
            meta_path(out).write_text(json.dumps({**made, "complete": False}))
        given = ["--candidates", tmp_path / "0.candidates.jsonl", *flags[:2], *flags[6:], "--out", out]
        given += ["-k", 2, "--rounds", 2]  # sums over processes that are made a second time are not added twice
        code, printed = run("refine.py", processes, *given, "--tensor-parallel", share)
        assert code == 0 and ("3 of 7 problems are there" in printed) == bool(processes), printed
        assert texts(out) == texts(tmp_path / "0.refined.jsonl")
        second = tmp_path / f"{processes}.round2.refined.jsonl"
        assert texts(second) == texts(tmp_path / "0.round2.refined.jsonl")
    parameters = read_json(meta_path(tmp_path / "2.refined.jsonl"))["parameters"]
    assert parameters == sum(p.numel() for p in m.load(folder)[0].parameters())


def test_a_part_has_the_memory_of_a_part(tmp_path):
    """Guards against: a process that holds the whole of what it is to share."""
    folder = make_folder(tmp_path / "model", "qwen2")
    config = m.read_config(folder)
    one = parallel.load_share(folder, torch.device("cpu"), torch.float32, 1, 2)
    for whole, part in zip(m.load(folder)[0].model.layers.parameters(), one.model.layers.parameters()):
        assert whole.shape == part.shape or whole.numel() == 2 * part.numel()
    assert parallel.count(parallel.share_of(config, 2)) == sum(p.numel() for p in one.parameters())
    with pytest.raises(InputError, match="--tensor-parallel 4: the model's n_heads is 6, no multiple of it"):
        parallel.share_of(config, 4)


@pytest.mark.parametrize(("shape", "gpus"), [(QWEN_32B, 1), (QWEN_72B, 4)])
def test_a_model_that_does_not_fit_is_one_line(shape, gpus, monkeypatch):
    """Guards against: minutes of reading, and then a GPU without memory. The numbers are those of hub.py's table."""
    config, gpu = m.Config.from_dict({**LARGE, **shape}), torch.device("cuda:0")
    monkeypatch.setattr(parallel, "free_memory", lambda device: 84e9)  # what 80 GB have free
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    parallel.check_fits("large", config, torch.bfloat16, gpu, gpus)
    if gpus > 1:
        with pytest.raises(InputError) as e:
            parallel.check_fits("--model qwen-72b", config, torch.bfloat16, gpu, 1)
        expected = "--model qwen-72b: 145.4 GB of weights, and cuda:0 has 84.0 GB free; share them: torchrun "
        assert str(e.value) == expected + "--nproc-per-node=4, and --tensor-parallel 4"


def test_tensor_parallel_wants_torchrun(random_model, problems, tmp_path):
    flags = ["--model", str(random_model), "--data", str(problems), "--out", str(tmp_path / "x.jsonl")]
    with pytest.raises(InputError, match="--tensor-parallel 2: start it with torchrun --nproc-per-node=2, or a mult"):
        sample.main([*flags, "--tensor-parallel", "2"])
    with pytest.raises(InputError, match="--tensor-parallel 0: must be at least 1"):
        sample.main([*flags, "--tensor-parallel", "0"])


MEMORY = """
import re, sys
from pathlib import Path

sys.path[:0] = [{root!r}, {tests!r}]
import test_train as t
import hub, model, parallel, train

rank, world, _, _ = hub.processes(t.CPU, "test")
process = train.Process(t.CPU, t.torch.float32, rank, world)
rows = t.rows_of(*[(300, 101)] * 4)
tokens, learned = sum(map(train.length_of, rows)), sum(train.learned_tokens(rows))
config = model.read_config({folder!r})
expected = parallel.training_memory(config, tokens, learned, process, {checkpointing}, train.CHUNK)[1]
net = parallel.load_sharded({folder!r}, *process) if world > 1 else model.load({folder!r})[0]
weights = train.prepare(net, process, {checkpointing})
optimizer = train.start_optimizer(weights, 1e-5)
for _ in range(2):
    packs = [train.load_pack(rows, t.CPU) for _ in range(2)]
    train.update(net, weights, optimizer, packs, t.torch.ones(2), 1e-5)
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print("memory", expected / peak)
"""


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """A model with weights and activations of some hundred MB."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096, "head_dim": 64}
    return make_folder(tmp_path_factory.mktemp("middling") / "model", "qwen3", **shape)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from Linux")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_was_estimated(processes, checkpointing, middling, tmp_path):
    """Guards against: an estimate that nobody has compared with anything. Oracle: the peak that Linux says."""
    script, start = tmp_path / "script.py", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    places = {"root": str(ROOT), "tests": str(ROOT / "tests"), "folder": str(middling)}
    script.write_text(MEMORY.format(checkpointing=checkpointing, **places))
    command = [sys.executable, *(start if processes == 2 else []), str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ratios = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("memory ")]
    assert len(ratios) == processes and all(0.85 < ratio < 1.15 for ratio in ratios), ratios
