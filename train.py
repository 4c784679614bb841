"""Generative Self-Refinement: train one model jointly to solve and to refine.

    python train.py                                          the built-in tiny model, minutes on a CPU
    python train.py --model qwen-1.5b                        a real one, on the GPU
    torchrun --nproc-per-node=8 train.py --model qwen-7b     on eight GPUs
    python train.py --model path/to/folder --solve s.candidates.jsonl --refine r.refined.jsonl --out trained

The third stage. Small models refine badly when merely prompted. So two kinds of examples are taken from
a larger teacher, and the student learns both at once:

    solve     problem                -> a solution of the teacher's
    refine    problem + candidates   -> the teacher's refinement of *these* candidates, which the student made

The candidates are the student's own because its own mistakes are what it will have to refine. A completion
with a wrong answer is dropped, and so is one of a problem whose right answer is missing. The loss is

    L = L_solve + weight * L_refine

where each L is the mean cross-entropy over that task's completion tokens in the step, the stop token
included: one mean over both would be dominated by the task with the longer completions. Seed, epoch and
number of the step fix its rows; each mean is over all of them, however many packs and processes there are:

    rows of a step       solve 210 | refine 1,130 | refine 870 | solve 180 | ...
    pack 0, process 0    [refine 1,130 | solve 210 | ...]      the rows of a pack are concatenated, without padding;
    pack 1, process 1    [refine 870 | solve 180 | ...]        attention stays within each of them

Without --solve and --refine the commands that are printed first make what is missing under runs/MODEL/: the
student's candidates, the teacher's solutions and its refinements. With --rounds R it trains R times, to OUT.round1,
OUT.round2, ... and OUT: each round samples the candidates anew from the result of the one before, so that the student
learns from the mistakes it makes now, and begins with a new optimizer, a warm-up and all of the steps. Beside a
result are OUT.metrics.jsonl, OUT.loss.png, OUT.meta.json and OUT.checkpoints/step-N. Random numbers depend on seed,
epoch and id alone: a run that was killed and started again goes on from its newest checkpoint, to the same weights.
Weights are float32: one GPU computes with a bfloat16 copy, several keep a part of them each (see parallel.py).
Left out: dropout, LoRA, packs that all have the same length, tensor and pipeline parallelism in training.
"""

import files  # isort: skip  first, so that Ctrl-C while torch is imported is one line
import argparse
import contextlib
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import parallel
import refine
import sample
from figures import draw_losses
from files import FIRST, InputError, check_same, command_line, disk_errors, meta_path, read_json, write_json
from grade import Grader, answer_of, gold_answer
from hub import ALIASES, find_model, fingerprint, pick_device, processes, versions
from model import SamplingParams, Tokenizer, attend_causal, load, read_config, uniforms, use_varlen, varlen_attn
from parallel import check_fits, load_sharded, reason, save, sync, wait, writing

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # in a checkpoint of one process
TASKS, KINDS = ("solve", "refine"), ("all wrong", "mixed", "all right")  # KINDS: of a refine row's candidates
RECORD = {"step": int, "tokens": int, "seconds": float}  # what a checkpoint says of the run so far
CHUNK = 2**26  # logits at a time in the loss: 256 MiB in float32
# "Candidate 2 is right", "the last candidate", "the first two": true only of the order in the teacher's own prompt.
ORDINALS = "first|second|third|fourth|fifth|sixth|seventh|eighth|last"
BEFORE, AFTER = rf"\b({ORDINALS}) (two |three )?", rf"s?\W{{1,4}}(\d|(one|two|three|four|{ORDINALS})\b)"
NAMED = re.compile(rf"\b(candidate|solution){AFTER}|{BEFORE}(candidate|solution)", re.IGNORECASE)
Process = namedtuple("Process", "device dtype rank world")  # its device and number type; its rank, of `world`
SETTINGS = ("weight", "lr", "epochs", "steps", "batch_size", "max_length", "shown", "seed")  # flags that fix a result
DATA_SETTINGS = ("teacher", "data", "limit", "n", "k", "max_new_tokens")  # flags that fix the data that are made
# Why a completion is not learned from; "ungraded": its problem has no right answer to compare with.
REASONS = ("excluded", "ungraded", "cut off", "no answer", "wrong", "duplicate", "too long", "unbalanced")


@dataclass
class Row:
    """One training example."""
    task: int  # index in TASKS
    prompt: list  # token ids without a loss; those of a refine row show the candidates that the teacher saw
    completion: list  # token ids with a loss, the stop id last
    problem: dict = None  # from the line of the file: id, problem, prompt and, for a refine row, candidates
    number: int = 0  # which of its problem's completions
    order: list = None  # refine row: the candidates that the teacher saw; None if no other order may be shown
    kind: int = None  # refine row: index in KINDS


