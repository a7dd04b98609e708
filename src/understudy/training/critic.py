"""Fitting a binary critic of text pairs, with early stopping on its precision at a wanted recall (paper 11)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from understudy.curation import base_rate_bias, cutoff_at_recall, recall_curve, score
from understudy.errors import InputError
from understudy.losses import binary_cross_entropy
from understudy.models.pairs import Pair, PairClassifier
from understudy.models.rows import evaluating
from understudy.training.order import EpochShuffle

View = Callable[[int, Pair], Pair]


@dataclass(frozen=True)
class Fit:
    """How a critic is fitted.

    Args:
        lr, batch, epochs, weight_decay: of AdamW, at most. warmup: steps of linear warm-up.
        patience: epochs without a better validation precision at `recall` before it stops.
        plateau: such epochs before the rate is divided by ten. seed: of order and dropout.
    """

    lr: float
    batch: int = 128
    epochs: int = 50
    warmup: int = 1000
    patience: int = 10
    plateau: int = 5
    recall: float = 0.8
    weight_decay: float = 0.01
    seed: int = 0


def fit_critic(
    model: PairClassifier,
    train: tuple[Sequence[Pair], Sequence[int]],
    validation: tuple[Sequence[Pair], Sequence[int]],
    fit: Fit,
    view: Callable[[int], View],
) -> dict[str, Any]:
    """Minimise binary cross-entropy from the base rate on; the model ends with the weights of its best epoch.

    Args:
        train, validation: text pairs and 0/1 labels. view: the wording of the pairs in an epoch; validation has the
            wordings of the first three.

    Returns:
        `epochs` done, `best_epoch`, `best_precision`, `seconds` and the `history` of validation precision.
    """
    pairs, labels = train
    checked, truth = validation
    for name, values in (("training", labels), ("validation", truth)):
        if len(set(values)) < 2:
            found = f"only label {values[0]}" if len(values) else "nothing"
            raise InputError(f"The critic's {name} labels hold {found}: it needs good and bad examples in both splits.")
    started = time.time()
    with torch.no_grad():
        model.output().bias.fill_(base_rate_bias(sum(labels) / len(labels)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.lr, weight_decay=fit.weight_decay)
    order = EpochShuffle(len(pairs), fit.seed)
    best, best_state, history = -1.0, model.state_dict(), []
    step, rate, stale, waiting = 0, fit.lr, 0, 0
    torch.manual_seed(fit.seed)
    for epoch in range(fit.epochs):
        order.set_epoch(epoch)
        chosen, worded = list(order), view(epoch)
        model.train()
        for start in range(0, len(chosen), fit.batch):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, step / max(1, fit.warmup))
            rows = chosen[start : start + fit.batch]
            logits = model([worded(i, pairs[i]) for i in rows])
            targets = torch.tensor([float(labels[i]) for i in rows], device=logits.device)
            optimizer.zero_grad()
            binary_cross_entropy(logits, targets).mean().backward()
            optimizer.step()
        precision = precision_at_recall(truth, probabilities(model, checked, [view(v) for v in range(3)]), fit.recall)
        history.append(precision)
        if precision > best:
            best, best_state, stale, waiting = precision, copy.deepcopy(model.state_dict()), 0, 0
            continue
        stale, waiting = stale + 1, waiting + 1
        if waiting > fit.plateau:
            rate, waiting = rate / 10, 0
        if stale >= fit.patience:
            break
    model.load_state_dict(best_state)
    return {
        "epochs": len(history),
        "best_epoch": history.index(best),
        "best_precision": best,
        "seconds": time.time() - started,
        "history": history,
    }


@torch.no_grad()
def probabilities(model: PairClassifier, pairs: Sequence[Pair], views: Sequence[View], batch: int = 256) -> list[float]:
    """The critic's probability of each pair, averaged over views, in evaluation mode."""

    def logits(worded: Sequence[Pair]) -> torch.Tensor:
        parts = [model(worded[s : s + batch]).cpu() for s in range(0, len(worded), batch)]
        return torch.cat(parts)

    with evaluating(model):
        return score(pairs, logits, views)


def precision_at_recall(labels: Sequence[int], scores: Sequence[float], recall: float) -> float:
    """Precision at the cutoff of a wanted recall; that of the strictest cutoff where ties leave no such cutoff."""
    curve = recall_curve(labels, scores)
    return cutoff_at_recall(labels, scores, recall).precision if curve[-1].recall <= recall else curve[-1].precision
