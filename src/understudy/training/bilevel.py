"""Gradients of loss weights in bilevel optimisation: one virtual step of the student, then an outer loss.

For L(θ) = Σ_ij w_ij ℓ_ij(θ) / n over the rows i and losses j of a whole update, θ′ = θ − η ∇L(θ) and an outer loss J,

    ∂J(θ′) / ∂w_ij = −(η / n) ⟨∇J(θ′), ∇ℓ_ij(θ)⟩.

All inner products of a micro-batch are one directional derivative of its losses, so no row needs its own backward pass.
The student is not changed: the computation uses copies of its parameters and buffers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models import ModelAdapter, ModelOutput, evaluating, find_head

log = logging.getLogger(__name__)

Parameters = Mapping[str, Tensor]
Ask = Callable[[Batch], ModelOutput]
Part = Literal["all", "head"]


def weight_gradients(
    student: ModelAdapter,
    batches: Sequence[Batch],
    losses: Callable[[ModelOutput, int], Tensor],
    weights: Sequence[Tensor],
    outer: Callable[[Ask], Tensor],
    *,
    rate: float,
    count: float,
    total: Callable[[Sequence[Tensor]], list[Tensor]] = list,
    part: Part = "all",
) -> tuple[list[Tensor], Tensor]:
    """∂J(θ′)/∂w for each micro-batch, shaped as its weights, and J(θ′).

    Args:
        batches: the micro-batches of one update on this rank; the result does not depend on the split into them.
        losses: `losses(rows, i)` returns `[rows, losses]` for micro-batch i from the student's output `rows`.
        weights: `[rows, losses]` for each micro-batch.
        outer: computes J; its argument is a function from a batch to the student's output at θ′.
        rate: η.
        count: n, rows of the update over all micro-batches and ranks.
        total: sums tensors over the ranks.
        part: the parameters that take the virtual step; `head` alone is cheaper.

    The student runs in evaluation mode, without autocast, in float32 at least. If one of its operations has no
    forward-mode derivative, central differences along ∇J are used instead, and a warning is logged.
    """
    moved, still = _stand_ins(student, part)

    def ask(parameters: Parameters, batch: Batch) -> ModelOutput:
        with torch.autocast(batch.labels.device.type, enabled=False):
            rows: ModelOutput = functional_call(student, {**still, **parameters}, (batch,))
        return rows

    with evaluating(student):
        gradient = {name: torch.zeros_like(p) for name, p in moved.items()}
        for i, batch in enumerate(batches):
            value = (losses(ask(moved, batch), i) * weights[i].detach()).sum() / count
            for name, found in _gradient(value, moved).items():
                gradient[name] += found
        summed = dict(zip(gradient, total(list(gradient.values())), strict=True))
        ahead = {n: (p.detach() - rate * summed[n]).requires_grad_() for n, p in moved.items()}
        reached = outer(lambda batch: ask(ahead, batch))
        direction = _gradient(reached, ahead)
        products = [
            along(lambda p, b=batch, i=i: losses(ask(p, b), i), moved, direction)  # type: ignore[misc]
            for i, batch in enumerate(batches)
        ]
    return [-rate / count * product for product in products], reached.detach()


def along(function: Callable[[Parameters], Tensor], at: Parameters, direction: Parameters) -> Tensor:
    """The directional derivative of each entry of `function`'s value, along `direction` in its parameters."""
    at = {name: p.detach() for name, p in at.items()}
    try:
        # Among the attention kernels only the math one has a forward-mode derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            value = function({n: forward_ad.make_dual(p, direction[n]) for n, p in at.items()})
            found = forward_ad.unpack_dual(value)
            return found.tangent if found.tangent is not None else torch.zeros_like(found.primal)
    except (NotImplementedError, RuntimeError) as error:
        if not any(word in str(error) for word in ("forward AD", "forward mode AD", "jvp")):
            raise
        reason = str(error).splitlines()[0]
    if reason not in _WARNED:
        _WARNED.add(reason)
        log.warning("No exact derivative along a direction, central differences are used: %s", reason)
    return _differences(function, at, direction)


_WARNED: set[str] = set()


@torch.no_grad()
def _differences(function: Callable[[Parameters], Tensor], at: Parameters, direction: Parameters) -> Tensor:
    """Central differences, with a step size that balances truncation and rounding error."""
    norm = sum(d.double().square().sum() for d in direction.values()) ** 0.5
    if not norm > 0:
        return torch.zeros_like(function(at))
    coarsest = max(torch.finfo(p.dtype).eps for p in at.values())
    step = float(coarsest ** (1 / 3) / norm)
    up, down = (function({n: p + sign * step * direction[n] for n, p in at.items()}) for sign in (1, -1))
    return (up - down) / (2 * step)


def _stand_ins(student: ModelAdapter, part: Part) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the parameters that take the virtual step (with gradient), and of all others; in float32 at least."""
    named = dict(student.named_parameters())
    chosen = [name for name, p in named.items() if p.requires_grad]  # a list: all ranks sum in the same order
    if part == "head":
        head: nn.Module | None = find_head(student)
        if head is None:
            raise InputError("The virtual step needs the student's head and it has none: set options.virtual=all.")
        own = set(map(id, head.parameters()))
        chosen = [name for name in chosen if id(named[name]) in own]
    if not chosen:
        raise InputError(f"No parameter of the student is trainable for a virtual step (options.virtual={part}).")
    moved = {name: _wide(named[name]).requires_grad_() for name in chosen}
    still = {name: _wide(p) for name, p in named.items() if name not in chosen}
    # Buffers are copied, since a layer may write to its buffers in evaluation mode too.
    return moved, still | {name: _wide(b).clone() for name, b in student.named_buffers()}


def _wide(x: Tensor) -> Tensor:
    return x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()


def _gradient(value: Tensor, parameters: Parameters) -> dict[str, Tensor]:
    """The gradient of a scalar, zero for parameters that it does not depend on."""
    if not value.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    found: tuple[Any, ...] = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {n: g if g is not None else torch.zeros_like(p) for (n, p), g in zip(parameters.items(), found, strict=True)}
