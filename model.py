"""A decoder language model in plain PyTorch: from weights on disk to sampled text.

This file is read top to bottom, and each part uses only what stands above it:

    Config, Decoder        the model: what config.json says, RoPE, attention, MLP, layers
    load, Tokenizer        Hugging Face folders; text <-> token ids; the chat template
    sample_token           logits -> one token, by temperature, top-k, top-p and min-p
    PagedCache             the keys and values of all tokens so far, in pages that sequences share
    DecodeGraphs           decode steps, recorded as CUDA graphs
    Scheduler              which sequences run, in which pages
    stream, generate       continuous batching: prompts in, completions out as they finish

One decoder covers Llama, Mistral, Qwen2/2.5, Qwen3 and SmolLM2, which differ in what config.json
names. Left out of the textbook: dropout, attention weights, beam search, padding in the sampler.

The words of the sampler: a *prefix* is a prompt to read, all but its last token; a *sequence* is
one sample of it. *Prefill* computes the keys and values of a prefix, *decode* one more token of
each sequence that runs; a *pass* is one call of the model. The cache is cut into pages, and the
*page table* says which of them a sequence has: samples of a prompt share its full pages.

The life of a token, in `stream`:

    admit      a prompt gets pages, and passes prefill its prefix; then its sequences get free rows
    decode     the newest token of each row goes through the model, and its keys and values into
               the cache; `sample_token` draws from the logits the token that is read next
    finish     at a stop token or at its limit a sequence leaves, and its pages are free again
    preempt    without a free page, the youngest gives its own up; what it drew joins its prefix

On CUDA, in half precision, flash attention reads the pages where they lie, and bursts of decode
steps replay a graph; elsewhere pages are gathered first: slower, plain, and right as well.

Letters in the shape comments:
    B rows or sequences   T tokens of a pass   S positions   V vocabulary   L layers   C model width
    H query heads   K key/value heads   D head size   F width of the MLP   W pages of a sequence
"""

import functools
import hashlib
import json
import math
import os
import re
import warnings
import weakref
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import jinja2.sandbox
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from files import InputError, read_json


