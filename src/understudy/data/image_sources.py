"""Sources of images: built-in sets, folders `class/image`, tables with `image` and `label`, tables that name image files,
sets of the Hub."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from understudy.data import memory
from understudy.data.class_labels import by_name, names_in, parquet_names, spell, text_classes
from understudy.data.folders import find, hub_id, own_names, split_files, split_folders
from understudy.data.image_files import (
    class_folders,
    decode,
    domain_column,
    domains_in,
    image_column,
    image_table,
    label_column,
    label_values,
    labels_in,
    loose_images,
    need_columns,
    resized,
    wanted_size,
)
from understudy.data.image_records import is_metadata, named_images
from understudy.data.image_set import ImageSet
from understudy.data.memory import MEMORY
from understudy.errors import InputError, nearest

NAMING = (".csv", ".jsonl", ".json")
"""Files that may name an image in each row."""
Embedded = Callable[[Mapping[str, Any]], tuple[dict[str, ImageSet], list[str]]]


def read_source(
    name: str, spec: Mapping[str, Any], embedded: Mapping[str, Embedded], notes: list[str]
) -> tuple[dict[str, ImageSet], list[str]]:
    """The image sets of each split and the names of the classes; changes and omissions are noted.

    Args:
        embedded: built-in sets by name, beside `digits`.
    """
    embedded = {"digits": lambda _: digits(), **embedded}
    counts: Counter[str] = Counter()
    path = None if name in embedded or name.startswith(MEMORY) else find(name)
    if name.startswith(MEMORY):
        pools, classes = _columns(name, memory.tables(name), spec, counts)
    elif name in embedded:
        pools, classes = embedded[name](spec)
    elif path is not None:
        pools, classes = _path(path, spec, counts, notes)
    elif "/" not in name or name.startswith((".", "/", "~")):
        raise InputError(
            f"Data {name!r} is neither built in ({', '.join(embedded)}), nor a path, nor in UNDERSTUDY_DATA."
            f"{nearest(name, embedded)}"
        )
    else:
        pools, classes = _hub(name, spec, counts)
    pools = _alike(name, pools, spec, counts)
    notes += [f"{name}: {number} {what}." for what, number in counts.items() if number]
    return pools, classes


def _alike(name: str, pools: dict[str, ImageSet], spec: Mapping[str, Any], counts: Counter[str]) -> dict[str, ImageSet]:
    """Splits with one size and type: resized to `size`, gray ones repeated to three channels if another split is
    coloured."""
    into = wanted_size(spec.get("size"))
    pixels = {split: part.pixels for split, part in pools.items()}
    if into is not None:
        pixels = {split: resized(p, into, counts) for split, p in pixels.items()}
    if {p.shape[1] for p in pixels.values()} == {1, 3}:
        counts["gray images beside coloured ones were given three equal channels"] += sum(
            len(p) for p in pixels.values() if p.shape[1] == 1
        )
        pixels = {split: p if p.shape[1] == 3 else p.expand(-1, 3, -1, -1).contiguous() for split, p in pixels.items()}
    train = pixels["train"]
    for split, p in pixels.items():
        if (p.shape[1:], p.dtype) != (train.shape[1:], train.dtype):
            raise InputError(
                f"{name}: the {split} split has images of {p.dtype} {tuple(p.shape[1:])} and the train split of {train.dtype} "
                f"{tuple(train.shape[1:])} (channels, height, width): set data.size, or convert them."
            )
    return {s: ImageSet(pixels[s], p.labels, p.ids, p.clean, p.parts, p.domains) for s, p in pools.items()}


def _path(
    path: Path, spec: Mapping[str, Any], counts: Counter[str], notes: list[str]
) -> tuple[dict[str, ImageSet], list[str]]:
    if path.is_file() and path.suffix.lower() not in NAMING:
        own = _own_names([path], spec)
        part = image_table([path], spec, counts, own)
        return {"train": part}, own or _names(part)
    left: list[str] = []
    tables = {} if path.is_file() else split_files(path, (".parquet", ".npz"), left, further=True)
    if path.is_file() or all(is_metadata(f) for files in tables.values() for f in files):
        tables, rows = {}, named_images(path, spec, counts, notes)
        if rows is not None:
            return _columns(str(path), rows, spec, counts, _class_names(path / "classes.json"))
    if not tables and not label_column(spec):
        splits = split_folders(path)
        roots = splits if "train" in splits else {"train": path}
        return {split: loose_images(root, spec, counts) for split, root in roots.items()}, []
    if not tables:
        return class_folders(path, spec, counts)
    notes += left
    if "train" not in tables:
        raise InputError(f"{path} has {', '.join(sorted(tables))} but no train file.")
    given = _class_names(path / "classes.json")
    own = _own_names(tables["train"], spec, given)
    parts = {split: image_table(files, spec, counts, own) for split, files in tables.items()}
    return parts, given or own or _names(parts["train"])


def _own_names(files: Sequence[Path], spec: Mapping[str, Any], given: Sequence[str] = ()) -> list[str]:
    """The names of the classes by number as the first file that names them has them; else of labels that are names, in the
    order that is `given` or sorted."""
    tables = [parquet_names(f) for f in files if f.suffix.lower() == ".parquet"]
    for names in tables:
        for column in label_column(spec):
            if column in names:
                return names[column]
    ends = (".parquet", ".npz")
    read = [v for f in files if f.suffix.lower() in ends for c in label_column(spec) for v in label_values(f, c)]
    return _ordered(text_classes(read), given)


def _ordered(names: list[str], given: Sequence[str]) -> list[str]:
    """The names of classes in the order that is given, if it has them all."""
    return list(given) if names and set(names) <= set(given) else names


def _class_names(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"{path} must hold a JSON list of the classes' names, in the order of their numbers.")
    return names


def _names(part: ImageSet) -> list[str]:
    return [str(i) for i in range(int(part.labels.max()) + 1)] if len(part) else []


def digits() -> tuple[dict[str, ImageSet], list[str]]:
    """scikit-learn's 1,797 digits of 8 × 8: 600 for test, the rest for training."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = torch.from_numpy(raw.images / 16 * 255).round().to(torch.uint8)[:, None]
    every = ImageSet(pixels, torch.from_numpy(raw.target).long(), torch.arange(len(raw.target)))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(9))
    return {"train": every.select(order[600:]), "test": every.select(order[:600])}, [str(i) for i in range(10)]


