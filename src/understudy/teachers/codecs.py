"""How a teacher's answer is kept: a typed target in, fixed-size rows of bytes out, and back.

| support | bytes a token at 152k classes | target | what is lost |
|---|---|---|---|
| `sampled:12` | 38 | `Sampled` | nothing in expectation: the gradient is unbiased |
| `top_k:50` | 130 | `TopK` with tail | log-probabilities to 1/220 of their range in the row, the tail's odds to 3 % |
| `scored:20` | 164 | `TopK` with tail | nothing: what a server said, in float32 |
| `hidden` | 2 a unit | `Projected` | rounding of the hidden states to bfloat16 |
| `dense` | 2 or 4 a class | `Dense` | rounding to float16 where that is exact enough, else nothing |

Ids are a set, coded as Elias and Fano do (1974, 1971): sorted, low bits plain, high bits in unary.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.streaming import logits_of
from understudy.targets import Dense, Mixture, Projected, Sampled, Target, TopK, top_k

Bits = np.ndarray[Any, np.dtype[np.uint8]]
FLOOR = 24.0
"""Nats below which a probability of the sampled support is not told apart from e^−24."""
ODDS = 16.0
"""Largest absolute log-odds of the tail of a top-k support that is told apart."""


@dataclass(frozen=True)
class Support:
    """What is kept: `kind` (`sampled`, `top_k`, `scored`, `hidden`, `dense`) and how many classes a row."""

    kind: str
    k: int = 0

    @classmethod
    def parse(cls, text: str) -> Support:
        """From `sampled:12`, `top_k:50`, `scored:20`, `hidden` or `dense`."""
        found = re.fullmatch(r"(sampled|top_k|scored):([1-9]\d*)|(hidden|dense)", text)
        if found is None:
            raise InputError(
                f"Support {text!r} is not one of sampled:N, top_k:N, scored:N, hidden, dense (for example sampled:12)."
            )
        return cls(found[1] or found[3], int(found[2] or 0))

    def __str__(self) -> str:
        return f"{self.kind}:{self.k}" if self.k else self.kind


def row_bytes(support: Support, classes: int, width: int = 0) -> float:
    """Bytes of one row on disk; `width` is that of hidden states. Dense logits are counted in float16."""
    if support.kind in ("hidden", "dense"):
        return 2.0 * (width if support.kind == "hidden" else classes)
    k = min(support.k, classes)
    if support.kind == "scored":
        return 8.0 * k + 4
    low = _low_bits(k, classes)
    ids = k * (low + 1) + ((classes - 1) >> low) + 1
    return float(-(-(ids + (7 * k + 15 if support.kind == "top_k" else 8 * k + 16)) // 8))


def encode(signal: Dense | Projected | Mixture, support: Support, temperature: float, seed: int) -> dict[str, Tensor]:
    """Rows of arrays for a teacher's signal; `seed` draws the sampled support, the same again for the same rows."""
    if support.kind == "hidden":
        if not isinstance(signal, Projected):
            raise InputError(
                "Support 'hidden' needs hidden states and a head; this teacher gives logits: choose dense."
            )
        return {"hidden": signal.hidden.bfloat16()}
    if not isinstance(signal, (Dense, Projected, Mixture)):
        raise InputError(f"A teacher that answers with {type(signal).__name__} is no whole distribution to be kept.")
    logits = logits_of(signal).float()
    if support.kind == "dense":
        half = logits.half()
        exact = bool(((half.float() - logits).abs() <= 1e-3).all())
        return {"logits": half if exact else logits}
    k = min(support.k, logits.shape[-1])
    if support.kind == "scored":
        return pack_scored(top_k(logits, k, temperature=temperature))
    if support.kind == "top_k":
        return {"code": _pack_top(top_k(logits, k, temperature=temperature), logits.shape[-1])}
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    chance = torch.Generator().manual_seed(seed)
    ids, log_c = draw_support(log_p.cpu(), k, chance)
    return {"code": _pack_sampled(ids, log_p.cpu().gather(-1, ids), log_c, logits.shape[-1], chance)}


