"""Filters that are applied to items in order, with the reasons for dropping. Deterministic; ties go to the earlier
item."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from understudy.errors import InputError

Item = TypeVar("Item")
LETTERS = frozenset(string.ascii_letters + string.digits + "'\",.-$ ")
"""The characters that the official code of paper 11 allows in an event."""


@dataclass
class Funnel:
    """The number of items that each filter kept and dropped, in the order of application."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def note(self, step: str, before: int, after: int, reasons: Counter[str] | None = None) -> None:
        """Record one step: number of items before and after it, and of dropped items by reason."""
        self.rows.append({"step": step, "before": before, "after": after, "dropped": dict(reasons or {})})

    def sieve(self, step: str, items: Sequence[Item], problem: Callable[[Item], str | None]) -> list[Item]:
        """The items without a problem; `problem` returns what is wrong with an item, or `None`."""
        found = [problem(item) for item in items]
        kept = [item for item, reason in zip(items, found, strict=True) if reason is None]
        self.note(step, len(items), len(kept), Counter(reason for reason in found if reason is not None))
        return kept

    def pick(self, step: str, items: Sequence[Item], chosen: Sequence[int], reason: str) -> list[Item]:
        """The items at the chosen positions, in that order."""
        gone = len(items) - len(chosen)
        self.note(step, len(items), len(chosen), Counter({reason: gone} if gone else {}))
        return [items[i] for i in chosen]


def first_occurrences(keys: Iterable[Hashable]) -> list[int]:
    """Position of the first item of each key, in order."""
    first: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    return list(first.values())


def most_likely(
    keys: Sequence[Hashable], log_probs: Sequence[float], *, keep: float, tokens: Sequence[int] | None = None
) -> list[int]:
    """The fraction `keep` of distinct keys with the largest log-probability, best first, as positions of first
    occurrences.

    A repeated key has the log-probability of its last occurrence, as in the official code of paper 11. Ties go to the
    key that occurred first. `int(keep · keys)` keys are kept.

    Args:
        log_probs: summed over the tokens, nats. A sum prefers short texts.
        tokens: numbers of tokens to divide by, for a mean per token.

    Raises:
        InputError: `keep` outside (0, 1], lengths that differ, a log-probability that is not a number.
    """
    if not 0 < keep <= 1:
        raise InputError(f"The share to keep by log-probability is {keep} and must be above 0 and at most 1.")
    if len(log_probs) != len(keys) or (tokens is not None and len(tokens) != len(keys)):
        raise InputError(
            f"{len(keys)} items have {len(log_probs)} log-probabilities"
            + (f" and {len(tokens)} token counts" if tokens is not None else "")
            + ": give one of each an item."
        )
    scores: dict[Hashable, float] = {}
    for i, (key, value) in enumerate(zip(keys, log_probs, strict=True)):
        if value is None or math.isnan(value):
            raise InputError(
                f"Item {i} has no log-probability ({value}): use a source that provides them, or keep all (1.0)."
            )
        scores[key] = value / max(1, tokens[i]) if tokens is not None else value
    first = dict(zip(scores, first_occurrences(keys), strict=True))
    best = sorted(scores, key=lambda key: -scores[key])  # sorting is stable
    return [first[key] for key in best[: int(keep * len(best))]]


def spelling(text: str, *, shortest: int, letters: frozenset[str] = LETTERS) -> str | None:
    """What is wrong with a text: a character outside `letters`, fewer than `shortest` characters, or `None`."""
    if len(text) < shortest:
        return f"shorter than {shortest} characters"
    return None if letters.issuperset(text) else "characters outside the alphabet"
