"""How fast train.py trains, beside other loops, on the machine at hand.

    python bench/training.py --model FOLDER     on a CPU, the second half of make bench
    python bench/training.py --device cuda      on a GPU, the second half of make bench-gpu

Each loop runs in a process of its own, which loads the model once and then waits; the rounds go
from one to the next, so that a slow minute of the machine hits all alike, and medians are compared.
A round is one optimizer step on the same rows for all, in the same precision, with AdamW (fused),
clipping and a loss on completions alone:

    ours       train.py: rows end to end in packs of --max-length, logits where there is a loss
    shuffled   transformers, rows in random order, --batch-size at a time, padded to their longest
    grouped    the same with rows of similar length together, as from 200 rows sorted by length

The rows: prompts of train.py made from SVAMP problems, with solutions and candidates written from a
few sentences so that lengths are those of real ones: half solve rows of 150 to 250 tokens, half
refine rows of 500 to 1,200. Without a tokenizer to make them, as on a GPU, they are random ids of
such lengths, in four packs. The MFU counts what train.py counts, against the maker's number.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from sampling import SHAPES, Engine, machine, memory, pick, random_model, serve, show  # noqa: E402

# ------------------------------------------------------------------------------------------------
# Rows

STEPS = (
    "Let us first write down what the problem says.",
    "We are told: {fact}",
    "That number matters for the question, so we keep it in mind.",
    "Now think about which operation fits here, addition, subtraction, multiplication or division.",
    "We put the numbers in the order in which they occur and work it out step by step.",
    "Check: putting the result back into the story gives the numbers that we started with.",
    "So the result of this step follows directly from the facts above.",
)


def solution(problem, answer, rng, sentences):
    """A worked solution of about 20 tokens a sentence that ends in \\boxed{answer}."""
    facts = [fact.strip() + "." for fact in problem.split(".") if fact.strip()]
    lines = [rng.choice(STEPS).format(fact=rng.choice(facts)) for _ in range(sentences)]
    return "\n".join(lines) + f"\nThe final answer is \\boxed{{{answer}}}."


def make_rows(args, round):
    """The rows of a round -> batches of similar length, a solve batch and a refine batch.

    200 rows of each task are sorted by length, and neighbours taken: what grouping would get.
    """
    import model as m
    import sample
    import train

    config = m.Config.from_dict(sample.read_json(Path(args.tokenizer) / "config.json"))
    tokenizer, room = m.Tokenizer(args.tokenizer, config), args.max_length
    rng = random.Random(f"round {round}")
    rows = [[], []]
    for number, problem in enumerate(rng.sample(sample.load_problems(args.problems), 200)):
        text, answer = problem["problem"], problem["answer"]
        solved = {"text": solution(text, answer, rng, rng.randint(3, 6))}
        rows[0].append(train.make_row(0, problem, number, solved, tokenizer, room))
        answers = [rng.choice((answer, "17")) for _ in range(rng.randint(3, 6))]
        candidates = [{"text": solution(text, a, rng, rng.randint(3, 8))} for a in answers]
        problem = {**problem, "candidates": candidates}
        refined = {"text": solution(text, answer, rng, rng.randint(4, 8))}
        refined["order"] = list(range(len(answers)))
        rows[1].append(train.make_row(1, problem, number, refined, tokenizer, room))
    picked = []
    for of_task in rows:
        of_task.sort(key=train.length_of)
        at = rng.randrange(0, len(of_task), args.batch_size)
        picked.append(of_task[at : at + args.batch_size])
    return picked


def random_rows(args, round):
    """The same of random ids, as many as four packs hold with some room to spare."""
    import train

    rng, rows, room = random.Random(f"round {round}"), [], int(3.87 * args.max_length)
    for task in itertools.cycle((0, 1)):
        sizes = rng.randint(*((70, 100), (420, 1000))[task]), rng.randint(80, (150, 200)[task])
        row = train.Row(task, *([rng.randrange(10, 49000) for _ in range(n)] for n in sizes))
        room -= train.length_of(row)
        if room < 0:
            break
        rows.append(row)
    rows.sort(key=train.length_of)
    return [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]


# ------------------------------------------------------------------------------------------------
# The loops: each a function that loads the model and returns a function from rows to nothing


def ours(args):
    import torch

    import hub
    import model as m
    import train

    process = train.Process(*hub.pick_device(args.device, "auto"), 0, 1)
    device = process.device
    if args.model in SHAPES:
        model = random_model(args.model, device, torch.float32)
    else:
        model, _ = m.load(args.model, device)
    weights = train.prepare(model, process, False)
    optimizer = train.start_optimizer(weights, 1e-5)

    def run(batches):
        rows = [row for batch in batches for row in batch]
        scale = 1 / torch.tensor(train.learned_tokens(rows), device=device)
        packs = [train.load_pack(pack, device) for pack in train.packs_of(rows, args.max_length, 1)]
        train.update(model, weights, optimizer, packs, scale, 1e-5)

    return run


def padded(args):
    """transformers' model as a Trainer has it: float32, on CUDA with bfloat16 autocast."""
    import torch
    import transformers

    auto = transformers.AutoModelForCausalLM
    if args.model in SHAPES:
        model = auto.from_config(transformers.AutoConfig.for_model(**SHAPES[args.model]))
    else:
        model = auto.from_pretrained(args.model, dtype=torch.float32)
    model.config.use_cache = False  # else keys and values are copied into a cache
    model = model.float().train().to(args.device)
    how = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}
    optimizer, on_gpu = torch.optim.AdamW(model.parameters(), **how), args.device != "cpu"

    def run(batches):
        total = sum(len(row.completion) for batch in batches for row in batch)
        for batch in batches:
            width = max(len(row.prompt) + len(row.completion) for row in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
            for i, row in enumerate(batch):
                n = len(row.prompt) + len(row.completion)
                ids[i, :n] = torch.tensor(row.prompt + row.completion)
                labels[i, len(row.prompt) : n] = torch.tensor(row.completion)
                mask[i, :n] = 1
            ids, mask, labels = (x.to(model.device) for x in (ids, mask, labels))
            given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                loss = model(**given, num_items_in_batch=total).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


LOOPS = {"ours": ours, "shuffled": padded, "grouped": padded}


def loop(args):
    """A loop -> the function from a line, a round's number and how much of it, to its results."""
    import torch

    import model as m
    import parallel
    import train

    run, on_gpu = LOOPS[args.loop](args), args.device != "cpu"
    raw = SHAPES.get(args.model) or json.loads((Path(args.model) / "config.json").read_text())
    config = m.Config.from_dict(raw)

    def step(number, n_batches):
        batches = (make_rows if args.tokenizer else random_rows)(args, number)[:n_batches]
        rows = [row for batch in batches for row in batch]
        if args.loop != "grouped":
            random.Random(0).shuffle(rows)
            batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, to Linux
        started = time.perf_counter()
        run(batches)
        torch.cuda.synchronize() if on_gpu else None
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM")
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, for the next loop
        lengths, learned = list(map(train.length_of, rows)), sum(train.learned_tokens(rows))
        work = parallel.flops(config, sum(lengths), learned, sum(n * n for n in lengths))
        done = {"seconds": seconds, "peak": peak, "flops": work, "learned": learned}
        return {**done, "tokens": sum(lengths) + len(rows)}

    return lambda line: step(**json.loads(line))


# ------------------------------------------------------------------------------------------------


def compare(args, model, names, report):
    """The loops in turns on one model; a line of the table for each."""
    import torch

    import parallel

    engines, rounds = {}, {name: [] for name in names}
    for name in names:
        command = [sys.executable, __file__, "--loop", name, "--model", model]
        for flag in ("tokenizer", "problems", "device", "batch_size", "max_length", "out"):
            value = getattr(args, flag)
            command += [f"--{flag.replace('_', '-')}", str(value)] if value else []
        engines[name] = Engine(command, f"{args.out}.{name}.log")
    on_gpu = args.device != "cpu"
    for round in range(args.rounds + 1):
        for name, engine in engines.items():
            few = 1 if round == 0 and not on_gpu else None  # on a CPU, a batch is enough to warm up
            done = engine.run(number=args.first + round, n_batches=few)
            rounds[name] += [done] if round else []
    for engine in engines.values():
        engine.close()
    peak = parallel.peak(torch.device(args.device))
    label = Path(model).name.removeprefix("gsr-")[:12]
    for name, done in rounds.items():
        seconds = [x["seconds"] for x in done]
        ratio = statistics.median(a / b["seconds"] for a, b in zip(seconds, rounds["ours"]))
        ratio = "" if name == "ours" else f"{ratio:.2f}x"
        rate, work = ([x[of] / x["seconds"] for x in done] for of in ("tokens", "flops"))
        rate, mfu = statistics.median(rate), f"{statistics.median(work) / peak:.1%}" if peak else ""
        most = max(x["peak"] for x in done) / 2**30
        step = 1000 * statistics.median(seconds)
        show(f"{label}, {name}", f"{rate:,.0f}", ratio, f"{step:,.0f}", mfu, "", f"{most:.1f}")
    report["works"].append({"model": label, "rounds": rounds})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add, real, here = parser.add_argument, *map(os.environ.get, ("GSR_REAL_MODEL", "GSR_PROBLEMS"))
    add("--model", help="folder of SmolLM2-135M-Instruct, or a shape of sampling.py's")
    add("--tokenizer", help="folder whose tokenizer makes the rows (default: that of --model)")
    add("--problems", default=f"{here}/svamp.jsonl" if here else None, help="svamp.jsonl")
    add("--rounds", type=int, default=3)
    add("--first", type=int, default=0, help="number of the first round, which chooses its rows")
    add("--batch-size", type=int, default=4, help="rows of a padded batch (default: 4)")
    add("--max-length", type=int, help="of a pack (default: 2048; 8192 on a GPU)")
    add("--device", default="auto")
    add("--transformers", action="store_true", help="on a GPU too")
    add("--out", default="runs/bench/training")
    add("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        return serve(lambda: loop(args))
    args.device = pick(args.device)
    on_gpu = args.device != "cpu"
    models = [args.model] if args.model else ["qwen2.5-1.5b", "qwen2.5-0.5b"] if on_gpu else [real]
    if not args.tokenizer and models[0] not in SHAPES:
        args.tokenizer = models[0]
    if not models[0] or (args.tokenizer and not args.problems):
        sys.exit("error: give --model and --problems, or set GSR_REAL_MODEL and GSR_PROBLEMS")
    args.max_length = args.max_length or (8192 if on_gpu else 2048)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    names = ["ours", *["shuffled", "grouped"] * (args.transformers or not on_gpu)]
    report = {**machine(args.device), "works": []}
    show("training, loop", "tokens/s", "ours is", "ms a step", "MFU", "", "peak, GiB")
    for model in models:
        compare(args, model, names, report)
    Path(f"{args.out}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
