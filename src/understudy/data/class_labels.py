"""Numbered classes whose names `datasets` keeps beside a column (`ClassLabel`), in memory and in parquet files.

Each split, and each shard, numbers its classes by itself: 0 may be "apple" in one and "bear" in another. So numbers of
different sources are compared by their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from understudy.errors import InputError

NamesOf = dict[str, dict[str, list[str]]]
"""By column and split the names of its classes, in the order of their numbers."""


def label_name(spec: Mapping[str, Any]) -> str:
    """What the data call the column `label`. `spec`: as the `data` of a recipe, which may map `columns`."""
    mapped = spec.get("columns")
    return str(mapped.get("label", "label")) if isinstance(mapped, Mapping) else "label"


def check_taught(name: str, labels: Mapping[str, Iterable[str]], remedy: str = "") -> None:
    """Refuse a class that another split has and `train` lacks: no model of these data can answer it.

    Args:
        labels: the classes of the records of each split. remedy: a further one, as the rest of a sentence.

    Raises:
        InputError: there is such a class.
    """
    taught = set(labels["train"])
    for split, own in labels.items():
        strange = sorted(set(own) - taught)
        if strange:
            raise InputError(
                f"{name}: the {split} split has a class {strange[0]!r} that train lacks; its classes are "
                f"{', '.join(sorted(taught))[:200]}. Give train records of it, or leave them out{remedy}."
            )


def check_alike(name: str, labels: Iterable[Any]) -> None:
    """Refuse labels of which one class would become two: truth values beside numbers, numbers beside names, one number or
    truth value written in two ways.

    Args:
        labels: of all records, as they are written; -1, which says that there is none, may stand beside any.

    Raises:
        InputError: there are such labels.
    """
    first: dict[str, Any] = {}
    spelled: dict[Any, Any] = {}
    for label in labels:
        said = str(label).strip()
        if said == "-1" or not isinstance(label, (bool, int, float, str)):
            continue
        number, truth = _NUMBER.fullmatch(said), said.casefold() in ("true", "false")
        kind = "truth" if truth else "number" if not isinstance(label, str) else "numeral" if number else "name"
        meant = float(said) if number else said.casefold() if truth else said
        written = said if isinstance(label, str) else said.lower().removesuffix(".0")
        other = next((first[k] for k in _APART[kind] if k in first), None)
        if other is None and spelled.setdefault(meant, (written, label))[0] != written:
            other = spelled[meant][1]
        if other is not None:
            raise InputError(
                f"{name}: the labels {other!r} and {label!r} stand beside one another, and may be one class or two. Write all "
                "labels alike, or name every class in data.classes."
            )
        first.setdefault(kind, label)


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
_APART = {"truth": ("number", "numeral"), "number": ("truth", "name"), "numeral": ("truth",), "name": ("number",)}
"""The kinds of labels that do not stand beside a kind."""


def text_classes(labels: Iterable[Any]) -> list[str]:
    """The classes of labels that are names, sorted as folders of classes are; none if one of the labels is a number."""
    names = set()
    for label in labels:
        if not isinstance(label, str):
            if isinstance(label, (int, float)) and label not in (-1,) and label == label:
                return []
        elif label and label != "-1":
            if _NUMBER.fullmatch(label.strip()):
                return []
            names.add(label)
    return sorted(names)


def places_of(where: str, labels: Sequence[Any], classes: Sequence[str], what: str) -> list[int]:
    """The numbers of classes that are named; −1, which says that there is none, stays.

    Args:
        what: what one label belongs to, for the message.

    Raises:
        InputError: a label that is none of the classes.
    """
    place = {name: i for i, name in enumerate(classes)} | {-1: -1, "-1": -1}
    for row, label in enumerate(labels):
        if not isinstance(label, (str, int)) or label == "" or label not in place:
            said = "no label" if label in (None, "") or label != label else f"the label {str(label)[:60]!r}"
            raise InputError(
                f"{where}: {what} {row} has {said}, and the classes of train are {_listed(classes)}: give it one of them, "
                "-1 for none, or leave it out."
            )
    return [place[label] for label in labels]


def names_in(features: Any) -> dict[str, list[str]]:
    """The names of the classes of every numbered column.

    Args:
        features: of a set of `datasets`, or their description in a file; `None` without.
    """
    found = {}
    for column, feature in (features or {}).items():
        read = feature.get if isinstance(feature, Mapping) else partial(getattr, feature)
        if read("_type", None) == "ClassLabel" and isinstance(read("names", None), list):
            found[str(column)] = [str(name) for name in read("names", None)]
    return found


def parquet_names(path: Path) -> dict[str, list[str]]:
    """As `names_in`, of a parquet file that `datasets` wrote; nothing of other files, and of those that cannot be read."""
    import pyarrow.parquet as pq

    try:
        described = json.loads((pq.read_schema(path).metadata or {}).get(b"huggingface", b"{}"))
        return names_in(described["info"]["features"]) if described else {}
    except Exception:  # pyarrow raises many types; who reads the records says what is wrong with the file
        return {}


def spell(values: Iterable[Any], names: Sequence[str] | None) -> list[Any]:
    """The names of numbered classes in the place of their numbers; what is no such number (−1, for none) stays."""
    if names is None:
        return list(values)
    return [names[v] if type(v) is int and 0 <= v < len(names) else v for v in values]


def spelled(
    records: list[dict[str, Any]], names: Mapping[str, list[str]], split: str, named: NamesOf
) -> list[dict[str, Any]]:
    """Replace the numbers of classes by their names in the columns of `named`, in place, and add these names to it."""
    for column in named.keys() & names.keys():
        for record, value in zip(records, spell([r.get(column) for r in records], names[column]), strict=True):
            if column in record:
                record[column] = value
        known = named[column].setdefault(split, [])
        known += [name for name in names[column] if name not in known]  # of several shards
    return records


def by_name(where: str, numbers: Sequence[int], names: Sequence[str] | None, known: Sequence[str]) -> list[int]:
    """Numbers of classes as `known` has them.

    Args:
        numbers: as `names` has them; −1 and other numbers without a name stay.
        names: of the classes here; `None` if nothing names them, so that numbers stay.
        known: names of the set's classes by number; empty if nothing names them.

    Raises:
        InputError: a class that occurs here is none of `known`.
    """
    if names is None or not known or list(names) == list(known):
        return list(numbers)
    place = {name: i for i, name in enumerate(known)}
    strange = next((names[n] for n in numbers if 0 <= n < len(names) and names[n] not in place), None)
    if strange is not None:
        raise InputError(
            f"{where} has the class {strange!r} of {_listed(names)}, and the classes of train are {_listed(known)}: give all "
            "splits the same classes."
        )
    return [place[names[n]] if 0 <= n < len(names) else n for n in numbers]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
