"""Rank correlation of a score with what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import kendalltau, rankdata


class Correlation(NamedTuple):
    """Spearman's ρ with its bootstrap interval, and Kendall's τ."""

    rho: float
    low: float
    high: float
    tau: float


def rank_correlation(
    x: Sequence[float], y: Sequence[float], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Correlation | None:
    """Rank correlation of paired values; `None` for fewer than three pairs, or where a side is constant.

    Args:
        resamples: of the bootstrap over pairs; those with a constant side are left out.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    chosen = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    drawn = _spearman(a[chosen], b[chosen])
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    rho = float(_spearman(a[None], b[None])[0])
    return Correlation(rho, float(low), float(high), float(kendalltau(a, b).statistic))


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """ρ of each row; nan where a side is constant."""
    x, y = (r - r.mean(1, keepdims=True) for r in (rankdata(v, axis=1) for v in (a, b)))
    norm = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norm > 0, (x * y).sum(1) / norm, np.nan)  # type: ignore[no-any-return]
