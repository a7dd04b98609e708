"""Checkpoints without pickle: any tree of dicts, lists, numbers and tensors as one safetensors file.

The structure is stored as JSON in the file's metadata and tensors bit for bit, so that a resumed run is exact.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from understudy.errors import InputError

COMPLETE = "complete.json"


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


def save_tree(tree: Any, path: Path) -> None:
    """Write a tree of dicts, lists, numbers and tensors to `path`."""
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_flatten(tree, tensors))
    save_file(tensors, str(path), metadata={"structure": structure})


def load_tree(path: Path) -> Any:
    """Read what `save_tree` wrote.

    Raises:
        InputError: the file is damaged; the message names it.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            structure = json.loads(file.metadata()["structure"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
        raise InputError(
            f"Checkpoint file {path} cannot be read ({error}). Delete its folder to go back to the one before."
        ) from error
    return _unflatten(structure, tensors)


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Mark a checkpoint folder as complete, with the hash of each file. The mark is written last, flushed and renamed, so
    a folder without it is incomplete."""
    digests = {p.name: _digest(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != COMPLETE}
    temporary = folder / (COMPLETE + ".tmp")
    with temporary.open("w") as file:
        json.dump(digests, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / COMPLETE)


def last_complete(folder: Path) -> Path | None:
    """The newest sealed `checkpoint-N` in `folder`, verified; `None` if there is none.

    Raises:
        InputError: a sealed checkpoint's file is missing or was changed.
    """
    if not folder.is_dir():
        return None
    sealed = [p for p in folder.glob("checkpoint-*") if (p / COMPLETE).is_file()]
    if not sealed:
        return None
    newest = max(sealed, key=lambda p: int(p.name.rsplit("-", 1)[1]))
    for name, digest in json.loads((newest / COMPLETE).read_text()).items():
        if not (newest / name).is_file() or _digest(newest / name) != digest:
            raise InputError(
                f"Checkpoint {newest} is corrupt: {name} is missing or differs from what was saved. "
                f"Delete that folder to resume from the checkpoint before it."
            )
    return newest
