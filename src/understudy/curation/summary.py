"""Statistics of a corpus: its size, its precision, and the fraction of its texts that are distinct or nearly so."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

_GONE = str.maketrans("", "", string.punctuation)


def softened(text: str) -> str:
    """A text without case, punctuation, articles and plural or third-person s, so that near duplicates become equal."""
    words = text.lower().translate(_GONE).split()
    return " ".join(w[:-1] if len(w) > 3 and w.endswith("s") else w for w in words if w not in ("a", "an", "the", "to"))


def precision(verdicts: Sequence[bool | None]) -> float | None:
    """Fraction of good items among those that were graded; `None` if none was."""
    known = [bool(j) for j in verdicts if j is not None]
    return sum(known) / len(known) if known else None


def summary(
    texts: Sequence[str], groups: Sequence[str], is_valid: Callable[[int], bool | None] | None = None
) -> dict[str, Any]:
    """Size, diversity and precision of a corpus.

    Args:
        texts: for example tails.
        groups: the group of each text, for example its head.
        is_valid: whether the item at a position is good; `None` where nobody knows.

    Returns:
        `size`, `groups`, `unique` (distinct texts), `soft_unique` (distinct after `softened`), `most_common` (fraction
        of the most frequent text; 1 means that all texts are equal), `precision` or `None`.
    """
    counts = Counter(texts)
    return {
        "size": len(texts),
        "groups": len(set(groups)),
        "unique": len(counts),
        "soft_unique": len({softened(text) for text in texts}),
        "most_common": max(counts.values()) / len(texts) if texts else 0.0,
        "precision": precision([is_valid(i) for i in range(len(texts))]) if is_valid is not None else None,
    }
