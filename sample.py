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
import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import platform
import random
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from files import InputError, command_line, meta_path, read_json, read_jsonl, write_json
from grade import gold_answer
from model import TOKENIZER_FILES, SamplingParams, Stats, checkpoint_tensors, load, stream

# The wording that Qwen2.5-Math made common; any instruction-tuned model follows it.
SOLVE_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


# ------------------------------------------------------------------------------------------------
# Models: short names, the hub, the device

# short name -> where it is; train.py's defaults for it: teacher, training problems, learning rate
HERE = Path(__file__).resolve().parent
ALIASES = {
    "tiny": (str(HERE / "tiny" / "qwen3-w96"), "tiny-teacher", "tiny-train", 1e-3),
    "tiny-teacher": (str(HERE / "tiny" / "qwen3-w192"), "tiny-teacher", "tiny-train", 1e-3),
    "qwen-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", "qwen-7b", "gsm8k-train", 1e-5),
    "qwen-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", "qwen-7b", "gsm8k-train", 1e-5),
    "qwen-3b": ("Qwen/Qwen2.5-3B-Instruct", "qwen-14b", "gsm8k-train", 1e-5),
    "qwen-7b": ("Qwen/Qwen2.5-7B-Instruct", "qwen-32b", "gsm8k-train", 1e-5),
    "qwen-14b": ("Qwen/Qwen2.5-14B-Instruct", "qwen-72b", "gsm8k-train", 1e-5),
    "qwen-32b": ("Qwen/Qwen2.5-32B-Instruct", "qwen-72b", "gsm8k-train", 1e-5),
    "qwen-72b": ("Qwen/Qwen2.5-72B-Instruct", "qwen-72b", "gsm8k-train", 1e-5),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", "qwen3-8b", "gsm8k-train", 1e-5),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", "qwen3-8b", "gsm8k-train", 1e-5),
    "qwen3-4b": ("Qwen/Qwen3-4B", "qwen3-14b", "gsm8k-train", 1e-5),
    "qwen3-8b": ("Qwen/Qwen3-8B", "qwen3-32b", "gsm8k-train", 1e-5),
    "qwen3-14b": ("Qwen/Qwen3-14B", "qwen3-32b", "gsm8k-train", 1e-5),
    "qwen3-32b": ("Qwen/Qwen3-32B", "qwen3-32b", "gsm8k-train", 1e-5),
    "llama-1b": ("meta-llama/Llama-3.2-1B-Instruct", "llama-8b", "gsm8k-train", 1e-5),
    "llama-3b": ("meta-llama/Llama-3.2-3B-Instruct", "llama-8b", "gsm8k-train", 1e-5),
    "llama-8b": ("meta-llama/Llama-3.1-8B-Instruct", "llama-8b", "gsm8k-train", 1e-5),
    "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b", "gsm8k-train", 1e-5),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-1.7b", "gsm8k-train", 1e-5),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", "smollm2-1.7b", "gsm8k-train", 1e-5),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "smollm2-1.7b", "gsm8k-train", 1e-5),
}
# Some repositories hold the weights a second time for other programs: those are not downloaded.
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


@contextlib.contextmanager
def hub_errors(repo, kind, what):
    """An InputError of one line for whatever huggingface_hub raises while it looks for `what`."""
    from huggingface_hub import errors  # slow to import

    try:
        yield
    except errors.GatedRepoError:
        raise InputError(f"{repo}: accept this {kind}'s terms on its page on the hub, then run `hf auth login`")
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(f"{repo}: no such {kind} on the hub and no such folder here; check the spelling")
    # No connection, a time-out, an HTTP error, a full disk; ValueError: an answer that is not the hub's.
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as e:
        # A cache that lacks files (the error has a snapshot_path) names them; else the cause says more.
        cause = e if hasattr(e, "snapshot_path") else e.__cause__ or e
        line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise InputError(
            f"{repo}: no such folder here, and {what} could not be downloaded from the hub ({line}); "
            "check the network, or give a local folder"
        )


