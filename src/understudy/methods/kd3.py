"""22. Distribution Shift Matters for Knowledge Distillation with Webly Collected Images (KD³, 2023).

The original data are gone; a pool of images from elsewhere is at hand, without labels and partly of other things. Each epoch
trains on the images that teacher and student together are confident about. The student is read by the teacher's frozen head
h, z_s = h(mean of r(F_s)), with r a block that is trained:

    loss = mean of w (r(F_s) − F_t)² + μ [ NTXent(e_s(x), e_s(x̃)) + NTXent(e_t(x), e_t(x̃)) ],   w = sigmoid(‖z_s − z_t‖)

F are the last maps, e embeddings of their means, and x̃ is x with means and deviations of its channels mixed with another
image's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from understudy.curation.confident import EPOCHS, Confident, chosen, confident, teacher_share
from understudy.data import Batch
from understudy.data.augment import mix_statistics
from understudy.data.noise import beta, uniform
from understudy.evaluation.pictures import picture_grid
from understudy.losses.contrast import nt_xent
from understudy.losses.features import disagreement_weights, hint_mse, same_grid
from understudy.losses.instances import by_group
from understudy.models import ClassifierAdapter, ModelAdapter, ModelOutput, evaluating
from understudy.models.sharding import agreed
from understudy.models.transfer import TransferClassifier, last_map, read_by_teacher
from understudy.training import Method, Requirements, SetupContext, Shapes, Term, TrainState
from understudy.training.order import Sampling

log = logging.getLogger(__name__)

_SHARE, _ORDER = 1, 2
"""Streams of random numbers."""
_SHOWN = 12
"""Most images in a row of pictures, and most rows of the course of selections."""


@dataclass
class Selections:
    """What was selected so far, one entry a selection.

    Args:
        steps: optimizer steps done. shares: weight of the teacher's logits. kept: share of the pool.
        sources: of what was kept, the share of each source of images, as the data name them.
    """

    steps: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    sources: list[list[float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {name: list(values) for name, values in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in vars(self):
            setattr(self, name, list(state[name]))

    def logs(self) -> dict[str, float]:
        return {"teacher_share": self.shares[-1], "kept": self.kept[-1]} if self.steps else {}


class KD3(Method):
    """Distillation with selected images from elsewhere, through the teacher's own head."""

    name = "kd3"
    paper = 22
    kinds = frozenset({"image"})
    cost = (
        "two teacher forwards and two student forwards and backwards an image (one with `contrast_weight` 0), and a student "
        "forward of the whole pool each epoch"
    )
    page: ClassVar[dict[str, str]] = {
        "when": "A trained image classifier whose data are gone, and a pool of unlabelled images from elsewhere (`data.pool`), "
        "of other styles and partly of other things.",
        "not": "With the original data: `kd` with labels is simpler. When the teacher's inside cannot be read.",
        "deviations": "Selection reads the images without augmentation. An epoch draws as many images as the pool has, or "
        "those of `selection_steps`, whatever number is kept. The schedule of 240 epochs is stretched to the run's steps. "
        "Mixing and contrast couple `group` consecutive images, so that a batch may be cut between groups; the paper's "
        "group is its batch of 1,024. Where fewer than two images pass, the most confident tenth is taken and the run "
        "warns. Networks without a last map that the head reads the mean of (an MLP, the class token of a transformer) "
        "are aligned at the vector that the head reads. The saved student is the network with block and head, whose "
        "weights count as its own; this package reads it.",
    }

    select: Literal["dynamic", "teacher", "all"] = Field(
        "dynamic", description="Who chooses images: teacher first and student later, the teacher alone, or none."
    )
    cutoff: float = Field(0.95, gt=0, le=1, description="c, threshold of the class that is predicted most.")
    min_threshold: float = Field(
        0.0, ge=0, lt=1, description="Least threshold; that of a class that is hardly predicted is near 0."
    )
    selection_steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps from one selection to the next; as many images as the pool has if not given.",
    )
    weighted: bool = Field(True, description="Weigh each image's features by how far the logits are apart.")
    contrast_weight: float = Field(0.001, ge=0, description="μ, weight of the contrast; 0 leaves out the mixed images.")
    teacher_contrast: bool = Field(
        True, description="Train the teacher's embedding too; the student has no part in it."
    )
    temperature: float = Field(0.3, gt=0, description="Of the contrast.")
    beta: float = Field(0.1, gt=0, description="λ of the mixing is drawn from Beta(beta, beta).")
    embedding: int = Field(128, ge=1, description="Width of the embeddings.")
    group: int = Field(64, ge=2, description="Consecutive images that are mixed and contrasted with each other.")
    transfer_factor: int = Field(2, ge=1, description="The block is narrower inside by this factor.")

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher_features=True, teacher_layers=True, teacher_model=True)

    @property
    def epoch_steps(self) -> int | None:
        return self.selection_steps

    # -- the student, and what is read of both sides --------------------------------------------------------------

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        teacher = context.live_teacher()
        assert isinstance(student, ClassifierAdapter) and isinstance(teacher, ClassifierAdapter)
        example = next(context.batches("train", 4))
        read_by_teacher(student, teacher, example, factor=self.transfer_factor, seed=context.seed)
        return student

    def taps(self, side: Literal["student", "teacher"], model: ModelAdapter, batch: Batch) -> Mapping[str, nn.Module]:
        if side == "student":
            net = model.model
            assert isinstance(net, TransferClassifier)
            return {"map": net.map, "transferred": net.transfer}
        assert isinstance(model, ClassifierAdapter)
        layer, _ = last_map(model, batch)
        return {} if layer is None else {"map": model.model.get_submodule(layer)}

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        if not self.contrast_weight:
            return {}
        assert shapes.teacher_features is not None
        found = {"student_embedding": nn.Linear(shapes.taps["map"][0], self.embedding)}
        if self.teacher_contrast:
            found["teacher_embedding"] = nn.Linear(shapes.teacher_features, self.embedding)
        return dict(found)

    # -- selection --------------------------------------------------------------------------------------------------

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        if self.select == "all":
            return {}

        def read() -> Mapping[str, Tensor]:
            assert context.teacher is not None
            return {"logits": torch.cat([context.teacher(b).signal.logits.cpu() for b in context.batches("train")])}

        batches = list(context.batches("train")) if context.domains else []
        known = [b.domains.cpu() for b in batches if b.domains is not None]
        counted = torch.cat([b.mask.cpu() for b in context.batches("train")])
        return {
            "teacher": context.once("kd3-teacher", read)["logits"],
            "places": counted.nonzero()[:, 0],
            "sources": torch.cat(known)[counted] if known else torch.zeros(int(counted.sum()), dtype=torch.long),
        }

    def init_state(self, total: int) -> Selections:
        return Selections()

    def sampling(self, state: TrainState) -> Sampling | None:
        if self.select == "all":
            return None
        found, share = self._selected(state)
        kept, replaced = agreed(chosen(found))  # ranks may hold other running statistics
        if replaced:
            log.warning(
                "Step %d: fewer than two images of the pool pass the thresholds of their classes (the largest confidence is "
                "%.2f): the most confident tenth is taken. Lower options.cutoff if this stays.",
                state.step,
                float(found.confidence.max()),
            )
        assert state.context is not None
        past, sources = state.method_state, state.tables["sources"][kept]
        number = max(1, len(state.context.domains))
        past.steps.append(state.step)
        past.shares.append(share)
        past.kept.append(len(kept) / len(found.keep))
        past.sources.append((torch.bincount(sources, minlength=number) / len(kept)).tolist())
        return Sampling(indices=state.tables["places"][kept])

    @torch.no_grad()
    def _selected(self, state: TrainState) -> tuple[Confident, float]:
        """The selection by the present student, and the weight of the teacher's logits in it."""
        assert state.context is not None and state.student is not None
        share = 1.0 if self.select == "teacher" else teacher_share(EPOCHS * state.step / state.total + 1)
        with evaluating(state.student):
            ours = [state.student(batch).signal.logits.cpu() for batch in state.context.batches("train")]
        options = {"cutoff": self.cutoff, "min_threshold": self.min_threshold}
        return confident(state.tables["teacher"], torch.cat(ours), share, **options), share

    # -- the loss ---------------------------------------------------------------------------------------------------

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None and teacher.features is not None
        ours = batch.select(student.taps["transferred"])
        theirs = batch.select(teacher.taps["map"]) if teacher.taps else teacher.features[:, :, None, None]
        align = hint_mse(*same_grid(ours, theirs.to(ours.dtype)))
        if self.weighted:
            align = align * disagreement_weights(student.signal.logits, teacher.signal.logits)
        terms = {"align": Term(align)}
        if self.contrast_weight:
            terms |= self._contrast(student, teacher, batch, state)
        return terms

    def _contrast(self, student: ModelOutput, teacher: ModelOutput, batch: Batch, state: TrainState) -> dict[str, Term]:
        """Each image is to be found by its mixed copy, in an embedding of the student's and one of the teacher's features."""
        assert state.student is not None and state.teacher is not None
        shown = self._mixed(batch, state)
        again = state.student(shown, taps={"map": state.student.model.map})
        views = {"student": [batch.select(student.taps["map"]).mean((2, 3)), again.taps["map"].mean((2, 3))]}
        if self.teacher_contrast:
            views["teacher"] = [teacher.features, state.teacher(shown).features]  # type: ignore[list-item]
        found, loss = {}, partial(nt_xent, temperature=self.temperature)
        for side, pair in views.items():
            embed = state.modules[f"{side}_embedding"]
            with torch.autocast(batch.labels.device.type, enabled=False):
                first, second = (embed(v.to(next(embed.parameters()).dtype)) for v in pair)
                found[f"{side}_contrast"] = Term(by_group(loss, first, second, self.group), self.contrast_weight)
        return found

    def _mixed(self, batch: Batch, state: TrainState) -> Batch:
        """The rows of the batch with mixed statistics; what is drawn hangs on example, step and seed alone."""
        rows = batch.take(batch.mask.nonzero()[:, 0])
        pixels, drawn = rows.inputs["pixel_values"], {"seed": state.seed, "step": state.step}
        share = beta(rows.ids, self.beta, stream=_SHARE, **drawn)
        place = uniform(rows.ids, (), stream=_ORDER, **drawn)
        parts = [
            mix_statistics(x, a, p.argsort(stable=True))
            for x, a, p in zip(*(v.split(self.group) for v in (pixels, share, place)), strict=True)
        ]
        return replace(rows, inputs={**rows.inputs, "pixel_values": torch.cat(parts)})

    # -- the report -------------------------------------------------------------------------------------------------

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """What the trained student selects: by source, by class, and some of the images; and the course of selections."""
        if self.select == "all":
            return {}
        found, _ = self._selected(state)
        kept, _ = chosen(found)
        names, sources = list(context.domains), state.tables["sources"]
        metrics = {"kept": len(kept) / len(found.keep)}
        for number, name in enumerate(names):
            metrics[f"pool_from_{name}"] = float((sources == number).double().mean())
            metrics[f"kept_from_{name}"] = float((sources[kept] == number).double().mean())
        out = torch.ones(len(found.keep), dtype=torch.bool)
        out[kept] = False
        return {
            "metrics": metrics,
            "tables": [_course(state.method_state, names), _by_class(found)],
            "pictures": {
                f"Images of the pool that {what}, drawn at random.": picture_grid([_some(context, state, index)])
                for what, index in (("are selected at the end", kept), ("are not", out.nonzero()[:, 0]))
                if len(index)
            },
        }


