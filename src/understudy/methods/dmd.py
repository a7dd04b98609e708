"""DMD: One-step Diffusion with Distribution Matching Distillation (Yin et al. 2024).

A generator G of one call follows the difference of two scores at its own noised samples: that of the teacher (real), and that
of a network μ_fake which learns the distribution of the samples as it changes:

    x = G(z),   x_t = α_t x + σ_t n
    fake score: minimise  the denoising loss of μ_fake on x, before every step of the generator
    generator:  gradient  (μ_fake(x_t, t) − μ_real(x_t, t)) / mean |x − μ_real(x_t, t)|,   t random
                plus      λ mean (G(z_ref) − y_ref)²,   y_ref the teacher's sample from the noise z_ref, made beforehand
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Subset

from understudy.data import Batch, NoiseBatch
from understudy.data.noise import normal
from understudy.losses.diffusion import denoising_loss, noised, squared_error
from understudy.losses.score_distillation import distribution_matching
from understudy.models import ModelAdapter, ModelOutput, evaluating
from understudy.training import (
    AuxiliaryContext,
    AuxiliaryOptimizer,
    Method,
    Phase,
    Requirements,
    SetupContext,
    Shapes,
    Term,
    TrainState,
)
from understudy.training.denoising import (
    ask_teacher,
    denoiser,
    noise_for,
    sampled_like,
    score_network,
    teacher_denoiser,
    teacher_outputs,
    time_for,
)

_STUDENT, _FAKE = 1, 3
"""First streams of random numbers at a step: a time and a noise each. Stream 0 is the noise that samples begin as."""


class DMD(Method):
    """DMD (2024): a generator of one call whose samples have the teacher's distribution."""

    name = "dmd"
    kinds = frozenset({"noise"})
    cost = (
        "three student forwards (two with backward; without regression two and one), one teacher call and two calls of the fake "
        "score (one with backward) a row, guidance twice the teacher's calls, and before training `pairs` samples of the "
        "teacher; a copy of the teacher in memory, with its optimiser"
    )
    example: ClassVar[dict[str, Any]] = {"teacher": {"train": {"max_steps": 500}}, "trainer": {"max_steps": 300}}
    page: ClassVar[dict[str, str]] = {
        "when": "A diffusion model that is to sample in one call, from noise alone: what matters is the distribution of samples, "
        "not that each is the teacher's own. Start from the teacher (`student=teacher`).",
        "not": "Where each noise should keep the teacher's sample (`consistency`, `progressive`), or for lack of memory: a second "
        "network is trained beside the student. Without regression modes may be lost.",
        "deviations": "The fake score steps before the generator on the same samples (paper: after it). Regression is the "
        "squared error, not LPIPS, and its pairs are those of all training noise; they are the teacher's own deterministic samples. "
        "The fake score's error is that of its own kind of prediction, not weighted. Where the teacher is a closed form it starts "
        "as the student. Guidance is the teacher's (`data.guidance`).",
    }

    regression: float = Field(0.25, ge=0, description="λ, weight of regression on stored pairs; 0 for none.")
    pairs: int = Field(2048, ge=1, description="Stored pairs of noise and the teacher's sample, if regression is used.")
    fake_rate: float = Field(1e-3, gt=0, description="Learning rate of the fake score.")
    t_min: float = Field(0.02, ge=0, lt=1, description="Least t of the noise that samples are compared at.")
    t_max: float = Field(0.98, gt=0, le=1, description="Largest t of this noise.")

    @model_validator(mode="after")
    def _times_in_order(self) -> Self:
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min is {self.t_min:g} and must lie below t_max ({self.t_max:g})")
        return self

    @property
    def requires(self) -> Requirements:
        """The student's own samples are shown to the teacher."""
        return Requirements(teacher="calls", teacher_autocast=True, teacher_model=True)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """For regression: the teacher's samples, once and stored."""
        if not self.regression:
            return {}
        train, teacher = context.splits["train"], denoiser(context.live_teacher())
        chosen = context.splits["pairs"] = Subset(train, range(min(self.pairs, len(train))))
        sampler = teacher.sampler
        settings = {"pairs": len(chosen), "seed": context.seed, "steps": sampler.steps, "guidance": sampler.guidance}
        times = teacher.times(sampler.steps)
        return context.once("dmd", lambda: {"outputs": teacher_outputs(context, chosen, times)}, **settings)

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        return sampled_like(student, context, steps=1, grid=1)

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        return {"fake": score_network(shapes)}

    def auxiliary_optimizers(self) -> Mapping[str, AuxiliaryOptimizer]:
        return {"fake": AuxiliaryOptimizer(("fake",), self.fake_rate)}

    def phases(self) -> Sequence[Phase]:
        return [Phase("dmd", split="pairs" if self.regression else "train")]

    def update_schedule(self, state: TrainState) -> Sequence[str]:
        return ("fake", "student")

    def transform_batch(self, batch: Batch, state: TrainState) -> Batch:
        """Fresh noise, of which the generator makes a sample."""
        assert isinstance(batch, NoiseBatch)
        return self._begun(batch, state, state.step + 1)  # the noise of step 0 belongs to the pairs

    def _begun(self, batch: NoiseBatch, state: TrainState, step: int) -> NoiseBatch:
        model = denoiser(state.student)
        eps = normal(batch.ids, model.shape, seed=state.seed, step=step).to(next(model.parameters()))
        return batch.at(model.initial(batch, eps), model.levels.snap(torch.tensor(model.sampler.t_max)))

    def auxiliary_loss(self, name: str, context: AuxiliaryContext, state: TrainState) -> Iterator[dict[str, Term]]:
        fake = denoiser(state.modules["fake"])
        for batch in context.batches:
            assert isinstance(batch, NoiseBatch)
            with torch.no_grad():
                x = context.student(batch).signal.values
            noisy = self._noised(x, batch, state, _FAKE)
            level = teacher_denoiser(state).levels.at(noisy.inputs["t"])
            yield {"fake": Term(denoising_loss(fake(noisy).signal.values, x, *level, fake.prediction))}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, NoiseBatch) and state.student is not None
        x, fake = student.signal.values, state.modules["fake"]
        with torch.no_grad(), evaluating(fake):
            noisy = self._noised(x, batch, state, _STUDENT)
            real, own = ask_teacher(state)(noisy).to(x.dtype), fake(noisy).signal.values.to(x.dtype)
        terms = {"dmd": Term(distribution_matching(x, real, own))}
        if self.regression:
            said = state.student(self._begun(batch, state, 0)).signal.values
            outputs = state.tables["outputs"][batch.ids.cpu()].to(said)
            terms["regression"] = Term(squared_error(said, outputs), self.regression)
        return terms

    def _noised(self, x: Tensor, batch: NoiseBatch, state: TrainState, stream: int) -> NoiseBatch:
        """Samples with noise of a random time."""
        levels = teacher_denoiser(state).levels
        t = levels.snap(self.t_min + time_for(batch, state, stream) * (self.t_max - self.t_min))
        return batch.at(noised(x, noise_for(batch, x, state, stream + 1), *levels.at(t)), t)

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """The teacher's calls for stored pairs."""
        if not self.regression:
            return {}
        calls = denoiser(context.live_teacher()).calls
        return {"metrics": {"stored_teacher_calls": float(len(state.tables["outputs"]) * calls)}}