def hub_file(repo, name):
    """Download one file of a data set on the hub, or find it in the cache; None when there is none."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache  # slow to import

    with hub_errors(repo, "dataset", name):
        try:
            return Path(hf_hub_download(repo, name, repo_type="dataset"))
        except errors.LocalEntryNotFoundError:  # no network; the cache may know that there is none
            if try_to_load_from_cache(repo, name, repo_type="dataset") is None:
                raise
        except errors.EntryNotFoundError:
            pass
    return None


def find_model(name):
    """A folder, a short name or a hub id -> the folder with the files, downloaded if need be."""
    where = ALIASES[name][0] if name in ALIASES else name
    folder = Path(where)
    if not folder.is_dir():
        if where.count("/") != 1 or where.startswith((".", "/", "~")):
            near = difflib.get_close_matches(name, ALIASES, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"short names: {', '.join(ALIASES)}"
            raise InputError(f"--model {name}: no such folder, hub id or short name; {hint}")
        from huggingface_hub import snapshot_download  # slow to import

        with hub_errors(where, "model", "the model"):
            files = ["config.json", *TOKENIZER_FILES, *WEIGHT_FILES]
            folder = Path(snapshot_download(where, allow_patterns=files))
    if not (folder / "config.json").is_file():
        raise InputError(f"{where}: no config.json, so this is not a model folder")
    return folder


def pick_device(device, dtype):
    """The flags --device and --dtype -> (torch.device, torch.dtype); "auto" is CUDA and bfloat16 if there is a GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # of the processes that torchrun starts on a machine, each takes a GPU
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=device)
        if torch.device(device).type == "cuda":  # CUDA graphs are recorded on the current device
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {device}: not usable here ({str(e).splitlines()[0]}); try --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return torch.device(device), getattr(torch, dtype)


def pack(model):
    """Lay the weights of a float32 model on a CPU out as oneDNN likes them; elsewhere do nothing.

    F.linear lays them out anew at every call, which takes as long as a product of few rows. The two
    operators are private to torch, so it is looked whether they are there. What is packed can sample,
    and nothing else. (SmolLM2, 32 x 64 tokens: 1.36 times as fast.)
    """
    weight, operators = model.lm_head.weight, torch.ops.mkldnn
    there = hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")
    if there and torch.backends.mkldnn.is_available() and weight.is_cpu and weight.dtype == torch.float32:
        for layer in [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]:
            packed = operators._reorder_linear_weight(layer.weight.detach(), 64)
            rest = packed, layer.bias, "none", [], ""
            layer.forward = lambda x, rest=rest: operators._linear_pointwise(x, *rest)
            layer.weight = None  # a tied embedding stays, beside its copy


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
    "knights": (None, ""),  # made by `knights_and_knaves` below
}


PEOPLE = ("Ava", "Ben", "Cleo", "Dan", "Eve")


def holds(statement, knights):
    """Is `statement` true, where knights[i] says whether person i is a knight?"""
    kind, *parts = statement
    if kind == "knight":
        return knights[parts[0]]
    if kind == "count":
        return sum(knights) == parts[0]
    if kind == "says":  # what a knight says is true, what a knave says is not
        return holds(parts[1], knights) == knights[parts[0]]
    first, *second = (holds(part, knights) for part in parts)
    if kind == "not":
        return not first
    return {"and": first and second[0], "or": first or second[0], "if": not first or second[0]}[kind]


def phrase(statement):
    """A statement in English, without a period."""
    kind, *parts = statement
    if kind == "knight":
        return f"{PEOPLE[parts[0]]} is a knight"
    if kind == "not":
        return f"{PEOPLE[parts[0][1]]} is a knave"  # `parts` says who is a knight, no more
    if kind == "count":
        return f"exactly {parts[0]} of us {'is a knight' if parts[0] == 1 else 'are knights'}"
    if kind == "says":
        return f"{PEOPLE[parts[0]]} would say that {phrase(parts[1])}"
    first, second = map(phrase, parts)
    return {"and": f"{first} and {second}", "or": f"{first} or {second}, or both", "if": f"if {first}, then {second}"}[
        kind
    ]


