"""Consistency distillation: Consistency Models (Song et al. 2023).

A function f(x_t, t) gives the end, at the smallest time ε, of the teacher's trajectory through x_t. It is the identity at ε by
its form, and learned by being the same at neighbouring times t < t′ of a trajectory:

    f_θ(x_t, t) = c_skip(t) x_t + c_out(t) x̂_θ(x_t, t),   c_skip(ε) = 1,   c_out(ε) = 0
    x_t′ = α_t′ x + σ_t′ z,   x̂_t = one step of the teacher's solver from x_t′ to t
    loss = d( f_θ(x_t′, t′), f_θ⁻(x̂_t, t) ),   θ⁻ ← μ θ⁻ + (1 − μ) θ

A sample is f of noise; more calls noise it again, to ever smaller times, and denoise it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from understudy.data import Batch, NoiseBatch
from understudy.losses.diffusion import ddim_step, noised
from understudy.losses.step_distillation import Distance, consistency, consistency_function
from understudy.models import DenoiserAdapter, ModelAdapter, ModelOutput
from understudy.training import Phase, Requirements, SetupContext, Term, TrainState
from understudy.training.averages import AveragedMethod, follow, warmed_up
from understudy.training.denoising import (
    EXAMPLES,
    ask_teacher,
    denoiser,
    noise_for,
    sampled_like,
    time_for,
    with_examples,
)


class Consistency(AveragedMethod):
    """Consistency distillation (2023): one call leads from any noise level to the end of the teacher's trajectory."""

    name = "consistency"
    kinds = frozenset({"noise"})
    cost = (
        "two student forwards (one with backward, one of its average) and one teacher call a row; `solver=heun` one teacher "
        "call more, guidance twice the teacher's calls; two copies of the student"
    )
    example: ClassVar[dict[str, Any]] = {"teacher": {"train": {"max_steps": 500}}, "trainer": {"max_steps": 300}}
    page: ClassVar[dict[str, str]] = {
        "when": "A diffusion model that is to sample in one call or a few, with examples to noise (or the teacher's samples "
        "where there are none). Start from the teacher (`student=teacher`).",
        "not": "Where the last bit of quality counts more than calls: `progressive` keeps an ordinary sampler. Without data "
        "and without the time for samples of the teacher: `boot`.",
        "deviations": "In variance-preserving time, with the sampler's times (`intervals` equal steps from `t_min` to `t_max`) in "
        "the place of the paper's ρ = 7. c_skip = σ_ε / σ_t and c_out = α_ε − α_t σ_ε / σ_t, the DDIM step to ε: the student remains "
        "an ordinary denoiser, and one step of its sampler is f. Heun averages the teacher's x_0 at both ends. No LPIPS. "
        "Averages warm up. Guidance is the teacher's (`data.guidance`).",
    }

    intervals: int = Field(18, ge=1, description="N − 1, steps of the teacher between the smallest and largest time.")
    solver: Literal["ddim", "heun"] = Field("heun", description="Heun averages the teacher at both ends of the step.")
    distance: Distance = Field("l2", description="Mean of squared or of absolute differences.")
    target_decay: float = Field(0.95, ge=0, lt=1, description="μ, decay of the average that gives the target.")
    steps: int = Field(1, ge=1, description="Calls of the saved student for a sample.")
    samples: int = Field(10_000, ge=1, description="Samples of the teacher to train on where there are no data.")

    @property
    def requires(self) -> Requirements:
        """The teacher steps from noisy examples."""
        return Requirements(teacher="calls", teacher_model=True)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """The examples to noise."""
        with_examples(context, self.samples)
        return {}

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        model = sampled_like(student, context, self.steps, self.intervals)
        model.sampler = replace(model.sampler, renoise=True)
        return model

    def companions(self, student: ModelAdapter) -> dict[str, nn.Module]:
        return {"target": copy.deepcopy(student), **super().companions(student)}

    def phases(self) -> Sequence[Phase]:
        return [Phase("consistency", split=EXAMPLES)]

    def transform_batch(self, batch: Batch, state: TrainState) -> Batch:
        """x_t′ of the examples, at a random time of the grid above the smallest."""
        assert isinstance(batch, NoiseBatch)
        model, clean = denoiser(state.student), batch.inputs["clean"]
        later = self._times(model)[:-1].to(clean.device)
        t = later[(time_for(batch, state, 1) * len(later)).long()]
        return batch.at(noised(clean, noise_for(batch, clean, state), *model.levels.at(t)), t)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, NoiseBatch)
        values = self._end(denoiser(state.student), batch, student)
        return {"consistency": Term(consistency(values, self.target(batch, state).to(values.dtype), self.distance))}

    @torch.no_grad()
    def target(self, batch: NoiseBatch, state: TrainState) -> Tensor:
        """f of the average, after one step of the teacher to the time before."""
        model, ask = denoiser(state.companions["target"]), ask_teacher(state)
        grid, x = self._times(model).to(batch.inputs["t"].device), batch.inputs["x"]
        s = grid[(grid[:, None] == batch.inputs["t"]).int().argmax(0) + 1]
        now, then = model.levels.at(batch.inputs["t"]), model.levels.at(s)
        clean = ask(batch).to(x.dtype)
        before = batch.at(ddim_step(x, clean, *now, *then), s)
        if self.solver == "heun":
            clean = (clean + ask(before).to(x.dtype)) / 2
            before = batch.at(ddim_step(x, clean, *now, *then), s)
        return self._end(model, before, model(before))

    def _end(self, model: DenoiserAdapter, batch: NoiseBatch, said: ModelOutput) -> Tensor:
        """f of the model's output for a batch."""
        smallest = model.levels.at(self._times(model)[-1].to(batch.inputs["t"].device))
        clean = said.signal.values
        return consistency_function(
            batch.inputs["x"].to(clean.dtype), clean, model.levels.at(batch.inputs["t"]), smallest
        )

    def _times(self, model: DenoiserAdapter) -> Tensor:
        """The grid, from the largest time to the smallest: `[intervals + 1]`."""
        return model.levels.snap(model.times(self.intervals))

    def on_step_end(self, state: TrainState) -> None:
        assert state.student is not None
        follow(state.companions["target"], state.student, warmed_up(self.target_decay, state.step))
        super().on_step_end(state)
