"""Metrics of final answers: shares with intervals, several attempts at each question, two graders, two treatments."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from scipy.stats import binomtest, ttest_rel

from understudy.errors import InputError


class Proportion(NamedTuple):
    """A share with its 95 % interval."""

    share: float
    low: float
    high: float


def wilson(successes: float, trials: int, z: float = 1.959963984540054) -> Proportion:
    """A share of independent trials with Wilson's score interval; `successes` may be a sum of probabilities."""
    if not 0 <= successes <= trials or trials < 1:
        raise InputError(
            f"{successes:g} of {trials} is no share: give at least one trial, and no more successes than trials."
        )
    share = successes / trials
    middle, width = share + z * z / (2 * trials), z * math.sqrt((share * (1 - share) + z * z / (4 * trials)) / trials)
    scale = 1 + z * z / trials
    return Proportion(share, max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale))


def pass_at_k(attempts: int, correct: int, k: int) -> float:
    """The probability that one of k attempts is correct, without bias from n ≥ k attempts of which c are: 1 − C(n−c, k) / C(n, k).

    Raises:
        InputError: k above n, or c above n.
    """
    if not 1 <= k <= attempts or not 0 <= correct <= attempts:
        raise InputError(
            f"pass@{k} of {attempts} attempts with {correct} correct: k and the correct ones are at most the attempts."
        )
    return 1.0 - math.comb(attempts - correct, k) / math.comb(attempts, k)


class Paired(NamedTuple):
    """Two models on the same items.

    Args:
        first_only, second_only: items that one alone has right. p: McNemar's exact two-sided p-value; 1 where there is none.
    """

    first_only: int
    second_only: int
    p: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Whether two models differ on the same items, by those that one alone has right."""
    if len(first) != len(second):
        raise InputError(
            f"One model has {len(first)} verdicts and the other {len(second)}: judge both on the same items."
        )
    one = sum(a and not b for a, b in zip(first, second, strict=True))
    two = sum(b and not a for a, b in zip(first, second, strict=True))
    return Paired(one, two, float(binomtest(one, one + two).pvalue) if one + two else 1.0)


def agreement(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Share of items to which two graders give one grade."""
    if len(first) != len(second) or not len(first):
        raise InputError(f"One grader has {len(first)} grades and the other {len(second)}: give both for each item.")
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Agreement of two graders beyond chance: (p_o − p_e) / (1 − p_e); NaN where both give one and the same grade alone."""
    observed, n = agreement(first, second), len(first)
    chance = sum(first.count(grade) * second.count(grade) for grade in set(first)) / n**2
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def consistent_verdicts(first_slot: Sequence[int], swapped: Sequence[int]) -> list[int]:
    """Verdicts on A against B that hold in both orders, else ties (paper 36).

    Args:
        first_slot: with A shown first: 1 where A wins, −1 where B wins, 0 a tie. swapped: with B shown first, 1 where B wins.

    Returns:
        1 where A wins in both orders, −1 where B does, else 0.
    """
    return [a if a == -b else 0 for a, b in zip(first_slot, swapped, strict=True)]


def win_rate(verdicts: Sequence[int]) -> float:
    """Share of wins of A, a tie as a half."""
    if not verdicts:
        raise InputError("There is no verdict to count.")
    return sum((v + 1) / 2 for v in verdicts) / len(verdicts)


class Gain(NamedTuple):
    """Paired scores of two treatments of the same items.

    Args:
        mean: of second − first. t, p: paired t-test; 0 and 1 where all differences are 0.
        win, tie, loss: items whose second score is higher, equal, lower. sign_p: exact two-sided sign test without ties.
    """

    mean: float
    t: float
    p: float
    win: int
    tie: int
    loss: int
    sign_p: float


def paired_gain(first: Sequence[float], second: Sequence[float]) -> Gain:
    """How much the second score of each item is above its first one.

    Raises:
        InputError: not the same number of both, or none.
    """
    if len(first) != len(second) or not first:
        raise InputError(f"{len(first)} items have {len(second)} second scores: give both for each, at least one.")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    win, loss = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    t, p = 0.0, 1.0
    if len(set(differences)) > 1:
        found = ttest_rel(second, first)
        t, p = float(found.statistic), float(found.pvalue)
    elif differences[0] and len(differences) > 1:  # the same gain for all
        t, p = math.copysign(math.inf, differences[0]), 0.0
    mean, tie = math.fsum(differences) / len(differences), len(differences) - win - loss
    return Gain(mean, t, p, win, tie, loss, float(binomtest(win, win + loss).pvalue) if win + loss else 1.0)
