"""grade.py: answers out of texts, and which of them mean the same."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import evaluate
import grade as g
from files import InputError, read_jsonl


@pytest.fixture(scope="module")
def grader():
    grader = g.Grader(limit=3.0)
    yield grader
    grader.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{27}", "27"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{x : \{1\}\right\}} and a } after", r"\left\{x : \{1\}\right\}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"an earlier \boxed{3}, cut off: \boxed{\frac{1}{2", None),
        (r"\boxed{}", None),
        ("no box, the answer is 5", None),
        (r"<think>maybe \boxed{3}</think> \boxed{4}", "4"),
        (r"<think>maybe \boxed{3}</think> hmm", None),
        (r"<think>cut off \boxed{3}", None),
        (r"template opened it \boxed{3}</think>\boxed{4}", "4"),
        (r"a</think> \boxed{3} <think>b</think>", "3"),
        (r"\boxed{1} <think>a</think> \boxed{2}</think> \boxed{3}", "3"),
        (r"\boxed{3} <think>a <think>b</think>", "3"),
        (r"so $\boxed 7$.", "7"),
        (r"so \boxed {7}.", "7"),
        (r"so $\boxed-7$", "-7"),
        (r"so \fbox{7}", "7"),
        (r"$x = \boxed{2}$ or $x = \boxed{3}$", "2, 3"),
        (r"\boxed{2}, \boxed{3}, and \boxed{5}", "2, 3, 5"),
        (r"\(\boxed{2}\) and \(y = \boxed{3}\)", "2, 3"),
        (r"$\boxed{2} \text{ or } \boxed{3}$", "2, 3"),
        (r"we get \boxed{2}. Then, \boxed{3}", "3"),
        (r"the side is \boxed{2}, so the area is \boxed{4}", "4"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"\boxed{2}，\boxed{3}", "2, 3"),
        (r"$f(1)=\boxed{3}$ and $f(2)=\boxed{4}$", "3, 4"),
        (r"so $\boxed\frac{1}{2}$", r"\frac{1}{2}"),
    ],
)
def test_answers_are_found(text, answer):
    """Guards against: falling back to an earlier box or to a thought, and braces counted wrongly."""
    assert g.answer_of({"text": text}) == answer


def test_thoughts_take_little_time():
    """Guards against: a time that grows with the square of the number of thoughts that were never closed."""
    started = time.time()
    assert g.strip_thinking("x" + "<think> hmm " * 100_000) == "x"
    assert g.strip_thinking("x" + "<think> hmm </think>y" * 100_000).startswith("xy")
    assert time.time() - started < 2


def test_thought_opened_by_the_template():
    """Guards against: a thought that the prompt opened and the length limit cut off, read as an answer."""
    assert g.answer_of({"text": r"so \boxed{3}"}, prompt="...assistant\n<think>\n") is None
    assert g.answer_of({"text": r"so</think> \boxed{3}"}, prompt="...assistant\n<think>\n") == "3"


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac{1}{2}", "1/2", True),
        ("-0.5", r"-\frac{1}{2}", True),
        ("27.0", "27", True),
        ("1,000", "1000", True),
        ("10000", "10001", False),
        ("2", "-2", False),
        (r"\frac{1}{2}", "2", False),
        (r"\sqrt{2}", r"2^{1/2}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        (r"x^2+2x+1", r"(x+1)^2", True),
        (r"x^2+2x+1", r"(x-1)^2", False),
        (r"\frac{x^2-1}{x-1}", "x+1", True),
        ("3x+2", "17", False),
        ("abc", r"\text{abc}", True),  # a product of letters and a word
        (r"1+\sum_{k=1}^{n} \frac1k", r"\sum_{k=1}^{n} \frac1k+1", True),  # has no size for an n between integers
        (r"\text{Evelyn}", "Evelyn", True),
        (r"\text{Evelyn}", "Carla", False),
        ("5", None, False),
        ("1/0", "0", False),
        (r"\frac12", "0.5", True),
        (".0000672", ".0000673", False),  # equal to math-verify, which rounds to 6 places
        ("4.5e33", r"4.5 \times 10^{33}", True),
        ("4.5e33", "4.6e33", False),
        (r"1{,}000", "1000", True),
        ("52_8", "52_9", False),  # math-verify reads both as 52
        ("52_8", "52", True),
        (r"15\mbox{ cm}^2", r"15\mbox{ cm}^3", False),
        ("5", r"5 \text{ cm}", True),
        ("5", r"5\mathrm{~m/s}", True),
        (r"90^\circ", "90", True),
        ("1,-2", "-2, 1", True),
        ("1,-2", "1, 2", False),
        ("$1$, $2$", r"2 \text{ and } 1", True),  # a list as OlympiadBench has it
        (r"\frac{1}{2}, 3", "3, 0.5", True),
        ("3, 5, 7", "3, 5, 8", False),
        ("(1,2)", "(2,1)", False),
        ("x=5", "5", True),
        ("5", "x=5", True),
        ("x=5", "y=5", False),
        ("[0,1)", "[0,1]", False),
        (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{3}", False),  # E is not 2.718...
        (r"\frac{d x}{d t}=k x-a", r"-\frac{d x}{d t}=k x-a", False),
        (r"m(\gamma^{2}-1) \theta", r"m(\gamma^{2}-2) \theta", False),  # gamma is not a function
        ("C", r"\text{(C)}", True),
        ("(C)", "C.", True),
        ("C", "(C) 12", True),
        ("C", "D", False),
        ("A: knight, B: knave", r"\text{B is a knave and A is a knight}", True),
        ("A: knight, B: knave", r"\text{A}: \text{Knight},\ \text{B}: \text{KNAVE}", True),
        ("A: knight, B: knave", "A: knight, B: knight", False),
        ("A: knight, B: knave", "A: knight", False),
        ("A: knight, B: knave", "A: knight, B: knave, C: knave", False),
        ("A: knight, B: knave", "A: knight, A: knave, B: knave", False),
        ("A: knight, B: knave", "not (A: knight, B: knave)", False),
    ],
)
def test_equal_answers(gold, answer, equal, grader):
    assert grader.equal(gold, answer) is equal


# Of each kind, pairs that mean the same (==) and pairs that nearly do (!=); in both orders.
KINDS = {
    "constants, exactly": r"""