# --------------------------------------------------------------------------------------------------- From files to rows
def data_files(args):
    """(solve file, refine file), None for one that is not there. Both are made, but for a dry run, if none is given."""
    if args.solve or args.refine:
        return args.solve, args.refine
    later = f".round{args.round}" if args.round > 1 else ""
    names = (f"train{later}.candidates.jsonl", "teacher.candidates.jsonl", f"teacher{later}.refined.jsonl")
    candidates, solutions, refinements = (str(Path(args.out).with_name(name)) for name in names)
    common = {"seed": args.seed, "device": args.device, "max_new_tokens": args.max_new_tokens}
    problems, share = {"data": args.data, "limit": args.limit}, args.tensor_parallel
    teacher = {"model": args.teacher, **common, "tensor_parallel": share if share > 1 else None}
    stages = [(sample, {"model": args.model, **common, **problems, "n": args.n, "out": candidates})]
    if args.teacher == args.model:
        solutions = candidates  # its own right ones
    elif args.round == 1:  # the teacher does not change, and so neither do its solutions
        stages.append((sample, {**teacher, **problems, "n": 1, "out": solutions}))
    stages.append((refine, {**teacher, "candidates": candidates, "k": args.k, "out": refinements}))
    for stage, settings in stages:
        given = {name.replace("_", "-"): str(value) for name, value in settings.items() if value is not None}
        flags = [word for name, value in given.items() for word in ("-" * min(2, len(name)) + name, value)]
        if FIRST:
            start = f"torchrun --nproc-per-node={share}" if settings.get("tensor_parallel") else "python"
            print(f"{start} {Path(stage.__file__).name} {shlex.join(flags)}", flush=True)
        if not args.dry_run:
            stage.main(flags)
    if not args.dry_run:
        return solutions, refinements
    made = [(x["out"], {name: x[name] for name in ("model", *DATA_SETTINGS) if name in x}) for _, x in stages]
    other = next(filter(None, (made_otherwise(path, now) for path, now in made)), None)
    if other:
        print(f"{other}: give another --out, or go on with more problems")
    return (solutions, refinements) if not other and all(Path(path).exists() for path, _ in made) else (None, None)


def made_otherwise(path, now):
    """Where the record beside a file names other flags than `now` {name: value}, which -> a text, or None."""
    old = read_json(meta_path(path)).get("flags") if meta_path(path).exists() else None
    old = {"round": 1, **old} if isinstance(old, dict) else {}  # an older version's lacks what that did not have
    differ = [name for name, value in now.items() if name in old and old[name] != value]
    return f"{path} was made with {differ[0]} {old[differ[0]]!r}, not {now[differ[0]]!r}" if differ else None


def read_examples(path, task):
    """The lines of a candidates file (task 0) or a refined file (task 1), checked."""
    lines = refine.read_candidates(path, "answer", *["refinements"][:task])
    for line in lines if task else []:
        line["candidates"] = (line.get("rounds") or [line["candidates"]])[-1]  # what the last round was made from
        n, found = len(line["candidates"]), line["refinements"]
        for x in found if isinstance(found, list) else [None]:
            good = isinstance(x, dict) and isinstance(x.get("order"), list) and isinstance(x.get("prompt") or "", str)
            if not (good and isinstance(x.get("text"), str) and all(type(i) is int and 0 <= i < n for i in x["order"])):
                raise InputError(f"{path}, id {line['id']!r}: a refinement lacks a text or an order of its candidates")
    return lines


def make_rows(lines, task, tokenizer, overlaps, args):
    """The rows that lines of a file give to a task -> (rows, how many completions were dropped for each of REASONS)."""
    rows, dropped, grader = [], dict.fromkeys(REASONS, 0), Grader()
    for line in lines:
        problem = {"id": line["id"], "problem": line["problem"], "prompt": line.get("prompt") or ""}
        gold, excluded, texts = gold_answer(line["answer"]), overlaps(line["problem"]), set()
        if task:
            problem["candidates"] = line["candidates"]
            answers = (answer_of(x, refine.prompt_of(line, i)) for i, x in enumerate(line["candidates"]))
            right = [grader.equal(gold, answer) for answer in answers]
        for number, completion in enumerate(line["refinements" if task else "candidates"]):
            answer = answer_of(completion, (completion.get("prompt") or "") if task else problem["prompt"])
            cut, wrong = completion.get("finish_reason") == "length", not grader.equal(gold, answer)
            checks = {"excluded": excluded, "ungraded": gold is None, "cut off": cut}
            checks |= {"no answer": wrong and answer is None, "wrong": wrong, "duplicate": completion["text"] in texts}
            if not any(checks.values()):
                texts.add(completion["text"])
                row = make_row(task, problem, number, completion, tokenizer, args.max_length)
                checks["too long"] = row is None
                if row and task:
                    shown = [right[i] for i in completion["order"]]
                    row.kind = 0 if not any(shown) else 2 if all(shown) else 1
                    draw = uniforms((args.seed, str(line["id"]), "balance", number), 1)[0]
                    checks["unbalanced"] = draw >= args.balance[row.kind]
            if why := next((name for name, bad in checks.items() if bad), None):
                dropped[why] += 1
            else:
                rows.append(row)
    grader.close()
    return rows, dropped


def make_row(task, problem, number, completion, tokenizer, max_length):
    """A Row, or None where prompt and completion together have more than `max_length` tokens."""
    ids, order = tokenizer.encode_completion(completion["text"]), None
    try:
        if task:
            prompt = refine.refinement_prompt(problem, completion["order"], tokenizer, max_length, len(ids))[1]
            order = None if NAMED.search(completion["text"]) else completion["order"]
        else:
            prompt = tokenizer.encode_chat(sample.SOLVE_PROMPT.format(problem=problem["problem"]))[1]
    except InputError:
        return None
    return Row(task, prompt, ids, problem, number, order) if len(prompt) + len(ids) <= max_length else None


