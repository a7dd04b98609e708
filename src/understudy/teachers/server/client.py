"""The client of a scoring server: the form of requests, the number in flight, and retries."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from understudy.errors import InputError
from understudy.generation import Endpoint, FailedRequests, RefusedRequest, SourceError
from understudy.generation.endpoint import ANSWER_BYTES, Client, spent
from understudy.generation.engine import Crew
from understudy.targets import TopK
from understudy.teachers.cache.codecs import pack_scored
from understudy.teachers.cache.store import ShardStore
from understudy.teachers.server.scores import (
    Asked,
    OtherWay,
    Score,
    Scored,
    ScoreRequest,
    echoed,
    given_ids,
    kept,
    prompt_log_probs,
)

MEMORY = 4 * 2**30
"""Bytes that a server may need for the log-probabilities of all tokens in flight: float32 logits and their softmax."""
MOST_TOKENS = 16_384  # in flight, also with a small vocabulary: responses of about 20 MB
SCORE_BYTES = 256  # most bytes of a response for each scored class at a position
WAYS = ("prompt_logprobs", "echo with token ids", "echo")
_TOO_LARGE = re.compile(r"HTTP 413|too large|out of memory|outofmemory", re.IGNORECASE)


class ScoringClient(Client):
    """Fills a store with a server's scores of sequences.

    A response is stored before its worker takes the next request, so a kill only loses those in flight. All requests in
    flight together hold at most `bound` tokens, computed from the vocabulary, since servers allocate a row of the whole
    vocabulary for each token (a longer sequence is sent alone). Failed requests are sent again in halves, down to
    single sequences, and partial results are kept.

    Args:
        store: where scores are kept.
        score: the kind of scores requested.
        classes: of the tokenizer.
        name, ids: text of a token and back, for servers that identify tokens by text.
    """

    def __init__(
        self,
        model: str,
        endpoint: Endpoint,
        store: ShardStore,
        score: Score,
        classes: int,
        name: Callable[[int], str],
        ids: Callable[[str], int],
    ) -> None:
        super().__init__(model, endpoint)
        self.store, self.score, self.classes = store, score, classes
        self.spell, self.find = name, ids
        self.way = WAYS[0]
        self.bound = endpoint.scoring_tokens or max(1, min(MOST_TOKENS, MEMORY // (8 * classes)))
        self.refused: list[str] = []
        self.writing = threading.Lock()

    def fill(self, asked: Sequence[Asked]) -> None:
        """Have the sequences scored that the store does not hold.

        Raises:
            BudgetSpent, FailedRequests, InputError: as in `generation.generate`; received scores are kept.
        """
        new = {a.key: a for a in asked if a.key not in self.store}
        if new:
            self.store.refresh()  # another process may have stored some
        left = [a for key, a in new.items() if key not in self.store]
        none = [a for a in left if not a.rows]  # no row counts, so no scores are needed
        if none:
            self._keep(none, [Scored(self._nothing(), [])] * len(none), {})
        requests = self._packed([a for a in left if a.rows])
        if not requests:
            return
        at_once = max(1, self.bound // max(r.tokens for r in requests))
        limits = self.endpoint.model_copy(update={"concurrency": min(self.endpoint.concurrency, at_once)})
        crew = Crew(self, _Answers(self, {r.id: r for r in requests}), limits)
        crew.names = {r.id: r.id for r in requests}
        crew.todo.extend((r.id, r) for r in requests)
        crew.run(False)
        self.store.compact(most=64)

    def _packed(self, asked: Sequence[Asked]) -> list[ScoreRequest]:
        """Requests of several sequences each, sized so that the requests in flight hold at most `bound` tokens."""
        share = max(1, self.bound // self.endpoint.concurrency)
        found: list[list[Asked]] = []
        size = 0
        for one in asked:
            if not found or one.support is not None or size + len(one.ids) > share:
                found.append([])
                size = 0
            found[-1].append(one)
            size += len(one.ids)
        return [ScoreRequest(f"scores/{i}", group) for i, group in enumerate(found)]

    def complete(self, request: ScoreRequest) -> None:
        """Have one request's sequences scored and stored; called by the worker, again after a failure."""
        left = [s for s in request.sequences if s.key not in self.store]
        size = max(1, len(left) >> request.attempts)
        request.attempts += 1
        while left:
            piece = left[:size]
            try:
                self._keep(piece, *self.ask(piece))
                left = left[len(piece) :]
            except (RefusedRequest, SourceError) as error:
                large = _TOO_LARGE.search(str(error)) is not None
                if large:
                    self.bound = max(1, min(self.bound, sum(len(s.ids) for s in piece) // 2))
                if len(piece) > 1 and (large or isinstance(error, RefusedRequest)):
                    size = len(piece) // 2
                    continue
                if isinstance(error, RefusedRequest):
                    self.refused.append(str(error))
                if large and len(piece) == 1:
                    raise RefusedRequest(
                        f"{error}: one sequence of {len(piece[0].ids)} tokens is too much for this server. Lower "
                        "data.max_length, or give the server more memory."
                    ) from None
                raise

    def _keep(self, piece: Sequence[Asked], found: Sequence[Scored], spent: dict[str, int]) -> None:
        arrays = [pack_scored(one.target) for one in found]
        joined = {name: torch.cat([a[name] for a in arrays]) for name in arrays[0]}
        with self.writing:
            self.store.append([a.key for a in piece], [len(a.rows) for a in piece], joined, spent)

    def _nothing(self) -> TopK:
        k = min(self.score.k, self.classes)
        return TopK(torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k), torch.zeros(0, 1))

    def ask(self, piece: Sequence[Asked]) -> tuple[list[Scored], dict[str, int]]:
        """Send sequences. Returns the scores of each, and the cost."""
        scores = sum(len(a.ids) for a in piece) * (min(self.score.k, self.classes) + 2)
        reply, check_own = self.post("/completions", self._body(piece), ANSWER_BYTES + SCORE_BYTES * scores)
        try:
            choices = sorted(reply["choices"], key=lambda c: c["index"])
            if [c["index"] for c in choices] != list(range(len(piece))):
                raise SourceError("the answer holds another number of sequences than were sent")
            found = [self._read(choice, one) for choice, one in zip(choices, piece, strict=True)]
            check_own()
        except (SourceError, InputError) as error:
            raise type(error)(self._say(str(error).removeprefix(f"{self.url}: "))) from None
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError):
            raise SourceError(self._say("the answer misses fields, or they cannot be read")) from None
        return found, self._spent(reply, piece)

    def _body(self, piece: Sequence[Asked]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "prompt": [list(a.ids) for a in piece], "temperature": 1.0}
        body |= {self.endpoint.max_tokens_name: 1} | self.endpoint.extra
        k = min(self.score.k, self.classes)
        if self.score.kind == "ids":
            (one,) = piece
            assert one.support is not None
            rows = dict(zip(one.rows, one.support, strict=True))
            listed = [list(rows.get(r, (one.ids[r + 1],))) for r in range(one.rows[0], len(one.ids) - 1)]
            return body | {
                "prompt_logprob_token_ids": listed,
                "prompt_logprob_start": one.rows[0],
                "return_token_ids": True,
            }
        if self.way == "prompt_logprobs":
            return body | {"prompt_logprobs": k, "return_token_ids": True}
        named = {"return_tokens_as_token_ids": True} if self.way == "echo with token ids" else {}
        return body | {"echo": True, "logprobs": k} | named

    def _read(self, choice: Any, one: Asked) -> Scored:
        if self.score.kind == "ids":
            found = given_ids(choice, one, self.classes)
            return Scored(found, found.log_probs[:, 0].tolist())
        if self.way == "prompt_logprobs":
            positions = prompt_log_probs(choice, one)
        else:
            positions = echoed(choice, one, self.score.kind != "sampled", self.spell, self.find)
        return Scored(kept(positions, one, self.score, self.classes), [p.own for p in positions])

    def _spent(self, reply: Mapping[str, Any], piece: Sequence[Asked]) -> dict[str, int]:
        """The tokens that the server counts, or an upper bound if it does not count."""
        prompt, written = spent(reply) or (sum(len(a.ids) for a in piece), len(piece))
        return {"prompt_tokens": prompt, "tokens": written}

    def settle(self, probe: Asked) -> list[float]:
        """Find the request format that this server supports, with a probe that is not stored.

        Returns:
            The log-probability of each token of the probe after the first (of each row's first id, for `ids`).

        Raises:
            OtherWay: it supports no format; with its responses.
            InputError: it cannot be reached.
        """
        said = []
        for self.way in WAYS:
            request = _Probe(self, probe)
            crew = Crew(request, request, self.endpoint)
            crew.names, crew.todo = {probe.key.hex(): "probe"}, type(crew.todo)([(probe.key.hex(), request)])
            try:
                crew.run(False)
                assert request.found is not None
                return request.found.own
            except FailedRequests:
                if request.refused is None:
                    raise
                said.append(str(request.refused).removeprefix(f"{self.url}: "))
                if self.score.kind == "ids":
                    break  # these have a single format
        words = "; ".join(dict.fromkeys(said))
        raise OtherWay(
            f"{self.url} gives no scores of a text's tokens for score={self.score}: {words}. It must offer "
            f"/completions with prompt_logprobs (vLLM, started with --max-logprobs {self.score.k}) or with echo and logprobs."
        )


