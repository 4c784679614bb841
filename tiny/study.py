"""Check the paper's claims on the tiny world, with this repository's own commands.

    python tiny/study.py                  all of it; stopped and started again, it goes on
    python tiny/study.py --claims 1 3     some of it
    python tiny/study.py --list           the commands, and run none of them

A claim is a list of rows, and a row is a model measured on held-out problems with three seeds: candidates
(sample.py), their refinements (refine.py), and before that, where the model is a trained one, its training
(train.py, once for each seed) on rows that are made once, with seed 0. evaluate.py makes one report of each claim.
Files are named after what they are, under runs/study, and what is there is not made again; study.md has the tables,
claims.png and losses.png are its figures.
Claim 0 is none of the paper's: it chooses the weight of refinement in training, on problems of its own.
"""

import argparse
import collections
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TINY = Path(os.path.relpath(Path(__file__).parent))
sys.path.insert(0, str(TINY.parent))

from evaluate import report  # noqa: E402
from figures import as_markdown, correlations, gap_of  # noqa: E402
from files import InputError, command_line, read_json  # noqa: E402

RUNS = Path("runs/study")
TEACHER, STUDENT = "qwen3-w192", "qwen3-w96"
SIZES = ("qwen3-w48", "qwen3-w64", "qwen3-w96", "qwen3-w128", "qwen3-w192")
STEPS, LR, WEIGHT = 180, 1e-3, 4

TRAINED = {  # what is trained on: flags of train.py, with the files of data_of
    "joint": "--solve {teacher} --refine {refined} --weight {weight}",
    "solve only": "--solve {teacher}",
    "refine only": "--refine {refined}",
    "own refinements": "--solve {teacher} --refine {own} --weight {weight}",
    "teacher's candidates": "--solve {teacher} --refine {teachers} --weight {weight}",
}


class Row(NamedTuple):
    model: str
    how: str | None = None  # of TRAINED, or untrained
    data: str = "test"
    given: bool = False  # the untrained model's candidates to refine, instead of its own
    n: int = 4
    temperature: float = 1
    weight: int = WEIGHT
    lr: float = LR
    seeds: tuple = (0, 1, 2)


CLAIMS = {  # number -> title, {name: Row}
    0: (
        "The weight of refinement, chosen on problems of its own",
        {
            "untrained": Row(STUDENT, data="valid", seeds=(0,)),
            **{f"weight {w}": Row(STUDENT, "joint", data="valid", weight=w, seeds=(0,)) for w in (1, 2, 4, 8)},
        },
    ),
    1: ("Small models refine badly when merely prompted", {"untrained": Row(STUDENT)}),
    2: ("The gap grows with size", {name: Row(name) for name in SIZES}),
    3: (
        "Joint training transfers refinement from the larger teacher",
        {"before": Row(STUDENT), "solve only": Row(STUDENT, "solve only"), "joint": Row(STUDENT, "joint")},
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
        "Out of domain: trained on sums, measured on differences",
        {
            "before": Row(STUDENT, data="differences"),
            # Training on sums alone unlearns to subtract; whether comparing carries over shows on candidates of before.
            "solve only": Row(STUDENT, "solve only", data="differences"),
            "joint": Row(STUDENT, "joint", data="differences"),
            "joint, a lower rate": Row(STUDENT, "joint", data="differences", lr=3e-4),
            "solve only, candidates of before": Row(STUDENT, "solve only", data="differences", given=True),
            "joint, candidates of before": Row(STUDENT, "joint", data="differences", given=True),
        },
    ),
    6: (
        "Ablations",
        {
            **{how: Row(STUDENT, how) for how in TRAINED},
            "joint, 2 candidates": Row(STUDENT, "joint", n=2),
            "joint, 8 candidates": Row(STUDENT, "joint", n=8),
            "joint, temperature 0.6": Row(STUDENT, "joint", temperature=0.6),
        },
    ),
}


