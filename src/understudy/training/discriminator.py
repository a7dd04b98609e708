"""An online discriminator of text pairs: fitted anew to what is good and bad at the time, from the weights it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses import binary_cross_entropy
from understudy.models import evaluating
from understudy.models.discriminators import load_discriminator
from understudy.models.fitting import minimise
from understudy.models.pairs import Pair
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


def corruptions(good: Sequence[Pair], number: int, share: float, seed: int) -> list[Pair]:
    """Corruptions of up to `number` of the good pairs, to balance the classes."""
    chance = np.random.default_rng([seed, 0xD15C])
    order = chance.permutation(len(good))[: max(0, number)]
    return [(good[i][0], corrupted(good[i][1], share, chance)) for i in order]


@dataclass(frozen=True)
class DiscriminatorFit:
    """Hyperparameters of a fit.

    Args:
        steps: of AdamW. lr: its rate. corruption: share of a good text that is changed for extra bad ones. batch: pairs a step.
        seed: of new weights, order and corruptions.
    """

    steps: int
    lr: float
    corruption: float = 0.3
    batch: int = 64
    seed: int = 0


def update_discriminator(
    start: str | Path, pairs: Sequence[Pair], labels: Sequence[bool], fit: DiscriminatorFit, folder: Path
) -> list[float]:
    """Minimise −log D of good pairs and −log (1 − D) of bad ones, from the weights of `start` on, and save it in `folder`.

    Args:
        start: as of `load_discriminator`. labels: True for good pairs.

    Returns:
        log D of each pair, nats: finite however sure it is.

    Raises:
        InputError: there is no good pair, or nothing to tell it from.
    """
    good, bad = ([p for p, y in zip(pairs, labels, strict=True) if y is side] for side in (True, False))
    if not good:
        raise InputError(
            f"None of {len(pairs)} rationales is positive, which the discriminator needs: ask for more samples."
        )
    bad += corruptions(good, len(good) - len(bad), fit.corruption, fit.seed)
    torch.manual_seed(fit.seed)
    model = load_discriminator(start).to("cuda" if torch.cuda.is_available() else "cpu")
    rows = [(pair, 1.0) for pair in good] + [(pair, 0.0) for pair in bad]
    order = list(EpochSampler(len(rows), fit.seed, fit.steps * fit.batch))

    def losses() -> Iterator[Tensor]:
        for s in range(0, len(order), fit.batch):
            chosen = [rows[i] for i in order[s : s + fit.batch]]
            logits = model([pair for pair, _ in chosen])
            yield binary_cross_entropy(logits, torch.tensor([y for _, y in chosen], device=logits.device)).mean()

    model.train()
    minimise(losses(), torch.optim.AdamW(model.parameters(), lr=fit.lr))
    model.save(folder)
    with evaluating(model), torch.no_grad():
        parts = [model(pairs[s : s + 256]).double().cpu() for s in range(0, len(pairs), 256)]
    found: list[float] = torch.nn.functional.logsigmoid(torch.cat(parts)).tolist()
    return found
