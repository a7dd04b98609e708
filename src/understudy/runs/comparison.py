"""Comparisons of methods: the same student, data and budget, over seeds, in parallel processes if there are enough
cores."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from torch import nn

from understudy.data.memory import MEMORY
from understudy.errors import InputError
from understudy.masking import masked
from understudy.methods import get as get_method
from understudy.reporting import render_comparison, summarise
from understudy.runs.objects import Modules, method_name, named
from understudy.runs.recipe import Recipe, load, make
from understudy.runs.run import run, train_first
from understudy.runs.teachers import MEMBERS, member_recipes
from understudy.tasks import get as get_task
from understudy.training import Method


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison: `table` has one row per method, `folder` holds `comparison.json` and `report.html`."""

    table: list[dict[str, Any]]
    data: dict[str, Any]
    folder: Path


def compare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    methods: Sequence[str | Method | type[Method]],
    seeds: int | Sequence[int] = 3,
    *,
    baseline: str | None = None,
    progress: bool = False,
) -> Comparison:
    """Train every method with every seed as in the recipe, and compare on the evaluation split.

    All arms have the same optimizer steps, batches and student initialisation per seed. The teacher is trained once.

    Args:
        recipe: as for `distill`, also with data in memory, a teacher that is a module, and factories (a student must be
            a factory, since every run starts from a new one). Forked workers get such objects; on a system that cannot
            fork, or with a GPU, the runs are sequential in this process.
        methods: names, or classes and instances of `Method`; options of those given by name come from the recipe's
            `arms`.
        seeds: their number, or a list.
        baseline: the method that differences are computed against; by default the first.
    """
    given = Modules({})
    if isinstance(recipe, Mapping):
        values, given = named(recipe)
        if isinstance(given.given.get("student"), nn.Module):
            raise InputError(
                "compare trains a student of its own in every run: give a function that makes one (lambda: ...)."
            )
        recipe = make(values)
    elif not isinstance(recipe, Recipe):
        recipe = load(recipe)
    own = bool(given) or str(recipe.data["name"]).startswith(MEMORY) or any(not isinstance(m, str) for m in methods)
    arms = dict(map(method_name, methods))
    if len(arms) < len(methods):
        raise InputError(
            f"Of the methods {', '.join(name for name, _ in map(method_name, methods))} two have one name."
        )
    recipe = recipe.model_copy(update={"arms": {**recipe.arms, **{n: o for n, o in arms.items() if o}}})
    chosen = list(arms)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or not chosen:
        raise InputError("A comparison needs at least one method and one seed: --methods a,b --seeds 3.")
    baseline = baseline or chosen[0]
    if baseline not in chosen:
        raise InputError(f"Baseline {baseline!r} is not among the methods {', '.join(chosen)}.")
    folder = recipe.output
    plans = [_arm(recipe, m, s, folder / "runs" / f"{m}-s{s}") for m in chosen for s in numbers]
    results = run_all(plans, folder / "teacher", progress=progress, modules=given if own else None)
    done = [
        {"method": p.method, "seed": p.seed, "folder": os.path.relpath(p.output, folder), **r}
        for p, r in zip(plans, results, strict=True)
    ]
    data = _collect(recipe, done, baseline, numbers)
    (folder / "comparison.json").write_text(json.dumps(masked(data), indent=1))
    render_comparison(folder)
    return Comparison(data["table"], data, folder)


def _arm(recipe: Recipe, method: str, seed: int, output: Path) -> Recipe:
    get_method(method)
    own = recipe.arms.get(method, recipe.options if method == recipe.method else {})
    return make(recipe.dump() | {"method": method, "options": own, "seed": seed, "output": str(output), "arms": {}})


