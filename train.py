"""Generative Self-Refinement: train one model jointly to solve and to refine.

    python train.py                                          the built-in tiny model, minutes on a CPU
    python train.py --model qwen-1.5b                        a real one, on the GPU
    torchrun --nproc-per-node=8 train.py --model qwen-7b     on eight GPUs
    python train.py --model path/to/folder --solve s.candidates.jsonl --refine r.refined.jsonl --out trained

The third stage. Small models refine badly when merely prompted. So two kinds of examples are taken from
a larger teacher, and the student learns both at once:

    solve     problem                -> a solution of the teacher's
    refine    problem + candidates   -> the teacher's refinement of *these* candidates, which the student made

The candidates are the student's own because its own mistakes are what it will have to refine. Solutions
and refinements with a wrong answer are dropped. The loss is

    L = L_solve + weight * L_refine

where each L is the mean cross-entropy over that task's completion tokens in the step, the stop token
included and the prompt left out: with one mean over both, the tokens of whichever task is longer would
drown the other. A step is a set of rows that (seed, epoch, number of the step) fix. However many packs
and processes share it, each mean is over all of its tokens:

    rows of a step       solve 210 | refine 1,130 | refine 870 | solve 180 | ...
    pack 0, process 0    [refine 1,130 | solve 210 | ...]      rows lie end to end in one flat row of tokens,
    pack 1, process 1    [refine 870 | solve 180 | ...]        each sees itself alone, and nothing is padded

Without --solve and --refine, what is missing under runs/MODEL/ is made first, by the commands that are
printed: the student's candidates, the teacher's solutions, the teacher's refinements. Given one or both,
training uses those files alone.

Beside the result OUT: OUT.metrics.jsonl and OUT.loss.png, OUT.meta.json, and OUT.checkpoints/step-N. Nothing in
training is random but what (seed, epoch, id) fix, so a checkpoint needs no more than the weights, AdamW's moments
and the number of the step, and a run that was killed ends as it would have ended.

Left out: dropout, LoRA, tensor and pipeline parallelism, and packs cut to one length, which only compilers need.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import refine
import sample
from files import InputError, command_line, meta_path, read_json, write_json
from grade import Grader, answer_of
from model import Config, Tokenizer, attend_causal, load, save, uniforms, use_varlen, varlen_attn
from sample import ALIASES, find_model, fingerprint, pick_device

# Without torchrun a checkpoint is saved by one process, as it should be.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

TASKS = ("solve", "refine")
KINDS = ("all wrong", "mixed", "all right")  # what the candidates of a refine row are
CHUNK = 2**25  # logits at a time in the loss: 128 MiB
# "Candidate 2 is right", or the last one, or the first two: true of the teacher's prompt alone.
ORDINALS = "first|second|third|fourth|fifth|sixth|seventh|eighth|last"
NAMED = rf"\b(candidate|solution)s?\W{{1,4}}(\d|(one|two|three|four|{ORDINALS})\b)"
NAMED = re.compile(rf"{NAMED}|\b({ORDINALS}) (two |three )?(candidate|solution)", re.IGNORECASE)
REASONS = ("excluded", "cut off", "no answer", "wrong", "duplicate", "too long", "unbalanced")


@dataclass
class Row:
    """One training example."""

    task: int  # index in TASKS
    prompt: list  # token ids that are only read; of a refine row, with the candidates as the teacher saw them
    completion: list  # token ids that are learned, the stop id last
    problem: dict = None  # of its line of the file: id, problem, prompt and, of a refine row, candidates
    number: int = 0  # which of its problem's completions
    order: list = None  # of a refine row: the candidates that the teacher saw, if others may be shown as well
    kind: int = None  # of a refine row: index in KINDS


# ------------------------------------------------------------------------------------------------
# From files to rows


def data_stages(args):
    """What makes the files that training needs -> (solve file, refine file, [(stage, its flags)])."""
    folder = Path("runs") / Path(args.model).name
    names = ("train.candidates.jsonl", "teacher.candidates.jsonl", "teacher.refined.jsonl")
    candidates, solutions, refinements = (folder / name for name in names)
    common = ["--seed", str(args.seed), "--device", args.device]
    common += ["--max-new-tokens", str(args.max_new_tokens)] if args.max_new_tokens else []
    problems = ["--data", args.data] + (["--limit", str(args.limit)] if args.limit else [])
    stages = [
        (sample, ["--model", args.model, *problems, "--n", str(args.n), "--out", str(candidates), *common]),
        (sample, ["--model", args.teacher, *problems, "--n", "1", "--out", str(solutions), *common]),
        (refine, ["--model", args.teacher, "--candidates", str(candidates), "--out", str(refinements), *common]),
    ]
    return solutions, refinements, stages


def read_examples(path, task):
    """The lines of a candidates file (task 0) or a refined file (task 1), checked."""
    lines = refine.read_candidates(path, "answer", *["refinements"][:task])
    for line in lines if task else []:
        numbers, found = range(len(line["candidates"])), line["refinements"]
        for x in found if isinstance(found, list) else [None]:
            good = isinstance(x, dict) and isinstance(x.get("text"), str) and isinstance(x.get("order"), list)
            if not (good and all(i in numbers for i in x["order"])):
                raise InputError(f"{path}, id {line['id']!r}: a refinement lacks a text or an order of its candidates")
    return lines


def make_rows(path, task, tokenizer, overlaps, args):
    """The rows that a file gives to a task -> (rows, how many completions were dropped for each of REASONS)."""
    rows, dropped, grader = [], dict.fromkeys(REASONS, 0), Grader()
    for line in read_examples(path, task):
        problem = {key: line.get(key, "") for key in ("id", "problem", "prompt", *["candidates"][:task])}
        if task:
            answers = [answer_of(candidate, problem["prompt"]) for candidate in line["candidates"]]
            right = [grader.equal(line["answer"], answer) for answer in answers]
        excluded, texts = overlaps(line["problem"]), set()
        for number, completion in enumerate(line["refinements" if task else "candidates"]):
            answer = answer_of(completion, completion.get("prompt", "") if task else problem["prompt"])
            wrong = not grader.equal(line["answer"], answer)
            checks = {"excluded": excluded, "cut off": completion.get("finish_reason") == "length"}
            checks |= {"no answer": wrong and answer is None, "wrong": wrong, "duplicate": completion["text"] in texts}
            if not any(checks.values()):
                texts.add(completion["text"])
                row = make_row(task, problem, number, completion, tokenizer, args.max_length)
                checks["too long"] = row is None
                if row and task:
                    shown = [right[i] for i in completion["order"]]
                    row.kind = 0 if not any(shown) else 2 if all(shown) else 1
                    lot = uniforms((args.seed, str(line["id"]), "balance", number), 1)[0]
                    checks["unbalanced"] = lot >= args.balance[row.kind]
            if reason := next((name for name, bad in checks.items() if bad), None):
                dropped[reason] += 1
            else:
                rows.append(row)
    grader.close()
    return rows, dropped


def make_row(task, problem, number, completion, tokenizer, max_length):
    """A Row, or None where prompt and completion do not fit `max_length` tokens together."""
    ids, order = tokenizer.encode_completion(completion["text"]), completion.get("order")
    try:
        if task:
            prompt = refine.refinement_prompt(problem, order, tokenizer, max_length, len(ids))[1]
        else:
            prompt = tokenizer.encode_chat(sample.SOLVE_PROMPT.format(problem=problem["problem"]))[1]
    except InputError:
        return None
    order = order if task and not NAMED.search(completion["text"]) else None
    return Row(task, prompt, ids, problem, number, order) if len(prompt) + len(ids) <= max_length else None


def shown_anew(row, epoch, tokenizer, args):
    """A refine row with the candidates that this epoch shows: a number drawn from --shown of them, in a new order.

    One order, seen in each epoch, would teach places in a list. With fewer candidates than the teacher saw, what it
    took from the others comes from nowhere: of a tiny model, 2 to 4 instead of 4 halved what refinement gets right.
    """
    if row.order is None:
        return row
    u = uniforms((args.seed, str(row.problem["id"]), "shown", row.number, epoch), len(row.order) + 1)
    low, high = (min(n or len(row.order), len(row.order)) for n in args.shown)
    order = [row.order[i] for i in np.argsort(u[1:], kind="stable")[: low + int(u[0] * (high - low + 1))]]
    try:
        prompt = refine.refinement_prompt(row.problem, order, tokenizer, args.max_length, len(row.completion))[1]
        return replace(row, prompt=prompt)
    except InputError:  # tokens merge differently in another order: a row that just fitted may not fit now
        return row


def overlap_test(names):
    """Problem files -> a function that says whether a problem's text is one of theirs, or shares 8 words in a row."""

    def grams(text):
        words = re.findall(r"\w+", text.lower())
        return {" ".join(text.lower().split()), *(tuple(words[i : i + 8]) for i in range(len(words) - 7))}

    seen = {gram for name in names for row in sample.load_problems(name) for gram in grams(row["problem"])}
    return lambda text: bool(seen) and not seen.isdisjoint(grams(text))


