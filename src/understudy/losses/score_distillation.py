"""Score distillation: a generator learns from the difference between two noise predictions at its own noised samples.

Of a sample x with the noisy copy x_t, the teacher predicts the noise ε_T and an assistant, trained on the generator's
samples, ε_A. The score is −ε/σ, so descent along d = ε_T − ε_A moves x from the distribution of the samples to the teacher's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full


class Ranking(NamedTuple):
    """The order of two candidates of each row.

    Args:
        first_wins: `[rows]`; false for a tie.
        tie: `[rows]`, whether both are equally good.
    """

    first_wins: Tensor
    tie: Tensor

    def order(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The winner and the loser of each row of `[rows, ...]`; of a tie the second is the winner."""
        wins = self.first_wins.view(-1, *[1] * (first.dim() - 1))
        return torch.where(wins, first, second), torch.where(wins, second, first)


def rank_pairs(first: Tensor, second: Tensor) -> Ranking:
    """Rank the two candidates of each row by a cost.

    Args:
        first, second: cost of the candidates, `[rows]`; the lower one wins.

    Raises:
        InputError: a cost is not finite.

    Source: Distillation-DPO (2025, arXiv 2504.11447), winning and losing sample.
    """
    for name, values in (("first", first), ("second", second)):
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row = int(bad[0])
            raise InputError(
                f"The metric of the {name} candidate of row {row} is {float(values[row])}: no pair can be ranked by it. "
                "Lower the learning rate if samples diverge, or choose a metric that is finite for every sample."
            )
    return Ranking(first < second, first == second)


def score_difference(teacher: Tensor, assistant: Tensor, clip: float | None = None) -> Tensor:
    """d = ε_T − ε_A without gradient, `[rows, ...]`.

    A field that is added to both predictions changes nothing, and equal predictions give 0.

    Args:
        teacher, assistant: ε_T and ε_A at the same noisy samples, `[rows, ...]`.
        clip: largest root mean square of d in a row; a larger one is scaled down to it.

    Raises:
        InputError: the predictions differ in shape.

    Source: Distillation-DPO (2025, arXiv 2504.11447), generator gradient.
    """
    if teacher.shape != assistant.shape:
        raise InputError(f"Teacher {tuple(teacher.shape)} and assistant {tuple(assistant.shape)} differ in shape.")
    difference = full(teacher.detach()) - full(assistant.detach())
    if clip is None:
        return difference
    size = difference.square().flatten(1).mean(1).sqrt()
    scale = torch.where(size > clip, clip / size, 1.0)
    return difference * scale.view(-1, *[1] * (difference.dim() - 1))


def score_distillation(samples: Tensor, difference: Tensor) -> Tensor:
    """mean (d · x) over a sample's own entries, `[rows]`: its gradient to x is d over their number.

    Distillation-DPO adds it for the winners and subtracts it, times λ, for the losers. Its released code shows
    x_t − x = σ n in the place of x: the value is then mean (d · σ n), and the gradient 0.

    Args:
        samples: x, `[rows, ...]`.
        difference: d, from `score_difference`, `[rows, ...]`.

    Raises:
        InputError: the two differ in shape.

    Source: Distillation-DPO (2025, arXiv 2504.11447), generator gradient; the surrogate of variational score distillation.
    """
    if samples.shape != difference.shape:
        raise InputError(f"Samples {tuple(samples.shape)} and scores {tuple(difference.shape)} differ in shape.")
    return (full(difference.detach()) * full(samples)).flatten(1).mean(1)


def distribution_matching(samples: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """½ mean d² with the gradient d / entries to the samples: `[rows]`, d = (μ_fake − μ_real) / mean |x − μ_real|.

    Descent along d moves a sample from the generator's distribution to the teacher's: it is the gradient of their KL
    divergence, averaged over noise levels, with a weight that gives all of these one size. 0 where both scores agree.

    Args:
        samples: x of the generator, `[rows, ...]`.
        real, fake: x_0 that the teacher and the fake-score network predict of a noisy copy of x, `[rows, ...]`; detached here.

    Raises:
        InputError: the three differ in shape.

    Source: DMD (Yin et al. 2024, arXiv 2311.18828), Eqs. 7 and 8 and Algorithm 2; α_t is left out as there.
    """
    if not samples.shape == real.shape == fake.shape:
        raise InputError(
            f"Samples {tuple(samples.shape)}, real {tuple(real.shape)} and fake predictions {tuple(fake.shape)} differ in shape."
        )
    samples = full(samples)
    x, real, fake = samples.detach(), full(real.detach()), full(fake.detach())
    size = (x - real).abs().flatten(1).mean(1).clamp(min=torch.finfo(x.dtype).eps)
    d = (fake - real) / size.view(-1, *[1] * (x.dim() - 1))
    return 0.5 * (samples - (x - d)).square().flatten(1).mean(1)