# ---------------------------------------------------------------------------------------- The model
def setting(file, values, key, default=None, least=1, most=1e12, whole=True, among=()):
    """values[key], or for null the default: a number, or one of `among`. InputError for all else."""
    value = default if values.get(key) is None else values[key]
    good, rule = value in among, " or ".join(map(str, among))
    if not among:
        good = type(value) in (int, float) and least <= value <= most and not (whole and value % 1)
        rule = f"a {'whole ' * whole}number from {least} to {most:g}"
    if not good:
        raise InputError(f"{file}: {key} is {value!r:.60}; it must be {rule}")
    return int(value) if whole and not among else value


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
    windows: list  # for each layer, how many positions it looks back (itself included), or None
    rope: dict  # all settings, those of RoPE among them
    raw: dict  # the file itself, to write it back

    @staticmethod
    def from_dict(raw):
        """Translate `raw`, a parsed config.json. InputError names what this file does not know."""
        read = functools.partial(setting, "config.json", raw)
        flag = functools.partial(read, default=False, among=(False, True))
        kind = read("model_type", among=("llama", "mistral", "qwen2", "qwen3"))
        read("hidden_act", "silu", among=("silu",))
        if raw.get("quantization_config"):
            raise InputError("config.json: quantization_config: a quantised model; take the one that it was made from")
        dim, n_layers, n_heads = read("hidden_size"), read("num_hidden_layers"), read("num_attention_heads")
        # Mistral slides in every layer, Qwen only where use_sliding_window says so, Llama never.
        slides = kind == "mistral" or (kind != "llama" and flag("use_sliding_window"))
        window = read("sliding_window", 4096) if slides and raw.get("sliding_window", 0) is not None else None
        first, types = (0, None) if kind == "mistral" else (read("max_window_layers", 28, 0), raw.get("layer_types"))
        types = types or ["sliding_attention" if i >= first else "full_attention" for i in range(n_layers)]
        if not isinstance(types, list) or len(types) != n_layers:
            raise InputError(f"config.json: layer_types is {types!r:.60}; it must be a list of {n_layers}")
        # Old files have rope_theta and rope_scaling, new ones one dict called rope_parameters.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise InputError(f"config.json: the parameters of RoPE are {rope!r:.60}; they must be an object")
        rope = {"rope_type": rope.get("type"), **{key: x for key, x in rope.items() if x is not None}}
        bias = kind != "mistral" and flag("attention_bias")
        return Config(
            vocab_size=read("vocab_size"), dim=dim, n_layers=n_layers, n_heads=n_heads,
            n_kv_heads=read("num_key_value_heads", n_heads), mlp_dim=read("intermediate_size"),
            head_dim=read("head_dim", 128 if kind == "qwen3" else dim // n_heads), qk_norm=kind == "qwen3",
            norm_eps=read("rms_norm_eps", 1e-6, least=0, whole=False),
            context=read("max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(kind, 32768)),
            tie_embeddings=flag("tie_word_embeddings"), mlp_bias=kind == "llama" and flag("mlp_bias"),
            qkv_bias=kind == "qwen2" or bias, out_bias=kind != "qwen2" and bias,
            windows=[window if t == "sliding_attention" else None for t in types], rope={**raw, **rope}, raw=raw,
        )  # fmt: skip


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_frequencies(config):
    """The angle, in radians, by which a plane of a head turns from one position to the next.

    Returns (frequencies [D/2] float32, factor on cos and sin). Plain RoPE is arXiv 2104.09864;
    `linear` divides all angles; `llama3` and `yarn` (arXiv 2309.00071) only those of long
    wavelengths, with a ramp between; `yarn` also makes the attention sharper, by a factor.
    """
    rope, half = config.rope, config.head_dim // 2
    kind = setting("config.json", rope, "rope_type", "default", among=("default", "linear", "llama3", "yarn"))
    setting("config.json", rope, "partial_rotary_factor", 1, among=(1,))
    read = functools.partial(setting, f"config.json, {kind} RoPE", rope, least=0.001, whole=False)
    theta, original = read("rope_theta", 10000.0, least=2), read("original_max_position_embeddings", config.context)
    factor = 1.0 if kind == "default" else read("factor", config.context / original if kind == "yarn" else None)
    plane = torch.arange(half, dtype=torch.float32)
    freq = 1.0 / theta ** (plane / half)
    if kind in ("default", "linear"):
        return freq / factor, 1.0
    if kind == "llama3":
        low, high = read("low_freq_factor"), read("high_freq_factor")
        turns = original * freq / (2 * math.pi)  # full turns within the original context
        keep = ((turns - low) / max(high - low, 1e-3)).clamp(0, 1)  # 1: many turns, left alone; 0: divided
        return freq * (keep + (1 - keep) / factor), 1.0

    def plane_of(turns):  # the (fractional) plane that makes so many turns in the original context
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)
    low, high = plane_of(read("beta_fast", 32)), plane_of(read("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    keep = 1 - ((plane - low) / (high - low if high > low else 0.001)).clamp(0, 1)
    scale, all_dim, sharpness = (read(key, 0, least=0) for key in ("mscale", "mscale_all_dim", "attention_factor"))
    scale, all_dim = (scale, all_dim) if scale and all_dim else (1, 0)
    sharp = 0.1 * math.log(max(factor, 1))
    return freq * (keep + (1 - keep) / factor), sharpness or (sharp * scale + 1) / (sharp * all_dim + 1)


def rotate(qkv, n, cos, sin):
    """Turn plane i of the first n heads, their elements (i, i + D/2).

    qkv [..., heads, D]; cos, sin [..., 1, D]. Halves become a cos - b sin and b cos + a sin: x cos
    plus its halves swapped times a sin whose first half is negative. Without gradients it is done
    in place: the keys still lie beside the values, and one write caches both.
    """
    x, rest = qkv.split([n, qkv.shape[-2] - n], dim=-2)
    out = None if torch.is_grad_enabled() else x
    turned = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, out=out)  # [..., n, D]
    return torch.cat([turned, rest], dim=-2) if out is None else qkv


def sees(query, key, window):
    """Which keys a query may look at, [..., n, S], by positions: query [..., n], key [S]."""
    back = query[..., :, None] - key  # how far each looks back
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def attend_causal(attention, qkv):
    """Whole sequences that attend to themselves: qkv [B, T, H + 2K, D] -> [B, T, H, D]."""
    T, window = qkv.shape[1], attention.window
    q, k, v = qkv.transpose(1, 2).split(attention.heads, dim=1)  # [B, H, T, D], [B, K, T, D] twice
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [B, H, T, D]
    i = torch.arange(T, device=q.device)
    mask = None if window is None or T <= window else sees(i, i, window)  # [T, T]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention; H / K query heads share a key and value head (arXiv 2305.13245)."""

    def __init__(self, config, layer):
        super().__init__()
        C, H, K, D = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.layer, self.heads, self.window = layer, (H, K, K), config.windows[layer]
        self.qkv_proj = nn.Linear(C, (H + 2 * K) * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.out_bias)
        self.q_norm, self.k_norm = (RMSNorm(D, config.norm_eps) if config.qk_norm else None for _ in range(2))

    def forward(self, x, cos, sin, attend):
        H, K, _ = self.heads
        qkv = self.qkv_proj(x).unflatten(-1, (H + 2 * K, -1))  # [..., H + 2K, D]
        if self.q_norm is not None:
            q, k, v = qkv.split(self.heads, dim=-2)
            qkv = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=-2)
        y = attend(self, rotate(qkv, H + K, cos, sin))  # [..., H, D]
        return self.o_proj(y.flatten(-2))  # [..., H * D] -> [..., C]


class MLP(nn.Module):
    """The gated feed-forward layer, SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.dim, 2 * config.mlp_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x):
        return self.down(self.gate_up_proj(x))  # [..., 2F] -> [..., C]

    def down(self, gate_up):  # apart, since training computes it twice to save its memory
        gate, up = gate_up.chunk(2, dim=-1)  # [..., F] each
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The whole model. `model(ids)` gives the last hidden states, `model.lm_head(h)` the logits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.agree = lambda x: x  # x of all processes that share this model, the least of each: see parallel.py
        layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        parts = {"embed_tokens": nn.Embedding(config.vocab_size, config.dim), "layers": layers}
        self.model = nn.ModuleDict({**parts, "norm": RMSNorm(config.dim, config.norm_eps)})
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)  # called for few: logits are large
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        freq, self.rope_factor = rope_frequencies(config)
        # Always float32: bfloat16 is off by up to 0.4%, which at position 10,000 is many turns.
        self.register_buffer("rope_freq", freq, persistent=False)

    def forward(self, ids, positions=None, attend=attend_causal):
        """ids [..., T] -> hidden states [..., T, C].

        By default, ids [B, T] are whole sequences, padded on the right. The sampler gives
        `positions` [T] and its own `attend`: one flat line of tokens that attend to a cache.
        """
        if positions is None:
            positions = torch.arange(ids.shape[-1], device=ids.device)  # [T]
        x = self.model.embed_tokens(ids)  # [..., T, C]
        angles = positions[:, None, None].float() * self.rope_freq  # [T, 1, D/2]
        cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor
        cos, sin = (torch.cat(halves, -1).to(x.dtype) for halves in ([cos, cos], [-sin, sin]))  # [T, 1, D]
        for block in self.model.layers:
            x = block(x, cos, sin, attend)
        return self.model.norm(x)


# --------------------------------------------------------------------------------- Weights and text
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja", *SETTINGS)
# layer here -> the layers of a checkpoint that it joins, one under another
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def checkpoint_rows(model):
    """Yield (name in a checkpoint, weight here, its first row there, number of rows); tied ones once."""
    c = model.config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    sizes = {"qkv_proj": [q, kv, kv], "gate_up_proj": [c.mlp_dim] * 2}
    for name, weight in model.named_parameters():
        *path, layer, kind = name.split(".")  # kind: weight or bias
        first = 0
        for part, n in zip(MERGED.get(layer, [layer]), sizes.get(layer, [len(weight)])):
            yield ".".join([*path, part, kind]), weight, first, n
            first += n


def read_config(folder):
    """The Config of a Hugging Face folder."""
    folder = Path(folder)
    if (adapter := (folder / "adapter_config.json").exists()) or not (folder / "config.json").is_file():
        what = "a LoRA adapter, to be merged into its model first" if adapter else "no config.json"
        raise InputError(f"{folder}: {what}, so this is not a model folder")
    return Config.from_dict(read_json(folder / "config.json"))


def materialise(model, device):
    """Memory on a device, not yet filled, for a model that was made on "meta", of shapes alone."""
    model = model.to_empty(device=device).eval()
    model.rope_freq = rope_frequencies(model.config)[0].to(device)  # to_empty dropped it
    if model.config.tie_embeddings:  # to_empty parted the two
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def each_weight(folder, tied):
    """Yield (name, its safetensors slice) for the weights of a folder; of weights only safetensors."""
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists() and not (folder / files[0]).exists():
        names = read_json(index).get("weight_map")  # of each weight, its file
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{index}: no weight_map that names files; download it again")
        files = sorted(set(names.values()))
    for file in files:
        try:
            with safe_open(folder / file, "pt") as shard:
                for key in shard.keys():
                    # Some store a tied output matrix or RoPE's angles, which follow from the rest.
                    if not key.endswith("rotary_emb.inv_freq") and not (key == "lm_head.weight" and tied):
                        yield key, shard.get_slice(key)
        except (OSError, SafetensorError) as e:
            raise InputError(f"{folder / file}: cannot be read as safetensors ({e})")


def read_weights(folder, targets, tied):
    """Fill targets {name: (tensor, slices, shape)}: each the `slices` of a weight that has this shape in all."""
    targets, wrong = dict(targets), []
    for key, found in each_weight(folder, tied):
        target, slices, whole = targets.pop(key, (None, None, None))
        shape, kind = found.get_shape(), found.get_dtype()
        if kind not in ("F64", "F32", "F16", "BF16"):
            wrong.append(f"{key} is {kind}, so this is a quantised model")
        elif target is None:
            wrong.append(f"{key} is spare")
        elif shape != list(whole):
            wrong.append(f"{key} is {shape}, not {list(whole)}")
        elif target.numel():
            target.copy_(found[slices])
    if wrong := sorted(wrong + [f"{key} is missing" for key in targets]):
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"{folder}: weights do not fit config.json: {', '.join(wrong[:8])}{more}")


def load(folder, device="cpu", dtype=torch.float32):
    """Read a Hugging Face folder -> (Decoder in eval mode, Tokenizer)."""
    config = read_config(folder)
    with torch.device("meta"):  # shapes only: the weights come from the files
        model = Decoder(config).to(dtype)
    model = materialise(model, device)
    rows = {name: w.detach()[first : first + n] for name, w, first, n in checkpoint_rows(model)}
    targets = {name: (weight, ..., weight.shape) for name, weight in rows.items()}
    read_weights(Path(folder), targets, config.tie_embeddings)
    return model, Tokenizer(folder, config)


def read_template(folder, source):
    """The chat template of a folder; `source`: what tokenizer_config.json says, if no file has it."""
    # A template is a program from somewhere else: it runs in jinja's sandbox. One that prints
    # today's date gets a fixed one, so that the same command gives the same prompt tomorrow.
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.add_extension("jinja2.ext.loopcontrols")
    env.intercepted_binops = frozenset("*")  # else 'x' * 10**9 becomes part of the program
    env.filters["tojson"] = lambda x, ensure_ascii=False, **options: json.dumps(x, ensure_ascii=ensure_ascii, **options)
    env.globals["strftime_now"] = lambda layout: {"%d %b %Y": "26 Jul 2024"}.get(layout, "2024-07-26")
    env.globals["raise_exception"] = jinja2.StrictUndefined  # raises its message where it is printed
    try:
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.exists() else source
        source = {t["name"]: t["template"] for t in source} if isinstance(source, list) else source
        source = source.get("default") if isinstance(source, dict) else source
        if not source:
            raise ValueError("there is none")
        # {% generation %} marks, for other programs, what a model wrote; it changes no text.
        return env.from_string(re.sub(r"(\{%[-+]?\s*(end)?)generation\b", r"\1with", source))
    except Exception as e:  # a template may be wrong in any way
        raise InputError(f"{folder}: no chat template that can be used ({e}); take an instruction-tuned model")


class Tokenizer:
    """Text <-> token ids, the chat template, and the sampling defaults of a model folder."""

    def __init__(self, folder, config):
        folder = self.folder = Path(folder)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as e:  # the library raises nothing more specific
            raise InputError(f"{folder}/tokenizer.json: cannot be read ({e}), so text cannot be turned into tokens")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings, special, defaults = (read_json(f) if (f := folder / name).exists() else {} for name in SETTINGS)
        self.template = read_template(folder, settings.get("chat_template"))
        defaults = self.generation_config = {key: x for key, x in defaults.items() if x is not None}
        for key in defaults.keys() & {"temperature", "top_p", "min_p", "top_k", "max_new_tokens"}:
            most, whole = 1 if key.endswith("_p") else 1e12, key in ("top_k", "max_new_tokens")
            defaults[key] = setting(f"{folder}/generation_config.json", defaults, key, None, 0, most, whole)
        names = [f"{word}_token" for word in ("bos", "eos", "unk", "pad")]  # of strings or {"content": string}
        words = {name: settings.get(name) or special.get(name) or "" for name in names}
        self.template_words = {n: str(w.get("content", "") if isinstance(w, dict) else w) for n, w in words.items()}
        # Generation stops at any of these ids; the tokenizer's eos ends a trained completion.
        file, found = (SETTINGS[2], defaults) if "eos_token_id" in defaults else ("config.json", config.raw)
        stops = stops if isinstance(stops := found.get("eos_token_id"), list) else [stops]
        stops = [setting(folder / file, {"eos_token_id": i}, "eos_token_id", least=0) for i in stops if i is not None]
        eos, self.vocab_size = self.tokenizer.token_to_id(self.template_words["eos_token"]), config.vocab_size
        if stops and eos not in (None, *stops):
            warnings.warn(f"{folder / file}: eos_token_id lacks {eos}, the tokenizer's; both end a text", stacklevel=1)
        self.stop_ids = stops if eos in (None, *stops) else [*stops, eos]
        if not self.stop_ids:
            raise InputError(f"{folder}: no eos_token_id in generation_config.json or config.json")
        self.end_id = eos if eos in stops else self.stop_ids[0]
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.added_words = [t.content for t in added]  # all that are cut out of text whole
        self.special_words = [t.content for t in added if t.special]  # control tokens

    def defuse(self, text, words):
        """Put the mark U+FDD0, a code point that no text uses, inside each of `words` in `text`."""
        text = text.replace("\ufdd0", "")
        for word in sorted(words, key=len, reverse=True):
            if len(word) > 1:
                text = text.replace(word, f"{word[0]}\ufdd0{word[1:]}")
        return text

    def encode_marked(self, text, *end):
        """Token ids of a text with marks, each stretch between them encoded by itself; then `end`."""
        parts = [self.tokenizer.encode(part, add_special_tokens=False).ids for part in text.split("\ufdd0")]
        ids = [i for part in (*parts, end) for i in part]
        if (last := max(ids, default=0)) >= self.vocab_size:
            word = self.tokenizer.id_to_token(last)
            raise InputError(f"{self.folder}: {word!r} is token {last}, but vocab_size is {self.vocab_size}")
        return ids

    def encode_chat(self, content):
        """A user message, in which control tokens stay text -> (the prompt, its token ids)."""
        text, prompt, wrong = self.defuse(content, self.added_words), "", ""
        options = {"tools": None, "documents": None, "add_generation_prompt": True, **self.template_words}
        # Templates want a string or a list of parts, and may drop the other kind without a word.
        for content in (text, [{"type": "text", "text": text}]):
            try:
                prompt = self.template.render(messages=[{"role": "user", "content": content}], **options)
            except Exception as e:  # a template can fail in any way
                wrong = wrong or f"{type(e).__name__}: {e}"
            if text.strip() in prompt and 0 < len(prompt) < 2**24:  # some templates strip it
                return prompt.replace("\ufdd0", ""), self.encode_marked(prompt)
        wrong = wrong or f"{len(prompt)} characters that lack the message, or too many"
        raise InputError(f"{self.folder}: the chat template gives no prompt ({wrong}); mend it, or use another model")

    def encode_completion(self, text):
        """Token ids of what a model wrote (`<think>` is one, `<|im_end|>` text), and its end."""
        return self.encode_marked(self.defuse(text, self.special_words), self.end_id)

    def encode(self, text):
        """Token ids of plain text, nothing added."""
        return self.encode_marked(self.defuse(text, self.added_words))

    def decode(self, ids):
        """Token ids -> text, control tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------- Drawing a token
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
    certainty: float = 0.0  # mean of KL(uniform || p) in nats, self-certainty (arXiv 2502.18581)


def uniforms(key, n):
    """n numbers in [0, 1) that depend on nothing but `key`, such as (seed, problem id, sample)."""
    words = hashlib.sha256(json.dumps(key).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(words, "little"))).random(n, dtype=np.float32)


