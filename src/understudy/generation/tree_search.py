"""Tree searches over reasoning steps, many side by side, within a budget of model calls and with a journal of their nodes.

Who proposes and evaluates steps is a function from leaves to expansions. Everything else follows from what it returned, so
a search that was killed is repeated from its journal, without a call, up to the node where it stood.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from understudy.errors import InputError
from understudy.generation.tree import Expand, Node, prior, state_value, tree_search

FORMAT = 1


@dataclass(frozen=True)
class Step:
    """A proposed step with what is said of it.

    Args:
        text: of the step, with what separates it from the next. log_prob: of its tokens under who proposed it, nats.
        tokens: their number. self_evaluation: the probability that all steps up to it are right; 0 says nothing.
        outcome: O of the finished answer, `None` while it goes on. ended: the answer came to its own end.
        requests: ids of the requests that it was made of.
    """

    text: str
    log_prob: float
    tokens: int
    self_evaluation: float = 0.0
    outcome: float | None = None
    ended: bool = False
    requests: tuple[str, ...] = ()


class Expansion(NamedTuple):
    """The steps proposed from one state, and how many model calls they took."""

    steps: Sequence[Step]
    calls: int


class Leaf(NamedTuple):
    """A state whose next steps are wanted.

    Args:
        tree: id of the search. node: number of the state in it. steps: the texts that lead to it.
        width: how many steps to propose. last: they must finish the answer.
    """

    tree: str
    node: int
    steps: tuple[str, ...]
    width: int
    last: bool


@dataclass(frozen=True)
class SearchOptions:
    """How a tree is searched.

    Args:
        simulations: of each step; 4 times as many of the first. width, first_width: proposals from a state, and from the root.
        depth: most steps of an answer. c: of exploration. length_penalty: λ of the prior. gamma: of values.
        calls: most model calls of one tree; a state that they do not cover is not expanded.
        calls_per_step: most calls that a proposed step takes.
        unfinished: added to R of a state from which no step is proposed, the outcome of an answer that is not finished.
    """

    simulations: int = 64
    width: int = 2
    first_width: int = 2
    depth: int = 3
    c: float = 1.0
    length_penalty: float = 1.25
    gamma: float = 1.0
    calls: int | None = None
    calls_per_step: int = 1
    unfinished: float = -1.0

    def __post_init__(self) -> None:
        for name in ("simulations", "width", "first_width", "depth", "calls_per_step"):
            if getattr(self, name) < 1:
                raise InputError(f"A tree search with {name}={getattr(self, name)} finds nothing: give at least 1.")
        if self.calls is not None and self.calls < self.first_width * self.calls_per_step:
            raise InputError(
                f"A budget of {self.calls} calls does not cover the first {self.first_width} proposals, which take up to "
                f"{self.first_width * self.calls_per_step}: raise it."
            )


@dataclass
class SearchedTree:
    """A finished search.

    Args:
        id: of the search. root: of its tree; the `step` of every other node is a `Step`.
        path: the chosen nodes, from the root on. calls: model calls. cut: whether the budget left a state unexpanded.
    """

    id: str
    root: Node
    path: list[Node]
    calls: int
    cut: bool


class TreeJournal:
    """An append-only file of JSON lines: a header with the settings, then one expansion a line with all its nodes.

    A line is handed to the operating system before a search goes on, so a killed process loses none, and an expansion is
    there whole or not at all: an incomplete last line is removed on reopening. One process at a time may write it.

    Args:
        path: the file, created if it does not exist. settings: all that the nodes depend on, as JSON.

    Raises:
        InputError: the file has other settings, or is damaged.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._known: dict[tuple[str, int], Expansion] = {}
        header = {"format": FORMAT, "settings": json.loads(json.dumps(settings))}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self._read(header)
        except BaseException:
            self._file.close()
            raise

    def _read(self, header: Mapping[str, Any]) -> None:
        self._file.seek(0)
        data = self._file.read()
        *lines, last = data.split(b"\n")
        if not lines and json.dumps(header).encode().startswith(last):
            self._file.truncate(0)
            self._write(header)
            return
        rows = []
        for number, line in enumerate(lines or [last]):
            try:
                rows.append(json.loads(line))
                if number:
                    steps = [Step(**{**s, "requests": tuple(s["requests"])}) for s in rows[-1]["steps"]]
                    self._known.setdefault((rows[-1]["tree"], rows[-1]["node"]), Expansion(steps, rows[-1]["calls"]))
                else:
                    rows[0]["settings"].keys()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise InputError(
                    f"{self.path} is damaged in line {number + 1}: put it back, or delete it to search anew."
                ) from None
        if rows[0] != header:
            raise InputError(
                f"{self.path} holds the nodes of a search with other settings ({_differing(rows[0], header)}): choose another "
                "journal, or delete it to search anew."
            )
        self._file.truncate(len(data) - len(last))  # only now is it known to be ours

    def _write(self, row: Mapping[str, Any]) -> None:
        rest = memoryview(json.dumps(row, allow_nan=False).encode() + b"\n")
        while rest:
            rest = rest[self._file.write(rest) :]

    def get(self, tree: str, node: int) -> Expansion | None:
        """The expansion of a node, `None` if there is none."""
        return self._known.get((tree, node))

    def append(self, tree: str, node: int, expansion: Expansion) -> None:
        """Store the expansion of a node."""
        self._write(
            {"tree": tree, "node": node, "calls": expansion.calls, "steps": [asdict(s) for s in expansion.steps]}
        )
        self._known[tree, node] = expansion

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> TreeJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _differing(found: Any, header: Mapping[str, Any]) -> str:
    theirs, ours = found["settings"], header["settings"]
    names = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
    return ", ".join(f"{k}: {theirs.get(k)!r}, now {ours.get(k)!r}" for k in names) or f"format {found.get('format')!r}"


