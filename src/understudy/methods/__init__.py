"""The methods: one file a paper. The files of this folder and the entry points `understudy.methods` are the registry."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any, Literal, get_args, get_origin

from understudy.errors import InputError, nearest
from understudy.training import Method


@cache
def built_in() -> tuple[type[Method], ...]:
    """The methods that the files of this folder define."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    kinds = [v for m in modules for v in vars(m).values() if isinstance(v, type) and v.__module__ == m.__name__]
    return tuple(k for k in kinds if issubclass(k, Method) and "name" in vars(k))


@cache
def _installed() -> dict[str, type[Method]]:
    """The built-in methods by name, then those of installed plug-ins: read once, for that opens a file of every package."""
    found = {method.name: method for method in sorted(built_in(), key=lambda m: (m.paper or 0, m.name != "sft"))}
    for point in entry_points(group="understudy.methods"):
        loaded = point.load()
        if not (isinstance(loaded, type) and issubclass(loaded, Method)):
            raise InputError(f"Entry point {point.name!r} ({point.value}) is not a subclass of understudy.Method.")
        if loaded.name in found:
            raise InputError(f"Two methods are named {loaded.name!r}: the plug-in {point.value} must choose another.")
        found[loaded.name] = loaded
    return found


def all_methods() -> dict[str, type[Method]]:
    """Every method by name: the built-in ones, those of installed plug-ins, then those of this process."""
    return {**_installed(), **_adopted}


_adopted: dict[str, type[Method]] = {}


def adopt(method: type[Method]) -> str:
    """Make a class of the caller's own known in this process, in the place of an earlier one of its name; returns the name.

    Raises:
        InputError: it has no name or no loss, or the name is that of a method that comes with the library or a plug-in.
    """
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name:
        raise InputError(f'Method class {method.__name__} has no name: set `name = "..."` in its body.')
    known = _adopted.get(name) or all_methods().get(name)
    if known is not method and known is not None and name not in _adopted:
        raise InputError(f"There is a method {name!r} already: give {method.__name__} another name.")
    if known is not method:
        _adopted[name] = method
    return name


def is_own(name: str) -> bool:
    """Whether a name is that of a class of the caller's own."""
    return name in _adopted


def _names(annotation: Any) -> tuple[str, ...]:
    """The values that an option may have by name, apart from lists of them."""
    parts = [annotation, *get_args(annotation)]
    return tuple(value for part in parts if get_origin(part) is Literal for value in get_args(part))


def variants() -> dict[str, tuple[str, dict[str, str]]]:
    """Names that stand for a method with one option: `kto` for `dpo` with `loss_type=kto`."""
    known = all_methods()
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for method in known.values():
        if method.variants is not None:
            for value in _names(method.model_fields[method.variants].annotation):
                if value not in known:
                    found.setdefault(value, (method.name, {method.variants: value}))
    return found


def resolve(name: str) -> tuple[str, dict[str, str]]:
    """The method that `name` stands for, and the options that make it so.

    Raises:
        InputError: an unknown name, with the nearest known one.
    """
    known, others = all_methods(), variants()
    if name in known:
        return name, {}
    if name not in others:
        raise InputError(
            f"Unknown method {name!r}.{nearest(name, [*known, *others])} Known: {', '.join(sorted(known))}; variants: "
            f"{', '.join(sorted(others))}."
        )
    return others[name]


def get(name: str) -> type[Method]:
    """The method that `name` stands for; an unknown name is an `InputError` with the nearest known one."""
    return all_methods()[resolve(name)[0]]


__all__ = ["adopt", "all_methods", "built_in", "get", "is_own", "resolve", "variants"]