\frac{1}{3}+\frac{1}{6} == \frac12
\sqrt{8} == 2\sqrt2
\frac{1}{\sqrt2} == \frac{\sqrt2}{2}
\cos\frac{\pi}{5} == \frac{1+\sqrt5}{4}
\ln 8 == 3\ln 2
\sqrt{3+2\sqrt2} == 1+\sqrt2
\binom{10}{3} == 120
\frac{10!}{7!} == 720
2^{10} == 1024
e^{2\pi i} == 1
0.5\sqrt{2} == \frac{\sqrt 2}{2}
\sqrt[3]{8} == 2
\log_2 8 == 3
(1+i)^2 == 2i
\frac{1}{1-i} == \frac{1+i}{2}
1-\frac{1}{2024!} == \frac{2024!-1}{2024!}
1-\frac{1}{100!} != 1
\frac{1}{3^{80}} != \frac{1}{3^{81}}
\sqrt{2}+10^{-40} != \sqrt{2}
\frac{1}{3} != 0.3333333333
\pi != 3.14159265358979
\frac{22}{7} != \pi
\sqrt{2} != 1.41421356
e^{-50} != 0
2^{100}+1 != 2^{100}
\sqrt{10^{40}+1} != 10^{20}
\frac{1}{2^{99}}x != \frac{1}{2^{98}}x
2+3i != 2-3i
\frac{1}{e^{3000}} != \frac{1}{e^{3001}}
""",
    "words": r"""
9 \text{ AM} == 9 a.m.
9 == 9\text{ AM}
5 km == 5000 m
1.5 hours == 90\text{ minutes}
\$5 == 5 dollars
\$0.50 == 50 cents
5 ft == 5 feet
10\text{ m/s} == 10 meters per second
10 cm^2 == 10\text{ square centimeters}
5 red apples == 5 apples
\text{even} == even
\text{an ellipse} == ellipse
50\% == 0.5
50\% == 50
50 percent == 50\%
12 inches == 1 foot
36\text{ km/h} == 10\text{ m/s}
5 == 5 mph
60 mph == 60 miles per hour
Yes == \text{yes}
3.5 kg == 3500 g
\frac{1}{2}\text{ hour} == 30 minutes
5 m == 5\text{ m}
5 \text{ cm} != 5\text{ m}
noon != midnight
20\% \text{ profit} != 20\% \text{ loss}
3 dollars != 3 cents
10 m^2 != 10 m^3
5\text{ m/s} != 5\text{ km/h}
5 pounds != 5 ounces
\text{even} != \text{odd}
\text{yes} != \text{no}
7 boys != 7 girls
5 seconds != 5 minutes
\text{left} != \text{right}
Monday != Tuesday
\text{not even} != \text{even}
2 hours != 2 days
90^\circ C != 90^\circ F
x\text{ positive} != x\text{ negative}
5 mL != 5 L
4 more != 4 fewer
\$3{,}000 == 3000 dollars
25,000 people == 25000
300\text{ K} == 300
7\mathrm{~N} == 7
4\text{ kg}\cdot\text{m/s} == 4
9.81\,\mathrm{m\,s^{-2}} == 9.81\text{ m/s}^2
3 million == 3,000,000
\$2.5\text{ million} == 2500000
negative 7 == -7
60 km/h == 60 kilometers per hour
2 h 30 min == 150 min
4 PM == 4:00 PM
5\text{元} == 5
3 厘米 == 3 cm
20°C == 20 degrees Celsius
6 \text{ (units)} == 6
3 million != 3
at least 4 != 4
4 dozen != 4
\text{length}=5, \text{width}=3 != \text{length}=3, \text{width}=5
\text{perimeter}=20 != \text{area}=20
half of 8 != 8
""",
    "compound quantities": r"""
