"""What distillation gained: size and speed of the student beside the teacher's, and the quality it kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from understudy.data import Batch
from understudy.evaluation.cost import synchronize
from understudy.models import ModelAdapter, evaluating
from understudy.models.sharding import agreed

BUDGET = 0.15
"""Seconds that the timing of one batch size may take; slow models are timed `FEWEST` times nevertheless."""
FEWEST, MOST = 3, 25


def sizes(model: nn.Module) -> dict[str, int]:
    """Number of parameters, and bytes of the saved weights (parameters and buffers; tied ones count once)."""
    held = {id(value): value for value in model.state_dict(keep_vars=True).values() if isinstance(value, torch.Tensor)}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(v.numel() * v.element_size() for v in held.values()),
    }


def gained(
    student: nn.Module, teacher: nn.Module | None, metrics: Mapping[str, float], metric: str, higher_is_better: bool
) -> dict[str, Any]:
    """The part that does not depend on the machine: sizes of both models, and the metric of both.

    Args:
        teacher: `None` if it was not run beside the student: there is none, or only its stored or served outputs.
        metrics: of the evaluation; the teacher's have the prefix `teacher_`.
        metric: the task's main metric.
    """
    found: dict[str, Any] = {"student": sizes(student)}
    if teacher is None:
        return found
    found["teacher"] = sizes(teacher)
    if metric in metrics and f"teacher_{metric}" in metrics:
        found["kept"] = {
            "metric": metric,
            "higher_is_better": higher_is_better,
            "student": metrics[metric],
            "teacher": metrics[f"teacher_{metric}"],
        }
    return found


@torch.no_grad()
def speeds(models: Mapping[str, ModelAdapter], one: Mapping[str, Any], many: Mapping[str, Any]) -> Any:
    """Time forward passes of models in this process, alternating, after a warm-up; medians.

    Every rank must call it.

    Args:
        models: by name.
        one: a batch of one example.
        many: a batch of the evaluation.

    Returns:
        `latency_seconds` of one example and `examples_per_second` of the batch by name, the number of
        examples of the batch, and how often each was timed.
    """
    with evaluating(*models.values()):
        alone, _ = _medians(models, Batch.from_dict(one))
        batch = Batch.from_dict(many)
        together, rounds = _medians(models, batch)
    examples = len(batch.ids)
    return {
        "latency_seconds": alone,
        "examples_per_second": {side: examples / seconds for side, seconds in together.items()},
        "examples": examples,
        "rounds": rounds,
    }


def _medians(models: Mapping[str, ModelAdapter], batch: Batch) -> tuple[dict[str, float], int]:
    batches = {side: batch.to(next(model.parameters()).device) for side, model in models.items()}
    times: dict[str, list[float]] = {side: [] for side in models}

    def measure(side: str) -> float:
        synchronize()
        start = time.perf_counter()
        models[side](batches[side])
        synchronize()
        return time.perf_counter() - start

    warm = [sum(map(measure, models)) for _ in range(2)]
    rounds = agreed(max(FEWEST, min(MOST, int(BUDGET / max(warm[-1], 1e-9)))))  # ranks make the same calls
    for _ in range(rounds):
        for side in models:
            times[side].append(measure(side))
    return {side: max(statistics.median(values), 1e-9) for side, values in times.items()}, rounds


def sentence(gain: Mapping[str, Any], speed: Mapping[str, Any] | None) -> str:
    """What was gained in one sentence; empty without a teacher to compare with.

    Args:
        gain: of `gained`.
        speed: of `speeds`, if it was measured.
    """
    if "teacher" not in gain:
        return ""
    student, teacher = gain["student"]["parameters"], gain["teacher"]["parameters"]
    said = [f"{_share(student / teacher)} the parameters"] if student and teacher else []
    if speed:
        each = speed["examples_per_second"]
        said.append(_pace(each["student"] / each["teacher"]))
    at = " and ".join(said)
    kept = gain.get("kept")
    if kept is None:
        return f"The student has {at} of its teacher." if at else ""
    at = f", at {at}" if at else ""
    ours, theirs, metric = kept["student"], kept["teacher"], kept["metric"]
    if min(ours, theirs) <= 0:
        return f"The student's {metric} is {ours:.3g}, its teacher's {theirs:.3g}{at}."
    if kept["higher_is_better"]:
        verb = "keeps" if ours <= theirs else "reaches"
        return f"The student {verb} {100 * ours / theirs:.0f} % of its teacher's {metric}{at}."
    return f"The student's {metric} is {ours / theirs:.3g} times its teacher's (lower is better){at}."


def _share(ratio: float) -> str:
    """A ratio of sizes in words: `1/8 of`, `36 % of`, `1.5 times`."""
    if abs(ratio - 1) < 0.02:
        return "1.0 times"
    if ratio > 1:
        return f"{ratio:.1f} times"
    whole = round(1 / ratio)
    near = whole >= 2 and abs(1 / ratio - whole) <= 0.05 * whole
    return f"1/{whole} of" if near else f"{100 * ratio:.0f} % of"


def _pace(ratio: float) -> str:
    if ratio < 0.95:
        return f"{ratio:.2g} times the speed (it is slower)"
    return f"{ratio:.1f} times the speed"
