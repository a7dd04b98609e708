"""Generic statements (paper 15): concept, relational phrase and completion; their prompts, their form, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from understudy.curation.filters import Funnel, first_occurrences
from understudy.curation.items import Item
from understudy.curation.triples import Triple, tidy
from understudy.data.knowledge import generic_words
from understudy.data.text import write_records
from understudy.errors import InputError
from understudy.generation import Prompt
from understudy.generation.constrained_source import FoundText
from understudy.models.pairs import words

Token = TypeVar("Token", bound=Hashable)


def malformed(
    tokens: Sequence[Token],
    *,
    function_words: Collection[Token],
    connectives: Collection[Token],
    concept: Sequence[Token],
    relation: Sequence[Token],
    related: Token | None = None,
    most_function: int = 1,
    most_connective: int = 0,
) -> str | None:
    """What is wrong with the form of a completion (paper 15, section 2.2), or `None`.

    Args:
        tokens: of the completion, without prompt; words or token ids.
        concept, relation: phrases of the prompt, which must not come again.
        related: must occur, if given.
    """
    if sum(t in function_words for t in tokens) > most_function:
        return "function words"
    if sum(t in connectives for t in tokens) > most_connective:
        return "connectives"
    if _holds(tokens, concept):
        return "repeats the concept"
    if _holds(tokens, relation):
        return "repeats the relation"
    return "lacks the related concept" if related is not None and related not in tokens else None


def _holds(tokens: Sequence[Token], phrase: Sequence[Token]) -> bool:
    return any(list(tokens[i : i + len(phrase)]) == list(phrase) for i in range(len(tokens) - len(phrase) + 1))


def perplexities(log_probs: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """exp(−log-probability / tokens) of each text.

    Args:
        log_probs: summed over the tokens, nats. tokens: their numbers.
    """
    if len(log_probs) != len(tokens) or min(tokens, default=1) < 1:
        raise InputError(
            f"{len(log_probs)} log-probabilities and {len(tokens)} token counts: give each its count, from 1."
        )
    return [math.exp(-value / number) for value, number in zip(log_probs, tokens, strict=True)]


class Form(BaseModel):
    """Which completions are well formed: what the search is told, and what is checked again word by word."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    function_words: tuple[str, ...] | None = Field(default=None, description="The built-in ones if not given.")
    connectives: tuple[str, ...] | None = Field(default=None, description="Likewise.")
    most_function: int = Field(default=1, ge=0, description="Function words of a statement.")
    most_connective: int = Field(default=0, ge=0, description="Connectives of a statement.")

    def limits(self, prompt: StatementPrompt) -> tuple[tuple[tuple[str, ...], int], ...]:
        """As of a `ConstrainedRequest`: counts of words; neither concept nor relational phrase comes again."""
        function_words, connectives = self._words()
        counts = ((function_words, self.most_function), (connectives, self.most_connective))
        return (*counts, ((prompt.concept, prompt.relation), 0))

    def problem(self, prompt: StatementPrompt, tail: str) -> str | None:
        """`malformed` of the words of a completion."""
        function_words, connectives = self._words()
        return malformed(
            words(tail),
            function_words=function_words,
            connectives=connectives,
            concept=words(prompt.concept),
            relation=words(prompt.relation),
            most_function=self.most_function,
            most_connective=self.most_connective,
        )

    def _words(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        own = generic_words()
        return (
            own["function_words"] if self.function_words is None else self.function_words,
            own["connectives"] if self.connectives is None else self.connectives,
        )


class StatementPrompt(Item):
    """The beginning of a statement.

    Args:
        perplexity: of its text, by the model before self-imitation.
    """

    concept: str
    relation: str
    quantifier: str
    text: str
    perplexity: float | None = None


class Statement(Triple):
    """A concept (`head`), a relational phrase and what a model wrote behind them (`tail`).

    Args:
        prompt: its beginning. log_prob, tokens: of the completion. wrong: what is wrong with its form.
    """

    prompt: str
    log_prob: float
    tokens: int
    wrong: str | None = None


def statement_prompts(
    template: Prompt, concepts: Sequence[str], relations: Sequence[str], quantifiers: Sequence[str]
) -> list[StatementPrompt]:
    """Every quantifier, concept and relational phrase, in order. Superfluous spaces are dropped.

    Args:
        template: with slots `quantifier` (empty for none), `concept` and `relation`.
    """
    return [
        StatementPrompt(
            concept=concept,
            relation=relation,
            quantifier=quantifier,
            text=" ".join(template.render(quantifier=quantifier, concept=concept, relation=relation).split()),
        )
        for concept in concepts
        for relation in relations
        for quantifier in quantifiers
    ]


def likeliest_prompts(
    prompts: Sequence[StatementPrompt], scores: Sequence[tuple[float, int]], most: int, funnel: Funnel
) -> list[StatementPrompt]:
    """Of each concept the `most` prompts of smallest perplexity, best first.

    Args:
        scores: log-probability and number of tokens of each prompt.
    """
    values = perplexities([s for s, _ in scores], [max(1, n) for _, n in scores])
    place = {c: i for i, c in enumerate(dict.fromkeys(p.concept for p in prompts))}
    order = sorted(range(len(prompts)), key=lambda i: (place[prompts[i].concept], values[i]))  # stable
    taken: dict[str, int] = {}
    chosen = []
    for i in order:
        taken[prompts[i].concept] = taken.get(prompts[i].concept, 0) + 1
        chosen += [i] if taken[prompts[i].concept] <= most else []
    kept = funnel.pick("likely prompts", prompts, chosen, "less likely")
    return [p.model_copy(update={"perplexity": values[i]}) for p, i in zip(kept, chosen, strict=True)]


def statements(
    asked: Sequence[tuple[StatementPrompt, str]],
    texts: Sequence[Sequence[FoundText]],
    split: Mapping[str, str],
    form: Form,
) -> list[Statement]:
    """Every text that was written, with what is wrong with its form.

    Args:
        asked: the prompt of each answer, and the id of its request. texts: of each answer. split: of each concept.
    """

    def wrong(prompt: StatementPrompt, one: FoundText) -> str | None:
        if not one.ended:
            return "cut off"
        return form.problem(prompt, tidy(one.text)) if tidy(one.text) else "empty"

    return [
        Statement(
            head=prompt.concept,
            relation=prompt.relation,
            tail=tidy(one.text),
            prompt=prompt.text,
            log_prob=one.log_prob,
            tokens=one.tokens,
            wrong=wrong(prompt, one),
            split=split[prompt.concept],
            parents=(prompt.id,),
            requests=(name,),
        )
        for (prompt, name), found in zip(asked, texts, strict=True)
        for one in found
    ]


def well_formed(written: Sequence[Statement], funnel: Funnel) -> list[Statement]:
    """Statements of the right form, each once."""
    kept = funnel.sieve("well formed", written, lambda s: s.wrong)
    return funnel.pick("distinct statements", kept, first_occurrences(s.key for s in kept), "seen before")


def write_statements(folder: Path, found: Sequence[Statement]) -> None:
    """A corpus of prompts and completions, for training, in `folder / train.jsonl`."""
    rows = [{"prompt": s.prompt, "completion": f" {s.tail}."} for s in found]
    write_records(folder / "train.jsonl", rows)
