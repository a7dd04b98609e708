"""The run folder: the recipe, facts of the run, and whether it is finished."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from understudy.errors import InputError
from understudy.masking import masked
from understudy.runs.recipe import Recipe


def open_folder(recipe: Recipe) -> Path:
    """Create the run folder, or raise an error for one that holds another run."""
    folder = recipe.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "recipe.yaml"
        text = yaml.safe_dump(recipe.shown(), sort_keys=False)
        if written.exists():
            before = yaml.safe_load(written.read_text()) or {}
            now = yaml.safe_load(text)
            changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k != "output"]
            if changed:
                key = changed[0]
                raise InputError(
                    f"Folder {folder} holds another run: {key} was {before.get(key)!r} and is {now.get(key)!r} now. "
                    "Choose another output, or delete the folder."
                )
        elif first_rank():
            temporary = written.with_suffix(".tmp")  # another rank may read it at any time
            temporary.write_text(text)
            temporary.rename(written)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied", str(folder))
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"Output {folder} is a file, not a folder. Choose another output.") from None
    except OSError as error:
        raise InputError(
            f"Output folder {folder} cannot be written: {error.strerror}. Choose another output."
        ) from None
    return folder


def finished(folder: Path) -> dict[str, Any] | None:
    """The evaluation of a finished run, or `None`."""
    try:
        if json.loads((folder / "run.json").read_text())["status"] != "done":
            return None
        evaluation: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
        return evaluation
    except (OSError, json.JSONDecodeError, KeyError):
        return None


def facts(recipe: Recipe, hashes: dict[str, str], findings: Any, status: str, started: float) -> dict[str, Any]:
    packages = ("understudy", "torch", "transformers", "accelerate", "numpy")
    return {
        "format": 1,
        "method": recipe.method,
        "task": recipe.task,
        "teacher": recipe.teacher.model if recipe.teacher else None,
        "student": recipe.student.model if recipe.student else None,
        "seed": recipe.seed,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "hashes": hashes,
        "preflight": dataclasses.asdict(findings),
        "status": status,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 2),
    }


def first_rank() -> bool:
    """Whether this is the first rank of those that `torchrun` or `accelerate launch` started; it writes the files."""
    return int(os.environ.get("RANK", "0")) == 0


def write_json(path: Path, value: Any) -> None:
    if not first_rank():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(masked(value), indent=1))
    temporary.rename(path)


def save_pictures(folder: Path, pictures: Mapping[str, Any]) -> dict[str, str]:
    """Write arrays `[height, width, 3]` of uint8 as PNG; returns caption → file name inside the folder."""
    from PIL import Image

    names: dict[str, str] = {}
    for i, (caption, pixels) in enumerate(pictures.items()):
        names[caption] = f"pictures/{i}.png"
        if first_rank():
            (folder / "pictures").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / names[caption])
    return names
