"""Sample N candidate solutions for each problem.

    python sample.py                                                        the built-in tiny model
    python sample.py --model qwen-1.5b --data gsm8k --n 8 --out runs/qwen-1.5b/gsm8k.candidates.jsonl
    python sample.py --model path/to/folder --data problems.jsonl --limit 20 --n 4 --out candidates.jsonl

The first stage of parallel self-refinement: N independent samples of the same prompt. Read
`SOLVE_PROMPT`, then `main`; what stands between is where problems come from and how a file is written
so that it can be stopped at any moment.

--data is a JSONL file with `problem` (or `question`), `answer` and, if you like, `id`, or a parquet
file, or the name of a benchmark. Sampling defaults come from the model's generation_config.json; flags
override them; what was used stands in the .meta.json beside the output. There too is what one cannot see
in the file: versions, token counts, seconds. A generation config's repetition_penalty is left out: it
punishes a model for repeating the numbers of its problem, and, in refinement, for copying what the
candidates got right.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import time
from pathlib import Path

import torch
from tqdm import tqdm

from evaluate import InputError, command_line, meta_path, read_json, read_jsonl, write_json
from model import HERE, SamplingParams, generate, hub_file, load, pick_device

# The wording that Qwen2.5-Math made common; any instruction-tuned model follows it.
SOLVE_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


# ------------------------------------------------------------------------------------------------
# Problems

# name -> hub repository and the file in it (places that it has had, in the order to try), or a local file
BENCHMARKS = {
    "tiny": (None, str(HERE / "tiny" / "test.jsonl")),
    "tiny-train": (None, str(HERE / "tiny" / "train.jsonl")),
    "gsm8k": ("openai/gsm8k", "main/test-00000-of-00001.parquet"),
    "gsm8k-train": ("openai/gsm8k", "main/train-00000-of-00001.parquet"),
    "math500": ("HuggingFaceH4/MATH-500", "test.jsonl"),
    "aime24": ("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet"),
    "aime25": ("math-ai/aime25", "test.jsonl", "data/test-00000-of-00001.parquet"),
    "amc23": ("math-ai/amc23", "test-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    "olympiadbench": ("math-ai/olympiadbench", "test.jsonl", "data/test-00000-of-00001.parquet"),
    "minerva": ("math-ai/minervamath", "test.jsonl", "data/test-00000-of-00001.parquet"),
}


def load_problems(data, limit=None):
    """A benchmark's name or a file -> a list of {"id", "problem", "answer", ...}; unknown keys are kept.

    `answer` is a string or None: of GSM8K's worked answers what follows `####`, of a list its members joined.
    """
    if Path(data).is_file():
        path = Path(data)
    elif data in BENCHMARKS:
        repo, *files = BENCHMARKS[data]
        found = (hub_file(repo, file, "dataset") if repo else Path(file) for file in files)
        path = next((file for file in found if file), None)
        if path is None:
            raise InputError(
                f"--data {data}: {repo} on the hub has no {' or '.join(files)} (any more); "
                "download the set and give the file itself"
            )
    else:
        raise InputError(f"--data {data}: no such file, and no such benchmark; benchmarks: {', '.join(BENCHMARKS)}")

    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        rows = read_jsonl(path)
    problems = []
    for number, row in enumerate(rows[:limit], 1):
        text = row.pop("problem", None) or row.pop("question", None)
        if not isinstance(text, str):
            raise InputError(f"{path}, row {number}: no text under 'problem' or 'question', only {', '.join(row)}")
        answer = row.pop("answer", None)
        answer = row.pop("final_answer", None) if answer is None else answer
        if isinstance(answer, list):
            answer = ", ".join(map(str, answer))
        if isinstance(answer, str) and "\n#### " in answer:
            answer = answer.rpartition("\n#### ")[2]
        identity = row.pop("id", None)
        identity = f"{data if data in BENCHMARKS else path.stem}-{number - 1}" if identity is None else identity
        problems.append({"id": identity, "problem": text, "answer": None if answer is None else str(answer), **row})
    return problems


# ------------------------------------------------------------------------------------------------
# Sampling flags, shared with refine.py


def add_sampling_flags(parser):
    group = parser.add_argument_group("sampling (defaults: the model's generation_config.json)")
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-p", type=float, help="keep the likeliest tokens that sum to this probability")
    group.add_argument("--top-k", type=int, help="keep this many of the likeliest tokens; 0 for all")
    group.add_argument("--min-p", type=float, help="keep tokens with this share of the likeliest one's probability")
    group.add_argument("--max-new-tokens", type=int, help="tokens of a completion at most (2048 if nothing else says)")
    group.add_argument("--seed", type=int, default=0, help="same seed, same samples, whatever the batch (default: 0)")
    group = parser.add_argument_group("machine")
    group.add_argument("--batch-size", type=int, default=128, help="sequences decoded together (default: 128)")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    group.add_argument("--device", default="auto", help="auto: CUDA (and bfloat16) if there is a GPU, else cpu")


def check_sizes(args, *flags):
    """InputError for a flag that counts something and is below 1."""
    for flag in flags:
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")


def sampling_params(args, defaults):
    """The flags over the model's defaults -> SamplingParams, checked."""
    values = {}
    for field in dataclasses.fields(SamplingParams):
        flag, default = getattr(args, field.name), defaults.get(field.name)
        values[field.name] = flag if flag is not None else default if default is not None else field.default
    params = SamplingParams(**values)
    checks = {
        "temperature": 0 <= params.temperature < math.inf,
        "top_p": 0 < params.top_p <= 1,
        "top_k": params.top_k >= 0,
        "min_p": 0 <= params.min_p <= 1,
        "max_new_tokens": params.max_new_tokens >= 1,
    }
    for name, good in checks.items():
        if not good:
            raise InputError(f"--{name.replace('_', '-')} {getattr(params, name)}: out of range")
    return params


