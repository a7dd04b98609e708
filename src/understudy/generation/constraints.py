"""Lexical constraints in conjunctive normal form, and the state of many hypotheses against them (paper 15).

A constraint is about the generated tokens alone: what stands in the prompt neither satisfies nor violates it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.errors import InputError

Phrase = tuple[int, ...]
MOST_CLAUSES = 62
"""A set of clauses is one int64."""


@dataclass(frozen=True)
class Literal:
    """The phrase occurs (`positive`), or does not.

    Args:
        phrase: token ids, contiguous.
    """

    phrase: Phrase
    positive: bool = True


Clause = tuple[Literal, ...]
"""Literals of which at least one must hold. Surface forms of a word are the literals of one clause."""


@dataclass(frozen=True)
class AtMost:
    """So many occurrences of any of the phrases at most: the next one is never generated. With 0 they are forbidden."""

    phrases: tuple[Phrase, ...]
    number: int = 0


@dataclass(frozen=True)
class Constraints:
    """All clauses and limits hold.

    A clause of negative literals alone is hard, as is a limit: the token that would break it gets −inf. Clauses with a
    positive literal are what the search tries to satisfy.
    """

    clauses: tuple[Clause, ...] = ()
    limits: tuple[AtMost, ...] = ()

    def check(self, max_new_tokens: int) -> None:
        """Refuse what no text can satisfy.

        Raises:
            InputError: an empty clause or phrase, too many clauses, a phrase that is longer than the text may be, or one
                that is required and forbidden.
        """
        if len(self.clauses) > MOST_CLAUSES:
            raise InputError(
                f"There are {len(self.clauses)} clauses and at most {MOST_CLAUSES} are possible: forbidden phrases go "
                "into one AtMost."
            )
        if not all(self.clauses) or any(not phrase for phrase in self._phrases()):
            raise InputError("A clause or a phrase of the constraints is empty: leave it out, or name its tokens.")
        never = {p for limit in self.limits if limit.number == 0 for p in limit.phrases}
        never |= {c[0].phrase for c in self.clauses if len(c) == 1 and not c[0].positive}
        for i, clause in enumerate(self.clauses):
            if not all(one.positive for one in clause):
                continue
            if all(len(one.phrase) > max_new_tokens for one in clause):
                raise InputError(
                    f"Clause {i} asks for a phrase of {len(clause[0].phrase)} tokens and max_new_tokens is "
                    f"{max_new_tokens}: raise it, or shorten the phrase."
                )
            if all(any(_within(other, one.phrase) for other in never) for one in clause):
                raise InputError(
                    f"Clause {i} asks for tokens {list(clause[0].phrase)}, and the constraints forbid them: leave one out."
                )

    def _phrases(self) -> Iterator[Phrase]:
        yield from (one.phrase for clause in self.clauses for one in clause)
        yield from (phrase for limit in self.limits for phrase in limit.phrases)


def _within(part: Phrase, whole: Phrase) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


class State(NamedTuple):
    """How hypotheses stand against the constraints of their prompt.

    Args:
        node: `[prompts, hypotheses]`, of the automaton: the longest suffix that begins a phrase.
        seen: `[prompts, hypotheses, clauses, literals]`, whether the literal's phrase has occurred.
        counts: `[prompts, hypotheses, limits]`, occurrences so far.
    """

    node: Tensor
    seen: Tensor
    counts: Tensor

    def at(self, rows: Tensor) -> State:
        """The states of the hypotheses `rows`, `[prompts, chosen]`."""
        prompt = torch.arange(len(rows), device=rows.device)[:, None]
        return State(*(part[prompt, rows] for part in self))


class Tracker:
    """The constraints of several prompts, as one automaton (Aho-Corasick) over all their phrases.

    The automaton's node says of every phrase how much of it the text ends with, so overlapping occurrences, phrases that
    begin alike and broken phrases need no special care.

    Args:
        constraints: of each prompt.
        vocabulary: number of tokens.
    """

    def __init__(self, constraints: Sequence[Constraints], vocabulary: int, device: torch.device | str = "cpu") -> None:
        phrases = list(dict.fromkeys(p for one in constraints for p in one._phrases()))
        over = next((t for p in phrases for t in p if not 0 <= t < vocabulary), None)
        if over is not None:
            raise InputError(f"The constraints name token {over} and the vocabulary has {vocabulary}.")
        having, self.table, symbols = _automaton(phrases)
        self.symbols = torch.tensor(symbols, dtype=torch.long, device=device)
        self.symbol = torch.zeros(vocabulary, dtype=torch.long, device=device)
        self.symbol[self.symbols] = torch.arange(1, len(symbols) + 1, device=device)
        clauses = max((len(one.clauses) for one in constraints), default=0)
        literals = max((len(clause) for one in constraints for clause in one.clauses), default=0)
        limits = max((len(one.limits) for one in constraints), default=0)
        prompts, nodes = len(constraints), len(self.table)
        self.positive = torch.zeros(prompts, clauses, literals, dtype=torch.bool)
        self.negative = self.positive.clone()
        self.ends = torch.zeros(prompts, nodes, clauses, literals, dtype=torch.bool)  # is the phrase complete at a node
        self.fraction = torch.zeros(prompts, nodes, clauses, dtype=torch.float64)
        self.hits = torch.zeros(prompts, nodes, limits, dtype=torch.bool)
        self.most = torch.zeros(prompts, limits, dtype=torch.long)
        wanted: set[int] = set()
        for b, one in enumerate(constraints):
            for c, clause in enumerate(one.clauses):
                for n, (phrase, positive) in enumerate((x.phrase, x.positive) for x in clause):
                    (self.positive if positive else self.negative)[b, c, n] = True
                    self.ends[b, having[phrase], c, n] = True
                    if positive:
                        wanted.update(phrase)
                        for length in range(1, len(phrase) + 1):
                            at = having[phrase[:length]]
                            share = self.fraction[b, at, c].clamp(min=length / len(phrase))
                            self.fraction[b, at, c] = share
        hits = {x: _flags((n for p in x.phrases for n in having[p]), nodes) for one in constraints for x in one.limits}
        for b, one in enumerate(constraints):
            for q, limit in enumerate(one.limits):
                self.hits[b, :, q], self.most[b, q] = hits[limit], limit.number
        self.wanted_tokens = torch.tensor(sorted(wanted), dtype=torch.long, device=device)
        for name in ("table", "positive", "negative", "ends", "fraction", "hits", "most"):
            setattr(self, name, getattr(self, name).to(device))
        self.counted = self.positive.any(-1)
        self.hard = self.negative.any(-1) & ~self.counted
        self._hard_columns = self.hard.any(0).nonzero()[:, 0]

    def start(self) -> State:
        """One hypothesis a prompt, with no token yet."""
        prompts, clauses, literals = self.positive.shape
        device = self.table.device
        seen = torch.zeros(prompts, 1, clauses, literals, dtype=torch.bool, device=device)
        counts = torch.zeros(prompts, 1, self.hits.shape[-1], dtype=torch.long, device=device)
        return State(torch.zeros(prompts, 1, dtype=torch.long, device=device), seen, counts)

    def advance(self, state: State, tokens: Tensor) -> State:
        """The states after one more token of each hypothesis, `[prompts, hypotheses]`."""
        node = self.table[state.node, self.symbol[tokens]]
        prompt = self._prompt(node)
        return State(node, state.seen | self.ends[prompt, node], state.counts + self.hits[prompt, node])

    def satisfied(self, state: State) -> Tensor:
        """Which clauses hold, `[prompts, hypotheses, clauses]`; padding does not."""
        positive, negative = self.positive[:, None], self.negative[:, None]
        return (positive & state.seen | negative & ~state.seen).any(-1)

    def met(self, state: State) -> Tensor:
        """The same, of the clauses with a positive literal alone."""
        return self.satisfied(state) & self.counted[:, None]

    def complete(self, state: State) -> Tensor:
        """Whether all clauses with a positive literal hold, `[prompts, hypotheses]`."""
        return (self.satisfied(state) | ~self.counted[:, None]).all(-1)

    def progress(self, state: State) -> Tensor:
        """The largest share of a phrase, of an unmet clause with a positive literal, that the text ends with: `[prompts,
        hypotheses]`, float64."""
        share = self.fraction[self._prompt(state.node), state.node].masked_fill(self.satisfied(state), 0)
        return share.amax(-1) if share.shape[-1] else share.sum(-1)

    def wanted(self, state: State) -> Tensor:
        """Which of `wanted_tokens` begins or continues a phrase of an unmet clause: `[prompts, hypotheses, tokens]`."""
        after = self.table[state.node[..., None], self.symbol[self.wanted_tokens]]
        share = self.fraction[self._prompt(after), after]
        return (share.gt(0) & ~self.satisfied(state)[:, :, None]).any(-1)

    def ban(self, scores: Tensor, state: State) -> None:
        """Set the scores `[prompts, hypotheses, vocabulary]` of tokens that would break a hard clause or a limit to −inf."""
        if not len(self.symbols):
            return
        after = self.table[state.node[..., None], torch.arange(1, len(self.symbols) + 1, device=scores.device)]
        prompt = self._prompt(after)
        broken = (self.hits[prompt, after] & (state.counts >= self.most[:, None])[:, :, None]).any(-1)
        if len(columns := self._hard_columns):
            now = self.ends[prompt, after][..., columns, :]
            seen = state.seen[:, :, None, columns] | now
            holds = (self.negative[:, None, None, columns] & ~seen).any(-1)
            broken |= (self.hard[:, None, None, columns] & now.any(-1) & ~holds).any(-1)
        values = scores[..., self.symbols]
        scores[..., self.symbols] = values.masked_fill(broken, -torch.inf)

    def broken(self, state: State) -> Tensor:
        """Number of clauses that do not hold and of limits that are exceeded, `[prompts, hypotheses]`."""
        return self._unmet(state).sum(-1) + self._exceeded(state).sum(-1)

    def report(self, state: State) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
        """Which these are, of each prompt and hypothesis."""
        listed = lambda flags: [[row.nonzero()[:, 0].tolist() for row in rows] for rows in flags.cpu()]  # noqa: E731
        return listed(self._unmet(state)), listed(self._exceeded(state))

    def _unmet(self, state: State) -> Tensor:
        return ~self.satisfied(state) & (self.counted | self.hard)[:, None]

    def _exceeded(self, state: State) -> Tensor:
        return state.counts > self.most[:, None]

    def _prompt(self, like: Tensor) -> Tensor:
        """Indices of the prompts that broadcast against `like`."""
        return torch.arange(len(like), device=like.device).view(-1, *[1] * (like.dim() - 1))


def _automaton(phrases: Sequence[Phrase]) -> tuple[dict[Phrase, list[int]], Tensor, list[int]]:
    """Of each beginning of a phrase, the nodes that end with it; the next node `[nodes, 1 + symbols]`, where symbol 0 is
    any token that is in no phrase; and the tokens of the other symbols."""
    nodes = sorted({p[:n] for p in phrases for n in range(1, len(p) + 1)} | {()}, key=lambda p: (len(p), p))
    number = {p: i for i, p in enumerate(nodes)}
    children: list[list[int]] = [[] for _ in nodes]
    for child, node in enumerate(nodes[1:], start=1):
        children[number[node[:-1]]].append(child)
    symbols = sorted({t for p in phrases for t in p})
    column = {t: i for i, t in enumerate(symbols, start=1)}
    table = torch.zeros(len(nodes), len(symbols) + 1, dtype=torch.long)
    fail = [0] * len(nodes)  # the longest proper suffix that is a node; it is shorter, so it comes first
    having: dict[Phrase, list[int]] = {node: [] for node in nodes}
    for i, node in enumerate(nodes):
        table[i] = table[fail[i]]
        for child in children[i]:
            last = column[nodes[child][-1]]
            fail[child] = int(table[fail[i], last]) if node else 0
            table[i, last] = child
        suffix = i
        while suffix:
            having[nodes[suffix]].append(i)
            suffix = fail[suffix]
    return having, table, symbols


def _flags(at: Iterable[int], size: int) -> Tensor:
    flags = torch.zeros(size, dtype=torch.bool)
    flags[list(at)] = True
    return flags