def shown_anew(row, epoch, tokenizer, args):
    """A refine row with the candidates that this epoch shows: as many as --shown says, in an order of its own."""
    # With one order for all epochs the model would learn at which place the right candidate stands. To show fewer than
    # the teacher saw hides where its steps came from: a tiny model with 2 to 4 of 4 got half as many refinements right.
    if row.order is None:
        return row
    u = uniforms((args.seed, str(row.problem["id"]), "shown", row.number, epoch), len(row.order) + 1)
    low, high = (min(n or len(row.order), len(row.order)) for n in args.shown)
    order = [row.order[i] for i in np.argsort(u[1:], kind="stable")[: low + int(u[0] * (high - low + 1))]]
    try:
        fitting = refine.refinement_prompt(row.problem, order, tokenizer, args.max_length, len(row.completion))
        return replace(row, prompt=fitting[1])
    except InputError:  # another order may have a few more tokens, and a row that just fitted does not fit then
        return row


def overlap_test(names):
    """Problem files -> a function that says whether a problem's text is one of theirs, or shares 8 words in a row."""
    def grams(text):
        words = re.findall(r"\w+", text.lower())
        return {" ".join(text.lower().split()), *(tuple(words[i : i + 8]) for i in range(len(words) - 7))}
    try:
        seen = {gram for name in names for row in sample.load_problems(name) for gram in grams(row["problem"])}
    except InputError as e:
        raise InputError(str(e).replace("--data", "--exclude", 1))
    return lambda text: bool(seen) and not seen.isdisjoint(grams(text))


def split(rows, validation, seed):
    """Rows -> (those to train on, those to validate on). All rows with the same problem text go together."""
    key = {id(row): " ".join(row.problem["problem"].split()) for row in rows}
    texts = sorted(set(key.values()), key=lambda text: uniforms((seed, text, "validation"), 1)[0])
    n = round(validation * len(texts)) if validation < 1 else int(validation)
    if rows and n >= len(texts):
        raise InputError(f"--validation {validation}: all of the {len(texts)} problems; leave some to train on")
    held = set(texts[:n])
    return [r for r in rows if key[id(r)] not in held], [r for r in rows if key[id(r)] in held]


def read_rows(paths, tokenizer, overlaps, args):
    """The files of both tasks -> (rows to train on, rows to validate on, what was found in each file)."""
    examples = [read_examples(path, task) if path else [] for task, path in enumerate(paths)]
    rows, counts = [], []
    for task, (path, lines) in enumerate(zip(paths, examples)):
        made, dropped = make_rows(lines, task, tokenizer, overlaps, args) if path else ([], {})
        kinds = {kind: sum(row.kind == i for row in made) for i, kind in enumerate(KINDS)} if task else {}
        counts.append({"rows": len(made), **kinds, "dropped": dropped})
        if path:
            found, lost = (", ".join(f"{n} {name}" for name, n in x.items()) for x in (kinds, dropped))
            print(f"{path}: {len(made)} {TASKS[task]} rows{f' ({found})' if task else ''}; dropped: {lost}")
        rows += made
    if not rows:
        raise InputError(f"{' '.join(filter(None, paths))}: no right solution or refinement to learn from")
    return *split(rows, args.validation, args.seed), counts


