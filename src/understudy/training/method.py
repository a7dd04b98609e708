"""The interface of a method: a typed, frozen configuration and one function from rows to named terms.

A *row* is whatever the task divides by: an image, a target token. The engine hands a method only the rows that
count, already aligned with their labels, so a method never sees a mask, a shift or a padded position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from understudy.data import Batch
from understudy.models import RowModel, Rows
from understudy.training.shapes import Shapes


class Term(NamedTuple):
    """One named part of the loss.

    Args:
        values: `[rows]`, differentiable and not reduced.
        weight: factor of this term in the total.
    """

    values: Tensor
    weight: float = 1.0


class State(Protocol):
    """What a method carries from step to step and a checkpoint must hold (a schedule, a running mean)."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def logs(self) -> dict[str, float]: ...


@dataclass
class Live:
    """What is alive during a run: own modules, state, and where in the run we are."""

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    state: Any = None
    step: int = 0
    total: int = 1


class Method(BaseModel):
    """Base of all methods. Subclass it in one file, state the facts below, and write `loss`.

    Class facts: `name` (as on the command line), `paper` (catalogue number, `None` for a baseline), `needs`
    (of `"teacher"`, `"features"`, `"teacher_features"`), `kinds` (batch kinds it can train on), `cost` (one line, per step).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    paper: ClassVar[int | None] = None
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})
    kinds: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    cost: ClassVar[str] = "one teacher forward and one student forward and backward a row"
    page: ClassVar[Mapping[str, str]] = {}

    def taps(self, side: Literal["student", "teacher"], rows: RowModel, batch: Batch) -> Mapping[str, nn.Module]:
        """Inner layers of one side to read, by a name of the method's own. `batch` is an example to find them with."""
        return {}

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        """Own trainable modules. They are optimised and checkpointed with the student, and stay behind at export."""
        return {}

    def state(self, total: int) -> State | None:
        """State for a run of `total` optimizer steps, or `None`."""
        return None

    def loss(self, student: Rows, teacher: Rows | None, batch: Batch, live: Live) -> dict[str, Term]:
        """Named terms, each with one value per row and no reduction."""
        raise NotImplementedError

    def updated(self, live: Live, means: Mapping[str, float]) -> None:
        """Called once per optimizer step, on every rank, with each term's mean over the whole update."""

    @property
    def merges_gradients(self) -> bool:
        """Whether `merge` must see the gradient of each term apart."""
        return False

    def merge(self, gradients: Mapping[str, list[Tensor | None]], owners: Sequence[str]) -> list[Tensor | None]:
        """Merge the whole update's gradients, one list per term (weight included), aligned with `owners`.

        `owners[i]` names the part a parameter belongs to: `"backbone"`, `"head"`, or one of `modules`.
        """
        raise NotImplementedError
