"""Data that the caller holds in memory: lists of records and `datasets` sets, named by a hash of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from understudy.data.class_labels import names_in
from understudy.data.tabular import SPLITS, tables_of
from understudy.errors import InputError

__all__ = ["MEMORY", "SPLITS", "Listed", "held", "keep", "records", "tables"]
MEMORY = "memory:"
"""Prefix of the name of a data set in memory."""
_held: dict[str, Mapping[str, Any]] = {}


def keep(data: Any) -> str:
    """Register a data set for the recipes of this process. Returns a name derived from its content.

    Args:
        data: see `tabular.is_data`; one without splits is the train split.

    Raises:
        InputError: a record is not a mapping, there is no record, or the set is streaming.
    """
    splits = tables_of(data)
    digest = hashlib.sha256()
    for split, rows in splits.items():
        if len(rows) == 0:
            raise InputError(f"data: the {split} split is empty.")
        digest.update(f"\n{split}\n".encode())
        named = names_in(getattr(rows, "features", None))
        digest.update(json.dumps(named, sort_keys=True).encode() if named else b"")
        for i, record in enumerate(_plain(rows)):
            if not isinstance(record, Mapping):
                raise InputError(f"data, {split} record {i} is {type(record).__name__}, not a mapping of columns.")
            digest.update(_said(f"data, {split} record {i}", record) + b"\n")
    name = f"{MEMORY}{digest.hexdigest()[:16]}"
    _held[name] = splits
    return name


def _said(where: str, record: Mapping[str, Any]) -> bytes:
    """A record as JSON text, for the name of its set."""
    odd = next((key for key in record if not isinstance(key, str)), None)
    if odd is not None:
        raise InputError(f"{where} has a column {odd!r}, a name that is {type(odd).__name__} and not text. Rename it.")
    try:
        return json.dumps(record, sort_keys=True, default=_content).encode()
    except RecursionError:
        raise InputError(f"{where} cannot be read: its values are nested too deeply. Flatten them.") from None
    except (TypeError, ValueError) as error:  # keys of several types inside, or a value that holds itself
        raise InputError(
            f"{where} cannot be read: {error}. Give names in text, and values that hold no others in a circle."
        ) from None


def held(name: str) -> Mapping[str, Any]:
    """The splits registered under a name."""
    if name not in _held:
        raise InputError(
            f"Data {name} were handed over in Python and this process has others or none: call again with the same data."
        )
    return _held[name]


def records(name: str) -> dict[str, list[dict[str, Any]]]:
    """Copies of the records of each split."""
    return {split: [dict(row) for row in _plain(rows)] for split, rows in held(name).items()}


class Listed:
    """Records of a list by column, as a `Dataset` gives them; but each value stays what it is, of whatever type the others
    are, so that a reader can say which record is wrong."""

    def __init__(self, rows: list[Mapping[str, Any]]) -> None:
        self.rows = rows
        self.features: dict[str, Any] | None = None
        self.column_names = list(dict.fromkeys(column for row in rows for column in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        return [row.get(column) for row in self.rows]


def tables(name: str) -> dict[str, Any]:
    """The columns of each split. A format such as that of torch, which would give tensors, is taken off; an own transform
    stays."""

    def columns(rows: Any) -> Any:
        if isinstance(rows, list):
            return Listed(rows)
        return rows if rows.format["type"] == "custom" else rows.with_format(None)

    return {split: columns(rows) for split, rows in held(name).items()}


def _plain(rows: Any) -> Iterator[Any]:
    """The records as stored: images of a `Dataset` stay encoded."""
    if isinstance(rows, list):
        yield from rows
        return
    for part in rows.with_format("arrow").iter(batch_size=1000):
        yield from part.to_pylist()


def _content(value: Any) -> Any:
    """A JSON value for a value that JSON does not have."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Image.Image):
        return [value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    return str(value)
