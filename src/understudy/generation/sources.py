"""The sources: a local model, a model behind HTTP, a function; and the source of a recipe's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from understudy.generation.endpoint import EndpointSource
from understudy.generation.limits import Endpoint
from understudy.generation.pool import ServerPool
from understudy.generation.request import Completion, Request, Source, cut


class OracleSource:
    """A Python function as a source, for synthetic worlds and tests.

    Args:
        name: for the log; change it when the function changes.
        write: takes the request and a random generator seeded by the request's content. Returns text (cut at the first
            stop string; a token is a word), or a `Completion`, which is used unchanged.
    """

    def __init__(self, name: str, write: Callable[[Request, np.random.Generator], str | Completion]) -> None:
        self.name, self.write = name, write

    def complete(self, request: Request) -> Completion:
        """The output of the function."""
        answer = self.write(request, np.random.default_rng(int(request.key(self.name)[:16], 16)))
        if isinstance(answer, Completion):
            return answer
        text, _ = cut(answer, request.stop)
        prompt = request.prompt if isinstance(request.prompt, str) else " ".join(m["content"] for m in request.prompt)
        return Completion(text, "stop", None, len(prompt.split()), len(text.split()))


class ModelLike(Protocol):
    """The attributes of a recipe's `ModelSpec` that are used here."""

    @property
    def model(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str | None: ...
    @property
    def quantization(self) -> dict[str, Any] | None: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def tokenizer(self) -> str | None: ...
    @property
    def endpoint(self) -> Endpoint | None: ...


def source_from(spec: ModelLike, *, batch: int = 8) -> Source:
    """The source of a recipe's model: its `endpoint` if it has one, with one server or several, else a model in this
    process."""
    if spec.endpoint is not None:
        several = not isinstance(spec.endpoint.url, str)
        return (ServerPool if several else EndpointSource)(spec.model, spec.endpoint)
    from understudy.generation.local import LocalSource

    return LocalSource.load(
        spec.model,
        tokenizer=spec.tokenizer,
        dtype=spec.dtype,
        device=spec.device,
        quantization=spec.quantization,
        trust_remote_code=spec.trust_remote_code,
        batch=batch,
    )


def limits_from(spec: ModelLike) -> dict[str, Any]:
    """The limits of a recipe's model, as arguments of `generate`."""
    return spec.endpoint.limits() if spec.endpoint is not None else {}
