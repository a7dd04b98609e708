"""Texts of a constrained beam search as answers of a source in this process: constraints are given as words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from understudy.data.ends import Ends, token_ids
from understudy.generation.constrained import BeamSettings, CausalLMScorer, Hypothesis, constrained_search
from understudy.generation.constraints import AtMost, Constraints, Literal, Phrase
from understudy.generation.decoding import end_tokens
from understudy.generation.local import LocalSource
from understudy.generation.request import Completion, Request, cut
from understudy.models import evaluating


@dataclass(frozen=True)
class ConstrainedRequest(Request):
    """A request for the best texts of a constrained beam search. `max_tokens` and `stop` hold; sampling has no meaning.

    Args:
        clauses: each an OR of (word or phrase, whether it must occur rather than must not).
        limits: (words or phrases, how many of their occurrences are allowed).
        search: how to search; its `max_new_tokens` is `max_tokens`.
        texts: how many are returned.
    """

    clauses: tuple[tuple[tuple[str, bool], ...], ...] = ()
    limits: tuple[tuple[tuple[str, ...], int], ...] = ()
    search: BeamSettings = field(default_factory=BeamSettings)
    texts: int = 1


@dataclass(frozen=True)
class FoundText:
    """One text of an answer.

    Args:
        text: without stop string. log_prob: of its tokens, the ending one included. tokens: their number.
        ended: it was not cut off. unmet: positions of the clauses that do not hold. exceeded: of limits.
    """

    text: str
    log_prob: float
    tokens: int
    ended: bool
    unmet: tuple[int, ...] = ()
    exceeded: tuple[int, ...] = ()


def found_texts(completion: Completion) -> list[FoundText]:
    """The texts in the answer to a `ConstrainedRequest`, best first."""
    rows = json.loads(completion.text)
    return [FoundText(**{**row, "unmet": tuple(row["unmet"]), "exceeded": tuple(row["exceeded"])}) for row in rows]


class ConstrainedSource(LocalSource):
    """A model in this process that answers each `ConstrainedRequest` with the texts of a search, as JSON (`found_texts`).

    A word stands for its tokens behind a space, as it is and with a capital letter. Words are looked for as tokens: what
    begins with a whole word's tokens (`in` + `side`) counts as the word, so check words again where that matters.
    """

    def write(self, requests: Sequence[Request], prompts: Sequence[list[int]]) -> list[Completion]:
        """The answers to prompts given as token ids; those with the same settings are searched in one batch."""
        asked = cast("Sequence[ConstrainedRequest]", requests)
        found: list[Completion | None] = [None] * len(asked)
        settings = [(replace(r.search, max_new_tokens=r.max_tokens), r.stop, r.texts) for r in asked]
        for search, stop, texts in dict.fromkeys(settings):
            at = [i for i, one in enumerate(settings) if one == (search, stop, texts)]
            scorer = CausalLMScorer(self.model, len(self.tokenizer), self.tokenizer.pad_token_id or 0)
            wanted = [constraints(self.tokenizer, asked[i]) for i in at]
            ends = sorted(end_tokens(self.model, self.tokenizer) | stop_tokens(self.tokenizer, stop))
            results = constrained_search(
                scorer, [prompts[i] for i in at], wanted, ends=ends, settings=search, num_return_sequences=texts
            )
            for i, hypotheses in zip(at, results, strict=True):
                found[i] = self._answer(prompts[i], hypotheses, stop)
        return cast("list[Completion]", found)

    def _answer(self, prompt: list[int], hypotheses: Sequence[Hypothesis], stop: tuple[str, ...]) -> Completion:
        decode: Any = lambda ids: self.tokenizer.decode(  # noqa: E731
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        rows = []
        for one in hypotheses:
            text, _ = cut(decode(prompt + one.tokens)[len(decode(prompt)) :], stop)  # keeps a leading space
            how = (one.log_prob, len(one.tokens), one.ended, tuple(one.unmet), tuple(one.exceeded))
            rows.append(asdict(FoundText(text, *how)))
        finish: Any = "stop" if rows and rows[0]["ended"] else "length"
        written = sum(len(one.tokens) for one in hypotheses)
        return Completion(json.dumps(rows), finish, rows[0]["log_prob"] if rows else None, len(prompt), written)


def constraints(tokenizer: PreTrainedTokenizerBase, request: ConstrainedRequest) -> Constraints:
    """The constraints of a request as tokens."""
    clauses = tuple(
        tuple(Literal(form, positive) for words, positive in clause for form in forms(tokenizer, words))
        for clause in request.clauses
    )
    limits = tuple(
        AtMost(tuple(dict.fromkeys(f for words in group for f in forms(tokenizer, words))), most)
        for group, most in request.limits
    )
    return Constraints(clauses, limits)


@cache
def forms(tokenizer: PreTrainedTokenizerBase, words: str) -> tuple[Phrase, ...]:
    """The token ids of a word or phrase behind a space, as it is and with a capital letter."""
    anchor = token_ids(tokenizer, "a")
    found: dict[Phrase, None] = {}
    for text in (words, words[:1].upper() + words[1:]):
        ids = token_ids(tokenizer, f"a {text}")
        found[tuple(ids[len(anchor) :] if ids[: len(anchor)] == anchor else token_ids(tokenizer, f" {text}"))] = None
    return tuple(found)


@cache
def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> set[int]:
    """The tokens whose text holds a stop string."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))]) if stop else []
    return {i for i, text in enumerate(texts) if any(mark in text for mark in stop)}


@torch.no_grad()
def text_log_probs(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch: int = 64
) -> list[tuple[float, int]]:
    """Summed log-probability of each text, nats, and the number of tokens it is over. The first token has none, unless the
    tokenizer begins texts with a token of its own."""
    ends, device = Ends.of(tokenizer), next(model.parameters()).device
    found: list[tuple[float, int]] = []
    with evaluating(model):
        for start in range(0, len(texts), batch):
            rows = [ends.before(token_ids(tokenizer, text)) for text in texts[start : start + batch]]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
            logits = model(ids, attention_mask=mask).logits[:, :-1, : len(tokenizer)]
            log_probs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double()
            sums = (log_probs * mask[:, 1:]).sum(-1).tolist()
            found += [(value, len(row) - 1) for value, row in zip(sums, rows, strict=True)]
    return found
