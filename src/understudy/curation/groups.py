"""Splits by group: items of one group are always in the same split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

from understudy.errors import InputError


def shuffled(keys: Iterable[str], seed: int, name: str) -> list[str]:
    """The distinct keys in an order that depends on seed, name and the set of keys alone."""
    return sorted(set(keys), key=lambda k: hashlib.sha256(json.dumps([seed, name, k]).encode()).digest())


def split_by_group(groups: Sequence[str], shares: Mapping[str, float], seed: int = 0) -> dict[str, list[int]]:
    """Positions of the items of each split. Groups are shuffled and divided by their number; the last split takes the
    rest.

    Args:
        groups: the group of each item, for example its head event.
        shares: fraction of the groups in each split; they sum to 1.
        seed: of the shuffle.

    Raises:
        InputError: shares that are not positive or do not sum to 1, or fewer groups than splits.
    """
    if any(s <= 0 for s in shares.values()) or abs(sum(shares.values()) - 1) > 1e-9:
        raise InputError(f"Shares {dict(shares)} must be above 0 and sum to 1.")
    order = shuffled(groups, seed, "split")
    if len(order) < len(shares):
        raise InputError(
            f"{len(order)} groups cannot be split into {len(shares)} parts ({', '.join(shares)}): get more."
        )
    place: dict[str, str] = {}
    start, done = 0, 0.0
    for i, (name, share) in enumerate(shares.items()):
        done += share
        left = len(shares) - 1 - i
        end = max(start + 1, min(round(done * len(order)), len(order) - left)) if left else len(order)
        place |= dict.fromkeys(order[start:end], name)
        start = end
    splits: dict[str, list[int]] = {name: [] for name in shares}
    for i, group in enumerate(groups):
        splits[place[group]].append(i)
    return splits