def split(rows, validation, seed):
    """Rows -> (those to train on, those to validate on). All rows of a problem, told by its text, go together."""
    key = {id(row): " ".join(row.problem["problem"].split()) for row in rows}
    texts = sorted(set(key.values()), key=lambda text: uniforms((seed, text, "validation"), 1)[0])
    n = round(validation * len(texts)) if validation < 1 else int(validation)
    if rows and n >= len(texts):
        raise InputError(f"--validation {validation}: all of the {len(texts)} problems; leave some to train on")
    held = set(texts[:n])
    return [r for r in rows if key[id(r)] not in held], [r for r in rows if key[id(r)] in held]


def read_rows(solve, refined, tokenizer, overlaps, args):
    """The files of both tasks -> (rows to train on, rows to validate on, what was found in each file)."""
    rows, counts = [], []
    for task, path in enumerate((solve, refined)):
        made, dropped = make_rows(path, task, tokenizer, overlaps, args) if path else ([], {})
        kinds = {kind: sum(row.kind == i for row in made) for i, kind in enumerate(KINDS)} if task else {}
        counts.append({"rows": len(made), **kinds, "dropped": dropped})
        if path:
            found, lost = (", ".join(f"{n} {name}" for name, n in x.items()) for x in (kinds, dropped))
            print(f"{path}: {len(made)} {TASKS[task]} rows{f' ({found})' if task else ''}; dropped: {lost}")
        rows += made
    if not rows:
        raise InputError(f"{solve or ''} {refined or ''}: no right solution or refinement to learn from")
    return *split(rows, args.validation, args.seed), counts


