"""A few examples from which networks learn what they learn from the data (paper 37): chosen by six rules, or optimised by four
matchings. An example is an image, or the embedding of a text; what is optimised is the example, or a latent that it is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.func import functional_call

from understudy.curation import pruning
from understudy.curation.coresets import k_center, matching_pursuit
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
from understudy.training.latents import Generator
from understudy.training.setup import SetupContext
from understudy.training.unrolled import Parameters, flat, gradients, sgd_step, unrolled_sgd

SELECTIONS = ("random", "herding", "k-center", "el2n", "grand", "pursuit")
"""Rules that choose real examples."""
_BY_NETWORKS = ("el2n", "grand", "pursuit")
ITERATIONS = {"gradient": 200, "distribution": 500, "trajectory": 300, "kernel": 300}
RATES = {"gradient": 0.01, "distribution": 0.3, "trajectory": 0.02, "kernel": 0.02}
"""Step sizes of the examples: of gradient descent with momentum, for trajectory and kernel of Adam."""
PARTS = 10
"""The examples are stored after each tenth of the iterations, so that a run that is stopped resumes there."""


class Examples(NamedTuple):
    """Images `[examples, channels, height, width]` or embeddings `[examples, 1, 1, width]`, less their mean and divided by their
    deviation, and their classes."""

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
    """What a method takes whose examples are chosen by one of the rules or optimised by one of the matchings."""

    match: Literal[
        "random", "herding", "k-center", "el2n", "grand", "pursuit", "gradient", "distribution", "trajectory", "kernel"
    ] = Field(
        "distribution",
        description="What examples are optimised for; the first six choose real ones: at random, by means, the farthest, by "
        "error, by norm of the gradient, by gradients whose sum is that of all.",
    )
    per_class: int = Field(1, ge=1, description="Examples of each class.")
    initial: Literal["real", "noise"] = Field("real", description="What those that are optimised start from.")
    network: str | None = Field(
        None,
        description="A small network to match in, such as mlp:64,64 or convnet:32; the student's own if not given, or mlp:64,64 on "
        "texts.",
    )
    space: Literal["examples", "latents"] = Field(
        "examples",
        description="What is optimised: the examples, or latents z of a frozen autoencoder, whose decoder makes the examples.",
    )
    autoencoder: str | None = Field(
        None, description="Of `latents`: a folder, ours or of diffusers; else one is trained on the data."
    )
    latent: int = Field(16, ge=1, description="Numbers in the latent of an autoencoder that is trained.")
    autoencoder_steps: int = Field(1000, ge=1, description="And the steps of 128 examples it is trained for.")
    iterations: int | None = Field(
        None, ge=1, description="Of matching; 200 for gradient, 500 for distribution, 300 for trajectory and kernel."
    )
    image_rate: float | None = Field(
        None,
        gt=0,
        description="Step size of the examples; 0.01 for gradient, 0.3 for distribution, 0.02 for the others.",
    )
    real_batch: int = Field(256, ge=1, description="Real examples of a class that an iteration compares with.")
    distance: Literal["layers", "mse", "cosine"] = Field(
        "layers", description="Of gradients: row by row, or of all at once."
    )
    outer: int = Field(1, ge=1, description="Steps of the examples at one network of gradient matching.")
    inner: int = Field(1, ge=1, description="Steps of that network on them in them.")
    network_rate: float = Field(0.01, gt=0, description="Step size of that network.")
    experts: int = Field(
        5, ge=1, description="Networks trained on the data, which are followed, or whose errors are read."
    )
    expert_steps: int = Field(60, ge=2, description="Their steps of gradient descent.")
    expert_rate: float = Field(0.2, gt=0, description="Their step size.")
    latest_start: int = Field(25, ge=0, description="Last step of an expert that a match starts from.")
    span: int = Field(15, ge=1, description="M, steps of an expert that are matched.")
    student_steps: int = Field(5, ge=1, description="n, steps on the examples that are to match them.")
    ridge: float = Field(1e-3, gt=0, description="λ of kernel.")


class Matching:
    """The choice of examples by one of the rules, or their optimisation by one of the matchings.

    Args:
        options: which of them, and its numbers. real: the data. labels: of the examples. network: name of a small network.
        seed: of the run. generator: G, from the latents that are optimised to the examples; the examples themselves are
            optimised if not given.
    """

    def __init__(
        self,
        options: MatchingOptions,
        real: Examples,
        labels: Tensor,
        classes: int,
        network: str,
        seed: int,
        generator: Generator | None = None,
    ) -> None:
        self.options, self.real, self.labels, self.classes = options, real, labels, classes
        self.network, self.seed = network, seed
        self.generator = generator

    def chosen(self, context: SetupContext, settings: Mapping[str, Any]) -> Tensor:
        """Indices of `per_class` real examples of each class, in the order of the classes; where they are optimised, of random
        ones that they may start from."""
        return context.once("chosen", lambda: {"index": self._choose()}, **settings)["index"].to(self.real.y.device)

    def _choose(self) -> Tensor:
        o, generator = self.options, torch.Generator().manual_seed(self.seed)
        logits, read = self._read() if o.match in _BY_NETWORKS else (None, None)
        parts = []
        for label in range(self.classes):
            own = (self.real.y == label).nonzero()[:, 0]
            if logits is None or read is None:
                order = self._by_place(self.real.x[own].flatten(1), generator)
            else:
                order = self._by_error(logits[:, own], self.real.y[own], read[:, own])
            parts.append(own[order.to(own.device)])
        return torch.cat(parts)

    def _by_place(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Of one class, by where its examples are."""
        rule, number = self.options.match, self.options.per_class
        if rule == "herding":
            scores = pruning.herding_scores(x.cpu(), torch.zeros(len(x), dtype=torch.long))
            return scores.sort(descending=True, stable=True).indices[:number]
        if rule == "k-center":
            middle = int((x - x.mean(0)).norm(dim=1).argmin())
            return k_center(x, number, start=middle).chosen
        return torch.arange(len(x)) if number >= len(x) else torch.randperm(len(x), generator=generator)[:number]

    def _by_error(self, logits: Tensor, labels: Tensor, read: Tensor) -> Tensor:
        """Of one class, by the errors of networks.

        Args:
            logits: `[experts, examples, classes]`. read: what the last layer reads, `[experts, examples, width + 1]`.
        """
        rule, number = self.options.match, self.options.per_class
        if rule == "pursuit":
            errors = logits.softmax(-1) - F.one_hot(labels, self.classes)
            slopes = torch.einsum("enc,enw->necw", errors, read).flatten(1)
            found = matching_pursuit(slopes, slopes.mean(0), number).chosen.tolist()
            rest = [i for i in range(len(labels)) if i not in found]  # where fewer sum up to the mean
            return torch.tensor([*found, *rest][:number])
        norms = read.norm(dim=-1)
        scores = pruning.grand_scores(logits, labels, norms) if rule == "grand" else pruning.el2n_scores(logits, labels)
        return scores.sort(descending=True, stable=True).indices[:number]

    @torch.no_grad()
    def _read(self) -> tuple[Tensor, Tensor]:
        """Logits of the experts at their end, and what their last layers read with a 1 for the bias, in float64."""
        found = []
        for expert in range(self.options.experts):
            with torch.enable_grad():
                *_, (net, parameters) = self._training(expert)
            logits = functional_call(net, dict(parameters), (self.real.x,))
            head = head_name(net, self.classes)
            assert head is not None  # every small network has one
            put_head(net, head, nn.Identity())
            left = {n: p for n, p in parameters.items() if not n.startswith(f"{head}.")}
            read = functional_call(net, left, (self.real.x,)).flatten(1)
            found.append((logits.double(), F.pad(read.double(), (0, 1), value=1.0)))
        logits, read = (torch.stack(part) for part in zip(*found, strict=True))
        return logits, read

    def run(self, z: Tensor, context: SetupContext, settings: Mapping[str, Any]) -> Tensor:
        """The examples after all iterations; chosen ones as they are. What has been stored is read.

        Args:
            z: what they, or the latents that they are made from, start from.
        """
        o = self.options
        if o.match in SELECTIONS:
            return z
        total = o.iterations or ITERATIONS[o.match]
        trajectories = context.once("experts", self._experts, **settings)["flat"] if o.match == "trajectory" else None
        state: Any = {"x": z.cpu(), "rate": torch.tensor(o.expert_rate), "optimizer": None}
        ends = [round(part * total / PARTS) for part in range(PARTS + 1)]
        for first, last in zip(ends, ends[1:], strict=False):
            make = partial(self._advance, state, first, last, trajectories)
            state = context.once("distilled", make, **settings, end=last)
        return self.examples(state["x"].to(z))

    def examples(self, z: Tensor) -> Tensor:
        """Those that are made from `z`, a constant."""
        with torch.no_grad():
            return self._made(z)

    def _made(self, z: Tensor) -> Tensor:
        return z if self.generator is None else self.generator(z)

    def _advance(self, state: Any, first: int, last: int, trajectories: Tensor | None) -> dict[str, Any]:
        """What is optimised, the step size and the optimiser after iterations `first` to `last`."""
        o, device = self.options, self.real.x.device
        z, rate = (state[k].to(device, copy=True).requires_grad_() for k in ("x", "rate"))
        size = o.image_rate or RATES[o.match]
        groups = [{"params": [z], "lr": size}, {"params": [rate], "lr": size / 10}]
        adam = o.match in ("trajectory", "kernel")
        optimizer = torch.optim.Adam(groups) if adam else torch.optim.SGD(groups, momentum=0.5)
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        for i in range(first, last):
            generator = torch.Generator().manual_seed(self._seed(i))
            minimise(self._losses(z, rate, i, generator, trajectories), optimizer)
            if not bool(z.isfinite().all()):
                raise InputError(
                    f"The examples are not finite after iteration {i + 1}: lower options.image_rate ({size:g})."
                )
        return {"x": z.detach(), "rate": rate.detach(), "optimizer": optimizer.state_dict()}

    def _losses(
        self, z: Tensor, rate: Tensor, i: int, generator: torch.Generator, trajectories: Tensor | None
    ) -> Iterator[Tensor]:
        """The losses of an iteration, each of the examples, or their latents, after the step before."""
        if self.options.match == "gradient":
            return self._gradient(z, self._new_network(i, generator), generator)
        if self.options.match == "distribution":
            return self._distribution(z, self._new_network(i, generator), generator)
        if trajectories is not None:
            return self._trajectory(z, rate, trajectories, generator)
        return self._kernel(z, generator)

    def _gradient(self, z: Tensor, net: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
        o, parameters = self.options, dict[str, Tensor](net.named_parameters())
        for _ in range(o.outer):
            x, distances = self._made(z), []
            for label in range(self.classes):
                own, real = self.labels == label, self.real.of(label).some(o.real_batch, generator)
                wanted = gradients(_mean_loss(net, real.x, real.y), parameters, differentiable=False)
                found = gradients(_mean_loss(net, x[own], self.labels[own]), parameters, differentiable=True)
                distances.append(gradient_distance(found, wanted, metric=o.distance))
            yield torch.stack(distances).sum()
            x = self._made(z).detach()  # after the step
            for _ in range(o.inner):
                parameters = sgd_step(_mean_loss(net, x, self.labels), parameters, o.network_rate)

    def _distribution(self, z: Tensor, net: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
        head = head_name(net, self.classes)
        assert head is not None  # every small network has one
        put_head(net, head, nn.Identity())
        x, distances = self._made(z), []
        for label in range(self.classes):
            real = self.real.of(label).some(self.options.real_batch, generator)
            with torch.no_grad():
                wanted = net(real.x)
            distances.append(mean_distance(net(x[self.labels == label]), wanted))
        yield torch.stack(distances).sum()

    def _trajectory(
        self, z: Tensor, rate: Tensor, trajectories: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        o, net, x = self.options, self._new_network(0, generator), self._made(z)
        expert = int(torch.randint(len(trajectories), (), generator=generator))
        t = int(torch.randint(min(o.latest_start, o.expert_steps - o.span) + 1, (), generator=generator))
        start, target = (trajectories[expert, at].to(x.device) for at in (t, t + o.span))
        shapes = {name: p.shape for name, p in net.named_parameters()}
        parts = start.split([s.numel() for s in shapes.values()])
        parameters = {name: part.view(s) for (name, s), part in zip(shapes.items(), parts, strict=True)}
        end = unrolled_sgd(_mean_loss(net, x, self.labels), parameters, rate, o.student_steps)
        yield trajectory_distance(flat(end), start, target)

    def _kernel(self, z: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        real = self.real.some(self.options.real_batch * self.classes, generator)
        ours = self._made(z).flatten(1)
        bandwidth = ours.shape[1] ** 0.5
        cross, kernel = (gaussian_kernel(a, ours, bandwidth) for a in (real.x.flatten(1), ours))
        wanted, targets = (F.one_hot(y, self.classes) - 1 / self.classes for y in (real.y, self.labels))
        prediction = kernel_ridge_prediction(cross, kernel, targets, self.options.ridge)
        yield kernel_ridge_error(prediction, wanted).mean()

    def _experts(self) -> dict[str, Tensor]:
        """Parameters of networks during training on the data: `flat [experts, expert_steps + 1, parameters]`."""
        found = []
        for expert in range(self.options.experts):
            path = []
            for net, parameters in self._training(expert):
                if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
                    raise InputError(
                        f"Trajectories are of parameters, and {self.network} has batch normalisation, whose statistics are "
                        "none: set options.network to one without, for example mlp:64,64 or circular:32."
                    )
                path.append(flat(parameters))
            found.append(torch.stack(path).cpu())
        return {"flat": torch.stack(found)}

    def _training(self, expert: int) -> Iterator[tuple[nn.Module, Parameters]]:
        """A network that is trained on the data, and its parameters before and after each step."""
        o, generator = self.options, torch.Generator().manual_seed(self._seed(expert))
        net = self._new_network(expert, generator)
        parameters: Parameters = dict(net.named_parameters())
        yield net, parameters
        for _ in range(o.expert_steps):
            real = self.real.some(o.real_batch * self.classes, generator)
            parameters = sgd_step(_mean_loss(net, real.x, real.y), parameters, o.expert_rate)
            yield net, parameters

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
