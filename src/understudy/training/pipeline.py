"""Pipelines: methods that are a list of resumable stages (generate, filter, train, repeat)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.errors import InputError
from understudy.files import replacing
from understudy.generation import Completion, Request, RequestLog, Source, generate
from understudy.training.method import Method


@dataclass(frozen=True)
class PipelineContext:
    """The inputs of a pipeline's stages.

    Args:
        recipe: the whole recipe, as plain values.
        folder: the run folder, where stages keep their files.
        teacher: the recipe's teacher as a model specification, or `None`.
        train: `train(name, values)` runs the recipe `values` in `folder / name` (it resumes like any run) and returns its
            result, with `student`, `metrics` and `folder`. Its teacher is the one in `values`, or none.
    """

    recipe: Mapping[str, Any]
    folder: Path
    train: Callable[[str, Mapping[str, Any]], Any]
    teacher: Any = None

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of `make()`, kept as JSON in `stages/NAME.json` and read from there the next time. An interrupted
        stage starts again, so expensive work inside it must resume by itself (a request log does)."""
        file = self.folder / "stages" / f"{name}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(make(), indent=1)
            with replacing(file) as temporary:
                temporary.write_text(text)
        try:
            return json.loads(file.read_bytes().decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is damaged ({error}): delete it, and the stage is made again.") from error

    def ask(
        self, source: Source, requests: Sequence[Request], name: str, folder: Path | None = None, **limits: Any
    ) -> list[Completion]:
        """Generate completions with the request log `NAME.jsonl` in `folder` (the run folder if not given). Requests
        that the log holds are not sent again. `limits` are those of `understudy.generation.generate`."""
        with RequestLog((folder or self.folder / "logs") / f"{name}.jsonl", source.name) as log:
            return generate(source, requests, log, **limits)


class Pipeline(Method):
    """Base class of pipelines. A subclass implements `run`; its options are fields, as for any method."""

    def run(self, context: PipelineContext) -> dict[str, Any]:
        """Run all stages in order.

        Returns:
            The evaluation: `metrics`, and the panels of the report.
        """
        raise NotImplementedError
