"""39. Insights into Alignment: Evaluating DPO and its Variants Across Multiple Tasks (2024).

One method, `loss` chooses the variant. With h = β (log-ratio of the better − of the worse candidate):

    dpo: softplus(−h)    cdpo, robust: for noisy labels    hinge: relu(1 − h)    ipo: (h/β − 1/(2β))²
    kto: each side alone, against the batch's KL    cpo, simpo, orpo: without a reference
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from understudy.data import Batch, ListBatch, mismatched
from understudy.data.noise import uniform
from understudy.errors import InputError
from understudy.losses import preference
from understudy.models import ModelOutput
from understudy.training import Method, Requirements, SetupContext, Term, TrainState
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

WITHOUT_REFERENCE = frozenset({"cpo", "simpo", "cpo_simpo", "orpo"})
WITH_NLL = frozenset({"cpo", "cpo_simpo", "orpo"})
MEAN_REWARD = frozenset({"simpo", "cpo_simpo", "orpo"})
"""Variants whose reward is of the mean log-probability a token, as in TRL."""
SMOOTHED = frozenset({"cdpo", "robust"})
USED_BY = {
    "label_smoothing": SMOOTHED,
    "gamma": frozenset({"simpo", "cpo_simpo"}),
    "nll_weight": WITH_NLL,
    "desirable_weight": frozenset({"kto"}),
    "undesirable_weight": frozenset({"kto"}),
    "length": frozenset({"dpo", "cdpo", "robust", "hinge", "ipo"}),
}
"""Options that some variants alone read."""
BETA = {"simpo": 2.0, "cpo_simpo": 2.0}
log = logging.getLogger(__name__)


class DPO(Method):
    """Direct preference optimisation and its variants, on the best and the worst candidate of each list."""

    name = "dpo"
    paper = 39
    kinds = frozenset({"preference"})
    variants = "loss_type"
    cost = (
        "two student forwards and backwards a pair; the reference costs two forwards a pair, once and stored; kto on single "
        "answers: one more forward of both"
    )
    page: ClassVar[dict[str, str]] = {
        "when": "Pairs of better and worse completions. KTO and CPO need no supervised start, DPO and IPO do.",
        "not": "With graded lists or noisy scores see `adpo`. SimPO, CPO and ORPO have no anchor to hold them.",
        "deviations": "The NLL of CPO and ORPO covers completion tokens (TRL's ORPO adds the prompt). IPO takes means a "
        "token unless `length=sum`. KTO's KL couples the examples of a micro-batch, which is the group: it depends on how a "
        "batch is cut, and gets no gradient. In pairs it is the mean log-ratio of the other side; for single answers that "
        "of each prompt with the answer of another example, chosen once for the whole set.",
    }

    loss_type: Literal["dpo", "cdpo", "robust", "hinge", "ipo", "kto", "cpo", "simpo", "cpo_simpo", "orpo"] = Field(
        "dpo", description="The variant."
    )
    beta: float | None = Field(None, gt=0, description="0.1 unless given, 2.0 for simpo.")
    label_smoothing: float | None = Field(
        None, ge=0, lt=0.5, description="Share of flipped labels, for cdpo and robust."
    )
    length: Literal["sum", "mean"] | None = Field(
        None, description="Log-ratios as sums or as means a token; sum unless given, mean for ipo."
    )
    gamma: float = Field(0.5, ge=0, description="Margin of simpo.")
    nll_weight: float = Field(1.0, ge=0, description="Of the better completion's NLL, for cpo, cpo_simpo and orpo.")
    desirable_weight: float = Field(1.0, gt=0, description="Of kto's desirable side.")
    undesirable_weight: float = Field(1.0, gt=0, description="Of kto's undesirable side.")
    pairs: Literal["extremes", "random", "all"] = Field(
        "extremes", description="Of longer lists: best against worst, one pair drawn for good, or the mean over all."
    )
    reference: Literal["start", "teacher", "recorded"] = Field(
        "start", description="The student at its start, the recipe's teacher, or the data's `log_probs`."
    )

    @field_validator("loss_type", mode="before")
    @classmethod
    def _name_in_trl(cls, value: Any) -> Any:
        return "dpo" if value == "sigmoid" else value

    @model_validator(mode="after")
    def _options_have_effect(self) -> Self:
        for name, variants in USED_BY.items():
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and self.loss_type not in variants:
                raise ValueError(
                    f"{name} has no effect on {self.loss_type}; it belongs to {', '.join(sorted(variants))}"
                )
        return self

    @property
    def _beta(self) -> float:
        return self.beta if self.beta is not None else BETA.get(self.loss_type, 0.1)

    @property
    def _smoothing(self) -> float:
        return 0.1 if self.label_smoothing is None else self.label_smoothing

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="setup" if self.reference == "teacher" else "none")

    def setup(self, context: SetupContext) -> dict[str, Tensor]:
        unpaired = self.loss_type == "kto" and _unpaired(context)
        if not unpaired:
            _need_order(context)
        rewarded(context, self._reward)
        if self.loss_type in WITHOUT_REFERENCE:
            if self.reference != "start":
                log.warning("%s has no reference: options.reference=%s is ignored.", self.loss_type, self.reference)
            return {}
        if self.reference == "recorded":
            if unpaired:
                raise InputError(
                    "dpo: kto on single answers also asks the reference about prompts with other answers, which recorded "
                    "log_probs do not hold. Set options.reference to start or teacher."
                )
            recorded(context)
            return {}
        if self.reference == "teacher" and context.teacher_model is None:
            raise InputError("dpo with reference='teacher' needs a teacher as its reference: set `teacher`.")
        scorer = context.teacher_model if self.reference == "teacher" else context.student
        assert scorer is not None
        attach(context, {"reference": scorer})
        if unpaired:
            train, strays = context.splits["train"], mismatched(context.splits["train"])
            attach(replace(context, splits={"mismatched": strays}), {"reference": scorer})
            for row, stray in zip(train.records, strays.records, strict=True):
                row["stray"] = stray
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, ListBatch)
        nll = {"nll": float(batch.lengths.gather(1, batch.best[:, None]).sum())} if self.loss_type in WITH_NLL else {}
        return {**nll, **reward_counts(batch)}

    def logged(self, means: Mapping[str, float]) -> Mapping[str, float]:
        return with_margin(means)

    @property
    def _reward(self) -> Reward:
        mean = self.loss_type in MEAN_REWARD or self.length == "mean"
        return Reward(self._beta, self.loss_type not in WITHOUT_REFERENCE, mean)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, ListBatch)
        values = finite(student.signal.values, batch)
        check_starts_at_zero(self.reference == "start", values, batch, state)
        seen = reward_terms(self._reward, values, batch.reference, batch)
        if self.loss_type == "kto":
            assert batch.reference is not None  # the data stage computed it
            ratio = values - batch.reference.to(values.dtype)
            return {"kto": Term(self._kto(ratio, batch, state)), **seen}
        row, *sides = self._pairs(batch)
        lengths = [batch.lengths[row, i] for i in sides]
        chosen, rejected = (values[row, i] for i in sides)
        if self.loss_type in WITHOUT_REFERENCE:
            found = self._without_reference(chosen, rejected, *lengths)
            nll = {"nll": Term(-values.gather(1, batch.best[:, None])[:, 0], self.nll_weight)}
            own = {name: Term(_by_list(term.values, row, batch), term.weight) for name, term in found.items()}
            return {**own, **(nll if self.loss_type in WITH_NLL else {}), **seen}
        assert batch.reference is not None
        ratios = [chosen, rejected, *(batch.reference.to(values.dtype)[row, i] for i in sides)]
        if (self.length or ("mean" if self.loss_type == "ipo" else "sum")) == "mean":
            ratios = [preference.per_token(x, n) for x, n in zip(ratios, lengths * 2, strict=True)]
        function = {"robust": preference.robust_dpo, "hinge": preference.hinge, "ipo": preference.ipo}
        variant: Any = function.get(self.loss_type, preference.dpo)
        options = {} if self.loss_type not in SMOOTHED else {"label_smoothing": self._smoothing}
        loss = _by_list(variant(*ratios, beta=self._beta, **options), row, batch)
        return {self.loss_type: Term(loss), **seen}

    def _pairs(self, batch: ListBatch) -> tuple[Tensor, Tensor, Tensor]:
        """List, better and worse candidate of each pair."""
        if self.pairs == "extremes":
            return torch.arange(batch.num_items, device=batch.ids.device), batch.best, batch.worst
        both = batch.candidates[:, :, None] & batch.candidates[:, None, :]
        ordered = (batch.scores[:, :, None] > batch.scores[:, None, :]) & both
        if self.pairs == "random":
            lot = uniform(batch.ids, ordered.shape[1:], seed=0, step=0).masked_fill(~ordered, 0.0).flatten(1)
            ordered = (
                torch.zeros_like(ordered).flatten(1).scatter(1, lot.argmax(1, keepdim=True), True).view_as(ordered)
            )
        row, better, worse = ordered.nonzero(as_tuple=True)
        return row, better, worse

    def _without_reference(self, chosen: Tensor, rejected: Tensor, nw: Tensor, nl: Tensor) -> dict[str, Term]:
        if self.loss_type == "orpo":
            return {"odds_ratio": Term(preference.odds_ratio(chosen, rejected, nw, nl), self._beta)}
        if self.loss_type == "cpo":
            return {"cpo": Term(preference.cpo(chosen, rejected, beta=self._beta))}
        return {"simpo": Term(preference.simpo(chosen, rejected, nw, nl, beta=self._beta, gamma=self.gamma))}

    def _kto(self, ratio: Tensor, batch: ListBatch, state: TrainState) -> Tensor:
        """Mean over the list's candidates. In pairs each is judged against the KL of those on the other side; single
        answers against the KL of prompts with the answers of others."""
        single = batch.slots.shape[1] == 1
        middle = ratio.new_full((1, 1), 0.5) if single else _mean(batch.scores, batch)
        good, bad = ((side & batch.candidates) for side in (batch.scores > middle, batch.scores <= middle))
        if single:
            kl = _stray_kl(batch, state).expand_as(ratio)
        else:
            kl = torch.where(good, preference.kto_kl(ratio[bad]), preference.kto_kl(ratio[good]))
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        return _mean(preference.kto(ratio, good, kl, beta=self._beta, **weights), batch)[:, 0]


def _mean(values: Tensor, batch: ListBatch) -> Tensor:
    """The mean over each list's candidates, `[lists, 1]`."""
    return values.masked_fill(~batch.candidates, 0.0).sum(1, keepdim=True) / batch.candidates.sum(1, keepdim=True)


