"""Commands. Exit codes: 0 done, 1 a bug, 2 bad input, 130 stopped by Ctrl-C (the same command resumes)."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from safetensors import SafetensorError

from understudy import __version__
from understudy.cli import cache as cache_commands
from understudy.cli.generate import EPILOG, generate_command
from understudy.cli.options import (
    AsJson,
    Executor,
    Overrides,
    Overwrite,
    RecipePath,
    Workers,
    json_option,
    keep_traceback,
    load_recipe,
    out,
    works_in,
    write_result,
)
from understudy.cli.plan import EPILOG as PLAN_EPILOG
from understudy.cli.plan import plan_command
from understudy.cli.push import EPILOG as PUSH_EPILOG
from understudy.cli.push import push_command
from understudy.cli.search import EPILOG as SEARCH_EPILOG
from understudy.cli.search import search_command
from understudy.cli.study import EPILOG as STUDY_EPILOG
from understudy.cli.study import study_command
from understudy.errors import InputError
from understudy.masking import masked_text
from understudy.stopping import SIGNALS, listen, restore

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"understudy {__version__}\n")
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only errors and JSON; no tables, no progress.")
    ] = False,
) -> None:
    """Teach small models from large ones, and show that it worked."""
    out.quiet = out.quiet or quiet
    logging.getLogger().setLevel(logging.ERROR if quiet else logging.WARNING)


app.add_typer(cache_commands.app, name="cache")
app.command("generate", epilog=EPILOG)(generate_command)
app.command("plan", epilog=PLAN_EPILOG, no_args_is_help=True)(plan_command)
app.command("search", epilog=SEARCH_EPILOG, no_args_is_help=True)(search_command)
app.command("study", epilog=STUDY_EPILOG, no_args_is_help=True)(study_command)
app.command("push", epilog=PUSH_EPILOG, no_args_is_help=True)(push_command)


def _names(incomplete: str) -> list[str]:
    """Names of methods, for shell completion."""
    from understudy.methods import all_methods, variants

    return [name for name in (*all_methods(), *variants()) if name.startswith(incomplete)]


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


@app.command(epilog="Example: understudy methods --elicitation labeling --algorithm sft --access black")
def methods(
    as_json: AsJson = False,
    family: Annotated[str | None, typer.Option(help="Only this family, such as language.")] = None,
    elicitation: Annotated[str | None, typer.Option(help="How knowledge is got, such as labeling or feature.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="How it is learned, such as sft or rank_optimization.")] = None,
    skill: Annotated[str | None, typer.Option(help="What is taught, such as nlp_task or vision.")] = None,
    vertical: Annotated[str | None, typer.Option(help="The field, such as medical.")] = None,
    access: Annotated[str | None, typer.Option(help="To the teacher: white, gray, black or self.")] = None,
) -> None:
    """List all papers and baselines by the survey's taxonomy (paper 7): number, title, year, family, status."""
    from understudy.catalogue import select

    entries = select(
        family=family, elicitation=elicitation, algorithm=algorithm, skill=skill, vertical=vertical, access=access
    )
    if as_json:
        _print_json([e.as_json() for e in entries])
        return
    if not entries:
        out.print("No paper and no baseline has all of these at once: ask for fewer.")
        return
    table = Table("no.", "name", "title", "year", "family", "access", "status")
    for e in entries:
        style = "green" if e.status == "works" else "dim"
        table.add_row(
            str(e.number or "–"), e.name, e.title, str(e.year or "–"), e.family, e.access, e.status, style=style
        )
    out.print(table)


@app.command(epilog="Example: understudy show taid")
def show(name: Annotated[str, typer.Argument(autocompletion=_names)], as_json: AsJson = False) -> None:
    """Show a method's page: when to use it, options, cost, deviations."""
    from understudy.catalogue import find
    from understudy.pages import page

    entry = find(name)
    if as_json:
        _print_json(entry.as_json())
    else:
        from rich.markdown import Markdown

        out.print(Markdown(page(entry)))


