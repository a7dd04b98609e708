"""Preferences whose truth is known: the words of real text in their order, and displaced."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from understudy.data.records import Record
from understudy.data.text import stdlib, whole


def word_order(spec: Mapping[str, Any]) -> list[Record]:
    """Passages of the standard library: given the beginning, the true words in order are best.

    Candidate k has k thirds of its words displaced (at least two), and the share of words in their place as score.

    Args:
        spec: `characters` of the passages and `candidates` of each prompt.
    """
    characters, number = whole(spec, "characters", 300_000), whole(spec, "candidates", 2, 2)
    records: list[Record] = []
    chance = random.Random(0)
    for passage in stdlib(characters):
        words = passage["text"].split()
        for start in range(0, len(words) - 24, 24):
            prompt, rest = words[start : start + 12], words[start + 12 : start + 24]
            made = [list(rest)]
            for k in range(1, number):
                moved = list(rest)
                places = chance.sample(range(len(rest)), max(2, round(len(rest) * k / (number - 1))))
                taken = [moved[p] for p in places]
                for spot, word in zip(places, taken[1:] + taken[:1], strict=True):
                    moved[spot] = word
                made.append(moved)
            scores = [sum(a == b for a, b in zip(m, rest, strict=True)) / len(rest) for m in made]
            order = chance.sample(range(number), number)  # the best is not always first
            records.append(
                {
                    "prompt": " ".join(prompt),
                    "steps": [[f" {word}" for word in made[i]] for i in order],
                    "scores": [scores[i] for i in order],
                }
            )
    return records
