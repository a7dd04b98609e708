"""Checkpoints without pickle: any tree of dicts, lists, numbers and tensors as one safetensors file.

The structure is stored as JSON in the file's metadata and tensors bit for bit, so that a resumed run is exact.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from understudy.errors import InputError
from understudy.files import COMPLETE, differing, read_json, seal, writing

__all__ = ["COMPLETE", "last_complete", "load_tree", "numbered", "rng_state", "save_tree", "seal", "set_rng_state"]


def _flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        key = f"t{len(tensors)}"
        # safetensors requires that every entry has its own storage, hence the clone.
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, np.ndarray):
        return {"numpy": _flatten(torch.from_numpy(value.astype(np.int64)), tensors), "dtype": str(value.dtype)}
    if isinstance(value, dict):
        # Schedulers hold functions too; those are created again on loading and not stored.
        return {"dict": [[_flatten(k, tensors), _flatten(v, tensors)] for k, v in value.items() if not callable(v)]}
    if isinstance(value, (list, tuple)):
        return {
            "tuple" if isinstance(value, tuple) else "list": [_flatten(v, tensors) for v in value if not callable(v)]
        }
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"A checkpoint holds numbers, strings, tensors and nests of them, not {type(value).__name__}.")


def _unflatten(node: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "numpy" in node:
        return _unflatten(node["numpy"], tensors).numpy().astype(node["dtype"])
    if "dict" in node:
        return {_unflatten(k, tensors): _unflatten(v, tensors) for k, v in node["dict"]}
    if "list" in node:
        return [_unflatten(v, tensors) for v in node["list"]]
    if "tuple" in node:
        return tuple(_unflatten(v, tensors) for v in node["tuple"])
    return node["value"]


def save_tree(tree: Any, path: Path, *, checksum: bool = False) -> None:
    """Write a tree of dicts, lists, numbers and tensors to `path`.

    Args:
        checksum: keep a hash of the content in the file, for one that lies in no sealed folder.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"structure": json.dumps(_flatten(tree, tensors))}
    if checksum:
        metadata["sha256"] = _checksum(metadata["structure"], tensors)
    with writing(path):
        save_file(tensors, str(path), metadata=metadata)


def _checksum(structure: str, tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def load_tree(path: Path) -> Any:
    """Read what `save_tree` wrote.

    Raises:
        InputError: the file is damaged, or is not what its checksum is of; the message names it.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        found = _unflatten(json.loads(metadata["structure"]), tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise InputError(
            f"Checkpoint file {path} cannot be read ({error}). Delete its folder to go back to the one before."
        ) from error
    if "sha256" in metadata and metadata["sha256"] != _checksum(metadata["structure"], tensors):
        raise InputError(f"{path} differs from what was written: put it back, or delete it to have it made again.")
    return found


def rng_state() -> dict[str, Any]:
    """The state of every random number generator that training uses."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def numbered(folder: Path) -> list[Path]:
    """The folders `checkpoint-N` by step; other folders beside them are ignored."""
    found = {p: re.fullmatch(r"checkpoint-(\d+)", p.name, re.ASCII) for p in folder.glob("checkpoint-*") if p.is_dir()}
    return sorted((p for p, named in found.items() if named), key=lambda p: int(p.name.rsplit("-", 1)[1]))


def last_complete(folder: Path) -> Path | None:
    """The newest sealed `checkpoint-N` in `folder`, verified; `None` if there is none.

    Raises:
        InputError: a sealed checkpoint's file is missing or was changed.
    """
    sealed = [p for p in numbered(folder) if (p / COMPLETE).is_file()]
    if not sealed:
        return None
    newest = sealed[-1]
    remedy = "Delete that folder to resume from the checkpoint before it."
    try:
        digests = read_json(newest / COMPLETE) or {}
    except InputError as error:
        raise InputError(f"Checkpoint {newest} is corrupt: {error} {remedy}") from error
    name = differing(newest, digests)
    if name is not None:
        raise InputError(f"Checkpoint {newest} is corrupt: {name} is missing or differs from what was saved. {remedy}")
    return newest
