"""Graphs with features and labels on their nodes, as one full batch, with splits, cleaned edges and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from understudy.data.batch import IGNORE, Batch
from understudy.data.graph_sources import Embedded, Graph, read_graph
from understudy.errors import InputError, nearest

OPTIONS = {"name", "split", "fold", "seed", "normalize", "root"}
SPLITS = ("train", "validation", "test")


@dataclass(kw_only=True)
class GraphBatch(Batch):
    """A whole graph. Its rows are the chosen nodes, with or without a label.

    Args:
        inputs: `nodes`, features `[nodes, features]`.
        labels: `[nodes]`, −100 for a node without a label in this split.
        ids: `[nodes]`.
        edges: `[2, edges]`, both directions, no self-loops.
        loops: the same with one self-loop per node.
        chosen: `[nodes]`, whether a node is a row: all in training, those of the split in evaluation.
    """

    edges: Tensor
    loops: Tensor
    chosen: Tensor

    @property
    def kind(self) -> str:
        return "graph"

    @cached_property
    def mask(self) -> Tensor:
        return self.chosen

    @cached_property
    def row_labels(self) -> Tensor:
        """`[rows]`, −100 for a node without a label."""
        return self.labels[self.chosen]

    @cached_property
    def sequence(self) -> Tensor:
        return torch.zeros_like(self.row_labels)

    def select(self, values: Tensor) -> Tensor:
        return values[self.chosen]

    @cached_property
    def labelled(self) -> int:
        """Number of rows with a label."""
        return int((self.row_labels != IGNORE).sum())

    def with_labels(self, signal: Any) -> tuple[Any, Tensor]:
        if self.labelled == 0:
            raise InputError("No node of this split has a label, and the objective reads labels.")
        has = self.row_labels != IGNORE
        return signal.select(has), self.row_labels[has]

    def among_rows(self, values: Tensor) -> Tensor:
        """`values` unchanged: on a graph the labelled nodes are counted separately."""
        return values

    @cached_property
    def everywhere(self) -> GraphBatch:
        """The same graph with all nodes as rows."""
        return replace(self, chosen=torch.ones_like(self.chosen))


class GraphSet(Dataset[dict[str, Tensor]]):
    """A data set with one example, the whole graph."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index != 0:  # so that iteration ends
            raise IndexError(index)
        return self.values


def collate_graph(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a `GraphBatch`: a batch is one graph."""
    if len(items) != 1:
        raise InputError(f"A batch is one whole graph, not {len(items)}.")
    return dict(items[0])


@dataclass
class GraphSplits:
    """The graph for training, validation and test."""

    train: GraphSet
    validation: GraphSet
    test: GraphSet
    classes: int
    features: int
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    hash: str = ""


def load_graph(spec: Mapping[str, Any], embedded: Mapping[str, Embedded] = MappingProxyType({})) -> GraphSplits:
    """Read a graph.

    Args:
        spec: `name` (one of `embedded`, a set in `UNDERSTUDY_DATA`, an .npz or .pt file, `planetoid:Cora`), `split`
            (`transductive`, or `inductive`: a fifth of the test nodes is removed from training with their edges, and
            evaluated), `fold` (of several published splits), `seed` (of the random choices: removed nodes, a split if
            there is none), `normalize` (divide each node's features by the sum of their absolute values), `root` (where
            Planetoid is downloaded to).
        embedded: built-in graphs by name, as functions from `spec` to the content of an .npz file.
    """
    for key in spec:
        if key not in OPTIONS:
            raise InputError(f"Unknown key data.{key}.{nearest(key, OPTIONS)} Known: {', '.join(sorted(OPTIONS))}.")
    how = spec.get("split", "transductive")
    if how not in ("transductive", "inductive"):
        raise InputError(f"data.split is {how!r} and must be transductive or inductive.")
    for key in ("seed", "fold"):
        number = spec.get(key, 0)
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise InputError(f"data.{key} is {number!r} and must be a whole number of at least 0.")
    graph = read_graph(spec, embedded)
    if spec.get("normalize", True):
        graph.nodes = graph.nodes / graph.nodes.abs().sum(1, keepdim=True).clamp(min=1e-12)
    digest = hashlib.sha256(json.dumps(dict(spec), sort_keys=True, default=str).encode())
    for part in (graph.nodes, graph.labels, graph.edges, *(graph.splits[s] for s in SPLITS)):
        digest.update(part.contiguous().numpy().tobytes() + b"|")
    hidden = _hidden(graph, int(spec.get("seed", 0))) if how == "inductive" else None
    keep = torch.ones(len(graph.labels), dtype=torch.bool)
    if hidden is not None:
        keep[hidden] = False
        graph.notes.append(
            f"{len(hidden)} test nodes and their edges are left out of training; the student is evaluated on them."
        )
    else:
        graph.notes.append("Features of test nodes, not their labels, are seen in training.")
    _facts(graph)
    sets = {
        "train": _view(graph, keep, graph.splits["train"], all_rows=True),
        "validation": _view(graph, keep, graph.splits["validation"]),
        "test": _view(graph, torch.ones_like(keep), graph.splits["test"] if hidden is None else hidden),
    }
    found = {"notes": graph.notes, "warnings": graph.warnings, "hash": digest.hexdigest()}
    return GraphSplits(**sets, classes=graph.classes, features=graph.nodes.shape[1], **found)  # type: ignore[arg-type]


def _hidden(graph: Graph, seed: int) -> Tensor:
    """A random fifth of the test nodes."""
    test = graph.splits["test"]
    number = round(len(test) / 5)
    if number == 0:
        raise InputError(
            f"{graph.name}: {len(test)} test nodes are too few for data.split=inductive; it hides a fifth."
        )
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    return test[order[:number]].sort().values


def _view(graph: Graph, keep: Tensor, labelled: Tensor, *, all_rows: bool = False) -> GraphSet:
    """The subgraph of the kept nodes, with only the labels of `labelled`."""
    labels = torch.full_like(graph.labels, IGNORE)
    labels[labelled] = graph.labels[labelled]
    chosen = torch.ones_like(keep) if all_rows else torch.zeros_like(keep).index_fill(0, labelled, True)
    place = keep.cumsum(0) - 1  # node → index among the kept ones
    edges = place[graph.edges[:, keep[graph.edges].all(0)]]
    loops = torch.arange(int(keep.sum())).expand(2, -1)
    return GraphSet(
        {
            "nodes": graph.nodes[keep],
            "labels": labels[keep],
            "ids": keep.nonzero()[:, 0],
            "edges": edges,
            "loops": torch.cat([edges, loops], 1),
            "chosen": chosen[keep],
        }
    )


def _facts(graph: Graph) -> None:
    number = graph.edges.shape[1]
    sizes = ", ".join(f"{len(graph.splits[s])} {s}" for s in SPLITS)
    graph.notes.insert(0, f"{len(graph.labels)} nodes, {number // 2} undirected edges; labels: {sizes}.")
    if number == 0:
        graph.warnings.append(f"{graph.name} has no edges: neighbours teach nothing, and the high-frequency term is 0.")
