"""Files of one graph: .npz archives, and .pt files of torch-geometric, which are read without running their code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.data.columns import names
from understudy.data.planetoid import dense
from understudy.data.tables import read_npz
from understudy.errors import InputError

SPARSE = {"x_indptr", "x_indices", "x_data", "x_shape"}
COLUMNS = {"x", "y", "edges", "edge_index", *SPARSE}


NAMES = {
    **dict.fromkeys(("features", "feat", "feats", "node_feat", "attr_matrix"), "x"),
    **dict.fromkeys(("labels", "label", "node_label"), "y"),
    **{f"attr_{part}": f"x_{part}" for part in ("indptr", "indices", "data", "shape")},
    **dict.fromkeys(("adjacency", "adj_matrix", "A"), "adj"),
}
"""Other names of columns, as other collections of graphs have them, by ours."""
_ADJACENCY = ("adj_data", "adj_indices", "adj_indptr", "adj_shape")


def graph_file(path: Path, splits: Collection[str], notes: list[str]) -> dict[str, Any]:
    """The columns of a graph from an .npz archive, or from torch-geometric data or a dictionary of tensors saved as
    .pt.

    Args:
        splits: columns that name the nodes of splits. notes: columns that nothing reads are added.
    """
    values: dict[str, Any] = dict(_saved(path) if path.suffix in (".pt", ".pth") else read_npz(path))
    for theirs in values.keys() & NAMES.keys():
        if NAMES[theirs] not in values:
            values[NAMES[theirs]] = values.pop(theirs)
    if not values.keys() & {"edges", "edge_index"}:
        _from_adjacency(path, values)
    unused = values.keys() - COLUMNS - set(splits)
    if unused:
        notes.append(f"{path.name}: not used: {'column' if len(unused) == 1 else 'columns'} {names(unused)}.")
    if "edges" not in values and "edge_index" in values:
        edges = np.asarray(values["edge_index"])
        if edges.ndim != 2 or edges.shape[0] != 2:
            raise InputError(f"{path}: edge_index is {edges.shape}; give (2, edges).")
        values["edges"] = edges.T
    missing = [c for c in ("y", "edges") if c not in values]
    if "x" not in values and not values.keys() >= SPARSE:
        missing = [*missing, "x (or " + ", ".join(sorted(SPARSE)) + ")"]
    if missing:
        raise InputError(
            f"{path} has columns {', '.join(sorted(values)) or 'none'} and lacks {', '.join(missing)}; edges are (edges, 2), "
            "edge_index (2, edges), or adj (nodes, nodes)."
        )
    if "x" not in values:
        values["x"] = dense(str(path), _sparse(path, values, "x"))
    return values


def _from_adjacency(path: Path, values: dict[str, Any]) -> None:
    """Turn a matrix of edges, dense or in the parts of a sparse one, into pairs of nodes, in place."""
    if values.keys() >= set(_ADJACENCY):
        matrix = _sparse(path, values, "adj").tocoo()
        values["edges"] = np.stack([matrix.row, matrix.col], 1)[matrix.data != 0].astype(np.int64)
    elif "adj" in values:
        matrix = np.asarray(values["adj"])
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype.kind not in "fiub":
            raise InputError(f"{path}: adj is {matrix.dtype} {matrix.shape}; give numbers, a row and a column a node.")
        values["edges"] = np.argwhere(matrix != 0)
    for name in ("adj", *_ADJACENCY):
        values.pop(name, None)


def _sparse(path: Path, values: Mapping[str, Any], name: str) -> Any:
    """The matrix of `NAME_data`, `NAME_indices`, `NAME_indptr` and `NAME_shape`."""
    from scipy.sparse import csr_matrix

    try:
        data, indices, indptr, shape = (values[f"{name}_{part}"] for part in ("data", "indices", "indptr", "shape"))
        matrix = csr_matrix((data, indices, indptr), shape=tuple(int(n) for n in shape))
        matrix.check_format()
        return matrix
    except Exception as error:  # scipy raises many types; the columns form no matrix
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        parts = f"{name}_indptr, {name}_indices, {name}_data and {name}_shape"
        raise InputError(f"{path}: {parts} make no matrix: {reason}.") from error


def _saved(path: Path) -> dict[str, Any]:
    """Tensors by name, without running code that the file may contain."""
    try:
        with torch.serialization.safe_globals(_plain()):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types; the file is no readable graph
        raise InputError(
            f"{path} is damaged or holds more than tensors and a torch-geometric Data object, and pickles are not run. Save "
            "its x, y, edge_index and masks with numpy.savez."
        ) from error
    if isinstance(found, tuple) and len(found) > 1 and found[1] is None:  # a data set with one graph
        found = found[0]
    if hasattr(found, "to_dict"):
        found = found.to_dict()
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}; give one graph: x, y, edge_index and masks by name.")
    return {str(k): _numpy(path, str(k), v) for k, v in found.items() if isinstance(v, torch.Tensor)}


def _plain() -> list[Any]:
    """The classes of a `Data` object and its parts; they only hold values, so creating them runs no code."""
    try:
        from torch_geometric.data.data import Data, DataEdgeAttr, DataTensorAttr
        from torch_geometric.data.storage import BaseStorage, EdgeStorage, GlobalStorage, NodeStorage
    except ImportError:
        return []
    return [Data, DataEdgeAttr, DataTensorAttr, BaseStorage, EdgeStorage, GlobalStorage, NodeStorage]


def _numpy(path: Path, name: str, value: Tensor) -> Any:
    if value.layout != torch.strided or value.is_quantized:
        raise InputError(f"{path}: {name} is {value.layout} and must be dense: convert it with to_dense().")
    plain = value.detach().resolve_conj().resolve_neg()
    # bfloat16 and similar dtypes do not exist in numpy
    return (plain.float() if plain.is_floating_point() else plain).numpy()
