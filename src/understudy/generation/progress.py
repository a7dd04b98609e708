"""How far a long command is: a bar where stderr is a terminal, and plain lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 10.0  # between two lines


@contextmanager
def counting(title: str, total: int | None = None, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show on stderr how many are done.

    Args:
        title: what is counted.
        total: how many there will be, if that is known.
        shown: off, nothing is written.

    Returns:
        A function to call with the number of those that were done since; from any thread.
    """
    console = Console(stderr=True)
    if shown and console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total)
            yield lambda number: bar.advance(task, number)
        return
    lock, begun, done = threading.Lock(), time.monotonic(), 0
    told = begun

    def advance(number: int) -> None:
        nonlocal done, told
        with lock:
            done, now = done + number, time.monotonic()
            if shown and now - told >= SECONDS:
                told = now
                of = f" of {total}" if total is not None else ""
                sys.stderr.write(f"{title}: {done}{of} done, {now - begun:.0f} s\n")
                sys.stderr.flush()

    yield advance
