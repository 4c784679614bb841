"""Sample N candidate solutions for each problem.

    python sample.py                                                        the built-in tiny model
    python sample.py --model qwen-1.5b --data gsm8k --n 8 --out runs/qwen-1.5b/gsm8k.candidates.jsonl
    python sample.py --model path/to/folder --data problems.jsonl --limit 20 --n 4 --out candidates.jsonl
    python sample.py --model qwen-1.5b --data gsm8k --n 32 --adaptive       fewer where they soon agree

The first stage of parallel self-refinement: N independent samples of the same prompt. Read
`SOLVE_PROMPT`, `load_problems`, `write_rows` and `main`; names of models and benchmarks are in hub.py.

--data is a JSONL or parquet file with `problem` (or `question`), `answer` and, if you like, `id`, or the
name of a benchmark. Sampling defaults come from the model's generation_config.json; flags override them;
what was used stands in the .meta.json beside the output. A generation config's repetition_penalty is left
out: it punishes a model for repeating the numbers of its problem or what the candidates got right.
"""

import files  # isort: skip  first, so that Ctrl-C while torch is imported is one line
import argparse
import dataclasses
import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from files import InputError, Output, as_written, check_id, command_line, meta_path, read_json, read_jsonl, write_json
from grade import Grader, answer_of, extract_answer, gold_answer
from hub import BENCHMARKS, find_model, fingerprint, hub_file, pack, pick_device, processes, versions
from model import SamplingParams, Stats, Tokenizer, read_config, stream
from parallel import check_fits, join, load_share
from vote import classes, decided

# The wording that Qwen2.5-Math made common; any instruction-tuned model follows it.
SOLVE_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."

# ------------------------------------------------------------------------------------------------
# Problems

# What the stages add to a problem's line.
OURS = ("prompt", "n_prompt_tokens", "adaptive", "candidates", "rounds", "refinements")


def read_table(data):
    """A benchmark's name or a file -> (its path, its rows)."""
    path = Path(data)
    if not path.is_file():
        if data not in BENCHMARKS:
            raise InputError(f"--data {data}: no such file, and no such benchmark; benchmarks: {', '.join(BENCHMARKS)}")
        repo, *files = BENCHMARKS[data]
        found = (hub_file(repo, file) if repo else Path(file) for file in files)
        path = next((file for file in found if file), None)
        if path is None:
            missing = f"{repo} on the hub has no {' or '.join(files)} (any more)"
            raise InputError(f"--data {data}: {missing}; download the set and give the file itself")
    if path.suffix != ".parquet":
        return path, read_jsonl(path)
    import pyarrow.parquet  # slow to import

    try:
        return path, pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as e:
        raise InputError(f"{path}: cannot be read as parquet ({str(e).splitlines()[0]})")


def load_problems(data, limit=None):
    """A benchmark's name or a file -> a list of {"id", "problem", "answer", ...}; unknown keys are kept.

    `answer` is a string, or None where it is missing: of GSM8K's worked answers what follows `####`, of a list its
    members joined, and without one the boxed answer of `solution`. What an earlier stage added is dropped. InputError
    for what would fail only when the output is written: no text, ids that collide, values that JSON does not have.
    """
    path, rows = read_table(data)
    if not rows:
        raise InputError(f"{path}: no rows in it")
    problems, seen, name = [], {}, data if data in BENCHMARKS else path.stem
    for number, row in enumerate(rows[:limit]):
        where = f"{path}, row {number + 1}"
        if isinstance(row.get("candidates"), list):  # a file that sample.py or refine.py wrote
            row = {key: value for key, value in row.items() if key not in OURS}
        text = row.get(name_of_text := "question" if row.get("problem") is None else "problem")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: no text under 'problem' or 'question', only {', '.join(row)}")
        row = {key: value for key, value in row.items() if key not in ("problem", name_of_text)}
        if taken := [key for key in OURS if key in row]:
            raise InputError(f"{where}: {taken[0]!r} is what the output calls something else; rename this column")
        unknown, answer = "answer" in row, row.pop("answer", None)  # null says that nobody knows
        answer = row.pop("final_answer", None) if answer is None else answer
        if isinstance(answer, list):
            answer = ", ".join(map(str, answer))
        if isinstance(answer, str) and "\n#### " in answer:
            answer = answer.rpartition("\n#### ")[2]
        if isinstance(answer, (bytes, dict)):
            raise InputError(f"{where}: its answer is not a text but {str(answer)[:40]!r}")
        if answer is None and not unknown and isinstance(row.get("solution"), str):
            answer = extract_answer(row["solution"])
            if answer is None:
                raise InputError(f"{where}: no 'answer', and no \\boxed{{}} in its 'solution'; give an answer, or null")
        identity = row.pop("id", None)
        identity = f"{name}-{number}" if identity is None else identity
        check_id(identity, seen, where)
        problem = {"id": identity, "problem": text, "answer": gold_answer(answer), **row}
        problems.append(as_written(problem, where))
    return problems