def _hub(name: str, spec: Mapping[str, Any], counts: Counter[str]) -> tuple[dict[str, ImageSet], list[str]]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(hub_id(name))
    except Exception as error:  # the Hub client raises many types; the set is not available
        raise InputError(f"Data set {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return _columns(name, loaded, spec, counts)


def _columns(
    name: str, loaded: Mapping[str, Any], spec: Mapping[str, Any], counts: Counter[str], given: Sequence[str] = ()
) -> tuple[dict[str, ImageSet], list[str]]:
    """The splits of a set of `datasets`, or of rows of records, by its columns. `given`: the classes' names in order."""
    label = label_column(spec)
    parts: dict[str, ImageSet] = {}
    own = own_names(name, loaded)
    if "train" not in own:
        raise InputError(f"{name} has splits {', '.join(own)} but no train split.")
    named = {split: names_in(loaded[theirs].features) for split, theirs in own.items()}
    classes = next((named["train"][column] for column in label if column in named["train"]), [])
    taught = loaded[own["train"]]
    if not classes:
        held = [v for c in label if c in taught.column_names for v in taught[c]]
        classes = _ordered(text_classes(held), given)
    for split, theirs in own.items():
        rows, names = loaded[theirs], named[split]
        image = image_column(spec, rows.column_names)
        need_columns(name, set(rows.column_names), {image, *label, *domain_column(spec)})
        domains = [domains_in(name, c, spell(rows[c], names.get(c))) for c in domain_column(spec)]
        pixels = decode(rows[image], name, counts, spec.get("size"))
        labels = labels_in(f"{name}, {split}", [rows[column] for column in label], len(rows), classes)
        if label:
            matched = by_name(f"{name}: the {split} split", labels.tolist(), names.get(label[0]), classes)
            labels = torch.tensor(matched, dtype=torch.int64)
        parts[split] = ImageSet(pixels, labels, torch.arange(len(rows)), None, None, *domains)
    return parts, classes or list(given) or _names(parts["train"])
