"""The one door: a recipe in, a run folder out. The Python API and the commands both come through it."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from understudy.data import Batch
from understudy.errors import InputError
from understudy.evaluation import CostMeter, evaluate
from understudy.folder import facts, finished, first_rank, open_folder, together, write_json
from understudy.models import RowModel, state_hash
from understudy.preflight import check as preflight
from understudy.progress import RichProgress
from understudy.recipe import ModelSpec, Recipe, load, make
from understudy.reporting import render_run
from understudy.tasks import Prepared, Task
from understudy.tasks import get as get_task
from understudy.tasks.base import MODULE
from understudy.teachers import LocalTeacher
from understudy.training import Apprentice, DistillationTrainer, last_complete
from understudy.training.arguments import StopOnSignal, total_steps, training_arguments
from understudy.training.shapes import probe

log = logging.getLogger(__name__)
transformers_logging.disable_progress_bar()  # bars of files that load in milliseconds hide the one that matters


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves.

    Args:
        student: the trained model itself (`save_pretrained` already called into `folder / "student"`).
        metrics: those of the judged split.
        folder: the run folder.
        interrupted: the run stopped early and resumes when started again.
    """

    student: Any
    metrics: dict[str, Any]
    folder: Path
    interrupted: bool = False


def distill(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None, *, progress: bool = False, **keys: Any
) -> Result:
    """Train a student as a recipe says, and evaluate it.

    Args:
        recipe: a recipe, a mapping, or the path of a YAML file; `keys` go on top (`method="taid"`, ...). `teacher` and
            `student` may also be modules: image classifiers that return logits, or causal LMs (name their tokenizer
            with `data={"tokenizer": ...}`).
        progress: show a progress bar.

    Started again on the same folder it resumes, and a finished run is read rather than repeated.

    Raises:
        InputError: anything the caller can mend, in one line.
    """
    if isinstance(recipe, (str, Path)):
        recipe = load(recipe)
    values = {**(recipe.dump() if isinstance(recipe, Recipe) else dict(recipe or {})), **keys}
    modules = {side: values[side] for side in ("teacher", "student") if isinstance(values.get(side), nn.Module)}
    named = {side: {"model": f"{MODULE}{type(m).__name__}"} for side, m in modules.items()}
    return run(make({**values, **named}), progress=progress, modules=modules)


