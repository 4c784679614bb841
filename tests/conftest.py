"""Fixtures: small random models in Hugging Face folders, and the real small model where there is one."""

import json
import os
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers is not to ask the hub about local folders

# A real instruction-tuned model (SmolLM2-135M-Instruct) as a folder, and folder of benchmark problems as JSONL.
REAL_MODEL = os.environ.get("GSR_REAL_MODEL", "")
PROBLEMS = os.environ.get("GSR_PROBLEMS", "")

BASE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder, eos_ids=(2,), answer=None):
    r"""A byte-level BPE tokenizer without merges: 256 bytes, and a few control tokens before them.

    With an `answer`, the 94 tokens of bytes that no ASCII text has begin with \boxed{answer}, so that a random model is
    often right; when it reads such bytes, it leaves them out.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if answer:
        alphabet = [f"\\boxed{{{answer}}}{char}" if 0xA1 <= ord(char) <= 0xFF else char for char in alphabet]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {word: i for i, word in enumerate(control + alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(eos_ids), "max_new_tokens": 24}))


def make_folder(folder, kind="llama", seed=0, scale=1.0, **changes):
    """A random model, initialised and written by transformers, so that its loading is tested too."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.AutoConfig.for_model(kind, **{**BASE, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # norms are ones and biases zeros: make them count
                weight.add_(0.3 * torch.randn_like(weight))
            else:
                weight.mul_(scale * (3 if "embed" not in name else 10))
    model.save_pretrained(folder)
    # The file as models of that kind carry it, not as the installed transformers rewrites it.
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **BASE, **changes}))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "random", "qwen3", head_dim=16, max_position_embeddings=1024)


@pytest.fixture(scope="session")
def real_model():
    if not REAL_MODEL:
        pytest.skip("set GSR_REAL_MODEL to a folder with SmolLM2-135M-Instruct")
    return REAL_MODEL


@pytest.fixture(scope="session")
def problem_files():
    if not PROBLEMS:
        pytest.skip("set GSR_PROBLEMS to a folder with gsm8k.jsonl and svamp.jsonl")
    return Path(PROBLEMS).resolve()


@pytest.fixture
def problems(tmp_path):
    """Seven small problems in a file."""
    path = tmp_path / "problems.jsonl"
    rows = [
        {"id": f"p{i}", "problem": f"What is {i} + {i * i}?", "answer": str(i + i * i), "level": i} for i in range(7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
