"""Scalar schedules that are updated once per optimizer step, with the state that a checkpoint must hold."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

log = logging.getLogger(__name__)


class ProgressSchedule:
    """A value that rises from `start` to `end`, at least linearly, and faster the more the loss falls (TAID, Alg. 1).

    With δ = (ℓ_prev − ℓ) / (ℓ_prev + 1e-15), 0 after a loss of 0, and m ← β·m + (1 − β)·δ, the value becomes
    `min(end, max(linear, value + α · sigmoid(m) · (1 − value)))`. The first call only stores the loss.

    Args:
        start, end: `0 <= start <= end <= 1`.
        alpha: size of the adaptive step.
        beta: momentum of the relative progress.
        adaptive: `False` keeps only the linear part.
    """

    def __init__(self, start: float, end: float, alpha: float, beta: float, adaptive: bool = True) -> None:
        self.start, self.end, self.alpha, self.beta, self.adaptive = start, end, alpha, beta, adaptive
        self.value, self.momentum = start, 0.0
        self.previous: float | None = None

    def linear(self, step: int, total: int) -> float:
        """The linear value at `step` of `total`."""
        if total <= 0 or step > total:
            raise ValueError(f"Step {step} is not within a run of {total} steps.")
        return self.start + (self.end - self.start) * step / total

    def update(self, loss: float, step: int, total: int) -> None:
        """Update the value. A loss that is not finite is skipped, since it would stay in the momentum for ever."""
        linear = self.linear(step, total)
        if not self.adaptive:
            self.value = linear
            return
        if not math.isfinite(loss):
            log.warning("The loss at step %d is %s: the schedule stays at %.4f.", step, loss, self.value)
            return
        if self.previous is None:
            self.previous = loss
            return
        # A loss of 0 (a target that is the student itself) has no relative change, and 1e-15 in its place would bring the
        # momentum to −1e10 for the rest of the run.
        delta = (self.previous - loss) / (self.previous + 1e-15) if self.previous > 0 else 0.0
        self.momentum = self.beta * self.momentum + (1 - self.beta) * delta
        step_up = self.alpha * _sigmoid(self.momentum) * (1 - self.value)
        self.value = min(self.end, max(linear, self.value + step_up))
        self.previous = loss

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "momentum": self.momentum, "previous": self.previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.momentum, self.previous = state["value"], state["momentum"], state["previous"]

    def logs(self) -> dict[str, float]:
        return {"t": self.value}


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def anneal(start: float, end: float, progress: float, pace: Literal["cosine", "linear", "constant"]) -> float:
    """From `start` to `end` as `progress` goes from 0 to 1; `constant` stays at `start`."""
    if pace == "constant":
        return start
    share = (1 + math.cos(math.pi * min(progress, 1.0))) / 2 if pace == "cosine" else 1 - min(progress, 1.0)
    return end + (start - end) * share
