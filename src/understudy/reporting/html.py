"""A self-contained HTML file: table, plots, configuration, hashes."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, TemplateError
from markupsafe import Markup

from understudy.errors import InputError
from understudy.files import differing, read_json, read_log, replacing, writing
from understudy.reporting import plots, study
from understudy.reporting.gains import export_table, gain_table, headline
from understudy.reporting.hacking import hacking_panels
from understudy.reporting.metrics import meaning
from understudy.reporting.ranks import ALPHA, compared_ranks, over_data, over_seeds
from understudy.reporting.table import span
from understudy.tasks import TASKS

Panel = dict[str, Any]
Drawn = tuple[list[Panel], list[str]]


def _render(**values: Any) -> str:
    environment = Environment(loader=PackageLoader("understudy", "reporting"), autoescape=True)
    return environment.get_template("template.html.j2").render(**values)


def _panel(title: str, svg: str, caption: str) -> Panel:
    return {"title": title, "svg": Markup(svg), "caption": caption}


def render_run(folder: Path, drawn: Drawn | None = None) -> Path:
    """Write `report.html` from the files of a run folder; panels without data are left out.

    Args:
        drawn: the result of `run_panels`, if it was called already.

    Raises:
        InputError: a file is damaged, or differs from what the run wrote.
    """
    facts = read_json(folder / "run.json") or {}
    if not isinstance(facts.get("method"), str) or not isinstance(facts.get("files", {}), dict):
        raise InputError(f"{folder / 'run.json'} is damaged, or no run's: it names no method.")
    changed = differing(folder, facts.get("files", {}))
    if changed is not None:
        raise InputError(f"{folder / changed} is missing or differs from what the run wrote. Put it back.")
    with _read_as_written(folder / "run.json", folder / "evaluation.json"):
        evaluation, recipe = read_json(folder / "evaluation.json") or {}, folder / "recipe.yaml"
        panels, damage = drawn or run_panels(folder)
        gains = [*gain_table(evaluation), *export_table(folder, facts)]
        return _written(
            folder,
            dict(
                title=f"{facts.get('method', 'run')} on {facts.get('task', '')}",
                subtitle=f"student {facts.get('student')} · teacher {facts.get('teacher')} · seed {facts.get('seed')}",
                facts=facts,
                headline=headline(evaluation),
                **_metrics(facts, evaluation),
                panels=panels + _pictures(folder, evaluation.get("pictures", {})),
                sections=[{**table, "panels": [], "recipe": ""} for table in [*gains, *evaluation.get("tables", [])]],
                notes=evaluation.get("notes", []) + _unseen(folder) + damage,
                recipe=_text(recipe) if recipe.is_file() else "",
            ),
        )


def run_panels(folder: Path) -> Drawn:
    """The drawn panels of a run, and notes on damaged lines of its logs."""
    panels, damage = _training(folder)
    panels += [_panel(*found) for found in hacking_panels(folder)]
    return panels + _panels(read_json(folder / "evaluation.json") or {}), damage


def _written(folder: Path, values: dict[str, Any]) -> Path:
    out = folder / "report.html"
    page = _render(**values)
    with replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
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


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is damaged: it is no text ({error}).") from error


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_SAMPLES = ("written", "tokens", "empty", "unended", "share", "replayed", "replay_age")


def _whole(line: dict[str, Any]) -> bool:
    """Whether a line of `metrics.jsonl` has the fields that a report shows."""
    terms, state, own = line.get("terms"), line.get("state", {}), line.get("on_policy") or dict.fromkeys(_SAMPLES, 0)
    inside = all(isinstance(v, dict) for v in (terms, state, own))
    return inside and _number(line.get("loss")) and all(_number(own.get(n)) for n in _SAMPLES)


def _damage(path: Path, lines: int) -> list[str]:
    return [f"{lines} damaged line{'s' * (lines > 1)} of {path.name} {'are' if lines > 1 else 'is'} left out."] * bool(
        lines
    )


def _training(folder: Path) -> tuple[list[Panel], list[str]]:
    """The panels of the training log, and a note on damaged lines."""
    path, looks = folder / "metrics.jsonl", folder / "validation.jsonl"
    lines, damaged = read_log(path, _whole)
    seen, wrong = _validations(folder)
    notes = _damage(path, damaged) + _damage(looks, wrong)
    if not lines:
        return [], notes
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
    panels += [_evaluations(seen, name) for name in _watched(folder, seen)]
    panels += [
        _panel("Method state", plots.curves(group, "value"), "What the method carries from step to step.")
        for group in plots.alike(_series(lines, "state"))
    ]
    return panels + _own_samples(lines), notes


def _series(lines: list[dict[str, Any]], part: str) -> dict[str, tuple[list[int], list[float | None]]]:
    """The values under `part` in the lines of a log, by name; `None` where a line lacks it."""
    names = dict.fromkeys(name for line in lines for name in line.get(part, {}))
    return {n: ([x["step"] for x in lines], [x.get(part, {}).get(n) for x in lines]) for n in names}


def _watched(folder: Path, seen: Sequence[dict[str, Any]], most: int = 3) -> list[str]:
    """The metrics whose validation curves are shown: the task's main metric, the likelihood, then others."""
    task = (read_json(folder / "run.json") or {}).get("task")
    first = [TASKS[task].metric] if task in TASKS else []
    names = [n for n in (seen[-1] if seen else {}) if n != "step"]
    return [n for n in dict.fromkeys([*first, "nll", *names]) if n in names][:most]


