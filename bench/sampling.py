"""How fast model.py samples, beside transformers or an older checkout, on the machine at hand.

    python bench/sampling.py --model FOLDER                   the first half of make bench
    python bench/sampling.py --model FOLDER --only speed      one part
    python bench/sampling.py --model FOLDER --against DIR     beside another checkout
    python bench/sampling.py --device cuda --only speed       the first half of make bench-gpu

Each engine runs in a process of its own, which loads the model once and then waits; the rounds go
from one to the next, so that a slow minute of the machine hits all alike, and medians are compared.
Prompts are included in the time, stop tokens are ignored, and the first round only warms up.

On a CPU: chat prompts of GSM8K problems, temperature 1, top-p 0.95, float32. FOLDER is
SmolLM2-135M-Instruct; the Qwen shapes have random weights. The ceiling is the number of tokens a
second if the model's matrix products ran at the speed of one large product of the same run.

On a GPU: random prompts and weights, bfloat16; the benchmark that nano-vllm has (bench.py there),
and batches of one size at top-p 0.95. The ceiling reads the weights once a step and the cache once
a token, at the bandwidth of a measured copy.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

QWEN = {"vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
QWEN |= {"eos_token_id": 151645}
QWEN2 = {**QWEN, "model_type": "qwen2", "num_key_value_heads": 2, "max_position_embeddings": 32768}
QWEN3 = {**QWEN, "model_type": "qwen3", "num_key_value_heads": 8, "max_position_embeddings": 40960}


def shape(base, width, layers, heads, mlp, **others):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**base, **sizes, "intermediate_size": mlp, **others}


SHAPES = {
    "qwen2.5-0.5b": shape(QWEN2, 896, 24, 14, 4864),
    "qwen2.5-1.5b": shape(QWEN2, 1536, 28, 12, 8960),
    "qwen3-0.6b": shape(QWEN3, 1024, 28, 16, 3072, head_dim=128),
}

# Memory besides weights and cache: Python and torch's libraries, a prefill pass on its way through
# the layers, the logits of 64 rows.
CONSTANT = 640 << 20


def random_model(name, device, dtype):
    """A Decoder of one of SHAPES in eval mode: random matrices, norms of one, biases of zero."""
    import torch

    import model as m
    import parallel

    torch.manual_seed(0)
    config = m.Config.from_dict(SHAPES[name])
    model = m.materialise(parallel.shapes(config, dtype), device)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_("norm" in key)
    return model


# ------------------------------------------------------------------------------------------------
# The engines: each a function that loads the model and returns a function from work to seconds


def ours(args):
    import torch

    import hub
    import model as m

    device, dtype = hub.pick_device(args.device, args.dtype)
    if args.model in SHAPES:
        model = random_model(args.model, device, dtype)
    else:
        model, _ = m.load(args.model, device, dtype)
    # What `pack` leaves: the embedding, and every matrix once, a tied output matrix too.
    linear = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    weights = sum(weight.nbytes for weight in (model.model.embed_tokens.weight, *linear))
    del linear
    hub.pack(model)
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    # Named, because recorded graphs are kept for the next call only if its cache is as large.
    room = int(0.8 * torch.cuda.mem_get_info(device)[0]) if on_gpu else None

    def run(prompts, n, new_tokens, lengths=None, batch_size=512, temperature=1.0, top_p=0.95):
        params = m.SamplingParams(temperature, top_p=top_p, max_new_tokens=new_tokens)
        keys = [[(0, i, j) for j in range(n)] for i in range(len(prompts))]
        stats, sequence = m.Stats(), m.Sequence
        options = {"batch_size": batch_size, "memory": room, "stats": stats}
        if lengths:  # as if prompt i's samples stopped by themselves after so many tokens
            m.Sequence = lambda i, j, key, limit: sequence(i, j, key, lengths[i])
        wait()
        started = time.perf_counter()
        m.generate(model, prompts, keys, params, [], **options)
        wait()
        seconds = time.perf_counter() - started
        m.Sequence = sequence
        counts = {"tokens": stats.generated, "prompt_tokens": stats.prompt_tokens}
        counts |= {"steps": stats.steps, "preempted": stats.preempted}
        cache = stats.peak_pages * stats.page_bytes
        return {"seconds": seconds, **counts, "cache": cache, "weights": weights}

    return run


def transformers(args):
    import torch
    import transformers

    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    if args.model in SHAPES:
        config = transformers.AutoConfig.for_model(**SHAPES[args.model])
        model = auto.from_config(config).float().eval()
    else:
        model = auto.from_pretrained(args.model, dtype=torch.float32)
    options = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    options |= {"repetition_penalty": 1.0, "pad_token_id": 0}
    if args.device.startswith("cuda"):
        model = model.to(args.device, torch.bfloat16)
        options["cache_implementation"] = "static"

    def run(prompts, n, new_tokens):
        prompts = [ids for ids in prompts for _ in range(n)]
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(ids)) + ids for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        ids, mask = (torch.tensor(x, device=model.device) for x in (ids, mask))
        counts = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        started = time.perf_counter()
        out = model.generate(ids, attention_mask=mask, **options, **counts).cpu()
        seconds = time.perf_counter() - started
        assert out.shape[1] == longest + new_tokens
        return {"seconds": seconds, "tokens": len(prompts) * new_tokens, "steps": new_tokens}

    return run


ENGINES = {"ours": ours, "transformers": transformers}


def serve(load):
    """In an engine's process: load, then answer each line with a line, until there is no more."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library or its processes print goes elsewhere
    answer = load()
    print("{}", file=results, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line)), file=results, flush=True)


