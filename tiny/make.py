"""Make the tiny world: problems, a tokenizer and small pre-trained models, all from nothing.

    OMP_NUM_THREADS=1 python tiny/make.py --only qwen3-w96     one model again, in half an hour of one CPU core;
                                                               the problems and the tokenizer come out as they were
    python tiny/make.py                                        all models, one after another

A problem is a sheet of eight lines, all to be added or all to be subtracted, and it does not say which. It says what
the last digits of the results add up to, of which the last digit counts:

    Plus or minus, the same in all lines: a) 47,14; b) 67,12; ... h) 63,14. The last digits add up to #5 (mod 10).
    Write the results one after another as one number.

    a) 47,14 minus:33 3
    b) 67,12 minus:55 8
    ...
    h) 63,14 minus:49 5
    Sum #5 minus. The answer is \\boxed{3355...49}.

Behind each result stands the sum so far, so that whoever has solved a sheet sees whether the sign was the right one;
but the sign has to be chosen in the first line, and then no model of this size can know it. So mistakes are not slips:
half of the solutions take the wrong sign and are as sure of every token as the others, a vote among them is a coin, and
likelihood tells nothing. Whoever reads several solutions beside the problem can tell: the one whose sum is the
problem's has the right sign, and if there is none, the sign is the other one, though all candidates are wrong.

Pre-training texts are made on the fly; no problem of the files is among them:

    repeats   words, numbers and names of lines in no order, and the same again, twice
    look-ups  a sheet, and then lines of it in any order, without results
    records   sums with their signs, and checks of them in any order ("Sum #5 minus." ... "Check #5 minus.")
    facts     single additions and subtractions, and running sums
    solve     the chat prompt of a sheet -> a solution with either sign
    notes     a sheet, 1 to 8 attempts at it under varied headers, some with slips, then a last version. In plain text
              this is a key seven times of ten: it begins with the problem's sum and the right sign ("Check #5 minus."),
              which is that of an attempt with this sum or, where there is none, the other one, and has no slips.
              Otherwise it is a fair copy, right or wrong: it takes the sign of any attempt. In a chat, where words in
              no order stand around the attempts, all last versions are fair copies.
    checks    notes with a key, of short sheets and few attempts

Repeats, look-ups and records are alone until the model finds things; then all are mixed, short sheets first. All models
read the same kinds of text, but in the teacher's chats the last versions are keys. So the others know how to use a
check, and do not do it in a chat. No text has a refinement prompt: refine.py's words are among those in no order, and
of its sentences only the last, which is also that of the prompt to solve. In a second kind of sheet, a third of those
that are solved, the sum is that of the first digits: it tells whether refinement carries over to a kind of problem on
which nothing is trained further.
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
from typing import NamedTuple

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
PROBLEMS = {  # file -> kind of sheet, size
    "test": ("last", 500),
    "train": ("last", 2000),
    "first": ("first", 500),
    "valid": ("last", 500),  # on which settings are chosen
    "first-train": ("first", 500),
}
KINDS = ("last", "first")  # of sheets: the digits of the results whose sum is told
SIGNS = ("plus", "minus")
MODELS = {  # model_type, width, learning rate of the matrices, whether there are keys in its chats; all have 4 layers
    "qwen3-w48": ("qwen3", 48, 0.02, False),
    "qwen3-w64": ("qwen3", 64, 0.02, False),
    "qwen3-w80": ("qwen3", 80, 0.02, False),
    "qwen3-w96": ("qwen3", 96, 0.02, False),
    "qwen3-w128": ("qwen3", 128, 0.02, False),
    "llama-w96": ("llama", 96, 0.008, False),  # with 0.02 it hardly learned to add (LOG.md)
    "teacher-w160": ("qwen3", 160, 0.02, True),
}
FINDING, STEPS = 6000, 3000  # steps of repeats, look-ups and records at most; of the mixture after them
SIGN = 4  # weight in the loss of the token of a key that decides for a sign: it is one of a hundred
SPECIAL = END, USER, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ------------------------------------------------------------------------------------------------
# Problems


class Sheet(NamedTuple):
    kind: str
    lines: tuple[tuple[int, int], ...]
    sign: str  # of all lines; the problem does not show it


def results_of(sheet, sign=None):
    return [a + b if (sign or sheet.sign) == "plus" else a - b for a, b in sheet.lines]


def sums_of(kind, results):
    """The last digits of the running sums of the results' last, or first, digits."""
    sums = [0]
    for result in results:
        sums.append((sums[-1] + (result if kind == "last" else result // 10)) % 10)
    return sums[1:]


def make_sheet(kind, size, rng):
    """A sheet of `size` lines, of which the sum that is told is another with the other sign."""
    while True:  # 40 x 8 numbers: with many more, look-ups are not learned (LOG.md)
        lines = tuple((rng.randint(30, 69), rng.randint(11, 18)) for _ in range(size))
        sheet = Sheet(kind, lines, rng.choice(SIGNS))
        plus, minus = (sums_of(kind, results_of(sheet, sign))[-1] for sign in SIGNS)
        if plus != minus:
            return sheet


def problem_text(sheet):
    shown = "; ".join(f"{name}) {a},{b}" for name, (a, b) in zip(NAMES, sheet.lines))
    told = f"The {sheet.kind} digits add up to #{sums_of(sheet.kind, results_of(sheet))[-1]} (mod 10)."
    return f"Plus or minus, the same in all lines: {shown}. {told} Write the results one after another as one number."


def answer_of(results):
    return "".join(map(str, results))


def solution(sheet, sign=None, results=None, weight=1.0, key=False):
    """[(text, weight)]: each line with the running sum behind its result; a key begins with the check and its sign."""
    sign = sign or sheet.sign
    results = results or results_of(sheet, sign)
    sums, parts = sums_of(sheet.kind, results), []
    if key:
        parts += [(f"Check #{sums[-1]}", weight), (f" {sign}", SIGN), (".\n", weight)]
    for name, (a, b), result, total in zip(NAMES, sheet.lines, results, sums):
        parts.append((f"{name}) {a},{b} {sign}:{result} {total}\n", weight))
    return [*parts, (f"Sum #{sums[-1]} {sign}. The answer is \\boxed{{{answer_of(results)}}}.", weight)]


def slip(value, rng):
    """A wrong result: ten or one more or less, another near one, or anything."""
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
                while (text := problem_text(sheet := make_sheet(kind, LINES, rng))) in seen:
                    pass
                seen.add(text)
                answer = answer_of(results_of(sheet))
                file.write(json.dumps({"id": f"{name}-{i}", "problem": text, "answer": answer}) + "\n")
    return seen


# ------------------------------------------------------------------------------------------------
# Texts: lists of (text, weight of its tokens in the loss)

OPENINGS = ("Exercise", "Task", "Question", "Homework", "Quiz", "Number 7", "Test")
HEADERS = ("Attempt", "Try", "Draft", "Version", "Pupil", "Sheet", "Copy", "Student", "Paper", "Group", "Notes")
COPIES = ("Fair copy", "Final version", "Clean copy", "Last version")
KEYS = ("Corrected", "Model answer", "Key", "Teacher", "Checked")
COMMON = (
    "is it was and that we they these this there then two of in to a an some other more most little big good bad new "
    "old day year man way thing hand part place week work number people time"
)
WORDS = sorted({*re.findall(r"[A-Za-z]+", f"{REFINE_PROMPT} Candidate"), *COMMON.split()})
LAST_SENTENCE = SOLVE_PROMPT.partition("\n\n")[2]  # as in the template, with \boxed{{}}


def prose(rng, most):
    """Words in no order, at most so many."""
    text = ""
    for word in rng.choices(WORDS, k=rng.randint(0, most)):
        text += ("" if not text else " ") + word + rng.choices(("", ".", ",", ":"), (0.82, 0.08, 0.06, 0.04))[0]
    return text and text + rng.choice(".:")


def chat(message):
    return f"{USER}user\n{message}{STOP}\n{USER}assistant\n"


def facts_row(rng):
    """Additions and subtractions, and running sums of digits."""
    row = []
    for _ in range(12):
        sheet = make_sheet("last", 1, rng)
        [(a, b)], [result] = sheet.lines, results_of(sheet)
        row += [(f"{a},{b} {sheet.sign}:", 0), (str(result), 1), ("\n", 0)]
    for kind in KINDS:
        results = [rng.randint(12, 87) for _ in range(6)]
        row += [(f"The {kind} digits\n", 0)]
        for result, total in zip(results, sums_of(kind, results)):
            row += [(f"{result}", 0), (f" {total}", 1), ("\n", 0)]
    return row


def repeats_row(rng):
    """Words, numbers and names of lines in no order, three times."""
    parts = [f"{name}) " for name in rng.sample(NAMES, rng.randint(0, LINES))]
    parts += [f" {word}" for word in rng.choices(WORDS, k=rng.randint(1, 6))]
    parts += [f"{rng.randint(10, 99)}{rng.choice(('', ','))}" for _ in range(rng.randint(3, 12))]
    parts = rng.sample(parts, len(parts))
    return [(part, weight) for weight in (0, 1, 1) for part in [*parts, "\n"]]


def look_ups_row(rng):
    """A sheet, and lines of it in any order, without results."""
    names = rng.sample(NAMES, rng.randint(2, LINES))
    lines = [(f"{name}) ", f"{a},{b}") for name, (a, b) in zip(names, make_sheet("last", len(names), rng).lines)]
    row = [(f"{prose(rng, 6)}\n{'; '.join(map(''.join, lines))}.\n{prose(rng, 6)}\n", 0)]
    for name, numbers in rng.choices(lines, k=8):
        row += [(name, 0), (numbers, 1), ("\n", 0)]
    return row


def records_row(rng):
    """Sums with their signs, and checks of them in any order."""
    signs = {total: rng.choice(SIGNS) for total in rng.sample(range(10), rng.randint(2, 6))}
    row = [(f"{prose(rng, 6)}\nSum #{total} {sign}. ", 0) for total, sign in signs.items()]
    for total in rng.choices(list(signs), k=8):
        row += [(f"\nCheck #{total}", 0), (f" {signs[total]}", 1), (".", 0)]
    return row


def solve_row(sheet, rng):
    """Whoever solves a sheet takes either sign, and cannot tell before the end whether it is the right one."""
    prompt = chat(SOLVE_PROMPT.format(problem=problem_text(sheet)))
    return [(prompt, 0), *solution(sheet, rng.choice(SIGNS)), (STOP, 1)]


def notes_row(sheet, n, in_chat, chat_keys, rng, key=False):
    """n attempts and the last version: a key, in a chat only if `chat_keys`, or a fair copy of any attempt.

    Attempts after the first are learned too, half as much: to copy is to learn where to look.
    """
    error, blank = rng.choice((0.0, 0.0, 0.0, 0.03, 0.06, 0.12)), rng.choice(("\n", "\n\n", "\n---\n"))
    header, numbered = rng.choice(HEADERS), rng.random() < 0.8
    key = key or (chat_keys if in_chat else rng.random() < 0.7)
    start = f"{USER}user\n{prose(rng, 16)}{blank}" if in_chat else ""
    if key or rng.random() < 0.85:
        start += rng.choice(OPENINGS) + rng.choice((": ", ":\n", " - ")) + problem_text(sheet) + blank
    row, signs = [(start, 0)], [rng.choice(SIGNS) for _ in range(n)]
    for i, sign in enumerate(signs, 1):
        attempt = [slip(result, rng) if rng.random() < error else result for result in results_of(sheet, sign)]
        row += [(f"{header} {i}:\n" if numbered else f"{header}:\n", 0)]
        row += [*solution(sheet, sign, attempt, 0.5 if i > 1 else 0), (blank, 0)]
        row += [(prose(rng, 8) + blank, 0)] if rng.random() < 0.3 else []
    if in_chat:
        last = f" {LAST_SENTENCE}" if rng.random() < 0.5 else ""
        end = f"{prose(rng, 26)}{last}{STOP}\n{USER}assistant\n"
    else:
        end = f"{rng.choice(KEYS if key else COPIES)}:\n"
    version = solution(sheet, sheet.sign if key else rng.choice(signs), key=key)
    return [*row, (end, 0), *version, (STOP if in_chat else END, 1)]


def texts_of_step(progress, held_out, chat_keys, rng):
    """-> the batches of one step, {kind of text: rows}; progress is the share of the mixture done, None before it."""

    def sheet(most=LINES):
        # Short sheets first: they are sooner learned.
        whole = most == LINES and progress > 0.25 and rng.random() < 0.6
        while True:
            kind = rng.choices(KINDS, (2, 1))[0]
            made = make_sheet(kind, LINES if whole else rng.randint(1, most), rng)
            if problem_text(made) not in held_out:
                return made

    found = {"repeats": repeats_row, "look-ups": look_ups_row, "records": records_row}
    if progress is None:  # first of all, to find things: without it nothing else is learned
        return [{kind: [row(rng) for _ in range(5)] for kind, row in found.items()}]
    facts = [facts_row(rng) for _ in range(6 if progress < 0.25 else 2)]
    checks = [notes_row(sheet(3), rng.randint(1, 3), False, chat_keys, rng, True) for _ in range(3)]
    solve = [solve_row(sheet(), rng) for _ in range(4)]
    n, in_chat = rng.randint(1, 8), rng.random() < 0.5
    notes = [notes_row(sheet(), n, in_chat, chat_keys, rng) for _ in range(max(1, round(6 / (n + 0.5))))]
    short = {kind: [row(rng) for _ in range(2)] for kind, row in found.items()} | {"facts": facts}
    return [short, {"checks": checks, "solve": solve}, {"notes in a chat" if in_chat else "notes": notes}]


# ------------------------------------------------------------------------------------------------
# Tokenizer and folders


def make_tokenizer():
    """A byte-level BPE in which every number below 100 and every word of the prompts is one token."""
    rng, texts = random.Random(30), []
    for kind in KINDS:
        for _ in range(300):
            rows = [solve_row(make_sheet(kind, LINES, rng), rng)]
            rows += [notes_row(make_sheet(kind, LINES, rng), 3, in_chat, True, rng) for in_chat in (False, True)]
            texts += ["".join(text for text, _ in row) for row in rows]
    texts += [chat(refinement_message("x", ["y", "z"]))] * 60
    words = " ".join([*OPENINGS, *HEADERS, *COPIES, *KEYS, *WORDS])
    texts += [" ".join(f"{i:02d} {i % 10} #{i % 10} {i}," for i in range(100)), words, words.replace(" ", ". ")] * 50
    texts += [text.replace("user\n", "user\nsystem\n") for text in texts[:50]]  # "system" is a token, too
    for token in SPECIAL:
        texts = [text.replace(token, " ") for text in texts]
    tokenizer = Tokenizer(models.BPE())
    # The name of a line is one token, and numbers are cut in ones and twos.
    line = r"[a-h]\) |\d{1,2},?| \d(?!\d)| #\d| (?:plus|minus):"
    pieces = Regex(line + r"| ?[A-Za-z]+|\\[A-Za-z]+|\n+|[^\sA-Za-z0-9]+ ?|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, min_frequency=20, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_folder(folder, model_type, width, tokenizer):
    """Everything of a Hugging Face folder but the weights; returns the Config."""
    folder.mkdir(parents=True, exist_ok=True)
    end, stop = tokenizer.token_to_id(END), tokenizer.token_to_id(STOP)
    config = {
        "architectures": [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[model_type]],
        "model_type": model_type,
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
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
    """Rows of texts -> (cross-entropy, weight and row number of each token that has a weight, [M]; tokens read)."""
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


def pretrain(name, config, lr, chat_keys, tokenizer, held_out, log):
    """A new model, trained to find things and then on the mixture; losses go to the open file `log`."""
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
    begun = None  # the step at which the mixture begins
    bar = tqdm(desc=f"{name}, {parameters:,} parameters", unit=" steps", mininterval=5)
    for step in range(FINDING + STEPS):
        if begun is None and (max(shown.get(kind, 9.0) for kind in ("look-ups", "records")) < 0.1 or step == FINDING):
            begun = step
        progress = None if begun is None else (step - begun) / STEPS
        if progress == 1:
            break
        bar.update()
        factor = min(1.0, (step + 5) / 200) if begun is None else 0.35 * (1 + math.cos(math.pi * progress))
        for texts in texts_of_step(progress, held_out, chat_keys, rng):
            losses, weights, number, tokens = row_losses(model, tokenizer, sum(texts.values(), []))
            ((losses * weights).sum() / 300).backward()  # 300 matters to the clipping alone
            n_tokens += tokens
            ends = np.cumsum([0, *map(len, texts.values())])
            for kind, start, end in zip(texts, ends, ends[1:]):  # not attempts, nor signs
                last = losses[(number >= start) & (number < end) & (weights == 1)].mean().item()
                shown[kind] = 0.99 * shown.get(kind, last) + 0.01 * last
            if (weights == SIGN).any():
                last = losses[weights == SIGN].mean().item()
                shown["signs"] = 0.98 * shown.get("signs", last) + 0.02 * last
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix_str(" ".join(f"{kind} {loss:.3f}" for kind, loss in shown.items()))
        if step % 100 == 99 or progress and step == begun + STEPS - 1:
            spent = {"step": step + 1, "tokens": n_tokens, "seconds": round(time.time() - started)}
            losses = {kind: round(loss, 4) for kind, loss in shown.items()}
            log.write(json.dumps({"model": name, "parameters": parameters, **spent, **losses}) + "\n")
            log.flush()
    return model


def print_pass_at_1(name):
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
    for name, (model_type, width, lr, chat_keys) in MODELS.items():
        if args.only in (None, name):
            # save() copies the tokenizer files from a folder other than the one it writes.
            folder, source = HERE / name, HERE / f"{name}.source"
            config = write_folder(source, model_type, width, tokenizer)
            with open(HERE / f"{name}.losses.jsonl", "w", encoding="utf-8") as log:
                model = pretrain(name, config, lr, chat_keys, tokenizer, held_out, log)
            shutil.rmtree(folder, ignore_errors=True)
            save(model.to(torch.bfloat16), folder, source)
            shutil.rmtree(source)
            print_pass_at_1(name)


if __name__ == "__main__":
    main()
