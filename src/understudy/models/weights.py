"""What is read from a model's folder: whole, as it was written, and every weight in its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from understudy.errors import InputError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds; anything else is one line."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # damaged, binary, or nested without end
        raise InputError(f"{file} is not valid JSON: {reason(error)}") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None
    if not isinstance(values, dict):
        raise InputError(
            f"{file} holds a {type(values).__name__}, and a configuration is an object of keys and values."
        )
    return values


def reason(error: BaseException) -> str:
    """What an error says, on one line; what transformers says of a missing file in a folder is about Hub ids."""
    said = " ".join(str(error).split())
    if "Repo id must be" in said or "not a valid model identifier" in said:
        return "neither a whole model folder nor the id of a model that can be reached."
    return said[:300] or type(error).__name__


def check_folder(path: Path, config: str = "config.json") -> dict[str, Any]:
    """The configuration of a model folder, once it is clear that configuration and weights are all there.

    Raises:
        InputError: the folder lacks one of them, or its weights are pickles.
    """
    if path.is_file() or not (path / config).is_file():
        raise InputError(f"{path} is not a model folder: it has no {config}.")
    facts = read_object(path / config)
    held = {file.name for file in path.glob("*.safetensors")}
    if not held:
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise InputError(
                f"{path} holds its weights as pickles ({pickles[0]}), which can run code when they are read: save the model "
                "again with save_pretrained, which writes safetensors."
            )
        raise InputError(f"{path} is incomplete: it has a {config} and no weights (*.safetensors).")
    for index in path.glob("*.safetensors.index.json"):
        named = read_object(index).get("weight_map")
        if not isinstance(named, dict):
            raise InputError(f"{index} has no weight_map, which says which file holds which weight.")
        lacks = sorted({str(n) for n in named.values()} - held)
        if lacks:
            raise InputError(f"{path} is incomplete: {index.name} names {lacks[0]}, which is not there.")
    return facts


def check_complete(name: str, found: Mapping[str, Iterable[str]]) -> None:
    """Refuse a model that lacks weights, or whose folder has some that it has no place for.

    Args:
        found: `missing_keys` and `unexpected_keys`, as `from_pretrained` reports them.
    """
    _refuse(name, sorted(found.get("missing_keys", ())), sorted(found.get("unexpected_keys", ())))


def _refuse(name: str, lacks: list[str], surplus: list[str]) -> None:
    if lacks or surplus:
        parts = [f"it has no weights for {_some(lacks)}"] * bool(lacks) + [f"no place for {_some(surplus)}"] * bool(
            surplus
        )
        raise InputError(
            f"{name} and its configuration do not fit: {' and '.join(parts)}. Correct the configuration, or name the model "
            "that was saved."
        )


def check_weights(name: str, model: nn.Module, found: Mapping[str, Iterable[str]], *, new_head: bool) -> None:
    """As `check_complete`, for a model of transformers.

    Args:
        new_head: the model's head may be new: an encoder that becomes a classifier. That is said in its notes
            (`notes_of`), and `is_new` knows it. What lies outside of the body may be left out then.

    A pooler is left out without a word: it is part of many encoders, and read by none of the models here.
    """
    model.new_weights = tuple(sorted(found.get("missing_keys", ())))  # type: ignore[assignment]
    missing = sorted(k for k in found.get("missing_keys", ()) if not _of(k, model, "pooler"))
    unexpected = sorted(k for k in found.get("unexpected_keys", ()) if not _of(k, model, "pooler"))
    head = [k for k in missing if new_head and not _in_body(k, model)]
    left = [k for k in unexpected if new_head and not _in_body(k, model)]
    _refuse(name, [k for k in missing if k not in head], [k for k in unexpected if k not in left])
    if head:
        model.new_head = True  # type: ignore[assignment]
        add_note(model, f"{name} has no weights for {_some(head)}: they are new, and random until they are trained.")


def is_new(model: nn.Module) -> bool:
    """Whether a part of a loaded model has no weights of its own."""
    return any(getattr(m, "new_head", False) is True for m in model.modules())


def add_note(model: nn.Module, note: str) -> None:
    """Something that a reader should know of a model as it was loaded."""
    model.loading_notes = [*getattr(model, "loading_notes", []), note]  # type: ignore[assignment]


def notes_of(model: nn.Module) -> list[str]:
    """What was said of a model, and of the models in it, when they were loaded."""
    return [note for m in model.modules() for note in m.__dict__.get("loading_notes", ())]


def _in_body(key: str, model: Any) -> bool:
    body = model.base_model
    names = {n for n, _ in body.named_children()} | {n for n, _ in body.named_parameters(recurse=False)}
    return key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] in names


def _of(key: str, model: Any, part: str) -> bool:
    return key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] == part


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
