"""Pools: images from other sets, without labels, in the form of the images that a task has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.data.batch import UNLABELLED
from understudy.data.image_set import ImageSet, training_order
from understudy.data.image_sources import Embedded, read_source
from understudy.errors import InputError

NOT_WITH = ("labelled", "label_noise", "with_validation", "domain_column")
"""Keys about labels or domains of the examples that a pool takes the place of."""
LUMINANCE = (0.299, 0.587, 0.114)


def read_pool(
    spec: Mapping[str, Any], embedded: Mapping[str, Embedded], like: ImageSet, notes: list[str]
) -> tuple[ImageSet, tuple[str, ...]]:
    """The training images of the sets that `data.pool` names, in a seeded order, at most `data.limit`.

    Args:
        spec, embedded: as of `load_images`. like: the images whose size, channels and type the pool gets.

    Returns:
        The images, each with the name of its set (or of its own domain in it), and these names.

    Raises:
        InputError: a set that cannot be read or made alike, or another key that needs labels.
    """
    given = spec["pool"]
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise InputError(f"data.pool is {given!r} and must be the name of an image set, or a list of names.")
    for key in NOT_WITH:
        if spec.get(key) not in (None, False):
            raise InputError(
                f"data.{key} is about labels or columns, and the images of data.pool have none: leave it out."
            )
    kept = {k: v for k, v in spec.items() if k in ("image_column", "input_data_format", "seed")}
    parts = []
    for name in names:
        own = {**kept, "name": name, "size": list(like.pixels.shape[2:]), "label_column": None}
        part = read_source(name, own, embedded, notes)[0]["train"]
        parts.append((_alike(name, part.pixels, like.pixels), _sources(name, part)))
    pixels, sources = torch.cat([p for p, _ in parts]), np.concatenate([s for _, s in parts])
    order = training_order(len(pixels))[: spec.get("limit")]
    notes.append(f"The student trains on {len(order)} images of {', '.join(names)}, without labels.")
    found = ImageSet(
        pixels[order], torch.full((len(order),), UNLABELLED), torch.arange(len(order)), domains=sources[order.numpy()]
    )
    return found, tuple(sorted(set(sources.tolist())))


def _sources(name: str, part: ImageSet) -> np.ndarray[Any, Any]:
    return part.domains if part.domains is not None else np.full(len(part), name)


def _alike(name: str, pixels: Tensor, like: Tensor) -> Tensor:
    """Gray images get three equal channels, or colours become gray, if the task's images have other channels."""
    if (pixels.shape[1], like.shape[1]) == (1, 3):
        pixels = pixels.expand(-1, 3, -1, -1)
    elif (pixels.shape[1], like.shape[1]) == (3, 1):
        gray = (pixels.float() * pixels.new_tensor(LUMINANCE, dtype=torch.float)[:, None, None]).sum(1, keepdim=True)
        pixels = (gray.round() if pixels.dtype == torch.uint8 else gray).to(pixels.dtype)
    if pixels.shape[1:] != like.shape[1:] or pixels.dtype != like.dtype:
        raise InputError(
            f"data.pool: {name} has images of {pixels.dtype} {tuple(pixels.shape[1:])} and the data of {like.dtype} "
            f"{tuple(like.shape[1:])} (channels, height, width): convert them."
        )
    return pixels
