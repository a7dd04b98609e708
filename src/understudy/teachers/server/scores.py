"""A server's scores of the tokens of a text, and their conversion to a typed target.

| `score` | requested at each position | target | estimates |
|---|---|---|---|
| `top_k:20` | the teacher's 20 most probable tokens | `TopK` with tail | the divergence with all other tokens as one bucket: a lower bound of the full one, which differs by the divergence inside the bucket |
| `ids:20` | the student's 20 most probable tokens | `TopK` with tail | the same on the student's support: tight for reverse KL, which weights by the student |
| `sampled` | the token of the text alone | `TopK` of one class with tail | the divergence of two buckets, this token or another: a lower bound of the full one |

None of the three is unbiased for the full divergence: merging classes into a bucket only lowers it (data processing).
Each is 0 where student and teacher agree on the kept classes. The tail is 1 − Σ p of the kept classes, at least the
resolution of the server's float32 (10⁻⁷), so that no divergence is infinite through a rounding error.

`ids` uses the fields of vLLM's prefill scoring (RFC 56860: `prompt_logprob_token_ids`, `prompt_logprob_start`,
`prompt_token_id_logprobs`) in `/completions`. With a server that does not support them `top_k:N` is used instead, and the
report says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.generation import RefusedRequest, SourceError
from understudy.generation.endpoint import number
from understudy.targets import TopK

UNRESOLVED = 1e-7
SLACK = 1e-3  # by which the probabilities of a server may exceed 1 through rounding


@dataclass(frozen=True)
class Score:
    """The scores requested for each token: `kind` (`top_k`, `ids`, `sampled`) and number of classes."""

    kind: str
    k: int = 1

    @classmethod
    def parse(cls, text: str) -> Score:
        """Parse `top_k:20`, `ids:20` or `sampled`."""
        found = re.fullmatch(r"(top_k|ids):([1-9]\d*)|(sampled)", text)
        if found is None:
            raise InputError(f"Score {text!r} is not one of top_k:N, ids:N, sampled (for example top_k:20).")
        return cls(found[1] or found[3], int(found[2] or 1))

    def __str__(self) -> str:
        return self.kind if self.kind == "sampled" else f"{self.kind}:{self.k}"

    @property
    def meaning(self) -> str:
        """The estimator, as one sentence for the report."""
        kept = {
            "top_k": f"the teacher's {self.k} most probable tokens",
            "ids": f"the student's {self.k} most probable tokens",
            "sampled": "the token of the text",
        }[self.kind]
        return (
            f"The served teacher is known at {kept} and as one bucket for all others: divergences are those of these "
            f"{self.k + 1} classes, a lower bound of the full ones."
        )


@dataclass(frozen=True)
class Asked:
    """One sequence to be scored.

    Args:
        key: of its scores in the store.
        ids: the tokens.
        rows: the positions that count; row r predicts token r + 1.
        support: the tokens to score at each row, or `None`.
    """

    key: bytes
    ids: tuple[int, ...]
    rows: tuple[int, ...]
    support: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Position:
    """A server's scores at one position: log-probability of the token at that position, and of others by id."""

    own: float
    others: Mapping[int, float]


class Scored(NamedTuple):
    """A server's scores of one sequence: the target of its rows, and the log-probability of each token after the first."""

    target: TopK
    own: list[float]


@dataclass
class ScoreRequest:
    """Sequences that are sent to the server together. `attempts` makes each later attempt smaller."""

    id: str
    sequences: Sequence[Asked]
    attempts: int = field(default=0)

    @property
    def tokens(self) -> int:
        """Number of tokens in the sequences."""
        return sum(len(s.ids) for s in self.sequences)

    def most_tokens(self) -> tuple[int, int]:
        """Upper bounds of (prompt, generated) tokens: servers generate at least one."""
        return self.tokens, len(self.sequences)


class OtherWay(RefusedRequest):
    """The server responds, but does not support this request format."""


def prompt_log_probs(choice: Mapping[str, Any], asked: Asked) -> list[Position]:
    """Parse vLLM's `prompt_logprobs`: for each token after the first, its own and the k most probable ones, by id."""
    given = choice.get("prompt_logprobs")
    if given is None:
        raise OtherWay("it gives no prompt_logprobs")
    same_tokens(choice, asked)
    if len(given) != len(asked.ids):
        raise SourceError(f"{len(given)} positions are scored of {len(asked.ids)}")
    found = []
    for token, entry in zip(asked.ids[1:], given[1:], strict=True):
        values = {int(i): _number(v["logprob"]) for i, v in entry.items()}
        if token not in values:
            raise SourceError("the answer scores other tokens than were sent")
        found.append(Position(values[token], values))
    return found


