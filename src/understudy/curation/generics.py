"""Generic statements (paper 15): concept, relational phrase and completion; their prompts, their form, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from typing import TypeVar

from understudy.errors import InputError

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
