"""The ordinary training of a diffusion model on examples: noise them, and learn what they were.

    loss = mean (network(x_t, t) − its target)²,   t uniform, ε fresh at every step

It trains the teachers of generation; the students of that task need no examples.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from understudy.data import Batch, NoiseBatch
from understudy.data.noise import normal, uniform
from understudy.errors import InputError
from understudy.losses.diffusion import denoising_loss, noised
from understudy.models import DenoiserAdapter, ModelOutput
from understudy.training import Requirements, Term, TrainState
from understudy.training.averages import AveragedMethod


class Denoise(AveragedMethod):
    """The denoising loss of diffusion models, on real examples."""

    name = "denoise"
    kinds = frozenset({"noise"})
    cost = "one student forward and backward a row; no teacher; a copy of the student for the average"
    example: ClassVar[dict[str, Any]] = {"trainer": {"max_steps": 300}}
    page: ClassVar[dict[str, str]] = {
        "when": "To train a diffusion model that will be a teacher, or the baseline that sees the data itself.",
        "not": "When a trained diffusion model exists: `boot` makes it draw in one call, without data.",
        "deviations": "None: Ho et al. 2020, with every kind of prediction in its own unweighted error.",
    }

    drop_condition: float = Field(
        0.1, ge=0, le=1, description="How often a class is hidden, for classifier-free guidance."
    )

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="none")

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


def _rows(state: TrainState) -> DenoiserAdapter:
    if not isinstance(state.student, DenoiserAdapter):
        raise InputError("Method 'denoise' trains denoisers: use task=image_generation.")
    return state.student
