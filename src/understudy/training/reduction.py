"""Counting the rows of an update, and the one place that divides a loss.

A loss term has one value per row. Its sum over the rows of an update, over all micro-batches and ranks, is divided
once: by the number of rows (or sequences, by `reduction`), or by the term's own count if the method gives one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from understudy.data import Batch
from understudy.losses.reduction import row_weights


class Term(NamedTuple):
    """One named part of the loss.

    Args:
        values: `[rows]`, differentiable and not reduced.
        weight: factor of this term in the total.
    """

    values: Tensor
    weight: float = 1.0


class TermSums(NamedTuple):
    """Terms summed over the rows of a micro-batch.

    Args:
        losses: by term, a scalar with gradient, the term's weight included.
        values: by term, the same sum without the term's weight and detached, for logs and schedules.
    """

    losses: dict[str, Tensor]
    values: dict[str, Tensor]


def sum_terms(terms: Mapping[str, Term], batch: Batch, reduction: str, own: Container[str] = ()) -> TermSums:
    """Sum each term over the rows of a micro-batch.

    Args:
        reduction: how rows are weighted, as in `understudy.losses.reduction`.
        own: terms with their own count; their rows have weight 1.
    """
    losses, values, weights = {}, {}, None
    for name, term in terms.items():
        if name in own or reduction != "sequence_mean":
            total = term.values.sum()
        else:
            if weights is None:
                weights, _ = row_weights(reduction, batch.sequence, term.values.dtype)
            total = (term.values * weights).sum()
        losses[name], values[name] = total if term.weight == 1 else term.weight * total, total.detach()
    return TermSums(losses, values)


@dataclass(frozen=True)
class Counts:
    """The divisors of an update, counted over its micro-batches and ranks.

    Args:
        items: number of rows.
        units: number of units that `reduction` divides by (rows or sequences; 0 if it does not divide).
        own: counts of single terms, by name.
    """

    items: float = 0.0
    units: float = 0.0
    own: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, reduction: str, own: Mapping[str, float]) -> Counts:
        """The counts of one micro-batch."""
        items = batch.num_items
        if reduction == "token_mean":
            return cls(items, items, own)
        return cls(items, 0 if reduction == "sum" else batch.sequence.unique().numel(), own)

    @classmethod
    def total(cls, parts: Sequence[Counts], reduce: Callable[[list[float]], list[float]]) -> Counts:
        """The sum of the counts of micro-batches; `reduce` then sums a list of numbers over the ranks."""
        names = list(parts[0].own)
        flat = [[p.items, p.units, *(p.own[n] for n in names)] for p in parts]
        items, units, *own = reduce([float(sum(column)) for column in zip(*flat, strict=True)])
        return cls(items, units, dict(zip(names, own, strict=True)))

    def scaled(self, factor: float) -> Counts:
        """All counts times a factor: 0 for a padding micro-batch, which another rank counts."""
        return Counts(factor * self.items, factor * self.units, {n: factor * v for n, v in self.own.items()})

    def divide(self, name: str, total: Tensor) -> Tensor:
        """Divide a term's sum by its count. Nothing else in the project divides a loss. A count of 0 divides by 1."""
        return total / max(1.0, self.own.get(name, self.units))

    def mean(self, name: str, total: Tensor) -> Tensor:
        """The mean of a term, for logs and schedules: as `divide`, or per row if the loss is a sum."""
        return total / max(1.0, self.own.get(name, self.units or self.items))
