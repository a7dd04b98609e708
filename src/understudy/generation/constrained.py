"""Beam search under lexical constraints (NeuroLogic decoding, paper 15), on any next-token scorer.

    maximise log p(y | x) + λ Σ_i C_i(y)

Of the candidates of a step, those with too few satisfied clauses are dropped, the others are grouped by the *set* of
satisfied clauses, and the best of every group, then the second best of every group, … fill the beam.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.generation.constraints import Constraints, State, Tracker
from understudy.models import evaluating

INFINITE = torch.inf


@dataclass(frozen=True)
class BeamSettings:
    """How to search. The defaults are those of the official code for a model that is not fine-tuned.

    Args:
        num_beams: K, hypotheses of a prompt.
        max_new_tokens, min_new_tokens: of a text, its ending token included, and before it may end.
        length_penalty: texts are compared by log-probability / tokens^length_penalty.
        no_repeat_ngram_size: no n generated tokens occur twice; 0 allows all.
        prune: candidates must be among the so many best by log-probability, or among the K best; `None` is off.
        tolerance: candidates may satisfy so many clauses fewer than the best one.
        progress: λ, weight of the largest share of an unmet phrase that the text ends with.
        log_progress: the official code's term, −λ log(share), which prefers *less* progress; paper: +λ share.
        early_stop: a text may end where its ending token is among the so many times K best of its row.
    """

    num_beams: int = 20
    max_new_tokens: int = 32
    min_new_tokens: int = 5
    length_penalty: float = 0.2
    no_repeat_ngram_size: int = 3
    prune: int | None = None
    tolerance: int = 2
    progress: float = 1.25
    log_progress: bool = False
    early_stop: float = 10.0

    def __post_init__(self) -> None:
        least = {"num_beams": 1, "max_new_tokens": 1, "min_new_tokens": 0, "length_penalty": 0, "tolerance": 0}
        for name, value in {**least, "no_repeat_ngram_size": 0, "early_stop": 0}.items():
            if not getattr(self, name) >= value:
                raise InputError(f"Beam search: {name} is {getattr(self, name)} and must be at least {value}.")
        if self.prune is not None and self.prune < 1:
            raise InputError(f"Beam search: prune is {self.prune} and must be at least 1, or None for no pruning.")


@dataclass(frozen=True)
class Hypothesis:
    """A text that was found.

    Args:
        tokens: generated ones, ending token included.
        log_prob: their sum, nats.
        score: log_prob / tokens^length_penalty.
        ended: it has an ending token; else it was cut off.
        unmet: positions of the clauses that do not hold. exceeded: of the limits that are exceeded, which happens only
            where nothing else could be generated.
    """

    tokens: list[int]
    log_prob: float
    score: float
    ended: bool
    unmet: list[int]
    exceeded: list[int]


class Scorer(Protocol):
    """A model of the next token."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities of the first token after each prompt, `[prompts, vocabulary]`."""
        ...

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities after the texts `rows` of the last call, each with one more token: `[rows, vocabulary]`."""
        ...


class CausalLMScorer:
    """A causal LM with a KV cache; prompts are padded on the left.

    Args:
        model: of transformers.
        vocabulary: size of the vocabulary; further rows of the head are padding.
    """

    def __init__(self, model: Any, vocabulary: int, pad: int = 0) -> None:
        self.model, self.vocabulary, self.pad = model, vocabulary, pad
        self.positions = "position_ids" in inspect.signature(model.forward).parameters
        self.cache: Any = None

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Scorer`."""
        longest, device = max(map(len, prompts)), next(self.model.parameters()).device
        ids = torch.tensor([[self.pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache = None
        return self._forward(ids, (self.mask.cumsum(-1) - 1).clamp(min=0))

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """See `Scorer`."""
        self.cache.reorder_cache(rows)
        self.mask = torch.cat([self.mask[rows], self.mask.new_ones(len(rows), 1)], 1)
        return self._forward(tokens[:, None], self.mask.sum(-1, keepdim=True) - 1)

    @torch.no_grad()
    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        more = {"position_ids": positions} if self.positions else {}
        with evaluating(self.model):
            out = self.model(ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **more)
        self.cache = out.past_key_values
        if not hasattr(self.cache, "reorder_cache"):
            raise InputError(
                f"{type(self.model).__name__} has no cache whose rows can be reordered, as a beam needs it."
            )
        logits = out.logits[:, -1, : self.vocabulary]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


class Selection(NamedTuple):
    """The candidates of a step that are kept, best first: `[prompts, 2 K]`.

    Args:
        rows: the hypothesis that each continues. scores: accumulated log-probabilities. state: with the token.
        valid: unfilled slots repeat the last candidate.
    """

    rows: Tensor
    tokens: Tensor
    scores: Tensor
    state: State
    valid: Tensor


def select(
    scores: Tensor, state: State, tracker: Tracker, ends: Tensor, length: int, settings: BeamSettings, best: int
) -> Selection:
    """One step of NeuroLogic's selection, as in the official `_sequential_topk`.

    Candidates are the K best of all, the `best` best of each row, tokens that begin or continue an unmet positive phrase, and
    the ending token of a row that has satisfied its clauses. Those that satisfy all clauses and are among the K best, or end,
    are kept first, at most K of them. Ties go to the smaller (row, token).

    Args:
        scores: accumulated log-probabilities `[prompts, rows, vocabulary]`, −inf where forbidden.
        state: of the rows. ends: ending tokens. length: divides log-probabilities in the score of a group.
        best: candidates of each row.
    """
    k, fill = settings.num_beams, 2 * settings.num_beams
    rows, tokens, value, valid, top, complete = _candidates(scores, state, tracker, ends, settings, best)
    prompt = torch.arange(len(rows), device=rows.device)[:, None]
    after = tracker.advance(state.at(rows), tokens)
    met = tracker.met(after)
    ranked = value.masked_fill(~valid, -INFINITE).argsort(dim=-1, descending=True, stable=True)
    in_global = torch.zeros_like(valid).scatter(1, ranked[:, :k], True) & valid
    is_end = torch.isin(tokens, ends)
    done = valid & (in_global & tracker.complete(after) | is_end & complete[prompt, rows])
    allowed = torch.where(
        is_end, in_global & (value >= top[prompt, rows]), in_global | _likely(value, scores, settings)
    )
    open_ = valid & ~done & allowed
    number = met.sum(-1)
    open_ &= number >= number.masked_fill(~open_, -1).amax(-1, keepdim=True) - settings.tolerance
    chunks = _chunks(_rank(value, tracker.progress(after), length, settings), met, open_)
    place = value.masked_fill(~done, -INFINITE).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    first = done.sum(-1, keepdim=True).clamp(max=torch.where(open_.any(-1, keepdim=True), k, fill))
    tier = torch.full_like(tokens, 3)
    tier[open_ & (chunks < fill - first)] = 2
    tier[open_ & (chunks < torch.minimum(fill - first, torch.tensor(k)))] = 1
    tier[done & (place < first)] = 0
    order = value.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(1, tier.gather(1, order).argsort(dim=-1, stable=True))
    kept = (tier < 3).sum(-1, keepdim=True)
    slots = torch.arange(fill, device=rows.device).expand(len(rows), fill)
    picked = order.gather(1, slots.minimum((kept - 1).clamp(min=0)))
    return Selection(
        rows.gather(1, picked), tokens.gather(1, picked), value.gather(1, picked), after.at(picked), slots < kept
    )


def _candidates(
    scores: Tensor, state: State, tracker: Tracker, ends: Tensor, settings: BeamSettings, best: int
) -> tuple[Tensor, ...]:
    """Rows, tokens, scores and validity of the candidates `[prompts, candidates]`, in the order of (row, token); the best
    score of each row, and whether it satisfies all clauses, `[prompts, rows]`."""
    prompts, width, vocabulary = scores.shape
    top, ids = _top(scores, min(best, vocabulary))
    complete = tracker.complete(state)
    groups = [ids]
    first = ids[..., :1]
    wanted = tracker.wanted(state)
    groups.append(torch.where(wanted, tracker.wanted_tokens, first))  # a repeated token is dropped below
    if len(ends):
        value, at = scores[..., ends].max(-1)
        among = (scores > value[..., None]).sum(-1) < int(settings.num_beams * settings.early_stop)
        groups.append(torch.where(complete & among, ends[at], first[..., 0])[..., None])
    tokens, _ = torch.cat(groups, -1).sort(dim=-1)
    again = torch.zeros_like(tokens, dtype=torch.bool)
    again[..., 1:] = tokens[..., 1:] == tokens[..., :-1]
    value = scores.gather(-1, tokens)
    valid = ~again & value.isfinite()
    rows = torch.arange(width, device=scores.device)[:, None].expand_as(tokens)
    flat = [x.reshape(prompts, -1) for x in (rows, tokens, value, valid)]
    return *flat, top[..., 0], complete


def _top(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest values and their positions; of equal ones at the edge, the first."""
    more = min(number + 1, scores.shape[-1])
    value, at = scores.topk(more, -1)
    if more > number and bool(((value[..., -1] == value[..., -2]) & value[..., -1].isfinite()).any()):
        value, at = scores.sort(dim=-1, descending=True, stable=True)
    return value[..., :number], at[..., :number]


def _likely(value: Tensor, scores: Tensor, settings: BeamSettings) -> Tensor:
    """Which candidates are among the `prune` − 1 best of all, as the official code counts."""
    if settings.prune is None:
        return torch.ones_like(value, dtype=torch.bool)
    if settings.prune == 1:
        return torch.zeros_like(value, dtype=torch.bool)
    flat = scores.flatten(1)
    return value >= flat.topk(min(settings.prune - 1, flat.shape[1]), -1).values[:, -1:]


def _rank(value: Tensor, progress: Tensor, length: int, settings: BeamSettings) -> Tensor:
    """The score within a group."""
    if settings.log_progress:
        term = torch.where(progress > 0, -progress.clamp(min=torch.finfo(progress.dtype).tiny).log(), 0.0)
    else:
        term = progress
    return value / length + settings.progress * term


def _chunks(rank: Tensor, met: Tensor, open_: Tensor) -> Tensor:
    """Position of each candidate when the best of all groups come first, then the second best of all groups, …"""
    bits = 2 ** torch.arange(met.shape[-1], device=met.device)
    group = (met * bits).sum(-1).masked_fill(~open_, torch.iinfo(torch.long).max)
    ranked = rank.masked_fill(~open_, -INFINITE).argsort(dim=-1, descending=True, stable=True)
    grouped = ranked.gather(1, group.gather(1, ranked).argsort(dim=-1, stable=True))
    name = group.gather(1, grouped)
    index = torch.arange(name.shape[1], device=name.device).expand_as(name)
    begins = torch.ones_like(name, dtype=torch.bool)
    begins[:, 1:] = name[:, 1:] != name[:, :-1]
    within = index - index.masked_fill(~begins, 0).cummax(-1).values
    within = torch.where(name == torch.iinfo(torch.long).max, index + name.shape[1], within)
    position = torch.empty_like(within).scatter(1, grouped, within)
    order = ranked.gather(1, position.gather(1, ranked).argsort(dim=-1, stable=True))
    return torch.empty_like(order).scatter(1, order, index)


def constrained_search(
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    constraints: Sequence[Constraints],
    *,
    ends: Sequence[int],
    settings: BeamSettings | None = None,
    num_return_sequences: int = 1,
) -> list[list[Hypothesis]]:
    """The best texts of each prompt: those with most satisfied clauses first, ended before cut off ones, then by score.

    Without constraints this is beam search. It goes on until no text can become better than those found.

    Args:
        scorer: of the next token, for example a `CausalLMScorer`.
        prompts: token ids, none empty. constraints: of each prompt.
        ends: tokens that end a text. One is generated only where all clauses hold.
        num_return_sequences: most texts of a prompt.

    Raises:
        InputError: constraints that no text satisfies, or of other number than prompts.
    """
    settings = settings or BeamSettings()
    if len(constraints) != len(prompts) or not all(prompts):
        raise InputError(
            f"There are {len(prompts)} prompts and {len(constraints)} constraints: give one to each, and no empty prompt."
        )
    for one in constraints:
        one.check(settings.max_new_tokens)
    log_probs = scorer.start(prompts)
    search = _Search(Tracker(constraints, log_probs.shape[-1], log_probs.device), settings, num_return_sequences, ends)
    beam = _Beam(
        log_probs.new_zeros(len(prompts), 1),
        torch.zeros(len(prompts), 1, 0, dtype=torch.long, device=log_probs.device),
        search.tracker.start(),
    )
    while beam.tokens.shape[-1] < settings.max_new_tokens:
        step = search.step(beam, log_probs.view(*beam.scores.shape, -1))
        if step is None:
            return search.found
        rows, beam = step
        if beam.tokens.shape[-1] < settings.max_new_tokens:
            log_probs = scorer.step(rows, beam.tokens[..., -1].flatten())
    search.cut_off(beam)
    return search.found


class _Beam(NamedTuple):
    """The live hypotheses: scores `[prompts, rows]` (−inf: none), tokens `[prompts, rows, length]` and state."""

    scores: Tensor
    tokens: Tensor
    state: State


@dataclass
class _Search:
    """A search of several prompts and what it has found."""

    tracker: Tracker
    settings: BeamSettings
    number: int
    ending: Sequence[int]
    found: list[list[Hypothesis]] = field(init=False)
    ends: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.found = [[] for _ in self.tracker.positive]
        self.ends = torch.tensor(list(self.ending), dtype=torch.long, device=self.tracker.table.device)

    def step(self, beam: _Beam, log_probs: Tensor) -> tuple[Tensor, _Beam] | None:
        """One token more: which rows go on, `[prompts · rows]`, and the new beam; `None` if all prompts are finished."""
        k, length = self.settings.num_beams, beam.tokens.shape[-1] + 1
        free = beam.scores[..., None] + log_probs
        scores = self._allowed(free, beam)
        best = k + min(len(self.ends), k)
        chosen = select(scores, beam.state, self.tracker, self.ends, length, self.settings, best)
        prompt = torch.arange(len(scores), device=scores.device)[:, None]
        grown = _Beam(
            chosen.scores.masked_fill(~chosen.valid, -INFINITE),
            torch.cat([beam.tokens[prompt, chosen.rows], chosen.tokens[..., None]], -1),
            chosen.state,
        )
        is_end = torch.isin(chosen.tokens, self.ends)
        # Where nothing has to be reached a text ends as in beam search: with one of the K best continuations.
        may_end = self.tracker.counted.any(-1, keepdim=True) | (torch.arange(is_end.shape[1], device=is_end.device) < k)
        self._add(grown, chosen.valid & is_end & may_end & self.tracker.complete(chosen.state), ended=True)
        goes_on = chosen.valid & ~is_end
        self.cut_off(beam, ~goes_on.any(-1))
        width = max(1, int(goes_on.sum(-1).max().clamp(max=k)))
        slots = (~goes_on).long().argsort(dim=-1, stable=True)[:, :width]
        values = grown.scores.gather(1, slots).masked_fill(~goes_on.gather(1, slots), -INFINITE)
        values = values.masked_fill(self._finished(values)[:, None], -INFINITE)
        if not bool(values.isfinite().any()):
            return None
        rows = (prompt * beam.scores.shape[1] + chosen.rows.gather(1, slots)).flatten()
        return rows, _Beam(values, grown.tokens[prompt, slots], chosen.state.at(slots))

    def _allowed(self, free: Tensor, beam: _Beam) -> Tensor:
        """The scores without what is forbidden; of prompts where that leaves nothing, all of them."""
        scores = free.clone()
        self.tracker.ban(scores, beam.state)
        _ban_repeats(scores, beam.tokens, self.settings.no_repeat_ngram_size)
        if beam.tokens.shape[-1] < self.settings.min_new_tokens:
            scores[..., self.ends] = -INFINITE
        stuck = ~scores.isfinite().flatten(1).any(-1)
        return torch.where(stuck[:, None, None], free, scores)

    def cut_off(self, beam: _Beam, mask: Tensor | None = None) -> None:
        """Add the live hypotheses, or those of the prompts in `mask`, to what is found, without an ending token."""
        live = beam.scores.isfinite()
        self._add(beam, live if mask is None else live & mask[:, None], ended=False)

    def _add(self, beam: _Beam, mask: Tensor, *, ended: bool) -> None:
        """Add the best hypotheses of those in `mask`, which all have the same length."""
        length = max(1, beam.tokens.shape[-1])
        broken = self.tracker.broken(beam.state).masked_fill(~mask, torch.iinfo(torch.long).max)
        order = beam.scores.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(1, broken.gather(1, order).argsort(dim=-1, stable=True))[:, : self.number]
        unmet, exceeded = self.tracker.report(beam.state.at(order))
        for b, n in mask.gather(1, order).nonzero().tolist():
            log_prob, tokens = float(beam.scores[b, order[b, n]]), beam.tokens[b, order[b, n]].tolist()
            score = log_prob / length**self.settings.length_penalty
            self.found[b].append(Hypothesis(tokens, log_prob, score, ended, unmet[b][n], exceeded[b][n]))
        for found in self.found:
            found.sort(key=lambda h: (len(h.unmet) + len(h.exceeded), not h.ended, -h.score))  # stable
            del found[self.number :]

    def _finished(self, values: Tensor) -> Tensor:
        """Which prompts have as many ended texts as are wanted, none worse than the best that a live one can become."""
        bound = values.amax(-1) / self.settings.max_new_tokens**self.settings.length_penalty
        enough = [
            found[-1].score
            if len(found) == self.number and found[-1].ended and not found[-1].unmet and not found[-1].exceeded
            else -INFINITE
            for found in self.found
        ]
        return torch.tensor(enough, device=values.device) >= bound


def _ban_repeats(scores: Tensor, tokens: Tensor, size: int) -> None:
    """Set the scores of tokens that would complete an n-gram of the text a second time to −inf."""
    if size < 1 or tokens.shape[-1] < size:
        return
    grams = tokens.unfold(-1, size, 1)
    same = (grams[..., :-1] == tokens[..., None, tokens.shape[-1] - size + 1 :]).all(-1)
    b, k, at = same.nonzero(as_tuple=True)
    scores[b, k, grams[b, k, at, -1]] = -INFINITE
