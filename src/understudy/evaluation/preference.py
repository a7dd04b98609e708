"""How well a policy ranks candidates, and how far it has moved from its reference model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from understudy.data import Batch, ListBatch
from understudy.errors import InputError
from understudy.models import ModelAdapter, evaluating

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
            log_probs, reference: `[lists, candidates]`, of the student and of the reference model.
            batch: the lists.
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
    """Add the difference of the mean chosen and rejected rewards as the margin of single answers, as in TRL's KTO."""
    if "rewards/margins" in means or not {"rewards/chosen", "rewards/rejected"} <= means.keys():
        return dict(means)
    return {**means, "rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}


@torch.no_grad()
def evaluate_preferences(model: ModelAdapter, loader: DataLoader[Any]) -> dict[str, Any]:
    """Metrics over lists.

    `accuracy`: fraction of ordered pairs of candidates that the mean log-probability per token orders as the scores do.
    `nll`: of the best candidate, nats per token. If the method's `setup` defined a reward: `rewards/…` and `logps/…` by
    TRL's names. If both rewards fall, probability moves away from all responses in the data.
    """
    device = next(model.parameters()).device
    parts: dict[str, list[Tensor]] = {}
    examples: Any = loader.dataset
    while isinstance(examples, Subset):
        examples = examples.dataset
    reward: Reward | None = getattr(examples, "reward", None)
    with evaluating(model):
        for values in loader:
            batch = Batch.from_dict(values)
            assert isinstance(batch, ListBatch)
            _score(parts, model(batch.to(device)).signal.values.cpu().double(), batch, reward)
    joined = {name: torch.cat(found) for name, found in parts.items()}
    if not joined or len(joined["nll"]) == 0:
        raise InputError("The split has no list to evaluate.")
    means = {k: float(v.mean()) for k, v in joined.items() if len(v)}
    return {"rows": len(joined["nll"]), "metrics": with_margin(means)}


def _score(parts: dict[str, list[Tensor]], scores: Tensor, batch: ListBatch, reward: Reward | None) -> None:
    def pick(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.gather(1, batch.best[:, None])[:, 0], x.gather(1, batch.worst[:, None])[:, 0]

    _add(parts, "accuracy", _ordered(scores / batch.lengths.clamp(min=1), batch))
    _add(parts, "nll", -pick(scores)[0] / pick(batch.lengths)[0])
    if reward is None or (reward.anchored and batch.reference is None):
        return
    for name, (value, counts) in reward.rows(scores, batch.reference, batch).items():
        _add(parts, name, value[counts])


def _add(parts: dict[str, list[Tensor]], name: str, value: Tensor) -> None:
    parts.setdefault(name, []).append(value)


def _ordered(values: Tensor, batch: ListBatch) -> Tensor:
    """1 for each pair of candidates ordered as its scores are, 0.5 for a tie of `values`, 0 otherwise."""
    better = batch.scores[:, :, None] > batch.scores[:, None, :]
    better &= batch.candidates[:, :, None] & batch.candidates[:, None, :]
    difference = (values[:, :, None] - values[:, None, :])[better]
    return (difference.sign() + 1) / 2
