"""Intervals that hold however often one looks at them: for seeds that come in rounds until a verdict is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from scipy.stats import t as student_t

from understudy.reporting.statistics import Interval, interval

FIRST = 3
"""With fewer values there is no interval: two give one degree of freedom."""
_DRAWS = 500_000


def spent(n: int, level: float = 0.95) -> float:
    """The chance of a miss that may be used up by the look at `n` values: (1 − level)(1 − 2 / n), 0 below three.

    It reaches 1 − level only in the limit, so there may be any number of looks, and the last need not be known.
    """
    return (1 - level) * max(0.0, 1 - 2 / n)


def limit(n: int, level: float = 0.95) -> float:
    """The largest |t| of `n` values that is no miss: if no look is left out, all of them hold with chance `level`.

    Args:
        n: number of values, at least 3.
        level: chance that every interval, at 3, 4, 5, … values, covers the mean.

    An error-spending boundary (Lan and DeMets 1983) for repeated t intervals (Jennison and Turnbull 1989; 1991 for
    sequential t). The joint distribution of a sample's t statistics knows no parameter if values are normal; it is drawn
    here, with a fixed seed, and the first bound is Student's own. Looks that are skipped only make the intervals safer.

    Against the alternatives, with 3 to 20 values and looks at 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 20: an effect of 2
    deviations is found by 5 values with chance 0.60, and one of 1 deviation by 20 values with 0.84. A mixture of t
    likelihood ratios (Wang and Ramdas 2024, prior deviation 2) has 0.44 and 0.82, and can find nothing at all with 3
    values; dividing the same chances by the union bound, 0.46 and 0.62; O'Brien and Fleming's spending for 20 values, 0.01
    and 0.98, and no answer beyond 20.
    """
    if n < FIRST:
        raise ValueError(f"a sequential interval needs at least {FIRST} values, not {n}")
    return _limits(1 << max(5, (n - 1).bit_length()), level)[n]


@cache
def _limits(most: int, level: float) -> Mapping[int, float]:
    """The bounds of all looks up to `most` values; more looks do not change the earlier ones."""
    rng = np.random.default_rng(0)
    total, squares = np.zeros(_DRAWS), np.zeros(_DRAWS)  # of the samples that no look has missed yet
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


def sequence(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and interval of independent values, one of a confidence sequence: see `limit`.

    Returns:
        An interval as `interval` gives, wider: it may be asked for after each new value, and one may stop at any of them.
    """
    n = len(values)
    if n < FIRST:
        return Interval(interval(values, level).mean, None, None)
    fixed = interval(values, level)
    assert fixed.high is not None
    half = (fixed.high - fixed.mean) * limit(n, level) / float(student_t.ppf(0.5 + level / 2, n - 1))
    return Interval(fixed.mean, fixed.mean - half, fixed.mean + half)


def paired_sequence(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """A sequence's interval of the differences a − b, seed by seed."""
    return sequence([x - y for x, y in zip(a, b, strict=True)], level)