def invert(weights, u):
    """weights [B, n] >= 0, u [B] in [0, 1) -> [B, 1], where running sums pass u of the total."""
    sums = weights.cumsum(-1, dtype=torch.double)
    index = torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)
    return index.clamp(max=weights.shape[1] - 1)  # past the end only where they are no numbers


def least_kept(ordered, p, params):
    """ordered [B, n], log p, likeliest first -> [B, 1], the log p that top-p and min-p ask for.

    p [B, n] are their shares of what top-k left. A token exactly as likely as the last passes too.
    """
    lowest = ordered[:, -1:]
    if params.top_p < 1:
        lowest = ordered.gather(-1, (p.cumsum(-1)[:, :-1] < params.top_p).sum(-1, keepdim=True))
    if params.min_p:
        lowest = lowest.maximum(ordered[:, :1] + math.log(params.min_p))
    return lowest


def draw_filtered(log_p, u, params, likeliest=0):
    """log_p [B, V], u [B] -> [B, 1], tokens of those that pass top-k, then top-p, then min-p.

    With `likeliest`, from that many alone where no other passes: on a CPU sorting all takes longer.
    """
    if likeliest:
        ordered, ids = log_p.topk(min(likeliest, log_p.shape[1]))  # [B, k] each
        p = ordered.exp()
        lowest, (ids, order) = least_kept(ordered, p, params), ids.sort()  # vocabulary's order
        weights = p.masked_fill_(ordered < lowest, 0).gather(-1, order)
        token = ids.gather(-1, invert(weights, u))
        for i in (lowest == ordered[:, -1:]).nonzero()[:, 0]:  # all of them pass, so others may
            token[i] = draw_filtered(log_p[i : i + 1], u[i : i + 1], params)  # one fits the cache
        return token
    if params.top_k:
        ordered = log_p.topk(min(params.top_k, log_p.shape[1])).values  # [B, k]
    elif not log_p.is_cpu:  # all are sorted: to ask how many are needed would be to wait
        ordered = log_p.sort(-1, descending=True).values  # [B, V]
    else:  # integers are sorted ten times as fast, and bits of positive floats are in their order
        ordered = [row.sort().values for row in (-log_p).view(torch.int32)]
        ordered = -torch.stack(ordered).view(torch.float32)  # [B, V]
    lowest = least_kept(ordered, ordered.softmax(-1), params)
    return invert(log_p.exp().masked_fill_(log_p < lowest, 0), u)


