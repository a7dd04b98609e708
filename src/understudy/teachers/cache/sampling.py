"""A sampled support of the rows of one example: as many classes as fit into a given number of bytes per row, without
bias.

All rows of an example share one threshold τ, so a row with many probable classes gets more of them than a certain one.
A pair of row and class with p > τ is kept with its probability; the others are drawn with probability p / τ and have
weight τ (Horvitz and Thompson 1952), by systematic sampling along the example: row after row, class after class. τ is
the smallest value for which every draw fits; it depends on the teacher alone, so the estimate stays unbiased.

Tokenizers number their tokens roughly from frequent to rare. So classes are coded in bands of ids, each twice as wide
as the one before: an id in a dense band takes fewer bits.

    level of τ, bits of a probability · sizes of both sets, per band · kept pairs, drawn pairs, per band
    · probabilities of the kept pairs · mean log p of the other classes of each row
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.targets import Sampled
from understudy.teachers.cache.bits import pack_sets, set_bits, to_bits, to_numbers, unpack_sets

FLOOR = 24.0
"""In nats: probabilities below e^−24 are drawn, never kept, and τ is at least that."""
LEVELS = 4096
"""Number of thresholds: τ = e^(−FLOOR · level / LEVELS)."""
WIDTHS = range(4, 13)
"""Possible numbers of bits of a kept probability."""
LEAST = 64
"""Smallest number of classes in a band."""
BAND = 64
"""Fewest bytes of an example per band."""
PAD = 16
"""Supports are padded to a multiple of this, so that few widths occur."""


def pack_sampled(log_p: Tensor, size: int, chance: torch.Generator) -> Tensor:
    """The rows of one example as `[rows, size]` bytes.

    Args:
        log_p: `[rows, classes]`, float64.
        size: bytes per row.
        chance: generator on the CPU, so that every device draws the same.

    Raises:
        InputError: `size` is too small for one drawn class per row.
    """
    rows, classes = log_p.shape
    if rows == 0:  # as of a node that is not the first of its graph
        return torch.zeros(0, size, dtype=torch.uint8)
    bands, surprise, p = _bands(classes, rows * size), -log_p.clamp(min=-1e4), log_p.exp()
    bins = (surprise * (LEVELS / FLOOR)).clamp(max=LEVELS).long()
    level, width = _finest(bins, p, bands, size)
    certain = bins < level
    rest = p.masked_fill_(certain, 0.0)
    kept = [certain[:, band].flatten().nonzero()[:, 0] for band in bands]
    drawn = [_systematic(rest[:, band].flatten() * math.exp(_nats(level)), chance) for band in bands]
    near = torch.cat([surprise[:, band].flatten()[ids] for band, ids in zip(bands, kept, strict=True)])
    mean = (rest * surprise).sum(-1) / rest.sum(-1).clamp(min=1e-300)
    parts = [_varint(level), _varint(width), *(_varint(len(ids)) for ids in (*kept, *drawn))]
    for ids, band in zip((*kept, *drawn), (*bands, *bands), strict=True):
        parts.append(pack_sets(ids.cpu().numpy()[None], rows * (band.stop - band.start))[0])
    steps = _by_chance(_levels_of(near.cpu(), _nats(level), 2**width - 1), chance)
    parts.append(to_bits(steps.long().numpy(), width).ravel())
    parts.append(to_bits((mean / FLOOR * 255).clamp(0, 255).round().long().cpu().numpy(), 8).ravel())
    code = np.packbits(np.concatenate(parts))
    return torch.from_numpy(np.pad(code, (0, rows * size - len(code))).reshape(rows, size))


def unpack_sampled(code: Tensor, counts: list[int], classes: int, temperature: float) -> Sampled:
    """The target of examples of `counts` rows each, from their bytes `[rows, size]`. Shorter rows are padded with
    weight 0."""
    counts = [count for count in counts if count]
    parts = [_entries(part.numpy(), classes) for part in code.split(counts)]
    start = np.repeat(np.cumsum([0, *counts[:-1]]), [len(p[0]) for p in parts])
    row, ids, weights, log_p = (np.concatenate(column) for column in zip(*parts, strict=True))
    row = row + start
    order = np.argsort(row, kind="stable")
    row, number = row[order], np.bincount(row, minlength=len(code))
    place = np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)
    width = -(-max(1, int(number.max())) // PAD) * PAD
    first = np.minimum(np.cumsum(number) - number, max(0, len(row) - 1))
    padded = np.repeat(ids[order][first][:, None], width, 1)  # padding is a valid class with weight 0
    out = [padded, np.zeros((len(code), width), np.float32), np.zeros((len(code), width), np.float32)]
    for target, values in zip(out, (ids, weights, log_p), strict=True):
        target[row, place] = values[order]
    found = [torch.from_numpy(x) for x in out]
    return Sampled(found[0], found[1], found[2], temperature)


def _bands(classes: int, size: int) -> list[slice]:
    """Bands of ids, halved from above; fewer if an example has few bytes, since each band costs a few."""
    ends = [classes]
    while ends[-1] > LEAST and len(ends) < size // BAND:
        ends.append(ends[-1] // 2)
    return [slice(a, b) for a, b in zip([0, *reversed(ends[1:])], reversed(ends), strict=True)]


def _finest(bins: Tensor, p: Tensor, bands: list[slice], size: int) -> tuple[int, int]:
    """The level of τ and the bits of a kept probability with the least variance for this number of bytes per row."""
    rows, level = len(bins), np.arange(LEVELS + 1)
    pairs = np.array([[rows * (band.stop - band.start)] for band in bands])
    kept, rest, near, far = (np.stack(x) for x in zip(*(_sums(bins[:, b], p[:, b]) for b in bands), strict=True))
    rest = np.where(kept == pairs, 0.0, rest)
    drawn = np.ceil(rest * np.exp(_nats(level)) + 1e-6).astype(np.int64) * (rest > 0)
    bits = 8 * (_varint_bytes(kept) + _varint_bytes(drawn)) + set_bits(kept, pairs) + set_bits(drawn, pairs)
    room = 8 * size * rows - bits.sum(0) - 8 * (3 + rows)
    possible, number, none = (drawn <= pairs).all(0), kept.sum(0), (drawn == 0).all(0)
    draws = rest.sum(0) * np.exp(-_nats(level)) - far.sum(0)
    found = []
    for width in WIDTHS:
        fits = possible & (width * number <= room)
        whole = (fits & none).nonzero()[0]
        if fits.any():
            best = int(whole[0] if len(whole) else fits.nonzero()[0][-1])  # nothing left to draw; lower is coarser
            step = _nats(best) / (2**width - 1)
            found.append((draws[best] + near.sum(0)[best] * step**2 / 6, best, width))
    if not found:
        raise InputError(
            f"{size} bytes a row do not hold one class of {bands[-1].stop} for each of {rows} rows: "
            "keep more (sampled:38B)."
        )
    return min(found)[1:]


def _sums(bins: Tensor, p: Tensor) -> tuple[Any, Any, Any, Any]:
    """At each level: number of kept pairs, mass of the others, and Σ p² of both."""
    flat, mass = bins.flatten(), p.flatten()
    before = []
    for weights in (None, mass, mass * mass):
        total = torch.bincount(flat, weights=weights, minlength=LEVELS + 1).cumsum(0).cpu().numpy()
        before.append(np.concatenate([total[:1] * 0, total]))
    number, mass_, square = before
    return number[:-1], (mass_[-1] - mass_[:-1]).clip(0), square[:-1], square[-1] - square[:-1]


def _systematic(inclusion: Tensor, chance: torch.Generator) -> Tensor:
    """Indices drawn with the given inclusion probabilities (below 1), ascending and distinct."""
    ends = inclusion.cumsum(0)
    points = torch.rand(1, generator=chance, dtype=ends.dtype) + torch.arange(math.ceil(float(ends[-1])))
    return torch.searchsorted(ends, points[points < ends[-1].cpu()].to(ends.device), right=True).clamp(
        max=len(ends) - 1
    )


def _entries(code: Any, classes: int) -> tuple[Any, Any, Any, Any]:
    """Row, class, weight and log-probability of each pair of one example, whose bytes are `[rows, size]`."""
    bands, (head, start) = _bands(classes, code.size), _header(code, classes)
    level, width, *numbers = head
    wide = np.array([band.stop - band.start for band in bands] * 2)
    bits, ends = np.unpackbits(code), 8 * start + set_bits(np.array(numbers), len(code) * wide).cumsum()
    row, ids = [], []
    for i, (number, end) in enumerate(zip(numbers, ends, strict=True)):
        found = unpack_sets(bits[None, 8 * start if i == 0 else ends[i - 1] : end], number, len(code) * int(wide[i]))[0]
        row.append(found // wide[i])
        ids.append(found % wide[i] + bands[i % len(bands)].start)
    kept, drawn = sum(numbers[: len(bands)]), np.concatenate(row[len(bands) :])
    end = ends[-1] + width * kept
    log_p = -to_numbers(bits[ends[-1] : end].reshape(-1, width)) * (_nats(level) / (2**width - 1))
    mean = -to_numbers(bits[end : end + 8 * len(code)].reshape(-1, 8)) * (FLOOR / 255)
    weights = np.concatenate([np.exp(log_p), np.full(len(drawn), math.exp(-_nats(level)))])
    return np.concatenate(row), np.concatenate(ids), weights, np.concatenate([log_p, mean[drawn]])


def _header(code: Any, classes: int) -> tuple[list[int], int]:
    """Level of τ, bits of a probability, sizes of the kept and the drawn set by band; and the bytes of this header."""
    stream, head, at = code.ravel(), [], 0
    for _ in range(2 + 2 * len(_bands(classes, code.size))):
        value, shift = 0, 0
        while True:
            byte = int(stream[at])
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                break
        head.append(value)
    return head, at


def _nats(level: Any) -> Any:
    return level * FLOOR / LEVELS


def _levels_of(surprise: Tensor, span: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two levels among 0 to `most` around each probability, and the position between them."""
    level = (surprise * (most / span)).clamp(0, most) if span else surprise * 0
    low, high = level.ceil(), level.floor()  # a higher level is a lower probability
    below, above = ((-x * span / most).exp() for x in (low, high))
    share = ((-surprise).exp() - below) / (above - below)
    return low, high, torch.where(above > below, share, torch.zeros_like(share))


def _by_chance(levels: tuple[Tensor, Tensor, Tensor], chance: torch.Generator) -> Tensor:
    """One of the two levels at random, so that the mean probability is exact."""
    low, high, share = levels
    return torch.where(torch.rand(share.shape, generator=chance, dtype=share.dtype) < share, high, low)


def _varint(value: int) -> Any:
    """Seven bits per byte, the lowest first; the eighth bit says that more follow."""
    groups = [value & 127]
    while value := value >> 7:
        groups.append(value & 127)
    return to_bits(np.array([g | 128 for g in groups[:-1]] + groups[-1:]), 8).ravel()


def _varint_bytes(value: Any) -> Any:
    return 1 + (value >= 1 << 7) + (value >= 1 << 14) + (value >= 1 << 21) + (value >= 1 << 28)
