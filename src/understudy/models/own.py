"""The caller's own modules: saved as safetensors, or by their `save_pretrained`."""

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
"""Key of `config.json` with the name of the module's class."""


def save_state(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write `model.safetensors`, and a `config.json` with the name of the class; see `write_model`."""
    write_model(model, folder, {MARK: type(model).__name__}, state)


def check_saves(model: nn.Module) -> None:
    """Save a module once into a temporary folder, so that a module that cannot be saved is an error before training.

    Models of transformers are not tested.
    """
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config") or hasattr(model, "understudy"):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            if hasattr(model, "save_pretrained"):
                model.save_pretrained(folder)  # type: ignore[operator]
            else:
                save_state(model, Path(folder))
        except Exception as error:  # the caller's code raises any type
            raise InputError(
                f"{type(model).__name__} cannot be saved: {reason(error)}. Its state must be tensors by name, or give it a "
                "save_pretrained(folder) that works."
            ) from error


def reload(folder: Path, module: nn.Module | None) -> Path | nn.Module:
    """A saved student: its folder, or the caller's module with the weights from the folder.

    Args:
        module: the caller's module, if one was given.

    Raises:
        InputError: the folder holds the state of a module, and none was given or it does not match.
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
    except Exception as error:  # the message says whether keys, shapes or the file are wrong
        raise InputError(
            f"{folder} does not hold the state of this {type(module).__name__}: {reason(error)}"
        ) from error
    return module
