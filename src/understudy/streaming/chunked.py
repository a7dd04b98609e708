"""The fast path: tile by tile over rows, with the gradient taken in the forward pass.

A tile is as many rows as the head's products are efficient on; its logits are the only large tensors there are. Inside a
tile the loss walks over strips of a few rows and writes its gradient over the logits it was taken at. Products
with the head are written out, so the head's gradient is accumulated in place. Cost: 6·H_s·V + 2·H_t·V operations a row;
memory two tiles of logits (student and teacher).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from understudy.streaming.gradients import by_hand
from understudy.streaming.plain import RowLoss, call, dense, finish
from understudy.targets import Dense, Projected, Target

TILE_BYTES = 48 * 2**20
"""Bytes of one `[tile rows, classes]` float32 tensor; two exist at a time."""
STRIP_BYTES = 4 * 2**20
"""Bytes of one `[strip rows, classes]` float32 tensor on a CPU; a loss holds about eight of them at a time."""
BLOCK = 2048
"""Classes that a CPU multiplies at a time: narrow products are slow when the head is the right-hand side."""
BLOCK_BYTES = 32 * 2**20
"""Half-precision heads are widened a block of classes at a time, of about this size."""


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
        loss: `loss(logits [strip, classes], target, *rows, **options) -> [strip]`; without target if that is `None`.
        student: `Dense` logits go straight to the loss; `Projected` ones tile by tile.
        target: any target; hidden states are projected a tile at a time.
        rows: further tensors with one entry a row, for example labels.
        tile_bytes: size of one tile of logits.

    Gradients flow to the student's hidden states, head weight and bias. Where one tile holds all rows its gradient is
    kept for the backward pass. Otherwise products are done in the forward pass and scaled when the gradient arrives; if
    that differs between rows, tiles are computed again.
    """
    if not isinstance(student, Projected):
        return call(loss, student.logits, dense(target), rows, options)
    target = target.detach() if target is not None else None
    work = _Work(loss, student.detach(), target, rows, options, tile_bytes)
    bias = student.bias if student.bias is not None else student.hidden.new_zeros(0)
    return _Tiles.apply(student.hidden, student.weight, bias, work)


