"""Methods by their mean rank over blocks, such as seeds or data sets: Friedman's test and the critical difference (Demšar
2006, "Statistical Comparisons of Classifiers over Multiple Data Sets")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from understudy.reporting.significance import SignificanceTest

ALPHA = 0.05


class MeanRanks(NamedTuple):
    """Mean ranks and which methods differ.

    Args:
        names: methods, the best mean rank first. ranks: mean rank of each, 1 for the best of a block.
        friedman: whether the methods differ at all, with the number of blocks.
        difference: the least difference of two mean ranks at which two methods differ.
        groups: first and last position in `names` of each largest group of two or more that do not differ.
    """

    names: list[str]
    ranks: list[float]
    friedman: SignificanceTest
    difference: float
    groups: list[tuple[int, int]]


def block_ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rank of each method in its block: 1 for the highest score; equal scores have their mean rank.

    Args:
        scores: `[blocks, methods]`.
    """
    return np.asarray(stats.rankdata(-scores, axis=1))


def friedman(ranks: NDArray[np.float64]) -> SignificanceTest:
    """Friedman's test that all methods rank alike: p is small where they do not. Corrected for ties, for 2 methods or more
    (`scipy.stats.friedmanchisquare` needs 3).

    Args:
        ranks: `[blocks, methods]`, as of `block_ranks`.

    Returns:
        χ² with methods − 1 degrees of freedom.

    Source: Conover 1999, section 5.8, T₁, which is Demšar's χ²_F where no scores are equal.
    """
    n, k = ranks.shape
    spread = float((ranks**2).sum()) - n * k * (k + 1) ** 2 / 4
    if spread == 0:
        return SignificanceTest(math.nan, math.nan, n, "the methods have equal values in every block")
    statistic = (k - 1) * float(((ranks.sum(0) - n * (k + 1) / 2) ** 2).sum()) / spread
    return SignificanceTest(statistic, float(stats.chi2.sf(statistic, k - 1)), n)


def critical_difference(methods: int, blocks: int, alpha: float = ALPHA) -> float:
    """The least difference of mean ranks at which two of the methods differ (Nemenyi's test).

    Source: Demšar 2006, section 3.2.2: q_α · √(k(k + 1) / 6N), where q_α is the studentized range over √2.
    """
    q = float(stats.studentized_range.ppf(1 - alpha, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * blocks))


def joined(ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """First and last position of each largest group of two or more whose mean ranks are less than `difference` apart.

    Args:
        ranks: ascending.
    """
    groups: list[tuple[int, int]] = []
    for first, low in enumerate(ranks):
        last = max(i for i, rank in enumerate(ranks) if rank - low < difference or i == first)
        if last > first and (not groups or last > groups[-1][1]):
            groups.append((first, last))
    return groups


def compared_ranks(scores: Mapping[str, Sequence[float]], alpha: float = ALPHA) -> MeanRanks | str:
    """Rank methods over blocks. Unless Friedman's test says that some differ, one group joins all of them.

    Args:
        scores: for each method one score of every block, higher for better.

    Returns:
        The result, or why there is none.
    """
    table = np.array(list(scores.values()), dtype=np.float64).T
    blocks, methods = table.shape if table.ndim == 2 else (0, len(scores))
    if methods < 2 or blocks < 2:
        return f"ranks need at least 2 methods and 2 blocks, and there are {methods} and {blocks}"
    if not np.isfinite(table).all():
        return "a run ended without a number"
    ranks = block_ranks(table)
    test = friedman(ranks)
    if test.reason is not None:
        return test.reason
    order = np.argsort(ranks.mean(0), kind="stable")
    means = [float(r) for r in ranks.mean(0)[order]]
    least = critical_difference(methods, blocks, alpha)
    groups = joined(means, least) if test.p < alpha else [(0, methods - 1)]
    return MeanRanks([list(scores)[i] for i in order], means, test, least, groups)


def over_seeds(comparison: Mapping[str, Any]) -> dict[str, list[float]]:
    """The scores of a comparison's methods with the seeds that all of them have as blocks."""
    found = _by_method(comparison)
    seeds = [s for s in comparison["seeds"] if all(s in values for values in found.values())]
    return {method: [values[s] for s in seeds] for method, values in found.items()}


def over_data(comparisons: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The scores of the methods that all comparisons have, with the comparisons as blocks: means over their seeds."""
    found = [_by_method(one) for one in comparisons]
    common = [method for method in found[0] if all(method in one for one in found)]
    return {m: [math.fsum(one[m].values()) / len(one[m]) for one in found] for m in common}


def _by_method(comparison: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """The main metric of each run by method and seed, negated where lower is better."""
    sign = 1.0 if comparison["higher_is_better"] else -1.0
    found: dict[str, dict[int, float]] = {}
    for run in comparison["runs"]:
        found.setdefault(run["method"], {})[run["seed"]] = sign * float(run["metrics"][comparison["metric"]])
    return found
