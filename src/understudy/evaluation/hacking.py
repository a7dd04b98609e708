"""Does a student that nears its teacher leave the truth? (On Teacher Hacking in Language Model Distillation, 2025.)

golden is the distance of an oracle to the student, proxy that of the teacher to the student: the forward KL of whole texts,
summed by the chain rule over tokens of texts that the first side wrote. Both are curves over evaluations; lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._kernels import kl


def sequence_kl(log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    """Σ_t KL(p_t ‖ q_t) over the tokens of each text, `[texts]`: KL of whole texts in expectation over texts of p.

    Args:
        log_p, log_q: log-probabilities of the next token `[texts, length, classes]` along the same texts, which p wrote.
        mask: `[texts, length]`, which tokens there are (the end of a text is one).

    Returns:
        In nats; +inf where q rules out what p allows.
    """
    mask = mask.bool()
    if log_p.shape != log_q.shape or log_p.shape[:2] != mask.shape:
        raise InputError(
            f"sequence_kl: log-probabilities are {list(log_p.shape)} and {list(log_q.shape)} and the mask {list(mask.shape)}: "
            "give both sides the same texts and one vocabulary."
        )
    steps = log_p.new_zeros(mask.shape)
    steps[mask] = kl(log_p[mask], log_q[mask])
    return steps.sum(-1)


def sequence_log_ratio(log_p: Tensor, log_q: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Σ_t log p(y_t) − log q(y_t), `[texts]`: the expectation of `sequence_kl` with more variance.

    Args:
        tokens: y `[texts, length]`; anything where `mask` is false. The rest as in `sequence_kl`.
    """
    at = tokens.clamp(min=0)[..., None]
    difference = (log_p.gather(-1, at) - log_q.gather(-1, at))[..., 0]
    return difference.masked_fill(~mask.bool(), 0.0).sum(-1)


@dataclass(frozen=True)
class Verdict:
    """What a golden curve says.

    Args:
        hacking: it rises by more than δ above its least while the proxy falls further. best: place of its least, the first
            of several. rise: (end − least) / least, 0 for a curve at 0. proxy_drop: (proxy there − proxy at the end) / proxy there.
    """

    hacking: bool
    best: int
    rise: float
    proxy_drop: float


def verdict(golden: Sequence[float], proxy: Sequence[float], delta: float = 0.02) -> Verdict:
    """Whether the student got nearer to its teacher and further from the truth (the paper's idea; the rule is ours).

    Raises:
        InputError: curves of different length, or empty ones.
    """
    if len(golden) != len(proxy) or not golden:
        raise InputError(f"verdict: {len(golden)} golden and {len(proxy)} proxy values; give both at every evaluation.")
    best = min(range(len(golden)), key=golden.__getitem__)
    rise = (golden[-1] - golden[best]) / golden[best] if golden[best] else 0.0
    drop = (proxy[best] - proxy[-1]) / proxy[best] if proxy[best] else 0.0
    return Verdict(rise > delta and drop > 0, best, rise, drop)


class PowerLaw(NamedTuple):
    """log m = a + b · log e, and how far each point is above it, `[points]`."""

    intercept: float
    slope: float
    residuals: Tensor


def power_law(epochs: Sequence[float], values: Sequence[float], first: int = 8) -> PowerLaw:
    """Least squares on the first points of a curve, which falls as a power law while training is sound.

    Args:
        epochs: e, above 0. values: m, above 0. first: points that are fitted.

    Raises:
        InputError: fewer than three points, or one that has no logarithm.
    """
    number = min(first, len(epochs))
    if number < 3 or len(epochs) != len(values):
        raise InputError(
            f"power_law: {len(epochs)} epochs and {len(values)} values; a line needs three points of both."
        )
    if min(epochs) <= 0 or min(values) <= 0:
        raise InputError("power_law: epochs and values must be above 0; count epochs from 1.")
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (epochs, values))
    dx, dy = x[:number] - x[:number].mean(), y[:number] - y[:number].mean()
    slope = float((dx * dy).sum() / dx.square().sum())
    intercept = float(y[:number].mean() - slope * x[:number].mean())
    return PowerLaw(intercept, slope, y - intercept - slope * x)


def leaves_power_law(
    epochs: Sequence[float], values: Sequence[float], first: int = 8, width: float = 3.0, run: int = 3
) -> int | None:
    """Where a curve has been off the line for `run` evaluations in a row: the place of the last of these, or `None`.

    Off is a residual of more than `width` standard deviations of the fitted points. Scaling the curve changes nothing.
    """
    residuals = power_law(epochs, values, first).residuals
    fitted = residuals[: min(first, len(residuals))]
    spread = math.sqrt(float(fitted.square().sum()) / max(1, len(fitted) - 2))
    count = 0
    for place, residual in enumerate(residuals.tolist()):
        count = count + 1 if place >= len(fitted) and abs(residual) > width * spread + 1e-12 else 0
        if count == run:
            return place
    return None
