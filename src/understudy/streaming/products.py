"""Products with the head: hidden · weightᵀ, slope · weight and slopeᵀ · hidden, in float32 whatever is stored.

A half-precision factor is widened a block of classes at a time, except on a GPU, whose bfloat16 units multiply exactly
and add in float32. There logits are one product of the stored numbers, not rounded on the way out. The slope is float32.
Rounded to bfloat16 it would cost 0.17 % of the head's gradient at any KL (1, 0.1, 0.01; 0.23 % once that is stored in
bfloat16, which by itself costs 0.17 %), and 0.03 to 0.15 % of the hidden states': most where the rows of the head have a
mean, which cancels in Σ slope · weight while the rounding does not. As the sum of two bfloat16 halves it adds less than
0.001 %, for two products in place of one: 10·H_s·V operations a row at bfloat16 speed in place of 6·H_s·V at float32
speed. These figures are emulated on a CPU. float16 has not the range for a slope: its products back stay wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 32 * 2**20
"""Half-precision heads are widened a block of classes at a time, of about this size."""
FEW, TURNED_CLASSES, TURNED_BYTES = 384, 512, 2 * 2**20
"""Logits of so few rows on a CPU are made as products of so many classes with the rows, of about this size at a time. At
131,072 classes that took, of one product's time, 0.4 to 0.5 with 16 rows, 0.6 with 128, 0.7 with 256 and 0.8 to 0.9 with
512 (hidden 1,024 to 4,096); at hidden 256 0.7, 0.8, 0.9 and 1.0."""
HALF = (torch.bfloat16, torch.float16)


def to_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """hidden · weightᵀ in the dtype of `out`, whatever autocast says."""
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
    """The same as many weight · hiddenᵀ."""
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
    """`out` `[classes, hidden]` becomes keep · out + slopeᵀ · hidden; with `keep` 0 it is not read, and may be narrower."""
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
    """All classes at once, or block by block, of up to `most`, where something must be widened, narrowed or turned on the
    way."""
    classes, size = len(weight), max(1, len(weight))
    if split:
        size = max(1, min(BLOCK_BYTES // (4 * weight.shape[1]), most or classes))
        size = size // TURNED_CLASSES * TURNED_CLASSES or size
    return [slice(start, start + size) for start in range(0, classes, size)]


def on_tensor_cores(x: Tensor) -> bool:
    """Half-precision numbers on a GPU, whose products are exact and summed in float32."""
    return x.device.type == "cuda" and x.dtype in HALF


def narrow(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """A float32 product of half-precision factors."""
    if out is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _by_halves(slope: Tensor, other: Tensor) -> bool:
    return on_tensor_cores(other) and other.dtype == torch.bfloat16 and slope.dtype == torch.float32


def _add_halves(out: Tensor, slope: Tensor, other: Tensor) -> None:
    """Add slope · other to `out`, the slope being high + low but for 2⁻¹⁷ of it."""
    high = slope.to(other.dtype)
    out.add_(narrow(high, other)).add_(narrow((slope - high).to(other.dtype), other))
