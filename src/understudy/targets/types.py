"""Typed targets. Leading axes are rows (tokens, images); the last axis is classes, hidden units or kept classes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from understudy.errors import InputError


class _Rows:
    """Base of targets whose fields marked in `_per_row` have one entry per row."""

    _per_row: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Number of rows: the product of the leading axes."""
        first: Tensor = getattr(self, self._per_row[0])
        return first.shape[:-1].numel()

    def _map(self, names: tuple[str, ...], change: Any) -> Self:
        return replace(self, **{n: change(getattr(self, n)) for n in names})  # type: ignore[type-var]

    def select(self, index: Any) -> Self:
        """The rows selected by `index` (a mask, indices or a slice on the first axis)."""
        return self._map(self._per_row, lambda x: x[index])

    def _tensors(self) -> tuple[str, ...]:
        return tuple(f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor))  # type: ignore[arg-type]

    def detach(self) -> Self:
        """The same values without gradient."""
        return self._map(self._tensors(), Tensor.detach)

    def to(self, device: torch.device | str) -> Self:
        """The same values on another device."""
        return self._map(self._tensors(), lambda x: x.to(device))


@dataclass(frozen=True)
class Dense(_Rows):
    """All logits, `[..., classes]`."""

    logits: Tensor
    _per_row = ("logits",)

    @property
    def classes(self) -> int:
        return self.logits.shape[-1]


@dataclass(frozen=True)
class Scores(_Rows):
    """A score for each candidate of a list, `[..., candidates]`: log-probabilities in nats, or relevance.

    Args:
        values: 0 where `mask` is false.
        mask: which candidates there are.
        tokens: `[tokens]`, the log-probability of each completion token, in the order of `ListBatch.tokens`' rows; `None` of a
            model that scores a candidate as a whole.
        token_signal: what the model says about the rows of these tokens, before the tokens are known.
    """

    values: Tensor
    mask: Tensor
    tokens: Tensor | None = None
    token_signal: Dense | Projected | None = None
    _per_row = ("values", "mask")

    def by_token(self, asker: str) -> tuple[Tensor, Dense | Projected]:
        """`tokens` and `token_signal`.

        Args:
            asker: the method, for the message.

        Raises:
            InputError: the model scores whole candidates.
        """
        if self.tokens is None or self.token_signal is None:
            raise InputError(
                f"{asker} reads the tokens of each candidate and this model scores a candidate as a whole: use a causal LM "
                "(task preferences), or the world `chains`."
            )
        return self.tokens, self.token_signal

    def select(self, index: Any) -> Self:
        """The lists that `index` picks, without what is said of single tokens."""
        return replace(super().select(index), tokens=None, token_signal=None)

    def detach(self) -> Self:
        """The same values without gradient."""
        signal = self.token_signal.detach() if self.token_signal is not None else None
        return replace(super().detach(), token_signal=signal)

    def to(self, device: torch.device | str) -> Self:
        """The same values on another device."""
        signal = self.token_signal.to(device) if self.token_signal is not None else None
        return replace(super().to(device), token_signal=signal)