# ------------------------------------------------------------------------------------------------
# Candidates


class Sampler(NamedTuple):
    model: torch.nn.Module
    tokenizer: object  # model.Tokenizer
    params: SamplingParams


def load_sampler(args):
    """The model that the flags name, or this process's share of it, with its sampling defaults under the flags."""
    device, dtype = pick_device(args.device, args.dtype)
    folder, share = find_model(args.model), args.tensor_parallel
    config = read_config(folder)
    check_fits(f"--model {args.model}", config, dtype, device, share)
    tokenizer = Tokenizer(folder, config)
    params = sampling_params(args, tokenizer.generation_config)
    model = load_share(folder, device, dtype, int(os.environ.get("RANK", 0)) % share, share)  # part 0 of 1 is all of it
    return Sampler(model, tokenizer, params)


def size(requests):
    """{row's number: [(prompt token ids, a key for each sample), ...]} -> (tokens to read, samples to draw)."""
    asked = [request for some in requests.values() for request in some]
    return sum(len(ids) for ids, _ in asked), sum(len(keys) for _, keys in asked)


def announce(out, rows, there, todo, where):
    """Print how many of the rows are there, and what of requests is to do, and on which device."""
    done = f"{len(rows) - len(todo)} of {len(rows)} problems are there" if todo else "complete"
    print(f"{out}: {done} already" if there else f"{out}: {len(rows)} problems", end="")
    read, draw = size(todo)
    print(f"; {draw:,} samples, {read:,} prompt tokens, {where}" if todo else "")


