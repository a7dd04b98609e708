"""Steps of gradient descent on parameters by name, which can be differentiated by the data and the step size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


def gradients(loss: Callable[[Parameters], Tensor], parameters: Parameters, *, differentiable: bool) -> list[Tensor]:
    """∇ of `loss(parameters)` for each parameter; 0 where the loss does not depend on it.

    Args:
        differentiable: whether the gradient can be differentiated again.
    """
    leaves = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in parameters.items()}
    found = torch.autograd.grad(
        loss(leaves), list(leaves.values()), create_graph=differentiable, allow_unused=True, materialize_grads=True
    )
    return list(found)


def unrolled_sgd(
    loss: Callable[[Parameters], Tensor], parameters: Parameters, rate: Tensor, steps: int
) -> dict[str, Tensor]:
    """Parameters after `steps` steps θ ← θ − η ∇loss(θ), as a differentiable function of what `loss` and η depend on.

    Args:
        loss: of the parameters, a scalar. parameters: θ at the start. rate: η `[]`.
    """
    moved = dict(parameters)
    for _ in range(steps):
        slopes = gradients(loss, moved, differentiable=True)
        moved = {name: p - rate * g for (name, p), g in zip(moved.items(), slopes, strict=True)}
    return moved


def sgd_step(loss: Callable[[Parameters], Tensor], parameters: Parameters, rate: float) -> dict[str, Tensor]:
    """Parameters after a step θ ← θ − η ∇loss(θ), detached."""
    slopes = gradients(loss, parameters, differentiable=False)
    return {name: (p - rate * g).detach() for (name, p), g in zip(parameters.items(), slopes, strict=True)}


def flat(parameters: Parameters) -> Tensor:
    """All parameters as one vector, in their order."""
    return torch.cat([p.flatten() for p in parameters.values()])
