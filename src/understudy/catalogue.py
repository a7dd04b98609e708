"""The catalogue: all 41 papers with their place in the survey's taxonomy, and which of them are implemented here.

The facts of the papers are in `papers.csv`; the status is derived from the methods and from `STUDIES`.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from understudy.errors import InputError, nearest
from understudy.methods import all_methods, variants
from understudy.training import Method, Requirements

STUDIES = {7: "methods", 14: "study", 20: "train"}
"""The commands of papers that are no method but a study of methods, by number."""
TAXONOMY = ("family", "elicitation", "algorithm", "skill", "vertical", "access")
"""What a selection may ask for; `all` in a paper's row is every value."""


@dataclass(frozen=True)
class Entry:
    """One entry of the catalogue. `number` is `None` for a baseline or a plug-in."""

    number: int | None
    name: str
    slug: str
    title: str
    year: int | None
    family: str
    status: str
    kind: str
    elicitation: tuple[str, ...]
    algorithm: tuple[str, ...]
    skill: tuple[str, ...]
    vertical: tuple[str, ...]
    access: str
    needs: tuple[str, ...]
    cost: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """A paper as it is cited. `authors` are in BibTeX's form; `arxiv` is the number there, or empty."""

    name: str
    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def told(self) -> str:
        """The reference in a line of Markdown."""
        names = [" ".join(reversed(a.split(", "))) for a in self.authors.split(" and ")]
        first, last = ", ".join(names[:-1]), names[-1]
        who = f"{names[0]} et al." if len(names) > 3 else f"{first} and {last}" if first else last
        where = f", [arXiv {self.arxiv}](https://arxiv.org/abs/{self.arxiv})" if self.arxiv else ""
        return f"{who} ({self.year}). *{self.title}*{where}."

    @property
    def bibtex(self) -> str:
        """An entry for BibTeX, with the title's capitals kept."""
        fields = {"title": "{" + self.title.replace("&", r"\&") + "}", "author": self.authors, "year": self.year}
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        return "\n".join([f"@misc{{{self.name},", *(f"  {key} = {{{value}}}," for key, value in fields.items()), "}"])


def reference(entry: Entry) -> Reference | None:
    """The paper of an entry: its own, or of a baseline that in `baselines.csv`; `None` of a plug-in, and where there is none."""
    number, name = str(entry.number or ""), entry.name
    for row in baselines():
        if row["name"] == name:
            number = row["paper"]
            if not number:
                return Reference(name, row["title"], row["authors"], int(row["year"]), row["arxiv"])
    for row in papers():
        if row["number"] == number:
            return Reference(row["slug"], row["title"], row["authors"], int(row["year"]), row["arxiv"])
    return None


@cache
def baselines() -> tuple[dict[str, str], ...]:
    """The rows of `baselines.csv`: the papers of methods that are none of the 41, or the number of one of these."""
    with (files("understudy") / "baselines.csv").open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


@cache
def papers() -> tuple[dict[str, str], ...]:
    """The rows of `papers.csv`."""
    with (files("understudy") / "papers.csv").open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def catalogue() -> list[Entry]:
    """Baselines first, then the papers by number, then plug-ins."""
    methods = all_methods()
    by_paper = {m.paper: m for m in methods.values() if m.paper is not None}
    numbered = [_paper(row, by_paper.get(int(row["number"]))) for row in papers()]
    known = {e.number for e in numbered}
    others = [_other(m) for m in methods.values() if m.paper not in known]
    return others + numbered


def _paper(row: dict[str, str], method: type[Method] | None) -> Entry:
    return Entry(
        number=int(row["number"]),
        name=method.name if method else row["slug"],
        slug=row["slug"],
        title=row["title"],
        year=int(row["year"]),
        family=row["family"],
        status="works" if method or int(row["number"]) in STUDIES else "planned",
        kind=row["kind"],
        elicitation=tuple(row["elicitation"].split(";")),
        algorithm=tuple(row["algorithm"].split(";")),
        skill=tuple(row["skill"].split(";")),
        vertical=tuple(row["vertical"].split(";")),
        access=row["access"],
        needs=requirements(method).names if method else (),
        cost=method.cost if method else "",
    )


def _other(method: type[Method]) -> Entry:
    title = (method.__doc__ or method.name).strip().splitlines()[0]
    return Entry(
        None,
        method.name,
        method.name,
        title,
        None,
        "baseline",
        "works",
        "method",
        (),
        (),
        (),
        (),
        "white" if requirements(method).needs_teacher else "any",
        requirements(method).names,
        method.cost,
    )


def requirements(method: type[Method]) -> Requirements:
    """What a method needs of a run with its default options."""
    return method.model_construct().requires


def select(**asked: str | None) -> list[Entry]:
    """The entries of these values of the taxonomy (`TAXONOMY`); `None` asks for nothing.

    Raises:
        InputError: no paper has such a value.
    """
    entries = every = catalogue()
    for key, value in asked.items():
        if value is None:
            continue
        known = sorted({v for e in every for v in _values(e, key)} - {"all"})
        if value not in known:
            raise InputError(f"No method has {key} {value!r}.{nearest(value, known)} Known: {', '.join(known)}.")
        entries = [e for e in entries if {value, "all"} & set(_values(e, key))]
    return entries


def _values(entry: Entry, key: str) -> tuple[str, ...]:
    value = getattr(entry, key)
    return (value,) if isinstance(value, str) else value


def find(name: str) -> Entry:
    """The entry with this name, number, name of the paper, or name of a variant."""
    entries, others = catalogue(), variants()
    asked = others[name][0] if name in others else name
    for entry in entries:
        if asked in (entry.name, entry.slug, str(entry.number)):
            return entry
    raise InputError(
        f"No method or paper {name!r}.{nearest(name, [*(e.name for e in entries), *others])} See `understudy methods`."
    )
