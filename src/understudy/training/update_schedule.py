"""A schedule that alternates updates of the student and of an auxiliary optimiser, depending on the student's loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

log = logging.getLogger(__name__)


class AlternatingSchedule:
    """Alternates between the student and an auxiliary optimiser by two thresholds, and keeps copies of the auxiliary
    modules.

    The student is updated until its loss falls below `low`, then the auxiliary modules until the loss exceeds `high`,
    and so on. Both tests are strict and use the loss of the last update. An auxiliary period that does not reach `high`
    in `longest` updates ends anyway and is counted in `saturated`. A loss that is not finite is ignored.

    Args:
        low, high: thresholds of the loss.
        longest: most updates of an auxiliary period.
        decay: of an exponential moving average of the loss, which is then compared instead of it; 0 for none.
        memory: number of earlier states of the auxiliary modules that are kept beside the present one, each from the
            end of a period.
    """

    def __init__(self, low: float, high: float, longest: int, decay: float = 0.0, memory: int = 0) -> None:
        self.low, self.high, self.longest, self.decay, self.memory = low, high, longest, decay, memory
        self.auxiliary = False
        self.mean: float | None = None
        self.steps = {"student": 0, "auxiliary": 0}
        self.period = self.saturated = 0
        self.copies: list[dict[str, Tensor]] = []

    def update(self, loss: float) -> bool:
        """Record the loss of the last update. True if it ended an auxiliary period."""
        self.steps["auxiliary" if self.auxiliary else "student"] += 1
        self.period += 1
        if math.isfinite(loss):
            self.mean = loss if self.mean is None else self.decay * self.mean + (1 - self.decay) * loss
        decides = self.mean if math.isfinite(loss) else None
        if not self.auxiliary:
            if decides is not None and decides < self.low:
                self.auxiliary, self.period = True, 0
            return False
        reached = decides is not None and decides > self.high
        if not reached and self.period < self.longest:
            return False
        if not reached:
            self.saturated += 1
            if self.saturated == 1:
                log.warning("The auxiliary loss did not raise the loss above %g in %d steps.", self.high, self.longest)
        self.auxiliary, self.period = False, 0
        return True

    def remember(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep a copy of the auxiliary modules at the end of a period. In `copies` the newest, which is the present
        state, is last."""
        if self.memory:
            self.copies.append({name: value.detach().clone() for name, value in parameters.items()})
            self.copies = self.copies[-self.memory - 1 :]

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        kept = ("auxiliary", "mean", "steps", "period", "saturated", "copies")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def logs(self) -> dict[str, float]:
        """Values for the log: 1 during an auxiliary period, and the number of periods that ended without reaching
        `high`."""
        return {"auxiliary period": float(self.auxiliary), "saturated": float(self.saturated)}
