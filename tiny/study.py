"""Check the paper's claims on the tiny world, with this repository's own commands.

    python tiny/study.py                  all of it; stopped and started again, it goes on
    python tiny/study.py --claims 1 3     some of it
    python tiny/study.py --list           the commands, and run none of them

A claim is a list of rows, and a row is a model measured on held-out problems with three seeds: candidates
(sample.py), their refinements (refine.py), and before that, where the model is a trained one, its training
(train.py, once for each seed) on rows that are made once, with seed 0. evaluate.py makes one report of each claim.
Files are named after what they are, under runs/study, and what is there is not made again. Claims 2 and 4 need
models that are not shipped yet: `python tiny/make.py` makes all of them.
"""

import argparse
import collections
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TINY = Path(os.path.relpath(Path(__file__).parent))
sys.path.insert(0, str(TINY.parent))

from evaluate import InputError, command_line, gap_of, read_json, report  # noqa: E402

RUNS = Path("runs/study")
SEEDS = (0, 1, 2)
TEACHER, STUDENT = "qwen3-w192", "qwen3-w96"
SIZES = ("qwen3-w48", "qwen3-w64", "qwen3-w96", "qwen3-w128", "qwen3-w192")
STEPS, LR = 180, 1e-3

# What is trained on, by name: flags of train.py, with the files of data_of
TRAINED = {
    "joint": "--solve {teacher} --refine {refined} --weight 4",
    "solve only": "--solve {teacher}",
    "refine only": "--refine {refined}",
    "own refinements": "--solve {teacher} --refine {own} --weight 4",
    "teacher's candidates": "--solve {teacher} --refine {teachers} --weight 4",
}
CLAIMS = {  # number -> title, rows: name -> (model, what it was trained on or None, more)
    1: ("Small models refine badly when merely prompted", {"untrained": (STUDENT, None, {})}),
    2: ("The gap grows with size", {name: (name, None, {}) for name in SIZES}),
    3: (
        "Joint training transfers refinement from the larger teacher",
        {
            "before": (STUDENT, None, {}),
            "solve only": (STUDENT, "solve only", {}),
            "joint": (STUDENT, "joint", {}),
        },
    ),
    4: (
        "Across scales and families",
        {
            f"{name}, {'joint' if how else 'before'}": (name, how, {})
            for name in ("qwen3-w64", "qwen3-w96", "qwen3-w128", "llama-w96")
            for how in (None, "joint")
        },
    ),
    5: (
        "Out of domain: trained on sums, measured on differences",
        {
            "before": (STUDENT, None, {"data": "differences"}),
            "solve only": (STUDENT, "solve only", {"data": "differences"}),
            "joint": (STUDENT, "joint", {"data": "differences"}),
        },
    ),
    6: (
        "Ablations",
        {
            **{how: (STUDENT, how, {}) for how in TRAINED},
            "joint, N = 2": (STUDENT, "joint", {"n": 2}),
            "joint, N = 8": (STUDENT, "joint", {"n": 8}),
            "joint, temperature 0.6": (STUDENT, "joint", {"temperature": 0.6}),
        },
    ),
}


# ------------------------------------------------------------------------------------------------
# Commands: lists of words, the last two are --out FILE


def data_of(student, how):
    """What `student` is trained on -> ([commands that make it, in order], flags of train.py)."""
    at, shared = RUNS / student, RUNS / TEACHER
    files = {
        "candidates": at / "train.candidates.jsonl",
        "teacher": shared / "train.candidates.jsonl",
        "refined": at / "teacher.refined.jsonl",
        "own": at / "own.refined.jsonl",
        "copy": shared / "copy.candidates.jsonl",
        "teachers": shared / "copy.refined.jsonl",
    }
    from_data = ["sample.py", "--data", str(TINY / "train.jsonl"), "--model"]
    makes = {
        "candidates": [*from_data, str(TINY / student)],
        "teacher": [*from_data, str(TINY / TEACHER)],
        "refined": ["refine.py", "--model", str(TINY / TEACHER), "--candidates", str(files["candidates"])],
        "own": ["refine.py", "--model", str(TINY / student), "--candidates", str(files["candidates"]), "--k", "4"],
        # train.py refuses refinements of another model's candidates, by the record beside these: a copy has none.
        "copy": ["cp", str(files["teacher"])],
        "teachers": ["refine.py", "--model", str(TINY / TEACHER), "--candidates", str(files["copy"])],
    }
    flags = TRAINED[how].format(**files).split()
    first = {"refined": ["candidates"], "own": ["candidates"], "teachers": ["teacher", "copy"]}
    commands = []
    for needed in [name for name in makes if str(files[name]) in flags]:
        for name in [*first.get(needed, []), needed]:
            out = [] if name == "copy" else ["--out"]
            commands.append([*makes[name], *out, str(files[name])])
    return commands, flags


