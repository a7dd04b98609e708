"""Networks that weigh the channels of a layer of a frozen model, by what the layer shows for an example."""

from __future__ import annotations

from torch import Tensor, nn

from understudy.errors import InputError


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

    Source: `MaskNet_1d` and its form for maps of MST-Distill's released code.
    """

    def __init__(self, channels: int, width: int, heads: int, maps: bool = False) -> None:
        super().__init__()
        self.channels = channels
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
