"""The order of examples, draws and shares of them: by seed, epoch and step alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler


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


class Share(Sampler[list[int]]):
    """One rank's micro-batches: together the ranks see what one process would, each example once.

    The last round of an epoch is shared out as evenly as it goes. Every rank has as many rounds, so that none waits for
    another in vain; one that nothing is left for gets an example that is not to count, written as −1 − index.

    Args:
        order: of all examples. micro: examples of a full micro-batch. drop_last: leave out a round that is not full.
    """

    def __init__(self, order: Sampler[int], micro: int, ranks: int, rank: int, drop_last: bool = False) -> None:
        self.order, self.micro, self.ranks, self.rank, self.drop_last = order, micro, ranks, rank, drop_last

    def __len__(self) -> int:
        examples, size = len(self.order), self.micro * self.ranks  # type: ignore[arg-type]
        return examples // size if self.drop_last else -(-examples // size)

    def __iter__(self) -> Iterator[list[int]]:
        order, size = list(self.order), self.micro * self.ranks
        for start in range(0, len(self) * size, size):
            left = order[start : start + size]
            each, more = divmod(len(left), self.ranks)
            first = self.rank * each + min(self.rank, more)
            yield left[first : first + each + (self.rank < more)] or [-1 - left[0]]


COUNTS = "counts_for_its_rank"


class Shared(Dataset[Any]):
    """A data set read through `Share`, with the key `COUNTS` in what is collated.

    Args:
        examples: by index. collate_plain: from examples to a dictionary.
    """

    def __init__(self, examples: Any, collate_plain: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.examples, self.collate_plain = examples, collate_plain

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        return self.examples[index if index >= 0 else -1 - index], index >= 0

    def collate(self, found: list[tuple[Any, bool]]) -> dict[str, Any]:
        """As `collate_plain`, with whether the micro-batch counts."""
        return {**self.collate_plain([example for example, _ in found]), COUNTS: found[0][1]}


def draw(length: int, number: int | None, seed: int, step: int) -> list[int]:
    """`number` of `length` examples, different at each step and the same again on resume; all where there are fewer."""
    if number is None or number >= length:
        return list(range(length))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step + 0x5EED)
    return torch.randperm(length, generator=generator)[:number].tolist()
