"""Routing of tokens to experts: top-k weights, the balance of their load, and capacities. Logits are `[tokens, experts]`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full


def top_k_gates(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest experts of each token, and their probabilities renormalised to sum 1.

    Args:
        router_logits: `[tokens, experts]`.
        k: experts per token; with k = experts the mixture is dense and has no discontinuity.

    Returns:
        weights and expert indices, both `[tokens, k]`, likeliest first; of equal ones the lowest index comes first.

    Raises:
        InputError: there are fewer experts than k.

    Source: paper 03, section on sparse up-cycling.
    """
    experts = router_logits.shape[-1]
    if not 1 <= k <= experts:
        raise InputError(f"top_k_gates: {k} experts per token of {experts} experts: k must lie in 1 … {experts}.")
    probs = full(router_logits).softmax(-1)
    index = probs.argsort(dim=-1, descending=True, stable=True)[..., :k]
    chosen = probs.gather(-1, index)
    return chosen / chosen.sum(-1, keepdim=True), index


def load_balance(router_logits: Tensor, group: Tensor | None = None) -> Tensor:
    """E Σ_e p_e · (share of tokens whose first choice is e), one value per token; the mean over the tokens of a group is
    the balance loss.

    Args:
        router_logits: `[tokens, experts]`.
        group: `[tokens]`, the group whose shares apply to each token; all tokens are one group if not given. The shares
            couple the tokens of a group and have no gradient.

    The mean is 1 if the mean probabilities are uniform, and tends to E if all tokens are sure of one expert.
    Source: paper 03, L_aux; Switch Transformer, Fedus et al. 2021, Eq. 4.
    """
    experts = router_logits.shape[-1]
    probs = full(router_logits).softmax(-1)
    first = F.one_hot(probs.detach().argsort(dim=-1, descending=True, stable=True)[..., 0], experts).to(probs.dtype)
    index = torch.zeros_like(first[:, 0], dtype=torch.long) if group is None else group
    groups = int(index.max()) + 1 if len(index) else 0
    load = first.new_zeros(groups, experts).index_add(0, index, first)
    share = load / load.sum(-1, keepdim=True).clamp(min=1)
    return experts * (probs * share[index]).sum(-1)


def expert_capacity(tokens: int, experts: int, k: int, factor: float) -> int:
    """⌈k · tokens / experts · factor⌉, the most assignments that an expert takes. Source: paper 03 (factor 1.5)."""
    return math.ceil(k * tokens / experts * factor)


def within_capacity(index: Tensor, experts: int, capacity: int) -> Tensor:
    """`[tokens, k]`, which assignments fit: first choices in the order of the tokens, then second choices, and so on.

    Args:
        index: `[tokens, k]`, from `top_k_gates`.
        capacity: of each expert.
    """
    taken = F.one_hot(index.T.flatten(), experts)
    place = (taken.cumsum(0) * taken).sum(-1)
    return (place <= capacity).view(index.shape[1], index.shape[0]).T
