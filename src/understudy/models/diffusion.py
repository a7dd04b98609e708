"""Denoiser adapters: any `UNet2DModel`, an MLP for points, and the closed form of a Gaussian mixture.

All return their prediction of the clean example (`Clean`), for any prediction type, and all generate samples: by DDIM,
or in one call if they were trained for that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data.noise import normal
from understudy.data.noise_sets import NoiseBatch
from understudy.errors import InputError
from understudy.losses.diffusion import (
    check_prediction,
    ddim_step,
    epsilon_from,
    guided,
    noised,
    signal_of,
    x0_from,
)
from understudy.models.adapters import ModelAdapter, ModelOutput
from understudy.models.noise_levels import NoiseLevels
from understudy.models.small import save_small
from understudy.targets import Clean

SAMPLER = "sampler.json"


@dataclass(frozen=True)
class Sampler:
    """How a model samples.

    Args:
        steps: calls of DDIM from `t_max` down to `t_min`; 0 samples in one call, `g(ε, t_min)`.
        guidance: weight of classifier-free guidance for DDIM; `None` uses only the conditional output.
        renoise: whether every call makes a sample, and fresh noise leads it up to the next time, as consistency models do, in
            place of the deterministic steps of DDIM. One step is the same in both.
        guided: whether the network has learned a guided teacher's outputs, so that no guidance is added to its own.
    """

    steps: int = 32
    t_min: float = 0.01
    t_max: float = 0.99
    guidance: float | None = None
    renoise: bool = False
    guided: bool = False


class DenoiserAdapter(ModelAdapter):
    """A denoiser on `NoiseBatch`es with `x` and `t`.

    Args:
        model: called as `(x, time, condition)`; the condition is `None`, or class indices, where `classes` means
            unconditional.
        levels: the noise schedule.
        prediction: type of the output, as in `losses.diffusion`.
        shape: of an example.
        classes: number of classes for conditioning, 0 for none.
        null: whether it can also run unconditionally.
        clip: bound of x_0 (static thresholding), if any.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: NoiseLevels,
        prediction: str,
        shape: Sequence[int],
        *,
        classes: int = 0,
        null: bool = True,
        clip: float | None = None,
        sampler: Sampler | None = None,
        scheduler: Any = None,
    ) -> None:
        super().__init__()
        check_prediction(prediction)
        self.model, self.levels, self.prediction, self.shape = model, levels, prediction, tuple(shape)
        self.classes, self.null, self.clip = classes, null, clip
        self.sampler = sampler or Sampler()
        self.scheduler = scheduler
        self.read_at: float | None = None
        self.padding = 0

    def answer(self, batch: Any, features: bool) -> ModelOutput:
        if features:
            raise InputError("A denoiser has no features before a head.")
        x, t = batch.inputs["x"], batch.inputs["t"]
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(f"The denoiser takes examples of shape {self.shape}, not {tuple(x.shape[1:])}.")
        dtype = next(self.model.parameters()).dtype
        alpha, sigma = self.levels.at(t if self.read_at is None else torch.full_like(t, self.read_at))
        output = _tensor(self.model(x.to(dtype), self.levels.clock(t), self.condition_of(batch)))
        channels = self.shape[0]
        if output.shape[1] == 2 * channels:  # a learned variance beside the mean
            output = output[:, :channels]
        if output.shape != x.shape:
            raise InputError(
                f"{type(self.model).__name__} answers {tuple(output.shape[1:])} for examples of {self.shape}: a denoiser "
                "gives back its input's shape, or twice the channels with a learned variance."
            )
        clean = x0_from(_wide(output), _wide(x), alpha, sigma, self.prediction)
        return ModelOutput(Clean(clean if self.clip is None else clean.clamp(-self.clip, self.clip)))

    def condition_of(self, batch: NoiseBatch) -> Tensor | None:
        """What the network is told of each example: the index of its class, or `None` without classes."""
        condition = batch.condition
        if not self.classes:
            return None
        absent = condition < 0
        if not self.null and bool(absent.any()):
            raise InputError(
                "This denoiser must be told a class and was asked without: set data.conditional=true, and leave "
                "guidance off."
            )
        if int(condition.max()) >= self.classes:
            raise InputError(f"Class {int(condition.max())} was asked of a denoiser that has {self.classes}.")
        return condition.masked_fill(absent, self.classes)

    def initial(self, batch: NoiseBatch, eps: Tensor) -> Tensor:
        """The state from which the noise `eps` is removed: the noise itself."""
        return eps

    def one_call(self, t: float, begin: float) -> DenoiserAdapter:
        """This model, sampling in one call at time `t` from noise that is the state at time `begin`.

        Its input is always that noise, so its output is converted with the noise level at `begin`, whatever time it is
        given: at the level of a small t, the noise would pass through unchanged and the network would have no effect.
        At `begin` x_0 does not follow from ε, so a network with ε-prediction is used as one with v-prediction. The
        bound of x_0 is removed, since it would stop the gradient.
        """
        self.sampler, self.clip = replace(self.sampler, steps=0, t_min=t, guidance=None), None
        self.read_at = begin
        self.prediction = "v_prediction" if self.prediction == "epsilon" else self.prediction
        return self

    @property
    def calls(self) -> int:
        """Network calls per sample."""
        return self.calls_for(max(1, self.sampler.steps))

    def calls_for(self, steps: int) -> int:
        """Network calls of this number of steps: guidance doubles them."""
        return steps * (2 if self.sampler.guidance is not None else 1)

    @torch.no_grad()
    def draw(self, batch: NoiseBatch, eps: Tensor, steps: int | None = None) -> Tensor:
        """Samples from the noise `eps`, one for each example of the batch.

        Args:
            steps: of DDIM; those of `sampler` if not given.
        """
        number = self.sampler.steps if steps is None else steps
        if number == 0:
            return self(batch.at(eps, self.sampler.t_min)).signal.values
        x, times = self.initial(batch, eps), self.times(number)
        if self.sampler.renoise:
            for step in range(1, number):
                sample = trajectory(self.denoise, self.levels, batch, x, times[[step - 1, -1]], eps)
                eps = normal(batch.ids, self.shape, seed=0, step=step).to(x)
                x = noised(sample, eps, *self.levels.at(self.levels.snap(times[step].to(x.device)).expand(len(x))))
            times = times[-2:]
        return trajectory(self.denoise, self.levels, batch, x, times, eps)

    def times(self, steps: int) -> Tensor:
        """The times of so many steps of the sampler, from `t_max` down to `t_min`: `[steps + 1]`."""
        return torch.linspace(self.sampler.t_max, self.sampler.t_min, steps + 1, dtype=torch.float64)

    def epsilon(self, batch: NoiseBatch, ask: Callable[[NoiseBatch], ModelOutput] | None = None) -> Tensor:
        """The noise in the inputs of a batch, as this model predicts it, without guidance.

        Args:
            ask: this model in some wrapper.
        """
        x = batch.inputs["x"]
        clean: Tensor = (ask or self)(batch).signal.values
        return epsilon_from(clean.to(x.dtype), x, *self.levels.at(batch.inputs["t"]))

    def denoise(self, batch: NoiseBatch) -> Tensor:
        """x_0 with the sampler's guidance."""
        return self.guide(lambda b: self(b).signal.values, batch)

    def guide(self, ask: Callable[[NoiseBatch], Tensor], batch: NoiseBatch) -> Tensor:
        """The output of `ask`, which is this model in some wrapper, for the batch, with the sampler's guidance.

        Guidance extrapolates, so a bound of x_0 is applied to the result too.
        """
        clean = with_guidance(ask, batch, self.sampler.guidance)
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)

    def save(self, folder: Path) -> None:
        """The network (`save_pretrained` with its scheduler, or the small format) and `sampler.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(self.model, "save_pretrained"):
            self.model.save_pretrained(str(folder))
            if self.scheduler is not None:
                self.scheduler.save_pretrained(str(folder))
        elif hasattr(self.model, "understudy"):
            save_small(self.model, folder)
        else:
            raise InputError(f"{type(self.model).__name__} cannot be saved: it has no save_pretrained.")
        facts = {**asdict(self.sampler), "clip": self.clip, "null": self.null}
        facts |= {"read_at": self.read_at, "prediction": self.prediction}
        (folder / SAMPLER).write_text(json.dumps(facts, indent=1))


@contextmanager
def unclipped(*models: DenoiserAdapter) -> Iterator[None]:
    """Leave out the bound of x_0 of the models."""
    held = [model.clip for model in models]
    try:
        for model in models:
            model.clip = None
        yield
    finally:
        for model, clip in zip(models, held, strict=True):
            model.clip = clip


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def with_guidance(ask: Callable[[NoiseBatch], Tensor], batch: NoiseBatch, weight: float | None) -> Tensor:
    """The output of `ask` for the batch; with a weight, classifier-free guidance with the unconditional output."""
    said = ask(batch)
    if weight is None:
        return said
    without = batch.at(batch.inputs["x"], batch.inputs["t"], torch.full_like(batch.condition, -1))
    return guided(said, ask(without), weight)


def trajectory(
    ask: Callable[[NoiseBatch], Tensor],
    levels: NoiseLevels,
    batch: NoiseBatch,
    x: Tensor,
    times: Tensor,
    eps: Tensor | None = None,
) -> Tensor:
    """DDIM from `x` at `times[0]` along `times`, and the signal at its end: the state without its initial noise.

    Args:
        ask: returns x_0 for a batch with `x` and `t`.
        x: the initial state.
        times: of the steps.
        eps: the initial noise of its trajectory; `x` itself if not given.
    """
    eps = x if eps is None else eps
    x = ddim(ask, levels, batch, x, times)
    return signal_of(x, eps, *levels.at(levels.snap(times[-1:].to(x.device)).expand(len(x))))


def ddim(
    ask: Callable[[NoiseBatch], Tensor], levels: NoiseLevels, batch: NoiseBatch, x: Tensor, times: Tensor
) -> Tensor:
    """The state at the end of `times` on the deterministic trajectory of DDIM from `x` at `times[0]`.

    Args:
        ask: returns x_0 for a batch with `x` and `t`.
    """
    times = levels.snap(times.to(x.device))
    for t, s in zip(times, times[1:], strict=False):
        now, then = (levels.at(v.expand(len(x))) for v in (t, s))
        clean = ask(batch.at(x, t)).to(x.dtype)
        x = clean if bool((then[1] == 0).all()) else ddim_step(x, clean, *now, *then)
    return x


class PointDenoiser(nn.Module):
    """An MLP on points, with sin and cos of 2^k πt/2 for k = 0 … 4, and a one-hot class.

    Args:
        size: dimensions of a point.
        classes: 0 for none; one more index is the unconditional class.
    """

    def __init__(self, size: int, hidden: Sequence[int], classes: int = 0) -> None:
        super().__init__()
        self.choices = classes + 1 if classes else 0
        widths = (size + 10 + self.choices, *hidden)
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(widths[-1], size))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        angle = (t[:, None] * (math.pi / 2) * 2.0 ** torch.arange(5, device=x.device)).to(x.dtype)
        parts = [x.flatten(1), angle.sin(), angle.cos()]
        if condition is not None:
            parts.append(nn.functional.one_hot(condition, self.choices).to(x.dtype))
        return self.body(torch.cat(parts, 1)).view_as(x)


class MixtureDenoiser(nn.Module):
    """E[x_0 | x_t] of Gaussians of one width with equal weights: an exact teacher without training.

    Args:
        centres: `[modes, dimensions]`.
        deviation: standard deviation of each mode.
        classes: whether it can be conditioned on one mode.
    """

    def __init__(self, centres: Tensor, deviation: float, levels: NoiseLevels) -> None:
        super().__init__()
        self.centres = nn.Parameter(centres, requires_grad=False)
        self.deviation, self.levels = deviation, levels

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        alpha, sigma = (v.to(x.dtype)[:, None] for v in self.levels.at(t))
        variance = (alpha * self.deviation).square() + sigma.square()
        away = x[:, None] - alpha[..., None] * self.centres  # [rows, modes, dimensions]
        weight = torch.softmax(-away.square().sum(-1) / (2 * variance), -1)
        if condition is not None:
            modes = len(self.centres)
            asked = nn.functional.one_hot(condition, modes + 1)[:, :modes].to(x.dtype)
            weight = torch.where((condition < modes)[:, None], asked, weight)
        shrink = alpha * self.deviation**2 / variance
        return torch.einsum("rm,rmd->rd", weight, self.centres + shrink[..., None] * away)
