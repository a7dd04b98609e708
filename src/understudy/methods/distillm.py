"""DistiLLM (Ko et al. 2024, arXiv 2402.03898): skew divergences, and samples of the student as the validation loss asks.

    loss = KL(p ‖ α p + (1 − α) q), or KL(q ‖ α q + (1 − α) p)

Texts begin as the data's. When the validation loss rises, a larger share is the student's, more and more of it from a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from understudy import losses
from understudy.data import Batch
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.training import Method, Term, TrainState


class DistiLLM(Method):
    """Skew divergence to the teacher, with an adaptive share of replayed texts of the student."""

    name = "distillm"
    kinds = frozenset({"text"})
    cost = "as kd, and one pass of the student for each token that it writes; replays cost none"
    defaults: ClassVar[Mapping[str, Any]] = {
        "on_policy": {"fraction": 0.0, "replay": {"size": 1000, "probability": "linear"}, "adaptive": {}},
        "trainer": {"eval_strategy": "epoch"},
    }
    page: ClassVar[dict[str, str]] = {
        "when": "As gkd, where writing is the larger part of the time: most texts are used again.",
        "not": "Without a validation split that is like the training data: its loss decides.",
        "deviations": "The share rises when the loss exceeds that of the evaluation before, as in the paper's Algorithm 1. The "
        "cross-entropy with a corpus for pre-training, which the released code adds, is left out.",
    }

    divergence: Literal["skew_kl", "skew_reverse_kl"] = Field("skew_reverse_kl", description="SKL or SRKL.")
    alpha: float = Field(0.1, ge=0, lt=1, description="Share of the other side in the mixture.")

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        values = rowwise(getattr(losses, self.divergence), student.signal, teacher.signal, alpha=self.alpha)
        return {self.divergence: Term(values)}
