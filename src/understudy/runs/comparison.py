"""Methods side by side: the same student, data and budget, over seeds, in parallel processes where cores allow."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from understudy.errors import InputError, nearest
from understudy.methods import all_methods
from understudy.methods import get as get_method
from understudy.reporting import render_comparison, summarise
from understudy.runs.folder import finished, open_folder
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
    methods: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 3,
    *,
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    baseline: str | None = None,
    progress: bool = False,
) -> Comparison:
    """Train every arm over every seed as the recipe says, and compare on the judged split.

    All arms have the same optimizer steps, batches and student initialisation per seed. The teacher is trained once.

    Args:
        methods: names of arms, or of methods; options of these come from the recipe's `arms`. Unless given: all arms, if
            the recipe names any with a method, else `sft` and `kd`.
        seeds: how many, or which.
        arms: `{name: {"method": …, "options": {…}}}`, in place of the recipe's `arms`.
        baseline: what differences are against; the first arm unless given.
    """
    if not isinstance(recipe, Recipe):
        recipe = make(recipe) if isinstance(recipe, Mapping) else load(recipe)
    if arms is not None:
        recipe = make(recipe.dump() | {"arms": {name: dict(arm) for name, arm in arms.items()}})
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    chosen = _chosen(recipe, methods)
    if not numbers or not chosen:
        raise InputError("A comparison needs at least one method and one seed: --methods a,b --seeds 3.")
    baseline = baseline or next(iter(chosen))
    if baseline not in chosen:
        raise InputError(f"Baseline {baseline!r} is not among the methods {', '.join(chosen)}.")
    folder = recipe.output
    places = _places(chosen)
    runs = [(name, s) for name in chosen for s in numbers]
    plans = [_plan(recipe, chosen[name], s, folder / "runs" / f"{places[name]}-s{s}") for name, s in runs]
    results = run_all(plans, folder / "teacher", progress=progress)
    done = [
        {"method": name, "seed": seed, "folder": os.path.relpath(p.output, folder), **r}
        for (name, seed), p, r in zip(runs, plans, results, strict=True)
    ]
    data = _collect(recipe, done, baseline, numbers) | {"arms": chosen}
    (folder / "comparison.json").write_text(json.dumps(data, indent=1))
    render_comparison(folder)
    return Comparison(data["table"], data, folder)


_Arm = dict[str, Any]
"""`{"method": …, "options": {…}}`."""
_ARM_KEYS = ("method", "options")


def _chosen(recipe: Recipe, names: Sequence[str] | None) -> dict[str, _Arm]:
    """The arms of a comparison by name."""
    named = {name: _arm(name, values) for name, values in recipe.arms.items()}
    if names is None:
        names = list(named) if any(_is_named(values) for values in recipe.arms.values()) else ["sft", "kd"]
    chosen: dict[str, _Arm] = {}
    for name in names:
        if name in chosen:
            raise InputError(
                f"{name!r} is named twice. Arms of one method have names of their own: arms: "
                f"{{'{name} a': {{method: {name}, options: {{...}}}}, ...}}."
            )
        if name not in named and not _is_method(name):
            raise InputError(
                f"No method {name!r}, and no arm of that name.{nearest(name, [*named, *all_methods()])} Arms of the recipe: "
                f"{', '.join(named) or 'none'}; methods: `understudy methods`."
            )
        own = recipe.options if name == recipe.method else {}
        chosen[name] = named.get(name, {"method": name, "options": own})
    return chosen


def _is_method(name: str) -> bool:
    try:
        get_method(name)
    except InputError:
        return False
    return True


def _is_named(values: Mapping[str, Any]) -> bool:
    """Whether an arm says its method or has its options apart; otherwise it is the options of the method of its name."""
    return not values.keys().isdisjoint(_ARM_KEYS)


def _arm(name: str, values: Mapping[str, Any]) -> _Arm:
    if not _is_named(values):
        if not _is_method(name):
            raise InputError(
                f"Arm {name!r} says no method, and there is none of that name.{nearest(name, all_methods())} Write arms: "
                f"{{{name!r}: {{method: NAME, options: {{...}}}}}}."
            )
        return {"method": name, "options": dict(values)}
    for key in values:
        if key not in _ARM_KEYS:
            raise InputError(
                f"Unknown key arms.{name}.{key}.{nearest(key, _ARM_KEYS)} Known: method, options; options of the method "
                "go below options."
            )
    options = values.get("options") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"arms.{name}.options is {options!r} and must map options of the method to values.")
    method = str(values.get("method", name))
    get_method(method)
    return {"method": method, "options": dict(options)}


def _places(names: Iterable[str]) -> dict[str, str]:
    """A folder name for each arm."""
    taken: dict[str, str] = {}
    for name in names:
        place = re.sub(r"[^\w.=+-]+", "-", name)
        if place in taken:
            raise InputError(f"Arms {taken[place]!r} and {name!r} would share the folder {place!r}: rename one.")
        taken[place] = name
    return {name: place for place, name in taken.items()}


def _plan(recipe: Recipe, arm: _Arm, seed: int, output: Path) -> Recipe:
    return make(recipe.dump() | {**arm, "seed": seed, "output": str(output), "arms": {}})


def run_all(plans: Sequence[Recipe], shared: Path, *, progress: bool = False) -> list[dict[str, Any]]:
    """Carry out runs in parallel, one thread each; results in the order of the plans. A finished run is read.

    Models that have to be trained first are trained once, in this process, and kept in `shared`.
    """
    results = {i: _measured(p) for i, p in enumerate(plans) if finished(p.output) is not None}
    left = [i for i in range(len(plans)) if i not in results]
    if left:
        results |= zip(left, _run_all([plans[i] for i in left], shared, progress), strict=True)
    return [results[i] for i in range(len(plans))]


def _run_all(plans: Sequence[Recipe], shared: Path, progress: bool) -> list[dict[str, Any]]:
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
    return _measured(plan)


def _measured(plan: Recipe) -> dict[str, Any]:
    """What a finished run found, if it is the run that is asked for."""
    evaluation = json.loads((open_folder(make(plan.dump())) / "evaluation.json").read_text())
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
        "recipe": recipe.dump(),
    }
