"""Locations of data: the folder `UNDERSTUDY_DATA`, or a path; and the split that a file's or folder's name indicates."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from understudy.errors import InputError
from understudy.reading import at_home

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "eval", "evaluation"},
    "test": {"test", "testing"},
}
"""The names of splits, as in `datasets`; `eval` means validation."""

METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that `datasets` writes beside the records."""

SHARD = re.compile(r"[-._]?(\d+)-of-(\d+)$")
T = TypeVar("T")


def data_folder() -> Path | None:
    """The folder of `UNDERSTUDY_DATA`, or `None` if it is not set."""
    value = os.environ.get("UNDERSTUDY_DATA")
    if not value:
        return None
    folder = Path(value)
    if not folder.is_dir():
        raise InputError(f"UNDERSTUDY_DATA names {folder}, which is not a folder. Correct it or unset it.")
    return folder


def find(name: str) -> Path | None:
    """`name` as a path, or inside the data folder; `None` if neither exists.

    Raises:
        InputError: the name is not a valid path.
    """
    if not name:
        return None
    try:
        path = at_home(Path(name))
        if path.exists():
            return path
        folder = data_folder()
        return folder / name if folder is not None and (folder / name).exists() else None
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, lone surrogates, unknown user
        raise InputError(f"{name[:100]!r} is not a path that can be read: {str(error).splitlines()[0]}") from None


def hub_id(name: str) -> str:
    """`name` to be loaded from the Hub.

    Where the Hub's host has no address, its cache alone is read from here on: its client would try again for most of a
    minute at every file.

    Raises:
        InputError: no name on the Hub has this form.
    """
    from huggingface_hub.constants import ENDPOINT  # slow to import, and most runs load nothing from it
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InputError(
            f"{name!r} is no path that exists, and no name on the Hub (owner/name) has this form."
        ) from None
    _look_up(ENDPOINT)
    return name


@cache
def _look_up(endpoint: str) -> None:
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():  # a proxy looks names up itself
        return
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        logging.getLogger(__name__).warning(
            "%s cannot be reached: until this process ends, only its cache is read.", endpoint
        )
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def visible(folder: Path) -> list[Path]:
    """The content of a folder, sorted by name, without hidden files of tools (`.ipynb_checkpoints`, `__MACOSX`)."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "__")))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}.") from error


def files_below(folder: Path) -> Iterator[Path]:
    """The visible files of a folder and its subfolders; links to folders are not followed."""
    for entry in visible(folder):
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not entry.is_symlink():
            yield from files_below(entry)


def words_of(name: str) -> set[str]:
    """The words of a name, separated by `-`, `.`, `_`, spaces and digits, without the `of` of shards."""
    return set(re.split(r"[-._ \d]+", name.lower())) - {"", "of"}


def split_of(name: str) -> str | None:
    """The split that a file's or folder's name indicates (`train-00000-of-00002`, `my_val`), or `None`.

    Raises:
        InputError: the name indicates two splits.
    """
    found = [split for split, known in SPLITS.items() if words_of(name) & known]
    if len(found) > 1:
        raise InputError(f"{name} names two splits, {' and '.join(found)}. Rename it after one.")
    return found[0] if found else None


def own_names(source: str, names: Iterable[str]) -> dict[str, str]:
    """A source's names of its splits, by this project's names: `val` is the validation split; other names stay.

    Raises:
        InputError: two names for one split.
    """
    return _once(source, [(next((s for s, known in SPLITS.items() if n.lower() in known), n), n) for n in names])


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of each split, where `test_NAME` is a separate split; empty if the folders are not splits.

    They are splits if one has a split in its name and contains folders, or if two have names of splits.

    Raises:
        InputError: two folders for one split.
    """
    inside = [entry for entry in visible(folder) if entry.is_dir()]
    nested = [f for f in inside if any(e.is_dir() for e in visible(f)) and split_of(f.name)]
    found = [(_further(f.name) or split_of(f.name) or "", f.name) for f in inside if f in nested or _plain(f.name)]
    if not nested and len(found) < 2:
        return {}
    return {split: folder / name for split, name in _with_test(_once(str(folder), found)).items()}


