"""A decoder language model in plain PyTorch: from weights on disk to sampled text.

This file is read top to bottom, and each part uses only what stands above it:

    Config                 what a Hugging Face config.json says, under the names used here
    RMSNorm, RoPE          the two small pieces of every block
    Attention, MLP, Block  one layer
    Decoder                embeddings, layers, output matrix
    load, save             Hugging Face folders, in and out; hub ids; the table of short names
    Tokenizer              text <-> token ids, and the chat template
    KVCache                the keys and values of what has been read so far
    generate               a batched sampler: ragged prompts in, completions out

One decoder covers Llama, Mistral, Qwen2/2.5, Qwen3 and SmolLM2, because they differ only in details
that their config.json names: grouped-query attention, biases, a norm on queries and keys, the head
size, tied embeddings, the scaling of RoPE and a sliding window. Module names are those of the
checkpoints, so that a state dict loads without renaming.

Left out of the textbook: dropout (nobody uses it at this scale), attention weights as an output,
beam search, and left padding (prompts are padded on the right, where the causal mask hides the
padding by itself). Try it on a question:

    python model.py --model tiny "Start with 5. Then: +3, *2. What is the result?"
    python model.py --model smollm2-135m "How many legs do three spiders have?"

Letters in the shape comments:
    B batch rows   T new tokens of a row   S cached positions   V vocabulary   L layers
    C model width  H query heads   K key/value heads   G = H / K   D head size   F width of the MLP
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from evaluate import InputError, command_line, read_json

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
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


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
    """Turn plane i of each head, which is its elements (i, i + D/2). x [B, heads, T, D]; cos, sin [B, 1, T, D/2]."""
    a, b = x.chunk(2, dim=-1)  # [B, heads, T, D/2] each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


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

    def forward(self, x, positions, cos, sin, cache, visible):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # [B, K, T, D]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            cache.write(self.layer, k, v, None if visible is None else positions)
        if cache is None or visible is None:  # whole sequences from position 0: they attend to themselves
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # [B, H, T, D]
            if self.window is None or T <= self.window:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, D]
            else:
                i = torch.arange(T, device=x.device)
                back = i[:, None] - i[None, :]  # [T, T], how far each query looks back
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < self.window))
        else:  # one new token a row, attending to the cache
            k, v = cache.k[self.layer, :, :, :visible], cache.v[self.layer, :, :, :visible]  # [B, K, S, D]
            back = positions - torch.arange(visible, device=x.device)  # [B, S]
            mask = back >= 0 if self.window is None else (back >= 0) & (back < self.window)
            # The G query heads of a key head become the rows of one product: no key is repeated.
            q = q.view(B, k.shape[1], -1, self.head_dim)  # [B, H, 1, D] -> [B, K, G, D]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])  # [B, K, G, D]
            y = y.reshape(B, -1, 1, self.head_dim)  # [B, H, 1, D]
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # [B, T, H * D] -> [B, T, C]


class MLP(nn.Module):
    """The gated feed-forward layer, SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.mlp_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.mlp_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # [B, T, F] -> [B, T, C]


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *attention):
        x = x + self.self_attn(self.input_layernorm(x), *attention)
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

    def forward(self, ids, positions=None, cache=None, visible=None):
        """ids [B, T] -> hidden states [B, T, C].

        Without a cache, or with an empty one, rows are whole sequences from position 0, padded on the right.
        With `visible`, each row has one new token (T = 1) at `positions` [B, 1] and attends to the first
        `visible` slots of the cache, as far as its own position.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # [1, T]
        x = self.model.embed_tokens(ids)  # [B, T, C]
        angles = positions[:, None, :, None].float() * self.rope_freq  # [B, 1, T, D/2]
        cos, sin = (angles.cos() * self.rope_factor).to(x.dtype), (angles.sin() * self.rope_factor).to(x.dtype)
        for block in self.model.layers:
            x = block(x, positions, cos, sin, cache, visible)
        return self.model.norm(x)

    def logits(self, hidden):
        """hidden [..., C] -> logits [..., V]."""
        return self.lm_head(hidden)

    def fingerprint(self):
        """A short hash that tells two sets of weights apart: of all norms and biases and the first embedding."""
        digest = hashlib.sha256(json.dumps(self.config.raw, sort_keys=True).encode())
        for _, weight in sorted(self.named_parameters()):
            part = weight if weight.dim() == 1 else weight[:1]
            digest.update(part.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# Weights: short names, folders, the hub

# short name -> where it is; train.py's defaults for it: teacher, training problems, learning rate
HERE = Path(__file__).resolve().parent
ALIASES = {
    "tiny": (str(HERE / "tiny" / "student"), "tiny-teacher", "tiny-train", 1e-3),
    "tiny-teacher": (str(HERE / "tiny" / "teacher"), "tiny-teacher", "tiny-train", 1e-3),
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
    expected, found, wrong = model.state_dict(), {}, []
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
    wrong += [f"{key} is missing" for key in expected if key not in found]
    wrong += [f"{key} is spare" for key in found if key not in expected]
    for key in expected.keys() & found.keys():
        if expected[key].shape != found[key].shape:
            wrong.append(f"{key} is {list(found[key].shape)}, not {list(expected[key].shape)}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"{folder}: weights do not fit config.json: {', '.join(sorted(wrong)[:8])}{more}")
    model.load_state_dict(found, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device).eval(), Tokenizer(folder, config)


def save(model, folder, source):
    """Write a Hugging Face folder: the weights in the type that they have, the rest copied from folder `source`.

    Everything goes to a sibling folder first and is renamed at the end, so that `folder` is never half written.
    """
    folder, partial = Path(folder), Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    raw = {**model.config.raw, "torch_dtype": dtype}
    raw.pop("dtype", None)  # the newer name of the same
    state = model.state_dict()
    if model.config.tie_embeddings:
        state.pop("lm_head.weight")
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
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
        defaults = read_json(p) if (p := folder / "generation_config.json").exists() else {}
        self.generation_config = defaults

        # The words for bos, eos, ... that a template may use; each is a string or {"content": string}.
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        words = {n: w["content"] if isinstance(w := settings.get(n), dict) else w for n in names}
        self.template_words = {name: word or "" for name, word in words.items()}
        if (folder / "chat_template.jinja").exists():
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        else:
            source = settings.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = {t["name"]: t["template"] for t in source}.get("default")
        if not source:
            raise InputError(f"{folder}: no chat template; use an instruction-tuned model")

        # A template is a program from somewhere else: it runs in jinja's sandbox. Templates that print today's
        # date get a fixed one, so that the same command gives the same prompt tomorrow.
        loop_controls = ["jinja2.ext.loopcontrols"]
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loop_controls)
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
        stops = defaults.get("eos_token_id", config.raw.get("eos_token_id"))
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


class KVCache:
    """Keys and values of every layer, [L, B, K, S, D] each: slot s of row b is that row's position s.

    Rows are of different lengths, so each has its own next position; what lies beyond it is never looked at.
    """

    def __init__(self, k, v):
        self.k, self.v = k, v

    def write(self, layer, k, v, positions=None):
        """Put k, v [B, K, T, D] at the start of each row, or with `positions` [B, 1] one token a row there."""
        if positions is None:
            self.k[layer, :, :, : k.shape[2]], self.v[layer, :, :, : v.shape[2]] = k, v
        else:
            row, slot = torch.arange(len(k), device=k.device), positions[:, 0]
            self.k[layer][row, :, slot], self.v[layer][row, :, slot] = k[:, :, 0], v[:, :, 0]  # [B, K, D] each

    def rows(self, index):
        """The cache of some rows, a view for a slice and a copy for a tensor of row numbers."""
        return KVCache(self.k[:, index], self.v[:, index])


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


def uniforms(key, n):
    """n numbers in [0, 1) that depend on nothing but `key`, a tuple such as (seed, problem id, sample index)."""
    words = hashlib.sha256(json.dumps(key).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(words, "little"))).random(n, dtype=np.float32)


def sample_token(logits, u, params):
    """logits [B, V], u [B] in [0, 1) -> token ids [B], by inverting the cumulative distribution at u.

    One random number a row, instead of V of them for a Gumbel or multinomial draw, is what lets a
    sample's randomness be drawn beforehand from its key. The filters come in the order of Hugging
    Face's: temperature, top-k, top-p, min-p.
    """
    if params.temperature == 0:
        return logits.argmax(-1)
    logits, order = logits / params.temperature, None
    if params.top_k:
        logits, order = logits.topk(min(params.top_k, logits.shape[-1]))  # [B, k], likeliest first
    elif params.top_p < 1:
        logits, order = logits.sort(descending=True)  # [B, V]
    probs = logits.softmax(-1)
    if params.top_p < 1:  # drop what comes after the sum has reached top_p; the likeliest always stays
        probs = probs * (probs.cumsum(-1) - probs < params.top_p)
    if params.min_p:
        probs = probs * (probs >= params.min_p * probs.amax(-1, keepdim=True))
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # Below the total even after rounding, so that the token found is never one of probability 0.
    target = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cdf, target, right=True)  # [B, 1], the first whose sum exceeds the target
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)


PREFILL_TOKENS = 8192  # prompts are read in groups of about so many tokens: bounds the memory for activations


@torch.inference_mode()
def generate(model, prompts, keys, params, stop_ids, progress=None):
    """Sample completions: `prompts` is a list of token id lists, keys[i] one random key for each sample of prompt i.

    Returns a list (a prompt each) of lists (a key each) of `Completion`. All samples are decoded as one
    batch; a prompt is read once, whatever its number of samples. What a sample draws depends on its key
    alone: neither its neighbours nor its place change it. `progress`, a tqdm bar, counts finished samples.
    InputError for a prompt that leaves no room in the context.
    """
    config, device = model.config, model.rope_freq.device
    for ids in prompts:
        if len(ids) >= config.context:
            raise InputError(f"a prompt has {len(ids)} tokens, and the model's context {config.context}")
    if not any(keys):
        return [[] for _ in prompts]

    # Prefill. Prompts of similar length are read together: less padding.
    n_prompts, longest = len(prompts), max(map(len, prompts))
    shape = (config.n_layers, n_prompts, config.n_kv_heads, longest, config.head_dim)
    dtype = model.model.embed_tokens.weight.dtype
    cache = KVCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
    by_length = sorted(range(n_prompts), key=lambda i: len(prompts[i]))
    last = torch.empty(n_prompts, config.dim, dtype=dtype, device=device)  # hidden state of each prompt's last token
    while by_length:
        longest_here = len(prompts[by_length[-1]])
        n = max(1, PREFILL_TOKENS // longest_here)
        group, by_length = by_length[-n:], by_length[:-n]
        ids = torch.zeros(len(group), longest_here, dtype=torch.long)  # [b, T], padded on the right
        for row, i in enumerate(group):
            ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
        part = cache.rows(group)
        hidden = model(ids.to(device), cache=part)  # [b, T, C]
        cache.k[:, group], cache.v[:, group] = part.k, part.v
        for row, i in enumerate(group):
            last[i] = hidden[row, len(prompts[i]) - 1]

    # One row for each sample: row r continues prompt owner[r][0] and is its sample owner[r][1].
    owner = [(i, j) for i, samples in enumerate(keys) for j in range(len(samples))]
    prompt_of = torch.tensor([i for i, _ in owner], device=device)  # [B]
    limits = [min(params.max_new_tokens, config.context - len(prompts[i])) for i, _ in owner]
    steps = max(limits)
    cache = cache.rows(prompt_of)
    logits = model.logits(last[prompt_of]).float()  # [B, V]
    position = torch.tensor([len(prompts[i]) for i, _ in owner], device=device)  # [B], of the token drawn next
    limit = torch.tensor(limits, device=device)
    random = torch.from_numpy(np.stack([uniforms(keys[i][j], steps) for i, j in owner])).to(device)  # [B, steps]
    tokens = torch.zeros(len(owner), steps, dtype=torch.long, device=device)
    logprob = torch.zeros(len(owner), dtype=torch.float64, device=device)
    finished = torch.zeros(len(owner), dtype=torch.bool, device=device)
    stops = torch.tensor(stop_ids, device=device)
    results = [[None] * len(samples) for samples in keys]

    for step in range(steps):
        token = sample_token(logits, random[:, step], params)  # [B]
        chosen = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(-1)
        logprob += torch.where(finished, 0.0, chosen.double())
        tokens[:, step] = token
        finished |= torch.isin(token, stops) | (limit == step + 1)
        # To look at `finished` waits for the device: at every step on a CPU, seldom on a GPU.
        if step + 1 == steps or device.type == "cpu" or step % 8 == 7:
            done = finished.tolist()
            if all(done) or sum(done) > len(done) // 4:  # rows that are done leave, when they are many
                ended = [r for r, is_done in enumerate(done) if is_done]
                for r, row, total in zip(ended, tokens[ended].tolist(), logprob[ended].tolist()):
                    i, j = owner[r]
                    row = row[: limits[r]]
                    end = next((n for n, t in enumerate(row) if t in stop_ids), None)
                    ids = row if end is None else row[: end + 1]
                    results[i][j] = Completion(ids, total, "length" if end is None else "stop")
                if progress is not None:
                    progress.update(len(ended))
                stay = [r for r, is_done in enumerate(done) if not is_done]
                if not stay:
                    return results
                owner, limits = [owner[r] for r in stay], [limits[r] for r in stay]
                stay = torch.tensor(stay, device=device)
                cache, random, tokens, logprob = cache.rows(stay), random[stay], tokens[stay], logprob[stay]
                token, position, limit, finished = token[stay], position[stay], limit[stay], finished[stay]
        if longest + step >= cache.k.shape[3]:  # the cache grows by half
            more = min(cache.k.shape[3] // 2 + 16, longest + steps - cache.k.shape[3])
            cache = KVCache(F.pad(cache.k, (0, 0, 0, more)), F.pad(cache.v, (0, 0, 0, more)))
        hidden = model(token[:, None], position[:, None], cache, visible=longest + step + 1)  # [B, 1, C]
        logits = model.logits(hidden[:, 0]).float()  # [B, V]
        position = position + 1


def pick_device(device, dtype):
    """The flags --device and --dtype -> (torch.device, torch.dtype); "auto" is CUDA and bfloat16 if there is a GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
