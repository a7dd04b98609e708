"""Pairs of a better and a worse next step behind the same beginning, out of a searched tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from understudy.generation.tree import Node


class SiblingPair(NamedTuple):
    """Two steps from one state, each the node behind it."""

    better: Node
    worse: Node


def sibling_pairs(path: Sequence[Node], *, worst: bool = True) -> list[SiblingPair]:
    """At every state of a path its best step and its worst by Q; ties go to the more visited one, then to the first.

    A state with fewer than two steps, or with steps of one Q, gives none.

    Args:
        path: from the root on. worst: the worse side is the worst step, else the second best.

    Source: MCTS-DPO (2024, arXiv 2405.00451), Section 3.1, as in its released code.
    """
    found = []
    for node in path:
        ranked = sorted(node.children or [], key=lambda child: (-child.q, -child.visits))
        if len(ranked) > 1 and ranked[0].q != (other := ranked[-1 if worst else 1]).q:
            found.append(SiblingPair(ranked[0], other))
    return found


def chain(node: Node) -> list[Node]:
    """A node and the steps that follow without an alternative: they belong to its step."""
    found = [node]
    while len(found[-1].children or []) == 1:
        found += found[-1].children or []
    return found
