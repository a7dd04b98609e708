"""Ordinary training of a small helper model: no schedule, no checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def minimise(losses: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step for each loss, in order.

    Args:
        losses: scalars. A generator computes each with the weights that the step before left.
    """
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
