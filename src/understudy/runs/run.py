"""The entry point of all runs, from the Python API and the command line: from a recipe to a run folder."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from understudy.data import find
from understudy.errors import InputError
from understudy.evaluation import CostMeter
from understudy.evaluation.corpus import funnel_table, spent_table
from understudy.evaluation.harness import check_student, check_tasks
from understudy.files import COMPLETE, check_seal, read_json, seal, write_json, writing
from understudy.models import ModelAdapter, state_hash
from understudy.models.own import check_saves, reload
from understudy.models.sharding import is_sharded, together, usable
from understudy.reporting import render_run, run_panels, write_card
from understudy.runs.evaluating import add_tasks, evaluate_split, gain, text_tables
from understudy.runs.fitting import alarms, assemble_teacher, fit
from understudy.runs.folder import (
    agree,
    clear,
    differences,
    finished,
    first_rank,
    held,
    same_inputs,
    save_pictures,
)
from understudy.runs.hacking import Hacking, oracle_of
from understudy.runs.inputs import named_files
from understudy.runs.journal import Journal
from understudy.runs.objects import checked_callbacks, named
from understudy.runs.preflight import check as preflight
from understudy.runs.recipe import Recipe, load, make, own_training
from understudy.runs.roles import models_of
from understudy.runs.specs import ModelSpec
from understudy.runs.teachers import (
    MEMBERS,
    check_room_first,
    comparable,
    copy_of,
    ensemble,
    for_teacher,
    load_model,
    member_recipes,
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
from understudy.training.arguments import autocast_dtype
from understudy.training.ranks import check_sharding

TRACKED_AS = {"test": "test", "validation": "eval"}
"""Prefixes of a split's metrics in transformers' trackers."""
log = logging.getLogger(__name__)
transformers_logging.disable_progress_bar()  # bars of fast file loads hide the training bar


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run.

    Args:
        student: the trained model itself (`save_pretrained` has been called into `folder / "student"`).
        metrics: those of the evaluation split.
        folder: the run folder.
        interrupted: the run stopped early; started again, it resumes.
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
    overwrite: bool = False,
    **keys: Any,
) -> Result:
    """Train a student by a recipe, and evaluate it.

    Args:
        recipe: a recipe, a mapping, or the path of a YAML file; `keys` override it (`method="taid"`, ...). `method` may
            be a `Method` class or instance. `teacher` and `student` may be modules, or functions without arguments that
            return one (`model_init` is such a function for the student, called after the seed is set): image
            classifiers that return logits, or causal LMs (their tokenizer is `data={"tokenizer": ...}`). `data`, or its
            `name`, may be a `Dataset`, a list of records, a data frame, columns or a data set of torch, or these by split.
        callbacks: of transformers, for the student's training.
        progress: show a progress bar.
        overwrite: replace any run in the output folder.

    Started again on the same folder it resumes; a finished run is read and not repeated. With more steps it continues
    from its last checkpoint.

    Raises:
        InputError: any problem that the caller can fix, in one line.
    """
    if isinstance(recipe, (str, Path)):
        recipe = load(recipe)
    given = recipe.dump() if isinstance(recipe, Recipe) else {} if recipe is None else recipe
    values, modules = named({**given, **keys} if isinstance(given, Mapping) else given)
    return run(
        make(values),
        progress=progress,
        modules=modules,
        callbacks=checked_callbacks(callbacks),
        overwrite=overwrite,
    )


def run(
    recipe: Recipe,
    *,
    progress: bool = False,
    home: Path | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    overwrite: bool = False,
) -> Result:
    """Execute a validated recipe.

    Args:
        home: folder of the models that are trained first and of stored scores, which may be shared; by default the run
            folder.
        modules: `teacher` or `student` given as a module.
        callbacks: of transformers.
        overwrite: replace the run in the folder.
    """
    with held(recipe.output, inputs(recipe)):
        return _run(recipe, progress, home or recipe.output, modules or {}, callbacks, overwrite)


def inputs(recipe: Recipe) -> Iterator[Path]:
    """The files and folders of a recipe's data."""
    names = [v for k, v in recipe.data.items() if isinstance(v, str) and not k.endswith("_column")]
    yield from filter(None, map(find, names))


