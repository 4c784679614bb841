"""Make the tiny world: problems, a tokenizer and small pre-trained models, all from nothing.

    python tiny/make.py                      everything, on two CPU cores
    python tiny/make.py --only qwen3-w96     one model again; the problems and the tokenizer come out as they were

A problem is a sheet of eight sums, of which the last two digits count, and it is solved when all eight are:

    Work out each sum and keep its last two digits: a) 28+38=?; b) 94+26=?; ... Write the results one after
    another as one number.

    a) 28+38=66
    b) 94+26=20
    ...
    The answer is \\boxed{6620...}.

Numbers below 100 are one token, the sign behind them included, so an addition is a table of 4,272 entries, of which
a small model gets some wrong. A line is easy and a sheet is long: a model that has 9 lines of 10 right solves 43% of
the sheets, and two wrong solutions of a sheet are seldom wrong in the same line. A vote on final answers throws that
away; whoever compares line by line can put a right sheet together from candidates that are all wrong.

Pre-training texts are made on the fly and never repeat; no problem of the files is among them:

    facts     lines of the tables
    repeats   words and numbers in no order, and the same again, twice
    look-ups  a sheet, and then lines of it in any order, without results
    solve     the chat prompt of a sheet -> a right solution
    notes     a sheet, 1 to 8 attempts at it under varied headers, with slips, then a corrected version; as plain text,
              or as a chat in which the user's message has words of all kinds around them, in no order

All models read the same mixture in the same order. It shows that a later passage may copy from earlier ones and
correct them, but no refinement prompt: refine.py's words are among those in no order, its sentences nowhere.
"Differences" are a second kind of sheet, which pre-training has seen too, for a third of the texts. Nothing in this
repository is trained further on them: they are what tells whether refinement carries over to another kind of problem.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from model import Config, Decoder, SamplingParams, generate, load  # noqa: E402
from parallel import save  # noqa: E402
from refine import REFINE_PROMPT, refinement_message  # noqa: E402
from sample import SOLVE_PROMPT  # noqa: E402

LINES, NAMES = 8, "abcdefgh"
PROBLEMS = {  # file -> kind, size
    "test": ("sums", 500),
    "train": ("sums", 2000),
    "differences": ("differences", 500),
    "valid": ("sums", 500),  # on which settings are chosen
}
KINDS = {  # what the sheet says; the sign
    "sums": ("Work out each sum and keep its last two digits", "+"),
    "differences": ("Work out each difference", "-"),
}
MODELS = {  # model_type, width, learning rate of the matrices; all have 4 layers
    "qwen3-w48": ("qwen3", 48, 0.02),
    "qwen3-w64": ("qwen3", 64, 0.02),
    "qwen3-w96": ("qwen3", 96, 0.02),
    "qwen3-w128": ("qwen3", 128, 0.02),
    "qwen3-w192": ("qwen3", 192, 0.02),
    "llama-w96": ("llama", 96, 0.008),  # with 0.02 it hardly learned to add (LOG.md)
}
STEPS = 6000
END, USER, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ------------------------------------------------------------------------------------------------
# Problems


def make_sheet(kind, size, rng):
    """[(expression, result)], `size` of them; results have two digits."""
    sheet = []
    while len(sheet) < size:
        a, b = rng.randint(11, 99), rng.randint(2, 49)
        result = (a + b) % 100 if kind == "sums" else a - b
        if result >= 10:
            sheet.append((f"{a}{KINDS[kind][1]}{b}", result))
    return sheet


def problem_text(kind, sheet):
    shown = "; ".join(f"{name}) {expression}=?" for name, (expression, _) in zip(NAMES, sheet))
    return f"{KINDS[kind][0]}: {shown}. Write the results one after another as one number."


def answer_of(results):
    return "".join(map(str, results))


def solution(sheet, results=None):
    results = results or [result for _, result in sheet]
    lines = [f"{name}) {expression}={result}\n" for name, (expression, _), result in zip(NAMES, sheet, results)]
    return f"{''.join(lines)}The answer is \\boxed{{{answer_of(results)}}}."


def slip(value, rng):
    """A wrong result of the kinds that occur: another tens digit, another last digit, anything."""
    wrong = value
    while wrong == value or wrong < 10:
        near = rng.choices(((10, -10), (1, -1), (20, -20, 2, -2, 11, -11, 9, -9), None), (0.35, 0.3, 0.15, 0.2))[0]
        wrong = (value + rng.choice(near)) % 100 if near else rng.randrange(10, 100)
    return wrong


def write_problems():
    """The files of problems; returns the texts of their problems, which pre-training leaves out."""
    rng, seen = random.Random(20), set()
    for name, (kind, size) in PROBLEMS.items():
        with open(HERE / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for i in range(size):
                while (text := problem_text(kind, sheet := make_sheet(kind, LINES, rng))) in seen:
                    pass
                seen.add(text)
                answer = answer_of(result for _, result in sheet)
                file.write(json.dumps({"id": f"{name}-{i}", "problem": text, "answer": answer}) + "\n")
    return seen


# ------------------------------------------------------------------------------------------------
# Texts: lists of (text, weight of its tokens in the loss)

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
COMMON = (
    "is it was and that we they these this there then two of in to a an some other more most little big good bad new "
    "old day year man way thing hand part place week work number people time"
)
WORDS = sorted({*re.findall(r"[A-Za-z]+", f"{REFINE_PROMPT} Candidate"), *COMMON.split()})
LAST_SENTENCE = SOLVE_PROMPT.partition("\n\n")[2]


def prose(rng, most):
    """Words in no order, at most so many."""
    text = ""
    for word in rng.choices(WORDS, k=rng.randint(0, most)):
        text += ("" if not text else " ") + word + rng.choices(("", ".", ",", ":"), (0.82, 0.08, 0.06, 0.04))[0]
    return text and text + rng.choice(".:")


def chat(message):
    return f"{USER}user\n{message}{STOP}\n{USER}assistant\n"


def facts_row(rng):
    row = []
    for kind in rng.choices(list(KINDS), (2, 1), k=20):
        [(expression, result)] = make_sheet(kind, 1, rng)
        row += [(f"{expression}=", 0), (str(result), 1), ("\n", 0)]
    return row


def repeats_row(rng):
    """Words and numbers in no order, three times."""
    parts = [f" {rng.choice(WORDS)}" if rng.random() < 0.3 else str(rng.randint(10, 99)) for _ in range(24)]
    text = "".join(parts[: rng.randint(4, 24)])
    return [(f"{text}\n", 0), (text, 1), ("\n", 0), (text, 1)]


def look_ups_row(rng):
    """A sheet, and lines of it in any order, without results."""
    names = rng.sample(NAMES, rng.randint(2, LINES))
    lines = [f"{name}) {make_sheet(rng.choice(list(KINDS)), 1, rng)[0][0]}=" for name in names]
    row = [(f"{prose(rng, 6)}\n{'; '.join(f'{line}?' for line in lines)}.\n{prose(rng, 6)}\n", 0)]
    for line in rng.choices(lines, k=8):
        row += [(line[:3], 0), (line[3:], 1), ("\n", 0)]
    return row


def solve_row(kind, sheet, rng):
    return [(chat(SOLVE_PROMPT.format(problem=problem_text(kind, sheet))), 0), (solution(sheet) + STOP, 1)]


def notes_row(kind, sheet, n, in_chat, rng):
    """n attempts and the corrected version.

    Attempts after the first are learned too, half as much: to copy is to learn where to look.
    """
    error, gap = rng.choice((0.03, 0.06, 0.1, 0.15, 0.25, 0.4)), rng.choice(("\n", "\n\n", "\n---\n"))
    header, numbered = rng.choice(HEADERS), rng.random() < 0.8
    start = f"{USER}user\n{prose(rng, 16)}{gap}" if in_chat else ""
    if rng.random() < 0.85:
        start += rng.choice(OPENINGS) + rng.choice((": ", ":\n", " - ")) + problem_text(kind, sheet) + gap
    row = [(start, 0)]
    for i in range(1, n + 1):
        attempt = [slip(result, rng) if rng.random() < error else result for _, result in sheet]
        row += [(f"{header} {i}:\n" if numbered else f"{header}:\n", 0)]
        row += [(solution(sheet, attempt), 0.5 if i > 1 else 0), (gap, 0)]
        row += [(prose(rng, 8) + gap, 0)] if rng.random() < 0.3 else []
    if in_chat:
        last = f" {LAST_SENTENCE}" if rng.random() < 0.5 else ""
        end = f"{prose(rng, 26)}{last}{STOP}\n{USER}assistant\n"
    else:
        end = f"{rng.choice(LAST_HEADERS)}:\n"
    return row + [(end, 0), (solution(sheet) + (STOP if in_chat else END), 1)]


def texts_of_step(progress, held_out, rng):
    """-> the batches of one step, {kind of text: rows}; progress goes from 0 to 1."""

    def sheet():
        whole = progress > 0.5 and rng.random() < 0.6  # short sheets first: they are sooner learned
        while True:
            kind = rng.choices(list(KINDS), (2, 1))[0]
            made = make_sheet(kind, LINES if whole else rng.randint(1, LINES), rng)
            if problem_text(kind, made) not in held_out:
                return kind, made

    repeats, look_ups = ([make(rng) for _ in range(6)] for make in (repeats_row, look_ups_row))
    if progress < 0.35:  # first of all, to find things: without it nothing else is learned
        return [{"repeats": repeats, "look-ups": look_ups}]
    short = {"repeats": repeats[:1], "look-ups": look_ups[:2]}
    short["facts"] = [facts_row(rng) for _ in range(6 if progress < 0.5 else 2)]
    short["solve"] = [solve_row(*sheet(), rng) for _ in range(4)]
    n, in_chat = rng.randint(1, 8), rng.random() < 0.5
    notes = [notes_row(*sheet(), n, in_chat, rng) for _ in range(max(1, round(6 / (n + 0.5))))]
    return [short, {"notes in a chat" if in_chat else "notes": notes}]


# ------------------------------------------------------------------------------------------------
# Tokenizer and folders


def make_tokenizer():
    """A byte-level BPE in which every number below 100 and every word of the prompts is one token."""
    rng, texts = random.Random(30), []
    for kind in KINDS:
        for _ in range(300):
            rows = [solve_row(kind, make_sheet(kind, LINES, rng), rng)]
            rows += [notes_row(kind, make_sheet(kind, LINES, rng), 3, in_chat, rng) for in_chat in (False, True)]
            texts += ["".join(text for text, _ in row) for row in rows]
    texts += [chat(refinement_message("x", ["y", "z"]))] * 60
    words = " ".join([*OPENINGS, *HEADERS, *LAST_HEADERS, *WORDS])
    texts += [" ".join(f"{i:02d} {i % 10} {i}+ {i}- {i}=" for i in range(100)), words, words.replace(" ", ". ")] * 50
    texts += [text.replace("user\n", "user\nsystem\n") for text in texts[:50]]
    for special in (END, USER, STOP):
        texts = [text.replace(special, " ") for text in texts]
    tokenizer = Tokenizer(models.BPE())
    # The name of a line is one token, and numbers are cut in ones and twos.
    pieces = Regex(r"[a-h]\) |\d{1,2}[-+=]?| ?[A-Za-z]+|\\[A-Za-z]+|\n+|[^\sA-Za-z0-9]+ ?|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, USER, STOP]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, min_frequency=20, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_folder(folder, kind, width, tokenizer):
    """Everything of a Hugging Face folder but the weights; returns the Config."""
    folder.mkdir(parents=True, exist_ok=True)
    end, stop = tokenizer.token_to_id(END), tokenizer.token_to_id(STOP)
    config = {
        "architectures": [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[kind]],
        "model_type": kind,
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": max(4, width // 32),
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000.0,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": stop,
        "pad_token_id": end,
        "torch_dtype": "bfloat16",
    }
    generation = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 120}
    generation |= {"eos_token_id": [stop, end], "pad_token_id": end}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "eos_token": STOP}
    settings |= {"pad_token": END, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    for name, data in (("config", config), ("generation_config", generation), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    return Config.from_dict(config)


# ------------------------------------------------------------------------------------------------
# Training


def row_losses(model, tokenizer, rows):
    """Rows of texts -> (cross-entropy [M], weight [M] and row [M] of the tokens that have a weight; tokens read)."""
    encoded = iter(tokenizer.encode_batch([text for row in rows for text, _ in row]))
    parts = [[(token, weight) for _, weight in row for token in next(encoded).ids] for row in rows]
    length = max(map(len, parts))
    ids, weights = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)  # [B, T], padded
    for i, row in enumerate(parts):
        ids[i, : len(row)] = torch.tensor([token for token, _ in row])
        weights[i, : len(row) - 1] = torch.tensor([weight for _, weight in row[1:]])  # of the next token
    at = weights > 0
    # On a CPU, plain attention is faster than the fused kernel for short rows, and slower for long ones.
    kernel = SDPBackend.MATH if length < 280 else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(kernel), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.lm_head(model(ids)[at])  # [B, T, C] -> [M, C] -> [M, V]
    losses = F.cross_entropy(logits.float(), ids.roll(-1, 1)[at], reduction="none")
    return losses, weights[at], at.nonzero()[:, 0], sum(map(len, parts))


def pretrain(name, config, lr, tokenizer, held_out, log):
    torch.manual_seed(0)
    rng, model = random.Random(100), Decoder(config)
    matrices, others = [], []
    for key, weight in model.named_parameters():
        if weight.dim() == 2:  # what is added to the residual stream starts small
            scale = 0.3 if key.endswith(("o_proj.weight", "down_proj.weight")) else 5 if "embed" in key else 1
            torch.nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[1]))
        (matrices if weight.dim() == 2 and "embed" not in key else others).append(weight)
    parameters = sum(weight.numel() for weight in model.parameters())
    # Muon (github.com/KellerJordan/Muon) for the matrices, AdamW for the rest.
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    shown, n_tokens, started = {}, 0, time.time()
    bar = tqdm(range(STEPS), desc=f"{name}, {parameters:,} parameters", unit=" steps", mininterval=5)
    for step in bar:
        progress = step / STEPS
        scale = min(1.0, (progress + 1e-3) / 0.03) * 0.5 * (1 + math.cos(math.pi * progress))
        for texts in texts_of_step(progress, held_out, rng):
            losses, weights, number, tokens = row_losses(model, tokenizer, sum(texts.values(), []))
            ((losses * weights).sum() / 300).backward()
            n_tokens += tokens
            ends = np.cumsum([0, *map(len, texts.values())])
            for kind, start, end in zip(texts, ends, ends[1:]):  # of the attempts in notes, nothing is shown
                last = losses[(number >= start) & (number < end) & (weights == 1)].mean().item()
                shown[kind] = 0.99 * shown.get(kind, last) + 0.01 * last
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix_str(" ".join(f"{kind} {loss:.3f}" for kind, loss in shown.items()))
        if step % 100 == 99 or step == STEPS - 1:
            spent = {"step": step + 1, "tokens": n_tokens, "seconds": round(time.time() - started)}
            losses = {kind: round(loss, 4) for kind, loss in shown.items()}
            log.write(json.dumps({"model": name, "parameters": parameters, **spent, **losses}) + "\n")
            log.flush()
    return model


def check(name):
    """Print pass@1 on 200 test problems, one sample each at temperature 1."""
    model, tokenizer = load(str(HERE / name))
    rows = [json.loads(line) for line in open(HERE / "test.jsonl", encoding="utf-8")][:200]
    prompts = [tokenizer.encode_chat(SOLVE_PROMPT.format(problem=row["problem"]))[1] for row in rows]
    keys = [[(0, row["id"], 0)] for row in rows]
    out = generate(model, prompts, keys, SamplingParams(max_new_tokens=120), tokenizer.stop_ids)
    texts = [tokenizer.decode(completion.ids) for [completion] in out]
    right = sum(f"\\boxed{{{row['answer']}}}" in text for row, text in zip(rows, texts))
    print(f"{name}: pass@1 {right / len(rows):.3f} on {len(rows)} test problems\n{texts[0]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", choices=list(MODELS), help="make this model alone")
    args = parser.parse_args()
    held_out, tokenizer = write_problems(), make_tokenizer()
    for name, (kind, width, lr) in MODELS.items():
        if args.only in (None, name):
            # save() copies the tokenizer files from a folder other than the one it writes.
            folder, source = HERE / name, HERE / f"{name}.source"
            config = write_folder(source, kind, width, tokenizer)
            with open(HERE / f"{name}.losses.jsonl", "w", encoding="utf-8") as log:
                model = pretrain(name, config, lr, tokenizer, held_out, log)
            shutil.rmtree(folder, ignore_errors=True)
            save(model.to(torch.bfloat16), folder, source)
            shutil.rmtree(source)
            check(name)


if __name__ == "__main__":
    main()
