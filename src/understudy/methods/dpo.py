"""39. Insights into Alignment: Evaluating DPO and its Variants Across Multiple Tasks (2024).

One method, `loss_type` chooses the variant. With h = β (log-ratio of the better − of the worse candidate):

    dpo: softplus(−h)    cdpo, robust, exo_pair: for noisy labels    hinge: relu(1 − h)    ipo: (h/β − 1/(2β))²
    apo_zero, apo_down, nca_pair, bco_pair, sppo_hard: each side's log-ratio    aot, aot_unpaired: sorted over the batch
    kto: each side alone, against the batch's KL    cpo, simpo, orpo: without a reference    sft: NLL of the better one

Several of them, such as `[dpo, bco_pair, sft]` with `loss_weights`, are added up. With `use_weighting` (WPO, Zhou et al. 2024) a
pair counts as much as the policy is likely to write both answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from understudy.data import Batch, ListBatch
from understudy.data.numeric_columns import Column
from understudy.errors import InputError
from understudy.losses import preference
from understudy.losses.pair_weights import log_collision, policy_weight
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.training import Method, Requirements, SetupContext, Term, TrainState
from understudy.training.list_pairs import mean_by_list, ordered_pairs
from understudy.training.reference import (
    Reward,
    attach,
    attach_tokens,
    check_starts_at_zero,
    finite,
    need_order,
    recorded,
    reward_counts,
    reward_terms,
    rewarded,
    with_margin,
)
from understudy.training.single_answers import add_strays, are_single, check_balance, stray_sums

LossType = Literal[
    "dpo",
    "cdpo",
    "robust",
    "hinge",
    "ipo",
    "kto",
    "cpo",
    "simpo",
    "cpo_simpo",
    "orpo",
    "sigmoid_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
OF_RATIOS: Mapping[str, Callable[..., Tensor]] = {
    "dpo": preference.dpo,
    "cdpo": preference.dpo,
    "robust": preference.robust_dpo,
    "hinge": preference.hinge,
    "ipo": preference.ipo,
    "sigmoid_norm": preference.dpo,
    "exo_pair": preference.exo_pair,
    "nca_pair": preference.nca_pair,
    "bco_pair": preference.bco_pair,
    "sppo_hard": preference.sppo_hard,
    "aot": preference.aot,
    "aot_unpaired": preference.aot_unpaired,
    "apo_zero": preference.apo_zero,
    "apo_down": preference.apo_down,
    "discopop": preference.discopop,
}
"""Losses of the log-probabilities of both sides under policy and reference; these and `sft` may be added up."""
WITHOUT_REFERENCE = frozenset({"cpo", "simpo", "cpo_simpo", "orpo", "sft"})
WITH_NLL = frozenset({"cpo", "cpo_simpo", "orpo"})
MEAN_REWARD = frozenset({"simpo", "cpo_simpo", "orpo"})
"""Variants whose reward is of the mean log-probability a token, as in TRL."""
SMOOTHING = {"cdpo": 0.1, "robust": 0.1, "exo_pair": 1e-3, "aot": 0.0, "aot_unpaired": 0.0}
"""Label smoothing of the variants that have it, unless given."""
SORTED = frozenset({"aot", "aot_unpaired"})
OF_MARGIN = frozenset({"dpo", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop", "sft"})
"""Variants that another f-divergence leaves defined: those of the difference of scores, and `sft`."""
WITH_LENGTH = frozenset({"dpo", "cdpo", "robust", "hinge", "ipo"})
WEIGHTED = frozenset({*OF_RATIOS, "simpo"} - SORTED)
SMOOTHED = "label_smoothing"
"""The column of the data's own label smoothing."""
BETA = {"simpo": 2.0, "cpo_simpo": 2.0}
log = logging.getLogger(__name__)


