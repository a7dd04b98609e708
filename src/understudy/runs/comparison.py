"""Methods side by side: the same student, data and budget, over seeds, in parallel processes where cores allow."""

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

from understudy.errors import InputError
from understudy.masking import masked
from understudy.methods import get as get_method
from understudy.reporting import render_comparison, summarise
from understudy.runs.recipe import Recipe, load, make
from understudy.runs.run import run, train_first
from understudy.runs.teachers import MEMBERS, member_recipes
from understudy.tasks import get as get_task


@dataclass(frozen=True)
class Comparison:
    """What a comparison found: `table` has one row a method, `folder` holds `comparison.json` and `report.html`."""

    table: list[dict[str, Any]]
    data: dict[str, Any]
    folder: Path


def compare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    methods: Sequence[str],
    seeds: int | Sequence[int] = 3,
    *,
    baseline: str | None = None,
    progress: bool = False,
) -> Comparison:
    """Train every method over every seed as the recipe says, and compare on the judged split.

    All arms have the same optimizer steps, batches and student initialisation per seed. The teacher is trained once.

    Args:
        methods: names; options of each come from the recipe's `arms`.
        seeds: how many, or which.
        baseline: what differences are against; the first method unless given.
    """
    if not isinstance(recipe, Recipe):
        recipe = make(recipe) if isinstance(recipe, Mapping) else load(recipe)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or not methods:
        raise InputError("A comparison needs at least one method and one seed: --methods a,b --seeds 3.")
    baseline = baseline or methods[0]
    if baseline not in methods:
        raise InputError(f"Baseline {baseline!r} is not among the methods {', '.join(methods)}.")
    folder = recipe.output
    plans = [_arm(recipe, m, s, folder / "runs" / f"{m}-s{s}") for m in methods for s in numbers]
    results = run_all(plans, folder / "teacher", progress=progress)
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


def run_all(plans: Sequence[Recipe], shared: Path, *, progress: bool = False) -> list[dict[str, Any]]:
    """Carry out runs in parallel, one thread each; results in the order of the plans.

    Models that have to be trained first are trained once, in this process, and kept in `shared`.
    """
    homes = [_home(p, shared) for p in plans]
    context = _processes()
    for plan, home in {h: (p, h) for p, h in zip(plans, homes, strict=True)}.values():
        _train_ahead(plan, home, progress)
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(plans))
    results: dict[int, dict[str, Any]] = {}
    with _single_threaded(), ProcessPoolExecutor(workers, context) as pool:
        waiting = {pool.submit(_work, p.dump(), str(t)): i for i, (p, t) in enumerate(zip(plans, homes, strict=True))}
        for future in _tracked(waiting, progress):
            results[waiting[future]] = future.result()
    return [results[i] for i in range(len(plans))]


def _train_ahead(recipe: Recipe, home: Path, progress: bool = False) -> None:
    """Train all models of a recipe that are to be trained first."""
    for name, own in member_recipes(recipe).items():
        if own.teacher is not None and own.teacher.train is not None:
            train_first(own, "teacher", home / MEMBERS / name, progress)
    for side in ("teacher", "student"):
        spec = getattr(recipe, side)
        if spec is not None and spec.train is not None:
            train_first(recipe, side, home, progress)


def _home(plan: Recipe, folder: Path) -> Path:
    """Plans with other models or data get a folder of their own."""
    import hashlib

    models = [spec.model_dump() if spec else None for spec in (plan.teacher, plan.student)]
    spec = json.dumps([*models, plan.data, plan.task], sort_keys=True)
    return folder / hashlib.sha256(spec.encode()).hexdigest()[:8]


def _tracked(waiting: Mapping[Any, int], progress: bool) -> Iterator[Any]:
    if not progress:
        yield from as_completed(waiting)
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(
        as_completed(waiting), "runs", total=len(waiting), console=console, disable=not console.is_terminal
    )


def _processes() -> BaseContext:
    """How runs get their processes: forked from one that imports the library while teachers are trained.

    A process that is forked cannot use a GPU that its parent has touched: where there is one, each starts afresh.
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
    """Children inherit one thread each: for small models that uses cores better than one process with many."""
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


def _work(recipe: dict[str, Any], home: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    plan = make(recipe)
    result = run(plan, home=Path(home))
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
