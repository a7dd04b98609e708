"""Which differences between runs are real: tests of gains and of what they go with (paper 14)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from understudy.errors import InputError

FEWEST = 3
"""Values below which no test is made."""


class SignificanceTest(NamedTuple):
    """A test's result.

    Args:
        statistic, p: NaN where there is no test. n: values. reason: why there is no test, else `None`.
    """

    statistic: float
    p: float
    n: int
    reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields, with null for NaN, which JSON lacks."""
        numbers = {k: None if math.isnan(getattr(self, k)) else getattr(self, k) for k in ("statistic", "p")}
        return {**numbers, "n": self.n, "reason": self.reason}


def gains_above_zero(gains: Sequence[float]) -> SignificanceTest:
    """One-sided one-sample t-test of the mean gain against 0: p is small where gains are above 0.

    Raises:
        InputError: a gain is not finite.
    """
    values = _finite("gain", gains)
    reason = _too_few(len(values)) or ("all gains are equal" if _constant(values) else None)
    if reason is not None:
        return _none(len(values), reason)
    found = stats.ttest_1samp(values, 0.0, alternative="greater")
    return SignificanceTest(float(found.statistic), float(found.pvalue), len(values))


def anova(groups: Mapping[str, Sequence[float]]) -> SignificanceTest:
    """One-way ANOVA of gains across methods: p is small where methods differ.

    Args:
        groups: gains of each method, by its name.

    Raises:
        InputError: a gain is not finite.
    """
    parts = [_finite(f"gain of {name}", values) for name, values in groups.items() if len(values)]
    n = sum(map(len, parts))
    reason = _too_few(n)
    if reason is None and len(parts) < 2:
        reason = "one method only"
    if reason is None and n == len(parts):
        reason = "one run of each method only"
    if reason is None and all(map(_constant, parts)):
        reason = "all gains of a method are equal"
    if reason is not None:
        return _none(n, reason)
    found = stats.f_oneway(*parts)
    return SignificanceTest(float(found.statistic), float(found.pvalue), n)


def rank_correlation(x: Sequence[float], y: Sequence[float], what: str = "the values") -> SignificanceTest:
    """Spearman's ρ with two-sided p; ties have their average rank.

    Args:
        x, y: one of each for every run. what: x is, for the reason why there is no ρ.

    Raises:
        InputError: different lengths, or a value that is not finite.
    """
    if len(x) != len(y):
        raise InputError(f"Rank correlation of {len(x)} and {len(y)} values: give both for every run.")
    first, second = _finite(what, x), _finite("gain", y)
    reason = _too_few(len(first))
    if reason is None and _constant(first):
        reason = f"{what} are all equal"
    if reason is None and _constant(second):
        reason = "all gains are equal"
    if reason is not None:
        return _none(len(first), reason)
    found = stats.spearmanr(first, second)
    return SignificanceTest(float(found.statistic), float(found.pvalue), len(first))


def _finite(what: str, values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        place = int(np.flatnonzero(~np.isfinite(found))[0])
        raise InputError(f"{what.capitalize()} {place} is {found[place]}: leave out runs that ended without a number.")
    return found


def _constant(values: np.ndarray[Any, np.dtype[np.float64]]) -> bool:
    """Whether values differ by no more than the rounding of a difference of two metrics."""
    return float(np.ptp(values)) <= 1e-12 * float(np.abs(values).max())


def _too_few(n: int) -> str | None:
    return f"{n} of at least {FEWEST} values" if n < FEWEST else None


def _none(n: int, reason: str) -> SignificanceTest:
    return SignificanceTest(math.nan, math.nan, n, reason)
