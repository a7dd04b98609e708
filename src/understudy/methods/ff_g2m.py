"""30. Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into MLPs (2023).

What a GNN teacher knows of a node is smooth over its neighbourhood (low frequency) and differs from node to node (high
frequency). An MLP student, which never sees an edge, learns both, edge by edge, from logits computed once:

    loss = λ · CE + (1 − λ) · (L_low + L_high)
    L_low  = mean over edges and self-loops of KL(softmax h_j ‖ softmax z_i)
    L_high = mean over edges of KL(softmax(|h_i − h_j| / τ) ‖ softmax(|z_i − z_j| / τ))
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from understudy.data import Batch, GraphBatch
from understudy.errors import InputError
from understudy.losses import cross_entropy
from understudy.losses.edges import high_frequency, low_frequency
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.teachers import LocalTeacher
from understudy.training import Method, Requirements, SetupContext, Term, TrainState


class FFG2M(Method):
    """Smooth and differing knowledge of a graph network, edge by edge, for a student without a graph."""

    name = "ff-g2m"
    paper = 30
    kinds = frozenset({"graph"})
    cost = "one teacher forward a run, stored; a step is one student forward and backward a node, and classes operations an edge"
    page: ClassVar[dict[str, str]] = {
        "when": "Node classification that must be served without fetching neighbours, with the graph at hand in training.",
        "not": "When labels have little to do with links: the low-frequency term then smooths over classes. Node features "
        "must tell something, or a student without a graph cannot follow.",
        "deviations": "AdamW (decoupled weight decay, 0 unless `trainer.weight_decay` says more) where the released code "
        "has Adam with an L2 term of 5e-4. The teacher trained by default keeps the epoch of the best likelihood on "
        "validation, not of the best accuracy. The defaults of λ and τ are those of Cora; the paper sets them graph by "
        "graph. Dropout of student and teacher is that of their own names; the released flags are crossed. A step is the "
        "whole graph, so the graph is the coupled group and no batch of it is cut. In the transductive split the student "
        "sees the features of all nodes, test nodes too; early stopping reads the validation labels. Figures on test are "
        "of the epoch that is best on validation, never the best on test. `low=0` or `high=0` are the ablations.",
    }

    lam: float = Field(0.4, ge=0, le=1, description="λ, weight of the labels; the rest is distillation.")
    tau: float = Field(1.5, gt=0, description="Temperature of the differences between neighbours.")
    low: float = Field(1.0, ge=0, description="Weight of the low-frequency term.")
    high: float = Field(1.0, ge=0, description="Weight of the high-frequency term.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.lam or self.low or self.high):
            raise ValueError("lam, low and high are all 0, so nothing is learnt; raise one")
        return self

    @property
    def requires(self) -> Requirements:
        """The teacher answers once for the whole graph."""
        return Requirements(teacher="setup", teacher_model=True)

    def setup(self, context: SetupContext) -> dict[str, Tensor]:
        (batch,) = context.batches("train")
        assert isinstance(batch, GraphBatch)
        if self.lam and not batch.labelled:
            raise InputError(f"No node of the training split has a label and lam is {self.lam}: set options.lam=0.")
        teacher = LocalTeacher(context.live_teacher(), "teacher", freeze=False)
        logits = context.once("node-logits", lambda: {"logits": teacher(batch).signal.logits})["logits"]
        bad = (~torch.isfinite(logits)).any(1).nonzero()
        if len(bad):
            node = int(batch.ids[int(bad[0, 0])])
            raise InputError(
                f"The teacher's logits of node {node} are not finite: train it again, or mend its features."
            )
        return {"logits": logits}

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, GraphBatch)
        return {"ce": float(batch.labelled), "low": float(batch.loops.shape[1]), "high": float(batch.edges.shape[1])}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, GraphBatch)
        z = student.signal.logits
        h, terms = state.tables["logits"].to(z.device), {}
        if self.lam:
            signal, labels = batch.with_labels(student.signal)
            terms["ce"] = Term(rowwise(cross_entropy, signal, None, labels), self.lam)
        if self.lam < 1 and self.low:
            terms["low"] = Term(low_frequency(z, h, batch.loops), (1 - self.lam) * self.low)
        if self.lam < 1 and self.high:
            terms["high"] = Term(high_frequency(z, h, batch.edges, tau=self.tau), (1 - self.lam) * self.high)
        return terms
