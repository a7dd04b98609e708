"""Plots as inline SVG whose colours are CSS variables, so that they are readable in light and dark mode."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours of the drawing, and the CSS variable that replaces each. Series colours are those of Okabe and Ito, which people
# with colour blindness can distinguish.
_INK, _GRID = "#010203", "#040506"
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)", **{c: f"var(--s{i})" for i, c in enumerate(_SERIES)}}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "understudy",
}


def _figure(width: float = 5.6, height: float = 3.2) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"font: ([^;\"]*)'sans-serif'[^;\"]*", r"font: \1system-ui, sans-serif", text)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', text, count=1)


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str) -> str:
    """Lines over optimizer steps.

    Args:
        series: `{name: (steps, values)}`.
        ylabel: label of the vertical axis.
    """
    with plt.rc_context(_STYLE):
        figure, axes = _figure()
        for i, (name, (steps, values)) in enumerate(series.items()):
            values = [math.nan if v is None else v for v in values]
            axes.plot(steps, values, color=_SERIES[i % len(_SERIES)], linewidth=1.5, label=name)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(ylabel)
        if len(series) > 1:
            axes.legend()
        return _svg(figure)


Series = Mapping[str, tuple[Sequence[float], Sequence[Any]]]


def alike(series: Series, factor: float = 5.0) -> list[dict[str, Any]]:
    """Group series whose median values are within `factor` of the first of the group, so that each group is readable on
    one axis."""
    groups: list[tuple[float, dict[str, Any]]] = []
    for name, (steps, values) in series.items():
        size = statistics.median([abs(v) for v in values if v is not None] or [0.0])
        near = (g for first, g in groups if size <= factor * first and first <= factor * size)
        home = next(near, None)
        if home is None:
            groups.append((size, {name: (steps, values)}))
        else:
            home[name] = (steps, values)
    return [group for _, group in groups]


def intervals(rows: Sequence[Mapping[str, Any]], metric: str, reference: float | None = None) -> str:
    """A dot with its interval for each method; the dashed line is the teacher."""
    with plt.rc_context(_STYLE):
        figure, axes = _figure(height=0.9 + 0.42 * len(rows))
        for i, row in enumerate(rows):
            low, high = row["interval"]
            y = len(rows) - 1 - i
            if low is not None and high is not None:
                axes.plot([low, high], [y, y], color=_SERIES[0], linewidth=2, solid_capstyle="round")
            axes.plot([row["mean"]], [y], "o", color=_SERIES[0])
        axes.set_yticks(range(len(rows)), [r["method"] for r in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
        if reference is not None:
            axes.axvline(reference, color=_SERIES[1], linestyle="--", linewidth=1.2, label="teacher")
            figure.legend(loc="outside upper right")
        axes.set_xlabel(metric)
        return _svg(figure)


def scatter(points: Sequence[tuple[float, float]], xlabel: str, ylabel: str) -> str:
    """Points `(x, y)`."""
    with plt.rc_context(_STYLE):
        figure, axes = _figure()
        axes.scatter([x for x, _ in points], [y for _, y in points], color=_SERIES[0], alpha=0.8)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        return _svg(figure)


def path(points: Sequence[tuple[float, float]], xlabel: str, ylabel: str) -> str:
    """Points `(x, y)` joined in their order, the first as a ring and the last as a dot."""
    with plt.rc_context(_STYLE):
        figure, axes = _figure()
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=_SERIES[0], linewidth=1.2, marker=".", markersize=4)
        axes.plot(x[:1], y[:1], "o", color=_SERIES[0], markersize=9, fillstyle="none")
        axes.plot(x[-1:], y[-1:], "o", color=_SERIES[0], markersize=9)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        return _svg(figure)


def dots(
    groups: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, logarithmic: bool = False
) -> str:
    """Points by group, `{name: [(x, y), …]}`, with a line at y = 0.

    Args:
        xlabel, ylabel: labels of the axes. logarithmic: of x.
    """
    with plt.rc_context(_STYLE):
        figure, axes = _figure()
        axes.axhline(0, color=_INK, linewidth=0.8)
        for i, (name, points) in enumerate(groups.items()):
            x, y = ([p[axis] for p in points] for axis in (0, 1))
            axes.scatter(x, y, color=_SERIES[i % len(_SERIES)], s=28, label=name)
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if logarithmic else "linear")
        if len(groups) > 1:
            axes.legend()
        return _svg(figure)


def reliability_diagram(table: Mapping[str, Any]) -> str:
    """Accuracy against confidence; the size of a dot is the fraction of rows in its bin."""
    with plt.rc_context(_STYLE):
        figure, axes = _figure(3.6, 3.4)
        axes.plot([0, 1], [0, 1], color=_GRID, linewidth=1)
        total = sum(table["count"]) or 1
        points = [
            (c, a, n) for c, a, n in zip(table["confidence"], table["accuracy"], table["count"], strict=True) if n
        ]
        axes.plot([p[0] for p in points], [p[1] for p in points], color=_SERIES[0], linewidth=1)
        axes.scatter(
            [p[0] for p in points],
            [p[1] for p in points],
            s=[12 + 300 * p[2] / total for p in points],
            color=_SERIES[0],
            alpha=0.8,
        )
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03), ylim=(0, 1.03))
        return _svg(figure)


def confidence_bars(table: Mapping[str, Any]) -> str:
    """Agreement with the teacher in bins of the student's confidence."""
    with plt.rc_context(_STYLE):
        figure, axes = _figure(3.6, 3.4)
        edges = table["edges"]
        names = [f"{a:.1f}–{b:.1f}" for a, b in zip(edges, edges[1:], strict=False)]
        values = [v if v is not None else 0 for v in table["agreement"]]
        bars = axes.bar(names, values, color=_SERIES[2], width=0.75)
        axes.bar_label(bars, [f"n={n}" for n in table["count"]], fontsize=8)
        axes.set(xlabel="student's confidence", ylabel="agreement with the teacher", ylim=(0, 1.1))
        axes.grid(axis="x", visible=False)
        return _svg(figure)


