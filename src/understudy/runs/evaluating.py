"""The evaluation of a run's student on a split."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from understudy.evaluation.texts import sample_texts
from understudy.models import ModelAdapter
from understudy.runs.preflight import Findings
from understudy.tasks import Prepared, Task


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
