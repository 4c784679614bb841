"""Tables, sentences and figures of what report.json says; evaluate.py prints and writes them. And train.py's losses.

`rows` are those of report.json, and `methods` are METHODS of evaluate.py, with their names and how they are drawn.
"""

import math
import sys
import textwrap
from dataclasses import dataclass

import numpy as np

BLUE, GREY = "#0b5fa5", "0.5"

# ------------------------------------------------------------------------------------------------
# Tables


@dataclass
class Table:
    title: str
    note: str
    columns: dict  # heading -> function of a row of report.json that gives the text
    needs: str = "name"  # what of a row must be known, or it is left out


def details(item, tokens, logprob, certainty):
    """The last cells of a candidate or refinement in `evaluate.py --show`."""
    mean_logprob = None if None in (tokens, logprob) else logprob / max(tokens, 1)
    known = [cell("{:.0f}", tokens), cell("{:.2f}", mean_logprob), cell("{:.2f}", certainty)]
    order = item["order"] if isinstance(item.get("order"), list) else []
    return [*known, str(item.get("finish_reason") or "-")[:12], " ".join(map(str, order))]


def cell(layout, *values):
    """Numbers as a text, with a dash for what is not known."""
    texts = ["-" if value is None else layout.format(value) for value in values]
    return "-" if set(texts) == {"-"} else " / ".join(texts)


def gap_of(found):
    """A gap in points with its interval."""
    values = [100 * value for value in (found["points"], *found["ci95"])] if "points" in found else None
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*values) if values else "-"


