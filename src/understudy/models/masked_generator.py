"""Masked autoregressive generators (MAR): an image is square patches, and a diffusion head draws each masked one.

The encoder reads the patches that are known, the decoder every place and the condition, and the head, a small network on
one patch, predicts the noise in it. Sampling begins with all patches masked and draws some in each iteration.

Source: LightGen (Wu et al. 2025), after MAR (Li et al. 2024).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy.data import Batch
from understudy.data.noise import normal, uniform
from understudy.data.noise_sets import NoiseBatch
from understudy.errors import InputError
from understudy.losses.diffusion import guided
from understudy.losses.masked_diffusion import (
    cosine_alphas,
    learned_log_variance,
    linear_guidance,
    masked_after,
    posterior_terms,
)
from understudy.models.adapters import ModelAdapter, ModelOutput
from understudy.models.diffusion import SAMPLER, Sampler
from understudy.models.small import save_small
from understudy.targets import TokenNoise

TIMES = 1000
"""Entries of the noise schedule."""
HEAD_STEPS = 50
"""Steps of the diffusion head for a patch, evenly spaced over the schedule."""
ORDER, HEAD = 1, 2
"""Streams of random numbers of a sample: the order of its patches, and the noise of the head's steps."""


class MaskedGenerator(nn.Module):
    """The network: encoder, decoder and diffusion head of one width.

    Args:
        shape: of an image, `(channels, side, side)`.
        classes: 0 for none; one more is the absent condition.
        width: of all parts. layers: of encoder and decoder each. patch: side of a patch.
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int, layers: int, patch: int) -> None:
        super().__init__()
        if len(shape) != 3 or shape[1] != shape[2] or patch < 1 or shape[1] % patch:
            raise InputError(
                f"A masked generator with patches of {patch} × {patch} cannot cut images of {tuple(shape)}: they must be square "
                "with a side that the patch divides."
            )
        if width < 4 or width % 4 or layers < 1:
            raise InputError(
                f"A masked generator of width {width} and {layers} layers: the width is a multiple of 4, and a layer is needed."
            )
        self.patch, self.side = patch, shape[1] // patch
        self.length, self.channels = self.side**2, shape[0] * patch**2
        self.condition = nn.Embedding(classes + 1, width)
        self.embed = nn.Linear(self.channels, width)
        self.places = nn.Parameter(0.02 * torch.randn(2, self.length, width))
        self.masked = nn.Parameter(0.02 * torch.randn(width))
        self.encoder = nn.ModuleList(_Block(width, False) for _ in range(layers))
        self.decoder = nn.ModuleList(_Block(width, True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = _Head(self.channels, width)

    def cut(self, images: Tensor) -> Tensor:
        """Patches `[images, L, C]` of images `[images, channels, side, side]`."""
        parts = images.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        return parts.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def join(self, tokens: Tensor) -> Tensor:
        """The images of patches: the inverse of `cut`."""
        parts = tokens.unflatten(1, (self.side, self.side)).unflatten(3, (-1, self.patch, self.patch))
        return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def forward(self, tokens: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
        """What the head is told about each place: `[images, L, width]`.

        Args:
            tokens: `[images, L, C]`; those that are masked are not read.
            mask: `[images, L]`, bool.
            condition: `[images]`, from 0 to `classes`.
        """
        told = self.condition(condition)[:, None]
        h = torch.cat([told, self.embed(tokens.masked_fill(mask[..., None], 0)) + self.places[0]], 1)
        known = torch.cat([mask.new_ones(len(mask), 1), ~mask], 1)[:, None, None]  # [images, heads, queries, keys]
        for block in self.encoder:
            h = block(h, known)
        s = torch.where(mask[..., None], self.masked, h[:, 1:]) + self.places[1]
        for block in self.decoder:
            s = block(s, told=told)
        return self.norm(s)


class _Block(nn.Module):
    """Pre-norm attention and feed-forward; with `cross`, attention to the condition between the two."""

    def __init__(self, width: int, cross: bool) -> None:
        super().__init__()
        self.own = _Attention(width)
        self.cross = _Attention(width) if cross else None
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, known: Tensor | None = None, told: Tensor | None = None) -> Tensor:
        x = x + self.own(x, None, known)
        if self.cross is not None:
            x = x + self.cross(x, told)
        return x + self.feed(x)


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), 4
        self.query, self.memory = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, other: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        parts = (self.query(x), *self.memory(x if other is None else other).chunk(2, -1))
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v, known).transpose(1, 2).flatten(2))


class _Head(nn.Module):
    """A residual network on one patch, modulated by time and place: `(x_t, t, s)` to noise and v, `[..., 2 C]`."""

    def __init__(self, channels: int, width: int, blocks: int = 2) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.enter, self.told = nn.Linear(channels, width), nn.Linear(width, width)
        self.modulate = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(blocks))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(blocks)
        )
        self.leave = nn.Linear(width, 2 * channels)
        for layer in (*self.modulate, self.leave):  # at first every block is the identity and the answer 0
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10_000) * torch.arange(self.width // 2, device=t.device) / (self.width // 2))
        angle = (t[..., None] * rates).to(s.dtype)
        c = F.silu(self.told(s) + self.time(torch.cat([angle.sin(), angle.cos()], -1)))
        h = self.enter(x_t)
        for block, modulate in zip(self.blocks, self.modulate, strict=True):
            shift, scale, gate = modulate(c).chunk(3, -1)
            h = h + gate * block(F.layer_norm(h, (self.width,)) * (1 + scale) + shift)
        return self.leave(F.layer_norm(h, (self.width,)))


class MaskedGeneratorAdapter(ModelAdapter):
    """A masked generator on `NoiseBatch`es with `clean`, `mask`, `x_t` and `times`; it draws from the batch's condition.

    Args:
        model: the network.
        shape: of an image.
        classes: 0 for none.
        sampler: `steps` is the number of iterations, at most one for each patch; guidance grows to its weight as patches are
            known; times are not read.
    """

    def __init__(
        self, model: MaskedGenerator, shape: Sequence[int], classes: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__()
        self.model, self.shape, self.classes = model, tuple(shape), classes
        self.sampler = sampler or Sampler()
        self.padding = 0
        self.alphas_cumprod = cosine_alphas(TIMES)

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        """`TokenNoise`, `[images, draws, L, ...]`.

        The inputs are `clean`, `mask` `[images, L]`, the noisy patches `x_t` `[images, draws, L, C]`, and `times`
        `[images, draws, L]`, indices into `alphas_cumprod`.
        """
        if features:
            raise InputError("A masked generator has no features before a head.")
        assert isinstance(batch, NoiseBatch)
        clean, mask, x_t = (batch.inputs[n] for n in ("clean", "mask", "x_t"))
        if tuple(clean.shape[1:]) != self.shape:
            raise InputError(f"The generator takes images of shape {self.shape}, not {tuple(clean.shape[1:])}.")
        dtype = next(self.model.parameters()).dtype
        s = self.model(self.model.cut(clean.to(dtype)), mask, self._asked(batch.condition))
        output = self.model.head(x_t.to(dtype), batch.inputs["times"], s[:, None])
        return ModelOutput(TokenNoise(*output.chunk(2, -1)))

    def _asked(self, condition: Tensor) -> Tensor:
        if int(condition.max()) >= max(1, self.classes):
            raise InputError(f"Class {int(condition.max())} was asked of a generator that has {self.classes}.")
        return condition.masked_fill(condition < 0, self.classes)

    @property
    def calls(self) -> int:
        """Calls of encoder and decoder per sample."""
        return self.calls_for(self.sampler.steps)

    def calls_for(self, steps: int) -> int:
        """Calls of encoder and decoder in so many iterations: guidance doubles them."""
        return min(steps, self.model.length) * (2 if self.sampler.guidance is not None else 1)

    @torch.no_grad()
    def draw(self, batch: NoiseBatch, eps: Tensor, steps: int | None = None) -> Tensor:
        """Samples `[images, ...]`; `eps` is where the diffusion of each patch begins.

        Args:
            steps: iterations, those of `sampler` if not given; more than there are patches are one for each patch.
        """
        net, dtype = self.model, next(self.model.parameters()).dtype
        start = net.cut(eps.to(dtype))
        places = uniform(batch.ids, (net.length,), seed=0, step=0, stream=ORDER).argsort(1).argsort(1)
        tokens, asked = torch.zeros_like(start), self._asked(batch.condition)
        before = net.length
        for after in masked_after(net.length, min(net.length, self.sampler.steps if steps is None else steps)):
            mask = places < before
            now = mask & (places >= after)
            told = [net(tokens, mask, asked)[now]]
            weight = self.sampler.guidance
            if weight is not None:
                told.append(net(tokens, mask, torch.full_like(asked, self.classes))[now])
                weight = linear_guidance(weight, after, net.length)
            fresh = self._diffuse(start[now], told, weight, batch.ids, now)
            tokens, before = tokens.masked_scatter(now[..., None], fresh), after
        return net.join(tokens)

    def _diffuse(self, x: Tensor, told: list[Tensor], weight: float | None, ids: Tensor, now: Tensor) -> Tensor:
        """Ancestral sampling of the patches at `now`, `[patches, C]`; with guidance, `told` is for and without the
        condition. x_0 is bounded by the range of pixels."""
        chosen = torch.linspace(0, TIMES - 1, HEAD_STEPS, dtype=torch.float64).round().long()
        table = self.alphas_cumprod[chosen]
        for i in reversed(range(HEAD_STEPS)):
            at = torch.full((len(x),), int(chosen[i]), device=x.device)
            noise, value = self.model.head(x, at, told[0]).chunk(2, -1)
            if weight is not None:
                noise = guided(noise, self.model.head(x, at, told[1]).chunk(2, -1)[0], weight)
            step = torch.full((len(x),), i)
            terms = posterior_terms(step, table)
            alpha, of_clean, of_noisy = (v.to(x)[:, None] for v in (table[step].sqrt(), *terms))
            clean = ((x - (1 - alpha.square()).sqrt() * noise) / alpha).clamp(-1, 1)
            x = of_clean * clean + of_noisy * x
            if i:
                deviation = (0.5 * learned_log_variance(value, step, table)).exp()
                drawn = normal(ids, now.shape[1:] + x.shape[1:], seed=0, step=i, stream=HEAD)
                x = x + deviation * drawn[now].to(x)
        return x

    def save(self, folder: Path) -> None:
        """The network in the small format, and `sampler.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_small(self.model, folder)
        facts = {**asdict(self.sampler), "clip": 1.0, "null": True, "read_at": None, "prediction": "epsilon"}
        (folder / SAMPLER).write_text(json.dumps(facts, indent=1))


def build_masked_generator(name: str, shape: Sequence[int], classes: int) -> MaskedGeneratorAdapter:
    """A new generator called `mar:WIDTH,LAYERS,PATCH`."""
    sizes = [int(v) for v in name.partition(":")[2].split(",")]
    if len(sizes) != 3:
        raise InputError(f"{name}: a masked generator is mar:WIDTH,LAYERS,PATCH, as in mar:64,2,2.")
    model = MaskedGenerator(shape, classes, *sizes)
    model.understudy = {"understudy_model": name, "classes": classes, "shape": list(shape)}  # type: ignore[assignment]
    return MaskedGeneratorAdapter(model, shape, classes)
