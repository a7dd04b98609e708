"""What a teacher says, as typed values. A loss states which of them it accepts."""

from understudy.targets.types import (
    Clean,
    Dense,
    Mixture,
    Projected,
    Sampled,
    Scores,
    Target,
    TopK,
    largest,
    sample,
    top_k,
)

__all__ = [
    "Clean",
    "Dense",
    "Mixture",
    "Projected",
    "Sampled",
    "Scores",
    "Target",
    "TopK",
    "largest",
    "sample",
    "top_k",
]
