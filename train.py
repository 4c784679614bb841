"""Generative Self-Refinement: train one model jointly to solve and to refine.

    python train.py                                          the built-in tiny model, minutes on a CPU
    python train.py --model qwen-1.5b                        a real one, on the GPU
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
drown the other.

Without --solve and --refine, what is missing under runs/MODEL/ is made first, by the commands that are
printed: the student's candidates, the teacher's solutions, the teacher's refinements. Given one or both,
training uses those files alone.

Left out: packing (rows of similar length share a padded batch), data parallelism, evaluation while training.
"""

import argparse
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import refine
import sample
from evaluate import Grader, InputError, answer_of, command_line, meta_path, read_jsonl, write_json
from model import ALIASES, load, pick_device, save

TASKS = ("solve", "refine")


@dataclass
class Row:
    """One training example."""

    task: int  # index in TASKS
    prompt: list  # token ids that are only read
    completion: list  # token ids that are learned, the stop id last


# ------------------------------------------------------------------------------------------------
# From files to rows


def make_data(args):
    """Make the three files that training needs, or find them -> (solve file, refine file)."""
    folder = Path("runs") / Path(args.model).name
    candidates, solutions = folder / "train.candidates.jsonl", folder / "teacher.candidates.jsonl"
    refinements = folder / "teacher.refined.jsonl"
    common = ["--seed", str(args.seed), "--device", args.device, "--batch-size", str(args.sample_batch_size)]
    if args.max_new_tokens:
        common += ["--max-new-tokens", str(args.max_new_tokens)]
    problems = ["--data", args.data] + (["--limit", str(args.limit)] if args.limit else [])
    for stage, flags in (
        (sample, ["--model", args.model, *problems, "--n", str(args.n), "--out", str(candidates)]),
        (sample, ["--model", args.teacher, *problems, "--n", "1", "--out", str(solutions)]),
        (refine, ["--model", args.teacher, "--candidates", str(candidates), "--out", str(refinements)]),
    ):
        print(f"python {Path(stage.__file__).name} {' '.join(flags + common)}")
        stage.main(flags + common)
    return solutions, refinements


def solve_rows(path, tokenizer, max_length, grader, dropped):
    """The right solutions in a candidates file, as Rows. `dropped` counts the others by reason."""
    rows = []
    for problem in refine.read_candidates(path):
        prompt = tokenizer.encode_chat(sample.SOLVE_PROMPT.format(problem=problem["problem"]))[1]
        for text in good_texts(problem, problem["candidates"], problem.get("prompt", ""), grader, dropped):
            completion = tokenizer.encode_completion(text)
            if len(prompt) + len(completion) > max_length:
                dropped["too long"] += 1
            else:
                rows.append(Row(0, prompt, completion))
    return rows


def refine_rows(path, tokenizer, max_length, grader, dropped):
    """The right refinements in a refined file, as Rows.

    The prompt is made anew for the student's tokenizer and template, with the candidates in the order in
    which the teacher saw them, and cut so that prompt and refinement fit `max_length` together.
    """
    rows = []
    for problem in read_jsonl(path, keys=("id", "problem", "answer", "candidates", "refinements")):
        for refinement in problem["refinements"]:
            for text in good_texts(problem, [refinement], refinement.get("prompt", ""), grader, dropped):
                completion = tokenizer.encode_completion(text)
                try:
                    order = refinement["order"]
                    _, prompt, _ = refine.refinement_prompt(problem, order, tokenizer, max_length, len(completion))
                    rows.append(Row(1, prompt, completion))
                except InputError:
                    dropped["too long"] += 1
    return rows


def good_texts(problem, completions, prompt, grader, dropped):
    """The texts to learn from: ended by themselves, with the right answer, each once."""
    texts = []
    for completion in completions:
        if completion.get("finish_reason") == "length":
            dropped["cut off"] += 1
        elif not grader.equal(problem.get("answer"), answer_of(completion, prompt)):
            dropped["wrong"] += 1
        elif completion["text"] in texts:
            dropped["twice"] += 1
        else:
            texts.append(completion["text"])
    return texts


# ------------------------------------------------------------------------------------------------
# From rows to losses


