"""Conversations through a tokenizer's chat template: the text, its tokens, and which of them the assistant wrote."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from understudy.data.batch import IGNORE
from understudy.data.records import reason
from understudy.data.text import shared_length
from understudy.errors import InputError

SECONDS = 10.0
"""Longest time that a template may take for one conversation."""

MARK = "\u241fcontent\u241f"
"""Placeholder of a message's content, to find its position."""

Messages = Sequence[Mapping[str, Any]]


def render(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, ask: bool = False, tools: list[Any] | None = None
) -> str:
    """Render messages with the tokenizer's chat template.

    Args:
        ask: end with the generation prompt.
        tools: the template's argument `tools`.

    Raises:
        InputError: there is no template, or it fails, refuses the messages or does not terminate.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "The data holds messages and the tokenizer has no chat template. Use a tokenizer with one "
            "(data.tokenizer=...), or prompt + completion columns."
        )
    try:
        with _watch.limited():
            return str(
                tokenizer.apply_chat_template(
                    [dict(m) for m in messages], tools=tools, tokenize=False, add_generation_prompt=ask
                )
            )
    except Exception as error:  # a template is a program and may raise any type
        roles = ", ".join(str(m.get("role")) for m in messages[:20])
        raise InputError(
            f"The tokenizer's chat template refuses a conversation of {roles}: {reason(error)} Fix the messages, or "
            "choose another template (data.tokenizer)."
        ) from error


class _TooLong(Exception):
    def __str__(self) -> str:
        return f"it takes more than {SECONDS:g} seconds."


class _Watch:
    """A single thread that stops renderings that take too long, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Raise `_TooLong` in the block after `SECONDS`."""
        me = threading.get_ident()
        with self._lock:
            self._ends[me] = time.monotonic() + SECONDS
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._ends.pop(me, None)

    def _look(self) -> None:
        while True:
            time.sleep(0.1)
            with self._lock:
                if not self._ends:
                    self._thread = None
                    return
                for thread in [t for t, end in self._ends.items() if time.monotonic() > end]:
                    del self._ends[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooLong))


_watch = _Watch()


def conversation_tokens(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, first: int = 0, tools: list[Any] | None = None
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation.

    The assistant's messages from message `first` on are trained on, save those of `weight` 0, each with the end token that the template adds and
    without the generation prompt. A token that overlaps with a message counts. If the template adds no end, the token
    after the message is its end: the first of the next message, or EOS.

    Raises:
        InputError: the template fails, or changes messages so that they cannot be found.
    """
    text = render(messages, tokenizer, tools=tools)
    if not tokenizer.is_fast:
        raise InputError(
            f"Tokenizer {type(tokenizer).__name__} gives no offsets, so the answers in a conversation cannot be told from the "
            "rest. Use a fast one (tokenizer.json)."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    labels = [IGNORE] * len(ids)
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if i < first or message["role"] != "assistant" or (i == 0 and not content) or message.get("weight") == 0:
            continue
        after = render(messages[: i + 1], tokenizer, tools=tools)
        before = (
            render(messages[:i], tokenizer, ask=True, tools=tools) if i else _beginning(messages[0], tokenizer, tools)
        )
        start, end = _turn(text, before, after, content, i)
        for k, (a, b) in enumerate(offsets):
            if a < end and b > start and b > a:
                labels[k] = ids[k]
        if content and text[start:end].endswith(content):
            following = next((k for k, (a, b) in enumerate(offsets) if a >= end and b > a), None)
            if following is not None:
                labels[following] = ids[following]
            elif tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
                labels.append(tokenizer.eos_token_id)
    return ids, labels


def _beginning(message: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None) -> str:
    """The template's text before the content of a first message, which has no generation prompt."""
    return render([{**message, "content": MARK}], tokenizer, tools=tools).partition(MARK)[0]


def _turn(text: str, before: str, after: str, content: str, number: int) -> tuple[int, int]:
    """Start and end of an assistant message in a rendered conversation.

    Args:
        before: the rendered earlier messages, with the generation prompt.
        after: the rendered messages up to this one.
        content: of the message, stripped.
        number: of the message.

    Some templates render the last message differently (with an empty thought, for example), so `after` need not be a
    prefix of `text`; the message is then found by its content, and ends as in `after`.
    """
    start = shared_length(text, before)
    if text.startswith(after):
        return start, len(after)
    own, found = after.rfind(content), text.find(content, start)
    if not content or own < 0 or found < 0:
        raise InputError(
            f"The chat template changes message {number} ({content[:40]!r}) when others follow, so its tokens cannot be "
            "told from the rest. Use a template without such changes (data.tokenizer), or prompt + completion columns."
        )
    ending = after[own + len(content) :]
    end = found + len(content)
    return start, end + shared_length(text[end:], ending)
