"""Sources of images: built-in sets, folders `class/image`, tables with `image` and `label`, sets of the Hub."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from understudy.data import memory
from understudy.data.folders import find, own_names, split_files
from understudy.data.image_files import (
    class_folders,
    decode,
    domain_column,
    image_table,
    need_columns,
    resized,
    wanted_size,
)
from understudy.data.image_set import ImageSet
from understudy.data.memory import MEMORY
from understudy.data.tables import class_numbers
from understudy.errors import InputError, nearest

EMBEDDED = ("digits", "clusters", "subclusters", "templates")


def read_source(name: str, spec: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, ImageSet], list[str]]:
    """The image sets of each split and the names of the classes; changes and omissions are noted."""
    counts: Counter[str] = Counter()
    path = None if name in EMBEDDED or name.startswith(MEMORY) else find(name)
    if name.startswith(MEMORY):
        pools, classes = _columns(name, memory.tables(name), spec, counts)
    elif name in EMBEDDED:
        pools, classes = _embedded(name, int(spec.get("seed", 0)))
    elif path is not None:
        pools, classes = _path(path, spec, counts, notes)
    elif "/" not in name or name.startswith((".", "/", "~")):
        raise InputError(
            f"Data {name!r} is neither built in ({', '.join(EMBEDDED)}), nor a path, nor in UNDERSTUDY_DATA."
            f"{nearest(name, EMBEDDED)}"
        )
    else:
        pools, classes = _hub(name, spec, counts)
    pools = _alike(name, pools, spec, counts)
    notes += [f"{name}: {number} {what}." for what, number in counts.items() if number]
    return pools, classes


def _embedded(name: str, seed: int) -> tuple[dict[str, ImageSet], list[str]]:
    if name == "digits":
        return _digits()
    if name == "clusters":
        return _clusters(seed)
    return _templates(seed) if name == "templates" else _subclusters(seed)


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
    if path.is_file():
        part = image_table([path], spec, counts)
        return {"train": part}, _names(part)
    left: list[str] = []
    tables = split_files(path, (".parquet", ".npz"), left, further=True)
    if not tables:
        return class_folders(path, spec, counts)
    notes += left
    if "train" not in tables:
        raise InputError(f"{path} has {', '.join(sorted(tables))} but no train file.")
    parts = {split: image_table(files, spec, counts) for split, files in tables.items()}
    return parts, _class_names(path / "classes.json") or _names(parts["train"])


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


def _digits() -> tuple[dict[str, ImageSet], list[str]]:
    """scikit-learn's 1,797 digits of 8 × 8: 600 for test, the rest for training."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = torch.from_numpy(raw.images / 16 * 255).round().to(torch.uint8)[:, None]
    every = ImageSet(pixels, torch.from_numpy(raw.target).long(), torch.arange(len(raw.target)))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(9))
    return {"train": every.select(order[600:]), "test": every.select(order[:600])}, [str(i) for i in range(10)]


def _clusters(
    seed: int, classes: int = 40, latent: int = 20, inputs: int = 32
) -> tuple[dict[str, ImageSet], list[str]]:
    """A 40-class mixture in 8 super-clusters: 20 latent dimensions, mapped to 32 inputs through tanh.

    Kept as float features of shape [1, 1, 32]. 13,600 training examples, 3,000 for test.
    """
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.normal(size=(8, latent)) * 2, classes // 8, 0) + rng.normal(size=(classes, latent))
    into = rng.normal(size=(latent, inputs)) / np.sqrt(latent)
    labels = rng.integers(0, classes, size=16_600)
    values = np.tanh((centres[labels] + 0.9 * rng.normal(size=(len(labels), latent))) @ into)
    pixels = torch.from_numpy(values).float()[:, None, None]
    every = ImageSet(pixels, torch.from_numpy(labels).long(), torch.arange(len(labels)))
    return {"train": every.select(slice(3000, None)), "test": every.select(slice(0, 3000))}, [
        str(i) for i in range(classes)
    ]