def _stray_kl(batch: ListBatch, state: TrainState) -> Tensor:
    """KTO's z of a micro-batch: the log-ratios of its prompts with the answers of other examples. No gradient."""
    strays = batch.strays
    assert strays is not None and strays.reference is not None and state.student is not None  # the data stage made them
    with torch.no_grad():
        said = finite(state.student(strays).signal.values, strays)
    return preference.kto_kl(said - strays.reference.to(said.dtype))


def _by_list(values: Tensor, row: Tensor, batch: ListBatch) -> Tensor:
    """The mean over each list's pairs, `[lists]`."""
    number = torch.bincount(row, minlength=batch.num_items).clamp(min=1)
    return values.new_zeros(batch.num_items).index_add(0, row, values) / number


def _unpaired(context: SetupContext) -> bool:
    """Whether the data are single answers; lists beside them are refused."""
    rows = [(split, row) for split, examples in context.splits.items() for row in examples.records]
    lists = [(split, row) for split, row in rows if len(row["scores"]) > 1]
    if lists and len(lists) < len(rows):
        (split, row), number = lists[0], len(rows) - len(lists)
        raise InputError(
            f"dpo: {split} example {row['id']} has {len(row['scores'])} candidates and {number} others have one. Give kto "
            "pairs (or lists) alone, or single answers with labels alone."
        )
    return not lists


def _need_order(context: SetupContext) -> None:
    for split, examples in context.splits.items():
        for row in examples.records:
            if max(row["scores"]) == min(row["scores"]):
                raise InputError(
                    f"dpo: {split} list {row['id']} has one candidate or equal scores, no better and worse. Use "
                    "options.loss_type=kto for unpaired examples, or drop it."
                )
