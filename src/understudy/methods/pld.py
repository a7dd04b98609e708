"""9. PLD: A Choice-Theoretic List-Wise Knowledge Distillation (2025).

The teacher's logits rank the classes: the label first, the rest in the teacher's order. The student maximises the
Plackett-Luce likelihood of that ranking, each rank weighted by the teacher's own probability:

    loss = Σ_k softmax(t/τ)[π_k] · ( logsumexp(s[π_k], …, s[π_C]) − s[π_k] )

There is no separate cross-entropy and no mixing weight: the first rank is the label's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from understudy.data import Batch
from understudy.losses import plackett_luce_distillation
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.training import Method, Requirements, Term, TrainState


class PLD(Method):
    """List-wise distillation along the teacher's ranking with the label first."""

    name = "pld"
    paper = 9
    cost = "as kd, and one sort of the classes a row"
    used_with: ClassVar[dict[str, Any]] = {"temperature": {"weights": ("teacher",)}}
    page: ClassVar[dict[str, str]] = {
        "when": "Labelled classification with a live teacher, when no mixing weight should be tuned.",
        "not": "When the student must match the teacher's probabilities: KL to the teacher ends higher than with kd. "
        "With two classes the ranking adds nothing. A nearly uniform teacher adds little.",
        "deviations": "Ties in the teacher go to the lower class index. Ignored labels leave the mean. The position "
        "weights follow the method section (2^(C−k) − 1), not the ablation's expression.",
    }

    temperature: float = Field(1.0, gt=0, description="Teacher temperature, for the weights only.")
    weights: Literal["teacher", "uniform", "position", "first"] = Field(
        "teacher", description="teacher: PLD; uniform: ListMLE / C; position: p-ListMLE; first: cross-entropy."
    )

    @property
    def requires(self) -> Requirements:
        return Requirements(temperature=self.temperature)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        values = rowwise(
            plackett_luce_distillation,
            student.signal,
            teacher.signal,
            batch.row_labels,
            temperature=self.temperature,
            weights=self.weights,
        )
        return {"pld": Term(values)}
