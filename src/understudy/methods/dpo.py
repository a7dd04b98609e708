"""39. Insights into Alignment: Evaluating DPO and its Variants Across Multiple Tasks (2024).

One method, `loss` chooses the variant. With h = β (log-ratio of the better − of the worse candidate):

    dpo: softplus(−h)    cdpo, robust: for noisy labels    hinge: relu(1 − h)    ipo: (h/β − 1/(2β))²
    kto: each side alone, against the batch's KL    cpo, simpo, orpo: without a reference
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from understudy.data import Batch, ListBatch
from understudy.data.noise import uniform
from understudy.errors import InputError
from understudy.losses import preference
from understudy.methods.adpo import attach, monitors, recorded, started_at_zero
from understudy.models import Rows
from understudy.training import Live, Method, Stage, Term

WITHOUT_REFERENCE = frozenset({"cpo", "simpo", "cpo_simpo", "orpo"})
WITH_NLL = frozenset({"cpo", "cpo_simpo", "orpo"})
SMOOTHED = frozenset({"cdpo", "robust"})
BETA = {"simpo": 2.0, "cpo_simpo": 2.0}


class DPO(Method):
    """Direct preference optimisation and its variants, on the best and the worst candidate of each list."""

    name = "dpo"
    paper = 39
    needs = frozenset()
    kinds = frozenset({"preference"})
    cost = "two student forwards and backwards a pair; the reference costs two forwards a pair, once and stored"
    page: ClassVar[dict[str, str]] = {
        "when": "Pairs of better and worse completions. KTO and CPO need no supervised start, DPO and IPO do.",
        "not": "With graded lists or noisy scores see `adpo`. SimPO, CPO and ORPO have no anchor to hold them.",
        "deviations": "The NLL of CPO and ORPO covers completion tokens (TRL's ORPO adds the prompt). IPO takes means a "
        "token unless `length=sum`. KTO's KL couples the examples of a micro-batch: it is the mean log-ratio of the other "
        "side (pairs), gets no gradient, and so depends on how a batch is cut.",
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

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing is not None and self.loss_type not in SMOOTHED:
            raise ValueError(f"label_smoothing has no effect on {self.loss_type}; it belongs to cdpo and robust")
        return self

    @property
    def _beta(self) -> float:
        return self.beta if self.beta is not None else BETA.get(self.loss_type, 0.1)

    def stage(self, work: Stage) -> dict[str, Tensor]:
        if self.loss_type != "kto":
            _need_order(work)
        if self.loss_type in WITHOUT_REFERENCE:
            return {}
        if self.reference == "recorded":
            recorded(work)
            return {}
        if self.reference == "teacher" and work.teacher is None:
            raise InputError("dpo with reference='teacher' needs a teacher as its reference: set `teacher`.")
        scorer = work.teacher if self.reference == "teacher" else work.student
        assert scorer is not None
        attach(work, {"reference": scorer})
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, ListBatch)
        if self.loss_type not in WITH_NLL:
            return {}
        return {"nll": float(batch.lengths.gather(1, batch.best[:, None]).sum())}

    def loss(self, student: Rows, teacher: Rows | None, batch: Batch, live: Live) -> dict[str, Term]:
        assert isinstance(batch, ListBatch)
        values: Tensor = student.signal.values
        started_at_zero(self.reference == "start", values, batch, live)
        if self.loss_type == "kto":
            assert batch.reference is not None  # the data stage computed it
            return {"kto": Term(self._kto(values - batch.reference.to(values.dtype), batch)), **monitors(values, batch)}
        row, *sides = self._pairs(batch)
        lengths = [batch.lengths[row, i] for i in sides]
        chosen, rejected = (values[row, i] for i in sides)
        if self.loss_type in WITHOUT_REFERENCE:
            found = self._without_reference(chosen, rejected, *lengths)
            nll = {"nll": Term(-values.gather(1, batch.best[:, None])[:, 0], self.nll_weight)}
            own = {name: Term(_by_list(term.values, row, batch), term.weight) for name, term in found.items()}
            return {**own, **(nll if self.loss_type in WITH_NLL else {})}
        assert batch.reference is not None
        ratios = [chosen, rejected, *(batch.reference.to(values.dtype)[row, i] for i in sides)]
        if (self.length or ("mean" if self.loss_type == "ipo" else "sum")) == "mean":
            ratios = [preference.per_token(x, n) for x, n in zip(ratios, lengths * 2, strict=True)]
        function = {"robust": preference.robust_dpo, "hinge": preference.hinge, "ipo": preference.ipo}
        variant: Any = function.get(self.loss_type, preference.dpo)
        options = {} if self.loss_type not in SMOOTHED else {"label_smoothing": self.label_smoothing or 0.1}
        loss = _by_list(variant(*ratios, beta=self._beta, **options), row, batch)
        return {self.loss_type: Term(loss), **monitors(values, batch)}

    def _pairs(self, batch: ListBatch) -> tuple[Tensor, Tensor, Tensor]:
        """List, better and worse candidate of each pair."""
        if self.pairs == "extremes":
            return torch.arange(batch.rows, device=batch.ids.device), batch.best, batch.worst
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

    def _kto(self, ratio: Tensor, batch: ListBatch) -> Tensor:
        """Mean over the list's candidates, each judged against the KL of those on the other side."""
        top = batch.scores > batch.scores.masked_fill(~batch.candidates, 0.0).sum(1, keepdim=True) / (
            batch.candidates.sum(1, keepdim=True)
        )
        good = torch.where(batch.candidates.sum(1, keepdim=True) > 1, top, batch.scores > 0.5) & batch.candidates
        bad = ~good & batch.candidates
        kl = torch.where(good, preference.kto_kl(ratio[bad]), preference.kto_kl(ratio[good]))
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        values = preference.kto(ratio, good, kl, beta=self._beta, **weights).masked_fill(~batch.candidates, 0.0)
        return values.sum(1) / batch.candidates.sum(1)


def _by_list(values: Tensor, row: Tensor, batch: ListBatch) -> Tensor:
    """The mean over each list's pairs, `[lists]`."""
    number = torch.bincount(row, minlength=batch.rows).clamp(min=1)
    return values.new_zeros(batch.rows).index_add(0, row, values) / number


def _need_order(work: Stage) -> None:
    for split, examples in work.splits.items():
        for row in examples.rows:
            if max(row["scores"]) == min(row["scores"]):
                raise InputError(
                    f"dpo: {split} list {row['id']} has one candidate or equal scores, no better and worse. Use "
                    "options.loss_type=kto for unpaired examples, or drop it."
                )
