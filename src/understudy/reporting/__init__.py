"""Reporting: statistics over seeds, plots, one self-contained HTML file."""

from understudy.reporting.card import write_card
from understudy.reporting.html import render_comparison, render_run, render_study, run_panels
from understudy.reporting.sequential import paired_sequence, sequence
from understudy.reporting.statistics import Interval, interval, paired, verdict
from understudy.reporting.table import comparison_table, summarise

__all__ = [
    "Interval",
    "comparison_table",
    "interval",
    "paired",
    "paired_sequence",
    "render_comparison",
    "render_run",
    "render_study",
    "run_panels",
    "sequence",
    "summarise",
    "verdict",
    "write_card",
]
