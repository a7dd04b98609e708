"""Scores of a frozen model (log-probabilities, relevance), computed once and kept in the store that teacher caches use.

The key of a score is the SHA-256 of the model's weights and of the candidate's inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from understudy.data import Batch
from understudy.models import ModelAdapter, evaluating, state_hash
from understudy.teachers.cache.store import ShardStore


class ScoreStore(ShardStore):
    """A store with one number for each candidate. Several processes may write to it.

    Args:
        folder: of the shards.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {"format": 1, "kind": "scores"})

    def keep(self, found: Mapping[bytes, float]) -> None:
        """Write new scores as one shard."""
        values = torch.tensor(list(found.values()), dtype=torch.float64)
        self.append(list(found), [1] * len(found), {"score": values})

    def scores(self, keys: Sequence[bytes]) -> list[float]:
        """The scores of these candidates."""
        found: list[float] = self.read(keys)["score"].tolist()
        return found


def sequences(example: Mapping[str, Any]) -> list[bytes]:
    """The inputs of a policy for each candidate: its tokens with their labels, or its features."""
    parts = [[x if x.is_floating_point() else x.to(torch.int64) for x in pair] for pair in example["sequences"]]
    return [b"".join(x.numpy().tobytes() + b"|" for x in pair) for pair in parts]


@torch.no_grad()
def score_lists(
    model: ModelAdapter,
    examples: Any,
    collate: Callable[[list[Any]], Any],
    store: ScoreStore,
    *,
    column: str,
    contents: Callable[[Mapping[str, Any]], list[bytes]] = sequences,
    batch: int = 16,
) -> int:
    """Fill `column` of each example with the model's scores of its candidates.

    Only candidates that the store does not hold are computed; results are stored every 64 batches.

    Args:
        contents: the inputs that the score of each candidate depends on, apart from the weights.

    Returns:
        The number of computed candidates.
    """
    name, device = state_hash(model).encode(), next(model.parameters()).device
    keys = [[hashlib.sha256(name + c).digest() for c in contents(e)] for e in examples.records]
    missing = [i for i, ks in enumerate(keys) if any(k not in store for k in ks)]
    found: dict[bytes, float] = {}
    computed = 0
    with evaluating(model):
        for start in range(0, len(missing), batch):
            chosen = missing[start : start + batch]
            values = model(Batch.from_dict(collate([examples[i] for i in chosen])).to(device)).signal.values.cpu()
            for row, i in enumerate(chosen):
                found.update(zip(keys[i], values[row].tolist(), strict=False))
                computed += len(keys[i])
            if (start // batch) % 64 == 63:
                store.keep(found)
                found = {}
    store.keep(found)
    for example, ks in zip(examples.records, keys, strict=True):
        example[column] = store.scores(ks)
    return computed
