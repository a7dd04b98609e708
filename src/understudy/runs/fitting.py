"""Fitting: building a trainer from the models and data of a recipe, and training with resume."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from understudy.data import Batch
from understudy.errors import InputError, nearest
from understudy.evaluation import CostMeter
from understudy.files import read_log, replacing
from understudy.models import ModelAdapter
from understudy.models.sharding import together
from understudy.runs.folder import first_rank
from understudy.runs.hacking import Hacking, with_distances
from understudy.runs.preflight import sample_loader
from understudy.runs.progress import RichProgress
from understudy.runs.recipe import Recipe
from understudy.runs.specs import SHARDED
from understudy.runs.teachers import teacher_of, writing_teacher
from understudy.tasks import Prepared, Task
from understudy.tasks import get as get_task
from understudy.teachers import CachedTeacher, Ensemble, LocalTeacher, Teacher
from understudy.training import DistillationTrainer, Method, Phase, Rollouts, SetupContext, TrainModule, last_complete
from understudy.training.arguments import StopOnSignal, check_epoch, epoch_length, total_steps, training_arguments
from understudy.training.dry_run import dry_run, dry_run_stored
from understudy.training.phases import load_phase, save_phase, steps_of
from understudy.training.shapes import probe
from understudy.training.validation import Validation


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The result of training.

    Args:
        module: the student with its method.
        trainer: of the last phase; `None` if all phases had been trained before.
        interrupted: whether training stopped early.
    """

    module: TrainModule
    trainer: DistillationTrainer | None
    interrupted: bool = False


def assemble_teacher(
    recipe: Recipe, prepared: Prepared, method: Method, model: ModelAdapter | None, student: ModelAdapter, home: Path
) -> Teacher | None:
    """The recipe's teacher in the form that the method uses, of any kind: a model here, a cache, a server, an ensemble.

    Args:
        model: the loaded teacher, if it is a model.
        home: folder where the scores of a server are kept and shared.
    """
    if method.requires.teacher == "none":
        return None
    found = teacher_of(recipe, prepared, method, model, student, home)
    if found is not None or model is None:
        return found
    args = training_arguments(recipe.trainer, home, recipe.seed)
    spec = recipe.teacher
    place = (spec.device if spec is not None else None) or args.device
    sharded = place == SHARDED
    return LocalTeacher(
        model,
        spec.model if spec is not None else "teacher",
        args.device if sharded else place,
        freeze=method.requires.in_steps,
        features=method.requires.teacher_features,
        taps=method.taps("teacher", model, _example(prepared)) if method.requires.in_steps else {},
        sharded=sharded,
        autocast=method.requires.teacher_autocast,
    )


def _example(prepared: Prepared) -> Batch:
    return Batch.from_dict(prepared.collate([prepared.train[i] for i in range(min(2, len(prepared.train)))]))


def fit(
    recipe: Recipe,
    prepared: Prepared,
    student: ModelAdapter,
    teacher: Teacher | None,
    tables: Mapping[str, Tensor],
    context: SetupContext,
    folder: Path,
    meter: CostMeter,
    progress: bool,
    callbacks: Sequence[TrainerCallback] = (),
    begin: Callable[[], None] = lambda: None,
    hacking: Hacking | None = None,
) -> Fitted:
    """Train the student through all phases, resuming where the run stopped.

    Args:
        teacher: from `assemble_teacher`.
        tables, context: the result and the argument of the method's `setup`.
        callbacks: the caller's own.
        begin: called before the first step, once everything is built.
        hacking: measured at every evaluation, if the recipe has an oracle.
    """
    task, method = get_task(recipe.task), recipe.build_method()
    values = _with_metric(recipe, task)
    args = training_arguments(values, folder / "checkpoints", recipe.seed)
    examples = epoch_length(method, args) or len(prepared.train)
    check_epoch(args, examples)
    total = total_steps(args, examples)
    module, example = module_for(recipe, prepared, student, teacher, total, tables, context)
    if args.metric_for_best_model is not None:
        _check_metric(task, prepared, student, args.metric_for_best_model)
    model = teacher.model if isinstance(teacher, LocalTeacher) else None
    kept = model if isinstance(model, Ensemble) else teacher
    if isinstance(kept, (CachedTeacher, Ensemble)) and method.requires.teacher == "outputs":
        dry_run_stored(module, kept, example)
    return _through_phases(
        recipe, prepared, module, teacher, context, folder, meter, progress, values, total, callbacks, begin, hacking
    )


