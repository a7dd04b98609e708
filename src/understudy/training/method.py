"""The interface of a method: a typed, frozen configuration and one function from rows to named terms.

A *row* is whatever the task divides by: an image, a target token. The engine hands a method only the rows that
count, already aligned with their labels, so a method never sees a mask, a shift or a padded position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from understudy.data import Batch
from understudy.models import ModelAdapter, ModelOutput
from understudy.teachers import Teacher
from understudy.training.auxiliary import AuxiliaryContext, AuxiliaryOptimizer
from understudy.training.setup import SetupContext
from understudy.training.shapes import Shapes


class Term(NamedTuple):
    """One named part of the loss.

    Args:
        values: `[rows]`, differentiable and not reduced.
        weight: factor of this term in the total.
    """

    values: Tensor
    weight: float = 1.0


class MethodState(Protocol):
    """What a method carries from step to step and a checkpoint must hold (a schedule, a running mean)."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, method_state: Mapping[str, Any]) -> None: ...
    def logs(self) -> dict[str, float]: ...


@dataclass
class TrainState:
    """What is alive during a run.

    Args:
        modules: own modules. companions: frozen ones that are checkpointed. tables: what the data stage returned.
        student: the student's rows, for methods that show it more than the batch. teacher: likewise; `None` without.
        state: as `Method.state` made it. step: optimizer steps done. total: of the run. seed: of the run.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    companions: Mapping[str, nn.Module] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    student: ModelAdapter | None = None
    teacher: Teacher | None = None
    method_state: Any = None
    step: int = 0
    total: int = 1
    seed: int = 0


class Method(BaseModel):
    """Base of all methods. Subclass it in one file, state the facts below, and write `loss`.

    Class facts: `name` (as on the command line), `paper` (catalogue number, `None` for a baseline), `needs`
    (of `"teacher"`, `"features"`, `"teacher_features"`), `kinds` (batch kinds it can train on), `cost` (one line, per step),
    `queries` (it asks `state.teacher` itself, about other inputs than the student's; `loss` is then given no teacher's rows).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    paper: ClassVar[int | None] = None
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})
    kinds: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    cost: ClassVar[str] = "one teacher forward and one student forward and backward a row"
    page: ClassVar[Mapping[str, str]] = {}
    queries: ClassVar[bool] = False

    @property
    def asks(self) -> frozenset[str]:
        """What each step asks for with these options: `needs`, less what the data stage has answered for good."""
        return self.needs

    @property
    def takes_teacher(self) -> bool:
        """Whether a task's default teacher stands in where the recipe names none; it is trained and loaded for no other."""
        return "teacher" in self.needs | self.asks

    def taps(self, side: Literal["student", "teacher"], rows: ModelAdapter, batch: Batch) -> Mapping[str, nn.Module]:
        """Inner layers of one side to read, by a name of the method's own. `batch` is an example to find them with."""
        return {}

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        """Own trainable modules. They are optimised and checkpointed with the student, and stay behind at export."""
        return {}

    def init_state(self, total: int) -> MethodState | None:
        """State for a run of `total` optimizer steps, or `None`."""
        return None

    def companions(self, student: ModelAdapter) -> dict[str, nn.Module]:
        """Frozen modules that a checkpoint must hold (a moving anchor). They stay in evaluation mode and behind."""
        return {}

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """Work on the data before training: read the models, add columns to the examples. It is called again on resume,
        so what is dear goes through `context.once`. The tensors it returns are `state.tables`."""
        return {}

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        """The student as it is trained, for example with another head; called after `stage`."""
        return student

    def eval_model(self, student: ModelAdapter, state: TrainState) -> ModelAdapter:
        """The student, with the weights it has, as it is judged during training: an ordinary model of the task."""
        return student

    def export(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        """The trained student as it is saved and judged: an ordinary model of the task again."""
        return student

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """What to report beside the task's metrics, once trained: `metrics` (name to number) and `pictures` (caption to
        an array `[height, width, 3]` of uint8)."""
        return {}

    def auxiliary_optimizers(self) -> Mapping[str, AuxiliaryOptimizer]:
        """Parts with an optimiser of their own, by name."""
        return {}

    def update_schedule(self, state: TrainState) -> Sequence[str]:
        """Who moves in this update, in order: players, and `"student"` last or not at all. It may read `state.state`."""
        return ("student",)

    def auxiliary_loss(self, name: str, context: AuxiliaryContext, state: TrainState) -> Iterator[dict[str, Term]]:
        """Terms of a player's objective, to be minimised, for each micro-batch of `scene.batches`."""
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

    def on_pre_optimizer_step(self, state: TrainState, means: Mapping[str, float]) -> None:
        """Called once per optimizer step that has rows, on every rank, with each term's mean over the whole update."""

    def on_step_end(self, state: TrainState) -> None:
        """Called after each optimizer step, when `state.step` counts it already."""

    @property
    def merges_gradients(self) -> bool:
        """Whether `merge` must see the gradient of each term apart."""
        return False

    def merge(self, gradients: Mapping[str, list[Tensor | None]], owners: Sequence[str]) -> list[Tensor | None]:
        """Merge the whole update's gradients, one list per term (weight included), aligned with `owners`.

        `owners[i]` names the part a parameter belongs to: `"backbone"`, `"head"`, or one of `modules`.
        """
        raise NotImplementedError