5 feet 6 inches == 66 inches
2 hours 30 minutes == 2.5 hours
3 dollars and 50 cents == \$3.50
1\text{ hour }30\text{ minutes} == 90 min
5\text{ ft }6\text{ in} == 5\text{ feet }6\text{ inches}
2 != 2 hours 15 minutes
5 feet 6 inches != 5 feet
2 hours 30 minutes != 2 hours 20 minutes
5 feet 6 inches != 6 feet 5 inches
1 kg 200 g != 1 kg 20 g
""",
    "letters and products": r"""
xy == yx
2ab == 2ba
abc == cab
HHT == \text{HHT}
\angle ABC == \angle CBA
\overline{AB} == \overline{BA}
BAC == \mathrm{BAC}
a b == ab
\triangle ABC == \triangle BCA
3xy^2 == 3 y^2 x
HTH != HHT
ACB != BCA
DBCA != ABCD
\angle ABC != \angle BAC
xy != xz
2ab != 2ac
\text{listen} != \text{silent}
east != seat
WXYZ != ZYXW
\frac{R}{r} != 1
\triangle ABC \sim \triangle DEF != \triangle ABC \sim \triangle DFE
Ann and Bob == Bob and Ann
x_1x_2 == x_2x_1
x_1x_2 != x_1x_3
""",
    "structure": r"""
(1,2) == ( 1 , 2 )
\{1,2\} == \{2,1\}
1, 2 == \{2, 1\}
1 and 2 == 2, 1
x=1 or x=2 == 1, 2
x = 1, 2 == x=2 \text{ or } x=1
(0,1)\cup(2,3) == (2,3)\cup(0,1)
1\pm\sqrt2 == 1-\sqrt2, 1+\sqrt2
\pm 3 == 3, -3
x<1\text{ or }x>2 == x>2\text{ or }x<1
x>3 == 3<x
[0,2] == 0\leq x\leq 2
x\in[0,2] == [0,2]
\begin{pmatrix}1\\2\end{pmatrix} == \begin{bmatrix}1\\2\end{bmatrix}
(1,2) == \langle 1,2\rangle
(1,2), (3,4) == (3,4) and (1,2)
\left(\frac12, 2\right) == (0.5,2)
\{5\} == 5
y=2x+1 == 2x+1
(-\infty,\infty) == \mathbb{R}
\text{no solution} == \emptyset
\begin{pmatrix} 1/2 & 0 \\ 0 & 1\end{pmatrix} == \begin{pmatrix} 0.5 & 0 \\ 0 & 1\end{pmatrix}
x=2, y=3 == y=3, x=2
(-\infty,1)\cup(2,\infty) == x<1\text{ or }x>2
3:4 == 3 : 4
f(x)=x+1 == x+1
2x+3y=6 == 3y+2x=6
(1,2) != (2,1)
[1,2] != (1,2)
[1,2) != (1,2]
(1,2) != \{2,1\}
x<1\text{ or }x>2 != x<1\text{ and }x>2
1, 2 != 1, 2, 3
(0,1)\cup(2,3) != (0,1)\cup[2,3)
\begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}2\\1\end{pmatrix}
x>3 != x<3
x\geq3 != x>3
\pm 3 != 3
x=5 != y=5
(1,2), (3,4) != (1,3), (2,4)
\{1,2\} != \{1,3\}
\begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1&3\\2&4\end{pmatrix}
x=2, y=3 != x=3, y=2
5 != 3x+2=5
[0,2] != 0<x\leq 2
3:4 != 4:3
(1,2,3) != (1,2)
\emptyset != 0
(A), (C) == A, C
A and C == (C) and (A)
(x,y)=(3,4) == (3,4)
100, 200 == 200, 100
\{x \mid 3\leq x\leq 4\} == [3,4]
1:2:3 == 2:4:6
(0,1) U (2,3) == (2,3)\cup(0,1)
\left(\begin{array}{cc}1&2\\3&4\end{array}\right) == \begin{pmatrix}1&2\\3&4\end{pmatrix}
no solution == \emptyset
x=1, x=2 == 1, 2
(A), (C) != (A), (B)
(A) and (C) != A
A: 5, B: 6 != A: 5, B: 7
100, 200 != 100200
1:2:3 != 1:3:2
(x,y)=(3,4) != (4,3)
no solution != no
""",
    "one spelling": r"""
