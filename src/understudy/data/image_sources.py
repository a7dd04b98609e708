"""Where images come from: built-in sets, folders `class/image`, tables with `image` and `label`, sets of the Hub."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from understudy.data import memory
from understudy.data.folders import find
from understudy.data.memory import MEMORY
from understudy.errors import InputError, nearest

EMBEDDED = ("digits", "clusters", "subclusters", "templates")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageSet(Dataset[tuple[Any, ...]]):
    """Images with labels and ids, held in memory.

    Args:
        pixels: `[images, channels, height, width]`, uint8 (0 … 255) or float features.
        labels: `[images]`, int64.
        ids: `[images]`, int64.
        clean: `[images]`, the labels before noise was added to them, if it was.
        parts: `[images, 2]`, int64, the true class and subclass of each, where subclasses are known.
        domains: `[images]`, the name of each one's domain, where the data have a column of them.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        ids: Tensor,
        clean: Tensor | None = None,
        parts: Tensor | None = None,
        domains: np.ndarray[Any, Any] | None = None,
    ) -> None:
        self.pixels, self.labels, self.ids, self.clean, self.parts = pixels, labels, ids, clean, parts
        self.domains = domains

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        found = self.pixels[index], int(self.labels[index]), int(self.ids[index])
        return found if self.domains is None else (*found, str(self.domains[index]))

    def select(self, index: Tensor | slice) -> ImageSet:
        clean, parts = (v[index] if v is not None else None for v in (self.clean, self.parts))
        domains = (
            self.domains[index if isinstance(index, slice) else index.numpy()] if self.domains is not None else None
        )
        return ImageSet(self.pixels[index], self.labels[index], self.ids[index], clean, parts, domains)

    def relabelled(self, labels: Tensor, clean: Tensor | None = None) -> ImageSet:
        """The same images under other labels."""
        clean = clean if clean is not None else self.clean
        return ImageSet(self.pixels, labels, self.ids, clean, self.parts, self.domains)


