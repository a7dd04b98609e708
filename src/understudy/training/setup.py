"""What a method may use outside the training loop: before the first step and after the last."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from understudy.data import Batch
from understudy.data.numeric_columns import Column
from understudy.errors import InputError
from understudy.models import ModelAdapter
from understudy.teachers import Teacher
from understudy.training.checkpoint import load_tree, save_tree


@dataclass(frozen=True)
class SetupContext:
    """Both sides, the data, and a place to keep what was computed.

    Args:
        student: as it is at the time. teacher: answers for a batch, of whatever kind (a model, a cache, a server, several of
            them); `None` without one. teacher_model: its model, where it runs here and answers about every example.
        splits: examples of `train`, `validation` and `test`; `setup` may add others, for phases to train on.
        collate: from examples to the tensors of a `Batch`. classes: of the task, 0 where it has none.
        teacher_train: what a teacher that is trained first may see.
        eval_split: the split that the run is evaluated on. store: a folder that comparisons share. key: hash of teacher and
            data. seed: of the run. columns: numbers by example or token, see `add_column`.
        domains: names of the examples' domains, by the number a batch gives them; empty where the data name none.
        tokenizer: of both sides, for text.
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

    def add_column(self, column: Column) -> None:
        """Give a number to every example or token of the training data, for the loss to read as `state.columns[name]`.

        Raises:
            InputError: there is a column of this name.
        """
        if column.name in self.columns:
            raise InputError(f"There is a column {column.name!r} already: choose another name.")
        self.columns[column.name] = column

    def live_teacher(self) -> ModelAdapter:
        """The teacher's own model, for a method that reads it.

        Raises:
            InputError: a cache, a server or a route to several models stands in its place.
        """
        if self.teacher_model is None:
            raise InputError(
                "This method reads the teacher's own model before training, about every example: give a live teacher, "
                "without teacher.cache, teacher.endpoint or teacher.route."
            )
        return self.teacher_model

    def examples(self, split: str) -> Any:
        """A split, or `teacher_train`."""
        return self.teacher_train if split == "teacher_train" else self.splits[split]

    def batches(self, split: str, size: int = 64) -> Iterator[Batch]:
        """A split in order, as it is without augmentation, on the student's device."""
        examples = self.examples(split)
        device = next(self.student.parameters()).device
        for start in range(0, len(examples), size):
            chosen = [examples[i] for i in range(start, min(start + size, len(examples)))]
            yield Batch.from_dict(self.collate(chosen)).to(device)

    def once(self, name: str, make: Callable[[], Mapping[str, Tensor]], **settings: Any) -> dict[str, Tensor]:
        """`make()`, or what it gave before for the same teacher, data and settings: computed once, kept whole or not."""
        asked = hashlib.sha256(json.dumps([self.key, settings], sort_keys=True, default=str).encode()).hexdigest()
        file = self.store / f"{name}-{asked[:16]}.safetensors"
        if not file.is_file():
            self.store.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{uuid.uuid4().hex}.tmp")
            save_tree(dict(make()), temporary)
            temporary.rename(file)
        found: dict[str, Tensor] = load_tree(file)
        return found
