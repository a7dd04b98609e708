"""What a study reads of finished runs: score, size, agreement and fidelity, evaluated again where a run does not say it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from understudy.data import find
from understudy.errors import InputError
from understudy.files import read_json, write_json
from understudy.methods import get as get_method
from understudy.methods import variants
from understudy.reporting.study import Record
from understudy.runs.check import evaluate_run
from understudy.runs.folder import finished, written
from understudy.runs.recipe import Recipe, make
from understudy.tasks import Task
from understudy.tasks import get as get_task


@dataclass(frozen=True)
class Place:
    """A run folder, and what a study calls its teacher, student and method; by default as the recipe does."""

    folder: Path
    teacher: str | None = None
    student: str | None = None
    method: str | None = None


def label_of(arm: Mapping[str, Any]) -> str:
    """A method with its options, without its temperature: `reverse_kl`, `kd ce_weight=0`, `jsd on-policy`.

    Args:
        arm: `method`, `options` and `on_policy` as in a recipe.
    """
    method = get_method(arm["method"])
    default = {name: field.default for name, field in method.model_fields.items()}
    own = {k: v for k, v in arm["options"].items() if k != "temperature" and v != default.get(k)}
    name = arm["method"]
    if method.variants in own and own[method.variants] in variants():
        name = own.pop(method.variants)
    words = [name, *(f"{k}={v}" for k, v in own.items()), *(["on-policy"] if arm.get("on_policy") is not None else [])]
    return " ".join(words)


def family_of(name: str, arm: Mapping[str, Any]) -> str:
    """What an arm of a comparison is called in a study: its name, unless that may tell temperatures apart."""
    return label_of(arm) if "temperature" in arm["options"] else name


def places_of(folder: Path) -> list[Place]:
    """The runs of a folder: of a study, a comparison, several comparisons, or one run.

    Raises:
        InputError: it is none of these.
    """
    if (folder / "study.json").is_file():
        runs = (read_json(folder / "study.json") or {}).get("runs", [])
        return [Place(folder / r["folder"], r["teacher"], r["student"], r["method"]) for r in runs]
    if (folder / "comparison.json").is_file():
        return _compared(folder, read_json(folder / "comparison.json") or {})
    if (folder / "run.json").is_file():
        return [Place(folder)]
    inner = sorted(folder.glob("*/comparison.json"))
    if not inner:
        raise InputError(
            f"{folder} holds neither a run (run.json), a comparison (comparison.json) nor a study (study.json)."
        )
    return [place for file in inner for place in places_of(file.parent)]


def _compared(folder: Path, data: Mapping[str, Any]) -> list[Place]:
    try:
        alone = get_task(data["task"]).baseline
        named = {
            name: alone if arm["method"] == alone and not arm["options"] else family_of(name, arm)
            for name, arm in data["arms"].items()
        }
        return [Place(folder / r["folder"], method=named[r["method"]]) for r in data["runs"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'comparison.json'} is damaged: {type(error).__name__} {error}.") from error


def measured(found: Sequence[Place], home: Path) -> tuple[list[Record], Task, list[str]]:
    """What finished runs reached, their task, and notes.

    Args:
        home: folder of the study, where evaluations that are made here are kept.

    Raises:
        InputError: a run is not finished, or has another task or split than the first.
    """
    if not found:
        raise InputError("A study needs runs: name folders of finished ones.")
    notes: list[str] = []
    read = [(place, *_read(place.folder)) for place in found]
    first, recipe, *_ = read[0]
    task = get_task(recipe.task)
    for place, other, *_ in read:
        if (other.task, other.eval_split) != (recipe.task, recipe.eval_split):
            raise InputError(
                f"{first.folder} is of {recipe.task} on {recipe.eval_split} and {place.folder} of {other.task} on "
                f"{other.eval_split}: study one task and split at a time."
            )
    hashes: dict[str, list[str]] = {}
    for _, one, _, facts in read:
        known = hashes.setdefault(str(one.data["name"]), [])
        known += [h for h in [_hash(facts)] if h not in known]
    records = []
    for place, one, evaluation, facts in read:
        name = str(one.data["name"])
        data = f"{name} {_hash(facts)[:6]}" if len(hashes[name]) > 1 else name
        metrics = _with_fidelity(place.folder, one, evaluation["metrics"], facts, home, notes)
        if metrics.get(task.metric) is None:
            raise InputError(f"{place.folder} has no metric {task.metric!r}, which the gains of {task.name} are of.")
        records.append(_record(place, one, metrics, data, task, home))
    return records, task, notes


def _read(folder: Path) -> tuple[Recipe, dict[str, Any], dict[str, Any]]:
    values, evaluation = written(folder), finished(folder)
    if values is None or evaluation is None:
        raise InputError(f"{folder} holds no finished run: run `understudy train` on its recipe, or leave it out.")
    return make(values), evaluation, read_json(folder / "run.json") or {}


def _hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(str(facts.get("hashes", {}).get("data")).encode()).hexdigest()


def _record(place: Place, recipe: Recipe, metrics: Mapping[str, Any], data: str, task: Task, home: Path) -> Record:
    agreement, fidelity = (metrics.get(name) for name in task.fidelity)
    option = getattr(recipe.build_method(), "temperature", None)
    return Record(
        data=data,
        teacher=place.teacher or (recipe.teacher.model if recipe.teacher is not None else None),
        student=place.student or (recipe.student.model if recipe.student is not None else "–"),
        method=place.method or label_of(recipe.dump()),
        temperature=option if isinstance(option, float) else None,
        seed=recipe.seed,
        score=metrics[task.metric],
        teacher_score=metrics.get(f"teacher_{task.metric}"),
        student_size=_size(place.folder, recipe),
        agreement=agreement,
        fidelity=fidelity,
        folder=os.path.relpath(place.folder, home),
    )


def _size(folder: Path, recipe: Recipe) -> float | None:
    """The number of a student's parameters; of one with adapters that of the model below them; `None` if not on disk."""
    home: Path | None = folder / "student"
    if (folder / "student" / "adapter_config.json").is_file():
        home = find(recipe.student.model) if recipe.student is not None else None
    total = 0
    for file in sorted(home.glob("*.safetensors")) if home is not None else ():
        with safe_open(file, "pt") as tensors:
            total += sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return float(total) or None


def _with_fidelity(
    folder: Path, recipe: Recipe, metrics: dict[str, Any], facts: Mapping[str, Any], home: Path, notes: list[str]
) -> dict[str, Any]:
    """The metrics of a run; of one that was not compared with its teacher, evaluated again beside it, once."""
    task = get_task(recipe.task)
    if recipe.teacher is None or not task.mixes or all(name in metrics for name in task.fidelity):
        return metrics
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    kept, files = home / "evaluations" / f"{key}.json", facts.get("files")
    known = read_json(kept)
    if known is None or known.get("files") != files:
        try:
            again = evaluate_run(folder, recipe.eval_split)["metrics"]
        except InputError as error:
            notes.append(f"{folder} was not compared with its teacher, and cannot be now: {error}")
            return metrics
        known = {"folder": str(folder), "files": files, "metrics": again}
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, known)
    if not all(name in known["metrics"] for name in task.fidelity):
        notes.append(f"{folder} was not compared with its teacher, which is not at hand.")
    return {**known["metrics"], **metrics}