def _run(
    recipe: Recipe,
    progress: bool,
    home: Path,
    modules: Mapping[str, nn.Module],
    callbacks: Sequence[TrainerCallback],
    overwrite: bool,
) -> Result:
    folder, task = recipe.output, get_task(recipe.task)
    if overwrite and home == folder and first_rank():
        for own in trained_first(recipe, home):
            if differences(own.output, own):
                clear(own.output)
    done = None if overwrite else finished(folder)
    longer = [] if overwrite else agree(recipe)
    if done is not None and not longer:
        if first_rank() and not (folder / "report.html").is_file():  # killed before it was written
            render_run(folder)
        if not (folder / "student").is_dir():
            same_inputs(folder, named_files(recipe))
            return Result(None, done["metrics"], folder)  # a pipeline: its models are in the runs below
        prepared = task.prepare(recipe)
        same_inputs(folder, prepared.hashes)
        check_seal(folder / "student")
        model = task.model(recipe.student, prepared, reload(folder / "student", modules.get("student")))
        return Result(model.model, done["metrics"], folder)
    before = None if overwrite else read_json(folder / "run.json")
    journal = Journal(recipe, overwrite, [*(before or {}).get("lengthened", []), *longer])
    if isinstance(recipe.build_method(), Pipeline):
        return _run_pipeline(recipe, journal, home, progress, callbacks)
    return _fit(recipe, task, journal, home, progress, modules, callbacks)


def _fit(
    recipe: Recipe,
    task: Task,
    journal: Journal,
    home: Path,
    progress: bool,
    modules: Mapping[str, nn.Module],
    callbacks: Sequence[TrainerCallback],
) -> Result:
    """Load student and teacher, check them, call `setup`, train, save, evaluate, report."""
    folder = journal.folder
    _check_recipe(recipe)
    prepared = _prepared(recipe, task, home, modules)
    set_seed(recipe.seed)  # a new teacher or head is the same on resume
    teacher = load_teacher(recipe, task, prepared, home, progress, modules.get("teacher"))
    shown = comparable(teacher, prepared)
    set_seed(recipe.seed)
    assert recipe.student is not None  # filled by every task
    if prepared.stored is not None:
        prepared.stored(home / "store")
    given = modules.get("student")
    copied = recipe.student.model == COPY
    student = copy_of(teacher) if copied else _model(recipe, "student", task, prepared, home, progress, given)
    _check_student(recipe, student, prepared)
    if recipe.student.peft is not None:
        student.add_adapters(recipe.student.peft)
    findings = journal.findings = preflight(task, prepared, student, shown, batch=min(32, recipe.evaluation_batch))
    for warning in findings.warnings:
        log.warning(warning)
    oracle = oracle_of(recipe, task, prepared)
    hashes = _hashes(prepared, student_initial=student, teacher=teacher, oracle=oracle) | named_files(recipe)
    journal.compare(hashes)
    method, meter = recipe.build_method(), CostMeter(task.unit)
    asked = assemble_teacher(recipe, prepared, method, teacher, student, home)
    hacking = Hacking(recipe, prepared, oracle, asked, folder) if oracle is not None else None
    start = copy.deepcopy(student) if prepared.win_rate is not None else None
    context = _setup_context(recipe, prepared, student, shown, asked, home, hashes)
    tables = method.setup(context)
    student = method.student(student, context)
    findings.notes.extend(getattr(asked, "notes", []))
    fitted = fit(
        recipe, prepared, student, asked, tables, context, folder, meter, progress, callbacks, journal.begin, hacking
    )
    module = fitted.module
    if fitted.interrupted:
        journal.record("interrupted")
        return Result(student.model, {}, folder, interrupted=True)
    findings.warnings.extend(alarms(folder))
    student = method.export(module.student, context)
    _save(student, prepared.tokenizer, folder / "student")
    with usable(module):
        evaluation = evaluate_split(task, prepared, student, shown, recipe.eval_split, recipe.evaluation_batch)
        found = method.finish(module.train_state, context)
        evaluation.setdefault("tables", []).extend(found.get("tables", []))
        evaluation["tables"].extend(text_tables(prepared, student, shown, recipe.eval_split, findings))
        evaluation["metrics"] |= found.get("metrics", {})
        if start is not None and prepared.win_rate is not None:
            evaluation["metrics"]["win_rate"] = prepared.win_rate(student, start)
        if hacking is not None:
            evaluation["metrics"] |= hacking.finish(student)
            findings.notes.extend(hacking.notes())
        if recipe.lm_eval is not None:
            add_tasks(evaluation, student, prepared.tokenizer, recipe.lm_eval)
        evaluation["gain"], speed = gain(recipe, task, prepared, student, shown, evaluation["metrics"])
    if fitted.trainer is not None:
        prefix = TRACKED_AS[recipe.eval_split]
        fitted.trainer.log({f"{prefix}_{name}": value for name, value in evaluation["metrics"].items()})
    evaluation["pictures"] = save_pictures(folder, {**evaluation.get("pictures", {}), **found.get("pictures", {})})
    evaluation |= {"cost": {**meter.summary(), **speed}, "notes": findings.notes + findings.warnings}
    hashes["student"] = state_hash(student)
    return _finish(journal, evaluation, student.model)


