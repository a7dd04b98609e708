"""A student that is read by its teacher's head: the last map of the student's network, a transfer block, and the head.

Its folder holds the block and the head, and in `body` the student's network in its own format.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models.adapters import ClassifierAdapter, ModelOutput, find_head
from understudy.models.heads import head_name
from understudy.models.modes import evaluating
from understudy.models.small import load_weights
from understudy.models.taps import called_layers
from understudy.models.weights import read_object, save_network, write_model

TRANSFER = "understudy_transfer"
"""Key of `config.json` that describes the block and the head."""
BODY = "body"


class Facts(BaseModel):
    """What `config.json` says of a `TransferClassifier`.

    Args:
        layer: name of the layer of the body whose output is its last map; `None`: what the body's own head reads.
        inputs, outputs: channels of the map, and of the teacher's. factor: by which the block is narrower inside.
        classes, bias: of the head. grid: height and width that the map is pooled to; `None` leaves it as it is.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    layer: str | None
    inputs: PositiveInt
    outputs: PositiveInt
    factor: PositiveInt
    classes: PositiveInt
    bias: bool
    grid: tuple[PositiveInt, PositiveInt] | None = None


class _BatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the running statistics where a channel has a single value in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[1]:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class TransferBlock(nn.Sequential):
    """Three convolutions of 1 × 1, 3 × 3 and 1 × 1, each with batch normalisation and ReLU: the student's channels become
    the teacher's.

    Args:
        inputs, outputs: channels. factor: the first two have `outputs / factor` channels.

    Source: Chen et al. 2022 (SimKD), as Tang et al. 2023 (KD³) use it.
    """

    def __init__(self, inputs: int, outputs: int, factor: int = 2) -> None:
        inner, layers = max(1, outputs // factor), []
        for a, b, size in ((inputs, inner, 1), (inner, inner, 3), (inner, outputs, 1)):
            layers += [nn.Conv2d(a, b, size, padding=size // 2, bias=False), _BatchNorm(b), nn.ReLU()]
        super().__init__(*layers)


class TransferClassifier(nn.Module):
    """A classifier: head(mean over positions of transfer(last map of the body)). The body's own head is not used.

    Args:
        body: the student's network. facts: how its map is found, and the sizes of block and head.
    """

    def __init__(self, body: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.facts, self.body = facts, body
        self.map = nn.Identity()  # the body's last map passes here, to be read
        self.transfer = TransferBlock(facts.inputs, facts.outputs, facts.factor)
        self.head = nn.Linear(facts.outputs, facts.classes, facts.bias)

    @property
    def understudy(self) -> dict[str, Any]:
        """What a small network says about the pixels that it reads."""
        return {"classes": self.facts.classes, "normalise": self.body.understudy["normalise"]}  # type: ignore[index]

    @property
    def config(self) -> Any:
        """The configuration of a body from transformers."""
        return self.body.config

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `[images, classes]`."""
        features = self.map(self._last_map(pixels))
        if self.facts.grid is not None:
            features = F.adaptive_avg_pool2d(features, self.facts.grid)
        logits: Tensor = self.head(self.transfer(features).mean((2, 3)))
        return logits

    def _last_map(self, pixels: Tensor) -> Tensor:
        seen: list[Any] = []
        if self.facts.layer is not None:
            layer = self.body.get_submodule(self.facts.layer)
            hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        else:
            head = self.body.get_submodule(head_name(self.body, self.facts.classes) or "")
            hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
        try:
            self.body(pixels)
        finally:
            hook.remove()
        found: Tensor = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
        return found if found.dim() == 4 else found[:, :, None, None]

    def save_pretrained(self, folder: str, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the body to `folder/body`, and block and head beside it."""
        state = self.state_dict() if state_dict is None else state_dict
        prefix = f"{BODY}."
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        save_network(self.body, Path(folder) / BODY, None if state_dict is None else inside)
        own = {k: v for k, v in state.items() if not k.startswith(prefix)}
        write_model(self, Path(folder), {TRANSFER: self.facts.model_dump()}, own)


def read_facts(folder: Path) -> Facts:
    """The facts in the folder of a `TransferClassifier`.

    Raises:
        InputError: they describe none.
    """
    file = folder / "config.json"
    try:
        given = read_object(file)[TRANSFER]
        return Facts.model_validate({**given, "grid": given["grid"] and tuple(given["grid"])})
    except (ValidationError, TypeError, KeyError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "keys are missing"
        raise InputError(f"{file} describes no student with a teacher's head: {said}.") from None


def load_transfer(folder: Path, body: nn.Module) -> TransferClassifier:
    """Read what `TransferClassifier.save_pretrained` wrote, around the body, which is loaded already.

    Raises:
        InputError: the folder does not describe one, or its weights are others.
    """
    model = TransferClassifier(body, read_facts(folder))
    load_weights(nn.ModuleDict({"transfer": model.transfer, "head": model.head}), folder / "model.safetensors")
    return model


def read_by_teacher(
    student: ClassifierAdapter, teacher: ClassifierAdapter, batch: Batch, *, factor: int = 2, seed: int = 0
) -> None:
    """Make the student's model a `TransferClassifier` with a copy of the teacher's head, in place.

    The head and the student's own one are frozen; the block's weights depend on `seed` alone.

    Args:
        batch: examples, on which last maps are looked for and measured.

    Raises:
        InputError: the teacher's head is not one linear layer, the student has none or has adapters, or the numbers of
            classes differ.
    """
    if student.classes != teacher.classes:
        raise InputError(
            f"The student has {student.classes} classes and the teacher {teacher.classes}: a shared head needs the same."
        )
    if hasattr(student.model, "peft_config"):
        raise InputError("A student with adapters cannot get another head, for adapters would not save it: drop peft.")
    heads = {"student": find_head(student), "teacher": find_head(teacher)}
    for side, found in heads.items():
        if type(found) is not nn.Linear:
            raise InputError(
                f"The {side} has {'no linear layer' if found is None else f'a {type(found).__name__}'} as its head: one linear "
                "layer is needed, for the student is read by the teacher's."
            )
    head, own = heads["teacher"], heads["student"]
    assert isinstance(head, nn.Linear) and own is not None
    (layer, ours), (_, theirs) = last_map(student, batch), last_map(teacher, batch)
    smaller = tuple(min(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))
    facts = Facts(
        layer=layer,
        inputs=ours[0],
        outputs=theirs[0],
        factor=factor,
        classes=head.out_features,
        bias=head.bias is not None,
        grid=(smaller[0], smaller[1]) if smaller != ours[1:] else None,
    )
    weight = next(student.parameters())
    own.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed + 1) * 1_000_003)  # another stream than that of the body
        model = TransferClassifier(student.model, facts)
    model.head = copy.deepcopy(head)
    for part in (model.transfer, model.head):
        part.to(weight.device, weight.dtype)
    model.head.requires_grad_(False)
    student.model = model


@torch.no_grad()
def last_map(rows: ClassifierAdapter, batch: Batch) -> tuple[str | None, tuple[int, ...]]:
    """The name of the layer whose output, averaged over positions, is what a classifier's head reads, and the shape
    `(channels, height, width)` of its output.

    `None` without such a layer, for heads that read a vector: it is a map of one position.
    """
    seen: list[ModelOutput] = []
    batch = batch.to(next(rows.parameters()).device)
    with evaluating(rows):
        calls = called_layers(rows.model, lambda: seen.append(rows(batch, features=True)))
    assert seen[0].features is not None
    read = seen[0].features.float()
    names = {id(module): name for name, module in rows.model.named_modules()}
    found: tuple[str | None, tuple[int, ...]] = None, (read.shape[-1], 1, 1)
    for module, y in calls:
        if y.dim() == 4 and y.shape[1] == read.shape[-1] and y.shape[2:].numel() > 1 and names[id(module)]:
            mean = batch.select(y.float().mean((2, 3)))
            if mean.shape == read.shape and torch.allclose(mean, read, rtol=1e-3, atol=1e-5):
                found = names[id(module)], tuple(y.shape[1:])
    return found
