"""The fraction of a text run's batches that is padding or repeated prefixes, reported before the run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from torch import Tensor

from understudy.data.packing import Tree, waste
from understudy.errors import InputError, nearest
from understudy.models.layouts import PACKING, Packing
from understudy.training.order import EpochSampler

BATCHES = 16
"""Number of batches of the first epoch that are measured."""


def checked_packing(value: Any) -> Packing:
    """`data.packing`, if it is a valid value."""
    if value in PACKING:
        found: Packing = value
        return found
    raise InputError(
        f"data.packing is {value!r}.{nearest(str(value), PACKING)} Known: {', '.join(PACKING)}. (Whether documents are "
        "joined into rows of max_length is data.pack.)"
    )


def padding_notes(
    recipe: Any, examples: Any, sequences: Callable[[dict[str, Any]], list[Tensor]], packing: Packing
) -> list[str]:
    """Notes on what packing saves on the first batches of a run; none if it saves nothing."""
    size = int(recipe.trainer.get("per_device_train_batch_size", 8))
    order = islice(EpochSampler(len(examples), recipe.seed), BATCHES * size)
    chosen = [sequences(examples[i]) for i in order]
    batches = []
    for start in range(0, len(chosen), size):
        lengths: list[int] = []
        trees: list[Tree] = []
        for found in chosen[start : start + size]:
            members = range(len(lengths), len(lengths) + len(found))
            lengths += [len(ids) for ids in found]
            shared = min(_common(found[0], ids) for ids in found) if len(found) > 1 else 0
            trees.append(Tree(tuple(members), shared))
        batches.append((lengths, trees))
    padded, packed, share = waste(batches)
    if padded < 0.01 and share > 0.99:
        return []
    how = {
        "free": "is done",
        "auto": "is done where it takes fewer operations",
        "none": "data.packing=none leaves undone",
    }
    return [
        f"Batches of {size} are {padded:.0%} padding; packed, with beginnings that candidates share computed once, they are "
        f"{packed:.0%} padding and {1 - share:.0%} fewer tokens, which {how[packing]}."
    ]


def _common(first: Tensor, other: Tensor) -> int:
    length = min(len(first), len(other))
    return int((first[:length] == other[:length]).long().cumprod(0).sum())