@dataclass(frozen=True)
class Clean(_Rows):
    """A denoiser's prediction of the clean example, `[rows, ...]` of any shape."""

    values: Tensor
    _per_row = ("values",)

    @property
    def rows(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class TokenNoise(_Rows):
    """What a diffusion head says about noisy tokens.

    Args:
        values: `[rows, ..., C]`, its prediction of the noise.
        variance: `[rows, ..., C]`, the interpolation of log-variances.
    """

    values: Tensor
    variance: Tensor
    _per_row = ("values", "variance")

    @property
    def rows(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Projected(_Rows):
    """Hidden states and the head that projects them to logits.

    `logits = scale · (hidden · weightᵀ + bias)`, then `softcap · tanh(logits / softcap)` if there is a soft-cap.

    Args:
        hidden: `[..., hidden]`.
        weight: `[classes, hidden]`.
        bias: `[classes]` or `None`.
        scale: factor of the logits.
        softcap: bound of the logits, or `None`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    _per_row = ("hidden",)

    def __post_init__(self) -> None:
        if self.hidden.shape[-1] != self.weight.shape[-1]:
            raise InputError(
                f"Projected: hidden states are {self.hidden.shape[-1]} wide and the head takes {self.weight.shape[-1]}. "
                "Pass the hidden states that this head reads."
            )

    @property
    def classes(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class Mixture(_Rows):
    """A mixture of several outputs. Row r is the weighted mean of the members that have an output for it.

    p = Σ_m w_m p_m with p_m the softmax of member m, over the members with `place[r, m]` ≥ 0 and with their weights
    divided by their sum; with `geometric` the logits are averaged instead, log p = Σ_m w_m z_m + constant. Members are
    kept separate: no `[rows, classes]` tensor is made before a loss requires some rows.

    Args:
        members: `Dense` or `Projected`, over the same classes.
        place: `[rows, members]`, int64, the row of each member's output for this row; −1 if it has none.
        weights: `[members]`, above 0.
        geometric: average logits instead of probabilities.
    """

    members: tuple[Dense | Projected, ...]
    place: Tensor
    weights: Tensor
    geometric: bool = False
    _per_row = ("place",)

    def __post_init__(self) -> None:
        sizes = {m.classes for m in self.members}
        if len(sizes) != 1:
            raise InputError(
                f"Mixture: the members have {', '.join(map(str, sorted(sizes)))} classes. Choose models of one class set."
            )
        if not len(self.members) == self.place.shape[-1] == len(self.weights):
            raise InputError(
                f"Mixture: {len(self.members)} members, {self.place.shape[-1]} places a row, {len(self.weights)} weights."
            )

    @property
    def classes(self) -> int:
        return self.members[0].classes

    def detach(self) -> Self:
        """The same values without gradient."""
        return replace(super().detach(), members=tuple(m.detach() for m in self.members))

    def to(self, device: torch.device | str) -> Self:
        """The same values on another device."""
        return replace(super().to(device), members=tuple(m.to(device) for m in self.members))


@dataclass(frozen=True)
class TopK(_Rows):
    """The k most probable classes and the probability mass of the others.

    Args:
        ids: `[..., k]`, int64, distinct; −1 where a row has fewer. A row without any gives no loss.
        log_probs: `[..., k]`, nats; −inf where the id is −1.
        log_tail: `[..., 1]`, log of the mass outside `ids` (−inf if none).
        temperature: of the softmax that the probabilities come from.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    temperature: float = 1.0
    _per_row = ("ids", "log_probs", "log_tail")

    def __post_init__(self) -> None:
        if self.ids.shape != self.log_probs.shape:
            raise InputError(f"TopK: ids are {tuple(self.ids.shape)} and log_probs {tuple(self.log_probs.shape)}.")


@dataclass(frozen=True)
class Sampled(_Rows):
    """A sampled support with importance weights: `E[Σ_i weights_i · f(ids_i)] = Σ_v p_v · f(v)` for any f.

    Args:
        ids: `[..., k]`, int64; repeats are allowed.
        weights: `[..., k]`; 0 where a row has fewer.
        log_probs: `[..., k]`, the teacher's log-probability of each id, nats. It may be the mean over all classes that
            were equally likely to be drawn in its place, which leaves `E[Σ_i weights_i · log_probs_i] = Σ_v p_v log
            p_v`.
        temperature: of the softmax that the probabilities come from.
    """

    ids: Tensor
    weights: Tensor
    log_probs: Tensor
    temperature: float = 1.0
    _per_row = ("ids", "weights", "log_probs")

    def __post_init__(self) -> None:
        if not self.ids.shape == self.weights.shape == self.log_probs.shape:
            raise InputError("Sampled: ids, weights and log_probs must have one shape [..., k].")


Target = Dense | Projected | Mixture | TopK | Sampled


def largest(values: Tensor, k: int) -> Tensor:
    """Ids `[..., k]` of the k largest of `values [..., classes]`, the largest first; ties go to the lowest id.

    Same result as a full stable sort, in a tenth of the time.
    """
    if k >= values.shape[-1] or bool(values.isnan().any()):
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    least = values.topk(k, -1).values[..., -1:]
    above, ties = values > least, values == least
    room = k - above.sum(-1, keepdim=True)
    keep = above | (ties & (ties.cumsum(-1) <= room))
    ids = keep.nonzero()[:, -1].view(*values.shape[:-1], k)
    order = values.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order)


def top_k(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """Keep the k most probable classes; ties go to the lowest index.

    Args:
        logits: `[..., classes]`.
        k: at least 1; more than `classes` keeps all.
        temperature: of the softmax.
    """
    if k < 1:
        raise InputError(f"top_k: k is {k} and must be at least 1.")
    log_p = torch.log_softmax(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    k = min(k, logits.shape[-1])
    ids = largest(log_p, k)
    outside = log_p.scatter(-1, ids, float("-inf"))
    return TopK(ids, log_p.gather(-1, ids), outside.logsumexp(-1, keepdim=True), temperature)


def sample(logits: Tensor, k: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Sampled:
    """k independent draws from the teacher, each with weight 1/k: unbiased for anything linear in p.

    Args:
        logits: `[rows, classes]`.
        k: number of draws per row.
        temperature: of the softmax.
    """
    if k < 1:
        raise InputError(f"sample: k is {k} and must be at least 1.")
    log_p = torch.log_softmax(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    ids = torch.multinomial(log_p.exp(), k, replacement=True, generator=generator)
    return Sampled(ids, torch.full_like(ids, 1, dtype=log_p.dtype) / k, log_p.gather(-1, ids), temperature)
