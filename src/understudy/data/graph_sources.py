"""Sources of graphs: embedded ones, .npz files, Planetoid; and the cleaning of their edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.data.batch import IGNORE
from understudy.data.folders import SPLITS, find, split_files
from understudy.data.graph_files import graph_file
from understudy.data.planetoid import read_planetoid
from understudy.data.tables import class_numbers
from understudy.errors import InputError, nearest
from understudy.losses.edges import check_edges

Embedded = Callable[[Mapping[str, Any]], Mapping[str, Any]]
ENDS = ("idx", "mask")
COLUMNS = {"train": "train_idx or train_mask", "validation": "val_idx or val_mask", "test": "test_idx or test_mask"}


@dataclass
class Graph:
    """A graph as read and cleaned.

    Args:
        nodes: features `[nodes, features]`.
        labels: `[nodes]`, −100 where there is none.
        edges: `[2, edges]`, both directions, without self-loops and duplicates.
        splits: node ids of train, validation and test.
    """

    name: str
    nodes: Tensor
    labels: Tensor
    edges: Tensor
    splits: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


def _path(name: str, embedded: Mapping[str, Embedded], notes: list[str]) -> Path:
    """The file of a graph: a path or a set in the data folder, with or without suffix, or the only file of a folder."""
    places = [p for p in map(find, (name, f"{name}.npz", f"graphs/{name}.npz")) if p]
    path = next((p for p in places if p.is_file()), None) or next(iter(places), None)
    if path is None:
        raise InputError(
            f"Graph {name!r} is neither built in ({', '.join(embedded)}), nor an .npz or .pt file, nor in UNDERSTUDY_DATA, nor "
            f"planetoid:NAME.{nearest(name, embedded)}"
        )
    if path.is_file():
        return path
    files = split_files(path, (".npz", ".pt", ".pth"), notes)
    every = [file for part in files.values() for file in part]
    if len(every) != 1:
        raise InputError(
            f"{path} holds {len(every)} graphs (.npz, .pt), and one is needed: name the file. A graph's splits are columns of "
            f"its file, {', '.join(COLUMNS.values())}."
        )
    return every[0]


def read_graph(spec: Mapping[str, Any], embedded: Mapping[str, Embedded]) -> Graph:
    """Find a graph by name, check it and clean its edges.

    Args:
        spec: see `load_graph`.
        embedded: built-in graphs by name, as functions from `spec` to the content of an .npz file.
    """
    name = str(spec["name"])
    notes: list[str] = []
    if name in embedded:
        values = embedded[name](spec)
    elif name.startswith("planetoid:"):
        values = read_planetoid(name.partition(":")[2], spec.get("root"))
    else:
        columns = [f"{word}_{end}" for words in SPLITS.values() for word in words for end in ENDS]
        values = graph_file(_path(name, embedded, notes), columns, notes)
    nodes, labels = _features(name, values["x"]), _labels(name, values["y"])
    if nodes.dim() != 2 or len(nodes) != len(labels) or 0 in nodes.shape:
        raise InputError(
            f"{name}: features are {tuple(nodes.shape)} and there are {len(labels)} labels: give a row of numbers a node."
        )
    if not bool(torch.isfinite(nodes).all()):
        node = int((~torch.isfinite(nodes)).any(1).nonzero()[0, 0])
        raise InputError(f"{name}: the features of node {node} are not finite.")
    graph = Graph(name, nodes, labels, torch.empty(2, 0, dtype=torch.int64), {}, notes)
    if graph.classes < 2:
        raise InputError(f"{name}: there is {max(0, graph.classes)} class; at least 2 are needed.")
    graph.edges = clean_edges(name, values["edges"], len(labels), graph.notes, graph.warnings)
    graph.splits = _splits(graph, values, int(spec.get("fold", 0)), int(spec.get("seed", 0)))
    return graph


def clean_edges(name: str, pairs: Any, nodes: int, notes: list[str], warnings: list[str]) -> Tensor:
    """`[2, edges]` with both directions, sorted, without self-loops and duplicates; changes are noted.

    Args:
        pairs: `[edges, 2]`. A list with each edge once, as i < j, is undirected; any other list that is not symmetric
            is directed, and adding the reverse edges is a warning.
    """
    raw = np.asarray(pairs)
    if raw.ndim != 2 or raw.shape[1] != 2:
        raise InputError(f"{name}: edges are {raw.shape}; give pairs of nodes, (edges, 2).")
    if raw.dtype.kind not in "iu":
        raise InputError(f"{name}: edges are {raw.dtype}; give whole numbers, a pair of nodes an edge.")
    listed = torch.from_numpy(raw.astype(np.int64))
    check_edges(name, listed.T, nodes)
    proper = listed[listed[:, 0] != listed[:, 1]]
    if len(proper) < len(listed):
        notes.append(f"{len(listed) - len(proper)} self-loops were removed; each node gets one if a loss requires it.")
    unique = proper.unique(dim=0)
    if len(unique) < len(proper):
        notes.append(f"{len(proper) - len(unique)} edges listed more than once were taken once.")
    both = torch.cat([unique, unique.flip(1)]).unique(dim=0)
    if len(both) > len(unique):
        if bool((unique[:, 0] < unique[:, 1]).all()):
            notes.append("Undirected edges are listed once and taken both ways.")
        else:
            warnings.append(
                f"The edges of {name} are directed ({len(both) - len(unique)} have no reverse): they are taken both ways."
            )
    return both.T.contiguous()


def _features(name: str, values: Any) -> Tensor:
    raw = np.asarray(values)
    if raw.dtype.kind not in "fiub":
        raise InputError(f"{name}: features are {raw.dtype}; give numbers, one row a node.")
    return torch.from_numpy(raw.astype(np.float32))


def _labels(name: str, values: Any) -> Tensor:
    raw = np.asarray(values)
    if raw.ndim == 2 and raw.dtype.kind in "fiub":
        if raw.shape[1] == 1:
            raw = raw[:, 0]
        elif np.isin(raw, (0, 1)).all() and (raw.sum(1) <= 1).all():  # a column a class; a row of zeros has none
            raw = np.where(raw.any(1), raw.argmax(1), -1)
    if raw.ndim == 1 and raw.dtype.kind == "f" and np.isfinite(raw).all() and (raw == np.floor(raw)).all():
        raw = raw.astype(np.int64)
    if raw.ndim != 1 or raw.dtype.kind not in "iu":
        raise InputError(f"{name}: labels are {raw.dtype} {raw.shape}; give one class number a node, −1 for none.")
    labels = torch.from_numpy(class_numbers(name, raw, "node"))
    if bool((labels < -1).any()):
        node = int((labels < -1).nonzero()[0, 0])
        raise InputError(f"{name}: the label of node {node} is {int(labels[node])}; classes begin at 0, −1 means none.")
    return labels.masked_fill(labels == -1, IGNORE)


def _splits(graph: Graph, values: Mapping[str, Any], fold: int, seed: int) -> dict[str, Tensor]:
    """The published split, or 20 labels per class for training, then 500 and 1,000 nodes (at most a third each)."""
    number = len(graph.labels)
    given = {split: _column(graph.name, split, values) for split in COLUMNS}
    if not any(given.values()):
        return _drawn(graph, seed)
    parts: dict[str, Tensor] = {}
    folds = max((_folds(np.asarray(values[c]), number) for c in given.values() if c is not None), default=1)
    for split, column in given.items():
        if column is None:
            raise InputError(f"{graph.name} has a split without {COLUMNS[split]}.")
        if fold >= folds and (np.asarray(values[column]).dtype == bool or column.endswith("_mask")):
            raise InputError(
                f"{graph.name}: {column} is {np.asarray(values[column]).shape} and there are {number} nodes; data.fold is {fold}, "
                f"and folds are numbered from 0 to {folds - 1}."
            )
        index = _chosen(graph.name, column, np.asarray(values[column]), number, fold)
        if len(index) and (int(index[0]) < 0 or int(index[-1]) >= number):
            raise InputError(f"{graph.name}: {column} names a node outside 0 … {number - 1}.")
        labelled = index[graph.labels[index] != IGNORE]
        if len(labelled) < len(index):
            graph.notes.append(f"{len(index) - len(labelled)} {split} nodes have no label and were left out.")
        parts[split] = labelled
    return _apart(graph.name, parts)


def _column(name: str, split: str, values: Mapping[str, Any]) -> str | None:
    """The column with a split's nodes, by any name of the split."""
    found = [f"{word}_{end}" for word in sorted(SPLITS[split]) for end in ENDS if f"{word}_{end}" in values]
    if len(found) > 1:
        raise InputError(f"{name} has {found[0]} and {found[1]}, both the {split} split. Keep one.")
    return found[0] if found else None