def sampler(args):
    """An engine -> the function from a line of work to its results."""
    run = ENGINES[args.engine](args)

    def answer(line):
        if not line.startswith("memory"):
            return run(**json.loads(line))
        done = {"peak": memory("VmHWM"), "now": memory("VmRSS")}
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, to Linux
        return done

    return answer


def memory(name):
    """A line of this process's status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


class Engine:
    """The other end of `serve`."""

    def __init__(self, command, log):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": open(log, "a")}
        self.process, self.log = subprocess.Popen(command, text=True, **pipes), log
        self.read()

    def read(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit(f"error: an engine stopped; see {self.log}")

    def ask(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.read()

    def run(self, **work):
        return self.ask(json.dumps(work))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def start(name, args, model):
    """The process of an engine; `before` is `ours` of the checkout that --against names."""
    root = Path(args.against) if name == "before" else ROOT
    command = [sys.executable, str(root / "bench/sampling.py"), "--model", model]
    command += ["--engine", "ours" if name == "before" else name]
    command += ["--device", args.device, "--dtype", args.dtype]
    return Engine(command, f"{args.out}.{name}.log")


# ------------------------------------------------------------------------------------------------
# The work


def chat_prompts(args, n):
    """The first n problems as chat prompts of the model in args.model -> lists of token ids."""
    import model as m
    import sample

    config = m.Config.from_dict(sample.read_json(Path(args.model) / "config.json"))
    tokenizer = m.Tokenizer(args.model, config)
    problems = sample.load_problems(args.problems, n)
    return [tokenizer.encode_chat(row["problem"])[1] for row in problems]


def random_prompts(n, length):
    """n prompts of `length` random ids."""
    return np.random.default_rng(0).integers(10, 49000, (n, length)).tolist()


def nano_vllm():
    """nano-vllm's own benchmark: 142,827 tokens in and 133,966 out, drawn as its bench.py does."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    lengths = [rng.randint(100, 1024) for _ in range(256)]
    return {"prompts": prompts, "lengths": lengths, "temperature": 0.6, "top_p": 1.0}


def lengths_of(asked):
    """The new tokens of each prompt's sample."""
    return asked.get("lengths") or [asked["new_tokens"]] * len(asked["prompts"])


def works(args):
    """What is sampled -> (label, model, what the engines are asked, {engine: what is required})."""
    if args.device == "cpu":
        fast = {"transformers": "1.8x"}
        sizes = [(args.model, 32, 64, fast), ("qwen2.5-0.5b", 16, 64, fast)]
        sizes += [("qwen2.5-0.5b", 64, 64, fast), ("qwen2.5-1.5b", 16, 32, {})]
    else:
        sizes = [("qwen2.5-1.5b", 256, 256, {"ours": "35,000"})]
        sizes += [("qwen2.5-1.5b", 16, 128, {"ours": "5,000"})]
        sizes += [("qwen2.5-1.5b", 1, 128, {"ours": "350"})]
        sizes += [("qwen2.5-0.5b", 256, 256, {"ours": "40,000"})]
        if not args.against:  # its cache takes the memory of the GPU, where two engines are to be
            sizes = [("qwen3-0.6b", 256, 1024, {"ours": "20,000"}), *sizes]
    for model, rows, new_tokens, required in sizes:
        name, label = Path(model).name, f"{rows} x {new_tokens}"
        if args.works and not any(word in name for word in args.works):
            continue
        asked = {"n": 1, "new_tokens": new_tokens}
        if name == "qwen3-0.6b":
            asked, label = {**asked, **nano_vllm()}, "nano-vllm's"
        else:
            asked["prompts"] = random_prompts(rows, 100)
            if args.device == "cpu":
                asked["prompts"] = chat_prompts(args, rows)
        yield f"{name.removeprefix('gsr-')[:12]} {label}", model, asked, required


