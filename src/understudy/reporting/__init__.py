"""Reporting: statistics over seeds, plots, one self-contained HTML file."""

from understudy.reporting.html import render_comparison, render_run
from understudy.reporting.statistics import Interval, interval, paired, verdict
from understudy.reporting.table import comparison_table, summarise

__all__ = [
    "Interval",
    "comparison_table",
    "interval",
    "paired",
    "render_comparison",
    "render_run",
    "summarise",
    "verdict",
]
