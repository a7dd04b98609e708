"""The request log: every paid completion, keyed by the content of its request, so that nothing is paid for twice."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from understudy.errors import InputError
from understudy.generation.limits import MOST_TOKENS
from understudy.generation.request import Completion, Request

log = logging.getLogger(__name__)
FORMAT = 1
SYNC_SECONDS = 1.0
SERVED = re.compile(r"^https?://\S+ ")  # how the name of a served model began before version 0.11


class RequestLog:
    """An append-only file of JSON lines: a header that names the source, then one completion per line.

    A line is handed to the operating system before `append` returns, so a killed process loses none. Lines are flushed
    to disk once a second and at the end, so a power failure may lose about one second. An incomplete last line is
    removed on reopening. Only one process may write a log at a time.

    Args:
        path: the file, created if it does not exist.
        source: `Source.name` of the source. A log of another source is refused. Before version 0.11 a served model was named
            with its address; such a log is one of the model, and its answers are found.

    Raises:
        InputError: the log belongs to another source, another process has it open, or the file is not a log.
    """

    def __init__(self, path: str | Path, source: str) -> None:
        self.path, self.source, self.former = Path(path), source, ""
        self.prompt_tokens = self.tokens = 0
        self._known: dict[str, Completion] = {}
        self._lock = threading.Lock()
        self._synced = time.monotonic()
        if self.path.exists() and not self.path.is_file() and not self.path.is_dir():
            raise InputError(f"Request log {self.path} is no regular file. Choose another path.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        except IsADirectoryError:
            raise InputError(f"Request log {self.path} is a folder, not a file. Choose another path.") from None
        try:
            self._claim()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _claim(self) -> None:
        try:
            import fcntl
        except ImportError:  # this system has no file locks
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"Request log {self.path} is being written by another process. Wait for it, or choose another log."
            ) from None

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        lines = data.split(b"\n")
        last = lines.pop()  # empty if the file ends with a complete line
        self._end = len(data) - len(last)
        header = json.dumps({"format": FORMAT, "source": self.source}).encode()
        # A file is changed only once it is known to be a log: its header, or the beginning of one.
        if lines:
            self._check_header(lines[0])
        elif not header.startswith(last):
            self._check_header(last)
        if last and lines and _record(last) is not None:  # complete except for its newline
            lines.append(last)
            self._write(b"\n", len(data))
        elif last:
            self._file.truncate(self._end)
        if not lines:
            self._write(header + b"\n", self._end)
            return
        damaged = 0
        for line in lines[1:]:
            record = _record(line)
            if record is None:
                damaged += bool(line)
            elif record[0] not in self._known:
                self._keep(*record)
        if damaged:
            lines_are = "damaged line is" if damaged == 1 else "damaged lines are"
            log.warning("%s: %d %s left out; the requests will be sent again.", self.path, damaged, lines_are)

    def _check_header(self, line: bytes) -> None:
        try:
            header = json.loads(line)
            version, written = header["format"], header["source"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.path} is not a request log: its first line names no source.") from None
        if version != FORMAT:
            raise InputError(f"Request log {self.path} has format {version!r} and this version reads {FORMAT}.")
        if isinstance(written, str) and SERVED.sub("served ", written) == self.source:
            self.former = written
        if written != (self.former or self.source):
            raise InputError(
                f"Request log {self.path} belongs to source {written!r} and the source is {self.source!r} now. "
                "Choose another log, or delete this one."
            )

    def _keep(self, key: str, completion: Completion) -> None:
        self._known[key] = completion
        self.prompt_tokens += completion.prompt_tokens
        self.tokens += completion.tokens

    def _write(self, data: bytes, at: int) -> None:
        """Append completely: an incomplete line, for example on a full disk, is removed."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(at)
            raise
        self._end = at + len(data)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Completion:
        return self._known[key]

    def get(self, key: str) -> Completion | None:
        """The completion of a request, or `None` if there is none."""
        return self._known.get(key)

    def key(self, request: Request) -> str:
        """The key that a request's completion is under, or will be."""
        key = request.key(self.source)
        if self.former and key not in self and request.key(self.former) in self:
            return request.key(self.former)
        return key

    def append(self, key: str, name: str, completion: Completion) -> None:
        """Store a completion. The first one of a key is kept; `name` is the request's id, for readers of the file."""
        line = json.dumps({"key": key, "id": name, **asdict(completion)}, allow_nan=False).encode() + b"\n"
        with self._lock:
            if key in self._known:
                return
            self._write(line, self._end)
            self._keep(key, completion)
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def sync(self) -> None:
        """Flush everything to disk now."""
        with self._lock:
            self._sync()

    def close(self) -> None:
        """Flush everything to disk and release the lock."""
        with self._lock:
            if not self._file.closed:
                self._sync()
                self._file.close()

    def __enter__(self) -> RequestLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def tally(path: Path) -> tuple[int, int, int]:
    """Answers, prompt tokens and written tokens of a log, as it is on disk; zeros where there is none."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    known: dict[str, Completion] = {}
    for record in filter(None, map(_record, lines[1:])):
        known.setdefault(*record)
    found = known.values()
    return len(known), sum(c.prompt_tokens for c in found), sum(c.tokens for c in found)


def _record(line: bytes) -> tuple[str, Completion] | None:
    """Key and completion of a line, or `None` if it is incomplete."""
    try:
        values: dict[str, Any] = json.loads(line)
        key, text, finish, log_prob = (values[name] for name in ("key", "text", "finish", "log_prob"))
        counts = [values["prompt_tokens"], values["tokens"]]
        if not isinstance(key, str) or not isinstance(text, str) or finish not in ("stop", "length"):
            return None
        if any(type(count) is not int or not 0 <= count <= MOST_TOKENS for count in counts):
            return None
        if log_prob is not None and (type(log_prob) not in (int, float) or not math.isfinite(log_prob)):
            return None
        return key, Completion(text, finish, log_prob, *counts)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