def decode(
    arrays: dict[str, Tensor], support: Support, temperature: float, classes: int, head: dict[str, Any] | None
) -> Target:
    """The typed target of stored rows; `head` (weight, bias, scale, softcap) belongs to `hidden`."""
    if support.kind == "hidden":
        assert head is not None
        return Projected(arrays["hidden"].to(head["weight"].dtype), **head)
    if support.kind == "dense":
        return Dense(arrays["logits"].float())
    if support.kind == "scored":
        return TopK(arrays["ids"].long(), arrays["log_probs"], arrays["log_tail"], temperature)
    k, bits = min(support.k, classes), np.unpackbits(arrays["code"].numpy(), axis=1)
    ids, used = _unpack_ids(bits, k, classes)
    if support.kind == "top_k":
        step = _number(bits[:, used : used + 7 * k].reshape(len(bits), k, 7))
        span, code = _number(bits[:, used + 7 * k :][:, :6]), _number(bits[:, used + 7 * k + 6 :][:, :9])
        kept = -torch.from_numpy(step / 127) * torch.from_numpy(_span(span))[:, None]
        odds = torch.from_numpy(code / 510 * 2 * ODDS - ODDS)[:, None]
        none = torch.from_numpy(code == 511)[:, None]
        log_tail = torch.nn.functional.logsigmoid(odds).masked_fill(none, -math.inf)
        room = torch.nn.functional.logsigmoid(-odds).masked_fill(none, 0.0)
        return TopK(ids, (kept - kept.logsumexp(-1, True) + room).float(), log_tail.float(), temperature)
    code = torch.from_numpy(_number(bits[:, used : used + 8 * k].reshape(len(bits), k, 8)))
    log_p = -code * (FLOOR / 255)
    log_c = -torch.from_numpy(_number(bits[:, used + 8 * k :][:, :16]) / 65535 * FLOOR)[:, None]
    return Sampled(ids, torch.maximum(log_p, log_c).exp().float(), log_p.float(), temperature)