def _folds(raw: Any, number: int) -> int:
    """How many masks of so many nodes a column holds."""
    return int(raw.size // number) if raw.ndim == 2 and number in raw.shape else 1


def _chosen(name: str, column: str, raw: Any, number: int, fold: int) -> Tensor:
    """Node ids of a column: a mask (booleans or 0 and 1, one row per fold, or one for all folds), or a list of ids."""
    if raw.dtype == bool or column.endswith("_mask"):
        masks = np.atleast_2d(raw)
        masks = masks.T if masks.shape[0] == number != masks.shape[-1] else masks  # torch-geometric: a column per fold
        if masks.ndim != 2 or masks.shape[1] != number or fold >= len(masks) > 1:
            raise InputError(f"{name}: {column} is {raw.shape} and there are {number} nodes; data.fold is {fold}.")
        if raw.dtype != bool and not np.isin(raw, (0, 1)).all():
            raise InputError(f"{name}: {column} is a mask and holds other values than 0 and 1; name node ids in *_idx.")
        raw = np.flatnonzero(masks[fold if len(masks) > 1 else 0])
    if raw.ndim != 1 or (raw.dtype.kind not in "iu" and len(raw)):
        raise InputError(f"{name}: {column} is {raw.dtype} {raw.shape}; give a list of node ids.")
    return torch.from_numpy(raw.astype(np.int64)).unique()


def _apart(name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Check that splits share no node and the evaluated ones are not empty. Training labels may be missing: some losses
    use none."""
    counted = torch.cat(list(parts.values()))
    if len(counted.unique()) < len(counted):
        node = int(counted.mode().values)
        inside = [s for s, index in parts.items() if bool((index == node).any())]
        raise InputError(f"{name}: node {node} is in the {' and '.join(inside)} splits: each node may be in one.")
    for split in ("validation", "test"):
        if len(parts[split]) == 0:
            raise InputError(f"{name}: no node of the {split} split has a label.")
    return parts


def _drawn(graph: Graph, seed: int) -> dict[str, Tensor]:
    order = torch.randperm(len(graph.labels), generator=torch.Generator().manual_seed(seed))
    order = order[graph.labels[order] != IGNORE]
    labels = graph.labels[order]
    counts = torch.bincount(labels, minlength=graph.classes)
    small = int((counts - 20).clamp(min=0).sum()) < 2  # 20 of each class would leave nothing to evaluate on
    chosen = torch.zeros(len(order), dtype=torch.bool)
    for c in range(graph.classes):
        most = max(1, int(counts[c]) // 3) if small else 20
        chosen[(labels == c).nonzero()[:most, 0]] = True
    rest = order[~chosen]
    validation, test = min(500, len(rest) // 3), min(1000, len(rest) // 2)
    graph.notes.append(
        f"{graph.name} has no split: {'a third of the' if small else '20'} nodes of each class are for training, others are drawn for validation and test."
    )
    parts = {"train": order[chosen], "validation": rest[:validation], "test": rest[validation : validation + test]}
    return _apart(graph.name, {s: index.sort().values for s, index in parts.items()})
