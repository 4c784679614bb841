"""How fast train.py trains, beside other loops, on the machine at hand.

    python bench/training.py --model FOLDER --rounds 3                  about three minutes a round on two cores
    python bench/training.py --trl .venv-trl/bin/python                 with trl's packing too
    python bench/training.py --model qwen2.5-1.5b --max-length 8192     its shape with random weights, on a GPU

Each loop runs in a process of its own, which loads the model once and then waits; the rounds go from one to the next,
so that a slow minute of the machine hits all alike, and medians are compared. A round is one optimizer step on the
same rows for all, in the same precision, with AdamW (fused), clipping and a loss on completions alone:

    ours       train.py: rows end to end in packs of --max-length, logits of learned positions in chunks
    shuffled   transformers, batches of --batch-size rows in random order, padded to their longest
    grouped    the same with rows of similar length together, as from 200 rows sorted by length
    trl        SFTTrainer's packing into --max-length, its own loss

The rows: prompts of train.py made from SVAMP problems, with solutions and candidates written from a few sentences so
that lengths are those of real ones: half solve rows of 150 to 250 tokens, half refine rows of 500 to 1,200.
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from sampling import SHAPES, memory  # noqa: E402

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
    """The rows of a round -> (solve rows, refine rows), each (prompt ids, completion ids), of similar length.

    200 rows of each task are sorted by length, and a batch of neighbours is taken: what grouping by length would get.
    """
    import model as m
    import sample
    import train

    folder = Path(args.tokenizer)
    tokenizer = m.Tokenizer(folder, m.Config.from_dict(sample.read_json(folder / "config.json")))
    rng = random.Random(f"round {round}")
    problems = rng.sample(sample.load_problems(args.problems), 200)
    rows = [[], []]
    for number, problem in enumerate(problems):
        text, answer = problem["problem"], problem["answer"]
        solved = {"text": solution(text, answer, rng, rng.randint(3, 6))}
        rows[0].append(train.make_row(0, problem, number, solved, tokenizer, args.max_length))
        answers = [rng.choice((answer, "17")) for _ in range(rng.randint(3, 6))]
        problem = {**problem, "candidates": [{"text": solution(text, a, rng, rng.randint(3, 8))} for a in answers]}
        refined = {"text": solution(text, answer, rng, rng.randint(4, 8)), "order": list(range(len(answers)))}
        rows[1].append(train.make_row(1, problem, number, refined, tokenizer, args.max_length))
    picked = []
    for of_task in rows:
        of_task.sort(key=train.length_of)
        at = rng.randrange(0, len(of_task), args.batch_size)
        picked.append(of_task[at : at + args.batch_size])
    return picked


# ------------------------------------------------------------------------------------------------
# The loops: each a function that loads the model and returns a function from rows to nothing, which is timed


def ours(args):
    import torch

    import model as m
    import train

    device, dtype = m.pick_device(args.device, "auto")
    if args.model in SHAPES:
        torch.manual_seed(0)
        model = m.Decoder(m.Config.from_dict(SHAPES[args.model]))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.02)
    else:
        model, _ = m.load(args.model)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    weights = train.prepare(model, device, 1, dtype, False)
    optimizer = train.start_optimizer(weights, 1e-5)

    def run(batches):
        rows = [row for batch in batches for row in batch]
        scale = 1 / torch.tensor(train.learned_tokens(rows), device=device)
        train.update(model, weights, optimizer, train.packs_of(rows, args.max_length, 1), scale, 1e-5)

    return run


def theirs(args):
    """transformers' model, in the precision that a Trainer gives it: float32, on CUDA with bfloat16 autocast."""
    import torch
    import transformers

    if args.model in SHAPES:
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**SHAPES[args.model]))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.config.use_cache = False  # as its Trainer sets it: else keys and values are copied into a cache
    return model.float().train().to("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def padded(args):
    import torch

    model = theirs(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

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
            with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
                loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=total).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def trl(args):
    import datasets
    import torch
    import transformers
    import trl

    model = theirs(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)

    def run(batches):
        rows = [row for batch in batches for row in batch]
        data = {"input_ids": [row.prompt + row.completion for row in rows]}
        data["completion_mask"] = [[0] * len(row.prompt) + [1] * len(row.completion) for row in rows]
        config = trl.SFTConfig(
            output_dir=f"{args.out}.trl",
            packing=True,
            max_length=args.max_length,
            per_device_train_batch_size=1,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=model.device.type == "cuda",
            use_cpu=model.device.type == "cpu",
            report_to=[],
        )
        trainer = trl.SFTTrainer(
            model, config, train_dataset=datasets.Dataset.from_dict(data), processing_class=tokenizer
        )
        trainer.current_gradient_accumulation_steps = 1  # what its train() would set
        batches = list(trainer.get_train_dataloader())
        started = time.perf_counter()  # packing and setting up its trainer are not counted
        for batch in batches:
            trainer.training_step(model, batch, num_items_in_batch=None)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return started

    return run


LOOPS = {"ours": ours, "shuffled": padded, "grouped": padded, "trl": trl}


def work(args):
    """The process of one loop: the number of a round in, a line of results out, until there is no more."""
    results, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints goes elsewhere
    import torch

    run, first = LOOPS[args.loop](args), True
    print("{}", file=results, flush=True)
    for line in sys.stdin:
        batches = make_rows(args, int(line))
        batches = batches[:1] if first else batches  # a solve batch warms up
        first = False
        rows = [row for batch in batches for row in batch]
        if args.loop != "grouped":
            random.Random(0).shuffle(rows)
            batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:  # the peak from here on: Linux takes a 5 to start counting again
            Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        started = run(batches) or started
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory("VmHWM")
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, for the next loop
        lengths = [len(row.prompt) + len(row.completion) for row in rows]
        done = {"seconds": seconds, "peak": peak, "tokens": sum(lengths), "lengths": lengths}
        print(json.dumps({**done, "learned": sum(len(row.completion) for row in rows)}), file=results, flush=True)


class Loop:
    """The other end of `work`."""

    def __init__(self, name, args):
        python = args.trl if name == "trl" else sys.executable
        command = [python, __file__, "--loop", name]
        for flag in ("model", "tokenizer", "problems", "device", "batch_size", "max_length", "out"):
            command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
        log = open(f"{args.out}.{name}.log", "a")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.name = name
        self.read()

    def read(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit(f"the loop {self.name!r} stopped; see its log")

    def run(self, round):
        self.process.stdin.write(f"{round}\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    real, here = os.environ.get("GSR_REAL_MODEL"), os.environ.get("GSR_PROBLEMS")
    parser.add_argument("--model", default=real, help="folder of SmolLM2-135M-Instruct, or a shape of sampling.py's")
    parser.add_argument("--tokenizer", default=real, help="folder whose tokenizer makes the rows (default: the same)")
    problems = f"{here}/svamp.jsonl" if here else None
    parser.add_argument("--problems", default=problems, help="svamp.jsonl, problems with answers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="number of the first round, which chooses its rows")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a padded batch; a step has two (default: 4)")
    parser.add_argument("--max-length", type=int, default=2048, help="of a pack, ours and trl's (default: 2048)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trl", help="a python that has trl")
    parser.add_argument("--out", default="runs/bench/training")
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        return work(args)
    if not args.model or not args.tokenizer or not args.problems:
        sys.exit("error: give --model and --problems, or set GSR_REAL_MODEL and GSR_PROBLEMS")
    import torch

    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    loops = [Loop(name, args) for name in LOOPS if name != "trl" or args.trl]
    rounds = {loop.name: [] for loop in loops}
    for round in range(args.rounds + 1):
        for loop in loops:
            done = loop.run(args.first + round)
            if round:  # the first one warms up
                rounds[loop.name].append(done)
    for loop in loops:
        loop.close()

    print(f"{'trained tokens a second':30}{'median':>10}{'ours is':>10}{'peak, MiB':>12}{'ours is':>10}")
    for name, done in rounds.items():
        rate = statistics.median(x["tokens"] / x["seconds"] for x in done)
        ratio = statistics.median(
            theirs["seconds"] / ours["seconds"] for theirs, ours in zip(done, rounds["ours"], strict=True)
        )
        peak, our_peak = (max(x["peak"] for x in rounds[n]) for n in (name, "ours"))
        print(f"{name:30}{rate:10.1f}{ratio:9.2f}x{peak >> 20:12}{our_peak / peak:9.2f}x")
    machine = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    machine |= {"torch": torch.__version__, "model": Path(args.model).name, "date": time.strftime("%Y-%m-%d")}
    Path(f"{args.out}.json").write_text(json.dumps({**machine, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
