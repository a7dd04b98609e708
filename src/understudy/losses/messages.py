"""Agreement of two models that exchange messages (Talking Models, 2023): one value a row, unreduced.

States and messages are `[rows, positions, width]`: a vector has one position, a map those of its pixels, a text its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full


class Compared(NamedTuple):
    """Two states or messages of the same rows.

    Args:
        found, wanted: `[rows, positions, width]`.
        mask: `[rows, positions]`, True for the positions that count; all if `None`.
    """

    found: Tensor
    wanted: Tensor
    mask: Tensor | None = None


class RoundStates(NamedTuple):
    """What is compared after one round, the listener's own state being what is wanted.

    Args:
        teacher_low: what the teacher decodes, and its lower state.
        teacher_high: what its upper layers make of that, and its higher state.
        student_high: what the student decodes, and its higher state.
    """

    teacher_low: Compared
    teacher_high: Compared
    student_high: Compared


def mean_square(pair: Compared) -> Tensor:
    """Mean of (found − wanted)² over units and the positions that count, `[rows]`; 0 where no position counts.

    Both sides have a gradient.

    Raises:
        InputError: the shapes differ.
    """
    found, wanted, mask = pair
    if found.shape != wanted.shape:
        raise InputError(
            f"mean_square: {tuple(found.shape)} is compared with {tuple(wanted.shape)}: bring both to one shape."
        )
    found, wanted = full(found), full(wanted)
    if mask is None:
        return (found - wanted.to(found.dtype)).square().mean((1, 2))
    outside = ~mask.bool()[..., None]
    # Masked before the difference: what is ignored may be infinite.
    gap = found.masked_fill(outside, 0) - wanted.to(found.dtype).masked_fill(outside, 0)
    return gap.square().mean(2).sum(1) / (~outside).sum((1, 2)).clamp(min=1)


def message_consistency(low: Compared, high: Compared) -> Tensor:
    """L_MC: how far the messages of student and teacher about the same input are apart, at both layers, `[rows]`.

    Args:
        low, high: E_S(h_S) and E_T(h_T) of the lower and the higher layer.

    Source: Talking Models (2023), message consistency.
    """
    return mean_square(low) + mean_square(high)


def state_consistency(own: Compared, heard: Compared, rounds: Sequence[RoundStates]) -> Tensor:
    """L_SC: how far decoded states are from the listener's own, `[rows]`. What is wanted has no gradient.

    Args:
        own: D_T(E_T(h_T)) and h_T of the higher layer, which keeps messages from becoming constant.
        heard: D_T(E_S(h_S)) and h_T of the higher layer.
        rounds: of each round; their mean is taken.

    Raises:
        InputError: there is no round.

    Source: Talking Models (2023), state consistency.
    """
    if not rounds:
        raise InputError("state_consistency: there is no round to compare: give at least 1.")
    values = _decoded(own) + _decoded(heard)
    for pair in (pair for compared in rounds for pair in compared):
        values = values + _decoded(pair) / len(rounds)
    return values


def _decoded(pair: Compared) -> Tensor:
    return mean_square(pair._replace(wanted=pair.wanted.detach()))
