"""Sources of examples with several modalities: spoken digits with images, archives and tables of columns, records in memory.

A file has a column for each modality and one for the label; each row is one example. An .npz archive holds arrays. A table
(.csv, .jsonl, .json, .parquet) holds numbers (lists), images, or names of files beside it: images, .npy arrays, .wav
recordings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from understudy.data import memory
from understudy.data.audio import read_wave, spectrogram
from understudy.data.class_labels import NamesOf, check_alike, check_taught, names_in, parquet_names, spelled
from understudy.data.folders import find, split_files
from understudy.data.image_files import array_pixels, decode, formats
from understudy.data.image_sources import read_source
from understudy.data.memory import MEMORY
from understudy.data.paired import Pairs
from understudy.data.records import absent, place, read_records
from understudy.data.tables import class_numbers, columns_of, read_npy, read_npz, read_parquet
from understudy.errors import InputError, nearest

SPOKEN = "spoken_digits"
SPOKEN_MODALITIES = ("image", "audio")
_RATE = 8000
_TABLES = (".npz", ".csv", ".jsonl", ".json", ".parquet")
Columns = dict[str, Any]
"""By modality its examples, and under the name of the label column the labels."""


def read_paired(spec: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Pairs], list[str]]:
    """The examples of each split of `spoken_digits`, a file, a folder or records in memory, and the classes' names.

    Args:
        spec: as for `load_paired`; `modalities` names the columns. notes: changes and omissions are added.

    Raises:
        InputError: no such data, a missing column or cell, a file that cannot be read, or examples of different shapes.
    """
    name = str(spec["name"])
    if name == SPOKEN:
        return spoken_digits(spec)
    label = str(spec.get("label_column") or "label")
    wanted, counts = [*spec["modalities"], label], Counter[str]()
    named: NamesOf = {label: {}}
    if name.startswith(MEMORY):
        found = {}
        for split, rows in memory.records(name).items():
            names = names_in(getattr(memory.held(name)[split], "features", None))
            found[split] = [_records("data", spelled(rows, names, split, named), wanted, None, spec, counts)]
    else:
        path = find(name)
        if path is None:
            raise InputError(f"Data {name!r} is no path and not in UNDERSTUDY_DATA: give a file, or a folder of files.")
        files = {"train": [path]} if path.is_file() else split_files(path, _TABLES, notes)
        if not files:
            raise InputError(f"{path} holds no file of columns ({', '.join(_TABLES)}): name them train.csv, test.csv.")
        found = {s: [_file(file, wanted, spec, counts, s, named) for file in each] for s, each in files.items()}
    notes += [f"{name}: {number} {what}." for what, number in counts.items() if number]
    whole = {split: _joined(name, parts, wanted[:-1], label) for split, parts in found.items()}
    own = list(dict.fromkeys(n for split in ("train", *named[label]) for n in named[label].get(split, ())))
    labels, classes = _labels(name, {split: columns[label] for split, columns in whole.items()}, own)
    return {
        split: Pairs({m: columns[m] for m in wanted[:-1]}, labels[split]) for split, columns in whole.items()
    }, classes


def _file(
    path: Path, wanted: Sequence[str], spec: Mapping[str, Any], counts: Counter[str], split: str, named: NamesOf
) -> Columns:
    if path.suffix.lower() not in _TABLES:
        raise InputError(f"{path} is no file of columns: give one of {', '.join(_TABLES)}.")
    if path.suffix.lower() != ".npz":
        rows = spelled(read_records(path), parquet_names(path), split, named)
        return _records(str(path), rows, wanted, path.parent, spec, counts)
    _need(str(path), columns_of(path), wanted)
    arrays = read_npz(path, wanted)
    parts: Columns = {m: array_pixels(path, m, arrays[m], spec, counts) for m in wanted[:-1]}
    return {**parts, wanted[-1]: arrays[wanted[-1]].tolist()}


def _records(
    where: str,
    rows: Sequence[Mapping[str, Any]],
    wanted: Sequence[str],
    folder: Path | None,
    spec: Mapping[str, Any],
    counts: Counter[str],
) -> Columns:
    if not rows:
        raise InputError(f"{where} holds no rows.")
    for i, row in enumerate(rows):
        _need(where, row, wanted)
        for column in wanted:
            if _empty(row[column]):
                raise InputError(
                    f"{place(f'{where}, row {i}', row)} has no {column}: every example needs each modality and a label. "
                    "Remove the row."
                )
    *modalities, label = wanted
    found: Columns = {m: _cells(f"{where}, {m}", [row[m] for row in rows], folder, spec, counts) for m in modalities}
    return {**found, label: [row[label] for row in rows]}


def _empty(cell: Any) -> bool:
    """Whether a cell holds nothing, as text, a list, or the bytes and path of a file."""
    if isinstance(cell, dict):
        return not (cell.get("bytes") or cell.get("path"))
    return absent(cell) or (isinstance(cell, (str, list)) and not len(cell))


def _need(where: str, have: Any, wanted: Sequence[str]) -> None:
    for column in wanted:
        if column not in have:
            raise InputError(
                f"{where} has no column {column!r}.{nearest(column, have)} Its columns are {', '.join(sorted(map(str, have)))}: "
                "name yours with data.modalities and data.label_column."
            )


def _cells(
    where: str, cells: Sequence[Any], folder: Path | None, spec: Mapping[str, Any], counts: Counter[str]
) -> Tensor:
    """The cells of one column, all of one kind, `[examples, channels, height, width]`."""
    if all(isinstance(c, (bytes, dict, Image.Image)) for c in cells):
        raw = [(c.get("bytes") or _beside(folder, c.get("path"))) if isinstance(c, dict) else c for c in cells]
        return decode(raw, where, counts, spec.get("size"))
    if all(isinstance(c, str) for c in cells):
        ends = {Path(c).suffix.lower() for c in cells}
        files = [_beside(folder, c) for c in cells]
        if ends <= formats()[1]:
            return decode(files, where, counts, spec.get("size"))
        if ends == {".wav"}:
            return _spectrograms(where, files)
        if ends != {".npy"}:
            raise InputError(
                f"{where}: {str(cells[0])[:60]!r} names no file of numbers: a column holds names of images, of .npy or of .wav "
                "files, all of one kind, or lists of numbers."
            )
        cells = [read_npy(file) for file in files]
    try:
        arrays = [np.asarray(c) for c in cells]
    except ValueError:
        raise InputError(f"{where} holds lists that are no array: give each row equally many numbers.") from None
    odd = next((i for i, a in enumerate(arrays) if a.shape != arrays[0].shape), None)
    if odd is not None:
        raise InputError(
            f"{where}: row {odd} is {arrays[odd].shape} and row 0 is {arrays[0].shape}: all rows must have one shape."
        )
    return array_pixels(Path(where), "the column", np.stack(arrays), spec, counts)


def _spectrograms(where: str, files: Sequence[Path]) -> Tensor:
    """Of recordings that have one rate: the bands reach up to half of it, so those of two rates are no longer the same."""
    heard = [read_wave(file) for file in files]
    first = heard[0][1]
    odd = next((i for i, (_, rate) in enumerate(heard) if rate != first), None)
    if odd is not None:
        raise InputError(
            f"{where}: {files[odd].name} has {heard[odd][1]} samples a second and {files[0].name} {first}: convert the "
            "recordings to one rate."
        )
    return torch.stack([spectrogram(samples, first) for samples, _ in heard])


def _beside(folder: Path | None, name: Any) -> Path:
    """A file that a table names, beside the table."""
    return Path(str(name)) if folder is None else folder / str(name)


def _joined(name: str, parts: Sequence[Columns], modalities: Sequence[str], label: str) -> Columns:
    """The shards of one split."""
    for modality in modalities:
        kinds = {(tuple(part[modality].shape[1:]), part[modality].dtype) for part in parts}
        if len(kinds) > 1:
            shapes = " and ".join(str(shape) for shape, _ in sorted(kinds, key=str))
            raise InputError(f"{name}: {modality} has shapes {shapes} in files of one split. Convert them.")
    found: Columns = {m: torch.cat([part[m] for part in parts]) for m in modalities}
    return {**found, label: [value for part in parts for value in part[label]]}


def _labels(
    name: str, columns: Mapping[str, Sequence[Any]], own: Sequence[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Labels by split as numbers, and the classes: names in the data's `own` order, if their numbered classes have names,
    or in alphabetical order; or numbers from 0."""
    for split, column in columns.items():
        odd = next((v for v in column if not isinstance(v, (str, Real))), None)
        if odd is not None:
            raise InputError(
                f"{name}, {split}: the label {str(odd)[:60]!r} is no class: give each example one name or number."
            )
    every = [v for column in columns.values() for v in column]
    values = {str(v) for v in every}
    if not own:  # nothing but the examples says which classes there are
        check_alike(name, every)
        check_taught(name, {s: [str(v) for v in c] for s, c in columns.items()})
    if any(isinstance(v, str) for v in every) and not all(v.lstrip("-").isdigit() for v in values):
        classes = list(own) if values <= set(own) else sorted(values)
        return {s: torch.tensor([classes.index(str(v)) for v in c]) for s, c in columns.items()}, classes
    found = {s: torch.from_numpy(class_numbers(f"{name}, {s}", list(c), "example")) for s, c in columns.items()}
    return found, [str(i) for i in range(max(int(part.max()) for part in found.values()) + 1)]


