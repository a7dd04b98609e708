"""Contrast of positive and negative rationales of a question, weighted by their quality. One value per question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full
from understudy.losses.checks import check_finite

Reduce = Literal["max", "min"]


class Contrast(NamedTuple):
    """The contrast of each question, in parts.

    Args:
        values: l⁺ − β l⁻, `[questions]`.
        positive: l⁺ = s⁺ · least cross-entropy of a positive, `[questions]`; 0 without positives.
        negative: l⁻ = (1 − s⁻) · min(cross-entropy of the chosen negative − δ, 0), `[questions]`; 0 without negatives.
        chosen: `[questions, 2]`, the rationales that the two are of; −1 for none.
    """

    values: Tensor
    positive: Tensor
    negative: Tensor
    chosen: Tensor


def many_to_one(
    cross_entropy: Tensor,
    kind: Tensor,
    quality: Tensor | None = None,
    *,
    beta: float = 0.2,
    delta: float = 3.0,
    reduce: Reduce = "max",
) -> Contrast:
    """Imitate the easiest positive rationale of a question, and make one negative as unlikely as δ nats a token.

    Args:
        cross_entropy: mean over a rationale's tokens of −log p, nats, `[questions, rationales]`.
        kind: 1 for a positive, −1 for a negative, 0 for none, `[questions, rationales]`; where it is 0 the other values may be
            anything.
        quality: D in [0, 1], `[questions, rationales]`, without gradient. Without it both weights are 1.
        beta: weight of the negative part. delta: margin, nats a token.
        reduce: the negative that counts. `max`: the one with the highest cross-entropy, so that there is no gradient as soon as
            one is beyond the margin. `min`: the one with the lowest.

    Returns:
        Ties go to the first rationale. With δ ≤ 0, with D = 1, or without negatives the negative part is 0.

    Source: QCRD (2024, arXiv 2405.13014), the contrastive loss with its min-max scheme.
    """
    if cross_entropy.shape != kind.shape or (quality is not None and quality.shape != kind.shape):
        shapes = [tuple(x.shape) for x in (cross_entropy, kind, quality) if x is not None]
        raise InputError(f"many_to_one: shapes {shapes} differ: give one value for each rationale.")
    if beta < 0:
        raise InputError(f"many_to_one: beta is {beta:g} and must be at least 0: a negative one imitates mistakes.")
    present, cross_entropy = kind != 0, full(cross_entropy)
    check_finite(cross_entropy, _says("cross-entropy", "the model gives it probability 0"), present)
    plus, minus = _weights(quality, cross_entropy, present)
    positive, first = _chosen(cross_entropy, kind > 0, plus, largest=False)
    below = torch.where(cross_entropy < delta, cross_entropy - delta, 0.0)
    negative, second = _chosen(cross_entropy, kind < 0, minus, largest=reduce == "max", taken=below)
    return Contrast(positive - beta * negative, positive, negative, torch.stack([first, second], 1))


def _weights(quality: Tensor | None, like: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """s and 1 − s."""
    if quality is None:
        return torch.ones_like(like), torch.ones_like(like)
    check_finite(quality, _says("quality", "the discriminator diverged"), present)
    s = quality.detach().to(like.dtype)
    outside = present & ((s < 0) | (s > 1))
    if bool(outside.any()):
        raise InputError(f"many_to_one: quality {float(s[outside][0]):g} is outside 0 … 1: give a probability.")
    return s, 1 - s


def _chosen(
    values: Tensor, among: Tensor, weights: Tensor, *, largest: bool, taken: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The weighted value of the chosen rationale and its index; 0 and −1 where there is none."""
    bound = -torch.inf if largest else torch.inf
    seen = values.detach().masked_fill(~among, bound)
    index, there = (seen.argmax(1) if largest else seen.argmin(1)), among.any(1)
    parts = (weights if i else values if taken is None else taken for i in (0, 1))
    value, weight = (part.gather(1, index[:, None])[:, 0].where(there, 0.0) for part in parts)
    return weight * value, index.where(there, -1)


def _says(what: str, why: str) -> Callable[[float, int, int], str]:
    return lambda value, question, i: f"many_to_one: {what} of rationale {i} of question {question} is {value}: {why}."
