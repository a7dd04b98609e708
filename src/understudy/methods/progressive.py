"""Progressive distillation: Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho 2022).

The number of sampling steps is halved again and again, in one phase each. In a phase a student of N steps learns to do in one
DDIM step, from t to t″, what its teacher does in two, by way of the time t′ between:

    z_t = α_t x + σ_t ε,   x̃ = (z_t″ − (σ_t″ / σ_t) z_t) / (α_t″ − (σ_t″ / σ_t) α_t),   z_t″ from two steps of the teacher
    loss = w(λ_t) mean (x̃ − x̂_θ(z_t))²,   t one of the N times that the student samples at

The teacher of the first phase is the run's; of every other it is the student that the phase before left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from understudy.data import Batch, NoiseBatch
from understudy.losses.diffusion import ddim_step, noised
from understudy.losses.step_distillation import SnrWeight, progressive, snr_weight, two_step_target
from understudy.models import ModelAdapter, ModelOutput
from understudy.training import Method, Phase, Requirements, SetupContext, Term, TrainState
from understudy.training.averages import take
from understudy.training.denoising import (
    EXAMPLES,
    ask_teacher,
    denoiser,
    noise_for,
    sampled_like,
    time_for,
    with_examples,
)


class Progressive(Method):
    """Progressive distillation (2022): one DDIM step of the student is two of its teacher, again and again."""

    name = "progressive"
    kinds = frozenset({"noise"})
    cost = (
        "one student forward and backward and two teacher calls a row (guidance twice as many, in the first phase alone); a "
        "copy of the student, which is the teacher from the second phase on"
    )
    example: ClassVar[dict[str, Any]] = {"teacher": {"train": {"max_steps": 500}}, "trainer": {"max_steps": 300}}
    page: ClassVar[dict[str, str]] = {
        "when": "A diffusion model that is to sample in a few calls and remain one: deterministic, with the same schedule, and "
        "every halving is of use by itself. Start from the teacher (`student=teacher`).",
        "not": "For one call: errors add up over the halvings, and `consistency` or `dmd` need no phases.",
        "deviations": "Phases have equal shares of the steps, with the recipe's schedule of the learning rate in each; the paper "
        "gives the last two twice as many. Times are those of the sampler (`t_max` to `t_min`), t is one of them. Errors are those "
        "of x_0 with a weight, whatever the network predicts. Without data the examples are the teacher's samples. Guidance "
        "is the teacher's (`data.guidance`), learned in the first phase. No average of weights.",
    }

    start_steps: int = Field(
        16, ge=2, description="Steps of the teacher's sampler in the first phase: `steps` times a power of two."
    )
    steps: int = Field(1, ge=1, description="Steps of the student's sampler at the end.")
    weight: SnrWeight = Field(
        "truncated_snr", description="Of an error in x_0: SNR (the error in ε), max(SNR, 1), or SNR + 1 (that in v)."
    )
    samples: int = Field(10_000, ge=1, description="Samples of the teacher to train on where there are no data.")

    @model_validator(mode="after")
    def _halves_to_the_end(self) -> Self:
        ratio, rest = divmod(self.start_steps, self.steps)
        if rest or ratio < 2 or ratio & (ratio - 1):
            raise ValueError(
                f"start_steps is {self.start_steps} and must be steps ({self.steps}) times 2, 4, 8, ...: each phase halves it"
            )
        return self

    @property
    def requires(self) -> Requirements:
        """The teacher sees noisy examples at two times."""
        return Requirements(teacher="calls", teacher_model=True)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """The examples to noise."""
        with_examples(context, self.samples)
        return {}

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        return sampled_like(student, context, self.steps, self.start_steps)

    def companions(self, student: ModelAdapter) -> dict[str, nn.Module]:
        return {"teacher": copy.deepcopy(student)}

    def phases(self) -> Sequence[Phase]:
        number = (self.start_steps // self.steps).bit_length() - 1
        halved = [self.start_steps >> k for k in range(1, number + 1)]
        return [Phase(f"{steps}-steps", 1 / number, split=EXAMPLES) for steps in halved]

    def on_phase_begin(self, state: TrainState) -> None:
        """The student as the phase before left it is the teacher."""
        assert state.student is not None
        take(state.companions["teacher"], state.student)

    def transform_batch(self, batch: Batch, state: TrainState) -> Batch:
        """z_t of the examples, at one of the times of the student's sampler in this phase."""
        assert isinstance(batch, NoiseBatch)
        model, clean = denoiser(state.student), batch.inputs["clean"]
        begins = self._times(state)[:-2:2].to(clean.device)
        t = begins[(time_for(batch, state, 1) * len(begins)).long()]
        return batch.at(noised(clean, noise_for(batch, clean, state), *model.levels.at(t)), t)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, NoiseBatch)
        said = student.signal.values
        weight = snr_weight(self.weight, *denoiser(state.student).levels.at(batch.inputs["t"]))
        return {"progressive": Term(progressive(said, self.target(batch, state).to(said.dtype), weight))}

    @torch.no_grad()
    def target(self, batch: NoiseBatch, state: TrainState) -> Tensor:
        """x̃ of a batch with `x` and `t`, from two steps of the phase's teacher."""
        ask, levels = self._ask(state), denoiser(state.student).levels
        grid = self._times(state).to(batch.inputs["t"].device)
        at = (grid[:, None] == batch.inputs["t"]).int().argmax(0)
        start, middle, end = (levels.at(grid[at + k]) for k in range(3))
        x = batch.inputs["x"]
        first = ask(batch).to(x.dtype)
        second = ask(batch.at(ddim_step(x, first, *start, *middle), grid[at + 1])).to(x.dtype)
        return two_step_target(first, second, start, middle, end)

    def _times(self, state: TrainState) -> Tensor:
        """The times of the phase's teacher, of which the student's are every second."""
        model = denoiser(state.student)
        return model.levels.snap(model.times(2 * int(state.phase.partition("-")[0])))

    def _ask(self, state: TrainState) -> Callable[[NoiseBatch], Tensor]:
        """x_0 by the phase's teacher."""
        if state.phase == self.phases()[0].name:
            return ask_teacher(state)
        model = denoiser(state.companions["teacher"])
        return lambda batch: model(batch).signal.values
