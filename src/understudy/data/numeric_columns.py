"""Columns of numbers that a method adds to the examples before training and a loss reads: one number per example or
token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from understudy.data.batch import Batch
from understudy.data.lists import ListBatch
from understudy.errors import InputError


class Column:
    """Numbers stored by example id, so that they match their example in any order, batch or split.

    Create one with `by_example` or `by_token`.

    Args:
        name: for messages.
        ids: `[examples]`.
        values: `[examples, …]`; or `[tokens]`, those of all examples concatenated, with the number of tokens of each in
            `lengths`, `[examples]`.
    """

    def __init__(self, name: str, ids: Tensor, values: Tensor, lengths: Tensor | None = None) -> None:
        order = ids.argsort(stable=True)
        self.name, self.ids = name, ids[order]
        if len(ids) > 1 and bool((self.ids[1:] == self.ids[:-1]).any()):
            raise InputError(f"Column {name!r} has two entries for one example: ids must be distinct.")
        held = len(values) if lengths is None else int(lengths.sum())
        counted = len(ids) if lengths is None else len(values)
        if held != counted:
            raise InputError(f"Column {name!r} has {len(values)} values for {counted if lengths is None else held}.")
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"Column {name!r} has a value that is not finite.")
        self.lengths = lengths[order] if lengths is not None else None
        if lengths is None:
            self.values = values[order]
        else:
            ends = lengths.cumsum(0)
            parts = [values[int(ends[i] - lengths[i]) : int(ends[i])] for i in order.tolist()]
            self.values = torch.cat(parts) if parts else values
            self.starts = self.lengths.cumsum(0) - self.lengths  # type: ignore[union-attr,operator]

    @classmethod
    def by_example(cls, name: str, ids: Tensor, values: Tensor) -> Column:
        """One entry per example: `values` is `[examples, …]`."""
        return cls(name, ids, values)

    @classmethod
    def by_token(cls, name: str, ids: Tensor, values: Sequence[Tensor]) -> Column:
        """Numbers for each row (counted token) of an example: `values` holds a `[rows, …]` tensor an example. The tokens of a
        list are those of its candidates, one after the other."""
        lengths = torch.tensor([len(v) for v in values], dtype=torch.long)
        return cls(name, ids, torch.cat(list(values)) if values else torch.empty(0), lengths)

    def tensors(self) -> dict[str, Tensor]:
        """As tensors that can be stored (`SetupContext.once`); `from_tensors` is the inverse."""
        lengths = {"lengths": self.lengths} if self.lengths is not None else {}
        return {"ids": self.ids, "values": self.values, **lengths}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor]) -> Column:
        """The inverse of `tensors`."""
        return cls(name, tensors["ids"], tensors["values"], tensors.get("lengths"))

    def of_examples(self, batch: Batch) -> Tensor:
        """The entries of a batch's examples, `[examples, …]`, on the batch's device."""
        if self.lengths is not None:
            raise InputError(f"Column {self.name!r} has numbers by token: read it with `of_rows`.")
        return self.values[self._place(batch)].to(batch.ids.device)

    def of_rows(self, batch: Batch) -> Tensor:
        """The numbers of a batch's rows, `[rows, …]`: by token, or that of each row's example."""
        if self.lengths is None:
            return self.of_examples(batch)[batch.sequence]
        return self._by_token(batch, batch.sequence)

    def of_tokens(self, batch: ListBatch) -> Tensor:
        """The numbers of the completion tokens of a batch of lists, `[tokens, …]`: by token, in the order of `batch.tokens`'
        rows."""
        return self._by_token(batch, batch.token_lists)

    def _by_token(self, batch: Batch, owner: Tensor) -> Tensor:
        """`owner`, `[rows]`, is the example each number belongs to."""
        assert self.lengths is not None
        if batch.source is not None and bool((batch.source > 0).any()):
            raise InputError(
                f"Column {self.name!r} has numbers for the data's own tokens, and texts written during training have none."
            )
        place = self._place(batch)
        counts = torch.bincount(owner.cpu(), minlength=len(batch.ids))
        wrong = (counts != self.lengths[place]).nonzero()
        if len(wrong):
            i = int(wrong[0, 0])
            raise InputError(
                f"Column {self.name!r} has {int(self.lengths[place[i]])} numbers for example {int(batch.ids[i])}, which has "
                f"{int(counts[i])} rows: compute the column on the data as they are trained on."
            )
        parts = [self.values[int(self.starts[p]) : int(self.starts[p] + self.lengths[p])] for p in place.tolist()]
        return torch.cat(parts).to(batch.ids.device) if parts else self.values[:0]

    def _place(self, batch: Batch) -> Tensor:
        ids: Any = batch.ids.cpu()
        place = torch.searchsorted(self.ids, ids).clamp(max=max(0, len(self.ids) - 1))
        missing = (self.ids[place] != ids).nonzero() if len(self.ids) else torch.zeros(1, 1, dtype=torch.long)
        if len(missing):
            raise InputError(
                f"Column {self.name!r} has nothing for example {int(ids[int(missing[0, 0])])}: it covers "
                f"{len(self.ids)} examples. Texts that the student writes during training have no columns."
            )
        return place
