"""train.py: which rows are learned, the loss, packs, processes, checkpoints, and what comes out."""

import argparse
import fcntl
import gc
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_folder, write_tokenizer
from test_evaluate import refined_row, write_rows
from test_model import theirs
from torch.utils._python_dispatch import TorchDispatchMode

import hub
import model as m
import parallel
import refine
import sample
import train
from files import LOCKS, InputError, meta_path, read_json, read_jsonl, unlock

CPU = torch.device("cpu")
ALONE = train.Process(CPU, torch.float32, 0, 1)


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
        refinements.append({**completion("I give up."), "order": [0, 1, 2], "prompt": ""})
        refined.append({**row, "candidates": candidates, "refinements": refinements})
    return write_rows(folder / "s.candidates.jsonl", solutions), write_rows(folder / "r.refined.jsonl", refined)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A model that is small, and calm enough to be trained."""
    folder = tmp_path_factory.mktemp("student") / "student"
    return make_folder(folder, "qwen2", scale=0.5, max_position_embeddings=1024)


def settings(**changes):
    names = {"lr": 1e-3, "batch_size": 4, "epochs": 1, "steps": None, "seed": 0, "weight": 0.5, "max_length": 1024}
    names |= {"balance": [1.0, 1.0, 1.0], "shown": [0, 0], "checkpointing": False, "save_every": 100, "keep": 2}
    return argparse.Namespace(**{**names, **changes})


def rows_of(*lengths):
    """Rows of random ids, solve and refine in turns, that are shown as they are."""
    rows, generator = [], torch.Generator().manual_seed(3)
    for i, (prompt, length) in enumerate(lengths):
        ids = torch.randint(3, 300, (prompt + length,), generator=generator).tolist()
        rows.append(train.Row(i % 2, ids[:prompt], ids[prompt:]))
    return rows


def run_train(folder, rows, out, held=(), **changes):
    """train.train() on a fresh copy of a model -> (its weights in one row, the lines of its log)."""
    tokenizer = m.Tokenizer(folder, m.read_config(folder))
    model, _ = train.train(tokenizer, rows, list(held), settings(out=str(out), **changes), ALONE, {"a": 1})
    return torch.cat([p.detach().flatten() for p in model.parameters()]), read_jsonl(f"{out}.metrics.jsonl")


def losses_of(model, rows, scale):
    return train.task_losses(model, train.load_pack(rows, CPU), scale)


def rows_in(path, task, tokenizer, excluded=False, **changes):
    """What train.make_rows() makes of a file."""
    return train.make_rows(train.read_examples(path, task), task, tokenizer, lambda _: excluded, settings(**changes))


ROWS = ((5, 9), (30, 4), (12, 1), (3, 20), (40, 8), (2, 2))

# ------------------------------------------------------------------------------------------------
# Rows


def test_rows(data, random_model):
    """Guards against: wrong, cut-off or doubled texts being learned; another order than the teacher's; no stop id."""
    _, tokenizer = m.load(random_model)
    rows, dropped = rows_in(data[0], 0, tokenizer)
    assert len(rows) == 6 and {k: n for k, n in dropped.items() if n} == {"wrong": 6, "cut off": 6, "duplicate": 6}
    assert rows[3].prompt == tokenizer.encode_chat(sample.SOLVE_PROMPT.format(problem="What is 3 + 3?"))[1]
    assert tokenizer.decode(rows[3].completion) == "3 and 3 make \\boxed{6}." and rows[3].completion[-1] == 2

    rows, dropped = rows_in(data[1], 1, tokenizer)
    assert len(rows) == 6 and {k: n for k, n in dropped.items() if n} == {"wrong": 6, "no answer": 6}
    text = tokenizer.tokenizer.decode(rows[3].prompt, skip_special_tokens=False)
    assert text.index("I do not know") < text.index("perhaps") < text.index("or \\boxed{6}")
    assert tokenizer.decode(rows[3].completion) == "Better: \\boxed{6}" and {row.kind for row in rows} == {1}

    assert rows_in(data[1], 1, tokenizer, max_length=300)[1]["too long"] == 6
    assert rows_in(data[1], 1, tokenizer, excluded=True)[1]["excluded"] == 18
    assert rows_in(data[1], 1, tokenizer, balance=[1.0, 0.0, 1.0])[1]["unbalanced"] == 6


@pytest.mark.parametrize("missing", [None, "", "nan", " NaN "])
def test_a_missing_right_answer_does_not_make_completions_wrong(missing, data, random_model, tmp_path):
    """Guards against: "nan" as a right answer that all are graded by, or wrong completions that nobody can call so."""
    _, tokenizer = m.load(random_model)
    for task, n in ((0, 24), (1, 18)):
        lines = [{**line, "answer": missing} for line in read_jsonl(data[task])]
        rows, dropped = rows_in(write_rows(tmp_path / "x.jsonl", lines), task, tokenizer)
        assert rows == [] and {k: n for k, n in dropped.items() if n} == {"ungraded": n}


def test_kinds_and_balance(tmp_path, random_model):
    """Guards against: rows told by another answer than the candidates', a share that is not kept."""
    _, tokenizer = m.load(random_model)
    answers = {"w": ["2", "3"], "m": ["1", "3"], "r": ["1", "1"]}
    lines = [refined_row(f"{kind}{i}", answers[kind], ["1"]) for i in range(40) for kind in "wmr"]
    path = write_rows(tmp_path / "x.refined.jsonl", lines)
    rows, dropped = rows_in(path, 1, tokenizer)
    assert all(row.kind == "wmr".index(row.problem["id"][0]) for row in rows) and len(rows) == 120
    half = rows_in(path, 1, tokenizer, balance=[1.0, 1.0, 0.5])
    kinds = [row.kind for row in half[0]]
    assert kinds.count(0) == kinds.count(1) == 40 and 10 < kinds.count(2) < 30
    assert half[1]["unbalanced"] == 40 - kinds.count(2)


def test_candidates_are_shown_anew_each_epoch(data, random_model):
    """Guards against: one order for all epochs, draws that depend on what was drawn before, "Candidate 2" misplaced."""
    _, tokenizer = m.load(random_model)
    rows, _ = rows_in(data[1], 1, tokenizer)
    args = settings(shown=[1, 2])
    epochs = [[train.shown_anew(row, epoch, tokenizer, args).prompt for row in rows] for epoch in range(8)]
    assert epochs[3] == [train.shown_anew(row, 3, tokenizer, args).prompt for row in rows]
    texts = [tokenizer.tokenizer.decode(prompt, skip_special_tokens=False) for epoch in epochs for prompt in epoch]
    numbers = [text.count("\nCandidate ") for text in texts]
    assert set(numbers) == {1, 2} and all(f"{n} candidate solutions" in text for n, text in zip(numbers, texts))
    assert all(len({tuple(epoch[i]) for epoch in epochs}) > 2 for i in range(6))
    assert all(train.shown_anew(row, 1, tokenizer, settings()).prompt != row.prompt for row in rows[:1])

    names = ("Candidate 2", "candidate #3", "Solution **1**", "The first candidate", "Of the last two solutions, one")
    for name in names:
        refinement = {"text": f"{name} has it: \\boxed{{0}}", "order": [2, 0, 1]}
        named = train.make_row(1, rows[0].problem, 0, refinement, tokenizer, 1024)
        assert all(train.shown_anew(named, epoch, tokenizer, args) is named for epoch in range(5)), name
    free = {"text": "The equation has two solutions, and no candidate has both.", "order": [2, 0, 1]}
    assert train.make_row(1, rows[0].problem, 0, free, tokenizer, 1024).order == [2, 0, 1]


