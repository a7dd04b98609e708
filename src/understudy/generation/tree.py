"""Monte Carlo tree search with priors (PUCT) over any states: selection, backup, and the choice of a step.

No model is in here. A search is a generator: it yields a node that is to be expanded and is sent the node's children, so
that whoever drives it decides who proposes and evaluates steps, and how many searches go on side by side.

Notation: N visits, Q value of a step, V value of the state behind it, R what an evaluator says of a state,
r = R(state) − R(state before) the reward of the step, p its prior.

Source: MCTS-DPO (2024, arXiv 2405.00451), Section 3.1, with the counting of its released code.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from understudy.errors import InputError

Expand = Generator["Node", "Sequence[Node] | None", Any]
"""A search, or a part of one: yields nodes to expand, is sent their children, or `None` where there are none to be had."""


@dataclass(eq=False)
class Node:
    """A state, and the step that leads to it from its parent.

    Args:
        step: what the step is; the search does not look at it. prior: p. value: R of the state. terminal: no step follows.
        parent: `None` at the root. children: `None` until the node is expanded.
        number: of the node in its tree, in the order of expansion; the root is 0.
        visits, q, v: N, Q and V.
    """

    step: Any = None
    prior: float = 1.0
    value: float = 0.0
    terminal: bool = False
    parent: Node | None = field(default=None, repr=False)
    children: list[Node] | None = field(default=None, repr=False)
    visits: int = 0
    q: float = 0.0
    v: float = 0.0
    number: int = 0

    @property
    def reward(self) -> float:
        """r of the step, 0 at the root; the rewards of a path sum to R(last) − R(first)."""
        return self.value - self.parent.value if self.parent is not None else 0.0

    @property
    def path(self) -> list[Node]:
        """The nodes from the root to this one."""
        return [*(self.parent.path if self.parent is not None else []), self]

    def walk(self) -> Iterator[Node]:
        """This node and all below it; parents come before their children."""
        todo = [self]
        while todo:
            node = todo.pop()
            yield node
            todo += reversed(node.children or [])


def prior(log_prob: float, tokens: int, length_penalty: float = 1.25) -> float:
    """p = exp(log π(step) / tokens^λ); 0 for a step of probability 0.

    Args:
        log_prob: log π of the step, summed over its tokens, nats. length_penalty: λ.

    Raises:
        InputError: the step has no tokens, or its log-probability is above 0 or not a number.
    """
    if tokens < 1:
        raise InputError(f"A step of {tokens} tokens has no prior: leave empty steps out.")
    if not log_prob <= 1e-6:
        raise InputError(f"The log-probability of a step is {log_prob} and must be at most 0.")
    return math.exp(min(0.0, log_prob) / tokens**length_penalty)


def state_value(
    self_evaluation: float, outcome: float | None, parent_value: float = 0.0, parent_depth: int = 0
) -> float:
    """R = C / max(d − 3, 1) + O, where a C of exactly 0 says nothing and R(parent) takes the place of the first term.

    Args:
        self_evaluation: C in [0, 1], the probability that the steps so far are right. outcome: O of a finished answer.
        parent_value: R of the state before. parent_depth: d, its number of steps.

    Raises:
        InputError: C lies outside [0, 1], or a value is not finite.
    """
    if not 0 <= self_evaluation <= 1:
        raise InputError(f"The evaluation of a step is {self_evaluation} and must be a probability, in [0, 1].")
    if outcome is not None and not math.isfinite(outcome):
        raise InputError(f"The outcome of an answer is {outcome} and must be finite.")
    guess = self_evaluation / max(parent_depth - 3, 1) if self_evaluation else parent_value
    return guess + (outcome or 0.0)


def attach(node: Node, children: Sequence[Node]) -> None:
    """Make children those of a node; each begins with N = 0, V = 0 and Q = V(node) + r."""
    node.children = list(children)
    for child in node.children:
        child.parent = node
        child.q = node.v + child.reward


def puct(node: Node, c: float = 1.0) -> Node:
    """The child with the largest Q + c p √N(node) / (1 + N(child)); the first of equals."""
    assert node.children
    scale = c * math.sqrt(node.visits)
    return max(node.children, key=lambda child: child.q + scale * child.prior / (1 + child.visits))


def backup(path: Sequence[Node], gamma: float = 1.0) -> None:
    """Count a visit of every node on a path and bring its last reward up to the first node.

    V(s) = Σ_c max(1, N_c) Q_c / Σ_c max(1, N_c) and Q = r + γ V. A child without visits counts once, by its initial Q
    (released code; the paper weighs by N). The first node, where the search stands, keeps its Q.
    """
    for place, node in reversed(list(enumerate(path))):
        if place < len(path) - 1:
            assert node.children
            weights = [max(1, child.visits) for child in node.children]
            node.v = sum(w * child.q for w, child in zip(weights, node.children, strict=True)) / sum(weights)
        node.visits += 1
        if place:
            node.q = node.reward + gamma * node.v


def simulation(start: Node, *, c: float = 1.0, gamma: float = 1.0) -> Expand:
    """From a node by PUCT down to a terminal one, expanding on the way, and back up. `start` counts two visits.

    It ends early where a node has no children to be had. Returns the path.
    """
    start.visits += 1
    path = [start]
    while not path[-1].terminal:
        if path[-1].children is None:
            children = yield path[-1]
            if children is None:
                break
            attach(path[-1], children)
        if not path[-1].children:
            break
        path.append(puct(path[-1], c))
    backup(path, gamma)
    return path


def chosen_child(node: Node) -> Node:
    """The child to go on with: the largest N · (1 + gap), gap = most − fewest visits among its own children; ties by Q,
    then V, then order."""
    assert node.children

    def rank(child: Node) -> tuple[float, float, float]:
        visits = [c.visits for c in child.children or []] or [0]
        return child.visits * (1 + max(visits) - min(visits)), child.q, child.v

    return max(node.children, key=rank)


def most_visited_child(node: Node) -> Node:
    """The child with the most visits; ties by Q, then order."""
    assert node.children
    return max(node.children, key=lambda child: (child.visits, child.q))


def tree_search(
    root: Node, *, simulations: int = 64, first: int | None = None, c: float = 1.0, gamma: float = 1.0
) -> Expand:
    """Search for steps one after the other: simulate, go on to the chosen child and keep what is below it, until the end.

    Args:
        simulations: of each step. first: of the first one; 4 times as many unless given. c: of exploration. γ: `gamma`.

    Returns:
        The chosen path from the root on. It ends above a terminal node where no children were to be had.

    Raises:
        InputError: no simulations.
    """
    first = 4 * simulations if first is None else first
    if min(simulations, first) < 1:
        raise InputError(f"A search of {min(simulations, first)} simulations chooses nothing: give at least 1.")
    node = root
    while not node.terminal:
        for _ in range(first if node is root else simulations):
            yield from simulation(node, c=c, gamma=gamma)
        if not node.children:
            break
        node = chosen_child(node)
    return node.path
