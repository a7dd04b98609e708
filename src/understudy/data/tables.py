"""Files of columns: .npz archives and parquet, read without pickle; any damage is an `InputError` of one line."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from understudy.errors import InputError

MOST_CLASSES = 1_000_000
LARGEST = 3.4028234663852886e38
"""The largest number of single precision, in which all is computed: what is beyond it would be infinite."""


def in_single(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which numbers are finite in single precision."""
    with np.errstate(over="ignore"):
        return np.isfinite(values.astype(np.float32, copy=False))


def columns_of(path: Path) -> set[str]:
    """The names of an archive's arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    except Exception as error:  # zipfile raises many types; the file cannot be read
        raise _unreadable(path, "a readable .npz file", error) from error


def read_npz(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of an archive: the given columns, or all.

    Raises:
        InputError: not an archive, a damaged one, an array of objects, or one that does not fit into memory.
    """
    known = columns_of(path)
    found = {}
    for name in sorted(known if names is None else names):
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
                shape, _, kind = _header(file)
        except Exception as error:  # as above
            raise _unreadable(path, f"a readable .npz file ({name})", error) from error
        if kind.hasobject:
            raise InputError(
                f"{path}: {name} holds Python objects, which are never unpickled. Save numbers (or text) of one type."
            )
        check_memory(f"{path}: {name} is {kind} {tuple(shape)}", kind.itemsize, shape)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found[name] = arrays[name]
        except Exception as error:  # as above
            raise _unreadable(path, f"a readable .npz file ({name})", error) from error
    return found


def read_npy(path: Path) -> np.ndarray[Any, Any]:
    """The array of a `.npy` file.

    Raises:
        InputError: another kind of file, a damaged one, an array of objects, or one that does not fit into memory.
    """
    try:
        with path.open("rb") as file:
            shape, _, kind = _header(file)
        check_memory(f"{path} is {kind} {tuple(shape)}", kind.itemsize, shape)
        found: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
    except InputError:
        raise
    except Exception as error:  # as above
        raise _unreadable(path, "a readable .npy file", error) from error
    return found


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of an array in the format `.npy`."""
    head = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if head == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def check_memory(what: str, itemsize: int, shape: Iterable[int]) -> None:
    """Raise an error for an array larger than this machine's memory, before it is allocated."""
    size = itemsize
    for length in shape:
        size *= int(length)
    total = psutil.virtual_memory().total
    if not 0 <= size <= total:
        raise InputError(f"{what}: {size / 2**30:.3g} GiB, and this machine has {total / 2**30:.3g} GiB of memory.")


def read_parquet(path: Path, columns: list[str] | None = None) -> Any:
    """A parquet file as a `pyarrow.Table`."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=columns)
    except Exception as error:  # pyarrow raises many types; the file cannot be read
        raise _unreadable(path, "a readable parquet file", error) from error


def cells(path: Path, table: Any, column: str) -> list[Any]:
    """The values of a table's column."""
    try:
        return list(table.column(column).to_pylist())
    except ValueError as error:  # not UTF-8, or times out of range
        raise _unreadable(path, f"a readable parquet file ({column})", error) from error


def class_numbers(where: str, values: Any, what: str) -> np.ndarray[Any, Any]:
    """Labels as int64.

    Args:
        what: what one label belongs to, for the message.

    Raises:
        InputError: not a list of integers, or a number that is not a class.
    """
    try:
        raw = np.asarray(values)
    except ValueError:  # lists of several lengths
        raise InputError(
            f"{where}: labels are lists of several lengths; give one class number for each {what}."
        ) from None
    if raw.dtype.kind == "U" and not isinstance(values, np.ndarray):
        raw = np.asarray(values, dtype=object)  # numbers beside names stay numbers
    if raw.ndim != 1 or raw.dtype.kind not in "OfSUiub":
        raise InputError(f"{where}: labels are {raw.dtype} {raw.shape}; give one class number for each {what}.")
    if raw.dtype.kind not in "iub":
        for row, value in enumerate(raw.tolist()):
            try:
                whole = float(value)
            except (TypeError, ValueError):
                raise InputError(
                    f"{where}: labels must be class numbers, found {str(value)[:60]!r} at {what} {row}. Number the classes from 0."
                ) from None
            if not (whole.is_integer() and abs(whole) < 2**53):
                raise InputError(f"{where}: the label of row {row} is {whole}, not a class number.")
        raw = raw.astype(float)
    if len(raw) and raw.max() >= MOST_CLASSES:
        row = int(raw.argmax())
        raise InputError(
            f"{where}: the label of {what} {row} is {int(raw[row])}; classes are numbered from 0, without gaps, and there "
            f"are at most {MOST_CLASSES}. Renumber them."
        )
    return raw.astype(np.int64)


def _unreadable(path: Path, what: str, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    return InputError(f"{path} is not {what}: {reason}")