def module_for(
    recipe: Recipe,
    prepared: Prepared,
    student: ModelAdapter,
    teacher: Teacher | None,
    total: int,
    tables: Mapping[str, Tensor],
    context: SetupContext | None = None,
) -> tuple[TrainModule, Batch]:
    """The student with its method, and two examples.

    Args:
        total: optimizer steps of the run.
    """
    if not any(p.requires_grad for p in student.parameters()):
        raise InputError(
            f"The student, {type(student.model).__name__}, has no weights to train: all are frozen (those of a zero-shot model "
            "always are). Name another model, or unfreeze it."
        )
    method, example = recipe.build_method(), _example(prepared)
    model = teacher.model if isinstance(teacher, LocalTeacher) else None
    sides = {"student": student, "teacher": model if method.requires.in_steps else None}
    taps = {
        "student": method.taps("student", student, example),
        "teacher": teacher.taps if isinstance(teacher, LocalTeacher) and teacher.taps else {},
    }
    shapes = dataclasses.replace(
        probe(method, prepared.classes, sides, taps, example, tables), student=student, teacher=model
    )
    module = TrainModule(
        student,
        method,
        shapes,
        total,
        recipe.reduction,
        taps["student"],
        tables=tables,
        seed=recipe.seed,
        context=context,
    )
    return module, example


def _through_phases(
    recipe: Recipe,
    prepared: Prepared,
    module: TrainModule,
    teacher: Teacher | None,
    context: SetupContext,
    folder: Path,
    meter: CostMeter,
    progress: bool,
    values: Mapping[str, Any],
    total: int,
    callbacks: Sequence[TrainerCallback],
    begin: Callable[[], None],
    hacking: Hacking | None,
) -> Fitted:
    method, trainer = module.method, None
    phases: list[Phase | None] = [*method.phases()] or [None]
    steps = steps_of(method.phases(), total) if method.phases() else [total]
    trainable = {id(p) for p in module.parameters() if p.requires_grad}
    finished, begun = 0, False
    for number, (phase, count) in enumerate(zip(phases, steps, strict=True)):
        inner = values if phase is None else {**values, **phase.trainer, "max_steps": count}
        end = folder / "phases" / f"{number}-{phase.name}.safetensors" if phase is not None else None
        if end is not None and end.is_file():
            load_phase(end, module, meter)
            finished += count
            continue
        if phase is not None:
            module.begin_phase(phase, count, trainable)
        trainer = trainer_for(
            recipe,
            prepared,
            module,
            teacher,
            context,
            folder,
            meter,
            progress,
            inner,
            phase,
            finished,
            callbacks,
            hacking,
        )
        if not begun:
            begin()
        begun = True
        if train(trainer, folder):
            return Fitted(module, trainer, interrupted=True)
        finished += count
        if end is not None and first_rank():
            save_phase(end, module, meter)
        together()
    if not begun:
        begin()
    return Fitted(module, trainer)


logger = logging.getLogger(__name__)


