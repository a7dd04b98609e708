"""The order of examples, and draws of them: by seed, epoch and step alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochShuffle(Sampler[int]):
    """A permutation of the data set that depends on seed and epoch alone, so a resumed run sees the same order."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


def draw(length: int, number: int | None, seed: int, step: int) -> list[int]:
    """`number` of `length` examples, different at each step and the same again on resume; all where there are fewer."""
    if number is None or number >= length:
        return list(range(length))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step + 0x5EED)
    return torch.randperm(length, generator=generator)[:number].tolist()
