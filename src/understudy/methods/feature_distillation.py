"""Inner layers and relations beside the labels: FitNets (2015), attention transfer (2017), RKD and SP (2019).

    loss = CE + λ τ² KL(teacher_τ ‖ student_τ) + the method's own terms

Each is as its paper and released code have it; λ is 0 but in FitNets, which adds its hint to distillation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.features import attention_transfer, feature_map, hint_mse, same_grid
from understudy.losses.instances import angle_relation, by_group, distance_relation, similarity_mse
from understudy.models import ModelAdapter, ModelOutput
from understudy.models.taps import called_layers, layer, stages
from understudy.streaming import rowwise
from understudy.training import Method, Phase, Requirements, Shapes, Term, TrainState
from understudy.training.shapes import look

Side = Literal["student", "teacher"]


class _WithLabels(Method):
    """What the four have in common: the labels, and the teacher's softened classes."""

    kinds = frozenset({"image"})

    ce_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the labels.")
    kd_weight: float = Field(0.0, ge=0, description="λ, weight of the softened classes.")
    temperature: float = Field(4.0, gt=0, description="τ of the softened classes.")

    def _shared_terms(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Term]:
        terms = {}
        if self.ce_weight:
            terms["ce"] = Term(rowwise(cross_entropy, student.signal, None, batch.row_labels), self.ce_weight)
        if self.kd_weight:
            kd = rowwise(forward_kl, student.signal, teacher.signal, temperature=self.temperature, tau_squared=True)
            terms["kd"] = Term(kd, self.kd_weight)
        return terms


