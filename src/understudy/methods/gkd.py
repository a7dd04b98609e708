"""Generalised knowledge distillation (Agarwal et al. 2024, arXiv 2306.13649): on-policy texts and the generalised JSD.

loss = jsd(β)(teacher, student), on the student's own texts with probability λ and on the data's otherwise
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from understudy.data import Batch
from understudy.losses import jsd
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.training import Method, Requirements, Term, TrainState


class GKD(Method):
    """The generalised Jensen-Shannon divergence, on texts half of which the student writes."""

    name = "gkd"
    kinds = frozenset({"text"})
    cost = "one teacher forward, one student forward and backward a row, and one pass of the student for each written token"
    defaults: ClassVar[Mapping[str, Any]] = {"on_policy": {"fraction": 0.5}}
    page: ClassVar[dict[str, str]] = {
        "when": "A live teacher of a language model whose student is to be used by sampling: it is corrected where it goes "
        "itself. λ is `on_policy.fraction`. With a column `teacher_prompt` in the data, which the teacher reads in the place of "
        "the prompt, and `student: teacher` it is self-distillation from privileged context.",
        "not": "With stored or served outputs of the teacher: they say nothing about new texts.",
        "deviations": "Whether a text is the student's is drawn for each example, not for each batch.",
    }

    beta: float = Field(0.5, ge=0, le=1, description="Weight of the teacher; 0 is forward KL and 1 reverse KL.")
    temperature: float = Field(1.0, gt=0, description="Divides both sides' logits before the softmax.")

    @property
    def requires(self) -> Requirements:
        return Requirements(temperature=self.temperature)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        values = rowwise(jsd, student.signal, teacher.signal, beta=self.beta, temperature=self.temperature)
        return {"jsd": Term(values)}
