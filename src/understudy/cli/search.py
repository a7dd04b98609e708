"""`understudy search`: rank students of a teacher without training, and distil the best."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.table import Table

from understudy.cli.options import AsJson, Overrides, Overwrite, RecipePath, finite, load_recipe, out

EPILOG = "Example: understudy search recipe.yaml --parameters 20000 --train 24 output=runs/search"
_SHOWN = 10


def search_command(
    recipe: RecipePath = None,
    overrides: Overrides = None,
    parameters: Annotated[int | None, typer.Option(min=1, help="Most parameters of a student.")] = None,
    operations: Annotated[float | None, typer.Option(callback=finite, help="Most operations of an image.")] = None,
    latency: Annotated[
        float | None, typer.Option(callback=finite, help="Most milliseconds of an image, measured here.")
    ] = None,
    evaluations: Annotated[int | None, typer.Option(min=1, help="Candidates to score (default 1000).")] = None,
    train: Annotated[
        int | None, typer.Option(min=0, help="Candidates to train, to compare their scores with their accuracy.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Rank students of a teacher without training, and distil the best. Started again, it resumes.

    The space and the rest are options of method diswot, see `understudy show diswot`: options.students holds names with
    blanks (resnet{depth}:{width}), options.ranges their values ({depth: [8, 14], width: {low: 4, high: 32, step: 4}}).
    """
    from understudy.runs.search import METHOD, search

    given = {
        "parameters": parameters,
        "operations": operations,
        "latency": latency,
        "evaluations": evaluations,
        "train": train,
    }
    more = [f"options.{name}={value}" for name, value in given.items() if value is not None]
    asked = load_recipe(recipe, [*(overrides or []), f"method={METHOD}", *more])
    result = search(asked, progress=not out.quiet, overwrite=overwrite)
    if as_json:
        facts = {"student": result.student, "folder": str(result.folder), "metrics": result.metrics}
        sys.stdout.write(json.dumps({**facts, "ranking": result.ranking}, indent=1) + "\n")
        return
    names = list(result.ranking[0]["scores"])
    table = Table("rank", "student", "parameters", "operations", *names, "trained")
    for row in result.ranking[:_SHOWN]:
        scores = ["–" if row["scores"][n] is None else f"{row['scores'][n]:.4g}" for n in names]
        trained = ", ".join(f"{a:.4f}" for a in row["trained"] or []) or "–"
        table.add_row(
            f"{row['rank']}", row["student"], f"{row['parameters']}", f"{row['operations']:.3g}", *scores, trained
        )
    out.print(table)
    for name, value in result.metrics.items():
        if name.startswith("rank_correlation_") and name != "rank_correlation_low":
            out.print(f"rank correlation with accuracy, {name.removeprefix('rank_correlation_')}: {value:+.2f}")
    out.print(f"{result.student} is distilled. Run folder: {result.folder} (report.html inside)")
