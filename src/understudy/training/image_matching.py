"""Images that are optimised so that networks learn from them what they learn from the data (paper 37): four matchings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.func import functional_call

from understudy.errors import InputError
from understudy.losses import cross_entropy
from understudy.losses.matching import (
    gaussian_kernel,
    gradient_distance,
    kernel_ridge_error,
    kernel_ridge_prediction,
    mean_distance,
    trajectory_distance,
)
from understudy.models.fitting import minimise
from understudy.models.heads import head_name, put_head
from understudy.models.small import build_small
from understudy.training.setup import SetupContext
from understudy.training.unrolled import Parameters, flat, gradients, sgd_step, unrolled_sgd

ITERATIONS = {"random": 0, "gradient": 200, "distribution": 500, "trajectory": 300, "kernel": 300}
RATES = {"random": 0.0, "gradient": 0.01, "distribution": 0.3, "trajectory": 0.02, "kernel": 0.02}
"""Step sizes of the images: of gradient descent with momentum, for trajectory and kernel of Adam."""
PARTS = 10
"""The images are stored after each tenth of the iterations, so that a run that is stopped resumes there."""


class Examples(NamedTuple):
    """Images `[examples, channels, height, width]`, less their mean and divided by their deviation, and their classes."""

    x: Tensor
    y: Tensor

    def some(self, number: int, generator: torch.Generator) -> Examples:
        """As many examples, without replacement; all, in order, if there are no more."""
        if number >= len(self.y):
            return self
        chosen = torch.randperm(len(self.y), generator=generator)[:number].to(self.y.device)
        return Examples(self.x[chosen], self.y[chosen])

    def of(self, label: int) -> Examples:
        """Those of a class."""
        return Examples(self.x[self.y == label], self.y[self.y == label])


class MatchingOptions(BaseModel):
    """What a method takes whose images are optimised by one of the matchings."""

    match: Literal["random", "gradient", "distribution", "trajectory", "kernel"] = Field(
        "distribution", description="What the images are optimised for; random keeps the real ones they start from."
    )
    per_class: int = Field(1, ge=1, description="Images of each class.")
    initial: Literal["real", "noise"] = Field("real", description="What the images start from.")
    network: str | None = Field(
        None,
        description="A small network to match in, such as mlp:64,64 or convnet:32; the student's own if not given.",
    )
    iterations: int | None = Field(
        None, ge=1, description="Of matching; 200 for gradient, 500 for distribution, 300 for trajectory and kernel."
    )
    image_rate: float | None = Field(
        None, gt=0, description="Step size of the images; 0.01 for gradient, 0.3 for distribution, 0.02 for the others."
    )
    real_batch: int = Field(256, ge=1, description="Real images of a class that an iteration compares with.")
    distance: Literal["layers", "mse", "cosine"] = Field(
        "layers", description="Of gradients: row by row, or of all at once."
    )
    outer: int = Field(1, ge=1, description="Steps of the images at one network of gradient matching.")
    inner: int = Field(1, ge=1, description="Steps of that network on the images between them.")
    network_rate: float = Field(0.01, gt=0, description="Step size of that network.")
    experts: int = Field(5, ge=1, description="Networks trained on the data, whose trajectories are followed.")
    expert_steps: int = Field(60, ge=2, description="Their steps of gradient descent.")
    expert_rate: float = Field(0.2, gt=0, description="Their step size.")
    latest_start: int = Field(25, ge=0, description="Last step of an expert that a match starts from.")
    span: int = Field(15, ge=1, description="M, steps of an expert that are matched.")
    student_steps: int = Field(5, ge=1, description="n, steps on the images that are to match them.")
    ridge: float = Field(1e-3, gt=0, description="λ of kernel.")


class Matching:
    """The optimisation of images by one of the matchings.

    Args:
        options: which matching, and its numbers. real: the data. labels: of the images. network: name of a small network. seed: of the run.
    """

    def __init__(
        self, options: MatchingOptions, real: Examples, labels: Tensor, classes: int, network: str, seed: int
    ) -> None:
        self.options, self.real, self.labels, self.classes = options, real, labels, classes
        self.network, self.seed = network, seed

    def run(self, x: Tensor, context: SetupContext, settings: Mapping[str, Any]) -> Tensor:
        """The images after all iterations. What has been stored is read.

        Args:
            x: what they start from.
        """
        o, total = self.options, self.options.iterations or ITERATIONS[self.options.match]
        if o.match == "random":
            return x
        trajectories = context.once("experts", self._experts, **settings)["flat"] if o.match == "trajectory" else None
        state: Any = {"x": x.cpu(), "rate": torch.tensor(o.expert_rate), "optimizer": None}
        ends = [round(part * total / PARTS) for part in range(PARTS + 1)]
        for first, last in zip(ends, ends[1:], strict=False):
            make = partial(self._advance, state, first, last, trajectories)
            state = context.once("distilled", make, **settings, end=last)
        found: Tensor = state["x"]
        return found

    def _advance(self, state: Any, first: int, last: int, trajectories: Tensor | None) -> dict[str, Any]:
        """The images, the step size and the optimiser after iterations `first` to `last`."""
        o, device = self.options, self.real.x.device
        x, rate = (state[k].to(device, copy=True).requires_grad_() for k in ("x", "rate"))
        size = o.image_rate or RATES[o.match]
        groups = [{"params": [x], "lr": size}, {"params": [rate], "lr": size / 10}]
        adam = o.match in ("trajectory", "kernel")
        optimizer = torch.optim.Adam(groups) if adam else torch.optim.SGD(groups, momentum=0.5)
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        for i in range(first, last):
            generator = torch.Generator().manual_seed(self._seed(i))
            minimise(self._losses(x, rate, i, generator, trajectories), optimizer)
            if not bool(x.isfinite().all()):
                raise InputError(
                    f"The images are not finite after iteration {i + 1}: lower options.image_rate ({size:g})."
                )
        return {"x": x.detach(), "rate": rate.detach(), "optimizer": optimizer.state_dict()}

    def _losses(
        self, x: Tensor, rate: Tensor, i: int, generator: torch.Generator, trajectories: Tensor | None
    ) -> Iterator[Tensor]:
        """The losses of an iteration, each of the images after the step before."""
        if self.options.match == "gradient":
            return self._gradient(x, self._new_network(i, generator), generator)
        if self.options.match == "distribution":
            return self._distribution(x, self._new_network(i, generator), generator)
        if trajectories is not None:
            return self._trajectory(x, rate, trajectories, generator)
        return self._kernel(x, generator)

    def _gradient(self, x: Tensor, net: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
        o, parameters = self.options, dict[str, Tensor](net.named_parameters())
        for _ in range(o.outer):
            distances = []
            for label in range(self.classes):
                own, real = self.labels == label, self.real.of(label).some(o.real_batch, generator)
                wanted = gradients(_mean_loss(net, real.x, real.y), parameters, differentiable=False)
                found = gradients(_mean_loss(net, x[own], self.labels[own]), parameters, differentiable=True)
                distances.append(gradient_distance(found, wanted, metric=o.distance))
            yield torch.stack(distances).sum()
            for _ in range(o.inner):
                parameters = sgd_step(_mean_loss(net, x.detach(), self.labels), parameters, o.network_rate)

    def _distribution(self, x: Tensor, net: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
        head = head_name(net, self.classes)
        assert head is not None  # every small network has one
        put_head(net, head, nn.Identity())
        distances = []
        for label in range(self.classes):
            real = self.real.of(label).some(self.options.real_batch, generator)
            with torch.no_grad():
                wanted = net(real.x)
            distances.append(mean_distance(net(x[self.labels == label]), wanted))
        yield torch.stack(distances).sum()

    def _trajectory(
        self, x: Tensor, rate: Tensor, trajectories: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        o, net = self.options, self._new_network(0, generator)
        expert = int(torch.randint(len(trajectories), (), generator=generator))
        t = int(torch.randint(min(o.latest_start, o.expert_steps - o.span) + 1, (), generator=generator))
        start, target = (trajectories[expert, at].to(x.device) for at in (t, t + o.span))
        shapes = {name: p.shape for name, p in net.named_parameters()}
        parts = start.split([s.numel() for s in shapes.values()])
        parameters = {name: part.view(s) for (name, s), part in zip(shapes.items(), parts, strict=True)}
        end = unrolled_sgd(_mean_loss(net, x, self.labels), parameters, rate, o.student_steps)
        yield trajectory_distance(flat(end), start, target)

    def _kernel(self, x: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        real = self.real.some(self.options.real_batch * self.classes, generator)
        ours, bandwidth = x.flatten(1), x[0].numel() ** 0.5
        cross, kernel = (gaussian_kernel(a, ours, bandwidth) for a in (real.x.flatten(1), ours))
        wanted, targets = (F.one_hot(y, self.classes) - 1 / self.classes for y in (real.y, self.labels))
        prediction = kernel_ridge_prediction(cross, kernel, targets, self.options.ridge)
        yield kernel_ridge_error(prediction, wanted).mean()

    def _experts(self) -> dict[str, Tensor]:
        """Parameters of networks during training on the data: `flat [experts, expert_steps + 1, parameters]`."""
        o, found = self.options, []
        for expert in range(o.experts):
            generator = torch.Generator().manual_seed(self._seed(expert))
            net = self._new_network(expert, generator)
            if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
                raise InputError(
                    f"Trajectories are of parameters, and {self.network} has batch normalisation, whose statistics are none: "
                    "set options.network to one without, for example mlp:64,64 or circular:32."
                )
            parameters: Parameters = dict(net.named_parameters())
            path = [flat(parameters)]
            for _ in range(o.expert_steps):
                real = self.real.some(o.real_batch * self.classes, generator)
                parameters = sgd_step(_mean_loss(net, real.x, real.y), parameters, o.expert_rate)
                path.append(flat(parameters))
            found.append(torch.stack(path).cpu())
        return {"flat": torch.stack(found)}

    def _seed(self, number: int) -> int:
        return 1_000_003 * self.seed + number

    def _new_network(self, number: int, generator: torch.Generator) -> nn.Module:
        """A new network in evaluation mode; batch normalisation has the statistics of some real images."""
        net = new_network(self.network, self.classes, tuple(self.real.x.shape[1:]), self._seed(number)).to(
            self.real.x.device
        )
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = None  # an average over all batches: here of one
        if norms:
            with torch.no_grad():
                net.train()(self.real.some(self.options.real_batch, generator).x)
        return net.eval().requires_grad_(False)


def new_network(name: str, classes: int, shape: tuple[int, ...], seed: int) -> nn.Module:
    """A small network with initial weights of this seed; no other random state is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_small(name, classes, shape)


def _mean_loss(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[Parameters], Tensor]:
    """Mean cross-entropy of examples as a function of the network's parameters."""
    return lambda parameters: cross_entropy(functional_call(net, dict(parameters), (x,)), y).mean()