def _prepared(recipe: Recipe, task: Task, home: Path, modules: Mapping[str, nn.Module]) -> Prepared:
    """The data, checked against the method before a model is loaded or trained."""
    prepared = task.prepare(recipe)
    recipe.build_method().check_data(prepared)
    if trained_first(recipe, home) and "student" not in modules:
        check_room_first(recipe, task, prepared)
    return prepared


def _hashes(prepared: Prepared, **models: ModelAdapter | None) -> dict[str, str]:
    """Those of the data, and of each model that there is."""
    return {**prepared.hashes, **{name: state_hash(model) for name, model in models.items() if model is not None}}


def _check_recipe(recipe: Recipe) -> None:
    """Refuse what can be told before data and models are loaded."""
    check_sharding(recipe.build_method(), recipe.trainer)
    _refuse_text_alone(recipe)
    if recipe.lm_eval is not None:
        check_tasks(recipe.lm_eval)


def _check_student(recipe: Recipe, student: ModelAdapter, prepared: Prepared) -> None:
    """Refuse a student that could not be saved, or not be evaluated as the recipe says."""
    check_saves(student.model)
    if recipe.lm_eval is not None:
        check_student(student, prepared.tokenizer)


def _refuse_text_alone(recipe: Recipe) -> None:
    """Raise an error for a teacher or student that only generates text where its outputs are needed."""
    for side, spec in (("teacher", recipe.teacher), ("student", recipe.student)):
        if spec is not None and spec.endpoint is not None and not (side == "teacher" and spec.score is not None):
            also = "name the scores it provides with teacher.score (top_k:20), " if side == "teacher" else ""
            raise InputError(
                f"{side}.endpoint only gives text, and method {recipe.method!r} needs the {side}'s own outputs: {also}name "
                "a model without endpoint, or a method that learns from text."
            )


def _save(student: ModelAdapter, tokenizer: Any, folder: Path) -> None:
    """Save a student with its tokenizer; `_finish` adds the model card and seals the folder."""
    with writing(folder):
        if first_rank():
            (folder / COMPLETE).unlink(missing_ok=True)
        if first_rank() or is_sharded(student):
            student.save(folder)
        if first_rank() and tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _finish(journal: Journal, evaluation: dict[str, Any], student: Any) -> Result:
    folder = journal.folder
    if first_rank():
        write_json(folder / "evaluation.json", evaluation)
        drawn = run_panels(folder)
        if student is not None:
            write_card(folder, drawn)
            seal(folder / "student")
        journal.record("done")
        render_run(folder, drawn)
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
        autocast=autocast_dtype(recipe.trainer),
    )