def test_exclusion(tmp_path):
    """Guards against: test problems in the training rows, whole or in part."""
    problems = ["How many legs do three spiders have in all,  if each has eight?", "What is 2 + 3?"]
    path = write_rows(tmp_path / "test.jsonl", [{"problem": text, "answer": "1"} for text in problems])
    overlaps = train.overlap_test([path])
    assert overlaps("how many legs do three spiders have in all, if each has eight?") and overlaps("what is 2 + 3?")
    assert overlaps("Tell me: HOW MANY legs do three spiders have in a box")  # eight words in a row
    assert not overlaps("How many legs do three spiders own altogether?") and not overlaps("What is 2 - 3?")
    assert not train.overlap_test([])("What is 2 + 3?")


def test_split_keeps_problems_together():
    """Guards against: a problem whose solution is trained and whose refinement validates, under another id as well."""
    rows = [train.Row(i % 2, [i], [i], {"id": i, "problem": f"problem {i // 4}"}) for i in range(400)]
    for validation, n in ((0.1, 10), (7, 7), (0.001, 0), (0, 0)):
        kept, held = train.split(rows, validation, 0)
        texts = [{row.problem["problem"] for row in part} for part in (kept, held)]
        assert len(texts[1]) == n and not texts[0] & texts[1] and len(kept) + len(held) == 400
    assert train.split(rows, 7, 0) == train.split(rows, 7, 0) != train.split(rows, 7, 1)
    with pytest.raises(InputError, match="leave some to train on"):
        train.split(rows, 100, 0)


# ------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_loss_of_a_pack_is_that_of_each_row_alone(kind, tmp_path):
    """Guards against: rows that see each other, positions that go on, labels off by one, tasks mixed up, a window lost.

    Oracle: row by row, through all of the logits.
    """
    folder = make_folder(tmp_path / kind, kind, **({"sliding_window": 8} if kind == "mistral" else {"head_dim": 16}))
    model, _ = m.load(folder)
    rows, expected = rows_of(*ROWS), [0.0, 0.0]
    for row in rows:
        logits = model.lm_head(model(torch.tensor([row.prompt + row.completion])))[0].log_softmax(-1)
        for i, token in enumerate(row.completion):
            expected[row.task] -= logits[len(row.prompt) + i - 1, token].item()
    loss, losses = losses_of(model, rows, torch.tensor([2.0, 0.5]))
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(2 * expected[0] + 0.5 * expected[1], rel=1e-5)
    with torch.no_grad():
        solve, only = losses_of(model, rows[1:2], torch.ones(2))[1].tolist()
        assert only > 0 and solve == 0  # no solve row: 0, not NaN


def test_a_process_without_rows_has_gradients_of_zero(random_model):
    """Guards against: a rank that waits for ever for another, which had nothing to do."""
    model, _ = m.load(random_model)
    loss, losses = losses_of(model, [], torch.ones(2))
    loss.backward()
    assert loss.item() == 0 and losses.tolist() == [0, 0]
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_in_chunks(dtype, student, monkeypatch):
    """Guards against: chunks that overlap or miss a position, a task's weight lost. Oracle: all logits in float64."""
    monkeypatch.setattr(train, "CHUNK", 7 * 320)
    rows, scale = rows_of(*ROWS), torch.tensor([2.0, 0.5])
    model, pack = m.load(student)[0].to(dtype), train.load_pack(rows, CPU)
    hidden = {}

    def keep(ids, positions, attend):
        hidden["ours"] = torch.randn(len(ids), 48, generator=torch.manual_seed(1)).to(dtype).requires_grad_()
        return hidden["ours"]

    monkeypatch.setattr(model, "forward", keep)
    loss, sums = train.task_losses(model, pack, scale)
    (3 * loss).backward()
    x, weight = (t.detach().double().requires_grad_() for t in (hidden["ours"], model.lm_head.weight))
    expected = F.cross_entropy(x[pack.learned] @ weight.t(), pack.labels, reduction="none")
    (3 * expected @ scale.double()[pack.tasks]).backward()
    close = 1e-5 if dtype == torch.float32 else 0.01
    assert loss.item() == pytest.approx((expected @ scale.double()[pack.tasks]).item(), rel=close)
    assert sums.tolist() == pytest.approx([expected[pack.tasks == i].sum().item() for i in (0, 1)], rel=close)
    for ours, reference in ((hidden["ours"].grad, x.grad), (model.lm_head.weight.grad, weight.grad)):
        assert (ours - reference).norm() < close * reference.norm()


def test_packing_and_accumulation_do_not_change_the_step(student, tmp_path):
    """Guards against: a mean of means, which weighs the tokens of small packs more."""
    rows, rooms = rows_of(*ROWS), (1024, 75, 47)
    assert [len(train.packs_of(rows, room, 1)) for room in rooms] == [1, 2, 3]
    found = [run_train(student, rows, tmp_path / f"{n}", steps=3, max_length=n, batch_size=6) for n in rooms]
    for weights, lines in found[1:]:
        torch.testing.assert_close(found[0][0], weights, atol=2e-5, rtol=0)
        for line, other in zip(found[0][1], lines):
            assert line["loss_solve"] == pytest.approx(other["loss_solve"], abs=1e-5)
            assert line["loss_refine"] == pytest.approx(other["loss_refine"], abs=1e-5)
    assert [line["step"] for line in found[0][1]] == [1, 2, 3]


def test_joint_loss_is_the_weighted_sum(random_model, tmp_path):
    """L = L_solve + weight * L_refine, each a mean over its own tokens: checked by the gradient of the first step."""
    rows = rows_of((5, 9), (30, 4))
    model, _ = m.load(random_model)
    (solve, refine) = losses_of(model, rows, torch.tensor([1 / 9, 0.5 / 4]))[1].tolist()
    losses_of(model, rows[:1], torch.tensor([1 / 9, 0.0]))[0].backward()
    losses_of(model, rows[1:], torch.tensor([0.0, 0.5 / 4]))[0].backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    _, [line] = run_train(random_model, rows, tmp_path / "out", steps=1)
    assert line["grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert line["loss_solve"] == pytest.approx(solve / 9) and line["loss_refine"] == pytest.approx(refine / 4)


def test_activation_checkpointing_changes_no_weight(student, tmp_path):
    plain, again = (
        run_train(student, rows_of(*ROWS), tmp_path / f"{on}", steps=3, checkpointing=on)[0] for on in (False, True)
    )
    assert torch.equal(plain, again)


def test_one_process_in_bfloat16_keeps_float32_weights():
    """What one GPU does, on a CPU: weights, gradients and moments float32, compute bfloat16, tied matrices."""
    rows, scale = rows_of(*ROWS), torch.tensor([0.1, 0.1])
    folder = hub.find_model("tiny")
    expected = losses_of(m.load(folder)[0], rows, scale)[1]
    model = m.load(folder)[0]
    weights = train.prepare(model, train.Process(CPU, torch.bfloat16, 0, 1), False)
    optimizer, before = train.start_optimizer(weights, 1e-3), {name: x.clone() for name, x in weights.items()}
    packs = [train.load_pack(part, CPU) for part in (rows[:3], rows[3:])]
    sums, norm = train.update(model, weights, optimizer, packs, scale, 1e-5)
    assert sums.tolist() == pytest.approx(expected.tolist(), rel=0.02) and 0 < norm < math.inf
    assert {x.dtype for x in weights.values()} == {s["exp_avg"].dtype for s in optimizer.state.values()}
    assert {x.dtype for x in weights.values()} == {torch.float32} != {x.dtype for x in model.parameters()}
    # Steps of 1e-5 are less than bfloat16 could add to most weights.
    assert min((weights[n] != before[n]).float().mean().item() for n in before if "layers" in n) > 0.9
    assert all(torch.equal(x, weights[name].bfloat16()) for name, x in model.named_parameters())

class Operators(TorchDispatchMode):
    """Counts what torch is asked to do, by name; what makes the host wait for a device is an error."""
    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.WAITS), f"{name}: the host waits for the device"
        self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_operators_of_a_step(student, monkeypatch):
    """Guards against: a wait between packs, weights that are cast for every pack, a product that is computed twice.

    What one GPU does, on a CPU with bfloat16; lists of numbers become tensors before the step begins.
    """
    counts = []
    for n_packs in (1, 2, 3):
        model = m.load(student)[0]
        weights = train.prepare(model, train.Process(CPU, torch.bfloat16, 0, 1), False)
        optimizer = train.start_optimizer(weights, 1e-4)
        packs = [train.load_pack(rows_of(*ROWS)[:2], CPU) for _ in range(n_packs)]
        with monkeypatch.context() as patch, Operators() as operators:
            patch.setattr(train, "load_pack", lambda *_: pytest.fail("made within the step"))
            train.update(model, weights, optimizer, packs, torch.ones(2), 1e-4)
        counts.append(operators.count)
    first, more, again = counts
    layers = model.config.n_layers
    of_a_pack = {name: n - first.get(name, 0) for name, n in more.items() if n != first.get(name, 0)}
    assert of_a_pack == {name: n - more.get(name, 0) for name, n in again.items() if n != more.get(name, 0)}
    products = of_a_pack.get("mm", 0) + of_a_pack.get("addmm", 0)
    # Four matrices and their two gradients, none of them again; the loss, in its backward pass: logits, two gradients.
    assert products == 3 * 4 * layers + 3
    # Cosine and sine, and the losses; norms of a CPU are computed in float32, those of a GPU are one kernel.
    assert of_a_pack["_to_copy"] <= 4 + 16 * layers
    assert first["copy_"] - of_a_pack.get("copy_", 0) >= len(weights)  # the copies follow the weights, once a step
    assert of_a_pack.get("copy_", 0) < len(weights)


