"""The interface of a method: a typed, frozen configuration and one function from model outputs to named loss terms.

A *row* is whatever the task divides by: an image, a target token, a list of candidates. The engine hands a method only
the rows that count, already aligned with their labels, so a method never sees a mask, a shift or a padded position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from understudy.data import Batch
from understudy.data.numeric_columns import Column
from understudy.models import ModelAdapter, ModelOutput
from understudy.teachers import Teacher
from understudy.training.auxiliary import AuxiliaryContext, AuxiliaryOptimizer
from understudy.training.order import Sampling
from understudy.training.phases import Phase
from understudy.training.reduction import Term
from understudy.training.setup import SetupContext
from understudy.training.shapes import Shapes

TeacherUse = Literal["none", "optional", "setup", "outputs", "calls"]


@dataclass(frozen=True)
class Requirements:
    """What a method needs of a run, with the options it has.

    Args:
        teacher: `none`; `optional`: read before training if the recipe names one; `setup`: read before training alone;
            `outputs`: its outputs for every micro-batch are given to `loss`; `calls`: the method calls `state.teacher`
            itself in every step, with inputs of its own, and `loss` is given no outputs.
        features, teacher_features: the hidden state before the head, of either side.
        teacher_layers: `taps` reads inner layers of the teacher, so its model must run here.
        teacher_model: `setup` asks the teacher's own model about every example, which a cache or server cannot stand in for.
        members: names of models that `setup` reads one by one: the recipe gives them in `teacher.members`, and they need not mix.
        temperature: at which the teacher's probabilities are taken; a cache or server must hold them at this one.
    """

    teacher: TeacherUse = "outputs"
    features: bool = False
    teacher_features: bool = False
    teacher_layers: bool = False
    teacher_model: bool = False
    members: tuple[str, ...] = ()
    temperature: float = 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether a recipe must name a teacher."""
        return self.teacher in ("setup", "outputs", "calls")

    @property
    def in_steps(self) -> bool:
        """Whether training steps ask the teacher."""
        return self.teacher in ("outputs", "calls")

    @property
    def names(self) -> tuple[str, ...]:
        """As the catalogue lists them."""
        held = {"teacher": self.needs_teacher, "features": self.features, "teacher_features": self.teacher_features}
        return tuple(sorted(name for name, needed in held.items() if needed))


class MethodState(Protocol):
    """What a method carries from step to step and a checkpoint must hold (a schedule, a running mean)."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def logs(self) -> dict[str, float]: ...


@dataclass
class TrainState:
    """What a method may read during training.

    Args:
        modules: the method's own modules. companions: frozen ones that are checkpointed. tables: what `setup` returned.
        columns: numbers by example or token that `setup` added. context: what `setup` was given.
        student: the student, for methods that show it more than the batch. teacher: likewise; `None` without.
        phase: name of the phase; step and total are then of the phase.
        method_state: as `Method.init_state` made it. step: optimizer steps done. total: of the run. seed: of the run.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    companions: Mapping[str, nn.Module] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Column] = field(default_factory=dict)
    context: SetupContext | None = None
    student: ModelAdapter | None = None
    teacher: Teacher | None = None
    method_state: Any = None
    phase: str = ""
    step: int = 0
    total: int = 1
    seed: int = 0


