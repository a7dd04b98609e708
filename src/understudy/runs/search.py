"""Search of a student for a teacher, from the Python API and the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.runs.recipe import Recipe, load, make
from understudy.runs.run import run
from understudy.tasks import get as get_task

METHOD = "diswot"


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        student: the name of the best candidate. model: it, distilled.
        ranking: all scored candidates, the best first: `rank`, `student`, `parameters`, `operations`, `latency`, `scores`,
            and `trained`, the accuracies of those that were trained.
        metrics: the winner's, and the rank correlation of each score. folder: the run folder, with the winner's own in it.
    """

    student: str
    model: Any
    ranking: list[dict[str, Any]]
    metrics: dict[str, Any]
    folder: Path


def search(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    progress: bool = False,
    overwrite: bool = False,
    **keys: Any,
) -> SearchResult:
    """Rank students of a teacher without training, by options of method `diswot`, and distil the best.

    Args:
        recipe: as for `distill`, with the method `diswot`; `keys` override it. The space is in its options:
            `students=["convnet:{width}", "resnet{depth}:{width}"]`,
            `ranges={"width": {"low": 4, "high": 32, "step": 4}, "depth": [8, 14, 20]}`, `parameters=20000`.

    Started again on the same folder it resumes: candidates that are scored and runs that are finished are read.

    Raises:
        InputError: any problem that the caller can fix, in one line.
    """
    if isinstance(recipe, (str, Path)):
        recipe = load(recipe, [f"method={METHOD}"])
    values = recipe.dump() if isinstance(recipe, Recipe) else dict(recipe or {})
    made = make({**values, **keys, "method": METHOD})
    result = run(made, progress=progress, overwrite=overwrite)
    lines = (result.folder / "stages" / "ranking.jsonl").read_text(encoding="utf-8").splitlines()
    ranking = [json.loads(line) for line in lines]
    task, spec = get_task(made.task), made.student
    prepared = task.prepare(made)
    model = task.model(spec, prepared, result.folder / "winner" / "student").model
    return SearchResult(ranking[0]["student"], model, ranking, result.metrics, result.folder)
