"""Scores of a frozen model (log-probabilities, relevance), computed once and kept by content.

A value is filed under the SHA-256 of the model's weights and of what it read of the candidate, so another run with the
same model and text finds it, whatever the order, the split or the padding, and nothing else ever does.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models import RowModel, evaluating, state_hash


class ScoreStore:
    """An append-only folder of shards, each whole or absent. Several processes may write to one.

    Args:
        folder: where shards are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[bytes, float] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            try:
                tensors = load_file(str(shard))
                keys, values = tensors["keys"], tensors["values"]
            except (SafetensorError, KeyError, OSError) as error:
                raise InputError(f"Stored scores {shard} cannot be read ({error}): delete that file.") from error
            self.values.update(zip((bytes(k) for k in keys.numpy()), values.tolist(), strict=True))

    def append(self, found: dict[bytes, float]) -> None:
        """Write new values as one shard, renamed into place."""
        if not found:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.values.update(found)
        keys = torch.tensor([list(k) for k in found], dtype=torch.uint8)
        name = self.folder / f"{uuid.uuid4().hex}.safetensors"
        temporary = name.with_suffix(".tmp")
        save_file({"keys": keys, "values": torch.tensor(list(found.values()), dtype=torch.float64)}, str(temporary))
        os.replace(temporary, name)


def content_key(model: str, content: bytes) -> bytes:
    """The key of one candidate under a model's hash."""
    return hashlib.sha256(model.encode() + content).digest()


def sequences(example: Mapping[str, Any]) -> list[bytes]:
    """What a causal LM reads of each candidate: its tokens with their labels."""
    return [b"".join(x.to(torch.int64).numpy().tobytes() + b"|" for x in pair) for pair in example["sequences"]]


@torch.no_grad()
def score_lists(
    model: RowModel,
    examples: Any,
    collate: Callable[[list[Any]], Any],
    store: ScoreStore,
    *,
    column: str,
    contents: Callable[[Mapping[str, Any]], list[bytes]] = sequences,
    batch: int = 16,
) -> int:
    """Fill `column` of each example with the model's scores of its candidates.

    Only candidates the store does not hold are computed; what is computed is stored every 64 batches.

    Args:
        contents: all that the score of each candidate depends on, beside the weights.

    Returns:
        How many candidates were computed.
    """
    name, device = state_hash(model), next(model.parameters()).device
    keys = [[content_key(name, c) for c in contents(e)] for e in examples.rows]
    missing = [i for i, ks in enumerate(keys) if any(k not in store.values for k in ks)]
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
                store.append(found)
                found = {}
    store.append(found)
    for example, ks in zip(examples.rows, keys, strict=True):
        example[column] = [store.values[k] for k in ks]
    return computed