def epoch_of(rows, batch_size, seed, epoch):
    """One epoch as a list of steps, each a list of about `batch_size` Rows with its share of both tasks."""
    rng = np.random.default_rng([seed, epoch])
    n_steps = max(1, round(len(rows) / batch_size))
    steps = [[] for _ in range(n_steps)]
    for task in range(len(TASKS)):
        of_task = [row for row in rows if row.task == task]
        for step, part in zip(steps, np.array_split(rng.permutation(len(of_task)), n_steps)):
            step += [of_task[i] for i in part]
    return [step for step in steps if step]


def micro_batches(step, tokens):
    """Cut a step into lists of rows of similar length, each of about `tokens` tokens when padded."""
    batch = []
    for row in sorted(step, key=lambda row: len(row.prompt) + len(row.completion), reverse=True):
        if batch and (len(batch) + 1) * (len(batch[0].prompt) + len(batch[0].completion)) > tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def task_losses(model, batch, device):
    """Sum of the cross-entropy over each task's completion tokens: a batch of Rows -> [2], in TASKS's order."""
    width = max(len(row.prompt) + len(row.completion) for row in batch) - 1
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # [B, T], padded on the right: nothing looks there
    labels = torch.full((len(batch), width), -1)  # [B, T], the next token where it is learned
    for i, row in enumerate(batch):
        whole = torch.tensor(row.prompt + row.completion)
        ids[i, : len(whole) - 1] = whole[:-1]
        labels[i, len(row.prompt) - 1 : len(whole) - 1] = whole[len(row.prompt) :]
    ids, labels = ids.to(device), labels.to(device)
    task = torch.tensor([row.task for row in batch], device=device)[:, None].expand_as(labels)  # [B, T]
    learned = labels >= 0
    hidden = model(ids)[learned]  # [B, T, C] -> [M, C], the M learned positions: the only ones that need logits
    losses = F.cross_entropy(model.logits(hidden).float(), labels[learned], reduction="none")  # [M]
    return torch.stack([losses[task[learned] == t].sum() for t in range(len(TASKS))])  # [2]


