"""Searched trees as they are stored, and pairs of a better and a worse next step behind the same beginning out of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from understudy.curation.items import Item
from understudy.generation.tree import Node
from understudy.generation.tree_search import SearchedTree, Step
from understudy.losses.pair_weights import visit_label_smoothing


class TreeNode(Item):
    """A node of a searched tree.

    Args:
        tree: place of the question in the training data. number: in the tree; the root is 0. parent: number of the one above.
        text: of the step that leads to it. chosen: whether it is on the chosen path. ended: the answer came to its own end.
        visits, q, v, prior, value, self_evaluation, outcome: N, Q, V, p, R, C and O; `outcome` is `None` while the answer goes on.
    """

    tree: int
    number: int
    parent: int | None
    text: str
    chosen: bool
    ended: bool
    visits: int
    q: float
    v: float
    prior: float
    value: float
    self_evaluation: float
    outcome: float | None


class StepPair(Item):
    """Two steps behind the same beginning. `parents` are the nodes of the better and of the worse one.

    Args:
        tree: place of the question in the training data. prompt: the question's, with the steps before.
        better, worse: texts. ended: whether each is the end of an answer. visits, q: of better and worse.
    """

    tree: int
    prompt: str
    better: str
    worse: str
    ended: tuple[bool, bool]
    visits: tuple[int, int]
    q: tuple[float, float]

    def record(self, smoothed: bool = True) -> dict[str, Any]:
        """As a preference record. smoothed: with label smoothing by visits."""
        better, worse = torch.tensor(self.visits, dtype=torch.float64)[:, None]
        own = {"label_smoothing": float(visit_label_smoothing(better, worse))} if smoothed else {}
        sides = {"completions": [self.better, self.worse], "scores": [1, 0], "ended": list(self.ended)}
        return {"prompt": self.prompt, **sides, **own}


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


def tree_nodes(found: SearchedTree, prefix: str) -> list[TreeNode]:
    """All nodes of a tree, parents first. `prefix` begins their ids."""
    path, rows = {node.number for node in found.path}, []
    for node in found.root.walk():
        step = node.step or Step("", 0.0, 0)
        said = {k: getattr(step, k) for k in ("text", "ended", "self_evaluation", "outcome", "requests")}
        counted = {k: getattr(node, k) for k in ("number", "visits", "q", "v", "prior", "value")}
        above = node.parent.number if node.parent is not None else None
        name, chosen = f"{prefix}trees/{found.id}/{node.number}", node.number in path
        rows.append(TreeNode(id=name, tree=int(found.id), parent=above, chosen=chosen, **said, **counted))
    return rows


def step_pairs(rows: Iterable[TreeNode], prompt: str, *, worst: bool = True, most: int = 8) -> list[StepPair]:
    """The pairs along the chosen path of a stored tree.

    Args:
        rows: the nodes of one tree, parents first. prompt: of the question. worst: as of `sibling_pairs`.
        most: pairs of the tree; those nearest to the root are kept.
    """
    nodes: dict[int, Node] = {}
    for row in rows:
        parent = nodes[row.parent] if row.parent is not None else None
        node = Node(row, row.prior, row.value, parent=parent, number=row.number, visits=row.visits, q=row.q, v=row.v)
        nodes[row.number] = node
        if parent is not None:
            parent.children = [*(parent.children or []), node]
    found = []
    for pair in sibling_pairs([n for n in nodes.values() if n.step.chosen], worst=worst)[:most]:
        sides, before = [chain(node) for node in pair], pair.better.path[:-1]
        better, worse = ("".join(n.step.text for n in side) for side in sides)
        found.append(
            StepPair(
                tree=pair.better.step.tree,
                prompt=prompt + "".join(n.step.text for n in before),
                better=better,
                worse=worse,
                ended=(sides[0][-1].step.ended, sides[1][-1].step.ended),
                visits=(pair.better.visits, pair.worse.visits),
                q=(pair.better.q, pair.worse.q),
                parents=(pair.better.step.id, pair.worse.step.id),
                requests=tuple(r for side in sides for n in side for r in n.step.requests),
            )
        )
    return found