@app.command(epilog="Example: understudy keys trainer.lr")
def keys(
    prefix: Annotated[str, typer.Argument(help="Only keys that begin so: data, options.dpo, trainer.save.")] = "",
    as_json: AsJson = False,
) -> None:
    """List every key of a recipe: type, default, meaning."""
    from dataclasses import asdict

    from understudy.keys import matching

    found = matching(prefix)
    if as_json:
        _print_json([asdict(key) for key in found])
        return
    table = Table("key", "type", "default", "meaning", *(["where"] if any(k.where for k in found) else []))
    for key in found:
        table.add_row(key.name, key.type, key.default, key.meaning, *([key.where] if key.where else []))
    out.print(table)


@app.command(epilog="Example: understudy check recipe.yaml data.max_length=256", no_args_is_help=True)
def check(recipe: RecipePath = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe before it costs anything: data, tokenizers, masks, teacher; print one batch with its mask."""
    from dataclasses import asdict

    from understudy.runs.check import check_recipe

    findings, sample = check_recipe(load_recipe(recipe, overrides))
    if as_json:
        _print_json(asdict(findings))
        return
    width = max(map(len, findings.overview), default=0)
    for topic, said in findings.overview.items():
        out.print(f"{topic:<{width}}  {said}", highlight=False)
    for note in findings.notes:
        out.print(f"• {note}", highlight=False)
    for warning in findings.warnings:
        out.print(f"! {warning}", style="yellow", highlight=False)
    if findings.scores:
        out.print({k: round(v, 4) for k, v in findings.scores.items()})
    if sample is not None:
        out.print(sample)


@app.command(epilog="Example: understudy train recipe.yaml method=taid seed=1 output=runs/taid", no_args_is_help=True)
def train(
    recipe: RecipePath = None, overrides: Overrides = None, overwrite: Overwrite = False, as_json: AsJson = False
) -> None:
    """Train a student as a recipe says, evaluate it, write its report. Started again, it resumes."""
    from understudy.runs.run import run

    result = run(load_recipe(recipe, overrides), progress=not out.quiet, overwrite=overwrite)
    if result.interrupted:
        raise KeyboardInterrupt
    if as_json:
        _print_json({"folder": str(result.folder), "metrics": result.metrics})
        return
    table = Table("metric", "value")
    for key, value in result.metrics.items():
        table.add_row(key, f"{value:.4f}")
    out.print(table)
    out.print(f"Run folder: {result.folder} (report.html inside)")


@app.command(
    epilog="Example: understudy compare recipe.yaml --methods sft,kd,pld --seeds 3 --json out.json",
    no_args_is_help=True,
)
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
    workers: Workers = None,
    executor: Executor = "processes",
    overwrite: Overwrite = False,
    json_file: Annotated[Path | None, json_option("the comparison")] = None,
) -> None:
    """Compare methods, or named arms of them, over seeds on equal budgets."""
    from understudy.reporting import comparison_table
    from understudy.runs.comparison import compare as run_compare

    names = [name.strip() for name in methods.split(",")] if methods is not None else None
    asked = load_recipe(recipe, overrides)
    options: dict[str, Any] = {"workers": workers, "executor": executor, "overwrite": overwrite}
    result = run_compare(asked, names, seeds, **options, progress=not out.quiet)
    out.print(comparison_table(result.data))
    if json_file is not None:
        write_result(json_file, result.data)
    out.print(f"Report: {result.folder / 'report.html'}")


@app.command(epilog="Example: understudy reproduce pld --setting real --max-seeds 12 --json pld.json")
def reproduce(
    name: Annotated[str, typer.Argument(help="The method whose claim is tried.", autocompletion=_names)],
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Exactly so many; otherwise rounds of seeds until a verdict is possible.")
    ] = None,
    max_seeds: Annotated[int | None, typer.Option(help="At most so many seeds in rounds (default 20).")] = None,
    hours: Annotated[float | None, typer.Option(help="Begin no round that would end later than this.")] = None,
    side_seeds: Annotated[
        int | None, typer.Option(help="Arms that the main claim does not compare stop after so many seeds.")
    ] = None,
    setting: Annotated[str, typer.Option(help="embedded, or real: on real data.")] = "embedded",
    data: Annotated[
        str | None,
        typer.Option(help="Other data of the same columns (folder, file or Hub id), or a folder as UNDERSTUDY_DATA."),
    ] = None,
    json_file: Annotated[Path | None, json_option("the result")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the runs (default runs/claims/NAME, with the setting and data).")
    ] = None,
    executor: Executor = "processes",
) -> None:
    """Test a paper's main claim: all arms tuned alike on validation, evaluated on test, over seeds until it is decided."""
    from understudy.claims import EMBEDDED, get, result_table
    from understudy.claims import reproduce as run_claim

    if data is not None and get(name).held_by(Path(data)):
        os.environ["UNDERSTUDY_DATA"], data = data, None
    parts = [name, *([setting] if setting != EMBEDDED else []), *([Path(data).name] if data is not None else [])]
    folder = output or Path("runs/claims") / "-".join(parts)
    budget: dict[str, Any] = {"max_seeds": max_seeds, "hours": hours, "side_seeds": side_seeds}
    where: dict[str, Any] = {"setting": setting, "data": data}
    result = run_claim(name, seeds, folder, **budget, **where, executor=executor, progress=not out.quiet)
    if json_file is not None:
        write_result(json_file, result)
    out.print(result_table(result))
    out.print(f"{result['verdict']}: {result['claim']}", style="bold")


@app.command(epilog="Example: understudy evaluate runs/taid --json")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead, as a,b (extra: understudy[lm-eval]).")
    ] = None,
    include_path: Annotated[str | None, typer.Option(help="Of --tasks: a folder of further ones, as YAML.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Of --tasks: examples in each prompt.")] = None,
    limit: Annotated[float | None, typer.Option(help="Of --tasks: documents of each; below 1 a share.")] = None,
    batch_size: Annotated[int, typer.Option(help="Of --tasks: requests answered at once.")] = 8,
    chat: Annotated[bool, typer.Option("--apply-chat-template", help="Of --tasks: use the chat template.")] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate the student of a finished run again, from its saved weights."""
    from understudy.evaluation.harness import HarnessSpec, harness_table
    from understudy.runs.check import evaluate_on_tasks, evaluate_run
    from understudy.runs.recipe import validated

    works_in(run)
    if tasks is not None:
        asked = {"num_fewshot": num_fewshot, "limit": limit, "include_path": include_path, "batch_size": batch_size}
        spec = validated(HarnessSpec, {"tasks": tasks, **asked, "apply_chat_template": chat}, "option of --tasks")
        found = evaluate_on_tasks(run, spec)
        shown = harness_table(found)
        table = Table(*shown["headings"], title=shown["title"])
        for row in shown["rows"]:
            table.add_row(*row)
    else:
        found = evaluate_run(run, split)
        table = Table("metric", f"on {split}")
        for key, value in found["metrics"].items():
            table.add_row(key, f"{value:.4f}")
    if as_json:
        _print_json(found)
        return
    out.print(table)


@app.command(epilog="Example: understudy report runs/demo")
def report(folder: Annotated[Path, typer.Argument(help="A run folder, or one of a comparison or study.")]) -> None:
    """Write report.html again from what a folder holds."""
    from understudy.reporting import render_comparison, render_run, render_study

    works_in(folder)
    if (folder / "run.json").is_file():
        out.print(f"Report: {render_run(folder)}")
    elif (folder / "study.json").is_file():
        out.print(f"Report: {render_study(folder)}")
    elif (folder / "comparison.json").is_file() or list(folder.glob("*/comparison.json")):
        out.print(f"Report: {render_comparison(folder)}")
    else:
        raise InputError(
            f"{folder} is neither a run folder (run.json), a comparison (comparison.json) nor a study (study.json)."
        )


@app.command(epilog="Example: understudy export runs/reviews --int8")
def export(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    int8: Annotated[bool, typer.Option("--int8", help="Also quantise the weights (dynamic quantisation).")] = False,
    as_json: AsJson = False,
) -> None:
    """Export a student to ONNX (RUN/export), and compare quality, size and speed with the student's own."""
    from understudy.runs.exporting import export_run

    works_in(run)
    found = export_run(run, int8)
    if as_json:
        _print_json(found)
        return
    table = Table("model", found["metric"], "agreement", "MiB", "ms an example", "examples a second")
    for name, one in found["models"].items():
        shown = (one["quality"], one["agreement"], one["bytes"] / 2**20, 1e3 * one["latency_seconds"])
        table.add_row(name, *(f"{value:.4f}" for value in shown), f"{one['examples_per_second']:,.0f}")
    out.print(table)
    out.print(f"Files: {run / 'export'}; the report shows them too.")