# ------------------------------------------------------------------------------------------------
# An output file that can be stopped at any moment


def check_same(out, made_by):
    """InputError unless the output `out`, which exists, was made by what `made_by` says."""
    old = read_json(meta_path(out)) if meta_path(out).exists() else {}
    for key, value in made_by.items():
        if old.get(key) != value:
            raise InputError(
                f"--out {out}: exists, and was made with {key} {old.get(key)!r}, not {value!r}; "
                "choose another --out or delete it"
            )


def resume(out, rows, made_by):
    """Open the output file -> the rows already in it. `made_by` is everything that its content depends on.

    The file grows by whole lines, in the order of `rows`. What was written by the same command is kept, a line
    that a kill tore is cut off; whatever else stands there is left alone, with an InputError.
    """
    out, meta = Path(out), meta_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new = not out.exists() or out.stat().st_size == 0
        with open(out, "ab"):
            pass
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e.strerror}); choose another")
    if new:
        write_json(meta, {**made_by, "complete": False})
        return []
    check_same(out, made_by)
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(out, len(whole))
    kept = [json.loads(line) for line in whole.decode().split("\n") if line]
    if len(kept) > len(rows) or any(old | row != old for old, row in zip(kept, rows)):
        raise InputError(f"--out {out}: exists, with other or more problems in it; choose another --out or delete it")
    return kept


