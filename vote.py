"""Votes of candidates, for classes of equal answers: evaluate.py and route.py count them, sample.py stops by them.

A class is a set of answers that mean the same (1/2 = 0.5). Class 0 is right, the others are wrong; -1 is a candidate
without an answer, -2 one that `sample.py --adaptive` did without: neither casts a vote.
"""

import itertools
import math

import numpy as np

from grade import as_fraction, normalise


def canonical(answer):
    """What stands for an answer and for those that are plainly equal to it: an exact number or its one spelling."""
    text = normalise(answer)
    value = as_fraction(text)
    return text if value is None else value


def distinct(answers, more=()):
    """{what stands for an answer: the answer}, of those not plainly equal; sorted, whatever order they come in."""
    found = {}
    for answer in itertools.chain(*(sorted(set(group) - {None}) for group in (answers, more))):
        found.setdefault(canonical(answer), answer)
    return found


def classes(gold, answers, grader, more=()):
    """Number the classes of equal answers: gold "1/2", ["0.5", "3", None, "3.0", "4"] -> [0, 1, -1, 1, 2].

    Class 0 is right, -1 casts no vote. Wrong answers are compared in sorted order with one member of each
    class, so that neither the order of the candidates nor an equality that is not quite transitive changes
    the outcome. Without a gold answer no class is right. `more`: answers (of refinements) that are numbered after
    these, and do not change their classes.
    """
    number, members = {}, []
    for key, answer in distinct(answers, more).items():
        if grader.equal(gold, answer):
            number[key] = 0
            continue
        equal = (i for i, m in enumerate(members, 1) if grader.equal(m, answer) or grader.equal(answer, m))
        number[key] = next(equal, len(members) + 1)
        if number[key] > len(members):
            members.append(answer)
    return [-1 if a is None else number[canonical(a)] for a in (*answers, *more)]


def class_sums(votes, weights):
    """votes [..., N] class numbers, weights [..., N] -> [..., classes], what each class gets; below 0 nothing."""
    *shape, N = votes.shape
    flat, width = votes.reshape(-1, N), max(int(votes.max()), 0) + 1
    cast = (flat >= 0).nonzero()  # rows, and which candidates of them
    sums = np.bincount(cast[0] * width + flat[cast], weights.reshape(-1, N)[cast], minlength=len(flat) * width)
    return sums.reshape(*shape, width)


def vote(votes, weights=None):
    """The credit of voting: votes [..., N] are class numbers -> [...], 1 where class 0 (right) gets the most.

    With several classes at the top each gets its share, which is what a coin toss would get on average.
    """
    sums = class_sums(votes, np.ones(votes.shape) if weights is None else weights)
    most = sums.max(-1, keepdims=True)
    top = (sums >= most * (1 - 1e-9)) & (most > 0)  # equal up to rounding
    return top[..., 0] / np.maximum(top.sum(-1), 1)


def best(votes, scores):
    """The credit of the candidate with the highest score, of those with an answer; equal scores share. -> [...]"""
    scores = np.where(votes >= 0, scores, -np.inf)
    top = (scores == scores.max(-1, keepdims=True)) & (votes >= 0)
    return (top & (votes == 0)).sum(-1) / np.maximum(top.sum(-1), 1)


def borda(certainty, power=0.5):
    """Votes by rank, arXiv 2502.18581: certainty [..., N] -> (N - rank + 1)^power, rank 1 the most certain.

    Power 0 is the plain vote; 0.5 is the default of the paper's code. Equal certainties share their ranks.
    """
    below = (certainty[..., None, :] < certainty[..., :, None]).sum(-1)  # [..., N]
    same = (certainty[..., None, :] == certainty[..., :, None]).sum(-1)  # [..., N]
    return (below + (same + 1) / 2) ** power


def decided(first, second):
    """May sampling stop, when the leading answer has `first` votes and the next one `second`?

    The Beta criterion of Adaptive-Consistency (arXiv 2305.11860): the leader's share of the votes for these two,
    uniform on [0, 1] before the first vote, is above one half with a probability of more than 95%. That is
    the probability of at most `first` heads in first + second + 1 tosses of a coin.
    """
    tosses = first + second + 1
    return sum(math.comb(tosses, heads) for heads in range(first + 1)) / 2**tosses > 0.95
