"""The interface of a text source: a request in, a completion out, independent of where the model runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from understudy.errors import InputError


@dataclass(frozen=True)
class Request:
    """One completion to generate.

    Args:
        prompt: text to be continued, or messages `({"role": …, "content": …}, …)` for a chat.
        id: a stable name that the caller chooses, for example `tails/12/xWant/3`.
        draw: index among several samples of one prompt.
        max_tokens: most tokens to generate.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        stop: strings that end the text.
        log_probs: request the summed log-probability of the generated tokens too.
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
        """SHA-256 of the content and the source's name. `id` is not part of it, so equal requests are paid for once."""
        content = {k: v for k, v in asdict(self).items() if k != "id"}
        return hashlib.sha256(json.dumps([source, content], sort_keys=True).encode()).hexdigest()

    def most_tokens(self) -> tuple[int, int]:
        """Upper bounds of (prompt, generated) tokens, before anything is sent.

        A token has at least one byte of UTF-8; 32 tokens per message are added for a chat template, and 16 for any
        prompt.
        """
        if isinstance(self.prompt, str):
            return len(self.prompt.encode(errors="surrogatepass")) + 16, self.max_tokens
        sizes = (sum(len(str(v).encode(errors="surrogatepass")) for v in m.values()) + 32 for m in self.prompt)
        return sum(sizes) + 16, self.max_tokens


@dataclass(frozen=True)
class Completion:
    """The output of a source.

    Args:
        text: without prompt and stop string.
        finish: the reason why it ended.
        log_prob: summed over the generated tokens, nats; `None` if the source does not provide it.
        prompt_tokens, tokens: as counted by the source.
    """

    text: str
    finish: Literal["stop", "length"]
    log_prob: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0


class Source(Protocol):
    """Anything that generates text. `complete` may be called from several threads at once."""

    name: str

    def complete(self, request: Request) -> Completion:
        """Generate one completion.

        Raises:
            SourceError: another attempt may succeed.
        """
        ...


class SourceError(RuntimeError):
    """A request failed for a temporary reason (429, 5xx, time-out, closed connection, malformed response).

    Args:
        wait: seconds to wait as given by the source, or `None`.
    """

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class RefusedRequest(InputError):
    """This request can never succeed (too long, filtered); others may."""


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    ends = [place for mark in stop if mark and (place := text.find(mark)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
