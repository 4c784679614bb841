r"""Answers out of texts, and whether two of them mean the same: the judge of all that this project says.

    python grade.py FILE    grades a JSONL file: each line has "gold", and "text" or "answer"

The measure is what a human grader would say at a contest. Reading order:

    extract     the last \boxed{...} of a text, or several that make up one list
    normalise   one spelling, whether it came as LaTeX, Unicode, Markdown or plain text; words become \text{word}
    form        numbers, lists, intervals, choices, assignments and quantities with units, without any algebra
    algebra     the rest, read by math-verify's parser: constants exactly, unknowns at rational points
    processes   algebra may run for ever or crash, so it runs in processes that can be killed
"""

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

from files import InputError, command_line, read_jsonl

RULES = 2  # the version of all that follows: grades of another one are not used again

# ------------------------------------------------------------------------------------------------
# From a text to its answer


def strip_thinking(text, prompt=""):
    """A completion without <think>...</think>, without a thought that was cut off, and one that `prompt` opened."""
    if prompt.rstrip().endswith("<think>"):
        text = "<think>" + text
    *thoughts, last = text.split("</think>")
    kept = ""
    for part in thoughts:  # what stands before a </think> that nobody opened is thought, too
        kept = kept + part.partition("<think>")[0] if "<think>" in part else ""
    return (kept + last.partition("<think>")[0]).strip()


MARK = r"(?:[,;，、；]|\b(?:and|or)\b|和|或)"
JOINT = re.compile(  # between the boxes of one list: `\boxed{2}$, or $x = \boxed{3}`
    rf"(?:[\s$~*]|\\[)\] ,;]|\\q?quad|\\text\s*\{{|{MARK})*?{MARK}(?:[\s$~*{{}}]|\\[(\[ ,;]|\\q?quad|{MARK}"
    r"|(?:\\[a-z]+\s*)?[A-Za-z]?(?:_\{?\w+\}?)?(?:\([^()]{0,9}\))?\s*(?:=|\\in|\bis\b))*"
)


def extract_answer(text):
    r"""The content of the last \boxed{...} of a text, or None; boxes that are joined to it come before it.

    A last box that is cut off is no answer: an earlier box held some intermediate result.
    """
    contents, follower = [], len(text)
    for box in reversed(list(re.finditer(r"\\f?box(?:ed)?(?![a-zA-Z])\s*", text))):
        start, depth, content = box.end(), 0, None
        if text[start : start + 1] != "{":  # \boxed 5
            content = re.match(r"[+-]?(?:\\[a-zA-Z]+(?:\{[^{}]*\}|\d)*|[\w.]*\w)|", text[start:])[0]
            end = start + len(content)
        else:
            for mark in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):  # \{ and \} are the answer's
                depth += {"{": 1, "}": -1}.get(mark[0], 0)
                if depth == 0:
                    end = start + mark.end()
                    content = text[start + 1 : end - 1].strip()
                    break
        if not content or (contents and not JOINT.fullmatch(text[end:follower])):
            break
        contents, follower = [content, *contents], box.start()
    return ", ".join(dict.fromkeys(contents)) or None


def gold_answer(value):
    """The right answer of a problem as a text, or None where it is missing: null, NaN or empty."""
    return None if value is None or str(value).strip().lower() in ("nan", "") else str(value)


def answer_of(completion, prompt=""):
    """The answer in a candidate or a refinement (a dict with "text"), or None."""
    return extract_answer(strip_thinking(completion["text"], prompt))


# ------------------------------------------------------------------------------------------------
# One spelling for everything

FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp max min gcd lcm det".split()
GREEK = "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi omega".split()
SIGNS = r"""
× \times · \cdot ⋅ \cdot ∙ \cdot • \cdot ÷ / ∕ / √ \sqrt ∛ \sqrt[3] ¢ \text{cent} “ " ” " ∞ \infty ≤ \leq ≥ \geq ⩽
\leq ⩾ \geq ≠ \neq ≈ \approx ± \pm ∪ \cup ∩ \cap ∈ \in ∅ \emptyset ∠ \angle △ \triangle ° ^\circ º ^\circ ˚ ^\circ
ℝ \mathbb{R} ℤ \mathbb{Z} ′ ' ’ ' 。 . 、 , … \ldots € \text{euro} £ \text{sterling} ¥ \text{yuan} 元 \text{yuan} ⟨
\langle ⟩ \rangle ≅ \cong ∼ \sim − - ‐ - ‑ - ‒ - ― - – - — -""".split()
SIGNS = {ord(sign): name.replace('"', "") + " " * name[-1].isalpha() for sign, name in zip(SIGNS[::2], SIGNS[1::2])}
SIGNS |= {ord(sign): f"\\{name} " for sign, name in zip("αβγδεζηθκλμνξπρστφχψω", GREEK)}
SIGNS |= dict.fromkeys([0xAD, 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFEFF], "")  # no width
GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}"  # braces in braces, four deep
ARGUMENT = rf"({GROUP}|\\[A-Za-z]+|[^\s\\{{}}])"
NUMERAL = r"(?<![\d.,])(\d[\d,]*(?:\.\d*)?|\.\d+)"


def from_unicode(text):
    """The signs of Unicode as LaTeX has them: ½ is a fraction, x² a power, x₁ a subscript."""
    text = re.sub("([¼-¾⅐-⅞])", r"\\frac{\1}", text)  # of which NFKC makes \frac{1⁄2}
    text = re.sub("([⁰¹²³⁴-⁹⁺⁻ⁿ]+)", r"^{\1}", text)
    text = re.sub("([₀-₉₊₋]+)", r"_{\1}", text)
    return unicodedata.normalize("NFKC", text.translate(SIGNS)).replace("⁄", "}{").replace("−", "-")


