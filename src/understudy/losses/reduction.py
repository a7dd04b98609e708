"""What an update divides by. The trainer uses the weights and divides once; `reduce` does both for a single batch."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.errors import InputError


def row_weights(how: str, sequence: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, str]:
    """The weight of each row, and the unit whose count divides the weighted sum.

    `token_mean`: 1, by rows. `sequence_mean`: 1 / rows of its sequence, by sequences that have any. `sequence_sum`:
    1, by sequences that have any. `sum`: 1, by nothing.

    Args:
        sequence: `[rows]`, the sequence each row comes from.

    Returns:
        Weights `[rows]` and `"rows"`, `"sequences"` or `"none"`.
    """
    ones = torch.ones(sequence.shape, dtype=dtype, device=sequence.device)
    if how == "token_mean":
        return ones, "rows"
    if how == "sequence_sum":
        return ones, "sequences"
    if how == "sum":
        return ones, "none"
    if how == "sequence_mean":
        _, inverse, counts = sequence.unique(return_inverse=True, return_counts=True)
        return ones / counts[inverse], "sequences"
    raise InputError(f"Unknown reduction {how!r}. Known: token_mean, sequence_mean, sequence_sum, sum.")


def reduce(values: Tensor, how: str, *, sequence: Tensor | None = None, count: float | None = None) -> Tensor:
    """One number from row values: the weighted sum over `count`, or over the count of the unit in this batch.

    Args:
        values: `[rows]`, only rows that count.
        sequence: `[rows]`, as in `row_weights`; needed for the sequence reductions.
        count: divide by this instead (the count over the whole update, under accumulation).

    No rows give 0 with a zero gradient, not nan.
    """
    if sequence is None:
        sequence = torch.zeros(values.shape, dtype=torch.long, device=values.device)
    weights, unit = row_weights(how, sequence, values.dtype)
    number = {"rows": values.numel(), "sequences": sequence.unique().numel(), "none": 1}[unit]
    return (values * weights).sum() / max(count if count is not None else number, 1)
