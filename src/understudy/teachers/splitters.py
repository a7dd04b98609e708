"""Methods that split classes into subclasses, with one interface: `fit` to embeddings once, `assign` to any rows.

A fit is a dict of tensors, so that it can be stored. LELP's linear projections are one of them; the baselines are
clusters, a random split and known subclasses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.data.noise import uniform
from understudy.errors import InputError
from understudy.losses.subclasses import (
    principal_directions,
    projections,
    random_rotations,
    subclass_log_probs,
)

Tables = Mapping[str, Tensor]


class Known(NamedTuple):
    """The data that a split is fitted to.

    Args:
        features: `[rows, width]`, the teacher's.
        labels, ids: `[rows]`.
        parts: `[rows, 2]`, the true class and subclass of each; `None` if the data do not have them.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor
    parts: Tensor | None = None


class Shape(NamedTuple):
    """Settings of a split: the numbers, the seed, and whether LELP's directions are rotated and scaled."""

    classes: int
    subclasses: int
    seed: int = 0
    projector: Tensor | None = None
    strict: bool = True
    rotate: bool = True
    normalise: bool = True


class Splitter(NamedTuple):
    """`fit(known, shape)` returns tables with at least `subclasses`; `assign(features, ids, tables, beta)` returns log
    r(s | c, x) `[rows, classes, subclasses]`."""

    fit: Callable[[Known, Shape], dict[str, Tensor]]
    assign: Callable[[Tensor, Tensor, Tables, float], Tensor]


def _fit_linear(known: Known, shape: Shape) -> dict[str, Tensor]:
    found = principal_directions(
        known.features,
        known.labels,
        classes=shape.classes,
        subclasses=shape.subclasses,
        projector=shape.projector,
        strict=shape.strict,
    )
    number = found.directions.shape[1]
    directions = found.directions
    if shape.rotate:
        directions = random_rotations(shape.classes, number, seed=shape.seed).to(directions) @ directions
    scale = found.scale if shape.normalise else (found.scale > 0).to(found.scale)  # 0 means uniform
    return {"subclasses": torch.tensor(number), "means": found.means, "directions": directions, "scale": scale}


def _assign_linear(features: Tensor, ids: Tensor, tables: Tables, beta: float) -> Tensor:
    scores = projections(features, tables["means"], tables["directions"])
    return subclass_log_probs(scores, beta=beta, scale=tables["scale"])


def _fit_kmeans(known: Known, shape: Shape) -> dict[str, Tensor]:
    """k-means centres of each class, and the mean squared distance of its examples to them."""
    from sklearn.cluster import KMeans

    centres, scales = [], []
    x = known.features.double() if shape.projector is None else known.features.double() @ shape.projector
    for c in range(shape.classes):
        own = x[known.labels == c]
        distinct = len(own.unique(dim=0))
        if distinct < shape.subclasses:
            raise InputError(
                f"kmeans: class {c} has {distinct} distinct embeddings and cannot be split into {shape.subclasses}: "
                "choose fewer subclasses."
            )
        found = KMeans(shape.subclasses, n_init=10, random_state=shape.seed).fit(own.cpu().numpy())
        centres.append(torch.from_numpy(found.cluster_centers_))
        scales.append(found.inertia_ / len(own))
    scale = torch.tensor(scales, dtype=torch.float64)
    return {"subclasses": torch.tensor(shape.subclasses), "centres": torch.stack(centres), "scale": scale}


def _closeness(features: Tensor, tables: Tables) -> Tensor:
    return (
        -torch.cdist(features.double(), tables["centres"].flatten(0, 1))
        .square()
        .unflatten(1, tables["centres"].shape[:2])
    )


def _assign_nearest(features: Tensor, ids: Tensor, tables: Tables, beta: float) -> Tensor:
    return one_hot_log(_closeness(features, tables).argmax(-1), int(tables["subclasses"]))


def _assign_soft(features: Tensor, ids: Tensor, tables: Tables, beta: float) -> Tensor:
    """Softmax of −‖h − centre‖² / (β · the class's mean of it)."""
    return subclass_log_probs(_closeness(features, tables), beta=beta, scale=tables["scale"])


def _fit_random(known: Known, shape: Shape) -> dict[str, Tensor]:
    numbers = {"subclasses": shape.subclasses, "classes": shape.classes, "seed": shape.seed}
    return {name: torch.tensor(value) for name, value in numbers.items()}


def _assign_random(features: Tensor, ids: Tensor, tables: Tables, beta: float) -> Tensor:
    """A random draw that depends on the example's id alone: a control with the same outputs and no information."""
    number = int(tables["subclasses"])
    draw = uniform(ids, (int(tables["classes"]),), seed=int(tables["seed"]), step=0, stream=6)
    return one_hot_log((draw * number).long(), number)


def _fit_oracle(known: Known, shape: Shape) -> dict[str, Tensor]:
    if known.parts is None:
        raise InputError(
            "oracle: the data tells no subclasses. Choose data that does (data.name=subclusters), or coarser classes of "
            "finer labels (data.modulo, data.label_map)."
        )
    class_of, fine = known.parts.unbind(1)
    part_of = torch.zeros_like(fine)
    for c in range(shape.classes):
        own = class_of == c
        names = fine[own].unique()
        if len(names) != shape.subclasses:
            raise InputError(
                f"oracle: class {c} has {len(names)} known subclasses and subclasses is {shape.subclasses}: set "
                f"options.subclasses={len(names)}."
            )
        part_of[own] = torch.searchsorted(names, fine[own])
    order = known.ids.argsort()
    columns = {"ids": known.ids, "class_of": class_of, "part_of": part_of}
    numbers = {"subclasses": torch.tensor(shape.subclasses), "classes": torch.tensor(shape.classes)}
    return {**numbers, **{name: column[order] for name, column in columns.items()}}


def _assign_oracle(features: Tensor, ids: Tensor, tables: Tables, beta: float) -> Tensor:
    """One-hot at the known subclass in the example's class; uniform in the other classes."""
    place = lookup(ids, tables["ids"])
    number, classes = int(tables["subclasses"]), int(tables["classes"])
    values = torch.full((len(ids), classes, number), -math.log(number), dtype=torch.float64, device=ids.device)
    rows = torch.arange(len(ids), device=ids.device)
    values[rows, tables["class_of"][place]] = one_hot_log(tables["part_of"][place], number)
    return values


def one_hot_log(index: Tensor, number: int) -> Tensor:
    """Logarithm of a one-hot: 0 at `index`, −inf elsewhere; `[*index.shape, number]`, float64."""
    blank = torch.full((*index.shape, number), -math.inf, dtype=torch.float64, device=index.device)
    return blank.scatter(-1, index[..., None], 0.0)


def lookup(ids: Tensor, known: Tensor) -> Tensor:
    """Positions of `ids` in the sorted `known`; an id that is missing is an error that names it."""
    place = torch.searchsorted(known, ids).clamp(max=max(0, len(known) - 1))
    wrong = known[place] != ids if len(known) else torch.ones_like(ids, dtype=torch.bool)
    if bool(wrong.any()):
        raise InputError(
            f"Example {int(ids[wrong][0])} was not among those that the data stage saw: its subclass is unknown."
        )
    return place


SPLITTERS = {
    "linear": Splitter(_fit_linear, _assign_linear),
    "kmeans": Splitter(_fit_kmeans, _assign_nearest),
    "kmeans_soft": Splitter(_fit_kmeans, _assign_soft),
    "random": Splitter(_fit_random, _assign_random),
    "oracle": Splitter(_fit_oracle, _assign_oracle),
}
