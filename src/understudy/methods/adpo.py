"""2. ADPO: Anchored Direct Preference Optimization (2025).

A soft target over a list of candidates, and a policy measured relative to an anchor:

    u_i = (log π(y_i) − log π_ref(y_i)) / τ,    loss = −Σ_i q_i log softmax(u)_i

Target, anchor and loss are three choices. Supervised training, distillation, DPO and maximum-entropy RL are corners.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from understudy.data import Batch, ListBatch
from understudy.errors import InputError
from understudy.losses import anchored
from understudy.models import ModelAdapter, ModelOutput
from understudy.targets import Scores
from understudy.training import Method, Requirements, SetupContext, Term, TrainState
from understudy.training.averages import follow
from understudy.training.reference import (
    Reward,
    attach,
    check_starts_at_zero,
    finite,
    recorded,
    reward_counts,
    reward_terms,
    rewarded,
    with_margin,
)


class ADPO(Method):
    """Anchored cross-entropy with a soft target over candidates."""

    name = "adpo"
    paper = 2
    kinds = frozenset({"preference"})
    cost = "one student forward and backward a candidate; a fixed anchor costs one forward a candidate, once and stored"
    used_with: ClassVar[dict[str, Any]] = {
        **{name: {"target": ("plackett_luce",)} for name in ("top", "label_smoothing", "poly", "strict")},
        "beta_reward": {"target": ("softmax_advantage", "bradley_terry", "kde_rank")},
        "teacher_temperature": {"target": ("teacher",)},
        "every": {"anchor": ("dynamic",)},
        "decay": {"anchor": ("ema",)},
    }
    page: ClassVar[dict[str, str]] = {
        "when": "Lists or pairs with noisy rewards, soft labels, or a teacher that scores candidates.",
        "not": "With clean hard pairs it is DPO. A smaller τ keeps the optimum closer to the anchor.",
        "deviations": "The equation is the manuscript's; the released default (Plackett-Luce with a polynomial term, "
        "clipping and smoothing) is `target=plackett_luce` with its options. Learning is off-line, from recorded "
        "candidates: sampling new ones inside training is not in this method. A temperature that adapts (`tau_entropy`, "
        "`tau_reward`) compares the rewards of a list with those of all training lists, not with those of a batch, and takes "
        "the candidates' mean −log π a token for the entropy.",
    }

    target: Literal[
        "softmax_advantage", "bradley_terry", "kde_rank", "best", "given", "teacher", "exact_teacher", "plackett_luce"
    ] = Field(
        "softmax_advantage",
        description="What to learn from: scores, ranks, a teacher's log-probs; given: the scores are the distribution "
        "(soft labels).",
    )
    anchor: Literal["fixed", "uniform", "dynamic", "ema", "recorded", "teacher"] = Field(
        "fixed",
        description="fixed: the student at its start; uniform: none; dynamic: a copy renewed every `every` steps; ema: a "
        "moving average; recorded: the data's `log_probs`; teacher: the recipe's teacher.",
    )
    tau: float = Field(1.0, gt=0, description="Divides the log-ratio; 1/β of DPO.")
    tau_entropy: float = Field(
        0.0, ge=0, description="τ grows by this share of itself for a list that the policy is unsure of."
    )
    tau_reward: float = Field(
        0.0, ge=0, description="And by this for one that it is sure of and that has the lowest rewards."
    )
    tau_range: tuple[float, float] = Field((0.1, 5.0), description="Bounds of a τ that adapts.")
    beta_reward: float = Field(0.5, gt=0, description="Temperature of the target over rewards.")
    teacher_temperature: float = Field(1.0, gt=0, description="Of `target=teacher`.")
    every: int = Field(50, ge=1, description="Steps between copies of `anchor=dynamic`.")
    decay: float = Field(0.99, ge=0, le=1, description="Of `anchor=ema`.")
    length: Literal["sum", "mean"] = Field(
        "sum", description="Log-probabilities of a completion, or their mean a token."
    )
    top: int | None = Field(None, ge=1, description="Positions of `plackett_luce`; all if not given.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Of `plackett_luce`.")
    poly: float = Field(0.0, ge=0, description="Weight of the polynomial term of `plackett_luce`.")
    strict: bool = Field(False, description="Refuse equal scores under `plackett_luce`; else the first goes first.")

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if not 0 < self.tau_range[0] <= self.tau_range[1]:
            raise ValueError(f"tau_range is {list(self.tau_range)}: a bound above 0 and one that is no smaller")
        return self

    @property
    def _adapts(self) -> bool:
        return self.tau_entropy > 0 or self.tau_reward > 0

    @property
    def _from_teacher(self) -> bool:
        return self.target in ("teacher", "exact_teacher")

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="setup" if self._from_teacher or self.anchor == "teacher" else "none")

    def companions(self, student: ModelAdapter) -> dict[str, nn.Module]:
        return {"anchor": copy.deepcopy(student)} if self.anchor in ("dynamic", "ema") else {}

    def setup(self, context: SetupContext) -> dict[str, Tensor]:
        if (self._from_teacher or self.anchor == "teacher") and context.teacher_model is None:
            raise InputError(
                f"adpo with target {self.target!r} and anchor {self.anchor!r} needs a teacher: set `teacher`."
            )
        rewarded(context, self._reward)
        scorers = {"reference": context.student} if self.anchor == "fixed" else {}
        if context.teacher_model is not None and self.anchor == "teacher":
            scorers["reference"] = context.teacher_model
        if context.teacher_model is not None and self._from_teacher:
            scorers["taught"] = context.teacher_model
        attach(context, scorers)
        if self.anchor == "recorded":
            recorded(context)
        means = [sum(row["scores"]) / len(row["scores"]) for row in context.splits["train"].records]
        return {"rewards": torch.tensor([min(means), max(means)], dtype=torch.float64)} if self._adapts else {}

    def check_data(self, data: Any) -> None:
        """What the data must be like for this target."""
        if all(len(row["scores"]) < 2 for row in data.splits["train"].records):
            raise InputError(
                "adpo: every training example has one candidate, so there is nothing to prefer. Give lists or pairs; for "
                "single labelled answers there is dpo with loss_type=kto."
            )
        for split, examples in data.splits.items():
            for row in examples.records:
                scores, where = row["scores"], f"{split} example {row['id']}"
                if self.target == "bradley_terry" and len(scores) != 2:
                    raise InputError(
                        f"adpo: target='bradley_terry' is for pairs and {where} has {len(scores)} candidates. Choose "
                        "softmax_advantage."
                    )
                if self.target == "given" and (min(scores) < 0 or abs(sum(scores) - 1) > 1e-6):
                    raise InputError(
                        f"adpo: target='given' takes scores as probabilities and those of {where} are {scores}: they must be "
                        "≥ 0 and sum to 1. For rewards choose softmax_advantage."
                    )
                if self.target == "plackett_luce" and self.strict and len(set(scores)) < len(scores):
                    raise InputError(
                        f"adpo: {where} has equal scores, and options.strict asks for an order: leave strict out."
                    )

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, ListBatch)
        ours = self._scale(finite(student.signal.values, batch), batch)
        reference = self._anchor(ours, batch, state)
        anchor = self._scale(reference, batch)
        check_starts_at_zero(self.anchor == "fixed", student.signal.values, batch, state)
        kl, tau = {}, self._tau(student.signal, batch, state)
        if self.target == "plackett_luce":
            values = anchored.anchored_plackett_luce(
                (ours - anchor) / anchored.by_list(tau),
                batch.scores.to(ours.dtype),
                mask=batch.candidates,
                top=self.top,
                label_smoothing=self.label_smoothing,
                poly=self.poly,
                strict=self.strict,
            )
        else:
            q = self._target(anchor, batch, tau).to(ours.dtype)
            values = anchored.anchored_cross_entropy(ours, anchor, q, tau=tau, mask=batch.candidates)
            kl = {"kl": Term(values.detach() + torch.special.xlogy(q, q).sum(-1), 0.0)}
        return {"adpo": Term(values), **kl, **reward_terms(self._reward, student.signal.values, reference, batch)}

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, ListBatch)
        return reward_counts(batch)

    def logged(self, means: Mapping[str, float]) -> Mapping[str, float]:
        return with_margin(means)

    @property
    def _reward(self) -> Reward:
        return Reward(1 / self.tau, self.anchor != "uniform", self.length == "mean")

    def _scale(self, log_probs: Tensor, batch: ListBatch) -> Tensor:
        return log_probs / batch.lengths.clamp(min=1) if self.length == "mean" else log_probs

    def _anchor(self, ours: Tensor, batch: ListBatch, state: TrainState) -> Tensor:
        if self.anchor == "uniform":
            return torch.zeros_like(ours)
        if "anchor" in state.companions:
            with torch.no_grad():
                return state.companions["anchor"](batch).signal.values
        assert batch.reference is not None  # the data stage computed it
        return batch.reference.to(ours.dtype)

    def _tau(self, signal: Scores, batch: ListBatch, state: TrainState) -> anchored.Temperature:
        """τ, or that of each list if it adapts. Where the policy has no tokens its entropy is that over the candidates."""
        if not self._adapts:
            return self.tau
        log_p, number = signal.values.detach(), batch.candidates.sum(1)
        if signal.token_signal is not None:
            nats = -log_p.sum(1) / batch.lengths.sum(1).clamp(min=1)
            most = torch.full_like(nats, signal.token_signal.classes).log()
        else:
            nats, most = -(log_p.exp() * log_p).sum(1), number.to(log_p.dtype).log()
        low, high = state.tables["rewards"].to(log_p)
        mean = (batch.scores.to(log_p) * batch.candidates).sum(1) / number
        reward = ((mean - low) / (high - low)).clamp(0, 1) if high > low else torch.full_like(mean, 0.5)
        return anchored.adaptive_temperature(
            self.tau,
            (nats / most.clamp(min=torch.finfo(most.dtype).tiny)).clamp(0, 1),
            reward,
            by_entropy=self.tau_entropy,
            by_reward=self.tau_reward,
            least=self.tau_range[0],
            most=self.tau_range[1],
        )

    def _target(self, anchor: Tensor, batch: ListBatch, tau: anchored.Temperature) -> Tensor:
        mask, scores = batch.candidates, batch.scores.double()
        if self._from_teacher:
            assert batch.taught is not None
            taught = self._scale(batch.taught, batch)
            if self.target == "teacher":
                return anchored.tempered(taught, temperature=self.teacher_temperature, mask=mask)
            return anchored.exact_teacher(
                taught, anchor.double(), tau=tau.double() if isinstance(tau, Tensor) else tau, mask=mask
            )
        if self.target == "best":
            return anchored.best(scores, mask)
        if self.target == "kde_rank":
            return anchored.kde_rank(scores, beta=self.beta_reward, mask=mask)
        if self.target == "softmax_advantage":
            return anchored.softmax_advantage(scores, beta=self.beta_reward, mask=mask)
        if self.target == "given":
            return scores / scores.sum(1, keepdim=True)
        p = anchored.bradley_terry(scores[:, 0], scores[:, 1], beta=self.beta_reward)
        return torch.stack([p, 1 - p], 1)

    def on_step_end(self, state: TrainState) -> None:
        if "anchor" not in state.companions or (self.anchor == "dynamic" and state.step % self.every):
            return
        assert state.student is not None
        follow(state.companions["anchor"], state.student, self.decay if self.anchor == "ema" else 0.0)
