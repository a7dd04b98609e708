"""Auxiliary optimisers: modules of a method that have their own objective (bilevel weights, an adversary, a critic).

In an update they step before the student, or instead of it, in the order that the method's `update_schedule` gives. The
gradient of an auxiliary loss is taken with respect to its own parameters alone, so it changes neither student nor teacher.
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
from understudy.training.reduction import Counts, Term, sum_terms

MOST_FAILURES = 10
"""Most consecutive steps whose gradient may be not finite; each halves the learning rate."""


@dataclass(frozen=True)
class AuxiliaryOptimizer:
    """The modules that an auxiliary optimiser trains, and its settings.

    Args:
        modules: names from `Method.modules`. The student's optimiser does not update them.
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
    """The inputs of an auxiliary loss in one update.

    Args:
        student: in evaluation mode.
        teacher: called with a batch, and `through(batch)` with gradient to the inputs.
        batches: the micro-batches of the update on this rank.
        counts: what the update divides by, over all ranks.
        reduction: how rows are weighted, as in `understudy.losses.reduction`.
        validation: `validation(n)` returns n validation examples that depend on seed and step alone and are the same on
            every rank; all of them if there are fewer, or if n is `None`.
        total: sums each tensor over the ranks.
    """

    student: ModelAdapter
    teacher: Teacher | None
    batches: Sequence[Batch]
    counts: Counts
    validation: Callable[[int | None], Batch]
    total: Callable[[Sequence[Tensor]], list[Tensor]]
    reduction: str = "token_mean"

    @property
    def count(self) -> float:
        """The divisor of a term that has no count of its own."""
        return max(1.0, self.counts.units)


class AuxiliaryOptimizers:
    """The auxiliary optimisers of a method.

    Args:
        auxiliary: by name.
        modules: the method's own modules.
    """

    def __init__(self, auxiliary: Mapping[str, AuxiliaryOptimizer], modules: Mapping[str, nn.Module]) -> None:
        self.parameters = {
            name: [p for m in part.modules for p in modules[m].parameters()] for name, part in auxiliary.items()
        }
        self.optimizers = {name: part.build(self.parameters[name]) for name, part in auxiliary.items()}
        self.failed = dict.fromkeys(auxiliary, 0)
        for parameters in self.parameters.values():
            for parameter in parameters:
                parameter.requires_grad_(False)  # so that the student's optimiser and DDP leave them out

    def step(
        self, name: str, terms: Callable[[], Iterator[Mapping[str, Term]]], context: AuxiliaryContext
    ) -> dict[str, Tensor]:
        """Make one step of an auxiliary optimiser on its loss over the whole update.

        Args:
            terms: returns the terms of the loss for each micro-batch of `context.batches`, in order. Rows are weighted
                and terms are divided as in the student's loss.

        Returns:
            The sum of each term's values over this rank's rows.
        """
        own = self.parameters[name]
        grads = [torch.zeros_like(p) for p in own]
        values: dict[str, Tensor] = {}
        for parameter in own:
            parameter.requires_grad_(True)
        try:
            with evaluating(context.student):
                for batch, found in zip(context.batches, terms(), strict=True):
                    sums = sum_terms(found, batch, context.reduction, context.counts.own)
                    loss: Any = sum(context.counts.divide(n, v) for n, v in sums.losses.items())
                    parts = torch.autograd.grad(loss, own, allow_unused=True)
                    for grad, part in zip(grads, parts, strict=True):
                        if part is not None:
                            grad.add_(part)
                    for term, value in sums.values.items():
                        values[term] = values.get(term, 0.0) + value
        finally:
            for parameter in own:
                parameter.requires_grad_(False)
        self._apply(name, context.total(grads))
        return values

    def _apply(self, name: str, grads: Sequence[Tensor]) -> None:
        optimizer = self.optimizers[name]
        if not all(bool(g.isfinite().all()) for g in grads):
            self.failed[name] += 1
            if self.failed[name] >= MOST_FAILURES:
                raise InputError(
                    f"The gradient of {name!r} was not finite {MOST_FAILURES} times in a row: lower its learning rate, or "
                    "check its inputs."
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
        """State of each optimiser, and the number of consecutive steps that failed."""
        return {"optimizers": {n: o.state_dict() for n, o in self.optimizers.items()}, "failed": dict(self.failed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.failed = dict(state["failed"])
