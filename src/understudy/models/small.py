"""Small networks for the built-in tasks, and their folder format: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from understudy.errors import InputError
from understudy.models.fusion import Fusion
from understudy.models.heads import MixtureHead, SubclassHead, head_name, put_head
from understudy.models.networks import graph_network, has_options, read_options
from understudy.models.weights import read_object, reason, write_model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class MLP(nn.Module):
    """Fully connected network on flattened pixels, or on the features of a node. Dropout applies to the hidden units."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        widths = (inputs, *hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(a, b), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


class ConvNet(nn.Module):
    """Three convolution blocks with batch normalisation, average pooling and a linear head."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        widths = (channels, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


class StagedConvNet(nn.Module):
    """Stages of convolutions with batch normalisation, halved in size between stages, average pooling and a linear head.

    Args:
        stages: width, number of convolutions and kernel size of each.
        skip: add its input to a convolution's output where both have one width.
    """

    def __init__(self, channels: int, stages: list[tuple[int, int, int]], classes: int, skip: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (width, depth, kernel) in enumerate(stages):
            if not (width and depth and kernel % 2):
                raise InputError(
                    f"A stage of width {width}, depth {depth} and kernel {kernel}: both must be 1 or more, and the kernel odd."
                )
            layers += [nn.MaxPool2d(2)] if i else []
            for inputs in (channels, *[width] * (depth - 1)):
                layers.append(_Convolution(inputs, width, kernel, skip))
            channels = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


class _Convolution(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, skip: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.skip = skip and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return x + y if self.skip else y


class Circular(nn.Module):
    """Three convolutions with circular padding, and a linear head on the maximum of each channel.

    It is invariant to circular shifts of the input. With `flat` the head reads every position, and it is not.
    """

    def __init__(self, shape: tuple[int, ...], width: int, classes: int, flat: bool = False) -> None:
        super().__init__()
        channels, high, wide = shape
        tall, long = (min(5, side - 1 + side % 2) for side in (high, wide))  # odd, no larger than the input
        size: dict[str, Any] = {"kernel_size": (tall, long), "padding": (tall // 2, long // 2)}
        layers: list[nn.Module] = []
        for inputs in (channels, width, width):
            layers += [nn.Conv2d(inputs, width, **size, padding_mode="circular"), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Identity() if flat else nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(width * high * wide if flat else width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad, self.changes = (outputs - inputs) // 2, inputs != outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.changes:  # the parameter-free shortcut "A": every second pixel, channels padded with zeros
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2015, Section 4.2, depth 6n + 2, with shortcut A."""

    def __init__(self, depth: int, classes: int, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"resnet{depth}: the depth of a CIFAR ResNet is 6n + 2, for example 8, 14, 20 or 56.")
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(n, width, width)
        self.layer2 = self._stage(n, width, 2 * width)
        self.layer3 = self._stage(n, 2 * width, 4 * width)
        self.linear = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(n: int, inputs: int, outputs: int) -> nn.Sequential:
        first = _Block(inputs, outputs, 1 if inputs == outputs else 2)
        return nn.Sequential(first, *(_Block(outputs, outputs, 1) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def is_small(name: str) -> bool:
    """Whether `name` is a small network: `mlp:64,64`, `mlp:hidden=64,layers=3,dropout=0.5`, `convnet:16`, `resnet20`,
    `resnet20:8` (width 8), `cnn:8x1k3,16x2k5,skip` (stages of width x depth k kernel, with skip connections),
    `circular:32`, `circular:32,flat`, `fusion:24,32` (for several inputs), or a graph network (`gcn`, `sage`, `gat`, with
    options like the MLP's)."""
    known = r"(mlp|fusion)(:\d+(,\d+)*)?|convnet(:\d+)?|resnet\d+(:\d+)?|circular:\d+(,flat)?|cnn:\d+x\d+k\d+(,\d+x\d+k\d+)*(,skip)?"
    return re.fullmatch(known, name) is not None or has_options(name)


def build_small(name: str, classes: int, shape: tuple[Any, ...]) -> nn.Module:
    """A new small network for images of `shape` (channels, height, width), or nodes of `shape` (features,); a fusion for
    inputs of several such shapes.

    It stores the settings to build it again.
    """
    kind, _, rest = name.partition(":")
    several = isinstance(shape[0], Sequence)
    if (kind == "fusion") != several:
        raise InputError(
            f"{name!r} reads {'several inputs' if kind == 'fusion' else 'one input'}, and it is given those of shape "
            f"{list(shape)}: choose fusion for several modalities, and another network for one."
        )
    if has_options(name):
        model: nn.Module = _with_options(name, classes, shape)
    elif kind == "mlp":
        hidden = tuple(int(v) for v in rest.split(",")) if rest else (64,)
        model = MLP(torch.Size(shape).numel(), hidden, classes)
    elif kind == "fusion":
        widths = tuple(int(v) for v in rest.split(",")) if rest else (32, 64)
        model = Fusion(shape, widths[0], widths[1:], classes)
    elif kind == "convnet":
        model = ConvNet(shape[0], int(rest or 16), classes)
    elif kind == "cnn":
        stages = [(int(w), int(d), int(k)) for w, d, k in re.findall(r"(\d+)x(\d+)k(\d+)", rest)]
        model = StagedConvNet(shape[0], stages, classes, rest.endswith(",skip"))
    elif kind == "circular":
        width, _, flat = rest.partition(",")
        model = Circular(shape, int(width), classes, bool(flat))
    else:
        model = ResNet(int(kind.removeprefix("resnet")), classes, shape[0], int(rest or 16))
    colour = kind.startswith("resnet") and shape[0] == 3
    model.understudy = {  # type: ignore[assignment]
        "understudy_model": name,
        "classes": classes,
        "shape": [sum(torch.Size(s).numel() for s in shape)] if several else list(shape),
        "inputs": [list(s) for s in shape] if several else None,
        "normalise": [list(v) for v in IMAGENET] if colour else None,
    }
    return model


def _with_options(name: str, classes: int, shape: tuple[int, ...]) -> nn.Module:
    kind, options = read_options(name)
    if kind != "mlp":
        return graph_network(kind, options, classes, shape)
    hidden = (options["hidden"],) * (options["layers"] - 1)
    return MLP(torch.Size(shape).numel(), hidden, classes, options["dropout"])


def normalisation(model: nn.Module) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of the pixels that a small network expects."""
    facts: dict[str, Any] | None = getattr(model, "understudy", None)
    return tuple(facts["normalise"]) if facts and facts["normalise"] else None  # type: ignore[return-value]


def save_small(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write `config.json` and `model.safetensors`, with the model's state or the given `state`."""
    facts: Any = model.understudy
    write_model(model, folder, facts, state)


_Share = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[FiniteFloat, Field(gt=0)]


class Facts(BaseModel):
    """The content of `config.json` of a small network."""

    model_config = ConfigDict(strict=True, extra="ignore")

    understudy_model: str
    classes: int = Field(ge=0)
    shape: list[PositiveInt] = Field(min_length=1)
    inputs: list[list[PositiveInt]] | None = Field(None, min_length=1)
    normalise: tuple[list[FiniteFloat], list[FiniteFloat]] | None = None
    subclasses: int | None = Field(None, ge=1)
    mixture: tuple[_Share, _Positive] | tuple[_Share, _Positive, _Positive] | None = None
    labels: list[str] | None = None

    @classmethod
    def read(cls, file: Path) -> Facts:
        """Read a file; invalid content is an `InputError` of one line."""
        try:
            return cls.model_validate_json(json.dumps(read_object(file)))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(f"{file} describes no network: {where}: {first['msg']}.") from None


def load_small(folder: Path) -> nn.Module:
    """Load a small network that a run trained, such as `convnet:16` or the MLP of a graph, in training mode.

    Args:
        folder: of the student, with `config.json` and `model.safetensors`.

    Returns:
        A module that maps a batch of inputs to logits `[examples, classes]`.

    Raises:
        InputError: the folder holds none, or is damaged.
    """
    facts = Facts.read(folder / "config.json")
    try:
        if not is_small(facts.understudy_model):
            raise InputError(f"no small network is called {facts.understudy_model!r}")
        model = build_small(facts.understudy_model, facts.classes, tuple(facts.inputs or facts.shape))
        name = head_name(model, facts.classes)
        if facts.subclasses is not None and name is not None:
            inputs = model.get_submodule(name).in_features
            put_head(model, name, SubclassHead(inputs, facts.classes, facts.subclasses))  # type: ignore[arg-type]
            model.understudy["subclasses"] = facts.subclasses  # type: ignore[index,operator]
        elif facts.mixture is not None and name is not None:
            inputs = model.get_submodule(name).in_features
            scale = facts.mixture[2] if len(facts.mixture) == 3 else None
            mixed = MixtureHead(inputs, facts.classes, *facts.mixture[:2], scale=scale)  # type: ignore[arg-type]
            put_head(model, name, mixed)
            model.understudy["mixture"] = list(facts.mixture)  # type: ignore[index,operator,assignment]
    except (ValueError, RuntimeError, MemoryError, OverflowError, IndexError, ZeroDivisionError) as error:
        # invalid sizes, or sizes beyond the memory
        raise InputError(f"{folder / 'config.json'} describes no network: {reason(error)}") from None
    if facts.normalise is not None:
        mean, deviation = facts.normalise
        if not len(mean) == len(deviation) == facts.shape[0] or not all(d > 0 for d in deviation):
            raise InputError(
                f"{folder / 'config.json'}: normalise must hold a mean and a deviation above 0 for each of {facts.shape[0]} "
                "channels."
            )
    model.understudy["normalise"] = list(facts.normalise) if facts.normalise is not None else None  # type: ignore[index,operator,assignment]
    if facts.labels is not None:
        model.understudy["labels"] = facts.labels  # type: ignore[index,operator,assignment]
    load_weights(model, folder / "model.safetensors")
    return model


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file; a damaged file or one of another model is an `InputError` of one line."""
    try:
        state = load_file(str(file))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # the last two: a damaged header
        raise InputError(f"Weights {file} cannot be read: {reason(error)}") from error
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    other = [k for k in shapes if k in state and tuple(state[k].shape) != shapes[k]]
    if other:
        key = other[0]
        raise InputError(
            f"Weights {file} do not fit the network: {key} has shape {list(state[key].shape)} in the file and "
            f"{list(shapes[key])} in the network."
        )
    wrong = model.load_state_dict(state, strict=False)
    missing = [k for k in wrong.missing_keys if not k.endswith("num_batches_tracked")]
    if missing or wrong.unexpected_keys:
        names = ", ".join((missing + wrong.unexpected_keys)[:3])
        raise InputError(f"Weights {file} do not fit the network: {names} missing or unexpected.")
