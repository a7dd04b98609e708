"""Critics: scoring of items as the mean over several views, human labels, and the initial bias of a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from understudy.errors import InputError

ACCEPT, REJECT = (2, 1), (-1, -2, -9)
"""The values of paper 11's rating: always and often true against sometimes, never and no sense."""


def binary_labels(values: Sequence[int]) -> list[int]:
    """1 for a rating above 0, else 0. Ratings are 2, 1, −1, −2 and −9, or 0 and 1; any other value is an `InputError`."""
    for i, value in enumerate(values):
        if value not in (*ACCEPT, *REJECT, 0):
            raise InputError(f"Label {i} is {value!r}: labels are 2, 1 (accept), -1, -2, -9 (reject), or 1 and 0.")
    return [int(value > 0) for value in values]


def base_rate_bias(rate: float) -> float:
    """The logit of a base rate: a classifier with this output bias predicts it at the start."""
    if not 0 < rate < 1:
        raise InputError(f"The base rate is {rate}: a critic needs good and bad examples.")
    return math.log(rate / (1 - rate))


def mean_probability(logits: Tensor) -> Tensor:
    """Mean over views of the probability, not of the logit: `[views, items]` to `[items]`, in float32 or wider."""
    if logits.dim() != 2 or not len(logits):
        raise InputError(
            f"Views have the shape {tuple(logits.shape)} and must be [views, items] with at least one view."
        )
    return torch.sigmoid(logits if logits.dtype == torch.float64 else logits.float()).mean(0)


def score(
    items: Sequence[tuple[str, str]],
    critic: Callable[[Sequence[tuple[str, str]]], Tensor],
    views: Sequence[Callable[[int, tuple[str, str]], tuple[str, str]]],
) -> list[float]:
    """The probability of each text pair, averaged over its views (test-time augmentation).

    Args:
        critic: from text pairs to logits `[pairs]`.
        views: each maps a pair and its position to another wording of the pair.
    """
    if not items:
        return []
    logits = torch.stack([critic([view(i, pair) for i, pair in enumerate(items)]).detach().cpu() for view in views])
    return mean_probability(logits).tolist()
