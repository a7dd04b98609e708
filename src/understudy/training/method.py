"""The interface of a method: a typed, frozen configuration, and one function from model outputs to named loss terms.

A *row* is the unit that the loss is averaged over: an image, a target token, a list of candidates. A method gets only the
rows that count, already aligned with their labels: padding and ignored positions are removed, the causal shift is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from understudy.data import Batch
from understudy.data.numeric_columns import Column
from understudy.models import ModelAdapter, ModelOutput
from understudy.teachers import Teacher
from understudy.training.alarm import Alarm
from understudy.training.auxiliary import AuxiliaryContext, AuxiliaryOptimizer
from understudy.training.on_policy import OnPolicy
from understudy.training.order import Sampling
from understudy.training.phases import Phase
from understudy.training.reduction import Term
from understudy.training.setup import SetupContext
from understudy.training.shapes import Shapes

TeacherUse = Literal["none", "optional", "setup", "outputs", "calls"]


@dataclass(frozen=True)
class Requirements:
    """What a method needs of a run, given its options.

    Args:
        teacher: how the teacher is used. `none`: not at all. `optional`: before training, if the recipe names one.
            `setup`: only before training. `outputs`: `loss` gets its outputs for every micro-batch. `calls`: the method
            calls `state.teacher` itself in every step, with its own inputs, and `loss` gets no outputs.
        features, teacher_features: whether outputs must hold the hidden state before the head, of student and teacher.
        teacher_layers: whether `taps` reads inner layers of the teacher; its model must then run in this process.
        teacher_classes: whether the teacher's classes must be those of the data; not for a method that reads its inner layers
            alone. Its head may then be of other classes, or new.
        teacher_autocast: whether the teacher runs in the mixed precision of the training steps: for a loss that compares it
            with a network which starts as its copy. Else it runs in the dtype of its weights.
        teacher_model: whether `setup` runs the teacher's model on every example; a cache or server cannot replace it.
        members: names of models that `setup` reads one by one; the recipe gives them in `teacher.members`.
        temperature: of the teacher's probabilities; a cache or server must hold probabilities at this temperature.
        support: what a capture stores of the teacher's outputs by default, if the method needs more than the usual.
        splits: those about whose examples the teacher is asked, and which a capture stores by default.
    """

    teacher: TeacherUse = "outputs"
    features: bool = False
    teacher_features: bool = False
    teacher_layers: bool = False
    teacher_classes: bool = True
    teacher_autocast: bool = False
    teacher_model: bool = False
    members: tuple[str, ...] = ()
    temperature: float = 1.0
    support: str | None = None
    splits: tuple[str, ...] = ("train",)

    @property
    def needs_teacher(self) -> bool:
        """Whether a recipe must name a teacher."""
        return self.teacher in ("setup", "outputs", "calls")

    @property
    def in_steps(self) -> bool:
        """Whether training steps use the teacher."""
        return self.teacher in ("outputs", "calls")

    @property
    def names(self) -> tuple[str, ...]:
        """The requirements by name, as the catalogue lists them."""
        held = {"teacher": self.needs_teacher, "features": self.features, "teacher_features": self.teacher_features}
        return tuple(sorted(name for name, needed in held.items() if needed))


@dataclass(frozen=True)
class Role:
    """A model that a procedure asks, beside teacher and student; a recipe names it in `roles`.

    Args:
        does: what it is asked for, as the rest of a sentence: `judges two answers`.
        required: the method cannot do without. many: several models may have the role (`roles.NAME.members`).
    """

    does: str
    required: bool = True
    many: bool = False


class MethodState(Protocol):
    """State that a method updates from step to step, such as a schedule or a running mean. Checkpoints store it."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def logs(self) -> dict[str, float]: ...


