"""`understudy plan`: memory, time and cost of a recipe, before anything is loaded."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from understudy.cli.options import AsJson, Overrides, RecipePath, finite, load_recipe, out

EPILOG = "Example: understudy plan recipe.yaml --gpu h100 --gpus 8 --shard both --rows 1e9"


def plan_command(
    recipe: RecipePath = None,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="A card: t4, a100, h100, …; this machine's CPU without.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices; each sees its own batch.")] = 1,
    peak: Annotated[float | None, typer.Option(callback=finite, help="TFLOP/s of a device, over the card's.")] = None,
    bandwidth: Annotated[float | None, typer.Option(callback=finite, help="TB/s of its memory.")] = None,
    memory: Annotated[float | None, typer.Option(callback=finite, help="GiB of its memory.")] = None,
    shard: Annotated[str | None, typer.Option(help="What FSDP2 divides: none, student or both.")] = None,
    rows: Annotated[
        float | None, typer.Option(callback=finite, help="Tokens or images to train on, in place of max_steps.")
    ] = None,
    support: Annotated[
        str | None, typer.Option(help="Of a cache that is not captured yet; as `cache capture` by default.")
    ] = None,
    generate: Annotated[int, typer.Option(min=0, help="Tokens the student writes for each example.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Plan a recipe: bytes by component, operations, hours, and whether it fits, before anything is loaded."""
    from understudy.planning import plan

    found = plan(
        load_recipe(recipe, overrides),
        gpu=gpu,
        gpus=gpus,
        peak=peak,
        bandwidth=bandwidth,
        memory=memory,
        shard=shard,  # type: ignore[arg-type]
        rows=rows,
        support=support,
        generate=generate,
    )
    if as_json:
        sys.stdout.write(json.dumps(found.as_json(), indent=1) + "\n")
        return
    show(found)


def show(found: Any) -> None:
    """Print a plan, preceded by that of a teacher which is trained first."""
    from understudy.planning import lines

    if found.first is not None:
        out.print("First, the teacher's own training", style="bold")
        show(found.first)
        out.print("Then", style="bold")
    for title, head, body in lines(found):
        table = Table(*head, title=title, title_justify="left")
        for row in body:
            table.add_row(*(Text(c[2:-2], style="bold") if c.startswith("**") else c for c in row))
        out.print(table)
    out.print(found.verdict, style="green" if found.fits else "red", highlight=False)
    for note in found.notes:
        out.print(f"• {note}", highlight=False)
