"""Files of records: .jsonl, .json, .parquet, .csv and .txt, with the location of each record for messages."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from understudy.errors import InputError

READERS = {".jsonl", ".json", ".parquet", ".csv", ".txt"}
"""Files that `datasets` writes beside the records."""

Record = dict[str, Any]


class Row(Record):
    """A record with its location.

    Args:
        values: its columns.
        at: file and line, or number of the row.
    """

    __slots__ = ("at",)

    def __init__(self, values: Any = (), at: str = "") -> None:
        super().__init__(values)
        self.at = at


def place(what: str, record: Mapping[str, Any]) -> str:
    """`what` with the record's location in its file, if known."""
    at = getattr(record, "at", "")
    return f"{what} ({at})" if at else what


def printable(text: str) -> str:
    """`text` for a message, with control characters and characters that cannot be encoded escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason(error: BaseException) -> str:
    """The message of an error, on one line."""
    return printable(" ".join(str(error).split()))[:300] or type(error).__name__


def absent(value: Any) -> bool:
    """Whether a cell holds no value: null, or NaN, which tables write in its place."""
    return value is None or (isinstance(value, (float, np.floating)) and bool(np.isnan(value)))


def read_records(path: Path) -> list[Record]:
    """The records of one file: .txt (pieces of 4,000 characters), .jsonl, .json, .parquet or .csv.

    Cells of .csv are text.

    Raises:
        InputError: the file cannot be read; the message names the line.
    """
    try:
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8-sig")
            return [Row({"text": text[i : i + 4000]}, f"{path.name} character {i}") for i in range(0, len(text), 4000)]
        if path.suffix in (".jsonl", ".json"):
            text = path.read_text(encoding="utf-8-sig")
            return _list(path, text) if path.suffix == ".json" else list(_lines(path, text))
        if path.suffix == ".parquet":
            return _parquet(path)
        if path.suffix == ".csv":
            return list(_cells(path))
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{path} cannot be read: its values are nested too deeply. Flatten them.") from None
    except (ValueError, OSError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    raise InputError(f"{path} is not a text set: give one of {', '.join(sorted(READERS))}.")


def _lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON text may hold other line separators
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} cannot be read as JSON: {error.msg} (column {error.colno}).") from error
        except RecursionError:
            raise InputError(f"{where} cannot be read: its values are nested too deeply. Flatten them.") from None
        except ValueError as error:  # a number with more digits than Python reads
            raise InputError(f"{where} cannot be read: {reason(error)}") from error
        yield Row(_object(where, row), f"{path.name} line {number}")


def _list(path: Path, text: str) -> list[Record]:
    """A JSON list; or JSON lines in a .json file, as `datasets` reads them."""
    if not text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except json.JSONDecodeError:
            return list(_lines(path, text))
        if not isinstance(whole, dict) or "\n" in text.strip():
            raise InputError(
                f"{path} must hold a JSON list of records, or one record a line, not a {type(whole).__name__}."
            )
        return list(_lines(path, text))
    rows = json.loads(text)
    return [Row(_object(f"{path}, record {i}", row), f"{path.name} record {i}") for i, row in enumerate(rows)]


def _object(where: str, row: Any) -> Record:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a record is {type(row).__name__}, not an object with columns.")
    return row


def _parquet(path: Path) -> list[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, TypeError, ArithmeticError, LookupError) as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    return [Row(row, f"{path.name} row {i}") for i, row in enumerate(rows)]


def _cells(path: Path) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a cell may be as long as a document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, None) or []
        for name in header:
            if header.count(name) > 1:
                raise InputError(f"{path} has {header.count(name)} columns named {name!r}. Rename all but one.")
        end = reader.line_num
        for cells in reader:
            start, end = end + 1, reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{path}, line {start}: {len(cells)} cells and {len(header)} columns. Quote cells that hold a comma, a "
                    "quote or a line break."
                )
            yield Row(zip(header, cells, strict=True), f"{path.name} line {start}")
