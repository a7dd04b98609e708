"""The sources: a model here, a model behind HTTP, a function; and which of them a recipe's model is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from understudy.generation.endpoint import EndpointSource
from understudy.generation.limits import Endpoint
from understudy.generation.request import Completion, Request, Source, cut


class OracleSource:
    """A Python function as a source, for synthetic worlds and tests.

    Args:
        name: for the log; change it with the function.
        write: takes the request and a random generator seeded by the request's content, returns text (cut at the first
            stop string; a token is a word) or a `Completion`, which is passed on as it is.
    """

    def __init__(self, name: str, write: Callable[[Request, np.random.Generator], str | Completion]) -> None:
        self.name, self.write = name, write

    def complete(self, request: Request) -> Completion:
        """What the function writes."""
        answer = self.write(request, np.random.default_rng(int(request.key(self.name)[:16], 16)))
        if isinstance(answer, Completion):
            return answer
        text, _ = cut(answer, request.stop)
        prompt = request.prompt if isinstance(request.prompt, str) else " ".join(m["content"] for m in request.prompt)
        return Completion(text, "stop", None, len(prompt.split()), len(text.split()))


class ModelLike(Protocol):
    """What is read of a recipe's `ModelSpec`."""

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
    """The source of a recipe's model: behind its `endpoint` where it names one, else in this process."""
    if spec.endpoint is not None:
        return EndpointSource(spec.model, spec.endpoint)
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
    """The bounds of a recipe's model, as arguments of `generate`."""
    return spec.endpoint.limits() if spec.endpoint is not None else {}