def _validations(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The evaluations during training, and the number of damaged lines of their log."""
    return read_log(folder / "validation.jsonl", lambda line: all(map(_number, line.values())))


def _evaluations(seen: Sequence[dict[str, Any]], name: str) -> Panel:
    held = [x for x in seen if name in x]
    curve = {name: ([x["step"] for x in held], [x[name] for x in held])}
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
        f"Share of the examples whose text a model wrote. Up to the last log it wrote {written:.0f} texts of "
        f"{tokens / written:.1f} tokens, {empty:.0f} empty and {unended:.0f} without an end; the oldest mean age of replays "
        f"is {oldest:.1f} steps. Of several processes this is the first. Every text, with the step whose weights wrote it, "
        "the step that it is for and the example of its prompt, is in samples.jsonl."
    )
    return [_panel("Own samples", plots.curves({n: (steps, v) for n, v in series.items()}, "share"), caption)]


def _panels(evaluation: dict[str, Any]) -> list[Panel]:
    panels: list[Panel] = [
        _panel(s["title"], plots.scatter(s["points"], s["xlabel"], s["ylabel"]), s["caption"])
        for s in evaluation.get("scatters", [])
    ]
    panels += [_panel(t["title"], plots.tree(t["nodes"]), t["caption"]) for t in evaluation.get("trees", [])]
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
                "How often student and teacher choose the same class, by the student's confidence."
                + _by_teacher(evaluation.get("fidelity_by_teacher")),
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


def _by_teacher(found: dict[str, Any] | None) -> str:
    """A sentence on the agreement where the teacher is right, and where it is wrong."""
    parts = {"right": "is right", "wrong": "is wrong"} if found is not None else {}
    said = [f"{found[k]:.3f} where the teacher {name}" for k, name in parts.items() if found and found[k] is not None]
    return f" It is {' and '.join(said)}." if said else ""


def _pictures(folder: Path, pictures: dict[str, str]) -> list[Panel]:
    """The pictures of the run as panels, embedded in the page."""
    panels = []
    for caption, name in pictures.items():
        if not _inside(folder, name):
            raise InputError(
                f"{folder / 'evaluation.json'} names the picture {name!r}, which is not in the run folder."
            )
        if (folder / name).is_file():
            code = base64.b64encode((folder / name).read_bytes()).decode()
            image = Markup('<img alt="{}" src="data:image/png;base64,{}">').format(caption, code)
            panels.append(_panel(caption.split(":")[0], image, caption))
    return panels


def _inside(folder: Path, name: Any) -> bool:
    return isinstance(name, str) and (folder / name).resolve().is_relative_to(folder.resolve())


def render_comparison(folder: Path) -> Path:
    """Write `report.html` of a folder with `comparison.json`, or with several such folders below it."""
    found = sorted(folder.glob("*/comparison.json")) if not (folder / "comparison.json").is_file() else None
    parts = [_comparison(p.parent) for p in found] if found is not None else [_comparison(folder)]
    panels, notes = _ranks(folder, over_data([read_json(p) or {} for p in found]), "data sets") if found else ([], [])
    return _written(
        folder,
        dict(
            title="Comparison",
            subtitle="equal budgets, paired over seeds",
            facts=parts[0]["facts"] if parts else {},
            sections=parts,
            headings=[],
            rows=[],
            panels=panels,
            notes=notes,
            recipe="",
        ),
    )


def _ranks(folder: Path, scores: dict[str, list[float]], blocks: str) -> Drawn:
    """The plot of mean ranks, also in a file of its own, or a sentence on why there is none."""
    file = folder / "critical_difference.svg"
    found = compared_ranks(scores)
    if isinstance(found, str):
        file.unlink(missing_ok=True)
        return [], [f"No ranks: {found}."]
    svg = plots.ranked(found.names, found.ranks, found.difference, found.groups)
    with writing(file):
        file.write_text(plots.standalone(svg), encoding="utf-8")
    test = found.friedman
    said = f"Friedman's test: χ² = {test.statistic:.2f}, p = {test.p:.2g}, "
    if test.p < ALPHA:
        said += f"so some differ. A bar joins methods less than the critical difference {found.difference:.2f} apart "
        said += f"(Nemenyi, α = {ALPHA})."
    else:
        said += f"so nothing tells the methods apart at α = {ALPHA}, and one bar joins all of them."
    title = f"Mean ranks over {test.n} {blocks}"
    return [_panel(title, svg, f"1 is the best of a block, equal values share their mean rank. {said}")], []


def render_study(folder: Path) -> Path:
    """Write `report.html` of a folder with `study.json`."""
    file = folder / "study.json"
    value = read_json(file) or {}
    try:
        sections = _study_sections(value)
        return _written(
            folder,
            dict(
                title=value["title"],
                subtitle=f"gains over {value['baseline']}, and agreement with the teacher",
                facts={},
                headings=study.headings(value),
                rows=study.rows(value),
                panels=_study_panels(value),
                sections=sections,
                notes=study.notes(value),
                recipe="",
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged: {type(error).__name__} {error}.") from error


def _study_sections(value: dict[str, Any]) -> list[dict[str, Any]]:
    fixed = value["fixed_temperature"]
    parts = {"Tests, with the best τ of each" if fixed else "Tests": value["best_temperature"]}
    parts |= {f"Tests, with τ = {tau}": found for tau, found in fixed.items()}
    return [
        {"title": title, "headings": study.ANSWERED, "rows": study.answers(found, value["measures"]), "panels": []}
        for title, found in parts.items()
    ]


def _study_panels(value: dict[str, Any]) -> list[Panel]:
    """The gain of each point against what gains are correlated with, as far as it varies."""
    panels = []
    for key, what in study.VARIABLES.items():
        known = [p for p in value["points"] if p[key] is not None]
        if len({p[key] for p in known}) > 1:
            name = dict(zip(("agreement", "fidelity"), value["measures"], strict=True)).get(key, what)
            dots: dict[str, list[tuple[float, float]]] = {}
            for p in known:
                dots.setdefault(p["method"], []).append((p[key], p["gain"]))
            caption = f"Each dot is a teacher, student, method and temperature, by {what}."
            panels.append(_panel(f"Gain by {name}", plots.dots(dots, name, "gain", key == "student_size"), caption))
    return panels


def _comparison(folder: Path) -> dict[str, Any]:
    file = folder / "comparison.json"
    with _read_as_written(file):
        return _section(folder, read_json(file) or {})


@contextmanager
def _read_as_written(*files: Path) -> Iterator[None]:
    """Turn what follows from values of other kinds than were written into an `InputError` that names the files."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, TemplateError) as error:
        if isinstance(error, InputError):
            raise
        named = " or ".join(str(file) for file in files)
        raise InputError(
            f"{named} is damaged: {type(error).__name__} {error}. Put it back as it was written."
        ) from error


def _section(folder: Path, value: dict[str, Any]) -> dict[str, Any]:
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
    ranks, missing = _ranks(folder, over_seeds(value), "seeds")
    panels += ranks
    shares = _shares(value["runs"])
    if any(shares.values()):
        panels.append(_panel("Where the time goes", plots.time_bar(shares), "First seed of each method."))
    firsts, damage = _first_panels(folder, value["runs"], metric)
    panels += firsts
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
        "notes": [*(f"{name}: {meaning(name)}" for name in (metric, *others)), *missing, *damage],
        "recipe": yaml.safe_dump(value.get("recipe", {}), sort_keys=False),
    }


