"""A small network that reads several inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """One hidden layer for each input, a fully connected network on all of them together, and a linear head.

    Args:
        shapes: of the inputs, without the axis of examples.
        width: units of each input's layer. hidden: units of the common layers.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], width: int, hidden: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), width), nn.ReLU()) for shape in shapes
        )
        widths = (len(shapes) * width, *hidden)
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `[examples, classes]` of one tensor for each input."""
        found = [branch(x) for branch, x in zip(self.branches, inputs, strict=True)]
        return self.head(self.body(torch.cat(found, 1)))
