"""Capturing a recipe's teacher once, so that any number of runs answer from disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models import ModelAdapter
from understudy.runs.recipe import Recipe
from understudy.runs.run import load_teacher
from understudy.runs.teachers import served
from understudy.tasks import Prepared
from understudy.tasks import get as get_task
from understudy.teachers.cache.codecs import DEFAULT, Support
from understudy.teachers.cache.store import ShardStore
from understudy.teachers.cache.teacher import Captured, capture, verify
from understudy.teachers.server.teacher import capture_served, verify_served


def capture_recipe(
    recipe: Recipe,
    folder: Path,
    support: str | None = None,
    *,
    temperature: float = 1.0,
    splits: Sequence[str] = ("train",),
    progress: bool = False,
    tick: Callable[[int], None] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Captured:
    """Capture what a recipe's teacher says about its data. Started again it goes on; other data are appended.

    Args:
        support: `sampled:38B` (the default: as many ids as 38 bytes a row hold), `sampled:12`, `top_k:50`, `hidden` or
            `dense`; a served teacher has its `score`.
        temperature: at which probabilities are kept; a loss that asks for another is refused when it reads them.
        shard: (i, n): only every n-th batch, from the i-th on. Shards may write to one folder, or to several whose files
            are put together: their union is the whole, to the bit.
    """
    for split in splits:
        if split not in ("train", "validation", "test"):
            raise InputError(f"Split {split!r} is not train, validation or test.")
    if recipe.teacher is not None and recipe.teacher.served:
        if support is not None or temperature != 1.0:
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
    return capture(
        teacher,
        (batch for split in splits for batch in _batches(prepared, split, shard=shard)),
        folder,
        support=Support.parse(support or DEFAULT),
        temperature=temperature,
        identity=_identity(recipe, prepared),
        tick=tick,
    )


def verify_recipe(recipe: Recipe, folder: Path, *, sample: int = 64) -> dict[str, float]:
    """Compare every shard with its checksum, score a sample of the training examples again and compare with what is stored.

    Raises:
        InputError: a shard was changed since it was written, or another teacher's answers are stored.
    """
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
    facts = {key: prepared.hashes[key] for key in ("tokenizer", "template", "ends") if key in prepared.hashes}
    return {
        "format": 1,
        "task": recipe.task,
        "teacher_name": recipe.teacher.model,
        "teacher_dtype": recipe.teacher.dtype,
        "classes": prepared.classes,
        **json.loads(json.dumps(facts)),
    }