def distinct(steps: Iterable[Step]) -> list[Step]:
    """The steps that say something, each text once but for white space; the first one stays."""
    found: dict[str, Step] = {}
    for step in steps:
        if words := " ".join(step.text.split()):
            found.setdefault(words, step)
    return list(found.values())


def search_trees(
    ids: Sequence[str],
    propose: Callable[[Sequence[Leaf]], Iterable[Expansion]],
    options: SearchOptions,
    journal: TreeJournal,
) -> list[SearchedTree]:
    """Search all trees side by side: what they wait for at a time is proposed together.

    Args:
        ids: of the trees, all different.
        propose: from the leaves, one of each waiting tree, to their expansions in order; each is in the journal before the next
            is taken. Its answer may depend on tree and node alone.
        journal: of these trees; what it holds is not proposed again.

    No tree takes more than `options.calls` calls, those of a killed and repeated search counted once. An expansion that was
    being made when the process was killed is made again.

    Raises:
        InputError: an expansion took more calls than it may, is longer than wanted, or leaves a last step unfinished.
    """
    growing = [_Growth(name, options) for name in ids]
    while waiting := [tree for tree in growing if tree.needs_model(journal)]:
        leaves = [tree.leaf() for tree in waiting]
        for tree, leaf, found in zip(waiting, leaves, propose(leaves), strict=True):
            expansion = Expansion(distinct(found.steps), found.calls)
            _check(leaf, expansion, options)
            children = tree.children(expansion)
            journal.append(leaf.tree, leaf.node, expansion)
            tree.go_on(children, expansion.calls)
    return [SearchedTree(tree.id, tree.root, tree.path, tree.calls, tree.cut) for tree in growing]


def _check(leaf: Leaf, expansion: Expansion, options: SearchOptions) -> None:
    where, most = f"The expansion of node {leaf.node} of tree {leaf.tree}", leaf.width * options.calls_per_step
    if expansion.calls > most:
        raise InputError(f"{where} took {expansion.calls} calls and may take {most}: raise calls_per_step.")
    if len(expansion.steps) > leaf.width:
        raise InputError(f"{where} has {len(expansion.steps)} steps and {leaf.width} were wanted.")
    if leaf.last and any(step.outcome is None for step in expansion.steps):
        raise InputError(f"{where} is at the last depth ({options.depth}) and has a step without an outcome.")


@dataclass
class _Growth:
    """A search on its way: the node that it waits for, and what it has used."""

    id: str
    options: SearchOptions
    root: Node = field(default_factory=Node)
    path: list[Node] = field(default_factory=list)
    calls: int = 0
    cut: bool = False
    size: int = 1
    node: Node | None = None

    def __post_init__(self) -> None:
        o = self.options
        self.search: Expand = tree_search(self.root, simulations=o.simulations, c=o.c, gamma=o.gamma)
        self._send(None)

    def _send(self, children: list[Node] | None) -> None:
        try:
            self.node = self.search.send(children)
        except StopIteration as end:
            self.node, self.path = None, end.value

    def leaf(self) -> Leaf:
        """What the search waits for."""
        assert self.node is not None
        steps = tuple(node.step.text for node in self.node.path[1:])
        width = self.options.width if steps else self.options.first_width
        return Leaf(self.id, self.node.number, steps, width, len(steps) + 1 == self.options.depth)

    def needs_model(self, journal: TreeJournal) -> bool:
        """Go on with what the journal holds; whether the search then waits for a model, and has the budget for it."""
        while self.node is not None:
            known = journal.get(self.id, self.node.number)
            if known is not None:
                self.go_on(self.children(known), known.calls)
            elif self._covered():
                return True
            else:
                self.cut = True
                self._send(None)
        return False

    def _covered(self) -> bool:
        most = self.leaf().width * self.options.calls_per_step
        return self.options.calls is None or self.calls + most <= self.options.calls

    def children(self, expansion: Expansion) -> list[Node]:
        """The nodes behind the steps proposed for the node that the search waits for."""
        assert self.node is not None
        depth, children = len(self.node.path) - 1, []
        for number, step in enumerate(expansion.steps, self.size):
            value = state_value(step.self_evaluation, step.outcome, self.node.value, depth)
            p = prior(step.log_prob, step.tokens, self.options.length_penalty)
            children.append(Node(step, p, value, step.outcome is not None, number=number))
        return children

    def go_on(self, children: list[Node], calls: int) -> None:
        """Search on with these children of the node that the search waits for; without any it is an end."""
        assert self.node is not None
        if not children:
            self.node.value, self.node.terminal = self.node.value + self.options.unfinished, True
        self.size, self.calls = self.size + len(children), self.calls + calls
        self._send(children)
