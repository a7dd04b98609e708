"""Comparisons of methods: the same student, data and budget, over seeds, in parallel processes if there are enough
cores."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from torch import nn

from understudy.data.memory import MEMORY
from understudy.errors import InputError, nearest
from understudy.evaluation.cost import NO_STEPS
from understudy.files import read_json, write_json
from understudy.methods import all_methods, is_own, resolve
from understudy.methods import get as get_method
from understudy.reporting import render_comparison, summarise
from understudy.runs.executors import PROCESSES, Slurm, executor_of, submit
from understudy.runs.folder import agree, clear, differences, finished, held
from understudy.runs.objects import Modules, method_name, named, named_arms
from understudy.runs.recipe import Recipe, load, make
from understudy.runs.run import inputs, run, trained_first
from understudy.tasks import get as get_task
from understudy.training import Method
from understudy.workers import carry_out, processes


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison: `table` has one row per arm, `folder` holds `comparison.json` and `report.html`."""

    table: list[dict[str, Any]]
    data: dict[str, Any]
    folder: Path


def compare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    methods: Sequence[str | Method | type[Method]] | None = None,
    seeds: int | Sequence[int] = 3,
    *,
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    baseline: str | None = None,
    workers: int | None = None,
    executor: str = PROCESSES,
    overwrite: bool = False,
    progress: bool = False,
) -> Comparison:
    """Train every arm with every seed as in the recipe, and compare on the evaluation split.

    All arms have the same optimizer steps, batches and student initialisation per seed. The teacher is trained once.

    Args:
        recipe: as for `distill`, also with data in memory, a teacher that is a module, and factories (a student must be
            a factory, since every run starts from a new one). Forked workers get such objects; on a system that cannot
            fork, or with a GPU, the runs are sequential in this process.
        methods: names of arms or of methods, or classes and instances of `Method`; options of those without any come
            from the recipe's `arms`. Default: all arms, if the recipe names any with a method, else `sft` and `kd`.
        seeds: their number, or a list.
        arms: `{name: {"method": …, "options": {…}}}`, instead of the recipe's `arms`; a method may be a class or an instance.
        baseline: the arm that differences are computed against; by default the first.
        workers: number of parallel runs; by default one per GPU, or one per core without a GPU.
        executor: `processes` of this machine, or jobs of a Slurm cluster: `slurm`, `slurm:partition=gpu,time=60,memory=8`
            (`runs.executors.Slurm`). Jobs take no objects of this process.
        overwrite: replace the runs in the output folder.
    """
    recipe, given = _read(recipe)
    own = bool(given) or str(recipe.data["name"]).startswith(MEMORY)
    own = own or any(not isinstance(m, str) for m in methods or ())
    if arms is not None:
        recipe = make(recipe.dump() | {"arms": named_arms(arms)})
    own = own or any(is_own(str(arm.get("method", name))) for name, arm in recipe.arms.items())
    pairs = [method_name(m) for m in methods or ()]
    adopted = {name: {"method": name, "options": options} for name, options in pairs if options}
    recipe = recipe.model_copy(update={"arms": {**recipe.arms, **adopted}})
    chosen = _chosen(recipe, None if methods is None else [name for name, _ in pairs])
    numbers = read_seeds(seeds)
    if workers is not None and workers < 1:
        raise InputError(f"A comparison with {workers} workers has none: give 1 or more.")
    if not numbers or not chosen:
        raise InputError("A comparison needs at least one method and one seed: --methods a,b --seeds 3.")
    baseline = baseline or next(iter(chosen))
    if baseline not in chosen:
        raise InputError(f"Baseline {baseline!r} is not among the methods {', '.join(chosen)}.")
    folder, homes = recipe.output, places(chosen)
    runs = [(name, s) for name in chosen for s in numbers]
    plans = [_plan(recipe, chosen[name], s, folder / "runs" / f"{homes[name]}-s{s}") for name, s in runs]
    with held(folder, inputs(recipe), several=True):
        results = run_all(
            plans,
            folder / "teacher",
            workers=workers,
            executor=executor,
            overwrite=overwrite,
            progress=progress,
            modules=given if own else None,
        )
        done = [
            {"method": name, "seed": seed, "folder": os.path.relpath(p.output, folder), **r}
            for (name, seed), p, r in zip(runs, plans, results, strict=True)
        ]
        data = _collect(recipe, done, baseline, numbers) | {"arms": chosen}
        write_json(folder / "comparison.json", data)
        render_comparison(folder)
    return Comparison(data["table"], data, folder)


