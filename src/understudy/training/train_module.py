"""The student and the method's own modules as one module that is trained, wrapped and checkpointed.

The loss is computed inside `forward`, so that wrappers of the module (DDP, FSDP, autocast, compile) cover all of it,
including the product with the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models import ModelAdapter, ModelOutput, evaluating, find_head
from understudy.models.sharding import block_names, usable
from understudy.training.method import Method, TrainState
from understudy.training.phases import Phase, freeze_all_but
from understudy.training.reduction import Term, TermSums, sum_terms
from understudy.training.setup import SetupContext
from understudy.training.shapes import Shapes

ROUTER = "router"
"""Term of the loss that balances the experts of a mixture, counted once an update."""


class TrainModule(nn.Module):
    """A student with its method.

    Args:
        student: the adapter of the trained model.
        method: defines the loss.
        shapes: shapes for the method's own modules.
        total: optimizer steps of the run.
        reduction: what an update divides by, as in `understudy.losses.reduction`.
        taps: inner layers of the student that the method reads.
        tables: what the method's `setup` returned.
        context: the argument of `setup`.
        seed: of the run.
    """

    def __init__(
        self,
        student: ModelAdapter,
        method: Method,
        shapes: Shapes,
        total: int,
        reduction: str = "token_mean",
        taps: Mapping[str, nn.Module] | None = None,
        tables: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        context: SetupContext | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.own = nn.ModuleDict(method.modules(shapes))
        self.method = method
        self.reduction = reduction
        self._taps = dict(taps or {})  # a plain dict, since the layers are registered in the student already
        self.companions = nn.ModuleDict(method.companions(student)).requires_grad_(False).eval()
        self.train_state = TrainState(
            modules=dict(self.own.items()),
            companions=dict(self.companions.items()),
            tables=dict(tables or {}),
            columns=context.columns if context is not None else {},
            taps=self._taps,
            context=context,
            student=student,
            method_state=method.init_state(total),
            total=total,
            seed=seed,
        )
        self.head_timer: Any = nullcontext
        self._frozen: list[nn.Module] = []

    @property
    def _no_split_modules(self) -> list[str]:
        """The blocks that FSDP2 shards separately. The rest, including the head, is one group and gathered while
        `forward` runs."""
        return block_names(self.student)

    def begin_phase(self, phase: Phase, steps: int, trainable: set[int]) -> None:
        """Freeze what the phase does not train, and restart the step count.

        Args:
            phase: the phase that begins.
            steps: its optimizer steps.
            trainable: ids of the parameters that may be trained at all.
        """
        parts = {"student": self.student, **dict(self.own.items())}
        self._frozen = freeze_all_but(parts, phase.train, trainable, phase.parameters)
        self.train_state.phase, self.train_state.step, self.train_state.total = phase.name, 0, steps
        self.method.on_phase_begin(self.train_state)

    def train(self, mode: bool = True) -> TrainModule:
        """Set the mode; companions and modules that the phase freezes stay in evaluation mode."""
        super().train(mode)
        for part in (*self.companions.values(), *self._frozen):
            part.eval()
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Enable gradient checkpointing of the student's model, for `trainer.gradient_checkpointing`."""
        inner = self.student.model
        if not hasattr(inner, "gradient_checkpointing_enable"):
            raise InputError(
                f"{type(inner).__name__} has no gradient checkpointing: leave trainer.gradient_checkpointing out."
            )
        # The re-entrant kind loses gradients where the embeddings are frozen, as they are under adapters.
        inner.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}, **more
        )

    def forward(self, batch: Batch, teacher: ModelOutput | None) -> TermSums:
        """The sum of each term over the rows of the batch."""
        output = self.student(batch, self.method.requires.features, self._taps)
        timer: AbstractContextManager[Any] = self.head_timer()
        with timer:
            found = self.method.loss(output, teacher, batch, self.train_state)
            terms = {name: term._replace(values=batch.weighted(term.values)) for name, term in found.items()}
        if output.router is not None:
            terms = {**terms, ROUTER: Term(output.router.expand(batch.num_items))}
        return sum_terms(terms, batch, self.reduction, self.counts(batch))

    def sum_ahead(
        self,
        batches: Iterable[Batch],
        counting: Iterable[bool],
        total: Callable[[Sequence[Tensor]], list[Tensor]],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Give the method what it sums over an update before the update's first loss (`Method.update_sums`), with the
        student in evaluation mode.

        Args:
            batches, counting: the update's micro-batches on this rank, and which of them count. total: sums over ranks.
            autocast: the context of mixed precision.
        """
        if type(self.method).update_sums is Method.update_sums:
            return
        sums: dict[str, Any] = {}
        with autocast(), torch.no_grad(), usable(self), evaluating(self.student):
            for batch, counts in zip(batches, counting, strict=True):
                for name, value in self.method.update_sums(batch, self.train_state).items():
                    sums[name] = sums.get(name, 0.0) + value * float(counts)
        self.train_state.update_sums = dict(zip(sums, total([*sums.values()]), strict=True))

    def counts(self, batch: Batch) -> dict[str, float]:
        """Divisors of terms that are not divided by the number of rows: those of the method, and that of the routers' loss,
        which is a mean over micro-batches by their rows, whatever `reduction` is."""
        found = self.method.counts(batch)
        return {**found, ROUTER: float(batch.num_items)} if self.student.balances else found

    def owners(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters with the name of the part each belongs to: `backbone`, `head`, or an own module's name."""
        head = find_head(self.student)
        in_head = set(map(id, head.parameters())) if head is not None else set()
        named: list[tuple[str, nn.Parameter]] = []
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.startswith("own."):
                named.append((name.split(".")[1], parameter))
            else:
                named.append(("head" if id(parameter) in in_head else "backbone", parameter))
        return named
