"""Let the model write one better solution of each problem from the problem and its candidates.

    python refine.py --candidates runs/tiny/tiny.candidates.jsonl           the built-in tiny model
    python refine.py --model qwen-1.5b --candidates gsm8k.candidates.jsonl --k 1 --out gsm8k.refined.jsonl
    python refine.py --model qwen-1.5b --candidates gsm8k.candidates.jsonl --k 8 --shown 4 --rounds 3

The second stage of parallel self-refinement, and the whole idea of the method: a vote can only choose
among the answers that are there, a refinement can take steps from several candidates, or find all of
them wrong. The candidates come from sample.py, of this model or another. Read `REFINE_PROMPT` and
the reasons for each of its sentences, then `draw_order`, `order_and_cut`, `refine_round` and `main`.

With --rounds the refinements of a round are the candidates of the next, as in recursive self-aggregation: --k of
them, each of --shown that are drawn. The first round is x.refined.jsonl, the second x.round2.refined.jsonl, ...,
each a refined file that also holds the rounds before it.
"""

import files  # isort: skip  first, so that Ctrl-C while torch is imported is one line
import argparse

import numpy as np

from files import InputError, as_written, command_line, meta_path, read_json, read_jsonl
from grade import answer_of, strip_thinking
from model import read_config, uniforms
from parallel import count
from sample import SOLVE_PROMPT, add_sampling_flags, as_json, check_flags, load_sampler, write_rows

REFINE_PROMPT = """\
Below are a problem and {n} candidate solutions. Some or all of the candidates may be wrong.

Problem:
{problem}

{candidates}

Write one better solution. Use what is right in the candidates. Where they disagree, work out which is right. \
If all of them fail, solve the problem afresh. \
Please reason step by step, and put your final answer within \\boxed{{}}."""


def refinement_message(problem, candidates):
    """The user message of a refinement: `problem` and `candidates`, texts in the order in which to show them.

    The wording is ours (the paper's abstract has none), and each sentence has its reason:

    - "Some or all ... may be wrong": a model trusts what stands in its prompt; without the warning it
      copies the majority, or the first, also when all are wrong.
    - The problem comes before the candidates, so that these are read with the problem in mind, and the
      instruction after them: after thousands of tokens of candidates it is what was read last.
    - "Use what is right": steps count, not only final answers. A candidate with a wrong end may hold the
      right beginning.
    - "Where they disagree, work out which is right": to compare is not to vote. One candidate can be right
      against three.
    - "If all of them fail, solve the problem afresh": the case in which no vote can help.
    - The last sentence is that of SOLVE_PROMPT, word for word: refinements are graded, voted on and
      trained like solutions.

    Candidates are numbered, not named or scored, and the prompt does not say which answer is the most
    frequent: the model is to look at the work. Without a single usable candidate there is nothing to
    refine, and the prompt is that of sample.py.
    """
    if not candidates:
        return SOLVE_PROMPT.format(problem=problem)
    numbered = "\n\n".join(f"Candidate {i}:\n{text}" for i, text in enumerate(candidates, 1))
    return REFINE_PROMPT.format(n=len(candidates), problem=problem, candidates=numbered)


def draw_order(row, key, shown):
    """The indices of so many of a row's candidates (None: all), in an order; they depend on `key` alone."""
    return [int(i) for i in np.argsort(uniforms(key, len(row["candidates"])), kind="stable")][:shown]


def ended(candidate, prompt):
    """Has a candidate an answer, and was it not cut off?"""
    return candidate.get("finish_reason") != "length" and answer_of(candidate, prompt) is not None


def prompt_of(row, i):
    """What the model saw when it wrote candidate number i: in a later round, a refinement prompt."""
    return str(row["candidates"][i].get("prompt") or row.get("prompt") or "")


