"""17. DDK: Distilling Domain Knowledge for Efficient Large Language Models (2024).

The student lags its teacher more in some domains than in others, and these are drawn more often. With ℓ the perplexities on
held-out data of each of N domains, measured anew every K steps,

    r⁰ = softmax_i(ℓ_S[i] / ℓ_T[i])                                           (Eq. 1)
    ψ[i] = r[i] · exp(ℓ_S[i] / ℓ_T[i]),   r′[i] = α ψ[i] / Σψ + (1 − α) / N     (Eq. 2)
    loss = CE(student, labels) + γ · KL(teacher_τ ‖ student_τ)                (Eq. 3)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from understudy import losses
from understudy.curation.domains import example_weights, first_weights, next_weights, perplexity_ratios
from understudy.data import Batch
from understudy.errors import InputError
from understudy.evaluation.domains import domain_perplexities
from understudy.models import ModelOutput, evaluating
from understudy.streaming import rowwise
from understudy.training import Method, Requirements, SetupContext, Term, TrainState
from understudy.training.order import Sampling

HELD_OUT = "held-out domains"


class Mixture:
    """The weights of the domains, and what they were made of.

    Args:
        weights: one list an interval, r. ratios: one list an interval, ℓ_S / ℓ_T as it began.
    """

    def __init__(self) -> None:
        self.weights: list[list[float]] = []
        self.ratios: list[list[float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "ratios": self.ratios}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights, self.ratios = ([list(row) for row in state[name]] for name in ("weights", "ratios"))

    def logs(self) -> dict[str, float]:
        """The largest ratio and the largest weight of the interval."""
        if not self.weights:
            return {}
        return {"worst_ratio": max(self.ratios[-1]), "largest_weight": max(self.weights[-1])}


class DDK(Method):
    """Domains are drawn by how far the student lags its teacher in them."""

    name = "ddk"
    paper = 17
    cost = "as kd, and every `interval` steps one student forward of `samples` held-out examples a domain"
    example: ClassVar[dict[str, Any]] = {
        "task": "language_modeling",
        "data": {"name": "lm_domains", "domain_column": "domain", "max_length": 64, "vocab_size": 512},
        "teacher": {"model": "llama:hidden=96,layers=3,heads=4", "train": {"max_steps": 300}},
        "options": {"interval": 25, "samples": 20},
        "trainer": {"max_steps": 150},
    }
    page: ClassVar[dict[str, str]] = {
        "when": "Data of several domains (`data.domain_column`) whose shares are to follow the student's gaps.",
        "not": "When the mean over domains is what counts: effort is moved, not made, and domains that are drawn less get "
        "worse. With few held-out tokens a domain the weights follow noise: raise `samples` or lower `alpha`.",
        "deviations": "The divergence is teacher ‖ student, as the baselines' description has it; `divergence=reverse_kl` is "
        "the order printed in Eq. 3. The first data are drawn by r⁰; `start=uniform` is the algorithm's letter. Examples of a "
        "domain are drawn with replacement, not each once before the first comes again. A run ends after its steps; there is "
        "no stop at a small largest ratio. A ratio of any size is safe, for logarithms are added.",
    }

    interval: int = Field(
        1000, ge=1, description="K, optimizer steps between two measurements of the domains; an epoch is as many."
    )
    alpha: float = Field(0.5, ge=0, le=1, description="α: 0 draws all domains alike, 1 never forgets a measurement.")
    gamma: float = Field(0.2, ge=0, description="γ, weight of the divergence beside the cross-entropy.")
    temperature: float = Field(1.0, gt=0, description="τ of the divergence, without τ².")
    divergence: Literal["forward_kl", "reverse_kl"] = Field("forward_kl", description="Teacher first.")
    start: Literal["ratios", "uniform"] = Field(
        "ratios", description="What the first interval draws by: r⁰, or all alike."
    )
    samples: int = Field(500, ge=1, description="Held-out examples of each domain that are measured, at most.")

    @property
    def requires(self) -> Requirements:
        return Requirements(temperature=self.temperature, support="dense", splits=("train", "validation"))

    @property
    def epoch_steps(self) -> int:
        return self.interval

    def check_data(self, data: Any) -> None:
        if not data.domains:
            raise InputError("Method 'ddk' weighs domains and the data name none: set data.domain_column.")

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        assert context.teacher is not None
        domains = {split: _domains(context, split) for split in ("train", "validation")}
        for split, numbers in domains.items():
            held = Counter(numbers.tolist())
            missing = [name for i, name in enumerate(context.domains) if not held[i]]
            if missing:
                raise InputError(
                    f"Domain {missing[0]!r} has no example in the {split} split: give some, or leave it out."
                )
        order = torch.randperm(len(domains["validation"]), generator=torch.Generator().manual_seed(context.seed))
        parts = [order[domains["validation"][order] == i][: self.samples] for i in range(len(context.domains))]
        context.splits[HELD_OUT] = [context.splits["validation"][i] for i in torch.cat(parts).tolist()]
        teacher = domain_perplexities(context.teacher, _held_out(context), len(context.domains))
        return {"domains": domains["train"], "teacher": teacher}

    def init_state(self, total: int) -> Mixture:
        return Mixture()

    def sampling(self, state: TrainState) -> Sampling:
        """Measure the student, and draw by what was found."""
        assert state.context is not None and state.student is not None
        mixture, names = state.method_state, state.context.domains
        with evaluating(state.student):
            student = domain_perplexities(state.student, _held_out(state.context), len(names))
        ratios = perplexity_ratios(student, state.tables["teacher"], names)
        if mixture.weights:
            weights = next_weights(torch.tensor(mixture.weights[-1], dtype=torch.float64), ratios, self.alpha)
        elif self.start == "uniform":
            weights = torch.full_like(ratios, 1 / len(names))
        else:
            weights = first_weights(ratios)
        mixture.weights.append(weights.tolist())
        mixture.ratios.append(ratios.tolist())
        return Sampling(weights=example_weights(weights, state.tables["domains"]))

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        divergence = getattr(losses, self.divergence)
        signal, labels = batch.with_labels(student.signal)
        terms = {"ce": Term(batch.among_rows(rowwise(losses.cross_entropy, signal, None, labels)))}
        if self.gamma:
            values = rowwise(divergence, student.signal, teacher.signal, temperature=self.temperature)
            terms["kd"] = Term(values, self.gamma)
        return terms

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """The ratios on the split that is judged, where the teacher answers about it, and the course of ratios and weights."""
        assert state.student is not None
        names, mixture = context.domains, state.method_state
        headings, rows = ["domain"], [[name] for name in names]
        for i in sorted({*range(0, len(mixture.weights), max(1, len(mixture.weights) // 4)), len(mixture.weights) - 1}):
            headings += [f"ratio {i}", f"weight {i}"]
            for row, ratio, weight in zip(rows, mixture.ratios[i], mixture.weights[i], strict=True):
                row += [f"{ratio:.3f}", f"{weight:.3f}"]
        title = "Perplexity of the student over the teacher's, and the weight, of each domain as an interval began"
        found: dict[str, Any] = {"tables": [{"title": title, "headings": headings, "rows": rows}]}
        if context.teacher_model is None:
            return found
        with evaluating(state.student, context.teacher_model):
            sides = [
                domain_perplexities(model, context.batches(context.eval_split), len(names))
                for model in (state.student, context.teacher_model)
            ]
        ratios = (sides[0] / sides[1])[~sides[0].isnan()]
        steady = [sum(abs(a - b) for a, b in zip(*two, strict=True)) / 2 for two in _pairs(mixture.weights)]
        metrics = {"worst_ratio": float(ratios.max()), "mean_ratio": float(ratios.mean())}
        if steady:
            metrics["weight_change"] = sum(steady) / len(steady)
        return found | {"metrics": metrics}


def _pairs(rows: list[list[float]]) -> Iterator[tuple[list[float], list[float]]]:
    return zip(rows[:-1], rows[1:], strict=True)


def _held_out(context: SetupContext) -> Iterator[Batch]:
    return context.batches(HELD_OUT, 16)


def _domains(context: SetupContext, split: str) -> Tensor:
    """The number of each example's domain, `[examples]`."""
    found = [batch.domains for batch in context.batches(split)]
    return torch.cat([numbers.cpu() for numbers in found if numbers is not None])