def run_all(
    plans: Sequence[Recipe], shared: Path, *, progress: bool = False, modules: Modules | None = None
) -> list[dict[str, Any]]:
    """Run recipes in parallel, one thread each; results are in the order of the plans.

    Models that have to be trained first are trained once, in this process, and kept in `shared`.

    Args:
        modules: the caller's models; must be given, possibly empty, if the plans name objects of this process.
    """
    homes = [_home(p, shared) for p in plans]
    context = _processes() if modules is None else _forked()
    for plan, home in {h: (p, h) for p, h in zip(plans, homes, strict=True)}.values():
        _train_ahead(plan, home, progress)
    if context is None:
        jobs = zip(plans, homes, strict=True)
        return [_work(p.dump(), str(home), modules) for p, home in _tracked(list(jobs), progress)]
    global _modules
    _modules = modules  # forked workers inherit it
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(plans))
    results: dict[int, dict[str, Any]] = {}
    with _single_threaded(), ProcessPoolExecutor(workers, context) as pool:
        waiting = {pool.submit(_work, p.dump(), str(t)): i for i, (p, t) in enumerate(zip(plans, homes, strict=True))}
        for future in _tracked(waiting, progress):
            results[waiting[future]] = future.result()
    return [results[i] for i in range(len(plans))]


def _train_ahead(recipe: Recipe, home: Path, progress: bool = False) -> None:
    """Train all models of a recipe that must be trained first."""
    for name, own in member_recipes(recipe).items():
        if own.teacher is not None and own.teacher.train is not None:
            train_first(own, "teacher", home / MEMBERS / name, progress)
    for side in ("teacher", "student"):
        spec = getattr(recipe, side)
        if spec is not None and spec.train is not None:
            train_first(recipe, side, home, progress)


def _home(plan: Recipe, folder: Path) -> Path:
    """The folder of a plan's shared models; plans with other models or data have separate ones."""
    import hashlib

    models = [spec.model_dump() if spec else None for spec in (plan.teacher, plan.student)]
    spec = json.dumps([*models, plan.data, plan.task], sort_keys=True)
    return folder / hashlib.sha256(spec.encode()).hexdigest()[:8]


_modules: Modules | None = None


def _forked() -> BaseContext | None:
    """A context of forked processes, which have the caller's objects; `None` without a fork or with a GPU, which forks
    cannot use."""
    import torch

    if "fork" not in multiprocessing.get_all_start_methods() or torch.cuda.is_available():
        return None
    return multiprocessing.get_context("fork")


def _tracked(waiting: Mapping[Any, int] | Sequence[Any], progress: bool) -> Iterator[Any]:
    coming = as_completed(waiting) if isinstance(waiting, Mapping) else iter(waiting)
    if not progress:
        yield from coming
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(coming, "runs", total=len(waiting), console=console, disable=not console.is_terminal)


def _processes() -> BaseContext:
    """The context of worker processes: forked from a server that imports the library while teachers are trained.

    A forked process cannot use a GPU that its parent has used, so with a GPU each worker is spawned.
    """
    import torch

    if "forkserver" not in multiprocessing.get_all_start_methods() or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    from multiprocessing.forkserver import ensure_running

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["understudy.runs.run"])
    with _single_threaded():
        ensure_running()
    return context


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Set one thread for each child process: for small models, several such processes use the cores better than one."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {n: os.environ.get(n) for n in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _work(recipe: dict[str, Any], home: str, modules: Modules | None = None) -> dict[str, Any]:
    import torch

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    plan = make(recipe)
    result = run(plan, home=Path(home), modules=modules or _modules)
    if result.interrupted:
        raise KeyboardInterrupt
    evaluation = json.loads((plan.output / "evaluation.json").read_text())
    return {"metrics": evaluation["metrics"], "cost": evaluation["cost"]}


def _collect(recipe: Recipe, done: list[dict[str, Any]], baseline: str, seeds: list[int]) -> dict[str, Any]:
    task = get_task(recipe.task)
    first = done[0]
    taught = {k.removeprefix("teacher_"): v for d in done for k, v in d["metrics"].items() if k.startswith("teacher_")}
    facts = json.loads((recipe.output / first["folder"] / "run.json").read_text())
    steps = {d["cost"]["steps"] for d in done}
    return {
        "title": f"{recipe.task} on {recipe.data['name']}",
        "task": recipe.task,
        "baseline": baseline,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "seeds": seeds,
        "split": recipe.eval_split,
        "runs": done,
        "table": summarise(done, baseline, task.metric),
        "teacher": {"name": recipe.teacher.model, **taught} if recipe.teacher is not None else None,
        "budget": {
            "micro_batches": sorted(steps),
            "forwards": {d["method"]: d["cost"]["forwards"] for d in done},
        },
        "versions": facts["versions"],
        "recipe": recipe.shown(),
    }