class Progress:
    """A bar over the tokens of all processes: of prompts, and of samples, expected as long as those that have ended.

    `add` sums over the processes: what is expected and finished samples as they come, token counts once a second.
    """

    def __init__(self, name, longest, add, disable):
        self.longest, self.add, self.told, self.told_at = longest, add, Stats(), 0.0
        self.bar = tqdm(desc=name, total=0, unit=" tokens", unit_scale=True, disable=disable)

    def expect(self, requests):
        """These requests of rows are going to be sampled."""
        for key, n in zip(("to read", "to sample"), size(requests)):
            self.add(key, n)
        self.add("going", -self.told.running)
        self.told = Stats()  # the next stream counts from 0

    def update(self, stats, finished, last):
        """Add what one step finished; True where a second has passed, and the bar was brought up to date."""
        n = self.add("samples", len(finished))
        length = self.add("length", sum(len(completion.ids) for _, _, completion in finished))
        if time.time() - self.told_at < 1 and not last:
            return False
        read = self.add("read", stats.prompt_tokens - self.told.prompt_tokens)
        generated = self.add("generated", stats.generated - self.told.generated)
        going = self.add("going", stats.running - self.told.running)
        self.told, self.told_at = dataclasses.replace(stats), time.time()
        to_sample = self.add("to sample", 0)  # of all processes
        self.bar.total = self.add("to read", 0) + to_sample * (length // n if n else self.longest)
        self.bar.set_postfix_str(f"{n}/{to_sample} samples, {going} in flight", refresh=False)
        self.bar.update(min(read + generated, self.bar.total) - self.bar.n)
        return True


def sample_rows(args, sampler, requests, finish, step):
    """Sample what rows ask for, {row's number: [(prompt token ids, a key for each sample), ...]}.

    step(stats, samples, rows, last) gets what a pass has finished, the rows made by finish(i, completions).
    """
    model, tokenizer, params = sampler
    place, prompts, keys, answers = [], [], [], {}  # place: of each request, its row and which of its requests
    for i, its_requests in requests.items():
        answers[i] = [[None] * len(its_keys) for _, its_keys in its_requests]
        for number, (ids, its_keys) in enumerate(its_requests):
            place.append((i, number))
            prompts.append(ids)
            keys.append(its_keys)
    left, stats = {i: sum(map(len, some)) for i, some in answers.items()}, Stats()
    memory = None if args.memory is None else int(args.memory * 2**30)
    options = {"batch_size": args.batch_size, "memory": memory, "stats": stats}
    options["graphs"] = args.graphs and args.tensor_parallel == 1  # sums over processes are not recorded
    for finished in stream(model, prompts, keys, params, tokenizer.stop_ids, **options):
        done = []
        for request, j, completion in finished:
            i, number = place[request]
            answers[i][number][j] = completion
            left[i] -= 1
            if not left[i]:
                done.append(finish(i, answers.pop(i)))
        step(stats, finished, done, not answers)


def sampling_record(args, sampler):
    """What samples depend on besides their prompts."""
    dtype = sampler.model.model.embed_tokens.weight.dtype
    weights, params = fingerprint(sampler.tokenizer.folder, dtype), dataclasses.asdict(sampler.params)
    return {"weights": weights, "dtype": str(dtype).removeprefix("torch."), "seed": args.seed, "sampling": params}


def write_rows(args, out, rows, requests, finish, sampler, made_by, record, next_requests=None):
    """Sample what each row asks for and write the finished rows to `out`; what is there already is kept.

    `requests[i]` is a list of (prompt token ids, one key for each of its samples) for row number i, and
    `finish(i, completions, row)` the finished row, from a list of Completions for each request. `made_by` is what the
    output depends on, so that other values are an error; `record` is only noted. Processes, or groups of
    --tensor-parallel, share the rows out. In waves: `next_requests(i, row)` are those of the next one for row number i,
    of which `row` is there (None: nothing), and none when it is complete.
    """
    model, meta, started = sampler.model, meta_path(out), time.time()
    device, ask = model.rope_freq.device, next_requests or (lambda i, row: [] if row else requests[i])
    made_by = {**made_by, **sampling_record(args, sampler)}
    record |= {"model": args.model, "flags": vars(args), "versions": versions()}
    (rank, world, add, wait), share = processes(device, str(out)), args.tensor_parallel
    if share > 1:  # so many processes draw the same samples, and one of them writes
        join(model, share)
    writes, rank, world, lead = rank % share == 0, rank // share, world // share, rank == 0
    output = Output(out, rows, made_by, rank)
    there, before = output.done, read_json(meta) if output.done else {}
    wait()  # nobody writes before all have looked
    todo = {i: some for i, row in enumerate(rows) if (some := ask(i, there.get(row["id"])))}
    mine = dict(list(todo.items())[rank::world])
    if lead:
        announce(out, rows, there, todo, f"{device}, {made_by['dtype']}")

    def write_meta(complete, **tokens):
        if lead:
            seconds = round(before.get("seconds", 0.0) + time.time() - started, 2)
            tokens = {"prompt": sum(len(ids) for row in requests for ids, _ in row), **tokens}
            write_json(meta, {**made_by, **record, "tokens": tokens, "seconds": seconds, "complete": complete})

    def step(stats, finished, done, last):
        there.update((row["id"], row) for row in done)
        if done and writes:
            output.append(done)
        if writes and progress.update(stats, finished, last):
            write_meta(complete=False)

    progress = Progress(Path(out).name, sampler.params.max_new_tokens, add, not (lead and todo))
    with progress.bar:
        if todo:
            pack(model)
            write_meta(complete=False)
        try:
            while mine:
                progress.expect(mine if writes else {})
                sample_rows(args, sampler, mine, lambda i, answers: finish(i, answers, there.get(rows[i]["id"])), step)
                mine = {i: some for i in mine if (some := ask(i, there[rows[i]["id"]]))}
        except torch.OutOfMemoryError:
            raise InputError(f"the device's memory is full; {out} goes on with a smaller --memory or --batch-size")
        wait()
        progress.bar.update(progress.bar.total - progress.bar.n)
    if lead and (todo or not before.get("complete") or output.parts()):
        read = add("read", 0) + before.get("tokens", {}).get("prompt_read", 0)
        completions = (c for row in output.finish() for c in row.get("refinements", row["candidates"]))
        write_meta(complete=True, prompt_read=read, generated=sum(c["n_tokens"] for c in completions))
    files.unlock(out)
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def as_json(completion, tokenizer):
    """A Completion as it stands in the files. `n_tokens` counts the stop token, and the other numbers include it."""
    text, numbers = tokenizer.decode(completion.ids), {"n_tokens": len(completion.ids)}
    numbers |= {"logprob": round(completion.logprob, 3), "self_certainty": round(completion.certainty, 4)}
    return {"text": text, **numbers, "finish_reason": completion.finish_reason}


def add_sampling_flags(parser):  # and those of refine.py
    group = parser.add_argument_group("sampling (defaults: the model's generation_config.json)")
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-p", type=float, help="keep the likeliest tokens that sum to this probability")
    group.add_argument("--top-k", type=int, help="keep this many of the likeliest tokens; 0 for all")
    group.add_argument("--min-p", type=float, help="keep tokens with this share of the likeliest one's probability")
    group.add_argument("--max-new-tokens", type=int, help="tokens of a completion at most (2048 if nothing else says)")
    group.add_argument("--seed", type=int, default=0, help="same seed, same samples, whatever the batch (default: 0)")
    group = parser.add_argument_group("machine")
    share = "of a model that is larger than a GPU: processes of torchrun that compute it together (default: 1)"
    group.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help=share)
    group.add_argument("--batch-size", type=int, default=256, help="sequences decoded together, at most (default: 256)")
    group.add_argument("--memory", type=float, help="GiB for the cache and the steps (default: most of what is free)")
    graphs = argparse.BooleanOptionalAction
    group.add_argument("--graphs", action=graphs, default=True, help="decode with CUDA graphs, where there is CUDA")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    group.add_argument("--device", default="auto", help="auto: CUDA (and bfloat16) if there is a GPU, else cpu")


