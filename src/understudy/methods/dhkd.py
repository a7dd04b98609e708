"""40. Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head (2024).

Matching raw logits helps the backbone and harms the classifier head. So the logit loss gets a head of its own,
which reads the same features and is dropped at inference:

    loss = γ · CE(main, labels) + α · τ² · Σ_k log cosh((aux_k − t_k) / 2τ)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.losses import binary_kl_norm, cross_entropy
from understudy.losses.gradients import align
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.targets import Dense
from understudy.training import Method, Requirements, Shapes, Term, TrainState


class DHKD(Method):
    """Cross-entropy on the main head, the logit loss on an auxiliary head that stays behind."""

    name = "dhkd"
    paper = 40
    kinds = frozenset({"classification"})
    cost = "as kd, and one small head; aligning gradients adds a second backward pass"
    page: ClassVar[dict[str, str]] = {
        "when": "Classification with the teacher's raw logits, above all when the teacher is weak or differs in kind.",
        "not": "When features are out of reach, or only probabilities of the teacher are known.",
        "deviations": "The log-cosh form is exact where the released clamp overflows. With `head=shared` both losses "
        "sit on the main head, as the ablation does. Alignment works once per update, on accumulated gradients. "
        "The released code does not clip gradients; the trainer does, at `trainer.max_grad_norm=1.0`, unless told otherwise.",
    }

    tau: float = Field(2.0, gt=0, description="Temperature of the logit loss.")
    gamma: float = Field(1.0, ge=0, description="Weight of the cross-entropy.")
    alpha: float = Field(1.0, ge=0, description="Weight of the logit loss.")
    head: Literal["linear", "nonlinear", "shared"] = Field(
        "linear", description="The auxiliary head; `shared` puts the logit loss on the main head (the baseline)."
    )
    until: float = Field(
        1.0, gt=0, le=1, description="Share of the steps after which the logit loss ends; 0.5 as released for ImageNet."
    )
    align: Literal["none", "all", "shared"] = Field(
        "none", description="Project the logit loss's gradient off a conflicting CE gradient, over which parameters."
    )

    @property
    def requires(self) -> Requirements:
        return Requirements(features=self.head != "shared")

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        if self.head == "shared":
            return {}
        if shapes.features is None:
            raise InputError("Method 'dhkd' reads the features before the classifier, and this student shows none.")
        if self.head == "linear":
            return {"auxiliary": nn.Linear(shapes.features, shapes.classes)}
        hidden = 200  # as released
        return {
            "auxiliary": nn.Sequential(
                nn.Linear(shapes.features, hidden),
                nn.Dropout(0.1),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                nn.Linear(hidden, shapes.classes),
            )
        }

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        if self.head == "shared":
            auxiliary = student.signal
        else:
            features = student.features
            assert features is not None  # the engine gives what `needs` asks for
            if self.head == "nonlinear" and len(features) == 1 and state.modules["auxiliary"].training:
                raise InputError(
                    "The non-linear auxiliary head normalises over the batch, and this batch has one row: "
                    "choose another batch size, set trainer.dataloader_drop_last=true, or options.head=linear."
                )
            head = state.modules["auxiliary"]  # in float32, also where the student is not
            auxiliary = Dense(head(features.to(next(head.parameters()).dtype)))
        alpha = self.alpha if state.step < self.until * state.total else 0.0
        return {
            "ce": Term(rowwise(cross_entropy, student.signal, None, batch.row_labels), self.gamma),
            "kd": Term(rowwise(binary_kl_norm, auxiliary, teacher.signal, temperature=self.tau), alpha),
        }

    @property
    def merges_gradients(self) -> bool:
        return self.align != "none"

    def merge(self, gradients: Mapping[str, list[Tensor | None]], owners: Sequence[str]) -> list[Tensor | None]:
        ce, kd = gradients["ce"], gradients["kd"]
        chosen = [self.align == "all" or owner == "backbone" for owner in owners]
        aligned = iter(
            align([g for g, c in zip(ce, chosen, strict=True) if c], [g for g, c in zip(kd, chosen, strict=True) if c])
        )
        kd = [next(aligned) if c else g for g, c in zip(kd, chosen, strict=True)]
        return [b if a is None else (a if b is None else a + b) for a, b in zip(ce, kd, strict=True)]
