"""Players: parts of a method with an objective and an optimiser of their own (bilevel weights, an adversary).

A player moves before the student in an update, or instead of it. Its gradient is taken with respect to its own
parameters alone, so neither student nor teacher can be touched by its move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models import ModelAdapter, evaluating
from understudy.teachers import Teacher

PATIENCE = 10
"""Moves in a row that may fail for a gradient that is not finite; each halves the step size."""


@dataclass(frozen=True)
class AuxiliaryOptimizer:
    """Which own modules a player moves, and how.

    Args:
        modules: names from `Method.modules`. They leave the student's optimiser.
    """

    modules: tuple[str, ...]
    learning_rate: float
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: float = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over `parameters`."""
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[self.optimizer]
        return kind(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)  # type: ignore[call-arg]


@dataclass
class AuxiliaryContext:
    """What a player sees of one update.

    Args:
        student: in evaluation mode. teacher: answers `teacher(batch)`, and `through(batch)` with gradient to the inputs.
        batches: the micro-batches of the update on this rank. count: rows over all micro-batches and ranks.
        validation: `validation(n)` gives n validation examples that depend on seed and step alone (all if there are
            fewer, or if n is `None`), the same on every rank.
        total: sums each tensor over the ranks.
    """

    student: ModelAdapter
    teacher: Teacher | None
    batches: Sequence[Batch]
    count: float
    validation: Callable[[int | None], Batch]
    total: Callable[[Sequence[Tensor]], list[Tensor]]


class AuxiliaryOptimizers:
    """The optimisers of all players, and their moves.

    Args:
        players: by name. modules: the method's own modules.
    """

    def __init__(self, auxiliary: Mapping[str, AuxiliaryOptimizer], modules: Mapping[str, nn.Module]) -> None:
        self.parameters = {
            name: [p for m in name.modules for p in modules[m].parameters()] for name, name in auxiliary.items()
        }
        self.optimizers = {name: name.build(self.parameters[name]) for name, name in auxiliary.items()}
        self.failed = dict.fromkeys(auxiliary, 0)
        for parameters in self.parameters.values():
            for parameter in parameters:
                parameter.requires_grad_(False)  # the student's optimiser and DDP are not to know of them

    def move(
        self, name: str, terms: Callable[[], Iterator[Mapping[str, Any]]], context: AuxiliaryContext
    ) -> dict[str, Tensor]:
        """One step of a player on the sum of its terms over the update's count; the sums of each term's values."""
        own = self.parameters[name]
        grads = [torch.zeros_like(p) for p in own]
        sums: dict[str, Tensor] = {}
        for parameter in own:
            parameter.requires_grad_(True)
        try:
            with evaluating(context.student):
                for found in terms():
                    loss = sum((t.weight * t.values.sum() for t in found.values()), torch.zeros(()))
                    parts = torch.autograd.grad(loss / context.count, own, allow_unused=True)
                    for grad, part in zip(grads, parts, strict=True):
                        if part is not None:
                            grad.add_(part)
                    for term, values in found.items():
                        sums[term] = sums.get(term, 0.0) + values.values.detach().sum()
        finally:
            for parameter in own:
                parameter.requires_grad_(False)
        self._step(name, context.total(grads))
        return sums

    def _step(self, name: str, grads: Sequence[Tensor]) -> None:
        optimizer = self.optimizers[name]
        if not all(bool(g.isfinite().all()) for g in grads):
            self.failed[name] += 1
            if self.failed[name] >= PATIENCE:
                raise InputError(
                    f"The gradient of {name!r} was not finite {PATIENCE} times in a row: lower its learning rate, or "
                    "look at what it is fed."
                )
            for group in optimizer.param_groups:
                group["lr"] /= 2
            return
        self.failed[name] = 0
        for parameter, grad in zip(self.parameters[name], grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Every optimiser's state, and the failures in a row."""
        return {"optimizers": {n: o.state_dict() for n, o in self.optimizers.items()}, "failed": dict(self.failed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.failed = dict(state["failed"])
