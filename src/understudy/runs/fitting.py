"""Fitting: from a recipe's two sides and data to a trainer, and through it, resuming where a run was left."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from understudy.data import Batch
from understudy.errors import InputError, nearest
from understudy.evaluation import CostMeter
from understudy.files import read_log, writing
from understudy.models import ModelAdapter
from understudy.models.sharding import together
from understudy.runs.folder import first_rank
from understudy.runs.preflight import sample_loader
from understudy.runs.progress import RichProgress
from understudy.runs.recipe import Recipe
from understudy.runs.specs import SHARDED
from understudy.runs.teachers import teacher_of
from understudy.tasks import Prepared, Task
from understudy.tasks import get as get_task
from understudy.teachers import CachedTeacher, Ensemble, LocalTeacher, Teacher
from understudy.training import DistillationTrainer, Rollouts, TrainModule, last_complete
from understudy.training.arguments import StopOnSignal, total_steps, training_arguments
from understudy.training.dry_run import dry_run, dry_run_stored
from understudy.training.shapes import probe

logger = logging.getLogger(__name__)


def trainer_for(
    recipe: Recipe,
    prepared: Prepared,
    student: ModelAdapter,
    teacher: ModelAdapter | None,
    tables: Mapping[str, Tensor],
    folder: Path,
    meter: CostMeter,
    progress: bool,
    home: Path | None = None,
) -> DistillationTrainer:
    """The trainer of a run: the method's modules and taps in place, the teacher where it should live.

    Args:
        home: where the scores of a served teacher are kept and shared; the run's folder if not given.
    """
    task = get_task(recipe.task)
    args = training_arguments(_with_metric(recipe, task), folder / "checkpoints", recipe.seed)
    total = total_steps(args, len(prepared.train))
    method = recipe.build_method()
    asked = teacher_of(recipe, prepared, method, teacher, student, home or folder)
    example = Batch.from_dict(prepared.collate([prepared.train[i] for i in range(min(2, len(prepared.train)))]))
    sides = {"student": student, "teacher": teacher if "teacher" in method.asks else None}
    taps = {s: method.taps(s, m, example) if m is not None else {} for s, m in sides.items()}  # type: ignore[arg-type]
    shapes = probe(method, prepared.classes, sides, taps, example, tables)
    train_module = TrainModule(
        student, method, shapes, total, recipe.reduction, taps["student"], tables=tables, seed=recipe.seed
    )
    callbacks: list[TrainerCallback] = [StopOnSignal()]
    if progress:
        callbacks.append(RichProgress(f"{recipe.method} on {recipe.data['name']}"))
    if asked is None and teacher is not None and "teacher" in method.asks:
        place = (recipe.teacher.device if recipe.teacher else None) or args.device
        name = recipe.teacher.model if recipe.teacher else "teacher"
        features, sharded = "teacher_features" in method.asks, place == SHARDED
        device = args.device if sharded else place
        asked = LocalTeacher(teacher, name, device, features=features, taps=taps["teacher"], sharded=sharded)
    if args.metric_for_best_model is not None:
        _check_metric(task, prepared, student, args.metric_for_best_model)
    kept = teacher if isinstance(teacher, Ensemble) and "teacher" in method.asks else asked
    if isinstance(kept, (CachedTeacher, Ensemble)) and not method.queries:
        dry_run_stored(train_module, kept, example)
    rollouts = _rollouts(recipe, train_module, asked, prepared, args, folder, meter)
    return DistillationTrainer(
        train_module,
        args,
        prepared.train,
        prepared.collate,
        teacher=asked,
        validation=prepared.validation,
        validate=partial(_validation, task, prepared, recipe.evaluation_batch),
        patience=recipe.patience,
        augmentation=prepared.augmentation,
        meter=meter,
        metrics_file=folder / "metrics.jsonl",
        callbacks=callbacks,
        rollouts=rollouts,
    )


def _rollouts(
    recipe: Recipe,
    train_module: TrainModule,
    teacher: Teacher | None,
    prepared: Prepared,
    args: TrainingArguments,
    folder: Path,
    meter: CostMeter,
) -> Rollouts | None:
    """Who writes the student's own samples, if the recipe asks for any and everything is able to."""
    if recipe.on_policy is None:
        return None
    assert teacher is not None  # the recipe was checked
    if args.fsdp or args.deepspeed:
        raise InputError("on_policy writes with whole weights, which FSDP and DeepSpeed split: use plain DDP.")
    dry_run(recipe.on_policy, train_module, teacher, prepared.train, prepared.tokenizer, prepared.collate)
    name = "samples.jsonl" if args.world_size == 1 else f"samples-rank{args.process_index}.jsonl"
    return Rollouts(
        recipe.on_policy,
        train_module.student,
        prepared.tokenizer,
        prepared.collate,
        seed=recipe.seed,
        total=train_module.train_state.total,
        file=folder / name,
        meter=meter,
    )


def _with_metric(recipe: Recipe, task: Task) -> dict[str, Any]:
    """The trainer options; where a best evaluation is asked for, with the task's metric and direction if none is named."""
    values = dict(recipe.trainer)
    if values.get("eval_strategy", "no") == "no" or not (values.get("load_best_model_at_end") or recipe.patience):
        return values
    metric = values.setdefault("metric_for_best_model", task.metric)
    if metric.removeprefix("eval_") == task.metric:
        values.setdefault("greater_is_better", task.higher_is_better)
    if "greater_is_better" not in values:
        raise InputError(f"Is a higher {metric} better? Say so with trainer.greater_is_better=true or false.")
    return values


def _check_metric(task: Task, prepared: Prepared, student: ModelAdapter, metric: str) -> None:
    """Refuse a metric the task does not have, before it is missed at the first evaluation."""
    known = task.evaluate(student, None, sample_loader(prepared, "validation", 64, 32))["metrics"]
    if metric.removeprefix("eval_") not in known:
        raise InputError(
            f"trainer.metric_for_best_model is {metric!r}.{nearest(metric, known)} Known: {', '.join(known)}."
        )


def _validation(task: Task, prepared: Prepared, batch: int, student: ModelAdapter) -> Mapping[str, float]:
    return task.evaluate(student, None, sample_loader(prepared, "validation", len(prepared.validation), batch))[
        "metrics"
    ]


def train(trainer: DistillationTrainer, folder: Path) -> bool:
    """Train from the last whole checkpoint, if any. True if the run was stopped early."""
    last = last_complete(folder / "checkpoints")
    step = int(last.name.rsplit("-", 1)[1]) if last is not None else 0
    for log in (folder / "metrics.jsonl", folder / "validation.jsonl", *folder.glob("samples*.jsonl")):
        if log.exists() and first_rank():  # lines after the checkpoint will be written again
            # A sample is written before the step that it names, everything else after it.
            most = step - 1 if log.name.startswith("samples") else step
            records, damaged = read_log(log)
            if damaged:
                logger.warning("%s: %d damaged lines are left out.", log, damaged)
            with writing(log):
                log.write_text("".join(json.dumps(record) + "\n" for record in records if record["step"] <= most))
    together()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    trainer.make_whole()
    if trainer.meter is not None:
        trainer.meter.wall += time.perf_counter() - start
    return trainer.state.global_step < trainer.state.max_steps and not trainer.settled
