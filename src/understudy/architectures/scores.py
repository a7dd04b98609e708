"""Scores of a network that needs no training; higher is better. Each is pure: it leaves the network as it is, but for its
weights where it says so."""

from __future__ import annotations

import hashlib
import math
from copy import deepcopy
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy.data import Batch
from understudy.data.batch import UNLABELLED
from understudy.errors import InputError
from understudy.losses.features import channel_similarity_mse, feature_map
from understudy.losses.instances import class_map_mse, similarity_mse
from understudy.models import ClassifierAdapter, find_head
from understudy.models.taps import called_layers, stages

Semantic = Literal["cam", "grad"]
_NORM = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def gaussian_(model: nn.Module, seed: int) -> None:
    """Draw all weights from N(0, 1); biases become 0 and scales 1, whatever they were before."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name:
                parameter.zero_()
            elif parameter.dim() <= 1:  # the scale of a normalisation layer
                parameter.fill_(1)
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(generator=generator))
        if isinstance(module, _NORM):
            module.reset_running_stats()


class _View(NamedTuple):
    """What a score reads of a network: features `[images, channels, height, width]` before pooling, the head's weight
    `[classes, channels]`, and its gradient if requested; in float64."""

    features: Tensor
    head: Tensor
    gradient: Tensor | None


def _view(model: ClassifierAdapter, batch: Batch, gradient: bool) -> _View:
    head = find_head(model)
    if head is None:
        raise InputError(f"{type(model.model).__name__} has no linear head of {model.classes} classes.")
    _batch_statistics(model)
    logits: list[Tensor] = []
    with torch.set_grad_enabled(gradient):
        calls = called_layers(model.model, lambda: logits.append(model.logits(batch)))
    found = stages(calls)
    if not found:
        raise InputError(f"{type(model.model).__name__} has no inner layer with features before its head.")
    features = feature_map([y for module, y in calls if module is found[-1]][-1].detach().double())
    weight: Tensor = head.weight  # type: ignore[assignment]
    slope = None
    if gradient:
        loss = F.cross_entropy(batch.select(logits[0]), batch.row_labels, ignore_index=UNLABELLED)
        slope = torch.autograd.grad(loss, weight)[0].double()
    return _View(features, weight.detach().double(), slope)


def _batch_statistics(model: nn.Module) -> None:
    """Batch normalisation by the batch's own statistics, without dropout."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _NORM):
            module.train()


class TeacherSimilarity:
    """DisWOT: how alike student and teacher see a batch, with random weights on both sides.

    Args:
        teacher: its architecture; its weights are overwritten.
        batch: images with labels, the same for every candidate.
        seed: of the weights, `seed`, `seed + 1`, … for each repeat, the same on both sides.
        repeats: initialisations that a score is the mean of.
        semantic: `cam` compares maps of classes; `grad`, as released, compares gradients of the head's weight, which needs
            heads of one width.

    Raises:
        InputError: fewer than two images, or fewer than two classes.

    Source: Dong et al. 2023 (DisWOT).
    """

    def __init__(
        self, teacher: ClassifierAdapter, batch: Batch, *, seed: int = 0, repeats: int = 3, semantic: Semantic = "cam"
    ) -> None:
        if len(batch.ids) < 2:
            raise InputError(
                f"A score compares images with each other, and the batch has {len(batch.ids)}: two or more."
            )
        if teacher.classes < 2:
            raise InputError("A score compares classes with each other, and the data have one: two or more.")
        self.batch, self.semantic, self.seeds = batch, semantic, range(seed, seed + repeats)
        self.views = [self._seen(teacher, s) for s in self.seeds]

    def _seen(self, model: ClassifierAdapter, seed: int) -> _View:
        gaussian_(model, seed)
        return _view(model, self.batch, self.semantic == "grad")

    def __call__(self, student: ClassifierAdapter) -> dict[str, float | None]:
        """`diswot` = `relation` + `semantic`, 0 at most; `None` where weights of N(0, 1) overflow. The student's weights
        are overwritten."""
        relations, semantics = [], []
        for seed, theirs in zip(self.seeds, self.views, strict=True):
            ours = self._seen(student, seed)
            relations.append(-float(similarity_mse(ours.features.flatten(1), theirs.features.flatten(1)).mean()))
            semantics.append(-_semantic(ours, theirs))
        relation, semantic = math.fsum(relations) / len(relations), math.fsum(semantics) / len(semantics)
        found = {"diswot": relation + semantic, "relation": relation, "semantic": semantic}
        return {name: _finite(value) for name, value in found.items()}


def _semantic(ours: _View, theirs: _View) -> float:
    if ours.gradient is not None and theirs.gradient is not None:
        if ours.gradient.shape[1] != theirs.gradient.shape[1]:
            raise InputError(
                f"The head reads {ours.gradient.shape[1]} channels and the teacher's {theirs.gradient.shape[1]}: `grad` needs "
                "one width, `cam` does not"
            )
        pair = (g[..., None, None] for g in (ours.gradient, theirs.gradient))
        return float(channel_similarity_mse(*pair).mean())
    heads = {"student_head": ours.head, "teacher_head": theirs.head}
    return float(class_map_mse(ours.features, theirs.features, **heads)[0])


def synflow_score(model: nn.Module, shape: tuple[int, ...]) -> float | None:
    """log Σ |w ∂R/∂w| with R the sum of the logits of an image of ones, all weights taken by magnitude.

    Source: Tanaka et al. 2020 (SynFlow), as a score by Abdelfattah et al. 2021.
    """
    positive = deepcopy(model).double().eval()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
    weights = [p for p in positive.parameters() if p.requires_grad]
    total = positive(torch.ones(1, *shape, dtype=torch.float64)).sum()
    slopes = torch.autograd.grad(total, weights, allow_unused=True)
    value = sum(float((w.detach() * g).abs().sum()) for w, g in zip(weights, slopes, strict=True) if g is not None)
    return _finite(math.log(value)) if value > 0 else None


def jacobian_score(model: nn.Module, pixels: Tensor) -> float | None:
    """−Σ (log(λ + k) + 1 / (λ + k)) over the eigenvalues λ of the correlations among images of the gradients of the summed
    logits, with k = 1e−5: high where images are told apart.

    Args:
        pixels: `[images, channels, height, width]`, as the network is shown them.

    Source: Mellor et al. 2020 (NASWOT, first version).
    """
    _batch_statistics(model)
    images = pixels.detach().clone().requires_grad_()
    (slopes,) = torch.autograd.grad(model(images).sum(), images)
    correlation = torch.corrcoef(slopes.flatten(1).double())
    if not bool(correlation.isfinite().all()):
        return None
    shifted = torch.linalg.eigvalsh(correlation).clamp(min=0) + 1e-5
    return _finite(-float((shifted.log() + 1 / shifted).sum()))


def random_score(name: str, seed: int) -> float:
    """A number from 0 to 1 that depends on the name and seed alone."""
    return int(hashlib.sha256(f"{seed} {name}".encode()).hexdigest()[:12], 16) / 16**12


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
