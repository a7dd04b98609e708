"""Targets: a teacher's outputs as typed values. The type says which losses accept them."""

from understudy.targets.types import (
    Clean,
    Dense,
    Mixture,
    Projected,
    Sampled,
    Scores,
    Target,
    TokenNoise,
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
    "TokenNoise",
    "TopK",
    "largest",
    "sample",
    "top_k",
]