class _WithLayers(_WithLabels):
    """Those that read inner layers of both sides."""

    @property
    def requires(self) -> Requirements:
        return Requirements(
            teacher_layers=True,
            teacher_model=True,
            teacher_classes=self.kd_weight > 0,
            temperature=self.temperature,
        )

    def _layers(self, side: Side) -> Sequence[str]:
        """Names of layers to read that the options give."""
        raise NotImplementedError

    def _chosen(self, found: list[nn.Module]) -> list[nn.Module]:
        """Those of a side's stages that are read where the options name none."""
        raise NotImplementedError

    def taps(self, side: Side, rows: ModelAdapter, batch: Batch) -> Mapping[str, nn.Module]:
        chosen = [layer(rows.model, name) for name in self._layers(side)]
        if not chosen:
            found = stages(called_layers(rows.model, lambda: look(rows, batch)))
            if not found:
                raise InputError(
                    f"Method {self.name!r} finds no inner layer of the {side} with maps, tokens or vectors of features: name "
                    f"one with options.{side}_layer."
                )
            chosen = self._chosen(found)
        # Counted from the last, so that sides with more and fewer stages meet at the deepest.
        return {f"layer{i}": module for i, module in enumerate(reversed(chosen), 1)}

    def _maps(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """The maps of the rows at each layer that both sides have, at one height and width, in float32 at least."""
        pairs = []
        for name in [n for n in student.taps if n in teacher.taps]:
            ours, theirs = (feature_map(r.taps[name][batch.mask]) for r in (student, teacher))
            pairs.append(same_grid(ours, theirs.to(ours.dtype)))
        return pairs


class FitNets(_WithLayers):
    """FitNets (2015): a regressor on a middle layer of the student predicts the teacher's.

        loss = CE + λ τ² KL(teacher_τ ‖ student_τ) + w · mean (r(F_s) − F_t)²

    F are the maps of a middle layer, r a convolution of 1 × 1 that is learned and stays behind.
    """

    name = "fitnets"
    cost = "as kd, and one convolution of 1 × 1 from the student's channels to the teacher's"
    page: ClassVar[dict[str, str]] = {
        "when": "A student that is deeper and thinner than its teacher, or of the same kind; whose inner layers can be read.",
        "not": "When only the teacher's outputs are known, or the two networks compute in different ways.",
        "deviations": "The hint is a mean over channels and positions with weight 100, beside the other terms, as in later "
        "comparisons; `hint_share` above 0 trains it alone first and then the rest without it, as the paper does. The "
        "regressor is 1 × 1; where heights differ the larger map is pooled.",
    }

    kd_weight: float = Field(1.0, ge=0, description="λ, weight of the softened classes.")
    hint_weight: float = Field(100.0, gt=0, description="Weight of the hint.")
    hint_share: float = Field(0.0, ge=0, lt=1, description="Share of the steps that train the hint alone, first.")
    student_layer: str | None = Field(None, description="The guided layer; the middle stage if not given.")
    teacher_layer: str | None = Field(None, description="The hint layer; likewise.")

    def _layers(self, side: Side) -> Sequence[str]:
        name = self.student_layer if side == "student" else self.teacher_layer
        return (name,) if name is not None else ()

    def _chosen(self, found: list[nn.Module]) -> list[nn.Module]:
        return [found[(len(found) - 1) // 2]]

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        ours, theirs = (feature_map(torch.zeros(1, *s["layer1"])).shape[1] for s in (shapes.taps, shapes.teacher_taps))
        return {"regressor": nn.Conv2d(ours, theirs, 1)}

    def phases(self) -> Sequence[Phase]:
        if not self.hint_share:
            return ()
        return Phase("hint", self.hint_share), Phase("distillation", 1 - self.hint_share)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        terms = {}
        if state.phase != "distillation":
            ((ours, theirs),) = self._maps(student, teacher, batch)
            regressor = state.modules["regressor"]
            projected = regressor(ours.to(next(regressor.parameters()).dtype))
            terms["hint"] = Term(hint_mse(projected, theirs), self.hint_weight)
        return terms if state.phase == "hint" else {**terms, **self._shared_terms(student, teacher, batch)}


class AttentionTransfer(_WithLayers):
    """Attention transfer (2017): where the student's maps are active, stage by stage, is where the teacher's are.

        loss = CE + λ τ² KL(teacher_τ ‖ student_τ) + β Σ_stages mean (a_s / ‖a_s‖ − a_t / ‖a_t‖)²,   a = Σ_channels |F|^p

    F is the map of a stage, and p the power.
    """

    name = "attention-transfer"
    cost = "as kd, and a sum over channels at each stage"
    example: ClassVar[dict[str, Any]] = {
        "student": "convnet:8",
        "teacher": {"model": "convnet:16", "train": {"max_steps": 500}},
    }
    page: ClassVar[dict[str, str]] = {
        "when": "Convolutional networks of any two widths: nothing is projected, and no layer is added.",
        "not": "For networks without maps: of vectors there is one position, and the term is 0.",
        "deviations": "Squared, a mean over positions, β of 1000 and a sum over stages, as released. Stages are the last layers of "
        "each resolution, matched from the deepest; where heights differ the larger map is pooled.",
    }

    attention_weight: float = Field(1000.0, gt=0, description="β, weight of the attention maps of each stage.")
    power: float = Field(2.0, ge=1, description="Of activations before they are summed over channels.")
    student_layers: tuple[str, ...] = Field((), description="Layers to read, first to last; the stages if not given.")
    teacher_layers: tuple[str, ...] = Field((), description="Likewise, of the teacher.")

    def _layers(self, side: Side) -> Sequence[str]:
        return self.student_layers if side == "student" else self.teacher_layers

    def _chosen(self, found: list[nn.Module]) -> list[nn.Module]:
        return found

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        for side, taps in (("student", shapes.taps), ("teacher", shapes.teacher_taps)):
            if all(feature_map(torch.zeros(1, *shape)).shape[2:].numel() == 1 for shape in taps.values()):
                raise InputError(
                    f"Method 'attention-transfer' compares positions, and the {side}'s layers have one: it needs a network "
                    "of convolutions or patches."
                )
        return {}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        maps = self._maps(student, teacher, batch)
        values = torch.stack([attention_transfer(ours, theirs, power=self.power) for ours, theirs in maps]).sum(0)
        return {"attention": Term(values, self.attention_weight), **self._shared_terms(student, teacher, batch)}


class SP(_WithLayers):
    """Similarity-preserving distillation (2019): images that excite the teacher alike excite the student alike.

        loss = CE + λ τ² KL(teacher_τ ‖ student_τ) + γ / b² · ‖G_s − G_t‖²,   G = F Fᵀ, its rows divided by their norms

    F holds the maps of the b images of a group, a row each.
    """

    name = "sp"
    cost = "as kd, and images² · width operations a group of images"
    page: ClassVar[dict[str, str]] = {
        "when": "Networks of any two kinds: similarities among images need no common width and no projection.",
        "not": "With groups of few images, which have few relations.",
        "deviations": "The images of a group are coupled: `group` consecutive ones, so that a batch may be cut between groups. "
        "The paper's group is its batch of 128.",
    }

    similarity_weight: float = Field(3000.0, gt=0, description="γ, weight of the similarities.")
    group: int = Field(64, ge=2, description="Consecutive images that are compared with each other.")
    student_layer: str | None = Field(None, description="Layer to read; the last stage if not given.")
    teacher_layer: str | None = Field(None, description="Likewise, of the teacher.")

    def _layers(self, side: Side) -> Sequence[str]:
        name = self.student_layer if side == "student" else self.teacher_layer
        return (name,) if name is not None else ()

    def _chosen(self, found: list[nn.Module]) -> list[nn.Module]:
        return found[-1:]

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        ours, theirs = (r.taps["layer1"][batch.mask].flatten(1) for r in (student, teacher))
        with torch.autocast(ours.device.type, enabled=False):
            values = by_group(similarity_mse, ours, theirs, self.group)
        return {"similarity": Term(values, self.similarity_weight), **self._shared_terms(student, teacher, batch)}


class RKD(_WithLabels):
    """Relational knowledge distillation (2019): distances and angles among examples are the teacher's.

        loss = CE + λ τ² KL(teacher_τ ‖ student_τ) + λ_D mean huber(d_s(i, j) − d_t(i, j))
               + λ_A mean huber(cos_s(i, j, k) − cos_t(i, j, k))

    d is a distance of two embeddings over the mean of such distances, cos that of the angle at j of three.
    """

    name = "rkd"
    kinds = frozenset({"classification"})
    cost = "as kd, and examples² · width (distances) and examples³ (angles) operations a group of examples"
    page: ClassVar[dict[str, str]] = {
        "when": "Networks of any two kinds and widths, above all where embeddings are what is used.",
        "not": "With groups of few examples, which have few relations.",
        "deviations": "Reads what the classifier's head reads. The examples of a group are coupled: `group` consecutive ones, so "
        "that a batch may be cut between groups. The losses are means over pairs and triples, as released.",
    }

    distance_weight: float = Field(25.0, ge=0, description="λ_D, weight of the distances.")
    angle_weight: float = Field(50.0, ge=0, description="λ_A, weight of the angles.")
    group: int = Field(64, ge=2, description="Consecutive examples that are compared with each other.")

    @property
    def requires(self) -> Requirements:
        return Requirements(features=True, teacher_features=True, temperature=self.temperature)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None and student.features is not None and teacher.features is not None
        parts: dict[str, tuple[Any, float]] = {
            "distance": (distance_relation, self.distance_weight),
            "angle": (angle_relation, self.angle_weight),
        }
        terms = self._shared_terms(student, teacher, batch)
        with torch.autocast(student.features.device.type, enabled=False):
            for name, (relation, weight) in parts.items():
                if weight:
                    terms[name] = Term(by_group(relation, student.features, teacher.features, self.group), weight)
        return terms