class _Work:
    """The loss and its inputs, and the pass over tiles and strips."""

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
        self.dtype = torch.promote_types(torch.promote_types(student.hidden.dtype, student.weight.dtype), torch.float32)
        size = self.dtype.itemsize * student.classes
        self.number = student.hidden.shape[0]
        self.tile = _even(self.number, max(1, tile_bytes // size))
        on_cpu = student.hidden.device.type == "cpu"
        self.strip = max(1, min(self.tile, STRIP_BYTES // size)) if on_cpu else self.tile

    def buffer(self) -> Tensor:
        return self.student.hidden.new_empty(self.tile, self.student.classes, dtype=self.dtype)

    def slopes(self, part: slice, mine: Tensor, theirs: Tensor | None, wants: bool) -> tuple[Tensor, Tensor]:
        """Values of a tile's rows, and the gradient with respect to its products, written over them in `mine`."""
        hidden = self.student.hidden[part]
        logits = _product(hidden, self.student.weight, mine[: len(hidden)])
        target = self.target.select(part) if self.target is not None else None
        if isinstance(target, Projected):
            assert theirs is not None
            made = _product(target.hidden, target.weight, theirs[: len(hidden)])
            target = Dense(finish(made, target, inplace=True))
        target = dense(target)  # of a mixture, these rows alone
        values = logits.new_empty(len(hidden))
        for start in range(0, len(hidden), self.strip):
            strip = slice(start, start + self.strip)
            rows = tuple(r[part][strip] for r in self.rows)
            values[strip] = self._strip(
                logits[strip], target.select(strip) if target is not None else None, rows, wants
            )
        return values, logits

    def _strip(self, logits: Tensor, target: Any, rows: tuple[Tensor, ...], wants: bool) -> Tensor:
        """Values of a strip; `logits` becomes their gradient: by hand where that is known, else by autograd."""
        if wants and self.student.softcap is None:
            done = by_hand(self.loss, finish(logits, self.student), target, rows, self.options)
            if done is not None:
                logits.copy_(done[1].mul_(self.student.scale) if self.student.scale != 1 else done[1])
                return done[0]
        leaf = logits.detach().clone().requires_grad_(wants)
        with torch.set_grad_enabled(wants):
            out = call(self.loss, finish(leaf, self.student), target, rows, self.options)
        if wants:
            logits.copy_(torch.autograd.grad(out, leaf, torch.ones_like(out))[0])
        return out.detach()

    def run(self, needs: tuple[bool, bool, bool], upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """Values, and the gradients of `Σ upstream · values` (upstream 1 where none is given), tile after tile."""
        values = self.student.hidden.new_empty(self.number, dtype=self.dtype)
        mine, theirs = self.buffer(), self.buffer() if isinstance(self.target, Projected) else None
        grads: list[Tensor | None] = [None, None, None]
        for start in range(0, self.number, self.tile):
            part = slice(start, start + self.tile)
            values[part], slope = self.slopes(part, mine, theirs, any(needs))
            if any(needs):
                if upstream is not None:
                    slope.mul_(upstream[part, None].to(slope.dtype))
                self.products(part, slope, needs, grads, self.dtype)
        return values, grads

    def products(
        self, part: slice, slope: Tensor, needs: tuple[bool, bool, bool], grads: list[Tensor | None], dtype: torch.dtype
    ) -> None:
        """Add a tile's share to the gradients of hidden states, weight and bias; the first tile makes them."""
        hidden, weight = self.student.hidden, self.student.weight
        if needs[0]:
            into = grads[0] = grads[0] if grads[0] is not None else torch.empty_like(hidden)
            into[part] = _back(slope, weight).to(hidden.dtype)
        if needs[1]:
            wide, held = hidden[part].to(self.dtype), grads[1]
            if held is not None:
                held.addmm_(slope.T, wide)
            else:
                grads[1] = _first(slope, wide, torch.empty_like(weight, dtype=dtype))
        if needs[2]:
            held, total = grads[2], slope.sum(0)
            grads[2] = total if held is None else held.add_(total)


def _even(rows: int, most: int) -> int:
    """Rows of a tile: as few tiles as `most` allows, of about one size, which products like to be a multiple of 32."""
    if rows <= most:
        return max(1, rows)
    each = -(-rows // -(-rows // most))
    return min(most, -(-each // 32) * 32)


def _first(slope: Tensor, hidden: Tensor, out: Tensor) -> Tensor:
    """slopeᵀ · hidden into `out`, which may be narrower than the product."""
    if out.dtype == slope.dtype:
        return torch.mm(slope.T, hidden, out=out)
    for block in _blocks(out, True):
        out[block] = (slope[:, block].T @ hidden).to(out.dtype)
    return out


def _blocks(weight: Tensor, narrow: bool) -> list[slice]:
    """All classes at once, or block by block where something must be widened or narrowed on the way."""
    size = max(1, BLOCK_BYTES // (4 * weight.shape[1])) if narrow else max(1, weight.shape[0])
    return [slice(start, start + size) for start in range(0, weight.shape[0], size)]


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """hidden · weightᵀ in the dtype of `out`, whatever autocast says."""
    wide = hidden.to(out.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.device.type == "cpu":
            across, room = wide.T.contiguous(), out.new_empty(min(BLOCK, len(weight)), len(wide))
            for start in range(0, len(weight), BLOCK):
                block = weight[start : start + BLOCK].to(out.dtype)
                out[:, start : start + BLOCK] = torch.mm(block, across, out=room[: len(block)]).T
        else:
            for part in _blocks(weight, weight.dtype != out.dtype):
                torch.mm(wide, weight[part].to(out.dtype).T, out=out[:, part])
    return out


def _back(slope: Tensor, weight: Tensor) -> Tensor:
    """slope · weight in the slope's dtype."""
    with torch.autocast(slope.device.type, enabled=False):
        if weight.dtype == slope.dtype:
            return (weight.T @ slope.T).T  # the order that is faster for few rows on a CPU
        out = slope.new_zeros(len(slope), weight.shape[1])
        for block in _blocks(weight, True):
            out.addmm_(slope[:, block], weight[block].to(slope.dtype))
        return out


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, work: _Work) -> Tensor:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2] and bias.numel() > 0)
        ctx.needs, ctx.work = needs, work
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype)
        ctx.slope = ctx.grads = None
        if any(needs) and work.number <= work.tile:
            theirs = work.buffer() if isinstance(work.target, Projected) else None
            values, ctx.slope = work.slopes(slice(0, work.number), work.buffer(), theirs, True)
        else:
            values, ctx.grads = work.run(needs)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        if ctx.slope is not None:
            grads: list[Tensor | None] = [None, None, None]
            slope, ctx.slope = ctx.slope, None
            slope.mul_(upstream[:, None].to(slope.dtype))
            work.products(slice(0, work.number), slope, ctx.needs, grads, ctx.dtypes[1])
        else:
            grads, ctx.grads = ctx.grads, None
            uniform = bool((upstream == upstream[:1]).all())
            if grads is None or not uniform:  # a second backward pass, or rows that weigh differently
                _, grads = work.run(ctx.needs, upstream)
            else:
                for grad in grads:
                    if grad is not None:
                        grad.mul_(upstream[0].to(grad.dtype))
        return (*(g.to(d) if g is not None else None for g, d in zip(grads, ctx.dtypes, strict=True)), None)