@app.command(epilog="Example: understudy scoreboard docs/claims --output docs/scoreboard")
def scoreboard(
    folder: Annotated[Path, typer.Argument(help="Results of `understudy reproduce NAME --json FOLDER/NAME.json`.")],
    output: Annotated[Path | None, typer.Option(help="Write index.html into this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count the claims that are decided, and draw all of them as a page that sorts and filters."""
    from understudy.scoreboard import dumped, render_scoreboard, rows, summary

    board = rows(folder)
    if as_json:
        sys.stdout.write(dumped(board) + "\n")
    else:
        out.print(summary(board))
    if output is not None:
        out.print(f"Scoreboard: {render_scoreboard(folder, output)}")


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code."""
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = typer.main.get_command(app)
    before = listen(_interrupt, tuple(s for s in SIGNALS if s != signal.SIGINT))
    try:
        code = command.main(args=arguments, prog_name="understudy", standalone_mode=False)
    except InputError as error:
        _fail(" ".join(str(error).split()), 2)
    except SafetensorError as error:
        _fail(f"{error}: free space, or put the file back.", 2)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}: free space, change permissions or choose another output.", 2)
    except (KeyboardInterrupt, EOFError, typer.Abort):
        code = 130
    except Exception as error:
        if hasattr(error, "format_message"):  # an error of the command parser
            said = _parser_says(error)
            _fail(f"{said} See --help.", 2) if said else sys.exit(2)  # without arguments the help has been shown
        said, kept = " ".join(str(error).split()) or "no message", keep_traceback()
        where = f"is in {kept}" if kept is not None else "could not be written to a file"
        _fail(
            f"unforeseen {type(error).__name__}: {masked_text(said)[:300]}. This is a fault in understudy; the traceback "
            f"{where}.",
            1,
        )
    finally:
        _leave_ranks()
        restore(before)
    if code == 130:  # also if the command parser caught Ctrl-C
        _fail("Stopped. The same command goes on from what is saved.", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _parser_says(error: Any) -> str:
    """What the command parser refuses, with a recipe's way to write what other trainers have as a flag."""
    said = " ".join(error.format_message().split())
    said += "" if not said or said.endswith((".", "!", "?", ")")) else "."
    name = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
    if not name or not said.startswith("No such option"):
        return said
    from understudy.training.arguments import fields

    return f"{said} Keys of a recipe are written as trainer.{name}=VALUE." if name in fields() else said


def _interrupt(number: int, frame: Any) -> None:
    """SIGTERM and SIGHUP stop like Ctrl-C."""
    raise KeyboardInterrupt


def _leave_ranks() -> None:
    """Close the process group of a run under torchrun; without it the last rank may abort at exit."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"understudy: {message}\n")
    sys.exit(code)
