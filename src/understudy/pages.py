"""Pages generated from the code: one per method, the catalogue, the import graph."""

from __future__ import annotations

import ast
import inspect
import json
import shlex
import sys
import textwrap
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from understudy.catalogue import STUDIES, Entry, catalogue, reference, requirements
from understudy.claims import claims
from understudy.claims.result import difference_told, verdict_told
from understudy.keys import of_model
from understudy.methods import all_methods, variants
from understudy.reporting.side_by_side import method_rows
from understudy.runs import hacking, study
from understudy.runs.recipe import Recipe, make
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


def page(entry: Entry, curve: Mapping[str, Any] | None = None) -> str:
    """Markdown page of a method: what it is, its equation, when to use it, options, an example, its reference.

    Args:
        curve: `{"metric", "steps", "values"}` of the example as it ran, drawn in `NAME.svg` beside the page; empty where
            no weights are trained.
    """
    head = f"# {entry.number}. {entry.title} ({entry.year})" if entry.number else f"# {entry.name}"
    lines = [head, "", f"`{entry.name}` · {entry.family} · {entry.status}", ""]
    method = all_methods().get(entry.name)
    if entry.number in STUDIES:
        asked = f"`understudy methods --elicitation labeling --algorithm sft --access black`{_claimed(entry)}"
        lines += _study(entry) if entry.number in _STUDIES else [*SURVEY, asked, ""]
    elif method is None:
        lines += ["Planned: no method of this name is registered yet.", ""]
    else:
        lines += [*_how(method), "", *_facts(method.page)]
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
        lines += ["## Example", "", f"`{command(method)}`{_claimed(entry)}, or from Python:", ""]
        lines += ["```python", *example(method).splitlines(), "```", ""]
        lines += _learned(entry.name, curve)
    lines += _reference(entry)
    if entry.number:
        lines.append(
            f"Taxonomy: knowledge by {', '.join(entry.elicitation)}; algorithm {', '.join(entry.algorithm)}; "
            f"access {entry.access}."
        )
    return "\n".join(lines)


def command(method: type[Method]) -> str:
    """The shortest command that trains with a method on the task and the data of its example."""
    keys = {"task": _task(method), "method": method.name, **method.example}
    if keys["task"] == Recipe.model_fields["task"].default:
        del keys["task"]
    return shlex.join(["understudy", "train", *(f"{key}={value}" for key, value in _flat(keys).items())])


def _task(method: type[Method]) -> str:
    """The task of a method's example: the default one, if it works there, else the first that fits."""
    default = str(Recipe.model_fields["task"].default)
    fits = [name for name, task in TASKS.items() if task.kinds & method.kinds]
    return str(method.example.get("task", default if default in fits else fits[0]))


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested keys as the command line takes them: `{"data": {"name": "a"}}` is `{"data.name": "a"}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return found


def example(method: type[Method]) -> str:
    """Python code that trains with a method on the data of its example, with the models that the recipe has there."""
    recipe = make({"task": _task(method), **method.example, "method": method.name})
    steps = recipe.trainer.get("max_steps")
    looks = {"max_steps": steps, "eval_strategy": "steps", "eval_steps": max(1, steps // 10)} if steps else {}
    models = {side: getattr(recipe, side) for side in ("teacher", "student")}
    own = ", ".join(f'{side}="{spec.model}"' for side, spec in models.items() if spec and side not in method.example)
    said = {"task": recipe.task, "method": method.name, "data": recipe.data.get("name"), **method.example}
    said["trainer"] = {**method.example.get("trainer", {}), **looks}
    lines = ["from understudy import distill", "", "result = distill("]
    lines += [line for key, value in said.items() if value for line in _argument(key, value)]
    lines += [f"    # {own}: the task's own, unless you name yours"] if own else []
    return "\n".join([*lines, f'    output="runs/{method.name}",', ")", "print(result.metrics)"])


def _argument(key: str, value: Any, most: int = 120) -> list[str]:
    """A keyword argument, in a line if it has at most `most` characters."""
    line = f"    {key}={_python(value)},"
    if len(line) <= most or not isinstance(value, Mapping):
        return [line]
    return [f"    {key}={{", *(f"        {json.dumps(k)}: {_python(v)}," for k, v in value.items()), "    },"]


def _python(value: Any) -> str:
    """A plain value as Python source, with strings in double quotes."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)}: {_python(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_python, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _how(method: type[Method]) -> list[str]:
    """What a method is, in a sentence, and how it works, with its equation: of its class where several share a module."""
    said = inspect.cleandoc(method.__doc__ or "")
    if "\n\n    " in said:
        return [said]
    body = (sys.modules[method.__module__].__doc__ or "").partition("\n\n")[2].rstrip()
    # Without a paragraph of prose all of it is the equation.
    return [said, "", body if "\n\n    " in f"\n\n{body}" else textwrap.indent(body, "    ")]


def _learned(name: str, curve: Mapping[str, Any] | None) -> list[str]:
    """The learning curve of a method's example."""
    if not curve:
        return ["No weights are trained, so there is no learning curve.", ""] if curve is not None else []
    if len(curve["steps"]) < 2:
        last = f"{curve['metric']} on validation data was {curve['values'][-1]:.3g}"
        return [f"The last round is too short for a learning curve: after it {last}.", ""]
    said = f"Validation {curve['metric']} over the steps of the example, as it came out with seed 0"
    return [f"![{said}]({name}.svg)", "", f"{said}.", ""]


def _reference(entry: Entry) -> list[str]:
    """The paper, with its address, and an entry for BibTeX."""
    paper = reference(entry)
    if paper is None:
        return []
    return ["## Reference", "", paper.told, "", "```bibtex", *paper.bibtex.splitlines(), "```", ""]


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
            fewer = check.get("seeds", seeds)
            told = f"{fewer} seeds" if fewer < seeds else ""
            paper = f"{entries[name].number} `{name}`{where}, {seeds} seeds" if i == 0 else told
            found = f"{difference_told(check)} | {check['threshold']:+g} | {verdict_told(results[stem], check)}"
            lines.append(f"| {paper} | {check['says']} | {found} |")
    return "\n".join(lines)


def searches(folder: Path) -> str:
    """What other options of a method reach on validation where its main check was not supported, as Markdown; empty
    where none was searched."""
    lines: list[str] = []
    for file in sorted(folder.glob("*.json")):
        for i, tried in enumerate(json.loads(file.read_text(encoding="utf-8")).get("search", [])):
            options = ", ".join(f"{k} {v}" for k, v in tried["options"].items()) or "as judged"
            found = f"{difference_told(tried)} | {tried['threshold']:+g}"
            lines.append(f"| {f'`{file.stem}`' if i == 0 else ''} | {options} | {found} |")
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
