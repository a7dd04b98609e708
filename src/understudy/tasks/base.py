"""The interface of a task: data, models and defaults."""

from __future__ import annotations

import copy
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
"""Prefix of the name of a model given as a module."""

COPY = "teacher"
"""Name of a student that starts as a copy of the teacher."""

Collate = Callable[[Any], dict[str, Any]]


@dataclass
class Prepared:
    """Data ready to train on.

    Args:
        train, validation, test: indexable examples that `collate` turns into the tensors of a `Batch`.
        teacher_train: the examples that a teacher which is trained first may use.
        classes: images: number of classes; text: size of the vocabulary.
        more_tests: further test sets by name (`test_shifted`), evaluated like `test`.
        notes: what a reader should know (splits made, rows dropped, truncation), one sentence each.
        warnings: likewise, of what may be wrong.
        hashes: content hashes for the run folder.
        domains: names of the examples' domains, indexed by `Batch.domains`; empty if the data have none.
        aligner: the alignment of the teacher's tokens with the student's, if it has another tokenizer.
        facts: what the task's own `model` needs to know of the data.
        stored: called with the folder where a run, or a comparison, keeps results that are expensive to compute.
        exact: whether a classifier that is loaded must have these classes.
        measure: a further measurement of a finished student, beside the teacher where it runs: `{"metrics", "table"}`.
        win_rate: share of a finished student's samples whose true reward is above that of one of itself before training, where
            a reward can be checked; a tie is a half.
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
    exact: bool = True
    measure: Callable[[ModelAdapter, ModelAdapter | None], dict[str, Any]] | None = None
    win_rate: Callable[[ModelAdapter, ModelAdapter], float] | None = None

    @property
    def splits(self) -> dict[str, Any]:
        """The examples of train, validation and test by name."""
        return {name: self.split(name) for name in ("train", "validation", "test")}

    def say(self, notes: Sequence[str]) -> None:
        """Add notes, each once, since a model may be loaded several times."""
        self.notes.extend(note for note in notes if note not in self.notes)

    def of_any_classes(self) -> Prepared:
        """The same data for a classifier whose classes may be others."""
        found = copy.copy(self)
        found.exact, found.facts = False, {**self.facts, "names": []}
        return found

    def split(self, name: str) -> Any:
        """`train`, `validation` or `test`."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


class Task(Protocol):
    """The interface of a task."""

    name: str
    kind: str
    """What its batches are, as a method's `kinds` says it."""
    unit: str
    metric: str
    higher_is_better: bool
    baseline: str
    """The method that trains a model on the data without a teacher, used for teachers that are trained first."""
    preflight_examples: int
    """Number of validation examples of the pre-flight check."""
    model_options: frozenset[str]
    """Keys that `options` of teacher and student may hold."""
    mixes: bool
    """Whether the teacher may be an ensemble, which needs class probabilities."""
    fidelity: tuple[str, str]
    """Metrics that say how often the student answers as its teacher does, and how closely it gets there."""

    @property
    def kinds(self) -> frozenset[str]:
        """All kinds that its batches are: `kind`, and more general ones."""
        ...

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """The recipe with this task's defaults for missing keys."""
        ...

    def first_data(self, data: Mapping[str, Any], side: str) -> dict[str, Any]:
        """A recipe's `data` for the run that first trains its `teacher`, or its `student`'s initial weights."""
        ...

    def prepare(self, recipe: Any) -> Prepared:
        """Read the data, and for text choose the tokenizer."""
        ...

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        """Build or load a model for this data; `source`, a folder or a module, replaces the recipe's name."""
        ...

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """`{"rows": …, "metrics": {…}, …}` of one split, deterministic; the mode of every module is restored."""
        ...

    def oracle(self, recipe: Mapping[str, Any], role: str) -> Source:
        """Who writes in a role of a procedure where its model is called `oracle`: the embedded world's own."""
        ...


class TaskDefaults:
    """Defaults that most tasks share."""

    baseline = "sft"
    preflight_examples = 256
    start_data: Mapping[str, Any] = MappingProxyType({})
    """Keys of `data` that select the examples for a model that is trained first."""
    model_options: frozenset[str] = frozenset()
    kind: str
    mixes = False
    fidelity: tuple[str, str] = ("agreement", "kl")
    name: str

    def first_data(self, data: Mapping[str, Any], side: str) -> dict[str, Any]:
        return {**data, **self.start_data}

    def oracle(self, recipe: Mapping[str, Any], role: str) -> Source:
        """None, where the task's data have no world of their own."""
        raise InputError(f"Task {self.name!r} has no oracle for {role}: name a model, or another task.")

    @property
    def kinds(self) -> frozenset[str]:
        """`kind` alone."""
        return frozenset({self.kind})


class LabelledTask(TaskDefaults):
    """Base of tasks whose rows have class labels."""

    mixes = True

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """Accuracy, NLL, calibration; with a teacher also fidelity."""
        return evaluate(student, teacher, loader, kind=self.kind)


def merged(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` merged over `defaults`, one level deep."""
    return {**defaults, **values}
