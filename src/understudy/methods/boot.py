"""25. BOOT: Data-free Distillation of Diffusion Models with Bootstrapping (2023).

A one-step generator g(ε, t) learns the signal y_t = (x_t − σ_t ε) / α_t of the teacher's deterministic trajectory that
begins at ε. Its value at an earlier time s = t − δ is bootstrapped from its own value at t and one teacher step:

    x̂ = α_t g(ε, t) + σ_t ε,    target = stop[ g(ε, t) + c (f(x̂, t) − g(ε, t)) ],    c = 1 − exp(λ_s − λ_t)
    loss = w · mean (g(ε, s) − target)² + β · mean (g(ε, t_max) − f(ε, t_max))²

Only noise goes in: no examples, and no stored trajectories. A sample is g(ε, t_min).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from understudy.data import Batch, NoiseBatch
from understudy.data.noise import normal, uniform
from understudy.errors import InputError
from understudy.evaluation.generation import SampleEvaluator, draw
from understudy.losses import diffusion
from understudy.models import DenoiserAdapter, ModelAdapter, ModelOutput, evaluating
from understudy.models.diffusion import trajectory
from understudy.models.noise_levels import NoiseLevels
from understudy.training import Requirements, SetupContext, Term, TrainState
from understudy.training.averages import AveragedMethod
from understudy.training.denoising import (
    ask_teacher,
    denoiser,
    student_denoiser,
    teacher_denoiser,
    teacher_outputs,
)


class BOOT(AveragedMethod):
    """A diffusion teacher as a generator of one call, from noise alone."""

    name = "boot"
    paper = 25
    kinds = frozenset({"noise"})
    cost = (
        "three student forwards (two with backward) and two teacher calls a row; `solver=heun` one teacher call more, "
        "guidance twice the teacher's calls"
    )
    example: ClassVar[dict[str, Any]] = {"teacher": {"train": {"max_steps": 500}}, "trainer": {"max_steps": 300}}
    page: ClassVar[dict[str, str]] = {
        "when": "A trained diffusion model without its data, that is to draw in one call and may not store trajectories.",
        "not": "Where storing pairs of noise and output is no trouble: plain regression on them (`target=regression`) "
        "with as many teacher calls is the baseline to beat, and in two dimensions it is the better one.",
        "deviations": "There is no official code. Reconstructed: the form of the weights (`inv_delta` is the paper's "
        "normalisation), β, the optimiser. The step is the exact one, c = 1 − exp(λ_s − λ_t), not its first order. The "
        "average of weights warms up. Noise is all that the student sees, so its output is always read as the teacher's "
        "at t_max; of a teacher that predicts ε it is read as v, which keeps the weights but not what they say at the "
        "start. Guidance is the teacher's (`data.guidance`), fixed; the student is not told it. Teachers are "
        "unconditional or told a class; text conditions are not in this method. `target=regression` and "
        "`target=boundary` are the baseline and the ablation of the claim.",
    }

    delta: float = Field(1 / 32, gt=0, lt=1, description="t − s, with t in [0, 1].")
    t_min: float = Field(0.01, ge=0, lt=1, description="Time of a sample.")
    t_max: float = Field(0.99, gt=0, le=1, description="Time at which a trajectory begins.")
    weight: Literal["uniform", "inv_delta", "inv_coef"] = Field("inv_delta", description="1, 1/δ² or 1/c² a row.")
    beta: float = Field(1.0, ge=0, description="Weight of the boundary loss; to be read together with `weight`.")
    solver: Literal["ddim", "heun"] = Field("ddim", description="Heun averages the teacher at both ends of the step.")
    ema: float = Field(
        0.9999, ge=0, lt=1, description="Decay of the average of weights, which is what is saved; 0 saves the student."
    )
    target: Literal["bootstrap", "boundary", "regression"] = Field(
        "bootstrap",
        description="boundary: that loss alone (one DDIM step, the ablation); regression: on stored pairs of noise and "
        "the teacher's output (the baseline).",
    )
    steps: int = Field(32, ge=1, description="Teacher calls for each pair of `target=regression`.")
    refine: int = Field(0, ge=0, description="Report also samples that this many teacher steps improve.")
    refine_from: float = Field(0.5, gt=0, lt=1, description="Time at which they begin.")

    @model_validator(mode="after")
    def _times_in_order(self) -> Self:
        if self.t_min + self.delta > self.t_max:
            raise ValueError(f"t_min + delta is {self.t_min + self.delta:g} and must not exceed t_max ({self.t_max:g})")
        if self.refine and self.refine_from <= self.t_min:
            raise ValueError(f"refine_from is {self.refine_from:g} and must lie above t_min ({self.t_min:g})")
        return self

    @property
    def requires(self) -> Requirements:
        """The student's own states are shown to the teacher."""
        return Requirements(teacher="calls", teacher_model=True)

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        model, teacher = student_denoiser(student, context), denoiser(context.live_teacher())
        if float(teacher.levels.snap(torch.tensor(self.delta))) == 0:
            raise InputError(f"options.delta is {self.delta:g}, less than a step of the teacher's schedule: raise it.")
        return model.one_call(self.t_max if self.target == "boundary" else self.t_min, self.t_max)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """For `target=regression`: the teacher's outputs for the noise of every id, once and stored."""
        if self.target != "regression":
            return {}
        settings = {"seed": context.seed, **self.model_dump(include={"t_min", "t_max", "steps"})}
        settings["guidance"] = denoiser(context.live_teacher()).sampler.guidance
        times = torch.linspace(self.t_max, self.t_min, self.steps + 1, dtype=torch.float64)
        train = context.splits["train"]
        return context.once("pairs", lambda: {"outputs": teacher_outputs(context, train, times)}, **settings)

    def transform_batch(self, batch: Batch, state: TrainState) -> Batch:
        """ε at the time the student learns: s of a random step for the bootstrap."""
        assert isinstance(batch, NoiseBatch) and state.student is not None
        levels = _levels(state)
        stored = self.target == "regression"  # the noise of a stored pair is always the same
        eps = _noise(state.student, batch, state.seed, 0 if stored else state.step).to(next(state.student.parameters()))
        if self.target == "bootstrap":
            u = uniform(batch.ids, (), seed=state.seed, step=state.step, stream=1)
            t = levels.snap(self.t_min + self.delta + u * (self.t_max - self.t_min - self.delta))
            return batch.at(eps, t - self._step(levels))
        return batch.at(eps, levels.snap(torch.tensor(self.t_min if stored else self.t_max)))

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, NoiseBatch) and state.student is not None
        y_s, eps = student.signal.values, batch.inputs["x"]
        if self.target == "regression":
            outputs = state.tables["outputs"][batch.ids.cpu()].to(y_s)
            return {"regression": Term(diffusion.squared_error(y_s, outputs))}
        first = batch.at(eps, _levels(state).snap(torch.tensor(self.t_max)))
        begun = ask_teacher(state)(first).to(y_s.dtype)
        if self.target == "boundary":
            return {"boundary": Term(diffusion.boundary(y_s, begun))}
        target, weight = self._target(batch, state)
        terms = {"bootstrap": Term(diffusion.bootstrapping(y_s, target.to(y_s.dtype), weight))}
        if self.beta:
            y_first = state.student(first).signal.values
            terms["boundary"] = Term(diffusion.boundary(y_first, begun), self.beta)
        return terms

    @torch.no_grad()
    def _target(self, batch: NoiseBatch, state: TrainState) -> tuple[Tensor, Tensor]:
        """The student's signal at t after one teacher step to s, and the weight of each row."""
        assert state.student is not None
        levels, ask = _levels(state), ask_teacher(state)
        eps, s = batch.inputs["x"], batch.inputs["t"]
        t = s + self._step(levels)
        now, then = levels.at(t), levels.at(s)
        with evaluating(state.student):
            y_t = state.student(batch.at(eps, t)).signal.values
        f = ask(batch.at(diffusion.noised(y_t, eps, *now), t))
        c = diffusion.ddim_coefficient(*now, *then)
        target = diffusion.bootstrap_target(y_t, f, c)
        if self.solver == "heun":
            f_s = ask(batch.at(diffusion.noised(target, eps, *then), s))
            target = diffusion.bootstrap_target(y_t, (f + f_s) / 2, c)
        bad = ~target.flatten(1).isfinite().all(1)
        if bool(bad.any()):
            raise InputError(
                f"The bootstrap target is not finite for t from {float(t[bad].min()):.4f} to {float(t[bad].max()):.4f}: "
                "lower the learning rate, or narrow options.t_min and options.t_max."
            )
        return target, diffusion.bootstrap_weight(self.weight, t - s, c)

    def _step(self, levels: NoiseLevels) -> Tensor:
        return levels.snap(torch.tensor(self.delta, dtype=torch.float64))

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """The teacher's calls for stored pairs, and samples refined by a few teacher steps, where asked for."""
        metrics: dict[str, float] = {}
        if self.target == "regression":
            metrics["stored_teacher_calls"] = float(len(state.tables["outputs"]) * self.steps)
        if self.refine:
            metrics |= self._refined(denoiser(state.student), denoiser(context.live_teacher()), context)
        return {"metrics": metrics}

    @torch.no_grad()
    def _refined(self, student: DenoiserAdapter, teacher: DenoiserAdapter, context: SetupContext) -> dict[str, float]:
        """From the student's own state at `refine_from`, down to t_min along the teacher: on the test split."""
        examples = context.splits["test"]
        reference = examples.reference
        times = torch.linspace(self.refine_from, self.t_min, self.refine + 1, dtype=torch.float64)
        parts, home = [], next(student.parameters())
        with evaluating(student, teacher):
            for batch in context.batches("test", 256):
                assert isinstance(batch, NoiseBatch)
                eps = _noise(student, batch, 0, 0).to(home)
                t = teacher.levels.snap(times[:1].to(home.device)).expand(len(eps))
                y = student(batch.at(eps, t)).signal.values
                x = diffusion.noised(y, eps, *teacher.levels.at(t))
                teacher.to(home.device)
                parts.append(trajectory(teacher.denoise, teacher.levels, batch, x, times, eps).cpu().float())
            samples = torch.cat(parts)
            loader = torch.utils.data.DataLoader(examples, batch_size=256, collate_fn=context.collate)
            best = draw(teacher, loader, reference.many)
        found = {
            "refined_nfe": 1.0 + teacher.calls_for(self.refine),
            "refined_rmse": float((samples - best).square().mean().sqrt()),
        }
        if reference.examples is not None:
            found["refined_distance"] = SampleEvaluator(reference, *reference.examples()).distance(samples)
        return found


def _noise(model: Any, batch: NoiseBatch, seed: int, step: int) -> Tensor:
    return normal(batch.ids, model.shape, seed=seed, step=step)


def _levels(state: TrainState) -> NoiseLevels:
    return teacher_denoiser(state).levels
