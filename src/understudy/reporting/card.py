"""The model card of a run's student, in the Hub's format."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from scipy.stats import binomtest
from transformers import CONFIG_MAPPING

from understudy.catalogue import Entry, find, reference
from understudy.data import find as find_data
from understudy.errors import InputError
from understudy.evaluation.harness import PREFIX, harness_table
from understudy.files import CARD, read_json, writing
from understudy.masking import masked_text
from understudy.reporting.gains import gain_table, headline
from understudy.reporting.html import Drawn, run_panels
from understudy.reporting.metrics import meaning
from understudy.reporting.plots import standalone
from understudy.tasks import TASKS

PANELS = "panels"
"""Folder of the card's pictures, inside the student's."""
PIPELINES = {
    "image_classification": "image-classification",
    "text_classification": "text-classification",
    "language_modeling": "text-generation",
    "vision_language": "image-text-to-text",
    "reasoning": "text-generation",
    "preferences": "text-generation",
    "node_classification": "graph-ml",
    "ranking": "text-ranking",
    "image_generation": "unconditional-image-generation",
}
"""The Hub's name of each task."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PATH = re.compile(r"(?<![\w:/.])~?/(?:[^\s/|]+/)*([^\s/|]+)")
"""An absolute path, whose last part alone is shown."""
_COUNTED = ("accuracy", "agreement", "teacher_accuracy")
"""Metrics that are a share of the rows."""


