"""A sampled support: of the rows of one example, as many classes as so many bytes a row hold, without bias.

One threshold τ serves the whole example, so a row of many likely classes gets more of them than a sure one. A pair of row
and class with p > τ is kept with its probability; the others are drawn with probability p / τ and each weighs τ (Horvitz
and Thompson 1952), by systematic sampling along the example: row after row, class after class. τ is the smallest for which
the two sets fit, whatever is drawn; it follows from the teacher alone, so the estimate stays unbiased.

    level of τ, sizes of both sets · kept pairs, drawn pairs · probabilities of the kept · mean log p of each row's rest
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.targets import Sampled
from understudy.teachers.bits import pack_sets, set_bits, to_bits, to_numbers, unpack_sets

FLOOR = 24.0
"""Nats: probabilities below e^−24 are drawn, never kept, and τ goes no lower."""
LEVELS = 4096
"""Thresholds that are told apart: τ = e^(−FLOOR · level / LEVELS)."""
PAD = 16
"""Supports are padded to a multiple of this, so that few widths occur."""


def pack_sampled(log_p: Tensor, size: int, chance: torch.Generator) -> Tensor:
    """The rows of one example as `[rows, size]` bytes.

    Args:
        log_p: `[rows, classes]`, float64. size: bytes a row. chance: of the CPU, so that a device draws the same.

    Raises:
        InputError: so few bytes hold not even one drawn class a row.
    """
    rows, classes = log_p.shape
    surprise, p = -log_p.flatten().clamp(min=-1e4), log_p.flatten().exp()
    bins = (surprise * (LEVELS / FLOOR)).clamp(max=LEVELS).long()
    level = _lowest(bins, p, rows, classes, size)
    kept = (bins < level).nonzero()[:, 0]
    rest = p.masked_fill_(bins < level, 0.0)
    drawn = _systematic(rest * math.exp(_nats(level)), chance)
    far = (rest * surprise).view(rows, classes).sum(-1)
    mean = far / rest.view(rows, classes).sum(-1).clamp(min=1e-300)
    steps = (
        _by_chance(_levels_of(surprise[kept].cpu(), _nats(level)), chance),
        (mean / FLOOR * 255).clamp(0, 255).round(),
    )
    parts = [
        _varint(level), _varint(len(kept)), _varint(len(drawn)),
        *(pack_sets(ids.cpu().numpy()[None], rows * classes)[0] for ids in (kept, drawn)),
        *(to_bits(step.long().cpu().numpy(), 8).ravel() for step in steps),
    ]  # fmt: skip
    code = np.packbits(np.concatenate(parts))
    return torch.from_numpy(np.pad(code, (0, rows * size - len(code))).reshape(rows, size))


def unpack_sampled(code: Tensor, counts: list[int], classes: int, temperature: float) -> Sampled:
    """The target of examples of `counts` rows each, from their bytes `[rows, size]`. Shorter rows have weights 0."""
    parts = [_entries(part.numpy(), classes) for part in code.split(counts)]
    start = np.repeat(np.cumsum([0, *counts[:-1]]), [len(p[0]) for p in parts])
    row, ids, weights, log_p = (np.concatenate(column) for column in zip(*parts, strict=True))
    row = row + start
    order = np.argsort(row, kind="stable")
    row, number = row[order], np.bincount(row, minlength=len(code))
    place = np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)
    width = -(-max(1, int(number.max())) // PAD) * PAD
    first = np.minimum(np.cumsum(number) - number, max(0, len(row) - 1))
    padded = np.repeat(ids[order][first][:, None], width, 1)  # a pad is a class that counts, of weight 0
    out = [padded, np.zeros((len(code), width), np.float32), np.zeros((len(code), width), np.float32)]
    for target, values in zip(out, (ids, weights, log_p), strict=True):
        target[row, place] = values[order]
    found = [torch.from_numpy(x) for x in out]
    return Sampled(found[0], found[1], found[2], temperature)


def _lowest(bins: Tensor, p: Tensor, rows: int, classes: int, size: int) -> int:
    """The level of the smallest threshold whose sets fit."""
    number = torch.bincount(bins, minlength=LEVELS + 1).cpu().cumsum(0)
    mass = torch.bincount(bins, weights=p, minlength=LEVELS + 1).cpu().cumsum(0)
    level = np.arange(LEVELS + 1)
    kept = np.concatenate([[0], number[:-1].numpy()])  # in bins below the level
    rest = (mass[-1] - torch.cat([mass.new_zeros(1), mass[:-1]])).clamp(min=0).numpy()
    rest[kept == rows * classes] = 0.0
    drawn = np.ceil(rest * np.exp(level * FLOOR / LEVELS) + 1e-6).astype(np.int64) * (rest > 0)
    pairs = rows * classes
    bits = 8 * (2 + _varint_bytes(kept) + _varint_bytes(drawn)) + set_bits(kept, pairs) + set_bits(drawn, pairs)
    room = (bits + 8 * kept + 8 * rows <= 8 * size * rows) & (drawn <= pairs)
    fits, whole = room.nonzero()[0], (room & (drawn == 0)).nonzero()[0]
    if not len(fits):
        raise InputError(
            f"{size} bytes a row do not hold one class of {classes} for each of {rows} rows: keep more (sampled:38B)."
        )
    return int(whole[0] if len(whole) else fits[-1])  # nothing left to draw: a lower one would only be coarser


def _systematic(inclusion: Tensor, chance: torch.Generator) -> Tensor:
    """Indices, each with its probability of inclusion (below 1), ascending and distinct."""
    ends = inclusion.cumsum(0)
    points = torch.rand(1, generator=chance, dtype=ends.dtype) + torch.arange(math.ceil(float(ends[-1])))
    return torch.searchsorted(ends, points[points < ends[-1].cpu()].to(ends.device), right=True).clamp(
        max=len(ends) - 1
    )


def _entries(code: Any, classes: int) -> tuple[Any, Any, Any, Any]:
    """Row, class, weight and log-probability of each pair of one example."""
    at, bits, head = 0, np.unpackbits(code), []
    for _ in range(3):
        value, used = _read_varint(bits[at:])
        head.append(value)
        at += used
    level, *numbers = head
    pairs, sets = len(code) * classes, []
    for number in numbers:
        end = at + int(set_bits(number, pairs))
        sets.append(unpack_sets(bits[None, at:end], number, pairs)[0])
        at = end
    end = at + 8 * numbers[0]
    log_p = -to_numbers(bits[at:end].reshape(-1, 8)) * (_nats(level) / 255)
    mean = -to_numbers(bits[end : end + 8 * len(code)].reshape(-1, 8)) * (FLOOR / 255)
    row = np.concatenate(sets) // classes
    weights = np.concatenate([np.exp(log_p), np.full(numbers[1], math.exp(-_nats(level)))])
    return row, np.concatenate(sets) % classes, weights, np.concatenate([log_p, mean[sets[1] // classes]])


def _nats(level: int) -> float:
    return level * FLOOR / LEVELS


def _levels_of(surprise: Tensor, span: float) -> tuple[Tensor, Tensor, Tensor]:
    """The two of 256 levels around each probability, and how near the upper one it is."""
    level = (surprise / (span / 255)).clamp(0, 255)
    low, high = level.ceil(), level.floor()  # a higher level is a lower probability
    below, above = ((-x * span / 255).exp() for x in (low, high))
    share = ((-surprise).exp() - below) / (above - below)
    return low, high, torch.where(above > below, share, torch.zeros_like(share))


def _by_chance(levels: tuple[Tensor, Tensor, Tensor], chance: torch.Generator) -> Tensor:
    """One of the two, so that the mean probability is exact."""
    low, high, share = levels
    return torch.where(torch.rand(share.shape, generator=chance, dtype=share.dtype) < share, high, low)


def _varint(value: int) -> Any:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    groups = [value & 127]
    while value := value >> 7:
        groups.append(value & 127)
    return to_bits(np.array([g | 128 for g in groups[:-1]] + groups[-1:]), 8).ravel()


def _varint_bytes(value: Any) -> Any:
    return 1 + (value >= 1 << 7) + (value >= 1 << 14) + (value >= 1 << 21) + (value >= 1 << 28)


def _read_varint(bits: Any) -> tuple[int, int]:
    """The number, and how many bits it took."""
    value, at = 0, 0
    while True:
        byte = int(to_numbers(bits[8 * at : 8 * at + 8]))
        value |= (byte & 127) << (7 * at)
        at += 1
        if byte < 128:
            return value, 8 * at
