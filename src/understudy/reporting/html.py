"""A self-contained HTML file: table, plots, configuration, hashes."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from understudy.reporting import plots
from understudy.reporting.metrics import meaning
from understudy.reporting.table import span
from understudy.tasks import TASKS

Panel = dict[str, Any]


def _render(**values: Any) -> str:
    environment = Environment(loader=PackageLoader("understudy", "reporting"), autoescape=True)
    return environment.get_template("template.html.j2").render(**values)


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _panel(title: str, svg: str, caption: str) -> Panel:
    return {"title": title, "svg": Markup(svg), "caption": caption}


def render_run(folder: Path) -> Path:
    """Write `report.html` from the files of a run folder; panels without data are left out."""
    facts, evaluation = _read(folder / "run.json") or {}, _read(folder / "evaluation.json") or {}
    recipe = folder / "recipe.yaml"
    out = folder / "report.html"
    out.write_text(
        _render(
            title=f"{facts.get('method', 'run')} on {facts.get('task', '')}",
            subtitle=f"student {facts.get('student')} · teacher {facts.get('teacher')} · seed {facts.get('seed')}",
            facts=facts,
            **_metrics(facts, evaluation),
            panels=_training(folder) + _panels(evaluation) + _pictures(folder, evaluation.get("pictures", {})),
            sections=[{**table, "panels": [], "recipe": ""} for table in evaluation.get("tables", [])],
            notes=evaluation.get("notes", []) + _unseen(folder),
            recipe=recipe.read_text() if recipe.is_file() else "",
        ),
        encoding="utf-8",
    )
    return out


def _metrics(facts: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """The table of metrics, after training and, if the check measured them, before it, with an explanation of each."""
    before = facts.get("preflight", {}).get("scores", {})
    headings = ["metric", f"on the {evaluation.get('split', '')} split", "meaning"]
    rows: list[list[str]] = []
    for name, value in evaluation.get("metrics", {}).items():
        rows.append([name, f"{value:.4f}", meaning(name, evaluation.get("explained"))])
        if before:
            rows[-1].insert(1, f"{before[name]:.4f}" if name in before else "–")
    if before:
        headings.insert(1, "before training (validation sample)")
    return {"headings": headings, "rows": rows}


def _unseen(folder: Path) -> list[str]:
    """A note for runs without validation during training."""
    if (folder / "validation.jsonl").is_file() or not (folder / "metrics.jsonl").is_file():
        return []
    return ["There is no validation curve: trainer.eval_strategy=steps with trainer.eval_steps=N draws one."]


def _training(folder: Path) -> list[Panel]:
    path = folder / "metrics.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []
    if not lines:
        return []
    steps = [x["step"] for x in lines]
    terms = _series(lines, "terms")
    panels = [
        _panel(
            "Loss",
            plots.curves({"loss": (steps, [x["loss"] for x in lines])}, "loss"),
            "Mean loss per row between two logs, all terms with their weights.",
        )
    ]
    if len(terms) > 1:
        panels += [
            _panel("Terms: " + ", ".join(group), plots.curves(group, "mean per row"), "Each term before its weight.")
            for group in plots.alike(terms)
        ]
    panels += [_looks(folder, name) for name in _watched(folder)]
    panels += [
        _panel("Method state", plots.curves(group, "value"), "What the method carries from step to step.")
        for group in plots.alike(_series(lines, "state"))
    ]
    return panels + _own_samples(lines)


def _series(lines: list[dict[str, Any]], part: str) -> dict[str, tuple[list[int], list[float | None]]]:
    """The values under `part` in the lines of a log, by name; `None` where a line lacks it."""
    names = dict.fromkeys(name for line in lines for name in line.get(part, {}))
    return {n: ([x["step"] for x in lines], [x.get(part, {}).get(n) for x in lines]) for n in names}


def _watched(folder: Path, most: int = 3) -> list[str]:
    """The metrics whose validation curves are shown: the task's main metric, the likelihood, then others."""
    seen = _validation(folder)
    task = (_read(folder / "run.json") or {}).get("task")
    first = [TASKS[task].metric] if task in TASKS else []
    names = [n for n in (seen[-1] if seen else {}) if n != "step"]
    return [n for n in dict.fromkeys([*first, "nll", *names]) if n in names][:most]


def _validation(folder: Path) -> list[dict[str, Any]]:
    looks = folder / "validation.jsonl"
    return [json.loads(x) for x in looks.read_text().splitlines()] if looks.is_file() else []


def _looks(folder: Path, name: str) -> Panel:
    seen = [x for x in _validation(folder) if name in x]
    curve = {name: ([x["step"] for x in seen], [x[name] for x in seen])}
    caption = f"On the validation split, while training. {meaning(name)}"
    return _panel(f"Validation {name}", plots.curves(curve, name), caption)


def _own_samples(lines: list[dict[str, Any]]) -> list[Panel]:
    """Panels about the origin of the training texts, if the student generated any of them."""
    logs = [(x["step"], x["on_policy"]) for x in lines if x.get("on_policy")]
    written, tokens, empty, unended = (sum(x[n] for _, x in logs) for n in ("written", "tokens", "empty", "unended"))
    if not written:
        return []
    steps = [step for step, _ in logs]
    series = {"own samples": [x["share"] for _, x in logs], "replayed of these": [x["replayed"] for _, x in logs]}
    oldest = max(x["replay_age"] for _, x in logs)
    caption = (
        f"Share of the examples whose text the student wrote. Up to the last log it wrote {written:.0f} texts of "
        f"{tokens / written:.1f} tokens, {empty:.0f} empty and {unended:.0f} without an end; the oldest mean age of replays "
        f"is {oldest:.1f} steps. Of several processes this is the first. Every text, with the step whose weights wrote it, "
        "the step that it is for and the example of its prompt, is in samples.jsonl."
    )
    return [_panel("Own samples", plots.curves({n: (steps, v) for n, v in series.items()}, "share"), caption)]


