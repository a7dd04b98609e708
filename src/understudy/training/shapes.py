"""The widths that a method's own modules need, measured on two examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models import ModelAdapter, ModelOutput, evaluating


@dataclass(frozen=True)
class Shapes:
    """What a method may need to build its own modules.

    Args:
        classes: number of classes of the task.
        features, teacher_features: width of the hidden state before the head, if the method requires it.
        taps, teacher_taps: shape of each tapped output, without the axis of examples.
        inputs: shape of each input, without the axis of examples.
        tables: what `setup` returned, for modules that are initialised from it.
        student, teacher: both models, for modules that are built from them; `None` for a teacher that does not run
            here.
    """

    classes: int
    features: int | None = None
    teacher_features: int | None = None
    taps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    teacher_taps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    student: ModelAdapter | None = None
    teacher: ModelAdapter | None = None


@torch.no_grad()
def look(
    model: ModelAdapter, batch: Batch, *, features: bool = False, taps: Mapping[str, nn.Module] | None = None
) -> ModelOutput:
    """One forward pass in evaluation mode; the mode of every module is restored."""
    with evaluating(model):
        return model(batch.to(next(model.parameters()).device), features=features, taps=taps)


def probe(
    method: Any,
    classes: int,
    sides: Mapping[str, ModelAdapter | None],
    taps: Mapping[str, Mapping[str, nn.Module]],
    batch: Batch,
    tables: Mapping[str, Tensor] | None = None,
) -> Shapes:
    """Measure the shapes that a method gets on `batch`, with the features it requires and its taps."""
    found: dict[str, Any] = {}
    for side, prefix in (("student", ""), ("teacher", "teacher_")):
        model, asks = sides[side], getattr(method.requires, f"{prefix}features")
        if model is None or not (asks or taps[side]):
            continue
        rows = look(model, batch, features=asks, taps=taps[side])
        if asks and rows.features is None:
            raise InputError(f"The {side} shows no features before its classifier, which {method.name!r} needs.")
        found[f"{prefix}features"] = rows.features.shape[-1] if rows.features is not None else None
        found[f"{prefix}taps"] = {name: tuple(value.shape[1:]) for name, value in rows.taps.items()}
    found["inputs"] = {name: tuple(value.shape[1:]) for name, value in batch.inputs.items()}
    return Shapes(classes, **found, tables=dict(tables or {}))
