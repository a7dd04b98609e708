"""Knowledge distillation as Hinton, Vinyals and Dean wrote it (2015, arXiv 1503.02531), with any divergence.

loss = ce_weight · CE(labels, student) + kd_weight · τ² · D(teacher_τ, student_τ)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from understudy import losses
from understudy.data import Batch, GraphBatch
from understudy.data.noise import normal
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.targets import Target
from understudy.training import Method, Requirements, Term, TrainState

_ROWS = 1 << 24
"""More than the rows of an example, so that those of different steps have different noise."""


class KD(Method):
    """Match the teacher's softened distribution, beside the labels."""

    name = "kd"
    kinds = frozenset({"classification", "text", "graph"})
    variants = "divergence"
    used_with: ClassVar[dict[str, Any]] = {
        "beta": {"divergence": ("jsd",)},
        "alpha": {"divergence": ("skew_kl", "skew_reverse_kl")},
        "ab": {"divergence": ("alpha_beta",)},
        "mu": {"divergence": ("adaptive_kl",)},
    }
    page: ClassVar[dict[str, str]] = {
        "when": "The first thing to try with any teacher; the yardstick of all other methods. With the recipe key "
        "`on_policy` the student learns from texts of its own: with `jsd` or `reverse_kl` that is GKD. `alpha_beta` is "
        "ABKD (with ce_weight 0), `adaptive_kl` AKL: forward KL weighted by the error in the head of the teacher's "
        "distribution, reverse KL by that in its tail. `teacher_noise` is the ablation of paper 14: it asks whether a good "
        "teacher's precise probabilities matter.",
        "not": "When only the teacher's text is known.",
        "deviations": "The default weights (0.1 and 0.9 at temperature 2) are those of the baseline in paper 9. On "
        "graphs every node is a row, with or without a label: temperature 1 and weights λ and 1 − λ make it GLNN. "
        "A student's own samples have no labels: their cross-entropy is 0.",
    }

    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "alpha_beta", "adaptive_kl"
    ] = Field("forward_kl", description="Between the softened distributions, teacher first.")
    temperature: float = Field(2.0, gt=0, description="Divides both sides' logits before the softmax.")
    tau_squared: bool = Field(True, description="Multiply the divergence by temperature².")
    ce_weight: float = Field(0.1, ge=0, description="Weight of the cross-entropy with the labels.")
    kd_weight: float = Field(0.9, ge=0, description="Weight of the divergence.")
    beta: float = Field(0.5, gt=0, lt=1, description="Weight of the teacher in the mixture of `jsd`.")
    alpha: float = Field(0.1, ge=0, lt=1, description="Share of the other side in the mixture of the skew divergences.")
    teacher_noise: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="σ of normal noise on the teacher's logits, anew in every step."
    )
    ab: tuple[float, float] = Field(
        (0.2, 0.7), description="α and β of `alpha_beta`: (1, 0) is forward_kl, (0, 1) reverse_kl."
    )

    mu: float = Field(0.5, gt=0, le=1, description="Teacher's probability in the head of `adaptive_kl`.")

    @property
    def requires(self) -> Requirements:
        return Requirements(temperature=self.temperature)

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"ce": float(batch.labelled)} if isinstance(batch, GraphBatch) else {}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        divergence = getattr(losses, self.divergence)
        options: dict[str, Any] = {"temperature": self.temperature, "tau_squared": self.tau_squared}
        if self.divergence == "jsd":
            options["beta"] = self.beta
        elif self.divergence.startswith("skew"):
            options["alpha"] = self.alpha
        elif self.divergence == "alpha_beta":
            options["alpha"], options["beta"] = self.ab
        elif self.divergence == "adaptive_kl":
            options["mu"] = self.mu
        if self.teacher_noise:
            drawn = batch.ids[batch.sequence], state.step * _ROWS + batch.places
            options |= {"divergence": divergence, "sigma": self.teacher_noise, "seed": state.seed}
            values = rowwise(_noisy, student.signal, teacher.signal, *drawn, **options)
        else:
            values = rowwise(divergence, student.signal, teacher.signal, **options)
        terms = {"kd": Term(values, self.kd_weight)}
        if self.ce_weight:
            signal, labels = batch.with_labels(student.signal)
            ce = batch.among_rows(rowwise(losses.cross_entropy, signal, None, labels))
            terms["ce"] = Term(ce, self.ce_weight)
        return terms


def _noisy(
    student: Tensor,
    target: Target | Tensor,
    ids: Tensor,
    places: Tensor,
    *,
    divergence: Callable[..., Tensor],
    sigma: float,
    seed: int,
    **options: Any,
) -> Tensor:
    """A divergence from teacher logits U + σ ξ, with ξ ~ N(0, 1) drawn by example and place (paper 14)."""
    noise = sigma * normal(ids, (student.shape[-1],), seed=seed, step=places)
    return losses.with_noise(divergence, student, target, noise, **options)
