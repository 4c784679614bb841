"""A decoder language model in plain PyTorch: from weights on disk to sampled text.

This file is read top to bottom, and each part uses only what stands above it:

    Config                 what a Hugging Face config.json says, under the names used here
    RMSNorm, RoPE          the two small pieces of every block
    Attention, MLP, Block  one layer
    Decoder                embeddings, layers, output matrix
    load, save             Hugging Face folders, in and out; hub ids; the table of short names
    Tokenizer              text <-> token ids, and the chat template
    sample_token           logits -> one token, by temperature, top-k, top-p and min-p
    pack                   weights laid out for products of few rows on a CPU
    PagedCache             the keys and values of what has been read so far, in pages that rows share
    stream, generate       continuous batching: prompts in, completions out as they finish

One decoder covers Llama, Mistral, Qwen2/2.5, Qwen3 and SmolLM2, because they differ only in details
that their config.json names: grouped-query attention, biases, a norm on queries and keys, the head
size, tied embeddings, the scaling of RoPE and a sliding window. Module names are those of the
checkpoints, so that a state dict loads without renaming.

Left out of the textbook: dropout (nobody uses it at this scale), attention weights as an output,
beam search, and padding in the sampler: all tokens of a step lie one after another in one flat row.

The cache is cut into pages of 64 positions. Two samples of one prompt of 150 tokens share its two full
pages, and each has a copy of the third, on which it goes on by itself:

    the prompt's pages      | 0 .. 63 | 64 .. 127 |
    sample 0, own pages                           | 128 .. 149, then what it draws .. 191 | 192 .. |
    sample 1, own pages                           | 128 .. 149, then what it draws .. 191 | 192 .. |

The life of a sample, in `stream`:

    waiting    its prompt comes in when there are pages for it and batch room for its samples, and with it a copy of
               what all prompts begin with, which was read before everything else
    reading    each step reads up to a chunk of the prompts on their way: once for all samples, all but the last token,
               and in the last layer only as far as the cache: keys and values
    row        when the batch has room it starts, with the prompt's last token: a token a step, beside those being read,
               and a new page when the last one is full
    done       at a stop token or at its limit: its pages are free again at once, and the next prompt comes in
    evicted    when no page is free, the youngest gives its own up and waits again, what it drew now part of its prompt

Try it on a question:

    python model.py --model smollm2-135m "How many legs do three spiders have?"

Letters in the shape comments:
    B batch rows   T tokens of a step or of a row   S positions   P pages   V vocabulary   L layers
    C model width  H query heads   K key/value heads   G = H / K   D head size   F width of the MLP
"""

import argparse
import bisect
import ctypes
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import shutil
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from evaluate import InputError, command_line, read_json

try:
    from torch.nn.attention.varlen import varlen_attn  # from torch 2.13 on, it reads the pages of a cache
except ImportError:
    varlen_attn = None

