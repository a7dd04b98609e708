"""The exception for bad input: a single line that names the thing, both sides and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from understudy.masking import masked_text

_ENDLESS = re.compile(r"(\S{200})\S{300,}")


class InputError(ValueError):
    """Bad input. The command line prints it as one line and exits with code 2, without a traceback.

    Secrets in the message are masked, and overlong words are truncated.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_ENDLESS.sub(r"\1…", masked_text(message)))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def with_article(word: str) -> str:
    """`word` after "a" or "an"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
