"""Training and evaluation mode of models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; the mode of every module is restored, also after an exception."""
    training = [m for model in models for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def without_dropout(model: nn.Module) -> None:
    """Set the probabilities of dropout to 0 in all modules: those of dropout layers, and the numbers that modules of
    transformers keep beside these (`attention_dropout`, `layerdrop`). The model's configuration stays as it is."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in [n for n, value in vars(module).items() if "drop" in n and isinstance(value, float)]:
            setattr(module, name, 0.0)
