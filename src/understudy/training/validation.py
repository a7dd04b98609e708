"""Validation during training: the task's own metrics on the validation split, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from understudy.models import ModelAdapter


@dataclass(frozen=True)
class Validation:
    """How a student is evaluated during training.

    Args:
        metrics: computes the validation metrics of a student.
        patience: stop after this many evaluations without improvement; `None` for no early stopping.
    """

    metrics: Callable[[ModelAdapter], Mapping[str, float]]
    patience: int | None = None

    def settled(self, history: Sequence[Mapping[str, Any]], args: TrainingArguments) -> bool:
        """Whether the last `patience` evaluations brought no improvement.

        Args:
            history: the trainer's log. Every checkpoint holds it, so there is no other state to resume.
        """
        if self.patience is None:
            return False
        name = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        sign = 1 if args.greater_is_better else -1
        values = [sign * entry[name] for entry in history if name in entry]
        values = [-math.inf if math.isnan(v) else v for v in values]
        return bool(values) and len(values) - 1 - values.index(max(values)) >= self.patience
