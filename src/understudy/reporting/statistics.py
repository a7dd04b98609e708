"""Statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import t as student_t


class Interval(NamedTuple):
    """A mean with its confidence interval; `low` and `high` are `None` with fewer than two values."""

    mean: float
    low: float | None
    high: float | None


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and Student-t interval of independent values."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, None)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(student_t.ppf(0.5 + level / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def paired(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Interval of the paired differences a − b over seeds."""
    return interval([x - y for x, y in zip(a, b, strict=True)], level)


def verdict(difference: Interval, threshold: float = 0.0, higher_is_better: bool = True) -> str:
    """`supported` if the whole interval is beyond the threshold on the claimed side, `not supported` if it is entirely
    on the other side, otherwise `inconclusive`.

    Args:
        difference: claimed arm minus the other arm.
        threshold: the smallest advantage, in units of the metric (0 or more).
        higher_is_better: direction of the metric.
    """
    if difference.low is None or difference.high is None:
        return "inconclusive"
    low, high = (difference.low, difference.high) if higher_is_better else (-difference.high, -difference.low)
    if low > threshold:
        return "supported"
    return "not supported" if high < threshold else "inconclusive"
