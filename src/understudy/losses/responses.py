"""Losses that rank the responses to a prompt by a reward. One value a list, nothing is reduced.

`scores` are s, what the policy says of each response (its mean log-probability a token), and `rewards` what is known of it;
both `[lists, candidates]`. Candidates that `mask` excludes may hold anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.losses._pairs import full
from understudy.losses.plackett_luce import plackett_luce


def rrhf(scores: Tensor, rewards: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Σ over pairs with r_i < r_j of relu(s_i − s_j), `[lists]`.

    0 exactly where scores are ordered like rewards; equal rewards contribute nothing.

    Source: RRHF (Yuan et al. 2023, arXiv 2304.05302), Eq. 3.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    s = full(scores).masked_fill(~mask, 0.0)
    worse = (rewards[:, :, None] < rewards[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    return (F.relu(s[:, :, None] - s[:, None, :]) * worse).sum((1, 2))


def pro(scores: Tensor, rewards: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """−Σ_k log(exp s_k / Σ_{i ≥ k} exp s_i), responses sorted by reward, best first and the first of equals first: `[lists]`.

    It is the likelihood of the whole order, with two responses that of Bradley and Terry, with one 0.

    Source: PRO (Song et al. 2023, arXiv 2306.17492), Eq. 5.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    order = rewards.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, mask.gather(-1, order).to(torch.int8).argsort(dim=-1, descending=True, stable=True))
    s = full(scores).masked_fill(~mask, -torch.inf)
    return plackett_luce(s, order, mask.gather(-1, order).to(s.dtype))
