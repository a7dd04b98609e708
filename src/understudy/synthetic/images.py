"""Made-up sets in the place of images, drawn from `data.seed`: a mixture of classes, classes with subclasses, moved signals, a pool
of images from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from understudy.data.batch import UNLABELLED
from understudy.data.image_set import ImageSet, training_order
from understudy.data.image_sources import Embedded, digits

GROUPS = (0, 1, 2, 3, 1, 3, 0, 2, 3, 0)
"""Of the ten digits, in `digits_shift`."""


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


def digits_shift(spec: Mapping[str, Any], copies: int = 4) -> tuple[dict[str, ImageSet], list[str]]:
    """Digits of another task than the teacher's: four groups of digits, under noise of deviation 0.35.

    A teacher that is trained first gets other digits, in ten classes, each in four copies under noise of deviation 0.2.
    Kept as float features of shape [1, 8, 8]: 297 training examples and 600 for test, 3,600 and 600 of the teacher.
    """
    rng = np.random.default_rng(int(spec.get("seed", 0)))
    found, teacher = digits()[0], bool(spec.get("for_teacher"))
    cut = slice(0, 900) if teacher else slice(900, None)
    train, test = found["train"].select(cut), found["test"]
    if teacher:
        train = train.select(torch.arange(len(train)).repeat(copies))
    parts = {}
    for split, part in {"train": train, "test": test}.items():
        drawn = torch.from_numpy(rng.normal(size=part.pixels.shape)).float()
        noise = (0.2 if split == "train" else 0.0) if teacher else 0.35
        labels = part.labels if teacher else torch.tensor(GROUPS)[part.labels]
        parts[split] = ImageSet(part.pixels.float() / 255 + noise * drawn, labels, torch.arange(len(part)))
    return parts, [str(i) for i in range(10 if teacher else 1 + max(GROUPS))]


def digits_web(spec: Mapping[str, Any], number: int = 540) -> tuple[dict[str, ImageSet], list[str]]:
    """A pool as if found elsewhere for `digits`: 540 other digits of another style, and 810 images of no digit.

    The digits are the last of the training part, which a teacher with `teacher_limit` up to 538 does not see. Each has its
    own contrast (0.3 to 1.5) and brightness (±0.3); half are blurred and three in ten inverted. The others are noise,
    smooth textures, and digits whose quarters are shuffled. The name of each image's kind is its domain.
    """
    rng = np.random.default_rng(int(spec.get("seed", 0)))
    train = digits()[0]["train"]
    found = train.select(training_order(len(train))[-number:])
    x, others = found.pixels.numpy()[:, 0] / 255, number // 2
    blur = rng.random(number) < 0.5
    x[blur] = _smooth(x[blur])
    x[rng.random(number) < 0.3] *= -1
    x += x.min((1, 2), keepdims=True) < 0
    contrast, brightness = rng.uniform(0.3, 1.5, (number, 1, 1)), rng.uniform(-0.3, 0.3, (number, 1, 1))
    kinds = {
        "digits": (x - 0.5) * contrast + 0.5 + brightness,
        "noise": rng.random((others, 8, 8)),
        "textures": _smooth(_smooth(rng.normal(size=(others, 8, 8)))) + 0.5,
        "shuffled": np.stack([_quarters(image, rng) for image in found.pixels.numpy()[:others, 0] / 255]),
    }
    values = np.concatenate(list(kinds.values())).clip(0, 1)
    pixels = torch.from_numpy((values * 255).round().astype(np.uint8))[:, None]
    labels = torch.cat([found.labels, torch.full((len(pixels) - number,), UNLABELLED)])
    names = np.repeat(list(kinds), [len(part) for part in kinds.values()])
    every = ImageSet(pixels, labels, torch.arange(len(pixels)), domains=names)
    return {"train": every}, [str(i) for i in range(10)]


def _smooth(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mean over the 3 × 3 pixels around each, the border repeated."""
    padded, (high, wide) = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge"), images.shape[1:]
    parts = [padded[:, i : i + high, j : j + wide] for i in range(3) for j in range(3)]
    return np.asarray(np.mean(parts, 0))


def _quarters(image: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """An image whose four quarters have changed places, all of them."""
    parts = [image[i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
    moved = np.roll(np.arange(4), int(rng.integers(1, 4)))
    a, b, c, d = (parts[i] for i in moved)
    return np.block([[a, b], [c, d]])


IMAGES: dict[str, Embedded] = {
    "clusters": clusters,
    "subclusters": subclusters,
    "templates": templates,
    "digits_shift": digits_shift,
    "digits_web": digits_web,
}
"""By name, for `load_images`."""
