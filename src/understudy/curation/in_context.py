"""How much a worked example helps a model: its accuracy on other questions with the example before them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from understudy.errors import InputError


class InContextScores(NamedTuple):
    """Scores of drafts, NaN where there is nothing to score.

    Args:
        rationales: `[questions, rationales]`, 0 … 1. questions: their means over the rationales there are, `[questions]`.
    """

    rationales: NDArray[np.float64]
    questions: NDArray[np.float64]


def in_context_scores(correct: ArrayLike, asked: ArrayLike) -> InContextScores:
    """The share of right answers with each rationale as the example, and its mean over a question's rationales.

    Args:
        correct: `[questions, rationales, probes]`, whether the model answers a probe with the example before it.
        asked: the same shape, or `[questions, rationales]`, whether it was asked: not where there is no rationale, nor where
            the probe is the example's own question.

    Raises:
        InputError: no probe.

    Source: ARTE (2024), Sec. 3.2.
    """
    right = np.asarray(correct, bool)
    if right.ndim != 3 or not right.shape[2]:
        raise InputError(
            f"In-context answers have shape {right.shape}: give [questions, rationales, probes], one probe at least."
        )
    known = np.asarray(asked, bool)
    known = np.broadcast_to(known if known.ndim == 3 else known[:, :, None], right.shape)
    rationales = _share((right & known).sum(-1), known.sum(-1))
    there = ~np.isnan(rationales)
    return InContextScores(rationales, _share(np.where(there, rationales, 0.0).sum(1), there.sum(1)))


def _share(part: NDArray[np.generic], whole: NDArray[np.generic]) -> NDArray[np.float64]:
    """Their quotient, NaN where `whole` is 0."""
    return np.asarray(np.where(whole == 0, np.nan, part / np.maximum(whole, 1)), np.float64)
