"""29. HARD: Hard Augmentations for Robust Distillation (2023).

An augmentor g learns to make the student s differ from the teacher t while the teacher's own answer stays where it is;
the student then learns on what it found. Both take turns. With D(p ‖ q) = τ² KL(softmax(p/τ) ‖ softmax(q/τ)):

    augmentor: maximise  λ_s D(t(x̃) ‖ s(x̃)) − λ_t D(t(x) ‖ t(x̃)),   x̃ = g(x, ε)
    student:   minimise  ½ [D(t(x̃) ‖ s(x̃)) + D(t(x) ‖ s(x))]

The student's turn ends when its loss on x̃ falls below ℓ_min, the augmentor's when that loss is above ℓ_max.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.func import functional_call

from understudy.data import Batch
from understudy.data.noise import normal, uniform
from understudy.errors import InputError
from understudy.evaluation.pictures import picture_grid
from understudy.losses import forward_kl
from understudy.losses.consistency import two_sided_kl
from understudy.models import ModelAdapter, ModelOutput
from understudy.models.augmentors import Affine, Augmentor, Border, Latent, Mix, Shift1d
from understudy.models.autoencoders import Autoencoder, load_autoencoder
from understudy.streaming import rowwise
from understudy.teachers import LocalTeacher
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
from understudy.training.latents import trained_autoencoder
from understudy.training.update_schedule import AlternatingSchedule

_SPREAD = {"shift1d": 0.5, "affine": 0.02, "mix": 0.1, "latent": 0.1}
_RATE = {"shift1d": 0.1, "affine": 0.01, "mix": 0.1, "latent": 0.01}
_COPY = 1  # the stream of the draws among remembered augmentors; 0 is that of ε


class HARD(Method):
    """Augmentations learned against the student, in turns with it."""

    name = "hard"
    paper = 29
    kinds = frozenset({"image"})
    cost = (
        "two teacher and two student forwards and a student backward a row of the student's turns; in the augmentor's, "
        "two teacher forwards, one student forward and a backward through both to the inputs. All count as steps"
    )
    page: ClassVar[dict[str, str]] = {
        "when": "Images or signals with a teacher that ignores changes which the data does not show the student, or few "
        "data. The teacher must run here: its gradient to the inputs is needed.",
        "not": "When the changes the teacher ignores are known: then augment with these. When the teacher is no more "
        "robust than the student, the augmentor finds little and the budget it took is lost.",
        "deviations": "The two losses, the two thresholds and the turns are the paper's. Weights, rates, thresholds and the "
        "details of each family are reconstructed: there is no released code. The thresholds are in nats times τ²: set "
        "`l_min` a little above what plain KD reaches. Adam's bounded steps stand for a clip on the augmentor's moves. "
        "A teacher in training mode is not refused: it answers in evaluation mode. "
        "`augmentor_memory` counts states before the present one, which is the last that was stored. "
        "There are no labels in the loss. With `augmentor=latent` and no `autoencoder`, a small one is trained first on "
        "the training inputs, outside the budget; it is not exact, so its x̃ is never quite x.",
    }

    augmentor: Literal["shift1d", "affine", "mix", "latent"] = Field(
        "affine",
        description="shift1d: circular shifts along the last axis; affine: six parameters an image; mix: a mixture of "
        "chains of fixed operations; latent: moved latents of an autoencoder.",
    )
    temperature: float = Field(2.0, gt=0, description="τ of every divergence.")
    lambda_s: float = Field(1.0, ge=0, description="λ_s, weight of the disagreement in the augmentor's objective.")
    lambda_t: float = Field(1.0, ge=0, description="λ_t, weight of the teacher's own change in it.")
    l_min: float = Field(0.05, gt=0, description="ℓ_min: a loss on x̃ below it ends the student's turn.")
    l_max: float = Field(0.5, gt=0, validate_default=True, description="ℓ_max: one above it ends the augmentor's.")
    max_augmentor_steps: int = Field(200, ge=1, description="The augmentor's turn ends after so many steps anyway.")
    mean_decay: float = Field(0.0, ge=0, lt=1, description="Decay of a mean of that loss over steps; 0 for none.")
    augmentor_memory: int = Field(0, ge=0, description="Earlier states of it, one a turn, to draw from as well.")
    augmentor_rate: float | None = Field(None, gt=0, description="Adam's, by family: 0.1, 0.01, 0.1, 0.01.")
    spread: float | None = Field(
        None, gt=0, description="Size of the changes at the start, by family: 0.5 samples, 0.02, a share of 0.1, 0.1."
    )
    noise: Literal["normal", "uniform"] = Field("normal", description="What ε is; uniform is between −1 and 1.")
    border: Border = Field("border", description="What affine maps see outside of an image.")
    learn: bool = Field(True, description="Off: the augmentor stays as it starts, a fixed random augmentation.")
    autoencoder: str | None = Field(
        None, description="Of `latent`: a folder, ours or of diffusers; else one is trained."
    )
    latent: int = Field(16, ge=1, description="Numbers in the latent of an autoencoder that is trained.")
    autoencoder_steps: int = Field(1000, ge=1, description="And the steps of 128 examples it is trained for.")

    @field_validator("l_max")
    @classmethod
    def _above(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("l_min", 0.0):
            raise ValueError(f"it must be above l_min, which is {info.data['l_min']}")
        return value

    @field_validator("spread")
    @classmethod
    def _share(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and value >= 1 and info.data.get("augmentor") == "mix":
            raise ValueError("of augmentor 'mix' it is a share and must be below 1")
        return value

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher_model=True, temperature=self.temperature)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        example = next(context.batches("train", 16))
        if "pixel_values" not in example.inputs:
            raise InputError("Method 'hard' augments images or signals, and the examples have no pixel_values.")
        _check_repeats(context.live_teacher(), example)
        if self.augmentor != "latent":
            return {}
        shape = tuple(example.inputs["pixel_values"].shape[1:])
        if self.autoencoder is not None:
            load_autoencoder(self.autoencoder, shape)  # a bad folder is told now, before training
            return {}

        def pixels() -> Tensor:
            return torch.cat([b.inputs["pixel_values"][b.mask] for b in context.batches("train")])

        return trained_autoencoder(context, pixels, self.latent, self.autoencoder_steps)

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        spread = _SPREAD[self.augmentor] if self.spread is None else self.spread
        if self.augmentor == "shift1d":
            return {"augmentor": Shift1d(spread)}
        if self.augmentor == "affine":
            return {"augmentor": Affine(spread, self.border)}
        shape = shapes.inputs["pixel_values"]
        if self.augmentor == "mix":
            return {"augmentor": Mix(shape, spread, self.border)}
        if self.autoencoder is not None:
            coder = load_autoencoder(self.autoencoder, shape)
        else:
            coder = Autoencoder(shape, self.latent)
            coder.load_state_dict(shapes.tables)
        return {"augmentor": Latent(coder, shape, spread)}

    def init_state(self, total: int) -> AlternatingSchedule | None:
        if not self.learn:
            return None
        return AlternatingSchedule(
            self.l_min, self.l_max, self.max_augmentor_steps, self.mean_decay, self.augmentor_memory
        )

    def auxiliary_optimizers(self) -> Mapping[str, AuxiliaryOptimizer]:
        rate = _RATE[self.augmentor] if self.augmentor_rate is None else self.augmentor_rate
        return {"augmentor": AuxiliaryOptimizer(("augmentor",), rate)}

    def update_schedule(self, state: TrainState) -> Sequence[str]:
        return ("augmentor",) if self.learn and state.method_state.auxiliary else ("student",)

    def auxiliary_loss(self, name: str, context: AuxiliaryContext, state: TrainState) -> Iterator[dict[str, Term]]:
        assert context.teacher is not None
        for batch in context.batches:
            shown = self._augmented(batch, state, None)
            if not shown.inputs["pixel_values"].requires_grad:
                raise InputError(
                    "The augmented inputs have no gradient to the augmentor's parameters: whole-number or image-library "
                    "operations cannot be learned. Build it from differentiable ones, or set options.learn=false."
                )
            ours, theirs = (m(shown).signal.logits for m in (context.student, context.teacher.through))
            if not theirs.requires_grad:
                raise InputError(
                    "The teacher passes no gradient to its inputs, which method 'hard' climbs: run it here."
                )
            clean = context.teacher(batch).signal.logits
            options: dict[str, Any] = {"temperature": self.temperature, "tau_squared": True}
            yield {
                "augmented": Term(two_sided_kl(ours, theirs, **options), -self.lambda_s),
                "consistency": Term(two_sided_kl(theirs, clean, **options), self.lambda_t),
            }

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None and state.student is not None and state.teacher is not None
        with torch.no_grad():
            shown = self._augmented(batch, state, self._remembered(state))
        ours, theirs = state.student(shown), state.teacher(shown)
        pairs = {"augmented": (ours, theirs), "clean": (student, teacher)}
        options: dict[str, Any] = {"temperature": self.temperature, "tau_squared": True}
        return {name: Term(rowwise(forward_kl, s.signal, t.signal, **options), 0.5) for name, (s, t) in pairs.items()}

    def _augmented(self, batch: Batch, state: TrainState, copy: Mapping[str, Tensor] | None) -> Batch:
        """The batch as the augmentor makes it; the noise hangs on example, step and seed alone."""
        module = state.modules["augmentor"]
        assert isinstance(module, Augmentor)
        # Examples that do not count may hold anything, and 0 · nan would reach the augmentor's gradient.
        pixels = batch.inputs["pixel_values"].masked_fill(~batch.mask[:, None, None, None], 0.0)
        draw = normal if self.noise == "normal" else uniform
        noise = draw(batch.ids, module.noise_shape, seed=state.seed, step=state.step)
        noise = (noise if self.noise == "normal" else 2 * noise - 1).to(pixels.dtype)
        with torch.autocast(pixels.device.type, enabled=False):  # bfloat16 has not the digits for where a pixel is
            augmented = module(pixels, noise) if copy is None else functional_call(module, dict(copy), (pixels, noise))
        return dataclasses.replace(batch, inputs={**batch.inputs, "pixel_values": augmented})

    def _remembered(self, state: TrainState) -> Mapping[str, Tensor] | None:
        """The augmentor of this step: the present one or one of those remembered, all equally likely."""
        copies = state.method_state.copies if self.learn else []
        if not copies:
            return None
        place = uniform(torch.zeros(1, dtype=torch.long), (), seed=state.seed, step=state.step, stream=_COPY)
        device = next(state.modules["augmentor"].parameters()).device
        return {k: v.to(device) for k, v in copies[int(place * len(copies))].items()}

    def on_pre_optimizer_step(self, state: TrainState, means: Mapping[str, float]) -> None:
        if self.learn and state.method_state.update(means["augmented"]):
            state.method_state.remember(dict(state.modules["augmentor"].named_parameters()))

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        module = state.modules["augmentor"]
        assert isinstance(module, Augmentor)
        metrics = {f"augmentor_{name}": value for name, value in module.facts().items()}
        if self.learn:
            steps = state.method_state.steps
            metrics |= {"student_steps": float(steps["student"]), "augmentor_steps": float(steps["auxiliary"])}
            metrics["saturated"] = float(state.method_state.saturated)
        batch = next(context.batches(context.eval_split, 8))
        with torch.no_grad():
            rows = [b.inputs["pixel_values"] for b in (batch, self._augmented(batch, state, None))]
        return {
            "metrics": metrics,
            "pictures": {"Augmented inputs: above as they are, below augmented.": picture_grid(rows)},
        }


@torch.no_grad()
def _check_repeats(teacher: ModelAdapter, batch: Batch) -> None:
    """Refuse a teacher that answers the same question in two ways: its own change would not be 0 without augmentation."""
    first, second = (LocalTeacher(teacher, "teacher", freeze=False)(batch).signal.logits for _ in range(2))
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise InputError(
            "The teacher answers the same inputs differently the second time, even in evaluation mode: dropout or another "
            "random part is on in it. Switch it off: method 'hard' compares the teacher with itself."
        )
