"""The readable reference: project everything, then call the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from understudy.targets import Dense, Projected, Target

RowLoss = Callable[..., Tensor]


def project(target: Projected) -> Tensor:
    """Logits `[..., classes]` of hidden states, in float32 at least.

    Half-precision hidden states and heads are widened *before* the product: a product stored in half precision has
    lost what the difference p − q is made of.
    """
    return finish(linear(target.hidden, target.weight), target)


def linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden · weightᵀ in float32 at least, whatever autocast says."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden.to(dtype) @ weight.to(dtype).T


def finish(logits: Tensor, target: Projected, inplace: bool = False) -> Tensor:
    """Bias, scale and soft-cap of a head on its product; `inplace` overwrites it."""
    if target.bias is not None:
        bias = target.bias.to(logits.dtype)
        logits = logits.add_(bias) if inplace else logits + bias
    if target.scale != 1:
        logits = logits.mul_(target.scale) if inplace else logits * target.scale
    if target.softcap is not None:
        capped = logits.div_(target.softcap).tanh_() if inplace else torch.tanh(logits / target.softcap)
        logits = capped.mul_(target.softcap) if inplace else target.softcap * capped
    return logits


def dense(target: Target | None) -> Target | None:
    """The same target with logits in place of hidden states."""
    return Dense(project(target)) if isinstance(target, Projected) else target


def plain(loss: RowLoss, student: Dense | Projected, target: Target | None, *rows: Tensor, **options: Any) -> Tensor:
    """Values `[rows]` of a row-wise loss. The signature and the values of `rowwise`; memory grows with classes."""
    logits = project(student) if isinstance(student, Projected) else student.logits
    return call(loss, logits, dense(target), rows, options)


def call(
    loss: RowLoss, logits: Tensor, target: Target | None, rows: tuple[Tensor, ...], options: dict[str, Any]
) -> Tensor:
    """A loss with a target takes it second; one against labels alone takes none."""
    if target is None:
        return loss(logits, *rows, **options)
    return loss(logits, target, *rows, **options)
