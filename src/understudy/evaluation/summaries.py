"""Metrics of summaries: overlap with a reference, and how many entities a text names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from understudy.errors import InputError


class Overlap(NamedTuple):
    """Shares of the candidate's and of the reference's units that the other has too, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def rouge_n(candidate: Sequence[Hashable], reference: Sequence[Hashable], n: int = 1) -> Overlap:
    """ROUGE-N: n-grams that both have, each at most as often as in the other; 0 where either text has none.

    Args:
        candidate, reference: tokens, as they are to be compared: nothing is stemmed.

    Source: Lin 2004, Section 2.
    """
    if n < 1:
        raise InputError(f"rouge_n: n is {n} and must be at least 1.")
    ours, theirs = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (candidate, reference))
    return _overlap((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> Overlap:
    """ROUGE-L: the longest common subsequence; 1 for two equal texts, 0 where either is empty.

    Source: Lin 2004, Section 3.1, with β = 1.
    """
    lengths = [0] * (len(reference) + 1)  # of the common subsequence with each beginning of the reference
    for token in candidate:
        above = lengths
        lengths = [0]
        for j, other in enumerate(reference):
            lengths.append(above[j] + 1 if token == other else max(above[j + 1], lengths[j]))
    return _overlap(lengths[-1], len(candidate), len(reference))


def entity_density(entities: int, tokens: int) -> float:
    """Named entities a token of a text (chain of density, Adams et al. 2023).

    Raises:
        InputError: a text without tokens, or with fewer tokens than entities.
    """
    if not 0 <= entities <= tokens or tokens < 1:
        raise InputError(f"entity_density: {entities} entities in {tokens} tokens: give a text and its own entities.")
    return entities / tokens


def _overlap(shared: int, candidate: int, reference: int) -> Overlap:
    if not shared:
        return Overlap(0.0, 0.0, 0.0)
    return Overlap(shared / candidate, shared / reference, 2 * shared / (candidate + reference))
