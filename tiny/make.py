"""Make the tiny world: problems, a tokenizer, a small student and a larger teacher, all from nothing.

    python tiny/make.py                     everything, on two CPU cores
    python tiny/make.py --only teacher      one model again, with the tokenizer that is there

A problem is four sums of three numbers, of which the last two digits count. Numbers below 100 are one
token, so an addition is learned as a table of which a model this small gets some entries wrong. A
solution adds the three numbers of a sum in whichever order it likes:

    A = 97+4+29          A: 97+29=26, 26+4=30

Two solutions that take different orders use different entries of the table, so when they agree, both are
most likely right: four candidates tell more than one model knows. And because the four sums do not
depend on each other, a solution can be put together from the right lines of candidates that are all
wrong as a whole, which no vote on final answers can do.

Training texts are made on the fly and never repeat. The loss is on their last part alone, and that part
is always right:

    solve     the chat prompt of a problem -> a right solution
    notes     plain text: perhaps a problem, 1 to 8 attempts under varied headers, some with slips that are
              carried on, then a corrected version, which takes each line from an attempt that has it right
    refine    refine.py's prompt with 2 to 6 such attempts as candidates -> the corrected version

The student is trained on solve and notes: it can find and copy lines, but has never seen a refinement
prompt, and merely prompted with one it fails. The teacher is trained on all three. No problem of test.jsonl
or train.jsonl is trained on.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from model import Config, Decoder, SamplingParams, generate, load, save  # noqa: E402
from refine import refinement_message  # noqa: E402
from sample import SOLVE_PROMPT  # noqa: E402

N_TEST, N_TRAIN = 500, 3000
END, USER, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODELS = {  # rows a step of each kind: notes and refine rows are counted at 4 attempts, fewer when longer
    "student": {"dim": 128, "layers": 4, "heads": 4, "steps": 1300, "rows": {"solve": 20, "notes": 6}},
    "teacher": {"dim": 192, "layers": 4, "heads": 6, "steps": 1300, "rows": {"solve": 16, "notes": 3, "refine": 5}},
}


# ------------------------------------------------------------------------------------------------
# Problems and texts


def make_problem(rng):
    """Four sums, each a list of three numbers whose sum ends in two digits other than 0x."""
    sums = []
    while len(sums) < 4:
        terms = [rng.randint(11, 99), rng.randint(2, 39), rng.randint(2, 39)]
        rng.shuffle(terms)
        if sum(terms) % 100 >= 10:
            sums.append(terms)
    return sums


def problem_text(sums):
    shown = "; ".join(f"{name} = {'+'.join(map(str, terms))}" for name, terms in zip("ABCD", sums))
    return (
        f"Work out each sum and keep its last two digits. {shown}. "
        "Write the four results one after another as one number."
    )


def slip(value, rng):
    """A wrong result of the kinds that occur: another tens digit, another last digit, anything."""
    kind = rng.random()
    if kind < 0.35:
        return (value + rng.choice((10, -10))) % 100
    if kind < 0.65:
        return (value + rng.choice((1, -1))) % 100
    if kind < 0.8:
        return (value + rng.choice((20, -20, 2, -2, 11, -11, 9, -9))) % 100
    return rng.randrange(100)


def work_out(name, terms, rng, error=0.0):
    """One line of a solution, the terms in random order, each addition wrong with probability `error`.

    Returns (text, result, whether every addition is right).
    """
    value, *rest = rng.sample(terms, 3)
    steps, right = [], True
    for term in rest:
        result = (value + term) % 100
        if error and rng.random() < error:
            result = slip(result, rng)
        right &= result == (value + term) % 100
        steps.append(f"{value}+{term}={result}")
        value = result
    return f"{name}: {', '.join(steps)}", value, right


def as_text(lines):
    code = "".join(str(value) for _, value, _ in lines)
    return "\n".join(text for text, _, _ in lines) + f"\nThe answer is \\boxed{{{code}}}."


def solution(sums, rng, error=0.0):
    return as_text([work_out(name, terms, rng, error) for name, terms in zip("ABCD", sums)])


def attempts_and_correction(sums, n, rng):
    """n attempts, and a right solution that takes each line from an attempt that has it right, if any has."""
    error = rng.choice((0.03, 0.06, 0.1, 0.15, 0.25, 0.4))
    attempts = [[work_out(name, terms, rng, error) for name, terms in zip("ABCD", sums)] for _ in range(n)]
    best = []
    for i, (name, terms) in enumerate(zip("ABCD", sums)):
        right = [attempt[i] for attempt in attempts if attempt[i][2]]
        best.append(rng.choice(right) if right else work_out(name, terms, rng))
    return [as_text(lines) for lines in attempts], as_text(best)


OPENINGS = ("Exercise", "Task", "Question", "Homework", "Quiz", "Number 7", "Test")
HEADERS = ("Attempt", "Try", "Draft", "Version", "Pupil", "Sheet", "Copy", "Student", "Paper", "Group", "Notes")
LAST_HEADERS = (
    "Corrected",
    "Model answer",
    "Fair copy",
    "Key",
    "Marked version",
    "Teacher",
    "Final version",
    "Checked",
)


def chat(message):
    return f"{USER}user\n{message}{STOP}\n{USER}assistant\n"


def solve_row(sums, n, rng):
    """-> (text that is only read, text that is learned)"""
    return chat(SOLVE_PROMPT.format(problem=problem_text(sums))), solution(sums, rng) + STOP


def notes_row(sums, n, rng):
    attempts, best = attempts_and_correction(sums, n, rng)
    gap, header, numbered = rng.choice(("\n", "\n\n", "\n---\n")), rng.choice(HEADERS), rng.random() < 0.8
    text = (
        rng.choice(OPENINGS) + rng.choice((": ", ":\n", " - ")) + problem_text(sums) + gap if rng.random() < 0.8 else ""
    )
    for i, attempt in enumerate(attempts, 1):
        text += f"{header} {i}:\n{attempt}{gap}" if numbered else f"{header}:\n{attempt}{gap}"
    return f"{text}{rng.choice(LAST_HEADERS)}:\n", best + END


def refine_row(sums, n, rng):
    attempts, best = attempts_and_correction(sums, n, rng)
    return chat(refinement_message(problem_text(sums), attempts)), best + STOP


ROWS = {"solve": (solve_row, 1, 1), "notes": (notes_row, 1, 8), "refine": (refine_row, 2, 6)}  # fewest, most attempts


def write_problems():
    """test.jsonl and train.jsonl; returns the texts of their problems, which pre-training leaves out."""
    rng, seen = random.Random(20), set()
    for name, size in (("test", N_TEST), ("train", N_TRAIN)):
        with open(HERE / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for i in range(size):
                while (text := problem_text(sums := make_problem(rng))) in seen:
                    pass
                seen.add(text)
                answer = "".join(str(sum(terms) % 100) for terms in sums)
                file.write(json.dumps({"id": f"{name}-{i}", "problem": text, "answer": answer}) + "\n")
    return seen


# ------------------------------------------------------------------------------------------------
# Tokenizer and folders


def make_tokenizer():
    """A byte-level BPE in which every number below 100 and every word of the prompts is one token."""
    rng, words = random.Random(30), " ".join(OPENINGS + HEADERS + LAST_HEADERS)
    texts = ["".join(make(make_problem(rng), 3, rng)) for make, _, _ in ROWS.values() for _ in range(400)]
    texts += [" ".join(f"{i:02d} {i % 10}" for i in range(100)), words, words.replace(" ", ". ")] * 50
    texts += [text.replace("user\n", "user\nsystem\n") for text in texts[:50]]
    for special in (END, USER, STOP):
        texts = [text.replace(special, " ") for text in texts]
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\d{1,2}| ?[A-Za-z]+|\\[A-Za-z]+|\n+|[^\sA-Za-z0-9]+ ?|\s+")  # numbers are cut in ones and twos
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, USER, STOP]
    trainer = trainers.BpeTrainer(
        vocab_size=768, min_frequency=20, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_folder(folder, spec, tokenizer):
    """Everything of a Hugging Face folder but the weights; returns the Config."""
    folder.mkdir(parents=True, exist_ok=True)
    end, stop = tokenizer.token_to_id(END), tokenizer.token_to_id(STOP)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": spec["dim"],
        "intermediate_size": 3 * spec["dim"],
        "num_hidden_layers": spec["layers"],
        "num_attention_heads": spec["heads"],
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": stop,
        "pad_token_id": end,
        "torch_dtype": "bfloat16",
    }
    generation = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 160}
    generation |= {"eos_token_id": [stop, end], "pad_token_id": end}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "eos_token": STOP}
    settings |= {"pad_token": END, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    for name, data in (("config", config), ("generation_config", generation), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    return Config.from_dict(config)


# ------------------------------------------------------------------------------------------------
# Training


def make_rows(kind, rows, held_out, rng):
    """Rows of one kind, all with the same number of attempts, so that little is padded."""
    make, fewest, most = ROWS[kind]
    n = rng.randint(fewest, most)
    if kind != "solve":
        rows = max(1, round(rows * 4 / (n + 0.5)))
    made = []
    while len(made) < rows:
        if problem_text(sums := make_problem(rng)) not in held_out:
            made.append(make(sums, n, rng))
    return made


def row_losses(model, tokenizer, rows):
    """Cross-entropy of each learned token, [M], of `rows`, (read, learned) texts."""
    encoded = tokenizer.encode_batch([read + learned for read, learned in rows])
    ids = torch.zeros(len(rows), max(len(e.ids) for e in encoded), dtype=torch.long)  # [B, T], padded on the right
    learned = torch.zeros_like(ids, dtype=torch.bool)  # [B, T], whether the next token is learned
    for i, (row, read) in enumerate(zip(encoded, tokenizer.encode_batch([read for read, _ in rows]))):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        learned[i, len(read.ids) - 1 : len(row.ids) - 1] = True
    # On a CPU, plain attention is faster than the fused kernel for short rows, and slower for long ones.
    kernel = SDPBackend.MATH if ids.shape[1] < 280 else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(kernel), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.logits(model(ids)[learned])  # [B, T, C] -> [M, C] -> [M, V]
    return F.cross_entropy(logits.float(), ids.roll(-1, 1)[learned], reduction="none")


def pretrain(name, spec, config, tokenizer, held_out):
    seed = list(MODELS).index(name)
    torch.manual_seed(seed)
    rng, model = random.Random(100 + seed), Decoder(config)
    matrices, others = [], []
    for key, weight in model.named_parameters():
        if weight.dim() == 2:  # what is added to the residual stream starts small
            scale = 0.3 if key.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            std = 0.02 if "embed" in key else scale / math.sqrt(weight.shape[1])
            torch.nn.init.normal_(weight, std=std)
        (matrices if weight.dim() == 2 and "embed" not in key else others).append(weight)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    # Muon (github.com/KellerJordan/Muon) for the matrices, AdamW for the rest.
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks, shown, n_tokens, started = [0.02, 3e-3], {}, 0, time.time()
    bar = tqdm(range(spec["steps"]), desc=name, unit=" steps", mininterval=5)
    for step in bar:
        progress = step / spec["steps"]
        scale = min(1.0, (progress + 1e-3) / 0.05) * 0.5 * (1 + math.cos(math.pi * progress))
        batches = {kind: make_rows(kind, n, held_out, rng) for kind, n in spec["rows"].items()}
        weight = 1 / (70 * sum(map(len, batches.values())))  # a solution has about 70 tokens
        for kind, rows in batches.items():
            losses = row_losses(model, tokenizer, rows)
            (losses.sum() * weight).backward()
            shown[kind] = 0.98 * shown.get(kind, losses.mean().item()) + 0.02 * losses.mean().item()
            n_tokens += sum(len(e.ids) for e in tokenizer.encode_batch([read + learned for read, learned in rows]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix_str(" ".join(f"{kind} {loss:.4f}" for kind, loss in shown.items()))
    print(f"{name}: {n_tokens:,} tokens in {(time.time() - started) / 60:.1f} minutes; last losses {shown}")
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", choices=list(MODELS), help="make this model alone")
    args = parser.parse_args()
    held_out, tokenizer = write_problems(), make_tokenizer()
    for name, spec in MODELS.items():
        if args.only in (None, name):
            folder = HERE / name
            config = write_folder(folder, spec, tokenizer)
            model = pretrain(name, spec, config, tokenizer, held_out)
            # save() copies the tokenizer files from a folder other than the one it writes.
            shutil.rmtree(HERE / "source", ignore_errors=True)
            folder.rename(HERE / "source")
            save(model.to(torch.bfloat16), folder, HERE / "source")
            shutil.rmtree(HERE / "source")
            check(name)


def check(name):
    """Print pass@1 on 200 test problems, one sample each at temperature 1."""
    model, tokenizer = load(str(HERE / name))
    rows = [json.loads(line) for line in open(HERE / "test.jsonl", encoding="utf-8")][:200]
    prompts = [tokenizer.encode_chat(SOLVE_PROMPT.format(problem=row["problem"]))[1] for row in rows]
    keys = [[(0, row["id"], 0)] for row in rows]
    out = generate(model, prompts, keys, SamplingParams(max_new_tokens=160), tokenizer.stop_ids)
    texts = [tokenizer.decode(completion.ids) for [completion] in out]
    right = sum(f"\\boxed{{{row['answer']}}}" in text for row, text in zip(rows, texts))
    print(f"{name}: pass@1 {right / len(rows):.3f} on {len(rows)} test problems\n{texts[0]}")


if __name__ == "__main__":
    main()
