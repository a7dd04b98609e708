"""What a training does to a student beside its task: hidden states that move, and questions out of domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from understudy.curation import Checker
from understudy.evaluation.answers import wilson
from understudy.evaluation.distances import pca_shift
from understudy.evaluation.readings import Readings, read_texts
from understudy.training.pipeline import PipelineContext
from understudy.training.solvers import Solver, load_source

Spec = Mapping[str, Any]


def readings(spec: Spec, records: Sequence[Mapping[str, str]], max_length: int) -> Readings:
    """`read_texts` of a saved model.

    Args:
        spec: of the model. records: with `prompt` and `completion`.
    """
    loaded = load_source(spec, "student")
    return read_texts(loaded.model, loaded.tokenizer, records, max_length)


def hidden_shift(before: Spec, after: Spec, records: Sequence[Mapping[str, str]], max_length: int) -> float | None:
    """How far a training moved the hidden states of reference answers in their first two principal components; `None` for
    fewer than three."""
    if len(records) < 3:
        return None
    first, last = (readings(spec, records, max_length).hidden for spec in (before, after))
    return pca_shift(first, last).distance


def out_of_domain(
    context: PipelineContext, models: Mapping[str, Spec], data: Mapping[str, Any], splits: Any, checker: Checker
) -> tuple[dict[str, float], dict[str, Any]]:
    """Greedy answers of models to test questions of other data.

    Args:
        models: by name, `before` the training (if the student knew anything) and `after` it. data, splits, checker: the others.

    Returns:
        `other_accuracy` and, with both models, `other_accuracy_before` and `other_shift`; and their table.
    """
    metrics, rows = {}, []
    for name, spec in models.items():
        right = Solver.load(spec, data).right(context, splits.test, checker, f"other_{name}")
        share = wilson(sum(tries[0] for tries in right), len(right))
        metrics["other_accuracy" if name == "after" else f"other_accuracy_{name}"] = share.share
        rows.append([name, f"{share.share:.3f}", f"{share.low:.3f} to {share.high:.3f}", len(right)])
    if len(models) > 1:
        shift = hidden_shift(models["before"], models["after"], splits.test, int(data["max_length"]))
        metrics |= {"other_shift": shift} if shift is not None else {}
    headings = ["the student", "accuracy", "interval", "questions"]
    return metrics, {"title": "Questions out of domain", "headings": headings, "rows": rows}