def draw_support(log_p: Tensor, k: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """k distinct classes a row with inclusion probability min(1, p / c), and log c, where Σ min(1, p / c) = k.

    Systematic sampling, probability proportional to size: a class above c is always kept and weighs p, the others weigh
    c, so that Σ weight · f is unbiased for Σ p f (Horvitz and Thompson 1952).

    Args:
        log_p: `[rows, classes]`, float64.

    Returns:
        ids `[rows, k]`, ascending; log c `[rows, 1]` (−inf where k covers all classes).
    """
    rows, classes = log_p.shape
    p = log_p.exp()
    if k >= classes:
        return torch.arange(classes).expand(rows, classes), torch.full((rows, 1), -math.inf, dtype=p.dtype)
    ordered, top = p.topk(k, -1)
    tail = p.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    rest = ordered.flip(-1).cumsum(-1).flip(-1) + tail  # rest[m]: mass from the m-th largest on
    kept = torch.arange(k)
    c = rest / (k - kept)  # with the m largest kept for sure
    right = (ordered <= c).double()  # the first m for which the next one is below c
    m = right.argmax(-1, keepdim=True)
    threshold = c.gather(-1, m).clamp(min=1e-300)
    inclusion = (p / threshold).clamp(max=1.0)
    ends = (inclusion.cumsum(-1) * (k / inclusion.sum(-1, keepdim=True))).clamp(max=k)
    start = torch.rand(rows, 1, generator=chance, dtype=p.dtype)
    points = start + kept
    return torch.searchsorted(ends, points).clamp(max=classes - 1), threshold.log()


def pack_scored(target: TopK) -> dict[str, Tensor]:
    """A target as it is, 8 bytes a class and 4 for the tail."""
    return {"ids": target.ids.int(), "log_probs": target.log_probs.float(), "log_tail": target.log_tail.float()}


def _pack_ids(ids: Tensor, classes: int) -> Bits:
    """Sorted distinct ids `[rows, k]` as bits."""
    values = ids.numpy().astype(np.int64)
    rows, k = values.shape
    low = _low_bits(k, classes)
    high = np.zeros((rows, k + ((classes - 1) >> low) + 1), np.uint8)
    np.put_along_axis(high, (values >> low) + np.arange(k), 1, 1)
    return np.concatenate([_bits(values & ((1 << low) - 1), low).reshape(rows, k * low), high], 1)


def _unpack_ids(bits: Bits, k: int, classes: int) -> tuple[Tensor, int]:
    """Ids, and how many bits they took."""
    low = _low_bits(k, classes)
    width = k + ((classes - 1) >> low) + 1
    lower = _number(bits[:, : k * low].reshape(len(bits), k, low)).astype(np.int64) if low else 0
    at = np.nonzero(bits[:, k * low : k * low + width])[1].reshape(len(bits), k) - np.arange(k)
    return torch.from_numpy((at << low) + lower), k * low + width


def _low_bits(k: int, classes: int) -> int:
    return max(0, math.floor(math.log2(classes / k))) if classes > k else 0


def _bits(values: Any, width: int) -> Bits:
    """Whole numbers `[…]` as bits `[…, width]`, the highest first."""
    return ((values[..., None] >> np.arange(width - 1, -1, -1)) & 1).astype(np.uint8)


def _number(bits: Any) -> Any:
    """The whole numbers of bits `[…, width]`, as float64."""
    width = bits.shape[-1]
    return bits.astype(np.float64) @ (2.0 ** np.arange(width - 1, -1, -1))


def _span(code: Any) -> Any:
    """The range of log-probabilities in a row, from 6 bits: 0.01 to 67 nats, each step 15 % wider."""
    return 0.01 * 1.15**code


def _pack_top(target: TopK, classes: int) -> Tensor:
    """Log-probabilities in 128 steps below the largest, and the odds of the tail; the sum is 1, so no more is needed."""
    order = target.ids.sort(-1).indices
    ids, log_p = target.ids.gather(-1, order).cpu(), target.log_probs.gather(-1, order).double().cpu()
    below = (log_p.amax(-1, keepdim=True) - log_p).clamp(max=66.0)
    wide = below.amax(-1).numpy()
    span = np.ceil(np.log(np.maximum(wide, 0.01) / 0.01) / np.log(1.15)).clip(0, 63).astype(np.int64)
    step = np.rint(below.numpy() / _span(span)[:, None] * 127).clip(0, 127).astype(np.int64)
    log_tail = target.log_tail.double().cpu()[:, 0]
    odds = (log_tail - log_p.logsumexp(-1)).clamp(-ODDS, ODDS)
    code = ((odds + ODDS) / (2 * ODDS) * 510).round().masked_fill(log_tail == -math.inf, 511).long().numpy()
    rows = len(ids)
    parts = [_pack_ids(ids, classes), _bits(step, 7).reshape(rows, -1), _bits(span, 6), _bits(code, 9)]
    return torch.from_numpy(np.packbits(np.concatenate(parts, 1), axis=1))


def _pack_sampled(ids: Tensor, log_p: Tensor, log_c: Tensor, classes: int, chance: torch.Generator) -> Tensor:
    """A probability above c goes to one of the two levels around it, by chance, so that the mean weight is exact; one
    below c weighs c whatever its code, and is rounded down."""
    c = (-log_c / FLOOR * 65535).clamp(0, 65535).round()
    threshold = (-c / 65535 * FLOOR).exp()
    level = (-log_p / FLOOR * 255).clamp(0, 255)
    low, high = level.ceil(), level.floor()  # a higher level is a lower probability
    p, above = log_p.exp(), (-high * FLOOR / 255).exp()
    below = torch.maximum((-low * FLOOR / 255).exp(), threshold)
    up = torch.where((p > threshold) & (above > below), (p - below) / (above - below), torch.zeros_like(p))
    code = torch.where(torch.rand(p.shape, generator=chance, dtype=p.dtype) < up, high, low).long().numpy()
    parts = [_pack_ids(ids, classes), _bits(code, 8).reshape(len(ids), -1), _bits(c.long().numpy()[:, 0], 16)]
    return torch.from_numpy(np.packbits(np.concatenate(parts, 1), axis=1))
