"""`understudy cache`: capture a teacher's outputs, show and verify them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from understudy.cli.options import AsJson, Overrides, RecipePath, Shard, finite, load_recipe, out, shard_of
from understudy.generation.progress import counting

app = typer.Typer(no_args_is_help=True, help="Capture a teacher once and train from disk.")


@app.command(
    epilog="Example: understudy cache capture recipe.yaml --output caches/qwen --support sampled:38B",
    no_args_is_help=True,
)
def capture(
    recipe: RecipePath = None,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder of the cache.")] = Path("cache"),
    support: Annotated[
        str | None,
        typer.Option(
            help="sampled:NB (unbiased, N bytes a row), top_k:N with tail, hidden, or dense. Default sampled:38B, or dense "
            "where the recipe's method needs every class."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            callback=finite, min=1e-3, help="At which probabilities are kept; that of the recipe's method unless given."
        ),
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option(help="Separated by commas; those about which the recipe's method asks the teacher unless given."),
    ] = None,
    shard: Shard = None,
    as_json: AsJson = False,
) -> None:
    """Capture the outputs of a recipe's teacher. Started again, it resumes; other data are appended."""
    from dataclasses import asdict

    from understudy.runs.capture import capture_recipe

    asked = load_recipe(recipe, overrides)
    with counting("examples") as tick:
        found = capture_recipe(
            asked,
            output,
            support,
            temperature=temperature,
            splits=None if splits is None else [name.strip() for name in splits.split(",")],
            shard=shard_of(shard),
            tick=tick,
        )
    if as_json:
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
        return
    out.print(
        f"{found.examples} examples, {found.rows} rows ({found.new} examples new), {found.bytes / 2**20:.1f} MiB, "
        f"{found.bytes / max(1, found.rows):.1f} bytes a row. Train from it with teacher.cache={output}"
    )


@app.command(epilog="Example: understudy cache info caches/qwen --json")
def info(folder: Annotated[Path, typer.Argument(help="A cache.")], as_json: AsJson = False) -> None:
    """Show whose outputs a cache holds, of what kind and size."""
    from understudy.runs.capture import describe

    found = describe(folder)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    for key, value in found.items():
        out.print(f"{key}: {value}", highlight=False)


@app.command(epilog="Example: understudy cache verify caches/qwen recipe.yaml --sample 64")
def verify(
    folder: Annotated[Path, typer.Argument(help="A cache.")],
    recipe: RecipePath = None,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(min=1, help="Training examples to score again.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Run the recipe's teacher on a sample again and compare; another teacher's cache is an error."""
    from understudy.runs.capture import verify_recipe

    found = verify_recipe(load_recipe(recipe, overrides), folder, sample=sample)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    out.print({k: round(v, 6) for k, v in found.items()})