def _read(recipe: Recipe | Mapping[str, Any] | str | Path) -> tuple[Recipe, Modules]:
    """The recipe of a comparison, and the caller's models in it."""
    if isinstance(recipe, Recipe):
        return recipe, Modules({})
    if isinstance(recipe, (str, Path)):
        return load(recipe), Modules({})
    values, given = named(recipe)
    if isinstance(given.given.get("student"), nn.Module):
        raise InputError(
            "compare trains a student of its own in every run: give a function that makes one (lambda: ...)."
        )
    return make(values), given


def read_seeds(seeds: int | Sequence[int]) -> list[int]:
    """The seeds of a comparison, given by their number or one by one.

    Raises:
        InputError: neither, or one is given twice, which would count one run as two.
    """
    if isinstance(seeds, int):
        return list(range(seeds))
    if isinstance(seeds, str) or not isinstance(seeds, Iterable):
        raise InputError(f"seeds is {seeds!r}: give their number, or a list of whole numbers.")
    numbers = list(seeds)
    twice = next((n for i, n in enumerate(numbers) if n in numbers[:i]), None)
    if twice is not None:
        raise InputError(f"Seed {twice} is given twice, and a run counts once: give each seed once.")
    return numbers


_Arm = dict[str, Any]
"""`{"method": …, "options": {…}}`, and `on_policy` where it differs from the recipe's."""
_ARM_KEYS = ("method", "options", "on_policy")


def _chosen(recipe: Recipe, names: Sequence[str] | None) -> dict[str, _Arm]:
    """The arms of a comparison by name."""
    named = {name: read_arm(name, values) for name, values in recipe.arms.items()}
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
        method, options = resolve(name) if name not in named else (name, {})
        own = recipe.options if method == recipe.method else {}
        chosen[name] = named.get(name, {"method": method, "options": {**own, **options}})
    return chosen


def _is_method(name: str) -> bool:
    try:
        get_method(name)
    except InputError:
        return False
    return True


def _is_named(values: Mapping[str, Any]) -> bool:
    """Whether an arm names its method or has its options under a key; otherwise it is the options of the method with
    its name."""
    return not values.keys().isdisjoint(_ARM_KEYS)


def read_arm(name: str, values: Mapping[str, Any]) -> _Arm:
    """The method and options of an arm as a recipe has it.

    Raises:
        InputError: an unknown key or method.
    """
    if not _is_named(values):
        if not _is_method(name):
            raise InputError(
                f"Arm {name!r} names no method, and there is none of that name.{nearest(name, all_methods())} Write arms: "
                f"{{{name!r}: {{method: NAME, options: {{...}}}}}}."
            )
        method, own = resolve(name)
        return {"method": method, "options": {**own, **values}}
    for key in values:
        if key not in _ARM_KEYS:
            raise InputError(
                f"Unknown key arms.{name}.{key}.{nearest(key, _ARM_KEYS)} Known: {', '.join(_ARM_KEYS)}; options of "
                "the method go below options."
            )
    options = values.get("options") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"arms.{name}.options is {options!r} and must map options of the method to values.")
    method, own = resolve(str(values.get("method", name)))
    samples = {"on_policy": values["on_policy"]} if "on_policy" in values else {}
    return {"method": method, "options": {**own, **options}, **samples}


def places(names: Iterable[str], what: str = "Arms") -> dict[str, str]:
    """A folder name for each of `what`.

    Raises:
        InputError: two would share one.
    """
    taken: dict[str, str] = {}
    for name in names:
        place = re.sub(r"[^\w.=+-]+", "-", name)
        if place in taken:
            raise InputError(f"{what} {taken[place]!r} and {name!r} would share the folder {place!r}: rename one.")
        taken[place] = name
    return {name: place for place, name in taken.items()}


def _plan(recipe: Recipe, arm: _Arm, seed: int, output: Path) -> Recipe:
    return make(recipe.dump() | {**arm, "seed": seed, "output": str(output), "arms": {}})


def run_all(
    plans: Sequence[Recipe],
    shared: Path,
    *,
    workers: int | None = None,
    executor: str = PROCESSES,
    overwrite: bool = False,
    progress: bool = False,
    modules: Modules | None = None,
) -> list[dict[str, Any]]:
    """Run recipes in parallel, one thread each; results are in the order of the plans. A finished run is read.

    Models that have to be trained first are trained once, in this process or in a job, and kept in `shared`.

    Args:
        workers, executor: see `compare`.
        overwrite: replace the runs in the plans' folders.
        modules: the caller's models; must be given, possibly empty, if the plans name objects of this process.
    """
    slurm = executor_of(executor)
    results = {} if overwrite else {i: _measured(p) for i, p in enumerate(plans) if _is_done(p)}
    left = [i for i in range(len(plans)) if i not in results]
    if left:
        found = _run_all([plans[i] for i in left], shared, workers, slurm, overwrite, progress, modules)
        results |= zip(left, found, strict=True)
    return [results[i] for i in range(len(plans))]


