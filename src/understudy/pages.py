"""A page for each method, generated from its code and the catalogue."""

from __future__ import annotations

from understudy.catalogue import Entry, catalogue
from understudy.methods import all_methods


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
            f"**Needs.** {', '.join(sorted(method.needs)) or 'labels alone'}; "
            f"works on {' and '.join(sorted(method.kinds))} tasks.",
            "",
        ]
        if method.model_fields:
            lines += ["| option | default | what |", "|---|---|---|"]
            lines += [f"| `{n}` | `{f.default}` | {f.description or ''} |" for n, f in method.model_fields.items()]
            lines.append("")
        lines += [f"`understudy train method={entry.name}` · `understudy reproduce {entry.name}`", ""]
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
