"""The interface of a text source: a request in, a completion out. Whoever generates never asks where it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from understudy.errors import InputError


@dataclass(frozen=True)
class Request:
    """One completion to be written.

    Args:
        prompt: text to be continued, or messages `({"role": …, "content": …}, …)` for a chat.
        id: the caller's stable name for it, for example `tails/12/xWant/3`.
        draw: which of several samples of one prompt.
        max_tokens: most tokens to write.
        temperature: 0 is greedy.
        top_p: nucleus.
        stop: strings that end the text.
        log_probs: also ask for the summed log-probability of the written tokens.
    """

    prompt: str | tuple[Mapping[str, str], ...]
    id: str
    draw: int = 0
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    log_probs: bool = False

    def key(self, source: str) -> str:
        """SHA-256 of the content under a source's name; `id` is not part of it, so equal requests are paid for once."""
        content = {k: v for k, v in asdict(self).items() if k != "id"}
        return hashlib.sha256(json.dumps([source, content], sort_keys=True).encode()).hexdigest()

    def most_tokens(self) -> tuple[int, int]:
        """Bounds of (prompt, written) tokens before anything is sent.

        A token covers at least one byte of UTF-8; a chat template is granted 32 tokens a message, and any prompt 16.
        """
        if isinstance(self.prompt, str):
            return len(self.prompt.encode(errors="surrogatepass")) + 16, self.max_tokens
        sizes = (sum(len(str(v).encode(errors="surrogatepass")) for v in m.values()) + 32 for m in self.prompt)
        return sum(sizes) + 16, self.max_tokens


@dataclass(frozen=True)
class Completion:
    """What a source wrote.

    Args:
        text: without prompt and stop string.
        finish: why it ended.
        log_prob: summed over the written tokens, nats, or `None` where the source does not say.
        prompt_tokens, tokens: as the source counts them.
    """

    text: str
    finish: Literal["stop", "length"]
    log_prob: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0


class Source(Protocol):
    """Anything that writes. `complete` may be called from several threads at once."""

    name: str

    def complete(self, request: Request) -> Completion:
        """Write one completion. Raises `SourceError` for a failure worth trying again."""
        ...


class SourceError(RuntimeError):
    """A request failed for a passing reason (429, 5xx, time-out, cut connection, malformed answer).

    Args:
        wait: seconds the source asks to wait, or `None`.
    """

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class RefusedRequest(InputError):
    """This one request cannot be answered however often it is sent (too long, filtered); others may be."""


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    ends = [place for mark in stop if mark and (place := text.find(mark)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
