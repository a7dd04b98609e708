"""38. Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation (2021).

    generation 1: L = mse(softmax(z), y)
    generation t: L = α_t · mse(softmax(z), y) + (1 − α_t) · mse(softmax(z), softmax(z of generation t − 1)), a new network
    α_t = ⟨p₁ − p₀, y − p₀⟩ / ‖p₁ − p₀‖², unless it is given

This is the best on the line between two fits of the validation labels y: p₁ of generation 1 (α = 1) and p₀ of a network that
learns from generation t − 1 alone (α = 0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from understudy.curation import Funnel, Item
from understudy.curation.closed_forms import best_alpha
from understudy.data import Batch
from understudy.errors import InputError
from understudy.losses.classification import check_labels, probability_mse
from understudy.models import ModelOutput, evaluating
from understudy.streaming.plain import logits_of
from understudy.tasks import get as get_task
from understudy.training import Method, Pipeline, PipelineContext, Requirements, Term, TrainState

_KEYS = ("task", "student", "trainer", "data", "reduction", "eval_split", "patience")
_METRICS = ("accuracy", "nll", "ece")


class ProbabilityMSE(Method):
    """Squared error of probabilities to the labels and the teacher's probabilities; `alpha` weighs the labels.

        loss = α · mse(softmax(z), y) + (1 − α) · mse(softmax(z), softmax(z of the teacher))

    y are the labels, one-hot, and z logits.
    """

    name = "probability-mse"
    kinds = frozenset({"image"})
    cost = "as kd"
    page: ClassVar[dict[str, str]] = {
        "when": "One generation of ground-truth self-distillation, from a teacher of your own.",
        "not": "When a first fit is far off: where the student is sure of a wrong class the gradient vanishes, and that of "
        "cross-entropy does not.",
    }

    alpha: float = Field(0.5, ge=0, le=1, description="α, weight of the labels; the teacher has 1 − α.")

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="none" if self.alpha == 1 else "outputs")

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        logits, labels, terms = student.signal.logits, batch.row_labels, {}
        if self.alpha:
            check_labels(self.name, labels, logits.shape[-1])
            target = F.one_hot(labels, logits.shape[-1]).to(logits)
            terms["labels"] = Term(probability_mse(logits, target), self.alpha)
        if self.alpha < 1:
            assert teacher is not None
            target = logits_of(teacher.signal).softmax(-1)
            terms["teacher"] = Term(probability_mse(logits, target), 1 - self.alpha)
        return terms


class Weight(Item):
    """α of a generation, and as it was before it was clipped."""

    alpha: float
    unclipped: float


class GroundTruthSelfDistillation(Pipeline):
    """Each generation is a new network that learns from the labels and the one before it."""

    name = "ground-truth-self-distillation"
    paper = 38
    kinds = frozenset({"image"})
    cost = "a training a generation, and one more a generation where α is estimated"
    page: ClassVar[dict[str, str]] = {
        "when": "No larger teacher is at hand and labels are noisy or few: soft targets of the network's own kind regularise. "
        "For kernel regression every generation, the limit and the best α have closed forms: "
        "`understudy.curation.closed_forms.KernelDistillation`.",
        "not": "With clean and plentiful labels there is little to gain. α weighs the labels here; many other codes weigh the "
        "teacher. No fixed α is best everywhere: with much label noise a low one wins, and α = 0 regularises more and more, in "
        "the limit to nothing. The best α of a generation is greedy: later generations can be worse, so read the table of "
        "all of them. The gradient of the loss vanishes where softmax saturates, also at a wrong class.",
        "deviations": "The penalty is the trainer's weight decay; the released code adds unsquared norms. The released code "
        "chooses checkpoints on the test set; here the last generation is judged, and α is chosen on validation examples. "
        "Estimated α is clipped to [0, 1], as networks are not linear in it.",
    }

    generations: int = Field(5, ge=2, description="Networks that are trained in turn, the first on the labels alone.")
    alpha: Annotated[float, Field(ge=0, le=1)] | list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None, description="α of generations 2, 3, …: one for all, or a list; estimated on validation if not given."
    )

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="none")

    def run(self, context: PipelineContext) -> dict[str, Any]:
        alphas = self._given()
        first = previous = context.train("generation-1", self._generation(context, 1, 1.0, None))
        rows = [_row(1, "", first)]
        metrics = {f"first_{name}": first.metrics[name] for name in _METRICS}
        for t in range(2, self.generations + 1):
            alpha = alphas[t - 2]
            if alpha is None:
                pure = context.train(f"generation-{t}-pure", self._generation(context, t, 0.0, previous))
                estimate = partial(self._estimate, context, first, pure)
                (weight,) = context.stage(f"alpha-{t}", Weight, estimate)
                alpha, metrics[f"unclipped_alpha_{t}"] = weight.alpha, weight.unclipped
            previous = context.train(f"generation-{t}", self._generation(context, t, alpha, previous))
            rows.append(_row(t, f"{alpha:.4g}", previous))
            metrics[f"alpha_{t}"] = alpha
        inner = json.loads((previous.folder / "evaluation.json").read_text(encoding="utf-8"))
        table = {"title": "Generations", "headings": ["generation", "alpha", *_METRICS], "rows": rows}
        notes = [
            *inner.get("notes", []),
            f"The student is {previous.folder.name}/student; cost is that of its training.",
        ]
        tables = [table, *inner.get("tables", [])]
        return {**inner, "metrics": {**inner["metrics"], **metrics}, "tables": tables, "notes": notes}

    def _given(self) -> list[float | None]:
        """α of generations 2, 3, …; `None` where it is to be estimated."""
        number = self.generations - 1
        if not isinstance(self.alpha, list):
            return [self.alpha] * number
        if len(self.alpha) != number:
            raise InputError(
                f"options.alpha lists {len(self.alpha)} weights and generations 2 to {self.generations} take {number}: list "
                "one for each, or give one number."
            )
        return list(self.alpha)

    def _generation(self, context: PipelineContext, t: int, alpha: float, before: Any) -> dict[str, Any]:
        """The recipe of a new network that learns from the labels with weight `alpha` and from the one before it."""
        recipe = {k: context.recipe[k] for k in _KEYS if k in context.recipe}
        teacher = {"teacher": str(before.folder / "student")} if alpha < 1 else {}
        seed = context.recipe["seed"] + _APART * (t - 1)
        return {**recipe, **teacher, "method": ProbabilityMSE.name, "options": {"alpha": alpha}, "seed": seed % 2**32}

    def _estimate(self, context: PipelineContext, first: Any, pure: Any, funnel: Funnel) -> list[Weight]:
        """The best α of a generation, from the validation probabilities of the fits with α = 1 and α = 0."""
        task = get_task(context.recipe["task"])
        prepared = task.prepare(SimpleNamespace(**context.recipe))
        seen = []
        for fit in (first, pure):
            model = task.model(context.models["student"], prepared, fit.folder / "student")
            seen.append(_probabilities(model, prepared))
        (p1, truth), (p0, _) = seen
        found = float(best_alpha(p1, p0, truth))
        return [Weight(alpha=min(1.0, max(0.0, found)), unclipped=found)]


_APART = 7919
"""Between the seeds of generations, so that those of two runs with near seeds are different."""


@torch.no_grad()
def _probabilities(model: Any, prepared: Any) -> tuple[Tensor, Tensor]:
    """The model's probabilities of the labelled validation examples and their one-hot labels, `[examples, classes]`."""
    device, parts = next(model.parameters()).device, []
    with evaluating(model):
        for start in range(0, len(prepared.validation), 64):
            stop = min(start + 64, len(prepared.validation))
            chosen = [prepared.validation[i] for i in range(start, stop)]
            batch = Batch.from_dict(prepared.collate(chosen)).to(device)
            labelled = batch.row_labels >= 0
            probabilities = logits_of(model(batch).signal).double().softmax(-1)[labelled]
            parts.append((probabilities, F.one_hot(batch.row_labels[labelled], probabilities.shape[-1]).double()))
    found, truth = (torch.cat(column) for column in zip(*parts, strict=True))
    return found, truth


def _row(generation: int, alpha: str, result: Any) -> list[Any]:
    metrics: Mapping[str, float] = result.metrics
    return [generation, alpha, *(f"{metrics[name]:.4f}" for name in _METRICS)]
