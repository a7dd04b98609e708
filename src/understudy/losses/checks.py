"""Checks of the inputs of losses."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from understudy.errors import InputError


def check_finite(values: Tensor, say: Callable[..., str], mask: Tensor | None = None) -> None:
    """Raise an error for the first valid value that is infinite or nan.

    Args:
        say: returns the message, one line, from the value and its index on each axis.
        mask: True for valid values; all if `None`.

    Raises:
        InputError: with the message from `say`.
    """
    wrong = ~values.detach().isfinite()
    if mask is not None:
        wrong &= mask
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise InputError(say(float(values.detach()[tuple(place)]), *place))
