"""The fast path: the loss tile by tile over rows, with its gradient computed in the forward pass.

A tile has as many rows as make the products with the head efficient; its logits are the only large tensors. Inside a
tile the loss is computed on strips of a few rows, and the gradient overwrites the logits. The products with the head
are written out, so that the head's gradient is accumulated in place. Cost: 6·H_s·V + 2·H_t·V operations per row;
memory: one tile of the student's logits and most of one of the teacher's.

On a CPU the gradient of a strip comes from `by_hand` or autograd; on a GPU Triton kernels are tried first, on a whole
tile. `torch.compile` is not used (`docs/benchmarks.md`).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from understudy.streaming.gradients import by_hand
from understudy.streaming.plain import RowLoss, call, dense, finish
from understudy.streaming.products import to_hidden, to_logits, to_weight
from understudy.targets import Dense, Mixture, Projected, Target

TILE_BYTES = 64 * 2**20
"""Bytes of one `[tile rows, classes]` float32 tensor on a CPU. The head is read, and its gradient added to, once per tile, so
`bytes_of_tile` takes up to three times as much if that saves tiles."""
GPU_TILE_BYTES = 256 * 2**20
"""The same on a GPU, where a tile of few rows would be bound by reading the head and adding to its gradient. At 512 rows
products take about twice as long as that, estimated from the bandwidth of an H100, not measured."""
STRIP_BYTES = 2**20
"""Bytes of one `[strip rows, classes]` float32 tensor on a CPU, small enough for the cache."""
STRIPS_HELD = 8
"""Approximate number of tensors of a strip that a loss holds at a time."""


def rowwise(
    loss: RowLoss,
    student: Dense | Projected,
    target: Target | None,
    *rows: Tensor,
    tile_bytes: int | None = None,
    kernels: bool = True,
    **options: Any,
) -> Tensor:
    """Values `[rows]` of a row-wise loss, differentiable, with no `[rows, classes]` tensor beyond one tile.

    Args:
        loss: `loss(logits [strip, classes], target, *rows, **options) -> [strip]`; without target if that is `None`.
        student: `Dense` logits go straight to the loss; `Projected` ones tile by tile.
        target: any target; hidden states are projected a tile at a time.
        rows: further tensors with one entry a row, for example labels. So are tensors among `options`.
        tile_bytes: size of one tile of logits, if not `bytes_of_tile`.
        kernels: use the Triton kernels where they run and cover the loss.

    Gradients flow to the student's hidden states, head weight and bias. Their products are done in the forward pass,
    except those of the last tile, which is kept for the backward pass and there added to the others, scaled in the same
    pass over memory. If the upstream gradient differs between rows, the tiles are recomputed.
    """
    if not isinstance(student, Projected):
        return call(loss, student.logits, dense(target), rows, options)
    target = target.detach() if target is not None else None
    work = _Work(loss, student.detach(), target, rows, options, tile_bytes, kernels)
    bias = student.bias if student.bias is not None else student.hidden.new_zeros(0)
    return _Tiles.apply(student.hidden, student.weight, bias, work)


Needs = tuple[bool, bool, bool]
Grads = list[Tensor | None]


class _Work:
    """The loss with its inputs, and the loop over tiles and strips."""

    def __init__(
        self,
        loss: RowLoss,
        student: Projected,
        target: Target | None,
        rows: tuple[Tensor, ...],
        options: dict[str, Any],
        tile_bytes: int | None,
        kernels: bool,
    ) -> None:
        self.loss, self.student, self.target, self.rows, self.options = loss, student, target, rows, options
        self.dtype = torch.promote_types(torch.promote_types(student.hidden.dtype, student.weight.dtype), torch.float32)
        size = self.dtype.itemsize * student.classes
        self.number = student.hidden.shape[0]
        device = student.hidden.device
        on_cpu = device.type == "cpu"
        most = tile_bytes or bytes_of_tile(not on_cpu, self.number * size)
        self.tile, self.beside = rows_of_tile(self.number, most // size, not on_cpu)
        if not isinstance(target, (Projected, Mixture)):
            self.beside = self.tile
        self.parts = [slice(start, start + self.tile) for start in range(0, max(1, self.number), self.tile)]
        self.kernels = kernels and _kernels(device)
        self.strip = max(1, min(self.tile, STRIP_BYTES // size)) if on_cpu else self.tile
        if self.strip < self.tile:
            keep_heap(STRIPS_HELD * self.strip * size)

    def buffer(self, rows: int) -> Tensor:
        return self.student.hidden.new_empty(rows, self.student.classes, dtype=self.dtype)

    def slopes(self, part: slice, mine: Tensor, teacher: _Teacher, wants: bool) -> tuple[Tensor, Tensor]:
        """Values of a tile's rows, and the gradient with respect to its logits, which overwrites them in `mine`."""
        hidden = self.student.hidden[part]
        logits = to_logits(hidden, self.student.weight, mine[: len(hidden)])
        values = logits.new_empty(len(hidden))
        start, stop = part.start, part.start + len(hidden)
        while start < stop:  # one block of the teacher's at a time
            at = slice(start, min(stop, (start // self.beside + 1) * self.beside))
            inside = slice(at.start - part.start, at.stop - part.start)
            values[inside] = self._piece(at, logits[inside], teacher.select(at), wants)
            start = at.stop
        return values, logits

    def _piece(self, at: slice, logits: Tensor, target: Target | None, wants: bool) -> Tensor:
        """Values of these rows; their gradient overwrites `logits`."""
        if wants and self.kernels:
            found = self._fused(at, logits, target)
            if found is not None:
                return found
        values = logits.new_empty(len(logits))
        for start in range(0, len(logits), self.strip):
            strip = slice(start, start + self.strip)
            rows = tuple(r[at][strip] for r in self.rows)
            options = {k: v[at][strip] if isinstance(v, Tensor) else v for k, v in self.options.items()}
            values[strip] = self._strip(
                logits[strip], target.select(strip) if target is not None else None, rows, options, wants
            )
        return values

    def _fused(self, part: slice, logits: Tensor, target: Any) -> Tensor | None:
        """Values of these rows by the Triton kernels, whose gradient overwrites `logits`; `None`, with `logits`
        unchanged, if they do not apply."""
        from understudy.streaming.writers import writer

        write = writer(self.loss, logits, target, tuple(r[part] for r in self.rows), self.options)
        if write is None:
            return None
        student = self.student
        values = write(finish(logits, student, inplace=True), student.scale, student.softcap)
        if bool(values.isfinite().all()):
            return values
        to_logits(student.hidden[part], student.weight, logits)  # for the plain loss
        return None

    def _strip(
        self, logits: Tensor, target: Any, rows: tuple[Tensor, ...], options: dict[str, Any], wants: bool
    ) -> Tensor:
        """Values of a strip; `logits` becomes their gradient: by hand where that is known, else by autograd."""
        if wants and self.student.softcap is None:
            done = by_hand(self.loss, finish(logits, self.student), target, rows, options)
            if done is not None:
                logits.copy_(done[1].mul_(self.student.scale) if self.student.scale != 1 else done[1])
                return done[0]
        leaf = logits.detach().clone().requires_grad_(wants)
        with torch.set_grad_enabled(wants):
            out = call(self.loss, finish(leaf, self.student), target, rows, options)
        if wants:
            logits.copy_(torch.autograd.grad(out, leaf, torch.ones_like(out))[0])
        return out.detach()

    def run(self, needs: Needs, upstream: Tensor | None = None) -> tuple[Tensor, Grads, Tensor]:
        """Values; the gradients of `Σ values` without the part of the last tile; and that tile's gradient with respect
        to its logits. With `upstream`, all of the gradients of `Σ upstream · values`."""
        values = self.student.hidden.new_empty(self.number, dtype=self.dtype)
        mine = self.buffer(self.tile)
        teacher = _Teacher(self)
        grads: Grads = [None, None, None]
        for part in self.parts:
            values[part], slope = self.slopes(part, mine, teacher, any(needs))
            if upstream is not None:
                slope.mul_(upstream[part, None].to(slope.dtype))
            if any(needs) and (upstream is not None or part is not self.parts[-1]):
                self.products(part, slope, needs, grads)
        return values, grads, slope

    def products(self, part: slice, slope: Tensor, needs: Needs, grads: Grads, scale: float = 1.0) -> None:
        """Multiply the gradients of hidden states, weight and bias by `scale` and add a tile's part; the first tile
        allocates them."""
        hidden, weight = self.student.hidden, self.student.weight
        if needs[0]:
            into = grads[0] = grads[0] if grads[0] is not None else torch.empty_like(hidden)
            if scale != 1:
                into[: part.start].mul_(scale)
            into[part] = to_hidden(slope, weight).to(hidden.dtype)
        if needs[1]:
            dtype = weight.dtype if len(self.parts) == 1 else self.dtype
            held = grads[1]
            into = torch.empty_like(weight, dtype=dtype) if held is None else held
            grads[1] = to_weight(slope, hidden[part], into, 0.0 if held is None else scale)
        if needs[2]:
            held, total = grads[2], slope.sum(0)
            grads[2] = total if held is None else held.mul_(scale).add_(total)


class _Teacher:
    """The target of rows that are requested in order. Hidden states are projected `beside` rows at a time, independent
    of the student's tiles: a teacher's head has no gradient, so small blocks cost less there."""

    def __init__(self, work: _Work) -> None:
        self.target, self.beside = work.target, work.beside
        self.room = work.buffer(work.beside) if isinstance(work.target, Projected) else None
        self.begin = -1
        self.made: Target | None = None

    def select(self, at: slice) -> Target | None:
        """The target of rows within one block of `beside` rows, with logits instead of hidden states."""
        if not isinstance(self.target, (Projected, Mixture)):
            return None if self.target is None else self.target.select(at)
        begin = at.start // self.beside * self.beside
        if begin != self.begin:
            self.begin, self.made = begin, None  # free it first
            these: Target = self.target.select(slice(begin, begin + self.beside))
            if isinstance(these, Projected):
                assert self.room is not None
                product = to_logits(these.hidden, these.weight, self.room[: len(these.hidden)])
                these = Dense(finish(product, these, inplace=True))
            self.made = dense(these)
        assert self.made is not None
        return self.made.select(slice(at.start - begin, at.stop - begin))


def _kernels(device: torch.device) -> bool:
    """Whether Triton is installed and runs on the device; on a CPU only in interpreter mode."""
    if device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
        return False
    try:
        from understudy.streaming.writers import runs_on
    except ImportError:
        return False
    return runs_on(device)


def keep_heap(size: int) -> None:
    """Make the C library keep the memory that a strip frees for the next strip, up to `size` bytes.

    glibc returns freed memory to the system beyond a threshold, which it raises to twice the largest block, up to 32
    MiB, that was ever freed. Allocating and freeing a block that is never written raises it and saves page faults
    (`docs/benchmarks.md`).
    """
    torch.empty(size, dtype=torch.uint8)


def bytes_of_tile(gpu: bool, whole: int) -> int:
    """Bytes of one tile of logits, if those of all rows are `whole` bytes."""
    if gpu:
        return GPU_TILE_BYTES
    if whole <= 2 * TILE_BYTES:
        return 2 * TILE_BYTES
    return min(max(TILE_BYTES, whole // 5), 3 * TILE_BYTES)


def rows_of_tile(rows: int, most: int, gpu: bool) -> tuple[int, int]:
    """Rows of the student's tiles, at most `most`, and the number of rows for which the teacher is projected at a time.
    The latter is smaller on a CPU, where it bounds the peak memory."""
    most = max(1, most)
    return even(rows, most), even(rows, most if gpu else max(1, most * 13 // 16))


def even(rows: int, most: int) -> int:
    """Rows of a tile: as few tiles as `most` allows, of about equal size and a multiple of 32, which products are
    efficient on."""
    if rows <= most:
        return max(1, rows)
    each = -(-rows // -(-rows // most))
    return min(most, -(-each // 32) * 32)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, work: _Work) -> Tensor:
        ctx.needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2] and bias.numel() > 0)
        ctx.work, ctx.dtypes = work, (hidden.dtype, weight.dtype, bias.dtype)
        values, *kept = work.run(ctx.needs)
        ctx.kept = kept if any(ctx.needs) else None
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        kept, ctx.kept = ctx.kept, None
        one = len(work.parts) == 1
        # Recompute for a second backward pass, or if the upstream gradient differs between rows.
        if kept is None or not (one or bool((upstream == upstream[:1]).all())):
            kept = None  # free it first
            _, grads, _ = work.run(ctx.needs, upstream)
        else:
            grads, slope = kept
            last = work.parts[-1]
            slope.mul_(upstream[last, None].to(slope.dtype))
            work.products(last, slope, ctx.needs, grads, 1.0 if one else float(upstream[0]))
        return (*(g.to(d) if g is not None else None for g, d in zip(grads, ctx.dtypes, strict=True)), None)