def order_and_cut(row, order, tokenizer, room):
    """What a refinement prompt shows of a row of the candidates file -> (texts, their indices, in that order).

    - Thoughts (<think>...</think>) are stripped; a candidate that is empty then is not shown.
    - Together the texts have at most `room` tokens. Short candidates keep what they have and long ones share
      the rest equally. A cut candidate loses its beginning: the answer stands at its end.
    """
    texts = {i: strip_thinking(row["candidates"][i]["text"], prompt_of(row, i)) for i in order}
    order = [i for i in order if texts[i]]
    tokens = {i: tokenizer.encode(texts[i]) for i in order}
    if sum(map(len, tokens.values())) > room:
        left = room
        for place, i in enumerate(sorted(order, key=lambda i: len(tokens[i]))):
            share = max(0, left // (len(order) - place) - 4)  # 4 for "..." and for how the cut changes tokens
            if len(tokens[i]) > share:
                texts[i] = "..." + tokenizer.decode(tokens[i][len(tokens[i]) - share :])
            left -= min(len(tokens[i]), share + 4)
    return [texts[i] for i in order], order


def refinement_prompt(row, order, tokenizer, context, reserve):
    """A row of the candidates file -> (prompt text, token ids, order), of at most context - reserve tokens.

    The order returned lacks the candidates that are empty. InputError where less than 16 tokens a candidate would fit.
    """
    empty = len(tokenizer.encode_chat(refinement_message(row["problem"], [""] * len(order)))[1])
    room = context - reserve - empty
    while room >= 16 * len(order):
        texts, shown = order_and_cut(row, order, tokenizer, room)
        text, ids = tokenizer.encode_chat(refinement_message(row["problem"], texts))
        if len(ids) <= context - reserve:
            return text, ids, shown
        room -= len(ids) - (context - reserve)  # tokens merge differently in their place; a little less, then
    raise InputError(
        f"id {row['id']!r}: the problem, {len(order)} candidates and {reserve} new tokens do not fit the context of "
        f"{context}; lower --max-new-tokens or show fewer candidates (--shown)"
    )


def read_candidates(path, *more_keys):
    """The rows of a candidates file, of sample.py or of another program: candidates need no more than a text."""
    rows = read_jsonl(path, keys=("id", "problem", "candidates", *more_keys))
    for number, row in enumerate(rows):
        where, rounds = f"{path}, id {row['id']!r}", row.get("rounds") or []
        for some in (row["candidates"], *(rounds if isinstance(rounds, list) else [rounds])):
            texts = some if isinstance(some, list) else [None]
            if not texts or not all(isinstance(c, dict) and isinstance(c.get("text"), str) for c in texts):
                raise InputError(f"{where}: no candidates with a text; make them with sample.py")
        for key, kinds in (("prompt", str), ("answer", (str, int, float))):
            if row.get(key) is not None and not isinstance(row[key], kinds):
                raise InputError(f"{where}: its {key} is not a text but {str(row[key])[:40]!r}")
        rows[number] = as_written(row, where)
    return rows


def refine_round(args, out, rows, number, sampler, made_by, record):
    """One round: refine the candidates of `rows` and write them to `out`; the round before is in their "rounds"."""
    context = sampler.model.config.context
    reserve = min(sampler.params.max_new_tokens, context // 2)  # tokens kept for the refinement, never over half
    of_round = (number,) if number > 1 else ()  # the later rounds draw other random numbers
    prompts, requests = [], []  # of each row, for each of its k refinements
    for row in rows:
        source = {**row, "candidates": row["rounds"][-1]} if number > 1 else row
        prompts.append([])
        for j in range(args.k):
            # Shuffled: models prefer some places in a list, and training on one order would teach that place.
            order = draw_order(source, (args.seed, str(row["id"]), "order", j, *of_round), args.shown)
            n_drawn = len(order)
            if args.skip_cut_off:
                order = [i for i in order if ended(source["candidates"][i], prompt_of(source, i))]
            try:
                text, ids, order = refinement_prompt(source, order, sampler.tokenizer, context, reserve)
            except InputError as e:
                raise InputError(f"--candidates {args.candidates}, {e}")
            shown = {"drawn": n_drawn, "order": order, "prompt": text, "n_prompt_tokens": len(ids)}
            prompts[-1].append((shown, ids))
        keys = [(args.seed, str(row["id"]), "refine", j, *of_round) for j in range(args.k)]
        requests.append([(ids, [key]) for (_, ids), key in zip(prompts[-1], keys)])

    def finish(i, answers, row):
        refined = [as_json(completion, sampler.tokenizer) for [completion] in answers]
        return {**rows[i], "refinements": [{**item, **shown} for item, (shown, _) in zip(refined, prompts[i])]}

    write_rows(args, out, rows, requests, finish, sampler, made_by, record)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="tiny", help="short name (see hub.py), hub id or folder (default: tiny)")
    parser.add_argument("--candidates", required=True, metavar="FILE", help="made by sample.py")
    parser.add_argument("-k", "--k", type=int, default=1, help="refinements a problem, each in an order of its own (1)")
    parser.add_argument("--shown", type=int, metavar="S", help="candidates that a refinement sees (of fewer: all)")
    parser.add_argument("--rounds", type=int, default=1, help="times to refine, each time those of before (default: 1)")
    skip = "show no candidates that were cut off or have no answer"
    parser.add_argument("--skip-cut-off", action="store_true", help=skip)
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--out", help="default: FILE with .refined.jsonl for .candidates.jsonl")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    check_flags(args, "k", "shown", "rounds", "limit", "batch_size", "tensor_parallel")
    if args.rounds > 1 and args.k == 1:
        raise InputError(f"--rounds {args.rounds}: a later round refines the --k of the one before; give --k 2 or more")
    stem = args.candidates.removesuffix(".jsonl").removesuffix(".candidates")
    if stem.endswith(".refined") and not args.out:
        raise InputError(f"--candidates {args.candidates}: a refined file; say with --out where its new refinements go")
    out = args.out or f"{stem}.refined.jsonl"
    stem = out.removesuffix(".jsonl").removesuffix(".refined")
    outs = [out, *(f"{stem}.round{number}{out[len(stem) :]}" for number in range(2, args.rounds + 1))]

    for path in outs:
        files.claim(path)
    rows = read_candidates(args.candidates)[: args.limit]
    if args.shown and args.shown > (most := max(len(row["candidates"]) for row in rows)):
        raise InputError(f"--shown {args.shown}: {args.candidates} has {most} candidates a problem; lower it")
    sampler = load_sampler(args)
    source = read_json(meta_path(args.candidates)) if meta_path(args.candidates).exists() else {}
    by = source.get("candidates_by") or source.get("weights")  # a refined file names who made its candidates
    parameters, seconds = count(read_config(sampler.tokenizer.folder)), 0.0
    made_by = {"k": args.k, "shown": args.shown, "skip_cut_off": args.skip_cut_off or None, "round": None}
    rows = [{key: row[key] for key in row if key not in ("rounds", "refinements")} for row in rows]  # of an earlier run
    for number, path in enumerate(outs, 1):
        record = {"data": args.candidates, "candidates_by": by, "parameters": parameters, "seconds_before": seconds}
        refine_round(args, path, rows, number, sampler, made_by, record)
        if number < len(outs):
            rows, done = read_jsonl(path), read_json(meta_path(path))
            for row in rows:
                row["rounds"] = [*row.get("rounds", []), row.pop("refinements")]
            by, seconds, made_by = done["weights"], seconds + done["seconds"], {**made_by, "round": number + 1}


if __name__ == "__main__":
    command_line(main)
