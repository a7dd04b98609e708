"""Products with the head: hidden · weightᵀ, slope · weight and slopeᵀ · hidden, in float32 for any stored dtype. The
slope is the gradient with respect to the logits, in float32.

A half-precision factor is converted to float32 one block of classes at a time, except on a GPU, whose bfloat16 units
multiply exactly and accumulate in float32. There logits are one product of the stored numbers, not rounded at the end,
and a slope is the sum of two bfloat16 halves: 10·H_s·V operations per row at bfloat16 speed instead of 6·H_s·V at
float32 speed. A slope rounded to bfloat16 would add an error to the gradients (`docs/benchmarks.md`). The range of
float16 is too small for a slope, so its products are in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 32 * 2**20
"""Approximate size of the blocks of classes in which half-precision heads are converted to float32."""
FEW, TURNED_CLASSES, TURNED_BYTES = 384, 512, 2 * 2**20
"""On a CPU, logits of up to FEW rows are computed as products of TURNED_CLASSES classes with the rows, of about TURNED_BYTES
at a time, which is faster there (`docs/benchmarks.md`)."""
HALF = (torch.bfloat16, torch.float16)


def to_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """hidden · weightᵀ in the dtype of `out`, also under autocast."""
    with torch.autocast(hidden.device.type, enabled=False):
        if on_tensor_cores(hidden) and hidden.dtype == weight.dtype and out.dtype == torch.float32:
            return narrow(hidden, weight.T, out)
        wide = hidden.to(out.dtype)
        few = 0 < len(wide) <= FEW and weight.device.type == "cpu"
        most = TURNED_BYTES // (4 * len(wide)) if few else len(weight)
        for part in _blocks(weight, few or weight.dtype != out.dtype, most):
            (_turned if few else _product)(wide, weight[part].to(out.dtype), out[:, part])
    return out


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.mm(hidden, weight.T, out=out)


def _turned(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """The same product as many products weight · hiddenᵀ."""
    blocks = len(weight) // TURNED_CLASSES
    split = blocks * TURNED_CLASSES
    made = torch.bmm(weight[:split].unflatten(0, (blocks, TURNED_CLASSES)), hidden.T.expand(blocks, -1, -1))
    out[:, :split].unflatten(1, (blocks, TURNED_CLASSES)).copy_(made.permute(2, 0, 1))
    _product(hidden, weight[split:], out[:, split:])


def to_hidden(slope: Tensor, weight: Tensor) -> Tensor:
    """slope · weight in the slope's dtype."""
    with torch.autocast(slope.device.type, enabled=False):
        if weight.dtype == slope.dtype:
            return slope @ weight
        out = slope.new_zeros(len(slope), weight.shape[1])
        for block in _blocks(weight, True):
            if _by_halves(slope, weight):
                _add_halves(out, slope[:, block], weight[block])
            else:
                out.addmm_(slope[:, block], weight[block].to(slope.dtype))
        return out


def to_weight(slope: Tensor, hidden: Tensor, out: Tensor, keep: float) -> Tensor:
    """Set `out` `[classes, hidden]` to keep · out + slopeᵀ · hidden. With `keep` 0 it is not read and may have a
    narrower dtype."""
    with torch.autocast(slope.device.type, enabled=False):
        halves = _by_halves(slope, hidden)
        wide = hidden if halves else hidden.to(slope.dtype)
        for block in _blocks(out, halves or out.dtype != slope.dtype):
            if halves:
                made = out[block].mul_(keep) if keep else torch.zeros_like(out[block], dtype=slope.dtype)
                _add_halves(made, slope[:, block].T, wide)
                out[block] = made
            elif out.dtype == slope.dtype:
                out[block].addmm_(slope[:, block].T, wide, beta=keep)
            else:
                out[block] = (slope[:, block].T @ wide).to(out.dtype)
    return out


def _blocks(weight: Tensor, split: bool, most: int | None = None) -> list[slice]:
    """All classes at once, or blocks of up to `most` where a factor must be converted or transposed."""
    classes, size = len(weight), max(1, len(weight))
    if split:
        size = max(1, min(BLOCK_BYTES // (4 * weight.shape[1]), most or classes))
        size = size // TURNED_CLASSES * TURNED_CLASSES or size
    return [slice(start, start + size) for start in range(0, classes, size)]


def on_tensor_cores(x: Tensor) -> bool:
    """Whether products are exact with float32 sums: half-precision numbers on a GPU."""
    return x.device.type == "cuda" and x.dtype in HALF


def narrow(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """A float32 product of half-precision factors."""
    if out is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _by_halves(slope: Tensor, other: Tensor) -> bool:
    return on_tensor_cores(other) and other.dtype == torch.bfloat16 and slope.dtype == torch.float32


def _add_halves(out: Tensor, slope: Tensor, other: Tensor) -> None:
    """Add slope · other to `out`, with the slope as high + low, up to a relative error of 2⁻¹⁷."""
    high = slope.to(other.dtype)
    out.add_(narrow(high, other)).add_(narrow((slope - high).to(other.dtype), other))