def knights_and_knaves(n=200, seed=0):
    """Puzzles of 3 to 5 people who are knights, whose statements are true, or knaves, whose statements are false.

    Statements are drawn at random, and a puzzle is kept if exactly one of all 2^people assignments fits.
    """
    rng, puzzles = random.Random(seed), {}
    while len(puzzles) < n:
        people, said = 3 + len(puzzles) % 3, []
        for _ in range(people):
            who = rng.sample(range(people), 2)
            first, second = (rng.choice((("knight", i), ("not", ("knight", i)))) for i in who)
            kinds = [first, ("count", rng.randrange(1, people)), ("says", who[1], first)]
            said.append(rng.choice([*kinds, ("and", first, second), ("or", first, second), ("if", first, second)]))
        fits = []
        for knights in itertools.product((True, False), repeat=people):
            if all(holds(statement, knights) == knight for statement, knight in zip(said, knights)):
                fits.append(knights)
        if len(fits) != 1:
            continue
        names, text = PEOPLE[:people], [phrase(statement) for statement in said]
        lines = "".join(f'\n{name} says: "{words[0].upper()}{words[1:]}."' for name, words in zip(names, text))
        problem = (
            "On an island live knights, whose statements are always true, and knaves, whose statements are always "
            f"false. You meet {', '.join(names[:-1])} and {names[-1]}.{lines}\nWho is a knight and who is a knave? "
            f'Give the answer in the form "{names[0]}: knight, {names[1]}: knave, ..." with all {people} names.'
        )
        answer = ", ".join(f"{name}: {'knight' if knight else 'knave'}" for name, knight in zip(names, fits[0]))
        puzzles.setdefault(problem, answer)
    return [{"problem": problem, "answer": answer} for problem, answer in puzzles.items()]


def load_problems(data, limit=None):
    """A benchmark's name or a file -> a list of {"id", "problem", "answer", ...}; unknown keys are kept.

    `answer` is a string or None (missing): of GSM8K's worked answers what follows `####`, of a list its members joined.
    """
    path, rows = Path(data), None
    if data == "knights" and not path.is_file():
        rows = knights_and_knaves()
    elif not path.is_file():
        if data not in BENCHMARKS:
            raise InputError(f"--data {data}: no such file, and no such benchmark; benchmarks: {', '.join(BENCHMARKS)}")
        repo, *files = BENCHMARKS[data]
        found = (hub_file(repo, file) if repo else Path(file) for file in files)
        path = next((file for file in found if file), None)
        if path is None:
            raise InputError(
                f"--data {data}: {repo} on the hub has no {' or '.join(files)} (any more); "
                "download the set and give the file itself"
            )
    if rows is None and path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif rows is None:
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
        problems.append({"id": identity, "problem": text, "answer": gold_answer(answer), **row})
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
    group.add_argument("--batch-size", type=int, default=256, help="sequences decoded together, at most (default: 256)")
    group.add_argument("--memory", type=float, help="GiB for the cache and the steps (default: most of what is free)")
    graphs = argparse.BooleanOptionalAction
    group.add_argument("--graphs", action=graphs, default=True, help="decode with CUDA graphs, where there is CUDA")
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
        "temperature": params.temperature == 0 or 1e-6 <= params.temperature < math.inf,
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


def check_same(out, made_by, record=None):
    """InputError unless the output `out`, which exists, was made by what `made_by` says, after its record."""
    record = record or meta_path(out)
    old = read_json(record) if record.exists() else {}
    for key, value in made_by.items():
        if old.get(key) != value:
            raise InputError(
                f"--out {out}: exists, and was made with {key} {old.get(key)!r}, not {value!r}; "
                "choose another --out or delete it"
            )


