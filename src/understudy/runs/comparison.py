"""Methods side by side: the same student, data and budget, over seeds, in parallel processes where cores allow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.errors import InputError
from understudy.files import read_json, write_json
from understudy.methods import get as get_method
from understudy.reporting import render_comparison, summarise
from understudy.runs.folder import clear, differences, finished, held
from understudy.runs.recipe import Recipe, load, make
from understudy.runs.run import inputs, run, trained_first
from understudy.tasks import get as get_task
from understudy.workers import carry_out, processes


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
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Comparison:
    """Train every method over every seed as the recipe says, and compare on the judged split.

    All arms have the same optimizer steps, batches and student initialisation per seed. The teacher is trained once.

    Args:
        methods: names; options of each come from the recipe's `arms`.
        seeds: how many, or which.
        baseline: what differences are against; the first method unless given.
        workers: runs at once; one a GPU, or one a core where there is none, if not given.
        overwrite: replace the runs that the output folder holds.
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
    with held(folder, inputs(recipe)):
        results = run_all(plans, folder / "teacher", workers=workers, overwrite=overwrite, progress=progress)
        done = [
            {"method": p.method, "seed": p.seed, "folder": os.path.relpath(p.output, folder), **r}
            for p, r in zip(plans, results, strict=True)
        ]
        data = _collect(recipe, done, baseline, numbers)
        write_json(folder / "comparison.json", data)
        render_comparison(folder)
    return Comparison(data["table"], data, folder)


def _arm(recipe: Recipe, method: str, seed: int, output: Path) -> Recipe:
    get_method(method)
    own = recipe.arms.get(method, recipe.options if method == recipe.method else {})
    return make(recipe.dump() | {"method": method, "options": own, "seed": seed, "output": str(output), "arms": {}})


def run_all(
    plans: Sequence[Recipe],
    shared: Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Carry out runs in parallel, one thread each; results in the order of the plans.

    Models that have to be trained first are trained once, in this process, and kept in `shared`.

    Args:
        workers: processes; one a GPU, or one a core where there is none, if not given. overwrite: replace the runs that the
            plans' folders hold.
    """
    homes = [_home(p, shared) for p in plans]
    context = processes()
    for plan, home in {h: (p, h) for p, h in zip(plans, homes, strict=True)}.values():
        for own in trained_first(plan, home):
            if overwrite and differences(own.output, own):
                clear(own.output)
            if run(own, progress=progress).interrupted:
                raise KeyboardInterrupt
    jobs = [(p.dump(), str(home), overwrite) for p, home in zip(plans, homes, strict=True)]
    return carry_out(_work, jobs, workers, context, lambda done: _tracked(done, len(jobs), progress))


def _home(plan: Recipe, folder: Path) -> Path:
    """Plans with other models or data get a folder of their own."""
    import hashlib

    models = [spec.model_dump() if spec else None for spec in (plan.teacher, plan.student)]
    spec = json.dumps([*models, plan.data, plan.task], sort_keys=True)
    return folder / hashlib.sha256(spec.encode()).hexdigest()[:8]


def _tracked(done: Iterator[Any], total: int, progress: bool) -> Iterator[Any]:
    if not progress:
        yield from done
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(done, "runs", total=total, console=console, disable=not console.is_terminal)


def _work(recipe: dict[str, Any], home: str, overwrite: bool) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    plan = make(recipe)
    result = run(plan, home=Path(home), overwrite=overwrite)
    if result.interrupted:
        raise KeyboardInterrupt
    evaluation = finished(plan.output) or {}
    return {"metrics": evaluation["metrics"], "cost": evaluation["cost"]}


def _collect(recipe: Recipe, done: list[dict[str, Any]], baseline: str, seeds: list[int]) -> dict[str, Any]:
    task = get_task(recipe.task)
    first = done[0]
    taught = {k.removeprefix("teacher_"): v for d in done for k, v in d["metrics"].items() if k.startswith("teacher_")}
    facts = read_json(recipe.output / first["folder"] / "run.json") or {}
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
        "recipe": recipe.dump(),
    }
