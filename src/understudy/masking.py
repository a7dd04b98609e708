"""Secrets: values of known fields (tokens, keys, passwords) stay in this process and are masked in all output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
FIELDS = (
    "hub_token token access_token auth_token api_token hf_token bearer_token api_key apikey x_api_key password passwd "
    "secret client_secret authorization proxy_authorization"
).split()
"""Names of fields that hold a secret, in lower case; a hyphen counts as an underscore."""

_NAMES = "|".join(name.replace("_", "[_-]") for name in FIELDS)
_VALUE = r"(?!\*\*\*)[^\s'\",;)}\]]+"
_PATTERNS = (
    re.compile(rf"(?i)((?<![\w-])(?:{_NAMES})\s*=\s*['\"]?){_VALUE}"),
    re.compile(rf"(?i)(['\"](?:{_NAMES})['\"]\s*:\s*['\"]?){_VALUE}"),
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}"),
    re.compile(r"(://)[^/\s@'\"]+(?=@)"),
)
_SHORTEST = 6  # a shorter secret would match inside ordinary words
_seen: set[str] = set()


def is_secret(key: Any) -> bool:
    """Whether a field of this name holds a secret."""
    return isinstance(key, str) and key.lower().replace("-", "_") in FIELDS


def remember(values: Any, secret: bool = False) -> None:
    """Record the secrets in nested values, so that a text that repeats one of them later is masked too."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            remember(value, secret or is_secret(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            remember(value, secret)
    elif secret and isinstance(values, (str, int)) and len(str(values)) >= _SHORTEST and values != MASK:
        _seen.add(str(values))


def masked_text(text: str) -> str:
    """`text` without secrets: values of known fields, the user part of a URL, and all values recorded by `remember`."""
    for value in sorted(_seen, key=len, reverse=True):
        text = text.replace(value, MASK)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return text


def masked(values: Any) -> Any:
    """Nested plain values with each secret replaced, for display and storage."""
    if isinstance(values, Mapping):
        return {k: _hidden(v) if is_secret(k) else masked(v) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return [masked(v) for v in values]
    return masked_text(values) if isinstance(values, str) else values


def _hidden(value: Any) -> Any:
    """A mask, unless the field is not set or is a switch (`token: true`)."""
    return value if value is None or isinstance(value, bool) else MASK
