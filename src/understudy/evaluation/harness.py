"""Named tasks of lm-evaluation-harness (the package `lm_eval`) for a student that is a language model of transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from understudy.errors import InputError, nearest
from understudy.models import ModelAdapter, evaluating
from understudy.models.sharding import ranks
from understudy.training import Method, Pipeline
from understudy.training import checkpoint as ck

PREFIX = "lm_eval/"
"""Of the names of metrics: `lm_eval/TASK/METRIC`."""


class HarnessSpec(BaseModel):
    """Which tasks a student is evaluated on at the end of its run, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...] = Field(
        min_length=1, description="Names of tasks, groups or tags, as `lm_eval --tasks` takes them; a list or `a,b`."
    )
    num_fewshot: int | None = Field(None, ge=0, description="Examples in each prompt; the task's own if not given.")
    limit: float | None = Field(None, gt=0, description="Documents of each task at most; below 1 a share of them.")
    include_path: str | None = Field(None, description="A folder of further tasks, as YAML files.")
    batch_size: int = Field(8, ge=1, description="Requests that the student answers at once.")
    apply_chat_template: bool = Field(False, description="Put prompts into the tokenizer's chat template.")

    @model_validator(mode="before")
    @classmethod
    def _tasks_alone(cls, value: Any) -> Any:
        return {"tasks": value} if isinstance(value, (str, list)) else value

    @field_validator("tasks", mode="before")
    @classmethod
    def _separated(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def check_run(method: Method, task: str, kind: str) -> None:
    """Raise an `InputError` for a run that has no language model of its own.

    Args:
        task, kind: name of the run's task, and the kind of its batches.
    """
    if isinstance(method, Pipeline):
        raise InputError(
            f"lm_eval is about the student of one run and method {method.name!r} makes several: leave it out, and call "
            "`understudy evaluate RUN --tasks ...` on the run inside its folder."
        )
    if kind not in ("text", "preference"):
        raise InputError(f"lm_eval evaluates language models and the batches of {task!r} are {kind}: leave it out.")


def check_tasks(spec: HarnessSpec) -> None:
    """Load the tasks with their data, so that nothing is trained for an evaluation that cannot be made.

    Raises:
        InputError: the package is missing, a task is unknown or cannot be loaded, or there are several processes.
    """
    if find_spec("lm_eval") is None:
        raise InputError("lm_eval.tasks need the extra: pip install understudy[lm-eval].")
    if ranks() > 1:
        raise InputError(
            f"lm_eval evaluates in one process and there are {ranks()}: leave it out, and call `understudy evaluate RUN --tasks "
            f"{','.join(spec.tasks)}` after the run."
        )
    if spec.include_path is not None and not Path(spec.include_path).is_dir():
        raise InputError(
            f"lm_eval.include_path {spec.include_path} is no folder: name one that holds YAML files of tasks."
        )
    manager = _manager(spec)
    for name in spec.tasks:
        if name not in manager.task_index:
            known = manager.all_tasks
            raise InputError(
                f"lm_eval has no task {name!r}.{nearest(name, known)} `lm_eval ls tasks` lists {len(known):,} names; a folder "
                "of your own is lm_eval.include_path."
            )
        try:
            manager.load([name])
        except Exception as error:  # from a task's own code, its data set, or the network
            said = str(error).strip().splitlines() or [""]
            raise InputError(
                f"lm_eval task {name!r} cannot be loaded ({type(error).__name__}: {said[0][:200]}): its data must be at hand "
                "or reachable."
            ) from None


def check_student(student: ModelAdapter, tokenizer: Any) -> None:
    """Raise an `InputError` for a student that the harness cannot ask: one that is no language model of transformers."""
    config = getattr(student.model, "config", None)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if tokenizer is None or not known or not getattr(student.model, "can_generate", lambda: False)():
        raise InputError(
            f"lm_eval evaluates language models of transformers and the student is {type(student.model).__name__}: leave "
            "lm_eval out."
        )


def evaluate_tasks(student: ModelAdapter, tokenizer: Any, spec: HarnessSpec) -> dict[str, Any]:
    """Evaluate a student on the tasks. Random states are as before afterwards.

    Returns:
        `{version, settings, rows}` with a row `{task, task_version, filter, num_fewshot, metric, value, stderr, higher_is_better,
        documents}` for each metric of each task and group; `stderr` is `None` where the harness has none.
    """
    check_student(student, tokenizer)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    before = ck.rng_state()
    with evaluating(student):
        # The harness may add a pad token to the tokenizer.
        model = HFLM(pretrained=student.model, tokenizer=copy.deepcopy(tokenizer), batch_size=spec.batch_size)
        found: Any = lm_eval.simple_evaluate(
            model=model,
            tasks=list(spec.tasks),
            num_fewshot=spec.num_fewshot,
            limit=spec.limit,
            apply_chat_template=spec.apply_chat_template,
            task_manager=_manager(spec),
            log_samples=False,
        )
    ck.set_rng_state(before)
    rows = [row for task in found["results"] for row in _rows(task, found)]
    return {"version": lm_eval.__version__, "settings": spec.model_dump(mode="json", exclude_none=True), "rows": rows}


def _manager(spec: HarnessSpec) -> Any:
    """The index of all tasks. It takes seconds, so that it is made anew only if files of the caller's own folder change."""
    folder = spec.include_path
    files = sorted(Path(folder).rglob("*.yaml")) if folder is not None else []
    return _indexed(folder, tuple((str(file), file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=1)
def _indexed(folder: str | None, files: tuple[tuple[str, int], ...]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _rows(task: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    values: Mapping[str, Any] = found["results"][task]
    rows = []
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        rows.append(
            {
                "task": task,
                "task_version": found["versions"].get(task),
                "filter": chosen,
                "num_fewshot": found["n-shot"].get(task),
                "metric": metric,
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                "documents": found["n-samples"].get(task, {}).get("effective"),
            }
        )
    return rows


def named_metrics(found: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """The values by the name of a metric, `lm_eval/TASK/METRIC` with a filter behind it where there are several, and what each
    is."""
    metrics, explained = {}, {}
    for row in found["rows"]:
        shown = row["metric"] if row["filter"] == "none" else f"{row['metric']}_{row['filter']}"
        name = f"{PREFIX}{row['task']}/{shown}"
        metrics[name] = row["value"]
        better = {True: " Higher is better.", False: " Lower is better."}.get(row["higher_is_better"], "")
        explained[name] = f"`{row['metric']}` of the task {row['task']} by lm-evaluation-harness.{better}"
    return metrics, explained


def harness_table(found: Mapping[str, Any]) -> dict[str, Any]:
    """The rows as a table for the report and the model card."""
    headings = ["task", "version", "filter", "few-shot", "documents", "metric", "value", "standard error"]

    def cells(row: Mapping[str, Any]) -> list[str]:
        plain = (row[k] for k in ("task", "task_version", "filter", "num_fewshot", "documents", "metric"))
        stderr = row["stderr"]
        return [
            *("–" if v is None else str(v) for v in plain),
            f"{row['value']:.4f}",
            "–" if stderr is None else f"{stderr:.4f}",
        ]

    title = f"Tasks of lm-evaluation-harness {found['version']}"
    return {"title": title, "headings": headings, "rows": [cells(row) for row in found["rows"]]}
