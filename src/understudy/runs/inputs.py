"""The files and folders that a recipe names, so that a run which goes on has what it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from understudy.data.folders import files_below, find
from understudy.errors import InputError
from understudy.files import digest
from understudy.runs.recipe import Recipe
from understudy.training import Pipeline

WRITTEN = ("log",)
"""Options that name what a run writes."""


def named_files(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the content of every file or folder that the options of the method name, by key; of a pipeline's `data` too,
    which tasks hash where they read them."""
    method = recipe.build_method()
    said = list(_texts("data", recipe.data)) if isinstance(method, Pipeline) else []
    for name, field in type(method).model_fields.items():
        if name not in WRITTEN and str in (field.annotation, *get_args(field.annotation)):
            said += _texts(f"options.{name}", getattr(method, name))
    found = {key: _path(text) for key, text in said}
    return {key: _content(path) for key, path in found.items() if path is not None}


def _path(text: str) -> Path | None:
    try:
        return find(text)
    except InputError:  # a text that cannot be a path
        return None


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and value.strip():
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(f"{key}.{name}", part)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _texts(f"{key}.{number}", part)


def _content(path: Path) -> str:
    if path.is_file():
        return digest(path)
    held = [(str(p.relative_to(path)), digest(p)) for p in sorted(files_below(path))]
    return hashlib.sha256(repr(held).encode()).hexdigest()