class _Probe:
    """One probe as request, source and log at once, to use the workers' retries and budget."""

    id, path = "probe", "no store"

    def __init__(self, client: ScoringClient, asked: Asked) -> None:
        self.client, self.asked = client, asked
        self.found: Scored | None = None
        self.refused: RefusedRequest | None = None
        spent = client.store.spent
        self.prompt_tokens, self.tokens = spent["prompt_tokens"], spent["tokens"]

    def most_tokens(self) -> tuple[int, int]:
        return len(self.asked.ids), 1

    def complete(self, request: Any) -> Scored:
        try:
            return self.client.ask([self.asked])[0][0]
        except RefusedRequest as error:
            self.refused = error
            raise

    def append(self, key: str, name: str, answer: Scored) -> None:
        self.found = answer

    def __contains__(self, key: str) -> bool:
        return self.found is not None

    def sync(self) -> None:
        """Does nothing: a probe is not stored."""


class _Answers:
    """The store with the interface of a request log."""

    def __init__(self, client: ScoringClient, requests: dict[str, ScoreRequest]) -> None:
        self.client, self.requests, self.path = client, requests, client.store.folder

    @property
    def _spent(self) -> Counter[str]:
        with self.client.writing:
            return self.client.store.spent

    @property
    def prompt_tokens(self) -> int:
        return self._spent["prompt_tokens"]

    @property
    def tokens(self) -> int:
        return self._spent["tokens"]

    def append(self, key: str, name: str, answer: None) -> None:
        """Does nothing: the scores are stored already."""

    def __contains__(self, key: str) -> bool:
        return all(s.key in self.client.store for s in self.requests[key].sequences)

    def sync(self) -> None:
        """Does nothing: each shard is complete when it exists."""
