"""Subsets of texts that differ from each other, by edit distance."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from understudy.errors import InputError

Rule = Literal["maximin", "maxsum", "random", "nearest"]
MOST_SUBSETS = 1_000_000
"""Subsets that `maxsum` compares at most."""


def levenshtein(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and replacements that turn one sequence into the other.

    Args:
        first, second: token ids, or texts for characters.

    A column of the table is held as bits of two integers, so a pair of n and m tokens costs m operations on n bits.
    Source: Myers 1999, in the form of Hyyrö 2003.
    """
    if not first:
        return len(second)
    places: dict[Hashable, int] = {}
    for i, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << i
    every, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    up, down, distance = every, 0, len(first)  # where the column rises and falls by 1 from row to row
    for token in second:
        equal = places.get(token, 0)
        kept = equal | down
        across = (((equal & up) + up) ^ up) | equal
        rises, falls = down | ~(across | up) & every, up & across  # from the column before
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = rises << 1 | 1, falls << 1
        up, down = (falls | ~(kept | rises)) & every, rises & kept & every
    return distance


def edit_distances(items: Sequence[Sequence[Hashable]]) -> NDArray[np.int64]:
    """`levenshtein` of all pairs, `[items, items]`."""
    found = np.zeros((len(items), len(items)), np.int64)
    for i, j in combinations(range(len(items)), 2):
        found[i, j] = found[j, i] = levenshtein(items[i], items[j])
    return found


def by_length(distances: NDArray[np.int64], lengths: Sequence[int]) -> NDArray[np.float64]:
    """Distances divided by the longer of both lengths: 0 … 1, and 0 for two empty sequences.

    Args:
        distances: `[items, items]`. lengths: `[items]`.
    """
    longer = np.maximum.outer(lengths, lengths)
    return np.asarray(distances / np.maximum(longer, 1), np.float64)


def select_diverse(
    distances: NDArray[np.int64], number: int, rule: Rule = "maximin", seed: Sequence[int] = ()
) -> list[int]:
    """Positions of items that are far from each other (paper 16, trajectory diversity).

    Args:
        distances: symmetric, `[items, items]`. number: of items wanted; all where there are no more; of one, the first.
        rule: `maximin` takes the farthest pair, then again and again the item whose smallest distance to those taken is
            largest. `maxsum` takes the subset with the largest sum of distances. Controls: `random`, by `seed`, and
            `nearest`, which is `maximin` with nearest for farthest and smallest for largest throughout.

    Returns:
        In the order in which they were taken; `maxsum` and `random` in ascending order. Ties go to the earlier item, of pairs to
        the earlier first item.

    Raises:
        InputError: `maxsum` would compare more than `MOST_SUBSETS`.
    """
    count = len(distances)
    number = min(number, count)
    if number <= 1:
        return list(range(number))
    if rule == "random":
        return sorted(np.random.default_rng([*seed, count]).permutation(count)[:number].tolist())
    if rule == "maxsum":
        if math.comb(count, number) > MOST_SUBSETS:
            raise InputError(
                f"maxsum would compare {math.comb(count, number)} subsets of {number} of {count} items, and "
                f"{MOST_SUBSETS} are the most: choose maximin."
            )
        subsets: Iterator[tuple[int, ...]] = combinations(range(count), number)
        largest = max(subsets, key=lambda subset: total_distance(distances, subset))
        return list(largest)
    sign = 1 if rule == "maximin" else -1
    signed = sign * np.asarray(distances)
    pairs: Iterator[tuple[int, int]] = combinations(range(count), 2)
    farthest = max(pairs, key=lambda pair: signed[pair])
    chosen = list(farthest)
    while len(chosen) < number:
        left = [i for i in range(count) if i not in chosen]
        chosen.append(max(left, key=lambda i: signed[i, chosen].min()))
    return chosen


def total_distance(distances: NDArray[np.int64], chosen: Sequence[int]) -> int:
    """The sum of distances over the pairs of the chosen items."""
    return int(distances[np.ix_(chosen, chosen)].sum()) // 2
