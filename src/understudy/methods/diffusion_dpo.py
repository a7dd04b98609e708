"""Diffusion-DPO: Diffusion Model Alignment Using Direct Preference Optimization (Wallace et al. 2023).

Of a pair of examples x^w is preferred to x^l. Both get one noise n at one time t, and the model learns to denoise the preferred
one better than the reference does, by more than the other one:

    E(x) = mean (n − ε(x_t, t))²,   x_t = α_t x + σ_t n
    loss = −log σ( −β [ (E_θ(x^w) − E_ref(x^w)) − (E_θ(x^l) − E_ref(x^l)) ] )                                   (Eq. 14)

The reference is the run's teacher, which the student starts as. Pairs are columns of the data, or two samples of the teacher
for each condition, of which a metric says which is the better one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Subset

from understudy.data import Batch, NoiseBatch
from understudy.data.noise import normal
from understudy.data.noise_sets import ExampleSet
from understudy.errors import InputError
from understudy.evaluation.sample_costs import CloudMetric, cloud_costs, metric_for, nearest_costs
from understudy.losses.checks import check_finite
from understudy.losses.diffusion import noised, squared_error
from understudy.losses.preference import dpo
from understudy.losses.score_distillation import rank_pairs
from understudy.models import DenoiserAdapter, ModelAdapter, ModelOutput, evaluating
from understudy.models.diffusion import unclipped
from understudy.training import Method, Phase, Requirements, SetupContext, Term, TrainState
from understudy.training.denoising import denoiser, noise_for, student_denoiser, teacher_denoiser, time_for

log = logging.getLogger(__name__)


class DiffusionDPO(Method):
    """Diffusion-DPO (2023): a trained diffusion model learns preferences over pairs of examples."""

    name = "diffusion-dpo"
    kinds = frozenset({"noise"})
    cost = (
        "two student forwards and backwards and two teacher calls a pair; without columns of pairs, before it two samples of the "
        "teacher for each pair, and their metric"
    )
    example: ClassVar[dict[str, Any]] = {"teacher": {"train": {"max_steps": 500}}, "trainer": {"max_steps": 300}}
    page: ClassVar[dict[str, str]] = {
        "when": "A trained diffusion model, and pairs of better and worse examples (`data.image_column` and "
        "`data.rejected_column`), or a measure of quality without gradient for its own samples: the model keeps its sampler and its "
        "steps. `student=teacher` always: the reference is what it starts from. A subclass with its own `costs` ranks by anything.",
        "not": "For fewer steps (`distillation-dpo`, `consistency`, `dmd`), or for a student of one of these: it is trained at "
        "every noise level. Where real examples are to be preferred to samples: `lightgen`.",
        "deviations": "Conditions are classes or scans, not captions. Errors are means over an example's entries; β is βTω(λ) "
        "of Eq. 14, constant in t, and half of the released code's (its 5,000 is 2,500 here). Pairs of the model's own "
        "samples are ranked by a metric, not by people.",
    }

    metric: Literal["nearest"] | CloudMetric | None = Field(
        None,
        description="What ranks own samples. Of scenes chamfer (the default), jsd, iou or emd; else nearest, the distance to "
        "the nearest training example.",
    )
    voxel: float = Field(0.5, gt=0, description="Side of a voxel of the metrics jsd and iou.")
    pairs: int = Field(1024, ge=1, description="Pairs of own samples; ties are left out.")
    beta: float = Field(500.0, gt=0, description="β T ω(λ), strength of the tie to the reference.")
    t_min: float = Field(0.02, gt=0, lt=1, description="Least t of the noise; the largest is the sampler's.")

    @property
    def requires(self) -> Requirements:
        """The teacher is the reference, and sees the pairs with noise."""
        return Requirements(teacher="calls", teacher_autocast=True, teacher_model=True)

    # -- pairs ------------------------------------------------------------------------------------------------------

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """The pairs by id, and the split `pairs` of these ids."""
        reference = getattr(context.splits["train"], "reference", None)
        if reference is None or reference.rejected is None:
            return self._own(context)
        chosen, labels = reference.examples()
        kept = self._told_apart(chosen, rejected := reference.rejected(), "columns")
        condition = labels if context.classes else torch.full_like(labels, -1)
        context.splits["pairs"] = Subset(ExampleSet(chosen, condition), kept)
        return {"chosen": chosen, "rejected": rejected}

    def _own(self, context: SetupContext) -> Mapping[str, Tensor]:
        """Two samples of the teacher for each id, ranked."""
        model, train = denoiser(context.live_teacher()), context.splits["train"]
        ids = Subset(train, range(min(self.pairs, len(train))))
        settings = {
            "class": type(self).__qualname__,
            "seed": context.seed,
            "steps": model.sampler.steps,
            "pairs": len(ids),
        }
        settings |= {"metric": self.metric, "voxel": self.voxel, "guidance": model.sampler.guidance}
        found = context.once("diffusion-dpo", lambda: self._ranked(context, model, ids), **settings)
        context.splits["pairs"] = Subset(ids, self._told_apart(found["chosen"], found["rejected"], "metric"))
        return found

    def _ranked(self, context: SetupContext, model: DenoiserAdapter, ids: Subset[Any]) -> dict[str, Tensor]:
        parts = []
        for batch in context.collated(ids, 256):
            assert isinstance(batch, NoiseBatch)
            pair = [_drawn(model, batch, context.seed, stream) for stream in (0, 1)]
            ranking = rank_pairs(*(self.costs(x, batch, context).cpu().double() for x in pair))
            better, worse = ranking.order(*pair)
            tie = ranking.tie.view(-1, *[1] * (better.dim() - 1))
            parts.append((better, torch.where(tie, better, worse)))  # a tie is a pair of equals
        better, worse = (torch.cat(side) for side in zip(*parts, strict=True))
        return {"chosen": better, "rejected": worse}

    def costs(self, samples: Tensor, batch: NoiseBatch, context: SetupContext) -> Tensor:
        """What own samples are ranked by, `[rows]`, the lower the better; a subclass may ask anything here.

        Args:
            samples: `[rows, ...]`.
            batch: of the same rows; `batch.inputs` holds what the data give beside noise.
        """
        metric = metric_for(self.metric, "clean" in batch.inputs)
        if metric != "nearest":
            return cloud_costs(metric, samples, batch.inputs["clean"].to(samples), voxel=self.voxel)
        reference = getattr(context.splits["train"], "reference", None)
        if reference is None or reference.examples is None:
            raise InputError(
                "options.metric=nearest compares samples with training examples, and these data have none: name data, give "
                "pairs (data.rejected_column), or a method of your own that defines `costs`."
            )
        return nearest_costs(samples, reference.examples()[0])

    def _told_apart(self, chosen: Tensor, rejected: Tensor, by: str) -> list[int]:
        """The pairs of two different examples."""
        kept = (chosen != rejected).flatten(1).any(1)
        if not bool(kept.any()):
            raise InputError(f"Every pair is a tie: the {by} tell no two examples apart. Give others.")
        if not bool(kept.all()):
            log.warning("diffusion-dpo: %d of %d pairs are ties and were left out.", int((~kept).sum()), len(kept))
        return kept.nonzero()[:, 0].tolist()

    # -- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        model, teacher = student_denoiser(student, context), denoiser(context.live_teacher())
        batch, home = next(context.batches("train", 2)), next(model.parameters())
        assert isinstance(batch, NoiseBatch)
        x = normal(batch.ids, model.shape, seed=0, step=0).to(home)
        seen = batch.to(home.device).at(x, teacher.levels.snap(torch.tensor(0.5, device=home.device)))
        with evaluating(model, teacher), unclipped(model, teacher):
            ours, theirs = model.epsilon(seen), teacher.to(home.device).epsilon(seen)
        if not torch.allclose(ours, theirs.to(ours), rtol=1e-3, atol=1e-4):
            raise InputError(
                "The student does not start as the teacher, which is the reference that preferences are relative to: set "
                "student=teacher, and the model to refine as teacher."
            )
        model.sampler, model.clip = teacher.sampler, None  # a bound of x_0 stops the gradient
        return model

    def phases(self) -> Sequence[Phase]:
        return [Phase("preference", split="pairs")]

    def transform_batch(self, batch: Batch, state: TrainState) -> Batch:
        """The chosen side with noise of a random time."""
        assert isinstance(batch, NoiseBatch)
        return self._noised("chosen", batch, state)

    def _noised(self, side: str, batch: NoiseBatch, state: TrainState) -> NoiseBatch:
        """One side of the pairs, with the noise and the time of both."""
        model = denoiser(state.student)
        x = state.tables[side][batch.ids.cpu()].to(next(model.parameters()))
        t = model.levels.snap(self.t_min + time_for(batch, state, 1) * (model.sampler.t_max - self.t_min))
        return batch.at(noised(x, noise_for(batch, x, state), *model.levels.at(t)), t)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, NoiseBatch)
        model, reference = denoiser(state.student), teacher_denoiser(state)
        worse, asked = self._noised("rejected", batch, state), state.teacher
        noise = noise_for(batch, batch.inputs["x"], state)
        said = {"chosen": model.epsilon(batch, lambda _: student), "rejected": model.epsilon(worse)}
        with unclipped(reference):  # as the student
            said |= {"chosen_ref": reference.epsilon(batch, asked), "rejected_ref": reference.epsilon(worse, asked)}
        errors = {name: squared_error(value.to(noise), noise) for name, value in said.items()}
        for name, values in errors.items():
            check_finite(
                values.detach(),
                lambda value, at, name=name: (
                    f"The error of the {name} side of pair {at} is {value}: lower the learning rate."
                ),
            )
        chosen, rejected, chosen_ref, rejected_ref = errors.values()
        terms = {"dpo": Term(dpo(-chosen, -rejected, -chosen_ref, -rejected_ref, beta=self.beta))}
        margin = (rejected - rejected_ref - chosen + chosen_ref).detach()
        # Logged and not trained on: if both errors rise, the learning rate is too high.
        seen = {"error/chosen": chosen, "error/rejected": rejected, "rewards/accuracies": (margin > 0).to(margin)}
        return terms | {name: Term(value.detach(), 0.0) for name, value in seen.items()}

    def export(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        """With the bound of x_0 that the teacher samples with."""
        model = denoiser(student)
        model.clip = denoiser(context.live_teacher()).clip
        return model

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """The mean cost of samples for the evaluated split, and that of the reference's from the same noise."""
        split = context.splits[context.eval_split]
        if getattr(split, "reference", None) is not None and split.reference.rejected is not None:
            return {}
        metrics = {}
        for name, model in (("cost", denoiser(state.student)), ("reference_cost", denoiser(context.live_teacher()))):
            batches = [batch for batch in context.collated(split, 256) if isinstance(batch, NoiseBatch)]
            costs = [self.costs(_drawn(model, batch, 0, 0), batch, context).cpu() for batch in batches]
            metrics[name] = float(torch.cat(costs).double().mean())
        return {"metrics": metrics}


def _drawn(model: DenoiserAdapter, batch: NoiseBatch, seed: int, stream: int) -> Tensor:
    """Samples of a model for a batch, on the CPU."""
    home = next(model.parameters())
    eps = normal(batch.ids, model.shape, seed=seed, step=0, stream=stream).to(home)
    with evaluating(model):
        return model.draw(batch.to(home.device), eps).cpu()
