"""Pairs of a better and a worse candidate out of lists."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from understudy.data import ListBatch
from understudy.data.noise import uniform


def ordered_pairs(batch: ListBatch, which: Literal["extremes", "random", "all"]) -> tuple[Tensor, Tensor, Tensor]:
    """The list, the better and the worse candidate of each pair, `[pairs]` each.

    Args:
        which: the best and the worst of each list, one pair drawn by the list's id, or all of unequal scores.
    """
    if which == "extremes":
        return torch.arange(batch.num_items, device=batch.ids.device), batch.best, batch.worst
    both = batch.candidates[:, :, None] & batch.candidates[:, None, :]
    ordered = (batch.scores[:, :, None] > batch.scores[:, None, :]) & both
    if which == "random":
        lot = uniform(batch.ids, ordered.shape[1:], seed=0, step=0).masked_fill(~ordered, 0.0).flatten(1)
        ordered = torch.zeros_like(ordered).flatten(1).scatter(1, lot.argmax(1, keepdim=True), True).view_as(ordered)
    row, better, worse = ordered.nonzero(as_tuple=True)
    return row, better, worse


def mean_by_list(values: Tensor, row: Tensor, batch: ListBatch) -> Tensor:
    """The mean over each list's pairs, `[lists]`. row: as of `ordered_pairs`."""
    number = torch.bincount(row, minlength=batch.num_items).clamp(min=1)
    return values.new_zeros(batch.num_items).index_add(0, row, values) / number
