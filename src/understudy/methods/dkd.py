"""Decoupled Knowledge Distillation (2022): the label against the rest, and the rest among itself, with weights apart.

loss = CE + τ² [ α KL(b_teacher ‖ b_student) + β KL(p̂_teacher ‖ p̂_student) ],   b = (p[label], 1 − p[label])
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from understudy.data import Batch
from understudy.losses import cross_entropy, decoupled_kl
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.training import Method, Requirements, Term, TrainState


class DKD(Method):
    """Decoupled distillation (2022): classes other than the label weigh as much where the teacher is sure."""

    name = "dkd"
    kinds = frozenset({"classification", "text"})
    page: ClassVar[dict[str, str]] = {
        "when": "Labelled classification with a confident teacher, whose other classes plain distillation hardly weighs.",
        "not": "Without labels. With two classes nothing is left of the second part.",
        "deviations": "The released code raises the divergence over the first epochs; here a learning-rate warm-up is left to "
        "the trainer. Best β differs by teacher (the paper: from 2 to 8).",
    }

    alpha: float = Field(1.0, ge=0, description="α, weight of the label against the rest.")
    beta: float = Field(8.0, ge=0, description="β, weight of the other classes among themselves.")
    temperature: float = Field(4.0, gt=0, description="τ of both sides.")
    ce_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the labels.")

    @property
    def requires(self) -> Requirements:
        return Requirements(temperature=self.temperature)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        values = rowwise(
            decoupled_kl,
            student.signal,
            teacher.signal,
            batch.row_labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )
        terms = {"dkd": Term(values)}
        if self.ce_weight:
            terms["ce"] = Term(rowwise(cross_entropy, student.signal, None, batch.row_labels), self.ce_weight)
        return terms
