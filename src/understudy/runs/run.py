"""The one door: a recipe in, a run folder out. The Python API and the commands both come through it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from understudy.errors import InputError
from understudy.evaluation import CostMeter
from understudy.evaluation.texts import sample_texts
from understudy.models import ModelAdapter, state_hash
from understudy.models.own import check_saves, reload
from understudy.models.sharding import is_sharded, together, usable
from understudy.models.weights import weight_hashes
from understudy.reporting import render_run
from understudy.runs.fitting import assemble_teacher, fit
from understudy.runs.folder import facts, finished, first_rank, open_folder, save_pictures, write_json
from understudy.runs.objects import checked_callbacks, named
from understudy.runs.preflight import Findings
from understudy.runs.preflight import check as preflight
from understudy.runs.recipe import Recipe, load, make, own_training
from understudy.runs.specs import ModelSpec
from understudy.runs.teachers import (
    MEMBERS,
    comparable,
    copy_of,
    ensemble,
    other_side,
    other_tokenizer,
    served,
    trained,
)
from understudy.tasks import Prepared, Task
from understudy.tasks import get as get_task
from understudy.tasks.base import COPY
from understudy.teachers import Teacher
from understudy.training import Pipeline, PipelineContext, SetupContext
from understudy.training.ranks import check_sharding

TRACKED_AS = {"test": "test", "validation": "eval"}
"""How transformers' trackers begin the names of a split's metrics."""
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
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    progress: bool = False,
    **keys: Any,
) -> Result:
    """Train a student as a recipe says, and evaluate it.

    Args:
        recipe: a recipe, a mapping, or the path of a YAML file; `keys` go on top (`method="taid"`, ...). `method` may be a
            `Method` class or instance of your own. `teacher` and `student` may be modules, or functions without arguments
            that make one (`model_init` is such a function for the student, called when the seed is set): image classifiers
            that return logits, or causal LMs (name their tokenizer with `data={"tokenizer": ...}`). `data`, or its `name`,
            may be a `datasets.Dataset`, a list of records, or either of these by split; they are known by their content.
        callbacks: of transformers, told of the student's training.
        progress: show a progress bar.

    Started again on the same folder it resumes, and a finished run is read rather than repeated.

    Raises:
        InputError: anything the caller can mend, in one line.
    """
    if isinstance(recipe, (str, Path)):
        recipe = load(recipe)
    values = {**(recipe.dump() if isinstance(recipe, Recipe) else dict(recipe or {})), **keys}
    values, modules = named(values)
    return run(make(values), progress=progress, modules=modules, callbacks=checked_callbacks(callbacks))


def run(
    recipe: Recipe,
    *,
    progress: bool = False,
    home: Path | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Result:
    """Carry out a validated recipe.

    Args:
        home: where models that are trained first and stored scores are kept and shared; the run folder if not given.
        modules: `teacher` or `student` handed over as a module. callbacks: of transformers.
    """
    modules = modules or {}
    folder = open_folder(recipe)
    task = get_task(recipe.task)
    done = finished(folder)
    if done is not None and not (folder / "student").is_dir():
        return Result(None, done["metrics"], folder)  # a procedure: its models are in the runs below
    if done is not None:
        prepared = task.prepare(recipe)
        model = task.model(recipe.student, prepared, reload(folder / "student", modules.get("student")))
        return Result(model.model, done["metrics"], folder)
    if isinstance(recipe.build_method(), Pipeline):
        return _run_pipeline(recipe, folder, progress, callbacks)
    return _fit(recipe, task, folder, home or folder, progress, modules, callbacks)


def _fit(
    recipe: Recipe,
    task: Task,
    folder: Path,
    home: Path,
    progress: bool,
    modules: Mapping[str, nn.Module],
    callbacks: Sequence[TrainerCallback],
) -> Result:
    """Load both sides, check them, work on the data, train, save, evaluate, report."""
    started = time.time()
    check_sharding(recipe.build_method(), recipe.trainer)
    _refuse_text_alone(recipe)
    prepared = task.prepare(recipe)
    teacher = load_teacher(recipe, task, prepared, home, progress, modules.get("teacher"))
    shown = comparable(teacher)
    set_seed(recipe.seed)
    assert recipe.student is not None  # every task fills it
    if prepared.stored is not None:
        prepared.stored(home / "store")
    given = modules.get("student")
    copied = recipe.student.model == COPY
    student = copy_of(teacher) if copied else _model(recipe, "student", task, prepared, home, progress, given)
    check_saves(student.model)
    if recipe.student.peft is not None:
        student.add_adapters(recipe.student.peft)
    findings = preflight(task, prepared, student, shown, batch=min(32, recipe.evaluation_batch))
    for warning in findings.warnings:
        log.warning(warning)
    hashes = {**prepared.hashes, "student_initial": state_hash(student)}
    if teacher is not None:
        hashes["teacher"] = state_hash(teacher)

    def record(status: str) -> None:
        write_json(folder / "run.json", facts(recipe, hashes, findings, status, started))

    record("running")
    method, meter = recipe.build_method(), CostMeter(task.unit)
    asked = assemble_teacher(recipe, prepared, method, teacher, student, home)
    context = _setup_context(recipe, prepared, student, shown, asked, home, hashes)
    tables = method.setup(context)
    student = method.student(student, context)
    findings.notes.extend(getattr(asked, "notes", []))
    fitted = fit(recipe, prepared, student, asked, tables, context, folder, meter, progress, callbacks)
    module = fitted.module
    if fitted.interrupted:
        record("interrupted")
        return Result(student.model, {}, folder, interrupted=True)
    student = method.export(module.student, context)
    if first_rank() or is_sharded(student):
        student.save(folder / "student")
    if first_rank() and prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(folder / "student")
    with usable(module):
        evaluation = evaluate_split(task, prepared, student, shown, recipe.eval_split, recipe.evaluation_batch)
        found = method.finish(module.train_state, context)
        evaluation.setdefault("tables", []).extend(found.get("tables", []))
        evaluation["tables"].extend(_sample_texts(prepared, student, shown, recipe.eval_split, findings))
    evaluation["metrics"] |= found.get("metrics", {})
    if fitted.trainer is not None:
        prefix = TRACKED_AS[recipe.eval_split]
        fitted.trainer.log({f"{prefix}_{name}": value for name, value in evaluation["metrics"].items()})
    evaluation["pictures"] = save_pictures(folder, {**evaluation.get("pictures", {}), **found.get("pictures", {})})
    evaluation |= {"cost": meter.summary(), "notes": findings.notes + findings.warnings}
    hashes |= {"student": state_hash(student), **(weight_hashes(folder / "student") if first_rank() else {})}
    return _finish(folder, evaluation, record, student.model)


def _refuse_text_alone(recipe: Recipe) -> None:
    """Refuse a side that gives text alone where its outputs are needed."""
    for side, spec in (("teacher", recipe.teacher), ("student", recipe.student)):
        if spec is not None and spec.endpoint is not None and not (side == "teacher" and spec.score is not None):
            also = "say what it is asked for with teacher.score (top_k:20), " if side == "teacher" else ""
            raise InputError(
                f"{side}.endpoint gives text alone, and method {recipe.method!r} needs the {side}'s own outputs: {also}name "
                "a model without endpoint, or a method that learns from text."
            )


def _finish(folder: Path, evaluation: dict[str, Any], record: Callable[[str], None], student: Any) -> Result:
    write_json(folder / "evaluation.json", evaluation)
    record("done")
    if first_rank():
        render_run(folder)
    together()
    return Result(student, evaluation["metrics"], folder)


def _setup_context(
    recipe: Recipe,
    prepared: Prepared,
    student: ModelAdapter,
    model: ModelAdapter | None,
    teacher: Teacher | None,
    home: Path,
    hashes: Mapping[str, str],
) -> SetupContext:
    splits = {name: prepared.split(name) for name in ("train", "validation", "test")}
    key = f"{hashes.get('teacher')} {hashes.get('data')}"
    shared = home / "store"
    return SetupContext(
        student,
        model,
        splits,
        prepared.collate,
        prepared.classes,
        shared,
        key,
        seed=recipe.seed,
        teacher_train=prepared.teacher_train,
        eval_split=recipe.eval_split,
        teacher=teacher,
        domains=prepared.domains,
        tokenizer=prepared.tokenizer,
    )


def _run_pipeline(recipe: Recipe, folder: Path, progress: bool, callbacks: Sequence[TrainerCallback]) -> Result:
    """A procedure: its stages in order, each a file or a run of its own below the folder."""
    started, method = time.time(), recipe.build_method()
    assert isinstance(method, Pipeline)

    def record(status: str) -> None:
        write_json(folder / "run.json", facts(recipe, {}, Findings(), status, started))

    def train_inside(name: str, values: Mapping[str, Any]) -> Result:
        inner = make({**values, "output": str(folder / name)})
        result = run(inner, progress=progress, callbacks=callbacks)
        if result.interrupted:
            raise KeyboardInterrupt
        return result

    record("running")
    evaluation = method.run(PipelineContext(recipe.dump(), folder, train_inside, recipe.teacher))
    evaluation["pictures"] = save_pictures(folder, evaluation.get("pictures", {}))
    return _finish(folder, evaluation, record, None)


def evaluate_split(
    task: Task, prepared: Prepared, student: ModelAdapter, teacher: ModelAdapter | None, split: str, batch: int = 64
) -> dict[str, Any]:
    """The evaluation of a student on a split, beside the teacher where there is one.

    Metrics of further test sets stand beside those of `test`, with the set's name at the end (`accuracy_clean`).
    """

    def on(data: Any) -> dict[str, Any]:
        loader: DataLoader[Any] = DataLoader(data, batch_size=batch, collate_fn=prepared.collate)
        return task.evaluate(student, teacher, loader)

    found = on(prepared.split(split))
    for name, data in prepared.more_tests.items() if split == "test" else ():
        found["metrics"] |= {f"{k}_{name.removeprefix('test_')}": v for k, v in on(data)["metrics"].items()}
    return {"split": split, **found}


def _sample_texts(
    prepared: Prepared, student: ModelAdapter, teacher: ModelAdapter | None, split: str, findings: Findings
) -> list[dict[str, Any]]:
    """What the student writes, for the report; nothing for a model that writes no text."""
    if prepared.tokenizer is None:
        return []
    try:
        table = sample_texts(student, teacher, prepared.split(split), prepared.tokenizer)
    except Exception as error:  # of a model's own code; the training is paid for and its evaluation stands without
        findings.notes.append(f"No sample texts: {type(student.model).__name__} cannot write ({type(error).__name__}).")
        return []
    return [table] if table is not None else []


def load_teacher(
    recipe: Recipe, task: Task, prepared: Prepared, home: Path, progress: bool, module: nn.Module | None
) -> ModelAdapter | None:
    """The recipe's teacher, trained first if the recipe says so; `None` where a cache or server answers in its place."""
    spec, method = recipe.teacher, recipe.build_method()
    if spec is None:
        if method.requires.needs_teacher:
            raise InputError(f"Method {recipe.method!r} needs a teacher and the recipe names none: set `teacher`.")
        return None
    if spec.members:

        def load(name: str, own: Recipe) -> ModelAdapter | Teacher:
            if own.teacher is not None and own.teacher.served:
                return served(own, prepared, home / MEMBERS / name / "store")
            return _model(own, "teacher", task, prepared, home / MEMBERS / name, progress, None)

        return ensemble(recipe, prepared, load)
    if spec.cache is not None or spec.served:
        return None
    if prepared.aligner is not None:
        return other_tokenizer(_model(recipe, "teacher", task, other_side(prepared), home, progress, module), prepared)
    return _model(recipe, "teacher", task, prepared, home, progress, module)


def _model(
    recipe: Recipe,
    side: str,
    task: Task,
    prepared: Prepared,
    home: Path,
    progress: bool,
    module: nn.Module | None,
) -> ModelAdapter:
    """Load one side; a model that is to be trained first is trained once and kept in `home`."""
    spec: ModelSpec = getattr(recipe, side)
    if module is not None or spec.train is None:
        model = task.model(spec, prepared, module)
        return trained(spec, model) if side == "teacher" else model
    folder = home / _FIRST[side]
    if not (folder / "student").is_dir() or finished(folder) is None:
        train_first(recipe, side, home, progress)
    return task.model(spec, prepared, folder / "student")


_FIRST = {"teacher": "teacher", "student": "start"}


def train_first(recipe: Recipe, side: str, home: Path, progress: bool = False) -> Result:
    """Train the recipe's teacher, or the student's start, on the labels, as a run of its own below `home`."""
    return run(own_training(recipe, side, home / _FIRST[side]), progress=progress)
