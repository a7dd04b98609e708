"""Launches the Triton kernels for a loss and its target: the cases of `by_hand`, on a tile on a GPU.

Import it only if Triton is installed. A class that was sampled twice is added twice, on a GPU in no fixed order, so the
last bit of such a gradient can differ between runs, as in `by_hand`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from understudy import losses
from understudy.losses.classification import check_labels
from understudy.streaming.gradients import bucket_gradient, scaling
from understudy.streaming.kernels import INTERPRETED, divergence, normalisers, softmax
from understudy.targets import Dense, Sampled, Target, TopK

BLOCK = 4096
"""Number of classes that a program holds at a time."""
PROGRAMS = 1024
"""Number of programs that fill a GPU: rows are split until there are as many."""

Writer = Callable[[Tensor, float, float | None], Tensor]
"""`writer(logits, scale, softcap) -> values`: the gradient overwrites the logits."""


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether kernels run on the device: a GPU that Triton can compile for, or a CPU in interpreter mode."""
    if device.type != "cuda":
        return INTERPRETED and device.type == "cpu"
    try:
        _norms(torch.zeros(1, 32, device=device), 1.0)
    except Exception as error:  # no compiler, an old GPU: the other path is used
        warnings.warn(f"Triton kernels are off, the slower path runs instead: {error}", stacklevel=2)
        return False
    return True


def writer(
    loss: Callable[..., Tensor],
    logits: Tensor,
    target: Target | None,
    rows: tuple[Tensor, ...],
    options: dict[str, Any],
) -> Writer | None:
    """A function that computes `loss` on `logits` in place, or `None` if kernels do not run or the loss is not covered.

    The losses, targets and options are those of `by_hand`. The function gets the finished logits (bias, scale and
    soft-cap applied), returns values `[rows]` and overwrites the logits with the gradient with respect to the head's
    product. If a value is not finite the logits are invalid, and the plain loss must be called on recomputed ones.
    """
    if logits.dtype != torch.float32 or logits.stride(-1) != 1 or not logits.numel() or not runs_on(logits.device):
        return None
    if loss is losses.cross_entropy and target is None and len(rows) == 1:
        check_labels("cross_entropy", rows[0], logits.shape[-1])
        return functools.partial(_sparse, loss, rows[0][:, None], None, {}, 1.0, 1.0)
    found = scaling(target, rows, options)
    if found is None:
        return None
    tau, factor, rest = found
    if isinstance(target, Dense) and target.logits.shape == logits.shape:
        form = _form(loss, rest)
        return functools.partial(_dense, *form, target.logits, tau, factor) if form else None
    if isinstance(target, Sampled) and loss in (losses.forward_kl, losses.cross_entropy_soft) and not rest:
        return functools.partial(_sparse, loss, target.ids, target, rest, tau, factor)
    if isinstance(target, TopK) and loss in _BUCKETED:
        return functools.partial(_sparse, loss, target.ids, target, rest, tau, factor)
    return None


_PLAIN = {x: x.__name__ for x in (losses.forward_kl, losses.cross_entropy_soft, losses.reverse_kl)}
_MIXED: dict[Callable[..., Tensor], tuple[str, float]] = {
    losses.jsd: ("beta", 0.5),
    losses.skew_kl: ("alpha", 0.1),
    losses.skew_reverse_kl: ("alpha", 0.1),
}
_ENDS: dict[tuple[Callable[..., Tensor], float], str] = {
    (losses.jsd, 0): "forward_kl",
    (losses.jsd, 1): "reverse_kl",
    (losses.skew_kl, 0): "forward_kl",
    (losses.skew_reverse_kl, 0): "reverse_kl",
}
"""The limits of a mixture at its ends."""
_BUCKETED = frozenset({*_PLAIN, *_MIXED, losses.total_variation, losses.alpha_beta})


def _form(loss: Callable[..., Tensor], options: dict[str, Any]) -> tuple[str, float] | None:
    """Name of a dense divergence, and the weight of its mixture."""
    options = {k: v for k, v in options.items() if k != "truncation"}
    if loss in _PLAIN:
        return (_PLAIN[loss], 0.5) if not options else None
    if loss not in _MIXED:
        return None
    option, default = _MIXED[loss]
    share = options.pop(option, default)
    if options:
        return None
    if (loss, share) in _ENDS:
        return _ENDS[loss, share], 0.5
    return (loss.__name__, share) if 0 < share < 1 else None