# ------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config:
    """The numbers that fix a decoder's shape, read from a Hugging Face `config.json`."""

    vocab_size: int
    dim: int  # C
    n_layers: int  # L
    n_heads: int  # H
    n_kv_heads: int  # K
    head_dim: int  # D
    mlp_dim: int  # F
    norm_eps: float
    context: int  # the longest sequence, in tokens
    tie_embeddings: bool  # the output matrix is the embedding matrix
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each query and key head
    windows: list  # for each layer, how many positions it looks back (itself included), or None for all
    rope: dict  # rope_type, rope_theta and the numbers of that type
    raw: dict  # the file itself, to write it back

    @staticmethod
    def from_dict(raw):
        """Translate `raw`, a parsed config.json. InputError names what this file does not know."""
        kind = raw.get("model_type")
        if kind not in ("llama", "mistral", "qwen2", "qwen3"):
            raise InputError(f"config.json: model_type {kind!r} is not known here; known: llama, mistral, qwen2, qwen3")
        if raw.get("hidden_act", "silu") != "silu":
            raise InputError(f"config.json: activation {raw['hidden_act']!r} is not known here; known: silu")
        need = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        if missing := [key for key in need if not isinstance(raw.get(key), int)]:
            raise InputError(f"config.json: no number under {', '.join(missing)}")
        n_layers, n_heads = raw["num_hidden_layers"], raw["num_attention_heads"]
        head_dim = raw.get("head_dim") or (128 if kind == "qwen3" else raw["hidden_size"] // n_heads)
        context = raw.get("max_position_embeddings", 2048)

        # Old files have rope_theta and rope_scaling, new ones one dict called rope_parameters.
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        rope["rope_theta"] = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
        rope.setdefault("original_max_position_embeddings", context)
        if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
            kind = rope["rope_type"]
            raise InputError(f"config.json: RoPE type {kind!r} is not known here; known: default, linear, llama3, yarn")
        if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
            raise InputError("config.json: a partial_rotary_factor other than 1 is not known here")

        # Mistral slides in every layer, Qwen only where use_sliding_window says so, Llama never.
        if kind == "mistral":
            windows = [raw.get("sliding_window", 4096)] * n_layers
        elif kind != "llama" and raw.get("use_sliding_window"):
            first = raw.get("max_window_layers", 28)
            types = raw.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(n_layers)]
            windows = [raw.get("sliding_window", 4096) if t == "sliding_attention" else None for t in types]
        else:
            windows = [None] * n_layers
        bias = bool(raw.get("attention_bias", False)) and kind != "mistral"
        return Config(
            vocab_size=raw["vocab_size"],
            dim=raw["hidden_size"],
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=raw.get("num_key_value_heads") or n_heads,
            head_dim=head_dim,
            mlp_dim=raw["intermediate_size"],
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            context=context,
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bias,
            out_bias=kind != "qwen2" and bias,
            mlp_bias=kind == "llama" and bool(raw.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            windows=windows,
            rope=rope,
            raw=raw,
        )


# ------------------------------------------------------------------------------------------------
# The pieces of a layer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        if not x.is_cpu or x.dtype != torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        # On a CPU that is four passes over x, its squares written out. These are three, and the rest is one column.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [..., 1]
        return x * (norm.square() / x.shape[-1] + self.eps).rsqrt() * self.weight


def rope_frequencies(config):
    """The angle, in radians, by which each of the D/2 planes of a head turns from one position to the next.

    Returns (frequencies [D/2] float32, factor on cos and sin). Plain RoPE is arXiv 2104.09864; `linear`
    divides all angles; `llama3` divides only those of long wavelengths; `yarn` (arXiv 2309.00071) does so
    with a ramp in between, and makes the attention sharper by a factor.
    """
    rope, half = config.rope, config.head_dim // 2
    theta, factor, original = rope["rope_theta"], rope.get("factor"), rope["original_max_position_embeddings"]
    # The device is named so that building the model on the "meta" device leaves these numbers real.
    plane = torch.arange(half, dtype=torch.float32, device="cpu")
    freq = 1.0 / theta ** (plane / half)
    if rope["rope_type"] == "default":
        return freq, 1.0
    if rope["rope_type"] == "linear":
        return freq / factor, 1.0
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * freq / (2 * math.pi)  # full turns within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: many turns, left alone; 0: few, divided
        return freq * (keep + (1 - keep) / factor), 1.0

    # yarn
    factor = factor or config.context / original

    def plane_of(turns):  # the (fractional) plane that makes so many turns within the original context
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low, high = plane_of(rope.get("beta_fast") or 32), plane_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    keep = 1 - ((plane - low) / (high - low if high > low else 0.001)).clamp(0, 1)

    def sharpen(scale):
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    sharpness = rope.get("attention_factor")
    if sharpness is None:
        both = rope.get("mscale") and rope.get("mscale_all_dim")
        sharpness = sharpen(rope["mscale"]) / sharpen(rope["mscale_all_dim"]) if both else sharpen(1.0)
    return freq * (keep + (1 - keep) / factor), sharpness


def rotate(x, cos, sin):
    """Turn plane i of each head, which is its elements (i, i + D/2). x [..., heads, D]; cos, sin [..., 1, D].

    The turned halves are a cos - b sin and b cos + a sin: x times cos plus its halves swapped times a sin whose
    first half is negative.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def project(x, *layers):
    """x [..., C] -> the output of each linear layer. After `pack`, one product for all of them."""
    packed = getattr(layers[0], "packed", None)
    return [layer(x) for layer in layers] if packed is None else packed(x)


def sees(query, key, window):
    """Which keys a query may look at, [..., n, S], by the positions of both, query [..., n] and key [..., S]."""
    back = query[..., :, None] - key[..., None, :]  # how far each looks back
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def score_bias(query, key, window):
    """The same as what is added to scores, [..., n, S]: 0, or what leaves a key no weight beside any that is seen.

    Not -inf, because a query that sees none of some keys is still to get a finite result.
    """
    return torch.where(sees(query, key, window), 0.0, -1e30)


def attend_causal(attention, q, k, v):
    """Whole sequences that attend to themselves: q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]."""
    T, groups, window = q.shape[1], q.shape[2] // k.shape[2], attention.window
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)  # [B, T, H, D]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, D]
    if window is None or T <= window:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        i = torch.arange(T, device=q.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees(i, i, window))
    return y.transpose(1, 2)  # [B, T, H, D]


class Attention(nn.Module):
    """Causal self-attention in which G query heads share one key/value head (arXiv 2305.13245)."""

    def __init__(self, config, layer):
        super().__init__()
        C, H, K, D = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.layer, self.head_dim, self.window = layer, D, config.windows[layer]
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.out_bias)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, attend):
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)  # [..., H * D], [..., K * D] twice
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim)))  # [..., H, D]
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim)))  # [..., K, D]
        v = v.unflatten(-1, (-1, self.head_dim))  # [..., K, D]
        y = attend(self, rotate(q, cos, sin), rotate(k, cos, sin), v)  # [..., H, D]
        [y] = project(y.flatten(-2), self.o_proj)  # [..., H * D] -> [..., C]
        return y


class MLP(nn.Module):
    """The gated feed-forward layer, SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.mlp_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.mlp_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x):
        gate, up = project(x, self.gate_proj, self.up_proj)  # [..., F] each
        [y] = project(F.silu(gate) * up, self.down_proj)  # [..., F] -> [..., C]
        return y


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *attention):
        y = self.self_attn(self.input_layernorm(x), *attention)
        if len(y) < len(x):  # of some tokens the sampler needs no more than the keys and values
            x = x[: len(y)]
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The whole model. `model(ids)` gives the last hidden states, `model.logits(h)` the scores of the vocabulary.

    They are two calls because only few positions need logits, and with 152k entries a position those
    are the largest tensors there are.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        parts = {"embed_tokens": nn.Embedding(config.vocab_size, config.dim), "layers": layers}
        self.model = nn.ModuleDict({**parts, "norm": RMSNorm(config.dim, config.norm_eps)})
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        freq, self.rope_factor = rope_frequencies(config)
        # Stays float32 whatever the weights are: in bfloat16, position 10,001 would equal position 10,000.
        self.register_buffer("rope_freq", freq, persistent=False)

    def forward(self, ids, positions=None, attend=attend_causal):
        """ids [..., T] -> hidden states [..., T, C].

        As it stands, ids [B, T] are whole sequences from position 0, padded on the right. The sampler gives
        `positions` and an `attend` of its own: all tokens of a step in one flat row, and attention to the cache. The
        hidden states are then those of the tokens that `attend` gave back in the last layer.
        """
        if positions is None:
            positions = torch.arange(ids.shape[-1], device=ids.device)  # [T]
        x = self.model.embed_tokens(ids)  # [..., T, C]
        angles = positions[:, None, None].float() * self.rope_freq  # [T, 1, D/2]
        cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor
        cos, sin = torch.cat([cos, cos], -1).to(x.dtype), torch.cat([-sin, sin], -1).to(x.dtype)  # [T, 1, D]
        for block in self.model.layers:
            x = block(x, cos, sin, attend)
        return self.model.norm(x)

    def logits(self, hidden):
        """hidden [..., C] -> logits [..., V]."""
        return project(hidden, self.lm_head)[0]

    def fingerprint(self, dtype=None):
        """A short hash that tells two sets of weights apart: of all norms and biases and the first embedding.

        With `dtype`, that of the model after it has been rounded to it.
        """
        digest = hashlib.sha256(json.dumps(self.config.raw, sort_keys=True).encode())
        for _, weight in sorted(self.named_parameters()):
            part = weight if weight.dim() == 1 else weight[:1]
            digest.update(part.detach().to(dtype or part.dtype).float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# Weights: short names, folders, the hub

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
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def hub_file(repo, name, kind="model"):
    """Download one file of a hub repository (or find it in the cache); None when the repository lacks it."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache  # slow to import

    try:
        return Path(hf_hub_download(repo, name, repo_type=kind))
    except errors.LocalEntryNotFoundError as e:  # no network; the cache may know that there is no such file
        if try_to_load_from_cache(repo, name, repo_type=kind) is not None:
            return None
        reason = e
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError:
        raise InputError(
            f"{repo}: the hub wants you to accept this {kind}'s terms on its page, then run `hf auth login`"
        )
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(f"{repo}: no such {kind} on the hub and no such folder here; check the spelling")
    except (OSError, RuntimeError) as e:  # time-outs, refused connections, HTTP errors
        reason = e
    cause = str(reason.__cause__ or reason).strip().splitlines()[0]
    raise InputError(
        f"{repo}: no such folder here, and {name} could not be downloaded from the hub ({cause}); "
        "check the network, or give a local folder"
    )


def find_model(name):
    """A local folder, a short name or a hub id -> the folder that holds the files, downloaded if need be."""
    where = ALIASES[name][0] if name in ALIASES else name
    folder = Path(where)
    if not folder.is_dir():
        if where.count("/") != 1 or where.startswith((".", "/", "~")):
            near = difflib.get_close_matches(name, ALIASES, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"short names: {', '.join(ALIASES)}"
            raise InputError(f"--model {name}: no such folder, hub id or short name; {hint}")
        config = hub_file(where, "config.json")
        if config is None:
            raise InputError(f"{where}: this hub repository has no config.json, so it is not a model folder")
        for file in TOKENIZER_FILES:
            hub_file(where, file)
        if not hub_file(where, "model.safetensors") and (index := hub_file(where, "model.safetensors.index.json")):
            for shard in sorted(set(read_json(index)["weight_map"].values())):
                hub_file(where, shard)
        folder = config.parent
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json, so this is not a model folder")
    return folder


def load(name, device="cpu", dtype=torch.float32):
    """Read a model -> (Decoder in eval mode, Tokenizer). `name`: a folder, a short name or a hub id.

    Only safetensors are read. InputError where something is missing, spare, misshapen or unknown.
    """
    folder = find_model(name)
    config = Config.from_dict(read_json(folder / "config.json"))
    files = ["model.safetensors"]
    if not (folder / files[0]).exists():
        if not (folder / "model.safetensors.index.json").exists():
            raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json, so no weights")
        files = sorted(set(read_json(folder / "model.safetensors.index.json")["weight_map"].values()))

    with torch.device("meta"):  # shapes only: the weights come from the file, without being filled twice
        model = Decoder(config)
    model.rope_freq = rope_frequencies(config)[0]
    expected, found = model.state_dict(), {}
    if config.tie_embeddings:
        expected.pop("lm_head.weight")
    for file in files:
        try:
            with safe_open(folder / file, "pt", device=str(device)) as shard:
                for key in shard.keys():
                    # Some store a tied output matrix, and very old files RoPE's angles: both follow from the rest.
                    if key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and config.tie_embeddings):
                        continue
                    found[key] = shard.get_tensor(key).to(dtype)
        except (OSError, SafetensorError) as e:
            raise InputError(f"{folder / file}: cannot be read as safetensors ({e})")
    shapes, should = ({key: list(value.shape) for key, value in x.items()} for x in (found, expected))
    wrong = [f"{key} is missing" for key in should if key not in shapes]
    wrong += [f"{key} is spare" for key in shapes if key not in should]
    wrong += [f"{key} is {x}, not {should[key]}" for key, x in shapes.items() if x != should.get(key, x)]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"{folder}: weights do not fit config.json: {', '.join(sorted(wrong)[:8])}{more}")
    model.load_state_dict(found, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device).eval(), Tokenizer(folder, config)


def save(model, folder, source, card=None, shard_bytes=5 * 10**9):
    """Write a Hugging Face folder: the weights in the type that they have, the rest copied from folder `source`.

    Weights of more than `shard_bytes` go to several files, with an index. Of a model that is sharded over processes
    all have to call this; the first one writes. `card` becomes README.md.
    Everything goes to a sibling folder first and is renamed at the end, so that `folder` is never half written.
    """
    folder, partial = Path(folder), Path(f"{folder}.partial")
    writes = not dist.is_initialized() or dist.get_rank() == 0
    state = model.state_dict()
    if model.config.tie_embeddings:
        state.pop("lm_head.weight")
    files, filled, total = [[]], 0, sum(value.nbytes for value in state.values())
    for key, value in state.items():
        if files[-1] and filled + value.nbytes > shard_bytes:
            files, filled = [*files, []], 0
        files[-1].append(key)
        filled += value.nbytes
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    weight_map = {}
    for number, keys in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(keys, name)
        part = {}
        for key in keys:
            whole = state[key].full_tensor() if hasattr(state[key], "full_tensor") else state[key]
            if writes:
                part[key] = whole.detach().cpu().contiguous()
        if writes:
            save_file(part, partial / name, metadata={"format": "pt"})
    if not writes:
        return
    raw = {**model.config.raw, "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}
    raw.pop("dtype", None)  # the newer name of the same
    written = {"config.json": raw}
    if len(files) > 1:
        written["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, content in written.items():
        (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if card:
        (partial / "README.md").write_text(card, encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, partial / name)
    os.replace(partial, folder)


# ------------------------------------------------------------------------------------------------
# Text


class Tokenizer:
    """Text <-> token ids, the chat template, and the sampling defaults that a model folder carries."""

    def __init__(self, folder, config):
        folder = self.folder = Path(folder)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as e:  # the library raises nothing more specific
            raise InputError(f"{folder}/tokenizer.json: cannot be read ({e}), so text cannot be turned into tokens")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings = read_json(p) if (p := folder / "tokenizer_config.json").exists() else {}
        self.generation_config = read_json(p) if (p := folder / "generation_config.json").exists() else {}

        # The words for bos, eos, ... that a template may use; each is a string or {"content": string}.
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        words = {n: w["content"] if isinstance(w := settings.get(n), dict) else w for n in names}
        self.template_words = {name: word or "" for name, word in words.items()}
        source = settings.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(source, list):  # several named templates
            source = {t["name"]: t["template"] for t in source}.get("default")
        if not source:
            raise InputError(f"{folder}: no chat template; use an instruction-tuned model")

        # A template is a program from somewhere else: it runs in jinja's sandbox. Templates that print today's
        # date get a fixed one, so that the same command gives the same prompt tomorrow.
        options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
        env = ImmutableSandboxedEnvironment(**options)
        env.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
        env.globals["strftime_now"] = lambda layout: {"%d %b %Y": "26 Jul 2024"}.get(layout, "2024-07-26")

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        env.globals["raise_exception"] = raise_exception
        try:
            self.template = env.from_string(source)
        except jinja2.TemplateError as e:
            raise InputError(f"{folder}: the chat template cannot be read: {e}")

        # Generation stops at any of these ids; the one that the tokenizer calls eos ends a trained completion.
        stops = self.generation_config.get("eos_token_id", config.raw.get("eos_token_id"))
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        eos = self.tokenizer.token_to_id(self.template_words["eos_token"])
        if not stops and eos is None:
            raise InputError(f"{folder}: no eos_token_id in generation_config.json or config.json")
        self.stop_ids = stops or [eos]
        self.end_id = eos if eos in self.stop_ids else self.stop_ids[0]
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.added_words = [t.content for t in added]  # all that the tokenizer cuts out of text whole
        self.special_words = [t.content for t in added if t.special]  # those that are control tokens to it

    def defuse(self, text, words):
        """Put the mark U+FDD0 (a code point that no text uses) inside every word of `words` found in `text`."""
        text = text.replace("\ufdd0", "")
        for word in sorted(words, key=len, reverse=True):
            if len(word) > 1:
                text = text.replace(word, f"{word[0]}\ufdd0{word[1:]}")
        return text

    def encode_marked(self, text):
        """Token ids of a text with marks; each stretch between two marks is encoded by itself.

        No stretch holds a control token that was spelled out, and a text without marks is encoded whole,
        as any other program would encode it.
        """
        parts = [self.tokenizer.encode(part, add_special_tokens=False).ids for part in text.split("\ufdd0")]
        return [i for part in parts for i in part]

    def encode_chat(self, content):
        """A user message -> (the rendered prompt up to where the assistant speaks, its token ids).

        A problem or a candidate that spells out a control token (`<|im_end|>`) stays text.
        """
        messages = [{"role": "user", "content": self.defuse(content, self.added_words)}]
        try:
            text = self.template.render(messages=messages, add_generation_prompt=True, **self.template_words)
        except jinja2.TemplateError as e:
            raise InputError(f"{self.folder}: the chat template fails: {e}")
        return text.replace("\ufdd0", ""), self.encode_marked(text)

    def encode_completion(self, text):
        """Token ids of what a model wrote, and the id that ends it. `<think>` is a token here, `<|im_end|>` text."""
        return self.encode_marked(self.defuse(text, self.special_words)) + [self.end_id]

    def encode(self, text):
        """Token ids of plain text, nothing added."""
        return self.encode_marked(self.defuse(text, self.added_words))

    def decode(self, ids):
        """Token ids -> text, control tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------
# Sampling


@dataclass
class SamplingParams:
    """How to draw a token. The defaults are those of the plain model distribution."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # only the k likeliest; 0 for all
    top_p: float = 1.0  # only the smallest set of likeliest tokens whose probabilities sum to p
    min_p: float = 0.0  # only tokens at least this share of the likeliest one's probability
    max_new_tokens: int = 2048


@dataclass
class Completion:
    ids: list  # the generated token ids, the stop id included if one came
    logprob: float  # sum over `ids` of log p at temperature 1, before top-k, top-p and min-p
    finish_reason: str  # "stop", or "length" when max_new_tokens or the context was used up
    certainty: float = 0.0  # self-certainty, the mean over `ids` of KL(uniform || p) at temperature 1, in nats


def uniforms(key, n):
    """n numbers in [0, 1) that depend on nothing but `key`, a tuple such as (seed, problem id, sample index)."""
    words = hashlib.sha256(json.dumps(key).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(words, "little"))).random(n, dtype=np.float32)


def nucleus(ordered, mass):
    """ordered [B, n], probabilities, likeliest first -> [B, 1], the smallest that it takes to sum to `mass`."""
    return torch.where(ordered.cumsum(-1) - ordered < mass, ordered, 2.0).amin(-1, keepdim=True)


def nucleus_unsorted(probs, mass):
    """probs [V], numpy -> what `nucleus` gives for them, without sorting them all.

    The upper 16 bits of positive floats are in the order of the floats: they put the tokens into some thousand
    buckets, and only the bucket in which the sum reaches `mass` is sorted.
    """
    bucket = probs.view(np.int32) >> 16  # [V]
    sums = np.bincount(bucket, weights=probs)
    above = sums[::-1].cumsum()[::-1] - sums  # what the buckets of likelier tokens hold
    last = np.argmax((above < mass) & (sums > 0))
    inside = np.sort(probs[bucket == last])[::-1]  # likeliest first
    return inside[above[last] + inside.cumsum(dtype=float) - inside < mass].min(initial=inside[0])


def draw(weights, u):
    """weights [B, n] >= 0, u [B, 1] in [0, 1) -> [B, 1], the entries where their running sums pass u of the total."""
    sums = weights.cumsum(-1, dtype=torch.double)
    index = torch.searchsorted(sums, u.double() * sums[:, -1:], right=True)  # below the total because u is below 1
    return index.clamp(max=weights.shape[1] - 1)  # past the end only where the weights are no numbers


def sample_token(logits, u, params):
    """logits [B, V] float32, u [B] in [0, 1) -> (token ids, their log p at temperature 1, certainty) [B].

    Draws by inverting the cumulative distribution at u, over the vocabulary in its own order: one random number a
    row, instead of V, is what lets a sample's randomness be drawn beforehand from its key. The filters apply in the
    order top-k, top-p, min-p; a token exactly as likely as the last one passes with it. Most rows keep fewer than 128
    tokens and are drawn from these. The certainty is KL(uniform || p) = logsumexp(logits) - mean(logits) - log V, in
    nats at temperature 1 (arXiv 2502.18581).
    """
    probs, u = torch.softmax(logits, -1), u[:, None]
    norm = logits.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()  # a tenth of logsumexp's time
    certainty = norm - logits.mean(-1, keepdim=True) - math.log(logits.shape[-1])
    if params.temperature not in (0, 1):
        torch.softmax(logits / params.temperature, -1, out=probs)
    if params.temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    elif params.top_k or params.top_p < 1 or params.min_p:
        top, ids = probs.topk(min(max(128, params.top_k + 1), probs.shape[-1]))  # [B, k], likeliest first
        kept, mass = top, params.top_p
        lowest = params.min_p * top[:, :1]  # [B, 1], the smallest probability that passes
        if params.top_k:
            kept = top[:, : params.top_k]
            mass = params.top_p * kept.sum(-1, keepdim=True)
            lowest = lowest.maximum(kept[:, -1:])
        if params.top_p < 1:
            lowest = lowest.maximum(nucleus(kept, mass))
        ids, order = ids.sort()  # in the vocabulary's order
        token = ids.gather(1, draw(torch.where(top >= lowest, top, 0.0).gather(1, order), u))
        wide = (lowest <= top[:, -1:]).nonzero()[:, 0]  # more may pass; this waits for the device, once a step
        if len(wide):
            rows, lowest = probs[wide], lowest[wide]
            if params.top_p < 1 and not params.top_k:  # a sort on a CPU would take as long as all else
                if rows.is_cpu:
                    lowest = torch.tensor([[nucleus_unsorted(row, mass)] for row in rows.numpy()])
                else:
                    lowest = nucleus(rows.sort(descending=True).values, mass)
                lowest = lowest.maximum(params.min_p * top[wide, :1])
            token[wide] = draw(rows.mul_(rows >= lowest), u[wide])
    else:
        token = draw(probs, u)
    logprob = logits.gather(1, token) - norm
    return token[:, 0], logprob[:, 0], certainty[:, 0].clamp(max=1e4)  # finite also where a logit is -inf


def halve(weight, bias):
    """A linear layer, float32 -> x to x @ weight.T + bias, from weight * 2^n in float16; None if that would round.

    bfloat16, in which most checkpoints come, has fewer digits than float16 but smaller numbers, so that some power of
    two fits nearly all of them in.
    """
    largest = max(map(abs, torch.stack(weight.aminmax()).tolist()))
    for n in (0, 15 - math.frexp(largest)[1]):  # with the second, the largest is below 2^15
        scaled = weight * 2.0**n if n else weight
        if largest < math.inf and (scaled.half() == scaled).all():
            packed = torch.ops.quantized.linear_prepack_fp16(scaled, bias)  # by FBGEMM
            return lambda x: torch.ops.quantized.linear_dynamic_fp16(x * 2.0**-n if n else x, packed)
    return None


def pack(model):
    """Make a float32 model on a CPU ready for sampling, in place. Elsewhere, or without the operator, do nothing.

    The weights are laid out once as oneDNN likes them, and matrices with the same input become one: products of
    few rows then run two to four times as fast as F.linear, which lays the weights out anew at every call. The
    plain weights are let go, so a packed model can sample and nothing else; a tied embedding stays beside its copy.

    A product of few rows takes as long as reading the weights. Where float16 holds them exactly, they are kept in it as
    well, if there is memory to spare, and read from there; the arithmetic is float32 as before. Without AVX-512 this is
    the faster for any number of rows, and then nothing else is kept.
    """
    weight, operators = model.lm_head.weight, torch.ops.mkldnn
    there = hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")
    if not (there and torch.backends.mkldnn.is_available() and weight.is_cpu and weight.dtype == torch.float32):
        return
    spare = free_memory(weight.device) / 4 > 2 * sum(p.numel() for p in model.parameters())
    fbgemm = hasattr(torch.ops.quantized, "linear_prepack_fp16")
    fbgemm = fbgemm and torch.backends.quantized.engine in ("x86", "fbgemm")
    alone = torch.backends.cpu.get_cpu_capability() == "AVX2"

    def merge(*layers):
        plain = torch.cat([layer.weight.detach() for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        sizes = [layer.out_features for layer in layers]
        halved = halve(plain, bias) if fbgemm and (spare or alone) else None
        weight = None if halved and alone else operators._reorder_linear_weight(plain, 64)
        few = 32 if len(plain) < 8192 else 16 if use_onednn(plain.device) else 8
        few = math.inf if alone else few  # rows up to which float16 wins
        for layer in layers:
            layer.weight = None

        def product(x):
            few_rows = halved and len(x) <= few
            y = halved(x) if few_rows else operators._linear_pointwise(x, weight, bias, "none", [], "")
            return y.split(sizes, -1)

        layers[0].packed = product

    for block in model.model.layers:
        merge(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        merge(block.self_attn.o_proj)
        merge(block.mlp.gate_proj, block.mlp.up_proj)
        merge(block.mlp.down_proj)
    merge(model.lm_head)
    # From here on glibc keeps what is freed (the plain weights go back before). It would give blocks of 32 MB and more
    # to the system at once, which clears them when they are asked for again: with 64 rows of 152k logits that takes as
    # long as the model itself.
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes
    except (OSError, AttributeError):
        pass  # another C library


def free_memory(device):
    """Bytes that can still be had on a device; on a CPU each process of this machine gets its share of them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        free.append(1024 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]))
        group = Path("/sys/fs/cgroup")  # a container's own limit, where it has one
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        free = free or [2**32]
    return max(0, min(free)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class PagedCache:
    """Keys and values of all layers in pages of `page` positions, shared out among sequences and back again.

    `width` is the number of pages of the longest sequence. Page 0 takes what the padding rows of a CUDA graph write.
    Pages that several rows read are taken from the low end and a row's own from the high end, so that these are one
    slice and need not be copied to be read.
    """

    def __init__(self, config, n_pages, page, width, dtype, device):
        L, K, D = config.n_layers, config.n_kv_heads, config.head_dim
        self.page, self.width, self.device, self.windows = page, width, device, set(config.windows)
        self.heads = config.n_heads
        self.varlen, self.onednn = use_varlen(device, dtype), use_onednn(device)
        # Memory that no page has used yet is asked for but not touched; a page is cleared when it is taken.
        # k and v have the shape that flash attention reads. Elsewhere they are views of what products of matrices read.
        if self.varlen:
            self.k, self.v = (torch.empty(L, n_pages, page, K, D, dtype=dtype, device=device) for _ in range(2))
        else:
            self.keys = torch.empty(L, n_pages, K, D, page, dtype=dtype, device=device)
            self.values = torch.empty(L, n_pages, K, page, D, dtype=dtype, device=device)
            self.k, self.v = self.keys.permute(0, 1, 4, 2, 3), self.values.transpose(2, 3)  # [L, pages, page, K, D]
        self.free = list(range(1, n_pages))  # in order
        self.users = [0] * n_pages
        self.shared = np.zeros(n_pages, dtype=bool)

    def take(self, n, shared=False):
        pages = [self.free.pop(0 if shared else -1) for _ in range(n)]
        for page in pages:
            self.users[page], self.shared[page] = 1, shared
            self.k[:, page], self.v[:, page] = 0, 0  # what is masked still must be a number
        return pages

    def release(self, pages):
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                bisect.insort(self.free, page)

    def copy(self, sources, targets):
        for source, target in zip(sources, targets):
            self.k[:, target], self.v[:, target] = self.k[:, source], self.v[:, source]

    def fork(self, pages):
        """The pages of another sequence that begins as `pages` do: the same, and a copy of the last one."""
        own = self.take(1)
        self.copy(pages[-1:], own)
        for page in pages[:-1]:
            self.users[page] += 1
        return pages[:-1] + own

    def settle(self, pages):
        """Make the pages that samples share, now all written, one block: one matrix a head, as if it were one page.

        It is read as a whole from now on, and no step has to put its pages together first.
        """
        if self.varlen:
            return  # flash attention reads page by page
        k, v = self.keys[:, pages], self.values[:, pages]  # [L, W, K, D, page], [L, W, K, page, D]
        self.keys[:, pages] = k.permute(0, 2, 3, 1, 4).reshape(k.shape)  # in the order of [L, K, D, W, page]
        self.values[:, pages] = v.transpose(1, 2).reshape(v.shape)  # in the order of [L, K, W, page, D]

    def plan(self, sequences, n_rows):
        """Fix where the next step's tokens go and what they see -> their positions [T].

        `sequences`: (pages, first position, tokens) of each; the first `n_rows` have one token, the others are
        stretches of prompts. The tokens of a step lie one after another in one flat row.
        """
        table = np.zeros((len(sequences), self.width), dtype=np.int32)
        for row, (pages, _, _) in zip(table, sequences):
            row[: len(pages)] = pages
        counts = [n for _, _, n in sequences]
        owner, ends = np.arange(len(counts)).repeat(counts), np.cumsum([0, *counts], dtype=np.int32)
        positions = np.concatenate([np.arange(first, first + n) for _, first, n in sequences])
        arrays = (torch.from_numpy(x).to(self.device) for x in (table, owner, ends, positions))
        self.place(*arrays, max(counts), n_rows)
        if not self.varlen:
            if n_rows:
                self.parts, self.reader = self.plan_rows(table[:n_rows])
            self.batches = self.plan_prompts(sequences[n_rows:], ends[n_rows + 1 :].tolist())
        return self.positions

    def place(self, table, owner, ends, positions, longest, n_rows):
        """What flash attention wants to know, and the place in the cache of every token.

        table [sequences, width], the pages of each; owner [T], whose a token is; ends [sequences + 1], where the
        tokens of each end, after a 0; positions [T]; `longest`, the most tokens of a sequence; the first `n_rows`
        sequences are rows.
        """
        self.table, self.ends, self.positions, self.longest, self.n_rows = table, ends, positions, longest, n_rows
        self.page_of, self.slot = table[owner, positions // self.page].long(), positions % self.page  # [T]
        self.used = (positions[ends[1:] - 1] + 1).int()  # [sequences]
        self.key_ends = F.pad(self.used.cumsum(0, dtype=torch.int32), (1, 0))  # [sequences + 1]

    def attend(self, attention, q, k, v):
        """q [T, H, D], k and v [T, K, D] of one layer: written to the cache, then attended to -> [T, H, D].

        In the last layer only the rows attend, which come first -> [B, H, D]: what a prompt's tokens would go on with
        there is of no use to anyone.
        """
        layer, window = attention.layer, attention.window
        self.k[layer][self.page_of, self.slot], self.v[layer][self.page_of, self.slot] = k, v
        n, longest, last = len(self.used), self.longest, layer == len(self.k) - 1  # n sequences attend
        if last:
            q, n, longest = q[: self.n_rows], self.n_rows, 1
        if not n:
            return q
        if self.varlen:
            span, look_back = self.width * self.page, (-1 if window is None else window - 1, 0)
            # The operator wants the ends of the keys as well, though it does not read them where there are pages. More
            # than one split writes later sequences to the wrong place (pytorch issue 194167, torch 2.13).
            options = {"seqused_k": self.used[:n], "block_table": self.table[:n], "enable_gqa": True, "num_splits": 1}
            places = self.k[layer], self.v[layer], self.ends[: n + 1], self.key_ends[: n + 1], longest, span
            return varlen_attn(q, *places, window_size=look_back, **options)
        keys, values = self.keys[layer], self.values[layer]  # [pages, K, D, page], [pages, K, page, D]
        q = q.unflatten(1, (keys.shape[1], -1))  # [T, K, G, D]
        if last or not self.batches:
            return self.attend_rows(q, keys, values, window).flatten(1, 2)  # [T, H, D]
        y = torch.empty_like(q)
        if self.n_rows:
            y[: self.n_rows] = self.attend_rows(q[: self.n_rows], keys, values, window)
        for tokens, pages, biases in self.batches:
            its, bias = q[tokens], biases[window]  # [P, n, K, G, D], [P, n, S]
            k = keys[pages].permute(0, 2, 3, 1, 4).flatten(3)  # [P, W, K, D, page] -> [P, K, D, S]
            v = values[pages].transpose(1, 2).flatten(2, 3)  # [P, W, K, page, D] -> [P, K, S, D]
            if self.onednn:
                its, _ = attend_block(its, k, v, bias)
            else:  # a GPU without paged flash attention, or a processor on which oneDNN would round
                its, bias = its.flatten(2, 3).transpose(1, 2), bias[:, None].to(q.dtype)  # [P, H, n, D], [P, 1, n, S]
                its = F.scaled_dot_product_attention(its, k.mT, v, attn_mask=bias, enable_gqa=True)
                its = its.transpose(1, 2).unflatten(2, q.shape[1:3])  # [P, n, K, G, D]
            y[tokens] = its.to(q.dtype)
        return y.flatten(1, 2)  # [T, H, D]

    def plan_prompts(self, stretches, ends):
        """The tokens of prompts in pieces; `ends`: where those of each stretch end in the step.

        In pieces, because none has to look at what comes after it, which is up to half of the work; and pieces that
        see as many pages in one batch, of as many scores as a processor's caches hold. Returns batches of P pieces of n
        tokens: which tokens these are [P, n], their pages [P, W], for each window the bias of the scores [P, n, S].
        """
        pieces, groups, batches = [], [], []
        for (pages, first, n), end in zip(stretches, ends):
            size = max(16, min(128, 2**20 // (first + n))) if self.onednn else 256  # 4 MiB of scores a head at most
            for begin in range(0, n, size):
                stop = min(begin + size, n)
                pieces.append((-(-(first + stop) // self.page), stop - begin, end - n + begin, pages))
        for width, n, start, pages in sorted(pieces):
            scores = n * width * self.page * self.heads  # of one piece
            if not groups or groups[-1][0][0] != width or (len(groups[-1]) + 1) * scores > 2**21:
                groups.append([])
            groups[-1].append((width, n, start, pages))
        for group in groups:
            width, longest, _, _ = group[-1]
            tokens = [[start + min(t, n - 1) for t in range(longest)] for _, n, start, _ in group]  # the last one again
            pages = torch.tensor([pages[:width] for *_, pages in group], device=self.device)
            at, biases = torch.arange(width * self.page, device=self.device), {}  # [S]
            tokens = torch.tensor(tokens, device=self.device)  # [P, n]
            for window in self.windows:
                biases[window] = score_bias(self.positions[tokens], at[None], window)  # [P, n, S]
            batches.append((tokens, pages, biases))
        return batches

    def plan_rows(self, table):
        """The blocks of pages that rows read, and who reads them; table [B, width].

        A row's own pages are blocks of one page with one reader; those that the samples of a prompt share are one
        block, which all of them read. Returns parts, each of P blocks of W pages: (where the blocks' pages are, their
        readers [P, n], for each window the bias of the scores [P, n or 1, W * page]); and the readers of all
        parts one after another, where row B is nobody.
        """
        B, K, shared = len(table), self.k.shape[3], self.shared[table]
        row, column = ((table > 0) & ~shared).nonzero()
        reader, start = np.full(len(self.users), B), np.zeros(len(self.users), dtype=np.int64)  # row B is nobody
        reader[table[row, column]], start[table[row, column]] = row, column * self.page
        [own] = (reader < B).nonzero()
        if 2 * len(own) > own[-1] + 1 - own[0]:  # read all between them too, which nobody reads: then it is one slice
            own = np.arange(own[0], own[-1] + 1)
        blocks = [(own[:, None], reader[own][:, None], start[own])]
        prompts = {}  # number of shared pages -> the first of them -> the rows that read them
        for row, (count, first) in enumerate(zip(shared.sum(1).tolist(), table[:, 0].tolist())):
            prompts.setdefault(count, {}).setdefault(first, []).append(row)
        for count in prompts.keys() - {0}:
            n = max(map(len, prompts[count].values()))
            readers = np.array([rows + [B] * (n - len(rows)) for rows in prompts[count].values()])  # [P, n]
            blocks.append((table[readers[:, 0], :count], readers, np.zeros(len(readers), dtype=np.int64)))

        parts, everyone, last = [], [], F.pad(self.positions[:B], (0, 1), value=-1)  # [B + 1]
        for pages, readers, start in blocks:
            readers, start = (torch.from_numpy(x).to(self.device) for x in (readers, start))
            width, pages = pages.shape[1], pages.flatten()  # W, [P * W]
            if (np.diff(pages) == 1).all():
                where = slice(pages[0] * K, (pages[-1] + 1) * K)
            else:
                where = torch.from_numpy((pages[:, None] * K + np.arange(K)).flatten()).to(self.device)  # [P * W * K]
            at, biases = start[:, None] + torch.arange(width * self.page, device=self.device), {}  # [P, W * page]
            for window in self.windows:
                those = readers if window else readers[:, :1]  # without a window all readers see the same
                biases[window] = score_bias(last[those], at, window)  # [P, n or 1, W * page]
            parts.append((where, readers.clamp(max=B - 1), biases))
            everyone.append(readers.flatten())  # [P * n]
        return parts, torch.cat(everyone)

    def attend_rows(self, q, keys, values, window):
        """One token a row, q [B, K, G, D], attends to keys [pages, K, D, page] and values [pages, K, page, D].

        Not row by row, but block by block of pages: each block is an entry of a batch, with the queries of all rows
        that read it. What a row gets from each of its blocks then counts by that block's share of its softmax.
        """
        (B, K, G, D), found = q.shape, []
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)  # [pages * K, D, page], [pages * K, page, D]
        for where, readers, biases in self.parts:
            P, in_place = len(readers), isinstance(where, slice)
            k, v = (x[where] if in_place else x.index_select(0, where) for x in (keys, values))
            k, v = k.view(P, K, D, -1), v.view(P, K, -1, D)  # [P, K, D, W * page], [P, K, W * page, D]
            its = q.index_select(0, readers.flatten()).unflatten(0, readers.shape)  # [P, n, K, G, D]
            block = attend_block(its, k, v, biases[window])  # [P, n, K, G, D], [P, n, K, G]
            found.append([x.flatten(0, 1) for x in block])  # [P * n, K, G, D], [P * n, K, G]
        y, lse = found[0] if len(found) == 1 else map(torch.cat, zip(*found))  # [N, K, G, D], [N, K, G], of all parts
        reader = self.reader  # [N]
        top = lse.new_full((B + 1, K, G), -math.inf)
        top.scatter_reduce_(0, reader[:, None, None].expand_as(lse), lse, "amax")
        share = (lse - top.index_select(0, reader)).exp_()
        total = torch.zeros_like(top).index_add_(0, reader, share)
        out = lse.new_zeros(B + 1, K, G, D).index_add_(0, reader, y.mul_(share[..., None]))
        return out.div_(total[..., None])[:B].to(q.dtype)  # [B, K, G, D]


def attend_block(q, k, v, bias):
    """q [P, n, K, G, D], n tokens of each of P blocks, attend to its k [P, K, D, S] and v [P, K, S, D].

    `bias` [P, n or 1, S] is added to the scores. Returns the results, like q, and the scores' log sum exp [P, n, K, G].
    """
    (P, n, K, G, D), S = q.shape, k.shape[-1]
    multiply = multiply_onednn if use_onednn(q.device) else torch.matmul
    q = q.permute(0, 2, 3, 1, 4).reshape(P, K, G * n, D)  # a block's queries of a head, one matrix
    scores = multiply(q.float(), k.float()).view(P, K, G, n, S)
    torch.add(bias[:, None, None], scores, alpha=D**-0.5, out=scores)
    weight = scores.softmax(-1)  # [P, K, G, n, S]
    lse = scores.amax(-1) - weight.amax(-1).log()  # [P, K, G, n]
    y = multiply(weight.flatten(2, 3), v.float()).view(P, K, G, n, D)  # weight as [P, K, G * n, S]
    return y.permute(0, 3, 1, 2, 4), lse.permute(0, 3, 1, 2)  # [P, n, K, G, D], [P, n, K, G]


def multiply_onednn(a, b):
    """a @ b, batches of float32 matrices: with few rows in half the time of MKL, which torch takes by itself.

    Torch leaves batches to oneDNN only where their products may be rounded to bfloat16.
    """
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        return a @ b
    finally:
        setting.fp32_precision = before


@functools.cache
def use_onednn(device):
    """Whether oneDNN keeps float32 where it may round to bfloat16, which only AMX makes worth it: found by trying."""
    if device.type != "cpu":
        return False
    a, b = torch.arange(2.0**16).sin().view(16, 64, 64), torch.arange(2.0**16).cos().view(16, 64, 64)
    return all((multiply_onednn(x, b) - x.double() @ b.double()).abs().max() < 1e-3 for x in (a[:, :4], a))


def use_varlen(device, dtype):
    """Whether attention can read pages by itself: on CUDA, in half precision, with torch 2.13 or later."""
    reads_pages = varlen_attn is not None and "block_table" in inspect.signature(varlen_attn).parameters
    return reads_pages and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


class DecodeGraphs:
    """Decode steps recorded as CUDA graphs: all launches of a step at the price of one.

    A graph replays fixed shapes at fixed addresses, so there is one for each of a few batch sizes (recorded when
    first needed), all with the same static inputs, and a step runs in the next larger one; padding rows write
    to page 0 and are not looked at.
    """

    def __init__(self, model, cache, max_rows):
        self.model, self.cache, self.max_rows, self.graphs, self.pool = model, cache, max_rows, {}, None
        self.ids, self.positions = torch.zeros(2, max_rows, dtype=torch.long, device=cache.device)
        self.table = torch.zeros(max_rows, cache.width, dtype=torch.int32, device=cache.device)

    def step(self, ids, positions, table):
        """ids, positions [B], table [B, width] -> logits [B, V], which the next step overwrites."""
        rows = len(ids)
        size = min(next((n for n in (1, 2, 4, 8) if n >= rows), -(-rows // 16) * 16), self.max_rows)
        for static, now in ((self.ids, ids), (self.positions, positions), (self.table, table)):
            static[:rows], static[rows:] = now, 0
        if size not in self.graphs:
            self.graphs[size] = self.record(size)
        graph, logits = self.graphs[size]
        graph.replay()
        return logits[:rows]

    def decode(self, size):
        """One token of the first `size` rows of the static inputs -> logits [size, V]."""
        ends = torch.arange(size + 1, dtype=torch.int32, device=self.ids.device)
        self.cache.place(self.table[:size], ends[:-1], ends, self.positions[:size], 1, size)
        return self.model.logits(self.model(self.ids[:size], self.positions[:size], self.cache.attend))

    def record(self, size):
        side = torch.cuda.Stream()  # a first run outside the recording: libraries set themselves up
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.decode(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.decode(size)
        self.pool = self.pool or graph.pool()
        return graph, logits


@dataclass(eq=False)
class Prompt:
    """Tokens on their way into the cache, all but the last, and the samples that wait for them."""

    ids: list
    rows: list  # the samples not yet started
    pages: list = field(default_factory=list)
    shared: list = field(default_factory=list)  # those of the pages that are still to become one block
    done: int = 0  # tokens read, those that all prompts begin with included


@dataclass(eq=False)
class Row:
    """One sample. When it decodes, all its tokens but the last, the prompt's and then its own, are in the cache."""

    i: int  # its prompt
    j: int  # its number among that prompt's samples
    key: tuple
    limit: int  # new tokens at most
    uniforms: np.ndarray = None  # [limit], one for each new token, from when it starts
    ids: list = field(default_factory=list)  # the new tokens
    logprob: float = 0.0
    certainty: float = 0.0  # summed, like logprob
    pages: list = field(default_factory=list)


@dataclass
class Stats:
    """What a `stream` has done so far."""

    prompt_tokens: int = 0  # read beside the rows' own: the common beginning, the rest of each, and what came again
    generated: int = 0  # tokens of finished and unfinished samples
    rows: int = 0  # samples being decoded in the last step
    steps: int = 0
    evicted: int = 0  # times that a row or a prompt gave its pages back, for lack of memory
    peak_pages: int = 0
    page_bytes: int = 0


@torch.inference_mode()
def stream(model, prompts, keys, params, stop_ids, batch_size=256, memory=None, graphs=True, stats=None):
    """Sample completions: `prompts` is a list of token id lists, keys[i] one random key for each sample of prompt i.

    Yields after every step the list of (i, j, Completion) of the samples that it finished, often none. What a
    sample draws depends on its key alone: neither its neighbours nor its place change it. At most `batch_size`
    rows are decoded together, and fewer when the `memory` (bytes, default: most of what is free) for the cache
    does not hold them. `graphs`: replay decode steps as CUDA graphs, where there is CUDA. `stats` is kept up to
    date. InputError for a prompt that leaves no room in the context, or a memory that does not hold one row.
    """
    config, device, dtype = model.config, model.rope_freq.device, model.model.embed_tokens.weight.dtype
    for ids in prompts:
        if len(ids) >= config.context:
            raise InputError(f"a prompt has {len(ids)} tokens, and the model's context {config.context}")
    if not any(keys):
        return
    stats = stats or Stats()
    page = 256 if use_varlen(device, dtype) else 64  # flash attention reads pages of 256
    chunk = 2048  # tokens of prompts read in one step, beside the rows' own

    # What all prompts begin with (the template's system message, an instruction) is read once, and then copied.
    common = os.path.commonprefix(prompts)[: min(map(len, prompts)) - 1][:chunk] if len(prompts) > 1 else []

    # How much fits. The steps need room as well: logits, probabilities and their sums, and a chunk's activations.
    stats.page_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim * page * dtype.itemsize
    step_bytes = 16 * config.vocab_size
    chunk_bytes = 4 * dtype.itemsize * chunk * (config.mlp_dim + config.dim + 2 * config.n_heads * config.head_dim)
    budget = memory if memory is not None else 0.85 * free_memory(device) - chunk_bytes
    batch_size = max(1, min(batch_size, sum(map(len, keys)), int(budget / 4 / step_bytes)))
    budget = max(0, budget - batch_size * step_bytes)
    lengths = [min(len(ids) + params.max_new_tokens, config.context) for ids in prompts]
    longest = max(lengths)
    width = -(-longest // page)
    least = -(-len(common) // page) + width + 3
    # A row's pages at most. Shared ones are divided by a quarter of the prompt's samples: the others may have stopped.
    most = max(
        -(-length // page) - len(ids) // page * (1 - 4 / max(4, len(samples)))
        for length, ids, samples in zip(lengths, prompts, keys)
    )
    n_pages = min(int(budget / stats.page_bytes), int(batch_size * (most + 1)) + least)
    if n_pages < least:
        need = (least * stats.page_bytes + batch_size * step_bytes) / 2**30
        raise InputError(
            f"{budget / 2**30:.2f} GiB of memory are left for the cache, and one sequence of {longest} tokens "
            f"needs {need:.2f}; give more with --memory, or lower --max-new-tokens"
        )
    cache = PagedCache(config, n_pages, page, width, dtype, device)
    recorded = DecodeGraphs(model, cache, batch_size) if cache.varlen and graphs else None
    ahead = 8 if recorded else 1  # graphs run so many steps between two looks at what they have drawn

    prefix = cache.take(-(-len(common) // page))
    if common:
        positions = cache.plan([(prefix, 0, len(common))], 0)
        model(torch.tensor(common, device=device), positions, cache.attend)
        stats.prompt_tokens += len(common)

    waiting, reading, rows = deque(), [], []  # prompts not begun; half or wholly read; samples being decoded
    for i, (ids, samples) in enumerate(zip(prompts, keys)):
        limit = min(params.max_new_tokens, config.context - len(ids))
        if samples:
            waiting.append(Prompt(ids, [Row(i, j, key, limit) for j, key in enumerate(samples)]))

    while waiting or reading or rows:
        # 1. Prompts come in while there is room for them and for one more page of all that is going on.
        while waiting:
            prompt, going = waiting[0], len(rows) + sum(len(p.rows) for p in reading)
            need = -(-len(prompt.ids) // page)
            room = len(cache.free) >= need + going + min(len(prompt.rows), batch_size)
            if going and (going >= batch_size or not room):
                break
            whole = need - 1 if len(prompt.rows) > 1 else 0  # pages that its samples will share
            prompt.shared = cache.take(whole, shared=True)
            prompt.pages, prompt.done = prompt.shared + cache.take(need - whole), len(common)
            cache.copy(prefix, prompt.pages)
            reading.append(waiting.popleft())

        # 2. Samples start whose prompt is read: they share its pages, but for the one it ends in. The oldest prompt is
        #    read first. Whenever no sample is going on, the reserve of 1. has left a page for the next.
        while reading and reading[0].done == len(reading[0].ids) - 1 and len(rows) < batch_size and cache.free:
            prompt = reading[0]
            if prompt.shared:
                cache.settle(prompt.shared)
                prompt.shared = []
            row = prompt.rows.pop(0)
            row.uniforms = uniforms(row.key, row.limit)
            row.pages = cache.fork(prompt.pages) if prompt.rows else prompt.pages
            rows.append(row)
            if not prompt.rows:
                del reading[0]

        # 3. Every row gets room for its next tokens. When no page is free, the youngest of all gives its own up and
        #    will be read again, with what it drew as part of the prompt.
        for row in list(rows):
            tokens = len(prompts[row.i]) + min(len(row.ids) - 1 + ahead, row.limit)
            while row.pages and len(row.pages) < -(-tokens // page):
                if cache.free:
                    row.pages += cache.take(1)
                    continue
                if reading:
                    prompt = reading.pop()
                else:
                    young = rows.pop()
                    prompt, young.pages = Prompt(prompts[young.i] + young.ids, [young], young.pages), []
                cache.release(prompt.pages)
                waiting.appendleft(prompt)
                stats.evicted += 1

        # 4. One pass of the model: a token of each row, and of the prompts what fills the chunk. Passes of equal size
        #    find room in the memory that the last one left.
        sequences = [(row.pages, len(prompts[row.i]) + len(row.ids) - 1, 1) for row in rows]
        ids, left = [(row.ids or prompts[row.i])[-1] for row in rows], max(chunk - len(rows), chunk // 2)
        for prompt in reading:
            n = min(left, len(prompt.ids) - 1 - prompt.done)
            if n:
                sequences.append((prompt.pages, prompt.done, n))
                ids += prompt.ids[prompt.done : prompt.done + n]
                prompt.done, left = prompt.done + n, left - n
                stats.prompt_tokens += n
        stats.peak_pages = max(stats.peak_pages, n_pages - 1 - len(cache.free))
        positions, ids, burst = cache.plan(sequences, len(rows)), torch.tensor(ids, device=device), 1
        if recorded and len(sequences) == len(rows):
            burst, table = min(ahead, *(row.limit - len(row.ids) for row in rows)), cache.table
            logits = recorded.step(ids, positions, table)
        else:
            hidden = model(ids, positions, cache.attend)  # [T, C]
            if not rows:
                yield []
                continue
            logits = model.logits(hidden[: len(rows)])  # [B, V]

        # 5. Draw, and go on from what was drawn while a burst lasts.
        u = np.stack([row.uniforms[len(row.ids) :][:burst] for row in rows], axis=1)  # [burst, B]
        drawn = []
        for step, now in enumerate(torch.from_numpy(u).to(device), 1):
            token, logprob, certainty = sample_token(logits.float(), now, params)
            drawn.append(torch.stack([token.double(), logprob.double(), certainty.double()]))  # [3, B]
            if step < burst:
                logits = recorded.step(token, positions + step, table)
        drawn = torch.stack(drawn).tolist()  # [burst, 3, B], the one transfer
        stats.steps, stats.rows, finished = stats.steps + burst, len(rows), []
        for at, row in enumerate(rows):
            for tokens, logprobs, certainties in drawn:
                if math.isnan(logprobs[at]):
                    raise InputError(
                        f"the model's logits are not numbers for sample {row.j} of prompt {row.i}; its weights are "
                        "damaged, or too large for this --dtype: try float32"
                    )
                row.ids.append(int(tokens[at]))
                row.logprob += logprobs[at]
                row.certainty += certainties[at]
                stats.generated += 1
                stop = row.ids[-1] in stop_ids
                if stop or len(row.ids) == row.limit:
                    cache.release(row.pages)
                    row.pages, reason = [], "stop" if stop else "length"
                    completion = Completion(row.ids, row.logprob, reason, row.certainty / len(row.ids))
                    finished.append((row.i, row.j, completion))
                    break
        rows = [row for row in rows if row.pages]
        yield finished


def generate(model, prompts, keys, params, stop_ids, **options):
    """`stream` to its end -> a list (a prompt each) of lists (a key each) of `Completion`."""
    results = [[None] * len(samples) for samples in keys]
    for finished in stream(model, prompts, keys, params, stop_ids, **options):
        for i, j, completion in finished:
            results[i][j] = completion
    return results


def pick_device(device, dtype):
    """The flags --device and --dtype -> (torch.device, torch.dtype); "auto" is CUDA and bfloat16 if there is a GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # of the processes that torchrun starts on a machine, each takes a GPU
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {device}: not usable here ({str(e).splitlines()[0]}); try --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return torch.device(device), getattr(torch, dtype)


def main():
    parser = argparse.ArgumentParser(description="Ask a model one question.")
    parser.add_argument("question")
    parser.add_argument("--model", default="tiny", help="short name, hub id or folder (default: tiny)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = load(args.model, *pick_device("auto", "auto"))
    prompt, ids = tokenizer.encode_chat(args.question)
    params = SamplingParams(max_new_tokens=512)
    [[completion]] = generate(model, [ids], [[(args.seed, "question", 0)]], params, tokenizer.stop_ids)
    print(tokenizer.decode(completion.ids))


if __name__ == "__main__":
    command_line(main)
