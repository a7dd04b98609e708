"""From (student logits, target) to a pair of log-probabilities. Temperature and truncation are applied here and only
here."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.targets import Dense, Projected, Sampled, Target, TopK

Truncation = Literal["tail", "renorm"]


def as_target(target: Target | Tensor) -> Target:
    """Wrap a bare tensor of logits as `Dense`."""
    return Dense(target) if isinstance(target, Tensor) else target


def need_dense(loss: str, target: Target | Tensor, classes: int | None = None) -> Tensor:
    """The logits of a dense target, detached.

    Raises:
        InputError: any other kind of target, or another number of classes.
    """
    target = as_target(target)
    if not isinstance(target, Dense):
        raise InputError(f"{loss} is not defined for {type(target).__name__} targets; it accepts Dense.")
    if classes is not None and target.classes != classes:
        raise InputError(
            f"{loss}: the student has {classes} classes and the teacher {target.classes}. Choose models of one "
            "class set, or cut padding rows off the larger head."
        )
    return full(target.logits.detach())


def full(x: Tensor) -> Tensor:
    """Convert to float32, or keep a wider dtype."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def unit(x: Tensor) -> Tensor:
    """Vectors along the last axis divided by their norms, or by 1e-12 below that, where they get no gradient."""
    # The norm is clamped under the root, where its gradient at 0 would be nan. What is clamped has gradient 0: divided by
    # the clamp it would be 1e12 times all others.
    x = full(x)
    square = x.square().sum(-1, keepdim=True)
    return torch.where(square > 1e-24, x, x.detach()) * square.clamp(min=1e-24).rsqrt()


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), exact everywhere. torch's own returns x from 20 on, with an error of 2e−9 there in value and
    gradient."""
    return -F.logsigmoid(-x)


Temperature = float | Tensor
"""One for all rows, or `[rows]`."""


def check_temperature(loss: str, temperature: Temperature) -> None:
    if isinstance(temperature, Tensor):
        wrong = (~(temperature > 0)).nonzero()
        if len(wrong):
            row = int(wrong[0, 0])
            raise InputError(f"{loss}: temperature of row {row} is {float(temperature[row])} and must be above 0.")
    elif not temperature > 0:
        raise InputError(f"{loss}: temperature is {temperature} and must be above 0.")


def log_softmax(logits: Tensor, temperature: Temperature) -> Tensor:
    """`[rows, classes]` log-probabilities at a temperature, in float32 at least."""
    logits = full(logits)
    if isinstance(temperature, Tensor):
        return torch.log_softmax(logits / temperature.to(logits)[:, None], dim=-1)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def bucketed(log_p: Tensor, ids: Tensor, truncation: Truncation) -> Tensor:
    """Log-probabilities on a support: renormalised, or with one more bucket for the probability mass outside it.

    The bucket is the log-sum-exp of the other classes, not `log(1 − Σ)`, which would lose small masses.
    """
    padded = bool((ids < 0).any())
    kept = log_p.gather(-1, ids.clamp(min=0))
    kept = kept.masked_fill(ids < 0, -torch.inf) if padded else kept
    if truncation == "renorm":
        return renormalised(kept)
    if padded:
        inside = torch.zeros_like(log_p).scatter_add(-1, ids.clamp(min=0), (ids >= 0).to(log_p.dtype))
        outside = log_p.masked_fill(inside > 0, -torch.inf)
    else:
        outside = log_p.scatter(-1, ids, float("-inf"))
    tail = logsumexp(outside)
    return torch.cat([kept, tail], dim=-1)


def renormalised(x: Tensor) -> Tensor:
    """`log_softmax`, all −inf where nothing is kept."""
    return torch.where((x == -torch.inf).all(-1, keepdim=True), x, x - logsumexp(x))


def logsumexp(x: Tensor) -> Tensor:
    """`logsumexp` whose gradient is 0, not nan, where everything is −inf."""
    empty = (x == float("-inf")).all(-1, keepdim=True)
    safe = torch.where(empty, torch.zeros_like(x), x)
    return torch.where(empty, torch.full_like(x[..., :1], float("-inf")), safe.logsumexp(-1, keepdim=True))


def pair(
    loss: str, student: Tensor, target: Target | Tensor, temperature: Temperature, truncation: Truncation
) -> tuple[Tensor, Tensor]:
    """`(log_q, log_p)`, both `[rows, n]`, of the student (with gradient) and the teacher (without)."""
    check_temperature(loss, temperature)
    if truncation not in get_args(Truncation):
        raise InputError(f"{loss}: truncation is {truncation!r} and must be tail or renorm.")
    target = as_target(target)
    if isinstance(target, Dense):
        teacher = need_dense(loss, target, student.shape[-1])
        return log_softmax(student, temperature), log_softmax(teacher, temperature)
    if isinstance(target, TopK):
        same_temperature(loss, target.temperature, temperature)
        log_q = bucketed(log_softmax(student, temperature), target.ids, truncation)
        log_p = full(target.log_probs.detach())
        if truncation == "renorm":
            return log_q, renormalised(log_p)
        return log_q, torch.cat([log_p, full(target.log_tail.detach())], dim=-1)
    if isinstance(target, Projected):
        raise InputError(f"{loss} reads logits: pass Projected targets through streaming.rowwise.")
    why = ", being not linear in p" if isinstance(target, Sampled) else ""
    raise InputError(f"{loss} is not defined for {type(target).__name__} targets{why}; it accepts Dense and TopK.")


def same_temperature(loss: str, taken: float, asked: Temperature) -> None:
    if isinstance(asked, Tensor):
        raise InputError(
            f"{loss}: a temperature of each row needs the teacher's logits: give a live teacher or dense ones."
        )
    if taken != asked:
        raise InputError(
            f"{loss}: the target's probabilities were taken at temperature {taken} and the loss requires {asked}. "
            "Capture them again at that temperature, or set the loss's temperature."
        )


def checked(loss: str, values: Tensor, student: Tensor, target: Target | Tensor | None) -> Tensor:
    """Raise an error for rows that are nan. It only inspects the `[rows]` values, so the check is cheap."""
    if not torch.isnan(values).any():
        return values
    row = int(torch.isnan(values).nonzero()[0, 0])
    side, what = "the student", _trouble(student[row])
    if what is None and target is not None:
        logits = getattr(as_target(target), "logits", None)
        side, what = "the teacher", (_trouble(logits[row]) if logits is not None else None)
    raise InputError(f"{loss}: row {row} is not a distribution: {side} has {what or 'undefined values'}.")


def _trouble(logits: Tensor) -> str | None:
    if torch.isnan(logits).any():
        return "nan logits"
    if (logits == float("inf")).any():
        return "+inf logits"
    if (logits == float("-inf")).all():
        return "-inf logits only"
    return None
