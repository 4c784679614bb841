"""What --model, --data and --device stand for: short names, downloads from the hub, devices, versions.

`find_model` turns what --model says into a folder, `pick_device` what --device and --dtype say into torch's
own. `BENCHMARKS` and `hub_file` are what sample.py finds problems by. What is in the hub's cache on this
machine is not downloaded again.
"""

import contextlib
import difflib
import hashlib
import json
import os
import platform
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy
import tokenizers
import torch
import torch.distributed as dist

from files import InputError, read_json
from model import TOKENIZER_FILES, Config, each_weight

HERE = Path(__file__).resolve().parent
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
    "knights": (None, str(HERE / "tiny" / "knights.jsonl")),
}
# short name -> where it is; train.py's defaults for it: teacher, training problems, learning rate.
# On GPUs of 80 GB qwen-32b and qwen3-32b (66 GB of weights) want 2 (--tensor-parallel 2), qwen-72b 4, the others 1.
ALIASES = {
    "tiny": (str(HERE / "tiny" / "qwen3-w96"), "tiny-teacher", "tiny-train", 1e-3),
    "tiny-teacher": (str(HERE / "tiny" / "teacher-w160"), "tiny-teacher", "tiny-train", 1e-3),
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
        raise InputError(f"{repo}: no such {kind} on the hub, and no such file or folder here; check the spelling")
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


def find_model(name, flag="--model", weights=True):
    """A folder, a short name or a hub id -> the folder with the files, downloaded if need be; `weights`: these, too?"""
    where = ALIASES[name][0] if name in ALIASES else name
    folder = Path(where)
    if not folder.is_dir():
        if where.count("/") != 1 or where.startswith((".", "/", "~")):
            near = difflib.get_close_matches(name, ALIASES, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"short names: {', '.join(ALIASES)}"
            raise InputError(f"{flag} {name}: no such folder, hub id or short name; {hint}")
        from huggingface_hub import snapshot_download  # slow to import

        with hub_errors(where, "model", "the model"):
            files = ["config.json", "adapter_config.json", *TOKENIZER_FILES, *(WEIGHT_FILES if weights else ())]
            folder = Path(snapshot_download(where, allow_patterns=files))
    # What an adapter is, model.load says.
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise InputError(f"{where}: no config.json, so this is not a model folder")
    return folder


# ------------------------------------------------------------------------------------------------
# Devices and weights


def pick_device(device, dtype):
    """The flags --device and --dtype -> (torch.device, torch.dtype); "auto": CUDA and bfloat16 where they are."""
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
    if dtype == "auto":  # GPUs before the A100 have no bfloat16
        new = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(False)
        dtype = "bfloat16" if new else "float32"
    return torch.device(device), getattr(torch, dtype)


def processes(device, name):
    """Join the processes that torchrun started -> (rank, their number, add, wait); without it, of this one alone.

    add(key, n) adds n to a count that all of them share, and returns it; wait() returns when all have come to it.
    """
    if "RANK" not in os.environ:
        counts = Counter()

        def add(key, n):
            counts[key] += n
            return counts[key]

        return 0, 1, add, lambda: None
    store, rank, world = next(dist.rendezvous("env://"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    # One process may have much more to do than another: who is done waits, for days if need be.
    store = dist.PrefixStore(name, store)  # train.py joins them several times, each time afresh
    its_device = device if device.type == "cuda" else None  # else NCCL guesses, and warns
    days = timedelta(days=30)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=days, device_id=its_device)
    return rank, world, store.add, dist.barrier


def pack(model):
    """Lay the weights of a float32 model on a CPU out as oneDNN likes them; elsewhere do nothing.

    F.linear lays them out anew at every call, which takes as long as a product of few rows. The two
    operators are private to torch, so it is looked whether they are there. What is packed can sample,
    and nothing else, and stays packed. (SmolLM2, 32 x 64 tokens: 1.36 times as fast.)
    """
    weight, operators = model.lm_head.weight, torch.ops.mkldnn
    there = hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")
    there = there and torch.backends.mkldnn.is_available() and weight is not None
    if there and weight.is_cpu and weight.dtype == torch.float32:
        for layer in [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]:
            packed = operators._reorder_linear_weight(layer.weight.detach(), 64)
            rest = packed, layer.bias, "none", [], ""
            layer.forward = lambda x, rest=rest: operators._linear_pointwise(x, *rest)
            layer.weight = None  # a tied embedding stays, beside its copy


def fingerprint(folder, dtype):
    """A short hash that tells two sets of weights apart: of all norms, biases and first rows, rounded to `dtype`."""
    raw = read_json(folder / "config.json")
    found = each_weight(folder, Config.from_dict(raw).tie_embeddings)
    parts = {name: weight[:1] if len(weight.get_shape()) > 1 else weight[...] for name, weight in found}
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode())
    for name in sorted(parts):
        digest.update(parts[name].to(dtype).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def versions():
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return {**found, "tokenizers": tokenizers.__version__, "numpy": numpy.__version__}
