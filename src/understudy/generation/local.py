"""A source in this process: any causal LM of transformers, in batches, with random numbers that belong to each request."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

from understudy.data.chat import render
from understudy.data.ends import Ends, token_ids
from understudy.errors import InputError
from understudy.generation.decoding import choose, end_tokens, written
from understudy.generation.request import Completion, RefusedRequest, Request, cut
from understudy.models import load_causal_lm, load_tokenizer, state_hash, tokenizer_hashes
from understudy.models.positions import positions

GATHER = 0.005  # seconds to wait for requests of other threads before a batch starts


class LocalSource:
    """A model that generates in this process.

    A text prompt is continued (after the tokenizer's beginning-of-text token, as in training); messages are rendered by
    the chat template. Requests that arrive from several threads at once form one batch. Random numbers depend on the
    content of the request alone, so a request gets the same text in any batch, up to the rounding of batched products.

    `log_prob` is the sum over all generated tokens, ending token included, of the model's log-probabilities: float32,
    before penalties, temperature and top-p. `tokens` counts the same tokens.

    Args:
        model: a causal LM with `generate`.
        tokenizer: its tokenizer.
        name: for the log; hashes of weights, tokens and template are added.
        batch: most requests per batch.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, *, batch: int = 8) -> None:
        self.model: Any = model
        self.tokenizer, self.batch = tokenizer, batch
        self._ends = Ends.of(tokenizer)
        hashes = tokenizer_hashes(tokenizer)
        self.name = f"{name} {state_hash(model)[:16]} {hashes['tokenizer'][:8]} {hashes['template'][:8]}".rstrip()
        self._pending: list[tuple[Request, Future[Completion]]] = []
        self._turn = threading.Condition()
        self._busy = False

    @classmethod
    def load(
        cls,
        name: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        quantization: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        batch: int = 8,
    ) -> LocalSource:
        """Load from a folder, a set in `UNDERSTUDY_DATA` or a Hub id; on a GPU if there is one."""
        words = load_tokenizer(tokenizer or name, trust_remote_code=trust_remote_code)
        model = load_causal_lm(
            name, tokenizer=words, dtype=dtype, quantization=quantization, trust_remote_code=trust_remote_code
        )
        if quantization is None:
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, words, name, batch=batch)

    def complete(self, request: Request) -> Completion:
        """Generate one completion. The thread that finds the model free processes the requests of all waiting threads."""
        mine: Future[Completion] = Future()
        with self._turn:
            self._pending.append((request, mine))
        while True:
            with self._turn:
                self._turn.wait_for(lambda: mine.done() or not self._busy)
                if mine.done():
                    return mine.result()
                self._busy = True
            if self.batch > 1:
                time.sleep(GATHER)
            with self._turn:
                taken, self._pending = self._pending[: self.batch], self._pending[self.batch :]
            try:
                self._write(taken)
            finally:
                with self._turn:
                    self._busy = False
                    self._turn.notify_all()

    def _write(self, taken: Sequence[tuple[Request, Future[Completion]]]) -> None:
        """Set the result of every request of a batch: its completion or an exception."""
        able: list[tuple[Request, Future[Completion], list[int]]] = []
        for request, future in taken:
            try:
                able.append((request, future, self._encode(request)))
            except Exception as error:  # raised again in the requesting thread
                future.set_exception(error)
        if not able:
            return
        try:
            completions = self.write([r for r, _, _ in able], [ids for _, _, ids in able])
        except BaseException as error:
            for _, future, _ in able:
                future.set_exception(error)
            return
        for (_, future, _), completion in zip(able, completions, strict=True):
            future.set_result(completion)

    def _encode(self, request: Request) -> list[int]:
        """The token ids of a prompt."""
        tokenizer = self.tokenizer
        if isinstance(request.prompt, str):
            ids = self._ends.before(token_ids(tokenizer, request.prompt))
            if not ids and tokenizer.bos_token_id is not None:  # generation needs at least one token
                ids = [tokenizer.bos_token_id]
        else:
            try:
                ids = token_ids(tokenizer, render(request.prompt, tokenizer, ask=True))
            except InputError as error:
                raise RefusedRequest(f"Request {request.id}, to {self.name}: {error}") from error
        most = positions(self.model)
        if request.max_tokens < 1:
            raise RefusedRequest(f"Request {request.id}: max_tokens is {request.max_tokens} and must be at least 1.")
        if not ids:
            raise RefusedRequest(f"Request {request.id} has an empty prompt and the tokenizer no token to begin with.")
        if most is not None and len(ids) + request.max_tokens > most:
            raise RefusedRequest(
                f"Request {request.id}: a prompt of {len(ids)} tokens and max_tokens {request.max_tokens} are more "
                f"than the {most} positions of the model. Shorten one of them."
            )
        return ids

    def write(self, requests: Sequence[Request], prompts: Sequence[list[int]]) -> list[Completion]:
        """Completions of prompts given as token ids, in one batch."""
        longest, most = max(map(len, prompts)), max(r.max_tokens for r in requests)
        draw = _Draw(requests, self.name, longest, len(self.tokenizer))
        end = _End(requests, longest, end_tokens(self.model, self.tokenizer), self.tokenizer)
        ids = written(self.model, prompts, most, self.tokenizer.pad_token_id or 0, [draw], end)
        log_probs = torch.stack(draw.log_probs, dim=1).double()
        return [
            self._completion(r, p, ids[i, : end.length[i]].tolist(), log_probs[i], end)
            for i, (r, p) in enumerate(zip(requests, prompts, strict=True))
        ]

    def _completion(
        self, request: Request, prompt: list[int], ids: list[int], log_probs: Tensor, end: _End
    ) -> Completion:
        decode = lambda some: self.tokenizer.decode(  # noqa: E731
            some, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        text, stopped = cut(decode(prompt + ids)[len(decode(prompt)) :], request.stop)  # keeps a leading space
        finish: Literal["stop", "length"] = "stop" if stopped or ids[-1] in end.ends else "length"
        return Completion(text, finish, float(log_probs[: len(ids)].sum()), len(prompt), len(ids))


class _Draw(LogitsProcessor):
    """Samples each row's next token with the row's own settings and seed, and masks all others."""

    def __init__(self, requests: Sequence[Request], source: str, start: int, vocabulary: int) -> None:
        self.requests, self.start, self.vocabulary = requests, start, vocabulary
        self.seeds = torch.tensor([int(r.key(source)[:15], 16) for r in requests])
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float()
        logits[:, self.vocabulary :] = float("-inf")  # padding rows of the head
        written = input_ids[:, self.start :]
        raw = logits.log_softmax(-1)
        chosen = self._choose(self._penalised(logits, written).double(), step=written.shape[1])
        self.log_probs.append(raw.gather(1, chosen[:, None])[:, 0].cpu())
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)

    def _column(self, values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]

    def _penalised(self, logits: Tensor, written: Tensor) -> Tensor:
        """Lower the logits of tokens generated before: by `presence_penalty` once, by `frequency_penalty` per
        occurrence."""
        presence = self._column([r.presence_penalty for r in self.requests], logits)
        frequency = self._column([r.frequency_penalty for r in self.requests], logits)
        if not bool(presence.any() or frequency.any()):
            return logits
        counts = torch.zeros_like(logits).scatter_add(1, written, torch.ones_like(written, dtype=logits.dtype))
        return logits - presence * (counts > 0) - frequency * counts

    def _choose(self, logits: Tensor, step: int) -> Tensor:
        """The next token of each row with its own settings, in float64."""
        temperature = self._column([r.temperature for r in self.requests], logits)
        return choose(logits, self.seeds, step, temperature, self._column([r.top_p for r in self.requests], logits))


class _End(StoppingCriteria):
    """Ends each row at an ending token, a stop string or its own `max_tokens`."""

    def __init__(self, requests: Sequence[Request], start: int, ends: set[int], tokenizer: Any) -> None:
        self.requests, self.start, self.ends, self.tokenizer = requests, start, ends, tokenizer
        self.length = [0] * len(requests)
        self.done = [False] * len(requests)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for i, (request, ids) in enumerate(zip(self.requests, input_ids[:, self.start :].tolist(), strict=True)):
            if not self.done[i]:
                self.length[i] = len(ids)
                self.done[i] = len(ids) >= request.max_tokens or ids[-1] in self.ends or self._stopped(request, ids)
        return torch.tensor(self.done, device=input_ids.device)

    def _stopped(self, request: Request, ids: list[int]) -> bool:
        """Whether the text holds a stop string. Only its end must be searched: a token has at least one byte."""
        if not request.stop:
            return False
        tail = ids[-(max(len(s.encode()) for s in request.stop) + 8) :]
        return cut(self.tokenizer.decode(tail, skip_special_tokens=True), request.stop)[1]
