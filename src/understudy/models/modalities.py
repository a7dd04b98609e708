"""Classifiers of examples with several modalities, each of which reads some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError, nearest
from understudy.models.adapters import ClassifierAdapter
from understudy.models.modes import evaluating
from understudy.models.processors import Processor
from understudy.models.weights import reason

OPTIONS = {
    "reads": ("text or list", "–", "The modalities that the model reads; the student reads the first by default.")
}
"""Keys of `options`, with the type, default and meaning of each."""


class ModalitiesAdapter(ClassifierAdapter):
    """A classifier that reads some modalities of an example, and never sees the others.

    Args:
        model: called with one tensor `[examples, channels, height, width]` for each modality, in the order of `reads`;
            returns logits or an output with `logits`.
        classes: number of classes.
        reads: names of inputs of a batch.
        normalise, processor: as of a `ClassifierAdapter`, for a single modality.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        reads: Sequence[str],
        normalise: tuple[list[float], list[float]] | None = None,
        processor: Processor | None = None,
    ) -> None:
        super().__init__(model, classes, normalise, processor)
        self.reads = tuple(reads)

    def logits(self, batch: Batch) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        shown = [self.shown(batch.inputs[name]).to(dtype) for name in self.reads]
        return self.checked(self.model(*shown), len(batch.ids))

    @torch.no_grad()
    def try_on(self, shape: Any) -> None:
        """Classify two blank examples, as a test.

        Args:
            shape: `(channels, height, width)` of each modality, by name.

        Raises:
            InputError: the model does not accept them, or returns no logits for them.
        """
        first = next(self.model.parameters(), None)
        if first is None or first.is_meta or not first.numel():
            return
        blank = {name: torch.zeros(2, *shape[name], device=first.device) for name in self.reads}
        with evaluating(self.model):
            try:
                self.logits(Batch(blank, torch.zeros(2).long(), torch.arange(2)))
            except InputError:
                raise
            except Exception as error:  # models raise any type on inputs that they do not support
                shapes = ", ".join(f"{name} {list(shape[name])}" for name in self.reads)
                raise InputError(
                    f"{type(self.model).__name__} cannot read {shapes}, each an input of its own in this order: "
                    f"{reason(error)}. Choose another model, or other modalities with options.reads."
                ) from error


def read_by(side: str, options: Mapping[str, Any] | None, known: Sequence[str]) -> list[str]:
    """The modalities that a model reads by its `options.reads`: a name, or a list of them; all if it is not given.

    Raises:
        InputError: not among `known`, or one twice.
    """
    given = (options or {}).get("reads")
    names = list(known) if given is None else [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise InputError(f"{side}: options.reads is {given!r} and must name modalities, each once: {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise InputError(
                f"{side}: options.reads names {name!r}.{nearest(str(name), known)} The data's modalities are {', '.join(known)}."
            )
    return names
