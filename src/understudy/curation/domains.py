"""How much of each domain is drawn: weights by how far a student lags its teacher (DDK)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from understudy.errors import InputError


def first_weights(ratios: Tensor) -> Tensor:
    """softmax of the ratios of perplexities (DDK, Eq. 1).

    Args:
        ratios: `[domains]`, ℓ_S / ℓ_T, above 0; above 1 where the student is worse.
    """
    return torch.softmax(ratios.double(), -1)


def next_weights(weights: Tensor, ratios: Tensor, alpha: float) -> Tensor:
    """ψ_i = r_i · exp(ratio_i), r′_i = α · ψ_i / Σψ + (1 − α) / N (DDK, Eq. 2): each at least (1 − α) / N.

    Logarithms are added instead, so no ratio is too large, and a weight of 0 is lifted to (1 − α) / N.

    Args:
        weights: r `[domains]`, at least 0, summing to 1. ratios: as in `first_weights`.

    Raises:
        InputError: α outside of 0 … 1.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"next_weights: alpha is {alpha} and must lie in [0, 1].")
    share = torch.softmax(weights.double().log() + ratios.double(), -1)
    return alpha * share + (1 - alpha) / len(weights)


def perplexity_ratios(student: Tensor, teacher: Tensor, names: Sequence[str]) -> Tensor:
    """ℓ_S / ℓ_T `[domains]`, float64.

    Args:
        student, teacher: perplexities `[domains]`: exp of the mean negative log-likelihood of a token.

    Raises:
        InputError: one that is not a finite number above 0, with the name of its domain.
    """
    for side, values in (("student", student), ("teacher", teacher)):
        for name, value in zip(names, values.tolist(), strict=True):
            if not 0 < value < float("inf"):
                raise InputError(
                    f"The {side}'s perplexity in domain {name!r} is {value} and must be a finite number above 0."
                )
    return student.double() / teacher.double()


def example_weights(weights: Tensor, domains: Tensor) -> Tensor:
    """`[examples]`: the weight of an example's domain, divided among the domain's examples.

    Args:
        weights: `[domains]`. domains: `[examples]`, the number of each one's domain.
    """
    counts = torch.bincount(domains, minlength=len(weights))
    return (weights / counts.clamp(min=1))[domains]