def sample_token(logits, u, params):
    """logits [B, V], u [B] in [0, 1) -> [3, B] float32: token ids, their log p, the mean log p.

    The two are at temperature 1. Draws by inverting the cumulative distribution at u, over the
    vocabulary in its own order: one random number a row lets a sample's randomness be drawn before,
    from its key. (By likelihood, tokens about as likely would change places with the rounding.)
    """
    log_p = logits.log_softmax(-1, dtype=torch.float32)  # [B, V]
    if params.temperature == 0:
        token = log_p.argmax(-1, keepdim=True)
    else:
        scaled = log_p if params.temperature == 1 else (log_p / params.temperature).log_softmax(-1)
        filters = params.top_k or params.top_p < 1 or params.min_p
        likeliest = 128 if log_p.is_cpu and not params.top_k else 0
        token = draw_filtered(scaled, u, params, likeliest) if filters else invert(scaled.exp(), u)
    return torch.stack([token[:, 0], log_p.gather(-1, token)[:, 0], log_p.mean(-1)])


# ------------------------------------------------------------------- The cache, and attention to it
GATHERED = 2**22  # numbers that attention without flash attention copies at once
BURST = 8  # decode steps on CUDA between two looks of the host at what was drawn
DRAWING = 64  # bytes that drawing takes for each row and entry of the vocabulary
KEPT = weakref.WeakKeyDictionary()  # model -> the DecodeGraphs of its last stream, and their cache


