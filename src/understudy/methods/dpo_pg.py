"""32. Differential Information: An Information-Theoretic Perspective on Preference Optimization (2025, arXiv 2505.23761).

Pairs teach the information that turns the reference policy into the target, with the distribution q ∝ π / π_ref. DPO lets the
likelihood of the better answer fall with that of the worse one (smoothing, high entropy of q). With projected gradients it does not
(reinforcement, low entropy). With g_w, g_l the gradients of log π of both sides and c = β σ(−h) of DPO:

    step = c (g_w − g_l′),    g_l′ = g_l − max(0, ⟨g_l, g_w⟩) / ‖g_w‖² · g_w
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from understudy.data import Batch, ListBatch
from understudy.errors import InputError
from understudy.losses import preference
from understudy.losses.gradients import align
from understudy.models import ModelOutput
from understudy.training import Method, Requirements, SetupContext, Term, TrainState
from understudy.training.reference import (
    Reward,
    attach,
    check_starts_at_zero,
    finite,
    need_order,
    recorded,
    rewarded,
)


class DPOPG(Method):
    """DPO whose step does not lower the likelihood of the better answers, on the best and the worst candidate of each list."""

    name = "dpo-pg"
    paper = 32
    kinds = frozenset({"preference"})
    cost = "as dpo, with a second backward pass and the gradients of both sides in memory"
    page: ClassVar[dict[str, str]] = {
        "when": "Pairs whose better answers must stay likely, as in questions of knowledge: where `dpo` reports that both sides "
        "fall (`displacement/both_fall`).",
        "not": "Open-ended instructions, where the paper finds DPO's smoothing better.",
        "deviations": "The gradients of an update are projected once, summed over its pairs: the sum of the better sides does not fall to "
        "first order, a single pair may. An optimiser with momentum or scales of its own, and a clipped norm, change the step after that. The "
        "paper's distributions are `losses.differential_information`. Rewards are reported after training and not in its steps.",
    }

    beta: float = Field(0.1, gt=0, description="Scale of the log-ratios.")
    reference: Literal["start", "teacher", "recorded"] = Field(
        "start", description="The student at its start, the recipe's teacher, or the data's `log_probs`."
    )

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="setup" if self.reference == "teacher" else "none")

    def check_data(self, data: Any) -> None:
        need_order(self.name, data)

    def setup(self, context: SetupContext) -> dict[str, Tensor]:
        rewarded(context, Reward(self.beta))
        if self.reference == "recorded":
            recorded(context)
            return {}
        scorer = context.teacher_model if self.reference == "teacher" else context.student
        if scorer is None:
            raise InputError("dpo-pg with reference='teacher' needs a teacher as its reference: set `teacher`.")
        attach(context, {"reference": scorer})
        return {}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, ListBatch) and batch.reference is not None
        values = finite(student.signal.values, batch)
        check_starts_at_zero(self.reference == "start", values, batch, state)
        both = torch.stack([batch.best, batch.worst], 1)
        chosen, rejected = values.gather(1, both).unbind(1)
        anchors = batch.reference.to(values.dtype).gather(1, both).unbind(1)
        of_chosen = preference.dpo(chosen, rejected.detach(), *anchors, beta=self.beta)
        of_rejected = preference.dpo(chosen.detach(), rejected, *anchors, beta=self.beta)
        # Together they have DPO's value and gradient; each has the gradient through one side.
        return {"dpo": Term(of_chosen), "rejected": Term(of_rejected - of_rejected.detach())}

    @property
    def merges_gradients(self) -> bool:
        return True

    def merge(self, gradients: Mapping[str, list[Tensor | None]], owners: Sequence[str]) -> list[Tensor | None]:
        chosen = gradients["dpo"]
        rejected = align(chosen, gradients["rejected"])
        return [b if a is None else (a if b is None else a + b) for a, b in zip(chosen, rejected, strict=True)]
