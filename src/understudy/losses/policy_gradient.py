"""The reverse KL of whole texts by its policy gradient, from texts that the student or a mixture wrote (MiniLLM).

∇ KL(q ‖ p) of whole texts is a sum over tokens of two parts, both weighted by w: the gradient of the next token's KL, over
the whole vocabulary, and −R ∇ log q(y), with R what later tokens earn. Tokens are rows, in order, text by text.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance_weights(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """w = q / (α p + (1 − α) q) of each token, `[tokens]`: 1 at α = 0, and at most 1 / (1 − α).

    The weight of a token stands for that of its whole beginning, which varies too much (MiniLLM, Sec. 2.2).

    Args:
        log_q, log_p: log-probabilities of the written tokens under student and teacher, `[tokens]`, in nats.
        alpha: share of the teacher in the mixture that wrote them, in [0, 1).
    """
    return 1 / ((1 - alpha) + alpha * (log_p - log_q).exp())


def future_rewards(rewards: Tensor, text: Tensor, normalised: bool = True) -> Tensor:
    """R of each token, `[tokens]`: the sum, or the mean, of the rewards of later tokens of its text; 0 at the last.

    Args:
        rewards: r = log p(y) − log q(y) of each token, `[tokens]`.
        text: `[tokens]`, index of the text of each token, rising.
        normalised: divide by the number of later tokens, so that long texts are not avoided (MiniLLM, Eq. 5).
    """
    sums, counts = rewards.double().cumsum(0), torch.ones_like(text).cumsum(0)
    size = int(text.max()) + 1 if len(text) else 0
    places = torch.arange(len(text), device=text.device)
    end = places.new_zeros(size).scatter_reduce(0, text, places, "amax")[text]
    later, number = sums[end] - sums, (counts[end] - counts).clamp(min=1)
    return (later / number if normalised else later).to(rewards.dtype)


def long_part(log_q: Tensor, weights: Tensor, future: Tensor) -> Tensor:
    """−w R log q(y), `[tokens]`, with gradient to log q alone."""
    return -(weights * future).detach() * log_q
