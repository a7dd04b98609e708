"""How much of a teacher's knowledge about neighbouring nodes a student has."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from understudy.data import Batch, GraphBatch
from understudy.losses.edges import high_frequency_cosine
from understudy.models import ModelAdapter, evaluating


@torch.no_grad()
def neighbour_cosine(student: ModelAdapter, teacher: ModelAdapter, loader: DataLoader[Any]) -> dict[str, float]:
    """`high_frequency_cosine`: the mean over all edges of the graph, at the paper's temperature 1.5. No metric without
    edges."""
    total, edges = 0.0, 0
    with evaluating(student, teacher):
        for values in loader:
            batch = Batch.from_dict(values)
            assert isinstance(batch, GraphBatch)
            signals = [
                model(batch.everywhere.to(next(model.parameters()).device)).signal.logits.to(batch.edges.device)
                for model in (student, teacher)
            ]
            total += float(high_frequency_cosine(signals[0], signals[1], batch.edges, tau=1.5).sum())
            edges += batch.edges.shape[1]
    return {"high_frequency_cosine": total / edges} if edges else {}
