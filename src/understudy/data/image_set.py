"""Images with labels, held in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


def training_order(number: int) -> Tensor:
    """The order in which training examples are given out: those set aside first, then as many as limits allow."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(0))


class ImageSet(Dataset[tuple[Any, ...]]):
    """Images with labels and ids, held in memory.

    Args:
        pixels: `[images, channels, height, width]`, uint8 (0 … 255) or float features.
        labels: `[images]`, int64.
        ids: `[images]`, int64.
        clean: `[images]`, the labels before noise was added, if it was.
        parts: `[images, 2]`, int64, the true class and subclass of each, if subclasses are known.
        domains: `[images]`, the name of each image's domain, if the data have a column of domains.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        ids: Tensor,
        clean: Tensor | None = None,
        parts: Tensor | None = None,
        domains: np.ndarray[Any, Any] | None = None,
    ) -> None:
        self.pixels, self.labels, self.ids, self.clean, self.parts = pixels, labels, ids, clean, parts
        self.domains = domains

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        found = self.pixels[index], int(self.labels[index]), int(self.ids[index])
        return found if self.domains is None else (*found, str(self.domains[index]))

    def __getitems__(self, indices: list[int]) -> ImageSet:
        """A loader asks for a whole batch, and `collate_images` reads the columns of the part it gets."""
        return self.select(torch.tensor(indices))

    def select(self, index: Tensor | slice) -> ImageSet:
        clean, parts = (v[index] if v is not None else None for v in (self.clean, self.parts))
        domains = (
            self.domains[index if isinstance(index, slice) else index.numpy()] if self.domains is not None else None
        )
        return ImageSet(self.pixels[index], self.labels[index], self.ids[index], clean, parts, domains)

    def relabelled(self, labels: Tensor, clean: Tensor | None = None) -> ImageSet:
        """The same images with other labels."""
        clean = clean if clean is not None else self.clean
        return ImageSet(self.pixels, labels, self.ids, clean, self.parts, self.domains)
