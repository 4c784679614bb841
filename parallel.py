"""A model on several devices: which part of it each process holds, in what memory, and how it is written.

    torchrun --nproc-per-node=4 sample.py --model qwen-72b --tensor-parallel 4 ...    one model on four GPUs
    torchrun --nproc-per-node=8 train.py --model qwen-7b                              eight parts of all weights

Two ways to cut a matrix, for two purposes:

    load_share     sampling (tensor parallel, arXiv 1909.08053): of each layer a process has some heads of the
                   attention and some channels of the MLP, and computes with them alone. What they add to the hidden
                   state is summed over the processes, twice a layer. All of them draw the same tokens.
    load_sharded   training (FSDP2, arXiv 2304.11277): a process has some rows of every matrix, of its gradient and
                   of its moments, and gathers all rows of a layer while it computes that layer on tokens of its own.

Both read from the files no more than what the process keeps. `save` writes a model that is held in such parts.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.benchmark import Timer

from files import InputError, disk_errors
from model import TOKENIZER_FILES, Decoder, checkpoint_rows, free_memory, materialise, read_config, read_weights

# Layers whose outputs are cut (the rows of their matrix), and those after them, whose inputs are cut (the columns):
# heads go from q, k and v to o, channels of the MLP from gate and up to down.
BY_OUTPUT, BY_INPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def shapes(config, dtype=torch.float32):
    """A Decoder without memory: its weights are shapes alone, to be counted or to be filled later."""
    with torch.device("meta"):
        return Decoder(config).to(dtype)


def count(config):
    """The number of parameters."""
    return sum(weight.numel() for weight in shapes(config).parameters())


def sync(path):
    """Wait until a file or a folder's list of names is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def wait():
    """Return when all processes have come to it."""
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------------------------
# Sampling: tensor parallel


