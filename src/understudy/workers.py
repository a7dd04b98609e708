"""Worker processes that run jobs in parallel and end with the process that started them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any

import torch

from understudy.errors import InputError
from understudy.stopping import SIGNALS, left_to_parent

Work = Callable[..., Any]
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""For small models, processes with one thread each use the cores better than one process with many threads."""


def processes() -> BaseContext:
    """The context of worker processes: forked from a server that imports the library while teachers are trained.

    A forked process cannot use a GPU that its parent has used, so with a GPU each worker is spawned.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods() or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    from multiprocessing.forkserver import ensure_running

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["understudy.runs.run"])
    with _environment(THREADS):
        ensure_running()
    return context


def carry_out(
    work: Work,
    jobs: Sequence[tuple[Any, ...]],
    workers: int | None,
    context: BaseContext,
    tracked: Callable[[Iterator[int]], Iterable[int]] = iter,
) -> list[Any]:
    """Run `work(*job)` for each job in processes with one thread each; results are in the order of the jobs.

    An error of one job is raised here, after the other workers were stopped as with Ctrl-C.

    Args:
        workers: number of processes; by default one per GPU, or one per core without a GPU.
        tracked: called with the number of each finished job.
    """
    crew = _Crew(work, jobs, min(workers or _places(), len(jobs)), context)
    try:
        for _ in tracked(crew.run()):
            pass
    finally:
        crew.stop()
    return [crew.results[i] for i in range(len(jobs))]


def _places() -> int:
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Crew:
    """The workers, the job of each, and the results."""

    def __init__(self, work: Work, jobs: Sequence[tuple[Any, ...]], number: int, context: Any) -> None:
        self.waiting = list(enumerate(jobs))[::-1]
        self.results: dict[int, Any] = {}
        self.members: dict[Connection, Any] = {}
        self.busy: set[Connection] = set()
        for i in range(number):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, work))
            with _without_main(), _environment({**THREADS, **_gpu(i)}):
                process.start()
            there.close()
            self.members[here] = process

    def run(self) -> Iterator[int]:
        """Distribute the jobs; yields the number of each as it finishes."""
        for member in self.members:
            self._next(member)
        while self.busy:
            ready: Any = wait(list(self.busy))
            for member in ready:
                number, result, error = self._answer(member)
                self.busy.discard(member)
                if error is not None:
                    raise error
                self.results[number] = result
                self._next(member)
                yield number

    def _answer(self, member: Connection) -> tuple[int, Any, BaseException | None]:
        try:
            found: tuple[int, Any, BaseException | None] = member.recv()
            return found
        except (EOFError, OSError):
            self.members[member].join()
            raise InputError(
                f"A worker process ended with exit code {self.members[member].exitcode}, perhaps for want of memory. The "
                "same command goes on from what is saved; fewer workers (--workers) need less."
            ) from None

    def _next(self, member: Connection) -> None:
        if self.waiting:
            self.busy.add(member)
            member.send(self.waiting.pop())

    def stop(self) -> None:
        """End idle workers; busy ones write a checkpoint and stop, or stop at once if they are asked again."""
        for member, process in self.members.items():
            if member in self.busy:
                process.terminate()
            with suppress(OSError):
                member.send(None)
        try:
            for process in self.members.values():
                process.join()
        except KeyboardInterrupt:
            for member in self.busy:
                self.members[member].terminate()
            raise


def _serve(connection: Connection, work: Work) -> None:
    """Run jobs until there are no more, or the parent has ended."""
    for number in (s for s in SIGNALS if s != signal.SIGTERM):
        signal.signal(number, left_to_parent)
    gc.freeze()  # Each training has a full collection, which takes longer than many a small one: it skips what is imported.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Workers of data loaders end with the process that started them, which must be this one and no server of forks.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while (job := connection.recv()) is not None:
            number, arguments = job
            try:
                connection.send((number, work(*arguments), None))
            except BaseException as error:
                if not isinstance(error, (InputError, KeyboardInterrupt)):
                    error.add_note(traceback.format_exc())
                connection.send((number, None, error))
    gc.unfreeze()


def _end_with_parent() -> None:
    """Wait for the end of the parent, which cannot notify its workers if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _gpu(number: int) -> dict[str, str]:
    """Environment variables that make a single GPU visible to a worker."""
    if not torch.cuda.is_available():
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": names[number % len(names)]}


@contextmanager
def _without_main() -> Iterator[None]:
    """Start processes without importing the caller's script, which may have no main guard or no file."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that children inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
