"""Several servers of one model: each has its share of the requests, and a request log of its own."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from understudy.generation.endpoint import EndpointSource, served_name
from understudy.generation.limits import Endpoint
from understudy.generation.log import RequestLog, tally
from understudy.generation.request import Completion, Request, Source


class ServerPool:
    """A model behind several servers. Which of them completes a request depends on the request's content alone.

    Its name is that of the same model behind one server, and so are the seeds that it sends.

    Args:
        model: the servers' name of the model. endpoint: with their addresses.
    """

    def __init__(self, model: str, endpoint: Endpoint) -> None:
        self.name = served_name(model, endpoint)
        self.servers = [EndpointSource(model, server) for server in endpoint.servers]

    def complete(self, request: Request) -> Completion:
        """Generate one completion, at the request's server; raises what `EndpointSource.complete` raises."""
        return self.servers[share(request.key(self.name), len(self.servers))].complete(request)


def share(key: str, number: int) -> int:
    """Which of `number` shards a request is in, by its key."""
    return int(key[:16], 16) % number


class ShardedLog:
    """The request log of a model that one or several servers serve, in a file for each server.

    `NAME.jsonl` has the answers of one server; `NAME-00000-of-00002.jsonl` those of the first of two. Every answer of the
    model in any such file is used, so a run goes on with other servers, or another number of them.

    Args:
        path: `NAME.jsonl`. source: name of the model's source. number: of servers.

    Raises:
        InputError: as `RequestLog`, of any of the files.
    """

    def __init__(self, path: str | Path, source: str, number: int = 1) -> None:
        self.path, self.source = Path(path), source
        with ExitStack() as stack:
            files = shard_files(self.path, number)
            # Those on disk first: if one is of another model, no new file is left beside it.
            every = sorted([*files, *_found(self.path, files)], key=lambda file: not file.exists())
            opened = {file: stack.enter_context(RequestLog(file, source)) for file in every}
            self._open = stack.pop_all()
        self.shards = [opened[file] for file in files]
        self._logs = list(opened.values())

    @property
    def prompt_tokens(self) -> int:
        return sum(log.prompt_tokens for log in self._logs)

    @property
    def tokens(self) -> int:
        return sum(log.tokens for log in self._logs)

    def __len__(self) -> int:
        return sum(map(len, self._logs))

    def __contains__(self, key: str) -> bool:
        return any(key in log for log in self._logs)

    def __getitem__(self, key: str) -> Completion:
        found = self.get(key)
        if found is None:
            raise KeyError(key)
        return found

    def get(self, key: str) -> Completion | None:
        """The completion of a request, or `None` if there is none."""
        return next((log[key] for log in self._logs if key in log), None)

    def key(self, request: Request) -> str:
        """The key that a request's completion is under, or will be."""
        key = request.key(self.source)
        if key in self:
            return key
        former = (log.key(request) for log in self._logs if log.former)
        return next((found for found in former if found in self), key)

    def append(self, key: str, name: str, completion: Completion) -> None:
        """Store a completion in its shard; see `RequestLog.append`."""
        self.shards[share(key, len(self.shards))].append(key, name, completion)

    def sync(self) -> None:
        """Flush everything to disk now."""
        for log in self._logs:
            log.sync()

    def close(self) -> None:
        """Flush everything to disk and release the locks."""
        self._open.close()

    def __enter__(self) -> ShardedLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def log_of(source: Source, path: Path) -> ShardedLog:
    """The log of a source, with a shard for each of its servers."""
    return ShardedLog(path, source.name, len(source.servers) if isinstance(source, ServerPool) else 1)


def shard_files(path: Path, number: int) -> list[Path]:
    """The file of each of `number` servers."""
    if number == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i:05d}-of-{number:05d}{path.suffix}") for i in range(number)]


def tally_all(path: Path) -> tuple[int, int, int]:
    """Answers, prompt tokens and written tokens of a model, over all its shards on disk."""
    requests, read, written = zip(*map(tally, [path, *_found(path, [path])]), strict=True)
    return sum(requests), sum(read), sum(written)


def _found(path: Path, without: list[Path]) -> list[Path]:
    """The files on disk that hold answers of the model, but those of a list."""
    shard = re.compile(rf"{re.escape(path.stem)}(-\d{{5}}-of-\d{{5}})?{re.escape(path.suffix)}")
    files = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    return [file for file in files if shard.fullmatch(file.name) and file not in without]
