"""The evaluation of a run's student on a split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from understudy.evaluation.gain import gained, speeds
from understudy.evaluation.harness import HarnessSpec, evaluate_tasks, harness_table, named_metrics
from understudy.evaluation.texts import sample_texts
from understudy.models import ModelAdapter
from understudy.models.sharding import is_sharded
from understudy.runs.preflight import Findings
from understudy.runs.recipe import Recipe
from understudy.tasks import Prepared, Task
from understudy.tasks.base import LabelledTask


def evaluate_split(
    task: Task, prepared: Prepared, student: ModelAdapter, teacher: ModelAdapter | None, split: str, batch: int = 64
) -> dict[str, Any]:
    """The evaluation of a student on a split, compared with the teacher if there is one.

    Metrics of further test sets are added to those of `test`, with the name of the set as suffix (`accuracy_clean`).
    """

    def on(data: Any) -> dict[str, Any]:
        loader: DataLoader[Any] = DataLoader(data, batch_size=batch, collate_fn=prepared.collate)
        return task.evaluate(student, teacher, loader)

    found = on(prepared.split(split))
    for name, data in prepared.more_tests.items() if split == "test" else ():
        found["metrics"] |= {f"{k}_{name.removeprefix('test_')}": v for k, v in on(data)["metrics"].items()}
    if prepared.measure is not None:
        more = prepared.measure(student, teacher)
        found["metrics"] |= more["metrics"]
        found["tables"] = [*found.get("tables", []), more["table"]]
    return {"split": split, **found}


def text_tables(
    prepared: Prepared, student: ModelAdapter, teacher: ModelAdapter | None, split: str, findings: Findings
) -> list[dict[str, Any]]:
    """Sample texts of the student for the report; none for a model that generates no text."""
    if prepared.tokenizer is None:
        return []
    try:
        table = sample_texts(student, teacher, prepared.split(split), prepared.tokenizer)
    except Exception as error:  # from a model's own code; the evaluation is complete without samples
        findings.notes.append(f"No sample texts: {type(student.model).__name__} cannot write ({type(error).__name__}).")
        return []
    return [table] if table is not None else []


def add_tasks(evaluation: dict[str, Any], student: ModelAdapter, tokenizer: Any, spec: HarnessSpec) -> None:
    """Add what the student reaches on tasks of lm-evaluation-harness: the rows, a table and the metrics."""
    found = evaluate_tasks(student, tokenizer, spec)
    metrics, explained = named_metrics(found)
    evaluation["lm_eval"] = found
    evaluation["metrics"] |= metrics
    evaluation["explained"] = {**evaluation.get("explained", {}), **explained}
    evaluation["tables"].append(harness_table(found))


def gain(
    recipe: Recipe,
    task: Task,
    prepared: Prepared,
    student: ModelAdapter,
    teacher: ModelAdapter | None,
    metrics: Mapping[str, float],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was gained over the teacher: `gain` of the evaluation, and its timing, `{"speed": …}` of the cost.

    The timing is left out, with a `note` in `gain`, if the teacher does not run beside the student, or if the use of a
    model is more than one forward pass.
    """
    found = gained(student, teacher, metrics, task.metric, task.higher_is_better)
    if teacher is None:
        if recipe.teacher is not None:
            found["note"] = (
                "The teacher did not run beside the student (its outputs are stored or served, or it has other tokens or classes): "
                "its size and speed are not compared."
            )
        return found, {}
    if not isinstance(task, LabelledTask):
        found["note"] = f"Speed is not compared: a model of {task.name} is used by more than one forward pass."
        return found, {}
    if is_sharded(student) or is_sharded(teacher):
        found["note"] = "Speed is not compared: FSDP's communication would be timed with the models."
        return found, {}
    return found, {"speed": speeds({"student": student, "teacher": teacher}, *timed_batches(recipe, prepared))}


def timed_batches(recipe: Recipe, prepared: Prepared) -> tuple[dict[str, Any], dict[str, Any]]:
    """What models are timed on: the first example of the evaluation split, and its first batch."""
    split = prepared.split(recipe.eval_split)
    items = [split[i] for i in range(min(recipe.evaluation_batch, len(split)))]
    return prepared.collate(items[:1]), prepared.collate(items)
