"""Checks without training: of a recipe before its run, and of a run folder after it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from understudy.data import Batch
from understudy.errors import InputError
from understudy.evaluation.harness import HarnessSpec, check_student, check_tasks, evaluate_tasks
from understudy.files import read_json
from understudy.models import ModelAdapter
from understudy.runs.comparison import home_of
from understudy.runs.evaluating import evaluate_split
from understudy.runs.fitting import module_for
from understudy.runs.folder import finished, same_inputs, written
from understudy.runs.overview import overview
from understudy.runs.preflight import Findings
from understudy.runs.preflight import check as preflight
from understudy.runs.recipe import Recipe, make
from understudy.runs.roles import models_of
from understudy.runs.teachers import load_model, served, standing, teacher_of
from understudy.tasks import Prepared
from understudy.tasks import get as get_task
from understudy.tasks.base import COPY
from understudy.teachers import CachedTeacher
from understudy.training import Method, Pipeline, PipelineContext
from understudy.training.dry_run import check_room, dry_run_stored
from understudy.training.ranks import check_sharding


def check_recipe(recipe: Recipe) -> tuple[Findings, Any]:
    """Run only the pre-flight check. Returns its findings, and one batch as text with its mask (text tasks).

    A teacher that is to be trained first does not exist yet and is left out.
    """
    task = get_task(recipe.task)
    prepared = task.prepare(recipe)
    method = recipe.build_method()
    if isinstance(method, Pipeline):  # its stages create models and data
        values = recipe.dump()
        with tempfile.TemporaryDirectory() as scratch:
            folder, oracle = Path(scratch), partial(task.oracle, values)
            method.check(
                PipelineContext(values, folder, models_of(recipe), _no_run, oracle, folder / "logs", recipe.budget)
            )
        seen = overview(recipe, prepared, method, None, None)
        return Findings(notes=prepared.notes, warnings=prepared.warnings, overview=seen), None
    check_sharding(method, recipe.trainer)
    if recipe.lm_eval is not None:
        check_tasks(recipe.lm_eval)
    set_seed(recipe.seed)
    assert recipe.student is not None
    copied = recipe.teacher is not None and recipe.student.model == COPY
    method.check_data(prepared)
    student = load_model(task, recipe.teacher if copied else recipe.student, prepared)
    if recipe.student.peft is not None:
        student.add_adapters(recipe.student.peft)
    if recipe.lm_eval is not None:
        check_student(student, prepared.tokenizer)
    teacher = standing(recipe, prepared)
    if recipe.on_policy is not None:
        check_room(recipe.on_policy, {"student": student, "teacher": teacher}, prepared.train)
    findings = preflight(task, prepared, student, teacher)
    findings.overview = overview(recipe, prepared, method, student, teacher)
    if recipe.teacher is not None and recipe.teacher.served:
        with tempfile.TemporaryDirectory() as scratch:
            findings.notes.extend(served(recipe, prepared, Path(scratch), student).notes)
    if recipe.teacher is not None and recipe.teacher.cache is not None and method.requires.in_steps:
        _compare_cache(recipe, prepared, student, teacher)
    for part in recipe.teacher.parts("teacher").values() if recipe.teacher is not None else ():
        if part.train is not None:
            findings.notes.append(f"The teacher {part.model} will be trained first; it is not checked here.")
    batch = Batch.from_dict(prepared.collate([prepared.train[i] for i in range(min(2, len(prepared.train)))]))
    return findings, prepared.show(batch) if prepared.show is not None else None


def _no_run(name: str, values: Mapping[str, Any]) -> Any:
    """In the place of runs inside a procedure, which its `check` does not begin."""
    raise RuntimeError(f"The check of a procedure began the run {name}.")


def _compare_cache(recipe: Recipe, prepared: Prepared, student: ModelAdapter, teacher: ModelAdapter | None) -> None:
    """Raise an error for a cache that the run would refuse: other tokens, missing examples, or a support or temperature
    that the method cannot learn from."""
    method = recipe.build_method()
    cached = teacher_of(recipe, prepared, method, None, student, recipe.output)
    assert isinstance(cached, CachedTeacher)
    if method.requires.teacher == "calls" or method.requires.teacher_model:
        raise InputError(f"Method {recipe.method!r} runs the teacher's own model: leave teacher.cache out.")
    if type(method).setup is Method.setup:
        module, example = module_for(recipe, prepared, student, cached, 1, {})
        cached(example)
        dry_run_stored(module, cached, example)


def evaluate_run(folder: Path, split: str = "test") -> dict[str, Any]:
    """The metrics of a finished run's saved student, computed again; of a run in a comparison beside the teacher they share."""
    if split not in ("test", "validation"):
        raise InputError(f"Split {split!r} is not test or validation.")
    recipe, prepared, student = saved_student(folder)
    shared = home_of(recipe, folder.parent.parent / "teacher")
    teacher = standing(recipe, prepared, shared if shared.is_dir() else folder)
    return evaluate_split(get_task(recipe.task), prepared, student, teacher, split)


def evaluate_on_tasks(folder: Path, spec: HarnessSpec) -> dict[str, Any]:
    """What the saved student of a finished run reaches on tasks of lm-evaluation-harness, as `evaluate_tasks` returns it."""
    check_tasks(spec)
    _, prepared, student = saved_student(folder)
    check_student(student, prepared.tokenizer)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return evaluate_tasks(student.to(device) if device is not None else student, prepared.tokenizer, spec)


def saved_student(folder: Path) -> tuple[Recipe, Prepared, ModelAdapter]:
    """The recipe of a finished run, its data, and the student that it saved.

    Raises:
        InputError: it is no finished run of one student, or its files or inputs have changed.
    """
    values, facts = written(folder), read_json(folder / "run.json")
    for name, found in (("recipe.yaml", values), ("run.json", facts)):
        if found is None:
            raise InputError(f"{folder} is not a run folder: {name} is missing.")
    finished(folder)  # compares the recipe with its hash
    recipe, status = make(values or {}), (facts or {}).get("status")
    if status == "done" and isinstance(recipe.build_method(), Pipeline):
        raise InputError(f"{folder} is a procedure's; its evaluation.json is final, its models are in the runs below.")
    if status != "done" or not (folder / "student").is_dir():
        raise InputError(
            f"{folder} is not finished ({status}): wait if it is being trained, else run `understudy train` on it again."
        )
    task = get_task(recipe.task)
    prepared = task.prepare(recipe)
    same_inputs(folder, prepared.hashes)
    return recipe, prepared, load_model(task, recipe.student, prepared, folder / "student")
