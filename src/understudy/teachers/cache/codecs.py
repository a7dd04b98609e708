"""Codecs of a cache: from a typed target to fixed-size rows of bytes, and back.

| support | bytes per token at 152k classes | target | loss |
|---|---|---|---|
| `sampled:38B` | 38 | `Sampled` | nothing in expectation: the gradient is unbiased |
| `sampled:12` | 38 | `Sampled` | the same; the size is that of 12 ids with their probabilities |
| `top_k:50` | 130 | `TopK` with tail | log-probabilities to 1/220 of their range in the row, the tail's odds to 3 % |
| `scored:20` | 164 | `TopK` with tail | nothing: a server's scores in float32 |
| `hidden` | 2 per unit | `Projected` | rounding of the hidden states to bfloat16 |
| `dense` | 2 or 4 per class | `Dense` | rounding to float16 where that is exact enough, else nothing |
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
from understudy.targets import Dense, Mixture, Projected, Target, TopK, top_k
from understudy.teachers.cache.bits import pack_sets, set_bits, to_bits, to_numbers, unpack_sets
from understudy.teachers.cache.sampling import pack_sampled, unpack_sampled

DEFAULT = "sampled:38B"
"""Default support of a capture: keys included, below 40 bytes per token for texts of at least 20 tokens."""
CODECS = {"sampled": 3}
"""Versions of codecs that have changed; all others are 1."""
ODDS = 16.0
"""Largest absolute log-odds of the tail of a top-k support that the code represents."""


@dataclass(frozen=True)
class Support:
    """The stored support: its `kind` (`sampled`, `top_k`, `scored`, `hidden`, `dense`) and the number of classes or
    bytes per row."""

    kind: str
    k: int = 0
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Support:
        """Parse `sampled:38B`, `sampled:12`, `top_k:50`, `scored:20`, `hidden` or `dense`."""
        found = re.fullmatch(r"(sampled|top_k|scored):([1-9]\d*)|(sampled):([1-9]\d*)B|(hidden|dense)", text)
        if found is None:
            raise InputError(
                f"Support {text!r} is not one of sampled:NB (N bytes a row), sampled:N, top_k:N, scored:N, hidden, dense "
                "(for example sampled:38B)."
            )
        return cls(found[1] or found[3] or found[5], int(found[2] or 0), int(found[4] or 0))

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}B" if self.size else f"{self.kind}:{self.k}" if self.k else self.kind

    @property
    def codec(self) -> int:
        """The version of the codec; only a cache written by the same version can be read."""
        return CODECS.get(self.kind, 1)


def row_bytes(support: Support, classes: int, width: int = 0) -> float:
    """Bytes of one row on disk; `width` is that of hidden states. Dense logits are counted in float16."""
    if support.kind in ("hidden", "dense"):
        return 2.0 * (width if support.kind == "hidden" else classes)
    if support.size:
        return float(support.size)
    k = min(support.k, classes)
    if support.kind == "scored":
        return 8.0 * k + 4
    return float(-(-(int(set_bits(k, classes)) + (7 * k + 15 if support.kind == "top_k" else 8 * k + 16)) // 8))


def encode(signal: Dense | Projected | Mixture, support: Support, temperature: float, seed: int) -> dict[str, Tensor]:
    """The rows of one example as arrays; `seed` determines the sampled support, so that the same rows give the same
    bytes."""
    if support.kind == "hidden":
        if not isinstance(signal, Projected):
            raise InputError(
                "Support 'hidden' needs hidden states and a head; this teacher gives logits: choose dense."
            )
        return {"hidden": signal.hidden.bfloat16()}
    if not isinstance(signal, (Dense, Projected, Mixture)):
        raise InputError(f"A teacher that answers with {type(signal).__name__} is no whole distribution to be kept.")
    logits = logits_of(signal).float()
    if bool(logits.isnan().any()):
        raise InputError(
            "The teacher's logits hold nan, so there is nothing to keep: load it in float32 (teacher.dtype)."
        )
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
    size = int(row_bytes(support, logits.shape[-1]))
    return {"code": pack_sampled(log_p, size, torch.Generator().manual_seed(seed))}


def decode(
    arrays: dict[str, Tensor],
    support: Support,
    temperature: float,
    classes: int,
    head: dict[str, Any] | None,
    counts: list[int],
) -> Target:
    """The typed target of stored rows: examples of `counts` rows each. `head` (weight, bias, scale, softcap) is needed
    for `hidden`."""
    if support.kind == "hidden":
        assert head is not None
        return Projected(arrays["hidden"].to(head["weight"].dtype), **head)
    if support.kind == "dense":
        return Dense(arrays["logits"].float())
    if support.kind == "scored":
        return TopK(arrays["ids"].long(), arrays["log_probs"], arrays["log_tail"], temperature)
    if support.kind == "sampled":
        return unpack_sampled(arrays["code"], counts, classes, temperature)
    k, bits = min(support.k, classes), np.unpackbits(arrays["code"].numpy(), axis=1)
    ids, used = torch.from_numpy(unpack_sets(bits, k, classes)), int(set_bits(k, classes))
    step = to_numbers(bits[:, used : used + 7 * k].reshape(len(bits), k, 7))
    span, code = to_numbers(bits[:, used + 7 * k :][:, :6]), to_numbers(bits[:, used + 7 * k + 6 :][:, :9])
    kept = -torch.from_numpy(step / 127) * torch.from_numpy(_span(span))[:, None]
    odds = torch.from_numpy(code / 510 * 2 * ODDS - ODDS)[:, None]
    none = torch.from_numpy(code == 511)[:, None]
    log_tail = torch.nn.functional.logsigmoid(odds).masked_fill(none, -math.inf)
    room = torch.nn.functional.logsigmoid(-odds).masked_fill(none, 0.0)
    return TopK(ids, (kept - kept.logsumexp(-1, True) + room).float(), log_tail.float(), temperature)


def pack_scored(target: TopK) -> dict[str, Tensor]:
    """A target without loss, 8 bytes per class and 4 for the tail."""
    return {"ids": target.ids.int(), "log_probs": target.log_probs.float(), "log_tail": target.log_tail.float()}


def _span(code: Any) -> Any:
    """The range of log-probabilities in a row from its 6-bit code: 0.01 to 67 nats, each step 15 % wider."""
    return 0.01 * 1.15**code


def _pack_top(target: TopK, classes: int) -> Tensor:
    """Log-probabilities in 128 steps below the largest, and the odds of the tail; this suffices since the sum is 1."""
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
    parts = [pack_sets(ids.numpy(), classes), to_bits(step, 7).reshape(rows, -1), to_bits(span, 6), to_bits(code, 9)]
    return torch.from_numpy(np.packbits(np.concatenate(parts, 1), axis=1))
