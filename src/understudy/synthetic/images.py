"""Made-up sets in the place of images, drawn from `data.seed`: a mixture of classes, classes with subclasses, moved signals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from understudy.data.image_set import ImageSet
from understudy.data.image_sources import Embedded


def clusters(
    spec: Mapping[str, Any], classes: int = 40, latent: int = 20, inputs: int = 32
) -> tuple[dict[str, ImageSet], list[str]]:
    """A 40-class mixture in 8 super-clusters: 20 latent dimensions, mapped to 32 inputs through tanh.

    Kept as float features of shape [1, 1, 32]. 13,600 training examples, 3,000 for test.
    """
    rng = np.random.default_rng(int(spec.get("seed", 0)))
    centres = np.repeat(rng.normal(size=(8, latent)) * 2, classes // 8, 0) + rng.normal(size=(classes, latent))
    into = rng.normal(size=(latent, inputs)) / np.sqrt(latent)
    labels = rng.integers(0, classes, size=16_600)
    values = np.tanh((centres[labels] + 0.9 * rng.normal(size=(len(labels), latent))) @ into)
    pixels = torch.from_numpy(values).float()[:, None, None]
    every = ImageSet(pixels, torch.from_numpy(labels).long(), torch.arange(len(labels)))
    return {"train": every.select(slice(3000, None)), "test": every.select(slice(0, 3000))}, [
        str(i) for i in range(classes)
    ]


def templates(
    spec: Mapping[str, Any], classes: int = 10, length: int = 40, width: int = 24
) -> tuple[dict[str, ImageSet], list[str]]:
    """Signals of 40 samples, each one of 10 smooth templates of 24 with its own amplitude, in noise.

    Kept as float features of shape [1, 1, 40]. Training (2,000), validation (500) and `test_clean` (2,000) have the
    template at the start; in `test` (2,000) the signal is moved round by any number of samples, equally likely.
    """
    rng = np.random.default_rng(int(spec.get("seed", 0)))
    smooth = np.exp(-0.5 * (np.arange(-6, 7) / 2) ** 2)
    shapes = np.stack([np.convolve(rng.normal(size=width), smooth, "same") for _ in range(classes)])
    shapes = np.pad(shapes / shapes.std(1, keepdims=True), ((0, 0), (0, length - width)))
    parts = {}
    for split, number in {"train": 2000, "validation": 500, "test": 2000, "test_clean": 2000}.items():
        labels = rng.integers(0, classes, size=number)
        values = (1 + 0.3 * rng.normal(size=(number, 1))) * shapes[labels]
        if split == "test":
            places = np.arange(length) - rng.integers(0, length, size=(number, 1))
            values = np.take_along_axis(values, places % length, 1)
        values = values + 0.35 * rng.normal(size=values.shape)
        pixels = torch.from_numpy(values).float()[:, None, None]
        parts[split] = ImageSet(pixels, torch.from_numpy(labels).long(), torch.arange(number))
    return parts, [str(i) for i in range(classes)]


def subclusters(spec: Mapping[str, Any], parts: int = 5, width: int = 20) -> tuple[dict[str, ImageSet], list[str]]:
    """Two classes of five Gaussian clusters each in 20 dimensions: unit variance, centres of variance 1.2².

    Kept as float features of shape [1, 1, 20]; each example knows its cluster. 7,000 training examples, 4,000 for test.
    """
    rng = np.random.default_rng(int(spec.get("seed", 0)))
    centres = rng.normal(size=(2 * parts, width)) * 1.2
    cluster = rng.integers(0, 2 * parts, size=11_000)
    values = centres[cluster] + rng.normal(size=(len(cluster), width))
    fine = torch.from_numpy(cluster).long()
    pixels, labels = torch.from_numpy(values).float()[:, None, None], fine // parts
    every = ImageSet(pixels, labels, torch.arange(len(labels)), parts=torch.stack([labels, fine], 1))
    return {"train": every.select(slice(4000, None)), "test": every.select(slice(0, 4000))}, ["0", "1"]


IMAGES: dict[str, Embedded] = {"clusters": clusters, "subclusters": subclusters, "templates": templates}
"""By name, for `load_images`."""
