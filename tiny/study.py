"""Check the paper's claims, and what reviewers ask, on the tiny world, with this repository's own commands.

    python tiny/study.py                  claims 1 to 8; stopped and started again, it goes on
    python tiny/study.py --claims 1 3     some of it
    python tiny/study.py --list           the commands that sample, refine and train, and run none of them

A claim is a table, and a row of it is a model measured on held-out problems with three seeds: candidates (sample.py),
their refinements (refine.py), and before that, where the model is a trained one, its training (train.py, once for each
seed) on examples that are made once, with seed 0 (on-policy: anew with each seed). evaluate.py makes one report of each
claim in runs/study/claimN, route.py one of the router in runs/study/router. study.md has the tables of all that are
made, claims.png and losses.png are its figures.
Files are named after model, training and sampling, and what is there is not made again, if it was made by the same
command of the same model.
Claim 0 is none of the paper's: it asks for the weight of refinement in training, on problems of its own.
"""

import argparse
import collections
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TINY = Path(os.path.relpath(ROOT / "tiny"))
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import route  # noqa: E402
from evaluate import METHODS, report  # noqa: E402
from figures import as_markdown, correlations, gap_of, tables_of  # noqa: E402
from files import InputError, command_line, meta_path, read_json, write_text  # noqa: E402
from hub import fingerprint  # noqa: E402
from train import made_otherwise  # noqa: E402

RUNS = Path("runs/study")
STUDENT, OLD = "qwen3-w96", "slips/qwen3-w96"  # of this world, and of the one before it (LOG.md)
TEACHERS = {".": "teacher-w160", "slips": "slips/qwen3-w192"}
SIZES = ("qwen3-w48", "qwen3-w64", "qwen3-w80", "qwen3-w96", "qwen3-w128")
STEPS, LR, WEIGHT = 60, 1e-3, 1

# {student}, {teacher}: their folders; {S}, {T}: the folders of what they wrote; {world}: the folder of the problems.
TRAINED = {  # what a row's model is trained on -> flags of train.py
    "joint": "--solve {T}/train.candidates.jsonl --refine {S}/teacher.refined.jsonl --weight {weight}",
    "solve only": "--solve {T}/train.candidates.jsonl",
    "refine only": "--refine {S}/teacher.refined.jsonl",
    "own refinements": "--solve {T}/train.candidates.jsonl --refine {S}/own.refined.jsonl --weight {weight}",
    "base data kept in": "--solve {S}/kept.candidates.jsonl --refine {S}/teacher.refined.jsonl --weight {weight}",
    # Two rounds of half the steps each, the second on refinements of what the student writes after the first. Nothing
    # of it is shared among the seeds: it is the dearest, and has half of the problems.
    "on-policy": "--teacher {teacher} --data {world}/train.jsonl --limit 500 --rounds 2 --weight {weight}",
}
MADE = {  # file -> the command that makes it, without --out
    "{S}/train.candidates.jsonl": "sample.py --model {student} --data {world}/train.jsonl --limit 1000",
    "{T}/train.candidates.jsonl": "sample.py --model {teacher} --data {world}/train.jsonl --limit 1000 --n 1",
    "{S}/teacher.refined.jsonl": "refine.py --model {teacher} --candidates {S}/train.candidates.jsonl",
    "{S}/own.refined.jsonl": "refine.py --model {student} --candidates {S}/train.candidates.jsonl --k 2",
    "{S}/first.candidates.jsonl": "sample.py --model {student} --data {world}/first-train.jsonl",
    # Of such a file there is no .meta.json, and train.py does not check where it comes from.
    "{S}/kept.candidates.jsonl": "cat {T}/train.candidates.jsonl {S}/first.candidates.jsonl",
}


class Row(NamedTuple):
    model: str
    how: str | None = None  # a key of TRAINED; None: untrained
    data: str = "test"
    n: int = 4
    temperature: float = 1
    drawn: str = ""  # more flags of sample.py
    refine: str | None = ""  # more flags of refine.py; None: nothing is refined
    steps: int = STEPS
    weight: int = WEIGHT
    seeds: tuple = (0, 1, 2)


