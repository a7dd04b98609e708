"""Matching of hidden states, as FitNets has it (Romero et al. 2015, arXiv 1412.6550), beside softened classes and labels.

    loss = CE · ce_weight + kd_weight · τ² · KL(teacher_τ ‖ student_τ) + weight · mean |W h_S − h_T|²

h are the states before the head; W is learnt with the student and stays behind.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from understudy.data import Batch
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.hidden import Distance, hidden_distance
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.training import Method, Requirements, Shapes, Term, TrainState


class HiddenMatch(Method):
    """Match the teacher's last hidden states through a learnt projection."""

    name = "hidden-match"
    cost = "as kd, and one projection of student width × teacher width a row"
    page: ClassVar[dict[str, str]] = {
        "when": "A live teacher of the student's kind, as the baseline of methods that read inside the teacher.",
        "not": "When only the teacher's outputs are known, or its states mean little to a student of another architecture.",
        "deviations": "The states before the head, not a middle layer, and one run, not a stage of hints before a stage of "
        "classes: the stages are two runs. The squared difference is a mean over units.",
    }

    weight: float = Field(1.0, ge=0, description="Of the distance between hidden states.")
    distance: Distance = Field("mse", description="Mean squared difference, 1 − cosine, or a norm of the difference.")
    temperature: float = Field(2.0, gt=0, description="Of the softened classes.")
    ce_weight: float = Field(0.1, ge=0, description="Weight of the cross-entropy with the labels.")
    kd_weight: float = Field(0.9, ge=0, description="Weight of the softened classes, times temperature².")

    @property
    def requires(self) -> Requirements:
        return Requirements(features=True, teacher_features=True, temperature=self.temperature)

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        assert shapes.features is not None and shapes.teacher_features is not None
        return {"projection": nn.Linear(shapes.features, shapes.teacher_features, bias=False)}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None and student.features is not None and teacher.features is not None
        projection = state.modules["projection"]
        projected = projection(student.features.to(next(projection.parameters()).dtype))
        terms = {"hidden": Term(hidden_distance(projected, teacher.features, distance=self.distance), self.weight)}
        if self.kd_weight:
            kd = rowwise(forward_kl, student.signal, teacher.signal, temperature=self.temperature, tau_squared=True)
            terms["kd"] = Term(kd, self.kd_weight)
        if self.ce_weight:
            signal, labels = batch.with_labels(student.signal)
            terms["ce"] = Term(batch.among_rows(rowwise(cross_entropy, signal, None, labels)), self.ce_weight)
        return terms
