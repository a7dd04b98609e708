"""The caller's own modules: saved as safetensors, or by their `save_pretrained`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel

from understudy.errors import InputError
from understudy.models.transfer import BODY, TRANSFER, load_transfer
from understudy.models.weights import MODULE, check_folder, reason, save_network


def check_saves(model: nn.Module) -> None:
    """Save a module once into a temporary folder, so that a module that cannot be saved is an error before training.

    Models of transformers are not tested.
    """
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config") or hasattr(model, "understudy"):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_network(model, Path(folder))
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
    if TRANSFER in facts:
        body = reload(folder / BODY, module)
        return folder if isinstance(body, Path) else load_transfer(folder, body)
    if MODULE not in facts:
        return folder
    if module is None:
        raise InputError(
            f"{folder} holds the state of your module {facts[MODULE]}: hand it over again in Python (student=...), for its code is "
            "not stored."
        )
    try:
        load_model(module, str(folder / "model.safetensors"))
    except Exception as error:  # the message says whether keys, shapes or the file are wrong
        raise InputError(
            f"{folder} does not hold the state of this {type(module).__name__}: {reason(error)}"
        ) from error
    return module
