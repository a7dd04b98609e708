"""The order of examples, draws and shares of them: by seed, epoch and step alone, so that a resumed run sees the same."""

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
    """Which examples an epoch draws, in place of each one once.

    Args:
        indices: `[n]`, the examples to draw from; all if not given.
        weights: `[n]`, draw with replacement in proportion to these; without them each once, again and again where the
            epoch is longer.
        streams: parts of every micro-batch in place of `indices`: pairs of indices and how many of them a micro-batch has.
            Each stream is shuffled and begins again when it is at its end.
    """

    indices: Tensor | None = None
    weights: Tensor | None = None
    streams: Sequence[tuple[Tensor, int]] = ()


class EpochSampler(Sampler[int]):
    """The order of an epoch's examples. It depends on seed, epoch and the epoch's `Sampling` alone, so a resumed run sees
    the same.

    Args:
        examples: of the data set.
        length: draws an epoch; the data set's size if not given.
    """

    def __init__(self, examples: int, seed: int, length: int | None = None) -> None:
        self.examples, self.seed, self.epoch = examples, seed, 0
        self.length = examples if length is None else length
        self.sampling: Sampling | None = None

    def set_epoch(self, epoch: int, sampling: Sampling | None = None) -> None:
        """Begin an epoch, with what it draws from.

        Raises:
            InputError: there is nothing to draw from, or an index or weight that cannot be drawn.
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
        """The epoch and what it draws from, which a method may have chosen by weights that have changed since."""
        chosen = self.sampling
        held = None
        if chosen is not None:
            held = {"indices": chosen.indices, "weights": chosen.weights, "streams": [list(s) for s in chosen.streams]}
        return {"epoch": self.epoch, "sampling": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        held = state["sampling"]
        chosen = None
        if held is not None:
            chosen = Sampling(held["indices"], held["weights"], [(i, int(n)) for i, n in held["streams"]])
        self.set_epoch(state["epoch"], chosen)


def _shuffled(indices: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """`number` draws: permutations of `indices` one after the other."""
    parts, left = [], number
    while left > 0:
        part = indices[torch.randperm(len(indices), generator=generator)][:left]
        parts.append(part)
        left -= len(part)
    return torch.cat(parts) if parts else indices[:0]


class Share(Sampler[list[int]]):
    """One rank's micro-batches: together the ranks see what one process would, each example once.

    The last round of an epoch is shared out as evenly as it goes. Every rank has as many rounds, so that none waits for
    another in vain; one that nothing is left for gets an example that is not to count, written as −1 − index.

    Args:
        order: of all examples.
        micro: examples of a full micro-batch.
        drop_last: leave out a round that is not full.
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
        examples: by index.
        collate_plain: from examples to a dictionary.
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
