"""Tables that name image files: `metadata.csv`, `metadata.jsonl` or `metadata.parquet` beside the images, as `imagefolder`
of `datasets` reads them, and other CSV and JSON Lines files with a column of names and one of labels.

| column | is |
|---|---|
| `image`, else `file_name` (or `data.image_column`) | the file, from the table's folder on |
| `label` (or `data.label_column`) | the class, by name or number |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from understudy.data.class_labels import parquet_names
from understudy.data.folders import files_below, split_files, split_of
from understudy.data.image_files import are_loose, domain_column, formats, image_column, label_column, need_columns
from understudy.data.memory import Listed
from understudy.data.records import Record, place, read_records
from understudy.errors import InputError

SUFFIXES = (".csv", ".jsonl")
STEM = "metadata"
"""The name of the tables that `datasets` reads beside images."""


def is_metadata(path: Path) -> bool:
    """Whether a file is a table beside images by its name alone."""
    return path.stem == STEM and path.suffix.lower() in (*SUFFIXES, ".parquet")


def has_tables(folder: Path, spec: Mapping[str, Any]) -> bool:
    """Whether tables of a folder name its images and their classes."""
    return any(_names_images(file, spec) for file in files_below(folder))


def named_images(
    path: Path, spec: Mapping[str, Any], counts: Counter[str], notes: list[str]
) -> dict[str, Listed] | None:
    """The rows of each split of a file, or of the tables of a folder; `None` for a folder without such tables.

    A table of the whole folder may name files of several splits (`train/1.png`, `test/2.png`): each row then belongs to
    the split of its file.

    Raises:
        InputError: a table that cannot be read, or a row whose file is not there.
    """
    if path.is_file():
        return {"train": _listed([(path, row) for row in read_records(path)], path, spec)}
    tables = [f for f in files_below(path) if _names_images(f, spec)]
    if not tables:
        unread = next((f for f in files_below(path) if is_metadata(f)), None)
        if unread is not None and label_column(spec) and are_loose(path):  # no folders name the classes either
            have = set(next(iter(read_records(unread)), {}))
            need_columns(unread, have, {image_column(spec, have), *label_column(spec)})
        return None
    left: list[str] = []
    ends = {f.suffix.lower() for f in tables}
    groups = split_files(path, ends, left, further=True)
    rows: dict[str, list[tuple[Path, Record]]] = {}
    for split, files in groups.items():
        for file in (f for f in files if f in tables):
            for row in read_records(file):
                rows.setdefault(_split(path, file, row, spec) or split, []).append((file, row))
    if "train" not in rows:
        raise InputError(
            f"{path}: the tables of its images have {', '.join(sorted(rows)) or 'no rows'} but no train rows."
        )
    notes += left if len(ends) == 1 and not any(map(is_metadata, tables)) else []
    found = {split: _listed(own, path, spec) for split, own in rows.items()}
    named = {cell for one in found.values() for cell in one[image_column(spec, one.column_names)]}
    images = [f for f in files_below(path) if f.suffix.lower() in formats()[1]]
    counts["images that no row of a table names were left out"] += sum(f not in named for f in images)
    return found


def _names_images(file: Path, spec: Mapping[str, Any]) -> bool:
    """Whether a file is a table with the columns of images and of labels."""
    if file.suffix.lower() not in SUFFIXES and not is_metadata(file):
        return False
    try:
        rows = read_records(file)
    except InputError:
        if is_metadata(file):
            raise
        return False  # some other file beside the images
    if not rows or not (label_column(spec) or spec.get("image_column")):
        return False
    column = image_column(spec, rows[0])
    return {column, *label_column(spec)} <= set(rows[0]) and isinstance(rows[0][column], str)


def _split(folder: Path, table: Path, row: Record, spec: Mapping[str, Any]) -> str | None:
    """The split of a row's file, where the table is of the whole folder."""
    if table.parent != folder or split_of(table.stem) is not None:
        return None
    above = Path(str(row.get(image_column(spec, row), ""))).parts[:-1]
    return split_of(above[0]) if above else None


def _listed(rows: list[tuple[Path, Record]], where: Path, spec: Mapping[str, Any]) -> Listed:
    """Rows with the paths of their files, and the names of the classes if the tables hold them."""
    if not rows:
        raise InputError(f"{where} holds no rows. Expected a row for each image.")
    column = image_column(spec, rows[0][1])
    found: list[Mapping[str, Any]] = []
    for i, (table, row) in enumerate(rows):
        need_columns(table, set(row), {column, *label_column(spec), *domain_column(spec)})
        file = table.parent / str(row[column])
        if not file.is_file():
            raise InputError(
                f"{place(f'{table}, row {i}', row)} names {row[column]!r} in its column {column}, and {file} is no file: "
                "give names from the table's folder on."
            )
        found.append({**row, column: file})
    listed = Listed(found)
    first = rows[0][0]
    names = parquet_names(first) if first.suffix.lower() == ".parquet" else {}
    listed.features = {c: {"_type": "ClassLabel", "names": n} for c, n in names.items()} or None
    return listed
