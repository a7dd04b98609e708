"""Curation: deterministic filters and scorers of a generated corpus that report what was dropped and why."""

from understudy.curation.critics import base_rate_bias, binary_labels, mean_probability, score
from understudy.curation.filters import LETTERS, Funnel, first_occurrences, most_likely, spelling
from understudy.curation.groups import shuffled, split_by_group
from understudy.curation.summary import precision, softened, summary
from understudy.curation.thresholds import Cutoff, above, cutoff_at_recall, cutoffs, recall_curve

__all__ = [
    "LETTERS",
    "Cutoff",
    "Funnel",
    "above",
    "base_rate_bias",
    "binary_labels",
    "cutoff_at_recall",
    "cutoffs",
    "first_occurrences",
    "mean_probability",
    "most_likely",
    "precision",
    "recall_curve",
    "score",
    "shuffled",
    "softened",
    "spelling",
    "split_by_group",
    "summary",
]
