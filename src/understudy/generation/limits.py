"""Limits of requests to a source, budgets, and the address of an endpoint, as parts of a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from understudy.errors import InputError

MOST_TOKENS = 10**9  # largest valid token count of a response
LONGEST_WAIT = 600.0  # longest `Retry-After` in seconds that is obeyed (daily quotas give hours)
SECRET = {"token", "key"}
SECRET_ENDS = ("apikey", "authorization", "accesstoken", "authtoken", "bearertoken", "secret", "password")
"""Ends of the names of fields that hold a key, in letters alone."""


class Limits(BaseModel):
    """Limits of a generation. Budgets count everything in the log, earlier runs included."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    concurrency: int = Field(8, ge=1, le=1024, description="Requests in flight at once, at each server.")
    rate: float | None = Field(None, ge=1e-5, description="Most attempts a second, at each server.")
    retries: int = Field(8, ge=0, description="Attempts after the first one, for each request.")
    backoff: float = Field(
        0.5, gt=0, le=LONGEST_WAIT, description="Seconds before the first retry; each later one waits twice as long."
    )
    longest_backoff: float = Field(60.0, gt=0, le=LONGEST_WAIT, description="Cap on the back-off, seconds.")
    token_budget: int | None = Field(None, ge=1, description="Most tokens, prompts and completions together.")
    cost_budget: float | None = Field(None, gt=0, description="Most money, in the currency of the prices.")
    price_in: float = Field(0.0, ge=0, description="Price of a million prompt tokens.")
    price_out: float = Field(0.0, ge=0, description="Price of a million written tokens.")

    @model_validator(mode="after")
    def _prices_for_a_cost(self) -> Limits:
        if self.cost_budget is not None and self.price_in == self.price_out == 0:
            raise ValueError("cost_budget needs price_in and price_out, per million tokens")
        return self

    def cost(self, prompt_tokens: int, tokens: int) -> float:
        """Cost of these numbers of tokens."""
        return (prompt_tokens * self.price_in + tokens * self.price_out) / 1e6


class Endpoint(Limits):
    """An OpenAI-compatible server, or several that serve one model. The key stays in its environment variable; only the
    variable's name is stored."""

    url: str | list[str] = Field(
        description="Base URL, for example http://localhost:8000/v1; a bare host gets /v1. A list is a pool of servers of the "
        "same model, which share the requests for texts; `score` asks one server."
    )
    api_key_env: str | None = Field(None, description="Environment variable that holds the key; none sends no key.")
    timeout: float = Field(
        120.0, gt=0, le=86_400.0, description="Seconds until a request whose answer is not whole counts as failed."
    )
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="The request's field that bounds the length."
    )
    seed: bool = Field(True, description="Send a seed made from the request's content; off for servers that refuse it.")
    extra: dict[str, Any] = Field(default_factory=dict, description="Further fields of the request's body.")
    scoring_tokens: int | None = Field(
        None, ge=1, description="Most tokens being scored at once; computed from the vocabulary if not given."
    )

    @field_validator("url", mode="before")
    @classmethod
    def _plain_urls(cls, value: Any) -> str | list[str]:
        """One URL is a text, several are a list."""
        given = value if isinstance(value, list) else [value]
        if not given or not all(isinstance(url, str) for url in given):
            raise ValueError("a URL is a text, and those of several servers of one model a list")
        urls = [_plain(url) for url in given]
        twice = [url for i, url in enumerate(urls) if url in urls[:i]]
        if twice:
            raise ValueError("a list of servers names one twice: leave it out, and raise concurrency for more at once")
        return urls[0] if len(urls) == 1 else urls

    @property
    def servers(self) -> list[Endpoint]:
        """The endpoint of each server."""
        urls = [self.url] if isinstance(self.url, str) else self.url
        return [self.model_copy(update={"url": url}) for url in urls]

    @property
    def address(self) -> str:
        """The URL of the one server.

        Raises:
            InputError: there are several.
        """
        if not isinstance(self.url, str):
            raise InputError(f"endpoint.url names {len(self.url)} servers ({', '.join(self.url)}) where one is asked.")
        return self.url

    @field_validator("api_key_env")
    @classmethod
    def _a_variable(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("this is the name of an environment variable, never the key itself")
        return value

    @field_validator("extra")
    @classmethod
    def _json_without_a_key(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise ValueError("fields of the body are JSON: texts, finite numbers, lists and objects") from None
        if _holds_a_key(value):
            raise ValueError("a key is no field of the body, which is kept: name its variable with api_key_env")
        return value

    @classmethod
    def shown(cls, place: Sequence[int | str]) -> list[int | str]:
        """A path in a recipe as it may be printed: inside an endpoint only known names, since a key might be there by
        mistake."""
        inside = place.index("endpoint") + 1 if "endpoint" in place else len(place)
        return [*place[:inside], *(p if p in cls.model_fields else "***" for p in place[inside : inside + 1])]

    def limits(self) -> dict[str, Any]:
        """Only the limits, as arguments of `generate`."""
        return {name: getattr(self, name) for name in Limits.model_fields}


def _holds_a_key(value: Any) -> bool:
    """Whether a field that holds a key is somewhere in the fields of a body, as in headers that some servers take there."""
    if isinstance(value, dict):
        letters = [re.sub(r"[^a-z]", "", str(name).lower()) for name in value]
        return any(n in SECRET or n.endswith(SECRET_ENDS) for n in letters) or any(map(_holds_a_key, value.values()))
    return isinstance(value, list) and any(map(_holds_a_key, value))


def _plain(value: str) -> str:
    """A base URL in its one form."""
    try:
        parts = urlsplit(value)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port >= 0)
    except ValueError:
        known = None
    if not known or not value.isprintable():
        raise ValueError("a URL begins with http:// or https:// and names a host")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("a URL holds no user, password or query; put the key into a variable, named by api_key_env")
    return value.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
