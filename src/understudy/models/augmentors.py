"""Augmentors: families of learnable transformations, differentiable in their parameters.

All have one interface: `forward(x [examples, channels, height, width], noise [examples, *noise_shape])` returns the
transformed inputs. The caller provides the noise and thereby determines the randomness. `facts()` returns the learned
values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Border = Literal["zeros", "border", "reflection"]


class Augmentor(nn.Module):
    """Base class of the families."""

    noise_shape: tuple[int, ...]

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """`x` transformed, with the same shape and dtype."""
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """The learned values, by name."""
        raise NotImplementedError


def circular_shift(x: Tensor, by: Tensor) -> Tensor:
    """x shifted circularly along its last axis by a fractional number of samples: `(1 − w) x[⌊n − Δ⌋] + w x[⌊n − Δ⌋ +
    1]`, w = frac(n − Δ).

    Args:
        x: `[examples, …, length]`.
        by: Δ `[examples]`, in samples; an integer is an exact roll to the right.
    """
    length = x.shape[-1]
    place = torch.arange(length, device=x.device, dtype=by.dtype) - by[:, None]
    below = place.detach().floor()
    share = (place - below).to(x.dtype).view(len(x), *[1] * (x.dim() - 2), length)
    left = below.long().remainder(length).view(share.shape).expand_as(x)
    right = (left + 1).remainder(length)
    return (1 - share) * x.gather(-1, left) + share * x.gather(-1, right)


def warp(x: Tensor, change: Tensor, border: Border) -> Tensor:
    """Apply an affine map to each image, with bilinear interpolation.

    Args:
        x: `[images, channels, height, width]`.
        change: `[images, 2, 3]`, added to the identity; coordinates run from −1 to 1 across the image, so 0.5 in the
            last column moves by a quarter of it.
        border: values outside of the image.
    """
    grid = F.affine_grid(torch.eye(2, 3).to(change) + change, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode=border, align_corners=False)


def _before_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


class Shift1d(Augmentor):
    """Circular shifts along the last axis by Δ = μ + softplus(ρ) · ε.

    Args:
        spread: softplus(ρ) at the start, in samples; μ starts at 0.
    """

    noise_shape = ()

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(()))
        self.rho = nn.Parameter(torch.tensor(_before_softplus(spread)))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return circular_shift(x, self.mu + F.softplus(self.rho) * noise)

    def facts(self) -> dict[str, float]:
        return {"shift": float(self.mu), "spread": float(F.softplus(self.rho))}


class Affine(Augmentor):
    """Affine maps with six parameters per image: identity + W ε ("HARD-Affine").

    Args:
        spread: W starts as this multiple of the identity matrix.
        border: values outside of the image.
    """

    noise_shape = (6,)

    def __init__(self, spread: float, border: Border) -> None:
        super().__init__()
        self.weight = nn.Parameter(spread * torch.eye(6))
        self.border = border

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return warp(x, (noise @ self.weight.T).view(-1, 2, 3), self.border)

    def facts(self) -> dict[str, float]:
        """Standard deviation of the six parameters: their root mean square, and that of the translations alone."""
        variance = self.weight.detach().square().sum(1)
        return {"spread": float(variance.mean().sqrt()), "spread_moves": float(variance[[2, 5]].mean().sqrt())}


Operation = Callable[[Tensor, Tensor, Border], Tensor]


def _affine(x: Tensor, size: Tensor, border: Border, *entries: tuple[int, float]) -> Tensor:
    change = torch.stack([size * dict(entries).get(i, 0.0) for i in range(6)], 1)
    return warp(x, change.view(-1, 2, 3), border)


def _across(x: Tensor, size: Tensor, border: Border) -> Tensor:
    return _affine(x, size, border, (2, 0.5))


def _down(x: Tensor, size: Tensor, border: Border) -> Tensor:
    return _affine(x, size, border, (5, 0.5))


def _zoom(x: Tensor, size: Tensor, border: Border) -> Tensor:
    return _affine(x, size, border, (0, 0.3), (4, 0.3))


def _rotate(x: Tensor, size: Tensor, border: Border) -> Tensor:
    angle = size * (math.pi / 6)
    turn, stretch = angle.sin(), angle.cos() - 1
    ratio = x.shape[-2] / x.shape[-1]  # coordinates are relative to each side, rotations are not
    zero = torch.zeros_like(turn)
    change = torch.stack([stretch, -turn * ratio, zero, turn / ratio, stretch, zero], 1)
    return warp(x, change.view(-1, 2, 3), border)


def _brightness(x: Tensor, size: Tensor, border: Border) -> Tensor:
    return x * (1 + 0.5 * size)[:, None, None, None]


def _contrast(x: Tensor, size: Tensor, border: Border) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (1 + 0.5 * size)[:, None, None, None]


def _blur(x: Tensor, size: Tensor, border: Border) -> Tensor:
    high = 1 if x.shape[-2] == 1 else 3
    padded = F.pad(x, (1, 1, high // 2, high // 2), mode="replicate")
    return torch.lerp(x, F.avg_pool2d(padded, (high, 3), 1), size.abs()[:, None, None, None])


def _colour(x: Tensor, size: Tensor, border: Border) -> Tensor:
    grey = x.mean(1, keepdim=True)
    return grey + (x - grey) * (1 + 0.8 * size)[:, None, None, None]


class Mix(Augmentor):
    """A convex mixture of the input and chains of fixed operations, with learned weights ("HARD-Mix").

    The weights of an image are softmax(a + ε) over the chains, the first of which is the identity; a is learned. Each
    operation of a chain draws its strength, up to a fixed maximum, from the noise.

    Args:
        shape: channels, height, width.
        spread: initial weight of all chains but the first, without noise.
    """

    def __init__(self, shape: tuple[int, ...], spread: float, border: Border) -> None:
        super().__init__()
        single: list[Operation] = [_across, _zoom, _brightness, _contrast, _blur]
        pairs: list[tuple[Operation, ...]] = [(_across, _brightness), (_zoom, _contrast)]
        if shape[1] > 1:
            single += [_down, _rotate]
            pairs += [(_rotate, _down)]
        if shape[0] == 3:
            single += [_colour]
        self.chains: list[tuple[Operation, ...]] = [(), *((o,) for o in single), *pairs]
        self.border = border
        number = len(self.chains)
        first = math.log((1 - spread) / spread * (number - 1))
        self.weight = nn.Parameter(torch.cat([torch.tensor([first]), torch.zeros(number - 1)]))
        self.noise_shape = (number, 3)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        shares = (self.weight + noise[:, :, 0]).softmax(-1)
        strengths = torch.tanh(noise[:, :, 1:])
        mixed = torch.zeros_like(x)
        for i, chain in enumerate(self.chains):
            y = x
            for j, operation in enumerate(chain):
                y = operation(y, strengths[:, i, j], self.border)
            mixed = mixed + shares[:, i, None, None, None].to(x.dtype) * y
        return mixed

    def facts(self) -> dict[str, float]:
        """The weights of the chains without noise: of the identity, and of the others by their operations."""
        shares = self.weight.detach().softmax(-1).tolist()
        names = ["_".join(o.__name__[1:] for o in chain) or "nothing" for chain in self.chains]
        return {f"share_{name}": share for name, share in zip(names, shares, strict=True)}


class Latent(Augmentor):
    """Encode, shift the latent z to z + μ + softplus(ρ) · ε, decode ("HARD-VAE").

    Args:
        autoencoder: with `encode` and `decode`; it is frozen, and stored in this module as buffers.
        shape: of one input.
        spread: initial softplus(ρ); μ starts at 0.
    """

    def __init__(self, autoencoder: nn.Module, shape: tuple[int, ...], spread: float) -> None:
        super().__init__()
        self.autoencoder = _buffered(autoencoder.eval())
        with torch.no_grad():
            self.noise_shape = tuple(autoencoder.encode(torch.zeros(1, *shape)).shape[1:])  # type: ignore[operator]
        self.mu = nn.Parameter(torch.zeros(self.noise_shape))
        self.rho = nn.Parameter(torch.full(self.noise_shape, _before_softplus(spread)))

    def train(self, mode: bool = True) -> Latent:
        """Set the mode; the autoencoder stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        latent = self.autoencoder.encode(x)  # type: ignore[operator]
        return self.autoencoder.decode(latent + self.mu + F.softplus(self.rho) * noise)  # type: ignore[operator]

    def facts(self) -> dict[str, float]:
        return {"shift": float(self.mu.detach().square().mean().sqrt()), "spread": float(F.softplus(self.rho).mean())}


def _buffered(module: nn.Module) -> nn.Module:
    """The module with buffers instead of parameters, so that no optimiser trains them."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            del part._parameters[name]
            part.register_buffer(name, parameter.detach() if parameter is not None else None)
    return module
