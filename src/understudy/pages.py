"""Pages generated from the code: one for each method, the catalogue, the drawing of the house."""

from __future__ import annotations

import ast
import json
from graphlib import TopologicalSorter
from pathlib import Path

from understudy.catalogue import Entry, catalogue, requirements
from understudy.claims import claims
from understudy.keys import of_model
from understudy.methods import all_methods, variants


def page(entry: Entry) -> str:
    """Markdown: what it is, when to use it, options, cost, deviations, taxonomy."""
    head = f"# {entry.number}. {entry.title} ({entry.year})" if entry.number else f"# {entry.title}"
    lines = [head, "", f"`{entry.name}` · {entry.family} · {entry.status}", ""]
    method = all_methods().get(entry.name)
    if method is None:
        lines += ["Planned: no method of this name is registered yet.", ""]
    else:
        facts = method.page
        lines += [(method.__doc__ or "").strip(), ""]
        for key, title in (("when", "Use it"), ("not", "Do not use it"), ("deviations", "Deviations from the paper")):
            if key in facts:
                lines += [f"**{title}.** {facts[key]}", ""]
        lines += [f"**Cost.** {method.cost}.", ""]
        lines += [
            f"**Needs.** {', '.join(requirements(method).names) or 'labels alone'}; "
            f"works on {' and '.join(sorted(method.kinds))} tasks.",
            "",
        ]
        if method.model_fields:
            lines += ["| option | values | default | what |", "|---|---|---|---|"]
            lines += [
                f"| `{k.name.removeprefix('options.')}` | {k.type} | `{k.default}` | {k.meaning} |"
                for k in of_model(method, "options.")
            ]
            lines.append("")
        others = [f"`method={other}`" for other, (name, _) in variants().items() if name == entry.name]
        if others:
            lines += [f"Variants have names of their own: {', '.join(others)}.", ""]
        claimed = f" · `understudy reproduce {entry.name}`" if entry.name in claims() else ""
        lines += [f"`understudy train method={entry.name}`{claimed}", ""]
    if entry.number:
        lines.append(
            f"Taxonomy: knowledge by {', '.join(entry.elicitation)}; algorithm {', '.join(entry.algorithm)}; "
            f"access {entry.access}."
        )
    return "\n".join(lines)


def table() -> str:
    """The catalogue as a Markdown table, for the README and the docs."""
    lines = ["| no. | name | title | year | family | status |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {e.number or '–'} | `{e.name}` | {e.title} | {e.year or '–'} | {e.family} | {e.status} |"
        for e in catalogue()
    ]
    return "\n".join(lines)


def findings(folder: Path) -> str:
    """Every check of the claims whose results lie in `folder`, as they came out, as a Markdown table.

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
            lines.append(f"| {paper} | {check['says']} | {difference} | {check['threshold']:+g} | {check['verdict']} |")
    return "\n".join(lines)


def rooms(package: Path | None = None) -> dict[str, set[str]]:
    """Which room (folder or file of the package) imports which, read from the sources."""
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
    """The rooms and their imports as a Mermaid graph; an arrow that a chain of others implies is left out."""
    direct = rooms()
    reach: dict[str, set[str]] = {}
    for room in TopologicalSorter(direct).static_order():
        reach[room] = set().union(*({r} | reach[r] for r in direct[room]))
    lines = ["```mermaid", "graph BT"]
    for room in sorted(direct):
        behind = set().union(*(reach[r] for r in direct[room]))
        lines += [f"  {room} --> {other}" for other in sorted(direct[room] - behind)]
    return "\n".join([*lines, "```"])