# Half of the problems, since each takes 16 candidates, up to 16 more in waves, and 13 refinements.
SIXTEEN = Row(STUDENT, "joint", n=16, drawn="--limit 250")
CLAIMS = {  # number -> title, {name: Row}
    0: (
        "The weight of refinement, on problems of its own",
        {
            "untrained": Row(STUDENT, data="valid", seeds=(0,)),
            **{f"weight {w}": Row(STUDENT, "joint", data="valid", weight=w, seeds=(0,)) for w in (1, 4)},
        },
    ),
    1: ("Small models refine badly when merely prompted", {STUDENT: Row(STUDENT)}),
    2: ("The gap grows with size", {name: Row(name) for name in SIZES}),
    3: (
        "Joint training transfers refinement from the larger teacher",
        {
            "before": Row(STUDENT),
            "solve only": Row(STUDENT, "solve only"),
            "joint": Row(STUDENT, "joint"),
            TEACHERS["."]: Row(TEACHERS["."]),
        },
    ),
    4: (
        "Across scales and families",
        {
            f"{name}, {'joint' if how else 'before'}": Row(name, how)
            for name in ("qwen3-w64", "qwen3-w96", "qwen3-w128", "llama-w96")
            for how in (None, "joint")
        },
    ),
    5: (
        "Out of domain: measured where first digits are added, trained where last ones are",
        {
            name: Row(STUDENT, None if name == "before" else name, data="first")
            for name in ("before", "solve only", "joint", "base data kept in")
        },
    ),
    6: (
        "Ablations",
        {
            **{how: Row(STUDENT, how) for how in ("joint", "refine only", "own refinements")},
            "on-policy, 500 problems": Row(STUDENT, "on-policy"),
            "joint, temperature 0.6": Row(STUDENT, "joint", temperature=0.6),
        },
    ),
    7: (
        "What reviewers ask: the number shown, rounds, a vote that stops",
        {
            **{f"{k} of 16": SIXTEEN._replace(refine=f"--shown {k}") for k in (1, 2, 4, 8, 16)},
            "rounds": SIXTEEN._replace(refine="--k 4 --shown 4 --rounds 2"),
            "waves": SIXTEEN._replace(drawn=f"{SIXTEEN.drawn} --adaptive", refine=None),
        },
    ),
    8: (
        "The world before this one, in which mistakes are slips of sampling",
        {
            f"{OLD}, before": Row(OLD, data="slips/test"),
            f"{OLD}, joint": Row(OLD, "joint", data="slips/test", steps=90, weight=4),
        },
    ),
}
ROUTED = CLAIMS[3][1]["joint"]  # on whose files claim 7 tries the router
# Titles of tables of evaluate.py that study.md has under these claims.
MORE = {
    3: ("What becomes of the vote", "The same by how far the candidates agree"),
    7: ("By the number of candidates shown", "Rounds"),
}


# ------------------------------------------------------------------------------------------------
# Commands: lists of words, the last of which is the file or folder that they make


def made_from(words, names):
    """The commands for the files of MADE among some words, each after those for the files that it reads."""
    commands, made = [], {out.format(**names): command.format(**names).split() for out, command in MADE.items()}
    for word in words:
        if word in made:
            commands += [*made_from(made[word], names), [*made[word], "--out", word]]
    return commands


