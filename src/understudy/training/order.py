"""Samplers: the order of examples and each rank's share of them depend on seed, epoch and step alone, so that a resumed run
gets the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from understudy.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How an epoch draws its examples. Without it an epoch has each example once.

    Args:
        indices: `[n]`, the examples to draw from; all if not given.
        weights: `[n]`, draw with replacement with probabilities proportional to these. Without weights each example is
            drawn once, and again in a new order if the epoch is longer.
        streams: instead of `indices`, the composition of every micro-batch: pairs of (indices, number per micro-batch).
            Each stream is shuffled and starts again at its end.
    """

    indices: Tensor | None = None
    weights: Tensor | None = None
    streams: Sequence[tuple[Tensor, int]] = ()


class EpochSampler(Sampler[int]):
    """The order of an epoch's examples. It depends on seed, epoch and the epoch's `Sampling` alone, so that a resumed run
    has the same order.

    Args:
        examples: number of examples in the data set.
        length: number of examples per epoch; the size of the data set if not given.
    """

    def __init__(self, examples: int, seed: int, length: int | None = None) -> None:
        self.examples, self.seed, self.epoch = examples, seed, 0
        self.length = examples if length is None else length
        self.sampling: Sampling | None = None

    def begin(self, epoch: int, sampling: Sampling | None = None) -> None:
        """Start an epoch with the given `Sampling`. Data loaders call a `set_epoch` of their own accord, which would drop it.

        Raises:
            InputError: there are no examples to draw from, or an index or weight is invalid.
        """
        self.epoch, self.sampling = epoch, sampling
        if sampling is not None:
            parts: list[Tensor | None] = [indices for indices, _ in sampling.streams] or [sampling.indices]
            for part in (p for p in parts if p is not None):
                if not len(part) or int(part.min()) < 0 or int(part.max()) >= self.examples:
                    raise InputError(f"An epoch draws from {len(part)} of {self.examples} examples: give some of them.")
            w, n = sampling.weights, self.examples if sampling.indices is None else len(sampling.indices)
            if w is not None and (len(w) != n or not bool((w >= 0).all()) or not 0 < float(w.sum()) < float("inf")):
                raise InputError(f"Sampling weights are one number of at least 0 for each of {n} examples, not all 0.")

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        chosen = self.sampling or Sampling()
        if chosen.streams:
            rounds = -(-self.length // sum(number for _, number in chosen.streams))
            columns = [_shuffled(i, rounds * number, generator).view(rounds, number) for i, number in chosen.streams]
            return iter(torch.cat(columns, 1).flatten()[: self.length].tolist())
        every = torch.arange(self.examples) if chosen.indices is None else chosen.indices
        if chosen.weights is not None:
            drawn = torch.multinomial(chosen.weights.double(), self.length, replacement=True, generator=generator)
            return iter(every[drawn].tolist())
        return iter(_shuffled(every, self.length, generator).tolist())

    def state_dict(self) -> dict[str, Any]:
        """The epoch and its `Sampling`, which cannot be computed again: it may depend on weights that have changed."""
        chosen = self.sampling
        held = None
        if chosen is not None:
            held = {"indices": chosen.indices, "weights": chosen.weights, "streams": [list(s) for s in chosen.streams]}
        return {"epoch": self.epoch, "sampling": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        held = state["sampling"]
        chosen = None
        if held is not None:
            chosen = Sampling(held["indices"], held["weights"], [(i, int(n)) for i, n in held["streams"]])
        self.begin(state["epoch"], chosen)


def _shuffled(indices: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """`number` draws: one permutation of `indices` after another."""
    parts, left = [], number
    while left > 0:
        part = indices[torch.randperm(len(indices), generator=generator)][:left]
        parts.append(part)
        left -= len(part)
    return torch.cat(parts) if parts else indices[:0]


class Share(Sampler[list[int]]):
    """One rank's micro-batches. Together the ranks process the batches of a single process, each example once.

    The last round of an epoch is divided as evenly as possible. Every rank has the same number of rounds, so that
    collectives match; a rank without examples gets a padding example that does not count, encoded as −1 − index.

    Args:
        order: indices of all examples in order.
        micro: examples per full micro-batch.
        drop_last: leave out a last round that is not full.
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
    """A data set indexed by `Share`; the collated dictionary says under the key `COUNTS` whether the micro-batch counts.

    Args:
        examples: the data set.
        collate_plain: collates a list of examples into a dictionary.
    """

    def __init__(self, examples: Any, collate_plain: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.examples, self.collate_plain = examples, collate_plain

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        return self.examples[index if index >= 0 else -1 - index], index >= 0

    def collate(self, found: list[tuple[Any, bool]]) -> dict[str, Any]:
        """Apply `collate_plain` and add whether the micro-batch counts."""
        return {**self.collate_plain([example for example, _ in found]), COUNTS: found[0][1]}


def draw(length: int, number: int | None, seed: int, step: int) -> list[int]:
    """Draw `number` of `length` examples, by seed and step alone; all of them if there are fewer."""
    if number is None or number >= length:
        return list(range(length))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step + 0x5EED)
    return torch.randperm(length, generator=generator)[:number].tolist()
