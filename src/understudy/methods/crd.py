"""Contrastive Representation Distillation (CRD, 2020): a student's embedding finds the teacher's of the same example.

    loss = CE + λ τ² KL(teacher_τ ‖ student_τ) + β [ NCE(g_s(x), M_t) + NCE(g_t(x), M_s) ]

g_s and g_t are learned projections of what each classifier's head reads, of length 1. M_s and M_t are memories that hold one
vector of every training example, from the last time it was seen. NCE tells an example's own entry in the other side's memory
from `negatives` entries of other classes. After each update, of the entries of its examples,

    m ← normalise(momentum · m + (1 − momentum) · g(x))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from understudy.data import Batch
from understudy.data.noise import uniform
from understudy.data.numeric_columns import Column
from understudy.errors import InputError
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.contrast import log_partition, memory_scores, noise_contrastive
from understudy.models import ModelOutput
from understudy.models.sharding import of_ranks
from understudy.streaming import rowwise
from understudy.training import Method, Requirements, SetupContext, Shapes, Term, TrainState

_SIDES = ("student", "teacher")
_NEGATIVES = 3
"""Stream of random numbers; 1 and 2 are those that fill the memories."""


@dataclass
class Memory:
    """The memories of both sides, and the logarithms of their normalisation constants.

    Args:
        vectors: by side, `[examples, width]`; empty before the first batch. log_z: by the side whose memory is read; empty in
            the first update. seen: what the present update has seen, by micro-batch: places of examples, the vectors of both
            sides, and each row's own estimates of log Z.
    """

    vectors: dict[str, Tensor] = field(default_factory=dict)
    log_z: dict[str, float] = field(default_factory=dict)
    seen: list[tuple[Tensor, ...]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {"vectors": dict(self.vectors), "log_z": dict(self.log_z)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.vectors, self.log_z, self.seen = dict(state["vectors"]), dict(state["log_z"]), []

    def logs(self) -> dict[str, float]:
        return {f"log_z_{side}": value for side, value in self.log_z.items()}


class CRD(Method):
    """CRD (2020): among all examples, the student's embedding finds the teacher's of the same one, and the reverse."""

    name = "crd"
    kinds = frozenset({"classification"})
    cost = "as kd, and twice rows · examples · width operations; memory: twice examples · width numbers"
    page: ClassVar[dict[str, str]] = {
        "when": "Networks of any two kinds and widths, where what the teacher's embeddings tell apart matters beside its classes; "
        "images, texts or own inputs.",
        "not": "Where the training set changes, or is so large that a vector of every example does not fit. With few classes "
        "and few examples there is little to tell apart.",
        "deviations": "Memories are read as they were before the update and written after it, once for all its micro-batches and "
        "processes, so that a batch may be cut anywhere; released code writes after each batch. Z is the mean estimate over the "
        "rows of the first update, in which each row uses its own. Negatives are drawn with replacement. An example without a "
        "label is a class of its own. β of 0.8 and 16384 negatives are those of the released code.",
    }

    crd_weight: float = Field(0.8, ge=0, description="β, weight of the contrast of both sides.")
    ce_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the labels.")
    kd_weight: float = Field(0.0, ge=0, description="λ, weight of the softened classes.")
    temperature: float = Field(4.0, gt=0, description="τ of the softened classes.")
    width: int = Field(128, ge=1, description="Width of the projections and memories.")
    negatives: int = Field(16384, ge=1, description="K, entries of other classes that a row is told apart from.")
    nce_temperature: float = Field(0.07, gt=0, description="Divides the inner products.")
    momentum: float = Field(0.5, ge=0, lt=1, description="Weight of an entry's old vector when it is written.")

    @property
    def requires(self) -> Requirements:
        return Requirements(
            features=True,
            teacher_features=True,
            teacher_model=True,
            teacher_classes=self.kd_weight > 0,
            temperature=self.temperature,
        )

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """The place of each example in the memories, and for each place where its class is among places ordered by class."""
        pairs = [(batch.ids.cpu(), batch.labels.cpu()) for batch in context.batches("train")]
        ids, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        context.add_column(Column.by_example("memory", ids, torch.arange(len(ids))))
        alone = labels.max() + 1 + torch.arange(len(ids))
        _, kind, sizes = torch.where(labels < 0, alone, labels).unique(return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise InputError(
                f"Method 'crd' contrasts examples with those of other classes, and all {len(ids)} are of one: give data with two "
                "classes or more."
            )
        starts = sizes.cumsum(0) - sizes
        return {"by_class": kind.argsort(stable=True), "start": starts[kind], "size": sizes[kind]}

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        assert shapes.features is not None and shapes.teacher_features is not None
        widths = zip(_SIDES, (shapes.features, shapes.teacher_features), strict=True)
        return {side: nn.Linear(width, self.width) for side, width in widths}

    def init_state(self, total: int) -> Memory:
        return Memory()

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        terms = {}
        if self.ce_weight:
            terms["ce"] = Term(rowwise(cross_entropy, student.signal, None, batch.row_labels), self.ce_weight)
        if self.kd_weight:
            kd = rowwise(forward_kl, student.signal, teacher.signal, temperature=self.temperature, tau_squared=True)
            terms["kd"] = Term(kd, self.kd_weight)
        if self.crd_weight:
            features = {"student": student.features, "teacher": teacher.features}
            values = [self._embedded(state.modules[side], found) for side, found in features.items()]
            with torch.autocast(values[0].device.type, enabled=False):
                terms["crd"] = Term(self._contrast(values, batch, state), self.crd_weight)
        return terms

    def _embedded(self, projection: nn.Module, features: Tensor | None) -> Tensor:
        assert features is not None
        projected: Tensor = projection(features.flatten(1).to(next(projection.parameters()).dtype))
        return F.normalize(projected if projected.dtype == torch.float64 else projected.float(), dim=1)

    def _contrast(self, vectors: list[Tensor], batch: Batch, state: TrainState) -> Tensor:
        """Both sides' NCE in the other's memory, `[rows]`; what is to be written is kept until the update ends."""
        memory: Memory = state.method_state
        places = state.columns["memory"].of_rows(batch)
        examples = len(state.tables["size"])
        if not memory.vectors:
            memory.vectors = self._filled(examples, state.seed)
        memory.vectors = {side: held.to(vectors[0]) for side, held in memory.vectors.items()}
        index = torch.cat([places[:, None], self._drawn(batch.ids[batch.sequence], places, state)], 1)
        values, estimates = [], []
        for own, other in zip(vectors, reversed(_SIDES), strict=True):
            scores = memory_scores(own, memory.vectors[other], index)
            estimates.append(log_partition(scores, examples, temperature=self.nce_temperature))
            log_z = scores.new_tensor(memory.log_z[other]) if memory.log_z else estimates[-1]
            values.append(noise_contrastive(scores, log_z, examples, temperature=self.nce_temperature))
        memory.seen.append((places, *(v.detach() for v in vectors), *estimates))
        return values[0] + values[1]

    def _filled(self, examples: int, seed: int) -> dict[str, Tensor]:
        """Random vectors whose lengths are about 1."""
        places, bound = torch.arange(examples), (3 / self.width) ** 0.5
        return {
            side: bound * (2 * uniform(places, (self.width,), seed=seed, step=0, stream=stream) - 1)
            for stream, side in enumerate(_SIDES, 1)
        }

    def _drawn(self, ids: Tensor, places: Tensor, state: TrainState) -> Tensor:
        """Places of examples of other classes, `[rows, negatives]`, by seed, step and example alone."""
        by_class, start, size = (state.tables[n].to(places.device) for n in ("by_class", "start", "size"))
        others = (len(by_class) - size[places])[:, None]
        drawn = uniform(ids, (self.negatives,), seed=state.seed, step=state.step, stream=_NEGATIVES)
        rank = (drawn * others).long().clamp(max=others - 1)
        return by_class[rank + torch.where(rank >= start[places][:, None], size[places][:, None], 0)]

    @torch.no_grad()
    def on_step_end(self, state: TrainState) -> None:
        """Write what the update has seen on all ranks; an example that it has seen twice, as first seen."""
        memory: Memory = state.method_state
        seen = [part for held in of_ranks([tuple(v.cpu() for v in part) for part in memory.seen]) for part in held]
        memory.seen = []
        if not seen:
            return
        places, student, teacher, of_teacher, of_student = (torch.cat(column) for column in zip(*seen, strict=True))
        order = places.argsort(stable=True)
        first = order[places[order] != torch.cat([places.new_tensor([-1]), places[order][:-1]])]
        if not memory.log_z:
            estimates = {"teacher": of_teacher[first].double(), "student": of_student[first].double()}
            memory.log_z = {side: float(e.exp().mean().log()) for side, e in estimates.items()}
        for side, new in (("student", student), ("teacher", teacher)):
            held = memory.vectors[side]
            at = places[first].to(held.device)
            mixed = self.momentum * held[at] + (1 - self.momentum) * new[first].to(held)
            memory.vectors[side] = held.index_copy(0, at, F.normalize(mixed, dim=1))
