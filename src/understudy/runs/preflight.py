"""The pre-flight check, before anything expensive starts. Each failure is one line with the remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, Subset

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models import ModelAdapter
from understudy.tasks import Prepared, Task


@dataclass
class Findings:
    """Findings of the check: notes, and warnings that do not stop the run.

    Args:
        overview: the inputs that were read and the use of the teacher, by topic.
    """

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    overview: dict[str, str] = field(default_factory=dict)


def check(
    task: Task,
    prepared: Prepared,
    student: ModelAdapter,
    teacher: ModelAdapter | None,
    *,
    sample: int | None = None,
    batch: int = 32,
) -> Findings:
    """Compare student and teacher on a sample of the validation split, and look for rows that train nothing.

    Raises:
        InputError: no row of the sample counts, teacher and student disagree on the classes, or the student's weights
            are quantised and it has no adapters.
    """
    if getattr(student.model, "is_quantized", False) and not hasattr(student.model, "peft_config"):
        raise InputError(
            "The student's weights are quantised, which no optimiser can move, and it has no adapters: add student.peft, or "
            "leave student.quantization out."
        )
    found = Findings(list(prepared.notes), list(prepared.warnings))
    sample = task.preflight_examples if sample is None else sample
    loader = sample_loader(prepared, "validation", sample, batch)
    rows = [Batch.from_dict(b).num_items for b in sample_loader(prepared, "train", 64, 1)]
    if sum(rows) == 0:
        raise InputError(
            "No row of the training sample counts: every label is masked. Check the columns, the chat template and "
            "data.max_length (prompts may fill the whole row)."
        )
    empty = sum(r == 0 for r in rows)
    if empty:
        found.warnings.append(f"{empty} of {len(rows)} sampled training examples have no row that counts.")
    if prepared.tokenizer is not None and getattr(student.model, "can_generate", lambda: False)():
        _check_ends(prepared, student, teacher, found)
    found.scores = scores = task.evaluate(student, teacher, loader)["metrics"]
    if teacher is not None:
        measure, sign = ("nll", 1) if "nll" in scores else (task.metric, -1 if task.higher_is_better else 1)
        own, taught = scores[measure], scores.get(f"teacher_{measure}")
        if taught is not None and sign * taught > sign * own:  # equal if the student is a copy of the teacher
            found.warnings.append(
                f"The teacher is no better than the untrained student on {sample} validation examples "
                f"({measure} {taught:.3f} against {own:.3f}): check that it fits this data, or train it."
            )
    return found


def _check_ends(prepared: Prepared, student: ModelAdapter, teacher: ModelAdapter | None, found: Findings) -> None:
    """Warn about end-of-sequence ids that differ, with which the student's texts would never end."""
    eos = prepared.tokenizer.eos_token_id
    if eos is None:
        found.warnings.append("The tokenizer has no end-of-sequence token: the student cannot learn to stop.")
    for side, model in (("student", student), ("teacher", teacher)):
        ids = _ends(getattr(model, "model", None))
        if not ids or eos is None or eos in ids:
            continue
        says = f"The {side} ends a text with token {min(ids)} and the tokenizer with {eos}"
        if side == "teacher" and not prepared.facts.get("chosen"):
            raise InputError(
                f"{says}: the student would not learn to stop. Name the tokenizer that both are to use (data.tokenizer), or "
                "fix eos_token_id in the teacher's configuration."
            )
        found.warnings.append(f"{says}.")


def _ends(model: Any) -> set[int]:
    """The ids that end a model's texts, by its configurations."""
    found: set[int] = set()
    for where in ("config", "generation_config"):
        own = getattr(getattr(model, where, None), "eos_token_id", None)
        found.update(own if isinstance(own, list) else [own] if own is not None else [])
    return found


def sample_loader(prepared: Prepared, split: str, number: int, batch: int) -> DataLoader[Any]:
    """The first `number` examples of a split in batches."""
    data = prepared.split(split)
    return DataLoader(Subset(data, range(min(number, len(data)))), batch_size=batch, collate_fn=prepared.collate)