def _course(past: Selections, names: list[str]) -> dict[str, Any]:
    """A table of the selections, the last one included."""
    every = len(past.steps)
    picked = sorted({*range(0, every, -(-every // _SHOWN))} | {every - 1}) if every else []
    rows = [
        [
            str(past.steps[i]),
            f"{past.shares[i]:.3f}",
            f"{past.kept[i]:.1%}",
            *(f"{v:.1%}" for v in past.sources[i][: len(names)]),
        ]
        for i in picked
    ]
    headings = ["step", "teacher's weight", "kept of the pool", *(f"of it {name}" for name in names)]
    return {"title": "Images that were selected to train on", "headings": headings, "rows": rows}


def _by_class(found: Confident) -> dict[str, Any]:
    """A table of the classes as the last selection has them."""
    rows = []
    for number, threshold in enumerate(found.thresholds.tolist()):
        own = found.classes == number
        rows.append([str(number), str(int(own.sum())), f"{threshold:.3f}", str(int((own & found.keep).sum()))])
    headings = ["class", "images predicted", "threshold", "above it"]
    return {"title": "Selection by the trained student", "headings": headings, "rows": rows}


def _some(context: SetupContext, state: TrainState, index: Tensor) -> Tensor:
    """Pixels of some images of the pool, drawn by the run's seed."""
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(context.seed))[:_SHOWN]
    examples = context.examples("train")
    items = [examples[i] for i in state.tables["places"][index[order]].tolist()]
    return Batch.from_dict(context.collate(items)).inputs["pixel_values"]
