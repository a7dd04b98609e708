"""Progress of a long command: a bar if stderr is a terminal, else plain lines."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 10.0  # between lines


@contextmanager
def counting(title: str, total: int | None = None, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show the number of finished items on stderr.

    Args:
        title: what is counted.
        total: number of items, if known.
        shown: False shows nothing.

    Returns:
        A thread-safe function to call with the number of newly finished items.
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