def _run_all(
    plans: Sequence[Recipe],
    shared: Path,
    workers: int | None,
    slurm: Slurm | None,
    overwrite: bool,
    progress: bool,
    modules: Modules | None,
) -> list[dict[str, Any]]:
    if slurm is not None and modules is not None:
        raise InputError(
            "Models, data and methods that are objects of this process cannot travel to a Slurm job: give names, folders or "
            "files, or leave the executor at processes."
        )
    homes = [home_of(p, shared) for p in plans]
    first = {own.output: own for p, home in zip(plans, homes, strict=True) for own in trained_first(p, home)}
    jobs = [(p.dump(), str(home), overwrite) for p, home in zip(plans, homes, strict=True)]

    def tracked(done: Iterator[Any]) -> Iterator[Any]:
        return _tracked(done, len(jobs), progress)

    if slurm is not None:
        train_shared(list(first.values()), shared.parent, slurm, overwrite, progress)
        by_folder = {str(p.output): job for p, job in zip(plans, jobs, strict=True)}
        return submit(_work, by_folder, slurm, shared.parent / "jobs", workers, tracked)
    context = processes() if modules is None else _forked()
    train_shared(list(first.values()), shared.parent, slurm, overwrite, progress)
    if context is None:
        return [_work(p, home, replace, modules) for p, home, replace in tracked(iter(jobs))]
    global _modules
    _modules = modules  # forked workers inherit it
    return carry_out(_work, jobs, workers, context, tracked)


def train_shared(plans: Sequence[Recipe], folder: Path, slurm: Slurm | None, overwrite: bool, progress: bool) -> None:
    """Train models that other runs share: in this process, or each in a job whose files are in `folder`."""
    if slurm is None:
        for plan in plans:
            _train(plan.dump(), overwrite, progress)
        return
    left = [p for p in plans if finished(p.output) is None or differences(p.output, p)]
    if left:
        submit(_train, {str(p.output): (p.dump(), overwrite) for p in left}, slurm, folder / "jobs")


def _train(recipe: dict[str, Any], overwrite: bool, progress: bool = False) -> None:
    plan = make(recipe)
    if overwrite and differences(plan.output, plan):
        clear(plan.output)
    if run(plan, progress=progress).interrupted:
        raise KeyboardInterrupt


_modules: Modules | None = None


def _forked() -> BaseContext | None:
    """A context of forked processes, which have the caller's objects; `None` without a fork or with a GPU, which forks
    cannot use."""
    import torch

    if "fork" not in multiprocessing.get_all_start_methods() or torch.cuda.is_available():
        return None
    return multiprocessing.get_context("fork")


def home_of(plan: Recipe, folder: Path) -> Path:
    """The folder of a plan's shared models in `folder`; plans with other models or data have separate ones."""
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


def _work(recipe: dict[str, Any], home: str, overwrite: bool, modules: Modules | None = None) -> dict[str, Any]:
    import torch

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    plan = make(recipe)
    result = run(plan, home=Path(home), modules=modules or _modules, overwrite=overwrite)
    if result.interrupted:
        raise KeyboardInterrupt
    return _measured(plan)


def _is_done(plan: Recipe) -> bool:
    """Whether the folder of a plan holds its finished run.

    Raises:
        InputError: it holds another run.
    """
    return finished(plan.output) is not None and not agree(plan)


def _measured(plan: Recipe) -> dict[str, Any]:
    """The results of a finished run."""
    evaluation = finished(plan.output) or {}
    return {"metrics": evaluation["metrics"], "cost": evaluation.get("cost", dict(NO_STEPS))}


def _collect(recipe: Recipe, done: list[dict[str, Any]], baseline: str, seeds: list[int]) -> dict[str, Any]:
    task = get_task(recipe.task)
    first = done[0]
    found = [d["metrics"] for d in reversed(done)]  # the first arms': a method with teachers of its own evaluates these
    taught = {k.removeprefix("teacher_"): v for values in found for k, v in values.items() if k.startswith("teacher_")}
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
        "recipe": recipe.shown(),
    }
