"""Noise schedules over t in [0, 1]: the continuous cosine, or a table of alphas_cumprod."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor

from understudy.errors import InputError


class NoiseLevels(Protocol):
    """A variance-preserving schedule over t in [0, 1]."""

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ, float64, of times `t` of any shape."""
        ...

    def snap(self, t: Tensor) -> Tensor:
        """The nearest times of the schedule."""
        ...

    def clock(self, t: Tensor) -> Tensor:
        """The network's time input."""
        ...


class Cosine:
    """α = cos(πt/2), σ = sin(πt/2), for every t; the network's time input is t."""

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t.double() * (math.pi / 2)
        # cos(π/2) is 6e-17 in floating point; in the schedule it is 0.
        return angle.cos().masked_fill(t == 1, 0.0), angle.sin()

    def snap(self, t: Tensor) -> Tensor:
        return t

    def clock(self, t: Tensor) -> Tensor:
        return t


class Table:
    """The levels of a diffusers scheduler: t = 0 is the first entry of `alphas_cumprod`, t = 1 the last.

    Args:
        alphas_cumprod: `[entries]`, decreasing; the network's time input is the index.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = alphas_cumprod.detach().double().cpu()
        if table.dim() != 1 or len(table) < 2 or not bool((table.diff() < 0).all() & (table >= 0).all()):
            raise InputError("A noise schedule must be a falling list of at least two alphas_cumprod, none below 0.")
        self.table = table

    def index(self, t: Tensor) -> Tensor:
        """The entry nearest to each time."""
        return (t.double() * (len(self.table) - 1)).round().long().clamp(0, len(self.table) - 1)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        squared = self.table.to(t.device)[self.index(t)]
        return squared.sqrt(), (1 - squared).sqrt()

    def snap(self, t: Tensor) -> Tensor:
        return self.index(t).double() / (len(self.table) - 1)

    def clock(self, t: Tensor) -> Tensor:
        return self.index(t)


def levels_of(scheduler: Any) -> Table:
    """The table of a diffusers scheduler (`DDPMScheduler`, `DDIMScheduler` and similar ones)."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise InputError(
            f"{type(scheduler).__name__} has no alphas_cumprod: only variance-preserving schedulers (DDPM, DDIM) are read."
        )
    return Table(table)