def write_rows(out, rows, made_by, record, batch_size, samples, complete):
    """Write complete(row numbers, bar) for all rows to `out`, batch by batch; what stands there already is kept.

    `complete` takes a range of row numbers and a progress bar that counts samples, `samples` a row, and returns
    the finished rows. A batch always holds the same rows, also after a restart in its middle, so that even the
    last digit of a log-probability comes out the same. `record` is what else the meta file is to say.
    """

    def count(rows):  # tokens generated for them
        return sum(c["n_tokens"] for row in rows for c in row.get("refinements", row["candidates"]))

    old = resume(out, rows, made_by)
    kept, tokens = len(old), count(old)
    meta = meta_path(out)
    if kept:
        print(
            f"{out}: " + (f"{kept} of {len(rows)} problems are there" if kept < len(rows) else "complete") + " already"
        )
    seconds = read_json(meta).get("seconds", 0.0)
    tokens_now, started = 0, time.time()

    def write_meta(complete):
        record["tokens"]["generated"] = tokens
        state = {"seconds": round(seconds + time.time() - started, 2), "complete": complete}
        write_json(meta, {**made_by, **record, **state})

    per_batch = max(1, batch_size // samples)
    batches = [range(i, min(i + per_batch, len(rows))) for i in range(0, len(rows), per_batch)]
    batches = [batch for batch in batches if batch.stop > kept]
    first = samples * (batches[0].start if batches else len(rows))
    bar = tqdm(total=samples * len(rows), initial=first, desc=Path(out).name, unit=" samples", disable=not batches)
    for batch in batches:
        try:
            finished = complete(batch, bar)
        except torch.OutOfMemoryError:
            raise InputError(f"--batch-size {batch_size}: the device's memory is full; {out} goes on with a lower one")
        fresh = finished[max(kept - batch.start, 0) :]
        with open(out, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh))
            file.flush()
            os.fsync(file.fileno())
        tokens += count(fresh)
        tokens_now += count(finished)
        bar.set_postfix_str(f"{tokens_now / (time.time() - started):,.0f} tokens/s")
        write_meta(complete=False)
    bar.close()
    if not read_json(meta)["complete"]:
        write_meta(complete=True)


def versions():
    import numpy
    import tokenizers

    found = {"python": platform.python_version(), "torch": torch.__version__}
    return {**found, "tokenizers": tokenizers.__version__, "numpy": numpy.__version__}


def as_json(completion, tokenizer):
    """A Completion as it stands in the files. `n_tokens` counts the stop token, and `logprob` includes it."""
    return {
        "text": tokenizer.decode(completion.ids),
        "n_tokens": len(completion.ids),
        "logprob": round(completion.logprob, 4),
        "finish_reason": completion.finish_reason,
    }


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="tiny", help="short name (see model.py), hub id or folder (default: tiny)")
    parser.add_argument("--data", default="tiny", help=f"a file, or one of: {', '.join(BENCHMARKS)} (default: tiny)")
    parser.add_argument("--n", type=int, default=4, help="candidates a problem (default: 4)")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--out", help="default: runs/MODEL/DATA.candidates.jsonl")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    check_sizes(args, "n", "limit", "batch_size")
    out = args.out or f"runs/{Path(args.model).name}/{Path(args.data).stem}.candidates.jsonl"

    problems = load_problems(args.data, args.limit)
    device, dtype = pick_device(args.device, args.dtype)
    model, tokenizer = load(args.model, device, dtype)
    params = sampling_params(args, tokenizer.generation_config)
    prompts, ids = [], []
    for problem in problems:
        text, tokens = tokenizer.encode_chat(SOLVE_PROMPT.format(problem=problem["problem"]))
        if len(tokens) >= model.config.context:
            raise InputError(
                f"--data {args.data}, id {problem['id']!r}: a prompt of {len(tokens)} tokens, and the context of "
                f"{args.model} is {model.config.context}; leave the problem out"
            )
        prompts.append(text)
        ids.append(tokens)

    def complete(batch, bar):
        """Sample the candidates of some problems: one prompt each, N random keys each."""
        keys = [[(args.seed, str(problems[i]["id"]), j) for j in range(args.n)] for i in batch]
        samples = generate(model, [ids[i] for i in batch], keys, params, tokenizer.stop_ids, bar)
        return [
            {**problems[i], "prompt": prompts[i], "candidates": [as_json(c, tokenizer) for c in completions]}
            for i, completions in zip(batch, samples)
        ]

    made_by = {
        "weights": model.fingerprint(),
        "dtype": str(dtype).removeprefix("torch."),
        "n": args.n,
        "seed": args.seed,
        "sampling": dataclasses.asdict(params),
    }
    tokens = {"prompt": sum(map(len, ids))}
    record = {"model": args.model, "data": args.data, "flags": vars(args), "versions": versions(), "tokens": tokens}
    write_rows(out, problems, made_by, record, args.batch_size, args.n, complete)


if __name__ == "__main__":
    command_line(main)