def learning_rate(step, n_steps, peak, warmup):
    """Linear warm-up to `peak`, then half a cosine down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model, rows, args, device, log):
    """Fine-tune `model` in place on `rows`; one JSON line a step goes to the open file `log`."""
    # Weights and optimizer state are float32 throughout: an update is often smaller than what bfloat16 can add
    # to a weight. On a GPU the matrix products run in bfloat16 (autocast), which needs no loss scaling.
    bf16 = torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    per_epoch = len(epoch_of(rows, args.batch_size, args.seed, 0))
    n_steps = args.steps or args.epochs * per_epoch
    warmup, weights = max(1, n_steps // 20), torch.tensor([1.0, args.weight], device=device)
    steps, started, seen, epoch = iter(()), time.time(), 0, 0
    bar = tqdm(range(n_steps), desc="train", unit=" steps")
    for number in bar:
        step = next(steps, None)
        if step is None:
            steps, epoch = iter(epoch_of(rows, args.batch_size, args.seed, epoch)), epoch + 1
            step = next(steps)
        # The denominators are those of the whole step, so that accumulation does not change the loss.
        counts = [sum(len(row.completion) for row in step if row.task == t) for t in range(len(TASKS))]
        scale = weights / torch.tensor(counts, device=device).clamp(min=1)  # [2]
        sums = torch.zeros(len(TASKS), device=device)
        for batch in micro_batches(step, args.micro_batch_tokens):
            with bf16:
                losses = task_losses(model, batch, device)  # [2]
            (losses * scale).sum().backward()
            sums += losses.detach()
            seen += sum(len(row.prompt) + len(row.completion) for row in batch)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = learning_rate(number, n_steps, args.lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        means = [s / c if c else None for s, c in zip(sums.tolist(), counts)]
        shown = " ".join(f"{name} {mean:.3f}" for name, mean in zip(TASKS, means) if mean is not None)
        bar.set_postfix_str(f"{shown} {seen / (time.time() - started):,.0f} tokens/s")
        line = {"step": number + 1, "loss_solve": means[0], "loss_refine": means[1], "lr": lr, "grad_norm": norm.item()}
        log.write(json.dumps({**line, "tokens": seen, "seconds": round(time.time() - started, 2)}) + "\n")
        log.flush()
    model.eval()
    return {"steps": n_steps, "tokens": seen, "seconds": round(time.time() - started, 2)}


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    group = parser.add_argument_group("what")
    group.add_argument("--model", default="tiny", help="the student: short name, hub id or folder (default: tiny)")
    group.add_argument("--teacher", help="the larger model that shows how (default: in model.py's table)")
    group.add_argument("--data", help="training problems, as in sample.py (default: in model.py's table)")
    group.add_argument("--limit", type=int, help="only the first so many problems")
    group.add_argument("--n", type=int, default=4, help="candidates a problem (default: 4)")
    group.add_argument("--solve", metavar="FILE", help="candidates file whose right solutions to learn from")
    group.add_argument("--refine", metavar="FILE", help="refined file whose right refinements to learn from")
    group.add_argument("--out", help="folder for the trained model (default: runs/MODEL/trained)")
    group = parser.add_argument_group("how")
    group.add_argument("--weight", type=float, default=1.0, help="of the refinement loss (default: 1)")
    group.add_argument("--lr", type=float, help="peak learning rate (default: in model.py's table, else 1e-5)")
    group.add_argument("--epochs", type=int, default=2, help="passes over the rows (default: 2)")
    group.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    group.add_argument("--batch-size", type=int, default=32, help="rows a step (default: 32)")
    group.add_argument(
        "--micro-batch-tokens",
        type=int,
        default=8192,
        help="padded tokens at once; a step takes as many"
        " passes as it needs and adds up their gradients (default: 8192)",
    )
    group.add_argument("--max-length", type=int, default=4096, help="tokens of prompt and completion (default: 4096)")
    group.add_argument("--sample-batch-size", type=int, default=128, help="sequences decoded together (default: 128)")
    group.add_argument("--max-new-tokens", type=int, help="of the data that are made (default: as in sample.py)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", default="auto", help="auto: CUDA if there is a GPU, else cpu")
    args = parser.parse_args(argv)
    sizes = ("limit", "n", "epochs", "steps", "batch_size", "micro_batch_tokens", "max_length", "sample_batch_size")
    sample.check_sizes(args, *sizes)
    _, teacher, data, lr = ALIASES.get(args.model, (None, None, "gsm8k-train", 1e-5))
    args.teacher, args.data, args.lr = args.teacher or teacher, args.data or data, args.lr or lr
    out = Path(args.out or f"runs/{Path(args.model).name}/trained")
    if not (args.solve or args.refine) and not args.teacher:
        raise InputError(f"--model {args.model}: not in model.py's table, so give --teacher (or --solve and --refine)")

    device, _ = pick_device(args.device, "auto")
    model, tokenizer = load(args.model, device, torch.float32)
    args.max_length = min(args.max_length, model.config.context)
    solve, refined = (args.solve, args.refine) if args.solve or args.refine else make_data(args)
    rows, grader = [], Grader()
    for name, path, make in (("solve", solve, solve_rows), ("refine", refined, refine_rows)):
        if path:
            dropped = {"wrong": 0, "cut off": 0, "twice": 0, "too long": 0}
            made = make(path, tokenizer, args.max_length, grader, dropped)
            print(f"{path}: {len(made)} {name} rows; dropped: " + ", ".join(f"{n} {why}" for why, n in dropped.items()))
            rows += made
    grader.close()
    if not rows:
        raise InputError(f"{solve or ''} {refined or ''}: no right solution or refinement to learn from")

    # What the result depends on. The same again: nothing to do. Another: nothing is overwritten.
    names = ("weight", "lr", "epochs", "steps", "batch_size", "max_length", "seed")
    digest = hashlib.sha256(json.dumps([[row.task, row.prompt, row.completion] for row in rows]).encode())
    made_by = {"student": model.fingerprint(), "rows": digest.hexdigest()[:16], **{n: getattr(args, n) for n in names}}
    if out.exists():
        sample.check_same(out, made_by)
        print(f"{out}: trained already")
        return
    record = {**made_by, "model": args.model, "solve": str(solve), "refine": str(refined), "flags": vars(args)}
    write_json(meta_path(out), {**record, "versions": sample.versions(), "complete": False})
    with open(f"{out}.metrics.jsonl", "w", encoding="utf-8") as log:
        spent = train(model, rows, args, device, log)
    # Saved as float32: rounded to bfloat16, weights that moved by less than half a step of it would not have moved.
    save(model, out, tokenizer.folder)
    write_json(meta_path(out), {**record, "spent": spent, "versions": sample.versions(), "complete": True})
    print(f"{out}: a Hugging Face folder; losses in {out}.metrics.jsonl")


if __name__ == "__main__":
    command_line(main)
