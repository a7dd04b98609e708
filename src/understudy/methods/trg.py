"""8. Knowledge Distillation via Token-level Relationship Graph (2023).

Besides the labels and the teacher's softened classes, the student learns how image patches relate: inside an image
(the pattern of their similarities), near each other in a group of images (a k-nearest-neighbour graph), and one to
one with the teacher's patches (contrast over the group):

    loss = CE + λ τ² KL(teacher_τ ‖ student_τ) + α L_inner + β L_local + γ L_global
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from understudy.data import Batch
from understudy.data.noise import uniform
from understudy.errors import InputError
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.relations import (
    affinity_kl,
    contextual_mse,
    grid_tokens,
    knn_affinity,
    median_squared_distance,
    neighbour_overlap,
    paired_info_nce,
)
from understudy.models import ModelAdapter, ModelOutput
from understudy.models.taps import called_layers, layer
from understudy.streaming import rowwise
from understudy.training import Method, Requirements, SetupContext, Shapes, Term, TrainState
from understudy.training.schedules import anneal
from understudy.training.shapes import look

Side = Literal["student", "teacher"]
HELD_OUT = 1024
"""Images at most that the graphs are compared on after training."""


class TRG(Method):
    """Relations among image patches, beside labels and softened classes."""

    name = "trg"
    paper = 8
    kinds = frozenset({"image"})
    cost = "as kd, and tokens² · width operations a group of images; one projector"
    example: ClassVar[dict[str, Any]] = {
        "student": "convnet:8",
        "teacher": {"model": "convnet:16", "train": {"max_steps": 500}},
    }
    page: ClassVar[dict[str, str]] = {
        "when": "Image classifiers whose inner layers can be read, above all with classes of very different size.",
        "not": "When only the teacher's outputs are known. The local term is bounded by 1/2 a token: with the default "
        "weight its pull is small, and `affinity_scale` makes it felt.",
        "deviations": "Means over tokens instead of sums (`tokens_reduction=sum` for the paper's). Images are coupled "
        "inside groups of `group` consecutive ones, so that a batch may be cut between groups; a last or only group "
        "with fewer images (a batch smaller than `group`) takes at most as many neighbours as it has, instead of an "
        "error. The temperature moves at each step, not each epoch. A class token is dropped (registers and others with "
        "`student_prefix`, `teacher_prefix`), and a token of norm 0 has neither similarity nor gradient in the contrast. "
        "Hyperparameters, the cosine pace of the temperature and σ as "
        "the teacher's median squared distance are ours: the text gives none.",
    }

    alpha: float = Field(1.0, ge=0, description="Weight of the similarity pattern inside each image.")
    beta: float = Field(1.0, ge=0, description="Weight of the nearest-neighbour graph.")
    gamma: float = Field(0.5, ge=0, description="Weight of the contrast with the teacher's tokens.")
    kd_weight: float = Field(1.0, ge=0, description="λ, weight of the softened classes.")
    temperature: float = Field(4.0, gt=0, description="Of the softened classes.")
    grid: int = Field(2, ge=1, description="Both sides' feature maps are pooled to grid × grid tokens.")
    group: int = Field(16, ge=1, description="Images whose tokens form one graph.")
    tokens: int = Field(256, ge=1, description="Most tokens of a group, drawn equally from its images.")
    k: int = Field(5, ge=1, description="Neighbours of a token.")
    sigma: float | Literal["median"] = Field("median", description="Width of the affinity, in squared distance.")
    affinity_scale: float = Field(1.0, gt=0, description="Multiplies affinities before the softmax.")
    direction: Literal["student_teacher", "teacher_student"] = Field(
        "student_teacher", description="Of the divergence between affinities: student ‖ teacher, or the reverse."
    )
    tau_start: float = Field(1.0, gt=0, description="Temperature of the contrast at the first step.")
    tau_end: float = Field(0.1, gt=0, description="And at the last.")
    tau_pace: Literal["cosine", "linear", "constant"] = Field("cosine", description="How the temperature falls.")
    tokens_reduction: Literal["mean", "sum"] = Field("mean", description="Of a text's tokens.")
    student_layer: str | None = Field(None, description="Layer to read; the last with a fine enough map if not given.")
    teacher_layer: str | None = Field(None, description="Likewise, of the teacher.")
    student_prefix: int | None = Field(
        None, ge=0, description="Tokens in front of the patches (class, registers); none, or one if not given."
    )
    teacher_prefix: int | None = Field(None, ge=0, description="Likewise, of the teacher.")

    @model_validator(mode="after")
    def _a_group_fills_its_graph(self) -> Self:
        if self.tokens < self.group:
            raise ValueError(
                f"tokens is {self.tokens} and a group has {self.group} images, of which each gives one or more"
            )
        number = self.group * min(self.grid**2, self.tokens // self.group)
        if self.beta and self.k >= number:
            raise ValueError(f"k is {self.k} and a group has {number} tokens: k must be less than that")
        return self

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher_layers=True, teacher_model=True, temperature=self.temperature)

    def taps(self, side: Side, rows: ModelAdapter, batch: Batch) -> Mapping[str, nn.Module]:
        name = self.student_layer if side == "student" else self.teacher_layer
        if name is not None:
            return {"tokens": layer(rows.model, name)}
        for module, output in reversed(called_layers(rows.model, lambda: look(rows, batch))):
            # A pooled map [images, width, 1] has no tokens: its second axis is the width.
            row = output.dim() == 3 and output.shape[1] >= self.grid**2 and output.shape[2] > 1
            if row or (output.dim() == 4 and min(output.shape[2:]) >= self.grid):
                return {"tokens": module}
        raise InputError(
            f"The {side} has no layer with a {self.grid} × {self.grid} map of tokens: method 'trg' needs a network of "
            "convolutions or patches, or a smaller options.grid."
        )

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        widths = [self._width("student", shapes.taps["tokens"]), self._width("teacher", shapes.teacher_taps["tokens"])]
        if not self.gamma:
            return {}
        return {"projector": nn.Linear(widths[0], widths[1], bias=False)}

    def _patches(self, features: Tensor, side: Side) -> Tensor:
        return grid_tokens(features, self.grid, self.student_prefix if side == "student" else self.teacher_prefix)

    def _width(self, side: Side, shape: tuple[int, ...]) -> int:
        """Width of the tokens of a tapped layer; a layer without them is refused before training."""
        try:
            return self._patches(torch.zeros(1, *shape), side).shape[-1]
        except InputError as error:
            name = self.student_layer if side == "student" else self.teacher_layer
            raise InputError(
                f"Method 'trg' reads tokens of the {side} at layer {name!r}: {error} (options.{side}_layer, {side}_prefix)"
            ) from error

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        kd = rowwise(forward_kl, student.signal, teacher.signal, temperature=self.temperature, tau_squared=True)
        terms = {"ce": Term(rowwise(cross_entropy, student.signal, None, batch.row_labels))}
        terms["kd"] = Term(kd, self.kd_weight)
        ours, theirs = (r.taps["tokens"][batch.mask] for r in (student, teacher))
        ours, theirs = self._patches(ours, "student"), self._patches(theirs, "teacher")
        # Similarities and distances in bfloat16 would not tell near tokens apart.
        dtype, ids = torch.promote_types(ours.dtype, torch.float32), batch.ids[batch.mask]
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        with torch.autocast(ours.device.type, enabled=False):
            terms["inner"] = Term(contextual_mse(ours, theirs), self.alpha)
            parts = [
                self._group(ours[i : i + self.group], theirs[i : i + self.group], ids[i : i + self.group], state)
                for i in range(0, len(ids), self.group)
            ]
        for name, weight in (("local", self.beta), ("global", self.gamma)):
            if weight:
                terms[name] = Term(torch.cat([p[name] for p in parts]) if parts else ours.sum((1, 2)), weight)
        return terms

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """How near the student's graph is to the teacher's on the images it is judged on, each by its own distances."""
        assert context.teacher_model is not None and state.student is not None
        sides: dict[Side, ModelAdapter] = {"student": state.student, "teacher": context.teacher_model}
        taps = {side: self.taps(side, m, next(context.batches(context.eval_split, 1))) for side, m in sides.items()}
        found: dict[str, list[Tensor]] = {"affinity_kl": [], "neighbour_overlap": []}
        for batch in islice(context.batches(context.eval_split, self.group), max(1, HELD_OUT // self.group)):
            maps = {side: look(m, batch, taps=taps[side]).taps["tokens"] for side, m in sides.items()}
            both = [self._patches(m, side).flatten(0, 1).to(maps["student"].device) for side, m in maps.items()]
            if k := min(self.k, len(both[0]) - 1):
                near = [knn_affinity(t, k=k, sigma=median_squared_distance(t)) for t in both]
                found["affinity_kl"].append(affinity_kl(near[0], near[1], direction=self.direction))
                found["neighbour_overlap"].append(neighbour_overlap(both[0], both[1], k=k))
        return {"metrics": {name: float(torch.cat(rows).mean()) for name, rows in found.items() if rows}}

    def _group(self, ours: Tensor, theirs: Tensor, ids: Tensor, state: TrainState) -> dict[str, Tensor]:
        """Relations across the images of one group; one value an image."""
        images, patches = ours.shape[:2]
        each = min(patches, self.tokens // images)
        # Which tokens are drawn hangs on the image, the step and the seed alone, not on how the batch is cut.
        draw = uniform(ids, (patches,), seed=state.seed, step=state.step)
        chosen = draw.argsort(-1)[:, :each].sort(-1).values
        s, t = (x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1])).flatten(0, 1) for x in (ours, theirs))
        found = {}
        # The last group of a batch may be small: it takes as many neighbours as it has. A whole one that is too small for k
        # is refused.
        k = self.k if images == self.group else min(self.k, len(s) - 1)
        if self.beta and not k:
            found["local"] = s.sum(-1) * 0
        elif self.beta:
            sigma = median_squared_distance(t) if self.sigma == "median" else self.sigma
            near = [knn_affinity(x, k=k, sigma=sigma) for x in (s, t)]
            found["local"] = affinity_kl(near[0], near[1], direction=self.direction, scale=self.affinity_scale)
        if self.gamma:
            tau = anneal(self.tau_start, self.tau_end, state.step / state.total, self.tau_pace)
            projector = state.modules["projector"]
            projected = projector(s.to(next(projector.parameters()).dtype)).to(s.dtype)
            found["global"] = paired_info_nce(projected, t, temperature=tau)
        factor = images if self.tokens_reduction == "sum" else 1 / each
        return {name: values.unflatten(0, (images, each)).sum(1) * factor for name, values in found.items()}