def commands_of(row, seed):
    """A row's commands for one seed, the last of which makes the file that is reported."""
    world, commands = str(Path(row.model).parent), []
    at, model = RUNS / row.model / "untrained", str(TINY / row.model)
    if row.how:
        flags = TRAINED[row.how]
        kind = slug(row.how) + (f"-weight{row.weight}" if "{weight}" in flags else "")
        at = RUNS / row.model / kind
        names = {"student": model, "teacher": str(TINY / TEACHERS[world]), "world": str(TINY / world)}
        names |= {"S": str(RUNS / row.model), "T": str(RUNS / TEACHERS[world]), "weight": row.weight}
        words = flags.format(**names).split()
        steps, out = row.steps, at / f"seed{seed}"
        if "--rounds" in words:  # what is made for each round stands beside its result
            steps, out = steps // 2, out / "trained"
        words += ["--steps", str(steps), "--lr", str(LR), "--seed", str(seed), "--out", str(out)]
        commands = [*made_from(words, names), ["train.py", "--model", model, *words]]
        model = words[-1]
    drawn = ["--seed", str(seed), "--temperature", str(row.temperature)]
    name = f"{Path(row.data).name}-n{row.n}-t{row.temperature}-seed{seed}{slug(row.drawn)}"
    candidates = str(at / f"{name}.candidates.jsonl")
    data = ["--data", str(TINY / f"{row.data}.jsonl"), "--n", str(row.n), *row.drawn.split()]
    commands.append(["sample.py", "--model", model, *data, *drawn, "--out", candidates])
    if row.refine is not None:
        refined = str(at / f"{name}{slug(row.refine)}.refined.jsonl")
        source = ["--candidates", candidates, *row.refine.split()]
        commands.append(["refine.py", "--model", model, *source, *drawn, "--out", refined])
    return commands


def rows_to_make(claims):
    rows = [row for claim in claims for row in CLAIMS[claim][1].values()]
    return [*rows, *([ROUTED] if 7 in claims else [])]


def chains_of(claims):
    """The commands of every row and seed. All rows of one seed, then of the next: neighbours seldom share a file."""
    rows = rows_to_make(claims)
    seeds = sorted({seed for row in rows for seed in row.seeds})
    return [commands_of(row, seed) for seed in seeds for row in rows if seed in row.seeds]


def slug(text):
    """As a part of a file's name."""
    return re.sub(r"\W+", "-", text).rstrip("-")


def results_of(row):
    """A row's files for the report, one a seed."""
    return [result_of(commands_of(row, seed)[-1]) for seed in row.seeds]


def result_of(command):
    """What is there when a command is done: of rounds, the last one's file."""
    rounds = command[command.index("--rounds") + 1] if command[0] == "refine.py" and "--rounds" in command else None
    return command[-1].replace(".refined.jsonl", f".round{rounds}.refined.jsonl") if rounds else command[-1]


def is_made(command, out):
    """Whether a command's output is there; InputError where it is that of other flags or of another model."""
    if not out.exists():
        return False
    if command[0] == "cat":
        return out.read_text(encoding="utf-8") == together(command)
    pairs = zip(command[1:], command[2:])
    given = {word[2:].replace("-", "_"): value(after) for word, after in pairs if word.startswith("--")}
    if command[0] == "train.py" and "rounds" in given:  # only the record of the first round names the command's model
        out = Path(given["out"] + ".round1")
        given["out"] = str(out)
    if differs := made_otherwise(out, given):
        raise InputError(f"{differs}; delete {RUNS}")
    made, model = read_json(meta_path(out)), given["model"]
    if made.get("weights", made.get("student")) != fingerprint(Path(model), torch.float32):
        raise InputError(f"{out} was made with other weights than those in {model}; delete {RUNS}")
    return True


def all_made(claim):
    """Whether everything that a claim's report rests on is there, and of today's commands and models."""
    try:
        return all(is_made(command, Path(result_of(command))) for chain in chains_of([claim]) for command in chain)
    except InputError:
        return False


def value(word):
    """A flag's value as the record has it: a number, a text, or True of a flag that stands alone."""
    try:
        return json.loads(word)
    except ValueError:
        return True if word.startswith("--") else word


LOCKS = collections.defaultdict(threading.Lock)  # one for each output
running, failed = set(), threading.Event()


