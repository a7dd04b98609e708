"""Node classifiers: networks that read the graph, and networks that only use node features."""

from __future__ import annotations

import inspect
from pathlib import Path

from torch import Tensor, nn

from understudy.data import Batch, GraphBatch
from understudy.data.folders import find
from understudy.errors import InputError
from understudy.models.adapters import ModelAdapter, ModelOutput
from understudy.models.loading import small_folder
from understudy.models.small import build_small, load_small
from understudy.targets import Dense


class NodeAdapter(ModelAdapter):
    """A node classifier.

    Args:
        model: takes features `[nodes, features]`, and edges `[2, edges]` if its `forward` has a second argument;
            returns logits `[nodes, classes]`. Edges are in both directions and without self-loops, as torch-geometric
            expects them.
        classes: number of classes.

    A model without the second argument never gets edges, and only the features of the rows.
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model, self.classes = model, classes
        self.reads_edges = reads_edges(model)

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        assert isinstance(batch, GraphBatch)
        if features:
            raise InputError(f"{type(self.model).__name__} shows no features before its classifier on graphs.")
        nodes = batch.inputs["nodes"].to(next(self.model.parameters()).dtype)
        shown = nodes if self.reads_edges else batch.select(nodes)
        logits: Tensor = self.model(shown, batch.edges) if self.reads_edges else self.model(shown)
        if logits.shape != (len(shown), self.classes):
            raise InputError(
                f"{type(self.model).__name__} gives {tuple(logits.shape)} for {len(shown)} nodes of {self.classes} classes: "
                "one row of logits a node is expected."
            )
        return ModelOutput(Dense(batch.select(logits) if self.reads_edges else logits))


def reads_edges(model: nn.Module) -> bool:
    """Whether `forward` takes edges after the features: a second argument without a default, or one named so."""
    try:
        _first, *rest = inspect.signature(model.forward).parameters.values()
    except ValueError:
        return False
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    second = rest[0] if rest and rest[0].kind in places else None
    return second is not None and (second.default is inspect.Parameter.empty or second.name.startswith("edge"))


def load_nodes(name: str | Path | nn.Module, *, classes: int, features: int) -> nn.Module:
    """A classifier of nodes: a module, `gcn|sage|gat|mlp` with options, `mlp:64,64`, or the folder of one."""
    if isinstance(name, nn.Module):
        return name
    name = str(name)
    if name.partition(":")[0] in ("gcn", "sage", "gat", "mlp"):
        return build_small(name, classes, (features,))
    path = find(name)
    if path is None or not small_folder(path):
        raise InputError(
            f"Model {name!r} is neither gcn, sage, gat or mlp (gcn:hidden=128,layers=2,dropout=0.5) nor the folder of "
            "one. A model of your own is handed over as a module, in Python."
        )
    model = load_small(path)
    facts = model.understudy
    if (facts["classes"], facts["shape"]) != (classes, [features]):  # type: ignore[index]
        raise InputError(
            f"{name} reads {facts['shape']} features for {facts['classes']} classes, and the data has [{features}] for "  # type: ignore[index]
            f"{classes}. Choose a model of this data."
        )
    return model