# ------------------------------------------------------------------------------------------------
# Commands: lists of words, the last of which is the file or folder that they make


def data_of(row):
    """What the row's model is trained on -> ([commands that make it, in order], flags of train.py)."""
    at, shared = RUNS / row.model, RUNS / TEACHER
    files = {
        "candidates": at / "train.candidates.jsonl",
        "teacher": shared / "train.candidates.jsonl",
        "refined": at / "teacher.refined.jsonl",
        "own": at / "own.refined.jsonl",
        "copy": shared / "copy.candidates.jsonl",
        "teachers": shared / "copy.refined.jsonl",
    }
    student, teacher, data = (str(TINY / name) for name in (row.model, TEACHER, "train.jsonl"))
    makes = {
        "candidates": ["sample.py", "--data", data, "--model", student, "--out"],
        "teacher": ["sample.py", "--data", data, "--model", teacher, "--out"],
        "refined": ["refine.py", "--model", teacher, "--candidates", str(files["candidates"]), "--out"],
        "own": ["refine.py", "--model", student, "--candidates", str(files["candidates"]), "--k", "4", "--out"],
        # train.py refuses refinements of another model's candidates, by the record beside these: a copy has none.
        "copy": ["cp", str(files["teacher"])],
        "teachers": ["refine.py", "--model", teacher, "--candidates", str(files["copy"]), "--out"],
    }
    before = {"refined": ["candidates"], "own": ["candidates"], "teachers": ["teacher", "copy"]}
    flags, commands = TRAINED[row.how].format(**files, weight=row.weight).split(), []
    for name in [name for name, file in files.items() if str(file) in flags]:
        commands += [[*makes[made], str(files[made])] for made in [*before.get(name, []), name]]
    return commands, flags


def commands_of(row, seed):
    """A row's commands for one seed, the last of which makes its refined file."""
    kind = (row.how or "untrained").replace(" ", "-").replace("'", "")
    kind += f"-weight{row.weight}" if "{weight}" in TRAINED.get(row.how, "") else ""
    kind += f"-lr{row.lr}" if row.lr != LR else ""
    at, model, commands = RUNS / row.model / kind, str(TINY / row.model), []
    if row.how:
        trained = str(at / f"seed{seed}")
        commands, flags = data_of(row)
        flags += ["--steps", str(STEPS), "--lr", str(row.lr), "--seed", str(seed), "--out", trained]
        commands.append(["train.py", "--model", model, *flags])
        model = trained
    name = f"{row.data}-n{row.n}-t{row.temperature}-seed{seed}"
    drawn = ["--seed", str(seed), "--temperature", str(row.temperature), "--out"]
    if row.given:
        sampled = commands_of(row._replace(how=None, given=False), seed)[0]
        name = f"given-{name}"
    else:
        data = ["--data", str(TINY / f"{row.data}.jsonl"), "--n", str(row.n)]
        sampled = ["sample.py", "--model", model, *data, *drawn, str(at / f"{name}.candidates.jsonl")]
    refine = ["refine.py", "--model", model, "--candidates", sampled[-1], *drawn, str(at / f"{name}.refined.jsonl")]
    return [*commands, sampled, refine]


LOCKS = collections.defaultdict(threading.Lock)  # one for each output
failed = threading.Event()


def run(commands, started):
    """Run commands one after another, but those whose output is there. What two chains need is made by one of them."""
    for command in commands:
        with LOCKS[command[-1]]:
            if failed.is_set() or Path(command[-1]).exists():
                continue
            Path(command[-1]).parent.mkdir(parents=True, exist_ok=True)
            if command[0] == "cp":
                shutil.copy(*command[1:])
                continue
            print(f"[{(time.time() - started) / 60:.1f} min] python {shlex.join(command)}", flush=True)
            words = [sys.executable, str(TINY.parent / command[0]), *command[1:]]
            # One thread each: two processes of one thread do more than one process of two.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                failed.set()  # the other chains end with the command that they are at
                said = (done.stdout.strip() or "no output").splitlines()[-1]
                raise InputError(f"python {shlex.join(command)}: {said}")