def time_bar(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Fractions of the time by role, `{run: {role: share}}`, as stacked bars."""
    with plt.rc_context(_STYLE):
        figure, axes = _figure(height=1.1 + 0.35 * len(shares))
        roles = list(dict.fromkeys(r for s in shares.values() for r in s))
        names = list(shares)[::-1]
        left = [0.0] * len(names)
        for i, role in enumerate(roles):
            values = [100 * shares[n].get(role, 0.0) for n in names]
            axes.barh(names, values, left=left, color=_SERIES[i % len(_SERIES)], height=0.6, label=role)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set_xlabel("% of the wall time")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper center", ncols=len(roles))
        return _svg(figure)


def tree(nodes: Sequence[Mapping[str, Any]]) -> str:
    """A searched tree from left to right: a dot for each node, larger with more visits, its text and value beside it.

    Args:
        nodes: parents first, each with `number`, `parent` (`None` at the root), `text`, `visits`, `q`, and whether it is
            `chosen`.
    """
    above = {node["number"]: node["parent"] for node in nodes}
    inner, x, y = set(above.values()), dict[int, int](), dict[int, float]()
    for node in nodes:
        x[node["number"]] = 0 if node["parent"] is None else x[node["parent"]] + 1
    leaves = [node["number"] for node in nodes if node["number"] not in inner]
    for place, number in enumerate(leaves):
        y[number] = -float(place)
    for number in sorted(inner - {None}, key=lambda n: -x[n]):
        y[number] = statistics.mean(y[n] for n, parent in above.items() if parent == number)
    most = max(node["visits"] for node in nodes) or 1
    deep = max(x.values())
    with plt.rc_context(_STYLE):
        figure, axes = _figure(width=max(5.6, 1.3 * (deep + 1)), height=0.8 + 0.36 * len(leaves))
        for node in nodes:
            here, colour = node["number"], _SERIES[1 if node["chosen"] else 0]
            if node["parent"] is not None:
                start = node["parent"]
                axes.plot([x[start], x[here]], [y[start], y[here]], color=colour, linewidth=0.8, zorder=1)
            axes.scatter([x[here]], [y[here]], s=12 + 60 * node["visits"] / most, color=colour, zorder=2)
            words = " ".join("".join(c if c.isprintable() else " " for c in node["text"]).split())
            label = (
                f"{words[:18]}{'…' * (len(words) > 18)}\n{node['visits']} visits, Q {node['q']:.2f}" if words else ""
            )
            axes.text(x[here] + 0.07, y[here] - 0.06, label, fontsize=7, va="center", parse_math=False)
        axes.set_xlim(-0.2, deep + 1.0)
        axes.axis("off")
        return _svg(figure)


def standalone(svg: str) -> str:
    """A plot as a file of its own: with colours in place of the page's variables, readable on light and dark."""
    grey = {_INK: "#7a828a", _GRID: "#a9afb5"}
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(variable, grey.get(colour, colour))
    return svg


def ranked(names: Sequence[str], ranks: Sequence[float], difference: float, groups: Sequence[tuple[int, int]]) -> str:
    """Methods on an axis of mean ranks, a bar below it for each group, and the critical difference above it.

    Args:
        names, ranks: the best first. groups: first and last position of those that a bar joins.

    Source: Demšar 2006, figure 1.
    """
    number = len(names)
    left = (number + 1) // 2  # named on the left side; the others on the right, the worst on top
    step, top = 0.5, 0.35 + 0.25 * len(groups)
    with plt.rc_context(_STYLE):
        figure, axes = _figure(height=0.9 + 0.5 * (top + step * left))
        axes.plot([1, number], [0, 0], color=_INK, linewidth=1)
        for tick in range(1, number + 1):
            axes.plot([tick, tick], [0, 0.15], color=_INK, linewidth=1)
            axes.text(tick, 0.25, str(tick), ha="center", va="bottom")
        axes.plot([1, 1 + difference], [1.0, 1.0], color=_SERIES[1], linewidth=2)
        axes.text(1 + difference / 2, 1.1, f"CD {difference:.2f}", ha="center", va="bottom")
        for i, (first, last) in enumerate(groups):
            y = -0.25 * (i + 1)
            axes.plot([ranks[first], ranks[last]], [y, y], color=_SERIES[0], linewidth=4, solid_capstyle="round")
        for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
            y = -top - step * (i if i < left else number - 1 - i)
            end, side = (0.9, "right") if i < left else (number + 0.1, "left")
            axes.plot([rank, rank, end], [0, y, y], color=_INK, linewidth=1)
            axes.text(end, y, f" {name} {rank:.2f} ", ha=side, va="center", parse_math=False)
        axes.axis("off")
        return _svg(figure)
