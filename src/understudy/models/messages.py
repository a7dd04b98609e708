"""Messages between two models: the positions that a layer's states have, and how a message reaches those of another layer.

Where both layers have the same positions a message goes from each to the same one. Between grids of different sizes it is
averaged or repeated by area. The tokens in front of an image's patches (class, registers) give their message to every patch
and get the mean of all. Between texts of different tokens, and between text and vector, it is the mean over tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.losses.messages import Compared
from understudy.models.adapters import ModelAdapter

PREFIXES = (0, 1, 2, 5)
"""Numbers of tokens in front of the patches: none, a class token, one more of distillation, or four registers."""


class Places(NamedTuple):
    """The positions of a layer's states.

    Args:
        text: the tokenizer whose tokens they are; `None` for images and vectors.
        prefix: tokens in front of the grid.
        grid: height and width.
    """

    text: str | None = None
    prefix: int = 0
    grid: tuple[int, int] = (1, 1)


class States(NamedTuple):
    """States of a layer, or messages, by position.

    Args:
        values: `[examples, positions, width]`. places: what the positions are.
        mask: `[examples, positions]`, the tokens that are text; `None` if all positions count.
    """

    values: Tensor
    places: Places
    mask: Tensor | None = None

    def encoded(self, module: nn.Module) -> States:
        """The messages that a module makes of each position."""
        return self._replace(values=module(self.values.to(next(module.parameters()).dtype)))

    def decoded(self, module: nn.Module, listener: States) -> States:
        """What a module makes of these messages at the listener's positions."""
        return listener._replace(values=module(carried(self, listener)))

    def mean(self) -> Tensor:
        """`[examples, 1, width]`, over the positions that count."""
        if self.mask is None:
            return self.values.mean(1, keepdim=True)
        weights = self.mask / self.mask.sum(1, keepdim=True).clamp(min=1)
        return (self.values.masked_fill(~self.mask[..., None], 0) * weights[..., None]).sum(1, keepdim=True)


def states_of(output: Tensor, model: ModelAdapter, batch: Batch) -> States:
    """A layer's output by position.

    Args:
        output: a vector `[examples, width]`, tokens `[examples, tokens, width]` or a map `[examples, width, height, width]`.
        model: whose layer it is. batch: the examples.

    Raises:
        InputError: an output of another kind, or of other tokens than the model reads.
    """
    text = model.text(batch)
    if output.dim() == 3 and text is not None:
        key, mask = text
        if output.shape[1] != mask.shape[1]:
            raise InputError(
                f"A layer has {output.shape[1]} positions for texts of {mask.shape[1]} tokens: name a layer with one state a "
                "token, or a vector."
            )
        return States(output, Places(key), mask.bool())
    if output.dim() == 2:
        return States(output[:, None], Places())
    if output.dim() == 3:
        number = output.shape[1]
        sides = ((front, math.isqrt(max(0, number - front))) for front in PREFIXES)
        square = (Places(None, front, (side, side)) for front, side in sides if side and side**2 == number - front)
        return States(output, next(square, Places(None, 0, (number, 1))))
    if output.dim() == 4:
        return States(output.flatten(2).transpose(1, 2), Places(None, 0, (output.shape[2], output.shape[3])))
    raise InputError(f"A layer's output {tuple(output.shape)} is no vector, tokens or map. Name another layer.")


def as_output(states: States, like: Tensor) -> Tensor:
    """The states in the shape and dtype of a layer's output."""
    values = states.values.to(like.dtype)
    return values.reshape(like.shape) if like.dim() < 4 else values.transpose(1, 2).reshape(like.shape)


def carried(message: States, listener: States) -> Tensor:
    """The message at the listener's positions, `[examples, positions of the listener, width]`."""
    if message.places == listener.places:
        return message.values
    if message.places.text is not None or listener.places.text is not None:
        return message.mean().expand(-1, listener.values.shape[1], -1)
    front, patches = message.values.split([message.places.prefix, message.values.shape[1] - message.places.prefix], 1)
    if message.places.prefix:
        patches = patches + front.mean(1, keepdim=True)
    grid = patches.transpose(1, 2).unflatten(2, message.places.grid)
    moved = F.adaptive_avg_pool2d(grid, listener.places.grid).flatten(2).transpose(1, 2)
    return torch.cat([moved.mean(1, keepdim=True).expand(-1, listener.places.prefix, -1), moved], 1)


def compared(student: States, teacher: States) -> Compared:
    """The messages of both sides at the positions of the one that has fewer."""
    if student.places == teacher.places:
        return Compared(student.values, teacher.values, student.mask)
    listener = min(student, teacher, key=lambda s: (s.places.text is not None, s.values.shape[1]))
    if listener.places.text is not None:  # of two tokenizers
        return Compared(student.mean(), teacher.mean())
    return Compared(carried(student, listener), carried(teacher, listener))