def share_of(config, parts):
    """The Config of what one of `parts` processes computes: fewer heads, a narrower MLP."""
    numbers = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "mlp_dim": config.mlp_dim}
    for name, n in numbers.items():
        if n % parts:
            raise InputError(f"--tensor-parallel {parts}: the model's {name} is {n}, no multiple of it; choose another")
    return dataclasses.replace(config, **{name: n // parts for name, n in numbers.items()})


def check_fits(what, config, dtype, device, parts):
    """InputError where a model cannot be shared among `parts` processes, or a part is more than the device has free."""
    need, free = count(share_of(config, parts)) * dtype.itemsize, free_memory(device)
    if int(os.environ.get("WORLD_SIZE", 1)) % parts:
        raise InputError(f"--tensor-parallel {parts}: start it with torchrun --nproc-per-node={parts}, or a multiple")
    if need > 0.95 * free:
        most = math.gcd(config.n_heads, config.n_kv_heads, config.mlp_dim)
        good = [n for n in range(parts + 1, most + 1) if most % n == 0]
        enough = [n for n in good if count(share_of(config, n)) * dtype.itemsize < 0.8 * free]
        have = f"{need / 1e9:.1f} GB of weights, and {device} has {free / 1e9:.1f} GB free"
        how = "take a smaller model"
        if enough:
            how = f"share them: torchrun --nproc-per-node={enough[0]}, and --tensor-parallel {enough[0]}"
        raise InputError(f"{what}: {have}; {how}")


def load_share(folder, device, dtype, part, parts):
    """Part number `part` of a folder's model -> Decoder, which computes once `join` has told it who has the others.

    Embeddings, norms and the output matrix are in all parts: each process has all hidden states and all logits.
    """
    whole = read_config(folder)
    model = materialise(shapes(share_of(whole, parts), dtype), device)
    targets = {}
    for name, weight, first, n in checkpoint_rows(model):
        rows, shape, (layer, kind) = weight.detach()[first : first + n], [n, *weight.shape[1:]], name.split(".")[-2:]
        dim = 0 if layer in BY_OUTPUT else 1 if layer in BY_INPUT and kind == "weight" else None
        slices = ...
        if dim is not None:
            size = shape[dim]
            slices, shape[dim] = (slice(None),) * dim + (slice(part * size, (part + 1) * size),), size * parts
        targets[name] = rows, slices, shape  # rows: [n, inputs] of a matrix, [n] of a bias or a norm
    read_weights(Path(folder), targets, whole.tie_embeddings)

    for block in model.model.layers if part else ():  # the sum is to have a bias once
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            if layer.bias is not None:
                layer.bias.detach().zero_()
    return model


def join(model, parts):
    """All processes call this: each `parts` that follow one another compute their model together from here on."""
    joined_before = hasattr(model, "group")
    model.group, _ = dist.new_subgroups(parts, timeout=timedelta(days=30))

    def add_up(layer, inputs, output):
        dist.all_reduce(output, group=model.group)

    def agree(x):
        dist.all_reduce(x, dist.ReduceOp.MIN, group=model.group)
        return x

    model.agree = agree  # with the same memory and the same tokens they take the same steps
    for block in () if joined_before else model.model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.register_forward_hook(add_up)


# ------------------------------------------------------------------------------------------------
# Training: fully sharded


def load_sharded(folder, device, dtype, rank, world):
    """A folder's model, of which each process keeps its rows in float32, and computes in `dtype` -> Decoder."""
    config = read_config(folder)
    model, mesh = shapes(config), init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    targets = {}
    for name, weight, first, n in checkpoint_rows(materialise(model, device)):
        local = weight.detach().to_local()
        start = rank * -(-len(weight) // world)  # FSDP's parts have ceil(rows / world) rows; which is the first here
        low, high = (min(max(row, first), first + n) for row in (start, start + len(local)))
        targets[name] = local[low - start : high - start], slice(low - first, high - first), (n, *weight.shape[1:])
    read_weights(Path(folder), targets, config.tie_embeddings)
    return model


# ------------------------------------------------------------------------------------------------
# What training takes

# bfloat16 matrix products, FLOP/s, as the makers state them (without sparsity), by a word in the device's name
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12}


def flops(config, tokens, learned, squares):
    """Floating-point operations of a step: `learned` tokens have a loss, `squares` is the sum of row lengths^2."""
    # 6 for each weight and token (output matrix: token with a loss), 12 for each channel of half the attention pairs.
    C, L, heads = config.dim, config.n_layers, config.n_heads * config.head_dim
    layer = 2 * C * heads + 2 * C * config.n_kv_heads * config.head_dim + 3 * C * config.mlp_dim
    return 6 * (L * layer * tokens + config.vocab_size * C * learned + L * heads * squares)


def training_memory(config, tokens, learned, process, checkpointing, chunk):
    """Bytes that a step takes of a process's device and of the machine's memory -> (device, machine, both in words).

    `tokens` is the length of the longest pack, `learned` how many of them have a loss, `chunk` how many logits the
    loss computes at a time. On a CPU both are the same. An estimate: within 15% of what was measured on a CPU.
    """
    device, dtype, _, world = process
    C, L, V, size, gpu = config.dim, config.n_layers, config.vocab_size, dtype.itemsize, device.type != "cpu"
    weights, outer = count(config), V * C * (1 if config.tie_embeddings else 2)
    held = 16 * weights / world  # each weight, its gradient and two moments take 4 bytes each
    if world == 1 and dtype != torch.float32:
        held += size * weights  # the copy to compute with
    if world > 1:  # what is outside the layers, and two layers: gathered, in place, gradients, and their float32
        held += (outer + 2 * (weights - outer) / L) * (3 * size + 4) + 8 * outer
    # What a layer keeps of a token for its gradient: input and output of both norms (on a CPU also what is between),
    # queries, keys and values (on a CPU keys and values for each query head, too), attention, the MLP's two channels.
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    kept = 4 * C + 2 * (q + kv) + 2 * config.mlp_dim if gpu else 6 * C + 5 * q + 2 * kv + 4 * config.mlp_dim
    kept += (q + 2 * kv if gpu else 2 * q + 3 * kv) if config.qk_norm else 0
    # With checkpointing, the input of every layer, and of one what it keeps and the gradients of that.
    kept = C * L + 2 * (kept + 2 * config.mlp_dim * gpu) if checkpointing else kept * L
    # A CPU's allocator leaves gaps. Beside that stands one layer's gradients, or before them the logits of the loss,
    # and the gradients of the output matrix and of the embedding.
    step = tokens * kept * size * (1 if gpu else 1.4) + 2 * V * C * size
    step += max(8 * tokens * config.mlp_dim * size, min(chunk, V * learned) * (4 + size))
    statm, base = Path("/proc/self/statm"), 2**29  # where Linux does not say what Python and torch take now
    if statm.exists():
        base = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    export = min(5e9, 4 * weights)  # a file of the result at a time
    on_device, on_host = held + step, base + (export if gpu else held + step)
    where = f"{on_device / 2**30:.1f} GiB on {device} and " if gpu else ""
    where += f"{on_host / 2**30:.1f} GiB of the machine's memory for each of {world} processes"
    if (free := free_memory(device)) < (on_device if gpu else on_host - base):
        where += f", more than the {free / 2**30:.1f} GiB that are free: lower --max-length, or see --checkpointing"
    return on_device, on_host, f"training: {weights / 1e6:,.1f} M weights; about {where}"


def peak(device):
    """The FLOP/s that the maker of a GPU states for bfloat16, or 0."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((value for word, value in PEAKS.items() if word in name), 0)


def speed(config, rows, device, dtype):
    """Floating-point operations a second of one matrix product of the MLP, for so many rows."""
    a, b = (torch.randn(*x, device=device).to(dtype) for x in ((rows, config.dim), (config.dim, config.mlp_dim)))
    product = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * rows * config.dim * config.mlp_dim / product.timeit(5).median


# ------------------------------------------------------------------------------------------------
# Export, and errors of writing


def reason(error):
    """What went wrong with a checkpoint, in words. torch wraps the errors of all processes in one of its own."""
    cause = error = next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error
    if not isinstance(error, Exception):
        raise error  # Ctrl-C or SIGTERM
    while cause and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause.strerror if cause else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def writing(path):
    """A full disk and the like as an InputError, also where torch or safetensors make an error of their own of it."""
    try:
        with disk_errors(path):
            yield
    except (dcp.api.CheckpointException, SafetensorError) as e:
        raise InputError(f"{path}: cannot be written ({reason(e)}); what was finished is kept, and a rerun goes on")


def save(model, folder, source, card=None, shard_bytes=5 * 10**9):
    """Write a Hugging Face folder: the weights as they are, the rest copied from folder `source`.

    Weights of more than `shard_bytes` go to several files; `card` becomes README.md. All processes of a sharded
    model call this and write files in turns: none holds more than one of them, and one weight that it gathers. All
    goes to a sibling folder, which is renamed at the end.
    """
    from huggingface_hub import split_torch_state_dict_into_shards  # slow to import
    from safetensors.torch import save_file

    folder, partial = Path(folder), Path(f"{folder}.partial")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = {name: (weight.detach(), first, n) for name, weight, first, n in checkpoint_rows(model)}
    sizes = {name: torch.empty(n, *w.shape[1:], dtype=w.dtype, device="meta") for name, (w, _, n) in rows.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_bytes)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait()
    for number, (file, names) in enumerate(plan.filename_to_tensors.items()):
        state = {}
        for name in names:
            weight, first, n = rows[name]
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # all take part in it
            if number % world == rank:
                state[name] = whole[first : first + n].to("cpu", copy=True)
        if state:
            save_file(state, partial / file, {"format": "pt"})
    wait()
    if rank:
        return
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    raw = {**model.config.raw, "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}
    raw.pop("dtype", None)  # the newer name of the same
    (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    if card:
        (partial / "README.md").write_text(card, encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, partial / name)
    for path in partial.iterdir():
        shutil.copymode(partial / "config.json", path)  # safetensors lets nobody but the owner read
        sync(path)
    sync(partial)
    os.replace(partial, folder)
