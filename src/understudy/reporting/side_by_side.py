"""A comparison as rows for pages: each method's main metric, its difference from the baseline, and the time of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from understudy.reporting.table import span


class MethodRow(NamedTuple):
    """One method, as text.

    Args:
        method: its name. mean, difference: of the main metric over seeds, with intervals. time: of a step, in units of the
            baseline's. others: means of the other metrics by name.
    """

    method: str
    mean: str
    difference: str
    time: str
    others: Mapping[str, float | None]


def method_rows(comparison: Mapping[str, Any]) -> list[MethodRow]:
    """The methods of a comparison, the best mean first.

    Args:
        comparison: what `understudy compare --json` wrote.
    """
    seconds: dict[str, float] = {}
    for run in comparison["runs"]:
        seconds[run["method"]] = seconds.get(run["method"], 0.0) + run["cost"]["seconds"] / run["cost"]["steps"]
    unit = seconds[comparison["baseline"]]
    table = sorted(comparison["table"], key=lambda row: row["mean"], reverse=comparison["higher_is_better"])
    digits = 3 if max(abs(row["mean"]) for row in table) > 0.1 else 5
    return [
        MethodRow(
            row["method"],
            span(row["mean"], row["interval"], digits),
            span(row["difference"], row["difference_interval"], digits),
            f"{seconds[row['method']] / unit:.2f} ×",
            row["others"],
        )
        for row in table
    ]
