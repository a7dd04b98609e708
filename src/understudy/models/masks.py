"""Networks that weigh the channels of a layer of a frozen model, by what the layer shows for an example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError, nearest
from understudy.models.adapters import ModelAdapter, find_head
from understudy.models.modes import evaluating
from understudy.models.taps import called_layers, edited, layer, stages
from understudy.targets import Target


def mask_width(channels: int, heads: int, factor: int) -> int:
    """The width of a channel's token in a mask network: ⌊channels / (factor · heads)⌋ · heads.

    Raises:
        InputError: there are fewer channels than factor · heads, which leaves no width.
    """
    width = channels // (factor * heads) * heads
    if width == 0:
        raise InputError(
            f"A mask of {channels} channels has no width left with {heads} heads and factor {factor}: give at most "
            f"{max(1, channels // factor)} heads, or mask a wider layer."
        )
    return width


class MaskNet(nn.Module):
    """A weight in (0, 1) for each channel, from self-attention among the channels.

    Each channel has a token that a linear layer computes from all channels: `channels² · width` weights.

    Args:
        channels: of the layer.
        width: of a token, a multiple of `heads`. heads: of the attention.
        maps: the layer shows maps `[examples, channels, height, width]` and not vectors `[examples, channels]`; they are
            reduced to vectors by convolutions with batch normalisation and the mean over positions.
        place: the name of the layer in its model, for `signal`.

    Source: `MaskNet_1d` and its form for maps of MST-Distill's released code.
    """

    def __init__(self, channels: int, width: int, heads: int, maps: bool = False, place: str = "") -> None:
        super().__init__()
        self.channels, self.place = channels, place
        self.pool = (
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels),
                nn.Conv2d(channels, channels, 1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            if maps
            else nn.Identity()
        )
        self.embed = nn.Linear(channels, channels * width)
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True)
        self.fc = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """`[examples, channels]`, or `[examples, channels, 1, 1]` for maps."""
        tokens = self.embed(self.pool(features)).unflatten(-1, (self.channels, -1))
        mixed, _ = self.mha(tokens, tokens, tokens, need_weights=False)
        mask: Tensor = self.fc(mixed)[..., 0].sigmoid()
        return mask.reshape(*mask.shape, *[1] * (features.dim() - 2))

    def masked(self, features: Tensor) -> Tensor:
        """`features` with each channel multiplied by its weight."""
        return self(features).to(features.dtype) * features

    def signal(self, model: ModelAdapter, batch: Batch) -> Target:
        """The outputs of `model` for the rows of a batch with its layer `place` masked. The hook is removed afterwards."""
        with edited({self.place: (layer(model.model, self.place), self.masked)}):
            found: Target = model(batch).signal
        return found


@torch.no_grad()
def mask_layers(
    name: str, model: ModelAdapter, batch: Batch, number: int, chosen: Sequence[str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Layers of a model to mask, in the order in which they run, with the shape of what they show for an example.

    By default these are the last of its linear layers on vectors and of the ends of its resolutions, the head left out.

    Args:
        name: of the model, for messages.
        number: how many. chosen: their names instead.

    Raises:
        InputError: the model has fewer, or a name is not that of a layer that shows vectors or maps.
    """
    with evaluating(model):
        calls = called_layers(model.model, lambda: model(batch))
    names = {id(m): n for n, m in model.model.named_modules()}
    shown = {names[id(m)]: tuple(y.shape[1:]) for m, y in calls if id(m) in names and y.dim() in (2, 4)}
    shown.pop("", None)
    if chosen is not None:
        for one in chosen:
            if one not in shown:
                raise InputError(
                    f"Teacher {name!r} has no layer {one!r} that shows vectors or maps.{nearest(one, shown)} Those that do: "
                    f"{', '.join(shown)}."
                )
        return {one: shown[one] for one in chosen}
    head = find_head(model)
    ends = (
        {names.get(id(m)) for m in stages(calls)}
        if any(y.dim() == 4 and y[0, 0].numel() > 1 for _, y in calls)
        else set()
    )
    linear = {names.get(id(m)) for m, y in calls if isinstance(m, nn.Linear) and y.dim() == 2 and m is not head}
    known = [one for one in shown if one in ends | linear][-number:]
    if len(known) < number:
        raise InputError(
            f"Teacher {name!r} ({type(model.model).__name__}) shows {len(known)} layers to mask and {number} are asked for: "
            "choose them by name (options.layers), or ask for fewer (options.layers_per_teacher)."
        )
    return {one: shown[one] for one in known}
