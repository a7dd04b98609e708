"""The scoreboard: what was found of every paper's claim, counted and drawn from the result files of `understudy reproduce`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from understudy.catalogue import Entry, catalogue
from understudy.claims import EMBEDDED
from understudy.claims.result import difference_told, verdict_told
from understudy.errors import InputError
from understudy.files import read_json, replacing
from understudy.reporting.side_by_side import method_rows

VERDICTS = ("supported", "not supported", "inconclusive", "not run")
DECIDED = VERDICTS[:2]
OURS = "Scoreboard – Understudy".encode()
"""What the page's title is, by which it is known again."""
PILLARS = {
    "elicitation": {
        "labeling": "the teacher writes answers or rationales for given inputs",
        "expansion": "the teacher grows inputs and answers from a few demonstrations",
        "curation": "data are made from topics or rules and filtered for quality",
        "feature": "logits, hidden states or gradients of the teacher are read",
        "feedback": "the teacher scores, ranks or corrects what the student wrote",
        "self_knowledge": "the student is its own teacher, with a filter",
    },
    "algorithm": {
        "sft": "cross-entropy on the teacher's text or labels",
        "divergence_similarity": "a distance between distributions or features of the two",
        "rl": "a reward is maximised, near a reference",
        "rank_optimization": "better answers are made likelier than worse ones",
        "none_prompting": "no weight changes; what was learned is text that is retrieved",
    },
}
"""The branches of the survey's taxonomy (paper 7) that a method is chosen by."""


CHOICES: dict[str, tuple[str, tuple[str, ...]]] = {
    "Logits of the teacher, images or texts with classes": (
        "Start with `kd`, choose its temperature on validation data, and compare the others with it.",
        ("pld", "dhkd", "tgeo-kd", "lelp", "trg", "hard"),
    ),
    "Logits of the teacher, language models": (
        "Start with `kd` at temperature 1. Its other divergences are `reverse_kl` and, with `on_policy`, `jsd`.",
        ("taid", "ddk", "first", "swing"),
    ),
    "Only text of the teacher": (
        "Start with `understudy generate` and `sft`. These methods filter, rank or contrast what the teacher wrote.",
        ("symbolic-kd", "frontier-synthetic", "qcrd", "ded", "redi", "strategy-teaching"),
    ),
    "Preferences": (
        "Start with `dpo` on pairs. The others are for noisy scores, lists, trees, or an aligned teacher.",
        ("dpo", "adpo", "tpo", "adpa", "redi", "dpo-pg", "mcts-dpo"),
    ),
    "Few labels, many inputs without": (
        "The teacher labels the inputs that have no label. `dho` learns its labels and yours with a head each.",
        ("dho", "kd3", "data-pruning-kd"),
    ),
    "No data of the task": (
        "These methods collect or generate inputs, and the teacher labels them.",
        ("kd3", "boot", "i2d2", "dataset-distillation"),
    ),
    "No larger teacher": (
        "These methods filter or search the student's own answers.",
        ("ground-truth-self-distillation", "i2d2", "mcts-dpo"),
    ),
    "Rankings": (
        "Take `embedding` to distil the vectors of a sentence encoder, and `margin-mse` to distil the scores of a ranker.",
        ("margin-mse",),
    ),
    "Graphs": (
        "Start with `kd`, which on nodes is GLNN. `ff-g2m` adds how neighbours resemble each other and differ.",
        ("ff-g2m",),
    ),
    "Diffusion": (
        "These methods make a student that needs fewer calls of the network for a sample.",
        ("boot", "distillation-dpo", "lightgen"),
    ),
    "Several modalities": (
        "The teachers read other modalities than the student, or more.",
        ("mst-distill", "llava-mod", "dho"),
    ),
}
"""What a reader has, what to start with, and the papers to try then (names of methods)."""


