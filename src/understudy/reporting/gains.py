"""What was gained over the teacher, as the first line of a report and as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from understudy.evaluation.gain import sentence
from understudy.files import read_json


def headline(evaluation: dict[str, Any]) -> str:
    """The sentence of what was gained, with the reason if a part is not compared; empty for a run without teacher."""
    gain = evaluation.get("gain", {})
    return " ".join(filter(None, [sentence(gain, _speed(evaluation)), gain.get("note", "")])) if gain else ""


def _speed(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    return evaluation.get("cost", {}).get("speed")


def gain_table(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Sizes and speeds side by side, as a table of the report; none if the run recorded no sizes."""
    gain, speed = evaluation.get("gain"), _speed(evaluation)
    if not gain:
        return []
    sides = [side for side in ("student", "teacher") if side in gain]
    lines: list[tuple[str, dict[str, float], str]] = [
        ("parameters", {s: gain[s]["parameters"] for s in sides}, "{:,.0f}"),
        ("weights, MiB", {s: gain[s]["bytes"] / 2**20 for s in sides}, "{:,.3f}"),
    ]
    notes = []
    if speed:
        latency, pace = speed["latency_seconds"], speed["examples_per_second"]
        lines += [
            ("latency of one example, ms", {s: 1000 * latency[s] for s in sides}, "{:,.3f}"),
            (f"examples a second, {speed['examples']} at a time", {s: pace[s] for s in sides}, "{:,.0f}"),
        ]
        cost = evaluation["cost"]
        notes.append(
            f"Forward passes of the same batches on {cost['device']} with {cost['threads']} threads, alternating between the "
            f"models in one process: medians; the batch was timed {speed['rounds']} times."
        )
    rows = []
    for name, values, form in lines:
        row = [name, *(form.format(values[s]) for s in sides)]
        if len(sides) > 1:
            row.append(f"{values['student'] / values['teacher']:.3g}" if values["teacher"] else "–")
        rows.append(row)
    headings = ["", *sides, *(["student / teacher"] if len(sides) > 1 else [])]
    return [{"title": "What was gained", "headings": headings, "rows": rows, "notes": notes}]


def export_table(folder: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Quality, size and speed of what was exported beside the student's, as a table of the report; none if nothing was, or if
    the student has been trained since.

    Args:
        folder: of the run. facts: of its `run.json`.
    """
    found = read_json(folder / "export" / "export.json")
    if found is None or found["student"] != facts.get("hashes", {}).get("student"):
        return []
    models = found["models"]
    lines = [
        (found["metric"], "quality", 1.0, "{:.4f}"),
        ("agreement with the student", "agreement", 1.0, "{:.4f}"),
        ("file, MiB", "bytes", 2.0**-20, "{:,.3f}"),
        ("latency of one example, ms", "latency_seconds", 1e3, "{:,.3f}"),
        (f"examples a second, {found['examples']} at a time", "examples_per_second", 1.0, "{:,.0f}"),
    ]
    rows = [[name, *(form.format(scale * m[key]) for m in models.values())] for name, key, scale, form in lines]
    note = (
        f"The student in torch, and its exported files in onnxruntime, on the CPU with {found['threads']} threads: forward passes "
        f"of the same batches in turns, medians; the batch was timed {found['rounds']} times."
    )
    return [{"title": "What was exported", "headings": ["", *models], "rows": rows, "notes": [note]}]