def write_card(folder: Path, drawn: Drawn | None = None) -> Path:
    """Write `student/README.md` with its panels from the files of a run folder; returns its path.

    Args:
        drawn: the result of `run_panels`, if it was called already.
    """
    facts, evaluation = read_json(folder / "run.json") or {}, read_json(folder / "evaluation.json") or {}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    panels, _ = drawn or run_panels(folder)
    student = folder / "student"
    with writing(student / CARD):
        pictures = _save_panels(student / PANELS, panels, folder, evaluation.get("pictures", {}))
        data = _metadata(student, facts, evaluation, recipe)
        body = "\n".join(_body(facts, evaluation, recipe, pictures))
        text = masked_text(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
        (student / CARD).write_text(ModelCard(text).content, encoding="utf-8")
    return student / CARD


def _save_panels(
    target: Path, panels: list[dict[str, Any]], folder: Path, pictures: dict[str, str]
) -> list[tuple[str, str]]:
    """Write the panels as files; returns caption and file name of each."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    found = []
    for i, panel in enumerate(panels):
        (target / f"{i}.svg").write_text(standalone(str(panel["svg"])), encoding="utf-8")
        found.append((f"{panel['title']}. {panel['caption']}", f"{PANELS}/{i}.svg"))
    for caption, name in pictures.items():
        shutil.copyfile(folder / name, target / Path(name).name)
        found.append((caption, f"{PANELS}/{Path(name).name}"))
    return found


def _is_local(name: str) -> bool:
    try:
        return Path(name).is_absolute() or name.startswith(("~", ".")) or find_data(name) is not None
    except InputError:
        return False


def _public(name: str | None) -> str:
    """A model's or data set's name without the folders of this machine."""
    return "none" if name is None else Path(name).name if _is_local(name) else name


def _hub_id(name: Any) -> str | None:
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) and not _is_local(name) else None


def _data_name(recipe: dict[str, Any]) -> str:
    return str(recipe.get("data", {}).get("name"))


def _metadata(student: Path, facts: dict[str, Any], evaluation: dict[str, Any], recipe: dict[str, Any]) -> Any:
    """The front matter. Only names that may be ids of the Hub are given as base model and data set."""
    task, name = facts["task"], _public(_data_name(recipe))
    kind = PIPELINES.get(task, task.replace("_", "-"))
    numbers = {
        k: v for k, v in evaluation["metrics"].items() if math.isfinite(v) and not k.startswith(("teacher_", PREFIX))
    }
    results = [
        EvalResult(
            task_type=kind,
            dataset_type=name,
            dataset_name=name,
            dataset_split=evaluation.get("split"),
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in numbers.items()
    ]
    results += [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["task"],
            dataset_name=f"{row['task']} (lm-evaluation-harness)",
            metric_type=row["metric"],
            metric_value=row["value"],
        )
        for row in evaluation.get("lm_eval", {}).get("rows", [])
        if math.isfinite(row["value"])
    ]
    data_id = _hub_id(_data_name(recipe))
    return ModelCardData(
        base_model=_hub_id(facts["student"]),
        datasets=[data_id] if data_id else None,
        metrics=list(numbers),
        eval_results=results or None,
        model_name=_title(facts, recipe),
        library_name=_library(student),
        pipeline_tag=PIPELINES.get(task),
        tags=["understudy", "knowledge-distillation", facts["method"]],
    )


def _library(student: Path) -> str:
    """The library that loads the student."""
    if (student / "adapter_config.json").is_file():
        return "peft"
    config = read_json(student / "config.json") or {}
    return "transformers" if config.get("model_type") in CONFIG_MAPPING or "auto_map" in config else "understudy"


def _title(facts: dict[str, Any], recipe: dict[str, Any]) -> str:
    return f"{_public(facts['student'])} by {facts['method']} on {_public(_data_name(recipe))}"


def _body(
    facts: dict[str, Any], evaluation: dict[str, Any], recipe: dict[str, Any], pictures: list[tuple[str, str]]
) -> list[str]:
    lines = [f"# {_title(facts, recipe)}", ""]
    first = headline(evaluation)
    lines += [first, ""] if first else []
    teacher = recipe.get("teacher")
    teacher = teacher if isinstance(teacher, dict) else {}  # or the name of scores that the data hold
    entry = find(facts["method"])
    members = teacher.get("members") or {}
    named = ", ".join(_public(m["model"]) for m in members.values()) or _public(facts["teacher"])
    lines += [
        f"- **Teacher:** {named}{', trained for this run on the labels' if teacher.get('train') else ''}",
        f"- **Student at the start:** {_public(facts['student'])}",
        f"- **Data:** {_public(_data_name(recipe))}; task {facts['task']}; evaluated on the {evaluation.get('split')} split",
        f"- **Method:** {_cited(entry, facts['method'])}",
        f"- **Seed:** {facts['seed']}",
        "",
    ]
    for table in gain_table(evaluation):
        lines += [f"## {table['title']}", "", *_table(table["headings"], table["rows"]), *table["notes"], ""]
    lines += ["## Metrics", "", *_metrics(facts, evaluation), ""]
    if "lm_eval" in evaluation:
        table = harness_table(evaluation["lm_eval"])
        lines += [f"## {table['title']}", "", *_table(table["headings"], table["rows"]), ""]
    cost = evaluation.get("cost")
    if cost:
        lines += ["## Cost", "", *_cost(cost), ""]
    if pictures:
        lines += ["## Panels", ""]
        for caption, file in pictures:
            lines += [f"![{caption.split('.')[0]}]({file})", "", caption, ""]
    notes = [_PATH.sub(r"\1", note) for note in evaluation.get("notes", [])]
    lines += ["## Notes", "", *(f"- {note}" for note in notes), ""] if notes else []
    paper = reference(entry)
    lines += ["## Citation", "", "```bibtex", *paper.bibtex.splitlines(), "```", ""] if paper is not None else []
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())
    return [*lines, f"Made with Understudy ({versions})."]


def _cited(entry: Entry, name: str) -> str:
    paper = reference(entry)
    return f"`{name}`: {entry.title if paper is None else paper.told}"


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return [line(headings), line(["---"] * len(headings)), *map(line, rows), ""]


def _metrics(facts: dict[str, Any], evaluation: dict[str, Any]) -> list[str]:
    """The table of metrics. Shares of independent rows have an interval; tokens of one text are not independent."""
    task = TASKS.get(facts["task"])
    independent = task is not None and task.kind in ("image", "classification")
    rows = []
    for name, value in evaluation["metrics"].items():
        interval = _interval(value, evaluation["rows"]) if independent and name in _COUNTED else "–"
        rows.append([name, f"{value:.4f}", interval, meaning(name, evaluation.get("explained"))])
    said = (
        f"95 % Wilson intervals of shares, over the {evaluation.get('rows')} {task.unit if task else 'rows'}; one seed."
    )
    none = "One seed, and rows that are not independent: no interval is given."
    return [*_table(["metric", "value", "95 %", "meaning"], rows), said if independent else none]


def _interval(share: float, rows: int) -> str:
    """Wilson's interval of a share."""
    found = binomtest(round(share * rows), rows).proportion_ci(method="wilson")
    return f"[{found.low:.4f}, {found.high:.4f}]"


def _cost(cost: dict[str, Any]) -> list[str]:
    return [
        f"{cost['seconds']:.1f} s of training in {cost['steps']} steps, {cost['flops_total']:.3g} floating-point operations, "
        f"{cost['rows_per_second']:.0f} {cost['unit']} a second, peak memory {cost['peak_memory_bytes'] / 2**20:.0f} MiB, on "
        f"{cost['device']}."
    ]
