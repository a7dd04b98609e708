"""Weights of the rows of an update, and the unit that its sums are divided by."""

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
