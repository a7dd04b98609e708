"""Commands. Exit codes: 0 done, 1 a bug, 2 bad input, 130 stopped by Ctrl-C (the same command resumes)."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from understudy.cli import cache as cache_commands
from understudy.cli.generate import EPILOG, generate_command
from understudy.cli.options import AsJson, Overrides, RecipePath, load_recipe, out
from understudy.cli.plan import EPILOG as PLAN_EPILOG
from understudy.cli.plan import plan_command
from understudy.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Teach small models from large ones, and show that it worked.",
)
app.add_typer(cache_commands.app, name="cache")
app.command("generate", epilog=EPILOG)(generate_command)
app.command("plan", epilog=PLAN_EPILOG)(plan_command)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


@app.command(epilog="Example: understudy demo --seeds 3 --output runs/demo")
def demo(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path, typer.Option(help="Folder for runs and report.")] = Path("runs/demo"),
) -> None:
    """Compare methods on an embedded image and text task, and write a report."""
    from understudy.reporting import comparison_table
    from understudy.runs.demo import demo as run_demo

    report = run_demo(output, seeds, lambda c: out.print(comparison_table(c.data)))
    out.print(f"Report: {report}")


@app.command(epilog="Example: understudy methods --json | jq '.[] | select(.status == \"works\")'")
def methods(
    as_json: AsJson = False,
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    access: Annotated[str | None, typer.Option(help="Only this access: white, gray, black or self.")] = None,
) -> None:
    """List all papers and baselines: number, title, year, family, status."""
    from understudy.catalogue import catalogue

    entries = [e for e in catalogue() if (not family or e.family == family) and (not access or e.access == access)]
    if as_json:
        _print_json([e.as_json() for e in entries])
        return
    table = Table("no.", "name", "title", "year", "family", "access", "status")
    for e in entries:
        style = "green" if e.status == "works" else "dim"
        table.add_row(
            str(e.number or "–"), e.name, e.title, str(e.year or "–"), e.family, e.access, e.status, style=style
        )
    out.print(table)


@app.command(epilog="Example: understudy show taid")
def show(name: str, as_json: AsJson = False) -> None:
    """Show a method's page: when to use it, options, cost, deviations."""
    from understudy.catalogue import find
    from understudy.pages import page

    entry = find(name)
    if as_json:
        _print_json(entry.as_json())
    else:
        from rich.markdown import Markdown

        out.print(Markdown(page(entry)))


