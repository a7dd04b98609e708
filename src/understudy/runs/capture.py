"""Capturing a recipe's teacher once, so that any number of runs read its outputs from disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models import ModelAdapter
from understudy.runs.fitting import module_for
from understudy.runs.recipe import Recipe, make
from understudy.runs.run import load_teacher
from understudy.runs.teachers import copy_of, outputs_alone, served
from understudy.tasks import Prepared
from understudy.tasks import get as get_task
from understudy.tasks.base import COPY
from understudy.teachers import LocalTeacher
from understudy.teachers.cache.codecs import DEFAULT, Support
from understudy.teachers.cache.store import ShardStore
from understudy.teachers.cache.teacher import CachedTeacher, Captured, capture, verify
from understudy.teachers.server.teacher import capture_served, verify_served
from understudy.training import Method
from understudy.training.dry_run import dry_run_stored


def capture_recipe(
    recipe: Recipe | Mapping[str, Any],
    folder: str | Path,
    support: str | None = None,
    *,
    temperature: float | None = None,
    splits: Sequence[str] | None = None,
    progress: bool = False,
    tick: Callable[[int], None] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Captured:
    """Capture the teacher's outputs for a recipe's data. It resumes when started again; other data are appended.

    Args:
        recipe: as for `distill`.
        support: `sampled:38B` (as many ids as fit 38 bytes per row), `sampled:12`, `top_k:50`, `hidden` or `dense`.
            Default: what the recipe's method requires, else
            `sampled:38B`, or `dense` if the method cannot learn from that. A served teacher has its
            `score`.
        temperature: of the stored probabilities; by default that of the recipe's method.
        splits: by default those about which the recipe's method asks the teacher.
        shard: (i, n): only every n-th batch, from the i-th on. Shards may write to one folder, or to several whose
            files are merged: their union equals a capture without shards, to the bit.

    Raises:
        InputError: the recipe's method could not learn from the stored targets; nothing is captured then.
    """
    recipe, folder = recipe if isinstance(recipe, Recipe) else make(recipe), Path(folder)
    splits = recipe.build_method().requires.splits if splits is None else splits
    for split in splits:
        if split not in ("train", "validation", "test"):
            raise InputError(f"Split {split!r} is not train, validation or test.")
    if recipe.teacher is not None and recipe.teacher.served:
        if support is not None or temperature not in (None, 1.0):
            raise InputError(
                f"A served teacher is kept as it was scored (teacher.score={recipe.teacher.score}, temperature 1): leave "
                "support and temperature out."
            )
        prepared = get_task(recipe.task).prepare(recipe)
        answers = (batch for split in splits for batch in _batches(prepared, split, shard=shard))
        return capture_served(served(recipe, prepared, folder), answers, tick=tick)
    prepared, teacher = _sides(recipe, folder, progress)
    if prepared.augmentation is not None:
        raise InputError(
            "The data are augmented, so no input comes twice: set data.augment=false, or use a live teacher."
        )
    kept, taken_at = _learnable(recipe, prepared, teacher, support, temperature)
    return capture(
        teacher,
        (batch for split in splits for batch in _batches(prepared, split, shard=shard)),
        folder,
        support=kept,
        temperature=taken_at,
        identity=_identity(recipe, prepared),
        tick=tick,
    )


def _learnable(
    recipe: Recipe, prepared: Prepared, teacher: ModelAdapter, support: str | None, temperature: float | None
) -> tuple[Support, float]:
    """The support and temperature to store, tested on one example with the recipe's method before the capture."""
    method = recipe.build_method()
    asked = method.requires.temperature
    at = temperature if temperature is not None else asked
    # Dense logits know no temperature, but a wrong one is not mended by keeping a hundred times as much.
    wanted = support if support is not None else method.requires.support
    names = [wanted] if wanted is not None else [DEFAULT, "dense"] if at == asked else [DEFAULT]
    choices = [Support.parse(name) for name in names]
    if not method.requires.in_steps:
        return choices[0], at
    outputs_alone(method, "a cache only keeps its outputs")
    if recipe.on_policy is not None:
        raise InputError(
            f"Method {recipe.method!r} asks the teacher about texts that are written during training (on_policy), and a cache "
            "knows none of them: train it with the live teacher, leave on_policy out, or name the method that will read the "
            "cache. Nothing was captured."
        )
    if method.requires.teacher_model:
        raise InputError(
            f"Method {recipe.method!r} reads the teacher's own model before training, and a cache is none: train it with "
            "the live teacher, or name the method that will read the cache."
        )
    if type(method).setup is not Method.setup:
        return choices[0], at  # the loss needs results of a `setup` that runs with the cache
    task = get_task(recipe.task)
    assert recipe.student is not None  # filled by every task
    copied = recipe.student.model == COPY
    student = copy_of(teacher) if copied else task.model(recipe.student, prepared)
    train_module, example = module_for(recipe, prepared, student, LocalTeacher(teacher, "teacher"), 1, {})
    refused = None
    for kept in choices:
        with tempfile.TemporaryDirectory() as scratch:
            folder, first = Path(scratch), _batches(prepared, "train", 1)
            capture(teacher, first, folder, support=kept, temperature=at, identity=_identity(recipe, prepared))
            cached = CachedTeacher(folder)
        cached.name = "such a cache"
        try:
            dry_run_stored(train_module, cached, example)
        except InputError as error:
            refused = refused or error
            continue
        return kept, at
    raise InputError(f"{refused} Nothing was captured. Change --support or --temperature, or the recipe's method.")


