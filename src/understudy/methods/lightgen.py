"""01. LightGen: Efficient Image Generation through Knowledge Distillation and Direct Preference Optimization (2025).

Data: a teacher draws one image for each condition, and no output of it is matched. Then, in two phases,

    masked:      m_l of the patches x_l masked,  x_t = √ᾱ_t x + √(1 − ᾱ_t) n
                 loss = Σ_l m_l e_l / Σ_l m_l,   e = mean_C (n − ε_θ(x_t, t, s))² + variational term of the variance
    preference:  E(x) = Σ_l m_l e_l / Σ_l m_l of the first part of e, per image
                 loss = −log σ( −β [ (E_θ(x^w) − E_ref(x^w)) − (E_θ(x^l) − E_ref(x^l)) ] )                       (Eq. 7)

x^w is a real image, x^l the student's own sample of the same condition as the phase begins, and the reference the
student as it is then. One mask ratio is drawn for a whole update, so the mean of E over images is the paper's sum over
the batch.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from understudy.data import Batch, NoiseBatch
from understudy.data.noise import normal, uniform
from understudy.data.noise_sets import APART, ExampleSet, Reference
from understudy.errors import InputError
from understudy.evaluation.distances import detail_ratio
from understudy.evaluation.generation import SampleEvaluator, draw
from understudy.evaluation.pictures import image_grid
from understudy.losses import masked_diffusion as masked
from understudy.losses.diffusion import noised
from understudy.losses.preference import dpo
from understudy.models import DenoiserAdapter, MaskedGeneratorAdapter, ModelAdapter, ModelOutput, evaluating
from understudy.targets import TokenNoise
from understudy.training import Phase, Requirements, SetupContext, Term, TrainState
from understudy.training.averages import AveragedMethod, take

log = logging.getLogger(__name__)

MASKED, PREFERENCE = "masked", "preference"
NOISE, RATIO, ORDER, TIME, HIDDEN = range(5)
"""Streams of random numbers of an update; those of the second phase follow."""


class LightGen(AveragedMethod):
    """A masked generator on a teacher's images, then preferences of real images over its own."""

    name = "lightgen"
    paper = 1
    kinds = frozenset({"noise"})
    cost = (
        "masked phase: one student forward and backward a row, before it the teacher's `samples`; preference phase: two and "
        "two of the reference, before it the student's `pairs` samples; two copies of the student"
    )
    used_with: ClassVar[dict[str, Any]] = {"beta": {"refine": ("dpo",)}, "pairs": {"refine": ("dpo", "sft")}}
    example: ClassVar[dict[str, Any]] = {
        "student": "mar:48,2,2",
        "teacher": {"train": {"max_steps": 500}},
        "trainer": {"max_steps": 300},
    }
    page: ClassVar[dict[str, str]] = {
        "when": "A generator of images that is good but large or slow, of which only samples are wanted, and a compact one to "
        "be trained on them; with some real images, preferences then mend what the samples got wrong. Choose "
        "`task=image_generation` and a student of width, layers and side of a patch, as `student=mar:64,2,2`. It samples in "
        "`data.teacher_steps` iterations, at most one for each patch.",
        "not": "Without real images there is nothing to prefer (`preference=0`), and for a generator of one call `boot` needs no "
        "data at all.",
        "deviations": "Conditions are classes, not captions, so there is no text encoder, and the condition is attended to in "
        "every decoder layer. Images are patches of pixels, not of a VAE; as pixels are bounded, sampling bounds x_0. Guidance "
        "is the linear one. The preference loop is not in the official code: it is that of Eq. 7 per "
        "image (the released function has one error for the whole batch, which couples its pairs), with mask, time and noise shared by both sides. β and the learning "
        "rate of that phase are for mean errors of pixels and not the paper's 5000 and 1e-8. Captions are not filtered by "
        "a vision-language model. Flips are not used, which the paper blames for errors of position.",
    }

    samples: int = Field(2000, ge=1, description="Images that the teacher draws, of its classes in turn.")
    pairs: int = Field(512, ge=1, description="Real images that are preferred to the student's own.")
    preference: float = Field(
        0.25, ge=0, lt=1, description="Share of the steps that is the second phase; 0 leaves it out."
    )
    refine: Literal["dpo", "sft", "none"] = Field(
        "dpo",
        description="Second phase: preferences; or, to compare, the masked loss on its real images or on the teacher's.",
    )
    beta: float = Field(500.0, gt=0, description="Strength of the tie to the reference.")
    preference_rate: float | None = Field(
        None, gt=0, description="Learning rate of the second phase; a twentieth of trainer.learning_rate is a start."
    )
    draws: int = Field(4, ge=1, description="Times and noises for each patch and step (`diffusion_batch_mul`).")
    least: float = Field(0.7, gt=0, le=1, description="Smallest share of patches that is masked.")
    drop_condition: float = Field(0.1, ge=0, le=1, description="How often a class is hidden, for guidance.")
    ema: float = Field(
        0.9999, ge=0, lt=1, description="Decay of the average of weights, which ends a phase; 0 for none."
    )

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="setup", teacher_model=True)

    # -- data -----------------------------------------------------------------------------------------------------

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """The teacher's images, once and stored, as the split `taught`; the real ones as `pairs`."""
        teacher = context.live_teacher()
        if not isinstance(teacher, DenoiserAdapter | MaskedGeneratorAdapter):
            raise InputError("Method 'lightgen' learns from a generator of images: use task=image_generation.")
        if not isinstance(context.student, MaskedGeneratorAdapter):
            raise InputError(
                "Method 'lightgen' trains a masked generator: name student=mar:WIDTH,LAYERS,PATCH, as mar:64,2,2."
            )
        train = context.splits["train"]
        if self.samples > len(train):
            raise InputError(f"options.samples is {self.samples} and data.size {len(train)}: raise data.size.")
        loader = DataLoader(Subset(train, range(self.samples)), batch_size=256, collate_fn=context.collate)
        settings = {"samples": self.samples, "steps": teacher.sampler.steps, "guidance": teacher.sampler.guidance}

        def make() -> dict[str, Tensor]:
            with evaluating(teacher):
                return {"images": draw(teacher, loader)}

        images = _finite("teacher", context.once("taught", make, **settings)["images"])
        context.splits["taught"] = ExampleSet(images, torch.tensor([train[i][1] for i in range(self.samples)]))
        if self._needs_real:
            context.splits["pairs"] = self._real(context)
        return {}

    @property
    def _needs_real(self) -> bool:
        return self.preference > 0 and self.refine != "none"

    def _real(self, context: SetupContext) -> ExampleSet:
        """Real training images, in an order that the seed decides."""
        reference: Reference = context.splits["test"].reference
        if reference.training is None:
            raise InputError("options.preference needs real images to prefer: name data, or set options.preference=0.")
        images, classes = reference.training()
        if self.pairs > len(images):
            log.warning(
                "lightgen: options.pairs is %d and there are %d real images: all are used.", self.pairs, len(images)
            )
        order = uniform(torch.arange(len(images)), (), seed=context.seed, step=0, stream=ORDER).argsort()[: self.pairs]
        return ExampleSet(images[order], classes[order] if context.classes else torch.full_like(order, -1))

    def companions(self, student: ModelAdapter) -> dict[str, nn.Module]:
        refers = self.preference > 0 and self.refine == "dpo"
        return super().companions(student) | ({"reference": copy.deepcopy(student)} if refers else {})

    def phases(self) -> Sequence[Phase]:
        trainer = {} if self.preference_rate is None else {"learning_rate": self.preference_rate}
        planned = (
            Phase(MASKED, 1 - self.preference, split="taught"),
            Phase(PREFERENCE, self.preference, split="pairs" if self._needs_real else "taught", trainer=trainer),
        )
        return [phase for phase in planned if phase.share]

    def on_phase_begin(self, state: TrainState) -> None:
        """The average begins anew. Before preferences: the reference, and the student's own images of the same classes."""
        assert state.student is not None and state.context is not None
        for name, companion in state.companions.items():
            if name == "average" or state.phase == PREFERENCE:
                take(companion, state.student)
        if state.phase == PREFERENCE and self.refine == "dpo":
            real = state.context.splits["pairs"]
            real = ExampleSet(real.clean, real.condition)
            loader = DataLoader(real, batch_size=256, collate_fn=state.context.collate)
            with evaluating(state.student):
                own = _finite("student", draw(state.student, loader, offset=APART["reference"]))
            kept = (real.clean != own).flatten(1).any(1)
            if not bool(kept.all()):
                log.warning("lightgen: %d pairs of equal images teach no order and were left out.", int((~kept).sum()))
            state.context.splits["pairs"] = ExampleSet(real.clean[kept], real.condition[kept], own[kept])

    # -- each update ------------------------------------------------------------------------------------------------

    def transform_batch(self, batch: Batch, state: TrainState) -> Batch:
        """A mask, times and noise for the patches of every image; in the masked phase some classes are hidden."""
        assert isinstance(batch, NoiseBatch)
        student, ids = _generator(state.student), batch.ids
        length, channels = student.model.length, student.model.channels
        where = {"seed": state.seed, "step": state.step}
        first = 0 if state.phase == MASKED else HIDDEN + 1
        ratio = masked.mask_ratio(uniform(ids[:1] * 0, (), stream=first + RATIO, **where), least=self.least)
        order = uniform(ids, (length,), stream=first + ORDER, **where).argsort(1).argsort(1)
        size = (self.draws, length)
        times = (uniform(ids, size, stream=first + TIME, **where) * len(student.alphas_cumprod)).long()
        noise = normal(ids, (*size, channels), stream=first + NOISE, **where).to(batch.inputs["clean"].dtype)
        parts = {"mask": order < masked.masked_number(ratio, length), "times": times, "noise": noise}
        batch = replace(batch, inputs={**batch.inputs, **parts})
        if not self._prefers(state):
            hidden = uniform(ids, (), stream=first + HIDDEN, **where) < self.drop_condition
            batch = replace(batch, condition=torch.where(hidden, -1, batch.condition))
        return _noisy(student, batch, batch.inputs["clean"])

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, NoiseBatch)
        if self._prefers(state):
            return self._preference_terms(student, batch, state)
        rows, signal, inputs = _generator(state.student), student.signal, batch.inputs
        assert isinstance(signal, TokenNoise)
        x = rows.model.cut(inputs["clean"])[:, None].expand_as(inputs["x_t"])
        spread = masked.variance_error(
            signal.values, signal.variance, x, inputs["x_t"], inputs["times"], rows.alphas_cumprod
        )
        return {"noise": Term(_error(signal, batch)), "variance": Term(masked.image_errors(spread, inputs["mask"]))}

    def _preference_terms(self, student: ModelOutput, batch: NoiseBatch, state: TrainState) -> dict[str, Term]:
        rows, reference = _generator(state.student), state.companions["reference"]
        worse = _noisy(rows, batch, batch.inputs["rejected"])
        chosen, rejected = _error(student.signal, batch), _error(rows(worse).signal, worse)
        with torch.no_grad():
            chosen_ref, rejected_ref = (_error(reference(b).signal, b) for b in (batch, worse))
        terms = {"dpo": Term(dpo(-chosen, -rejected, -chosen_ref, -rejected_ref, beta=self.beta))}
        margin = (rejected - rejected_ref - chosen + chosen_ref).detach()
        # Logged and not trained on: if both errors rise, the learning rate is too high.
        seen = {"error/chosen": chosen, "error/rejected": rejected, "rewards/accuracies": (margin > 0).to(margin)}
        return terms | {name: Term(value.detach(), 0.0) for name, value in seen.items()}

    def _prefers(self, state: TrainState) -> bool:
        return state.phase == PREFERENCE and self.refine == "dpo"

    # -- afterwards -------------------------------------------------------------------------------------------------

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """How much detail samples have, how often a sample is of its class, and the pairs as pictures."""
        split = context.splits[context.eval_split]
        if split.reference.examples is None:
            return {}
        examples, classes = split.reference.examples()
        student = _generator(state.student)
        with evaluating(student):
            samples = draw(student, DataLoader(split, batch_size=256, collate_fn=context.collate))
        detail = detail_ratio(samples, examples)
        metrics = {"detail": detail, "detail_gap": abs(detail - 1)}
        if context.classes:
            asked = torch.tensor([split[i][1] for i in range(len(split))])
            seen = SampleEvaluator(split.reference, examples, classes).modes(samples)
            metrics["class_accuracy"] = float((seen == asked).double().mean())
        pairs = context.splits.get("pairs")
        if pairs is None or pairs.rejected is None:
            return {"metrics": metrics}
        pictures = {"Preferred: real images": pairs.clean, "Rejected: the student's before preferences": pairs.rejected}
        return {"metrics": metrics, "pictures": {name: image_grid(v[:48]) for name, v in pictures.items()}}


def _noisy(student: MaskedGeneratorAdapter, batch: NoiseBatch, images: Tensor) -> NoiseBatch:
    """The same mask, times and noise for other images of the batch."""
    noise, level = batch.inputs["noise"], student.alphas_cumprod.to(images.device)[batch.inputs["times"]]
    tokens = student.model.cut(images)[:, None].expand_as(noise)
    x_t = noised(tokens.flatten(0, 2), noise.flatten(0, 2), level.sqrt().flatten(), (1 - level).sqrt().flatten())
    return replace(batch, inputs={**batch.inputs, "clean": images, "x_t": x_t.view_as(noise)})


def _error(signal: TokenNoise, batch: NoiseBatch) -> Tensor:
    """E of each image."""
    return masked.image_errors(masked.noise_error(signal.values, batch.inputs["noise"]), batch.inputs["mask"])


def _finite(who: str, images: Tensor) -> Tensor:
    if not bool(images.isfinite().all()):
        row = int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
        raise InputError(f"Sample {row} of the {who} is not finite: lower the learning rate that it was trained with.")
    return images


def _generator(model: Any) -> MaskedGeneratorAdapter:
    assert isinstance(model, MaskedGeneratorAdapter)  # `setup` has checked it
    return model