# ------------------------------------------------------------------------------------------------
# The report


def table(claim):
    """The rows of a claim, from the report that evaluate.py made of it, in Markdown."""
    title, rows = CLAIMS[claim]
    found = read_json(RUNS / f"claim{claim}" / "report.json")
    head = ["", "pass@1", "pass@N", "maj@N", "likeliest", "refined", "**gap [95%]**", "s.e. of seeds"]
    head += ["gap at equal tokens", "all wrong, rescued"]
    lines = [head]
    for row in found["rows"]:
        gap, cost, (rescued, wrong) = row["gap"], row["equal_cost"]["generated"], row["rescued"]["all_wrong"]
        methods = [row["methods"][method] for method in ("pass@1", "pass@N", "maj@N", "logprob", "refined")]
        line = [row["name"], *(f"{method['accuracy']:.1%}" for method in methods), f"**{gap_of(gap)}**"]
        line += ["-" if gap["seed_se"] is None else f"{100 * gap['seed_se']:.1f}"]
        line += ["~" * cost["extrapolated"] + gap_of(cost) if "maj" in cost else "-", f"{rescued} of {wrong}"]
        lines.append(line)
    seeds = ", ".join(map(str, next(iter(rows.values())).seeds))
    text = as_markdown(f"{claim}. {title}", lines, f"`python tiny/study.py --claims {claim}`, seeds {seeds}")
    return "\n\n".join([text, *(correlations(found["scaling"]) if claim == 2 else [])])


def draw_gaps(claims, out):
    """The gap of every row of these claims, with its interval."""
    from matplotlib.figure import Figure

    reports = [read_json(RUNS / f"claim{claim}" / "report.json")["rows"] for claim in claims]
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

    fig = Figure(figsize=(10, 6), layout="constrained")
    axes = fig.subplots(2, 3, sharex=True).ravel()
    for path in sorted(TINY.glob("*.losses.jsonl"), key=lambda path: (path.name[:5], len(path.name), path.name)):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for axis, kind in zip(axes, ("repeats", "look-ups", "facts", "solve", "notes", "notes in a chat")):
            tokens, losses = zip(*((line["tokens"] / 1e6, line[kind]) for line in lines if kind in line))
            style = "--" if path.name.startswith("llama") else "-"
            axis.semilogy(tokens, losses, style, linewidth=1.2, label=path.name.removesuffix(".losses.jsonl"))
            axis.set_title(kind, fontsize=10)
            axis.grid(color="0.92")
    for axis in axes[3:]:
        axis.set_xlabel("tokens read (millions)")
    for axis in axes[::3]:
        axis.set_ylabel("loss (nats)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    fig.savefig(out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--claims", nargs="+", type=int, choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args()
    started, rows = time.time(), [row for claim in args.claims for row in CLAIMS[claim][1].values()]
    chains = [commands_of(row, seed) for row in rows for seed in row.seeds]
    if args.list:
        return print(*dict.fromkeys(f"python {shlex.join(command)}" for chain in chains for command in chain), sep="\n")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for work in [pool.submit(run, chain, started) for chain in chains]:
            work.result()
    for claim in args.claims:
        files = {name: [commands_of(row, seed)[-1][-1] for seed in row.seeds] for name, row in CLAIMS[claim][1].items()}
        report([f"{name}={','.join(paths)}" for name, paths in files.items()], RUNS / f"claim{claim}", 5.0)
    made = [claim for claim in CLAIMS if (RUNS / f"claim{claim}" / "report.json").exists()]
    text = "\n\n".join(map(table, made))
    draw_gaps(made, RUNS / "claims.png")
    draw_losses(RUNS / "losses.png")
    (RUNS / "study.md").write_text(f"# The claims on the tiny world\n\n{text}\n", encoding="utf-8")
    print(text, f"\n{RUNS}/study.md, {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    command_line(main)