def commands_of(name, how, more, seed):
    """One row's commands for one seed, what it is trained on first -> (commands, refined file)."""
    data, n, temperature = more.get("data", "test"), more.get("n", 4), more.get("temperature", 1)
    at = RUNS / name / (how or "untrained").replace(" ", "-").replace("'", "")
    model, commands = str(TINY / name), []
    if how:
        model = str(at / f"seed{seed}")
        commands, data_flags = data_of(name, how)
        steps = ["--steps", str(STEPS), "--lr", str(LR), "--seed", str(seed)]
        commands.append(["train.py", "--model", str(TINY / name), *data_flags, *steps, "--out", model])
    stem = at / f"{data}-n{n}-t{temperature}-seed{seed}"
    drawn = ["--seed", str(seed), "--temperature", str(temperature)]
    candidates, refined = f"{stem}.candidates.jsonl", f"{stem}.refined.jsonl"
    measured = ["--data", str(TINY / f"{data}.jsonl"), "--n", str(n)]
    commands.append(["sample.py", "--model", model, *measured, *drawn, "--out", candidates])
    commands.append(["refine.py", "--model", model, "--candidates", candidates, *drawn, "--out", refined])
    return commands, refined


LOCKS = collections.defaultdict(threading.Lock)  # one for each output


def run(commands, started):
    """Run commands one after another, but those whose output is there. What two chains need is made by one of them."""
    for command in commands:
        with LOCKS[command[-1]]:
            if Path(command[-1]).exists():
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
                raise InputError(f"python {shlex.join(command)}: {done.stdout.strip().splitlines()[-1]}")


# ------------------------------------------------------------------------------------------------
# The report


def table(claim):
    """The rows of a claim, from the report that evaluate.py made of it, in Markdown."""
    title, rows = CLAIMS[claim]
    found = read_json(RUNS / f"claim{claim}" / "report.json")
    lines = [
        f"## {claim}. {title}",
        "",
        f"`python tiny/study.py --claims {claim}`, seeds {', '.join(map(str, SEEDS))}",
        "",
        "| | pass@1 | pass@N | maj@N | refined | gap, points [95%] | s.e. of seeds | all wrong, rescued |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in zip(rows, found["rows"]):
        gap, n, (rescued, wrong) = row["gap"], row["n"], row["rescued"]["all_wrong"]
        accuracy = " | ".join(f"{row[key]:.1%}" for key in ("pass@1", f"pass@{n}", f"maj@{n}", "refined"))
        lines.append(f"| {name} | {accuracy} | {gap_of(gap)} | {100 * gap['seed_se']:.1f} | {rescued} of {wrong} |")
    if claim == 2:
        for key, value in found["scaling"].items():
            lines += ["", f"{key.replace('_', ' ')}: {value}"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--claims", nargs="+", type=int, choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args()
    started, rows = time.time(), [row for claim in args.claims for row in CLAIMS[claim][1].values()]
    chains = [commands_of(*row, seed)[0] for seed in SEEDS for row in rows]
    if args.list:
        return print(*dict.fromkeys(f"python {shlex.join(command)}" for chain in chains for command in chain), sep="\n")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for work in [pool.submit(run, chain, started) for chain in chains]:
            work.result()
    for claim in args.claims:
        files = []
        for name, row in CLAIMS[claim][1].items():
            files.append(f"{name}=" + ",".join(commands_of(*row, seed)[1] for seed in SEEDS))
        report(files, RUNS / f"claim{claim}", 5.0)
    text = "\n\n".join(map(table, args.claims))
    (RUNS / "study.md").write_text(f"# The claims on the tiny world\n\n{text}\n", encoding="utf-8")
    print(text, f"\n{RUNS}/study.md, {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    command_line(main)
