"""The Planetoid graphs (Yang et al. 2016) from the files of their release. These are pickles, which are never
unpickled.

`Recorder` reads a pickle as a description: imports, calls and state are recorded and not executed.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from understudy.data.tables import check_memory
from understudy.errors import InputError, nearest

NAMES = ("Cora", "CiteSeer", "PubMed")
PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")


class Record:
    """An object described by a pickle: the arguments of its call, its state and its items."""

    def __init__(self, *values: Any) -> None:
        self.values, self.state = values, None
        self.items: dict[Any, Any] = {}

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Recorder(pickle._Unpickler):  # type: ignore[name-defined,misc]  # the C one may allocate any amount of memory
    """Reads a pickle without importing or calling anything."""

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (Record,), {"__module__": module})


def read_planetoid(name: str, root: Any) -> dict[str, Any]:
    """Features, labels, edges and the published split, from `root/NAME/raw`; missing files are downloaded."""
    if name not in NAMES:
        raise InputError(f"Unknown graph planetoid:{name}.{nearest(name, NAMES)} Known: {', '.join(NAMES)}.")
    folder = Path(str(root)).expanduser() if root else Path.home() / ".cache" / "understudy" / "planetoid"
    raw = folder / name / "raw"
    files = {part: raw / f"ind.{name.lower()}.{part}" for part in PARTS}
    missing = [file for file in files.values() if not file.is_file()]
    if missing:
        _download(name, raw, missing)
    try:
        found = {part: _described(file) for part, file in files.items() if part != "test.index"}
        test = np.array([int(line) for line in files["test.index"].read_text().split()], dtype=np.int64)
        return _assembled(found, test)
    except InputError:
        raise
    except Exception as error:  # a damaged file may raise any type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"planetoid:{name} cannot be read from {raw}: {reason}. Remove it to download it again."
        ) from error


def _download(name: str, raw: Path, missing: list[Path]) -> None:
    try:
        from torch_geometric.data import download_url
        from torch_geometric.datasets import Planetoid
    except ImportError:
        raise InputError(
            f"planetoid:{name} is not in {raw}, and downloading it needs the extra: pip install understudy[graph]."
        ) from None
    try:
        for file in missing:
            download_url(f"{Planetoid.url}/{file.name}", str(raw), log=False)
    except Exception as error:  # many types; the set is not available
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"planetoid:{name} cannot be downloaded to {raw}: {reason}") from error


def _described(file: Path) -> Any:
    """An array, a sparse matrix made dense, or a mapping, as described by a pickle file."""
    found = Recorder(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    if not isinstance(found, Record):
        return found
    kind = type(found).__name__
    if kind == "defaultdict":
        return found.items
    if kind != "csr_matrix" and not (kind == "_reconstructor" and found.values[0].__name__ == "csr_matrix"):
        return _array(found)
    parts: Any = found.state
    shape = tuple(int(n) for n in parts.get("_shape", parts.get("shape")))
    matrix = csr_matrix(tuple(_array(parts[key]) for key in ("data", "indices", "indptr")), shape=shape)
    return dense(str(file), matrix)


def dense(where: str, matrix: Any) -> np.ndarray[Any, Any]:
    """A sparse matrix as an array, after checking its indices and its size."""
    matrix.check_format(full_check=True)
    check_memory(f"{where}: the features are {matrix.shape}", matrix.dtype.itemsize, matrix.shape)
    return np.asarray(matrix.toarray())


def _array(found: Any) -> np.ndarray[Any, Any]:
    """The numpy array described by its shape, type and bytes."""
    name = type(found).__name__
    if name == "_frombuffer":
        data, kind, shape, order = found.values
        return np.frombuffer(data, _kind(kind)).reshape(shape, order=order)
    if name != "_reconstruct":
        raise ValueError(f"it holds {name} where an array is expected")
    _, shape, kind, columns_first, data = found.state
    if isinstance(data, Record):  # old protocols store bytes as text and a call to encode it
        data = data.values[0]
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, _kind(kind)).reshape(shape, order="F" if columns_first else "C")


def _kind(record: Any) -> np.dtype[Any]:
    """A dtype of plain numbers."""
    order = record.state[1] if record.state else "="
    kind = np.dtype(("=" if order == "|" else order) + record.values[0])
    if kind.kind not in "fiub":
        raise ValueError(f"it holds {kind} where numbers are expected")
    return kind


def _assembled(parts: Mapping[str, Any], test: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The graph of the release: test rows at their index, and empty rows for nodes of CiteSeer without features."""
    span = int(test.max() - test.min()) + 1
    start = len(parts["allx"])
    if test.min() != start or len(test) != len(parts["tx"]) or span > 10 * len(test):
        raise ValueError(f"test.index names nodes {test.min()} … {test.max()}, and the test nodes begin at {start}")
    x, y = (np.zeros((start + span, parts[c].shape[1]), np.float32) for c in ("allx", "ally"))
    x[:start], y[:start] = parts["allx"], parts["ally"]
    x[test], y[test] = parts["tx"], parts["ty"]
    edges = [(i, j) for i, others in parts["graph"].items() for j in others]
    train = len(parts["y"])
    return {
        "x": x,
        "y": y.argmax(1),
        "edges": np.array(edges, dtype=np.int64).reshape(-1, 2),
        "train_idx": np.arange(train),
        "val_idx": np.arange(train, train + 500),
        "test_idx": np.sort(test),
    }
