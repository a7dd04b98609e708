"""The readable reference: project all rows, then call the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from understudy.targets import Dense, Mixture, Projected, Target

RowLoss = Callable[..., Tensor]


def project(target: Projected) -> Tensor:
    """Logits `[..., classes]` of hidden states, in float32 at least.

    Half-precision hidden states and heads are converted *before* the product: a product rounded to half precision has
    lost the small differences that p − q consists of.
    """
    return finish(linear(target.hidden, target.weight), target)


def linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden · weightᵀ in float32 at least, also under autocast."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden.to(dtype) @ weight.to(dtype).T


def finish(logits: Tensor, target: Projected, inplace: bool = False) -> Tensor:
    """Apply the bias, scale and soft-cap of a head to its product; `inplace` overwrites it."""
    if target.bias is not None:
        bias = target.bias.to(logits.dtype)
        logits = logits.add_(bias) if inplace else logits + bias
    if target.scale != 1:
        logits = logits.mul_(target.scale) if inplace else logits * target.scale
    if target.softcap is not None:
        capped = logits.div_(target.softcap).tanh_() if inplace else torch.tanh(logits / target.softcap)
        logits = capped.mul_(target.softcap) if inplace else target.softcap * capped
    return logits


def mixed(target: Mixture) -> Tensor:
    """Log-probabilities `[rows, classes]` of a mixture, or its mean logits. Each member projects only its own rows."""
    there = target.place >= 0
    shares = torch.where(there, target.weights, torch.zeros_like(target.weights))
    shares = shares / shares.sum(-1, keepdim=True)
    total: Tensor | None = None
    for m, member in enumerate(target.members):
        at = there[:, m].nonzero()[:, 0]
        if total is not None and not len(at):
            continue
        values = logits_of(member.select(target.place[at, m]))
        share = shares[at, m, None].to(values.dtype)
        values = share * values if target.geometric else torch.log_softmax(values, -1) + share.log()
        if total is None:
            total = values.new_full((len(there), target.classes), 0.0 if target.geometric else -torch.inf)
        held = total[at]
        total = total.index_copy(0, at, held + values if target.geometric else _logaddexp(held, values))
    assert total is not None
    return total


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """`logaddexp` whose gradient is 0, not nan, where both are −inf."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)).masked_fill(empty, -torch.inf)


def logits_of(signal: Dense | Projected | Mixture) -> Tensor:
    """Logits `[rows, classes]` of a dense, projected or mixed output."""
    if isinstance(signal, Mixture):
        return mixed(signal)
    if isinstance(signal, Projected):
        return project(signal)
    return signal.logits if signal.logits.dtype == torch.float64 else signal.logits.float()


def dense(target: Target | None) -> Target | None:
    """The same target with logits in place of hidden states."""
    return Dense(logits_of(target)) if isinstance(target, (Projected, Mixture)) else target


def plain(loss: RowLoss, student: Dense | Projected, target: Target | None, *rows: Tensor, **options: Any) -> Tensor:
    """Values `[rows]` of a row-wise loss. The signature and the values of `rowwise`; memory grows with classes."""
    logits = project(student) if isinstance(student, Projected) else student.logits
    return call(loss, logits, dense(target), rows, options)


def call(
    loss: RowLoss, logits: Tensor, target: Target | None, rows: tuple[Tensor, ...], options: dict[str, Any]
) -> Tensor:
    """Call a loss with the target as second argument, or without it if the loss has none (losses against labels only)."""
    if target is None:
        return loss(logits, *rows, **options)
    return loss(logits, target, *rows, **options)
