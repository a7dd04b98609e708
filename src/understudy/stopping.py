"""Signals that ask a process to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
AGAIN = 1.0
"""Seconds within which a further signal is the same request: `timeout`, launchers and shells signal a process and then
its group."""


def left_to_parent(number: int, frame: Any) -> None:
    """The handler of a worker for signals of the whole group, as Ctrl-C is: its parent gets them too and stops it."""


def listen(handler: Callable[[int, Any], Any], numbers: tuple[int, ...] = SIGNALS) -> dict[int, Any]:
    """Have a handler called for signals that ask to stop; returns the former handlers, for `restore`.

    SIGHUP stays ignored under `nohup`, and signals that a worker leaves to its parent are left. Only the main thread may
    set handlers: elsewhere there are none.
    """
    before: dict[int, Any] = {}
    with suppress(ValueError):
        for number in numbers:
            now = signal.getsignal(number)
            if now is left_to_parent or (now is signal.SIG_IGN and number == getattr(signal, "SIGHUP", None)):
                continue
            before[number] = signal.signal(number, _of_closed_terminal(number, handler))
    return before


def restore(before: Mapping[int, Any]) -> None:
    """Put former handlers back."""
    with suppress(ValueError):
        for number, handler in before.items():
            signal.signal(number, handler)


def _of_closed_terminal(number: int, handler: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
    """A handler that first turns output away from a terminal that is gone, where writing would fail."""
    if number != getattr(signal, "SIGHUP", None):
        return handler

    terminals = [output for output in (1, 2) if os.isatty(output)]  # one that is gone no longer says that it was one

    def turned(number: int, frame: Any) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in terminals:
            os.dup2(nowhere, output)
        os.close(nowhere)
        handler(number, frame)

    return turned