@dataclass
class TrainState:
    """What a method may read during training.

    Args:
        modules: the method's own modules.
        companions: its frozen modules, from `Method.companions`.
        tables: the tensors that `setup` returned.
        columns: numbers per example or token that `setup` added, by name.
        taps: the student's tapped layers, by name, for methods that enter one.
        context: the argument of `setup`.
        student: the student, for methods that run it on more than the batch.
        teacher: the teacher, for methods that call it; `None` without one.
        on_policy: how texts are written during training; `None` if none are.
        phase: name of the present phase; `step` and `total` then count its steps only.
        method_state: what `Method.init_state` returned.
        update_sums: what `Method.update_sums` returned, summed over the present update.
        step: optimizer steps done.
        total: optimizer steps of the run.
        seed: of the run.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    companions: Mapping[str, nn.Module] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Column] = field(default_factory=dict)
    taps: Mapping[str, nn.Module] = field(default_factory=dict)
    context: SetupContext | None = None
    student: ModelAdapter | None = None
    teacher: Teacher | None = None
    on_policy: OnPolicy | None = None
    method_state: Any = None
    update_sums: Mapping[str, Tensor] = field(default_factory=dict)
    phase: str = ""
    step: int = 0
    total: int = 1
    seed: int = 0


class Method(BaseModel):
    """Base class of methods. A subclass is one file: it sets the class attributes below and implements `loss`.

    Class attributes: `name` (on the command line), `paper` (catalogue number, `None` for a baseline), `kinds` (kinds of
    task that it trains on: `classification` where rows are examples with a class, `image` where these must be images),
    `cost` (per step, one line), `page` (`when` to use it, when `not`, and `deviations` from the paper), `example` (recipe keys
    that the example on its page has beside `method`; by default the first task that fits, with its own data and models),
    `defaults` (of recipe keys such as `on_policy` and `trainer`, below the recipe's own), `variants` (an option whose values
    are also names of methods: `method=kto` is `dpo` with that value), `roles` (the models
    that a pipeline uses beside teacher and student, by name), `used_with` (options that have an effect only with some values
    of another one, or with one of several, as `{"beta": {"divergence": ("jsd",)}}`; elsewhere a value that is not the default
    is refused), `value_kinds` (values of options that work on some of `kinds` alone, as
    `{"score": {"detector": frozenset({"text"})}}`; on other tasks a recipe is refused).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    paper: ClassVar[int | None] = None
    kinds: ClassVar[frozenset[str]] = frozenset({"classification", "text"})
    cost: ClassVar[str] = "one teacher forward and one student forward and backward a row"
    page: ClassVar[Mapping[str, str]] = {}
    example: ClassVar[Mapping[str, Any]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}
    variants: ClassVar[str | None] = None
    roles: ClassVar[Mapping[str, Role]] = {}
    used_with: ClassVar[Mapping[str, Mapping[str, Sequence[Any]]]] = {}
    value_kinds: ClassVar[Mapping[str, Mapping[Any, frozenset[str]]]] = {}

    @model_validator(mode="after")
    def _are_used(self) -> Self:
        for name, others in self.used_with.items():
            for other, values in others.items():
                said = getattr(self, other)
                several = said if isinstance(said, tuple) else (said,)
                if not set(several) & set(values) and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} has no effect with {other}={' + '.join(map(str, several))}; it belongs to "
                        f"{', '.join(map(str, values))}"
                    )
        return self

    @property
    def requires(self) -> Requirements:
        """What the method needs of a run, given its options."""
        return Requirements()

    def check_trainer(self, trainer: Mapping[str, Any]) -> None:
        """Raise an `InputError` for a recipe's arguments of the trainer that the options do not go with."""

    def check_data(self, data: Any) -> None:
        """Raise an `InputError` for data that the method cannot learn from; `understudy check` and every run ask before a model
        is loaded, or trained first.

        Args:
            data: their `splits`, `tokenizer` and `domains`, as a `SetupContext` has them too.
        """

    # -- before training ----------------------------------------------------------------------------------------

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """Compute what training needs beforehand: run the models, add columns to the examples. It is called again on
        resume, so expensive work goes through `context.once`. The tensors it returns become `state.tables`."""
        return {}

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        """The student as it is trained, for example with another head. Called after `setup`."""
        return student

    def taps(self, side: Literal["student", "teacher"], model: ModelAdapter, batch: Batch) -> Mapping[str, nn.Module]:
        """Inner layers whose outputs `loss` reads, by names that the method chooses. `batch` is an example of a batch."""
        return {}

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        """Trainable modules of the method. They are optimised and checkpointed with the student, and not exported."""
        return {}

    def companions(self, student: ModelAdapter) -> dict[str, nn.Module]:
        """Frozen modules that are checkpointed, for example a moving average. They stay in evaluation mode and are not
        exported."""
        return {}

    def init_state(self, total: int) -> MethodState | None:
        """The method's state at the start of a run of `total` optimizer steps, or `None`."""
        return None

    def auxiliary_optimizers(self) -> Mapping[str, AuxiliaryOptimizer]:
        """Optimisers, by name, of modules that have their own objective."""
        return {}

    def phases(self) -> Sequence[Phase]:
        """Parts of the run in order, each with its own data, training arguments and frozen modules. Empty: one phase."""
        return ()

    def on_phase_begin(self, state: TrainState) -> None:
        """Called where a phase begins, with the weights that the one before left. It may change weights in place. A run that is
        resumed inside the phase calls it too, and then reads its checkpoint."""

    # -- each epoch ---------------------------------------------------------------------------------------------

    @property
    def epoch_steps(self) -> int | None:
        """Optimizer steps per epoch; `None` means one pass over the data."""
        return None

    def sampling(self, state: TrainState) -> Sampling | None:
        """How the next epoch draws its examples (a subset, weights, several streams); `None` means each example once.
        Called at the start of each epoch. It may read the data through `state.context`, and read
        and change `state.method_state`. Checkpoints store the result."""
        return None

    # -- each update --------------------------------------------------------------------------------------------

    def update_schedule(self, state: TrainState) -> Sequence[str]:
        """The optimisers that step in this update, in order: names of auxiliary optimisers, then `"student"` or not. It may
        read `state.method_state`."""
        return ("student",)

    def auxiliary_loss(self, name: str, context: AuxiliaryContext, state: TrainState) -> Iterator[dict[str, Term]]:
        """Terms of the loss that an auxiliary optimiser minimises, for each micro-batch of `context.batches`."""
        raise NotImplementedError

    def update_sums(self, batch: Batch, state: TrainState) -> Mapping[str, Tensor]:
        """What the loss of each micro-batch depends on and is a sum over the whole update: the summands of one micro-batch,
        without gradient and with the student in evaluation mode. They are summed over all micro-batches and ranks before
        the update's first loss reads them in `state.update_sums`."""
        return {}

    def transform_batch(self, batch: Batch, state: TrainState) -> Batch:
        """Change the inputs of a micro-batch before student and teacher get it, for example add noise. Rows and ids
        stay."""
        return batch

    def counts(self, batch: Batch) -> dict[str, float]:
        """Divisors of terms that are not divided by the number of rows, by the term's name, for this micro-batch."""
        return {}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        """The named terms of the loss, each with one value per row, not reduced.

        Args:
            student: outputs of the student for the rows that count.
            teacher: the same of the teacher, without gradient; `None` unless `requires.teacher` is `outputs`.
            batch: the micro-batch; `batch.row_labels` are the labels of the rows.
            state: the present state of training.
        """
        raise NotImplementedError

    @property
    def merges_gradients(self) -> bool:
        """Whether `merge` gets the gradient of each term separately."""
        return False

    def merge(self, gradients: Mapping[str, list[Tensor | None]], owners: Sequence[str]) -> list[Tensor | None]:
        """Combine the gradients of the terms of an update into one gradient per parameter.

        Args:
            gradients: by term, its gradient (weight included) for each parameter; `None` where it does not depend on it.
            owners: for each parameter the part it belongs to: `"backbone"`, `"head"`, or a name from `modules`.

        Returns:
            The gradient of each parameter.
        """
        raise NotImplementedError

    def on_pre_optimizer_step(self, state: TrainState, means: Mapping[str, float]) -> None:
        """Called on every rank after the backward pass of an optimizer step that has rows, with each term's mean over the
        whole update."""

    def logged(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """The values to log for an update: the means of its terms, and values computed from them."""
        return means

    def alarm(self, history: Sequence[Mapping[str, Any]]) -> Alarm | None:
        """What is wrong with training by the trainer's log of the present phase, or `None`. It is asked on every rank after
        each log, and where a run resumes, so it must depend on `history` alone. The first log with an alarm gives a warning;
        an alarm may end the phase as early stopping does."""
        return None

    def on_step_end(self, state: TrainState) -> None:
        """Called after each optimizer step; `state.step` already counts it."""

    def on_train_end(self, state: TrainState) -> None:
        """Called where a phase, or a run without phases, has ended: after its last step, or after early stopping, with the
        weights of the best evaluation where these are kept. A run that is resumed at its end calls it again."""

    # -- evaluation and export ----------------------------------------------------------------------------------

    def eval_model(self, student: ModelAdapter, state: TrainState) -> ModelAdapter:
        """The student with its present weights as validation evaluates it: an ordinary model of the task."""
        return student

    def export(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        """The trained student as it is saved and evaluated: an ordinary model of the task."""
        return student

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """Results to report beside the task's metrics, after training: `metrics` (name to number), `pictures`
        (caption to an array `[height, width, 3]` of uint8) and `tables` (each of `title`, `headings` and `rows`)."""
        return {}
