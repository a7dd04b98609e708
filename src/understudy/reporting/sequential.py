"""Confidence sequences: intervals that stay valid under repeated evaluation, for seeds that are added until a result is
decided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from scipy.stats import t as student_t

from understudy.reporting.statistics import Interval, interval

FIRST = 3
"""With fewer values there is no interval: two give one degree of freedom."""
_DRAWS = 500_000


def spent(n: int, level: float = 0.95) -> float:
    """The error probability that may be spent up to the evaluation at `n` values: (1 − level)(1 − 2 / n), 0 below
    three.

    It reaches 1 − level only in the limit, so the number of evaluations is unlimited and the last need not be known.
    """
    return (1 - level) * max(0.0, 1 - 2 / n)


def limit(n: int, level: float = 0.95) -> float:
    """The critical value of |t| for `n` values: with probability `level` the intervals of all evaluations cover the
    mean.

    Args:
        n: number of values, at least 3.
        level: probability that every interval, at 3, 4, 5, … values, covers the mean.

    An error-spending boundary (Lan and DeMets 1983) for repeated t intervals (Jennison and Turnbull 1989; 1991 for
    sequential t). For normal values the joint distribution of a sample's t statistics has no parameters; it is
    simulated here with a fixed seed, and the first bound is exactly Student's. Skipped evaluations only make the
    intervals more conservative.

    Power, with 3 to 20 values and evaluations at 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 20: an effect of 2 standard
    deviations is found by 5 values with probability 0.60, and one of 1 by 20 values with 0.84. A mixture of t
    likelihood ratios (Wang and Ramdas 2024, prior deviation 2) has 0.44 and 0.82, and none at 3 values; the same error
    spending with the union bound 0.46 and 0.62; O'Brien-Fleming spending for 20 values 0.01 and 0.98, and no evaluation
    beyond 20.
    """
    if n < FIRST:
        raise ValueError(f"a sequential interval needs at least {FIRST} values, not {n}")
    return _limits(1 << max(5, (n - 1).bit_length()), level)[n]


@cache
def _limits(most: int, level: float) -> Mapping[int, float]:
    """The critical values of all evaluations up to `most` values; more evaluations do not change the earlier ones."""
    rng = np.random.default_rng(0)
    total, squares = np.zeros(_DRAWS), np.zeros(_DRAWS)  # of the samples that every interval has covered so far
    bounds: dict[int, float] = {}
    for n in range(1, most + 1):
        drawn = rng.standard_normal(len(total))
        total, squares = total + drawn, squares + drawn**2
        if n < FIRST:
            continue
        t = np.abs(total) / np.sqrt(np.maximum(squares - total**2 / n, 1e-300) / (n - 1) * n)
        if n == FIRST:
            bound = float(student_t.ppf(1 - spent(n, level) / 2, n - 1))
        else:
            misses = max(1, round(_DRAWS * spent(n, level)) - (_DRAWS - len(t)))
            bound = float(np.partition(t, len(t) - misses)[len(t) - misses])
        bounds[n] = bound
        total, squares = total[t < bound], squares[t < bound]
    return bounds


def required_size(values: Sequence[float], threshold: float = 0.0, most: int = 10_000) -> int | None:
    """The number of values that would decide on which side of `threshold` their mean is, if mean and deviation stay.

    Args:
        values: at least two. threshold: what the mean is compared with. most: the largest number that is told.

    Returns:
        The smallest n with limit(n) · s / √n < |mean − threshold|, or `None` above `most`. Above 64 values, where the
        limit hardly grows, that of 64 is taken.
    """
    s, gap = float(np.std(values, ddof=1)), abs(float(np.mean(values)) - threshold)
    numbers = range(FIRST, most + 1)
    return next((n for n in numbers if limit(min(n, 64)) * s < gap * math.sqrt(n)), None)


def sequence(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and interval of independent values, from a confidence sequence: see `limit`.

    Returns:
        An interval as `interval` returns, but wider: it may be computed after each new value, with stopping at any
            time.
    """
    n = len(values)
    if n < FIRST:
        return Interval(interval(values, level).mean, None, None)
    fixed = interval(values, level)
    assert fixed.high is not None
    half = (fixed.high - fixed.mean) * limit(n, level) / float(student_t.ppf(0.5 + level / 2, n - 1))
    return Interval(fixed.mean, fixed.mean - half, fixed.mean + half)


def paired_sequence(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """The confidence-sequence interval of the paired differences a − b over seeds."""
    return sequence([x - y for x, y in zip(a, b, strict=True)], level)
