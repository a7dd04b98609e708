"""The fast path: tile by tile over rows, with the gradient taken in the forward pass.

Each tile's logits live only while the tile does. The loss is differentiated with respect to the tile's logits alone;
the products with the head are written out, so the head's gradient is accumulated in place and nothing is kept for
the backward pass but the gradients themselves. Cost: 6·H_s·V + 2·H_t·V operations a row, memory one tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from understudy.streaming.plain import RowLoss, call, dense, finish, linear
from understudy.targets import Dense, Projected, Target

TILE_BYTES = 6 * 2**20
"""Bytes of one `[tile rows, classes]` float32 tensor; a loss holds about eight of them at a time."""


def rowwise(
    loss: RowLoss,
    student: Dense | Projected,
    target: Target | None,
    *rows: Tensor,
    tile_bytes: int = TILE_BYTES,
    **options: Any,
) -> Tensor:
    """Values `[rows]` of a row-wise loss, differentiable, with no `[rows, classes]` tensor beyond one tile.

    Args:
        loss: `loss(logits [tile, classes], target, *rows, **options) -> [tile]`; without target if that is `None`.
        student: `Dense` logits go straight to the loss; `Projected` ones tile by tile.
        target: any target; hidden states are projected a tile at a time.
        rows: further tensors with one entry a row, for example labels.
        tile_bytes: size of one tile of logits.

    Gradients flow to the student's hidden states, head weight and bias. If the gradient that arrives is the same for
    every row (a sum or mean), those taken in the forward pass are scaled; otherwise tiles are computed again.
    """
    if not isinstance(student, Projected):
        return call(loss, student.logits, dense(target), rows, options)
    target = target.detach() if target is not None else None
    work = _Work(loss, student.detach(), target, rows, options, tile_bytes)
    bias = student.bias if student.bias is not None else student.hidden.new_zeros(0)
    return _Tiles.apply(student.hidden, student.weight, bias, work)


class _Work:
    """The loss and its inputs, and the pass over tiles."""

    def __init__(
        self,
        loss: RowLoss,
        student: Projected,
        target: Target | None,
        rows: tuple[Tensor, ...],
        options: dict[str, Any],
        tile_bytes: int,
    ) -> None:
        self.loss, self.student, self.target, self.rows, self.options = loss, student, target, rows, options
        size = max(4, student.hidden.element_size()) * student.classes
        self.tile = max(1, tile_bytes // size)

    def run(self, needs: tuple[bool, bool, bool], upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """Values, and the gradients of `Σ upstream · values` (upstream 1 where none is given)."""
        student = self.student
        hidden, weight = student.hidden, student.weight
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        wide = weight.to(dtype)  # once, not once a tile
        wants = any(needs)
        grads: list[Tensor | None] = [
            torch.empty_like(hidden) if needs[0] else None,
            torch.zeros_like(wide) if needs[1] else None,
            torch.zeros_like(student.bias, dtype=dtype) if needs[2] and student.bias is not None else None,
        ]
        values = hidden.new_empty(hidden.shape[0], dtype=dtype)
        for start in range(0, hidden.shape[0], self.tile):
            part = slice(start, start + self.tile)
            wide_hidden = hidden[part].to(dtype)
            logits = linear(wide_hidden, wide).requires_grad_(wants)
            target = dense(self.target.select(part)) if self.target is not None else None
            with torch.set_grad_enabled(wants), torch.autocast(hidden.device.type, enabled=False):
                out = call(self.loss, finish(logits, student), target, tuple(r[part] for r in self.rows), self.options)
                values[part] = out.detach()
                if wants:
                    seed = torch.ones_like(out) if upstream is None else upstream[part].to(out)
                    (slope,) = torch.autograd.grad(out, logits, seed)
            if not wants:
                continue
            del logits, out, target
            if grads[0] is not None:
                grads[0][part] = slope @ wide
            if grads[1] is not None:
                grads[1].addmm_(slope.T, wide_hidden)
            if grads[2] is not None:
                grads[2].add_(slope.sum(0))
            del slope
        return values, grads


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, work: _Work) -> Tensor:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2] and bias.numel() > 0)
        values, ctx.grads = work.run(needs)
        ctx.needs, ctx.work = needs, work
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        uniform = bool((upstream == upstream[:1]).all())
        if grads is None or not uniform:  # a second backward pass, or rows that weigh differently
            _, grads = ctx.work.run(ctx.needs, upstream)
        elif upstream.numel():
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream[0].to(grad.dtype))
        out = [g.to(d) if g is not None else None for g, d in zip(grads, ctx.dtypes, strict=True)]
        return (*out, None)
