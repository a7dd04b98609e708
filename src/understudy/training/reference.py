"""Log-probabilities of reference models for preference data, and the rewards that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

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
    """What a method takes as the reward of a candidate, in TRL's terms: beta · (log π − log π_ref).

    Args:
        beta: as in the method's loss.
        anchored: whether a reference is taken off; without one the reward is beta · log π.
        mean: whether log-probabilities are means a token instead of sums.
    """

    beta: float
    anchored: bool = True
    mean: bool = False

    def rows(self, log_probs: Tensor, reference: Tensor | None, batch: ListBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Values `[lists]` by TRL's names (`NAMES`), each with which lists count.

        The best candidate of a list is the chosen one and the worst the rejected one; a single answer is chosen where its
        label is 1 and rejected where it is 0, and alone has neither margin nor accuracy.

        Args:
            log_probs, reference: `[lists, candidates]`, of the student and of the reference.
        """
        scale = batch.lengths.clamp(min=1) if self.mean else torch.ones_like(batch.lengths)
        ours = log_probs.detach() / scale
        rewards = self.beta * (ours - reference.detach() / scale if self.anchored and reference is not None else ours)
        several = batch.candidates.sum(1) > 1
        good = batch.scores[:, 0] > 0.5
        found, sides = {}, {"chosen": (batch.best, several | good), "rejected": (batch.worst, several | ~good)}
        for kind, values in (("rewards", rewards), ("logps", ours)):
            for side, (place, counts) in sides.items():
                found[f"{kind}/{side}"] = (values.gather(1, place[:, None])[:, 0], counts)
        margins = found["rewards/chosen"][0] - found["rewards/rejected"][0]
        found["rewards/margins"] = (margins, several)
        found["rewards/accuracies"] = ((margins > 0).to(margins.dtype), several)
        return {name: found[name] for name in NAMES}


def with_margin(means: Mapping[str, float]) -> dict[str, float]:
    """Means of single answers, with the difference of both sides as their margin, as TRL's KTO has it."""
    if "rewards/margins" in means or not {"rewards/chosen", "rewards/rejected"} <= means.keys():
        return dict(means)
    return {**means, "rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}


def attach(context: SetupContext, scorers: dict[str, ModelAdapter]) -> None:
    """Compute what each model says of every candidate, once, into the column of its name."""
    for column, model in scorers.items():
        store = ScoreStore(context.store / "scores")
        for split, examples in context.splits.items():
            score_lists(model, examples, context.collate, store, column=column)
            for row in examples.records:
                for i, value in enumerate(row[column]):
                    if not math.isfinite(value):
                        raise InputError(
                            f"The {SAYS[column]} gives candidate {i} of {split} example {row['id']} the log-probability "
                            f"{value}, and it must be finite. Load the model in float32, or leave the example out."
                        )


def recorded(context: SetupContext) -> None:
    """Take the log-probabilities recorded with the data as reference."""
    for split, examples in context.splits.items():
        for row in examples.records:
            if row["log_probs"] is None or len(row["log_probs"]) != len(row["sequences"]):
                raise InputError(
                    f"anchor='recorded' needs log_probs, one for each candidate; {split} example {row['id']} has none."
                )
            row["reference"] = row["log_probs"]


def reward_terms(reward: Reward, log_probs: Tensor, reference: Tensor | None, batch: ListBatch) -> dict[str, Term]:
    """Rewards and log-probabilities of both sides by TRL's names, logged but not trained: both rewards falling is a
    collapse on its way."""
    rows = reward.rows(log_probs, reference, batch)
    return {name: Term(torch.where(counts, values, 0.0), 0.0) for name, (values, counts) in rows.items()}


def reward_counts(batch: ListBatch) -> dict[str, float]:
    """How many lists each of `reward_terms` is the mean of."""
    blank = torch.zeros_like(batch.scores)
    return {name: float(counts.sum()) for name, (_, counts) in Reward(1.0).rows(blank, blank, batch).items()}


def rewarded(context: SetupContext, reward: Reward) -> None:
    """Have evaluations of the run's splits report this reward."""
    for examples in context.splits.values():
        examples.reward = reward


def finite(log_probs: Tensor, batch: ListBatch) -> Tensor:
    """The student's log-probabilities; one that is −inf or nan is named by its example."""

    def say(value: float, row: int, i: int) -> str:
        return (
            f"The student gives candidate {i} of example {int(batch.ids[row])} the log-probability {value}, and it must be "
            "finite. Look at that example, lower the learning rate, or train in float32."
        )

    check_finite(log_probs, say, batch.candidates)
    return log_probs


def check_starts_at_zero(own: bool, log_probs: Tensor, batch: ListBatch, state: TrainState) -> None:
    """At the first step the student is its own reference: any log-ratio but 0 is a defect, and said so."""
    if not own or state.step or batch.reference is None:
        return
    ratio = ((log_probs - batch.reference).detach() / batch.reference.abs().clamp(min=1)).abs().max()
    if float(ratio) > 2e-2:
        raise InputError(
            f"The student's log-probabilities differ from their stored reference by {float(ratio):.1%} before the first "
            "step. Something random or stateful is in the model (dropout, batch statistics): switch it off."
        )
