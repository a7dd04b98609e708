"""An online discriminator of text pairs: fitted anew to what is good and bad at the time, from the weights it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses import binary_cross_entropy
from understudy.models import evaluating
from understudy.models.fitting import minimise
from understudy.models.pairs import Pair, PairClassifier
from understudy.training.order import EpochSampler


def corrupted(text: str, share: float, chance: np.random.Generator) -> str:
    """`text` with a share of its parts, at least one, replaced by others of the same text or by a mask.

    Parts are words, or characters where there are fewer than four words. A text of equal parts gets masks.

    Source: QCRD (2024), word masking and replacement of positives.
    """
    between = " " if len(text.split()) >= 4 else ""
    parts = text.split() if between else list(text)
    places = chance.permutation(len(parts))[: max(1, round(share * len(parts)))]
    for place in places:
        others = [part for part in sorted(set(parts)) if part != parts[place]]
        mask = not others or chance.random() < 0.5
        parts[place] = "_" if mask else others[int(chance.integers(len(others)))]
    return between.join(parts)


def balanced(good: Sequence[Pair], bad: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Both classes, with corruptions of good pairs added to the bad ones until there are as many."""
    chance = np.random.default_rng([seed, 0xD15C])
    order = chance.permutation(len(good))[: max(0, len(good) - len(bad))]
    return list(good), [*bad, *((good[i][0], corrupted(good[i][1], share, chance)) for i in order)]


def fit_discriminator(
    model: PairClassifier, good: Sequence[Pair], bad: Sequence[Pair], *, steps: int, batch: int, lr: float, seed: int
) -> float:
    """Minimise −log D of good pairs and −log (1 − D) of bad ones with AdamW, from the model's weights on.

    Returns:
        The mean loss of the last tenth of the steps, nats.

    Raises:
        InputError: there is no pair of a class.
    """
    if not good or not bad:
        raise InputError(
            f"The discriminator has {len(good)} good and {len(bad)} bad rationales and needs both: ask for more samples."
        )
    pairs = [(pair, 1.0) for pair in good] + [(pair, 0.0) for pair in bad]
    order, found = EpochSampler(len(pairs), seed, steps * batch), list[float]()

    def losses() -> Iterator[Tensor]:
        chosen = list(order)
        for start in range(0, steps * batch, batch):
            rows = [pairs[i] for i in chosen[start : start + batch]]
            logits = model([pair for pair, _ in rows])
            loss = binary_cross_entropy(logits, torch.tensor([y for _, y in rows], device=logits.device)).mean()
            found.append(float(loss.detach()))
            yield loss

    model.train()
    minimise(losses(), torch.optim.AdamW(model.parameters(), lr=lr))
    return float(np.mean(found[-max(1, steps // 10) :]))


@torch.no_grad()
def log_qualities(model: PairClassifier, pairs: Sequence[Pair], batch: int = 256) -> list[float]:
    """log D of each pair, nats, in evaluation mode: finite however sure the model is."""
    with evaluating(model):
        parts = [model(pairs[s : s + batch]).double().cpu() for s in range(0, len(pairs), batch)]
    found: list[float] = torch.nn.functional.logsigmoid(torch.cat(parts)).tolist() if parts else []
    return found


def auc(good: Sequence[float], bad: Sequence[float]) -> float:
    """The probability that a good pair is above a bad one, ties counted half; 0.5 where there is none of a kind."""
    if not good or not bad:
        return 0.5
    difference = np.sign(np.asarray(good)[:, None] - np.asarray(bad)[None])
    return float((difference.mean() + 1) / 2)
