"""23. Simple Semi-supervised Knowledge Distillation via Dual-Head Optimization (DHO, 2025).

Few examples have labels, many have none. Two heads read the same features: one learns from the labels, one from the
teacher, so that the two never pull at one head:

    loss = λ CE(ce(x_l), y) + (1 − λ) [ KL(t_l ‖ kd(x_l)) + KL(t_u ‖ kd(x_u)) ],   each KL τ² times its own mean
    p = α softmax(ce) + (1 − α) softmax(kd / β)

α and β are chosen on validation data once training is over.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from understudy.data import UNLABELLED, Batch
from understudy.errors import InputError
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.subclasses import two_class_head
from understudy.losses.two_heads import best_mixing, mixed_log_probabilities
from understudy.models import (
    ClassifierAdapter,
    MixtureAdapter,
    ModelAdapter,
    ModelOutput,
    evaluating,
    find_head,
    replace_head,
)
from understudy.models.classifier_heads import linear_readout, mix_heads, read_as_cosines
from understudy.streaming import rowwise
from understudy.targets import Dense
from understudy.training import Method, Requirements, SetupContext, Term, TrainState
from understudy.training.order import Sampling

log = logging.getLogger(__name__)


class DHO(Method):
    """Two heads for few labels and many examples without, mixed after training."""

    name = "dho"
    paper = 23
    kinds = frozenset({"classification"})
    cost = "as kd, and one more head"
    used_with: ClassVar[dict[str, Any]] = {"kd_head": {"heads": ("two",)}}
    page: ClassVar[dict[str, str]] = {
        "when": "A general teacher, such as a zero-shot one (`teacher=openai/clip-vit-base-patch32`; with `teacher.options.adapter=true` the few labelled images vote too), few labels (`data.labelled`, or label −1 in your own data) and many examples without. The "
        "balance of labels and teacher is chosen after training.",
        "not": "When the teacher is about as good as the labels: one head with a large λ does as well. On other losses of two "
        "heads see `dhkd`.",
        "deviations": "The mixture is chosen on validation data, where the released few-shot script takes test data. The "
        "micro-batch holds `labelled_batch` and `unlabelled_batch` examples in that proportion; an epoch draws as many as "
        "there are. The saved student is an ordinary model. A small network keeps the mixture exactly; so does any model where one "
        "linear head is left over (α of 0 or 1). Others get the linear head that fits the mixture best on the training examples, and `mix_agreement` "
        "is the share of validation examples on which it predicts the same class.",
    }

    lam: float = Field(0.5, ge=0, le=1, description="λ, weight of the labels; the rest is the teacher's.")
    objective: Literal["few_shot", "low_shot"] = Field(
        "few_shot", description="low_shot: both weights are 1, as for 1 and 10 % of labels; λ is not read."
    )
    temperature: float = Field(2.0, gt=0, description="τ of the divergences.")
    labelled_batch: int = Field(8, ge=1, description="Labelled examples of a round.")
    unlabelled_batch: int = Field(24, ge=1, description="Examples without label of a round.")
    heads: Literal["two", "one"] = Field("two", description="one: both losses on one head (the baseline).")
    kd_head: Literal["linear", "cosine"] = Field(
        "linear",
        description="cosine: the teacher's head reads features of length 100, as a vision-language teacher has them.",
    )
    aligned: bool = Field(False, description="Start both heads from the student's own, in place of one of them.")
    select: bool = Field(True, description="Choose α and β on validation data; otherwise as given.")
    mix_alpha: float = Field(0.5, ge=0, le=1, description="α, weight of the label head, where none is chosen.")
    mix_beta: float = Field(1.0, gt=0, description="β, temperature of the teacher's head, where none is chosen.")

    @property
    def requires(self) -> Requirements:
        return Requirements(temperature=self.temperature)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        labels = torch.cat([batch.labels.cpu() for batch in context.batches("train")])
        labelled, unlabelled = ((labels >= 0).nonzero()[:, 0], (labels == UNLABELLED).nonzero()[:, 0])
        if not len(labelled):
            raise InputError("Method 'dho' learns from a few labels, and no training example has one: label some.")
        if not len(unlabelled):
            log.warning("Every training example has a label: the teacher is asked about these alone.")
        self._compare(context)
        return {"labelled": labelled, "unlabelled": unlabelled}

    def _compare(self, context: SetupContext) -> None:
        """Warn of a teacher that is at chance where labels are known: its classes may be in another order."""
        if context.teacher is None:
            return
        right, seen = 0, 0
        for batch in context.batches("train"):
            known = batch.row_labels != UNLABELLED
            signal = context.teacher(batch).signal
            if not isinstance(signal, Dense):
                return
            right += int((signal.logits.argmax(-1) == batch.row_labels)[known].sum())
            seen += int(known.sum())
            if seen >= 256:
                break
        if seen >= 10 and right / seen <= 1.2 / context.classes:
            log.warning(
                "The teacher is right on %d of %d labelled examples, no more than chance: compare the order of its classes "
                "with that of the data.",
                right,
                seen,
            )

    def sampling(self, state: TrainState) -> Sampling | None:
        labelled, unlabelled = state.tables["labelled"], state.tables["unlabelled"]
        if not len(unlabelled):
            return None
        return Sampling(streams=((labelled, self.labelled_batch), (unlabelled, self.unlabelled_batch)))

    def counts(self, batch: Batch) -> dict[str, float]:
        known = float((batch.row_labels != UNLABELLED).sum())
        return {"ce": known, "kd_labelled": known, "kd_unlabelled": batch.num_items - known}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        logits, known = student.signal.logits, batch.row_labels != UNLABELLED
        ours, theirs = logits.chunk(2, -1) if self.heads == "two" else (logits, logits)
        ce = rowwise(cross_entropy, Dense(ours[known]), None, batch.row_labels[known])
        kd = rowwise(forward_kl, Dense(theirs), teacher.signal, temperature=self.temperature, tau_squared=True)
        labels, targets = (1.0, 1.0) if self.objective == "low_shot" else (self.lam, 1 - self.lam)
        return {
            "ce": Term(ce, labels),
            "kd_labelled": Term(kd[known], targets),
            "kd_unlabelled": Term(kd[~known], targets),
        }

    # -- the student: two heads side by side while it learns, one afterwards ------------------------------------------

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        if self.heads == "one":
            return student
        assert isinstance(student, ClassifierAdapter)
        old, classes = find_head(student), context.classes
        wide = replace_head(student, 2 * classes, seed=context.seed)
        assert isinstance(old, nn.Linear)
        with torch.no_grad():
            for half in (slice(0, classes), slice(classes, 2 * classes))[: 2 if self.aligned else 1]:
                wide.weight[half] = two_class_head(old.weight)[-classes:]
                if wide.bias is not None:
                    wide.bias[half] = two_class_head(old.bias[:, None])[-classes:, 0]
        if self.kd_head == "cosine":
            read_as_cosines(student)
        return student

    def eval_model(self, student: ModelAdapter, state: TrainState) -> ModelAdapter:
        return student if self.heads == "one" else MixtureAdapter(student, self.mix_alpha, self.mix_beta)

    def export(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        if self.heads == "one":
            return student
        assert isinstance(student, ClassifierAdapter)
        features, ce, kd, labels = _read(student, context, "validation")
        facts, known = {"mix_alpha": self.mix_alpha, "mix_beta": self.mix_beta}, labels >= 0
        if self.select and bool(known.any()):
            best = best_mixing(ce[known], kd[known], labels[known])
            facts = {"mix_alpha": best.alpha, "mix_beta": best.beta}
            facts |= {
                "ce_head_validation": float(best.grid[0, -1]) / 100,
                "kd_head_validation": float(best.grid[0, 0]) / 100,
            }
        elif self.select:
            log.warning("No validation example has a label: the heads are mixed by options.mix_alpha and mix_beta.")
        alpha, beta = facts["mix_alpha"], facts["mix_beta"]
        if not mix_heads(student, context.classes, alpha, beta):
            wanted = mixed_log_probabilities(ce, kd, alpha=alpha, beta=beta).argmax(-1)
            x, ours, theirs, _ = _read(student, context, "train")
            mixture = mixed_log_probabilities(ours, theirs, alpha=alpha, beta=beta).exp()
            head = replace_head(student, context.classes)
            fitted = linear_readout(x, mixture, bias=head.bias is not None)
            facts["mix_agreement"] = float((fitted(features.double()).argmax(-1) == wanted).double().mean())
            head.load_state_dict(fitted.state_dict())
        find_head(student).mixing = facts  # type: ignore[union-attr,assignment]
        return student

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        assert state.student is not None
        return {"metrics": getattr(find_head(state.student), "mixing", {})}


@torch.no_grad()
def _read(student: ClassifierAdapter, context: SetupContext, split: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, the logits of both heads, and labels of a split, without augmentation."""
    with evaluating(student):
        rows = [(student(batch, features=True), batch.row_labels) for batch in context.batches(split)]
    features = torch.cat([r.features for r, _ in rows if r.features is not None])
    ours, theirs = torch.cat([r.signal.logits for r, _ in rows]).double().chunk(2, -1)
    return features, ours, theirs, torch.cat([labels for _, labels in rows])
