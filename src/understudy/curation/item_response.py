"""Two-parameter logistic item response theory: which questions tell able models from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit

from understudy.errors import InputError

Floats = NDArray[np.float64]


class ItemResponse(NamedTuple):
    """Parameters of the model P(i answers j) = σ(α_j (θ_i − β_j)).

    Args:
        ability: θ `[models]`. discrimination: α `[items]`. difficulty: β `[items]`.
    """

    ability: Floats
    discrimination: Floats
    difficulty: Floats

    @property
    def logits(self) -> Floats:
        """α_j (θ_i − β_j), `[models, items]`."""
        return np.asarray(self.discrimination * (self.ability[:, None] - self.difficulty), np.float64)

    @property
    def probabilities(self) -> Floats:
        """Of a right answer, `[models, items]`."""
        return np.asarray(expit(self.logits), np.float64)

    def nll(self, responses: ArrayLike) -> Floats:
        """−log P of each response, 1 right and 0 wrong, `[models, items]`, nats."""
        signed = np.where(np.asarray(responses, bool), -self.logits, self.logits)
        return np.asarray(np.logaddexp(0.0, signed), np.float64)

    def gradient(self, responses: ArrayLike) -> ItemResponse:
        """Of the summed `nll`, in each parameter."""
        error = self.probabilities - np.asarray(responses, np.float64)
        alpha = (error * (self.ability[:, None] - self.difficulty)).sum(0)
        return ItemResponse(error @ self.discrimination, alpha, -self.discrimination * error.sum(0))


def fit_item_response(responses: ArrayLike) -> ItemResponse:
    """The most likely parameters, with priors that keep them finite: θ, β ~ N(0, 1), log α ~ N(0, ½²).

    Args:
        responses: `[models, items]`, 1 right and 0 wrong.

    Returns:
        With abilities of mean 0 and variance 1 where they differ; the model does not change with their scale and origin.

    Raises:
        InputError: no model or no item, or a response that is neither 0 nor 1.

    Source: ARTE (2024), Sec. 3.1; the priors are ours.
    """
    answers = np.asarray(responses, np.float64)
    if answers.ndim != 2 or not answers.size:
        raise InputError(f"Responses have shape {answers.shape}: give [models, items], at least one of each.")
    if (bad := ~np.isin(answers, (0, 1))).any():
        model, item = (int(i[0]) for i in bad.nonzero())
        raise InputError(
            f"The response of model {model} to item {item} is {answers[model, item]}: give 1 for right, 0 for wrong."
        )
    models, items = answers.shape

    def unpacked(x: Floats) -> ItemResponse:
        return ItemResponse(x[:models], np.exp(x[models : models + items]), x[models + items :])

    def objective(x: Floats) -> tuple[float, Floats]:
        found = unpacked(x)
        slope = found.gradient(answers)
        precision = np.repeat([1.0, 4.0, 1.0], [models, items, items])
        whole = np.concatenate([slope.ability, slope.discrimination * found.discrimination, slope.difficulty])
        return float(found.nll(answers).sum() + (precision * x * x).sum() / 2), whole + precision * x

    best = minimize(objective, np.zeros(models + 2 * items), jac=True, method="L-BFGS-B", options={"maxiter": 5000})
    found = unpacked(best.x)
    origin, scale = found.ability.mean(), found.ability.std()
    scale = scale if scale > 1e-8 else 1.0
    shifted = (found.ability - origin) / scale, found.discrimination * scale, (found.difficulty - origin) / scale
    return ItemResponse(*shifted)


def most_discriminating(discrimination: Sequence[float], number: int, responses: ArrayLike | None = None) -> list[int]:
    """Positions of the items with the largest α, best first; ties go to the earlier item.

    Args:
        responses: `[models, items]`. Items that all models answer alike tell nothing, and come last.
    """
    answers = np.asarray(responses) if responses is not None else None
    alike = [False] * len(discrimination) if answers is None else (answers == answers[:1]).all(0).tolist()
    return sorted(range(len(discrimination)), key=lambda j: (alike[j], -discrimination[j]))[:number]
