"""A teacher in this process: any model with rows, in its own mode, dtype and place."""

from __future__ import annotations

from typing import Protocol

import torch

from understudy.data import Batch
from understudy.models import RowModel
from understudy.targets import Target


class Teacher(Protocol):
    """What a method's engine asks of any teacher."""

    name: str

    def targets(self, batch: Batch) -> Target:
        """What the teacher says about the batch's rows, detached and on the batch's device."""
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
    """

    def __init__(
        self, model: RowModel, name: str, device: torch.device | str | None = None, freeze: bool = True
    ) -> None:
        self.model = model if device is None else model.to(device)
        self.name = name
        if freeze:
            self.model.requires_grad_(False)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Target:
        """`Dense` or `Projected` rows of the batch, detached.

        Half-precision teachers compute in their own dtype; the head product is left to the loss, in float32.
        """
        training = [m for m in self.model.modules() if m.training]
        for module in training:
            module.training = False
        device = next(self.model.parameters()).device
        home = batch.labels.device
        with torch.autocast(home.type, enabled=False):
            signal = self.model(batch if device == home else batch.to(device)).signal
        for module in training:
            module.training = True
        return signal.detach() if device == home else signal.detach().to(home)