def verify_recipe(recipe: Recipe, folder: Path, *, sample: int = 64) -> dict[str, float]:
    """Compare every shard with its checksum, run the teacher on a sample of the training examples again, and compare
    with the stored outputs.

    Raises:
        InputError: a shard was changed since it was written, or the stored outputs are another teacher's.
    """
    describe(folder)  # no teacher is trained for a folder that is no cache
    if recipe.teacher is not None and recipe.teacher.served:
        ShardStore(folder).check()
        prepared = get_task(recipe.task).prepare(recipe)
        with tempfile.TemporaryDirectory() as fresh:
            return verify_served(served(recipe, prepared, Path(fresh)), _batches(prepared, "train", sample), folder)
    prepared, teacher = _sides(recipe, folder, False)
    return verify(teacher, _batches(prepared, "train", sample), folder)


def describe(folder: Path) -> dict[str, Any]:
    """Identity and size of a cache."""
    store = ShardStore(folder)
    per_row = store.size / max(1, store.rows)
    return {**store.identity, "examples": len(store), "rows": store.rows, "bytes": store.size, "bytes_per_row": per_row}


def _sides(recipe: Recipe, folder: Path, progress: bool) -> tuple[Prepared, ModelAdapter]:
    task = get_task(recipe.task)
    if recipe.teacher is None:
        raise InputError("A capture needs a teacher: set `teacher`.")
    if recipe.teacher.cache is not None:
        raise InputError("The recipe's teacher already answers from a cache: leave teacher.cache out to capture.")
    prepared = task.prepare(recipe)
    teacher = load_teacher(recipe, task, prepared, folder, progress, None)
    assert teacher is not None
    if torch.cuda.is_available():
        teacher.cuda()
    return prepared, teacher


def _batches(
    prepared: Prepared, split: str, most: int | None = None, size: int = 16, shard: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    examples = prepared.split(split)
    number = len(examples) if most is None else min(most, len(examples))
    for start in range(shard[0] * size, number, shard[1] * size):
        chosen = [examples[i] for i in range(start, min(start + size, number))]
        batch = Batch.from_dict(prepared.collate(chosen))
        yield batch.to("cuda") if torch.cuda.is_available() else batch


def _identity(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    assert recipe.teacher is not None
    facts = {
        key: prepared.hashes[key] for key in ("tokenizer", "template", "ends", "class_names") if key in prepared.hashes
    }
    return {
        "format": 1,
        "task": recipe.task,
        "teacher_name": recipe.teacher.model,
        "teacher_dtype": recipe.teacher.dtype,
        "classes": prepared.classes,
        **json.loads(json.dumps(facts)),
    }