def run(
    recipe: Recipe,
    *,
    progress: bool = False,
    teacher_folder: Path | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> Result:
    """Carry out a validated recipe.

    Args:
        teacher_folder: where a teacher that is trained first is kept and shared.
        modules: `teacher` or `student` handed over as a module.
    """
    modules = modules or {}
    folder = open_folder(recipe)
    task = get_task(recipe.task)
    done = finished(folder)
    if done is not None:
        prepared = task.prepare(recipe)
        model = task.model(recipe.student, prepared, folder / "student")
        return Result(model.model, done["metrics"], folder)
    started = time.time()
    prepared = task.prepare(recipe)
    teacher = _teacher(recipe, task, prepared, teacher_folder or folder / "teacher", progress, modules.get("teacher"))
    set_seed(recipe.seed)
    assert recipe.student is not None  # every task fills it
    student = task.model(recipe.student, prepared, modules.get("student"))
    if recipe.student.peft is not None:
        student.add_adapters(recipe.student.peft)
    findings = preflight(task, prepared, student, teacher)
    for warning in findings.warnings:
        log.warning(warning)
    hashes = {**prepared.hashes, "student_initial": state_hash(student)}
    if teacher is not None:
        hashes["teacher"] = state_hash(teacher)

    def record(status: str) -> None:
        write_json(folder / "run.json", facts(recipe, hashes, findings, status, started))

    record("running")
    meter = CostMeter(task.unit)
    trainer = _trainer(recipe, task, prepared, student, teacher, folder, meter, progress)
    if _train(trainer, folder):
        record("interrupted")
        return Result(student.model, {}, folder, interrupted=True)
    if first_rank():
        student.save(folder / "student")
        if prepared.tokenizer is not None:
            prepared.tokenizer.save_pretrained(folder / "student")
    evaluation = judge(task, prepared, student, teacher, recipe.judge)
    evaluation |= {"cost": meter.summary(), "notes": findings.notes + findings.warnings}
    write_json(folder / "evaluation.json", evaluation)
    hashes["student"] = state_hash(student)
    record("done")
    if first_rank():
        render_run(folder)
    together()
    return Result(student.model, evaluation["metrics"], folder)


def judge(
    task: Task, prepared: Prepared, student: RowModel, teacher: RowModel | None, split: str, batch: int = 64
) -> dict[str, Any]:
    """The evaluation of a student on a split, beside the teacher where there is one."""
    loader: DataLoader[Any] = DataLoader(prepared.split(split), batch_size=batch, collate_fn=prepared.collate)
    return {"split": split, **evaluate(student, teacher, loader, kind=task.kind)}


def _trainer(
    recipe: Recipe,
    task: Task,
    prepared: Prepared,
    student: RowModel,
    teacher: RowModel | None,
    folder: Path,
    meter: CostMeter,
    progress: bool,
) -> DistillationTrainer:
    args = training_arguments(recipe.trainer, folder / "checkpoints", recipe.seed)
    total = total_steps(args, len(prepared.train))
    method = recipe.build_method()
    example = Batch.from_dict(prepared.collate([prepared.train[i] for i in range(min(2, len(prepared.train)))]))
    sides = {"student": student, "teacher": teacher if "teacher" in method.needs else None}
    taps = {s: method.taps(s, m, example) if m is not None else {} for s, m in sides.items()}  # type: ignore[arg-type]
    shapes = probe(method, prepared.classes, sides, taps, example)
    apprentice = Apprentice(student, method, shapes, total, recipe.reduction, taps["student"])
    callbacks: list[TrainerCallback] = [StopOnSignal()]
    if progress:
        callbacks.append(RichProgress(f"{recipe.method} on {recipe.data['name']}"))
    local = None
    if teacher is not None and "teacher" in method.needs:
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
        augmentation=prepared.augmentation,
        meter=meter,
        metrics_file=folder / "metrics.jsonl",
        callbacks=callbacks,
    )


def _train(trainer: DistillationTrainer, folder: Path) -> bool:
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


def _teacher(
    recipe: Recipe, task: Task, prepared: Prepared, folder: Path, progress: bool, module: nn.Module | None
) -> RowModel | None:
    """Load the teacher, if there is one; one that is to be trained first is trained once and kept in `folder`."""
    spec = recipe.teacher
    if spec is None:
        if "teacher" in recipe.build_method().needs:
            raise InputError(f"Method {recipe.method!r} needs a teacher and the recipe names none: set `teacher`.")
        return None
    if module is not None or spec.train is None:
        return task.model(spec, prepared, module)
    if not (folder / "student" / "config.json").exists() or finished(folder) is None:
        train_teacher(recipe, folder, progress)
    return task.model(spec, prepared, folder / "student")


def train_teacher(recipe: Recipe, folder: Path, progress: bool = False) -> Result:
    """Train the recipe's teacher on the labels, as a run of its own in `folder`."""
    spec = recipe.teacher
    assert spec is not None and spec.train is not None
    student = ModelSpec(**{**spec.model_dump(), "train": None})
    data = {**recipe.data, "for_teacher": True} if recipe.task == "image_classification" else recipe.data
    values = recipe.dump() | {
        "method": "sft",
        "options": {},
        "output": str(folder),
        "student": student.model_dump(exclude_none=True),
        "teacher": None,
        "trainer": spec.train,
        "seed": 0,
        "data": data,
        "judge": "test",
        "arms": {},
    }
    # The defaults of the task would name a teacher again; a teacher's own run has none.
    return run(make(values).model_copy(update={"teacher": None}), progress=progress)