class Method(BaseModel):
    """Base of all methods. Subclass it in one file, state the facts below, and write `loss`.

    Class facts: `name` (as on the command line), `paper` (catalogue number, `None` for a baseline), `kinds` (batch kinds it
    can train on), `cost` (one line, per step), `page` (when to use it, when not, deviations from the paper),
    `variants` (the option whose values are methods under names of their own: `method=kto` is `dpo` with it).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    paper: ClassVar[int | None] = None
    kinds: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    cost: ClassVar[str] = "one teacher forward and one student forward and backward a row"
    page: ClassVar[Mapping[str, str]] = {}
    variants: ClassVar[str | None] = None

    @property
    def requires(self) -> Requirements:
        """What the method needs of a run with these options."""
        return Requirements()

    # -- before training ----------------------------------------------------------------------------------------

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """Work on the data before training: read the models, add columns to the examples. It is called again on resume,
        so what is expensive goes through `context.once`. The tensors it returns are `state.tables`."""
        return {}

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        """The student as it is trained, for example with another head; called after `setup`."""
        return student

    def taps(self, side: Literal["student", "teacher"], model: ModelAdapter, batch: Batch) -> Mapping[str, nn.Module]:
        """Inner layers of one side to read, by a name of the method's own. `batch` is an example to find them with."""
        return {}

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        """Own trainable modules. They are optimised and checkpointed with the student, and stay behind at export."""
        return {}

    def companions(self, student: ModelAdapter) -> dict[str, nn.Module]:
        """Frozen modules that a checkpoint must hold (a moving anchor). They stay in evaluation mode, and behind."""
        return {}

    def init_state(self, total: int) -> MethodState | None:
        """State for a run of `total` optimizer steps, or `None`."""
        return None

    def auxiliary_optimizers(self) -> Mapping[str, AuxiliaryOptimizer]:
        """Optimisers of modules that have an objective of their own, by name."""
        return {}

    def phases(self) -> Sequence[Phase]:
        """Parts of the run with data, arguments and frozen parts of their own, in order; a single one if empty."""
        return ()

    # -- each epoch ---------------------------------------------------------------------------------------------

    @property
    def epoch_steps(self) -> int | None:
        """Optimizer steps of an epoch; one pass over the data if `None`."""
        return None

    def sampling(self, state: TrainState) -> Sampling | None:
        """Called as each epoch begins: what it draws from (a subset, weights, several streams); `None` for each example once.
        It may look at the data through `state.context`. A checkpoint holds the choice."""
        return None

    # -- each update --------------------------------------------------------------------------------------------

    def update_schedule(self, state: TrainState) -> Sequence[str]:
        """Which parameters this update moves, in order: auxiliary optimisers by name, and `"student"` last or not at all.
        It may read `state.method_state`."""
        return ("student",)

    def auxiliary_loss(self, name: str, context: AuxiliaryContext, state: TrainState) -> Iterator[dict[str, Term]]:
        """Terms of an auxiliary optimiser's loss, to be minimised, for each micro-batch of `context.batches`."""
        raise NotImplementedError

    def transform_batch(self, batch: Batch, state: TrainState) -> Batch:
        """The batch as both sides see it, at each step: with noise added, a part left out. Rows and ids stay."""
        return batch

    def counts(self, batch: Batch) -> dict[str, float]:
        """What terms are divided by, where that is not the number of rows: by the term's name, for this batch."""
        return {}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        """Named terms, each with one value per row and no reduction."""
        raise NotImplementedError

    @property
    def merges_gradients(self) -> bool:
        """Whether `merge` must see the gradient of each term apart."""
        return False

    def merge(self, gradients: Mapping[str, list[Tensor | None]], owners: Sequence[str]) -> list[Tensor | None]:
        """Merge the whole update's gradients, one list per term (weight included), aligned with `owners`.

        `owners[i]` names the part a parameter belongs to: `"backbone"`, `"head"`, or one of `modules`.
        """
        raise NotImplementedError

    def on_pre_optimizer_step(self, state: TrainState, means: Mapping[str, float]) -> None:
        """Called once per optimizer step that has rows, on every rank, after the backward pass, with each term's mean over
        the whole update."""

    def logged(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """The means of an update as they are logged, with what follows from several of them."""
        return means

    def on_step_end(self, state: TrainState) -> None:
        """Called after each optimizer step, when `state.step` counts it already."""

    # -- evaluation and export ----------------------------------------------------------------------------------

    def eval_model(self, student: ModelAdapter, state: TrainState) -> ModelAdapter:
        """The student, with the weights it has, as it is evaluated during training: an ordinary model of the task."""
        return student

    def export(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        """The trained student as it is saved and evaluated: an ordinary model of the task again."""
        return student

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """What to report beside the task's metrics, once trained: `metrics` (name to number) and `pictures` (caption to
        an array `[height, width, 3]` of uint8)."""
        return {}
