"""The ordinary training of a diffusion model on examples: noise them, and learn what they were.

    loss = mean (network(x_t, t) − its target)²,   t uniform, ε fresh at every step

It trains the teachers of generation; the students of that task need no examples.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from understudy.data import Batch, NoiseBatch
from understudy.data.noise import normal, uniform
from understudy.errors import InputError
from understudy.losses.diffusion import denoising_loss, noised
from understudy.models import DenoiserAdapter, ModelAdapter, ModelOutput
from understudy.training import Method, Requirements, Term, TrainState
from understudy.training.averages import averaged, follow, take, warmed_up


class Denoise(Method):
    """The denoising loss of diffusion models, on real examples."""

    name = "denoise"
    kinds = frozenset({"noise"})
    cost = "one student forward and backward a row; no teacher; a copy of the student for the average"
    page: ClassVar[dict[str, str]] = {
        "when": "To train a diffusion model that will be a teacher, or the baseline that sees the data itself.",
        "not": "When a trained diffusion model exists: `boot` makes it draw in one call, without data.",
        "deviations": "None: Ho et al. 2020, with every kind of prediction in its own unweighted error.",
    }

    ema: float = Field(
        0.999, ge=0, lt=1, description="Decay of the average of weights, which is what is saved; 0 for none."
    )
    drop_condition: float = Field(
        0.1, ge=0, le=1, description="How often a class is hidden, for classifier-free guidance."
    )

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="none")

    def companions(self, student: ModelAdapter) -> dict[str, nn.Module]:
        return {"average": copy.deepcopy(student)} if self.ema else {}

    def transform_batch(self, batch: Batch, state: TrainState) -> Batch:
        assert isinstance(batch, NoiseBatch)
        if "clean" not in batch.inputs:
            raise InputError("Method 'denoise' learns from examples, and this batch holds noise alone.")
        clean, levels, where = batch.inputs["clean"], _rows(state).levels, {"seed": state.seed, "step": state.step}
        t = levels.snap(uniform(batch.ids, (), stream=1, **where))
        eps = normal(batch.ids, clean.shape[1:], **where).to(clean.dtype)
        hidden = uniform(batch.ids, (), stream=2, **where) < self.drop_condition
        return batch.at(noised(clean, eps, *levels.at(t)), t, torch.where(hidden, -1, batch.condition))

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        rows = _rows(state)
        alpha, sigma = rows.levels.at(batch.inputs["t"])
        clean = batch.inputs["clean"]
        return {"denoise": Term(denoising_loss(student.signal.values, clean, alpha, sigma, rows.prediction))}

    def on_step_end(self, state: TrainState) -> None:
        if self.ema:
            follow(state.companions["average"], _rows(state), warmed_up(self.ema, state.step))

    def on_train_end(self, state: TrainState) -> None:
        if self.ema:
            take(_rows(state), state.companions["average"])

    def eval_model(self, student: ModelAdapter, state: TrainState) -> ModelAdapter:
        return averaged(student, state)


def _rows(state: TrainState) -> DenoiserAdapter:
    if not isinstance(state.student, DenoiserAdapter):
        raise InputError("Method 'denoise' trains denoisers: use task=image_generation.")
    return state.student
