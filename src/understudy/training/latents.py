"""Latents of a frozen autoencoder: one that is trained before the run, and examples as a function of what it reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from understudy.models.autoencoders import Autoencoder
from understudy.training.setup import SetupContext


def trained_autoencoder(context: SetupContext, x: Callable[[], Tensor], latent: int, steps: int) -> dict[str, Tensor]:
    """Weights of an `Autoencoder` of the training examples, once and stored. No other random state is touched.

    Args:
        x: returns the examples, `[examples, *shape]`. latent: numbers in a latent. steps: of 128 examples.
    """

    def fitted() -> dict[str, Tensor]:
        with torch.random.fork_rng():  # a run that finds it in the store goes on with the same random numbers
            torch.manual_seed(context.seed)
            seen = x()
            return Autoencoder(tuple(seen.shape[1:]), latent).to(seen).fit(seen, steps=steps).state_dict()

    return context.once("autoencoder", fitted, latent=latent, steps=steps, seed=context.seed)


class Generator(nn.Module):
    """G: examples as a function of latents z. Both are less their mean and divided by their deviation, over the data.

    Args:
        autoencoder: with `encode` and `decode`; it is frozen. x: the data as it reads them, `[examples, *shape]`.
        mean, deviation: of them.
    """

    def __init__(self, autoencoder: nn.Module, x: Tensor, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.autoencoder = autoencoder.to(x).eval().requires_grad_(False)
        self.seen = mean, deviation
        latents = self._encoded(x)
        self.own = latents.mean(), latents.std().clamp(min=1e-8)

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:
        """z of examples, `[examples, *latent]`."""
        return (self._encoded(x * self.seen[1] + self.seen[0]) - self.own[0]) / self.own[1]

    def forward(self, z: Tensor) -> Tensor:
        """`[examples, *shape]`."""
        decoded: Tensor = self.autoencoder.decode(z * self.own[1] + self.own[0])  # type: ignore[operator]
        return (decoded - self.seen[0]) / self.seen[1]

    @torch.no_grad()
    def _encoded(self, x: Tensor) -> Tensor:
        return torch.cat([self.autoencoder.encode(part) for part in x.split(256)])  # type: ignore[operator]
