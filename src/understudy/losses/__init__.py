"""Losses: pure functions from tensors to one value per row. Nothing here reduces over rows."""

from understudy.losses.classification import binary_cross_entropy, cross_entropy
from understudy.losses.divergences import (
    adaptive_kl,
    alpha_beta,
    cross_entropy_soft,
    entropy,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from understudy.losses.interpolation import interpolate_logits, interpolated_kl
from understudy.losses.logits import binary_kl, binary_kl_norm, decoupled_kl
from understudy.losses.noisy import with_noise
from understudy.losses.plackett_luce import (
    plackett_luce,
    plackett_luce_distillation,
    position_weights,
    teacher_permutation,
)
from understudy.losses.preference import signed_likelihood
from understudy.losses.truncation import truncate

__all__ = [
    "adaptive_kl",
    "alpha_beta",
    "binary_cross_entropy",
    "binary_kl",
    "binary_kl_norm",
    "cross_entropy",
    "cross_entropy_soft",
    "decoupled_kl",
    "entropy",
    "forward_kl",
    "interpolate_logits",
    "interpolated_kl",
    "jsd",
    "plackett_luce",
    "plackett_luce_distillation",
    "position_weights",
    "reverse_kl",
    "signed_likelihood",
    "skew_kl",
    "skew_reverse_kl",
    "teacher_permutation",
    "total_variation",
    "truncate",
    "with_noise",
]