class DPO(Method):
    """Direct preference optimisation and its variants, on the best and the worst candidate of each list."""

    name = "dpo"
    paper = 39
    kinds = frozenset({"preference"})
    variants = "loss_type"
    used_with: ClassVar[dict[str, Any]] = {
        "label_smoothing": {"loss_type": tuple(SMOOTHING)},
        "gamma": {"loss_type": ("simpo", "cpo_simpo")},
        "nll_weight": {"loss_type": sorted(WITH_NLL)},
        "desirable_weight": {"loss_type": ("kto",)},
        "undesirable_weight": {"loss_type": ("kto",)},
        "length": {"loss_type": sorted(WITH_LENGTH)},
        "length_penalty": {"loss_type": ("dpo",)},
        "ld_alpha": {"loss_type": tuple(OF_RATIOS)},
        "discopop_tau": {"loss_type": ("discopop",)},
        "use_weighting": {"loss_type": sorted(WEIGHTED)},
        "f_alpha_divergence_coef": {"f_divergence_type": ("alpha_divergence",)},
    }
    cost = (
        "two student forwards and backwards a pair; the reference costs two forwards a pair, once and stored; kto on single "
        "answers: one more forward of both"
    )
    page: ClassVar[dict[str, str]] = {
        "when": "Pairs of better and worse completions. KTO and CPO need no supervised start, DPO and IPO do.",
        "not": "With graded lists or noisy scores see `adpo`. SimPO, CPO and ORPO have no anchor to hold them.",
        "deviations": "Pairs with a `label_smoothing` of their own are smoothed by it. The NLL of CPO and ORPO covers completion tokens (TRL's ORPO adds the prompt). IPO takes means a "
        "token unless `length=sum`. AOT sorts within a micro-batch, which is its group: it depends on how a batch is cut. `sft` is "
        "the NLL a token over the whole update. With `ld_alpha` the logged rewards stay those of whole completions. KTO's KL gets no gradient. For single answers it is the mean "
        "log-ratio, over the whole update, of each prompt with the answer of another example, chosen once for the whole set. In "
        "pairs it is that of the other side in the micro-batch, which is its group: it depends on how a batch is cut.",
    }

    loss_type: LossType | tuple[LossType, ...] = Field("dpo", description="The variant, or several to add up.")
    loss_weights: tuple[float, ...] | None = Field(
        None, description="Weights of several losses, in their order; 1 unless given."
    )
    beta: float | None = Field(None, gt=0, description="0.1 unless given, 2.0 for simpo.")
    label_smoothing: float | None = Field(
        None,
        ge=0,
        lt=0.5,
        description="Share of flipped labels: 0.1 unless given for cdpo and robust, 0.001 for exo_pair, 0 for aot.",
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl", description="What holds the policy near its reference, for losses of the margin."
    )
    f_alpha_divergence_coef: float = Field(0.5, description="α of alpha_divergence.")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="Weight of tokens beyond the shorter side's length (LD-DPO); 1 changes nothing."
    )
    length_penalty: float = Field(
        0.0, ge=0, description="α of R-DPO: α times the tokens that the better side has more is added to the margin h."
    )
    discopop_tau: float = Field(0.05, gt=0, description="Temperature of discopop.")
    use_weighting: bool = Field(
        False, description="Weigh each pair by how likely the policy is to write both answers (WPO); without gradient."
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
        if isinstance(value, list | tuple):
            names = tuple("dpo" if v == "sigmoid" else v for v in value)
            return names[0] if len(names) == 1 else names
        return "dpo" if value == "sigmoid" else value

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        types, said = self._types, " + ".join(self._types)
        if self.f_divergence_type != "reverse_kl" and (not set(types) <= OF_MARGIN or types == ("sft",)):
            raise ValueError(
                f"f_divergence_type is not defined for {said}; it belongs to {', '.join(sorted(OF_MARGIN))}"
            )
        if "exo_pair" in types and self.label_smoothing == 0:
            raise ValueError("label_smoothing is 0, where exo_pair is infinite; the paper takes 0.001")
        if self.use_weighting and not set(types) <= WEIGHTED:
            raise ValueError(f"use_weighting is not defined for {said}; it belongs to {', '.join(sorted(WEIGHTED))}")
        if self.pairs != "extremes" and types == ("kto",):
            raise ValueError("pairs has no effect on kto, which reads every candidate by itself")
        if self.pairs == "all" and SORTED & set(types):
            raise ValueError(f"pairs=all does not go with {said}, which sorts one pair of each list")
        if self.ld_alpha is not None and (self.pairs != "extremes" or self.reference == "recorded"):
            raise ValueError(
                "ld_alpha reads the tokens of best and worst: it needs pairs=extremes and no recorded reference"
            )
        return self._mix_is_defined()

    def _mix_is_defined(self) -> Self:
        types, addable = self._types, {*OF_RATIOS, "sft"}
        if not types or len(types) != len(set(types)) or (len(types) > 1 and not set(types) <= addable):
            raise ValueError(
                f"loss_type {list(types)} cannot be added up: name each once, out of {', '.join(sorted(addable))}"
            )
        if self.loss_weights is not None and (len(types) < 2 or len(self.loss_weights) != len(types)):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} values for {len(types)} losses of loss_type: give each of several one"
            )
        return self

    @property
    def _types(self) -> tuple[LossType, ...]:
        return self.loss_type if isinstance(self.loss_type, tuple) else (self.loss_type,)

    @property
    def _weights(self) -> dict[str, float]:
        return dict(zip(self._types, self.loss_weights or [1.0] * len(self._types), strict=True))

    @property
    def _anchored(self) -> bool:
        return not set(self._types) <= WITHOUT_REFERENCE

    @property
    def _beta(self) -> float:
        return self.beta if self.beta is not None else BETA.get(self._types[0], 0.1)

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="setup" if self.reference == "teacher" else "none")

    def check_data(self, data: Any) -> None:
        if not (self.loss_type == "kto" and are_single(data)):
            need_order(self.name, data)
        self._check_weights(data)

    def setup(self, context: SetupContext) -> dict[str, Tensor]:
        unpaired = self.loss_type == "kto" and are_single(context)
        if unpaired:
            check_balance(context, self.desirable_weight, self.undesirable_weight)
        rewarded(context, self._reward)
        self._add_smoothing(context)
        if not self._anchored:
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
        if self.ld_alpha is not None:
            attach_tokens(context, scorer, self.name)
        if unpaired:
            add_strays(context, scorer)
        return {}

    def _add_smoothing(self, context: SetupContext) -> None:
        """The data's own label smoothing as a column; 0, or the option, for examples without."""
        rows = context.splits["train"].records
        smoothed = next((row for row in rows if row.get("label_smoothing") is not None), None)
        if smoothed is None:
            return
        if self._types not in (("dpo",), ("cdpo",)):
            raise InputError(
                f"dpo: train example {smoothed['id']} has a label_smoothing and loss_type {' + '.join(self._types)} reads none: "
                "set it to dpo or cdpo, or leave the column out."
            )
        usual = self._smoothing(self._types[0])
        values = [row.get("label_smoothing", usual) for row in rows]
        ids = torch.tensor([row["id"] for row in rows])
        context.add_column(Column.by_example(SMOOTHED, ids, torch.tensor(values, dtype=torch.float64)))

    def _check_weights(self, data: Any) -> None:
        """Refuse weights of records where a row of the loss is of no record."""
        weighted = next((row for row in data.splits["train"].records if "weight" in row), None)
        if weighted is not None and SORTED & {*self._types}:
            raise InputError(
                f"dpo: train example {weighted['id']} has a weight, and loss_type {' + '.join(self._types)} sorts the batch, so that no "
                "loss is of one record: leave the column weight out, or choose another loss_type."
            )

    def _smoothing(self, name: str) -> float:
        return SMOOTHING.get(name, 0.0) if self.label_smoothing is None else self.label_smoothing

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, ListBatch)
        with_nll = {"sft", *WITH_NLL} & set(self._types)
        nll = {"nll": float(batch.lengths.gather(1, batch.best[:, None]).sum())} if with_nll else {}
        return {**nll, **reward_counts(batch)}

    def logged(self, means: Mapping[str, float]) -> Mapping[str, float]:
        return with_margin(means)

    @property
    def _reward(self) -> Reward:
        mean = self.loss_type in MEAN_REWARD or self.length == "mean"
        return Reward(self._beta, self._anchored, mean)

    def update_sums(self, batch: Batch, state: TrainState) -> Mapping[str, Tensor]:
        if self.loss_type != "kto" or not isinstance(batch, ListBatch) or batch.strays is None:
            return {}
        return {"strays": stray_sums(batch, state)}

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
        nll = Term(-values.gather(1, batch.best[:, None])[:, 0], self._weights.get("sft", self.nll_weight))
        row, *sides = ordered_pairs(batch, self.pairs)
        nw, nl = (batch.lengths[row, i] for i in sides)
        if self._anchored:
            chosen, rejected = self._scores(student, values, batch, state, row, sides)
            column = state.columns.get(SMOOTHED)
            smoothed = column.of_examples(batch)[row].to(values.dtype) if column is not None else None
            found = {
                name: Term(self._of_ratios(name, chosen, rejected, nw, nl, smoothed), weight)
                for name, weight in self._weights.items()
                if name != "sft"
            }
        else:
            better, worse = (values[row, i] for i in sides)
            found = self._without_reference(better, worse, nw, nl)
        if self.use_weighting:
            each = self._weight(student, batch)
            weights = each[row, sides[0]] * each[row, sides[1]]
            found = {name: Term(weights * term.values, term.weight) for name, term in found.items()}
            seen["weights"] = Term(mean_by_list(weights, row, batch), 0.0)
        own = {name: Term(mean_by_list(term.values, row, batch), term.weight) for name, term in found.items()}
        return {**own, **({"nll": nll} if {"sft", *WITH_NLL} & set(self._types) else {}), **seen}

    def _scores(
        self,
        student: ModelOutput,
        values: Tensor,
        batch: ListBatch,
        state: TrainState,
        row: Tensor,
        sides: list[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Policy and reference of better and worse candidate, `[pairs]` each."""
        assert batch.reference is not None
        ours, theirs = values, batch.reference.to(values.dtype)
        if self.ld_alpha is not None:
            tokens, _ = student.signal.by_token(self.name)
            shared = batch.lengths.gather(1, torch.stack([batch.best, batch.worst], 1)).amin(1)
            reference = state.columns["reference"].of_tokens(batch).to(tokens.dtype)
            beyond = batch.token_places >= shared[batch.token_lists]
            ours, theirs = (batch.sum_tokens(torch.where(beyond, self.ld_alpha * x, x)) for x in (tokens, reference))
        if self.f_divergence_type != "reverse_kl":  # the score holds the reference
            kind, alpha = self.f_divergence_type, self.f_alpha_divergence_coef
            ours, theirs = preference.f_divergence_score(ours - theirs, kind, alpha=alpha), torch.zeros_like(ours)
        return [(ours[row, i], theirs[row, i]) for i in sides]

    def _of_ratios(
        self,
        name: str,
        chosen: tuple[Tensor, Tensor],
        rejected: tuple[Tensor, Tensor],
        nw: Tensor,
        nl: Tensor,
        smoothed: Tensor | None,
    ) -> Tensor:
        sides = [chosen[0], rejected[0], chosen[1], rejected[1]]
        length = self.length if name in WITH_LENGTH else None
        if name == "sigmoid_norm" or (length or ("mean" if name == "ipo" else "sum")) == "mean":
            sides = [preference.per_token(x, n) for x, n in zip(sides, (nw, nl) * 2, strict=True)]
        options: dict[str, Any] = {}
        if name in SMOOTHING:
            options["label_smoothing"] = self._smoothing(name)
        if smoothed is not None:
            options["label_smoothing"] = smoothed
        if name == "discopop":
            options["tau"] = self.discopop_tau
        if name == "dpo":
            options["offset"] = self.length_penalty * (nw - nl)
        return OF_RATIOS[name](*sides, beta=self._beta, **options)

    def _weight(self, student: ModelOutput, batch: ListBatch) -> Tensor:
        """WPO's weight of each candidate, `[lists, candidates]`."""
        tokens, signal = student.signal.by_token(self.name)
        with torch.no_grad():
            usual = rowwise(log_collision, signal.detach(), None)
            return policy_weight(batch.mean_tokens(tokens - usual.to(tokens.dtype)))

    def _without_reference(self, chosen: Tensor, rejected: Tensor, nw: Tensor, nl: Tensor) -> dict[str, Term]:
        if self.loss_type == "orpo":
            return {"odds_ratio": Term(preference.odds_ratio(chosen, rejected, nw, nl), self._beta)}
        if self.loss_type == "sft":
            return {}
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
            total, number = (state.update_sums or self.update_sums(batch, state))["strays"]
            kl = (total / number).clamp(min=0).expand_as(ratio)
        else:
            kl = torch.where(good, preference.kto_kl(ratio[bad]), preference.kto_kl(ratio[good]))
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        return _mean(preference.kto(ratio, good, kl, beta=self._beta, **weights), batch)[:, 0]


def _mean(values: Tensor, batch: ListBatch) -> Tensor:
    """The mean over each list's candidates, `[lists, 1]`."""
    return values.masked_fill(~batch.candidates, 0.0).sum(1, keepdim=True) / batch.candidates.sum(1, keepdim=True)