# --------------------------------------------------------------------------------------------------- From rows to packs
def epoch_of(rows, batch_size, seed, epoch):
    """One epoch as a list of steps, each a list of about `batch_size` Rows with its share of both tasks."""
    rng = np.random.default_rng([seed, epoch])
    steps = [[] for _ in range(max(1, round(len(rows) / batch_size)))]
    for task in range(len(TASKS)):
        of_task = [row for row in rows if row.task == task]
        parts = np.array_split(rng.permutation(len(of_task)), max(1, min(len(steps), len(of_task))))
        for place, part in enumerate(parts):  # fewer rows than steps are spread over the epoch
            steps[place * len(steps) // len(parts)] += [of_task[i] for i in part]
    return [step for step in steps if step]


def length_of(row):
    """Tokens that a row takes in a pack: all but its last one, which is predicted but is no input."""
    return len(row.prompt) + len(row.completion) - 1


def packs_of(rows, room, world):
    """Rows -> packs (lists of Rows) of at most `room` tokens and of nearly the same length, longest first.

    Processes compute a pack each and wait for the slowest, so the number of packs is a multiple of `world`, the
    number of processes. Each row, longest first, goes to the emptiest pack; if one overflows, again with more packs.
    """
    rows = sorted(rows, key=length_of, reverse=True)
    for n in itertools.count(-(-sum(map(length_of, rows)) // (room * world)) * world, world):
        packs, filled = [[] for _ in range(n)], [0] * n
        for row in rows:
            emptiest = filled.index(min(filled))
            packs[emptiest].append(row)
            filled[emptiest] += length_of(row)
        if max(filled) <= room:
            return sorted(packs, key=lambda pack: sum(map(length_of, pack)), reverse=True)


def padding(steps, world):
    """The share of padding: idle tokens of the processes that wait while the longest pack of a round is computed."""
    lengths = [[sum(map(length_of, pack)) for pack in packs] for packs in steps]
    longest = sum(world * max(step[i : i + world]) for step in lengths for i in range(0, len(step), world))
    return (longest - sum(map(sum, lengths))) / max(1, longest)


def learned_tokens(rows):
    """[solve, refine], the number of tokens that the rows of each task train."""
    return [sum(len(row.completion) for row in rows if row.task == task) for task in range(len(TASKS))]


# ------------------------------------------------------------------------------------------------- From packs to losses
@dataclass
class Pack:
    """Rows one after another, as tensors on the device: T tokens, of which M have a loss."""
    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], from 0 in each row
    ends: torch.Tensor  # [rows + 1] int32, where each row ends, after a 0
    learned: torch.Tensor  # [M], which tokens have a loss
    labels: torch.Tensor  # [M], the tokens after them
    tasks: torch.Tensor  # [M], of which task
    lengths: list  # of the rows, in tokens


def load_pack(rows, device):
    """Rows -> a Pack. The copies to a GPU do not make the host wait, nor the GPU."""
    # A process without a row computes one token, without a loss: with FSDP all of them exchange weights and gradients.
    lengths = [length_of(row) for row in rows] or [1]
    ends = [0, *itertools.accumulate(lengths)]
    ids = [i for row in rows for i in (row.prompt + row.completion)[:-1]] or [0]
    positions = [i for n in lengths for i in range(n)]
    # Position i predicts token i + 1: a completion is learned from the last token of its prompt on.
    learned = [i for end, row in zip(ends[1:], rows) for i in range(end - len(row.completion), end)]
    labels, tasks = [i for row in rows for i in row.completion], [row.task for row in rows for _ in row.completion]
    parts = [torch.tensor(part, dtype=torch.long) for part in (ids, positions, learned, labels, tasks)]
    parts.insert(2, torch.tensor(ends, dtype=torch.int32))
    if device.type == "cuda":
        parts = [part.pin_memory().to(device, non_blocking=True) for part in parts]
    return Pack(*parts, lengths)


def attention_within(pack):
    """Attention, qkv [T, H + 2K, D] -> [T, H, D], within each of a pack's rows; no mask [T, T] is needed."""

    def attend(attention, qkv):
        if use_varlen(qkv.device, qkv.dtype, qkv.shape[-1]):
            q, k, v = qkv.split(attention.heads, dim=1)
            longest, back = max(pack.lengths), (-1 if attention.window is None else attention.window - 1, 0)
            ends = pack.ends, pack.ends, longest, longest
            return varlen_attn(q, k, v, *ends, window_size=back, enable_gqa=True)
        return torch.cat([attend_causal(attention, row[None])[0] for row in qkv.split(pack.lengths)])

    return attend


def task_losses(model, pack, scale):
    """A Pack, the weight of a token of each task [2] -> (loss, the sum of cross-entropies of each task [2])."""
    hidden = model(pack.ids, pack.positions, attention_within(pack))  # [T, C]
    hidden = hidden.index_select(0, pack.learned)  # [M, C]
    # All logits [M, V] would be larger than the model: a chunk of positions at a time, and again for the gradient.
    # Losses come in the number type of `hidden`: one of bfloat16 has 8 bits, the mean over many tokens more.
    weight = model.lm_head.weight
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, CHUNK // len(weight)))
    losses = F.linear_cross_entropy(hidden, weight, pack.labels, reduction="none", options=options).float()  # [M]
    sums = torch.zeros_like(scale).index_add(0, pack.tasks, losses.detach())
    return losses.dot(scale[pack.tasks]), sums


# ----------------------------------------------------------------------------- Weights on many devices, and checkpoints
def prepare(model, process, checkpointing):
    """Get a loaded model ready for training -> {name: weight}, all of them float32.

    One process computes with a copy of the weights in its number type; the gradients of its packs are summed in
    float32. Several keep a part of every weight each, and FSDP does the same for them.
    """
    for block in model.model.layers if checkpointing or process.device.type != "cpu" else ():
        # The activation is most of what a layer would keep for its gradient, and quickly computed again on a GPU.
        part, name = (block, "forward") if checkpointing else (block.mlp, "down")
        again = functools.partial(checkpoint, getattr(part, name), use_reentrant=False, preserve_rng_state=False)
        setattr(part, name, again)
    weights = dict(model.named_parameters())
    if process.world == 1 and process.dtype != torch.float32:
        for name, copy in weights.items():
            weights[name] = master = copy.detach()
            copy.data = master.to(process.dtype)
            copy.register_post_accumulate_grad_hook(functools.partial(add_gradient, master))
    return weights


def add_gradient(master, copy):
    """A backward pass has given a weight's copy its gradient: it goes to the weight's own, in float32."""
    master.grad = copy.grad.to(master.dtype) if master.grad is None else master.grad.add_(copy.grad)
    copy.grad = None


def copy_weights(model, weights):
    """The model computes with the weights as they are now."""
    for copy, master in zip(model.parameters(), weights.values()):
        if copy is not master:
            copy.data.copy_(master)


def start_optimizer(weights, lr):
    """AdamW with all of its state there already, as a checkpoint is read into it."""
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for weight in weights.values():
        moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        optimizer.state[weight] = {"step": torch.zeros((), device=weight.device), **moments}
    return optimizer


def tensors(weights, optimizer):
    """The tensors of a checkpoint: each weight with its moments, under its name."""
    moments = {x: {key: optimizer.state[x][key] for key in ("exp_avg", "exp_avg_sq")} for x in weights.values()}
    return {name: {"weight": x.detach(), **moments[x]} for name, x in weights.items()}


def whole_checkpoints(folder):
    """The checkpoints in a folder, oldest first. One that is being written or deleted has another name."""
    found = (path for path in Path(folder).glob("step-*") if path.name[5:].isdigit())
    return sorted(found, key=lambda path: int(path.name[5:]))


def save_checkpoint(folder, state, record, keep, rank):
    """Write `state`, the tensors, and `record` to folder/step-STEP, which gets its name when all of it is on disk."""
    partial, final = folder / f"step-{record['step']}.partial", folder / f"step-{record['step']}"
    with writing(final):
        if rank == 0:
            for path in folder.glob("step-*.partial"):  # of a run that was killed, or found no room
                shutil.rmtree(path)
            partial.mkdir(parents=True)
        wait()
        dcp.save(state, checkpoint_id=partial)  # its files are synced
        if rank == 0:
            write_json(partial / "record.json", record)
            sync(partial)
            os.rename(partial, final)
            sync(folder)
            for old in whole_checkpoints(folder)[:-keep]:
                os.rename(old, f"{old}.partial")
                shutil.rmtree(f"{old}.partial")
    wait()


def total(tensor, operation=dist.ReduceOp.SUM):
    """The sum, or another operation, of each element over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


# ------------------------------------------------------------------------------------------------------------- Training
def learning_rate(step, n_steps, peak, warmup):
    """Linear warm-up to `peak`, then half a cosine down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def update(model, weights, optimizer, packs, scale, lr):
    """One optimizer step on this process's packs -> (the sum of cross-entropies of each task [2], gradient norm)."""
    sums = torch.zeros_like(scale)
    for pack in packs:
        loss, losses = task_losses(model, pack, scale)
        loss.backward()
        sums += losses
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    copy_weights(model, weights)
    return sums, norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def validate(model, rows, room, process):
    """The mean cross-entropy over the learned tokens of each task of the validation rows, None without any."""
    sums = torch.zeros(len(TASKS), device=process.device)
    with torch.no_grad():
        for pack in packs_of(rows, room, process.world)[process.rank :: process.world]:
            sums += task_losses(model, load_pack(pack, process.device), sums)[1]
    if process.world > 1:
        model.reshard()  # without a backward pass FSDP would leave what it has gathered, in its place
    return [s / c if c else None for s, c in zip(total(sums).tolist(), learned_tokens(rows))]


def steps_ahead(rows, first, n_steps, tokenizer, args, process):
    """(number, rows, padding, this process's Packs) of each step from `first` on. A thread prepares the next one."""
    per_epoch = len(epoch_of(rows, args.batch_size, args.seed, 0))

    def packs_of_step(number):
        epoch, i = divmod(number, per_epoch)
        step = [shown_anew(row, epoch, tokenizer, args) for row in epoch_of(rows, args.batch_size, args.seed, epoch)[i]]
        packs = packs_of(step, args.max_length, process.world)
        mine = [load_pack(pack, process.device) for pack in packs[process.rank :: process.world]]
        return step, padding([packs], process.world), mine

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(packs_of_step, first)
        for number in range(first, n_steps):
            now, coming = coming.result(), pool.submit(packs_of_step, number + 1)
            yield number, *now


@contextlib.contextmanager
def stop_signals():
    """SIGINT and SIGTERM do not end the process but add its exit code, 130 or 143, to the list that this gives."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: caught.append(128 + number)) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def resume(source, log_path, folder, args, process):
    """Get ready to train on from the newest checkpoint, with the log cut back to it.

    -> model, weights, optimizer, record
    """
    model = load_sharded(source, *process) if process.world > 1 else load(source, process.device)[0]
    weights = prepare(model, process, args.checkpointing)
    optimizer, record = start_optimizer(weights, args.lr), {"step": 0, "tokens": 0, "seconds": 0.0}
    found = whole_checkpoints(folder)[-1:]
    for path in found:
        try:
            record = {key: kind(read_json(path / "record.json")[key]) for key, kind in RECORD.items()}
            dcp.FileSystemReader(path).read_metadata()  # where this fails, dcp.load would print a traceback
            dcp.load(tensors(weights, optimizer), checkpoint_id=path)  # in place
        except (Exception, dcp.api.CheckpointException) as e:
            raise InputError(f"{path}: cannot be read ({reason(e)}); without it, a rerun goes on from the one before")
    for state in optimizer.state.values():
        state["step"].fill_(record["step"])
    copy_weights(model, weights)
    if process.rank == 0:
        print(f"{found[0]}: goes on from there\n" if found else "", end="")
        lines = files.whole_lines(log_path)[0] if found and log_path.exists() else []
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= record["step"]]
        files.write_text(log_path, "".join(kept))
    wait()
    return model, weights, optimizer, record


def train(tokenizer, rows, held, args, process, made_by):
    """Train the model of the tokenizer's folder, or its newest checkpoint -> (model, what was spent).

    `held` are the rows to validate on.
    """
    folder, log_path = Path(f"{args.out}.checkpoints"), Path(f"{args.out}.metrics.jsonl")
    device, _, rank, world = process
    model, weights, optimizer, before = resume(tokenizer.folder, log_path, folder, args, process)
    first, tokens = before["step"], before["tokens"]
    n_steps = args.steps or args.epochs * len(epoch_of(rows, args.batch_size, args.seed, 0))
    if rank == 0:
        todo = f"{n_steps - first} of {n_steps} steps on {device} x {world}, computing in {str(process.dtype)[6:]}"
        print(f"{args.out}: {len(rows)} rows to train on, {len(held)} to validate on; {todo}", flush=True)
    peak = parallel.peak(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # not that of the stages that made the data
    weight, work, started = torch.tensor([1.0, args.weight], device=device), 0, time.time()
    bar = tqdm(desc="train", unit=" steps", initial=first, total=n_steps, disable=rank > 0)
    with bar, stop_signals() as caught:
        for number, step, idle, packs in steps_ahead(rows, first, n_steps, tokenizer, args, process):
            done = number + 1
            counts, lengths = learned_tokens(step), [length_of(row) for row in step]
            # FSDP takes the mean of the gradients over the processes; ours is a sum.
            scale = weight * world / torch.tensor(counts, device=device).clamp(min=1)  # [2]
            lr = learning_rate(number, n_steps, args.lr, max(1, n_steps // 20))
            sums, norm = update(model, weights, optimizer, packs, scale, lr)
            if not math.isfinite(norm):
                raise InputError(f"step {done}: the gradient is not finite; lower --lr and choose another --out")
            solve, refined = (s / c if c else None for s, c in zip(total(sums).tolist(), counts))
            tokens, now = tokens + sum(lengths), time.time() - started
            work += parallel.flops(model.config, sum(lengths), sum(counts), sum(n * n for n in lengths))
            line = {"step": done, "loss_solve": solve, "loss_refine": refined, "lr": lr, "grad_norm": norm.item()}
            line |= {"padding": idle, "tokens": tokens, "seconds": round(before["seconds"] + now, 2)}
            if held and (done == n_steps or done % max(1, n_steps // 10) == 0):
                found = validate(model, held, args.max_length, process)
                line |= {f"validation_{name}": mean for name, mean in zip(TASKS, found)}
            with disk_errors(log_path), open(log_path if rank == 0 else os.devnull, "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            shown = [f"{name} {mean:.3f}" for name, mean in zip(TASKS, (solve, refined)) if mean is not None]
            shown += [f"{(tokens - before['tokens']) / now:,.0f} tokens/s"]
            bar.set_postfix_str(" ".join(shown + ([f"MFU {work / now / peak / world:.0%}"] if peak else [])), False)
            bar.update()
            # One process may have been asked to stop a step before another: they agree on it here.
            code = int(total(torch.tensor(max(caught, default=0), device=device), dist.ReduceOp.MAX))
            if done < n_steps and (code or done % args.save_every == 0):
                record = {**made_by, **{key: line[key] for key in RECORD}}
                save_checkpoint(folder, tensors(weights, optimizer), record, args.keep, rank)
                if code:
                    bar.close()
                    if rank == 0:
                        print(f"stopped, saved at step {done}; the same command goes on from there", file=sys.stderr)
                    sys.exit(code)
    spent = {"steps": n_steps, "tokens": tokens, "seconds": line["seconds"], "processes": world}
    for copy, master in zip(model.parameters(), weights.values()):
        if copy is not master:
            copy.data = master  # float32 again, to be saved
    return model, {**spent, "peak_memory": torch.cuda.max_memory_allocated(), "last": line}


# ---------------------------------------------------------------------------------------------------------- The command
def dry_run(args, overlaps, device, dtype):
    """Print what a round would take: exact for rows and tokens of the first epoch, estimated for the rest."""
    source, paths, world = find_model(args.model), data_files(args), int(os.environ.get("WORLD_SIZE", 1))
    config, process = read_config(source), Process(device, dtype, 0, world)
    tokenizer = Tokenizer(source, config)
    if args.rounds > 1:
        print(f"what follows is the first of {args.rounds} rounds, which take about {args.rounds} times as long in all")
    if not any(paths):  # nothing is known of the training but --max-length
        n, longest = len(sample.load_problems(args.data, args.limit)), args.max_new_tokens
        longest = longest or tokenizer.generation_config.get("max_new_tokens") or SamplingParams.max_new_tokens
        of_teacher = n * args.k + (n if args.teacher != args.model else 0)
        work = 2 * parallel.count(config) * n * args.n * longest
        minutes = work / (0.5 * world * parallel.speed(config, 64, device, dtype)) / 60
        samples = f"{n * args.n:,} samples of {args.model} (roughly {minutes:,.1f} minutes on {device})"
        samples += f", {of_teacher:,} of {args.teacher}"
        print(f"{args.data}: {n:,} problems; {samples}, each of at most {longest:,} tokens")
        print(parallel.training_memory(config, args.max_length, args.max_length, process, args.checkpointing, CHUNK)[2])
        return print("the rows are made by these commands; once they have run, --dry-run can count them")
    rows = [shown_anew(row, 0, tokenizer, args) for row in read_rows(paths, tokenizer, overlaps, args)[0]]
    steps = [packs_of(step, args.max_length, world) for step in epoch_of(rows, args.batch_size, args.seed, 0)]
    packs = [pack for packs in steps for pack in packs]
    longest = max(sum(map(length_of, pack)) for pack in packs)
    tokens, learned = sum(map(length_of, rows)), sum(learned_tokens(rows))
    n_steps = args.steps or args.epochs * len(steps)
    print(f"an epoch: {len(rows)} rows, {tokens:,} tokens, {learned:,} of them learned, {len(steps)} steps")
    print(f"packs: {len(packs)} of at most {longest:,} tokens, padding {padding(steps, world):.1%}")
    learned_at_once = max(sum(learned_tokens(pack)) for pack in packs)
    print(parallel.training_memory(config, longest, learned_at_once, process, args.checkpointing, CHUNK)[2])
    work = parallel.flops(config, tokens, learned, sum(length_of(row) ** 2 for row in rows)) * n_steps / len(steps)
    minutes = work / (0.7 * world * parallel.speed(config, 2048, device, dtype)) / 60  # 70% of one product's was seen
    print(f"{n_steps} steps: about {minutes:,.1f} minutes")


def model_card(args, record):
    """README.md of the trained folder."""
    return f"""---\nbase_model: {args.model}\nlibrary_name: transformers\n---
# {Path(args.model).name}, trained to solve and to refine\n
Generative Self-Refinement (arXiv 2509.00084): trained jointly on a larger teacher's solutions and on its
refinements of this model's own candidates. The weights are float32. Data, results and flags:\n
```json\n{json.dumps(record, indent=2, ensure_ascii=False)}\n```\n"""


def read_flags(argv):
    """The command's flags, with the defaults that depend on --model; InputError for one that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument_group("what").add_argument
    add("--model", default="tiny", help="the student: short name, hub id or folder (default: tiny)")
    add("--teacher", help="the larger model that shows how (default: in hub.py's table)")
    add("--data", help="training problems, as in sample.py (default: in hub.py's table)")
    add("--limit", type=int, help="only the first so many problems")
    add("-n", "--n", type=int, default=4, help="candidates a problem (default: 4)")
    add("-k", "--k", type=int, default=1, help="refinements a problem by the teacher (default: 1)")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="processes that the teacher is shared among (1)")
    add("--max-new-tokens", type=int, help="of the data that are made (default: as in sample.py)")
    add("--solve", metavar="FILE", help="candidates file whose right solutions to learn from")
    add("--refine", metavar="FILE", help="refined file whose right refinements to learn from")
    add("--rounds", type=int, default=1, help="train so often, each time on new candidates of the student (default: 1)")
    add("--out", help="folder for the trained model (default: runs/MODEL/trained)")
    add("--dry-run", action="store_true", help="print rows, tokens, steps, memory and time, and stop")
    add = parser.add_argument_group("which rows").add_argument
    add("--exclude", nargs="*", default=[], metavar="FILE", help="drop problems that share 8 words in a row with these")
    add("--validation", type=float, default=0.02, help="problems held back: a share, or a number (default: 0.02)")
    # All wrong: to solve afresh. Mixed: to compare. All right: to copy, which is easy, and good students have many.
    shares = {"nargs": 3, "type": float, "default": [1, 1, 0.5], "metavar": "SHARE"}
    add("--balance", **shares, help="kept of refine rows whose candidates are all wrong, mixed, all right (1 1 0.5)")
    add("--shown", nargs=2, type=int, default=[0, 0], metavar="N", help="candidates shown, from N to N; 0: all (0 0)")
    add = parser.add_argument_group("how").add_argument
    add("--weight", type=float, default=1.0, help="of the refinement loss (default: 1)")
    add("--lr", type=float, help="peak learning rate (default: in hub.py's table, else 1e-5)")
    add("--epochs", type=int, default=2, help="passes over the rows (default: 2)")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, default=32, help="rows a step, in as many packs as they need (default: 32)")
    add("--max-length", type=int, help="tokens of a row, and of a pack (default: 4096, or the context)")
    add("--checkpointing", action="store_true", help="compute activations twice to save their memory")
    add("--save-every", type=int, default=200, metavar="STEPS", help="checkpoint (default: 200)")
    add("--keep", type=int, default=2, help="checkpoints that are kept, the newest (default: 2)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto: CUDA if there is a GPU, else cpu")
    args = parser.parse_args(argv)
    sizes = "limit n k tensor_parallel max_new_tokens rounds epochs steps batch_size max_length save_every keep"
    sample.check_flags(args, *sizes.split())
    _, teacher, data, lr = ALIASES.get(args.model, (None, None, "gsm8k-train", 1e-5))
    args.teacher, args.data, args.lr = args.teacher or teacher, args.data or data, lr if args.lr is None else args.lr
    given = args.solve or args.refine
    fewest, most = (n or math.inf for n in args.shown)
    args.out = str(Path(args.out or f"runs/{Path(args.model).name}/trained"))
    rules = {
        "model": (given or args.teacher, "not in hub.py's table, so give --teacher (or --solve and --refine)"),
        "rounds": (args.rounds == 1 or not given, "each round makes its data; leave out --solve and --refine"),
        "lr": (0 < args.lr < math.inf, "a rate is above 0"),
        "weight": (0 <= args.weight < math.inf, "must not be below 0"),
        "seed": (args.seed >= 0, "must not be below 0"),
        "validation": (0 <= args.validation < math.inf, "a share below 1, or a number of problems"),
        "balance": (all(0 <= share <= 1 for share in args.balance), "shares are between 0 and 1"),
        "shown": (min(args.shown) >= 0 and fewest <= most, "from a number to one not below it, or to 0, all"),
        "out": (Path(args.out).is_dir() or not os.path.lexists(args.out), "a file or a device; name a folder"),
    }
    for name, (good, rule) in rules.items():
        if not good:
            value = getattr(args, name)
            raise InputError(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}: {rule}")
    return args