def _templates(
    seed: int, classes: int = 10, length: int = 40, width: int = 24
) -> tuple[dict[str, ImageSet], list[str]]:
    """Signals of 40 samples, each one of 10 smooth templates of 24 with its own amplitude, plus noise.

    Stored as float features of shape [1, 1, 40]. Training (2,000), validation (500) and `test_clean` (2,000) have the
    template at the start; in `test` (2,000) the signal is shifted circularly by a uniform number of samples.
    """
    rng = np.random.default_rng(seed)
    smooth = np.exp(-0.5 * (np.arange(-6, 7) / 2) ** 2)
    shapes = np.stack([np.convolve(rng.normal(size=width), smooth, "same") for _ in range(classes)])
    shapes = np.pad(shapes / shapes.std(1, keepdims=True), ((0, 0), (0, length - width)))
    parts = {}
    for split, number in {"train": 2000, "validation": 500, "test": 2000, "test_clean": 2000}.items():
        labels = rng.integers(0, classes, size=number)
        values = (1 + 0.3 * rng.normal(size=(number, 1))) * shapes[labels]
        if split == "test":
            places = np.arange(length) - rng.integers(0, length, size=(number, 1))
            values = np.take_along_axis(values, places % length, 1)
        values = values + 0.35 * rng.normal(size=values.shape)
        pixels = torch.from_numpy(values).float()[:, None, None]
        parts[split] = ImageSet(pixels, torch.from_numpy(labels).long(), torch.arange(number))
    return parts, [str(i) for i in range(classes)]


def _subclusters(seed: int, parts: int = 5, width: int = 20) -> tuple[dict[str, ImageSet], list[str]]:
    """Two classes of five Gaussian clusters each in 20 dimensions: unit variance, centres of variance 1.2².

    Kept as float features of shape [1, 1, 20]; each example knows its cluster. 7,000 training examples, 4,000 for test.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(2 * parts, width)) * 1.2
    cluster = rng.integers(0, 2 * parts, size=11_000)
    values = centres[cluster] + rng.normal(size=(len(cluster), width))
    fine = torch.from_numpy(cluster).long()
    pixels, labels = torch.from_numpy(values).float()[:, None, None], fine // parts
    every = ImageSet(pixels, labels, torch.arange(len(labels)), parts=torch.stack([labels, fine], 1))
    return {"train": every.select(slice(4000, None)), "test": every.select(slice(0, 4000))}, ["0", "1"]


def _hub(name: str, spec: Mapping[str, Any], counts: Counter[str]) -> tuple[dict[str, ImageSet], list[str]]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(name)
    except Exception as error:  # the Hub client raises many types; the set is not available
        raise InputError(f"Data set {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return _columns(name, loaded, spec, counts)


def _columns(
    name: str, loaded: Mapping[str, Any], spec: Mapping[str, Any], counts: Counter[str]
) -> tuple[dict[str, ImageSet], list[str]]:
    """The splits of a set of `datasets`, by its columns."""
    image, label = str(spec.get("image_column", "image")), str(spec.get("label_column", "label"))
    parts: dict[str, ImageSet] = {}
    for split, own in own_names(name, loaded).items():
        rows = loaded[own]
        need_columns(name, set(rows.column_names), {image, label, *domain_column(spec)})
        domains = [np.asarray([str(v) for v in rows[column]]) for column in domain_column(spec)]
        pixels = decode(rows[image], name, counts, spec.get("size"))
        labels = torch.from_numpy(class_numbers(name, rows[label], "image"))
        parts[split] = ImageSet(pixels, labels, torch.arange(len(rows)), None, None, *domains)
    if "train" not in parts:
        raise InputError(f"{name} has splits {', '.join(parts)} but no train split.")
    names = getattr(loaded["train"].features[label], "names", None)
    return parts, names or _names(parts["train"])
