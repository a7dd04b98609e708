"""Pairs of a better and a worse text, out of attempts that were checked or scored. Ties go to the earlier attempt."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from understudy.curation.filters import Funnel
from understudy.errors import InputError


class PairOf(NamedTuple):
    """Positions of a better and a worse item."""

    chosen: int
    rejected: int


def by_group(groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Positions of each group's items, in order; groups in the order of their first item."""
    found: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        found.setdefault(group, []).append(i)
    return found


def first_correct(groups: Sequence[Hashable], correct: Sequence[bool], funnel: Funnel) -> list[int]:
    """The first correct attempt at each problem: what supervised training learns (paper 28, D_SFT).

    Args:
        groups: the problem of each attempt; attempts are in the order in which they were made.
    """
    _same_length(groups, correct)
    problems = list(by_group(groups).values())
    solved = funnel.sieve(
        "problems solved", problems, lambda tries: None if any(correct[i] for i in tries) else "no correct attempt"
    )
    return [next(i for i in tries if correct[i]) for tries in solved]


def correct_after_wrong(
    groups: Sequence[Hashable], correct: Sequence[bool], funnel: Funnel, texts: Sequence[str] | None = None
) -> list[PairOf]:
    """For each problem that was solved after a wrong attempt: the first correct attempt, and the first wrong one before it
    (paper 28, D_Pref).

    Args:
        groups: the problem of each attempt. texts: a wrong attempt of the same text as the correct one is passed over.
    """
    _same_length(groups, correct)
    rejected: dict[int, int] = {}

    def problem(tries: list[int]) -> str | None:
        first = next((i for i in tries if correct[i]), None)
        if first is None:
            return "no correct attempt"
        before = tries[: tries.index(first)]
        if not before:
            return "correct at once"
        wrong = [i for i in before if texts is None or texts[i] != texts[first]]
        if not wrong:
            return "wrong and correct attempt are the same text"
        rejected[first] = wrong[0]
        return None

    kept = funnel.sieve("pairs of correct after wrong", list(by_group(groups).values()), problem)
    firsts = [next(i for i in tries if correct[i]) for tries in kept]
    return [PairOf(first, rejected[first]) for first in firsts]


def best_and_worst(groups: Sequence[Hashable], scores: Sequence[float], funnel: Funnel) -> list[PairOf]:
    """Of each group the item with the largest and that with the smallest score (paper 5, rationales).

    Args:
        scores: higher is better; what is not a number is passed over.
    """
    _same_length(groups, scores)
    scored = [[i for i in items if not math.isnan(scores[i])] for items in by_group(groups).values()]

    def problem(items: list[int]) -> str | None:
        if len(items) < 2:
            return "fewer than two scored"
        return "all scores equal" if len({scores[i] for i in items}) == 1 else None

    kept = funnel.sieve("pairs of best and worst", scored, problem)
    return [PairOf(max(items, key=lambda i: scores[i]), min(items, key=lambda i: scores[i])) for items in kept]


def best_and_worst_shares(scores: Sequence[float], share: float = 0.25) -> tuple[list[int], list[int]]:
    """The best and the worst share of the items, best first and worst first (paper 5, questions).

    Args:
        scores: what is not a number is passed over. share: of those that are left, at least one item.

    Raises:
        InputError: the two share an item, or the worst of the best is no better than the best of the worst.
    """
    if not 0 < share <= 0.5:
        raise InputError(f"The share of best and worst items is {share} and must be above 0 and at most 0.5.")
    known = [i for i, s in enumerate(scores) if not math.isnan(s)]
    number = max(1, math.floor(share * len(known)))
    best = sorted(known, key=lambda i: -scores[i])[:number]
    worst = sorted(known, key=lambda i: scores[i])[:number]
    if not known or scores[best[-1]] <= scores[worst[-1]]:
        raise InputError(
            f"The preferences carry no signal: the best and the worst {number} of {len(known)} scored items do not differ. "
            "Score more items, or on more questions."
        )
    return best, worst


def _same_length(groups: Sequence[Hashable], values: Sequence[object]) -> None:
    if len(groups) != len(values):
        raise InputError(f"{len(groups)} attempts have {len(values)} verdicts: give one each.")