5 == ５
-3 == −3
\frac{3}{4} == ¾
x^2+1 == x²+1
2\sqrt3 == 2√3
(-\infty,2) == (−∞,2)
45^\circ == 45º
45 == 45 degrees
3\pi == 3π
6x == 6×x
x\leq3 == x≤3
7 == \textbf{7}
7 == {\color{blue} 7}
7 == \textcolor{red}{7}
7 == __7__
7 == `7`
7 == 7;
7 == 7.
7 == \underline{7}
1234567 == 1 234 567
1234567 == 1,234,567
1234567 == 1\,234\,567
\frac{1}{3} == 0.333...
\frac{1}{3} == 0.\dot{3}
\frac{7}{3} == 2\frac{1}{3}
\frac{7}{3} == 2⅓
\frac{7}{3} == 2 1/3
\frac{5\pi}{6} == 5pi/6
\sqrt{5} == sqrt(5)
e^{3} == exp(3)
\frac{1}{2} == \sin 30^\circ
\frac{1}{2} == \cos(60°)
3 == 3rd
21 == 21^{\text{st}}
x=7 == 7=x
7 == \text{There are 7 apples}
7 == \text{seven}
B == (B) 17
B == \text{B.}
B == \textbf{(B) }\frac12
A, B == B and A
A, B == \text{A, B}
\frac{\sqrt3}{2} == \frac{\sqrt 3}2
\frac{7}{2} == \tfrac72
10 == \mathbf{10}
\theta == θ
x_1 == x₁
\sqrt{x+1} == sqrt(x+1)
2^{10} == 2**10
2x == 2*x
\frac{x}{y} == x/y
25 == \text{Area} = 25
25 == \approx 25
5 == 5 个
100 == 100\%
x^{10} == x¹⁰
1/2 == .5
4.5\times10^{33} == 4.5·10³³
5 == \(5\)
5 == \[5\]
5 != -5
\frac{3}{4} != ¼
x^2 != x³
2\sqrt3 != 3√2
45^\circ != 54°
3\pi != 3
1234567 != 1 234 576
\frac{1}{3} != 0.33
\frac{1}{3} != 0.\overline{34}
\frac{7}{3} != 2\frac{2}{3}
\frac{7}{3} != 21/3
\frac{5\pi}{6} != pi/6
e^{3} != exp(2)
\frac{1}{2} != \sin 30
\frac12 != \cos 61^\circ
3 != 4th
B != (C) 17
A, B != A, C
A, B != A
x_1 != x₂
7 != \text{There are 8 apples}
2^{10} != 2*10
x=7 != 8=x
7 != \text{six}
4.5\times10^{33} != 4.5·10³²
10 != \mathbf{1}0 1
AC != A, B
1,024 == 2^{10}
1,000x == 1000x
\operatorname{arctan}(2) == \arctan 2
\sqrt[3]{2} == ∛2
0.1212... == \frac{4}{33}
7 == ***7***
7 == “7”
2^{n(n+1)} == 2^(n(n+1))
12 == The value of x is 12
12 == x := 12
{5 \choose 2} == 10
1,024 != 2^{11}
1.41421 != 1.4142
""",
}
PAIRS = [(kind, *re.split(" ([!=]=) ", line)) for kind, text in KINDS.items() for line in text.strip().split("\n")]


@pytest.fixture(scope="module")
def algebra():
    return g.load_algebra()


@pytest.mark.parametrize(("kind", "gold", "sign", "answer"), PAIRS)
def test_kinds_of_answers(kind, gold, sign, answer, algebra):
    """Guards against: a wrong answer that counts as right, and a right one that counts as wrong, in either order."""
    a, b = g.normalise(gold), g.normalise(answer)
    assert [g.same(a, b, algebra), g.same(b, a, algebra)] == [sign == "=="] * 2, (a, b)


def test_signs_without_width_go(algebra):
    """Guards against: a zero-width space or a soft hyphen, which nobody sees and which changed the grade."""
    for sign in "\u200b\u200d\u2060\ufeff\u00ad":
        assert g.same(g.normalise(f"{sign}5"), g.normalise(f"5{sign}")) is True
    for space in "\u00a0\u2009\u202f\u3000":
        assert g.same(g.normalise(f"10{space}000"), "10000") is True


def test_missing_right_answers():
    """Guards against: an answer that pandas wrote as NaN, a problem that nobody ever solves."""
    assert [g.gold_answer(value) for value in (None, float("nan"), "", " ", "NaN")] == [None] * 5
    assert [g.gold_answer(value) for value in (0, 27.0, "no")] == ["0", "27.0", "no"]


def test_grading_a_file(tmp_path):
    """Guards against: the command line and the library saying different things."""
    rows = [{"gold": r"\frac12", "text": r"\boxed{0.5}"}, {"gold": "x+1", "answer": "1+x"}, {"gold": "5", "text": "-"}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, ROOT / "grade.py", tmp_path / "answers.jsonl"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split("\t")[0] for line in run.stdout.splitlines()] == ["right", "right", "wrong", "2 of 3 are right"]
    imports = subprocess.run([sys.executable, "-X", "importtime", *command[1:]], capture_output=True, text=True).stderr
    assert "tqdm" in imports and "torch" not in imports


def near_misses(answer):
    """An answer with another sign, with one other digit, with a fraction upside down."""
    if g.as_fraction(answer) != 0:
        yield answer[1:] if answer.startswith("-") else f"-{answer}"
    for digit in re.finditer(r"\d", answer):
        yield f"{answer[: digit.start()]}{(int(digit[0]) + 1) % 10}{answer[digit.end() :]}"
    fraction = re.search(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}", answer)
    if fraction and fraction[1] != fraction[2]:
        yield rf"{answer[: fraction.start()]}\frac{{{fraction[2]}}}{{{fraction[1]}}}{answer[fraction.end() :]}"


def test_grader_agrees_with_what_others_wrote(problem_files, grader):
    """MATH-500's and Minerva's own solutions and AMC's floats are right, and of their near misses none is."""
    golds = []
    for row in read_jsonl(problem_files / "math500.jsonl"):
        golds.append(row["answer"])
        assert grader.equal(row["answer"], g.extract_answer(row["solution"])), row["answer"]
    for row in read_jsonl(problem_files / "amc23.jsonl"):
        golds.append(str(row["answer"]))
        assert grader.equal(str(row["answer"]), str(int(row["answer"])))
    for row in read_jsonl(problem_files / "minerva_math.jsonl"):
        golds.append(g.extract_answer(row["solution"]))
        assert grader.equal(golds[-1], rf"$\displaystyle{{}} {golds[-1]}$".replace("{}", "").replace("frac", "dfrac"))
    assert len(golds) == 812
    pairs = [(gold, miss) for gold in golds for miss in near_misses(gold)]
    grader.grade(pairs)
    assert len(pairs) > 2500 and [pair for pair in pairs if grader.equal(*pair)] == []