def echoed(
    choice: Mapping[str, Any], asked: Asked, others: bool, name: Callable[[int], str], ids: Callable[[str], int]
) -> list[Position]:
    """Parse OpenAI's `echo` with `logprobs`: tokens by their text, or as `token_id:N` where the server supports it.

    Args:
        others: parse the other tokens of a position too.
        name: the text of an id.
        ids: the id of a text; raises an error for one that several ids share.
    """
    given = choice.get("logprobs")
    if not isinstance(given, Mapping) or not given.get("token_logprobs"):
        raise OtherWay("it gives no log-probabilities of an echoed prompt")
    tokens, own, top = given["tokens"], given["token_logprobs"], given.get("top_logprobs") or []
    count = len(asked.ids)
    if len(own) not in (count, count + 1) or len(tokens) != len(own):
        if len(own) <= 1:
            raise OtherWay("it does not echo the prompt")
        raise SourceError(f"{len(own)} tokens come back of {count}")
    for token, said in zip(asked.ids, tokens[:count], strict=True):
        wanted = f"token_id:{token}" if said.startswith("token_id:") else name(token)
        if said != wanted and "\ufffd" not in wanted and not said.startswith("bytes:"):
            raise SourceError(f"the answer scores other tokens than were sent ({said!r} for {wanted!r})")
    found = []
    for place in range(1, count):
        entry = top[place] if others and place < len(top) else None
        values = {ids(text): _number(v) for text, v in (entry or {}).items()}
        found.append(Position(_number(own[place]), values | {asked.ids[place]: _number(own[place])}))
    return found


def given_ids(choice: Mapping[str, Any], asked: Asked, classes: int) -> TopK:
    """Parse vLLM's prefill scoring of given ids (RFC 56860): `prompt_token_id_logprobs`, `[rows from the first on,
    ids]`."""
    given = choice.get("prompt_token_id_logprobs")
    if given is None:
        raise OtherWay("it scores no given ids")
    same_tokens(choice, asked)
    assert asked.support is not None
    start = asked.rows[0]
    if len(given) != len(asked.ids) - 1 - start:
        raise SourceError(f"{len(given)} rows are scored of {len(asked.ids) - 1 - start}")
    width = len(asked.support[0])
    values = [[_number(v) for v in given[row - start][:width]] for row in asked.rows]
    if any(len(v) != width for v in values):
        raise SourceError("a row of the answer misses ids")
    return target(torch.tensor(asked.support), torch.tensor(values, dtype=torch.float64), width == classes)


def kept(positions: Sequence[Position], asked: Asked, score: Score, classes: int) -> TopK:
    """The target of the rows that count: the k most probable tokens, ties to the lowest id, or the token of the text
    alone."""
    ids: list[list[int]] = []
    values: list[list[float]] = []
    k = min(score.k, classes)
    for row in asked.rows:
        said = positions[row]
        if score.kind == "sampled":
            best = [(asked.ids[row + 1], said.own)]
        else:
            best = sorted(said.others.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
        beyond = [i for i, _ in best if not 0 <= i < classes]
        if beyond:
            raise InputError(
                f"the server names token {beyond[0]} and the run's tokenizer has {classes}: it serves a model of another "
                "tokenizer, or one that gives its padding rows probability. Serve the teacher of this tokenizer."
            )
        if len(best) < k:
            raise InputError(
                f"the server gives {len(best)} tokens a position of the {k} that score={score} asks for. Raise its limit "
                f"(vLLM: --max-logprobs {k}) or lower N."
            )
        ids.append([i for i, _ in best])
        values.append([v for _, v in best])
    return target(
        torch.tensor(ids).reshape(-1, k), torch.tensor(values, dtype=torch.float64).reshape(-1, k), k == classes
    )


def target(ids: Tensor, log_probs: Tensor, whole: bool = False) -> TopK:
    """`TopK` with the remaining mass as tail; raises an error for values that cannot be log-probabilities."""
    total = log_probs.exp().sum(-1, keepdim=True)
    if bool((total > 1 + SLACK).any()):
        raise InputError(
            f"the server's probabilities sum to {float(total.max()):.4g} at a position: these are not log-probabilities of "
            "temperature 1. Start vLLM with --logprobs-mode raw_logprobs."
        )
    if whole:
        log_tail = torch.full_like(total, -math.inf)
    else:
        log_tail = (1 - total).clamp(min=UNRESOLVED).log()
    return TopK(ids, log_probs.float(), log_tail.float())


def same_tokens(choice: Mapping[str, Any], asked: Asked) -> None:
    """Check the tokens that the server says it read, if it does, against those sent."""
    read = choice.get("prompt_token_ids")
    if read is not None and tuple(read) != asked.ids:
        raise SourceError("the answer scores other tokens than were sent")


def _number(value: Any) -> float:
    if isinstance(value, float) and value == -math.inf:
        return value  # of what cannot be
    try:
        return number(value)
    except ValueError:
        raise SourceError("the answer's log-probabilities cannot be read") from None
