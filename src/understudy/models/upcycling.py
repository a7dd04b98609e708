"""Sparse up-cycling: feed-forward networks of a trained decoder become mixtures of experts that start as its copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import InputError
from understudy.losses.experts import expert_capacity, top_k_gates, within_capacity

NAMES = ("mlp", "feed_forward", "ffn")
"""What architectures call the feed-forward network of a layer."""


class MixtureOfExperts(nn.Module):
    """Experts that start as copies of one feed-forward network, and a linear router without bias.

    Args:
        ffn: the trained network, from `[…, width]` to `[…, width]`; it becomes the first expert.
        width: of the hidden states.
        experts: number of experts E.
        k: experts per token; their renormalised probabilities weight the sum of their outputs.
        capacity_factor: an expert takes at most ⌈k · tokens / E · factor⌉ tokens of a batch, and what is beyond adds
            nothing; unlimited if not given.

    While `dense` is true only the first expert is used. The router is called in any case, so that its logits can be read.
    Right after construction both modes give what `ffn` does.
    """

    def __init__(self, ffn: nn.Module, width: int, experts: int, k: int, capacity_factor: float | None = None) -> None:
        super().__init__()
        if not 1 <= k <= experts:
            raise InputError(f"A mixture of {experts} experts cannot use {k} per token: choose top_k in 1 … {experts}.")
        like = next(ffn.parameters())
        self.gate = nn.Linear(width, experts, bias=False, device=like.device, dtype=like.dtype)
        nn.init.normal_(self.gate.weight, std=0.02)
        self.experts = nn.ModuleList([ffn, *(copy.deepcopy(ffn) for _ in range(experts - 1))])
        self.k, self.capacity_factor, self.dense = k, capacity_factor, False

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.gate(hidden)
        if self.dense:
            first: Tensor = self.experts[0](hidden)
            return first
        return self.mix(hidden, logits)

    def mix(self, hidden: Tensor, router_logits: Tensor) -> Tensor:
        """Σ_e w_e · expert_e(hidden) over the k experts of each token.

        Args:
            hidden: `[…, width]`.
            router_logits: `[…, experts]`.
        """
        flat, logits = hidden.flatten(0, -2), router_logits.flatten(0, -2)
        weights, index = top_k_gates(logits, self.k)
        if self.capacity_factor is not None:
            most = expert_capacity(len(flat), len(self.experts), self.k, self.capacity_factor)
            weights = weights * within_capacity(index, len(self.experts), most)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (index == number).nonzero(as_tuple=True)
            said = expert(flat[token]) * weights[token, place, None].to(flat.dtype)
            out = out.index_add(0, token, said)
        return out.view_as(hidden)

    def spread(self) -> None:
        """Make every expert a copy of the first."""
        held = self.experts[0].state_dict()
        for expert in self.experts[1:]:
            expert.load_state_dict(held)


def decoder_layers(model: Any) -> tuple[nn.ModuleList, str]:
    """The layers of a model's text decoder, and the name of the feed-forward network in each.

    Args:
        model: a causal or vision-language model of transformers.

    Raises:
        InputError: no such layers are found.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for part in decoder.modules():
        if isinstance(part, nn.ModuleList) and len(part):
            name = next((n for n in NAMES if all(isinstance(getattr(x, n, None), nn.Module) for x in part)), None)
            if name is not None:
                return part, name
    raise InputError(
        f"{type(model).__name__} has no decoder layers with a feed-forward network called {', '.join(NAMES)}: "
        "choose a student of another architecture."
    )


def upcycle(
    model: Any, *, experts: int = 4, k: int = 2, every: int = 2, capacity_factor: float | None = None
) -> list[MixtureOfExperts]:
    """Replace the feed-forward network of layers 0, `every`, 2 · `every`, … by a mixture of its copies, in place.

    The configuration of the model records it as `understudy_experts`, which `load_experts` reads.

    Returns:
        The mixtures, by layer. Source: paper 03.
    """
    layers, name = decoder_layers(model)
    width = model.config.get_text_config().hidden_size
    made = []
    for layer in layers[::every]:
        mixture = MixtureOfExperts(getattr(layer, name), width, experts, k, capacity_factor)
        setattr(layer, name, mixture)
        made.append(mixture)
    facts = {"experts": experts, "k": k, "every": every, "capacity_factor": capacity_factor}
    model.config.understudy_experts = facts
    return made


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of a model, in order."""
    return [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
