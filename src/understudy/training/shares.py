"""The share of rows of which something holds, watched over a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)
ENOUGH = 10
"""Updates before a share is judged; of a shorter run all are."""


class WatchedShare:
    """A mean over the updates so far, with one warning if it is above a limit.

    Args:
        name: in logs.
        limit: above which there is a warning.
        says: the warning, with a place `{share:.1%}`.
    """

    def __init__(self, name: str, limit: float, says: str) -> None:
        self.name, self.limit, self.says = name, limit, says
        self.total, self.updates, self.warned = 0.0, 0, False

    @property
    def value(self) -> float:
        """The share so far."""
        return self.total / max(1, self.updates)

    def update(self, share: float, last: bool) -> None:
        """Add the share of an update's rows. last: whether the run ends with it."""
        self.total, self.updates = self.total + share, self.updates + 1
        if not self.warned and self.value > self.limit and (last or self.updates >= ENOUGH):
            self.warned = True
            log.warning(self.says.format(share=self.value))

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"total": self.total, "updates": self.updates, "warned": self.warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.total, self.updates, self.warned = state["total"], state["updates"], state["warned"]

    def logs(self) -> dict[str, float]:
        """Values for the log: the share."""
        return {self.name: self.value}
