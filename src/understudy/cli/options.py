"""Shared by the commands: options, the console, reading a recipe."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import traceback
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from understudy.errors import InputError
from understudy.files import write_json, writing
from understudy.masking import masked, masked_text

for _name in ("stdout", "stderr"):  # as of a service, which may start a process without any
    if getattr(sys, _name) is None:
        setattr(sys, _name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process

# Under torchrun only the first rank prints. Names and paths may hold brackets and colons, so markup is off.
out = Console(
    width=None if sys.stdout.isatty() else 150,
    quiet=os.environ.get("RANK", "0") != "0",
    markup=False,
    emoji=False,
)

_folders: list[Path] = []

RecipePath = Annotated[Path | None, typer.Argument(help="A YAML recipe; not needed with overrides.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, dots reach inside: trainer.max_steps=100")]
Shard = Annotated[
    str | None, typer.Option(help="Only part i of n of the data, as i/n (1/4 … 4/4). Each part resumes separately.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that the output folder holds.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Runs at once; one a GPU, or one a core where there is none, if not given.")
]
Executor = Annotated[
    str,
    typer.Option(
        help="processes of this machine, or jobs of a Slurm cluster: slurm, or with options in minutes and GB "
        "slurm:partition=gpu,time=60,memory=8,gpus=1,account=NAME. Jobs outlive the command, which finds them again."
    ),
]


def _writable(path: Path | None) -> Path | None:
    """A file to write when all is done, checked before anything starts. A pipe or device is one too; its folder may have
    to be made.

    Raises:
        InputError: a folder, or a file that may not be written or made.
    """
    if path is None:
        return path
    if path.is_dir():
        raise InputError(f"--json {path} is a folder: name a file in it.")
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if there != path and not there.is_dir():
        raise InputError(f"--json {path}: its folder cannot be made, for {there} is no folder. Choose another file.")
    if not os.access(there, os.W_OK):
        raise InputError(f"--json {path} may not be written: change its permissions, or choose another file.")
    return path


def json_option(what: str) -> Any:
    """The option `--json FILE` of a command that also prints a table. `what`: what it writes."""
    return typer.Option("--json", help=f"Write {what} to this file too.", callback=_writable)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load_recipe(recipe: Path | None, overrides: list[str] | None) -> Any:
    """The recipe of a command: a file with overrides, or overrides alone."""
    from understudy.runs.recipe import load

    if recipe is None and not overrides:
        raise InputError(
            "Usage: give a YAML recipe, keys with values, or both, for example `recipe.yaml seed=1` or "
            "`task=language_modeling method=kd`. See --help."
        )
    items = list(overrides or [])
    if recipe is not None and "=" in str(recipe):  # only overrides
        items, recipe = [str(recipe), *items], None
    found = load(recipe, items)
    works_in(found.output)
    return found


def works_in(folder: Path) -> None:
    """Set the folder of a command: a traceback is written there if it belongs to a run or a comparison."""
    _folders.append(folder)


def keep_traceback() -> Path | None:
    """Write the traceback of the present exception to a file, without secrets; in the run folder if there is one. `None`
    where no file can be written."""
    ours = ("recipe.yaml", "run.json", "comparison.json", "study.json")
    text = masked_text(traceback.format_exc())
    rank = os.environ.get("RANK", "0")
    for folder in reversed(_folders):
        if any((folder / name).is_file() for name in ours) and os.access(folder, os.W_OK):
            path: Path | None = folder / ("error.log" if rank == "0" else f"error-rank{rank}.log")
            break
    else:
        path = None
    for file in filter(None, (path, Path(tempfile.gettempdir()) / f"understudy-{uuid.uuid4().hex[:8]}.log")):
        with suppress(OSError):  # a disk that is full may be the very reason
            file.write_text(text, encoding="utf-8", errors="backslashreplace")
            return file
    return None


def write_result(path: Path, value: Any) -> None:
    """Write a result to the file that a command was given for it.

    Raises:
        InputError: it cannot be written.
    """
    if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
        with writing(path):
            path.write_text(json.dumps(masked(value), indent=1))
    else:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.resolve(), value)  # a link stays one


def finite(value: float | None) -> float | None:
    """An option's number, unless it is nan or infinite."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def shard_of(text: str | None) -> tuple[int, int]:
    """`i/n` as (i − 1, n); all if not given."""
    if text is None:
        return 0, 1
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise InputError(f"Shard {text!r} is not of the form i/n with 1 ≤ i ≤ n, for example 1/4.")
    return int(first) - 1, int(second)
