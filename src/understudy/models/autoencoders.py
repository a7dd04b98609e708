"""Autoencoders whose latents are perturbed: a small one trained here, or one of diffusers from a folder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy.data.folders import find
from understudy.errors import InputError
from understudy.models.fitting import minimise
from understudy.models.small import load_weights
from understudy.models.weights import check_complete, read_object, reason, write_model


class Autoencoder(nn.Module):
    """An encoder and a decoder with one hidden layer each, between inputs of `shape` and `latent` numbers."""

    def __init__(self, shape: tuple[int, ...], latent: int = 16, hidden: int = 256) -> None:
        super().__init__()
        self.shape, self.sizes = tuple(shape), (latent, hidden)
        inputs = torch.Size(shape).numel()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, inputs))

    def encode(self, x: Tensor) -> Tensor:
        """`[examples, latent]`."""
        return self.encoder(x)

    def decode(self, latent: Tensor) -> Tensor:
        """`[examples, *shape]`."""
        return self.decoder(latent).view(-1, *self.shape)

    def fit(self, x: Tensor, *, steps: int = 1000, batch: int = 128, learning_rate: float = 1e-3) -> Autoencoder:
        """Train on the squared reconstruction error, with torch's global random generator."""
        draws = (x[torch.randint(len(x), (batch,)).to(x.device)] for _ in range(steps))
        losses = (F.mse_loss(self.decode(self.encode(chosen)), chosen) for chosen in draws)
        minimise(losses, torch.optim.Adam(self.parameters(), lr=learning_rate))
        return self

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`, for `load_autoencoder`."""
        write_model(self, folder, {"understudy_autoencoder": self.sizes, "shape": self.shape})


class _OfDiffusers(nn.Module):
    """An autoencoder of diffusers, which takes images in [−1, 1]. Its latents are the mean of the posterior."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def encode(self, x: Tensor) -> Tensor:
        found = self.model.encode(2 * x - 1)  # type: ignore[operator]
        return found.latent_dist.mean if hasattr(found, "latent_dist") else found.latents

    def decode(self, latent: Tensor) -> Tensor:
        return (self.model.decode(latent).sample + 1) / 2  # type: ignore[operator]


def load_autoencoder(name: str, shape: tuple[int, ...]) -> nn.Module:
    """A module with `encode` and `decode` for inputs of `shape`, from a folder in this project's format or that of
    diffusers."""
    path = find(name)
    if path is None or not (path / "config.json").is_file():
        raise InputError(f"Autoencoder {name!r} is not a folder with a config.json. Leave it out to have one trained.")
    facts = read_object(path / "config.json")
    if "understudy_autoencoder" in facts and "shape" not in facts:
        raise InputError(
            f"{path}/config.json describes no autoencoder: one of ours has 'understudy_autoencoder' (two sizes) and "
            "'shape', one of diffusers '_class_name'. Leave autoencoder out to have one trained."
        )
    if "understudy_autoencoder" in facts:
        try:
            own = Autoencoder(tuple(facts["shape"]), *facts["understudy_autoencoder"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}/config.json describes no autoencoder: {reason(error)}") from None
        load_weights(own, path / "model.safetensors")
        model: nn.Module = own
    else:
        model = _OfDiffusers(_diffusers(path, str(facts.get("_class_name"))))
    try:
        with torch.no_grad():
            back = tuple(model.decode(model.encode(torch.zeros(1, *shape))).shape[1:])  # type: ignore[operator]
    except RuntimeError:
        back = None
    if back != tuple(shape):
        raise InputError(
            f"Autoencoder {name} does not give back inputs of shape {list(shape)}, which the data has. Choose one that "
            "was trained on this data, or leave it out to have one trained."
        )
    return model


def _diffusers(path: Path, kind: str) -> nn.Module:
    try:
        import diffusers
    except ImportError:
        raise InputError(f"Autoencoder {path} needs the extra: pip install understudy[diffusion].") from None
    if not kind.startswith("Autoencoder") or not hasattr(diffusers, kind):
        raise InputError(f"{path} holds a {kind}, not an autoencoder of diffusers nor one of ours.")
    try:
        model, found = getattr(diffusers, kind).from_pretrained(
            str(path), use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # loaders raise many types, all fixed by another model name
        raise InputError(f"Autoencoder {path} cannot be loaded: {reason(error)}") from error
    check_complete(str(path), found)
    return model
