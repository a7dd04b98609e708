"""Moving averages of weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from understudy.models import ModelAdapter
from understudy.training.method import TrainState


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Update an average of weights in place: decay · average + (1 − decay) · model; buffers are copied."""
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new.to(old.dtype), 1 - decay)
    _copy(average.buffers(), model.buffers())


def warmed_up(decay: float, step: int) -> float:
    """A decay of at most (1 + step) / (10 + step), so that in short runs the initial weights do not dominate."""
    return min(decay, (1 + step) / (10 + step))


def averaged(student: ModelAdapter, state: TrainState) -> ModelAdapter:
    """The companion `average` of a method, or the student without one."""
    found = state.companions.get("average", student)
    assert isinstance(found, ModelAdapter)
    return found


@torch.no_grad()
def take(model: nn.Module, average: nn.Module) -> None:
    """Copy the averaged weights into the model."""
    _copy(model.parameters(), average.parameters())
    _copy(model.buffers(), average.buffers())


def _copy(old: Iterable[Tensor], new: Iterable[Tensor]) -> None:
    for a, b in zip(old, new, strict=True):
        a.copy_(b)
