"""What a method says against a run by its log, and the line of a log."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from understudy.files import append_line

log = logging.getLogger(__name__)


class Alarm(NamedTuple):
    """What is wrong with a run by its log.

    Args:
        says: one line, with the remedy. ends: whether training ends, as with early stopping.
    """

    says: str
    ends: bool = False


def new_alarm(method: Any, history: Sequence[Mapping[str, Any]]) -> Alarm | None:
    """The method's alarm, with a warning, if the last log of a trainer is the first that has one."""
    found: Alarm | None = method.alarm(history)
    if found is None or method.alarm(history[:-1]) is not None:
        return None
    log.warning(found.says)
    return found


def write_line(
    trainer: Any, logs: Mapping[str, Any], terms: Mapping[str, float], state: Mapping[str, float], alarm: Alarm | None
) -> None:
    """Write one line to the `metrics.jsonl` of a trainer.

    Args:
        logs: of transformers. terms, state: the means of the method's terms, and its state.
        alarm: a new one, whose text the line keeps.
    """
    if trainer.metrics_file is None or not trainer.args.should_save:
        return
    line = {
        "step": trainer.steps_before + trainer.state.global_step,
        "epoch": round(trainer.state.epoch or 0.0, 6),
        "loss": logs["loss"],
        "terms": terms,
        "lr": logs.get("learning_rate"),
        "grad_norm": logs.get("grad_norm"),
        "state": state,
    }
    if trainer.model.train_state.phase:
        line["phase"] = trainer.model.train_state.phase
    if alarm is not None:
        line["alarm"] = alarm.says
    if trainer.rollouts is not None:
        line |= trainer.rollouts.logs()
    append_line(trainer.metrics_file, line)