HOSTILE = [r"10^{10^{10}}", "(" * 1999, r"\frac{" * 300, "x^{" * 600, r"\text{" * 300, "1," * 900 + "x", "9" * 100_000]
HOSTILE += [r"\pm 1" * 300, "A:" * 900, "1" * 2000, "1 000 " * 300, "a_1" * 600, "**a" * 600, ".12" * 600]
HOSTILE += [r"\sqrt(" * 300, "A. " * 600, r"5\text{m}" * 200]


@pytest.mark.parametrize("hostile", [*HOSTILE, "(" * 100_000, "$" * 100_000, " " * 100_000 + "."])
def test_hostile_answers_cost_their_time_limit_and_no_more(hostile, grader):
    """Guards against: one expression that keeps the algebra system, and with it the whole run, busy for ever."""
    started = time.time()
    assert grader.equal("5", hostile) is False
    assert time.time() - started < grader.limit + 5  # the start of a process included
    assert grader.equal(r"\sqrt{4}", "2") is True  # and the next answer is graded as ever


def test_stuck_answers_are_killed_counted_and_remembered(tmp_path):
    """Guards against: a stuck answer that holds up the others, is asked about again, or goes unreported."""
    grader = g.Grader(limit=1.0, cache=tmp_path / "grades.jsonl")
    pairs = [("5", r"10^{10^{10}}"), *((f"x+{i}", f"{i}+x") for i in range(20))]
    grader.grade(pairs)
    workers = list(grader.workers)
    assert [grader.equal(*pair) for pair in pairs] == [False] + [True] * 20
    assert grader.stuck == {pairs[0]}
    grader.close()
    assert all(worker.poll() is not None for worker in workers)  # none is left behind
    with open(tmp_path / "grades.jsonl", "ab") as file:
        file.write(b'["torn", "by a ki')
    again = g.Grader(limit=1.0, cache=tmp_path / "grades.jsonl")
    again.start = lambda: pytest.fail("asked again")
    assert [again.equal(*pair) for pair in pairs] == [False] + [True] * 20 and again.stuck == {pairs[0]}
    again.close()
    other = g.Grader(limit=2.0, cache=tmp_path / "grades.jsonl")  # another limit: other grades
    assert other.known == {} and len((tmp_path / "grades.jsonl").read_text().splitlines()) == 1
    other.close()
    with open(tmp_path / "grades.jsonl", "a") as file:
        file.write('["a", "b", 1e30]\n')
    with pytest.raises(InputError, match="grades.jsonl: cannot be used for grades"):
        g.Grader(limit=2.0, cache=tmp_path / "grades.jsonl")
    (tmp_path / "mine.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(InputError, match="mine.jsonl: cannot be used for grades"):
        g.Grader(cache=tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == '{"mine": 1}\n'


def test_crashing_worker_is_replaced(grader):
    """Guards against: a grade lost with a process that somebody killed while it had nothing to do."""
    assert grader.equal("x+1", "1+x") is True
    for worker in grader.workers:
        worker.kill()
        worker.wait()
    assert grader.equal("x+2", "2+x") is True and grader.equal("x+3", "3+x") is True


def test_huge_numbers_crash_no_worker(grader):
    """Guards against: an overflow from abs() of a complex nan, which ended the process with a traceback."""
    assert grader.equal("x+1", "1+x") is True
    before = {worker.pid for worker in grader.workers}
    assert grader.equal("5070365563156674", "50505015664=5050505050505050505015") is False
    assert not any("50505015664" in answer for _, answer in grader.stuck)
    assert {worker.pid for worker in grader.workers} == before


def test_answers_that_are_not_tidy_after_one_pass(grader):
    """Guards against: a pair that is tidied once more when it is asked about, and then is not found again."""
    for answer in ("x+2..", "x . .", r"\displaysty\displaystylele x"):
        assert grader.equal("x+1", answer) is False
    assert evaluate.classes("x+1", ["x+2..", "x+2.."], grader, ["x+2.."]) == [1, 1, 1]


def test_ctrl_c_does_not_reach_the_grading_processes(grader):
    """Guards against: a traceback from each of them on the terminal, above the one line of the command itself."""
    assert grader.equal("x+1", "1+x") is True
    assert grader.workers and all(os.getsid(worker.pid) == worker.pid for worker in grader.workers)


def test_missing_math_verify_is_no_wrong_answer(monkeypatch):
    """Guards against: processes that cannot start, and whose silence counts as unequal answers."""
    grader = g.Grader()
    monkeypatch.setattr(g.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="is math-verify installed"):
        grader.equal("x+1", "1+x")
    grader.close()


def test_benchmark_of_the_grader(tmp_path):
    """Guards against: a benchmark that cannot run, or whose rules make pairs that are not what they are called."""
    golds = [r"-\frac{7}{2}", "1234", r"(3, \frac{\pi}{2})", r"2\sqrt{5}", r"\text{Evelyn}", r"45^\circ", "(1,6]"]
    (tmp_path / "math500.jsonl").write_text("".join(json.dumps({"answer": gold}) + "\n" for gold in golds))
    command = [sys.executable, ROOT / "bench" / "grading.py", tmp_path, "--show"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    shares = {tuple(line.split()[:-3]): line.split()[-2] for line in lines if line.endswith("%")}
    assert len(shares) == 14 and set(shares.values()) == {"100.00%"}, lines
    assert lines[-1].startswith("0 of ")