@dataclass(frozen=True)
class Row:
    """One claim in one setting; `result` is `None` where it was not run."""

    entry: Entry
    setting: str
    result: dict[str, Any] | None

    @property
    def check(self) -> dict[str, Any]:
        """The main check."""
        return self.result["checks"][0] if self.result else {}

    @property
    def verdict(self) -> str:
        return str(self.check.get("verdict", "not run"))

    @property
    def told(self) -> str:
        """The verdict, and how many seeds would decide it if it is open."""
        return verdict_told(self.result, self.check) if self.result else self.verdict

    @property
    def effect(self) -> str:
        """Difference and interval of the main check, with the threshold that decides."""
        if not self.check:
            return ""
        return f"{difference_told(self.check)} (threshold {self.check['threshold']:+g})"

    @property
    def seeds(self) -> int:
        return int(self.result["budget"]["seeds"]) if self.result else 0

    @property
    def tally(self) -> str:
        """Supported, decided and all checks."""
        found = [c["verdict"] for c in self.result["checks"]] if self.result else []
        decided = sum(v in DECIDED for v in found)
        return f"{found.count('supported')} of {decided} decided, {len(found)} in all" if found else ""

    @property
    def cost(self) -> float | None:
        """Seconds of training of the arm in the main check, divided by those of the arm that it is compared with."""
        if not self.result:
            return None
        spent = self.result["budget"]["seconds"]
        other = spent.get(self.check["other"])
        return spent[self.check["arm"]] / other if other and self.check["arm"] != self.check["other"] else None

    @property
    def machine(self) -> str:
        if not self.result:
            return ""
        return f"{self.result['machine']['platform'].split('-')[0]}, Python {self.result['machine']['python']}"


def rows(folder: Path) -> list[Row]:
    """All papers by number, one row for each setting that there is a result of.

    Args:
        folder: holds `NAME.json`, and `NAME.SETTING.json` of other settings than `embedded`.

    Raises:
        InputError: there is no such folder, or a file in it is no result.
    """
    if not folder.is_dir():
        raise InputError(
            f"There is no folder {folder}: give one with results of `understudy reproduce NAME --json FILE`."
        )
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        name, _, setting = file.stem.partition(".")
        result = read_json(file) or {}
        if not result.get("checks") or "budget" not in result:
            raise InputError(f"{file} is no result of `understudy reproduce`: it has no checks or no budget.")
        found.setdefault(name, {})[setting or EMBEDDED] = result
    papers = [e for e in catalogue() if e.number is not None]
    return [Row(e, setting, result) for e in papers for setting, result in found.get(e.name, {EMBEDDED: None}).items()]


def counted(board: Sequence[Row]) -> dict[str, int]:
    """How many papers have each verdict. Of several settings a decided one counts, and `not supported` before `supported`."""
    order = ("not supported", "supported", "inconclusive", "not run")
    found: dict[int, str] = {}
    for row in board:
        assert row.entry.number is not None
        known = found.get(row.entry.number, order[-1])
        found[row.entry.number] = min(known, row.verdict, key=order.index)
    return {verdict: list(found.values()).count(verdict) for verdict in VERDICTS}


def summary(board: Sequence[Row]) -> str:
    """One sentence: decided, and how the others stand."""
    number = counted(board)
    decided = sum(number[v] for v in DECIDED)
    parts = ", ".join(f"{number[v]} {v}" for v in VERDICTS)
    return f"{decided} of {sum(number.values())} claims decided: {parts}."


def side_by_side(folder: Path, output: Path) -> list[dict[str, Any]]:
    """What a page in `output` shows of each comparison of methods in `folder`: how it was made, its methods, and its picture of
    ranks."""
    found = []
    for file in sorted(folder.glob("*.json")):
        one = read_json(file) or {}
        if not one.get("table") or "baseline" not in one:
            raise InputError(f"{file} is no result of `understudy compare`: it has no table or no baseline.")
        about = f"{one['title']}, student {one['recipe']['student']['model']}, {len(one['seeds'])} seeds"
        drawn = file.with_suffix(".svg")
        picture = Path(os.path.relpath(drawn, output)).as_posix() if drawn.is_file() else None
        found.append({**one, "name": file.stem, "about": about, "picture": picture, "methods": method_rows(one)})
    return found


