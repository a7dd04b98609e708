"""The numbers of a recipe that a plan needs: batches, steps, classes, devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from understudy.data.folders import find
from understudy.errors import InputError, with_article
from understudy.models import is_new_causal_lm, load_tokenizer
from understudy.models.adapters import ModelAdapter
from understudy.planning.cost_trace import Answer
from understudy.planning.machine import Machine
from understudy.planning.sizes import config_of, outline_classifier, outline_lm
from understudy.runs.recipe import Recipe
from understudy.runs.specs import ModelSpec
from understudy.tasks import get as get_task
from understudy.tasks.base import COPY, MODULE
from understudy.teachers.cache.codecs import Support, row_bytes
from understudy.teachers.cache.store import IDENTITY, ShardStore

BATCH = 8
"""Examples per device if a recipe does not set them (the Trainer's default)."""


@dataclass
class Setting:
    """Numbers of a recipe.

    Args:
        one: the shape of one example: `(length,)`, or `(channels, height, width)`.
        batch: examples per micro-batch.
        accumulation: micro-batches per update.
        steps: number of updates.
        rows: rows trained on in total, over `gpus`.
        distinct: number of distinct rows among them.
        classes: of the head.
        mixed: activations in half precision, weights not.
        teacher_width: width of the teacher's hidden states.
        itemsize: bytes per number of the student's computations.
    """

    machine: Machine
    gpus: int
    shard: str
    one: tuple[int, ...]
    batch: int
    accumulation: int
    evaluation_batch: int
    unit: str
    classes: int
    mixed: bool
    checkpointing: bool
    steps: int = 0
    rows: int = 0
    distinct: int = 0
    teacher_width: int | None = None
    itemsize: int = 4
    notes: list[str] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return self.machine.gpu

    @property
    def rows_each(self) -> int:
        """Rows per example: the last token of a text has no successor."""
        return self.one[0] - 1 if len(self.one) == 1 else 1

    def shape(self, number: int) -> tuple[int, ...]:
        """Shape of the inputs of `number` examples."""
        return (number, *self.one)

    def as_computed(self, student: ModelAdapter) -> ModelAdapter:
        """Set the student's dtype and gradient checkpointing to those of the run, in place."""
        if self.mixed:
            student.bfloat16()
        self.itemsize = next(student.parameters()).itemsize
        if self.checkpointing:
            inner = student.model
            if not hasattr(inner, "gradient_checkpointing_enable"):
                raise InputError(f"{type(inner).__name__} has no gradient checkpointing: leave it out of `trainer`.")
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return student


def setting(recipe: Recipe, device: Machine, gpus: int, shard: str | None, rows: float | None) -> Setting:
    """Read a recipe. Data are read only if the number of steps, or an image's shape, depends on them."""
    task, trainer = get_task(recipe.task), recipe.trainer
    if task.kind not in ("text", "image") or "preference" in task.kinds:
        raise InputError(
            f"plan knows tasks of text or images alone, and {recipe.task!r} is {with_article('/'.join(sorted(task.kinds)))} "
            "task: run a few steps and read `cost` in its evaluation.json."
        )
    for name in ("teacher", "student"):
        spec: ModelSpec | None = getattr(recipe, name)
        if spec is not None and spec.model.startswith(MODULE):
            raise InputError(f"The {name} is a module in memory: plan needs a name, a folder or a Hub id.")
    prepared: Any = task.prepare(recipe) if task.kind == "image" else None
    fsdp = trainer.get("fsdp") or trainer.get("deepspeed")
    if shard is None:
        both = recipe.teacher is not None and recipe.teacher.device == "sharded"
        shard = ("both" if both else "student") if fsdp and gpus > 1 else "none"
    inside = trainer.get("fsdp_config") or {}
    found = Setting(
        machine=device,
        gpus=gpus,
        shard=shard if gpus > 1 else "none",
        one=tuple(prepared.input_shape) if prepared is not None else (int(recipe.data["max_length"]),),
        batch=int(trainer.get("per_device_train_batch_size", BATCH)),
        accumulation=int(trainer.get("gradient_accumulation_steps", 1)),
        evaluation_batch=recipe.evaluation_batch,
        unit=task.unit,
        classes=prepared.classes if prepared is not None else _vocabulary(recipe),
        mixed=bool(trainer.get("bf16") or trainer.get("fp16")),
        checkpointing=bool(
            trainer.get("gradient_checkpointing")
            or (isinstance(inside, dict) and inside.get("activation_checkpointing"))
        ),
    )
    if task.kind == "text" and not recipe.data.get("pack", True):
        found.notes.append(
            "Rows are not packed: every one is counted at data.max_length, which is the most there can be."
        )
    _length_of_run(recipe, found, prepared, rows)
    return found


def _length_of_run(recipe: Recipe, found: Setting, prepared: Any, rows: float | None) -> None:
    """Steps, rows and distinct rows: from `rows`, from `max_steps`, or from the data and the epochs."""
    trainer, update = recipe.trainer, found.batch * found.accumulation * found.gpus
    epochs = 1.0
    if rows is not None:
        if not rows > 0:
            raise InputError(f"rows is {rows} and must be above 0.")
        found.steps = max(1, round(rows / (update * found.rows_each)))
    elif trainer.get("max_steps", -1) > 0:
        found.steps = int(trainer["max_steps"])
    else:
        prepared = prepared if prepared is not None else get_task(recipe.task).prepare(recipe)
        epochs = float(trainer.get("num_train_epochs", 3.0))
        found.steps = max(1, int(-(-len(prepared.train) // update) * epochs))
    found.rows = found.steps * update * found.rows_each
    found.distinct = round(found.rows / max(1.0, epochs))
    if prepared is not None:
        found.distinct = min(found.distinct, len(prepared.train) * found.rows_each)


def _vocabulary(recipe: Recipe) -> int:
    """Number of classes of the head: from a pretrained model, from the tokenizer, or from one that is to be trained."""
    for spec in (recipe.teacher, recipe.student):
        if spec is not None and not is_new_causal_lm(spec.model) and spec.model != COPY:
            return int(config_of(spec).get_text_config().vocab_size)
    own = recipe.data.get("tokenizer")
    return len(load_tokenizer(own)) if own is not None else int(recipe.data.get("vocab_size", 1024))


def outlines(recipe: Recipe, found: Setting) -> tuple[ModelAdapter, ModelAdapter | None]:
    """Student and teacher on `meta`; no teacher for a method that requires none."""
    method = recipe.build_method()
    asks = method.requires.in_steps
    if asks and recipe.teacher is None:
        raise InputError(f"Method {recipe.method!r} needs a teacher and the recipe names none: set `teacher`.")

    def outline(spec: ModelSpec) -> ModelAdapter:
        if len(found.one) == 1:
            return outline_lm(spec, found.classes, found.gpu)
        return outline_classifier(spec, found.classes, found.one)

    teacher = None
    if asks and recipe.teacher is not None and recipe.teacher.endpoint is None:
        teacher = outline(recipe.teacher)
        head = getattr(teacher.model, "get_output_embeddings", lambda: None)()
        found.teacher_width = head.weight.shape[1] if head is not None else None
        teacher.requires_grad_(False)
    assert recipe.student is not None
    if recipe.student.model == COPY:
        if recipe.teacher is None:
            raise InputError(f"student={COPY} begins as a copy of the teacher, and there is none: set `teacher`.")
        return outline(recipe.teacher.model_copy(update={"quantization": None, "cache": None})), teacher
    return outline(recipe.student), teacher


def answer_of(recipe: Recipe, found: Setting, teacher: ModelAdapter | None, support: str) -> Answer:
    """The source of the teacher's outputs during training: its model, its cache, or none."""
    if recipe.teacher is None or teacher is None or recipe.teacher.cache is None:
        return Answer(teacher)
    held = find(recipe.teacher.cache)
    if held is not None and (held / IDENTITY).is_file():
        support = str(ShardStore(held).identity.get("support"))
    else:
        found.notes.append(f"Cache {recipe.teacher.cache} is not there yet: it is taken to be {support}.")
    kept = Support.parse(support)
    if kept.kind == "hidden":
        head = teacher.model.get_output_embeddings().weight
        return Answer(stored=row_bytes(kept, found.classes, head.shape[1]), head=torch.empty_like(head, device="meta"))
    # After reading, each kept class is a 64-bit id and two float32 numbers; each dense one a float16 and a float32.
    unpacked = 6.0 * found.classes if kept.kind == "dense" else 16.0 * min(kept.k or 2 * kept.size, found.classes)
    return Answer(stored=unpacked)