def test_packs_are_on_the_device_before_their_step(student, monkeypatch):
    """Guards against: lists that become tensors while a GPU waits, or memory from which it cannot copy alone."""
    moved = []

    class Tensor(torch.Tensor):
        pinned = False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            assert self.pinned, "from other memory the host waits for the copy all the same"
            moved.append((device.type, non_blocking))
            return self

    monkeypatch.setattr(torch, "tensor", lambda *a, f=torch.tensor, **k: f(*a, **k).as_subclass(Tensor))
    rows = rows_of(*ROWS)
    pack = train.load_pack(rows, torch.device("cuda:1"))
    assert moved == [("cuda", True)] * 6 and sum(pack.lengths) == len(pack.ids) == pack.ends[-1]


SHARDED = """
import sys

import torch
import torch.distributed as dist

sys.path[:0] = [{root!r}, {tests!r}]
import test_train as t
import hub, parallel, train

rank, world, _, _ = hub.processes(t.CPU, "test")
rows, scale = t.rows_of(*t.ROWS), torch.tensor([0.1, 0.2])
for dtype in (torch.float32, torch.bfloat16):
    process = train.Process(t.CPU, dtype, rank, world)
    model = parallel.load_sharded({folder!r}, *process) if world > 1 else t.m.load({folder!r})[0]
    weights = train.prepare(model, process, False)
    optimizer = train.start_optimizer(weights, 1e-3)
    packs = [[rows[0], rows[1]], [rows[2], rows[3]], [rows[4]], [rows[5]]]
    losses = []
    for _ in range(3):
        mine = [train.load_pack(pack, t.CPU) for pack in packs[rank::world]]
        sums, norm = train.update(model, weights, optimizer, mine, scale * world, 1e-3)
        losses.append([*train.total(sums).tolist(), norm.item()])
    losses.append(train.validate(model, rows, 100, process))  # FSDP must not leave bfloat16 in place of the weights
    if world == 1 and dtype == torch.bfloat16:
        for copy, master in zip(model.parameters(), weights.values()):
            copy.data = master
    out = f"{out}/{{world}}-{{str(dtype)[6:]}}"
    parallel.save(model, out, {folder!r}, shard_bytes=100_000)
    if rank == 0:
        print("losses", losses)
dist.is_initialized() and dist.destroy_process_group()
"""


