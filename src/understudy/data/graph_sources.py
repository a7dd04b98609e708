"""Where graphs come from: an embedded one, .npz files, Planetoid; and the cleaning of their edges."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.data.batch import IGNORE
from understudy.data.folders import find
from understudy.errors import InputError, nearest
from understudy.losses.edges import check_edges
from understudy.reading import at_home

EMBEDDED = ("topics",)
COLUMNS = {
    "train": ("train_idx", "train_mask"),
    "validation": ("val_idx", "val_mask"),
    "test": ("test_idx", "test_mask"),
}


@dataclass
class Graph:
    """A graph as read and cleaned.

    Args:
        nodes: features `[nodes, features]`. labels: `[nodes]`, −100 where there is none. edges: `[2, edges]`, both
            directions, without self-loops and duplicates. splits: node ids of train, validation and test.
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


def read_graph(spec: Mapping[str, Any]) -> Graph:
    """Find a graph by name, check it and clean its edges."""
    name = str(spec["name"])
    path = next((p for p in map(find, (name, f"{name}.npz", f"graphs/{name}.npz")) if p and p.is_file()), None)
    if name == "topics":
        values = topics(int(spec.get("seed", 0)))
    elif name.startswith("planetoid:"):
        values = _planetoid(name.partition(":")[2], spec.get("root"))
    elif path is not None:
        values = _npz(path)
    else:
        raise InputError(
            f"Graph {name!r} is neither built in ({', '.join(EMBEDDED)}), nor an .npz file, nor in UNDERSTUDY_DATA, nor "
            f"planetoid:NAME.{nearest(name, EMBEDDED)}"
        )
    nodes, labels = _features(name, values["x"]), _labels(name, values["y"])
    if nodes.dim() != 2 or len(nodes) != len(labels) or not nodes.shape[1]:
        raise InputError(
            f"{name}: features are {tuple(nodes.shape)} and there are {len(labels)} labels: give a row of numbers a node."
        )
    if not bool(torch.isfinite(nodes).all()):
        node = int((~torch.isfinite(nodes)).any(1).nonzero()[0, 0])
        raise InputError(f"{name}: the features of node {node} are not finite.")
    graph = Graph(name, nodes, labels, torch.empty(2, 0, dtype=torch.int64), {})
    if graph.classes < 2:
        raise InputError(f"{name}: there is {max(0, graph.classes)} class; at least 2 are needed.")
    graph.edges = clean_edges(name, values["edges"], len(labels), graph.notes, graph.warnings)
    graph.splits = _splits(graph, values, int(spec.get("fold", 0)), int(spec.get("seed", 0)))
    return graph


