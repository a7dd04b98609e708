"""Pages generated from the code: one per method, the catalogue, the import graph."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from understudy.catalogue import STUDIES, Entry, catalogue, requirements
from understudy.claims import claims
from understudy.claims.result import verdict_told
from understudy.keys import of_model
from understudy.methods import all_methods, variants
from understudy.reporting.side_by_side import method_rows
from understudy.runs import hacking, study
from understudy.runs.recipe import Recipe
from understudy.tasks import TASKS
from understudy.training import Method, OnPolicy

_STUDIES: dict[int, tuple[Any, Any, type[Any], str, str]] = {
    14: (
        study,
        study.study,
        study.Grid,
        "key beside a recipe's",
        "`understudy study study.yaml` · `understudy study runs/a runs/b --output runs/study`",
    ),
    20: (hacking, hacking.Hacking, OnPolicy, "key of `on_policy`", "`understudy train recipe.yaml`"),
}
"""Of each study with runs its module, what says in a line what it asks, its own keys with their heading, and its commands."""

SURVEY = [
    "How knowledge is got from a teacher (elicitation) and how a student learns it (algorithm): the catalogue has a place for "
    "every method in this taxonomy, and `understudy methods` answers which ones fit.",
    "",
    "**Use it.** To choose by what you have: `--access black` are methods that need a teacher's text alone, "
    "`--elicitation self_knowledge` those without a larger teacher, `--algorithm none_prompting` those that change no weights. "
    "A page for every branch (`docs/survey`) puts first what was found to work here.",
    "",
    "**Deviations from the paper.** The classification is this project's; `none_prompting` and the skills `vision`, `graph` and "
    "`general_model_compression` are added for papers that the survey's words do not fit.",
    "",
]
"""The page of paper 7: the taxonomy that the catalogue has its words from, and how to ask it."""


def page(entry: Entry) -> str:
    """Markdown page of a method: what it is, when to use it, options, cost, deviations, taxonomy."""
    head = f"# {entry.number}. {entry.title} ({entry.year})" if entry.number else f"# {entry.title}"
    lines = [head, "", f"`{entry.name}` · {entry.family} · {entry.status}", ""]
    method = all_methods().get(entry.name)
    if entry.number in STUDIES:
        asked = f"`understudy methods --elicitation labeling --algorithm sft --access black`{_claimed(entry)}"
        lines += _study(entry) if entry.number in _STUDIES else [*SURVEY, asked, ""]
    elif method is None:
        lines += ["Planned: no method of this name is registered yet.", ""]
    else:
        lines += [(method.__doc__ or "").strip(), "", *_facts(method.page)]
        lines += [f"**Cost.** {method.cost}.", ""]
        lines += [
            f"**Needs.** {', '.join(requirements(method).names) or 'labels alone'}; "
            f"works on {' and '.join(sorted(method.kinds))} tasks.",
            "",
        ]
        if method.model_fields:
            lines += _options(method, "option")
        given = [f"`{key}.{k}: {v}`" for key, own in method.defaults.items() for k, v in own.items()]
        if given:
            lines += [f"Unless the recipe says otherwise: {', '.join(given)}.", ""]
        others = [f"`method={other}`" for other, (name, _) in variants().items() if name == entry.name]
        if others:
            lines += [f"Variants have names of their own: {', '.join(others)}.", ""]
        lines += [f"`{command(method)}`{_claimed(entry)}", ""]
    if entry.number:
        lines.append(
            f"Taxonomy: knowledge by {', '.join(entry.elicitation)}; algorithm {', '.join(entry.algorithm)}; "
            f"access {entry.access}."
        )
    return "\n".join(lines)


def command(method: type[Method]) -> str:
    """The shortest command that trains with a method: on the default task, if it works there, else on the first that fits."""
    default = Recipe.model_fields["task"].default
    fits = [name for name, task in TASKS.items() if task.kinds & method.kinds]
    task = method.page.get("task", default if default in fits else fits[0])
    return f"understudy train {'' if task == default else f'task={task} '}method={method.name}"


def _facts(facts: Mapping[str, str]) -> list[str]:
    """When to use it, when not, and deviations from the paper."""
    titles = {"when": "Use it", "not": "Do not use it", "deviations": "Deviations from the paper"}
    return [line for key, title in titles.items() if key in facts for line in (f"**{title}.** {facts[key]}", "")]


def _options(model: Any, heading: str) -> list[str]:
    """The fields of a method or of a study's keys as a table."""
    lines = [f"| {heading} | values | default | what |", "|---|---|---|---|"]
    return [*lines, *(f"| `{k.name}` | {k.type} | `{k.default}` | {k.meaning} |" for k in of_model(model, "")), ""]


def _study(entry: Entry) -> list[str]:
    """What a study says, which keys it has beside a recipe's, and an example of one."""
    assert entry.number is not None
    module, asks, keys, heading, commands = _STUDIES[entry.number]
    return [
        *(asks.__doc__ or "").strip().splitlines()[:1],
        "",
        *_facts(module.PAGE),
        *_options(keys, heading),
        "```yaml",
        *module.EXAMPLE.strip().splitlines(),
        "```",
        "",
        f"{commands}{_claimed(entry)}",
        "",
    ]


