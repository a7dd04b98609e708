"""Arithmetic on gradients of several losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def align(reference: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Remove from `other` its component against `reference`, if the two conflict (DHKD, gradient alignment).

    Over all tensors as one vector: if ⟨g₁, g₂⟩ < 0, g₂ ← g₂ − ⟨g₁, g₂⟩ / ‖g₁‖² · g₁. One-sided: `reference` is not
    changed. `None` counts as zero; a zero reference changes nothing.

    Args:
        reference, other: gradients of the same parameters, in the same order.

    Returns:
        The changed gradients of `other`.
    """
    zero = torch.zeros((), dtype=torch.float64)
    dot = sum(
        (
            (a.double() * b.double()).sum().cpu()
            for a, b in zip(reference, other, strict=True)
            if a is not None and b is not None
        ),
        zero,
    )
    norm = sum((a.double().square().sum().cpu() for a in reference if a is not None), zero)
    if dot >= 0 or norm == 0:
        return list(other)
    factor = float(dot / norm)
    out: list[Tensor | None] = []
    for a, b in zip(reference, other, strict=True):
        out.append(b if a is None else (-factor * a if b is None else b - factor * a))
    return out
