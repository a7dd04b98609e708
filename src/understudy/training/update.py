"""One optimizer step in progress, and its notice to the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from understudy.data import Batch
from understudy.training.reduction import Counts


@dataclass
class Update:
    """One optimizer step in progress.

    Args:
        batches, counting: its micro-batches on this rank, and which of them count here. counts: what it divides by.
        roles: whose parameters it moves: auxiliary optimisers by name, and `"student"`.
        done: micro-batches done. values: sums of terms so far. gradients: of each term, where the method merges them.
    """

    batches: Sequence[Batch]
    counting: Sequence[bool]
    counts: Counts
    roles: Sequence[str] | None = None
    done: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, list[Tensor | None]] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the sums of terms of a micro-batch."""
        for name, value in values.items():
            held = self.values.get(name)
            self.values[name] = value if held is None else held + value

    def add_gradients(self, name: str, gradients: Sequence[Tensor | None]) -> None:
        """Add a term's gradients of a micro-batch, by parameter."""
        held = self.gradients.setdefault(name, [None] * len(gradients))
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                before = held[i]
                held[i] = gradient if before is None else before + gradient


class FollowSteps(TrainerCallback):
    """Tells the trainer which epoch begins (also on resume), and the method that a step, or training, has ended."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_epoch(int((state.epoch or 0) + 1e-9))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        module = self.trainer.model
        module.train_state.step = state.global_step
        module.method.on_step_end(module.train_state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps or self.trainer.settled:  # else it was interrupted
            module = self.trainer.model
            module.method.on_train_end(module.train_state)