# ------------------------------------------------------------------------------------------------
# From rows to packs


def epoch_of(rows, batch_size, seed, epoch):
    """One epoch as a list of steps, each a list of about `batch_size` Rows with its share of both tasks."""
    rng = np.random.default_rng([seed, epoch])
    n_steps = max(1, round(len(rows) / batch_size))
    steps = [[] for _ in range(n_steps)]
    for task in range(len(TASKS)):
        of_task = [row for row in rows if row.task == task]
        parts = np.array_split(rng.permutation(len(of_task)), max(1, min(n_steps, len(of_task))))
        for place, part in enumerate(parts):  # fewer rows than steps are spread over the epoch
            steps[place * n_steps // len(parts)] += [of_task[i] for i in part]
    return [step for step in steps if step]


def length_of(row):
    """Tokens that a row takes in a pack: its last one is predicted, and never read."""
    return len(row.prompt) + len(row.completion) - 1


def packs_of(rows, room, world):
    """Rows -> packs (lists of Rows) of at most `room` tokens and of nearly the same length, longest first.

    Their number is a multiple of `world`, the number of processes, which take packs in turn and wait for each other.
    Longest first onto the pack that is emptiest; if that overflows one, again with more packs.
    """
    rows = sorted(rows, key=length_of, reverse=True)
    fewest = -(-sum(map(length_of, rows)) // room)
    for n in itertools.count(-(-fewest // world) * world, world):
        packs, filled = [[] for _ in range(n)], [0] * n
        for row in rows:
            emptiest = filled.index(min(filled))
            packs[emptiest].append(row)
            filled[emptiest] += length_of(row)
        if max(filled) <= room:
            return sorted(packs, key=lambda pack: sum(map(length_of, pack)), reverse=True)


def padding(steps, world):
    """The share of tokens that nobody computes with while the longest pack of each round is computed."""
    idle = total = 0
    for packs in steps:
        lengths = [sum(map(length_of, pack)) for pack in packs]
        total += sum(lengths)
        idle += sum(world * max(lengths[i : i + world]) for i in range(0, len(lengths), world)) - sum(lengths)
    return idle / max(1, idle + total)


def learned_tokens(rows):
    """[solve, refine], the number of tokens that the rows of each task train."""
    return [sum(len(row.completion) for row in rows if row.task == task) for task in range(len(TASKS))]


# ------------------------------------------------------------------------------------------------
# From packs to losses


def attention_within(lengths, device):
    """Attention for rows of these lengths that lie end to end: no row sees another, and no mask of all is made.

    The function returned takes qkv [T, H + 2K, D] -> [T, H, D].
    """
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)  # [rows + 1]

    def attend(attention, qkv):
        if use_varlen(qkv.device, qkv.dtype, qkv.shape[-1]):
            q, k, v = qkv.split(attention.heads, dim=1)
            back = (-1 if attention.window is None else attention.window - 1, 0)
            longest = max(lengths)
            return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=back, enable_gqa=True)
        return torch.cat([attend_causal(attention, row[None])[0] for row in qkv.split(lengths)])

    return attend


class ChunkedCrossEntropy(torch.autograd.Function):
    """hidden [M, C], output matrix [V, C], labels [M], scale [M] -> (sum of scale * cross-entropy, cross-entropy [M]).

    The gradient is worked out beside the loss, for a few positions at a time, so that logits [M, V] never exist:
    with 152k entries they would be larger than the model. The gradient of the logits is softmax - one_hot, by scale.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, scale):
        losses = torch.empty(len(labels), device=hidden.device)
        train = ctx.needs_input_grad[0]
        grad_hidden = torch.empty_like(hidden) if train else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if train else None
        size = max(1, CHUNK // len(weight))  # positions at a time
        for at in range(0, len(labels), size):
            x, y = hidden[at : at + size], labels[at : at + size, None]  # [m, C], [m, 1]
            logits = (x @ weight.t()).float()  # [m, V]
            norm = logits.logsumexp(-1, keepdim=True)  # [m, 1]
            losses[at : at + size] = (norm - logits.gather(1, y))[:, 0]
            if train:
                grad = logits.sub_(norm).exp_()
                grad.scatter_add_(1, y, torch.full_like(norm, -1.0))
                grad = grad.mul_(scale[at : at + size, None]).to(weight.dtype)
                torch.mm(grad, weight, out=grad_hidden[at : at + size])
                if weight.dtype == torch.float32:
                    grad_weight.addmm_(grad.t(), x)
                else:
                    grad_weight += grad.t() @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return (losses * scale).sum(), losses

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad_weight.mul_(grad).to(grad_hidden.dtype), None, None


def task_losses(model, pack, scale):
    """A pack of Rows, the weight of a token of each task [2] -> (loss, the sum of cross-entropies of each task [2]).

    A process without a row left takes part in the exchange of weights and gradients with one token and no loss.
    """
    device, lengths = scale.device, [length_of(row) for row in pack] or [1]
    ids = torch.tensor([i for row in pack for i in (row.prompt + row.completion)[:-1]] or [0])  # [T]
    positions = torch.cat([torch.arange(n) for n in lengths])  # [T]
    task = torch.tensor([row.task for row in pack for _ in row.completion], dtype=torch.long, device=device)  # [M]
    labels = torch.tensor([i for row in pack for i in row.completion], dtype=torch.long, device=device)  # [M]
    # Position i predicts token i + 1: a completion is learned from the last token of its prompt on.
    ends = list(itertools.accumulate(lengths))
    learned = [torch.arange(end - len(row.completion), end) for end, row in zip(ends, pack)]
    learned = torch.cat([torch.arange(0), *learned]).to(device)  # [M]
    hidden = model(ids.to(device), positions.to(device), attention_within(lengths, device))  # [T, C]
    loss, losses = ChunkedCrossEntropy.apply(hidden[learned], model.lm_head.weight, labels, scale[task])
    return loss, torch.zeros(len(TASKS), device=device).index_add(0, task, losses)


def flops(config, tokens, learned, squares):
    """Floating-point operations of a step that reads `tokens` and learns `learned`; `squares`: sum of row lengths^2.

    Forward and backward take 6 for each weight and token, the output matrix only at learned tokens, and causal
    attention 6 for each of half the pairs, twice.
    """
    C, L, heads = config.dim, config.n_layers, config.n_heads * config.head_dim
    layer = 2 * C * heads + 2 * C * config.n_kv_heads * config.head_dim + 3 * C * config.mlp_dim
    return 6 * (L * layer * tokens + config.vocab_size * C * learned + L * heads * squares)


# bfloat16 matrix products, FLOP/s, as the makers state them (without sparsity), by a word in the device's name
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12}


# ------------------------------------------------------------------------------------------------
# Weights on many devices, and checkpoints


def prepare(model, device, world, dtype, checkpointing):
    """Get a loaded model ready for training -> {name: weight}, all of them float32.

    Of several processes each keeps a part of every weight, gradient and moment (FSDP2), and a layer is gathered,
    in `dtype`, while it computes. The weights are read by every process into the machine's own memory and go to the
    GPU a layer at a time, so that no GPU ever holds them whole. One GPU is the same with one part.
    """
    model.train()
    if checkpointing:  # keep the input of each layer alone, and compute the rest again when its gradient is due
        for block in model.model.layers:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (world,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return dict(model.to(device).named_parameters())


def start_optimizer(weights, lr):
    """AdamW with all of its state there already, as a checkpoint is read into it."""
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for weight in weights.values():
        moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        optimizer.state[weight] = {"step": torch.zeros((), device=weight.device), **moments}
    return optimizer


def tensors(weights, optimizer):
    """The tensors of a checkpoint: each weight with its moments, under its name."""
    moments = {name: {key: optimizer.state[x][key] for key in ("exp_avg", "exp_avg_sq")} for name, x in weights.items()}
    return {name: {"weight": weight.detach(), **moments[name]} for name, weight in weights.items()}


def whole_checkpoints(folder):
    """The checkpoints in a folder, oldest first. One that is being written or deleted has another name."""
    found = [path for path in Path(folder).glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(folder, step, state, record, keep, rank):
    """Write `state`, the tensors, and `record` to folder/step-STEP, and delete all but the newest `keep`.

    It gets its name when all of it is on disk: a kill at any moment leaves the checkpoint before it.
    """
    partial, final = folder / f"step-{step}.partial", folder / f"step-{step}"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait()
    dcp.save(state, checkpoint_id=partial)  # its files are synced
    if rank == 0:
        write_json(partial / "record.json", record)
        for path in (partial / "record.json", partial):
            sync(path)
        os.rename(partial, final)
        sync(folder)
        for old in whole_checkpoints(folder)[:-keep]:
            os.rename(old, f"{old}.partial")
            shutil.rmtree(f"{old}.partial")
    wait()


def sync(path):
    """Wait until a file or a folder's list of names is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def wait():
    """Return when all processes have come to it."""
    if dist.is_initialized():
        dist.barrier()


def total(tensor):
    """The sum of each element over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# ------------------------------------------------------------------------------------------------
# Training


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
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return sums, norm.full_tensor() if dist.is_initialized() else norm


def validate(model, rows, room, device, rank, world):
    """The mean cross-entropy over the learned tokens of each task of the validation rows, None without any."""
    sums = torch.zeros(len(TASKS), device=device)
    with torch.no_grad():
        for pack in packs_of(rows, room, world)[rank::world]:
            sums += task_losses(model, pack, sums)[1]
    return [s / c if c else None for s, c in zip(total(sums).tolist(), learned_tokens(rows))]


def train(model, rows, held, tokenizer, args, device, dtype, out, made_by, rank, world):
    """Fine-tune `model` in place on `rows`, from the newest checkpoint on if there is one -> what was spent.

    `held` are the validation rows. A step more is a JSON line more in OUT.metrics.jsonl.
    """
    folder, log_path = Path(f"{out}.checkpoints"), Path(f"{out}.metrics.jsonl")
    weights = prepare(model, device, world, dtype, args.checkpointing)
    optimizer = start_optimizer(weights, args.lr)
    first, seen, spent = 0, 0, 0.0
    if rank == 0:
        for path in folder.glob("*.partial"):
            shutil.rmtree(path)
    wait()
    if found := whole_checkpoints(folder):
        record = read_json(found[-1] / "record.json")
        dcp.load(tensors(weights, optimizer), checkpoint_id=found[-1])  # in place
        first, seen, spent = record["step"], record["tokens"], record["seconds"]
        for state in optimizer.state.values():
            state["step"].fill_(first)
        if rank == 0:
            print(f"{found[-1]}: goes on from there")
    if rank == 0:  # lines of steps that will be done again go
        lines = sample.whole_lines(log_path)[0] if found and log_path.exists() else []
        kept = Path(f"{log_path}.partial")
        kept.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= first))
        os.replace(kept, log_path)

    per_epoch = len(epoch_of(rows, args.batch_size, args.seed, 0))
    n_steps = args.steps or args.epochs * per_epoch
    warmup, weight = max(1, n_steps // 20), torch.tensor([1.0, args.weight], device=device)
    peak = next((x for word, x in PEAKS.items() if device.type == "cuda" and word in torch.cuda.get_device_name()), 0)
    started, seen_before, work = time.time(), seen, 0

    def rows_and_packs(number):  # a step is the same for every process, which then takes its packs of it
        epoch, i = divmod(number, per_epoch)
        step = [shown_anew(row, epoch, tokenizer, args) for row in epoch_of(rows, args.batch_size, args.seed, epoch)[i]]
        return step, packs_of(step, args.max_length, world)

    bar = tqdm(range(first, n_steps), desc="train", unit=" steps", initial=first, total=n_steps)
    bar.disable = bar.disable or rank > 0
    caught, signals = [], (signal.SIGINT, signal.SIGTERM)  # asked to stop: after the step, with a checkpoint
    before = [signal.signal(number, lambda number, _: caught.append(number)) for number in signals]
    log = open(log_path if rank == 0 else os.devnull, "a", encoding="utf-8")
    with log, ThreadPoolExecutor(1) as pool:
        coming = pool.submit(rows_and_packs, first)
        for number in bar:
            done, (step, packs) = number + 1, coming.result()
            coming = pool.submit(rows_and_packs, done)  # tokens of the next step, beside the computing
            counts = learned_tokens(step)
            # FSDP takes the mean of the gradients over the processes; ours is a sum.
            scale = weight * world / torch.tensor(counts, device=device).clamp(min=1)  # [2]
            lr = learning_rate(number, n_steps, args.lr, warmup)
            sums, norm = update(model, weights, optimizer, packs[rank::world], scale, lr)
            # One process may have been asked to stop a step before another: they agree on it here.
            asked = torch.tensor([float(x in caught) for x in signals], device=device)
            *sums, interrupt, terminate = total(torch.cat([sums, asked])).tolist()
            if not math.isfinite(norm):
                raise InputError(f"step {done}: the gradient is not finite; lower --lr and choose another --out")

            means = [s / c if c else None for s, c in zip(sums, counts)]
            lengths = [length_of(row) for row in step]
            seen += sum(lengths)
            work += flops(model.config, sum(lengths), sum(counts), sum(n * n for n in lengths))
            now = time.time() - started
            line = {"step": done, "loss_solve": means[0], "loss_refine": means[1], "lr": lr, "grad_norm": norm.item()}
            line |= {"padding": padding([packs], world), "tokens": seen, "seconds": round(spent + now, 2)}
            if held and (done == n_steps or done % max(1, n_steps // 10) == 0):
                found = validate(model, held, args.max_length, device, rank, world)
                line |= {f"validation_{name}": mean for name, mean in zip(TASKS, found)}
            log.write(json.dumps(line) + "\n")
            log.flush()
            shown = [f"{name} {mean:.3f}" for name, mean in zip(TASKS, means) if mean is not None]
            shown += [f"{(seen - seen_before) / now:,.0f} tokens/s"]
            bar.set_postfix_str(" ".join(shown + ([f"MFU {work / now / peak / world:.0%}"] if peak else [])))
            stop = (interrupt or terminate) and done < n_steps
            if stop or (done % args.save_every == 0 and done < n_steps):
                sync(log_path) if rank == 0 else None
                record = {**made_by, **{key: line[key] for key in ("step", "tokens", "seconds")}}
                save_checkpoint(folder, done, tensors(weights, optimizer), record, args.keep, rank)
            if stop:
                bar.close()
                if rank == 0:
                    print(f"stopped, saved at step {done}; the same command goes on from there", file=sys.stderr)
                sys.exit(143 if terminate else 130)
    for number, handler in zip(signals, before):
        signal.signal(number, handler)
    model.eval()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # what Linux counts in KiB
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else memory
    spent = {"steps": n_steps, "tokens": seen, "seconds": round(spent + time.time() - started, 2)}
    return {**spent, "peak_memory": memory, "processes": world, "last": line}


# ------------------------------------------------------------------------------------------------
# Before and after


def dry_run(config, rows, tokenizer, args, device, dtype, world):
    """Print what the training would take: exact for rows and tokens of the first epoch, estimated for the rest."""
    rows = [shown_anew(row, 0, tokenizer, args) for row in rows]
    steps = [packs_of(step, args.max_length, world) for step in epoch_of(rows, args.batch_size, args.seed, 0)]
    lengths = [sum(map(length_of, pack)) for packs in steps for pack in packs]
    tokens, learned = sum(lengths), sum(learned_tokens(rows))
    n_steps = args.steps or args.epochs * len(steps)
    print(f"an epoch: {len(rows)} rows, {tokens:,} tokens, {learned:,} of them learned, {len(steps)} steps")
    print(f"packs: {len(lengths)} of at most {max(lengths):,} tokens, padding {padding(steps, world):.1%}")

    C, F, V, L = config.dim, config.mlp_dim, config.vocab_size, config.n_layers
    heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    n_weights = L * C * (2 * heads + 2 * kv + 3 * F) + V * C * (1 if config.tie_embeddings else 2)
    # What a layer keeps of a token for its gradient; with --checkpointing its input, and all of one layer.
    kept = 6 * C + 3 * heads + 3 * kv + 4 * F
    kept = (C * L + kept if args.checkpointing else kept * L) * dtype.itemsize
    # A weight, its gradient and two moments take 4 bytes each.
    memory = 16 * n_weights / world + max(lengths) * kept + 4 * V * C + 3 * 4 * CHUNK
    a, b, times = torch.randn(2048, C, device=device).to(dtype), torch.randn(C, F, device=device).to(dtype), []
    for _ in range(6):
        started = time.time()
        (a @ b)[0, 0].item()  # waits for the device
        times.append(time.time() - started)
    work = flops(config, tokens, learned, sum(length_of(row) ** 2 for row in rows)) * n_steps / len(steps)
    seconds = work / (0.7 * world * 2 * 2048 * C * F / min(times))  # of what one product reaches, 70% has been seen
    print(f"{n_steps} steps: about {memory / 2**30:.1f} GiB a process and {seconds / 60:,.1f} minutes")


def draw_losses(log_path, path):
    """The losses of both tasks over the steps, in training and validation, as a figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = sample.whole_lines(log_path)[0]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for task, color, style, mark in zip(TASKS, ("#0072b2", "#d55e00"), ("-", "--"), ("o", "s")):
        for key, looks in (("loss", {"linestyle": style}), ("validation", {"linestyle": "none", "marker": mark})):
            points = [(line["step"], line[f"{key}_{task}"]) for line in lines if line.get(f"{key}_{task}") is not None]
            if points:
                axes.plot(*zip(*points), color=color, mfc="none", linewidth=1, label=f"{key}, {task}", **looks)
    axes.set(xlabel="step", ylabel="cross-entropy of a learned token, nats", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def model_card(args, record):
    """README.md of the trained folder."""
    return (
        f"---\nbase_model: {args.model}\nlibrary_name: transformers\n---\n"
        f"# {Path(args.model).name}, trained to solve and to refine\n\n"
        "Generative Self-Refinement (arXiv 2509.00084): trained jointly on a larger teacher's solutions and on its\n"
        "refinements of this model's own candidates. The weights are float32. Data, results and flags:\n\n"
        f"```json\n{json.dumps(record, indent=2, ensure_ascii=False)}\n```\n"
    )


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument_group("what").add_argument
    add("--model", default="tiny", help="the student: short name, hub id or folder (default: tiny)")
    add("--teacher", help="the larger model that shows how (default: in sample.py's table)")
    add("--data", help="training problems, as in sample.py (default: in sample.py's table)")
    add("--limit", type=int, help="only the first so many problems")
    add("--n", type=int, default=4, help="candidates a problem (default: 4)")
    add("--max-new-tokens", type=int, help="of the data that are made (default: as in sample.py)")
    add("--solve", metavar="FILE", help="candidates file whose right solutions to learn from")
    add("--refine", metavar="FILE", help="refined file whose right refinements to learn from")
    add("--out", help="folder for the trained model (default: runs/MODEL/trained)")
    add("--dry-run", action="store_true", help="print rows, tokens, steps, memory and time, and stop")
    add = parser.add_argument_group("which rows").add_argument
    add("--exclude", nargs="*", default=[], metavar="FILE", help="drop problems that share 8 words in a row with these")
    add("--validation", type=float, default=0.02, help="problems held back: a share, or a number (default: 0.02)")
    # All wrong: to solve afresh. Mixed: to compare. All right: to copy, which is easy, and good students have many.
    shares, numbers = {"nargs": 3, "type": float, "default": [1, 1, 0.5]}, {"nargs": 2, "type": int, "default": [0, 0]}
    add("--balance", **shares, metavar="SHARE", help="kept of all wrong, mixed, all right refine rows (1 1 0.5)")
    add("--shown", **numbers, metavar="N", help="candidates in a prompt, at least and at most; 0 for all (0 0)")
    add = parser.add_argument_group("how").add_argument
    add("--weight", type=float, default=1.0, help="of the refinement loss (default: 1)")
    add("--lr", type=float, help="peak learning rate (default: in sample.py's table, else 1e-5)")
    add("--epochs", type=int, default=2, help="passes over the rows (default: 2)")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    # A step takes as many packs as it needs and adds up their gradients.
    add("--batch-size", type=int, default=32, help="rows a step (default: 32)")
    add("--max-length", type=int, help="tokens of a row, and of a pack (default: 4096, or the context)")
    add("--checkpointing", action="store_true", help="compute activations twice to save their memory")
    add("--save-every", type=int, default=200, metavar="STEPS", help="checkpoint (default: 200)")
    add("--keep", type=int, default=2, help="checkpoints that are kept, the newest (default: 2)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto: CUDA if there is a GPU, else cpu")
    args = parser.parse_args(argv)

    # What can be wrong is looked at before any time is spent.
    sizes = ("limit", "n", "max_new_tokens", "epochs", "steps", "batch_size", "max_length", "save_every", "keep")
    sample.check_sizes(args, *sizes)
    _, teacher, data, lr = ALIASES.get(args.model, (None, None, "gsm8k-train", 1e-5))
    args.teacher, args.data, args.lr = args.teacher or teacher, args.data or data, lr if args.lr is None else args.lr
    if not (args.solve or args.refine or args.teacher):
        raise InputError(f"--model {args.model}: not in sample.py's table, so give --teacher (or --solve and --refine)")
    fewest, most = (n or math.inf for n in args.shown)
    rules = {
        "lr": (0 < args.lr < math.inf, "a rate is above 0"),
        "weight": (0 <= args.weight < math.inf, "must not be below 0"),
        "seed": (args.seed >= 0, "must not be below 0"),
        "validation": (0 <= args.validation < math.inf, "a share below 1, or a number of problems"),
        "balance": (all(0 <= share <= 1 for share in args.balance), "shares are between 0 and 1"),
        "shown": (min(args.shown) >= 0 and fewest <= most, "from a number to one not below it, or to 0, all"),
    }
    for name, (good, rule) in rules.items():
        if not good:
            raise InputError(f"--{name} {str(getattr(args, name)).strip('[]').replace(',', '')}: {rule}")
    device, _ = pick_device(args.device, "auto")
    source = find_model(args.model)
    config = Config.from_dict(read_json(source / "config.json"))
    if (args.max_length or 0) > config.context:
        raise InputError(f"--max-length {args.max_length}: the context of {args.model} is {config.context}; lower it")
    args.max_length = args.max_length or min(4096, config.context)
    overlaps, tokenizer = overlap_test(args.exclude), Tokenizer(source, config)

    # The data, and the rows in them.
    first, out = os.environ.get("RANK", "0") == "0", Path(args.out or f"runs/{Path(args.model).name}/trained")
    solve, refined, stages = args.solve, args.refine, []
    if not (solve or refined):
        solve, refined, stages = data_stages(args)
        if not args.dry_run:
            find_model(args.teacher)  # there, before the student samples for hours
    for stage, flags in stages:
        if first:
            print(f"python {Path(stage.__file__).name} {' '.join(flags)}")
        if not args.dry_run:
            stage.main(flags)
    if stages and not (solve.exists() and refined.exists()):
        message = "the rows are made by these commands; once they have run, --dry-run can count them"
        return print(message) if first else None
    if not args.dry_run:
        # Into the machine's own memory, also for a GPU: see prepare().
        model, _ = load(source, "cpu", torch.float32)
        made = read_json(meta_path(refined)) if refined and meta_path(refined).exists() else {}
        known = [fingerprint(model, kind) for kind in (torch.float32, torch.bfloat16, torch.float16)]
        if made.get("candidates_by") and made["candidates_by"] not in known:
            raise InputError(
                f"--refine {refined}: refines candidates of another model ({made['candidates_by']}) than {args.model} "
                f"({known[0]}); refine this one's, or delete {meta_path(refined)} to learn from them all the same"
            )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, world, _, _ = sample.processes(device, f"train {out}")
    # One process reads and grades: two that grade by themselves might not agree on a slow answer.
    box = [read_rows(solve, refined, tokenizer, overlaps, args)] if rank == 0 else [None]
    if world > 1:
        dist.broadcast_object_list(box)
    rows, held, counts = box[0]
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    if rank == 0:
        print(f"{len(rows)} rows to train on, {len(held)} to validate on")
        why = f"this is a {'CPU' if device.type == 'cpu' else 'device that may lack bfloat16'}"
        why = "half the memory traffic, and no loss scaling" if dtype == torch.bfloat16 else why
        # An update is often smaller than what bfloat16 can add to a weight.
        print(f"weights and optimizer in float32, computing in {str(dtype).removeprefix('torch.')}: {why}")
        if args.dry_run:
            dry_run(config, rows, tokenizer, args, device, dtype, world)
    if args.dry_run:
        return

    # What the result depends on. The same again: nothing to do. Another: nothing is overwritten.
    names = ("weight", "lr", "epochs", "steps", "batch_size", "max_length", "shown", "seed")
    content = [[[row.task, row.prompt, row.completion] for row in part] for part in (rows, held)]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    made_by = {"student": known[0], "rows": digest, **{name: getattr(args, name) for name in names}}
    made_by["dtype"] = str(dtype).removeprefix("torch.")
    if out.exists():
        sample.check_same(out, made_by)
        return print(f"{out}: trained already") if rank == 0 else None
    for path in whole_checkpoints(f"{out}.checkpoints")[-1:]:
        sample.check_same(path, made_by, path / "record.json")
    record = {**made_by, "model": args.model, "solve": str(solve), "refine": str(refined), "flags": vars(args)}
    record |= {"data": dict(zip(TASKS, counts)), "validation_rows": len(held), "versions": sample.versions()}
    if rank == 0:
        write_json(meta_path(out), {**record, "complete": False})
    if device.type == "cuda" and not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        record["spent"] = train(model, rows, held, tokenizer, args, device, dtype, out, made_by, rank, world)
    except torch.OutOfMemoryError:
        raise InputError("the device's memory is full; lower --max-length or give --checkpointing")
    if rank == 0:
        draw_losses(Path(f"{out}.metrics.jsonl"), f"{out}.loss.png")
        write_json(meta_path(out), {**record, "complete": True})
    # Saved as float32: rounded to bfloat16, weights that moved by less than half a step of it would not have moved.
    save(model, out, source, model_card(args, record))
    if rank == 0:
        print(f"{out}: a Hugging Face folder; losses in {out}.metrics.jsonl and {out}.loss.png")
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
