"""What a task answers: data, models and defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn
from torch.utils.data import DataLoader

from understudy.data import Batch
from understudy.errors import InputError
from understudy.evaluation import evaluate
from understudy.generation import Source
from understudy.models import ModelAdapter

MODULE = "module:"
"""Begins the name of a model that was handed over as a module."""

COPY = "teacher"
"""As the name of a student: begin as a copy of the teacher."""

Collate = Callable[[list[Any]], dict[str, Any]]


@dataclass
class Prepared:
    """Data ready to train on.

    Args:
        train, validation, test: indexable examples that `collate` turns into the tensors of a `Batch`.
        teacher_train: what a teacher that is trained first may see.
        classes: images: number of classes; text: size of the vocabulary.
        more_tests: further test sets by name (`test_shifted`), judged beside `test`.
        notes: what a reader should know (splits made, rows dropped, truncation), one sentence each. warnings: likewise,
            of what may be wrong.
        hashes: content hashes for the run folder.
        domains: names of the examples' domains, by the number a batch gives them; empty where the data name none.
        aligner: how the teacher's tokens lie over the student's, where it has a tokenizer of its own.
        facts: what the task's own `model` needs to know of the data. stored: told the folder where a run, or a
            comparison, keeps what is dear to compute.
    """

    train: Any
    validation: Any
    test: Any
    collate: Collate
    classes: int
    teacher_train: Any = None
    tokenizer: Any = None
    input_shape: tuple[int, ...] = ()
    augmentation: Mapping[str, Any] | None = None
    more_tests: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    show: Callable[[Batch], Any] | None = None
    domains: Sequence[str] = ()
    aligner: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    stored: Callable[[Path], None] | None = None

    def say(self, notes: Sequence[str]) -> None:
        """Add notes, each once: a model may be loaded several times."""
        self.notes.extend(note for note in notes if note not in self.notes)

    def split(self, name: str) -> Any:
        """`train`, `validation` or `test`."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


class Task(Protocol):
    """A kind of problem."""

    name: str
    kind: str
    unit: str
    metric: str
    higher_is_better: bool
    baseline: str
    """The method that trains a model on the data alone: a teacher that is trained first is trained by it."""
    preflight_examples: int
    """How many validation examples the check before a run looks at."""
    start_data: Mapping[str, Any]
    """Keys of `data` that name the part which a model that is trained first sees."""
    model_options: frozenset[str]
    """Keys that `options` of teacher and student may hold."""
    mixes: bool
    """Whether several teachers may answer as one: rows are classes."""

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """The recipe with this task's defaults where it is silent."""
        ...

    def prepare(self, recipe: Any) -> Prepared:
        """Read the data, and for text agree on the tokenizer."""
        ...

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        """Build or load a model for this data; `source` stands in for the recipe's name: a folder, or a module."""
        ...

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """`{"rows": …, "metrics": {…}, …}` of one split, deterministic, with every module left in its mode."""
        ...

    def oracle(self, recipe: Mapping[str, Any], role: str) -> Source:
        """Who writes in a role of a procedure where its model is called `oracle`: the embedded world's own."""
        ...


class TaskDefaults:
    """What most tasks answer alike."""

    baseline = "sft"
    preflight_examples = 256
    start_data: Mapping[str, Any] = MappingProxyType({})
    model_options: frozenset[str] = frozenset()
    mixes = False
    name: str

    def oracle(self, recipe: Mapping[str, Any], role: str) -> Source:
        """None, where the task's data have no world of their own."""
        raise InputError(f"Task {self.name!r} has no oracle for {role}: name a model, or another task.")


class LabelledTask(TaskDefaults):
    """Tasks whose rows are classes with labels are judged alike."""

    kind: str
    mixes = True

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """Accuracy, NLL, calibration; fidelity beside a teacher."""
        return evaluate(student, teacher, loader, kind=self.kind)


def merged(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `defaults`, one level deep."""
    return {**defaults, **values}