def test_sharded_equals_one_process(tmp_path):
    """Guards against: a process that reads other rows than it keeps, gradients that are not summed, a rounded export.

    One process with its copy of the weights against two with FSDP, in both number types: losses, norms and weights.
    """
    folder = make_folder(tmp_path / "student", "qwen2", scale=0.5, intermediate_size=81, vocab_size=331)
    script = tmp_path / "script.py"
    script.write_text(SHARDED.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder), out=str(tmp_path)))
    env, printed = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    for start in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        done = subprocess.run([sys.executable, *start, script], env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        printed.append([json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("losses ")])
    for dtype, one, two in zip(("float32", "bfloat16"), *printed):
        close = 1e-4 if dtype == "float32" else 2e-2
        for a, b in zip(one, two):
            assert a == pytest.approx(b, rel=close)
        files = [sorted((tmp_path / f"{n}-{dtype}").glob("*.safetensors")) for n in (1, 2)]
        assert len(files[0]) > 1 and [f.name for f in files[0]] == [f.name for f in files[1]]
        models = [m.load(tmp_path / f"{n}-{dtype}")[0] for n in (1, 2)]
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
            assert (a - b).abs().mean() < (1e-6 if dtype == "float32" else 1e-3), name
            assert dtype == "float32" or not torch.equal(b, b.bfloat16().float()), name


# ------------------------------------------------------------------------------------------------
# Steps and packs


def test_epochs_hold_every_row_once_and_both_tasks_in_each_step():
    rows = [train.Row(int(i >= 30), [i], [i]) for i in range(50)]
    steps = train.epoch_of(rows, 8, 0, 0)
    assert sorted(row.prompt[0] for step in steps for row in step) == list(range(50))
    assert all({row.task for row in step} == {0, 1} and 7 <= len(step) <= 10 for step in steps)
    assert steps != train.epoch_of(rows, 8, 0, 1) and steps == train.epoch_of(rows, 8, 0, 0)
    # Guards against: the few rows of a task all at the beginning, which the rest of the epoch forgets.
    few = [train.Row(int(i >= 75), [i], [i]) for i in range(80)]
    assert [i for i, step in enumerate(train.epoch_of(few, 4, 0, 0)) if any(r.task for r in step)] == [0, 4, 8, 12, 16]


def test_packs():
    """Guards against: lost rows, packs over the limit, ranks that wait for one with more to do."""
    rng = random.Random(0)
    for world in (1, 2, 8):
        steps = []
        for _ in range(20):  # lengths of SVAMP's rows, as bench/training.py makes them
            lengths = [rng.choice((rng.randint(130, 240), rng.randint(450, 1060))) for _ in range(32)]
            rows = rows_of(*((n // 2, n - n // 2 + 1) for n in lengths))
            packs = train.packs_of(rows, 4096, world)
            assert sorted(map(id, rows)) == sorted(id(row) for pack in packs for row in pack)
            assert len(packs) % world == 0 and all(sum(map(train.length_of, pack)) <= 4096 for pack in packs)
            steps.append(packs)
        assert train.padding(steps, world) < (0.05 if world > 1 else 1e-9)
    assert train.packs_of(rows_of((50, 51)), 100, 3)[1:] == [[], []]
    # Three of 60 fit two packs of 100 in sum, but not in pieces.
    assert len(train.packs_of(rows_of((30, 31), (30, 31), (30, 31)), 100, 1)) == 3
    assert train.padding([[rows_of((5, 6)), rows_of((2, 4))]], 2) == pytest.approx(5 / 20)


def test_schedule():
    rates = [train.learning_rate(step, 100, 1.0, 5) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and max(rates) == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=0.01)


# ------------------------------------------------------------------------------------------------
# Processes, kills and resumes


def flags_of(student, data, out, *more):
    flags = ["--model", str(student), "--solve", data[0], "--refine", data[1], "--out", str(out), "--device", "cpu"]
    return [*flags, "--lr", "3e-3", "--batch-size", "6", "--validation", "1", *more]


def start(flags, ranks=0, limit=""):
    """train.py as a process, or as `ranks` of them; `limit`: KiB that a file may have at most."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *torchrun, str(ROOT / "train.py"), *flags]
    command = ["bash", "-c", f'ulimit -f {limit} && exec "$@"', "bash", *command] if limit else command
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)


def finish(process, code=0):
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, out + err
    return out + err


def assert_same_losses(one, other, tolerance):
    lines = [read_jsonl(f"{out}.metrics.jsonl") for out in (one, other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines):
        for key in ("loss_solve", "loss_refine", *(k for k in a if k.startswith("validation"))):
            assert a[key] == pytest.approx(b[key], abs=tolerance)
        # AdamW hides a gradient that is a mean over the processes where it should be a sum.
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance)


@pytest.mark.parametrize("room", ["1024", "520"])  # one pack for each of two ranks or fewer; several, accumulated
def test_two_processes_have_the_losses_of_one(data, student, tmp_path, room):
    """Guards against: means of means over ranks, ranks that choose other rows, a hang where one has no pack."""
    flags = ["--steps", "20", "--max-length", room]
    two = start(flags_of(student, data, tmp_path / "two", *flags), 2)
    train.main(flags_of(student, data, tmp_path / "one", *flags))
    finish(two)
    assert_same_losses(tmp_path / "one", tmp_path / "two", 1e-4)
    trained = [m.load(tmp_path / name)[0].state_dict() for name in ("one", "two")]
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], atol=1e-3, rtol=0)


def wait_for(condition, process):
    while process.poll() is None and not condition():
        time.sleep(0.002)


def test_killed_at_any_moment_it_ends_with_the_same_weights(data, student, tmp_path):
    """SIGKILL while it trains and while it saves: the same command ends bit for bit the same."""
    out, rng = tmp_path / "out", random.Random(5)
    flags = ["--steps", "30", "--save-every", "1"]
    finish(start(flags_of(student, data, tmp_path / "whole", *flags)))
    folder, resumed = Path(f"{out}.checkpoints"), 0
    for kill in range(4):
        done = [path.name.removeprefix("step-") for path in train.whole_checkpoints(folder)]
        target = folder / f"step-{int(done[-1] if done else 0) + 4}"
        saving = target.with_suffix(".partial") if kill % 2 else target
        process = start(flags_of(student, data, out, *flags))
        wait_for(lambda: saving.exists() or target.exists(), process)  # noqa: B023
        time.sleep(rng.choice((0, 0.01)))
        process.kill()
        resumed += "goes on from there" in process.communicate()[0]
    assert resumed == 3 and not out.exists()
    output = finish(start(flags_of(student, data, out, *flags)))
    assert "goes on from there" in output
    assert read_json(meta_path(out))["complete"] and Path(f"{out}.loss.png").exists()
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert_same_losses(tmp_path / "whole", out, 0)
    assert sorted(path.name for path in folder.iterdir()) == ["step-28", "step-29"]


def test_a_kill_while_the_log_is_cut_back_loses_none_of_it(student, tmp_path, monkeypatch):
    """Guards against: a metrics.jsonl emptied by a kill at the start, so that its first steps are never seen again."""
    rows, flags = rows_of(*ROWS), {"steps": 6, "save_every": 2}
    run_train(student, rows, tmp_path / "a", **flags)
    before = read_jsonl(tmp_path / "a.metrics.jsonl")

    def killed(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        run_train(student, rows, tmp_path / "a", **flags)
    monkeypatch.undo()
    _, lines = run_train(student, rows, tmp_path / "a", **flags)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert [line["loss_solve"] for line in lines] == [line["loss_solve"] for line in before]


def test_a_gradient_that_is_not_finite_ends_training(student, tmp_path, monkeypatch):
    """Guards against: weights of NaN that are trained on for hours, and saved over the last good checkpoint."""
    update = train.update

    def fourth_fails(*given):
        sums, norm = update(*given)
        return sums, norm * math.nan if given[-1] == train.learning_rate(3, 9, 1e-3, 1) else norm

    monkeypatch.setattr(train, "update", fourth_fails)
    with pytest.raises(InputError, match="step 4: the gradient is not finite"):
        run_train(student, rows_of(*ROWS), tmp_path / "a", steps=9, save_every=1)
    assert [path.name for path in train.whole_checkpoints(tmp_path / "a.checkpoints")] == ["step-2", "step-3"]
    assert len(read_jsonl(tmp_path / "a.metrics.jsonl")) == 3


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves(data, student, tmp_path, sign, code):
    """Guards against: work lost on a cluster's SIGTERM or on Ctrl-C, or a traceback. Two ranks go on from there."""
    out, flags = tmp_path / "out", ["--steps", "12"]
    process = start(flags_of(student, data, out, *flags))
    log = Path(f"{out}.metrics.jsonl")
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, process)
    process.send_signal(sign)
    text = finish(process, code)
    step = int(re.search(r"stopped, saved at step (\d+); the same command goes on", text)[1])
    assert "Traceback" not in text and 4 <= step < 12
    assert [path.name for path in train.whole_checkpoints(f"{out}.checkpoints")] == [f"step-{step}"]
    if sign == signal.SIGTERM:
        assert f"step-{step}: goes on from there" in finish(start(flags_of(student, data, out, *flags), 2))
        train.main(flags_of(student, data, tmp_path / "whole", *flags))
        assert_same_losses(tmp_path / "whole", out, 1e-4)


def test_what_two_ranks_saved_one_goes_on_from(data, student, tmp_path):
    """The other way round; and torchrun's SIGTERM, which comes to all ranks, lets them save together."""
    out, flags = tmp_path / "out", ["--steps", "30"]
    process = start(flags_of(student, data, out, *flags), 2)
    log = Path(f"{out}.metrics.jsonl")
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, process)
    process.terminate()
    text = "".join(process.communicate(timeout=100))
    assert text.count("stopped, saved at step") == 1 and process.returncode
    train.main(flags_of(student, data, out, *flags))
    train.main(flags_of(student, data, tmp_path / "whole", *flags))
    assert_same_losses(tmp_path / "whole", out, 1e-4)


def test_signals_are_as_they_were_after_training():
    """Guards against: handlers that stay after an error, so that Ctrl-C is ignored from then on."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), train.stop_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [143, 130]
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_leaves_ends_it_without_a_traceback(data, student, tmp_path):
    """Guards against: `train.py | head -1` that ends in a traceback of BrokenPipeError."""
    process = start(flags_of(student, data, tmp_path / "out", "--steps", "2000"))
    assert "solve rows" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=100) == 141 and "Traceback" not in process.stderr.read()
    assert not Path(f"{tmp_path}/out.lock").exists()


@pytest.mark.parametrize("limit,file", [("600", "out.checkpoints/step-4"), ("200", "out")])
def test_no_room_is_one_line_and_a_rerun_goes_on(limit, file, data, student, tmp_path):
    """Guards against: an internal error of torch or safetensors, without a word about the disk, or work lost by it."""
    out, flags = tmp_path / "out", ["--steps", "6", "--save-every", "2" if limit == "200" else "4"]
    if limit == "200":  # its checkpoints have room, its result has none
        process = start(flags_of(student, data, out, *flags))
        wait_for(lambda: (out.parent / "out.checkpoints" / "step-4").exists(), process)
        process.kill()
        process.communicate()
        assert not out.exists()
    text = finish(start(flags_of(student, data, out, *flags), limit=limit), 2)
    assert f"error: {tmp_path / file}: cannot be written (" in text and "File too large" in text
    assert "Traceback" not in text and not out.exists() and not read_json(meta_path(out))["complete"]
    for folder in (out, tmp_path / "whole"):  # with one thread, as before: sums of several end in other digits
        finish(start(flags_of(student, data, folder, *flags)))
    assert_same_losses(tmp_path / "whole", out, 0)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "record.json"])
@pytest.mark.parametrize("content", [b"", b"[]\n"])
def test_a_damaged_checkpoint_is_one_line(name, content, student, tmp_path, capfd):
    """Guards against: a traceback, or weights of which a part is read. Without it the one before is taken."""
    rows, flags = rows_of(*ROWS), {"steps": 4, "save_every": 1}
    weights, _ = run_train(student, rows, tmp_path / "a", **flags)
    newest = tmp_path / "a.checkpoints" / "step-3"
    (newest / name).write_bytes(content)
    capfd.readouterr()
    with pytest.raises(InputError, match="step-3: cannot be read .*; without it, a rerun goes on from the one before"):
        run_train(student, rows, tmp_path / "a", **flags)
    assert "Traceback" not in "".join(capfd.readouterr())
    newest.rename(tmp_path / "damaged")
    again, lines = run_train(student, rows, tmp_path / "a", **flags)
    assert torch.equal(weights, again) and [line["step"] for line in lines] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------
# The command


def test_trained_folder(data, student, tmp_path, capsys, monkeypatch):
    """It learns its rows, transformers loads the result with the same logits, and a second run leaves it alone."""
    out = tmp_path / "trained"
    flags = flags_of(student, data, out, "--steps", "60", "--batch-size", "12", "--validation", "0")
    train.main(flags)
    printed = capsys.readouterr().out
    assert "6 solve rows; dropped: 0 excluded, 0 ungraded, 6 cut off, 0 no answer, 6 wrong, 6 duplicate" in printed
    assert (
        "6 refine rows (0 all wrong, 6 mixed, 0 all right); dropped: 0 excluded, 0 ungraded, 0 cut off, 6 no answer, "
        "6 wrong" in printed
    )
    place = "12 rows to train on, 0 to validate on; 60 of 60 steps on cpu x 1, computing in float32"
    assert f"{out}: {place}\n" in printed
    lines = read_jsonl(f"{out}.metrics.jsonl")
    assert lines[-1]["loss_solve"] < 0.3 * lines[0]["loss_solve"]
    assert lines[-1]["loss_refine"] < 0.3 * lines[0]["loss_refine"]
    meta = read_json(meta_path(out))
    assert meta["complete"] and meta["spent"]["steps"] == 60 and meta["data"]["solve"]["dropped"]["wrong"] == 6
    assert Path(f"{out}.loss.png").stat().st_size > 5000
    assert "loss_refine" in (out / "README.md").read_text() and '"lr": 0.003' in (out / "README.md").read_text()

    model, tokenizer = m.load(out)
    ids = torch.tensor([tokenizer.encode_chat("What is 2 + 2?")[1]])
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(model(ids)), theirs(out)(ids).logits, atol=1e-4, rtol=0)
    before = (out / "model.safetensors").read_bytes()
    train.main(flags)
    assert "trained already" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(InputError, match="exists, and was made with lr"):
        patch.setattr(train, "read_examples", lambda *_: pytest.fail("it read the data first"))
        train.main([*flags, "--lr", "1e-4"])
    assert not Path(f"{out}.lock").exists()
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("tie", [True, False])
def test_export_in_shards(tie, tmp_path):
    """Guards against: an index that names other files than there are, or a tied matrix twice. Oracle: transformers."""
    folder = make_folder(tmp_path / "a", "qwen2", tie_word_embeddings=tie)
    model, _ = m.load(folder)
    parallel.save(model, tmp_path / "b", folder, "card", shard_bytes=50_000)
    shards = sorted(path.name for path in (tmp_path / "b").glob("*.safetensors"))
    index = read_json(tmp_path / "b" / "model.safetensors.index.json")
    assert len(shards) > 3 and sorted(set(index["weight_map"].values())) == shards
    again, _ = m.load(tmp_path / "b")
    parallel.save(model, tmp_path / "c", folder)
    assert hub.fingerprint(tmp_path / "b", torch.float32) == hub.fingerprint(tmp_path / "c", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(model(ids)), theirs(tmp_path / "b")(ids).logits, atol=1e-4, rtol=0)


def test_validation_is_apart(data, student, tmp_path):
    """Both losses of the validation rows are logged, and those rows are not trained. Oracle: the rows one by one."""
    rows = rows_of(*ROWS)
    weights, lines = run_train(student, rows[:4], tmp_path / "a", held=rows[4:], steps=20)
    assert [line["step"] for line in lines if "validation_solve" in line] == list(range(2, 21, 2))
    other, _ = run_train(student, rows[:4], tmp_path / "b", steps=20)
    assert torch.equal(weights, other)
    model, _ = m.load(student)
    with torch.no_grad():
        at = 0
        for parameter in model.parameters():
            parameter.copy_(weights[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()
        solve = losses_of(model, rows[4:5], torch.ones(2))[1][0].item() / 8
    assert lines[-1]["validation_solve"] == pytest.approx(solve, rel=1e-5)


def test_dry_run(data, student, tmp_path, capsys, monkeypatch):
    """It prints what there would be to do, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "problems.jsonl", [{"id": i, **row} for i, row in enumerate(TINY)])
    flags = flags_of(student, data, tmp_path / "out", "--epochs", "3")
    with monkeypatch.context() as patch:
        for name in ("load", "load_sharded"):
            patch.setattr(train, name, lambda *_: pytest.fail("it read weights that it does not need"))
        train.main([*flags, "--dry-run"])
    printed = capsys.readouterr().out
    assert re.search(r"an epoch: 10 rows, [\d,]+ tokens, [\d,]+ of them learned, 2 steps", printed)
    assert "padding 0.0%" in printed and re.search(r"6 steps: about [\d.]+ minutes", printed)
    assert re.search(r"training: 0.1 M weights; about [\d.]+ GiB of the machine's memory for each of 1 proc", printed)
    assert [path.name for path in tmp_path.iterdir()] == ["problems.jsonl"]
    train.main(flags)
    tokens = int(re.search(r"rows, ([\d,]+) tokens", printed)[1].replace(",", ""))
    assert 0.5 * 3 * tokens < read_json(meta_path(tmp_path / "out"))["spent"]["tokens"] <= 1.05 * 3 * tokens
    capsys.readouterr()
    train.main(["--model", "tiny", "--limit", "50", "-k", "2", "--dry-run"])
    printed = capsys.readouterr().out
    assert "once they have run, --dry-run can count them" in printed and not Path("runs").exists()
    expected = r"tiny-train: 50 problems; 200 samples of tiny \(roughly [\d.]+ min.*, 150 of tiny-teacher, .* 120 tok"
    assert re.search(expected, printed)
    own = ["--model", "tiny", "--teacher", "tiny", "--data", "problems.jsonl", "--steps", "1"]
    train.main([*own, "--dry-run"])
    assert ", 16 of tiny, each of" in capsys.readouterr().out  # its own solutions are its candidates
    train.main(own)
    with monkeypatch.context() as patch:
        patch.setattr(train, "fingerprint", lambda *_: pytest.fail("it read weights"))
        train.main([*own, "--dry-run"])
        assert "an epoch: " in capsys.readouterr().out
        changes = {"--limit=5": "limit None, not 5", "--n=3": "n 4, not 3", "--k=2": "k 1, not 2"}
        for more, was in changes.items():
            for flags in (own, [*own, "--dry-run"]):
                with pytest.raises(InputError, match=f"--out runs/tiny/trained was made with {was}; choose another"):
                    train.main([*flags, more])
            train.main([*own, more, "--dry-run", "--out", "runs/tiny/more"])  # beside the same data
            printed = capsys.readouterr().out
            assert f"was made with {was}: give another --out" in printed and "can count them" in printed
        train.main([*own[:2], *own[4:], "--dry-run", "--out", "runs/tiny/more"])  # the default teacher's are missing
        assert "made with model 'tiny', not 'tiny-teacher'" in capsys.readouterr().out


def test_bad_input_gets_a_line_before_any_time_is_spent(data, student, tmp_path, monkeypatch):
    """Guards against: a traceback, or an error after an hour of sampling or training."""
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it trained"))
    monkeypatch.setattr(sample, "main", lambda *_: pytest.fail("it sampled"))
    out = tmp_path / "out"

    def fails(match, *more, files=data):
        with pytest.raises(InputError, match=match) as caught:
            train.main(flags_of(student, files, out, *more))
        assert "\n" not in str(caught.value) and not out.exists()

    fails("--max-length 5000: the context of .* is 1024", "--max-length", "5000")
    fails("--balance", "--balance", "1", "1", "2")
    fails("--shown 3 2", "--shown", "3", "2")
    fails("--exclude .*nothing: no such file", "--exclude", str(tmp_path / "nothing"))
    fails("all of the 6 problems", "--validation", "6")
    fails("--lr 0.0", "--lr", "0")  # not the default
    fails("--weight -1.0", "--weight", "-1")
    fails("--seed -1", "--seed", "-1")
    for file in (tmp_path / "file", Path("/dev/null")):
        with pytest.raises(InputError, match=f"--out {file}: a file or a device"):
            file.write_text("mine")
            train.main(flags_of(student, data, file))
    assert (tmp_path / "file").read_text() == "mine" and Path("/dev/null").is_char_device()
    lines = read_jsonl(data[1])
    for match, bad in (
        ("its answer is not a text but \"\\['4'", {"answer": ["4"]}),
        ("its problem is not a text", {"problem": 7}),
        ("no 'problem'", {"problem": None}),
        ("no candidates with a text", {"candidates": [{"text": None}]}),
        ("its prompt is not a text", {"prompt": 7}),
        ("lacks a text or an order", {"refinements": [{"text": "a", "order": [1.0]}]}),
        ("lacks a text or an order", {"refinements": [{"text": "a", "order": [True]}]}),
        ("lacks a text or an order", {"refinements": [{"text": "a", "order": [0], "prompt": 7}]}),
    ):
        path = write_rows(tmp_path / "x.jsonl", [lines[0], {**lines[1], **bad}])
        with monkeypatch.context() as patch:
            patch.setattr(train, "load", lambda *_: pytest.fail("it read weights first"))
            fails(match, files=(data[0], path))
    for key in ("answer", "refinements", "candidates", "problem"):
        path = write_rows(tmp_path / "x.jsonl", [lines[0], {k: v for k, v in lines[1].items() if k != key}])
        fails(f"line 2: no '{key}'", files=(data[0], path))
    for bad in ([{"text": "a", "order": [0, 7]}], [{"text": "a", "order": [[0]]}], [{"order": [0]}], [7], None):
        path = write_rows(tmp_path / "x.jsonl", [{**lines[0], "refinements": bad}])
        fails("lacks a text or an order", files=(data[0], path))
    monkeypatch.chdir(tmp_path)
    for match, *more in (("--exclude nothing", "--exclude", "nothing"), ("no such folder", "--teacher", "./nothing")):
        with pytest.raises(InputError, match=match):  # here it would sample first
            train.main(["--model", str(student), "--teacher", str(student), *more])
    assert not Path("runs").exists()
    wrong = write_rows(tmp_path / "x.jsonl", [{**line, "answer": "5555"} for line in lines])
    fails("no right solution or refinement", files=(wrong, wrong))

    path = write_rows(tmp_path / "y.refined.jsonl", lines)
    for weights, good in (("0123456789abcdef", False), (hub.fingerprint(student, torch.bfloat16), True)):
        meta_path(path).write_text(json.dumps({"candidates_by": weights}))
        if not good:
            with monkeypatch.context() as patch:
                patch.setattr(train, "read_rows", lambda *_: pytest.fail("it graded"))
                fails("candidates of another model", files=(data[0], path))
    monkeypatch.undo()
    train.main(flags_of(student, (data[0], path), out, "--steps", "2", "--save-every", "1"))

    other = tmp_path / "other"
    Path(f"{out}.checkpoints").rename(f"{other}.checkpoints")  # of a run with other flags
    with pytest.raises(InputError, match="step-1: exists, and was made with lr 0.003, not 0.001"):
        train.main(flags_of(student, (data[0], path), other, "--steps", "2", "--save-every", "1", "--lr", "1e-3"))
    stranger = make_folder(tmp_path / "stranger", "qwen2", seed=9, max_position_embeddings=1024)
    with pytest.raises(InputError, match="step-1: exists, and was made with student"):
        train.main(flags_of(stranger, data, other, "--steps", "2", "--save-every", "1"))


@pytest.mark.parametrize("name", ["", ".partial", ".metrics.jsonl", ".loss.png", ".meta.json"])
def test_what_others_wrote_is_left_alone(name, data, student, tmp_path):
    """Guards against: a folder or file beside --out, of another program, that is deleted or overwritten."""
    theirs = tmp_path / f"out{name}"
    theirs.mkdir() if name in ("", ".partial") else theirs.write_text('{"made": "by hand"}')
    with pytest.raises(InputError, match=f"out{name} is in the way, and not of train.py; choose another --out"):
        train.main(flags_of(student, data, tmp_path / "out"))
    assert theirs.is_dir() or theirs.read_text() == '{"made": "by hand"}'
    assert list(tmp_path.iterdir()) == [theirs]


def test_a_meta_file_that_is_no_object_is_one_line(data, student, tmp_path):
    (tmp_path / "out.meta.json").write_text("[]")
    with pytest.raises(InputError, match="out.meta.json: holds no JSON object"):
        train.main(flags_of(student, data, tmp_path / "out"))


def test_one_command_at_a_time_on_an_output(data, student, tmp_path, monkeypatch):
    """Guards against: two that write one output together, die at a checkpoint and leave half of the losses."""
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("it began"))
    with open(tmp_path / "out.lock", "w+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        print("process 7", end="", file=other, flush=True)
        with pytest.raises(InputError, match="out: in use by process 7"):
            train.main(flags_of(student, data, tmp_path / "out"))


def test_complete_is_said_when_the_folder_is_there(data, student, tmp_path, monkeypatch, capsys):
    """Guards against: a meta file that says complete before there is a result; killed between, a rerun says it."""
    flags, save = flags_of(student, data, tmp_path / "out", "--steps", "2"), train.save

    def killed(*given):
        assert not read_json(meta_path(tmp_path / "out"))["complete"]
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    assert not read_json(meta_path(tmp_path / "out"))["complete"]
    train.main(flags)
    assert "trained already" in capsys.readouterr().out
    meta = read_json(meta_path(tmp_path / "out"))
    assert meta["complete"] and meta["spent"]["steps"] == 2


def test_a_gpu_without_a_number_is_the_process_own(monkeypatch):
    """Guards against: --device cuda, which torch.cuda.set_device refuses, and which is GPU 0 for every process."""
    current = []  # CUDA graphs are recorded on the current device, which has to be the model's
    monkeypatch.setattr(m.torch, "empty", lambda *_, device: None)
    monkeypatch.setattr(m.torch.cuda, "set_device", current.append)
    monkeypatch.setattr(m.torch.cuda, "is_bf16_supported", lambda emulated: not current or current[-1] != "cuda:7")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert hub.pick_device("cuda", "auto") == (torch.device("cuda:3"), torch.bfloat16)
    assert hub.pick_device("cuda:1", "auto")[0].index == 1 and hub.pick_device("cpu", "auto")[1] == torch.float32
    assert hub.pick_device("cuda:7", "auto")[1] == torch.float32  # a GPU before bfloat16
    assert current == ["cuda:3", "cuda:1", "cuda:7"]


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
    made = read_json(folder / "teacher.refined.meta.json")
    assert made["candidates_by"] == hub.fingerprint(random_model, torch.float32)
    assert capsys.readouterr().out.count("python sample.py --model") == 2
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    with pytest.raises(InputError, match="no right solution"):
        train.main(flags)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")} == times
    assert "complete already" in capsys.readouterr().out


def test_a_student_that_is_its_own_teacher(tmp_path, monkeypatch, capsys):
    """Guards against: a second sampling of what is there; data that are not beside the result; a -k that is lost."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "problems.jsonl", [{"id": i, **row} for i, row in enumerate(TINY)])
    flags = ["--teacher", "tiny", "--data", "problems.jsonl", "-n", "2", "-k", "3", "--steps", "1"]
    train.main([*flags, "--out", "x/trained"])
    printed = capsys.readouterr().out
    assert printed.count("python sample.py") == printed.count("python refine.py") == 1
    assert re.search(r"x/train.candidates.jsonl: [1-9]\d* solve rows", printed)
    assert len(read_jsonl("x/teacher.refined.jsonl")[0]["refinements"]) == 3
    record = read_json("x/trained.meta.json")
    assert record["solve"] == "x/train.candidates.jsonl"
    del record["flags"]["k"]  # as an older version wrote it, which had no such flag
    Path("x/trained.meta.json").write_text(json.dumps(record))
    train.main([*flags, "--out", "x/trained"])
    assert "x/trained: trained already" in capsys.readouterr().out


def test_two_processes_make_the_data_and_train(tmp_path):
    """Guards against: the process group of one stage in the way of the next, a rank that reads too soon."""
    rows = [{"id": i, "problem": row["problem"], "answer": row["answer"]} for i, row in enumerate(TINY)]
    write_rows(tmp_path / "problems.jsonl", rows)
    flags = ["--data", str(tmp_path / "problems.jsonl"), "--n", "2", "--steps", "3", "--batch-size", "4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(ROOT / "train.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("python sample.py --model") == 2
    assert len(read_jsonl(tmp_path / "runs" / "tiny" / "trained.metrics.jsonl")) == 3


TINY = read_jsonl(ROOT / "tiny" / "train.jsonl")[:16]


def test_training_on_one_task_alone(data, student, tmp_path, capsys):
    """And, without --steps, a second run finds the first: the steps taken are not the steps asked for."""
    flags = ["--model", str(student), "--solve", data[0], "--out", str(tmp_path / "t"), "--epochs", "1"]
    train.main(flags)
    train.main(flags)
    assert "trained already" in capsys.readouterr().out
    [line] = read_jsonl(tmp_path / "t.metrics.jsonl")
    assert line["loss_refine"] is None and math.isfinite(line["loss_solve"])


# ------------------------------------------------------------------------------------------------
# Rounds


@pytest.fixture(scope="module")
def world(student, tmp_path_factory):
    """Flags for a student, a teacher and problems of its own, in an empty folder."""
    folder = tmp_path_factory.mktemp("world")
    write_rows(folder / "problems.jsonl", [{"id": i, "problem": f"{i}?", "answer": "1"} for i in range(6)])
    teacher = make_folder(folder / "teacher", "qwen2", seed=1, max_position_embeddings=1024)
    # It often stops, and with an answer: what the length limit cuts off and what is wrong is not learned.
    write_tokenizer(teacher, eos_ids=range(2, 60), answer="1")
    flags = ["--model", str(student), "--teacher", str(teacher), "--data", str(folder / "problems.jsonl")]
    flags += ["-n", "2", "-k", "2", "--lr", "3e-3", "--batch-size", "6", "--steps", "5", "--save-every", "2"]
    return [*flags, "--device", "cpu"]


@pytest.fixture(scope="module")
def two_rounds(world, tmp_path_factory):
    """What `--rounds 2` makes: OUT, with all the rest beside it."""
    out = tmp_path_factory.mktemp("two") / "trained"
    train.main([*world, "--rounds", "2", "--out", str(out)])
    return out


def weights_of(out):
    return (out / "model.safetensors").read_bytes()


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_rounds_are_what_two_commands_by_hand_make(world, student, two_rounds, tmp_path, capsys):
    """Guards against: a round on the first student's candidates or weights, with its optimizer, or with a new teacher.

    By hand: training, then sampling, refining and training again from what came out. And a rerun changes nothing.
    """
    by_hand, teacher, first = tmp_path / "trained", world[3], str(tmp_path / "trained.round1")
    train.main([*world, "--out", first])
    names = ("train.round2.candidates.jsonl", "teacher.round2.refined.jsonl", "teacher.candidates.jsonl")
    candidates, refined, solutions = (str(tmp_path / name) for name in names)
    sample.main(["--model", first, "--data", world[5], "-n", "2", "--device", "cpu", "--out", candidates])
    refine.main(["--model", teacher, "--candidates", candidates, "-k", "2", "--device", "cpu", "--out", refined])
    train.main(["--model", first, "--solve", solutions, "--refine", refined, *world[10:], "--out", str(by_hand)])
    rounds = [Path(f"{two_rounds}.round1"), two_rounds]
    for ours, other in zip(rounds, (Path(first), by_hand)):
        assert weights_of(ours) == weights_of(other)
        assert_same_losses(ours, other, 0)
    assert weights_of(rounds[0]) != weights_of(rounds[1])
    folder = two_rounds.parent
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    texts = [
        [[c["text"] for c in row["candidates"]] for row in read_jsonl(folder / f"train{later}.candidates.jsonl")]
        for later in ("", ".round2")
    ]
    assert len(texts[0]) == len(texts[1]) == 6 and texts[0] != texts[1]

    before = [hub.fingerprint(path, torch.float32) for path in (student, rounds[0])]
    sampled = [read_json(folder / f"train{later}.candidates.meta.json")["weights"] for later in ("", ".round2")]
    metas = [read_json(meta_path(out)) for out in rounds]
    assert sampled == before == [meta["student"] for meta in metas]
    assert [meta["model"] for meta in metas] == [str(student), str(rounds[0])]
    assert [(meta["flags"]["round"], meta["flags"]["rounds"]) for meta in metas] == [(1, 2), (2, 2)]
    assert all(meta["complete"] and meta["spent"]["steps"] == 5 for meta in metas)
    assert all(meta["data"][task]["rows"] > 2 for meta in metas for task in ("solve", "refine")), "little to learn from"

    there = content_of(folder)
    capsys.readouterr()
    train.main([*world, "--rounds", "2", "--out", str(two_rounds)])
    printed = capsys.readouterr().out
    assert content_of(folder) == there and printed.count(": trained already") == 2
    assert printed.count(f"python sample.py --model {teacher}") == 1  # its solutions are those of the first round
    assert f"round 2 of 2: {rounds[0]} -> {rounds[1]}" in printed


STOPS = [  # a function, and the call of it before which a run of two rounds is stopped: by its arguments, or its number
    (train, "write_json", lambda path, data: path.name == "trained.round1.meta.json" and data["complete"]),
    (sys.modules["files"], "write_text", lambda path, text: path.name == "train.round2.candidates.jsonl"),
    (refine, "main", lambda flags: flags[-1].endswith("teacher.round2.refined.jsonl")),
    (train, "update", 4),  # of the second round, which has saved its second step
    (train, "save", lambda model, out, *_: out.endswith("trained")),
    (train, "write_json", lambda path, data: path.name == "trained.meta.json" and data["complete"]),
]


def test_rounds_stopped_at_any_moment_end_with_the_same_weights(world, two_rounds, tmp_path, monkeypatch, capsys):
    """Guards against: a round that begins again from the first student, or mixes its data with another round's."""
    out = tmp_path / "trained"
    flags = [*world, "--rounds", "2", "--out", str(out)]
    for module, name, stop in STOPS:
        real, calls = getattr(module, name), []

        def stopped(*given, real=real, calls=calls, stop=stop):
            calls.append(given)
            if len(calls) == stop or callable(stop) and stop(*given):
                raise KeyboardInterrupt
            return real(*given)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, stopped)
            train.main(flags)
        for locked in list(LOCKS):  # as when the process ends
            unlock(locked)
    assert f"{out}.checkpoints/step-2: goes on from there" in capsys.readouterr().out
    train.main(flags)
    for end in ("", ".round1"):
        assert weights_of(Path(f"{out}{end}")) == weights_of(Path(f"{two_rounds}{end}"))
        assert_same_losses(f"{out}{end}", f"{two_rounds}{end}", 0)
        assert read_json(meta_path(f"{out}{end}"))["complete"]
    names = [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path, two_rounds.parent)]
    assert names[0] == names[1]


