"""Scores of a frozen model (log-probabilities, relevance) by candidate or by token, computed once, in the store that caches
of teachers use.

The key of a score is the SHA-256 of the model's weights, of the dtype of mixed precision if there is any, and of the
candidate's inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.data import Batch, ListBatch
from understudy.models import ModelAdapter, ModelOutput, evaluating, state_hash
from understudy.targets import Scores
from understudy.teachers.cache.store import ShardStore

Arrays = Mapping[str, Tensor]


class ScoreStore(ShardStore):
    """A store of what a model says of each candidate: a number, or arrays with one row a token. Several processes may write
    to one.

    Args:
        folder: where shards are.
        kind: of what is kept.
    """

    def __init__(self, folder: Path, kind: str = "scores") -> None:
        super().__init__(folder, {"format": 1, "kind": kind})

    def keep(self, found: Mapping[bytes, Arrays]) -> None:
        """Write what is new as one shard."""
        if not found:
            return
        said = list(found.values())
        arrays = {name: torch.cat([one[name] for one in said]) for name in said[0]}
        self.append(list(found), [len(next(iter(one.values()))) for one in said], arrays)

    def scores(self, keys: Sequence[bytes]) -> list[float]:
        """The scores of these candidates."""
        found: list[float] = self.read(keys)["score"].tolist()
        return found


def sequences(example: Mapping[str, Any]) -> list[bytes]:
    """The inputs of a policy for each candidate: its tokens with their labels, or its features, and its images."""
    seen = example["pictures"].key if "pictures" in example else b""
    parts = [[x if x.is_floating_point() else x.to(torch.int64) for x in pair] for pair in example["sequences"]]
    return [b"".join(x.numpy().tobytes() + b"|" for x in pair) + seen for pair in parts]


def score_lists(
    model: ModelAdapter,
    examples: Any,
    collate: Callable[[list[Any]], Any],
    store: ScoreStore,
    *,
    column: str,
    contents: Callable[[Mapping[str, Any]], list[bytes]] = sequences,
    batch: int = 16,
    autocast: torch.dtype | None = None,
) -> int:
    """Fill `column` of each example with the model's scores of its candidates.

    Only candidates that the store does not hold are computed; results are stored every 64 batches.

    Args:
        contents: the inputs that the score of each candidate depends on, apart from the weights.
        autocast: compute in mixed precision of this dtype.

    Returns:
        The number of computed candidates.
    """

    def read(said: ModelOutput, batch: Batch) -> list[list[Arrays]]:
        values: Tensor = said.signal.values.double().cpu()
        return [[{"score": value[None]} for value in row] for row in values]

    keys = _keys(model, examples, contents, autocast)
    computed = _compute(model, examples, collate, store, keys, read, batch, autocast)
    for example, ks in zip(examples.records, keys, strict=True):
        example[column] = store.scores(ks)
    return computed


def score_tokens(
    model: ModelAdapter,
    examples: Any,
    collate: Callable[[list[Any]], Any],
    store: ScoreStore,
    read: Callable[[Scores], Arrays],
    batch: int = 16,
    autocast: torch.dtype | None = None,
) -> list[dict[str, Tensor]]:
    """What the model says of the completion tokens of each example, `[tokens, …]`, one candidate after the other.

    Args:
        store: holds nothing but what this `read` gave.
        read: from the model's answer to arrays with one row a token of the batch.
        autocast: compute in mixed precision of this dtype.
    """

    def cut(said: ModelOutput, batch: Batch) -> list[list[Arrays]]:
        assert isinstance(batch, ListBatch)
        sizes = batch.tokens.mask.sum(1).tolist()
        parts = {name: array.cpu().split(sizes) for name, array in read(said.signal).items()}
        return [[{name: part[s] for name, part in parts.items()} for s in group] for group in batch.groups]

    keys = _keys(model, examples, sequences, autocast)
    _compute(model, examples, collate, store, keys, cut, batch, autocast)
    return [store.read(ks) for ks in keys]


def _keys(
    model: ModelAdapter,
    examples: Any,
    contents: Callable[[Mapping[str, Any]], list[bytes]],
    autocast: torch.dtype | None,
) -> list[list[bytes]]:
    name = (state_hash(model) + (f" {autocast}" if autocast is not None else "")).encode()
    return [[hashlib.sha256(name + c).digest() for c in contents(e)] for e in examples.records]


@torch.no_grad()
def _compute(
    model: ModelAdapter,
    examples: Any,
    collate: Callable[[list[Any]], Any],
    store: ScoreStore,
    keys: Sequence[Sequence[bytes]],
    read: Callable[[ModelOutput, Batch], list[list[Arrays]]],
    size: int,
    autocast: torch.dtype | None,
) -> int:
    """Store what is missing of each example's candidates; how many were computed.

    Args:
        read: from an answer to arrays, by example and candidate.
    """
    device = next(model.parameters()).device
    missing = [i for i, ks in enumerate(keys) if any(k not in store for k in ks)]
    found: dict[bytes, Arrays] = {}
    computed = 0
    with evaluating(model), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for start in range(0, len(missing), size):
            chosen = missing[start : start + size]
            batch = Batch.from_dict(collate([examples[i] for i in chosen])).to(device)
            for i, said in zip(chosen, read(model(batch), batch), strict=True):
                found.update(zip(keys[i], said, strict=False))  # a list may have fewer candidates than the longest
                computed += len(keys[i])
            if (start // size) % 64 == 63:
                store.keep(found)
                found = {}
    store.keep(found)
    return computed
