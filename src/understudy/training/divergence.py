"""A guard against runs whose samples get worse without bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from understudy.errors import InputError


class DivergenceGuard:
    """Ends a run when the moving average of a cost exceeds a multiple of its lowest value.

    Args:
        factor: that multiple; of a negative lowest value, the average may rise by (factor − 1) times its size.
        remedy: what to do about it, as the end of the message.
        decay: of the exponential moving average over updates.
    """

    def __init__(self, factor: float, remedy: str, decay: float = 0.9) -> None:
        self.factor, self.remedy, self.decay = factor, remedy, decay
        self.mean: float | None = None
        self.lowest: float | None = None

    def update(self, cost: float) -> None:
        """Record the cost of an update.

        Raises:
            InputError: the average has risen too far.
        """
        self.mean = cost if self.mean is None else self.decay * self.mean + (1 - self.decay) * cost
        self.lowest = self.mean if self.lowest is None else min(self.lowest, self.mean)
        if self.mean - self.lowest > (self.factor - 1) * abs(self.lowest):
            raise InputError(
                f"The run diverges: the mean cost of its better samples rose from {self.lowest:.4g} to {self.mean:.4g}. "
                f"{self.remedy}"
            )

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"mean": self.mean, "lowest": self.lowest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.mean, self.lowest = state["mean"], state["lowest"]

    def logs(self) -> dict[str, float]:
        """Values for the log: the average, and its lowest so far."""
        if self.mean is None or self.lowest is None:
            return {}
        return {"mean cost": self.mean, "lowest cost": self.lowest}
