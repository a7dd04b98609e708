"""Log-probabilities of reference models for preference data, and the rewards that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from understudy.data import ListBatch
from understudy.errors import InputError
from understudy.losses.checks import check_finite
from understudy.models import ModelAdapter
from understudy.teachers.cache.scores import ScoreStore, score_lists
from understudy.training.method import TrainState
from understudy.training.reduction import Term
from understudy.training.setup import SetupContext
from understudy.training.token_columns import add_token_columns

SAYS = {"reference": "reference", "taught": "teacher"}
"""Whose log-probabilities a column of the data holds."""

NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True)
class Reward:
    """The reward of a candidate under a method, in TRL's terms: beta · (log π − log π_ref).

    Args:
        beta: as in the method's loss.
        anchored: whether the reference's log-probability is subtracted; otherwise the reward is beta · log π.
        mean: whether log-probabilities are means over tokens instead of sums.
    """

    beta: float
    anchored: bool = True
    mean: bool = False

    def rows(self, log_probs: Tensor, reference: Tensor | None, batch: ListBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Values `[lists]` by TRL's names (`NAMES`), each with a mask of the lists that count.

        The best candidate of a list is the chosen one and the worst the rejected one. A single answer is chosen if its
        label is 1 and rejected if it is 0, and has neither margin nor accuracy.

        Args:
            log_probs, reference: `[lists, candidates]`, of the student and of the reference model, nats.
            batch: the lists.
        """
        scale = batch.lengths.clamp(min=1) if self.mean else torch.ones_like(batch.lengths)
        ours = log_probs.detach() / scale
        rewards = self.beta * (ours - reference.detach() / scale if self.anchored and reference is not None else ours)
        several = batch.candidates.sum(1) > 1
        found, sides = {}, {"chosen": (batch.best, batch.chosen), "rejected": (batch.worst, several | ~batch.chosen)}
        for kind, values in (("rewards", rewards), ("logps", ours)):
            for side, (place, counts) in sides.items():
                found[f"{kind}/{side}"] = (values.gather(1, place[:, None])[:, 0], counts)
        margins = found["rewards/chosen"][0] - found["rewards/rejected"][0]
        found["rewards/margins"] = (margins, several)
        found["rewards/accuracies"] = ((margins > 0).to(margins.dtype), several)
        return {name: found[name] for name in NAMES}


def with_margin(means: Mapping[str, float]) -> dict[str, float]:
    """Add the difference of the mean chosen and rejected rewards as the margin of single answers, as in TRL's KTO."""
    if "rewards/margins" in means or not {"rewards/chosen", "rewards/rejected"} <= means.keys():
        return dict(means)
    return {**means, "rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}


def attach(context: SetupContext, scorers: dict[str, ModelAdapter]) -> None:
    """Compute each model's log-probabilities of all candidates once, into the column of its name, in the precision that the
    student's are computed in."""
    for column, model in scorers.items():
        store = ScoreStore(context.store / "scores")
        for split, examples in context.splits.items():
            autocast = None if split in ("validation", "test") else context.autocast
            score_lists(model, examples, context.collate, store, column=column, autocast=autocast)
            for row in examples.records:
                for i, value in enumerate(row[column]):
                    if not math.isfinite(value):
                        raise InputError(
                            f"The {SAYS[column]} gives candidate {i} of {split} example {row['id']} the log-probability "
                            f"{value}, and it must be finite. Load the model in float32, or leave the example out."
                        )


def attach_tokens(context: SetupContext, model: ModelAdapter, method: str) -> None:
    """The same of each completion token of the training examples, as the column `reference`.

    Args:
        method: for the message, if the model tells nothing of tokens.
    """
    add_token_columns(
        context, model, lambda s: {"reference": s.by_token(method)[0]}, kind="log_probs", autocast=context.autocast
    )


def recorded(context: SetupContext) -> None:
    """Use the log-probabilities recorded in the data as those of the reference model."""
    for split, examples in context.splits.items():
        for row in examples.records:
            if row["log_probs"] is None or len(row["log_probs"]) != len(row["sequences"]):
                raise InputError(
                    f"anchor='recorded' needs log_probs, one for each candidate; {split} example {row['id']} has none."
                )
            row["reference"] = row["log_probs"]


def need_order(method: str, data: Any) -> None:
    """Refuse lists without a better and a worse candidate."""
    for split, examples in data.splits.items():
        for row in examples.records:
            if max(row["scores"]) == min(row["scores"]):
                raise InputError(
                    f"{method}: {split} list {row['id']} has one candidate or equal scores, no better and worse. Use "
                    "dpo with options.loss_type=kto for unpaired examples, or drop it."
                )


def reward_terms(reward: Reward, log_probs: Tensor, reference: Tensor | None, batch: ListBatch) -> dict[str, Term]:
    """Rewards and log-probabilities of both sides by TRL's names, logged and not trained on. If both rewards fall,
    probability moves away from all responses in the data."""
    rows = reward.rows(log_probs, reference, batch)
    return {name: Term(torch.where(counts, values, 0.0), 0.0) for name, (values, counts) in rows.items()}


def reward_counts(batch: ListBatch) -> dict[str, float]:
    """The number of lists that each of `reward_terms` is averaged over."""
    blank = torch.zeros_like(batch.scores)
    return {name: float(counts.sum()) for name, (_, counts) in Reward(1.0).rows(blank, blank, batch).items()}


def rewarded(context: SetupContext, reward: Reward) -> None:
    """Report this reward in evaluations of the run's splits."""
    for examples in context.splits.values():
        examples.reward = reward


def finite(log_probs: Tensor, batch: ListBatch) -> Tensor:
    """The student's log-probabilities, after checking that none is −inf or nan; the error names the example."""

    def say(value: float, row: int, i: int) -> str:
        return (
            f"The student gives candidate {i} of example {int(batch.ids[row])} the log-probability {value}, and it must be "
            "finite. Look at that example, lower the learning rate, or train in float32."
        )

    check_finite(log_probs, say, batch.candidates)
    return log_probs


def check_starts_at_zero(own: bool, log_probs: Tensor, batch: ListBatch, state: TrainState) -> None:
    """Check that all log-ratios are 0 at the first step, where the student equals its reference model."""
    if not own or state.step or batch.reference is None:
        return
    ratio = ((log_probs - batch.reference).detach() / batch.reference.abs().clamp(min=1)).abs().max()
    if float(ratio) > 2e-2:
        raise InputError(
            f"The student's log-probabilities differ from their stored reference by {float(ratio):.1%} before the first "
            "step. Something random or stateful is in the model (dropout, batch statistics): switch it off."
        )
