"""Validation during training: the task's own metrics on the validation split, the best checkpoint, and patience."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from understudy.models import ModelAdapter
from understudy.models.sharding import agreed, usable
from understudy.training import checkpoint as ck
from understudy.training.saving import ExactCheckpoints

Validate = Callable[[ModelAdapter], Mapping[str, float]]


class Validating(ExactCheckpoints):
    """`Trainer` that evaluates with `validate`, and whose best checkpoint is the best of all evaluations.

    Looking changes nothing: random numbers are put back as they were. Every new best is saved at once, so the weights
    that are loaded in the end are those of the best evaluation, not of the best that happened to be saved.
    """

    validate: Validate | None = None
    patience: int | None = None
    metrics_file: Path | None
    control: Any
    settled = False
    """Whether training ended because `patience` evaluations in a row brought no gain."""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train. From a checkpoint that training had ended in, its state is loaded and no further step is taken."""
        if resume_from_checkpoint is not None:
            self.state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            self.settled = self.patience is not None and self._without_gain() >= self.patience
            # A run that is to be longer than its checkpoint knows of goes on.
            if self.settled or self.state.global_step >= max(self.state.max_steps, self.model.train_state.total):
                self._load_from_checkpoint(resume_from_checkpoint)
                self._load_rng_state(resume_from_checkpoint)
                self.model.train_state.step = self.state.global_step
                if self.args.load_best_model_at_end and self._best_folder().is_dir():
                    self._load_best_model()
                return None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The validation metrics of the student as it is now; logged, and written to `validation.jsonl`."""
        assert self.validate is not None
        before = ck.rng_state()
        with usable(self.model):
            student = self.model.method.eval_model(self.model.student, self.model.train_state)
            found = agreed(dict(self.validate(student)))
        ck.set_rng_state(before)
        if self.rollouts is not None:
            self.rollouts.on_evaluate(found)
        if self.metrics_file is not None and self.args.should_save:
            line = {"step": self.state.global_step, **found}
            with self.metrics_file.with_name("validation.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        named = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best: bool = super()._determine_best_metric(metrics, trial)
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True
        if self.patience is not None and self._without_gain() >= self.patience:
            self.settled = self.control.should_training_stop = True
        return best

    def _without_gain(self) -> int:
        """Evaluations since the best one, read from the log that every checkpoint holds: nothing else to resume."""
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        sign = 1 if self.args.greater_is_better else -1
        values = [sign * entry[name] for entry in self.state.log_history if name in entry]
        values = [-math.inf if math.isnan(v) else v for v in values]
        return len(values) - 1 - values.index(max(values)) if values else 0

    def _best_folder(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"

    def _finalize_training(self, *args: Any) -> Any:
        if self._best_folder().is_dir():  # also where the run folder was moved since
            self.state.best_model_checkpoint = str(self._best_folder())
        keep, self.args.save_total_limit = self.args.save_total_limit, None  # old ones went when the newest was sealed
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = keep

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self._best_folder()))
