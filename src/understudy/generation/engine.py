"""The generation engine: runs many requests concurrently, each answered once, within a budget, and resumes after a
kill."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from understudy.errors import InputError, nearest
from understudy.generation.budget import Budget, Spent
from understudy.generation.limits import LONGEST_WAIT, Limits
from understudy.generation.log import RequestLog
from understudy.generation.pool import ServerPool, ShardedLog, share
from understudy.generation.progress import counting
from understudy.generation.request import Completion, RefusedRequest, Request, Source, SourceError

log = logging.getLogger(__name__)
GIVE_UP = 20  # consecutive failed requests after which the source counts as down or misconfigured


class FailedRequests(InputError):
    """Some requests were not answered; the answers of the others are in the log.

    Args:
        failed: request id → reason.
    """

    def __init__(self, message: str, failed: Mapping[str, str]) -> None:
        super().__init__(message)
        self.failed = dict(failed)


class BudgetSpent(InputError):
    """The next request might exceed the budget. Completions already paid for are in the log."""


class _Stopped(Exception):
    """The workers are stopping: this request is left for the next run."""


def generate(
    source: Source,
    requests: Sequence[Request],
    log: RequestLog | ShardedLog,
    *,
    progress: bool = False,
    budget: Budget | None = None,
    before: Spent | None = None,
    **limits: Any,
) -> list[Completion]:
    """Complete requests, from the log if it holds them, else from the source.

    Args:
        source: who writes; each server of a `ServerPool` gets its share. log: opened for `source.name`, and for as many
            servers if it is sharded.
        progress: show a bar on stderr, or lines where that is no terminal.
        budget: of all models of a run. before: what the run's other models have spent of it.
        limits: the fields of `Limits`: `concurrency`, `rate`, `retries`, `backoff`, `longest_backoff`, `token_budget`,
            `cost_budget`, `price_in`, `price_out`. `concurrency` and `rate` hold at each server, budgets over all.

    Returns:
        One completion per request, in order. Requests with equal content share one.

    A completion is in the log before its worker takes the next request, so a kill loses only the completions in flight
    (at most `concurrency` of each server). If a server fails, the others finish their shares first. Before a request is sent, the most that it may use is reserved from the budget; budgets
    include everything in the log. What a server charged for a lost response is unknown.

    Raises:
        BudgetSpent: the budget does not cover the next request.
        FailedRequests: requests that were refused, or failed at every attempt.
        InputError: the source cannot complete any request (key, address, model), or a limit is invalid.
    """
    bounds = _limits(limits)
    if log.source != source.name:
        raise InputError(f"Log {log.path} is open for source {log.source!r}, and the source is {source.name!r}.")
    crews = _crews(source, log, bounds, _Purse(bounds, log, budget or Budget(), before or Spent()))
    keys = [log.key(request) for request in requests]
    for key, request in zip(keys, requests, strict=True):
        crew = crews[share(key, len(crews))]
        if key not in log and key not in crew.names:
            crew.names[key] = request.id
            crew.todo.append((key, request))
    run_together(crews, progress)
    return [log[key] for key in keys]


def _crews(source: Source, log: RequestLog | ShardedLog, limits: Limits, purse: _Purse) -> list[Crew]:
    """A crew for each server, which share a purse."""
    if not isinstance(source, ServerPool):
        return [Crew(source, log, limits, purse)]
    logs = log.shards if isinstance(log, ShardedLog) else [log] * len(source.servers)
    if len(logs) != len(source.servers):
        raise InputError(f"Log {log.path} is open for {len(logs)} servers, and the source has {len(source.servers)}.")
    return [Crew(s, own, limits, purse, s.url) for s, own in zip(source.servers, logs, strict=True)]


def _limits(values: Mapping[str, Any]) -> Limits:
    for name in values:
        if name not in Limits.model_fields:
            raise InputError(f"Unknown limit {name!r}.{nearest(name, Limits.model_fields)}")
    try:
        return Limits(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        at = f"{where} = {first['input']!r}: " if where else ""
        raise InputError(f"Bad limit: {at}{first['msg'].removeprefix('Value error, ')}.") from None


class Crew:
    """Worker threads on one list of requests, and their shared state.

    Args:
        source, log: complete requests and keep the results. Other kinds of requests and results than text use their own
            (`teachers.server`): the result of `complete` is given to `append`.
        purse: shared with other crews; else its own. server: address, if the source is one of several servers.
    """

    def __init__(self, source: Any, log: Any, limits: Limits, purse: _Purse | None = None, server: str = "") -> None:
        self.source, self.log, self.limits, self.server = source, log, limits, server
        self.todo: deque[tuple[str, Any]] = deque()
        self.names: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.fatal: BaseException | None = None
        self.in_a_row = 0
        self.warned = self.left_out = False
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.purse = purse or _Purse(limits, log, Budget(), Spent())
        self.pace = _Pace(limits.rate)
        self.beside: Sequence[Crew] = ()

    def run(self, progress: bool) -> None:
        """Work through the list, and raise what `generate` raises."""
        run_together([self], progress)

    def threads(self, advance: Callable[[], None]) -> list[threading.Thread]:
        """The workers, to be started."""
        number = min(self.limits.concurrency, len(self.todo))
        return [threading.Thread(target=self._work, args=(advance,), daemon=True) for _ in range(number)]

    @property
    def kept(self) -> str:
        """How many of its requests are answered, and where."""
        total = len(self.names)
        left = sum(key not in self.log for key in self.names)
        where = f"of {self.server} " if self.server else ""
        return f"{total - left} of {total} new requests {where}are answered and kept in {self.log.path}"

    @property
    def trouble(self) -> str:
        """Which requests failed, and why; empty if none did."""
        at = f"Server {self.server}: " if self.server else ""
        if self.fatal is not None:
            return f"{at}{str(self.fatal).removeprefix(f'{self.server}: ').rstrip('.')}."
        if not self.failed:
            return ""
        some = ", ".join(list(self.failed)[:5]) + (", …" if len(self.failed) > 5 else "")
        reason = next(reversed(self.failed.values())).removeprefix(f"{self.server}: ")
        early = f" Stopped early: {GIVE_UP} requests in a row failed." if self.todo else ""
        return f"{at}{len(self.failed)} requests failed ({some}), the last one: {reason.rstrip('.')}.{early}"

    def halt(self) -> None:
        """Stop sending requests."""
        self.stop.set()
        self.purse.wake()

    def _work(self, advance: Any) -> None:
        try:
            while not self.stop.is_set():
                with self.lock:
                    if not self.todo:
                        return
                    key, request = self.todo.popleft()
                if not self.purse.reserve(request, self.stop):
                    return self.halt()
                try:
                    self.log.append(key, request.id, self._ask(request))
                    self.in_a_row = 0
                    advance()
                except (SourceError, RefusedRequest) as error:
                    self._failure(request, str(error))
                finally:
                    self.purse.settle(request)
        except _Stopped:
            return
        except BaseException as error:  # raised again in the caller's thread
            with self.lock:
                self.fatal = self.fatal or error
            self.halt()
            if isinstance(error, InputError):
                return self._leave_out()
            for crew in self.beside:
                crew.halt()

    def _failure(self, request: Any, reason: str) -> None:
        with self.lock:
            self.failed[request.id] = reason
            self.in_a_row += 1
        if self.in_a_row >= GIVE_UP:
            self.halt()
            self._leave_out()

    def _leave_out(self) -> None:
        """Say at once that a server of several is asked no more; its share is missing at the end."""
        with self.lock:
            first, self.left_out = not self.left_out, True
        if first and self.server:
            log.warning("%s The other servers go on with their shares.", self.trouble)

    def _ask(self, request: Any) -> Any:
        """Send one request, with retries after growing waits."""
        for attempt in range(self.limits.retries + 1):
            self.pace.take(self.stop)
            if self.stop.is_set():
                raise _Stopped
            try:
                return self.source.complete(request)
            except SourceError as error:
                wait = max(error.wait or 0.0, self._backoff(attempt))
                if attempt == self.limits.retries:
                    raise SourceError(f"{error}, {attempt + 1} attempts") from None
                if wait > LONGEST_WAIT:
                    raise SourceError(f"{error}; it asks to wait {wait:.0f} s") from None
                if not self.warned:
                    self.warned = True
                    log.warning("A request failed and is tried again: %s", error)
                self.stop.wait(wait)
        raise AssertionError("unreachable")

    def _backoff(self, attempt: int) -> float:
        """Doubles up to the maximum; the jitter (half to all of it) keeps workers from retrying at the same moment."""
        return min(self.limits.longest_backoff, self.limits.backoff * 2.0 ** min(attempt, 60)) * random.uniform(0.5, 1)


def run_together(crews: Sequence[Crew], progress: bool) -> None:
    """Have crews work at the same time, until each has finished or stopped; raises what `generate` raises."""
    with counting("completions", sum(len(c.todo) for c in crews), shown=progress) as advance:
        threads = [thread for crew in crews for thread in crew.threads(lambda: advance(1))]
        for crew in crews:
            crew.beside = crews
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            for crew in crews:
                crew.halt()
            log.warning("Stopping: waiting for the answers in flight. Ctrl-C again leaves without them.")
            for thread in threads:
                thread.join()
            raise
    for crew in crews:
        crew.log.sync()
    _report(crews)


def _report(crews: Sequence[Crew]) -> None:
    """Raise an error for what is missing, with what each crew has kept."""
    fatal = [crew.fatal for crew in crews if crew.fatal is not None]
    for error in fatal:
        if len(crews) == 1 or not isinstance(error, InputError):
            raise error
    purse, failed = crews[0].purse, {name: why for crew in crews for name, why in crew.failed.items()}
    kept = ", ".join(crew.kept for crew in crews if crew.names)
    missing = (
        f"{' '.join(filter(None, (crew.trouble for crew in crews)))} {kept}; starting again sends only what is missing."
    )
    if fatal:
        raise InputError(missing)
    if purse.empty:
        also = f" {len(failed)} requests failed." if failed else ""
        raise BudgetSpent(f"{purse.what}{also} {kept}. Raise the budget and start again: nothing is paid for twice.")
    if failed:
        raise FailedRequests(missing, failed)


class _Purse:
    """Requests, tokens and money: reserved before a request is sent, settled by what it used."""

    def __init__(self, limits: Limits, log: Any, budget: Budget, before: Spent) -> None:
        self.limits, self.log, self.budget, self.before = limits, log, budget, before
        self.held = self.held_in = self.held_out = 0
        self.empty = False
        self.what = ""
        self.changed = threading.Condition()

    def _over(self, prompt: int, written: int) -> str:
        """The budget that these tokens would exceed, with those reserved and used; empty if they fit."""
        prompt, written = prompt + self.held_in + self.log.prompt_tokens, written + self.held_out + self.log.tokens
        limits = self.limits
        if limits.token_budget is not None and prompt + written > limits.token_budget:
            used = self.log.prompt_tokens + self.log.tokens
            return f"The token budget of {limits.token_budget} does not cover the next request: {used} are used."
        if limits.cost_budget is not None and limits.cost(prompt, written) > limits.cost_budget:
            used_cost = limits.cost(self.log.prompt_tokens, self.log.tokens)
            return (
                f"The cost budget of {limits.cost_budget:g} does not cover the next request: {used_cost:.4g} is used."
            )
        if self.budget == Budget():
            return ""
        answered, own = len(self.log), (self.log.prompt_tokens, self.log.tokens)
        used = self.before + Spent(answered, *own, limits.cost(*own))
        next_one = Spent(answered + self.held + 1, prompt, written, limits.cost(prompt, written))
        return self.budget.exceeded(self.before + next_one, used)

    def reserve(self, request: Any, stop: threading.Event) -> bool:
        """Wait until the request fits beside those in flight. False if it never will, or the workers stop."""
        prompt, written = request.most_tokens()
        with self.changed:
            while over := self._over(prompt, written):
                if stop.is_set() or self.empty:
                    return False
                if self.held == 0:
                    self.empty, self.what = True, over
                    return False
                self.changed.wait()
            if self.empty:  # another crew has found it so
                return False
            self.held += 1
            self.held_in, self.held_out = self.held_in + prompt, self.held_out + written
            return True

    def settle(self, request: Any) -> None:
        """Release the reservation; the log counts the actual use by now."""
        prompt, written = request.most_tokens()
        with self.changed:
            self.held -= 1
            self.held_in, self.held_out = self.held_in - prompt, self.held_out - written
            self.changed.notify_all()

    def wake(self) -> None:
        """Notify the waiting threads."""
        with self.changed:
            self.changed.notify_all()


class _Pace:
    """A rate limit of `rate` attempts per second, evenly spaced."""

    def __init__(self, rate: float | None) -> None:
        self.gap, self.next, self.lock = (1 / rate if rate else 0.0), time.monotonic(), threading.Lock()

    def take(self, stop: threading.Event) -> None:
        """Wait for the next free moment."""
        if not self.gap:
            return
        with self.lock:
            mine = max(self.next, time.monotonic())
            self.next = mine + self.gap
        stop.wait(max(0.0, mine - time.monotonic()))