def shorten(name, width):
    """A name without its middle where it is too long: names of one family differ at their ends."""
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[len(name) - (width - width // 2) :]}"


def of_how_many(found, way):
    """One of the pairs [how many, of how many] in `found`, with a dash where that is not known."""
    return "{:.4g} / {:.4g}".format(*(round(x, 1) for x in found[way])) if found else "-"


def at_equal_cost(kind, mark=""):
    """Columns: the number of candidates that cost the same, their vote, and the gap to it."""

    def maj(cost):
        return "~" * cost.get("extrapolated", 0) + cell("{:.1%}", cost.get("maj"))

    return {
        f"{mark}k": lambda row: cell("{:.1f}", row["equal_cost"][kind]["k"]),
        f"{mark}maj@k": lambda row: maj(row["equal_cost"][kind]),
        f"{mark}gap [95%]": lambda row: gap_of(row["equal_cost"][kind]),
    }


TABLES = [
    Table(
        "Refinement Gap: refined - maj@N, on the same candidates",
        "better : worse: problems on which the refinement does better or worse than the vote, with p of the exact "
        "McNemar test; s.e.: standard error of the gap over seeds, in points",
        {
            "points [95%]": lambda row: gap_of(row["gap"]),
            "relative": lambda row: cell("{:+.1%}", row["gap"]["relative"]),
            "[95%]": lambda row: cell("[{0[0]:+.0%}, {0[1]:+.0%}]", row["gap"]["relative_ci95"]),
            "better : worse": lambda row: "{better} : {worse}".format(**row["gap"]["mcnemar"]),
            "p": lambda row: "{p:.2g}".format(**row["gap"]["mcnemar"]),
            "s.e. of seeds": lambda row: cell("{:.1%}", row["gap"]["seed_se"]).rstrip("%"),
        },
        "gap",
    ),
    Table(
        "At equal cost: refined - maj@k, where k candidates cost what N and one refinement do",
        "in generated tokens, and (*) together with prompts; ~: the files hold fewer than k candidates, so the curve "
        "of maj@k is continued in a straight line, which overestimates the vote; -: k is more than twice as many as "
        "the files hold, or tokens are not known",
        {
            "refined": lambda row: cell("{:.1%}", row["refined"]),
            **at_equal_cost("generated"),
            **at_equal_cost("with_prompts", "*"),
        },
        "equal_cost",
    ),
    Table(
        "What refinement does, by what the vote did",
        "all wrong, outvoted, tied: problems that the refinement solves, of those where no candidate is right, where "
        "the right ones lose the vote, and where the vote is tied; broken: problems that it gets wrong, of those that "
        "the vote solves; reordered: how often two refinements of a problem, shown its candidates in different orders, "
        "differ in their answers (in part by chance); first / last: accuracy of the refinement where the first or the "
        "last candidate shown is right, but not all are",
        {
            "all wrong": lambda row: "{:.4g} / {}".format(*row["rescued"]["all_wrong"]),
            "outvoted": lambda row: "{:.4g} / {}".format(*row["rescued"]["minority_right"]),
            "tied": lambda row: "{:.4g} / {}".format(*row["rescued"]["tied"]),
            "broken": lambda row: "{:.4g} / {}".format(*row["rescued"]["majority_right_broken"]),
            "reordered": lambda row: cell("{:.1%}", row["order"]["changed"]),
            "first / last": lambda row: cell("{:.1%}", *(row["order"]["at_place"][i][0] for i in (0, -1))),
        },
        "rescued",
    ),
    Table(
        "What becomes of the vote",
        "wrong → right: problems that the refinement gets right, of those that the vote gets wrong; right → wrong: "
        "problems that it gets wrong, of those that the vote solves; a tied vote is neither; one more: what the last "
        "candidate does to the vote of those before it, on average over which is the last; copied: refinements whose "
        "text, without thoughts, is that of one of the candidates that they saw",
        {
            "wrong → right": lambda row: of_how_many(row["flips"], "wrong_to_right"),
            "right → wrong": lambda row: of_how_many(row["flips"], "right_to_wrong"),
            "copied": lambda row: cell("{:.1%}", row["copied"]),
            "one more: w → r": lambda row: of_how_many(row["flips"]["one_more"], "wrong_to_right"),
            "r → w": lambda row: of_how_many(row["flips"]["one_more"], "right_to_wrong"),
        },
        "flips",
    ),
    Table(
        "The same by how far the candidates agree: wrong → right, right → wrong",
        "unanimous: all give the same answer; majority: more than half do; split: at most half do; none: no answer",
        {
            name: lambda row, name=name: ", ".join(
                of_how_many(row["flips"]["by_agreement"][name], way).replace(" ", "")
                for way in ("wrong_to_right", "right_to_wrong")
            )
            for name in ("unanimous", "majority", "split", "none")
        },
        "flips",
    ),
    Table(
        "Less the first row: paired differences in points [95%]",
        "over the same problems; - where they are other ones",
        {
            name: lambda row, name=name: gap_of(row["to_first"].get(name, {}))
            for name in ("pass@1", "maj@N", "refined")
        },
        "to_first",
    ),
    Table(
        "Answers and cost of a problem: candidates / refinements",
        "unanimous: all candidates of a problem give the same answer; cut off: ended by the length limit; a prompt "
        "counts once, since it is computed once for all its samples",
        {
            "unanimous": lambda row: cell("{:.1%}", row["unanimous"]),
            "answered": lambda row: cell("{:.1%}", *row["answered"].values()),
            "cut off": lambda row: cell("{:.1%}", *row["cut_off"].values()),
            "tokens": lambda row: cell("{:,.0f}", row["tokens"]["candidates"], row["tokens"]["refinement"]),
            "prompts": lambda row: cell("{:,.0f}", row["tokens"]["prompt"], row["tokens"]["refinement_prompt"]),
            "seconds": lambda row: cell("{:.2f}", *row["seconds"].values()),
            "parameters": lambda row: cell("{:,.1f} M", row["parameters"] and row["parameters"] / 1e6),
        },
    ),
]


def tables_of(rows, methods):
    """All tables of some rows of report.json -> [(title, lines of cells with the headings first, note)]."""
    methods = [method for method in methods if any(method.name in row["methods"] for row in rows)]
    accuracy = {key: lambda row, key=key: str(row[key.lower()]) for key in ("problems", "N", "K")}
    for name in (method.name for method in methods):
        accuracy[name] = lambda row, name=name: cell("{:.1%}", row["methods"].get(name, {}).get("accuracy"))
    sizes = [2**i for i in range(max(row["n"] for row in rows).bit_length())][-6:]
    curve = {f"k = {k}": lambda row, k=k: cell("{:.1%}", row.get(f"maj@{k}"), row.get(f"pass@{k}")) for k in sizes}
    labels = "; ".join(f"{method.name}: {method.label.format(n='N', k='K')}" for method in methods)
    first = [Table("Accuracy", labels, accuracy)]
    first.append(Table("With k of the candidates: maj@k / pass@k", "means over all subsets of k", curve))
    tables = []
    for table in first + TABLES:
        lines = [[row["name"], *(text(row) for text in table.columns.values())] for row in rows if row[table.needs]]
        tables += [(table.title, [["", *table.columns], *lines], table.note)] if lines else []
    return tables + lists_of(rows)


def lists_of(rows):
    """The tables with several lines for a row, where it has them: by the number of candidates shown, and rounds."""
    accuracy = {"refined [95%]": lambda line: "{:.1%} [{:.1%}, {:.1%}]".format(line["refined"], *line["ci95"])}
    tokens = {"tokens": lambda line: cell("{:,.0f}", line["tokens"])}
    shown = {
        "k": lambda line: str(line["shown"]),
        **accuracy,
        "maj@k": lambda line: f"{line['maj']:.1%}",
        "gap [95%]": lambda line: gap_of(line["gap"]),
        **tokens,
    }
    rounds = {
        "round": lambda line: str(line["round"]),
        **accuracy,
        "gap to maj@N [95%]": lambda line: gap_of(line["gap"]),
        "their vote": lambda line: f"{line['vote']:.1%}",
        "any right": lambda line: f"{line['any_right']:.1%}",
        **tokens,
    }
    of_shown = "gap: refined - maj@k, paired, in points; tokens: generated a problem, for these k and the refinement"
    of_rounds = "the refinements of a round are the candidates of the next; tokens: generated for one, a problem"
    lines = [(row["name"], line) for row in rows for line in row["by_shown"] or ()]
    varied = any(line["shown"] != row["n"] for row in rows for line in row["by_shown"] or ())
    several = [(row["name"], line) for row in rows if len(row["rounds"] or ()) > 1 for line in row["rounds"]]
    tables = []
    for title, note, columns, some in (
        ("By the number of candidates shown: k of N", of_shown, shown, lines if varied else []),
        ("Rounds", of_rounds, rounds, several),
    ):
        cells = [[name, *(text(line) for text in columns.values())] for name, line in some]
        tables += [(title, [["", *columns], *cells], note)] if cells else []
    return tables


# What reviewers of refinement ask, where report.json answers it, and what makes a file for evaluate.py that shows it.
SAMPLE = "python sample.py --data gsm8k -n 8 --model"
REFINE = "python refine.py --model qwen-1.5b --candidates runs/g.candidates.jsonl"
CHECKLIST = [
    ("Is it better than a vote that costs as much?", "equal_cost", [REFINE]),
    ("What does it break, and where?", "flips", [REFINE]),
    (
        "And with little diversity?",
        "flips",
        [
            f"{SAMPLE} qwen-1.5b --temperature 0.3 --out runs/cold.candidates.jsonl",
            "python refine.py --model qwen-1.5b --candidates runs/cold.candidates.jsonl",
        ],
    ),
    ("How many candidates should it see?", "by_shown", [f"{REFINE} --shown 4 --out runs/four.refined.jsonl"]),
    ("Do more rounds help?", "rounds", [f"{REFINE} -k 4 --rounds 3 --out runs/again.refined.jsonl"]),
    ("Does the order of the candidates matter?", "order", [f"{REFINE} -k 4 --out runs/orders.refined.jsonl"]),
    ("And the temperature?", "to_first", [f"{REFINE} --temperature 0 --out runs/greedy.refined.jsonl"]),
    ("And candidates that were cut off?", "to_first", [f"{REFINE} --skip-cut-off --out runs/whole.refined.jsonl"]),
    ("What does the teacher itself score?", "methods", [f"{SAMPLE} qwen-7b --out runs/teacher.candidates.jsonl"]),
    (
        "Would training on solving alone, for as many steps, do as well?",
        "to_first",
        [
            "python train.py --model qwen-1.5b --solve s.candidates.jsonl --steps 100 --out runs/solving",
            f"{SAMPLE} runs/solving --out runs/solving.candidates.jsonl",
            "python refine.py --model runs/solving --candidates runs/solving.candidates.jsonl",
        ],
    ),
]


def checklist():
    """A table of CHECKLIST, for report.md and the README."""
    lines = [["question", "in report.json", "what makes a file that shows it"]]
    for question, key, made_by in CHECKLIST:
        lines.append([question, f"`{key}`", "; ".join(f"`{command}`" for command in made_by)])
    return "Questions of a reviewer", lines, "give the files to evaluate.py, beside the first; with your model and data"


def as_text(title, lines, note, width=100):
    """A table for the terminal, `width` columns at most: long names lose their middle."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    gap = 2 if sum(widths) + 2 * len(widths) - 2 <= width else 1
    widths[0] = max(6, min(widths[0], width - sum(widths[1:]) - gap * (len(widths) - 1)))
    text = [title]
    for name, *others in lines:
        padded = (other.rjust(size) for other, size in zip(others, widths[1:]))
        text.append((" " * gap).join([shorten(name, widths[0]).ljust(widths[0]), *padded]).rstrip())
    return "\n".join([*text, *textwrap.wrap(f"({note})", width)])


def say(*parts, sep="\n"):
    """Print texts, with a ? for what this terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(sep.join(parts).encode(encoding, "replace").decode(encoding))


def as_markdown(title, lines, note):
    head, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([f"## {title}", "", head, "| --- |" + " ---: |" * (len(lines[0]) - 1), *rest, "", f"{note}."])


def spearman(x, y):
    """Rank correlation of x and y [n] and its 95% interval (Bonett and Wright 2000), over models as a sample.

    None for fewer than 3, or where one of them is constant; no interval for fewer than 4. A perfect order
    counts as half a swap of neighbours less in the interval, which would have no width otherwise.
    """
    both, n, r, ends = np.array([x, y], dtype=float), len(x), None, None
    above, equal = both[:, :, None] > both[:, None], both[:, :, None] == both[:, None]
    ranks = above.sum(2) + (equal.sum(2) + 1) / 2  # equal values share the mean of their ranks
    if n >= 3 and ranks.std(1).min() > 0:
        r = float(np.clip(np.corrcoef(ranks)[0, 1], -1, 1))
    if r is not None and n >= 4:
        bound = 1 - 6 / (n**3 - n)
        z, half = math.atanh(min(max(r, -bound), bound)), 1.96 * math.sqrt((1 + r * r / 2) / (n - 3))
        ends = [min(r, math.tanh(z - half)), max(r, math.tanh(z + half))]
    return {"models": n, "spearman": r, "ci95": ends}


def scaling(rows):
    """Over the rows of several models: does the gap go with the model's size, and with what one sample is worth?"""
    rows = [row for row in rows if row["parameters"] and row["gap"]]
    if len({row["parameters"] for row in rows}) < 2:
        return None
    gap = [row["gap"]["points"] for row in rows]
    return {f"gap_and_{key}": spearman([row[key] for row in rows], gap) for key in ("parameters", "pass@1")}


def correlations(scaling):
    """What report.json says under `scaling`, a sentence each."""
    text = []
    for key, values in (scaling or {}).items():
        if values["spearman"] is not None:
            low_high = values["ci95"] and "95% [{:+.2f}, {:+.2f}]".format(*values["ci95"])
            what = f"{key.replace('_and_', ' against ')}: rank correlation {values['spearman']:+.2f}"
            text.append(f"{what} over {values['models']} rows ({low_high or 'too few for an interval'}).")
    return text


def notes(rows, scaling, stuck, limit):
    """What the tables do not say, a sentence each; `stuck` comparisons took longer than `limit` seconds."""
    text = ["pass@k and maj@k are exact expectations over subsets; 95% intervals: 10,000 bootstrap draws, seed 0."]
    text += correlations(scaling)
    if bare := [row["name"] for row in rows if not row["k"]]:
        text.append(f"No Refinement Gap for {', '.join(bare)}: there are no refinements; refine.py makes them.")
    makers = {"candidates": "sample.py", "refinements": "refine.py"}
    for row in rows:
        name = row["name"]
        for kind, script in makers.items():
            cut, unboxed = row["cut_off"][kind] or 0, row["unboxed"][kind] or 0
            if cut >= 0.1:
                what = f"{name}: {cut:.0%} of the {kind} were cut off by the length limit"
                text.append(f"{what}, and a cut-off one seldom has an answer; give {script} a larger --max-new-tokens.")
            if unboxed >= 0.1:
                what = f"{name}: {unboxed:.0%} of the {kind} that were not cut off have no answer"
                text.append(rf"{what}: the model does not put it in a box, \boxed{{...}}, so that grading sees none.")
        if row["sampled"] < row["n"]:
            what = f"{name}: until the vote was decided, {row['sampled']:.1f} candidates a problem were sampled"
            text.append(f"{what} of {row['n']} at most; pass@k and maj@k are of the first ones, which all have.")
        if row["left_out"]:
            what = f"{name}: {row['left_out']:.1%} of the candidates that were drawn are not in the refinement prompts"
            text.append(f"{what}: empty, or (--skip-cut-off) cut off or without an answer.")
    if stuck:
        text.append(f"{stuck} comparisons took longer than {limit:g} s or crashed, and count as unequal.")
    return text


# ------------------------------------------------------------------------------------------------
# Figures: the refinement in blue, the vote in black, the rest in grey; names stand beside their points


def look(method, row, **more):
    """How the points of a method are drawn: arguments of plot."""
    n = row["n"] if row["sampled"] == row["n"] else f"up to {row['n']}"
    style = {"label": method.label.format(n=n, k=row["k"]), "color": method.colour, "marker": method.marker}
    return {**style, "markersize": 5 if method.colour == GREY else 7, "linestyle": "none", **more}


def in_percent(found, value):
    """An accuracy or a gap and its interval, for a figure -> (value, [low, high])."""
    return 100 * found[value], [100 * x for x in found["ci95"]]


def spread(places, distance):
    """Ascending places in [0, 1], moved to be `distance` apart, up as much as down, and not out of [0, 1]."""
    steps = distance * np.arange(len(places))
    up, down = np.maximum.accumulate(places - steps), np.minimum.accumulate((places - steps)[::-1])[::-1]
    return np.clip((up + down) / 2, 0, max(0, 1 - steps[-1])) + steps


def name_points(axis, inches):
    """Right of a panel so many inches high, the names of its points (of lines: of their ends), joined to them."""
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    lines.sort(key=lambda line: line.get_ydata()[-1])
    low, high = axis.get_ylim()
    places = np.array([(line.get_ydata()[-1] - low) / (high - low) for line in lines])
    thin = {"arrowstyle": "-", "color": "0.8", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
    for line, height in zip(lines, spread(places, 0.17 / inches)):
        at = {"xytext": (1.06, height), "textcoords": "axes fraction", "va": "center", "arrowprops": thin}
        axis.annotate(line.get_label(), line.get_xydata()[-1], color=line.get_color(), fontsize=9, **at)


def panels(fig, things, ylabel, inches=2.6):
    """(panel, thing) for each of some things, two panels beside each other; when all are drawn, points get names."""
    down, across = -(-len(things) // 2), min(len(things), 2)
    fig.set_size_inches(5 * across, (inches + 0.9) * down)
    axes = fig.subplots(down, across, squeeze=False, sharey=True).ravel()
    yield from zip(axes, things)
    for axis in axes[::across]:
        axis.set_ylabel(ylabel)
    for axis in axes[: len(things)]:  # now that their limits, which they share, are known
        name_points(axis, inches)
    for axis in axes[len(things) :]:
        axis.remove()


def draw_methods(rows, methods, fig):
    """On the left the accuracy of each method with its interval, on the right the gap, where there is one."""
    gaps = any(row["gap"] for row in rows)
    intervals = [in_percent(found, "accuracy")[1] for row in rows for found in row["methods"].values()]
    room = min(max(low, 100 - high) for low, high in intervals) > 42  # for names beside them; else they stand outside
    fig.set_size_inches((6 if room else 7.5) + 3.5 * gaps, 1 + 0.2 * len(rows) + 0.19 * len(intervals))
    left, *right = fig.subplots(1, 1 + gaps, width_ratios=(5, 3)[: 1 + gaps], sharey=True, squeeze=False)[0]
    y, middles = 0, []
    for row in rows:
        middles.append(y + (len(row["methods"]) - 1) / 2)
        for method in (method for method in methods if method.name in row["methods"]):
            accuracy, (low, high) = in_percent(row["methods"][method.name], "accuracy")
            style = look(method, row)
            left.plot([low, high], [y, y], color=method.colour, linewidth=1.2)
            left.plot(accuracy, y, **style)
            x, shift, side = (low, (-7, 0), "right") if low > 100 - high else (high, (7, 0), "left")
            if not room:
                x, shift, side = 102, (5, 0), "left"
            text = {"fontsize": 8, "color": method.colour, "ha": side, "va": "center", "textcoords": "offset points"}
            left.annotate(f"{style['label']}  {accuracy:.1f}", (x, y), shift, **text)
            y += 1
        y += 1
        if row["gap"]:
            gap, ends = in_percent(row["gap"], "points")
            right[0].plot(ends, [middles[-1]] * 2, "|-", color=BLUE, markersize=9)
            right[0].plot(gap, middles[-1], "D", color=BLUE)
            text = {"ha": "center", "fontsize": 9, "textcoords": "offset points"}
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            right[0].annotate(gap_of(row["gap"]), (gap, middles[-1]), (0, 9), bbox=paper, **text)
        for axis in (left, *right):
            axis.axhline(y - 1, color="0.8", linewidth=0.8)
    left.set(xlabel="problems solved (%), 95% interval", xlim=(-2, 102), ylim=(y - 1, -1))
    left.set_yticks(middles, [shorten(row["name"], 28) for row in rows])
    for axis in right:
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel("Refinement Gap\n(refined - majority vote, in points)")
        axis.margins(x=0.3)


def draw_frontier(rows, methods, fig):
    """Accuracy against tokens: the vote and a perfect judge of 1..N candidates, and the other methods."""
    for axis, row in panels(fig, rows, "problems solved (%)"):
        for method in (method for method in methods if method.name in row["methods"]):
            found, style = row["methods"][method.name], look(method, row)
            tokens, (accuracy, ends) = found["tokens"], in_percent(found, "accuracy")
            if method.name == "pass@1":  # where both curves begin, far from the other names
                at = {"xytext": (4, -6), "textcoords": "offset points", "va": "top", "fontsize": 9}
                axis.annotate(style.pop("label"), (tokens, accuracy), color=method.colour, **at)
            elif method.name in ("maj@N", "pass@N"):
                curve = method.name.replace("N", "{}").format
                k = [i for i in range(1, row["n"]) if curve(i) in row]  # its last point is that of all
                accuracy = [*(100 * row[curve(i)] for i in k), accuracy]
                tokens = [*(tokens * i / row["sampled"] for i in k), tokens]
                style |= {"linestyle": "-" if method.name == "maj@N" else ":", "markersize": 4 if len(k) < 16 else 0}
            elif method.name == "refined":
                axis.vlines(tokens, *ends, color=method.colour, linewidth=1.2)
            axis.plot(tokens, accuracy, **style)
        axis.set(title=shorten(row["name"], 28), xlabel="tokens generated for a problem")
        axis.set_xlim(0, 1.05 * max(found["tokens"] for found in row["methods"].values()))
        axis.margins(y=0.12)


def draw_outcomes(rows, methods, fig):
    """By the number of right candidates: how many problems (bars), and how often vote and refinement are right."""
    for axis, row in panels(fig, rows, "% of all problems (bars),\n% of these that are solved (lines)"):
        lines = [line for line in row["by_correct"] if line["problems"]]
        right = [line["correct"] for line in lines]
        shares = [100 * line["problems"] / sum(line["problems"] for line in lines) for line in lines]
        axis.bar(right, shares, color="0.87", edgecolor="0.6", linewidth=0.6)
        axis.plot(right, shares, linestyle="none", color=GREY, label="share of all problems")
        for method, key in ((method, method.name.removesuffix("@N")) for method in methods):
            if key in ("maj", "refined") and method.name in row["methods"]:
                axis.plot(right, [100 * line[key] for line in lines], **look(method, row, linestyle="-"))
        axis.set(title=shorten(row["name"], 28), xlabel=f"right candidates of {row['n']}")
        axis.set(xlim=(-0.7, row["n"] + 0.7), ylim=(-5, 105))
        axis.xaxis.get_major_locator().set_params(integer=True)


def draw_shown(rows, methods, fig):
    """Refined accuracy against the number of candidates shown, beside vote and perfect judge of as many.

    Rows of the same candidates are one panel.
    """
    same = {}
    for row in rows:
        curves = {key: value for key, value in row.items() if key.startswith(("maj@", "pass@"))}
        same.setdefault(str(curves), []).append(row)
    for axis, some in panels(fig, list(same.values()), "problems solved (%)"):
        first, k = some[0], range(1, some[0]["n"] + 1)
        for curve, style in (("maj@{}", {"label": "majority vote of k", "color": "black", "linestyle": "-"}),
                             ("pass@{}", {"label": "any right of k", "color": GREY, "linestyle": ":"})):  # fmt: skip
            axis.plot(k, [100 * first[curve.format(i)] for i in k], marker=".", **style)
        points = sorted((line["shown"], in_percent(line, "refined")) for row in some for line in row["by_shown"])
        for shown, (_, ends) in points:
            axis.vlines(shown, *ends, color=BLUE, linewidth=1.2)
        axis.plot([x for x, _ in points], [y for _, (y, _) in points], "D-", color=BLUE, label="refined")
        title = shorten(first["name"], 28) + (f" and {len(some) - 1} more" if len(some) > 1 else "")
        axis.set(title=title, xlabel="candidates, or shown of them: k")
        axis.xaxis.get_major_locator().set_params(integer=True)


def draw_scaling(rows, methods, fig):
    """The gap against the model's parameters, and against what one sample is worth."""
    inches, ylabel = max(2.6, 0.17 * len(rows)), "Refinement Gap (points, 95% interval)"
    for axis, (key, scale) in panels(fig, [("parameters", 1), ("pass@1", 100)], ylabel, inches):
        for row in rows:
            gap, ends = in_percent(row["gap"], "points")
            axis.vlines(scale * row[key], *ends, color="0.7", linewidth=1.2)
            axis.plot(scale * row[key], gap, "D", color=BLUE, label=shorten(row["name"], 24))
        axis.axhline(0, color="black", linewidth=0.8)
        if key == "parameters":
            axis.set(xlabel="parameters of the model", xscale="log")
        else:
            axis.set(xlabel="problems that one sample solves (%)")
        axis.margins(x=0.15)


def draw(rows, methods, scaling, out):
    """Draw all figures that the rows have the numbers for to the folder `out` -> their names."""
    import matplotlib  # here, since it takes a second that --show and a wrong flag need not wait for
    from matplotlib.figure import Figure

    drawn = []
    with_tokens = [row for row in rows if None not in [found["tokens"] for found in row["methods"].values()]]
    with_sizes = [row for row in rows if scaling and row["parameters"] and row["gap"]]
    with_shown = [row for row in rows if row["by_shown"]]
    if len({line["shown"] for row in with_shown for line in row["by_shown"]}) < 2:
        with_shown = []
    with matplotlib.rc_context():
        matplotlib.rc("figure.constrained_layout", use=True)
        matplotlib.rc("axes", grid=True, axisbelow=True, titlesize=10)
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("grid", color="0.92")
        for name, draw_one, some in (
            ("figure.png", draw_methods, rows),
            ("frontier.png", draw_frontier, with_tokens),
            ("outcomes.png", draw_outcomes, rows),
            ("shown.png", draw_shown, with_shown),
            ("scaling.png", draw_scaling, with_sizes),
        ):
            if some:
                fig = Figure()
                draw_one(some, methods, fig)
                fig.savefig(out / name, dpi=150)
                drawn.append(name)
    return drawn


def draw_losses(lines, tasks, path):
    """The losses of both tasks over the steps of train.py, lines of its log, in training and validation."""
    from matplotlib.figure import Figure  # slow to import

    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    for task, color, line_style, marker in zip(tasks, (BLUE, "#d55e00"), ("-", "--"), ("o", "s")):
        for key, style in (("loss", line_style), ("validation", marker)):
            points = [(line["step"], line[f"{key}_{task}"]) for line in lines if line.get(f"{key}_{task}") is not None]
            if points:
                axes.plot(*zip(*points), style, color=color, mfc="none", linewidth=1, label=f"{key}, {task}")
    axes.set(xlabel="step", ylabel="cross-entropy of a learned token, nats", ylim=(0, None))
    axes.legend()
    axes.figure.savefig(path, dpi=150)
