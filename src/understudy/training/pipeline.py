"""Procedures: methods that are a short list of resumable stages (generate, filter, train, repeat) over the same parts."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.errors import InputError
from understudy.generation import Completion, Request, RequestLog, Source, generate
from understudy.training.method import Method


@dataclass(frozen=True)
class PipelineContext:
    """What the stages of a procedure work with.

    Args:
        recipe: the whole recipe, as plain values. folder: of the run; stages keep their files in it.
        teacher: of the recipe, as a model specification, or `None`.
        train: `train(name, values)` carries out a recipe of its own in `folder / name` (it resumes like any run) and
            returns its result, with `student`, `metrics` and `folder`. It has the teacher that `values` name, or none.
    """

    recipe: Mapping[str, Any]
    folder: Path
    train: Callable[[str, Mapping[str, Any]], Any]
    teacher: Any = None

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave before: JSON in `stages/NAME.json`, whole or absent. A stage that was cut off is
        made again, so what is dear inside it must resume by itself (a request log does)."""
        file = self.folder / "stages" / f"{name}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(make(), indent=1)
            temporary = file.with_suffix(f".{uuid.uuid4().hex}.tmp")
            temporary.write_text(text)
            os.replace(temporary, file)
        try:
            return json.loads(file.read_bytes().decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is damaged ({error}): delete it, and the stage is made again.") from error

    def ask(
        self, source: Source, requests: Sequence[Request], name: str, folder: Path | None = None, **limits: Any
    ) -> list[Completion]:
        """Completions through the request log `NAME.jsonl` in `folder` (that of the run unless given): what the log
        holds is not asked for again. `limits` are those of `understudy.generation.generate`."""
        with RequestLog((folder or self.folder / "logs") / f"{name}.jsonl", source.name) as log:
            return generate(source, requests, log, **limits)


class Pipeline(Method):
    """Base of procedures. Subclasses write `carry_out`; its options are fields, like those of any method."""

    def run(self, context: PipelineContext) -> dict[str, Any]:
        """All stages in order. Returns the evaluation: `metrics`, and whatever panels the report is to show."""
        raise NotImplementedError