def whole_lines(path):
    """The rows of a file that a kill may have torn: those of its whole lines -> (rows, their length in bytes)."""
    content = path.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in content.decode().split("\n") if line], len(content)


def resume(out, rows, made_by):
    """What there is already of an output -> {id: row}. `made_by` is everything that its content depends on.

    Each process appends the rows that it finishes to a part of its own, OUT.part0, OUT.part1, ...; at the end
    they become OUT, in the order of `rows`. A row is found again in any of them, whoever wrote it. What another
    command made is left alone, with an InputError.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files = [path for path in (out, *sorted(out.parent.glob(f"{out.name}.part*"))) if path.exists()]
        with open(files[0] if files else f"{out}.part0", "ab"):
            pass
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e.strerror}); choose another")
    files = [path for path in files if path.stat().st_size]
    if not files:
        return {}
    check_same(out, made_by)
    known, there = {row["id"]: row for row in rows}, {}
    for row in (row for path in files for row in whole_lines(path)[0]):
        if row["id"] not in known or row | known[row["id"]] != row:
            raise InputError(f"--out {out}: exists, with other or more problems in it; choose another or delete it")
        there[row["id"]] = row
    return there


def processes(device, name):
    """Join the processes that torchrun started -> (rank, their number, add, wait); without it, of this one alone.

    add(key, n) adds n to a count that all of them share, and returns it; wait() returns when all have come to it.
    """
    if "RANK" not in os.environ:
        counts = Counter()
        return 0, 1, lambda key, n: (counts.update({key: n}), counts[key])[1], lambda: None
    store, rank, world = next(dist.rendezvous("env://"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    # One process may have much more to do than another: who is done waits, for days if need be.
    store = dist.PrefixStore(name, store)  # train.py joins them several times, each time afresh
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(days=30))
    return rank, world, store.add, dist.barrier


def write_rows(args, out, rows, made_by, record, samples, model, params, stop_ids, requests, finish):
    """Sample what each row asks for and write the finished rows to `out`; what is there already is kept.

    `requests(i)` -> a list of (prompt token ids, one key for each of its samples) for row number i, `samples` in
    all; `finish(i, completions)` -> the finished row, from a list of Completions for each request. `record` is
    what else the meta file is to say. Of several processes each takes its share of the rows that are missing.
    """
    out, meta = Path(out), meta_path(out)
    rank, world, add, wait = processes(model.rope_freq.device, str(out))
    there = resume(out, rows, made_by)
    before = read_json(meta) if there else {}
    wait()  # nobody writes before all have looked
    missing = [i for i, row in enumerate(rows) if row["id"] not in there]
    if rank == 0 and there:
        print(f"{out}: {f'{len(there)} of {len(rows)} problems are there' if missing else 'complete'} already")
    if missing:
        pack(model)
    started = time.time()

    def write_meta(complete, **more):
        if rank == 0:
            seconds = round(before.get("seconds", 0.0) + time.time() - started, 2)
            write_json(meta, {**made_by, **record, "seconds": seconds, "complete": complete, **more})

    part = Path(f"{out}.part{rank}")
    if missing:
        write_meta(complete=False)
        if part.exists():
            os.truncate(part, whole_lines(part)[1])
    place, prompts, keys, answers, left = [], [], [], {}, Counter()  # place: of each request, its row and number
    for i in missing[rank::world]:
        answers[i] = []
        for ids, its_keys in requests(i):
            place.append((i, len(answers[i])))
            prompts.append(ids)
            keys.append(its_keys)
            answers[i].append([None] * len(its_keys))
            left[i] += len(its_keys)

    stats, shown = Stats(), [0.0, 0, 0]  # when the bar was last brought up to date; tokens and rows as it knows them
    bar = tqdm(total=samples * len(rows), initial=samples * len(there), desc=out.name, unit=" samples")
    bar.disable = bar.disable or rank > 0 or not missing
    memory = None if args.memory is None else int(args.memory * 2**30)
    options = {"batch_size": args.batch_size, "memory": memory, "graphs": args.graphs, "stats": stats}
    try:
        for finished in stream(model, prompts, keys, params, stop_ids, **options) if prompts else ():
            done = []
            for request, j, completion in finished:
                i, number = place[request]
                answers[i][number][j] = completion
                left[i] -= 1
                if not left[i]:
                    done.append(finish(i, answers.pop(i)))
            if done:
                with open(part, "a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done))
                    file.flush()
                    os.fsync(file.fileno())
            now = time.time()
            n = add("samples", len(finished))
            if now - shown[0] > 1 or not (left.total() or answers):
                tokens, going = add("tokens", stats.generated - shown[1]), add("rows", stats.running - shown[2])
                shown = [now, stats.generated, stats.running]
                bar.set_postfix_str(f"{tokens / (now - started):,.0f} tokens/s, {going} in flight", refresh=False)
                write_meta(complete=False)
            bar.update(samples * len(there) + n - bar.n)
    except torch.OutOfMemoryError:
        raise InputError(f"the device's memory is full; {out} goes on with a smaller --memory or --batch-size")
    bar.close()
    read = add("read", stats.prompt_tokens)
    wait()
    if rank == 0 and (part.exists() or missing or not before.get("complete")):
        read = add("read", 0)
        there = resume(out, rows, made_by)
        partial = Path(f"{out}.partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.write("".join(json.dumps(there[row["id"]], ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out)
        for path in out.parent.glob(f"{out.name}.part*"):
            path.unlink()
        generated = sum(c["n_tokens"] for row in there.values() for c in row.get("refinements", row["candidates"]))
        tokens = {**record["tokens"], "prompt_read": before.get("tokens", {}).get("prompt_read", 0) + read}
        write_meta(complete=True, tokens={**tokens, "generated": generated})
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def fingerprint(model, dtype=None):
    """A short hash that tells two sets of weights apart: of all norms, biases and first rows.

    With `dtype`, that of the model after it has been rounded to it.
    """
    digest = hashlib.sha256(json.dumps(model.config.raw, sort_keys=True).encode())
    for _, weight in sorted(checkpoint_tensors(model)):
        part = weight if weight.dim() == 1 else weight[:1]
        digest.update(part.to(dtype or part.dtype).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def versions():
    import numpy
    import tokenizers

    found = {"python": platform.python_version(), "torch": torch.__version__}
    return {**found, "tokenizers": tokenizers.__version__, "numpy": numpy.__version__}


def as_json(completion, tokenizer):
    """A Completion as it stands in the files. `n_tokens` counts the stop token, and the other numbers include it."""
    return {
        "text": tokenizer.decode(completion.ids),
        "n_tokens": len(completion.ids),
        "logprob": round(completion.logprob, 3),
        "self_certainty": round(completion.certainty, 4),
        "finish_reason": completion.finish_reason,
    }


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="tiny", help="short name (see ALIASES), hub id or folder (default: tiny)")
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
    model, tokenizer = load(find_model(args.model), device, dtype)
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

    def requests(i):  # one prompt, N random keys
        return [(ids[i], [(args.seed, str(problems[i]["id"]), j) for j in range(args.n)])]

    def finish(i, answers):
        shown = {"prompt": prompts[i], "n_prompt_tokens": len(ids[i])}
        return {**problems[i], **shown, "candidates": [as_json(c, tokenizer) for c in answers[0]]}

    made_by = {
        "weights": fingerprint(model),
        "dtype": str(dtype).removeprefix("torch."),
        "n": args.n,
        "seed": args.seed,
        "sampling": dataclasses.asdict(params),
    }
    tokens = {"prompt": sum(map(len, ids))}
    record = {"model": args.model, "data": args.data, "flags": vars(args), "versions": versions(), "tokens": tokens}
    write_rows(args, out, problems, made_by, record, args.n, model, params, tokenizer.stop_ids, requests, finish)


if __name__ == "__main__":
    command_line(main)