def spoken_digits(spec: Mapping[str, Any]) -> tuple[dict[str, Pairs], list[str]]:
    """Recordings of spoken digits, as spectrograms `[1, 32, 32]`, each with an image of the same digit from `mnist10k`.

    Pairs belong together by class alone: which image of its class a recording gets is drawn from `data.seed`. Test
    recordings get the last tenth of the images.
    """
    folder, seed = find(SPOKEN), int(spec.get("seed") or 0)
    if folder is None or find("mnist10k") is None:
        raise InputError(
            f"Data {SPOKEN!r} lies in UNDERSTUDY_DATA, with mnist10k for its images: set it to such a folder."
        )
    images = read_source("mnist10k", {}, {}, [])[0]["train"]
    cut = len(images) * 9 // 10
    pools = {"train": images.select(slice(0, cut)), "test": images.select(slice(cut, None))}
    found = {}
    for split, pool in pools.items():
        table = read_parquet(folder / f"{split}.parquet", ["audio_int16", "label"])
        sounds = [torch.from_numpy(np.frombuffer(b, "<i2").copy()) for b in table.column("audio_int16").to_pylist()]
        labels = torch.tensor(table.column("label").to_pylist()).long()
        chosen = torch.zeros_like(labels)
        generator = torch.Generator().manual_seed(seed)
        for c in range(10):
            own, theirs = (labels == c).nonzero()[:, 0], (pool.labels == c).nonzero()[:, 0]
            order = theirs[torch.randperm(len(theirs), generator=generator)]
            chosen[own] = order[torch.arange(len(own)) % len(order)]
        audio = torch.stack([spectrogram(s, _RATE) for s in sounds])
        found[split] = Pairs({"image": pool.pixels[chosen], "audio": audio}, labels)
    return found, [str(i) for i in range(10)]
