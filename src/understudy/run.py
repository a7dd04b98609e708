"""The one door: a recipe in, a run folder out. The Python API and the commands both come through it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import signal
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from understudy.data import Batch
from understudy.errors import InputError
from understudy.evaluation import CostMeter, evaluate
from understudy.models import RowModel, state_hash
from understudy.preflight import check as preflight
from understudy.progress import RichProgress
from understudy.recipe import ModelSpec, Recipe, load, make
from understudy.reporting import render_run
from understudy.tasks import Prepared, Task
from understudy.tasks import get as get_task
from understudy.tasks.base import MODULE
from understudy.teachers import LocalTeacher
from understudy.training import Apprentice, DistillationTrainer, Shapes, last_complete

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


class Interrupted(Exception):
    """The run was stopped after a checkpoint; the same command resumes it."""


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
    folder = _open_folder(recipe)
    task = get_task(recipe.task)
    done = _finished(folder)
    if done is not None:
        prepared = task.prepare(recipe)
        model = task.model(recipe.student, prepared, folder / "student")
        return Result(model.model, done["metrics"], folder)
    started = time.time()
    prepared = task.prepare(recipe)
    method = recipe.build_method()
    teacher = None
    if "teacher" in method.needs or recipe.teacher is not None:
        if "teacher" in modules:
            teacher = task.model(recipe.teacher, prepared, modules["teacher"])
        else:
            teacher = _teacher(recipe, task, prepared, teacher_folder or folder / "teacher", progress)
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
    _write_json(folder / "run.json", _facts(recipe, hashes, findings, "running", started))
    meter = CostMeter(task.unit)
    trainer = _trainer(recipe, task, prepared, student, teacher, folder, meter, progress)
    interrupted = _train(trainer, folder)
    if interrupted:
        _write_json(folder / "run.json", _facts(recipe, hashes, findings, "interrupted", started))
        return Result(student.model, {}, folder, interrupted=True)
    if first_rank():
        student.save(folder / "student")
        if prepared.tokenizer is not None:
            prepared.tokenizer.save_pretrained(folder / "student")
    evaluation = judge(task, prepared, student, teacher, recipe.judge)
    evaluation["cost"] = meter.summary()
    evaluation["notes"] = findings.notes + findings.warnings
    _write_json(folder / "evaluation.json", evaluation)
    hashes["student"] = state_hash(student)
    _write_json(folder / "run.json", _facts(recipe, hashes, findings, "done", started))
    if first_rank():
        render_run(folder)
    _together()
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
    total = args.max_steps if args.max_steps > 0 else _steps(args, len(prepared.train))
    method = recipe.build_method()
    features = _feature_width(student, prepared) if "features" in method.needs else None
    apprentice = Apprentice(student, method, Shapes(prepared.classes, features), total, recipe.reduction)
    callbacks: list[TrainerCallback] = [StopOnSignal()]
    if progress:
        callbacks.append(RichProgress(f"{recipe.method} on {recipe.data['name']}"))
    local = None
    if teacher is not None and "teacher" in method.needs:
        device = recipe.teacher.device if recipe.teacher and recipe.teacher.device else args.device
        local = LocalTeacher(teacher, recipe.teacher.model if recipe.teacher else "teacher", device)
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


def training_arguments(values: Mapping[str, Any], output: Path, seed: int) -> TrainingArguments:
    """Transformers' arguments with this project's defaults; a bad value is one line."""
    defaults: dict[str, Any] = {
        "save_steps": 200,
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "log_level": "error",
    }
    try:
        return TrainingArguments(output_dir=str(output), seed=seed, **{**defaults, **values})
    except (TypeError, ValueError) as error:
        raise InputError(f"Bad trainer options: {' '.join(str(error).split())}") from error


def _steps(args: TrainingArguments, examples: int) -> int:
    batch = args.train_batch_size * max(1, args.world_size) * args.gradient_accumulation_steps
    return int(-(-examples // batch) * args.num_train_epochs)


def _feature_width(student: RowModel, prepared: Prepared) -> int:
    """The width of the features before the classifier, read off two examples."""
    batch = Batch.from_dict(prepared.collate([prepared.train[i] for i in range(min(2, len(prepared.train)))]))
    training = student.training
    student.eval()
    with torch.no_grad():
        features = student(batch, features=True).features
    student.train(training)
    if features is None:
        raise InputError("This student shows no features before its classifier, which the method needs.")
    return features.shape[-1]


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


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM finish the step, write a checkpoint and stop; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        try:
            self.before = [signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)]
        except ValueError:  # signals belong to the main thread; elsewhere the caller handles them
            self.before = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), self.before, strict=False):
            signal.signal(number, handler)


def _teacher(recipe: Recipe, task: Task, prepared: Prepared, folder: Path, progress: bool) -> RowModel:
    """Load the teacher; one that is to be trained first is trained once and kept in `folder`."""
    spec = recipe.teacher
    if spec is None:
        raise InputError(f"Method {recipe.method!r} needs a teacher and the recipe names none: set `teacher`.")
    if spec.train is None:
        return task.model(spec, prepared)
    if not (folder / "student" / "config.json").exists() or _finished(folder) is None:
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


def _open_folder(recipe: Recipe) -> Path:
    """Make the run folder, or refuse one that holds another run."""
    folder = recipe.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "recipe.yaml"
        text = yaml.safe_dump(recipe.dump(), sort_keys=False)
        if written.exists():
            before = yaml.safe_load(written.read_text()) or {}
            now = yaml.safe_load(text)
            changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k != "output"]
            if changed:
                key = changed[0]
                raise InputError(
                    f"Folder {folder} holds another run: {key} was {before.get(key)!r} and is {now.get(key)!r} now. "
                    "Choose another output, or delete the folder."
                )
        elif first_rank():
            written.write_text(text)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied", str(folder))
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"Output {folder} is a file, not a folder. Choose another output.") from None
    except OSError as error:
        raise InputError(
            f"Output folder {folder} cannot be written: {error.strerror}. Choose another output."
        ) from None
    return folder


def _finished(folder: Path) -> dict[str, Any] | None:
    """The evaluation of a finished run, or None."""
    try:
        if json.loads((folder / "run.json").read_text())["status"] != "done":
            return None
        evaluation: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
        return evaluation
    except (OSError, json.JSONDecodeError, KeyError):
        return None


def _facts(recipe: Recipe, hashes: dict[str, str], findings: Any, status: str, started: float) -> dict[str, Any]:
    packages = ("understudy", "torch", "transformers", "accelerate", "numpy")
    return {
        "format": 1,
        "method": recipe.method,
        "task": recipe.task,
        "teacher": recipe.teacher.model if recipe.teacher else None,
        "student": recipe.student.model if recipe.student else None,
        "seed": recipe.seed,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "hashes": hashes,
        "preflight": dataclasses.asdict(findings),
        "status": status,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 2),
    }


def first_rank() -> bool:
    """Whether this process writes files: the first of those that `torchrun` or `accelerate launch` started."""
    return int(os.environ.get("RANK", "0")) == 0


def _together() -> None:
    """Wait for the other ranks, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _write_json(path: Path, value: Any) -> None:
    if not first_rank():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.rename(path)
