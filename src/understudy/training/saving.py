"""Files of a checkpoint that resumes exactly: safetensors without pickle, sealed when whole.

Model and optimiser are held in one piece whether they are sharded or not; random numbers and the state of the method,
the auxiliary optimisers, the cost meter and the rollouts are those of each rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from understudy.errors import InputError
from understudy.models.sharding import gathered
from understudy.training import checkpoint as ck

STATE, OPTIMIZER, MODEL = "state.safetensors", "optimizer.safetensors", "model.safetensors"


def _best(folder: Path) -> str:
    """The checkpoint that was the best when this one was written; a run that goes on from here may end with it."""
    try:
        return f"checkpoint-{json.loads((folder / 'trainer_state.json').read_text())['best_global_step']}"
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def delete_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and their best ones. To be called once the newest is sealed, so that
    a kill at any moment leaves a whole one."""
    old = ck.numbered(folder)
    best = {_best(path) for path in old[-keep:]}
    for path in old[:-keep]:
        if path.name not in best:
            shutil.rmtree(path, ignore_errors=True)


def save_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the weights of student and method."""
    folder.mkdir(parents=True, exist_ok=True)
    ck.save_tree(dict(state), folder / MODEL)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """What `save_weights` wrote."""
    found: dict[str, Tensor] = ck.load_tree(folder / MODEL)
    return found


def save_optimizer(folder: Path, optimizer: Any, scheduler: Any, sharded: bool, write: bool) -> None:
    """Write optimiser and schedule. Every rank calls; the one with `write` writes."""
    state = optimizer.state_dict()
    tree = {"optimizer": gathered(state) if sharded else state, "scheduler": scheduler.state_dict()}
    if write:
        ck.save_tree(tree, folder / OPTIMIZER)


def load_optimizer_tree(folder: Path) -> dict[str, Any]:
    """`{"optimizer": …, "scheduler": …}` of `save_optimizer`."""
    found: dict[str, Any] = ck.load_tree(folder / OPTIMIZER)
    return found


def state_file(folder: Path, ranks: int, rank: int) -> Path:
    """The file of a rank's own state."""
    return folder / (STATE if ranks == 1 else f"rank{rank}-{STATE}")


def save_state(file: Path, parts: Mapping[str, Any]) -> None:
    """Write random numbers and the `state_dict` of each part that is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tree = {name: part.state_dict() if part is not None else None for name, part in parts.items()}
    ck.save_tree({"rng": ck.rng_state(), **tree}, file)


def load_state(file: Path, parts: Mapping[str, Any], ranks: int) -> None:
    """Put back what `save_state` wrote into the parts that are there.

    Raises:
        InputError: the checkpoint was written by another number of processes.
    """
    if not file.is_file():
        held = len(list(file.parent.glob(f"*{STATE}")))
        raise InputError(
            f"{file.parent} was written by {held} process{'es' * (held > 1)} and is resumed by {ranks}: "
            "start as many, or choose another output."
        )
    tree = ck.load_tree(file)
    ck.set_rng_state(tree["rng"])
    for name, part in parts.items():
        if part is not None and tree[name] is not None:
            part.load_state_dict(tree[name])
