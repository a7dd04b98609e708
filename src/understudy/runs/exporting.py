"""Export of a finished run's student to ONNX, with the quality and speed of what was exported beside the student's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from understudy.data import Batch
from understudy.errors import InputError
from understudy.evaluation.gain import sizes, speeds
from understudy.files import write_json
from understudy.models import ModelAdapter
from understudy.models.onnx import OnnxAdapter, write_int8, write_onnx
from understudy.reporting import render_run
from understudy.runs.check import saved_student
from understudy.runs.evaluating import evaluate_split, timed_batches
from understudy.runs.folder import hashes_of
from understudy.tasks import TASKS
from understudy.tasks import get as get_task
from understudy.tasks.base import LabelledTask

FOLDER = "export"


def export_run(run: Path, int8: bool = False) -> dict[str, Any]:
    """Write `RUN/export/model.onnx`, and `model.int8.onnx` if asked; evaluate and time them on the evaluation split.

    Args:
        run: the folder of a finished run.
        int8: also quantise the weights (dynamic quantisation).

    Returns:
        `student` (the hash of its weights), `metric`, and `models`: by name (`student`, `onnx`, `int8`) its `quality`, `bytes`,
        `latency_seconds`, `examples_per_second` and `agreement`, the share of rows with the student's own prediction. It is
        stored in `export.json` too, and shown by the report.

    Raises:
        InputError: the run is not finished, the extra is missing, or the model cannot be exported.
    """
    recipe, prepared, student = saved_student(run)
    task, folder = get_task(recipe.task), run / FOLDER
    if not _by_logits(task):
        can = ", ".join(name for name, one in TASKS.items() if _by_logits(one))
        raise InputError(
            f"{run} is a run of {task.name}, which evaluates by more than a model's logits: only students of {can} can be "
            "exported, and their exports compared with them."
        )
    student = student.cpu()
    prepared = replace(prepared, measure=None)  # further measurements are of the trained model, not of its files
    one, many = timed_batches(recipe, prepared)
    shown = Batch.from_dict(many)
    if len(shown.ids) < 2:
        raise InputError(f"{run}: its {recipe.eval_split} split has one example and the exporter is shown two or more.")
    files = {"onnx": folder / "model.onnx"}
    write_onnx(student, shown, files["onnx"])
    if int8:
        files["int8"] = folder / "model.int8.onnx"
        write_int8(files["onnx"], files["int8"])
    models: dict[str, ModelAdapter] = {"student": student}
    models |= {name: OnnxAdapter(file, student) for name, file in files.items()}
    timed = speeds(models, one, many)
    hashes = hashes_of(run)
    found: dict[str, Any] = {"student": hashes.get("student"), "metric": task.metric, "models": {}}
    for name, model in models.items():
        size = sizes(student.model)["bytes"] if name == "student" else _bytes(files[name])
        metrics = evaluate_split(task, prepared, model, student, recipe.eval_split)["metrics"]
        found["models"][name] = {
            "quality": metrics[task.metric],
            "agreement": metrics["agreement"],
            "bytes": size,
            "latency_seconds": timed["latency_seconds"][name],
            "examples_per_second": timed["examples_per_second"][name],
        }
    found |= {"examples": timed["examples"], "rounds": timed["rounds"], "threads": torch.get_num_threads()}
    write_json(folder / "export.json", found)
    render_run(run)
    return found


def _by_logits(task: Any) -> bool:
    """Whether a task evaluates models by their logits alone."""
    return type(task).evaluate is LabelledTask.evaluate


def _bytes(file: Path) -> int:
    """Of a model's file and what lies beside it (weights above 2 GB)."""
    return sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*"))
