"""A monitor of preference training whose loss has no lower bound, where the likelihood of both sides can collapse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal

from pydantic import Field

from understudy.errors import InputError
from understudy.training.alarm import Alarm
from understudy.training.method import Method

WINDOW = 3
"""Logs that each end of a comparison is the mean of: one log is of one update."""
NORM = "grad_norm"


class CollapseMonitored(Method):
    """Base of methods that log the mean log-probability of a token of both sides, as `collapse_terms`."""

    collapse_terms: ClassVar[tuple[str, str]] = ("logps/chosen", "logps/rejected")
    used_with: ClassVar[dict[str, Any]] = {
        name: {"collapse_monitor": ("warn", "stop")} for name in ("collapse_fall", "collapse_rise")
    }

    collapse_monitor: Literal["off", "warn", "stop"] = Field(
        "warn",
        description="Where the log-probabilities of both sides fall while the gradient grows: warn, or stop and keep the "
        "weights of the best evaluation (`trainer.load_best_model_at_end`). Looked at with each log.",
    )
    collapse_fall: float = Field(
        1.0, gt=0, description="By how many nats a token both must have fallen since the phase began."
    )
    collapse_rise: float = Field(
        1.25, ge=1, description="Times its first value that the gradient norm must have reached."
    )

    def check_trainer(self, trainer: Mapping[str, Any]) -> None:
        if self.collapse_monitor == "stop" and not trainer.get("load_best_model_at_end"):
            raise InputError(
                "options.collapse_monitor=stop keeps the weights of the best evaluation, and none are kept: set "
                "trainer.eval_strategy=steps and trainer.load_best_model_at_end=true, or options.collapse_monitor=warn."
            )

    def alarm(self, history: Sequence[Mapping[str, Any]]) -> Alarm | None:
        if self.collapse_monitor == "off":
            return None
        found = collapse(history, self.collapse_terms, self.collapse_fall, self.collapse_rise)
        if found is None:
            return None
        sides = " and ".join(f"{name} from {a:.3g} to {b:.3g}" for name, (a, b) in found.items() if name != NORM)
        before, after = found[NORM]
        judged = any(key.startswith("eval_") for log in history for key in log)
        kept = "the weights of the best evaluation" if judged else "the present weights, as no evaluation came before,"
        ends = self.collapse_monitor == "stop"
        says = (
            f"{self.name}: the likelihood of both sides collapses: the mean log-probability of a token fell of {sides}, while "
            f"the gradient norm rose from {before:.3g} to {after:.3g}. "
            + (f"Training ends here and {kept} are kept. " if ends else "")
            + "Lower the learning rate, or the weight of the worse side."
        )
        return Alarm(says, ends)


def collapse(
    history: Sequence[Mapping[str, Any]], terms: Sequence[str], fall: float, rise: float
) -> dict[str, tuple[float, float]] | None:
    """Whether all `terms` have fallen sharply while the gradient norm rose (REDI, early stop): the means over the first and
    the last three logs of each value, by name, or `None`.

    Args:
        history: logs in order; those without the values are left out, and six are needed.
        terms: names of the log-probabilities. fall: nats that each must have fallen by.
        rise: factor that the gradient norm must have risen by.
    """
    names = [*terms, NORM]

    def ends(places: Iterable[int]) -> list[int]:
        return list(islice((i for i in places if all(name in history[i] for name in names)), WINDOW))

    first, last = ends(range(len(history))), ends(reversed(range(len(history))))
    if len(first) < WINDOW or last[-1] <= first[-1]:
        return None

    def mean(name: str, places: Sequence[int]) -> float:
        return sum(float(history[i][name]) for i in places) / WINDOW

    found = {name: (mean(name, first), mean(name, last)) for name in names}
    fallen = all(found[name][0] - found[name][1] >= fall for name in terms)
    return found if fallen and found[NORM][1] >= rise * found[NORM][0] else None
