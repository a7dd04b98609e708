"""`understudy study`: what teachers give their students: a gain over training alone, and their own way of answering."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from understudy.cli.options import Executor, Overwrite, Workers, json_option, out, works_in, write_result
from understudy.errors import InputError

EPILOG = "Example: understudy study study.yaml --seeds 3, or: understudy study runs/a runs/b --output runs/study"


def study_command(
    given: Annotated[
        list[str],
        typer.Argument(
            help="A YAML recipe with teachers, students, arms and temperatures, and key=value; or folders of runs, "
            "comparisons or studies."
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Of a grid; folders have their own.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder of the study; of a grid the recipe's output.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Arm or method that gains are measured against; training alone unless given.")
    ] = None,
    workers: Workers = None,
    executor: Executor = "processes",
    overwrite: Overwrite = False,
    json_file: Annotated[Path | None, json_option("the study")] = None,
) -> None:
    """Does a taught student beat one trained alone, and does it answer as its teacher does? Gains, fidelity, tests."""
    from understudy.reporting.study import notes, study_tables
    from understudy.runs.study import study

    overrides = [item for item in given if "=" in item and not Path(item).exists()]
    paths = [item for item in given if item not in overrides]
    if not paths:
        raise InputError(
            "A study needs a YAML recipe, or folders of runs: understudy study study.yaml output=runs/study."
        )
    if output is not None:
        works_in(output)
    found = study(
        paths[0] if len(paths) == 1 else paths,
        seeds,
        overrides=overrides,
        output=output,
        baseline=baseline,
        workers=workers,
        executor=executor,
        overwrite=overwrite,
        progress=not out.quiet,
    )
    for table in study_tables(found.data):
        out.print(table)
    for note in notes(found.data):
        out.print(f"• {note}", highlight=False)
    if json_file is not None:
        write_result(json_file, found.data)
    out.print(f"Report: {found.folder / 'report.html'}")