def check_out(out, made_by):
    """InputError if what is there of an output is another program's, or was made with anything but `made_by`."""
    ours = meta_path(out).exists() and "student" in read_json(meta_path(out))
    for end in ("", ".partial", ".metrics.jsonl", ".loss.png", ".meta.json"):
        if os.path.exists(out + end) and not ours:
            raise InputError(f"--out {out}: {out}{end} is in the way, and not of train.py; choose another --out")
    if Path(out).exists():
        check_same(out, made_by)
    for path in whole_checkpoints(f"{out}.checkpoints")[-1:]:
        check_same(path, made_by, path / "record.json")


def main(argv=None):
    args = read_flags(argv)
    (device, dtype), config = pick_device(args.device, "auto"), read_config(find_model(args.model))
    if (args.max_length or 0) > config.context:
        raise InputError(f"--max-length {args.max_length}: the context of {args.model} is {config.context}; lower it")
    args.max_length, overlaps = args.max_length or min(4096, config.context), overlap_test(args.exclude)
    if not (args.solve or args.refine):  # the teacher has to be there and to fit before the student samples for hours
        teacher = read_config(find_model(args.teacher, "--teacher", weights=not args.dry_run))
        check_fits(f"--teacher {args.teacher}", teacher, dtype, device, args.tensor_parallel)
    rounds = [argparse.Namespace(**vars(args), round=number) for number in range(1, args.rounds + 1)]
    for before, flags in zip(rounds, rounds[1:]):  # the student of a round is the result of the one before
        flags.model = before.out = f"{args.out}.round{before.round}"
        flags.teacher = flags.model if args.teacher == args.model else args.teacher
    try:
        for flags in rounds:  # all results, before the first of them takes its hours
            if not args.dry_run:
                files.lock(flags.out)
                check_out(flags.out, {name: getattr(flags, name) for name in SETTINGS})
            data = () if args.solve or args.refine or not Path(flags.out).exists() else DATA_SETTINGS
            if other := made_otherwise(flags.out, {name: getattr(flags, name) for name in ("round", *data)}):
                raise InputError(f"--out {other}; choose another --out")
        if args.dry_run:
            return dry_run(rounds[0], overlaps, device, dtype) if FIRST else None
        for flags in rounds:
            if FIRST and args.rounds > 1:
                print(f"round {flags.round} of {args.rounds}: {flags.model} -> {flags.out}", flush=True)
            run(flags, overlaps, device, dtype)
            gc.collect()  # the trained model refers to itself (see prepare) and would stay until the next round
            if dist.is_initialized():
                wait()
                dist.destroy_process_group()
    finally:
        for flags in rounds:
            files.unlock(flags.out)