def read_source(name: str, spec: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, ImageSet], list[str]]:
    if name.startswith(MEMORY):
        return _columns(name, memory.tables(name), spec)
    if name == "digits":
        return _digits()
    if name == "clusters":
        return _clusters(int(spec.get("seed", 0)))
    if name == "templates":
        return _templates(int(spec.get("seed", 0)))
    if name == "subclusters":
        return _subclusters(int(spec.get("seed", 0)))
    path = find(name)
    if path is None:
        if "/" not in name or name.startswith((".", "/", "~")):
            raise InputError(
                f"Data {name!r} is neither built in ({', '.join(EMBEDDED)}), nor a path, nor in UNDERSTUDY_DATA."
                f"{nearest(name, EMBEDDED)}"
            )
        return _hub(name, spec)
    if path.is_file():
        part = _table(path, spec)
        return {"train": part}, _names(part)
    tables = {
        file.stem: file
        for end in (".parquet", ".npz")
        for file in sorted(path.glob(f"*{end}"))
        if file.stem in ("train", "validation", "test") or file.stem.startswith("test_")
    }
    if tables:
        if "train" not in tables:
            raise InputError(f"{path} has {', '.join(sorted(tables))} but no train file.")
        parts = {split: _table(file, spec) for split, file in tables.items()}
        classes = json.loads((path / "classes.json").read_text()) if (path / "classes.json").exists() else None
        return parts, classes or _names(parts["train"])
    return _folder(path)


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
    """Signals of 40 samples, each one of 10 smooth templates of 24 with its own amplitude, in noise.

    Kept as float features of shape [1, 1, 40]. Training (2,000), validation (500) and `test_clean` (2,000) have the
    template at the start; in `test` (2,000) the signal is moved round by any number of samples, equally likely.
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


def _table(path: Path, spec: Mapping[str, Any]) -> ImageSet:
    image, label = str(spec.get("image_column", "image")), str(spec.get("label_column", "label"))
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            have = set(file.files)
            image, label = ("images" if "images" in have else image), ("labels" if "labels" in have else label)
            _need(path, have, {image, label, *_domain(spec)})
            pixels, labels = torch.from_numpy(file[image]), file[label]
            domains = [file[column].astype(str) for column in _domain(spec)]
        if pixels.dim() == 3:
            pixels = pixels[:, None]
        return ImageSet(pixels, _labels(path, labels), torch.arange(len(pixels)), None, None, *domains)
    if path.suffix != ".parquet":
        raise InputError(f"{path} is not an image set: give a folder class/image, a .parquet or an .npz file.")
    import pyarrow
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error
    _need(path, set(table.column_names), {image, label, *_domain(spec)})
    cells = table.column(image).to_pylist()
    return ImageSet(
        decode([c["bytes"] if isinstance(c, dict) else c for c in cells], str(path)),
        _labels(path, table.column(label).to_numpy()),
        torch.arange(len(cells)),
        None,
        None,
        *(np.asarray([str(v) for v in table.column(column).to_pylist()]) for column in _domain(spec)),
    )


def _domain(spec: Mapping[str, Any]) -> list[str]:
    """The column of domains, if one is asked for."""
    return [str(spec["domain_column"])] if spec.get("domain_column") is not None else []


def _need(path: Path | str, have: set[str], want: set[str]) -> None:
    if not want <= have:
        raise InputError(
            f"{path} has columns {', '.join(sorted(have))}; expected {', '.join(sorted(want))}. "
            "Name yours with data.image_column, data.label_column and data.domain_column."
        )


def _labels(path: Path | str, labels: Any) -> Tensor:
    values = np.asarray(labels)
    if values.dtype.kind in "OfSU":
        try:
            floats = values.astype(float)
        except (TypeError, ValueError):
            raise InputError(f"{path}: labels must be class numbers, found {str(values[0])!r}.") from None
        wrong = np.flatnonzero(~np.isfinite(floats) | (floats != np.round(floats)))
        if len(wrong):
            raise InputError(f"{path}: the label of row {wrong[0]} is {floats[wrong[0]]}, not a class number.")
        values = floats
    return torch.from_numpy(values.astype(np.int64))


def decode(cells: Iterable[Any], source: str) -> Tensor:
    """Encoded images (bytes, paths or PIL images) as uint8 `[images, channels, height, width]`."""
    out: list[np.ndarray[Any, Any]] = []
    for i, cell in enumerate(cells):
        where = str(cell) if isinstance(cell, Path) else f"{source}, row {i}"
        try:
            opened = (
                cell
                if isinstance(cell, Image.Image)
                else Image.open(io.BytesIO(cell) if isinstance(cell, bytes) else cell)
            )
            gray = opened.mode in ("L", "1", "I;16")
            out.append(np.asarray(opened.convert("L" if gray else "RGB")))
        except (UnidentifiedImageError, OSError, TypeError, AttributeError) as error:
            raise InputError(f"{where} is not a readable image ({type(error).__name__}).") from None
        if out[-1].shape != out[0].shape:
            raise InputError(f"{where} is {out[-1].shape} and the first image {out[0].shape}: resize them to one size.")
    if not out:
        raise InputError(f"{source} holds no images.")
    stacked = torch.from_numpy(np.stack(out))
    return stacked[:, None] if stacked.dim() == 3 else stacked.permute(0, 3, 1, 2).contiguous()


def _folder(path: Path) -> tuple[dict[str, ImageSet], list[str]]:
    """`class/image.png`, optionally below train, validation and test."""
    roots = {s: path / s for s in ("train", "validation", "test") if (path / s).is_dir()} or {"train": path}
    if "train" not in roots:
        raise InputError(f"{path} has {', '.join(sorted(roots))} but no train folder.")
    classes = sorted(p.name for p in roots["train"].iterdir() if p.is_dir())
    parts = {}
    for split, root in roots.items():
        files = [
            (f, i) for i, c in enumerate(classes) for f in sorted((root / c).glob("*")) if f.suffix.lower() in SUFFIXES
        ]
        if not files:
            raise InputError(f"{root} holds no images. Expected {root}/CLASS/IMAGE with {', '.join(sorted(SUFFIXES))}.")
        pixels = decode([f for f, _ in files], str(root))
        parts[split] = ImageSet(pixels, torch.tensor([i for _, i in files]), torch.arange(len(files)))
    return parts, classes


def _hub(name: str, spec: Mapping[str, Any]) -> tuple[dict[str, ImageSet], list[str]]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(name)
    except Exception as error:  # the Hub client raises a dozen kinds; each means that the set is not to be had
        raise InputError(f"Data set {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return _columns(name, loaded, spec)


def _columns(name: str, loaded: Mapping[str, Any], spec: Mapping[str, Any]) -> tuple[dict[str, ImageSet], list[str]]:
    """The splits of a set of `datasets`, by its columns."""
    image, label = str(spec.get("image_column", "image")), str(spec.get("label_column", "label"))
    parts: dict[str, ImageSet] = {}
    for split, rows in loaded.items():
        _need(name, set(rows.column_names), {image, label, *_domain(spec)})
        domains = [np.asarray([str(v) for v in rows[column]]) for column in _domain(spec)]
        pixels, labels = decode(rows[image], name), _labels(name, rows[label])
        parts[split] = ImageSet(pixels, labels, torch.arange(len(rows)), None, None, *domains)
    if "train" not in parts:
        raise InputError(f"{name} has splits {', '.join(parts)} but no train split.")
    names = getattr(loaded["train"].features[label], "names", None)
    return parts, names or _names(parts["train"])