def _shares(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {r["method"]: r["cost"]["time_share"] for r in reversed(runs)}


def _first_panels(folder: Path, runs: Sequence[dict[str, Any]], metric: str) -> Drawn:
    """Panels of the first seed of each method: its loss on separate axes, since losses differ in scale, and the
    validation curves of the metric on common axes. And notes on damaged lines of their logs."""
    panels: list[Panel] = []
    notes: list[str] = []
    curves: dict[str, Any] = {}
    first: dict[str, dict[str, Any]] = {}
    for run in runs:
        if not _inside(folder, run["folder"]):
            raise InputError(
                f"{folder / 'comparison.json'} names the run {run['folder']!r}, which is not in its folder."
            )
        first.setdefault(run["method"], run)
    for run in first.values():
        home, name = folder / run["folder"], run["method"]
        lines, damaged = read_log(home / "metrics.jsonl", _whole)
        looks, wrong = _validations(home)
        for log, number in (("metrics.jsonl", damaged), ("validation.jsonl", wrong)):
            notes += [f"{run['folder']}: {said}" for said in _damage(home / log, number)]
        if lines:
            loss = {name: ([x["step"] for x in lines], [x["loss"] for x in lines])}
            panels.append(
                _panel(f"Loss of {name}", plots.curves(loss, "loss"), "Losses of methods are not comparable.")
            )
        seen = [x for x in looks if metric in x]
        if seen:
            curves[name] = ([x["step"] for x in seen], [x[metric] for x in seen])
    if curves:
        panels.insert(0, _panel(f"Validation {metric}", plots.curves(curves, metric), "While training."))
    return panels, notes
