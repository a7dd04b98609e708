"""Node classification: a student without the graph learns from a teacher that reads it. Embedded: documents of topics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from understudy.data import collate_graph, load_graph
from understudy.evaluation.graphs import neighbour_cosine
from understudy.models import ModelAdapter, NodeAdapter, load_nodes
from understudy.synthetic.topics import topics
from understudy.tasks.base import LabelledTask, Prepared, merged

_TRAINER = {
    "max_steps": 500,
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "eval_strategy": "steps",
    "eval_steps": 1,
}
_PATIENCE = 50
# A teacher's most accurate epoch is often an early one with low confidence; the one with the best likelihood teaches more.
_TEACHER = {"metric_for_best_model": "nll", "greater_is_better": False}


class NodeClassification(LabelledTask):
    """Predict the class of a node. One step is one epoch: the whole graph."""

    name = "node_classification"
    kind = "graph"
    unit = "nodes"
    metric = "accuracy"
    higher_is_better = True

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Default: the embedded graph, a GCN that is trained first, and an MLP; both keep their best validation epoch."""
        data = recipe.get("data") or {}
        data.setdefault("name", "topics")
        recipe["data"] = data
        trainer = merged(_TRAINER, recipe.get("trainer") or {})
        if trainer["eval_strategy"] != "no":
            trainer.setdefault("load_best_model_at_end", True)
            recipe.setdefault("patience", _PATIENCE)
        recipe["trainer"] = trainer
        if recipe.get("teacher") is None:
            recipe["teacher"] = {"model": "gcn:hidden=128,layers=2,dropout=0.5", "train": dict(_TEACHER)}
        if recipe.get("student") is None:
            recipe["student"] = {"model": "mlp:hidden=128,layers=2,dropout=0.5"}
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        splits = load_graph(recipe.data, {"topics": topics})
        return Prepared(
            train=splits.train,
            validation=splits.validation,
            test=splits.test,
            teacher_train=splits.train,
            collate=collate_graph,
            classes=splits.classes,
            input_shape=(splits.features,),
            notes=list(splits.notes),
            warnings=list(splits.warnings),
            hashes={"data": splits.hash},
        )

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        name = spec.model if source is None else source
        model = load_nodes(name, classes=prepared.classes, features=prepared.input_shape[0])
        return NodeAdapter(model, prepared.classes)

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """As for images; with a teacher also the similarity of the differences between neighbours."""
        found = super().evaluate(student, teacher, loader)
        if teacher is not None:
            found["metrics"] |= neighbour_cosine(student, teacher, loader)
        return found