def run(commands, started):
    """Run commands one after another, but those whose output is there. What two chains need is made once."""
    try:
        for command in commands:
            out = Path(result_of(command))
            with LOCKS[out]:
                if failed.is_set():
                    return
                if not is_made(command, out):
                    out.parent.mkdir(parents=True, exist_ok=True)
                    print(f"[{(time.time() - started) / 60:.1f} min] {as_typed(command)}\n", end="", flush=True)
                    run_one(command, out)
    except BaseException:
        failed.set()  # the other chains end with the command that they are at
        raise


def run_one(command, out):
    if command[0] == "cat":
        return write_text(out, together(command))
    words = [sys.executable, str(ROOT / command[0]), *command[1:]]
    # One thread each: two processes of one thread do more than one process of two. And no GPU for any of them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env=environment, **pipes) as process:
        running.add(process)
        said = process.communicate()[0].strip()
        running.remove(process)
    if process.returncode:
        raise InputError(f"{as_typed(command)}: {said.splitlines()[-1] if said else 'no output'}")


def together(command):
    """What cat makes."""
    return "".join(Path(path).read_text(encoding="utf-8") for path in command[1:-2])


def as_typed(command):
    """A command as a user would type it."""
    if command[0] == "cat":
        return f"cat {shlex.join(command[1:-2])} > {command[-1]}"
    return f"python {shlex.join(command)}"


# ------------------------------------------------------------------------------------------------
# The report


def rows_of(claim):
    """The rows of a claim that have refinements, from the report that evaluate.py made of it."""
    return [row for row in read_json(RUNS / f"claim{claim}" / "report.json")["rows"] if row["k"]]


def table(claim):
    """The rows of a claim, from the report that evaluate.py made of it, in Markdown, and what else it shows."""
    title, rows = CLAIMS[claim]
    found = read_json(RUNS / f"claim{claim}" / "report.json")
    head = ["", "pass@1", "pass@N", "maj@N", "likeliest", "refined", "**gap [95%]**", "s.e. of seeds"]
    head += ["gap at equal tokens", "all wrong, rescued"]
    lines = [head]
    for row in rows_of(claim):
        gap, cost, (rescued, wrong) = row["gap"], row["equal_cost"]["generated"], row["rescued"]["all_wrong"]
        methods = [row["methods"][method] for method in ("pass@1", "pass@N", "maj@N", "logprob", "refined")]
        line = [row["name"], *(f"{method['accuracy']:.1%}" for method in methods), f"**{gap_of(gap)}**"]
        line += ["-" if gap["seed_se"] is None else f"{100 * gap['seed_se']:.1f}"]
        line += ["~" * cost["extrapolated"] + gap_of(cost) if "maj" in cost else "-", f"{rescued:.4g} of {wrong}"]
        lines.append(line)
    seeds = ", ".join(map(str, next(iter(rows.values())).seeds))
    parts = [as_markdown(f"{claim}. {title}", lines, f"`python tiny/study.py --claims {claim}`, seeds {seeds}")]
    parts += [
        "#" + as_markdown(name, cells, note)
        for name, cells, note in tables_of(found["rows"], METHODS)
        if name.startswith(MORE.get(claim, ()))
    ]
    parts += [*(correlations(found["scaling"]) if claim == 2 else []), *(budgets(found) if claim == 7 else [])]
    return "\n\n".join(parts)


def budgets(found):
    """Claim 7: the vote of waves beside the vote of all, and whether a router is cheaper than the hull."""
    waves, full = (next(row for row in found["rows"] if row["name"] == name) for name in ("waves", "16 of 16"))
    texts = []
    for name, row in (("All 16 candidates", full), ("Waves", waves)):
        vote, tokens = row["methods"]["maj@N"], row["tokens"]["candidates"]
        solved = "{:.1%} [{:.1%}, {:.1%}]".format(vote["accuracy"], *vote["ci95"])
        texts.append(f"{name}: vote {solved}, {row['sampled']:.1f} candidates and {tokens:,.0f} tokens a problem.")
    for kind, what in route.KINDS.items():
        points = [p for p in read_json(RUNS / "router" / "budget.json")["points"] if p["kind"] == kind]
        texts.append(f"Candidates of claim 3's joint, in {what}: {' '.join(route.table(points, what)[1:])}")
    return texts


