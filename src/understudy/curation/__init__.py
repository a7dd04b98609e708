"""Curation: deterministic filters and scorers of a generated corpus that report what was dropped and why."""

from understudy.curation.answers import Checker, Parsed, Vote, kind_of, majority
from understudy.curation.critics import base_rate_bias, binary_labels, mean_probability, score
from understudy.curation.filters import LETTERS, Funnel, first_occurrences, most_likely, spelling
from understudy.curation.groups import shuffled, split_by_group
from understudy.curation.items import Item
from understudy.curation.pairs import (
    PairOf,
    best_and_worst,
    best_and_worst_shares,
    correct_after_wrong,
    first_correct,
)
from understudy.curation.summary import precision, softened, summary
from understudy.curation.thresholds import (
    Cutoff,
    above,
    at_least,
    cutoff_at,
    cutoff_at_precision,
    cutoff_at_recall,
    cutoffs,
    recall_curve,
)

__all__ = [
    "LETTERS",
    "Checker",
    "Cutoff",
    "Funnel",
    "Item",
    "PairOf",
    "Parsed",
    "Vote",
    "above",
    "at_least",
    "base_rate_bias",
    "best_and_worst",
    "best_and_worst_shares",
    "binary_labels",
    "correct_after_wrong",
    "cutoff_at",
    "cutoff_at_precision",
    "cutoff_at_recall",
    "cutoffs",
    "first_correct",
    "first_occurrences",
    "kind_of",
    "majority",
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