def test_a_round_leaves_the_device_to_the_next(world, tmp_path, monkeypatch):
    """Guards against: weights, gradients and moments that stay while the next round samples, and so twice of them."""
    trained, sampled, real = [], [], (train.train, sample.main)

    def keep(*given):
        model, spent = real[0](*given)
        trained.append(weakref.ref(model))
        return model, spent

    def look(flags):
        sampled.append([ref() is None for ref in trained])
        return real[1](flags)

    monkeypatch.setattr(train, "train", keep)
    monkeypatch.setattr(sample, "main", look)
    gc.disable()  # it may come by itself, but not because a GPU is full
    try:
        train.main([*world, "--rounds", "3", "--checkpointing", "--steps", "1", "--out", str(tmp_path / "trained")])
    finally:
        gc.enable()
    assert sampled == [[], [], [True], [True, True]]


def test_rounds_of_a_student_that_is_its_own_teacher(world, tmp_path, capsys):
    """Guards against: the first student as the teacher of the later ones, or its solutions beside their refinements."""
    out, teacher = tmp_path / "trained", world[3]
    train.main(["--model", teacher, *world[2:], "--rounds", "2", "--out", str(out)])
    first, weights = f"{out}.round1", hub.fingerprint(Path(f"{out}.round1"), torch.float32)
    meta = read_json(meta_path(out))
    assert meta["model"] == meta["flags"]["teacher"] == first
    assert meta["solve"] == str(tmp_path / "train.round2.candidates.jsonl") and meta["data"]["solve"]["rows"]
    assert meta["refine"] == str(tmp_path / "teacher.round2.refined.jsonl")
    assert read_json(meta_path(meta["solve"]))["weights"] == read_json(meta_path(meta["refine"]))["weights"] == weights
    assert not (tmp_path / "teacher.candidates.jsonl").exists()
    assert capsys.readouterr().out.count("python sample.py") == 2


