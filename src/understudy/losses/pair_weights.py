"""How much a pair of answers counts: labels softened by a search, and weights of what the policy itself would write."""

from __future__ import annotations

from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import checked, full, log_softmax


def visit_label_smoothing(chosen_visits: Tensor, rejected_visits: Tensor) -> Tensor:
    """min(N_l / (max(1, N_w) + N_l), ½) of each pair, `[pairs]`: the less a search preferred one side, the softer its label.

    0 where the worse side was never visited; ½ where it was visited as often as the better one, or more.

    Args:
        chosen_visits, rejected_visits: N_w and N_l, how often a tree search visited each side, `[pairs]`.

    Raises:
        InputError: a number of visits is negative or not finite.

    Source: MCTS-DPO (2024, arXiv 2405.00451), Eq. for α, 1 / (N_w / N_l + 1), as in its released code.
    """
    for side, visits in (("chosen", chosen_visits), ("rejected", rejected_visits)):
        wrong = (~(visits.isfinite() & (visits >= 0))).nonzero()
        if len(wrong):
            at = wrong[0].tolist()
            raise InputError(
                f"visit_label_smoothing: {float(visits[tuple(at)])} visits of the {side} side of pair {at[0]}: give counts."
            )
    better, worse = (full(n) if n.is_floating_point() else n.double() for n in (chosen_visits, rejected_visits))
    return (worse / (better.clamp(min=1) + worse)).clamp(max=0.5)


def log_collision(logits: Tensor) -> Tensor:
    """log Σ_v p_v² of each row, `[rows]`: the log-probability that two draws of the row's distribution are equal.

    −log n where n classes share the probability; at least the mean of log p_v under p.

    Args:
        logits: `[rows, classes]`.

    Source: WPO (2024, arXiv 2406.11827), what a token's probability is divided by in its sampled alignment.
    """
    return checked("log_collision", (2 * log_softmax(logits, 1.0)).logsumexp(-1), logits, None)


def policy_weight(mean_log_ratio: Tensor) -> Tensor:
    """exp of an answer's mean over tokens of log π(y_t) − log Σ_v π(v)², any shape, without gradient.

    How likely the policy is to write an answer, next to what it usually writes: 1 where it is certain of each token or
    draws each from equally likely ones, whatever the length. The weight of a pair is the product of both.

    Source: WPO (2024, arXiv 2406.11827), Eq. 2 with sampled alignment, as in TRL (`use_weighting`).
    """
    return mean_log_ratio.detach().exp()
