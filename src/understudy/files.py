"""The project's own files: damage is an error of one line, writes are atomic, sealed folders hold a hash of each file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from understudy.errors import InputError
from understudy.masking import masked
from understudy.reading import parse_json

COMPLETE = "complete.json"
CARD = "README.md"
"""The model card, which its owner may edit: it is not part of a seal."""


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; `None` if there is no such file.

    Raises:
        InputError: the file is damaged or does not hold an object.
    """
    try:
        value = parse_json(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}.") from error
    except InputError as error:
        raise InputError(f"{path} is damaged: {error} Put the file back as it was written.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it holds a {type(value).__name__}, not an object with keys.")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with secrets masked."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(masked(value), indent=1))


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record to a log of JSON lines.

    Raises:
        InputError: as `writing`.
    """
    with writing(path), path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_log(
    path: Path, whole: Callable[[dict[str, Any]], bool] = lambda record: True
) -> tuple[list[dict[str, Any]], int]:
    """The records of a log of JSON lines, and the number of damaged lines.

    Args:
        whole: a further condition on a record.

    A record is an object whose `step` is a finite number, 0 or more. An incomplete last line after a kill is left out
    and not counted, since its step is repeated.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    last = lines.pop()  # empty if the file ends with a complete line
    if _record(last) is not None:
        lines.append(last)
    records = [_record(line) for line in lines]
    kept = [r for r in records if r is not None and whole(r)]
    return kept, len(records) - len(kept)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
        step = value["step"]
        return value if not isinstance(step, bool) and math.isfinite(step) and step >= 0 else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors while `path` is written (full disk, no permission) into an `InputError` of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be written: {_reason(error)}. Free space, change permissions or choose another output; the "
            "same command goes on from what is whole."
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which replaces `path` atomically at the end of the block.

    Raises:
        InputError: as `writing`.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())[:200].rstrip(".")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Mark a folder as complete: `complete.json` with the hash of each of its files, flushed, and renamed into place
    last. The model card is left out."""
    with writing(folder / COMPLETE):
        digests = {
            p.relative_to(folder).as_posix(): digest(p)
            for p in sorted(folder.rglob("*"))
            if p.is_file() and p.relative_to(folder).as_posix() not in (COMPLETE, COMPLETE + ".tmp", CARD)
        }
        temporary = folder / (COMPLETE + ".tmp")
        with temporary.open("w") as file:
            json.dump(digests, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / COMPLETE)


def differing(folder: Path, digests: Mapping[str, Any]) -> str | None:
    """The first file of a folder that is missing or whose hash differs from the given one, or `None`."""
    for name, wanted in digests.items():
        if not (folder / name).is_file() or digest(folder / name) != wanted:
            return name
    return None


def check_seal(folder: Path) -> None:
    """Compare the files of a folder with its seal, if it has one.

    Raises:
        InputError: a file is missing or was changed since.
    """
    name = differing(folder, read_json(folder / COMPLETE) or {})
    if name is not None:
        raise InputError(
            f"{folder} is not as it was saved: {name} is missing or has another hash than {COMPLETE} says. Put the file "
            f"back, or train again; if the change is meant, delete {COMPLETE}."
        )
