"""All keys of a recipe with type, default and meaning, read from the code, for `understudy keys` and its page."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from types import UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from understudy.errors import InputError, nearest
from understudy.evaluation.harness import HarnessSpec
from understudy.evaluation.leakage import Canaries
from understudy.generation import Budget
from understudy.generation.limits import Endpoint
from understudy.methods import all_methods
from understudy.models.few_shot import OPTIONS as FEW_SHOT
from understudy.models.modalities import OPTIONS as MODALITIES
from understudy.models.ranker_loading import MEANINGS
from understudy.models.text_classifiers import OPTIONS as TEXT_CLASSIFIER
from understudy.models.zero_shot import OPTIONS as ZERO_SHOT
from understudy.runs.recipe import Recipe
from understudy.runs.specs import ModelSpec, OracleSpec
from understudy.tasks.data_keys import KEYS
from understudy.training.arguments import UNSUPPORTED, choices, default, fields, kind, meaning
from understudy.training.on_policy import Adaptive, OnPolicy, Replay


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Args:
        name: with dots, as on the command line.
        where: the tasks or the method that have it; empty for all.
    """

    name: str
    type: str
    default: str
    meaning: str
    where: str = ""


def sections() -> dict[str, list[Key]]:
    """All keys by section of a recipe."""
    teacher = dict.fromkeys(("members", "weights", "mix", "route", "score", "cache"), "teacher")
    models = [*of_model(ModelSpec, "model."), *of_model(Endpoint, "model.endpoint.")]
    named = [_renamed(key, teacher.get(key.name.split(".")[1])) for key in models]
    oracle = [key for key in of_model(OracleSpec, "oracle.") if key.name.split(".")[1] not in ModelSpec.model_fields]
    of_tasks = {
        "ranking": MEANINGS,
        "image_classification": {**ZERO_SHOT, **FEW_SHOT},
        "text_classification": TEXT_CLASSIFIER,
        "multimodal_classification": MODALITIES,
    }
    options = [Key(f"SIDE.options.{k}", *facts, task) for task, keys in of_tasks.items() for k, facts in keys.items()]
    on_policy = [
        *of_model(OnPolicy, "on_policy."),
        *of_model(Replay, "on_policy.replay."),
        *of_model(Adaptive, "on_policy.adaptive."),
    ]
    methods = [key for name, method in all_methods().items() for key in of_model(method, "options.", name)]
    return {
        "Recipe": [*of_model(Recipe, ""), *of_model(Budget, "budget."), *of_model(HarnessSpec, "lm_eval.")],
        "Data": _data(),
        "Models": [*named, *oracle, *options],
        "Own samples": on_policy,
        "Options of methods": methods,
        "Trainer": [Key(f"trainer.{n}", _words(n), default(n), meaning(n)) for n in fields() if n not in UNSUPPORTED],
    }


def matching(prefix: str) -> list[Key]:
    """The keys that begin with `prefix`; a method's or task's name after `options.` or `data.` selects its keys.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    every = [key for keys in sections().values() for key in keys]
    part, _, name = prefix.partition(".")
    sides = ("teacher", "student", "oracle")
    asked = prefix.replace(part, "SIDE", 1) if part in sides and name else prefix
    found = [
        k
        for k in every
        if k.name.startswith((asked, prefix)) or (k.name.startswith(f"{part}.") and name in k.where.split(", "))
    ]
    if not found:
        raise InputError(
            f"No key begins with {prefix!r}.{nearest(asked, [k.name for k in every])} See `understudy keys`."
        )
    return found


def page() -> str:
    """The page of all keys, as Markdown."""
    lines = [
        "# Keys of a recipe",
        "",
        "Every key that a recipe may hold, as a YAML mapping or `key=value` on the command line. `understudy keys PREFIX` lists",
        "them in the terminal, for example `understudy keys data.max` or `understudy keys options.dpo`. `SIDE` is `teacher`,",
        "`student`, `oracle` or `roles.NAME`; a text alone is the side's `model`, and `data=NAME` is `data.name`.",
    ]
    for title, keys in sections().items():
        placed = any(k.where for k in keys)
        lines += ["", f"## {title}", ""]
        lines += ["| key | where | type | default | meaning |", "|---|---|---|---|---|"] if placed else []
        lines += [] if placed else ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in keys:
            where = f" {key.where or 'all'} |" if placed else ""
            cells = (key.type, key.default, key.meaning)
            lines.append(f"| `{key.name}` |{where} " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    by_reason = groupby(UNSUPPORTED.items(), lambda item: item[1])
    unsupported = "; ".join(f"{', '.join(f'`{n}`' for n, _ in names)} ({why})" for why, names in by_reason)
    return "\n".join([*lines, "", f"Arguments of transformers' Trainer that are refused: {unsupported}."])


def _data() -> list[Key]:
    """The keys of `data`; one that several tasks share is listed once."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for task, model in KEYS.items():
        for key in [
            *of_model(model, "data."),
            *(of_model(Canaries, "data.canaries.") if "canaries" in model.model_fields else ()),
        ]:
            found.setdefault((key.name, key.type, key.default, key.meaning), []).append(task)
    return [Key(*facts, ", ".join(tasks)) for facts, tasks in sorted(found.items())]


def _renamed(key: Key, where: str | None) -> Key:
    name = key.name.replace("model.", "SIDE.", 1)
    return Key(name, key.type, key.default, key.meaning, where or "")


def of_model(model: type[BaseModel], prefix: str, where: str = "") -> Iterator[Key]:
    """The keys of a configuration class, with `prefix` before each name."""
    for name, field in model.model_fields.items():
        yield Key(f"{prefix}{name}", _type(field.annotation, field), _default(field), field.description or "", where)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "{}"
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    """A type as text, with its choices and range."""
    words = list(dict.fromkeys(_parts(annotation)))
    bounds = [
        f"{sign} {getattr(m, name):g}"
        for m in (field.metadata if field else ())
        for name, sign in _SIGNS
        if _has(m, name)
    ]
    return " or ".join(words) + (f", {' and '.join(bounds)}" if bounds else "")


_SIGNS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "mapping", list: "list"}


def _has(mark: Any, name: str) -> bool:
    return isinstance(getattr(mark, name, None), (int, float))


def _parts(annotation: Any) -> Iterator[str]:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, UnionType):
        for part in inner:
            yield from _parts(part)
    elif origin is Literal:
        yield from map(str, inner)
    elif origin is Annotated:
        marks = [m for mark in inner[1:] for m in getattr(mark, "metadata", [mark])]
        bounds = [f"{sign} {getattr(m, name):g}" for m in marks for name, sign in _SIGNS if _has(m, name)]
        yield " or ".join(_parts(inner[0])) + (f" {' and '.join(bounds)}" if bounds else "")
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "mapping"
    elif annotation is not type(None):
        yield _PLAIN.get(origin or annotation, "text")


def _words(name: str) -> str:
    return " or ".join(choices(name)) or " or ".join(_ARGUMENT.get(w, w) for w in kind(name).split(" or "))


_ARGUMENT = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "dict": "mapping"}
