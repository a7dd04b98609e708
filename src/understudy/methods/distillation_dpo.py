"""4. Distillation-DPO: Diffusion Distillation With Direct Preference Optimization (2025).

Of each example the student g draws two samples from two noises, and a metric of any kind says which is the better one, x^w,
and which the worse, x^l. Two assistants ε_W and ε_L, which start as the teacher ε_T, learn the scores of the better and of
the worse samples, and the student follows the difference between their scores and the teacher's:

    assistants: minimise  mean (n − ε_W(x_t^w, t))² + mean (n − ε_L(x_t^l, t))²,   x_t = α_t x + σ_t n
    student:    minimise  mean (d^w · x^w) − λ mean (d^l · x^l),   d = stop[ ε_T(x_t, t) − ε_{W or L}(x_t, t) ]

The better sample moves towards the teacher's distribution and the worse one away from it. No gradient passes the metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from understudy.data import Batch, NoiseBatch
from understudy.data.noise import normal, uniform
from understudy.errors import InputError
from understudy.evaluation.sample_costs import CloudMetric, cloud_costs, metric_for, nearest_costs
from understudy.losses.diffusion import noised, over, squared_error
from understudy.losses.score_distillation import Ranking, rank_pairs, score_difference, score_distillation
from understudy.models import ModelAdapter, ModelOutput, evaluating
from understudy.models.diffusion import ddim
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
from understudy.training.denoising import denoiser, score_network, student_denoiser, teacher_denoiser
from understudy.training.divergence import DivergenceGuard

_STUDENT, _ASSISTANTS = 0, 2
"""First streams of noise: each pair of samples takes two, and each sample two more for its time and its noise."""
_TIMES, _NOISE = 4, 8


class DistillationDPO(Method):
    """A few-step student that is drawn to its teacher by its better samples and driven away by its worse ones."""

    name = "distillation-dpo"
    paper = 4
    kinds = frozenset({"noise"})
    cost = (
        "four student forwards (two with backward), two teacher calls and four assistant calls (two with backward) a row, "
        "and the metric of four samples; two assistants of the teacher's size in memory, with their optimiser"
    )
    used_with: ClassVar[dict[str, Any]] = {"voxel": {"metric": ("jsd", "iou")}}
    example: ClassVar[dict[str, Any]] = {"teacher": {"train": {"max_steps": 500}}, "trainer": {"max_steps": 300}}
    page: ClassVar[dict[str, str]] = {
        "when": "A diffusion model that needs tens of calls, and a measure of quality that has no gradient (Chamfer distance, "
        "a voxel score, a judge's mark): the student draws in one call or a few.",
        "not": "Without such a measure, or where winners and losers are hardly different: then `lambda_l=0`, score "
        "distillation on the winners, does the same and cannot diverge by the losers' term.",
        "deviations": "The released code multiplies d by x_t − α_t x, which holds no gradient of the student: its generator "
        "gradient is 0. That is `surrogate=released`, kept for comparison; the default is the paper's. Ties have weight 0 "
        "here, and count in the divisor; the code takes the second sample for the winner. λ is 0.1 and the optimiser Adam "
        "(code: 1 and SGD at 1e-5). Both assistants have one optimiser, without a clip of its own. Noise is added from t = "
        "0.02 on. Where the teacher is a closed form the assistants start as the student. A run that drives the winners' "
        "metric up is ended (`guard`). Scores are asked for without guidance; guidance belongs to sampling.",
    }

    metric: Literal["nearest"] | CloudMetric | None = Field(
        None,
        description="What ranks the two samples. Of scenes chamfer (the default), jsd, iou or emd; else nearest, the distance "
        "to the nearest training example. A subclass with its own `costs` ranks by anything else.",
    )
    voxel: float = Field(0.5, gt=0, description="Side of a voxel of the metrics jsd and iou.")
    lambda_l: float = Field(0.1, ge=0, description="λ, weight of the worse samples; 1 in the paper, 0 for none.")
    gamma: float | None = Field(
        1.1, gt=0, description="The second sample's noise is the first one's times γ; null: a noise of its own."
    )
    steps: int = Field(1, ge=1, description="Calls of the student for a sample; the last of them has a gradient.")
    assistant_rate: float = Field(1.5e-4, gt=0, description="Learning rate of the assistants, at least the student's.")
    assistant_optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="Optimiser of the assistants.")
    t_min: float = Field(0.02, ge=0, lt=1, description="Least t of the noise that samples are compared at.")
    clip: float | None = Field(None, gt=0, description="Largest root mean square of d in a sample; null: no bound.")
    guard: float = Field(
        2.0, gt=1, description="The run ends when the winners' mean metric exceeds so many times its lowest value."
    )
    surrogate: Literal["paper", "released"] = Field(
        "paper", description="released: the expression of the released code, whose gradient is 0."
    )

    @property
    def requires(self) -> Requirements:
        """The student's own samples are shown to the teacher."""
        return Requirements(teacher="calls", teacher_autocast=True, teacher_model=True)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """For the metric `nearest`: the training examples."""
        example = next(context.batches("train", 1))
        if (
            metric_for(self.metric, "clean" in example.inputs) != "nearest"
            or type(self).costs is not DistillationDPO.costs
        ):
            return {}
        reference = getattr(context.splits["train"], "reference", None)
        if reference is None or reference.examples is None:
            raise InputError(
                "options.metric=nearest compares samples with training examples, and these data have none: name data, or a "
                "method of your own that defines `costs`."
            )
        return {"examples": reference.examples()[0]}

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        model, teacher = student_denoiser(student, context), denoiser(context.live_teacher())
        if self.t_min >= teacher.sampler.t_max:
            raise InputError(
                f"options.t_min is {self.t_min:g} and samples begin at {teacher.sampler.t_max:g}: lower it."
            )
        model.sampler, model.clip = replace(model.sampler, steps=self.steps), None  # a bound stops the gradient
        return model

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        """An assistant for the winners, and one for the losers if they have a weight."""
        return {name: score_network(shapes) for name in self._sides}

    @property
    def _sides(self) -> tuple[str, ...]:
        return ("winner", "loser") if self.lambda_l else ("winner",)

    def init_state(self, total: int) -> DivergenceGuard:
        return DivergenceGuard(
            self.guard,
            f"Lower options.lambda_l (now {self.lambda_l:g}) or trainer.learning_rate, bound the scores (options.clip), or "
            "stop early (trainer.eval_strategy with patience).",
        )

    def auxiliary_optimizers(self) -> Mapping[str, AuxiliaryOptimizer]:
        return {"assistants": AuxiliaryOptimizer(self._sides, self.assistant_rate, self.assistant_optimizer)}

    def update_schedule(self, state: TrainState) -> Sequence[str]:
        return ("assistants", "student")

    def auxiliary_loss(self, name: str, context: AuxiliaryContext, state: TrainState) -> Iterator[dict[str, Term]]:
        for batch in context.batches:
            assert isinstance(batch, NoiseBatch)
            with torch.no_grad():
                pair = [context.student(self._shown(batch, state, i, _ASSISTANTS)).signal.values for i in (0, 1)]
            samples = self._ranked(pair, batch, state)[0].order(*pair)
            terms = {}
            for i, (side, x) in enumerate(zip(self._sides, samples, strict=False)):
                noisy, eps = self._noised(x, batch, state, _ASSISTANTS + i)
                said = denoiser(state.modules[side]).epsilon(noisy)
                terms[f"assistant/{side}"] = Term(squared_error(said, eps))
            yield terms

    def transform_batch(self, batch: Batch, state: TrainState) -> Batch:
        """What the student sees in the last call for its first sample."""
        assert isinstance(batch, NoiseBatch)
        return self._shown(batch, state, 0, _STUDENT)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, NoiseBatch) and state.student is not None
        first = student.signal.values
        pair = [first, state.student(self._shown(batch, state, 1, _STUDENT)).signal.values]
        ranking, costs = self._ranked(pair, batch, state)
        kept = (~ranking.tie).to(first.dtype)
        weights = {"winner": 1.0, "loser": -self.lambda_l}
        terms = {}
        for side, x in zip(self._sides, ranking.order(*pair), strict=False):
            terms[side] = Term(kept * self._surrogate(x, side, batch, state), weights[side])
        better, worse = ranking.order(*costs)
        # Without weight: for the logs and the guard.
        return terms | {"metric/winner": Term(better, 0.0), "metric/loser": Term(worse, 0.0)}

    def _surrogate(self, x: Tensor, side: str, batch: NoiseBatch, state: TrainState) -> Tensor:
        """The values whose gradient to x is the difference of scores. Both samples get one noise at one time."""
        assert state.teacher is not None
        noisy, _ = self._noised(x, batch, state, _STUDENT)
        seen = batch.at(noisy.inputs["x"].detach(), noisy.inputs["t"])
        assistant = denoiser(state.modules[side])
        with torch.no_grad(), evaluating(assistant):
            theirs, ours = teacher_denoiser(state).epsilon(seen, state.teacher), assistant.epsilon(seen)
        alpha, _ = teacher_denoiser(state).levels.at(noisy.inputs["t"])
        moved = x if self.surrogate == "paper" else noisy.inputs["x"] - over(alpha, x) * x
        return score_distillation(moved, score_difference(theirs, ours, self.clip))

    def costs(self, samples: Tensor, batch: NoiseBatch, state: TrainState) -> Tensor:
        """What candidates are ranked by, `[rows]`, the lower the better; a subclass may ask anything here.

        Args:
            samples: `[rows, ...]`, detached.
            batch: of the same rows; `batch.inputs` holds what the data give beside noise.
        """
        metric = metric_for(self.metric, "clean" in batch.inputs)
        if metric == "nearest":
            return nearest_costs(samples, state.tables["examples"])
        return cloud_costs(metric, samples, batch.inputs["clean"], voxel=self.voxel)

    def _ranked(self, pair: Sequence[Tensor], batch: NoiseBatch, state: TrainState) -> tuple[Ranking, list[Tensor]]:
        costs = [self.costs(x.detach(), batch, state).to(x.device, torch.float64) for x in pair]
        return rank_pairs(*costs), [c.to(x.dtype) for c, x in zip(costs, pair, strict=True)]

    def _shown(self, batch: NoiseBatch, state: TrainState, which: int, stream: int) -> NoiseBatch:
        """The student's input in the last of its calls for one of the two samples."""
        model = denoiser(state.student)
        own = stream + (which if self.gamma is None else 0)
        eps = normal(batch.ids, model.shape, seed=state.seed, step=state.step, stream=own)
        eps = eps.to(next(model.parameters())) * (self.gamma if which and self.gamma is not None else 1.0)
        times = model.times(self.steps)
        x = model.initial(batch, eps)
        if self.steps > 1:
            with torch.no_grad(), evaluating(model):
                x = ddim(lambda b: model(b).signal.values, model.levels, batch, x, times[:-1])
        return batch.at(x, model.levels.snap(times[-2:-1].to(x.device)).expand(len(x)))

    def _noised(self, x: Tensor, batch: NoiseBatch, state: TrainState, stream: int) -> tuple[NoiseBatch, Tensor]:
        """Samples with noise of a random time, and the noise."""
        model = teacher_denoiser(state)
        where = {"seed": state.seed, "step": state.step}
        u = uniform(batch.ids, (), stream=_TIMES + stream, **where)
        t = model.levels.snap(self.t_min + u * (model.sampler.t_max - self.t_min))
        eps = normal(batch.ids, model.shape, stream=_NOISE + stream, **where).to(x)
        return batch.at(noised(x, eps, *model.levels.at(t)), t), eps

    def on_pre_optimizer_step(self, state: TrainState, means: Mapping[str, float]) -> None:
        state.method_state.update(means["metric/winner"])