def repeating(match):
    r"""0.1\overline{6} -> \frac{15}{90}"""
    whole, fixed, *period = match.groups("")
    period = "".join(period)
    difference = int(f"0{whole}{fixed}{period}") - int(f"0{whole}{fixed}")
    return rf"\frac{{{difference}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}"


def mixed(match):
    r"""2\frac{1}{2} or 2 1/2 -> \frac{5}{2}; what stands behind a whole number must be less than one."""
    whole, top, bottom = (int(x) for x in match.groups() if x)
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}" if top < bottom else match[0]


SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}


def scaled(match):
    r"""1.5 \text{million} -> 1500000"""
    value = Fraction(match[1].replace(",", "")) * SCALES[match[3]]
    return f"{value}{match[2]}" if value.denominator == 1 else match[0]


def braced(match):
    r"""\frac\pi2 -> \frac{\pi}{2}, sqrt(2) and \sqrt2 -> \sqrt{2}"""
    bare = (part[1:-1] if part[0] + part[-1] in ("{}", "()") else part for part in match.groups()[1:])
    return f"\\{match[1]}" + "".join(f"{{{part}}}" for part in bare)


def unordered(match):
    r"""Where the order of points does not matter: \angle CBA -> \angle ABC, segments and triangles sorted."""
    kind, points = match[1], match[2].replace(" ", "")
    return rf"\text{{{kind}}}" + (min(points, points[::-1]) if kind == "angle" else "".join(sorted(points)))


