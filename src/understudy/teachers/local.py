"""A teacher in this process: any model with rows, in its own mode, dtype and place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from understudy.data import Batch
from understudy.models import ModelAdapter, ModelOutput, evaluating
from understudy.models.sharding import ranks, shard


class Teacher(Protocol):
    """What a method's engine asks of any teacher."""

    name: str

    def __call__(self, batch: Batch) -> ModelOutput:
        """What the teacher says about the batch's rows, detached and on the batch's device."""
        ...

    def through(self, batch: Batch) -> ModelOutput:
        """The same with gradient to the inputs; a teacher that cannot give it refuses."""
        ...


class LocalTeacher:
    """A model that is run when it is asked.

    Its mode is its own: it answers in evaluation mode and leaves every module, also one that it shares with the
    student, in the mode it found it in. Its parameters are frozen unless a student shares them.

    Args:
        model: gives the rows of a batch.
        name: for messages and reports.
        device: where it lives; `None` leaves it where it is.
        freeze: turn off the gradients of its parameters.
        features, taps: what to answer beside the signal: features before the head, outputs of these layers.
        sharded: spread its weights over the ranks, each on its `device`. Every rank must ask as often as the others.
    """

    def __init__(
        self,
        model: ModelAdapter,
        name: str,
        device: torch.device | str | None = None,
        freeze: bool = True,
        *,
        features: bool = False,
        taps: Mapping[str, nn.Module] | None = None,
        sharded: bool = False,
    ) -> None:
        self.model, self.name, self.features, self.taps = model, name, features, taps
        if freeze:
            model.requires_grad_(False)
        if sharded and ranks() > 1:
            shard(model, device if device is not None else "cpu")
        elif device is not None:
            model.to(device)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> ModelOutput:
        """`Dense` or `Projected` rows of the batch, detached.

        Half-precision teachers compute in their own dtype; the head product is left to the loss, in float32.
        """
        return self.through(batch).detach()

    def through(self, batch: Batch) -> ModelOutput:
        """The same with gradient to the batch's inputs, for a player that makes them."""
        home = batch.labels.device
        device = next((p.device for p in self.model.parameters()), home)  # some answer from elsewhere
        with evaluating(self.model), torch.autocast(home.type, enabled=False):
            rows: ModelOutput = self.model(batch if device == home else batch.to(device), self.features, self.taps)
        return rows if device == home else rows.to(home)
