"""Where data lies: the folder that `UNDERSTUDY_DATA` names, or a path."""

from __future__ import annotations

import os
from pathlib import Path

from understudy.errors import InputError
from understudy.reading import at_home


def data_folder() -> Path | None:
    """The folder of `UNDERSTUDY_DATA`, or `None` where it is not set."""
    value = os.environ.get("UNDERSTUDY_DATA")
    if not value:
        return None
    folder = Path(value)
    if not folder.is_dir():
        raise InputError(f"UNDERSTUDY_DATA names {folder}, which is not a folder. Correct it or unset it.")
    return folder


def find(name: str) -> Path | None:
    """`name` as a path, or inside the data folder; `None` if it is neither."""
    path = at_home(Path(name))
    if path.exists():
        return path
    folder = data_folder()
    return folder / name if folder is not None and (folder / name).exists() else None
