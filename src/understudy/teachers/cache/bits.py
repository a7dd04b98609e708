"""Integers and sets of integers as bits. Sets use Elias-Fano coding (1974, 1971): sorted, low bits plain, high bits in
unary."""

from __future__ import annotations

from typing import Any

import numpy as np

Bits = np.ndarray[Any, np.dtype[np.uint8]]


def low_bits(k: Any, universe: Any) -> Any:
    """Number of plain low bits of each of k integers below `universe`; both may be arrays."""
    return np.floor(np.log2(np.maximum(universe / np.maximum(k, 1), 1))).astype(np.int64)


def set_bits(k: Any, universe: Any) -> Any:
    """Number of bits of such a set; 0 for an empty one. Both may be arrays."""
    low = low_bits(k, universe)
    return np.where(np.asarray(k) > 0, k * (low + 1) + ((universe - 1) >> low) + 1, 0)


def pack_sets(values: Any, universe: int) -> Bits:
    """Rows `[rows, k]` of sorted distinct integers as bits `[rows, set_bits(k, universe)]`."""
    rows, k = values.shape
    if k == 0:
        return np.zeros((rows, 0), np.uint8)
    low = int(low_bits(k, universe))
    high = np.zeros((rows, k + ((universe - 1) >> low) + 1), np.uint8)
    np.put_along_axis(high, (values >> low) + np.arange(k), 1, 1)
    return np.concatenate([to_bits(values & ((1 << low) - 1), low).reshape(rows, k * low), high], 1)


def unpack_sets(bits: Bits, k: int, universe: int) -> Any:
    """The integers `[rows, k]`, int64, of bits that begin with such sets."""
    if k == 0:
        return np.zeros((len(bits), 0), np.int64)
    low, whole = int(low_bits(k, universe)), int(set_bits(k, universe))
    lower = to_numbers(bits[:, : k * low].reshape(len(bits), k, low)).astype(np.int64) if low else 0
    at = np.nonzero(bits[:, k * low : whole])[1].reshape(len(bits), k) - np.arange(k)
    return (at << low) + lower


def to_bits(values: Any, width: int) -> Bits:
    """Integers `[…]` as bits `[…, width]`, the highest first."""
    return ((values[..., None] >> np.arange(width - 1, -1, -1)) & 1).astype(np.uint8)


def to_numbers(bits: Any) -> Any:
    """The integers of bits `[…, width]`, as float64."""
    width = bits.shape[-1]
    return bits.astype(np.float64) @ (2.0 ** np.arange(width - 1, -1, -1))