def use_varlen(device, dtype, head_dim):
    """Whether flash attention can read pages here: CUDA, half precision, torch 2.13 or newer."""
    if device.type != "cuda" or torch.__version__ < (2, 13) or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


class PagedCache:
    """Keys and values of all layers in pages of `page` positions, lent to sequences.

    Page 0 is nobody's: padding rows of a graph and steps past a sequence's last page write there.
    """

    def __init__(self, config, n_pages, page, dtype, device):
        L, K, D = config.n_layers, config.n_kv_heads, config.head_dim
        # Keys and values side by side: one write for both. Memory is touched when a page is taken.
        self.kv = torch.empty(L, n_pages, page, 2 * K, D, dtype=dtype, device=device)
        self.kv[:, 0] = 0
        self.page, self.windows, self.varlen = page, set(config.windows), use_varlen(device, dtype, D)
        self.free, self.users = list(range(1, n_pages)), [0] * n_pages  # users: of each page

    def take(self, n):
        pages = [self.free.pop() for _ in range(n)]
        for page in pages:
            self.users[page] = 1
            self.kv[:, page].zero_()  # what is masked still must be a number
        return pages

    def release(self, pages):
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)

    def fork(self, pages):
        """The pages of a sequence that goes on from a prefix: the same, but a copy of the last."""
        [own] = self.take(1)
        self.kv[:, own] = self.kv[:, pages[-1]]
        for page in pages[:-1]:
            self.users[page] += 1
        return [*pages[:-1], own]

    def plan(self, table, first, counts):
        """Fix where the tokens of the next pass go and what they see -> their positions [T].

        Of B sequences, numpy: the page table [B, W], the position of each one's first token of the
        pass, and the number of its tokens. They lie in one flat line, sequence after sequence.
        """
        device, width = self.kv.device, -(-(first + counts) // self.page)  # [B], pages seen
        owner, ends = np.arange(len(counts)).repeat(counts), np.cumsum([0, *counts], dtype=np.int32)
        positions = (first - ends[:-1])[owner] + np.arange(len(owner))  # [T]
        self.place(*(torch.from_numpy(x).to(device) for x in (table, owner, ends, positions)), int(counts.max()))
        self.groups = []  # without flash attention: sequences of as many tokens and pages at a time
        for n, w in () if self.varlen else sorted(set(zip(counts.tolist(), width.tolist()))):
            members = ((counts == n) & (width == w)).nonzero()[0]
            most = max(1, GATHERED // (w * self.kv[0, 0].numel()))  # a copy must not fill memory
            for part in np.split(members, range(most, len(members), most)):
                at = torch.from_numpy(ends[part][:, None] + np.arange(n)).to(device)  # [b, n]
                pages = torch.from_numpy(table[part, :w].flatten()).to(device)  # [b * w]
                key = torch.arange(w * self.page, device=device)  # [S]
                masks = {x: sees(self.positions[at], key, x) for x in self.windows}  # [b, n, S]
                self.groups.append((at, pages, masks))
        return self.positions

    def place(self, table, owner, ends, positions, longest):
        """What flash attention wants to know and where keys go, from tensors on the device.

        owner [T]: whose a token is; ends [B + 1]: where each sequence's tokens end, after a 0;
        positions [T]; longest: the most tokens of a sequence.
        """
        self.table, self.ends, self.positions, self.longest = table, ends, positions, longest
        pages = table[owner, positions // self.page].long()  # [T]
        self.slots = pages * self.page + positions % self.page  # [T]
        self.used = (positions[ends[1:] - 1] + 1).int()  # [B], positions that are written
        self.key_ends = F.pad(self.used.cumsum(0, dtype=torch.int32), (1, 0))  # [B + 1]

    def attend(self, attention, qkv):
        """qkv [T, H + 2K, D] of a layer: its keys and values are cached -> attention [T, H, D]."""
        H, K, _ = attention.heads
        q, window = qkv[:, :H], attention.window
        kv = self.kv[attention.layer]  # [pages, page, 2K, D]
        kv.flatten(0, 1).index_copy_(0, self.slots, qkv[:, H:])  # kv as [pages * page, 2K, D]
        if self.varlen:
            k, v = kv.split(K, dim=2)  # [pages, page, K, D] each
            # The operator wants the ends of the keys, though with pages it does not read them. With
            # more than one split it writes later sequences to a wrong place (pytorch issue 194167).
            where = {"seqused_k": self.used, "block_table": self.table, "num_splits": 1, "enable_gqa": True}
            ends = self.ends, self.key_ends, self.longest, self.table.shape[1] * self.page
            return varlen_attn(q, k, v, *ends, window_size=(-1 if window is None else window - 1, 0), **where)
        y = torch.empty_like(q)
        for at, pages, masks in self.groups:  # at [b, n]: where the tokens of b sequences are
            found = kv.index_select(0, pages).view(len(at), -1, 2 * K, kv.shape[-1])  # [b, S, 2K, D]
            k, v = found.transpose(1, 2).split(K, dim=1)  # [b, K, S, D] each
            part, mask = q[at].transpose(1, 2), masks[window][:, None]  # [b, H, n, D], [b, 1, n, S]
            y[at] = F.scaled_dot_product_attention(part, k, v, mask, enable_gqa=True).transpose(1, 2)
        return y


# --------------------------------------------------------------------------------- Decoding on CUDA
def record_graph(run, pool):
    """Record what run() launches as a CUDA graph -> (replay, the memory that graphs share)."""
    run()  # outside the recording first: libraries set themselves up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay, pool or graph.pool()


class DecodeGraphs:
    """Decode steps recorded as CUDA graphs: all launches of a step at the price of one.

    A graph replays fixed shapes at fixed addresses. So what changes from step to step lies in the
    tensors below, and each number of rows (rounded up) and way of drawing has a graph of its own.
    """

    def __init__(self, cache, max_rows, width, sizes):
        self.cache, self.max_rows, self.sizes, self.graphs, self.pool = cache, max_rows, sizes, {}, None
        device = cache.kv.device
        self.ids, self.positions = torch.zeros(2, max_rows, dtype=torch.long, device=device)
        self.table = torch.zeros(max_rows, width, dtype=torch.int32, device=device)
        self.uniforms = torch.zeros(BURST, max_rows, dtype=torch.double, device=device)
        self.drawn = torch.zeros(BURST, 3, max_rows, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)

    def burst(self, model, params, ids, positions, table, uniforms):
        """ids, positions [B], table [B, W], uniforms [steps, B], numpy -> drawn [steps, 3, B]."""
        steps, rows = uniforms.shape
        size = min(next((n for n in (1, 2, 4, 8) if n >= rows), -(-rows // 16) * 16), self.max_rows)
        key = (size, params.temperature, params.top_k, params.top_p, params.min_p)
        if key not in self.graphs:
            for static in (self.ids, self.positions, self.table, self.step):
                static.zero_()  # so that the first run writes to page 0
            run = functools.partial(self.decode, model, params, size)
            self.graphs[key], self.pool = record_graph(run, self.pool)
        for static, now in ((self.ids, ids), (self.positions, positions), (self.table, table)):
            static[:rows].copy_(torch.from_numpy(now))
            static[rows:size].zero_()
        self.uniforms[:steps, :rows].copy_(torch.from_numpy(uniforms))
        self.step.zero_()
        for _ in range(steps):
            self.graphs[key]()
        return self.drawn[:steps, :, :rows]

    def decode(self, model, params, size):
        """A step of the first `size` rows: the host waits for nothing, no shape depends on data."""
        ids, positions = self.ids[:size], self.positions[:size]
        ends = torch.arange(size + 1, dtype=torch.int32, device=ids.device)
        self.cache.place(self.table[:size], ends[:-1], ends, positions, 1)
        logits = model.lm_head(model(ids, positions, self.cache.attend))  # [size, V]
        drawn = sample_token(logits, self.uniforms.index_select(0, self.step)[0, :size], params)
        self.drawn[:, :, :size].index_copy_(0, self.step, drawn[None])
        ids.copy_(drawn[0])
        positions.add_(1)
        self.step.add_(1)


# ------------------------------------------------------------------------------ Continuous batching
@dataclass(eq=False)
class Sequence:  # one sample
    i: int  # its prompt
    j: int  # its number among that prompt's samples
    key: tuple
    limit: int  # new tokens at most
    ids: list = field(default_factory=list)  # drawn before it was preempted; a row has its own
    sums: list = (0.0, 0.0)  # over these: of log p, and of the certainty


@dataclass(eq=False)
class Prefix:
    """Tokens on their way into the cache, all of `ids` but the last, and who waits for them."""
    ids: list
    sequences: list
    left: int  # tokens still to prefill
    pages: list = field(default_factory=list)


@dataclass
class Stats:
    """What a `stream` has done so far."""
    prompt_tokens: int = 0  # prefilled, those of preempted sequences again
    generated: int = 0  # tokens of finished and unfinished samples
    running: int = 0  # sequences decoded in the last step
    steps: int = 0
    preempted: int = 0  # times that a sequence or a prefix gave its pages back, for lack of memory
    peak_pages: int = 0
    page_bytes: int = 0


class Scheduler:
    """Which prefixes are prefilled and which sequences decoded, and in which pages.

    A decoded sequence has a row in the arrays below, so that a burst costs the host a few calls of
    numpy, and Python works only on the sequences that start or finish.
    """

    def __init__(self, cache, waiting, max_rows, width, limit, stats):
        self.cache, self.stats, self.max_rows = cache, stats, max_rows
        self.waiting, self.prefilling = deque(waiting), []  # prefixes without and with pages
        self.rows, self.free_rows = np.empty(0, dtype=int), list(range(max_rows))  # oldest first
        self.sequences, self.sums = [None] * max_rows, np.zeros((max_rows, 2))
        self.table = np.zeros((max_rows, width), dtype=np.int32)  # 0 where there is no page
        self.n_pages, self.token, self.position, self.n_drawn, self.limit = np.zeros((5, max_rows), int)
        self.ids = np.zeros((max_rows, limit), dtype=np.int32)  # the new tokens
        self.uniforms = np.zeros((max_rows, limit), dtype=np.float32)

    def admit(self):
        """Waiting prefixes get pages while there is room; sequences of prefilled ones get rows."""
        while self.waiting:
            prefix, need = self.waiting[0], -(-len(self.waiting[0].ids) // self.cache.page)
            going = len(self.rows) + sum(len(p.sequences) for p in self.prefilling)
            # A page more for all that is going on: what comes in is not to be preempted at once.
            room = need + going + min(len(prefix.sequences), self.max_rows)
            if going and (going >= self.max_rows or len(self.cache.free) < room):
                break
            prefix.pages = self.cache.take(need)
            self.prefilling.append(self.waiting.popleft())
        while self.prefilling and not self.prefilling[0].left and self.free_rows and self.cache.free:
            self.start(self.prefilling[0])
            if not self.prefilling[0].sequences:
                del self.prefilling[0]

    def start(self, prefix):
        """The next sequence of a prefix gets a row. The last one takes over the prefix's pages."""
        sequence, row = prefix.sequences.pop(0), self.free_rows.pop()
        pages = self.cache.fork(prefix.pages) if prefix.sequences else prefix.pages
        n, limit = len(sequence.ids), sequence.limit
        self.sequences[row], self.sums[row] = sequence, sequence.sums
        self.table[row], self.table[row, : len(pages)], self.n_pages[row] = 0, pages, len(pages)
        self.token[row], self.position[row] = prefix.ids[-1], len(prefix.ids) - 1
        self.n_drawn[row], self.limit[row], self.ids[row, :n] = n, limit, sequence.ids
        self.uniforms[row, :limit] = uniforms(sequence.key, limit)
        self.rows = np.append(self.rows, row)

    def leave(self, row):
        """A sequence gives its row and its pages back -> the sequence, with what it drew."""
        sequence = self.sequences[row]
        sequence.ids = self.ids[row, : self.n_drawn[row]].tolist()
        sequence.sums = self.sums[row].tolist()
        self.cache.release(self.table[row, : self.n_pages[row]].tolist())
        self.n_pages[row] = self.limit[row] = 0
        self.free_rows.append(row)
        self.rows = self.rows[self.rows != row]
        return sequence

    def make_room(self, steps, prompts):
        """Rows get pages for their next tokens; when none is free, the youngest is preempted."""
        tokens = self.position + np.minimum(steps, self.limit - self.n_drawn)
        need = -(-tokens // self.cache.page)  # [max_rows]
        for row in self.rows[need[self.rows] > self.n_pages[self.rows]]:
            while self.limit[row] and self.n_pages[row] < need[row]:  # limit 0: preempted now
                if self.cache.free:
                    self.table[row, self.n_pages[row]] = self.cache.take(1)[0]
                    self.n_pages[row] += 1
                    continue
                if self.prefilling:  # the youngest of all loses its pages, and waits again
                    prefix = self.prefilling.pop()
                    self.cache.release(prefix.pages)
                    prefix.pages, prefix.left = [], len(prefix.ids) - 1
                else:
                    sequence = self.leave(self.rows[-1])
                    ids = prompts[sequence.i] + sequence.ids
                    prefix = Prefix(ids, [sequence], len(ids) - 1)
                self.waiting.appendleft(prefix)
                self.stats.preempted += 1

    def next_uniforms(self, steps):
        """The rows' next random numbers, [steps, B]; past a sequence's end any will do."""
        at = self.n_drawn[self.rows] + np.arange(steps)[:, None]  # [steps, B]
        return self.uniforms[self.rows, at.clip(max=self.uniforms.shape[1] - 1)].astype(float)

    def one_pass(self, model, params, chunk):
        """A token of each row, and `chunk` of prefixes, through the model -> drawn [1, 3, B]."""
        rows, n, width = self.rows, len(self.rows), self.table.shape[1]
        ids, first, counts = self.token[rows].tolist(), self.position[rows].tolist(), [1] * n
        table = np.concatenate([self.table[rows], np.zeros((len(self.prefilling), width), np.int32)])
        for prefix in self.prefilling:
            if count := min(chunk, prefix.left):
                table[len(first), : len(prefix.pages)] = prefix.pages
                first.append(len(prefix.ids) - 1 - prefix.left)
                counts.append(count)
                ids += prefix.ids[first[-1] : first[-1] + count]
                prefix.left, chunk = prefix.left - count, chunk - count
        self.stats.prompt_tokens += len(ids) - n
        positions = self.cache.plan(table[: len(first)], np.array(first), np.array(counts))
        hidden = model(torch.tensor(ids, device=positions.device), positions, self.cache.attend)  # [T, C]
        if n == 0:
            return torch.empty(1, 3, 0)
        u = torch.from_numpy(self.next_uniforms(1)[0]).to(hidden.device)
        return model.agree(sample_token(model.lm_head(hidden[:n]), u, params))[None]

    def finish(self, drawn, stop_ids, vocab_size):
        """What was drawn, [steps, 3, B], goes to the rows -> [(i, j, Completion)] of those done."""
        rows, steps, column = self.rows, len(drawn), np.arange(len(self.rows))
        token, log_p = drawn[:, 0].astype(np.int32), drawn[:, 1].astype(float)  # [steps, B]
        certainty = np.minimum(-drawn[:, 2] - math.log(vocab_size), 1e4)  # finite, with -inf too
        stops = np.isin(token, list(stop_ids))
        count = np.where(stops.any(0), stops.argmax(0) + 1, steps)  # [B], tokens up to a stop
        count = np.minimum(count, self.limit[rows] - self.n_drawn[rows])
        valid = np.arange(steps)[:, None] < count  # [steps, B], which tokens count
        if (bad := np.isnan(log_p) & valid).any():
            sequence = self.sequences[rows[bad.any(0).argmax()]]
            where = f"sample {sequence.j} of prompt {sequence.i}"
            raise InputError(f"logits are not numbers for {where}: damaged weights, or too large: try --dtype float32")
        step, of = valid.nonzero()
        self.ids[rows[of], self.n_drawn[rows[of]] + step] = token[valid]
        sums = [np.where(valid, x, 0).sum(0) for x in (log_p, certainty)]  # [B] each
        self.sums[rows] += np.stack(sums, axis=1)
        self.n_drawn[rows] += count
        self.position[rows] += count
        self.token[rows], stopped = token[count - 1, column], stops[count - 1, column]
        self.stats.generated += int(count.sum())
        self.stats.steps, self.stats.running = self.stats.steps + steps, len(rows)
        finished, over = [], stopped | (self.n_drawn[rows] == self.limit[rows])
        for row, stop in zip(rows[over], stopped[over]):
            sequence = self.leave(row)
            mean, reason = sequence.sums[1] / len(sequence.ids), "stop" if stop else "length"
            finished.append((sequence.i, sequence.j, Completion(sequence.ids, sequence.sums[0], reason, mean)))
        return finished


def free_memory(device):
    """Bytes that can still be had on a device; on a CPU each process gets its share of them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds and does not use can be had as well
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        free.append(1024 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]))
        group = Path("/sys/fs/cgroup")  # a container's own limit, where it has one
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        free = free or [2**32]
    return max(0, min(free)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def memory_to_use(model, chunk, recorded, dtype):
    """Bytes for the cache and for drawing: most of what is free, or what `recorded` gives back."""
    config, device = model.config, model.rope_freq.device
    widest = 4 * (config.mlp_dim + config.dim + 2 * config.n_heads * config.head_dim)  # of a pass
    free = free_memory(device) + (recorded.cache.kv.nbytes if recorded else 0)
    memory = torch.tensor(0.85 * free - chunk * widest * dtype.itemsize, dtype=torch.double, device=device)
    return model.agree(memory).item()


def cache_budget(config, page, page_bytes, longest, n_sequences, batch_size, memory):
    """Share `memory`, in bytes, between drawing and the cache -> (rows, pages).

    - Drawing takes 64 bytes for each row and entry of the vocabulary: logits, log-probabilities,
      a sorted copy with its indices and buffers, running sums in double precision. That may be a
      quarter of the memory, which limits the rows, the sequences decoded together.
    - The cache gets the rest, but no more pages than rows of `longest` tokens can fill. A page
      takes 2 (keys and values) x L x K x D numbers for each of its positions.

    InputError where not even one sequence fits: its pages, page 0, a prefix's last and one more.
    """
    row_bytes, width = DRAWING * config.vocab_size, -(-longest // page)
    rows = max(1, min(batch_size, n_sequences, int(memory / 4 / row_bytes)))
    left = max(0, memory - rows * row_bytes)
    pages = min(int(left / page_bytes), rows * (width + 1) + width + 3)
    if pages < width + 3:
        need = max((width + 3) * page_bytes + row_bytes, (width + 3) * page_bytes * 4 / 3) / 2**30
        have = f"{max(0, memory) / 2**30:.2f} GiB of memory are too few: one sequence of {longest} tokens"
        raise InputError(f"{have} needs {need + 0.005:.2f}; give more with --memory, or lower --max-new-tokens")
    return rows, pages if pages < 128 else max(width + 3, pages // 64 * 64)  # the same next time


@torch.inference_mode()
def stream(model, prompts, keys, params, stop_ids, batch_size=256, memory=None, graphs=True, stats=None):
    """Sample completions: prompts[i] are token ids, keys[i] a random key for each sample of them.

    Yields after every pass or burst the list of (i, j, Completion) that the one before it finished,
    often none: who works on them does so while the device computes. What a sample draws depends on
    its prompt and key, and up to rounding not on its neighbours. At most `batch_size` sequences are
    decoded together, and fewer when `memory` (bytes, default: most of what is free) holds fewer.
    `graphs`: replay decode steps as CUDA graphs where flash attention reads pages; they stay with
    the model, with the cache, for the next call. `stats` is kept up to date. InputError for a
    prompt that leaves no room in the context, or a memory that holds no sequence.
    """
    config, device, dtype = model.config, model.rope_freq.device, model.model.embed_tokens.weight.dtype
    context, samples, stats = config.context, sum(map(len, keys)), stats or Stats()
    if (n := max(map(len, prompts), default=0)) >= context:
        raise InputError(f"a prompt has {n} tokens, and the model's context {context}")
    varlen = use_varlen(device, dtype, config.head_dim)
    if device.type != "cpu" and not varlen:
        need = "the fast path needs an A100 or newer, torch 2.13 or newer, and bfloat16 or float16"
        warnings.warn(f"slow attention on {device}: {need}; this is {torch.__version__}, {dtype}", stacklevel=1)
    page, chunk = (256, 8192) if varlen else (64, 512)  # positions; prompt tokens of a pass
    numbers = 2 * config.n_layers * config.n_kv_heads * config.head_dim  # of a position
    stats.page_bytes = numbers * page * dtype.itemsize
    recorded = KEPT.pop(model, None)
    memory = memory_to_use(model, chunk, recorded, dtype) if memory is None else memory
    longest = max((min(len(ids) + params.max_new_tokens, context) for ids in prompts), default=1)
    rows, pages = cache_budget(config, page, stats.page_bytes, longest, samples, batch_size, memory)
    width = -(-longest // page) + 1  # the last page is 0, for steps past the end
    sizes = rows, width, pages, page, dtype, model.model.norm.weight.data_ptr()  # weights at their place
    if not (graphs and recorded and recorded.sizes == sizes):
        recorded = None  # what it holds is free before more is asked for
        cache = PagedCache(config, pages, page, dtype, device)
        recorded = DecodeGraphs(cache, rows, width, sizes) if varlen and graphs else None
    cache = recorded.cache if recorded else cache
    waiting = []
    for i, (ids, own) in enumerate(zip(prompts, keys)):
        limit = min(params.max_new_tokens, context - len(ids))
        sequences = [Sequence(i, j, key, limit) for j, key in enumerate(own)]
        waiting += [Prefix(ids, sequences, len(ids) - 1)] if own else []
    batch, finished = Scheduler(cache, waiting, rows, width, longest, stats), []
    while batch.waiting or batch.prefilling or len(batch.rows):
        batch.admit()
        burst = recorded and not any(prefix.left for prefix in batch.prefilling)
        steps = min(BURST, (batch.limit - batch.n_drawn)[batch.rows].max()) if burst else 1
        batch.make_room(steps, prompts)
        stats.peak_pages = max(stats.peak_pages, len(cache.users) - 1 - len(cache.free))
        if burst:
            inputs = (x[batch.rows] for x in (batch.token, batch.position, batch.table))
            drawn = recorded.burst(model, params, *inputs, batch.next_uniforms(steps))
        else:
            drawn = batch.one_pass(model, params, chunk)
        yield finished
        finished = batch.finish(drawn.cpu().numpy(), stop_ids, config.vocab_size)
    yield finished
    if recorded:
        KEPT[model] = recorded


def generate(model, prompts, keys, params, stop_ids, **options):
    """`stream` to its end -> a list (a prompt each) of lists (a key each) of `Completion`."""
    steps = stream(model, prompts, keys, params, stop_ids, **options)
    found = {(i, j): completion for finished in steps for i, j, completion in finished}
    return [[found[i, j] for j in range(len(own))] for i, own in enumerate(keys)]