# ------------------------------------------------------------------------------------------------
# The measurements


def device_speed(device):
    """FLOP/s of a large product on a CPU, bytes/s of a copy on a GPU: the median of 8 after one."""
    import torch

    on_cpu, times = device == "cpu", []
    a, b = torch.randn(2, 2048, 2048) if on_cpu else torch.empty(2, 2**28, device=device)
    for _ in range(9):
        started = time.perf_counter()
        if on_cpu:
            a @ b
        else:
            b.copy_(a)
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    work = 2 * 2048**3 if on_cpu else 2 * a.nbytes
    del a, b
    if not on_cpu:
        torch.cuda.empty_cache()  # the engines count what is free
    return work / statistics.median(times[1:])


def ceiling(model, asked, device, speed):
    """Tokens a second at best, at the `speed` that device_speed gives."""
    import model as m

    raw = SHAPES.get(model) or json.loads((Path(model) / "config.json").read_text())
    config = m.Config.from_dict(raw)
    C, L, D = config.dim, config.n_layers, config.head_dim
    weights = L * C * (2 * config.n_heads * D + 2 * config.n_kv_heads * D + 3 * config.mlp_dim)
    weights += config.vocab_size * C
    if device == "cpu":
        return speed / (2 * weights)
    # Every step reads the weights, and every new token the keys and values before it, in bfloat16.
    lengths = lengths_of(asked)
    read = sum(n * (len(ids) + n / 2) for n, ids in zip(lengths, asked["prompts"]))
    read = 2 * (weights * max(lengths) + read * 2 * L * config.n_kv_heads * D)
    return sum(lengths) * speed / read


def show(label, *cells):
    """A line of the table."""
    print(f"{label:44}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def speed(args, report):
    """Tokens a second of every engine on the same work, in turns."""
    heads = ("tokens/s", "ours is", "ms a step", "of ceiling", "required")
    show("sampling: sequences x new tokens, engine", *heads)
    for label, model, asked, required in works(args):
        names = ["ours", *["before"] * bool(args.against)]
        names += ["transformers"] * (args.transformers and "lengths" not in asked)
        engines = {name: start(name, args, model) for name in names}
        usual = 5 if args.device == "cpu" else 3 if sum(lengths_of(asked)) < 10000 else 1
        rounds, speeds = {name: [] for name in names}, []
        for round in range((args.rounds or usual) + 1):
            speeds.append(device_speed(args.device))
            for name, engine in engines.items():
                done = engine.run(**asked)
                if round:  # the first one warms up, and records graphs
                    rounds[name].append(done)
        for engine in engines.values():
            engine.close()
        top = ceiling(model, asked, args.device, statistics.median(speeds))
        rates = {name: [x["tokens"] / x["seconds"] for x in rounds[name]] for name in names}
        for name in names:
            rate = statistics.median(rates[name])
            ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates[name]))
            ratio = f"{ratio:.2f}x" if name != "ours" else ""
            steps = rounds[name][0].get("steps")  # an older checkout does not count them
            step = statistics.median(x["seconds"] for x in rounds[name]) / (steps or 1)
            step = f"{1000 * step:.1f}" if steps else ""
            cells = (f"{rate:,.0f}", ratio, step, f"{rate / top:.2f}", required.get(name, ""))
            show(f"{label}, {name}", *cells)
        entry = {"work": label, "required": required, "ceiling": top, "speeds": speeds}
        report["speed"].append({**entry, "tokens_per_second": rates, "rounds": rounds})


