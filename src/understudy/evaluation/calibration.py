"""Calibration: whether predictions with confidence c are right in a fraction c of the cases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from understudy.losses.calibration import recalibrate


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> dict[str, list[Any]]:
    """Mean confidence and accuracy in bins of equal width; `None` in empty bins.

    Args:
        confidence: `[rows]`, probability of the top class.
        correct: `[rows]`, 0 or 1.
        bins: number of bins.
    """
    which = _bin(confidence, bins)
    count = torch.bincount(which, minlength=bins)
    mean = [
        torch.bincount(which, weights=v.double(), minlength=bins) / count.clamp(min=1) for v in (confidence, correct)
    ]
    return {
        "edges": [i / bins for i in range(bins + 1)],
        "confidence": [float(m) if n else None for m, n in zip(mean[0], count, strict=True)],
        "accuracy": [float(m) if n else None for m, n in zip(mean[1], count, strict=True)],
        "count": count.tolist(),
    }


def _bin(confidence: Tensor, bins: int) -> Tensor:
    """Index of each row's bin. Bins are (a, b], so that confidence 1 is in the last."""
    rounding = 1e-9  # 7 / 25 · 25 is above 7
    return ((confidence.double() * bins - rounding).ceil().long() - 1).clamp(0, bins - 1)


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Σ over bins of share · |accuracy − confidence| (Guo et al. 2017, Eq. 3)."""
    if len(confidence) == 0:
        return 0.0
    which = _bin(confidence, bins)
    gap = torch.bincount(which, weights=correct.double() - confidence.double(), minlength=bins)
    return float(gap.abs().sum() / len(confidence))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in [0.05, 20] that minimises NLL on a validation split (Guo et al. 2017, Section 4.2).

    Args:
        logits: `[rows, classes]`.
        labels: `[rows]`.
    """

    def nll(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits.double() / torch.exp(torch.tensor(log_t)), labels))

    found = minimize_scalar(nll, bounds=(-3.0, 3.0), method="bounded", options={"xatol": 1e-4})
    return float(torch.exp(torch.tensor(found.x)))


@dataclass(frozen=True)
class Grid:
    """Expected calibration error by temperature of probabilities.

    Args:
        best: the temperature with the least error. coarse, fine: pairs of temperature and error, in order.
    """

    best: float
    coarse: list[tuple[float, float]]
    fine: list[tuple[float, float]]


def calibrate_probabilities(probs: Tensor, correct: Tensor, bins: int = 10) -> Grid:
    """The c in (0, 1] for which softmax(P / c) is best calibrated: steps of 0.1, then of 0.02 around the best (FIRST).

    Of equal errors the largest c wins, which sharpens least. Accuracy does not depend on c.

    Args:
        probs: P `[rows, k]`, probabilities of the most probable classes. correct: `[rows]`, 0 or 1, of the first.
    """

    def errors(grid: list[float]) -> list[tuple[float, float]]:
        found = []
        for c in grid:
            confidence = recalibrate(probs, "temperature", c=c).exp().amax(-1)
            found.append((c, expected_calibration_error(confidence, correct, bins)))
        return found

    def best(found: list[tuple[float, float]]) -> float:
        return min(found, key=lambda pair: (pair[1], -pair[0]))[0]

    coarse = errors([i / 10 for i in range(1, 11)])
    middle = best(coarse)
    fine = errors([c for c in (round(middle + i / 50, 10) for i in range(-5, 6)) if 0 < c <= 1])
    return Grid(best(fine), coarse, fine)
