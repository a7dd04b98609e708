"""How much a worked example helps a model: its accuracy on other questions with the example before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from understudy.errors import InputError
from understudy.generation import Prompt


class InContextScores(NamedTuple):
    """Scores of drafts, NaN where there is nothing to score.

    Args:
        rationales: `[questions, rationales]`. questions: their means over the rationales there are, `[questions]`.
    """

    rationales: NDArray[np.float64]
    questions: NDArray[np.float64]


def in_context_scores(correct: ArrayLike, asked: ArrayLike) -> InContextScores:
    """The share of right answers with each rationale as the example, and its mean over a question's rationales.

    Args:
        correct: `[questions, rationales, probes]`, whether the model answers a probe with the example before it; or any other
            number of how much the example helps there, whose means are taken.
        asked: the same shape, or `[questions, rationales]`, whether it was asked: not where there is no rationale, nor where
            the probe is the example's own question.

    Raises:
        InputError: no probe.

    Source: ARTE (2024), Sec. 3.2.
    """
    right = np.asarray(correct, np.float64)
    if right.ndim != 3 or not right.shape[2]:
        raise InputError(
            f"In-context answers have shape {right.shape}: give [questions, rationales, probes], one probe at least."
        )
    known = np.asarray(asked, bool)
    known = np.broadcast_to(known if known.ndim == 3 else known[:, :, None], right.shape)
    rationales = _share(np.where(known, right, 0.0).sum(-1), known.sum(-1))
    there = ~np.isnan(rationales)
    return InContextScores(rationales, _share(np.where(there, rationales, 0.0).sum(1), there.sum(1)))


def _share(part: NDArray[np.generic], whole: NDArray[np.generic]) -> NDArray[np.float64]:
    """Their quotient, NaN where `whole` is 0."""
    return np.asarray(np.where(whole == 0, np.nan, part / np.maximum(whole, 1)), np.float64)


def with_shots(prompt: Prompt, examples: Sequence[Mapping[str, Any]], question: str) -> str:
    """The prompt of a question behind solved ones, each with `question` and `completion`."""
    solved = (f"{prompt.render(question=e['question'])}{e['completion']}\n" for e in examples)
    return "".join(solved) + prompt.render(question=question)


def draw_shots(pool: Sequence[Mapping[str, Any]], number: int, *seed: int) -> list[Mapping[str, Any]]:
    """`number` different records of the pool, or all of a smaller one, at random by the seed."""
    order = np.random.default_rng([0x540, *seed]).permutation(len(pool))[:number]
    return [pool[int(i)] for i in order]