def check_flags(args, *counts):
    """InputError for one of `counts`, flags that count something, below 1, and for a --memory that is no size."""
    for flag in counts:
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    memory = getattr(args, "memory", None)
    if memory is not None and not 0 < memory < math.inf:
        raise InputError(f"--memory {memory}: must be a number of GiB above 0")


def sampling_params(args, defaults):
    """The flags over the model's defaults -> SamplingParams, checked."""
    values = {}
    for field in dataclasses.fields(SamplingParams):
        flag, default = getattr(args, field.name), defaults.get(field.name)
        values[field.name] = flag if flag is not None else default if default is not None else field.default
    params = SamplingParams(**values)
    checks = {"temperature": params.temperature == 0 or 1e-6 <= params.temperature < math.inf}
    checks |= {"top_p": 0 < params.top_p <= 1, "top_k": params.top_k >= 0, "min_p": 0 <= params.min_p <= 1}
    for name, good in {**checks, "max_new_tokens": params.max_new_tokens >= 1}.items():
        if not good:
            where = "generation_config.json: " if getattr(args, name) is None else ""
            raise InputError(f"{where}--{name.replace('_', '-')} {getattr(params, name)}: out of range")
    return params


# ------------------------------------------------------------------------------------------------


def undecided(row, grader):
    """Is the vote of a row's candidates still open, by the criterion of `decided`? No right answer is looked at."""
    answers = [answer_of(candidate, row["prompt"]) for candidate in row["candidates"]]
    votes = Counter(number for number in classes(None, answers, grader) if number >= 0)
    second, first = sorted([0, 0, *votes.values()])[-2:]
    return not decided(first, second)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="tiny", help="short name (see hub.py), hub id or folder (default: tiny)")
    parser.add_argument("--data", default="tiny", help=f"a file, or one of: {', '.join(BENCHMARKS)} (default: tiny)")
    parser.add_argument("-n", "--n", type=int, default=4, help="candidates a problem (default: 4)")
    adaptive = "stop where the vote is decided, at 95%%: looked at after 4, 8, 16, ... candidates, up to n"
    parser.add_argument("--adaptive", action="store_true", help=adaptive)
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--out", help="default: runs/MODEL/DATA.candidates.jsonl")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    check_flags(args, "n", "limit", "batch_size", "tensor_parallel")
    out = args.out or f"runs/{Path(args.model).resolve().name}/{Path(args.data).stem}.candidates.jsonl"

    files.claim(out)
    problems = load_problems(args.data, args.limit)
    sampler = load_sampler(args)
    context, prompts, requests = sampler.model.config.context, [], []
    for problem in problems:
        text, ids = sampler.tokenizer.encode_chat(SOLVE_PROMPT.format(problem=problem["problem"]))
        if len(ids) >= context:
            what = f"a prompt of {len(ids)} tokens, and the context of {args.model} is {context}"
            raise InputError(f"--data {args.data}, id {problem['id']!r}: {what}; leave the problem out")
        prompts.append({"prompt": text, "n_prompt_tokens": len(ids), **({"adaptive": args.n} if args.adaptive else {})})
        requests.append([(ids, [(args.seed, str(problem["id"]), j) for j in range(args.n)])])  # N random keys

    def finish(i, answers, row):
        more = [as_json(completion, sampler.tokenizer) for completion in answers[0]]
        return {**problems[i], **prompts[i], "candidates": (row["candidates"] if row else []) + more}

    def next_wave(i, row):
        [(ids, keys)], n = requests[i], len(row["candidates"]) if row else 0
        more = n < args.n and (n < 4 or undecided(row, grader))  # fewer than four votes decide nothing
        # Grading has a time limit, so that processes that share a model might judge apart: then none goes on.
        more = sampler.model.agree(torch.tensor(float(more), device=device))
        return [(ids, keys[n : max(4, 2 * n)])] if more else []

    grader, device, made_by = Grader(), sampler.model.rope_freq.device, {"n": args.n, "adaptive": args.adaptive or None}
    waves = next_wave if args.adaptive else None
    write_rows(args, out, problems, requests, finish, sampler, made_by, {"data": args.data}, waves)
    grader.close()


if __name__ == "__main__":
    command_line(main)