def _plain(name: str) -> bool:
    """Whether a name is only that of a split."""
    return len(words_of(name)) == 1 and split_of(name) is not None


def _further(name: str) -> str | None:
    """A separate test set `test_NAME`, without the number of a shard."""
    name = SHARD.sub("", name)
    return name if name.startswith("test_") and words_of(name) != {"test"} else None


def _once(source: str, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for split, name in pairs:
        if split in found:
            raise InputError(f"{source} has {found[split]} and {name}, both the {split} split. Keep one.")
        found[split] = name
    return found


def _with_test(found: dict[str, T]) -> dict[str, T]:
    """Use a single `test_NAME` as the test split if there is no other."""
    more = [split for split in found if split.startswith("test_")]
    return found if "test" in found or len(more) != 1 else {("test" if s in more else s): v for s, v in found.items()}


def split_files(
    folder: Path, suffixes: Collection[str], notes: list[str], *, further: bool = False
) -> dict[str, list[Path]]:
    """The files of each split: those of a folder, and those below `data` or a folder that is named after a split.

    A folder's name takes precedence over a file's. If files are named exactly after a split, they are its files and
    others are noted as left out; otherwise every file with the split's word in its name is. The files of one split are
    its shards. If no name indicates a split, all files are the training split.

    Args:
        suffixes: of the files to consider.
        further: whether `test_NAME` is a separate split.

    Raises:
        InputError: two names or formats for one split, or a missing shard.
    """
    groups: dict[str, list[Path]] = {}
    unnamed = []
    for entry in visible(folder):
        inside = split_of(entry.name) if entry.is_dir() else None
        files = [entry] if entry.is_file() else list(files_below(entry)) if inside or entry.name == "data" else []
        for file in (f for f in files if f.suffix.lower() in suffixes and f.name not in METADATA):
            split = inside or (_further(file.stem) if further else None) or split_of(file.stem)
            groups.setdefault(split, []).append(file) if split else unnamed.append(file)
    if not groups:
        return {"train": unnamed} if unnamed else {}
    groups, left = _with_test(groups), unnamed
    for split, files in groups.items():
        plain = [f for f in files if _plain(f.stem)] or files
        left += [f for f in files if f not in plain]
        groups[split] = _one_of_a_kind(folder, split, plain)
    if left:
        names = ", ".join(f.name for f in left[:5]) + (", …" if len(left) > 5 else "")
        notes.append(f"{folder.name}: {len(left)} files that no split is named after were left out: {names}.")
    return groups


def _one_of_a_kind(folder: Path, split: str, files: list[Path]) -> list[Path]:
    """The files of one split, which must be alike: one word, one format, either shards or not, and no shard missing."""
    shards = {f: SHARD.search(f.stem) for f in files}
    kinds: dict[tuple[object, ...], Path] = {}
    for file in files:
        word = next(iter(words_of(file.stem) & SPLITS.get(split, set())), "")
        kinds.setdefault((word, file.suffix.lower(), shards[file] is not None), file)
    if len(kinds) > 1:
        first, second, *_ = (f.relative_to(folder) for f in kinds.values())
        raise InputError(
            f"{folder} has {first} and {second}, both the {split} split. Keep one, or name shards {split}-00000-of-00002."
        )
    numbers = sorted((int(m[1]), int(m[2])) for m in shards.values() if m)
    for number, of in numbers:
        if sum(n[1] == of for n in numbers) % of:
            missing = next((i for i in range(of) if (i, of) not in numbers), number)
            raise InputError(
                f"{folder}: shard {missing} of the {of} shards of the {split} split is not there, or another is there twice."
            )
    return files
