"""The setup context: what a method may use before the first step and after the last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.data import Batch
from understudy.data.numeric_columns import Column
from understudy.errors import InputError
from understudy.files import replacing
from understudy.models import ModelAdapter
from understudy.teachers import Teacher
from understudy.training.checkpoint import load_tree, save_tree


@dataclass(frozen=True)
class SetupContext:
    """Both models, the data, and a store for results.

    Args:
        student: the student at that time.
        teacher: called with a batch, whatever its kind (a model, a cache, a server, an ensemble); `None` without a
            teacher.
        teacher_model: the teacher's model, if it runs in this process and covers every example.
        splits: examples of `train`, `validation` and `test`; `setup` may add others, for phases to train on.
        collate: from examples to the tensors of a `Batch`.
        classes: number of classes of the task, 0 if it has none.
        teacher_train: the examples that a teacher which is trained first may use.
        eval_split: the split that the run is evaluated on.
        store: a folder that the runs of a comparison share.
        key: hash of teacher and data.
        seed: of the run.
        columns: numbers per example or token, see `add_column`.
        domains: names of the examples' domains, by their number in a batch; empty if the data have none.
        tokenizer: of both models, for text.
        autocast: dtype of the training steps' mixed precision, if any. A reference that the student equals at the first step
            is to be computed in it; evaluation is in the dtype of the weights.
    """

    student: ModelAdapter
    teacher_model: ModelAdapter | None
    splits: dict[str, Any]
    collate: Callable[[list[Any]], Any]
    classes: int
    store: Path
    key: str
    seed: int = 0
    teacher_train: Any = None
    eval_split: str = "test"
    columns: dict[str, Column] = field(default_factory=dict)
    teacher: Teacher | None = None
    domains: Sequence[str] = ()
    tokenizer: Any = None
    autocast: torch.dtype | None = None

    def add_column(self, column: Column) -> None:
        """Add a number to every example or token of the training data; `loss` reads it as `state.columns[name]`.

        Raises:
            InputError: there is a column of this name.
        """
        if column.name in self.columns:
            raise InputError(f"There is a column {column.name!r} already: choose another name.")
        self.columns[column.name] = column

    def live_teacher(self) -> ModelAdapter:
        """The teacher's own model, for a method that runs it.

        Raises:
            InputError: the teacher is a cache, a server, or several models with one for each domain.
        """
        if self.teacher_model is None:
            raise InputError(
                "This method reads the teacher's own model before training, about every example: give a live teacher, "
                "without teacher.cache, teacher.endpoint or teacher.route."
            )
        return self.teacher_model

    def examples(self, split: str) -> Any:
        """The examples of a split, or of `teacher_train`."""
        return self.teacher_train if split == "teacher_train" else self.splits[split]

    def batches(self, split: str, size: int = 64) -> Iterator[Batch]:
        """The batches of a split in order, without augmentation, on the student's device."""
        return self.collated(self.examples(split), size)

    def collated(self, examples: Any, size: int = 64) -> Iterator[Batch]:
        """The batches of `examples`, as of `batches`."""
        device = next(self.student.parameters()).device
        for start in range(0, len(examples), size):
            chosen = [examples[i] for i in range(start, min(start + size, len(examples)))]
            yield Batch.from_dict(self.collate(chosen)).to(device)

    def once(self, name: str, make: Callable[[], Mapping[str, Tensor]], **settings: Any) -> dict[str, Tensor]:
        """The result of `make()`, stored under its name, teacher, data and settings and read from there the next time.
        A stored result is complete or absent."""
        asked = hashlib.sha256(json.dumps([self.key, settings], sort_keys=True, default=str).encode()).hexdigest()
        file = self.store / f"{name}-{asked[:16]}.safetensors"
        if not file.is_file():
            self.store.mkdir(parents=True, exist_ok=True)
            made = dict(make())
            with replacing(file) as temporary:
                save_tree(made, temporary, checksum=True)
        found: dict[str, Tensor] = load_tree(file)
        return found