def draw_gaps(claims, out):
    """The gap of every row of these claims, with its interval."""
    from matplotlib.figure import Figure

    reports = [rows_of(claim) for claim in claims]
    sizes = [len(rows) for rows in reports]
    fig = Figure(figsize=(10, 1 + 0.2 * sum(sizes) + 0.4 * len(claims)), layout="constrained")
    axes = fig.subplots(len(claims), 1, sharex=True, squeeze=False, height_ratios=[size + 0.6 for size in sizes])[:, 0]
    for axis, claim, rows in zip(axes, claims, reports):
        for y, gap in enumerate(row["gap"] for row in rows):
            low, high = gap["ci95"]
            color = "tab:red" if high < 0 else "tab:green" if low > 0 else "0.5"
            axis.plot([100 * low, 100 * high], [y, y], color=color, linewidth=2)
            axis.plot(100 * gap["points"], y, "o", color=color, markersize=5)
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_title(f"{claim}. {CLAIMS[claim][0]}", fontsize=10, loc="left")
        axis.grid(axis="x", color="0.92")
    axes[-1].set_xlabel("Refinement Gap: refined minus majority vote (points, 95% interval)")
    fig.savefig(out, dpi=110)


def draw_losses(out):
    """The models' pre-training: the loss of each kind of text against tokens."""
    from matplotlib.figure import Figure

    kinds = ("repeats", "look-ups", "records", "facts", "checks", "signs", "solve", "notes", "notes in a chat")
    fig = Figure(figsize=(11, 8), layout="constrained")
    axes = fig.subplots(3, 3, sharex=True).ravel()
    # By family, then by width.
    for path in sorted(TINY.glob("*.losses.jsonl"), key=lambda path: (path.name[:5], len(path.name), path.name)):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for axis, kind in zip(axes, kinds):
            tokens = [line["tokens"] / 1e6 for line in lines if kind in line]
            losses = [line[kind] for line in lines if kind in line]
            style = "--" if path.name.startswith("llama") else "-"
            axis.semilogy(tokens, losses, style, linewidth=1.2, label=path.name.removesuffix(".losses.jsonl"))
            axis.set_title(kind, fontsize=10)
            axis.grid(color="0.92")
    for axis in axes[6:]:
        axis.set_xlabel("tokens read (millions)")
    for axis in axes[::3]:
        axis.set_ylabel("loss (nats)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False)
    fig.savefig(out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--claims", nargs="+", type=int, choices=list(CLAIMS), default=list(CLAIMS)[1:])
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args()
    started, chains = time.time(), chains_of(args.claims)
    if args.list:
        return print(*dict.fromkeys(as_typed(command) for chain in chains for command in chain), sep="\n")
    for name in dict.fromkeys(row.model for row in rows_to_make(args.claims)):
        if not (TINY / name / "config.json").exists():
            raise InputError(f"{TINY / name}: not there; {TINY}/README.md says what makes it")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for work in [pool.submit(run, chain, started) for chain in chains]:
                work.result()
        except BaseException:  # of Ctrl-C and SIGTERM, too
            failed.set()
            for process in [*running]:
                process.terminate()
            raise
    made = [claim for claim in CLAIMS if claim in args.claims or all_made(claim)]  # of earlier runs, too
    if 7 in made:
        route.main([",".join(results_of(ROUTED)), "--out", str(RUNS / "router")])
    for claim in made:
        words = [f"{name}={','.join(results_of(row))}" for name, row in CLAIMS[claim][1].items()]
        report(words, RUNS / f"claim{claim}", 5.0)  # at most 5 seconds to compare two answers
    text = "\n\n".join(map(table, made))
    write_text(RUNS / "study.md", f"# The claims on the tiny world\n\n{text}\n")
    draw_gaps(made, RUNS / "claims.png")
    draw_losses(RUNS / "losses.png")
    print(text, f"\n{RUNS}/study.md, {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    command_line(main)
