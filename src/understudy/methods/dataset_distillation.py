"""37. Knowledge Distillation and Dataset Distillation of Large Language Models: Emerging Trends (2025).

A few synthetic examples x_S of each class are optimised so that training on them does what training on the data T does:

gradient (DC):      Σ_c D(∇L(x_S, c), ∇L(x_T, c)) at random networks, and along their training on x_S
distribution (DM):  Σ_c ‖mean φ(x_S, c) − mean φ(x_T, c)‖², φ a random network without its head
trajectory (MTT):   ‖θ_n − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖², θ_n: n steps on x_S from an expert's θ*_t, step size learned
kernel (KIP):       mean ½ ‖y_T − K_TS (K_SS + λ I)⁻¹ y_S‖²

Then the student trains on them: (1 − α) CE + α τ² KL(teacher_τ ‖ student_τ).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from understudy.data import Batch
from understudy.data.image_files import write_image_split
from understudy.data.image_set import ImageSet
from understudy.errors import InputError
from understudy.evaluation.pictures import picture_grid
from understudy.files import COMPLETE, seal
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.matching import (
    gaussian_kernel,
    gradient_distance,
    kernel_ridge_error,
    kernel_ridge_prediction,
    mean_distance,
    trajectory_distance,
)
from understudy.models import ModelOutput
from understudy.models.fitting import minimise
from understudy.models.heads import head_name, put_head
from understudy.models.small import build_small, is_small
from understudy.streaming import rowwise
from understudy.streaming.plain import logits_of
from understudy.targets import Dense
from understudy.teachers import LocalTeacher
from understudy.training import Method, Phase, Requirements, SetupContext, Term, TrainState
from understudy.training.unrolled import Parameters, flat, gradients, sgd_step, unrolled_sgd

log = logging.getLogger(__name__)

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


class DatasetDistillation(Method):
    """A few synthetic images of each class, optimised to train networks like all the data, and a student of them."""

    name = "dataset-distillation"
    paper = 37
    kinds = frozenset({"image"})
    cost = (
        "as kd, on the few images; once, `iterations` of matching: gradient takes a forward and a double backward of a network "
        "on real_batch images of each class, distribution a forward of them, trajectory `student_steps` differentiable steps "
        "and the experts' training and memory (experts · expert_steps · parameters), kernel a ridge regression"
    )
    page: ClassVar[dict[str, str]] = {
        "when": "Many networks are to be trained on the same data, or data must be small to be kept or sent: search over "
        "architectures, continual learning. A teacher's soft labels (`alpha`) add to any of the matchings. "
        "`match=random` is the baseline: real images of the same number. The set is an ordinary data set: "
        "`data.name=FOLDER`, with the folder that the report names, trains any other student on it.",
        "not": "When one network is to be trained: synthesis costs more than that. With more than some tens of images a class, "
        "selection (data-pruning-kd) is as good and cheaper. Text is discrete, and embeddings that are optimised lie off its "
        "manifold: for text see frontier-synthetic.",
        "deviations": "A survey: the methods are those of the works it reviews, with step sizes that suit small data (the "
        "released ones are 0.1 for gradient, 1 for distribution, 1000 without Adam for trajectory, and 1,000 to 20,000 "
        "iterations). Too large a step size makes gradient matching worse than random images, as the cosine does not see "
        "norms: watch `distilled_norm` beside `initial_norm`. Kernel is Gaussian with labels held fixed. Batch normalisation has "
        "statistics of real images; trajectory needs a network without it. No augmentation during matching. Results do not carry "
        "over to every network: `others` trains fresh ones on the images.",
    }

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
    alpha: float = Field(1.0, ge=0, le=1, description="α, weight of the teacher's soft labels.")
    temperature: float = Field(4.0, gt=0, description="τ of both sides.")
    others: tuple[str, ...] = Field(("mlp:64,64",), description="Small networks that are trained afresh on the images.")
    evaluations: int = Field(5, ge=1, description="Fresh networks of each kind.")

    @property
    def requires(self) -> Requirements:
        taught = self.alpha > 0
        return Requirements(teacher="outputs" if taught else "none", teacher_model=taught, temperature=self.temperature)

    def phases(self) -> Sequence[Phase]:
        return (Phase("distilled", split="distilled"),)

    # -- the images ---------------------------------------------------------------------------------------------------

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        if self.match == "trajectory" and self.span >= self.expert_steps:
            raise InputError(
                f"options.span={self.span} steps of an expert are matched and options.expert_steps={self.expert_steps} are "
                "made: make more, or match fewer."
            )
        raw = _labelled(context, "train", every=True)
        mean, deviation = raw.x.mean(), raw.x.std().clamp(min=1e-8)
        real = Examples((raw.x - mean) / deviation, raw.y)
        start = self._initial(context, real)
        name = self._network_name(context)
        asked = self.model_dump(exclude={"alpha", "temperature", "others", "evaluations"})
        settings = {**asked, "network": name, "seed": context.seed}
        matching = Matching(self, real, start.y, context.classes, name, context.seed)
        x = matching.run(start.x, context, settings).to(real.x)
        pixels = (x * deviation + mean).float().cpu()
        labels = start.y.cpu()
        made = ImageSet(pixels, labels, torch.arange(len(labels)))
        context.splits["distilled"] = made
        tables = {"x": x, "labels": start.y, "mean": mean, "deviation": deviation, "initial": start.x}
        if self.alpha:
            teacher = LocalTeacher(context.live_teacher(), "teacher", freeze=False)
            batch = Batch.from_dict(context.collate([made[i] for i in range(len(made))])).to(real.x.device)
            tables["teacher_logits"] = logits_of(teacher(batch).signal).detach()
        self._save(context, made, tables, _folder(context, settings))
        return tables

    def _initial(self, context: SetupContext, real: Examples) -> Examples:
        """`per_class` images of each class, in the order of the classes."""
        parts = []
        generator = torch.Generator().manual_seed(context.seed)
        for label in range(context.classes):
            own = real.of(label)
            needed = self.per_class if self.initial == "real" else 1
            if len(own.y) < needed:
                raise InputError(
                    f"Class {label} has {len(own.y)} training images and options.per_class={self.per_class} starts from as "
                    "many: lower it, give the class more, or set options.initial=noise, which needs one."
                )
            parts.append(own.some(self.per_class, generator).x)
            if self.initial == "noise":
                shape = (self.per_class, *real.x.shape[1:])
                parts[-1] = torch.randn(shape, generator=generator).to(real.x)
        labels = torch.arange(context.classes, device=real.y.device).repeat_interleave(self.per_class)
        return Examples(torch.cat(parts), labels)

    def _network_name(self, context: SetupContext) -> str:
        model: Any = getattr(context.student, "model", None)
        name = self.network or getattr(model, "understudy", {}).get("understudy_model", "")
        if not is_small(name) or name.startswith(("gcn", "sage", "gat")):
            raise InputError(
                f"Images are matched in new small networks and {name or type(model).__name__!r} is none: set options.network "
                "to one, for example convnet:32 or mlp:64,64."
            )
        return str(name)

    def _save(self, context: SetupContext, made: ImageSet, tables: Mapping[str, Tensor], folder: Path) -> None:
        """Write the images, with the validation and test examples, as a data set that `data.name` reads."""
        if (folder / COMPLETE).is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        more = {k: tables[k].cpu().numpy() for k in ("teacher_logits",) if k in tables}
        write_image_split(folder / "train.npz", made.pixels, made.labels, **more)
        for split in ("validation", "test"):
            write_image_split(folder / f"{split}.npz", *(v.cpu() for v in _labelled(context, split)))
        seal(folder)
        log.info("The distilled images are a data set: data.name=%s", folder)

    # -- the student --------------------------------------------------------------------------------------------------

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        signal = teacher.signal if teacher is not None else None
        return self._terms(student.signal, signal, batch.row_labels)

    def _terms(self, student: Any, teacher: Any, labels: Tensor) -> dict[str, Term]:
        terms = {}
        if self.alpha:
            kd = rowwise(forward_kl, student, teacher, temperature=self.temperature, tau_squared=True)
            terms["kd"] = Term(kd, self.alpha)
        if self.alpha < 1:
            terms["ce"] = Term(rowwise(cross_entropy, student, None, labels), 1 - self.alpha)
        return terms

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """The images, their norms, and what fresh networks reach that are trained on them."""
        x, initial, pixels = state.tables["x"], state.tables["initial"], context.splits["distilled"].pixels
        metrics = {
            "distilled_images": float(len(x)),
            "initial_norm": float(initial.flatten(1).norm(dim=1).mean()),
            "distilled_norm": float(x.flatten(1).norm(dim=1).mean()),
        }
        rows = []
        for name in self.others:
            found = [self._fresh(name, state.tables, context, n) for n in range(self.evaluations)]
            metrics[f"fresh_accuracy_{name}"] = sum(found) / len(found)
            rows.append([name, f"{sum(found) / len(found):.4f}", f"{min(found):.4f} to {max(found):.4f}", len(found)])
        shown = [row[:12] for row in pixels.split(self.per_class)]
        headings = ["network", "accuracy", "range", "networks"]
        table = {"title": "Fresh networks, trained on the distilled images", "headings": headings, "rows": rows}
        return {
            "metrics": metrics,
            "pictures": {"Distilled images, a row for each class": picture_grid(shown)},
            "tables": [table] if rows else [],
        }

    def _fresh(self, name: str, tables: Mapping[str, Tensor], context: SetupContext, number: int) -> float:
        """Accuracy of a new network after 300 steps on all the images."""
        if not is_small(name):
            raise InputError(
                f"options.others has {name!r}, and a small network is meant: mlp:64,64, convnet:32, resnet8."
            )
        x, labels = tables["x"], tables["labels"]
        net = _new(name, context.classes, tuple(x.shape[1:]), context.seed + 1000 * (number + 1)).to(x.device).train()
        signal = Dense(tables["teacher_logits"]) if self.alpha else None
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

        def losses() -> Iterator[Tensor]:
            for _ in range(300):
                terms = self._terms(Dense(net(x)), signal, labels)
                yield torch.stack([t.weight * t.values.mean() for t in terms.values()]).sum()

        minimise(losses(), optimizer)
        net.eval()
        real = _labelled(context, context.eval_split)
        with torch.no_grad():
            parts = ((real.x - tables["mean"]) / tables["deviation"]).split(256)
            return float((torch.cat([net(part) for part in parts]).argmax(1) == real.y).double().mean())


class Matching:
    """The optimisation of images by one of the matchings.

    Args:
        options: of the method. real: the data. labels: of the images. network: name of a small network. seed: of the run.
    """

    def __init__(
        self, options: DatasetDistillation, real: Examples, labels: Tensor, classes: int, network: str, seed: int
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
        net = _new(self.network, self.classes, tuple(self.real.x.shape[1:]), self._seed(number)).to(self.real.x.device)
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = None  # an average over all batches: here of one
        if norms:
            with torch.no_grad():
                net.train()(self.real.some(self.options.real_batch, generator).x)
        return net.eval().requires_grad_(False)


def _new(name: str, classes: int, shape: tuple[int, ...], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_small(name, classes, shape)


def _mean_loss(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[Parameters], Tensor]:
    """Mean cross-entropy of examples as a function of the network's parameters."""
    return lambda parameters: cross_entropy(functional_call(net, dict(parameters), (x,)), y).mean()


def _labelled(context: SetupContext, split: str, every: bool = False) -> Examples:
    """Pixels and classes of the labelled examples of a split.

    Args:
        every: whether an example without a label is an error.
    """
    pairs = [(batch.inputs["pixel_values"], batch.labels) for batch in context.batches(split)]
    x, y = (torch.cat(column) for column in zip(*pairs, strict=True))
    if every and bool((y < 0).any()):
        raise InputError(
            f"Training example {int((y < 0).nonzero()[0, 0])} has no label, and images are made for each class: leave it out."
        )
    return Examples(x[y >= 0], y[y >= 0])


def _folder(context: SetupContext, settings: Mapping[str, Any]) -> Path:
    """Where the images are kept as a data set."""
    asked = hashlib.sha256(json.dumps([context.key, settings], sort_keys=True, default=str).encode()).hexdigest()
    return context.store / f"distilled-set-{asked[:16]}"