BEFORE_WORDS = (
    # \left( \displaystyle \color{red}{5} \boldsymbol{5} \(5\) **5** \mathrm{d}x \textbf{5} all real numbers
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""), (r"(?<!\\)\\[()\[\]]", " "),
    (r"\\(?:(?:display|text|script)style|n?o?limits|bf|it|rm|boldmath|[lL]arge|LARGE|[hH]uge|small)(?![a-zA-Z])", ""),
    (r"\\(?:textcolor|color|colorbox)(?:\[\w*\])?\s*\{[^{}]*\}", ""), (r"\\mathrm\s*\{([dei])\}", r"\1"),
    (rf"\\(?:mathbf|boldsymbol|bm|pmb|mathit|mathsf|mathtt|underline|emph|f?box(?:ed)?)\s*(?={GROUP}|\d)", ""),
    (r"(?<![\w)}*])(\*{1,3}|__|`)(?=\S)(.+?)(?<=\S)\1(?![\w({*])", r"\2"), (r"\{,\}|,\\!\s*", ","),
    (r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|mathrm|mbox|hbox|operatorname\*?)\s*(?=\{)", r"\\text"),
    (r"\\mathbb\s*\{?R\}?|\\text\{\s*all reals?(?: numbers)?\s*\}|\ball reals?(?: numbers)?\b", r"(-\\infty,\\infty)"),
    # 1{,}000 10\,000 10 000; 12^{\text{th}}; 0.\dot{1}\dot{2} 0.1\overline{6} 0.(3) 0.333...
    (r"(?<![\d.^_])\d{1,3}(?:(?:\\[,!;: ]|~|\s)\s*\d{3}(?!\d))+", lambda m: re.sub(r"\D", "", m[0])),
    (r"(?:(?<=\d)|(?<=\bn))\s*\^?\s*\{?\s*(?:\\text\s*\{)?\s*(?:st|nd|rd|th)(?![a-zA-Z])\s*\}{0,2}", " "),
    (r"\.\.\.|\\c?dots(?![a-z])", r"\\ldots"), (r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}"),
    (r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?|\((\d+)\))", repeating),
    (r"(\d*)\.(\d*?)(?:(\d)\3{2,}|(\d{2,6}?)\4+)\s*\\ldots", repeating),
    # \$5 €5; 90^\circ C; 5\%; spaces
    (rf"\\\$\s*{NUMERAL}", r"\1\\text{dollar}"), (r"\\\$", r"\\text{dollar}"), (r"\$", " "),
    (rf"(\\text\{{(?:euro|sterling|yuan)\}})\s*{NUMERAL}", r"\2\1"), (r"\\?%", r"\\text{percent}"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degree(?![a-z])", r"\\text{degree}"),
    (r"\\text\{degree\}\s*(?:([CF])(?![a-z])|\\text\s*\{\s*([CF])\s*\})", r"\\text{degree\1\2}"),
    (r"(?<!\\)\\[ ,;:!>]|~|\\q?quad(?![a-z])|\\hspace\{[^{}]*\}", " "),
    (r"\\text\{(?:[^{}]|\{[^{}]*\})*\}", lambda m: r"\text{%s}" % re.sub(r"\\text|[{}]", "", m[0][6:-1])),  # s^{-2}
    # Signs that have several names.
    (r"\\[dtc]frac(?![a-z])", r"\\frac"), (r"\\l(?:e|eqslant)(?![a-z])|<=", r"\\leq "), (r"\\lt(?![a-z])", "<"),
    (r"\\g(?:e|eqslant)(?![a-z])|>=", r"\\geq "), (r"\\gt(?![a-z])", ">"), (r"\\ne(?![a-z])|!=", r"\\neq "),
    (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset "), (r":=", "="), (r"^#+\s*", ""),
    (r"\b([A-Za-z])\s+(?:is|equals)\s+(?=[-\d\\])", r"\1="), (r"\\colon(?![a-z])", ":"), (r"\b([ap])\.\s*m\.", r"\1m"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"), (r"\\(?:begin|end)\{cases\}", ""),
    (r"(?i)(?:\\text\{)?\s*(?:there (?:is|are) )?\bno (?:real )?solutions?\b[.\s]*\}?", r"\\emptyset "),
    (r"\*\*", "^"), (r"\*", r"\\cdot "), (r"(?<=\w)\^\(((?:[^()]|\([^()]*\))*)\)", r"^{\1}"),
    # (0,1) U (2,3); {x | x > 3}; arrays and cases
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "), (r"^\\\{\s*[a-z]\s*(?:\\mid|\||:)(.*)\\\}$", r"\1"),
    (r"[(\[]\s*\\begin\{array\}(?:\{[^{}]*\})?(.*?)\\end\{array\}\s*[)\]]", r"\\begin{pmatrix}\1\\end{pmatrix}"),
    # P(1,2), a named point; \angle CBA, \overline{BA}, \triangle BCA
    (r"(?<![A-Za-z\\])[A-Z](?=\((?:[^()]|\([^()]*\))*,(?:[^()]|\([^()]*\))*\)$)", ""),
    (r"(?:m?\\|\\measured)(angle)\s*((?:[A-Z]\s*){3})(?![A-Za-z])", unordered),
    (r"\\(overline|overleftrightarrow)\s*\{\s*((?:[A-Z]\s*){2})\}", unordered),
    (r"^\\(triangle)\s*((?:[A-Z]\s*){3})$", unordered),
)  # fmt: skip
AFTER_WORDS = (
    # inf pi sqrt(2) \frac\pi2 2\frac{1}{2}; square inch, inch squared, per, mph; \sqrt{2} \approx 1.41; =5 5, 5; 5. 5\\
    (r"(?<![\\A-Za-z])(?:inf|infinity|oo)(?![A-Za-z])|\\text\{infinity\}", r"\\infty "),
    (rf"(?<![\\A-Za-z])(?<!\\text\{{)(?:(?:np|math)\.)?({'|'.join(FUNCTIONS + GREEK)})(?![A-Za-z])", r"\\\1 "),
    (rf"(?:\\|(?<![\\A-Za-z]))(sqrt)\s*({GROUP}|\((?:[^()]|\([^()]*\))*\)|\d+|[A-Za-z](?![A-Za-z])|\\[a-z]+)", braced),
    (rf"\\(frac)\s*{ARGUMENT}\s*{ARGUMENT}", braced), (r"\\sqrt\s*\[(\w+)\]\s*([\da-z])", r"\\sqrt[\1]{\2}"),
    (r"(?<![\d.^_{}/])(\d+)\s*(?:\\frac\{(\d+)\}\{(\d+)\}|\s(\d+)/(\d+))", mixed),
    (r"\\text\{square\}\s*\\text\{root\}\s*(\d+)", r"\\sqrt{\1}"), (r"\\text\{(?:negative|minus)\}\s*(?=[\d\\])", "-"),
    (rf"{NUMERAL}\s*(\\text\{{dollar\}}|)\s*\\text\{{({'|'.join(SCALES)})\}}", scaled),
    (r"\\text\{(?:square|sq)\}\s*(\\text\{\w+\})|(\\text\{\w+\})\s*\\text\{squared\}", r"\1\2^2"),
    (r"\\text\{cubic\}\s*(\\text\{\w+\})|(\\text\{\w+\})\s*\\text\{cubed\}", r"\1\2^3"),
    # kg \cdot m, \mu m, degree celsius, 3:00 pm; 5 (cm), x + k\pi, k \in \mathbb{Z}
    (r"(\\text\{\w+\}(?:\^\{?-?\d\}?)?)\s*\\cdot\s*(?=\\text)", r"\1 "), (r":00(?=\s*\\text\{[ap]m\})", ""),
    (r"\\mu\s*\\text\{(\w+)\}", r"\\text{micro\1}"), (r"\\text\{deg\}", r"\\text{degree}"),
    (r"\\text\{degree\}\s*\\text\{([cf])(?:elsius|ahrenheit)\}", r"\\text{degree\1}"),
    (r"(?<=\S)\s*\((?:\\approx[^()]*|\s*(?:\\text\{\w+\}\s*)*)\)\s*$", ""),
    (r"(?<=\S)[,;]?\s*(?:\\text\{(?:for|where)\}\s*)?\(?\b[a-z]\s*\\in\s*\\mathbb\s*\{?Z\}?\)?\s*$", ""),
    (r"\\text\{per\}", "/"), (r"\\text\{mph\}", r"\\text{mile}/\\text{h}"), (r"(?<=\S)\s*\\(?:approx|simeq).*$", ""),
    (r"^(?:[\s=:,;]|\\(?:approx|therefore)(?![a-z]))+|(?:[\s.,;:?=]|\\\\)+$", ""),
)  # fmt: skip
ANGLE = re.compile(r"(\d+(?:\.\d+)?|\\frac\{[^{}]*\}\{[^{}]*\}|\([^()]*\))\s*\\text\{degree\}")
# Units with a sure factor: dimension, then names of a unit and its size.
UNITS = {name: (dimension, Fraction(size)) for dimension, units in {
    "length": "mm millimeter millimetre 1/1000, cm centimeter centimetre 厘米 1/100, dm 1/10, m meter metre 米 1, "
              "km kilometer kilometre 千米 公里 1000, in inch inche 127/5000, ft foot feet 381/1250, "
              "yd yard 1143/1250, mi mile 201168/125",
    "mass": "mg milligram 1/1000, g gram 克 1, kg kilogram 千克 公斤 1000, lb lbs pound 45359237/100000, "
            "oz ounce 45359237/1600000",
    "time": "ms millisecond 1/1000, s sec second 秒 1, min minute 分钟 60, h hr hour 小时 3600, day 86400, week 604800",
    "money": "cent 1/100, dollar usd buck 1", "volume": "ml milliliter millilitre 1/1000, l liter litre 1",
}.items() for entry in units.split(", ") for *names, size in [entry.split()] for name in names}  # fmt: skip
FILLERS = set("the a an answer option choice is are was be equals equal to of there therefore so thus hence then final "
              "result value values total we get have has it that this solution solutions about approximately approx "
              "roughly exactly only possible".split())  # fmt: skip
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
KNOWN = {*"and or am pm yes no not odd even true false per sq nm hz ev mph".split(), *FILLERS} - {"a"}
# Words without which an answer says something else.
DECISIVE = set("no not negative minus least most than under over half twice double triple root squared tenth".split())
LETTERS = r"[^\W\d_]+(?:['-][^\W\d_]+)*"


def word(name):
    r"""\text{name}, in the singular and in small letters; a number for `seven`."""
    name = name.lower()
    if len(name) > 3 and name.endswith("s") and not name.endswith(("ss", "us", "is")):
        name = name[:-1]
    return str(NUMBERS.index(name)) if name in NUMBERS else rf"\text{{{name}}}"


def mark_words(text):
    r"""Each word becomes \text{word}; letters of products (2ab), of points (AB) and of choices (C) stay.

    In \text{...} all is words but capitals; elsewhere the known ones, units after a number, and what has four
    letters or more. Words that say nothing about the answer (the, is) go.
    """

    def in_text(before, match):
        name, small, before = match[0], match[0].lower(), before + match.string[: match.start()]
        counted = re.search(r"[\d}]\s*$", before)
        if name[0] == "\\" or (name in FUNCTIONS and not counted):
            return name
        if len(name) == 1 and name.isascii():  # 5 K and 5 m have units; C is a choice, x an unknown, a an article
            unit = counted if name.isupper() else name in UNITS or match.string.strip() != name
            return word(name) if unit else name
        return name if name.isupper() and name.isascii() and small not in {*KNOWN, *UNITS} else word(name)

    def outside(match):
        name, small = match[0], match[0].lower()
        before, behind = match.string[: match.start()], match.string[match.end() :]
        counted = re.search(r"\d\s+$", before)
        if name in (*FUNCTIONS, *GREEK, "sqrt") and not (name in UNITS and re.search(r"\d\s*$", before)):
            return name
        unit = small in UNITS and before.strip()
        if len(name) == 1:  # 5 m, 60 m/s, 60 km/h, 2 h 30 min, but not 2m
            unit = unit and counted and re.match(r"\s*(?:$|/|\s\d|\^\{?\d)", behind)
            unit = unit or (small in UNITS and re.search(r"\d\s*[A-Za-z]+\s*/\s*$", before))
            unit = unit or (name in "KNJWVTL" and counted and not behind.strip())
        long = len(name) > 2 and counted or len(name) > 3 and not name.isupper()
        return word(name) if unit or long or small in KNOWN or not name.isascii() else name

    pieces = re.split(r"(?<!_)(?<!_\{)\\text\{([^{}]*)\}", text)
    bare = r"(?<![\\A-Za-z])(?<!_)(?<!_\{)(?<!begin\{)(?<!end\{)" + LETTERS  # no command, subscript, environment
    text = ""
    for i, piece in enumerate(pieces):
        if i % 2:
            text += " " + re.sub(rf"\\[A-Za-z]+|{LETTERS}", functools.partial(in_text, text), piece) + " "
        else:
            text += re.sub(bare, outside, piece)
    short = re.sub(r"\\text\{(\w+)\}", lambda m: "" if m[1] in FILLERS else m[0], text)
    return short if re.search(r"\w", short) else text


@functools.lru_cache(1 << 16)
def normalise(text):
    """An answer in the one spelling that all that follows compares."""
    if len(text := str(text)) > 2000:  # babble, and a strain on all that follows
        return text
    text = from_unicode(text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2:  # a single dollar sign before a number is money
        text = re.sub(r"(?<!\\)\$(?=\s*\d)", r"\\$", text)
    for pattern, replacement in BEFORE_WORDS:
        text = re.sub(pattern, replacement, text)
    text = mark_words(text)
    for pattern, replacement in AFTER_WORDS:
        text = re.sub(pattern, replacement, text)
    if not re.search(r"[(\[]|\\\{", text):  # 1,000x; but (1,100) is a pair
        text = re.sub(r"(?<![\d.,_^])\d{1,3}(?:,\d{3})+(?!\d)", lambda m: m[0].replace(",", ""), text)
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text):  # \cos 36^\circ
        text = ANGLE.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    return re.sub(r"\s+", " ", text).strip()


# ------------------------------------------------------------------------------------------------
# Equal by form


class NeedsAlgebra(Exception):
    """The form of two answers does not decide whether they are equal."""


@functools.lru_cache(1 << 16)
def as_fraction(text):
    r"""An integer, a decimal or a fraction, exactly, else None: -7 4.5\times10^{33} -\frac{1}{2}"""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    text = re.sub(r"\\(?:times|cdot)10\^\{?([+-]?\d+)\}?$", r"e\1", text)
    text = re.sub(r"^([+-]?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    try:
        return Fraction(text) if re.fullmatch(r"[+-]?[\d./]+([eE][+-]?\d{1,3})?", text) else None
    except (ValueError, ZeroDivisionError):
        return None


def split(text, marks):
    """The parts of a text between the matches of `marks` that stand in no bracket; [] where one closes too many."""
    parts, start, depth = [], 0, 0
    brackets = r"(\\[{}]|\\[lr]angle|\\(?:begin|end)\{\w*\}|[()\[\]{}])"
    for match in re.finditer(f"{brackets}|{marks}", text):
        if match[1]:
            depth += 1 if match[1] in ("(", "[", "{", r"\{", r"\langle") or "begin" in match[1] else -1
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
        if depth < 0:
            return []
    return [*parts, text[start:].strip()]


COMMA = r"(?:[,;]|\\text\{(?:and|or)\}|\\\\)(?:\s*\\text\{(?:and|or)\})?"


def items(text):
    r"""A list -> (its brackets, its parts), a matrix -> (its shape, its cells); all else is one part in no brackets.

    \{1, 2\} is a set, whose brackets are "{". Lists without brackets have "", and 1 \pm 2 is one of them."""
    kind, matrix = "", re.fullmatch(r"\\begin\{([pb]?)matrix\}(.*?)(?:\\\\\s*)*\\end\{\1matrix\}", text)
    if matrix:
        rows = [split(row, "&") for row in split(matrix[2], r"\\\\")]
        return f"{len(rows)}x{len(rows[0])}", [cell for row in rows for cell in row]
    bracket = re.fullmatch(r"(\\\{|\\langle|[(\[])(.*)(\\\}|\\rangle|[)\]])", text)
    if bracket and (inside := split(bracket[2], COMMA)):
        if bracket[1] == r"\{" and not re.search(r"\\mid|:|\|", bracket[2]):
            kind, text = "{", bracket[2]
        elif len(inside) > 1:
            return ("[" if bracket[1] == "[" else "(") + ("]" if bracket[3] == "]" else ")"), inside
    parts = [part for part in split(text, COMMA) if part] or [text]
    names = [part.partition("=")[0].strip() for part in parts if "=" in part]
    if len(parts) > 1 and (len(names) == 1 and "=" in parts[0] or len(names) == len(parts) and len(set(names)) == 1):
        parts = [part.rpartition("=")[2].strip() or part for part in parts]  # x = 2, 3 and x = 2, x = 3
    expanded = []
    for part in parts:
        left, sign, right = part.partition(r"\pm")
        expanded += [f"{left}+{right}", f"{left}-{right}"] if sign else [part]
    return kind, expanded


def same_lists(a, b, algebra):
    """Tuples, intervals and matrices part by part; sets and lists without brackets in any order."""
    (kind_a, a), (kind_b, b) = a, b
    ordered = {kind_a, kind_b} - {"", "{"}
    if len(ordered) == 2 and ordered not in ({"()", f"{len(a)}x1"}, {"()", f"1x{len(a)}"}):  # [1,2] is not (1,2)
        return False
    if ordered and "{" in (kind_a, kind_b):  # (1,2) is not \{1,2\}
        return False
    if not ordered and 1 in (len(a), len(b)):  # \frac{1}{2}, 0.5 is one number
        return all(same(x, y, algebra) for x in a for y in b)
    if len(a) != len(b) or ordered:
        return len(a) == len(b) and all(same(x, y, algebra) for x, y in zip(a, b))
    left = list(b)
    for x in a:
        match = x if x in left else next((y for y in left if same(x, y, algebra)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def truths(text):
    r"""A truth assignment, `A: knight, \text{B is a knave}` -> {"A": "knight", "B": "knave"}, else None."""
    plain = re.sub(r"\\text\{(\w+)\}", r" \1 ", text).lower()
    if "knight" not in plain and "knave" not in plain:
        return None
    found = re.findall(r"(\w+)\s*[:=]?\s*\b(knight|knave)\b", plain)
    rest = re.sub(r"(\w+)\s*[:=]?\s*\b(knight|knave)\b|\band\b|[\s,;.&\\]", "", plain)
    return dict(found) if found and set(found) == set(dict(found).items()) and not rest else None


def choice(text):
    r"""A multiple choice, `C`, `(C)`, `C.`, `(C) 12`, `C: 12` -> its letter and the text behind it, else None."""
    match = re.fullmatch(r"(?:\(?([A-J])\)?|\(([A-J])\)\s*([^-+*/^=,;<>(].*)|([A-J])[).:]\s*(.*))", text)
    rest = match and (match[3] or match[5] or "")
    if match is None or re.search(r"^\\text\{(?:and|or)\}|(?<![A-Za-z])[A-J][).:]", rest):  # A: 5, B: 6
        return None
    return match[1] or match[2] or match[4], rest


NAME = r"(?:[A-Za-z]|\\(?:vec|overrightarrow)\{\w+\}|\\text\{\w+\}|\\[a-zA-Z]+)+'?(?:_\{[^{}]*\}|_\w)?(?:\([^()]*\))?"
NAME = rf"{NAME}|\({NAME}(?:,{NAME})+\)"  # x, f(x), (x,y)


def assignment(text):
    r"""`x = 5`, `5 = x`, `x \in 5` -> ("x", "5"); `2 + 3 = 5` -> ("", "5"), no name; others -> (None, text)."""
    parts = split(text, r"(?<![<>!\\])=|\\(?:in|to)(?![a-z])")
    if len(parts) < 2 or not all(parts) or re.search(r"<|>|\\[lgn]eq", text):
        return None, text
    names = [part for part in parts if re.fullmatch(NAME, part.replace(" ", ""))]
    values = [part for part in parts if part not in names] or parts[1:]
    if names:
        return names[0].replace(" ", ""), values[-1]
    unknown = any(re.search(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", part) for part in parts)
    return (None, text) if unknown else ("", parts[-1])


WORD = re.compile(r"(/?)\s*(?<!_)(?<!_\{)\\text\{([^{}]*)\}(?:\s*\^\s*\{?(-?\d)\}?)?")


def quantities(text):
    r"""5\text{km}/\text{h}^2 -> [("5", [("", "km", ""), ("/", "h", "2")])], pieces and the words behind each."""
    found, end = [], 0
    for match in WORD.finditer(text):
        if (piece := text[end : match.start()].strip()) or not found:
            found.append((piece, []))
        found[-1][1].append(match.groups(""))
        end = match.end()
    return [*found, (text[end:].strip(), [])] if text[end:].strip() else found


def measure(words):
    """The unit that the words begin with -> (its dimension, its size, the other words); ([], 1, words) without one."""
    dimension, size = {}, Fraction(1)
    for i, (slash, name, power) in enumerate(words):
        if name not in UNITS or (i and not slash and not power.startswith("-")):
            return sorted(dimension.items()), size, words[i:]
        exponent = int(power or 1) * (-1 if slash else 1)
        dimension[UNITS[name][0]] = dimension.get(UNITS[name][0], 0) + exponent
        size *= UNITS[name][1] ** exponent
    return sorted(dimension.items()), size, []


def amount(text):
    """`1.5 hours`, `5 feet 6 inches` -> (its dimension, its exact size, of how many numbers), else None."""
    found = [(as_fraction(piece), *measure(words)) for piece, words in quantities(re.sub(COMMA, " ", text))]
    sizes = [size for _, _, size, _ in found]
    if any(n is None or not d or d != found[0][1] or rest for n, d, _, rest in found):
        return None
    if not found or sorted(set(sizes), reverse=True) != sizes:  # 5 m, 6 m are two quantities
        return None
    return found[0][1], sum(n * size for n, _, size, _ in found), len(found)


def same_quantities(a, b, algebra):
    """Mathematics with words behind it, as `quantities` gives it. A left out word is forgiven, a contradiction not."""
    if len(a) != len(b):  # increase 10 and 10 increase
        a, b = ([(" ".join(p for p, _ in found).strip(), [w for _, ws in found for w in ws])] for found in (a, b))
    for (x, words_x), (y, words_y) in zip(a, b):
        if not (x and y):
            if (x, words_x) != (y, words_y):
                return False
            continue
        (kind_x, size_x, rest_x), (kind_y, size_y, rest_y) = measure(words_x), measure(words_y)
        if kind_x and kind_y:  # 5 km is not 5 m, and 10 km north is not 10 km south
            if (kind_x, size_x) != (kind_y, size_y):
                return False
            words_x, words_y = rest_x, rest_y
        extra = set(words_x) ^ set(words_y)
        contained = set(words_x) <= set(words_y) or set(words_y) <= set(words_x)
        if not contained or DECISIVE & {name for _, name, _ in extra}:
            return False
        m, n = as_fraction(x), as_fraction(y)
        percent = [("", "percent", "") in words for words in (words_x, words_y)]
        if m is not None and n is not None and m * (1 if percent[0] else 100) == n * (1 if percent[1] else 100):
            continue  # 50% is 0.5
        if not same(x, y, algebra):  # 50% is 50
            return False
    return True


def bare(text):
    """{5} and (5) without their brackets."""
    while (match := re.fullmatch(r"\{(.*)\}|\(([^,]*)\)", text)) and split(match[1] or match[2] or "", ","):
        text = (match[1] or match[2] or "").strip()
    return text


def same(a, b, algebra=None):
    """Do two answers in the one spelling mean the same? NeedsAlgebra where that is needed and not given."""
    a, b = bare(a), bare(b)
    m, n = as_fraction(a), as_fraction(b)
    if m is not None and n is not None:
        return m == n
    if len({re.sub(r"\\text\{(\w)\}|\s", r"\1", text) for text in (a, b)}) == 1:  # 5 m and 5m too
        return True
    based = [re.fullmatch(r"([^\W_]+)_\{?(\d+)\}?|(\d+)", text) for text in (a, b)]
    if all(based):  # 52_8 is not 52_9
        return len({x[1] or x[3] for x in based}) == 1 and len({x[2] for x in based} - {None}) < 2
    x, y = truths(a), truths(b)
    if x or y:
        return x == y
    x, y = (re.sub(r"\\text\{(\w+)\}|\s", r"\1", text) for text in (a, b))
    listed = re.search(r"\\text\{(?:and|or)\}", a + b)
    if not listed and min(len(x), len(y)) > 1 and x.isalpha() and y.isalpha():  # HHT is not THH, but xy is yx
        product = "\\" not in a + b and (a + b).islower()
        return x.lower() == y.lower() or (product and sorted(x) == sorted(y))
    x, y = choice(a), choice(b)
    if x and y:  # C and (C) 12
        return x[0] == y[0] and (not x[1] or not y[1] or same(x[1], y[1], algebra))
    if (x or y) and (x or y)[1]:  # (C) 12 and 12
        return same(x[1] if x else a, y[1] if y else b, algebra)
    x, y = items(a), items(b)
    for text, (_, letters) in ((a, y), (b, x)):  # AC and A, C
        if re.fullmatch(r"[A-J]{2,}", text) and len(letters) > 1 and all(map(choice, letters)):
            found = [choice(letter)[0] for letter in letters]
            return list(text) in (found, sorted(found))
    sizes = amount(a), amount(b)
    if all(sizes):
        return sizes[0][:2] == sizes[1][:2]
    if any(size and size[2] > 1 for size in sizes):  # 3 hours 30 minutes is not 3
        return False
    return same_structure(a, b, x, y, algebra)


def same_structure(a, b, x, y, algebra):
    """The rest of `same`, with what `items` says about the two: lists, assignments, words, and else algebra."""
    relations = [re.search(r"<|>|\\(?:leq|geq|neq)", text) for text in (a, b)]
    joints = [set(re.findall(r"\\text\{(and|or)\}", text)) for text in (a, b)]
    if all(relations) and all(joints) and joints[0] != joints[1]:  # x < 1 or x > 2 is not x < 1 and x > 2
        return False
    lists = [len(parts) > 1 or kind == "{" for kind, parts in (x, y)]
    if not all(lists):
        (name, left), (other, right) = ((None, t) if is_list else assignment(t) for t, is_list in zip((a, b), lists))
        if None not in (name, other):
            kinds = {"\\text" in name, "\\text" in other}
            if name == other or "" in (name, other) or (len(kinds) == 2 and 1 in (len(name), len(other))):  # A, area
                return same(left, right, algebra)
            if None not in (as_fraction(left), as_fraction(right)):  # x = 5 and y = 5
                return False
        elif (name is None) != (other is None) and "=" not in (left if name is None else right):  # x = 5 and 5
            return same(left, right, algebra)
    ratios = [split(text, ":") for text in (a, b)]
    if max(map(len, ratios)) > 2:  # 1:2:3 is 2:4:6
        first, second = ([as_fraction(part) for part in parts] for parts in ratios)
        if len(first) == len(second) and None not in first + second and first[0] and second[0]:
            return [x / first[0] for x in first] == [y / second[0] for y in second]
        return len(first) == len(second) and all(same(x, y, algebra) for x, y in zip(*ratios))
    sets = any(relations) or re.search(r"\\cup|\\setminus|\\mid|\\pmod", a + b)
    if all(lists) and not all(relations) or any(lists) and not sets:
        return same_lists(x, y, algebra)
    pieces = quantities(a), quantities(b)
    if any(words for found in pieces for _, words in found) and not any(lists):
        return same_quantities(*pieces, algebra)
    x, y = (("", split(text, r"\\cup|\\text\{or\}")) for text in (a, b))
    if len(x[1]) == len(y[1]) > 1 and same_lists(x, y, algebra):
        return True
    if algebra is None:
        raise NeedsAlgebra
    return algebra(a, b)


@functools.lru_cache(1 << 18)
def by_form(gold, answer, algebra=None):
    """True or False where the form of two answers decides whether they are equal, None where algebra must."""
    try:
        return gold == answer or (max(len(gold), len(answer)) <= 2000 and same(gold, answer, algebra))
    except (NeedsAlgebra, RecursionError) as e:  # too many brackets in brackets mean nothing
        return None if isinstance(e, NeedsAlgebra) else False


# ------------------------------------------------------------------------------------------------
# Equal by algebra

MISREAD = (  # these are names here, not numbers, functions and derivatives
    (r"(?<![A-Za-z\\])E(?![a-zA-Z])", r"\\Xi "), (r"\\gamma(?![a-z])", r"\\Upsilon "),
    (r"\\frac\{\s*d\s*(\\?[A-Za-z]+)\s*\}\{\s*d\s*(\\?[A-Za-z]+)\s*\}", r"\\Theta_{\1,\2}"),
)  # fmt: skip


def is_zero(constant):
    """Rational numbers are zero exactly; others if 600 digits, beyond those that cancel, show nothing else."""
    import sympy  # slow to import, and needed in the processes alone, here and below

    constant = constant.doit()
    if constant.is_Rational or constant.has(sympy.nan, sympy.zoo, sympy.oo):
        return constant == 0
    try:
        return constant.evalf(5, maxn=600, strict=True) == 0
    except sympy.core.evalf.PrecisionExhausted:
        return True


def same_expressions(x, y):
    """Constants exactly; with unknowns, by their values at three rational points, one of them negative."""
    import sympy

    difference, pointless = x - y, (sympy.Derivative, sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit)
    if difference.free_symbols and difference.has(*pointless):
        return None
    at = {s: 1 + sympy.Rational(zlib.crc32(s.name.encode()), 2**32) for s in difference.free_symbols}
    for sign in (2, 3, -2) if at else (1,):
        if not is_zero(difference.subs({symbol: sign * value for symbol, value in at.items()})):
            return False
    return True


def load_algebra():
    """sympy's and math-verify's part, imported only where it runs -> a function that says if two texts are equal."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex
    from sympy.core.function import AppliedUndef

    plain = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    with_case = ConversionConfig(lowercase_symbols=False)

    @functools.lru_cache(4096)
    def read(text):
        """A text as an object of sympy, or None; several relations become the set of their solutions."""
        parts = split(text, COMMA)
        if len(parts) > 1 and re.search(r"<|>|\\(?:leq|geq|neq)", text):
            join = sympy.Intersection if r"\text{and}" in text else sympy.Union
            return join(*(read(part).as_set() for part in parts))
        for pattern, replacement in MISREAD:
            text = re.sub(pattern, replacement, text)
        real = not should_treat_as_complex(text)
        found = latex2sympy(text, is_real=real, normalization_config=plain, conversion_config=with_case)
        if isinstance(found, sympy.Expr):
            exact = {x: sympy.Rational(str(x)) for x in found.atoms(sympy.Float)}
            exact |= {x: sympy.Symbol(str(x)) for x in found.atoms(AppliedUndef)}
            exact |= {x: sympy.I for x in found.free_symbols if x.name == "i"}
            found = found.xreplace(exact)
        return found

    def equal(a, b):
        try:
            x, y = read(a), read(b)
            expressions = [isinstance(z, sympy.Expr) for z in (x, y)]
            found = None
            if all(expressions):
                found = x == y or same_expressions(x, y)
            elif any(expressions) and any(isinstance(z, sympy.core.relational.Relational) for z in (x, y)):
                found = False  # 3x + 2 = 5 is not 5
        except Exception:  # the parser and sympy raise many kinds
            return False
        if found is not None:
            return bool(found)
        return any(verify(*z, timeout_seconds=None, allow_set_relation_comp=True) for z in ((x, y), (y, x)))

    return equal


# ------------------------------------------------------------------------------------------------
# Processes that can be killed


class Grader:
    """Says whether two answers mean the same: by their form where that decides it, else by algebra.

    Algebra runs in processes, one a core, which the system kills after `limit` seconds: `10^{10^{10}}` has no
    end. Such an answer is not equal; `stuck` holds the pair. `cache` is a file that each grade is added to.
    """

    def __init__(self, limit=5.0, cache=None):
        if not 0 < limit <= 86400:
            raise InputError(f"--time-limit {limit:g}: must be above 0 seconds, and a day at most")
        self.limit, self.known, self.stuck, self.workers, self.file = limit, {}, set(), [], None
        if cache is not None:
            self.open(Path(cache))

    def open(self, cache):
        from importlib.metadata import version

        header = ["math-verify", version("math-verify"), "seconds", self.limit, "rules", RULES]
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(cache, "a+b", buffering=0)  # a line is one write: whole or not at all
            self.file.seek(0)
            content = self.file.read()
            if content and not content.startswith(b'["math-verify"'):
                raise ValueError("not made by evaluate.py")
            whole = content[: content.rfind(b"\n") + 1]
            first, *lines = map(json.loads, whole.splitlines() or ["[]"])
            self.file.truncate(len(whole) if first == header else 0)  # grades of another version or limit go
            self.known = {(gold, answer): grade for gold, answer, grade in lines} if first == header else {}
            if not set(self.known.values()) <= {True, False, None}:
                raise ValueError("damaged")
            if first != header:
                self.file.write((json.dumps(header) + "\n").encode())
        except (OSError, TypeError, ValueError) as e:
            raise InputError(f"{cache}: cannot be used for grades ({e}); delete it or choose another --out")

    def equal(self, gold, answer):
        """Is `answer` right, given the right answer `gold`? None is never right."""
        if gold is None or answer is None:
            return False
        pair = normalise(gold), normalise(answer)
        if (decided := by_form(*pair)) is not None:
            return decided
        if pair not in self.known:
            self.grade([(gold, answer)])
        if self.known[pair] is None:
            self.stuck.add(pair)
        return bool(self.known[pair])

    def grade(self, pairs, what=None):
        """Ask algebra about all `pairs` of (gold, answer) that are not known, in parallel; `what`: of a bar."""
        pairs = {(normalise(gold), normalise(answer)) for gold, answer in pairs}
        todo = sorted(pair for pair in pairs if pair not in self.known and by_form(*pair) is None)
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            answers = pool.map(self.ask, todo)
            list(tqdm(answers, f"grade {what}", len(todo), unit=" comparisons", disable=what is None or not todo))
        finally:
            pool.shutdown(cancel_futures=True)

    def ask(self, pair):
        """One pair to a process -> its grade goes to `known`, None where it was too slow or crashed."""
        while True:
            worker = self.workers.pop() if self.workers else self.start()
            try:
                worker.stdin.write(json.dumps(pair).encode() + b"\n")
                break
            except BrokenPipeError:  # it died before it saw this pair
                self.stop(worker)
        grade = self.known[pair] = {b"1\n": True, b"0\n": False}.get(worker.stdout.readline())
        self.stop(worker) if grade is None else self.workers.append(worker)
        if self.file:
            self.file.write((json.dumps([*pair, grade]) + "\n").encode())

    def start(self):
        command, pipe = [sys.executable, __file__, "--worker", str(self.limit)], subprocess.PIPE
        # In a session of its own, so that Ctrl-C does not make each print a traceback; they end with stdin.
        worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True)
        if worker.stdout.readline() != b"ready\n":
            self.stop(worker)
            raise RuntimeError("a grading process did not start; is math-verify installed?")
        return worker

    def stop(self, worker):
        worker.kill()
        worker.communicate()  # waits, and closes its pipes

    def close(self):
        while self.workers:
            self.stop(self.workers.pop())
        if self.file:
            self.file.close()


def work(limit):
    """The other end of Grader.ask: reads a line [gold, answer], writes 1 or 0."""
    import logging
    import resource

    logging.disable()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads the reply any more: end in silence
    try:  # an expression that wants the whole memory gets a MemoryError, where the system allows a limit
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    except (ValueError, OSError):
        pass
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing else that is printed may look like a reply
    equal = load_algebra()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # Nobody handles this alarm, so the system ends the process, also in C code, where no handler runs.
        signal.setitimer(signal.ITIMER_REAL, limit)
        grade = by_form(*json.loads(line), equal)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(grade), file=replies, flush=True)


def main():
    if sys.argv[1:2] == ["--worker"]:
        return work(float(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help='JSONL with "gold", and "text" or "answer", in each line')
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds that algebra may take for an answer")
    args = parser.parse_args()
    rows = read_jsonl(args.file, keys=("gold",))
    answers = [extract_answer(strip_thinking(str(row.get("text")))) for row in rows]
    pairs = [(row["gold"], row.get("answer", answer)) for row, answer in zip(rows, answers)]
    grader = Grader(args.time_limit)
    grader.grade((gold, answer) for gold, answer in pairs if None not in (gold, answer))
    grades = [grader.equal(*pair) for pair in pairs]
    grader.close()
    for grade, pair in zip(grades, pairs):
        print("right" if grade else "wrong", *pair, sep="\t")
    print(f"{sum(grades)} of {len(grades)} are right")


if __name__ == "__main__":
    command_line(main)