def _claimed(entry: Entry) -> str:
    return f" · `understudy reproduce {entry.name}`" if entry.name in claims() else ""


def table() -> str:
    """The catalogue as a Markdown table, for the README and the docs."""
    lines = ["| no. | name | title | year | family | status |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {e.number or '–'} | `{e.name}` | {e.title} | {e.year or '–'} | {e.family} | {e.status} |"
        for e in catalogue()
    ]
    return "\n".join(lines)


def findings(folder: Path) -> str:
    """Results of all checks of the claims in `folder`, as a Markdown table.

    A result in another setting than the embedded one is named `NAME.SETTING.json`.
    """
    entries = {e.name: e for e in catalogue()}
    lines = ["| paper | what is claimed | difference [95 %] | bar | verdict |", "|---|---|---|---|---|"]
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}
    for stem in sorted(results, key=lambda n: (entries[n.partition(".")[0]].number or 0, n)):
        name, _, setting = stem.partition(".")
        where = f" {setting}" if setting else ""
        seeds = results[stem]["budget"]["seeds"]
        for i, check in enumerate(results[stem]["checks"]):
            low, high = check["interval"]
            span = f" [{low:+.3g}, {high:+.3g}]" if low is not None else ""
            paper = f"{entries[name].number} `{name}`{where}, {seeds} seeds" if i == 0 else ""
            difference = f"{check['difference']:+.3g}{span} {check['metric']}"
            found = verdict_told(results[stem], check)
            lines.append(f"| {paper} | {check['says']} | {difference} | {check['threshold']:+g} | {found} |")
    return "\n".join(lines)


def searches(folder: Path) -> str:
    """What other options of a method reach on validation where its main check was not supported, as Markdown; empty
    where none was searched."""
    lines: list[str] = []
    for file in sorted(folder.glob("*.json")):
        for i, tried in enumerate(json.loads(file.read_text(encoding="utf-8")).get("search", [])):
            options = ", ".join(f"{k} {v}" for k, v in tried["options"].items()) or "as judged"
            low, high = tried["interval"]
            found = f"{tried['difference']:+.3g} [{low:+.3g}, {high:+.3g}] {tried['metric']}"
            lines.append(f"| {f'`{file.stem}`' if i == 0 else ''} | {options} | {found} | {tried['threshold']:+g} |")
    head = ["| paper | options | difference [95 %] | bar |", "|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def comparison(name: str, about: str, data: Mapping[str, Any]) -> str:
    """A comparison of methods on one task as Markdown, as it came out: every metric, and the time of a step.

    Args:
        name: of the recipe in `benchmarks/comparisons`. about: what is compared, in a sentence.
        data: what `understudy compare --json` wrote.
    """
    recipe, metric, baseline = data["recipe"], data["metric"], data["baseline"]
    trainer = {key: recipe["trainer"][key] for key in ("max_steps", "per_device_train_batch_size", "learning_rate")}
    teacher = data["teacher"] or {}
    taught = f", teacher `{teacher['name']}` {teacher[metric]:.3f}" if metric in teacher else ""
    others = list(data["table"][0]["others"])
    lines = [
        f"## {name}",
        "",
        about,
        "",
        f"Student `{recipe['student']['model']}`{taught}; {len(data['seeds'])} seeds; "
        + ", ".join(f"{key} {value:g}" for key, value in trainer.items())
        + " for every arm.",
        "",
        f"`understudy compare benchmarks/comparisons/{name}.yaml --seeds {len(data['seeds'])}`",
        "",
        f"![Mean ranks with the critical difference]({name}.svg)",
        "",
        f"| method | {metric} [95 %] | against {baseline} [95 %] | {' | '.join(others)} | time of a step |",
        "|---" * (len(others) + 4) + "|",
    ]
    for row in method_rows(data):
        rest = [f"{row.others[key]:.3f}" if row.others.get(key) is not None else "–" for key in others]
        lines.append(f"| {' | '.join([f'`{row.method}`', row.mean, row.difference, *rest, row.time])} |")
    return "\n".join(lines)


def rooms(package: Path | None = None) -> dict[str, set[str]]:
    """Which subpackage or module of the package imports which, read from the sources."""
    package = package or Path(__file__).parent
    found: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        here = file.relative_to(package).with_suffix("").parts[0]
        if here.startswith("__"):
            continue
        asked = found.setdefault(here, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("understudy."):
                asked.add(str(node.module).split(".")[1])
    return {room: asked - {room} for room, asked in found.items()}


def drawing() -> str:
    """The import graph in Mermaid, without arrows that a chain of others implies."""
    direct = rooms()
    reach: dict[str, set[str]] = {}
    for room in TopologicalSorter(direct).static_order():
        reach[room] = set().union(*({r} | reach[r] for r in direct[room]))
    lines = ["```mermaid", "graph BT"]
    for room in sorted(direct):
        behind = set().union(*(reach[r] for r in direct[room]))
        lines += [f"  {room} --> {other}" for other in sorted(direct[room] - behind)]
    return "\n".join([*lines, "```"])


def notebook_page(path: Path) -> str:
    """Markdown page of a notebook in `examples/notebooks`: its text and its code."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in sources]
    return "\n\n".join([parts[0], f"As a notebook: `examples/notebooks/{path.name}`.", *parts[1:]])