def test_another_number_of_rounds_is_a_line(world, two_rounds, tmp_path, monkeypatch, capsys):
    """Guards against: a result of the second round that passes for one of the third, after hours; rounds of no data."""
    for stage in (sample, refine):
        monkeypatch.setattr(stage, "main", lambda *_: pytest.fail("it made data first"))
    there, out = content_of(two_rounds.parent), tmp_path / "trained"

    def fails(match, *more, out=two_rounds):
        for flags in ([*world, *more], [*world, *more, "--dry-run"]):
            with pytest.raises(InputError, match=match) as caught:
                train.main([*flags, "--out", str(out)])
            assert "\n" not in str(caught.value)

    fails("trained was made with round 2, not 3; choose another --out", "--rounds", "3")
    fails("trained was made with round 2, not 1; choose another --out")
    fails("round1 was made with limit None, not 5; choose another --out", "--rounds", "2", "--limit", "5")
    meta = read_json(meta_path(two_rounds))
    meta_path(out).write_text(json.dumps({**meta, "complete": False}))  # of a run that was killed
    fails("trained was made with round 2, not 3", "--rounds", "3", out=out)
    del meta["flags"]["round"], meta["flags"]["rounds"]  # of a version that had no rounds
    meta_path(out).write_text(json.dumps(meta))
    fails("trained was made with round 1, not 2", "--rounds", "2", out=out)
    fails("--rounds 0: must be at least 1", "--rounds", "0")
    for name in ("--solve", "--refine"):
        fails("--rounds 2: each round makes its data", "--rounds", "2", name, "file.jsonl")
    assert content_of(two_rounds.parent) == there

    train.main([*world, "--rounds", "3", "--dry-run", "--out", str(tmp_path / "new")])
    assert "the first of 3 rounds, which take about 3 times as long in all\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [meta_path(out)]


