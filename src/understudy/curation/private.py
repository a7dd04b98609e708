"""Which parts of a text look private: patterns and names, found in the text and told by token."""

from __future__ import annotations

import re
from collections.abc import Sequence

from understudy.errors import InputError

PATTERNS = (r"[\w.+-]+@[\w-]+\.[\w.-]+", r"\d+")
"""E-mail addresses; numbers, and with them telephone numbers, dates, cards and codes."""


def detector(patterns: Sequence[str] = PATTERNS, names: Sequence[str] = ()) -> re.Pattern[str]:
    """One pattern for all, and for names as whole words in any case.

    Raises:
        InputError: a pattern that is no regular expression, or nothing to look for.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"Pattern {pattern!r} is no regular expression: {error}.") from None
    parts = [f"(?:{p})" for p in patterns] + [rf"(?i:\b{re.escape(name)}\b)" for name in names]
    if not parts:
        raise InputError("There is nothing to look for: give patterns or names.")
    return re.compile("|".join(parts))


def private_tokens(pieces: Sequence[bytes], found: re.Pattern[str]) -> list[bool]:
    """Whether each token overlaps a match in the text that the tokens make.

    Args:
        pieces: the bytes of each token, the space before a word among them; a character may be cut between tokens.
    """
    whole = b"".join(pieces)
    text = whole.decode("utf-8", "surrogateescape")  # what is no character stays one byte
    marked = bytearray(len(whole))
    for match in found.finditer(text):
        start, end = (len(text[:at].encode("utf-8", "surrogateescape")) for at in match.span())
        marked[start:end] = b"\1" * (end - start)
    ends, place = [], 0
    for piece in pieces:
        ends.append(any(marked[place : place + len(piece)]))
        place += len(piece)
    return ends