def run(args, overlaps, device, dtype):
    """One round: make the data, read the rows, train on them and save the model."""
    out, source, paths = args.out, find_model(args.model), data_files(args)
    student, kinds = fingerprint(source, torch.float32), (torch.bfloat16, torch.float16)
    by = read_json(meta_path(paths[1])).get("candidates_by") if paths[1] and meta_path(paths[1]).exists() else None
    if by and by != student and by not in (fingerprint(source, kind) for kind in kinds):
        advice = f"refine this one's, or delete {meta_path(paths[1])} to learn from them all the same"
        other = f"refines candidates of another model ({by}) than {args.model} ({student})"
        raise InputError(f"--refine {paths[1]}: {other}; {advice}")
    tokenizer = Tokenizer(source, read_config(source))
    rank, world, *_ = processes(device, f"train {out}")
    # One process reads and grades: two that grade by themselves might not agree on a slow answer.
    box = [read_rows(paths, tokenizer, overlaps, args)] if rank == 0 else [None]
    if world > 1:
        dist.broadcast_object_list(box)
    (rows, held, counts), process = box[0], Process(device, dtype, rank, world)
    content = [[[row.task, row.prompt, row.completion] for row in part] for part in (rows, held)]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    made_by = {"student": student, "rows": digest, "dtype": str(process.dtype).removeprefix("torch.")}
    made_by |= {name: getattr(args, name) for name in SETTINGS}
    check_out(out, made_by)
    wait()  # nobody writes before all have looked
    record = {**made_by, "model": args.model, "solve": paths[0], "refine": paths[1], "flags": vars(args)}
    record |= {"data": dict(zip(TASKS, counts)), "validation_rows": len(held), "versions": versions()}
    trained = Path(out).exists()
    meta = read_json(meta_path(out)) if trained else record
    if rank == 0 and not meta.get("complete"):
        write_json(meta_path(out), {**meta, "complete": trained})
    if trained:
        return print(f"{out}: trained already") if rank == 0 else None
    try:
        model, record["spent"] = train(tokenizer, rows, held, args, process, made_by)
    except torch.OutOfMemoryError:
        raise InputError("the device's memory is full; lower --max-length or give --checkpointing")
    with writing(out):
        if rank == 0:
            draw_losses(files.whole_lines(Path(f"{out}.metrics.jsonl"))[0], TASKS, f"{out}.loss.png")
            write_json(meta_path(out), {**record, "complete": False})
        # In float32: an update is often smaller than what bfloat16 can add to a weight.
        save(model, out, source, model_card(args, record))
    if rank == 0:
        sync(Path(out).parent)
        write_json(meta_path(out), {**record, "complete": True})  # only now
        print(f"{out}: a Hugging Face folder; losses in {out}.metrics.jsonl and {out}.loss.png")


if __name__ == "__main__":
    command_line(main)
