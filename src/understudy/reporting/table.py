"""A table of runs over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from understudy.reporting.statistics import Interval, interval, paired

_OTHERS = ("accuracy", "nll", "bits_per_byte", "ece", "agreement", "kl", "rmse", "coverage", "nfe", "exposure")


def summarise(runs: Sequence[Mapping[str, Any]], baseline: str, metric: str) -> list[dict[str, Any]]:
    """One row per method: mean and interval of the metric, and the paired difference to the baseline over the same
    seeds.

    Args:
        runs: each with `method`, `seed` and `metrics`.
        baseline: name of the baseline method.
        metric: name of the metric.
    """
    by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
    for one in runs:
        by_method.setdefault(one["method"], {})[one["seed"]] = one["metrics"]
    rows = []
    for method, seeds in by_method.items():
        own = interval([m[metric] for m in seeds.values()])
        base = by_method.get(baseline, {})
        common = sorted(seeds.keys() & base.keys())
        difference = (
            paired([seeds[s][metric] for s in common], [base[s][metric] for s in common])
            if common and method != baseline
            else Interval(0.0, None, None)
        )
        others = {
            k: sum(m[k] for m in seeds.values()) / len(seeds)
            for k in _OTHERS
            if k != metric and all(k in m for m in seeds.values())
        }
        rows.append(
            {
                "method": method,
                "metric": metric,
                "mean": own.mean,
                "interval": [own.low, own.high],
                "difference": difference.mean if method != baseline else None,
                "difference_interval": [difference.low, difference.high],
                "seeds": len(seeds),
                "others": others,
            }
        )
    return rows


def span(mean: float | None, ends: Sequence[float | None], digits: int = 3) -> str:
    """Format as `0.931 [0.920, 0.942]`."""
    if mean is None:
        return "–"
    low, high = ends
    if low is None or high is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """The comparison as a table for the terminal."""
    metric = comparison["metric"]
    better = "higher" if comparison["higher_is_better"] else "lower"
    table = Table(title=f"{comparison['title']}: {metric} ({better} is better)")
    others = [k for k in _OTHERS if any(k in r["others"] for r in comparison["table"])]
    for heading in ("method", f"{metric} [95 %]", f"against {comparison['baseline']} (paired)", *others, "seeds"):
        table.add_column(
            heading, justify="left" if heading == "method" else "right", no_wrap="95" in heading or heading == "method"
        )
    for row in comparison["table"]:
        cells = [f"{row['others'][k]:.3f}" if k in row["others"] else "–" for k in others]
        table.add_row(
            row["method"],
            span(row["mean"], row["interval"]),
            span(row["difference"], row["difference_interval"]),
            *cells,
            str(row["seeds"]),
        )
    teacher = comparison.get("teacher")
    if teacher:
        value = teacher.get(metric)
        table.caption = f"teacher {teacher['name']}: {span(value, (None, None))}" if value is not None else None
    return table