def _run_pipeline(
    recipe: Recipe, journal: Journal, home: Path, progress: bool, callbacks: Sequence[TrainerCallback]
) -> Result:
    """Run the stages of a pipeline in order, each with a file or a run of its own in the folder."""
    folder, method = journal.folder, recipe.build_method()
    assert isinstance(method, Pipeline)

    def train_inside(name: str, values: Mapping[str, Any]) -> Result:
        inner = make({**values, "output": str(folder / name)})
        shared = None if method.teacher_writes else home
        result = run(inner, progress=progress, home=shared, callbacks=callbacks, overwrite=journal.overwrite)
        if result.interrupted:
            raise KeyboardInterrupt
        return result

    journal.compare(named_files(recipe))
    journal.begin(keep=True)
    values, task = recipe.dump(), get_task(recipe.task)
    logs = Path(method.log) if method.log is not None else folder / "logs"
    oracle = partial(task.oracle, values)
    context = PipelineContext(values, folder, models_of(recipe), train_inside, oracle, logs, recipe.budget)
    try:
        evaluation = method.run(context)
    except Exception:  # of whatever kind, as of a server that is down
        journal.fail()
        raise
    general = [funnel_table(context.funnel), spent_table(context.spent())]
    evaluation["tables"] = [table for table in general if table["rows"]] + evaluation.get("tables", [])
    evaluation["pictures"] = save_pictures(folder, evaluation.get("pictures", {}))
    return _finish(journal, evaluation, None)


def load_teacher(
    recipe: Recipe, task: Task, prepared: Prepared, home: Path, progress: bool, module: nn.Module | None
) -> ModelAdapter | None:
    """The recipe's teacher, trained first if the recipe says so; `None` if a cache or server is used."""
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
    return _model(recipe, "teacher", task, for_teacher(recipe, prepared), home, progress, module)


def _model(
    recipe: Recipe,
    side: str,
    task: Task,
    prepared: Prepared,
    home: Path,
    progress: bool,
    module: nn.Module | None,
) -> ModelAdapter:
    """Load the teacher or the student; a model that must be trained first is trained once and kept in `home`."""
    spec: ModelSpec = getattr(recipe, side)
    if module is not None or spec.train is None:
        model = load_model(task, spec, prepared, module)
        return trained(recipe, model) if side == "teacher" else model
    folder = home / _FIRST[side]
    if agree(own_training(recipe, side, folder)) or finished(folder) is None:
        train_first(recipe, side, home, progress)
    return load_model(task, spec, prepared, folder / "student")


_FIRST = {"teacher": "teacher", "student": "start"}
"""The side of a recipe that is trained first, and the name of the run's folder."""


def trained_first(recipe: Recipe, home: Path) -> list[Recipe]:
    """The runs in `home` that train the recipe's teachers, or the student's initial weights, on the labels."""
    found = [
        own_training(own, "teacher", home / MEMBERS / name / _FIRST["teacher"])
        for name, own in member_recipes(recipe).items()
        if own.teacher is not None and own.teacher.train is not None
    ]
    sides = [s for s in _FIRST if getattr(recipe, s) is not None and getattr(recipe, s).train is not None]
    return found + [own_training(recipe, side, home / _FIRST[side]) for side in sides]


def train_first(recipe: Recipe, side: str, home: Path, progress: bool = False) -> Result:
    """Train the recipe's teacher, or the student's initial weights, on the labels, as a separate run in `home`.

    Raises:
        KeyboardInterrupt: it was stopped; started again it resumes.
    """
    result = run(own_training(recipe, side, home / _FIRST[side]), progress=progress)
    if result.interrupted:
        raise KeyboardInterrupt
    return result