def render_scoreboard(folder: Path, output: Path) -> Path:
    """Write `index.html`: a table of `rows(folder)` that a browser sorts and filters, and below it the comparisons that lie in
    the folder `comparisons` beside `folder`."""
    board = rows(folder)
    environment = Environment(loader=PackageLoader("understudy", "reporting"), autoescape=True)
    page = environment.get_template("scoreboard.html.j2")
    families = sorted({r.entry.family for r in board})
    index = output / "index.html"
    if index.exists() and OURS not in index.read_bytes():
        raise InputError(f"{index} is no scoreboard of ours and is left alone: choose another folder for --output.")
    output.mkdir(parents=True, exist_ok=True)
    with replacing(index) as temporary:
        beside = side_by_side(folder.parent / "comparisons", output)
        text = page.render(rows=board, summary=summary(board), verdicts=VERDICTS, families=families, comparisons=beside)
        temporary.write_text(text + "\n", encoding="utf-8")
    return output / "index.html"


def branch(pillar: str, value: str, board: Sequence[Row]) -> str:
    """A branch of the taxonomy as Markdown: its methods, those first whose claim was supported by the most."""
    order = ("supported", "inconclusive", "not run", "not supported")
    own = [r for r in board if {value, "all"} & set(getattr(r.entry, pillar)) and r.entry.kind != "survey"]
    own.sort(key=lambda r: (order.index(r.verdict), r.entry.number))
    title = f"# {pillar.capitalize()}: {value.replace('_', ' ')}"
    lines = [title, "", f"{PILLARS[pillar][value].capitalize()}.", ""]
    lines += [f"`understudy methods --{pillar} {value}` lists these with titles and years.", ""]
    lines += [
        "Try them in this order: what was supported here first, then what is open, last what was not supported.",
        "",
    ]
    lines += ["| method | access to the teacher | verdict | measured | why |", "|---|---|---|---|---|"]
    for r in own:
        said = r.check.get("says", "planned" if r.entry.status != "works" else "no result yet")
        lines.append(f"| {_link(r, '../methods')} | {r.entry.access} | {r.verdict} | {r.effect} | {said} |")
    return "\n".join(lines)


def choice(board: Sequence[Row]) -> str:
    """The page that leads from what a reader has to methods, with what was measured of each."""
    lines = [
        "# Choose a method",
        "",
        "Find the heading that says what you have. The sentence below it says where to start; the table lists methods of papers.",
        "Each was tried with small models. *Measured* is the difference that the paper claims, with its 95 % interval. The claim",
        "is *supported* if the whole interval is beyond the threshold, *not supported* if none of it is, and else *inconclusive*.",
        "The numbers are those of the [scoreboard](scoreboard/index.html).",
        "",
    ]
    for have, (start, names) in CHOICES.items():
        lines += [f"## {have}", "", start, "", "| method | verdict | measured | what was asked |", "|---|---|---|---|"]
        for name in names:
            own = [r for r in board if name in (r.entry.name, r.entry.slug)]
            lines += [f"| {_link(r, 'methods')} | {r.verdict} | {r.effect} | {r.check.get('says', '')} |" for r in own]
        lines.append("")
    return "\n".join(lines[:-1])


def _link(row: Row, folder: str) -> str:
    """The method's name, linked to its page if there is one, with the setting if it is not the embedded one."""
    name = f"`{row.entry.name}`"
    linked = f"[{name}]({folder}/{row.entry.name}.md)" if row.entry.status == "works" else name
    return linked + (f" ({row.setting})" if row.setting != EMBEDDED else "")


def dumped(board: Sequence[Row]) -> str:
    """The counts as JSON."""
    number = counted(board)
    return json.dumps({**number, "decided": sum(number[v] for v in DECIDED)})
