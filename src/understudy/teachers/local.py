"""A teacher in this process: any model adapter, with its own mode, dtype and device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.models import ModelAdapter, ModelOutput, evaluating
from understudy.models.sharding import ranks, shard
from understudy.models.taps import entered


class Teacher(Protocol):
    """The interface of all teachers."""

    name: str

    def __call__(self, batch: Batch) -> ModelOutput:
        """The outputs for the rows of the batch, detached and on the batch's device."""
        ...

    def through(self, batch: Batch) -> ModelOutput:
        """The same with gradient to the inputs; teachers without gradient raise an `InputError`."""
        ...


class LocalTeacher:
    """A model that is run for every batch.

    It runs in evaluation mode and restores the mode of every module, also of those shared with the student. Its
    parameters are frozen unless a student shares them.

    Args:
        model: the adapter of the model.
        name: for messages and reports.
        device: of the model; `None` leaves it where it is.
        freeze: turn off the gradients of its parameters.
        features, taps: further outputs: features before the head, outputs of these layers.
        sharded: shard its weights over the ranks, each on its `device`. Every rank must call it equally often.
        autocast: run in the mixed precision around the call, as a student does that it is compared with.
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
        autocast: bool = False,
    ) -> None:
        self.model, self.name, self.features, self.taps = model, name, features, taps
        self.autocast = autocast
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
        """The same with gradient to the batch's inputs, for methods that optimise the inputs."""
        batch = batch.for_teacher()
        home = batch.labels.device
        device = next((p.device for p in self.model.parameters()), home)  # a cache or server has no parameters
        own = nullcontext() if self.autocast else torch.autocast(home.type, enabled=False)
        with evaluating(self.model), own:
            rows: ModelOutput = self.model(batch if device == home else batch.to(device), self.features, self.taps)
        return rows if device == home else rows.to(home)

    def resumed(self, batch: Batch, tap: str, value: Tensor) -> ModelOutput:
        """The outputs and taps that follow if the tapped layer `tap` gives `value`, with gradient to it."""
        layer = self.taps[tap]  # type: ignore[index]
        device = next((p.device for p in self.model.parameters()), value.device)
        with entered(layer, value.to(device)):
            return self.through(batch)
