"""Modules of the caller's own: their state as safetensors, or whatever their `save_pretrained` writes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from understudy.errors import InputError
from understudy.models.weights import check_folder, reason, write_model

MARK = "understudy_module"
"""Key of a `config.json` beside the state of such a module: the name of its class."""


def save_state(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write `model.safetensors`, and a `config.json` that names the class; see `write_model`."""
    write_model(model, folder, {MARK: type(model).__name__}, state)


def check_saves(model: nn.Module) -> None:
    """Save a module once into a folder that is thrown away: what cannot be saved is said before it is trained.

    Models of transformers are known to be able to.
    """
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config") or hasattr(model, "understudy"):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            if hasattr(model, "save_pretrained"):
                model.save_pretrained(folder)  # type: ignore[operator]
            else:
                save_state(model, Path(folder))
        except Exception as error:  # it is the caller's code
            raise InputError(
                f"{type(model).__name__} cannot be saved: {reason(error)}. Its state must be tensors by name, or give it a "
                "save_pretrained(folder) that works."
            ) from error


def reload(folder: Path, module: nn.Module | None) -> Path | nn.Module:
    """What stands for a saved student: its folder, or the caller's module with the weights that are in the folder.

    Args:
        module: as it was handed over, if it was.

    Raises:
        InputError: the folder holds the state of a module, and none was handed over or it does not fit.
    """
    own = module is not None and not isinstance(module, PreTrainedModel) and hasattr(module, "save_pretrained")
    if own:
        read: Any = getattr(type(module), "from_pretrained", None)
        if read is None:
            raise InputError(
                f"{folder} was written by save_pretrained of {type(module).__name__}, which has no from_pretrained: give it one."
            )
        return read(str(folder))
    facts = check_folder(folder) if (folder / "config.json").is_file() else {}
    if MARK not in facts:
        return folder
    if module is None:
        raise InputError(
            f"{folder} holds the state of your module {facts[MARK]}: hand it over again in Python (student=...), for its code is "
            "not stored."
        )
    try:
        load_model(module, str(folder / "model.safetensors"))
    except Exception as error:  # keys, shapes and damage are told apart in the message
        raise InputError(
            f"{folder} does not hold the state of this {type(module).__name__}: {reason(error)}"
        ) from error
    return module
