"""One deterministic pass over a split that computes all metrics and panels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.data import DataLoader

from understudy.data import Batch
from understudy.errors import InputError
from understudy.evaluation.calibration import expected_calibration_error, reliability
from understudy.evaluation.fidelity import by_confidence, by_teacher
from understudy.evaluation.rows import RowStatistics, row_statistics
from understudy.models import ModelAdapter, evaluating


@torch.no_grad()
def evaluate(
    student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any], *, kind: str
) -> dict[str, Any]:
    """Metrics of the student, and of the teacher if there is one.

    Accuracy, NLL (nats per row), ECE, bits per byte (text), agreement and KL(teacher ‖ student). Both models run in
    evaluation mode; the mode of every module is restored.
    """
    models = [m for m in (student, teacher) if m is not None]
    parts: list[RowStatistics] = []
    size = 0
    with evaluating(*models):
        for values in loader:
            batch = Batch.from_dict(values)
            shown = [batch, batch.for_teacher()]
            signals = [m(b.to(next(m.parameters()).device)).signal for m, b in zip(models, shown, strict=False)]
            teacher_signal = signals[1].to(batch.labels.device) if teacher is not None else None
            parts.append(row_statistics(signals[0].to(batch.labels.device), teacher_signal, batch.row_labels))
            size += int(batch.bytes.sum()) if batch.bytes is not None else 0
    rows = RowStatistics.join(parts)
    if len(rows.nll) == 0:
        raise InputError("The split has no row to evaluate: every label is masked.")
    return _summary(rows, teacher is not None, size if kind == "text" else 0)


def _summary(rows: RowStatistics, taught: bool, size: int) -> dict[str, Any]:
    metrics = {
        "accuracy": float(rows.correct.mean()),
        "nll": float(rows.nll.mean()),
        "ece": expected_calibration_error(rows.confidence, rows.correct),
    }
    if size:
        metrics["bits_per_byte"] = float(rows.nll.sum()) / math.log(2) / size
    out: dict[str, Any] = {"rows": len(rows.nll), "metrics": metrics}
    if taught:
        metrics["agreement"] = float(rows.agree.mean())
        metrics["kl"] = float(rows.kl.mean())
        metrics["teacher_accuracy"] = float(rows.teacher_correct.mean())
        metrics["teacher_nll"] = float(rows.teacher_nll.mean())
        if size:
            metrics["teacher_bits_per_byte"] = float(rows.teacher_nll.sum()) / math.log(2) / size
        out["fidelity_by_confidence"] = by_confidence(rows.confidence, rows.agree, rows.kl)
        out["fidelity_by_teacher"] = by_teacher(rows.agree, rows.teacher_correct)
    out["reliability"] = reliability(rows.confidence, rows.correct)
    return out
