"""The demonstration: an image and a text task, with and without distillation, over seeds."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from understudy.reporting import render_comparison
from understudy.runs.comparison import Comparison, compare
from understudy.runs.folder import held
from understudy.runs.recipe import load

PARTS = {"image": ["sft", "kd", "pld", "taid", "dhkd"], "text": ["sft", "kd", "pld"]}


def demo(folder: Path, seeds: int, show: Callable[[Comparison], None], progress: bool = True) -> Path:
    """Run both comparisons into `folder` and return the report's path."""
    with held(folder, several=True):
        for part, methods in PARTS.items():
            with as_file(files("understudy") / "recipes" / f"demo_{part}.yaml") as path:
                recipe = load(path, [f"output={folder / part}"])
            show(compare(recipe, methods, seeds, progress=progress))
        return render_comparison(folder)
