"""How well a policy ranks candidates, and how far it has moved from its reference model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from understudy.data import Batch, ListBatch
from understudy.errors import InputError
from understudy.evaluation.displacement import displacement
from understudy.models import ModelAdapter, evaluating
from understudy.training.reference import Reward, with_margin

_PREFERRED, _REJECTED = "change of the preferred", "change of the rejected"


@torch.no_grad()
def evaluate_preferences(model: ModelAdapter, loader: DataLoader[Any]) -> dict[str, Any]:
    """Metrics over lists.

    `accuracy`: fraction of ordered pairs of candidates that the mean log-probability per token orders as the scores do.
    `nll`: of the best candidate, nats per token. If the method's `setup` defined a reward: `rewards/…` and `logps/…` by
    TRL's names. With a reference model, `displacement/…` and the table of where the probability of both sides went.
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
    changes = [joined.pop(side, torch.empty(0)) for side in (_PREFERRED, _REJECTED)]
    metrics = with_margin({k: float(v.mean()) for k, v in joined.items() if len(v)})
    if not len(changes[0]):
        return {"rows": len(joined["nll"]), "metrics": metrics}
    moved = displacement(*changes)
    return {"rows": len(joined["nll"]), "metrics": metrics | moved["metrics"], "tables": [moved["table"]]}


def _score(parts: dict[str, list[Tensor]], scores: Tensor, batch: ListBatch, reward: Reward | None) -> None:
    def pick(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.gather(1, batch.best[:, None])[:, 0], x.gather(1, batch.worst[:, None])[:, 0]

    _add(parts, "accuracy", _ordered(scores / batch.lengths.clamp(min=1), batch))
    _add(parts, "nll", -pick(scores)[0] / pick(batch.lengths)[0])
    if reward is None or (reward.anchored and batch.reference is None):
        return
    for name, (value, counts) in reward.rows(scores, batch.reference, batch).items():
        _add(parts, name, value[counts])
    if reward.anchored and batch.reference is not None:
        several = batch.candidates.sum(1) > 1
        for name, value in zip((_PREFERRED, _REJECTED), pick(scores - batch.reference), strict=True):
            _add(parts, name, value[several])


def _add(parts: dict[str, list[Tensor]], name: str, value: Tensor) -> None:
    parts.setdefault(name, []).append(value)


def _ordered(values: Tensor, batch: ListBatch) -> Tensor:
    """1 for each pair of candidates ordered as its scores are, 0.5 for a tie of `values`, 0 otherwise."""
    better = batch.scores[:, :, None] > batch.scores[:, None, :]
    better &= batch.candidates[:, :, None] & batch.candidates[:, None, :]
    difference = (values[:, :, None] - values[:, None, :])[better]
    return (difference.sign() + 1) / 2
