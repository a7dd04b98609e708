"""Objects of the caller instead of names: methods, models, factories of models, and data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from understudy.data.memory import keep
from understudy.data.tabular import is_data
from understudy.errors import InputError
from understudy.methods import adopt
from understudy.runs.foreign import plain
from understudy.tasks.base import MODULE
from understudy.tasks.data_keys import KEYS
from understudy.training import Method

SIDES = ("teacher", "student")
IN_MEMORY = (
    *("language_modeling", "preferences", "image_classification", "image_generation", "text_classification"),
    *("multimodal_classification", "vision_language", "ranking", "reasoning", "conversation"),
)
"""Tasks whose data may be handed over in memory."""


class Modules(Mapping[str, nn.Module]):
    """Models by side. A factory is called when its side is accessed, so that a seed set before applies to it.

    Args:
        given: modules, or functions without arguments that return one.
    """

    def __init__(self, given: Mapping[str, nn.Module | Callable[[], nn.Module]]) -> None:
        self.given = dict(given)

    def __getitem__(self, side: str) -> nn.Module:
        one = self.given[side]
        made = one if isinstance(one, nn.Module) else one()
        if not isinstance(made, nn.Module):
            raise InputError(f"The factory given as {side} returns {type(made).__name__}, not a torch.nn.Module.")
        if next(made.parameters(), None) is None:
            raise InputError(
                f"The module given as {side}, {type(made).__name__}, has no weights, so no device and no dtype: register one as "
                "torch.nn.Parameter, or give a model that has some."
            )
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def named(values: Mapping[str, Any]) -> tuple[dict[str, Any], Modules]:
    """A recipe's values with names instead of objects, and the models among these objects.

    Args:
        values: a recipe's keys, where `method` may be a `Method` class or instance, `teacher` and `student` a module or
            a factory, `model_init` a factory of the student, and `data` (or its `name`) a data set in memory.

    Raises:
        InputError: an unsupported object, or two keys for the same thing.
    """
    if not isinstance(values, Mapping):
        raise InputError(
            f"A recipe is a mapping of keys to values or the path of a YAML file, and {type(values).__name__} is neither."
        )
    found = plain(values)
    if "model_init" in found:
        if found.get("student") is not None:
            raise InputError("model_init makes the student, and student names one too: give one of them.")
        found["student"] = found.pop("model_init")
    given: dict[str, Any] = {}
    for side in SIDES:
        one = found.get(side)
        if not isinstance(one, nn.Module) and not callable(one):
            continue
        if not isinstance(one, nn.Module) and any(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            for p in _parameters(one)
        ):
            raise InputError(f"The factory given as {side} must take no argument: wrap it (lambda: make(...)).")
        kind = type(one).__name__ if isinstance(one, nn.Module) else getattr(one, "__name__", type(one).__name__)
        given[side], found[side] = one, {"model": f"{MODULE}{kind}"}
    if "method" in found:
        found["method"], options = method_name(found["method"])
        if options and found.get("options"):
            raise InputError(
                "method is an instance with options of its own, and options are given too: give one of them."
            )
        found["options"] = options or found.get("options") or {}
    if isinstance(found.get("arms"), Mapping):
        found["arms"] = named_arms(found["arms"])
    data, task = found.get("data"), found.get("task", "image_classification")
    keys = KEYS[task].model_fields if task in KEYS else ()
    inside = data.get("name") if isinstance(data, Mapping) and not is_data(data, keys) else data
    if is_data(inside):
        if task not in IN_MEMORY:
            raise InputError(
                f"Data of task {task!r} are read from files: in memory they work for {', '.join(IN_MEMORY)}."
            )
        found["data"] = {**(data if inside is not data else {}), "name": keep(inside)}  # type: ignore[dict-item]
    return found, Modules(given)


def named_arms(arms: Any) -> Any:
    """The arms of a comparison with names of methods that are classes or instances; an instance's options are the arm's.

    What is no mapping is left to the recipe, which refuses it.
    """
    if not isinstance(arms, Mapping):
        return arms
    found = {}
    for name, arm in arms.items():
        alone = isinstance(arm, (str, Method)) or (isinstance(arm, type) and issubclass(arm, Method))
        arm = {"method": arm} if alone else dict(arm) if isinstance(arm, Mapping) else arm
        if isinstance(arm, dict) and arm.get("method") is not None:
            arm["method"], options = method_name(arm["method"])
            if options and arm.get("options"):
                raise InputError(
                    f"arms.{name}.method is an instance with options of its own, and options are given too: give one of them."
                )
            if options:
                arm["options"] = options
        found[name] = arm
    return found


def method_name(method: Any) -> tuple[str, dict[str, Any]]:
    """The name of a method given by name, class or instance, and the options of an instance."""
    if isinstance(method, Method):
        return adopt(type(method)), method.model_dump(mode="json", exclude_defaults=True)
    if isinstance(method, type) and issubclass(method, Method):
        return adopt(method), {}
    if not isinstance(method, str):
        raise InputError(
            f"method is {type(method).__name__}: give a name, or a class or instance of understudy.Method."
        )
    return method, {}


def checked_callbacks(callbacks: Sequence[Any]) -> list[TrainerCallback]:
    """Callbacks as instances; a class is instantiated, as in transformers' Trainer."""
    made = [c() if isinstance(c, type) else c for c in callbacks]
    for one in made:
        if not isinstance(one, TrainerCallback):
            raise InputError(f"callbacks holds {type(one).__name__}, which is no transformers.TrainerCallback.")
    return made


def _parameters(factory: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):  # some C callables have no signature
        return []
