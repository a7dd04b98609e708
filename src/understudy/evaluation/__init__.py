"""Evaluation: task metrics, calibration, fidelity to the teacher, and the cost of a run."""

from understudy.evaluation.calibration import expected_calibration_error, fit_temperature, reliability
from understudy.evaluation.cost import CostMeter, matmul_peak
from understudy.evaluation.evaluate import evaluate
from understudy.evaluation.fidelity import by_confidence, by_teacher
from understudy.evaluation.rows import RowStatistics, row_statistics

__all__ = [
    "CostMeter",
    "RowStatistics",
    "by_confidence",
    "by_teacher",
    "evaluate",
    "expected_calibration_error",
    "fit_temperature",
    "matmul_peak",
    "reliability",
    "row_statistics",
]
