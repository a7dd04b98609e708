"""35. Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation (ICLR 2024).

How far to trust the teacher and how far the label is learned for each example, from where student S, teacher P, label G
and the teacher's average for that label T̄ lie to each other:

    α_i = σ(net_ω(S, P, G, T̄, their distances)),    L(θ, ω) = mean_i [ α_i τ² KL_i + (1 − α_i) CE_i ]

θ minimises L on the training data with α held still. ω minimises the cross-entropy of a clean validation set after one
virtual step of θ on L.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from understudy.data import IGNORE, Batch
from understudy.errors import InputError
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.geometry import class_means, class_sums, triangle_features
from understudy.models import ModelOutput, evaluating
from understudy.streaming import rowwise
from understudy.targets import Target
from understudy.teachers import LocalTeacher
from understudy.teachers.cache.store import content_key
from understudy.training import (
    AuxiliaryContext,
    AuxiliaryOptimizer,
    Method,
    Requirements,
    SetupContext,
    Shapes,
    Term,
    TrainState,
)
from understudy.training.bilevel import weight_gradients

log = logging.getLogger(__name__)


class TGeoKD(Method):
    """A weight between teacher and label for each example, learned against a validation set."""

    name = "tgeo-kd"
    paper = 35
    kinds = frozenset({"classification"})
    cost = (
        "as kd; an update in which the ratio network moves adds three student forwards and one backward a row, one "
        "teacher forward a row, and one student forward and backward a validation example"
    )
    page: ClassVar[dict[str, str]] = {
        "when": "The teacher is wrong on some examples and the labels on others, and a small clean validation set is at "
        "hand: ten examples a class or more.",
        "not": "Without clean validation data: the weights follow whatever the validation set says, noise included. "
        "With a good teacher and clean labels one weight for all is cheaper. Where the validation examples may be "
        "trained on, labels alone with them added did better in our claim. A ratio network that learns too fast (0.02 in "
        "our claim) can drive every weight to 0, from where it does not return: watch `alpha` in the log.",
        "deviations": "The paper names no estimator for the outer gradient, and the released code never moves the ratio "
        "network. Here it is exact for one virtual SGD step over the whole update, with the student in evaluation mode; "
        "the student's own step uses its predictions in training mode. The cross-entropy reads logits, where the "
        "released code reads probabilities. The class average is over the whole training set, where the released code "
        "takes the batch. The ratio network's Adam runs at 5e-3 without decay, where the released code sets 0.1 and "
        "0.05 and has no gradient. The rate of the virtual step and the number of validation examples are ours. "
        "The released code oversamples rare classes and stops after ten changes of the validation loss below 1e-5: examples are "
        "taken as they come here, and `patience` with trainer.eval_strategy, which counts evaluations without gain, ends a run "
        "early.",
    }

    temperature: float = Field(1.5, gt=0, description="τ, divides both sides' logits in the KL.")
    features: Literal["all", "vertices", "edges"] = Field("all", description="What the ratio network reads.")
    angles: bool = Field(False, description="And the angles at the student, entry by entry.")
    inter: bool = Field(True, description="And where the class average lies.")
    ratio_learning_rate: float = Field(5e-3, ge=0, description="Of the ratio network's Adam.")
    ratio_weight_decay: float = Field(0.0, ge=0, description="And its weight decay.")
    every: int = Field(1, ge=0, description="Updates between moves of the ratio network; 0 leaves it as it starts.")
    virtual: Literal["all", "head"] = Field("all", description="What the virtual step moves; `head` is cheaper.")
    virtual_rate: float = Field(0.1, ge=0, description="η of the virtual step; with SGD the student's learning rate.")
    validation: int | None = Field(
        256, ge=1, description="Validation examples of a move, best ten a class; all with null."
    )

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher_model=True, temperature=self.temperature)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        if context.classes < 2:
            raise InputError(
                f"Method 'tgeo-kd' weighs teacher against label, and the data has {context.classes} class."
            )
        if self.every:
            self._check_validation(context)
        tables = context.once("class-means", lambda: _class_means(context))
        absent = (tables["counts"] == 0).nonzero()[:, 0].tolist()
        if absent:
            log.warning("No training example has label %s: its class average is uniform.", ", ".join(map(str, absent)))
        if int(tables["shared"]):
            log.warning(
                "%d validation examples are also training examples: the weights are judged on what the student saw.",
                int(tables["shared"]),
            )
        return {"means": tables["means"]}

    def _check_validation(self, context: SetupContext) -> None:
        """Refuse a split that the weights cannot be judged on, and say where a move sees too little of it."""
        if not len(context.splits["validation"]):
            raise InputError("Method 'tgeo-kd' learns from a validation split, and the data has none: add one.")
        held = [(batch.ids.cpu(), batch.labels.cpu()) for batch in context.batches("validation")]
        ids, labels = (torch.cat(part) for part in zip(*held, strict=True))
        _need_labels("validation", ids, labels != IGNORE)
        least, rarest = (int(v) for v in torch.bincount(labels, minlength=context.classes).min(0))
        seen = least * min(1.0, (self.validation or len(labels)) / len(labels))
        if seen < 10:
            log.warning(
                "A move of the ratio network sees about %.2g validation examples of label %d; below ten of each the weights "
                "follow their noise: %s.",
                seen,
                rarest,
                "set options.validation higher, or null for all" if least >= 10 else "add validation examples",
            )

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        k = shapes.classes
        example = torch.zeros(1, k), torch.zeros(1, k), torch.zeros(1).long(), torch.zeros(k, k)
        width = self._read(*example).shape[-1]
        hidden = (nn.Linear(width, 32), nn.LeakyReLU(0.01), nn.Linear(32, 16), nn.LeakyReLU(0.01))
        return {"ratio": nn.Sequential(*hidden, nn.Linear(16, 1))}

    def auxiliary_optimizers(self) -> Mapping[str, AuxiliaryOptimizer]:
        return {"ratio": AuxiliaryOptimizer(("ratio",), self.ratio_learning_rate, weight_decay=self.ratio_weight_decay)}

    def update_schedule(self, state: TrainState) -> Sequence[str]:
        return ("ratio", "student") if self.every and state.step % self.every == 0 else ("student",)

    def auxiliary_loss(self, name: str, context: AuxiliaryContext, state: TrainState) -> Iterator[dict[str, Term]]:
        """Σ_i (∂J/∂α_i) α_i(ω), whose gradient in ω is that of J. J itself goes along with weight 0, for the log."""
        assert context.teacher is not None
        teachers = [context.teacher(batch) for batch in context.batches]
        with torch.no_grad():
            students = [context.student(batch) for batch in context.batches]
            alphas = [self._alpha(*side, state) for side in zip(students, teachers, context.batches, strict=True)]
        validation = context.validation(self.validation)

        def losses(rows: ModelOutput, i: int) -> Tensor:
            return torch.stack(self._losses(rows, teachers[i], context.batches[i]), -1)

        gradients, outer = weight_gradients(
            context.student,
            context.batches,
            losses,
            [torch.stack([a, 1 - a], -1) for a in alphas],
            lambda ask: rowwise(cross_entropy, ask(validation).signal, None, validation.row_labels).mean(),
            rate=self.virtual_rate,
            count=context.count,
            total=context.total,
            part=self.virtual,
        )
        for student, teacher, batch, gradient in zip(students, teachers, context.batches, gradients, strict=True):
            alpha = self._alpha(student, teacher, batch, state)
            slope = gradient[:, 0] - gradient[:, 1]
            yield {"outer": Term(context.count * slope * alpha), "validation_ce": Term(outer.expand(len(alpha)), 0.0)}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        kd, ce = self._losses(student, teacher, batch)
        with torch.no_grad():
            alpha = self._alpha(student, teacher, batch, state)
        return {"kd": Term(alpha * kd), "ce": Term((1 - alpha) * ce), "alpha": Term(alpha, 0.0)}

    def _losses(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """τ² KL and CE, `[rows]` each."""
        kd = rowwise(forward_kl, student.signal, teacher.signal, temperature=self.temperature, tau_squared=True)
        return kd, rowwise(cross_entropy, student.signal, None, batch.row_labels)

    def _read(self, student: Tensor, teacher: Target | Tensor, labels: Tensor, means: Tensor) -> Tensor:
        shown = {"vertices": self.features != "edges", "edges": self.features != "vertices"}
        return triangle_features(student, teacher, labels, means, angles=self.angles, inter=self.inter, **shown)

    def _alpha(self, student: ModelOutput, teacher: ModelOutput, batch: Batch, state: TrainState) -> Tensor:
        """The teacher's weight, `[rows]`, with gradient to the ratio network alone."""
        network = state.modules["ratio"]
        seen = self._read(student.signal.logits, teacher.signal, batch.row_labels, state.tables["means"])
        with torch.autocast(
            seen.device.type, enabled=False
        ):  # the student's step has the weights that the auxiliary loss evaluated
            return torch.sigmoid(network(seen.to(next(network.parameters()).dtype))[:, 0])

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """Mean α over the training set, and where the teacher's top class is the label and where not. Where the data
        knows the labels before noise, also where one of teacher and label is right and the other wrong."""
        assert state.student is not None and state.teacher is not None
        alphas, tops, labels = [], [], []
        with torch.no_grad(), evaluating(state.student):
            for batch in context.batches("train"):
                teacher = state.teacher(batch)
                alphas.append(self._alpha(state.student(batch), teacher, batch, state).double().cpu())
                tops.append(teacher.signal.logits.argmax(-1).cpu())
                labels.append(batch.row_labels.cpu())
        alpha, top, label = torch.cat(alphas), torch.cat(tops), torch.cat(labels)
        groups = {"alpha_agreed": top == label, "alpha_disputed": top != label}
        truth = getattr(context.splits["train"], "clean", None)
        if truth is not None:
            groups["alpha_teacher_right"] = (top == truth) & (label != truth)
            groups["alpha_label_right"] = (top != truth) & (label == truth)
        if self.every and float((alpha * (1 - alpha)).max()) < 1e-3:
            log.warning(
                "Every weight of the teacher ended at 0 or 1 (mean %.3g), where the ratio network no longer learns: lower "
                "options.ratio_learning_rate.",
                float(alpha.mean()),
            )
        metrics = {"alpha": float(alpha.mean())}
        metrics |= {name: float(alpha[rows].mean()) for name, rows in groups.items() if rows.any()}
        if {"alpha_teacher_right", "alpha_label_right"} <= metrics.keys():
            metrics["alpha_gap"] = metrics["alpha_teacher_right"] - metrics["alpha_label_right"]
        return {"metrics": metrics}


def _class_means(context: SetupContext) -> dict[str, Tensor]:
    """The teacher's average for each label, examples of each label, and examples that both splits hold."""
    teacher = LocalTeacher(context.live_teacher(), "teacher")
    sums, counts = torch.zeros(context.classes, context.classes).double(), torch.zeros(context.classes).double()
    seen: set[bytes] = set()
    for batch in context.batches("train"):
        _need_labels("training", batch.ids, batch.mask)
        part = class_sums(teacher(batch).signal, batch.row_labels, context.classes)
        sums, counts = sums + part[0].cpu(), counts + part[1].cpu()
        seen.update(_prints(batch))
    shared = sum(mark in seen for batch in context.batches("validation") for mark in _prints(batch))
    return {"means": class_means(sums, counts), "counts": counts, "shared": torch.tensor(shared)}


def _need_labels(split: str, ids: Tensor, has: Tensor) -> None:
    if not has.all():
        raise InputError(
            f"Method 'tgeo-kd' needs a label for every {split} example, and example {int(ids[~has][0])} has none: leave out "
            "those without."
        )


def _prints(batch: Batch) -> list[bytes]:
    """A hash of each example's content."""
    return [content_key(*parts) for parts in batch.contents]