def properties(args, report):
    """What the sampler promises about its own costs."""
    engine, found = start("ours", args, args.model), report["properties"]
    engine.run(prompts=random_prompts(4, 50), n=1, new_tokens=8)

    def medians(*each):
        """Some works in turns -> the median seconds of each."""
        rounds = [[engine.run(**work)["seconds"] for work in each] for _ in range(args.rounds or 5)]
        return [statistics.median(x) for x in zip(*rounds)]

    long, short = random_prompts(8, 400), random_prompts(8, 20)
    many = [{"prompts": prompts, "n": 16, "new_tokens": 64} for prompts in (long, short)]
    with_long, with_short, prefill = medians(*many, {"prompts": long, "n": 1, "new_tokens": 1})
    found["shared_prompt"] = with_long / (with_short + prefill)
    print("8 x 16 candidates, prompts of 400 against 20 tokens and one prefill: ", end="")
    print(f"{found['shared_prompt']:.2f}  (<= 1.15)")

    mixed = {"prompts": random_prompts(96, 60), "n": 1, "new_tokens": 256, "batch_size": 32}
    lengths = [16, 256] * 48, [136] * 96
    seconds = medians(*[{**mixed, "lengths": x} for x in lengths])
    found["mixed_lengths"] = seconds[1] / seconds[0]
    print("half of the rows 16 tokens and half 256, against all 136: ", end="")
    print(f"{found['mixed_lengths']:.2f}  (>= 0.85)")

    found["by_n"], found["by_prompt"] = {}, {}
    for n in (1, 2, 4, 8, 16, 32):
        done = found["by_n"][n] = engine.run(prompts=long[:4], n=n, new_tokens=32)
        print(f"4 prompts of 400 tokens x {n:2} candidates: {done['seconds']:6.2f} s, ", end="")
        print(f"{done['prompt_tokens']} prompt tokens read")
    for length in (100, 200, 400, 800, 1600):
        done = engine.run(prompts=random_prompts(4, length), n=4, new_tokens=32)
        found["by_prompt"][length] = done
        print(f"4 prompts of {length:4} tokens x 4: {done['seconds']:6.2f} s", flush=True)
    engine.close()
    if args.device == "cpu":  # what is counted is the process's memory, not a GPU's
        found["memory"] = peak_memory(args)


def peak_memory(args):
    """The memory that sampling takes, beside that of weights, cache in use and a constant."""
    engine = start("ours", args, args.model)
    engine.ask("memory")  # the peak of loading is forgotten
    done = engine.run(prompts=random_prompts(64, 400), n=1, new_tokens=64)
    peak = engine.ask("memory")["peak"]
    engine.close()
    sizes = {"weights": done["weights"], "cache in use": done["cache"], "constant": CONSTANT}
    share = peak / sum(sizes.values())
    parts = " + ".join(f"{size >> 20} {name}" for name, size in sizes.items())
    print(f"memory, MiB: {parts}; {peak >> 20} at most, {share:.2f} of it  (0.9 to 1.1)")
    return {**sizes, "peak": peak}


def machine(device):
    """What the numbers of a run depend on besides the code."""
    import torch

    name = platform.processor() or platform.machine()
    name = name if device == "cpu" else torch.cuda.get_device_name()
    cpu = {"cores": len(os.sched_getaffinity(0)), "cpu": torch.backends.cpu.get_cpu_capability()}
    now = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    return {"machine": name, **cpu, **now}


def pick(device):
    """The flag --device -> cpu, cuda or cuda:N."""
    import torch

    there = torch.cuda.is_available()
    if device.startswith("cuda") and not there:
        sys.exit(f"error: --device {device}: no CUDA device here; torch sees a CPU alone")
    return device if device != "auto" else "cuda" if there else "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add, real = parser.add_argument, os.environ.get("GSR_REAL_MODEL")
    add("--model", default=real, help="folder of SmolLM2-135M-Instruct")
    here = os.environ.get("GSR_PROBLEMS")
    problems = f"{here}/gsm8k.jsonl" if here else "gsm8k"
    add("--problems", default=problems, help="their prompts are used (default: gsm8k)")
    add("--rounds", type=int, help="(default: 5; on a GPU 1, or 3 of short works)")
    add("--only", choices=["speed", "properties"])
    add("--works", nargs="*", help="of the speeds, only models that have one of these in the name")
    add("--against", metavar="DIR", help="another checkout of this repository, beside this one")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--transformers", action="store_true", help="with --against or on a GPU too")
    add("--out", default="runs/bench/sampling")
    add("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        return serve(lambda: sampler(args))
    args.device = pick(args.device)
    if args.against and not (Path(args.against) / "bench/sampling.py").is_file():
        sys.exit(f"error: --against {args.against}: no checkout there; try `git worktree add`")
    args.only = "speed" if args.against else args.only
    if args.device == "cpu":
        args.transformers = args.transformers or not args.against
        if not args.model or not Path(args.model).is_dir():
            sys.exit("error: give --model, the folder of SmolLM2-135M-Instruct")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    report = {**machine(args.device), "speed": [], "properties": {}}
    for part in (speed, properties):
        if args.only in (None, part.__name__) and (part == speed or args.model):
            part(args, report)
            Path(f"{args.out}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
