"""Divergences from a teacher whose logits carry noise (On the Generalization vs Fidelity Paradox, 2025)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from understudy.losses._pairs import need_dense
from understudy.targets import Target


def with_noise(
    divergence: Callable[..., Tensor], student: Tensor, target: Target | Tensor, noise: Tensor, **options: Any
) -> Tensor:
    """D(U + ξ, S): a divergence of logits, from a teacher whose logits are disturbed. ξ = 0 changes no bit.

    Args:
        divergence: a row-wise loss of (student, target). student: logits S `[rows, classes]`. target: `Dense` logits U.
        noise: ξ `[rows, classes]`, in units of logits. options: of the divergence.

    Returns:
        `[rows]`, in nats.

    Raises:
        InputError: the target has no logits of every class.

    Source: paper 14, ablation of teacher noise.
    """
    logits = need_dense("a divergence with teacher noise", target, student.shape[-1])
    return divergence(student, logits + noise.to(logits), **options)
