"""Plain training loops for small auxiliary models, without schedule and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def minimise(losses: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step for each loss, in order.

    Args:
        losses: scalars. A generator computes each loss with the weights after the previous step.
    """
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
