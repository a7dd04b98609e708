"""Moving averages of weights, and the base of methods whose student is one in the end."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor, nn

from understudy.models import ModelAdapter
from understudy.training.method import Method, TrainState


class AveragedMethod(Method):
    """Base of methods that evaluate and save an average of the student's weights (companion `average`)."""

    ema: float = Field(
        0.999, ge=0, lt=1, description="Decay of the average of weights, which is what is saved; 0 for none."
    )

    def companions(self, student: ModelAdapter) -> dict[str, nn.Module]:
        return {"average": copy.deepcopy(student)} if self.ema else {}

    def on_step_end(self, state: TrainState) -> None:
        if self.ema:
            assert state.student is not None
            follow(state.companions["average"], state.student, warmed_up(self.ema, state.step))

    def on_train_end(self, state: TrainState) -> None:
        if self.ema:
            assert state.student is not None
            take(state.student, state.companions["average"])

    def eval_model(self, student: ModelAdapter, state: TrainState) -> ModelAdapter:
        found = state.companions.get("average", student)
        assert isinstance(found, ModelAdapter)
        return found


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Update an average of weights in place: decay · average + (1 − decay) · model; buffers are copied."""
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new.to(old.dtype), 1 - decay)
    _copy(average.buffers(), model.buffers())


def warmed_up(decay: float, step: int) -> float:
    """A decay of at most (1 + step) / (10 + step), so that in short runs the initial weights do not dominate."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def take(model: nn.Module, average: nn.Module) -> None:
    """Copy the averaged weights into the model."""
    _copy(model.parameters(), average.parameters())
    _copy(model.buffers(), average.buffers())


def _copy(old: Iterable[Tensor], new: Iterable[Tensor]) -> None:
    for a, b in zip(old, new, strict=True):
        a.copy_(b)