def trainer_for(
    recipe: Recipe,
    prepared: Prepared,
    module: TrainModule,
    teacher: Teacher | None,
    context: SetupContext,
    folder: Path,
    meter: CostMeter,
    progress: bool,
    values: Mapping[str, Any],
    phase: Phase | None = None,
    steps_before: int = 0,
    more_callbacks: Sequence[TrainerCallback] = (),
    hacking: Hacking | None = None,
) -> DistillationTrainer:
    """The trainer of a run, or of one of its phases.

    Args:
        values: training arguments.
        steps_before: optimizer steps of the earlier phases, which logs count too.
        more_callbacks: the caller's own.
        hacking: measured at every evaluation.
    """
    task, method = get_task(recipe.task), module.method
    checkpoints = folder / "checkpoints" / (phase.name if phase is not None else "")
    args = training_arguments(values, checkpoints, recipe.seed)
    asked = teacher if method.requires.in_steps else None
    callbacks: list[TrainerCallback] = [StopOnSignal(), *more_callbacks]
    if progress:
        named = f" ({phase.name})" if phase is not None else ""
        callbacks.append(RichProgress(f"{recipe.method}{named} on {recipe.data['name']}"))
    patience = phase.patience if phase is not None and phase.patience is not None else recipe.patience
    trainer = DistillationTrainer(
        module,
        args,
        context.splits[phase.split if phase is not None else "train"],
        prepared.collate,
        teacher=asked,
        validation_dataset=prepared.validation,
        validation=Validation(partial(_validation, task, prepared, recipe.evaluation_batch, hacking), patience),
        augmentation=prepared.augmentation,
        meter=meter,
        metrics_file=folder / "metrics.jsonl",
        callbacks=callbacks,
        rollouts=_rollouts(recipe, module, asked, prepared, args, folder, meter),
        steps_before=steps_before,
    )
    for tracker in trainer.callback_handler.callbacks:
        if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
            tracker.logging_dir = str(folder / "tensorboard")
    return trainer


def _rollouts(
    recipe: Recipe,
    train_module: TrainModule,
    teacher: Teacher | None,
    prepared: Prepared,
    args: TrainingArguments,
    folder: Path,
    meter: CostMeter,
) -> Rollouts | None:
    """The generator of on-policy samples, if the recipe uses them and student, tokenizer and teacher support them."""
    if recipe.on_policy is None:
        return None
    assert teacher is not None  # the recipe has been checked
    if args.fsdp or args.deepspeed:
        raise InputError("on_policy writes with whole weights, which FSDP and DeepSpeed split: use plain DDP.")
    train_module.train_state.on_policy = recipe.on_policy
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
        teacher=writing_teacher(teacher).model if recipe.on_policy.teacher_share else None,
    )


def _with_metric(recipe: Recipe, task: Task) -> dict[str, Any]:
    """The trainer options; if the best evaluation is to be kept, with the task's metric and direction as defaults."""
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
    """Raise an error for a metric that the task does not have, before the first evaluation."""
    known = task.evaluate(student, None, sample_loader(prepared, "validation", 64, 32))["metrics"]
    if metric.removeprefix("eval_") not in known:
        raise InputError(
            f"trainer.metric_for_best_model is {metric!r}.{nearest(metric, known)} Known: {', '.join(known)}."
        )


def _validation(
    task: Task, prepared: Prepared, batch: int, hacking: Hacking | None, student: ModelAdapter
) -> Mapping[str, float]:
    loader = sample_loader(prepared, "validation", len(prepared.validation), batch)
    return with_distances(task.evaluate(student, None, loader)["metrics"], hacking, student)


def alarms(folder: Path) -> list[str]:
    """What the method said against the run by its log, in order."""
    return [record["alarm"] for record in read_log(folder / "metrics.jsonl")[0] if "alarm" in record]


def train(trainer: DistillationTrainer, folder: Path) -> bool:
    """Train from the last complete checkpoint, if any. True if the run was stopped early."""
    last = last_complete(Path(trainer.args.output_dir))
    step = trainer.steps_before + (int(last.name.rsplit("-", 1)[1]) if last is not None else 0)
    for log in (folder / "metrics.jsonl", folder / "validation.jsonl", *folder.glob("samples*.jsonl")):
        if log.exists() and first_rank():  # drop lines after the checkpoint, which will be written again
            # A sample is logged before the step that it names, all other lines after it.
            most = step - 1 if log.name.startswith("samples") else step
            records, damaged = read_log(log)
            if damaged:
                logger.warning("%s: %d damaged lines are left out.", log, damaged)
            with replacing(log) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in records if record["step"] <= most))
    together()
    if last is not None:
        trainer.args.eval_on_start = False  # the evaluations before the checkpoint are in the log
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, StopOnSignal):
                callback.restore()
    trainer.ranks.make_whole()
    if trainer.meter is not None:
        trainer.meter.wall += time.perf_counter() - start
    return trainer.state.global_step < trainer.state.max_steps and not trainer.settled
