"""Curriculum Temperature for Knowledge Distillation (CTKD, AAAI 2023, arXiv 2211.16231): the temperature is an adversary.

    loss = ce_weight · CE + kd_weight · τ² KL(teacher_τ ‖ student_τ),    τ = τ_low + (τ_high − τ_low) σ(θ)

The student goes down this loss and θ goes up: its gradient is reversed, with a weight λ that grows from 0,

    θ ← θ + μ λ ∂loss/∂θ,    λ = λ_max ½ (1 − cos(π min(1, n / (ramp · N))))     at step n of N
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from understudy.data import Batch
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.temperature import temperature_slope
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.training import Method, Requirements, Term, TrainState
from understudy.training.schedules import anneal

log = logging.getLogger(__name__)


@dataclass
class LearnedTemperature:
    """A temperature that gradient ascent with momentum moves within its bounds.

    Args:
        low, high: the bounds. theta: where it is between them, before the sigmoid. velocity: of the momentum. weight: λ of the
            last update.
    """

    low: float
    high: float
    theta: float
    velocity: float = 0.0
    weight: float = 0.0

    @classmethod
    def at(cls, value: float, low: float, high: float) -> Self:
        """The temperature `value`."""
        return cls(low, high, math.log((value - low) / (high - value)))

    @property
    def share(self) -> float:
        """σ(θ)."""
        return 0.5 + 0.5 * math.tanh(self.theta / 2)

    @property
    def value(self) -> float:
        """τ."""
        return self.low + (self.high - self.low) * self.share

    def gradient(self, slope: float) -> float:
        """∂loss/∂θ, of ∂loss/∂τ."""
        return slope * (self.high - self.low) * self.share * (1 - self.share)

    def ascend(self, slope: float, weight: float, rate: float, momentum: float) -> None:
        """A step up, of size `rate`, along the gradient times `weight`."""
        self.weight = weight
        self.velocity = momentum * self.velocity + weight * self.gradient(slope)
        self.theta += rate * self.velocity

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("theta", "velocity", "weight")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def logs(self) -> dict[str, float]:
        return {"temperature": self.value, "lambda": self.weight}


class CTKD(Method):
    """CTKD (2023): the temperature is learned against the student, with a weight that grows over training."""

    name = "ctkd"
    cost = "as kd; of language models one product more with both heads, without gradient"
    page: ClassVar[dict[str, str]] = {
        "when": "In place of `kd` where no temperature has been searched for: the loss grows harder as the student follows.",
        "not": "With stored top-k or sampled probabilities, which hold one temperature, or with a server: the teacher is live, "
        "or its cache dense. A temperature that runs to a bound learns nothing more: watch it in the log, and lower "
        "`temperature_rate`.",
        "deviations": "The temperature is one for all examples, as in the released code; the paper also has a network that "
        "gives each example its own. It has SGD with momentum of its own and not the student's optimiser, for AdamW divides a "
        "gradient by its size and λ would have no effect. Its rate does not decay with the student's, and no weight decay "
        "draws it to the middle. λ grows in every step, in the paper with every epoch (10 of 240: `ramp`). The start is that of "
        "the released code, θ = 1.",
    }

    temperature: float = Field(15.62, gt=0, description="τ at the start, within its bounds.")
    bounds: tuple[float, float] = Field((1.0, 21.0), description="τ_low and τ_high.")
    temperature_rate: float = Field(0.05, ge=0, description="μ, learning rate of θ.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Of the steps of θ.")
    lambda_max: float = Field(1.0, ge=0, description="λ_max, weight of the reversed gradient; 0 is kd.")
    ramp: float = Field(0.04, gt=0, le=1, description="Share of the run over which λ grows to it.")
    ce_weight: float = Field(0.1, ge=0, description="Weight of the cross-entropy with the labels.")
    kd_weight: float = Field(0.9, gt=0, description="Weight of the divergence.")

    @model_validator(mode="after")
    def _between(self) -> Self:
        low, high = self.bounds
        if not 0 < low < self.temperature < high < math.inf:
            raise ValueError(
                f"temperature ({self.temperature:g}) must lie between the bounds ({low:g}, {high:g}), and these above 0"
            )
        return self

    @property
    def requires(self) -> Requirements:
        return Requirements(temperature=self.temperature, support="dense")

    def init_state(self, total: int) -> LearnedTemperature:
        return LearnedTemperature.at(self.temperature, *self.bounds)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        sides, tau = (student.signal, teacher.signal), state.method_state.value
        kd = rowwise(forward_kl, *sides, temperature=tau, tau_squared=True)
        terms = {"kd": Term(kd, self.kd_weight)}
        if self.lambda_max and self.temperature_rate:
            # ∂kd/∂τ, for the state: the student does not learn from it.
            slope = rowwise(temperature_slope, student.signal.detach(), teacher.signal, temperature=tau)
            terms["slope"] = Term(slope, 0.0)
        if self.ce_weight:
            signal, labels = batch.with_labels(student.signal)
            terms["ce"] = Term(batch.among_rows(rowwise(cross_entropy, signal, None, labels)), self.ce_weight)
        return terms

    def on_pre_optimizer_step(self, state: TrainState, means: Mapping[str, float]) -> None:
        if "slope" not in means:
            return
        if not math.isfinite(means["slope"]):
            log.warning("The slope at step %d is %s: the temperature stays where it is.", state.step, means["slope"])
            return
        weight = anneal(0.0, self.lambda_max, state.step / (self.ramp * state.total), "cosine")
        state.method_state.ascend(self.kd_weight * means["slope"], weight, self.temperature_rate, self.momentum)