@app.command(epilog="Example: understudy check recipe.yaml data.max_length=256")
def check(recipe: RecipePath = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe before it costs anything: data, tokenizers, masks, teacher; print one batch with its mask."""
    from dataclasses import asdict

    from understudy.runs.check import check_recipe

    findings, sample = check_recipe(load_recipe(recipe, overrides))
    if as_json:
        _print_json(asdict(findings))
        return
    for note in findings.notes:
        out.print(f"• {note}", highlight=False)
    for warning in findings.warnings:
        out.print(f"[yellow]! {warning}[/yellow]", highlight=False)
    if findings.scores:
        out.print({k: round(v, 4) for k, v in findings.scores.items()})
    if sample is not None:
        out.print(sample)


@app.command(epilog="Example: understudy train recipe.yaml method=taid seed=1 output=runs/taid")
def train(recipe: RecipePath = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train a student as a recipe says, evaluate it, write its report. Started again, it resumes."""
    from understudy.runs.run import run

    result = run(load_recipe(recipe, overrides), progress=True)
    if result.interrupted:
        sys.stderr.write(f"Stopped after a checkpoint; the same command resumes {result.folder}.\n")
        raise typer.Exit(130)
    if as_json:
        _print_json({"folder": str(result.folder), "metrics": result.metrics})
        return
    table = Table("metric", "value")
    for key, value in result.metrics.items():
        table.add_row(key, f"{value:.4f}")
    out.print(table)
    out.print(f"Run folder: {result.folder} (report.html inside)")


@app.command(epilog="Example: understudy compare recipe.yaml --methods sft,kd,pld --seeds 3 --json out.json")
def compare(
    recipe: RecipePath = None,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods or arms of the recipe, separated by commas; the first is the baseline. Unless given: all arms "
            "that the recipe names, else sft,kd."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the comparison here too.")] = None,
) -> None:
    """Compare methods, or named arms of them, over seeds on equal budgets."""
    from understudy.reporting import comparison_table
    from understudy.runs.comparison import compare as run_compare

    names = [name.strip() for name in methods.split(",")] if methods is not None else None
    result = run_compare(load_recipe(recipe, overrides), names, seeds, progress=True)
    out.print(comparison_table(result.data))
    if json_file is not None:
        json_file.write_text(json.dumps(result.data, indent=1))
    out.print(f"Report: {result.folder / 'report.html'}")


@app.command(epilog="Example: understudy reproduce pld --setting real --max-seeds 12 --json pld.json")
def reproduce(
    name: Annotated[str, typer.Argument(help="The method whose claim is tried.")],
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Exactly so many; otherwise rounds of seeds until a verdict is possible.")
    ] = None,
    max_seeds: Annotated[int | None, typer.Option(help="At most so many seeds in rounds (default 20).")] = None,
    hours: Annotated[float | None, typer.Option(help="Begin no round that would end later than this.")] = None,
    setting: Annotated[str, typer.Option(help="embedded, or real: on real data.")] = "embedded",
    data: Annotated[
        str | None,
        typer.Option(help="Other data of the same columns (folder, file or Hub id), or a folder as UNDERSTUDY_DATA."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the runs (default runs/claims/NAME, with the setting and data).")
    ] = None,
) -> None:
    """Try a paper's main claim: all arms tuned alike on validation, judged on test, over seeds until it is decided."""
    from understudy.claims import EMBEDDED, get, result_table
    from understudy.claims import reproduce as run_claim

    if data is not None and get(name).held_by(Path(data)):
        os.environ["UNDERSTUDY_DATA"], data = data, None
    parts = [name, *([setting] if setting != EMBEDDED else []), *([Path(data).name] if data is not None else [])]
    folder = output or Path("runs/claims") / "-".join(parts)
    result = run_claim(name, seeds, folder, max_seeds=max_seeds, hours=hours, setting=setting, data=data, progress=True)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1))
    out.print(result_table(result))
    out.print(f"[bold]{result['verdict']}[/bold]: {result['claim']}")


@app.command(epilog="Example: understudy evaluate runs/taid --json")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    as_json: AsJson = False,
) -> None:
    """Evaluate the student of a finished run again, from its saved weights."""
    from understudy.runs.check import evaluate_run

    result = evaluate_run(run, split)
    if as_json:
        _print_json(result)
        return
    table = Table("metric", f"on {split}")
    for key, value in result["metrics"].items():
        table.add_row(key, f"{value:.4f}")
    out.print(table)


@app.command(epilog="Example: understudy report runs/demo")
def report(folder: Annotated[Path, typer.Argument(help="A run folder, or one of a comparison.")]) -> None:
    """Write report.html again from what a folder holds."""
    from understudy.reporting import render_comparison, render_run

    if (folder / "run.json").is_file():
        out.print(f"Report: {render_run(folder)}")
    elif (folder / "comparison.json").is_file() or list(folder.glob("*/comparison.json")):
        out.print(f"Report: {render_comparison(folder)}")
    else:
        raise InputError(f"{folder} is neither a run folder (run.json) nor a comparison (comparison.json).")


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code."""
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="understudy", standalone_mode=False)
    except InputError as error:
        _fail(" ".join(str(error).split()), 2)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}: free space, change permissions or choose another output.", 2)
    except (KeyboardInterrupt, EOFError):
        _fail("Stopped. The same command resumes from the last checkpoint.", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # only the command parser's own errors have it
            raise
        _fail(" ".join(error.format_message().split()) + " See --help.", 2)
    finally:
        _leave_ranks()
    sys.exit(code if isinstance(code, int) else 0)


def _leave_ranks() -> None:
    """Close the process group of a run under torchrun; without it the last rank may abort at exit."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"understudy: {message}\n")
    sys.exit(code)
