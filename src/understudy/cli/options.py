"""What the commands share: options, the console, reading a recipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from understudy.errors import InputError

# Under torchrun only the first rank speaks.
out = Console(width=None if sys.stdout.isatty() else 150, quiet=os.environ.get("RANK", "0") != "0")

RecipePath = Annotated[Path | None, typer.Argument(help="A YAML recipe; overrides alone also do.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, dots reach inside: trainer.max_steps=100")]
Shard = Annotated[
    str | None, typer.Option(help="Only part i of n of the data, as i/n (1/4 … 4/4). Each part resumes alone.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that the output folder holds.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Runs at once; one a GPU, or one a core where there is none, if not given.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load_recipe(recipe: Path | None, overrides: list[str] | None) -> Any:
    """The recipe of a command: a file with overrides, or overrides alone."""
    from understudy.runs.recipe import load

    items = list(overrides or [])
    if recipe is not None and "=" in str(recipe):  # no recipe, overrides alone
        items, recipe = [str(recipe), *items], None
    return load(recipe, items)


def shard_of(text: str | None) -> tuple[int, int]:
    """`i/n` as (i − 1, n); the whole where nothing is given."""
    if text is None:
        return 0, 1
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise InputError(f"Shard {text!r} is not of the form i/n with 1 ≤ i ≤ n, for example 1/4.")
    return int(first) - 1, int(second)
