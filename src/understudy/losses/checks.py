"""Checks of what losses are given."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from understudy.errors import InputError


def check_finite(values: Tensor, say: Callable[..., str], mask: Tensor | None = None) -> None:
    """Refuse the first value that counts and is infinite or nan.

    Args:
        say: what is wrong, in one line, given the value and its index on each axis. mask: which values count; all if `None`.

    Raises:
        InputError: what `say` says.
    """
    wrong = ~values.detach().isfinite()
    if mask is not None:
        wrong &= mask
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise InputError(say(float(values.detach()[tuple(place)]), *place))
