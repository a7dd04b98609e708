"""Pipelines: methods that are a list of resumable stages (generate, filter, train, repeat)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import Field

from understudy.curation import Funnel, Item
from understudy.data.text import write_records
from understudy.errors import InputError
from understudy.files import read_json, write_json
from understudy.generation import (
    Budget,
    Completion,
    Request,
    RequestLog,
    Source,
    Spent,
    generate,
    limits_from,
    log_of,
    source_from,
    tally_all,
)
from understudy.training.method import Method

Made = TypeVar("Made", bound=Item)
Ask = Callable[[Sequence[Request]], list[Completion]]
"""Completions of requests, through a log: what it holds is not asked for again."""

ORACLE = "oracle"
"""As the name of a model: the embedded world's own, whose truth is known."""


@dataclass(frozen=True)
class PipelineContext:
    """The inputs of a pipeline's stages.

    Args:
        recipe: the whole recipe, as plain values. folder: of the run; stages keep their files in it.
        models: every model that the recipe names, as a specification, by its role (`teacher`, `student`, `critic`); several
            models of one role are `ROLE.NAME`.
        run_recipe: carries out a recipe in a folder below the run's, and returns its result.
        oracle: the source that a task's embedded world has for a role. budget: of all models together.
        logs: folder of the request logs, one a role. funnel: what each step kept and dropped, over all stages so far.
        prefix: begins the names of stages and runs, see `round`.
    """

    recipe: Mapping[str, Any]
    folder: Path
    models: Mapping[str, Any]
    run_recipe: Callable[[str, Mapping[str, Any]], Any]
    oracle: Callable[[str], Source]
    logs: Path
    budget: Budget | None = None
    funnel: list[dict[str, Any]] = field(default_factory=list)
    prefix: str = ""
    _sources: dict[str, Source] = field(default_factory=dict)

    def round(self, number: int) -> Self:
        """The same, with `round-N/` before the names of stages and runs.

        A request of the same content has the same answer in every round: give it another `draw` for another one.
        """
        return replace(self, prefix=f"round-{number}/")

    # -- stages -------------------------------------------------------------------------------------------------------

    def stage(self, name: str, kind: type[Made], make: Callable[[Funnel], Iterable[Made]]) -> list[Made]:
        """The items that `make` returns, or returned before.

        They are in `stages/NAME.jsonl`, whole or absent; `stages/NAME.json` is written behind them, with their hash and what
        the funnel counted. A stage that was cut off is made again, so what is dear inside it must resume by itself (a
        request log does).

        Args:
            kind: of the items. make: is given a funnel, to count what it keeps and drops.

        Raises:
            InputError: the file is not the one that was written.
        """
        name = self.prefix + name
        file, seal = (self.folder / "stages" / f"{name}{ending}" for ending in (".jsonl", ".json"))
        if not seal.is_file():
            seal.parent.mkdir(parents=True, exist_ok=True)
            counted = Funnel()
            items = [
                item if item.id else item.model_copy(update={"id": f"{name}/{i}"})
                for i, item in enumerate(make(counted))
            ]
            write_records(file, [item.model_dump(mode="json") for item in items])
            write_json(seal, {"items": len(items), "sha256": _hash(file), "funnel": counted.rows})
        facts = read_json(seal) or {}
        counts = facts.get("funnel")
        if not isinstance(counts, list) or not all(isinstance(row, dict) for row in counts):
            raise InputError(f"{seal} is damaged: put it back, or delete it to have stage {name} made again.")
        if not file.is_file() or _hash(file) != facts.get("sha256"):
            raise InputError(
                f"{file} is not what stage {name} wrote: put it back, or delete {seal.name} too to have it made again."
            )
        self.funnel.extend({"stage": name, **row} for row in counts)
        return [kind.model_validate_json(line) for line in file.read_text(encoding="utf-8").split("\n") if line]

    def train(self, name: str, values: Mapping[str, Any]) -> Any:
        """Carry out a recipe of its own in `folder / NAME`; it resumes like any run.

        Args:
            values: the recipe. It has the teacher that they name, or none.

        Returns:
            Its result, with `student`, `metrics` and `folder`.
        """
        return self.run_recipe(self.prefix + name, values)

    # -- models that write ----------------------------------------------------------------------------------------------

    def members(self, role: str) -> list[str]:
        """The models of a role: itself, or `ROLE.NAME` of each where there are several; none where the recipe names none."""
        return [name for name in self.models if name == role or name.startswith(f"{role}.")]

    def source(self, role: str) -> Source:
        """Who writes in a role: the world's oracle, a model behind an endpoint or one in this process. Loaded once."""
        if role not in self._sources:
            spec = self.models[role]
            self._sources[role] = self.oracle(role) if spec.model == ORACLE else source_from(spec)
        return self._sources[role]

    def ask(self, role: str, requests: Sequence[Request]) -> list[Completion]:
        """Completions of the model in a role, through its request log `logs/ROLE.jsonl`, which has a file for each server of
        a pool: what the log holds is not asked for again. The run's budget and the endpoint's own bounds hold."""
        with self.asking(role) as ask:
            return ask(requests)

    @contextmanager
    def asking(self, role: str) -> Iterator[Ask]:
        """`ask` of one role, with its log kept open, for many small parts."""
        source, limits = self.source(role), limits_from(self.models[role])

        def ask(requests: Sequence[Request]) -> list[Completion]:
            others = self.spent() if self.budget is not None else {}
            before = sum((s for name, s in others.items() if name != role), Spent())
            return generate(source, requests, log, budget=self.budget, before=before, **limits)

        with log_of(source, self.logs / f"{role}.jsonl") as log:
            yield ask

    def check_log_probs(self, role: str, request: Request, why: str, remedy: str) -> None:
        """Ask once before all, for not every server tells log-probabilities; the answer is in the log and not asked again.

        Args:
            why: begins the message. remedy: ends it, beside having the server tell them.

        Raises:
            InputError: it tells none.
        """
        says = "gives no log-probabilities"
        try:
            missing = self.ask(role, [request])[0].log_prob is None
        except InputError as error:
            if "logprob" not in str(error).lower().replace("-", ""):
                raise
            missing, says = True, f"refuses log-probabilities ({error})"
        if missing:
            name = self.models[role].model
            raise InputError(f"{why}, and {role} {name!r} {says}: {remedy}, or have the server tell them.")

    def ask_trained(self, source: Source, requests: Sequence[Request], name: str) -> list[Completion]:
        """Completions of a model that the run itself has trained, through `logs/NAME.jsonl` of the run folder. No budget
        counts them."""
        with self.asking_trained(source, name) as ask:
            return ask(requests)

    @contextmanager
    def asking_trained(self, source: Source, name: str) -> Iterator[Ask]:
        """`ask_trained` with its log kept open, for many small parts."""
        with RequestLog(self.folder / "logs" / f"{self.prefix}{name}.jsonl", source.name) as log:
            yield lambda requests: generate(source, requests, log, concurrency=64)

    def spent(self) -> dict[str, Spent]:
        """What each model has been asked, by role: all that is in its log, earlier runs too."""
        found = {}
        for role, spec in self.models.items():
            requests, read, written = tally_all(self.logs / f"{role}.jsonl")
            cost = spec.endpoint.cost(read, written) if spec.endpoint is not None else 0.0
            if requests:
                found[role] = Spent(requests, read, written, cost)
        return found


class Pipeline(Method):
    """Base of procedures. Subclasses write `run`; their options are fields, like those of any method.

    Class attribute: `teacher_writes`, whether the teacher is asked for text: it is the world's oracle where a recipe names
    none, and is not trained first. Otherwise the procedure's runs learn from it, and share it if it is trained first.
    """

    teacher_writes: ClassVar[bool] = True

    log: str | None = Field(None, description="Folder of the request logs, to share them between runs.")

    def check(self, context: PipelineContext) -> Any:
        """What can be known to fail before anything is asked or trained; `understudy check` asks for it too.

        Raises:
            InputError: the recipe cannot be carried out.
        """

    def need_answers(self, context: PipelineContext) -> None:
        """Refuse a task whose answers cannot be checked."""
        task = context.recipe["task"]
        if task != "reasoning":
            raise InputError(f"Method {self.name!r} checks final answers and task {task!r} has none: task=reasoning.")

    def run(self, context: PipelineContext) -> dict[str, Any]:
        """Run all stages in order.

        Returns:
            The evaluation: `metrics`, and the panels of the report.
        """
        raise NotImplementedError


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
