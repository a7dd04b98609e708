"""Supervised training on the data's own labels: the baseline that every method must beat, without a teacher.

loss = −log q(y | x)
"""

from __future__ import annotations

from typing import ClassVar

import torch

from understudy.data import Batch, GraphBatch, ListBatch
from understudy.data.retrieval_batches import RankingBatch
from understudy.losses import cross_entropy
from understudy.losses.retrieval import ordered_pairs, over_pairs, ranknet
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.training import Method, Requirements, Term, TrainState


class SFT(Method):
    """Cross-entropy with the labels; RankNet on rankings."""

    name = "sft"
    kinds = frozenset({"classification", "text", "preference", "graph", "ranking"})
    cost = "one student forward and backward a row; no teacher"
    page: ClassVar[dict[str, str]] = {
        "when": "As the baseline, and whenever labels are plentiful.",
        "not": "When a good teacher exists and labels are few: it ignores the teacher.",
        "deviations": "None: this is the plain objective. Of several answers it learns the best, and none that is labelled false.",
    }

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="none")

    def counts(self, batch: Batch) -> dict[str, float]:
        if isinstance(batch, GraphBatch):
            return {"ce": float(batch.labelled)}
        if isinstance(batch, RankingBatch):
            return {"ranknet": float(ordered_pairs(batch.labels, batch.candidates).sum())}
        if not isinstance(batch, ListBatch):
            return {}
        return {"ce": float(batch.lengths.gather(1, batch.best[:, None])[batch.chosen].sum())}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        if isinstance(batch, RankingBatch):  # every pair whose grades differ, divided by how many there are
            scores, valid = student.signal.values, ordered_pairs(batch.labels, batch.candidates)
            return {"ranknet": Term(over_pairs(lambda a, b, *_: ranknet(a, b), scores, scores, valid).sums)}
        if isinstance(batch, ListBatch):  # learn the best candidate, divided by its tokens
            best = student.signal.values.gather(1, batch.best[:, None])[:, 0]
            return {"ce": Term(torch.where(batch.chosen, -best, 0.0))}
        signal, labels = batch.with_labels(student.signal)
        return {"ce": Term(rowwise(cross_entropy, signal, None, labels))}
