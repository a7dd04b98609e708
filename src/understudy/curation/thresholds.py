"""Cutoffs on a score: the precision-recall curve on labelled data, the cutoff for a given recall, and what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from understudy.errors import InputError


@dataclass(frozen=True)
class Cutoff:
    """A cutoff, with its precision and recall on the labelled data that it was chosen on.

    Args:
        value: of the score.
        precision, recall: of the rule `score ≥ value`, as in the curve.
        strict_precision, strict_recall: of the filter rule `score > value`. The precision of an empty selection is 1.
    """

    value: float
    precision: float
    recall: float
    strict_precision: float
    strict_recall: float


def recall_curve(labels: Sequence[int], scores: Sequence[float]) -> list[Cutoff]:
    """The precision-recall curve over the distinct scores, in increasing order.

    Args:
        labels: 1 is good, 0 is bad.
        scores: higher is better.

    Raises:
        InputError: lengths that differ, labels of one class only, scores that are not numbers.
    """
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if y.shape != s.shape or y.ndim != 1:
        raise InputError(f"There are {y.size} labels and {s.size} scores: give one score a label.")
    if not np.isin(y, (0, 1)).all():
        raise InputError(f"Labels must be 0 or 1; found {sorted(set(y.tolist()) - {0, 1})[0]}.")
    if len(np.unique(y)) < 2:
        only = f"only label {int(y[0])}" if y.size else "no label at all"
        raise InputError(f"The labelled data holds {only}: precision and recall need good and bad examples.")
    if not np.isfinite(s).all():
        raise InputError(
            f"Score {int(np.flatnonzero(~np.isfinite(s))[0])} of the labelled data is not a finite number."
        )
    values, first = np.unique(np.sort(s), return_index=True)
    ahead = np.append(np.cumsum(y[np.argsort(s, kind="stable")][::-1])[::-1], 0)  # good items from each rank on
    edges = np.append(first, len(s))
    good, kept = ahead[edges], len(s) - edges
    precision, recall = np.where(kept > 0, good / np.maximum(kept, 1), 1.0), good / y.sum()
    return [
        Cutoff(float(v), *(float(x) for x in (precision[i], recall[i], precision[i + 1], recall[i + 1])))
        for i, v in enumerate(values)
    ]


def cutoff_at_recall(labels: Sequence[int], scores: Sequence[float], recall: float) -> Cutoff:
    """The smallest cutoff whose recall (rule `score ≥ cutoff`) is at most `recall` (paper 11, official code).

    Filtering is strict (`score > cutoff`), so an item exactly at the cutoff counts here and is dropped there;
    `strict_recall` is the recall of the filter.

    Raises:
        InputError: a recall outside (0, 1], or below the smallest of the curve; see also `recall_curve`.
    """
    if not 0 < recall <= 1:
        raise InputError(
            f"The wanted recall is {recall} and must be above 0 and at most 1: no cutoff has such a recall."
        )
    curve = recall_curve(labels, scores)
    for point in curve:
        if point.recall <= recall:
            return point
    raise InputError(
        f"No cutoff has a recall of at most {recall}: the largest score keeps {curve[-1].recall:.3f} of the good "
        "examples. Ask for more recall, or for a scorer with fewer ties."
    )


def cutoff_at(labels: Sequence[int], scores: Sequence[float], value: float) -> Cutoff:
    """Any value as a cutoff, with its precision and recall on labelled data, as of `recall_curve`."""
    recall_curve(labels, scores)  # the same inputs are refused
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    found = []
    for kept in (s >= value, s > value):
        good, number = y[kept].sum(), int(kept.sum())
        found += [float(good / number) if number else 1.0, float(good / y.sum())]
    return Cutoff(value, *found)


def cutoffs(labels: Sequence[int], scores: Sequence[float], recalls: Sequence[float]) -> list[Cutoff]:
    """The cutoffs of several recalls, without those that have none."""
    curve = recall_curve(labels, scores)
    found = (next((point for point in curve if point.recall <= recall), None) for recall in recalls)
    return [point for point in found if point is not None]


def cutoff_at_precision(labels: Sequence[int], scores: Sequence[float], precision: float) -> Cutoff:
    """The smallest cutoff whose precision (rule `score ≥ cutoff`) is at least `precision` (paper 15).

    Raises:
        InputError: a precision outside (0, 1], or above all of the curve; see also `recall_curve`.
    """
    if not 0 < precision <= 1:
        raise InputError(f"The wanted precision is {precision} and must be above 0 and at most 1.")
    curve = recall_curve(labels, scores)
    found = next((point for point in curve if point.precision >= precision), None)
    if found is None:
        best = max(point.precision for point in curve)
        raise InputError(
            f"No cutoff has a precision of {precision}: the best has {best:.3f}. Ask for less, or label more."
        )
    return found


def at_least(scores: Sequence[float], cutoff: float) -> list[int]:
    """Positions of the scores of at least the cutoff, in order. A score that is not a number is an `InputError`."""
    return [int(i) for i in np.flatnonzero(_numbers(scores) >= cutoff)]


def above(scores: Sequence[float], cutoff: float) -> list[int]:
    """Positions of the scores strictly above the cutoff, in order. A score that is not a number is an `InputError`."""
    return [int(i) for i in np.flatnonzero(_numbers(scores) > cutoff)]


def _numbers(scores: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    s = np.asarray(scores, dtype=np.float64)
    if np.isnan(s).any():
        raise InputError(f"Score {int(np.flatnonzero(np.isnan(s))[0])} is not a number.")
    return s