def _cut(z: Tensor) -> tuple[tuple[int, int], int, int]:
    """Grid (rows, parts), number of classes per part, and block size."""
    rows, classes = z.shape
    block = min(BLOCK, 1 << (classes - 1).bit_length())
    blocks = -(-classes // block)
    parts = min(blocks, max(1, -(-PROGRAMS // rows)))
    span = -(-blocks // parts) * block
    return (rows, -(-classes // span)), span, block


def _norms(z: Tensor, inverse: float) -> Tensor:
    """`[rows, 2]`: maximum and log Σ exp(z − maximum), kept separate since their sum would round away small parts of z."""
    grid, span, block = _cut(z)
    top, total = (z.new_empty(grid, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(z):
        normalisers[grid](z, top, total, z.stride(0), z.shape[1], inverse, span, BLOCK=block, num_warps=8)
    return _joined(top, total)


def _joined(top: Tensor, total: Tensor) -> Tensor:
    """Combine the normalisers of a row's parts."""
    highest = top.amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    return torch.cat([highest, (total * (top - highest).exp()).sum(-1, keepdim=True).log()], -1)


def _dense(
    name: str, share: float, teacher: Tensor, tau: float, factor: float, z: Tensor, scale: float, softcap: float | None
) -> Tensor:
    teacher = teacher if teacher.stride(-1) == 1 else teacher.contiguous()
    norm_q, norm_p = _norms(z, 1 / tau), _norms(teacher, 1 / tau)
    grid, span, block = _cut(z)
    values, pulls = (z.new_empty(grid) for _ in range(2))
    mixture = (share, math.log(share), math.log1p(-share))

    def launch(row_pull: Tensor, write: bool) -> None:
        with torch.cuda.device_of(z):
            divergence[grid](
                z, teacher, norm_q, norm_p, row_pull, values, pulls, z.stride(0), teacher.stride(0), z.shape[1],
                1 / tau, *mixture, factor / tau * scale, 1 / (softcap or 1.0), span,
                LOSS=name, WRITE=write, CAPPED=softcap is not None, BLOCK=block, num_warps=8,
            )  # fmt: skip

    if name in ("forward_kl", "cross_entropy_soft"):
        launch(z.new_full((len(z),), -1.0), True)
    else:
        launch(z.new_zeros(len(z)), False)
        launch(pulls.sum(-1), True)
    return values.sum(-1) * factor


def _sparse(
    loss: Callable[..., Tensor], ids: Tensor, target: Any, options: dict[str, Any], tau: float, factor: float,
    z: Tensor, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    kept = z.gather(-1, ids)
    if isinstance(target, TopK):
        z.scatter_(-1, ids, -math.inf)  # the tail remains, summed without the excluded classes
        norm, coefficient, added, values = _named_apart(loss, z, kept / tau, target, options, tau)
    else:
        norm = _norms(z, 1 / tau)
        at = (kept / tau - norm[:, :1]) - norm[:, 1:]
        weights = target.weights.to(z.dtype) if target is not None else torch.ones_like(at)
        taught = target.log_probs.to(z.dtype) if loss is losses.forward_kl else 0.0
        values, coefficient, added = (weights * (taught - at)).sum(-1), weights.sum(-1), -weights
    outward, (grid, span, block) = factor / tau * scale, _cut(z)
    with torch.cuda.device_of(z):
        softmax[grid](
            z, norm, coefficient.mul(outward), z.stride(0), z.shape[1], 1 / tau, 1 / (softcap or 1.0), span,
            CAPPED=softcap is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip
    if softcap is not None:
        added = added * (1 - (kept / softcap).square())
    z.scatter_add_(-1, ids, added * outward)
    return values * factor


def _named_apart(
    loss: Callable[..., Tensor], z: Tensor, kept: Tensor, target: TopK, options: dict[str, Any], tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For k classes and a tail: the tail's normalisers and coefficient, the gradient of the k classes, and the values."""
    tail = _norms(z, 1 / tau)
    whole = _joined(torch.cat([kept, tail[:, :1]], -1), torch.cat([torch.ones_like(kept), tail[:, 1:].exp()], -1))
    log_q = (torch.cat([kept, tail.sum(-1, keepdim=True)], -1) - whole[:, :1]) - whole[:, 1:]
    values, u = bucket_gradient(loss, log_q, target, options)
    slope = u - log_q.exp() * u.sum(-1, keepdim=True)
    tail[:, 1].masked_fill_(tail[:, 1] == -math.inf, 0.0)  # no tail: 0 · exp(−inf), not nan
    return tail, slope[:, -1].contiguous(), slope[:, :-1], values
