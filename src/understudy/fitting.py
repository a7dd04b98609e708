"""Fitting: from a recipe's two sides and data to a trainer, and through it, resuming where a run was left."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import TrainerCallback

from understudy.data import Batch
from understudy.evaluation import CostMeter
from understudy.folder import first_rank
from understudy.models import RowModel
from understudy.progress import RichProgress
from understudy.recipe import Recipe
from understudy.tasks import Prepared
from understudy.teachers import LocalTeacher
from understudy.training import Apprentice, DistillationTrainer, last_complete
from understudy.training.arguments import StopOnSignal, total_steps, training_arguments
from understudy.training.shapes import probe


def trainer_for(
    recipe: Recipe,
    prepared: Prepared,
    student: RowModel,
    teacher: RowModel | None,
    tables: Mapping[str, Tensor],
    folder: Path,
    meter: CostMeter,
    progress: bool,
) -> DistillationTrainer:
    """The trainer of a run: the method's modules and taps in place, the teacher where it should live."""
    args = training_arguments(recipe.trainer, folder / "checkpoints", recipe.seed)
    total = total_steps(args, len(prepared.train))
    method = recipe.build_method()
    example = Batch.from_dict(prepared.collate([prepared.train[i] for i in range(min(2, len(prepared.train)))]))
    sides = {"student": student, "teacher": teacher if method.asks_teacher else None}
    taps = {s: method.taps(s, m, example) if m is not None else {} for s, m in sides.items()}  # type: ignore[arg-type]
    shapes = probe(method, prepared.classes, sides, taps, example)
    apprentice = Apprentice(
        student, method, shapes, total, recipe.reduction, taps["student"], tables=tables, seed=recipe.seed
    )
    callbacks: list[TrainerCallback] = [StopOnSignal()]
    if progress:
        callbacks.append(RichProgress(f"{recipe.method} on {recipe.data['name']}"))
    local = None
    if teacher is not None and method.asks_teacher:
        device = recipe.teacher.device if recipe.teacher and recipe.teacher.device else args.device
        name = recipe.teacher.model if recipe.teacher else "teacher"
        asks = "teacher_features" in method.needs
        local = LocalTeacher(teacher, name, device, features=asks, taps=taps["teacher"])
    return DistillationTrainer(
        apprentice,
        args,
        prepared.train,
        prepared.collate,
        teacher=local,
        validation=prepared.validation,
        augmentation=prepared.augmentation,
        meter=meter,
        metrics_file=folder / "metrics.jsonl",
        callbacks=callbacks,
    )


def train(trainer: DistillationTrainer, folder: Path) -> bool:
    """Train from the last whole checkpoint, if any. True if the run was stopped early."""
    last = last_complete(folder / "checkpoints")
    metrics = folder / "metrics.jsonl"
    step = int(last.name.rsplit("-", 1)[1]) if last is not None else 0
    if metrics.exists() and first_rank():  # lines after the checkpoint will be written again
        lines = [line for line in metrics.read_text().splitlines() if _step_of(line) <= step]
        metrics.write_text("".join(line + "\n" for line in lines))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    if trainer.meter is not None:
        trainer.meter.wall += time.perf_counter() - start
    return trainer.state.global_step < trainer.state.max_steps


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # a line cut short by a kill
        return float("inf")
