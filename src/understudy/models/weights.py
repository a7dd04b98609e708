"""A model's folder: writing it, and checks that it is complete, unchanged, and has every weight in its place."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from understudy.errors import InputError

MODULE = "understudy_module"
"""Key of `config.json` with the name of the class of the caller's own module."""
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "num_attention_heads", "n_head"), 1_000_000),
    **dict.fromkeys(("num_key_value_heads", "intermediate_size"), 10_000_000),
    "vocab_size": 100_000_000,
}
"""Sizes in a configuration, and the most that is taken for a model's: building one of a million layers takes hours, even
without its weights."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def write_model(
    model: nn.Module, folder: Path, config: Mapping[str, Any] | None = None, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write `model.safetensors` and, if given, `config.json`. Tied weights are stored once.

    Args:
        state: instead of the module's own state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = str(folder / "model.safetensors")
    if state is None:
        save_model(model, file)
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=1))


def save_network(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Save with `save_pretrained`, in the small networks' own format, or as the module's state.

    Args:
        state: instead of the module's own state.
    """
    if hasattr(model, "save_pretrained"):
        more: dict[str, Any] = {} if state is None else {"state_dict": state}
        model.save_pretrained(str(folder), **more)  # type: ignore[operator]
    else:
        facts: Any = getattr(model, "understudy", None)
        write_model(model, folder, {MODULE: type(model).__name__} if facts is None else facts, state)


def merged(model: nn.Module) -> nn.Module:
    """The model, or a copy with its adapters merged if they say of no folder or Hub id whose they are: saved by themselves,
    they would be all that is left of it."""
    adapters = getattr(model, "peft_config", {}).values()
    if not adapters or any(one.base_model_name_or_path for one in adapters):
        return model
    found: nn.Module = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    return found


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; anything else is an `InputError` of one line."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # damaged, binary, or nested too deeply
        raise InputError(f"{file} is not valid JSON: {reason(error)}") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None
    if not isinstance(values, dict):
        raise InputError(
            f"{file} holds a {type(values).__name__}, and a configuration is an object of keys and values."
        )
    return values


def check_sizes(values: Mapping[str, Any], name: str, least: int = 0) -> None:
    """Refuse a configuration whose sizes are no model's, before anything is built from it.

    Args:
        values: the configuration, or that of a part of it.
        name: what the error calls the model.
        least: 1 where each size has to be there; a folder's configuration may say 0 for a part that it does not have.

    Raises:
        InputError: a size is too small or too large; it is named with its bounds.
    """
    for key, most in SIZES.items():
        size = values.get(key)
        if isinstance(size, int) and not isinstance(size, bool) and not least <= size <= most:
            raise InputError(
                f"The configuration of {name} says {key} = {str(size)[:30]}, and a model has {least} to {most:,}: correct it."
            )
    if isinstance(values.get("text_config"), Mapping):
        check_sizes(values["text_config"], name, least)


def reason(error: BaseException) -> str:
    """The message of an error on one line, without what transformers says about Hub ids if a file is missing in a
    folder."""
    said = " ".join(str(error).split())
    if "Repo id must be" in said or "not a valid model identifier" in said:
        return "neither a whole model folder nor the id of a model that can be reached."
    return said[:300] or type(error).__name__


def check_folder(path: Path, config: str = "config.json") -> dict[str, Any]:
    """The configuration of a model folder, after checking that configuration and weights exist.

    Raises:
        InputError: the folder lacks one of them, or its weights are pickles.
    """
    if path.is_file() or not (path / config).is_file():
        raise InputError(f"{path} is not a model folder: it has no {config}.")
    facts = read_object(path / config)
    check_sizes(facts, str(path))
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
    """Raise an error for a model that lacks weights, or whose folder has weights that do not belong to it.

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
        new_head: the model's head may be new, for an encoder that becomes a classifier. Then its notes (`notes_of`) say
            so, `is_new` is True for it, and weights of the folder outside of the body may be unused.

    A missing or unused pooler is accepted silently: many encoders have one, and no model here uses it.
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
    """Whether a part of a loaded model has newly initialised weights."""
    return any(getattr(m, "new_head", False) is True for m in model.modules())


def add_note(model: nn.Module, note: str) -> None:
    """Add a note for readers about a model as it was loaded."""
    model.loading_notes = [*getattr(model, "loading_notes", []), note]  # type: ignore[assignment]


def notes_of(model: nn.Module) -> list[str]:
    """The notes of a model, and of the models in it, from their loading."""
    return [note for m in model.modules() for note in m.__dict__.get("loading_notes", ())]


def _in_body(key: str, model: Any) -> bool:
    body = model.base_model
    whole = body is model  # such as CLIP's classifier, whose head stands beside the parts of the body
    parts = {n for n, m in body.named_children() if not (whole and isinstance(m, nn.Linear))}
    names = parts | {n for n, _ in body.named_parameters(recurse=False)}
    return key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] in names


def _of(key: str, model: Any, part: str) -> bool:
    return key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] == part


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