def clean_edges(name: str, pairs: Any, nodes: int, notes: list[str], warnings: list[str]) -> Tensor:
    """`[2, edges]` with both directions, sorted, without self-loops and duplicates; what was changed is said.

    Args:
        pairs: `[edges, 2]`. Edges listed once each as i < j are an undirected list; any other list that is not
            symmetric is directed, and taking it both ways is a warning.
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
        notes.append(
            f"{len(listed) - len(proper)} self-loops were removed; each node gets one where a loss asks for it."
        )
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
    if raw.ndim != 1 or raw.dtype.kind not in "iu":
        raise InputError(f"{name}: labels are {raw.dtype} {raw.shape}; give one class number a node, −1 for none.")
    labels = torch.from_numpy(raw.astype(np.int64))
    if bool((labels < -1).any()):
        node = int((labels < -1).nonzero()[0, 0])
        raise InputError(f"{name}: the label of node {node} is {int(labels[node])}; classes begin at 0, −1 means none.")
    return labels.masked_fill(labels == -1, IGNORE)


def _splits(graph: Graph, values: Mapping[str, Any], fold: int, seed: int) -> dict[str, Tensor]:
    """The published split, or 20 labels a class for training, then 500 and 1,000 nodes (at most a third each)."""
    number = len(graph.labels)
    given = {s: next((c for c in names if c in values), None) for s, names in COLUMNS.items()}
    if not any(given.values()):
        return _drawn(graph, seed)
    parts: dict[str, Tensor] = {}
    for split, column in given.items():
        if column is None:
            raise InputError(f"{graph.name} has a split without {' or '.join(COLUMNS[split])}.")
        index = _chosen(graph.name, column, np.asarray(values[column]), number, fold)
        if len(index) and (int(index[0]) < 0 or int(index[-1]) >= number):
            raise InputError(f"{graph.name}: {column} names a node outside 0 … {number - 1}.")
        labelled = index[graph.labels[index] != IGNORE]
        if len(labelled) < len(index):
            graph.notes.append(f"{len(index) - len(labelled)} {split} nodes have no label and were left out.")
        parts[split] = labelled
    return _apart(graph.name, parts)


def _chosen(name: str, column: str, raw: Any, number: int, fold: int) -> Tensor:
    """Node ids of a column: of a mask, booleans or 0 and 1, one row a fold; or of a list of ids."""
    if raw.dtype == bool or column.endswith("_mask"):
        masks = np.atleast_2d(raw)
        if masks.ndim != 2 or masks.shape[1] != number or fold >= len(masks):
            raise InputError(f"{name}: {column} is {raw.shape} and there are {number} nodes; data.fold is {fold}.")
        if raw.dtype != bool and not np.isin(raw, (0, 1)).all():
            raise InputError(f"{name}: {column} is a mask and holds other values than 0 and 1; name node ids in *_idx.")
        raw = np.flatnonzero(masks[fold])
    if raw.ndim != 1 or (raw.dtype.kind not in "iu" and len(raw)):
        raise InputError(f"{name}: {column} is {raw.dtype} {raw.shape}; give a list of node ids.")
    return torch.from_numpy(raw.astype(np.int64)).unique()


def _apart(name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits share no node, and the judged ones are not empty. Training labels may be absent: some losses use none."""
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
    chosen = torch.zeros(len(order), dtype=torch.bool)
    for c in range(graph.classes):
        chosen[(labels == c).nonzero()[:20, 0]] = True
    rest = order[~chosen]
    validation, test = min(500, len(rest) // 3), min(1000, len(rest) // 2)
    graph.notes.append(f"{graph.name} has no split: 20 nodes of each class are for training, others drawn to judge.")
    parts = {"train": order[chosen], "validation": rest[:validation], "test": rest[validation : validation + test]}
    return _apart(graph.name, {s: index.sort().values for s, index in parts.items()})


def topics(seed: int, nodes: int = 1000, classes: int = 5, words: int = 300) -> dict[str, Any]:
    """A citation-like graph: documents of 5 topics, weak bags of words, and links that mostly stay in a topic.

    A contextual stochastic block model: each document has about 8 of 300 words, half of them its topic's own; each
    has about 4 links, four in five of them inside the topic. 20 labels a topic, 300 validation and 500 test nodes.
    """
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(nodes) % classes)
    own = np.arange(words) % classes == y[:, None]
    x = (rng.random((nodes, words)) < np.where(own, 4.0, 1.0) / (words / classes)).astype(np.float32)
    same = y[:, None] == y
    size = nodes / classes
    chance = np.where(same, 4 * 0.8 / size, 4 * 0.2 / (nodes - size))
    edges = np.argwhere(np.triu(rng.random((nodes, nodes)) < chance, 1))
    order = rng.permutation(nodes)
    train = np.concatenate([order[y[order] == c][:20] for c in range(classes)])
    rest = order[~np.isin(order, train)]
    return {"x": x, "y": y, "edges": edges, "train_idx": train, "val_idx": rest[:300], "test_idx": rest[300:800]}


def _npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            values = {k: file[k] for k in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{path} is not a readable .npz file: {str(error).splitlines()[0]}") from error
    sparse = {"x_indptr", "x_indices", "x_data", "x_shape"}
    missing = sorted({"y", "edges"} - values.keys())
    if "x" not in values and not sparse <= values.keys():
        missing = [*missing, "x (or " + ", ".join(sorted(sparse)) + ")"]
    if missing:
        raise InputError(f"{path} has columns {', '.join(sorted(values)) or 'none'} and lacks {', '.join(missing)}.")
    if "x" not in values:
        from scipy.sparse import csr_matrix

        try:
            parts = (values["x_data"], values["x_indices"], values["x_indptr"])
            values["x"] = csr_matrix(parts, shape=tuple(values["x_shape"])).toarray()
        except (ValueError, IndexError, TypeError) as error:
            raise InputError(f"{path}: x_indptr, x_indices, x_data and x_shape make no matrix: {error}.") from error
    return values


def _planetoid(name: str, root: Any) -> dict[str, Any]:
    """Planetoid through torch-geometric: read from `root`, or downloaded into it."""
    try:
        from torch_geometric.datasets import Planetoid
    except ImportError:
        raise InputError(f"planetoid:{name} needs the extra: pip install understudy[graph].") from None
    known = ("Cora", "CiteSeer", "PubMed")
    if name not in known:
        raise InputError(f"Unknown graph planetoid:{name}.{nearest(name, known)} Known: {', '.join(known)}.")
    folder = at_home(Path(root)) if root else Path.home() / ".cache" / "understudy" / "planetoid"
    try:
        data = Planetoid(str(folder), name)[0]
    except Exception as error:  # downloads and unpickling raise a dozen kinds; each means that the set is not to be had
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"planetoid:{name} cannot be read from or downloaded to {folder}: {reason}") from error
    masks = {f"{s}_mask": getattr(data, f"{s}_mask").numpy() for s in ("train", "val", "test")}
    return {"x": data.x.numpy(), "y": data.y.numpy(), "edges": data.edge_index.T.numpy(), **masks}
