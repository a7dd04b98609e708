"""Knowledge Distillation from A Stronger Teacher (DIST, 2022): correlation in place of divergence.

    loss = CE + τ² [ β mean_i (1 − ρ(p_i, q_i)) + γ mean_c (1 − ρ(p_·c, q_·c)) ]

with ρ Pearson's correlation, over the classes of an image and over the images of a class.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from pydantic import Field

from understudy.data import Batch
from understudy.losses import cross_entropy
from understudy.losses.instances import by_group, inter_class_relation, intra_class_relation
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.streaming.plain import logits_of
from understudy.training import Method, Requirements, Term, TrainState


class DIST(Method):
    """DIST (2022): the student's probabilities correlate with the teacher's, over classes and over examples."""

    name = "dist"
    kinds = frozenset({"classification"})
    cost = "as kd"
    page: ClassVar[dict[str, str]] = {
        "when": "A teacher much stronger than the student, whose probabilities it cannot match, only follow.",
        "not": "When probabilities must be matched: correlation leaves their scale free, so calibration is the labels' affair.",
        "deviations": "The examples of a group are coupled in the second term: `group` consecutive ones, so that a batch may be "
        "cut between groups.",
    }

    beta: float = Field(1.0, ge=0, description="β, weight of the correlation over classes.")
    gamma: float = Field(1.0, ge=0, description="γ, weight of the correlation over examples.")
    temperature: float = Field(1.0, gt=0, description="τ of both sides; the paper's 4 on CIFAR-100.")
    ce_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the labels.")
    group: int = Field(64, ge=2, description="Consecutive examples that are correlated with each other.")

    @property
    def requires(self) -> Requirements:
        return Requirements(temperature=self.temperature)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        inter = rowwise(inter_class_relation, student.signal, teacher.signal, temperature=self.temperature)
        relation = partial(intra_class_relation, temperature=self.temperature)
        intra = by_group(relation, student.signal.logits, logits_of(teacher.signal), self.group)
        scale = self.temperature**2
        terms = {"inter": Term(inter, scale * self.beta), "intra": Term(intra, scale * self.gamma)}
        if self.ce_weight:
            terms["ce"] = Term(rowwise(cross_entropy, student.signal, None, batch.row_labels), self.ce_weight)
        return terms