def test_two_processes_go_through_the_rounds_together(tmp_path):
    """Guards against: a process group or a mesh of one round in the way of the next, a rank that reads too soon."""
    rows = [{"id": i, "problem": row["problem"], "answer": row["answer"]} for i, row in enumerate(TINY)]
    write_rows(tmp_path / "problems.jsonl", rows)
    flags = ["--data", str(tmp_path / "problems.jsonl"), "-n", "2", "--steps", "3", "--batch-size", "4"]
    out = tmp_path / "trained"
    printed = finish(start([*flags, "--rounds", "2", "--out", str(out)], 2))
    assert printed.count("python sample.py --model") == 3 and printed.count(f"round 2 of 2: {out}.round1 ->") == 1
    for result in (f"{out}.round1", out):
        assert read_json(meta_path(result))["complete"] and len(read_jsonl(f"{result}.metrics.jsonl")) == 3
    assert read_json(meta_path(out))["student"] == hub.fingerprint(Path(f"{out}.round1"), torch.float32)


# ------------------------------------------------------------------------------------------------
# The real model


def real_rows(problem_files, folder, n):
    """Solve and refine files of n SVAMP problems, with answers of a few words."""
    solve, refined = [], []
    for row in read_jsonl(problem_files / "svamp.jsonl")[:n]:
        right, wrong = completion(f"The answer is \\boxed{{{row['answer']}}}."), completion("It is \\boxed{-1}.")
        solve.append({**row, "candidates": [right, wrong]})
        refined.append({**row, "candidates": [right, wrong], "refinements": [{**right, "order": [1, 0]}]})
    return write_rows(folder / "s.jsonl", solve), write_rows(folder / "r.jsonl", refined)


def test_real_model_overfits(real_model, problem_files, tmp_path):
    """Both tasks of 4 SVAMP problems, 8 rows, are learned by heart: below 0.01; transformers agrees on the result."""
    files = real_rows(problem_files, tmp_path, 4)
    flags = ["--batch-size", "8", "--steps", "13", "--lr", "3e-4", "--validation", "0", "--device", "cpu"]
    flags = ["--model", real_model, "--solve", files[0], "--refine", files[1], *flags]
    train.main([*flags, "--out", str(tmp_path / "t")])
    lines = read_jsonl(tmp_path / "t.metrics.jsonl")
    assert lines[-1]["loss_solve"] < 0.01 and lines[-1]["loss_refine"] < 0.01 < lines[0]["loss_solve"]
    model, tokenizer = m.load(tmp_path / "t")
    ids = torch.tensor([tokenizer.encode_chat("What is 2 + 2?")[1]])
    with torch.no_grad():
        ours, reference = model.lm_head(model(ids)), theirs(tmp_path / "t")(ids).logits
    # Rounding: logits of up to 30 have been seen to differ by 1.3e-4, a hundred of two million.
    torch.testing.assert_close(ours, reference, atol=5e-4, rtol=0)