def _panels(evaluation: dict[str, Any]) -> list[Panel]:
    panels = []
    if "reliability" in evaluation:
        panels.append(
            _panel(
                "Calibration",
                plots.reliability_diagram(evaluation["reliability"]),
                "On the diagonal, confidence means what it says; below it the student is overconfident.",
            )
        )
    if "fidelity_by_confidence" in evaluation:
        panels.append(
            _panel(
                "Fidelity",
                plots.confidence_bars(evaluation["fidelity_by_confidence"]),
                "How often student and teacher choose the same class, by the student's confidence.",
            )
        )
    if "cost" in evaluation:
        cost = evaluation["cost"]
        caption = (
            f"{cost['seconds']:.1f} s, {cost['rows_per_second']:.0f} {cost['unit']} a second, "
            f"{cost['flops_total']:.3g} operations, {cost['percent_of_peak']:.1f} % of the measured matrix-product peak, "
            f"peak memory {cost['peak_memory_bytes'] / 2**20:.0f} MiB, {cost['device']}."
        )
        panels.append(_panel("Cost", plots.time_bar({"run": cost["time_share"]}), caption))
    return panels


def _pictures(folder: Path, pictures: dict[str, str]) -> list[Panel]:
    """The pictures of the run as panels, embedded in the page."""
    panels = []
    for caption, name in pictures.items():
        if (folder / name).is_file():
            code = base64.b64encode((folder / name).read_bytes()).decode()
            image = Markup('<img alt="{}" src="data:image/png;base64,{}">').format(caption, code)
            panels.append(_panel(caption.split(":")[0], image, caption))
    return panels


def render_comparison(folder: Path) -> Path:
    """Write `report.html` of a folder with `comparison.json`, or with several such folders below it."""
    found = sorted(folder.glob("*/comparison.json")) if not (folder / "comparison.json").is_file() else None
    parts = [_comparison(p.parent) for p in found] if found is not None else [_comparison(folder)]
    out = folder / "report.html"
    out.write_text(
        _render(
            title="Comparison",
            subtitle="equal budgets, paired over seeds",
            facts=parts[0]["facts"] if parts else {},
            sections=parts,
            headings=[],
            rows=[],
            panels=[],
            notes=[],
            recipe="",
        ),
        encoding="utf-8",
    )
    return out


def _comparison(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "comparison.json").read_text())
    metric, rows = value["metric"], value["table"]
    others = list(dict.fromkeys(k for r in rows for k in r["others"]))
    teacher = (value.get("teacher") or {}).get(metric)
    panels = [
        _panel(
            metric,
            plots.intervals(rows, metric, teacher),
            f"Mean and 95 % interval over {len(value['seeds'])} seeds; "
            f"{'higher' if value['higher_is_better'] else 'lower'} is better.",
        )
    ]
    panels.append(_panel("Where the time goes", plots.time_bar(_shares(value["runs"])), "First seed of each method."))
    panels += _first_panels(folder, value["runs"], metric)
    return {
        "title": value["title"],
        "facts": {"versions": value.get("versions", {}), "budget": value.get("budget", {})},
        "headings": ["method", f"{metric} [95 %]", f"against {value['baseline']} (paired)", *others, "seeds"],
        "rows": [
            [
                r["method"],
                span(r["mean"], r["interval"]),
                span(r["difference"], r["difference_interval"]),
                *(f"{r['others'][k]:.3f}" if k in r["others"] else "–" for k in others),
                r["seeds"],
            ]
            for r in rows
        ],
        "panels": panels,
        "notes": [f"{name}: {meaning(name)}" for name in (metric, *others)],
        "recipe": yaml.safe_dump(value.get("recipe", {}), sort_keys=False),
    }


def _shares(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {r["method"]: r["cost"]["time_share"] for r in reversed(runs)}


def _first_panels(folder: Path, runs: Sequence[dict[str, Any]], metric: str) -> list[Panel]:
    """Panels of the first seed of each method: its loss on separate axes, since losses differ in scale, and the
    validation curves of the metric on common axes."""
    panels: list[Panel] = []
    seen: dict[str, Any] = {}
    first: dict[str, dict[str, Any]] = {}
    for run in runs:
        first.setdefault(run["method"], run)
    for run in first.values():
        home, name = folder / run["folder"], run["method"]
        path = home / "metrics.jsonl"
        if path.is_file():
            lines = [json.loads(x) for x in path.read_text().splitlines()]
            loss = {name: ([x["step"] for x in lines], [x["loss"] for x in lines])}
            panels.append(
                _panel(f"Loss of {name}", plots.curves(loss, "loss"), "Losses of methods are not comparable.")
            )
        looks = [x for x in _validation(home) if metric in x]
        if looks:
            seen[name] = ([x["step"] for x in looks], [x[metric] for x in looks])
    if seen:
        panels.insert(0, _panel(f"Validation {metric}", plots.curves(seen, metric), "While training."))
    return panels
