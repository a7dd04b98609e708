"""Digits that are seen and heard: scikit-learn's images in noise, and a made-up two-tone code of each digit in noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from understudy.data.image_sources import digits
from understudy.data.paired import Pairs

MODALITIES = ("image", "audio")
TRAIN, VALIDATION = 600, 200


def av_digits(
    spec: Mapping[str, Any], image_noise: float = 0.5, audio_noise: float = 0.7, wrong: float = 0.2
) -> tuple[dict[str, Pairs], list[str]]:
    """Pairs of an image `[1, 8, 8]` in [0, 1] and a code `[1, 1, 16]`: 600 train, 200 validation, 997 test.

    The code of digit c is 1 at 2 ⌊c / 4⌋ (its row) and 8 + 2 (c mod 4) (its column), else 0. Both have normal noise of these
    standard deviations. A share `wrong` of the labels of train and validation is drawn anew from all classes; those of
    test are right. All is drawn from `data.seed`.

    Source: the world `av-digits` for MST-Distill: neither modality suffices, and no teacher is right everywhere.
    """
    rng = np.random.default_rng(int(spec.get("seed") or 0))
    pools, classes = digits()
    pixels = torch.cat([pools["train"].pixels, pools["test"].pixels]).numpy() / 255
    labels = torch.cat([pools["train"].labels, pools["test"].labels]).numpy()
    order = rng.permutation(len(labels))
    pixels, labels = pixels[order], labels[order]
    code = np.zeros((len(labels), 16))
    rows = np.arange(len(labels))
    code[rows, 2 * (labels // 4)] = code[rows, 8 + 2 * (labels % 4)] = 1
    image = pixels + image_noise * rng.normal(size=pixels.shape)
    audio = code + audio_noise * rng.normal(size=code.shape)
    drawn = np.where(rng.random(len(labels)) < wrong, rng.integers(0, 10, len(labels)), labels)
    found, start = {}, 0
    for split, number in {"train": TRAIN, "validation": VALIDATION, "test": len(labels) - TRAIN - VALIDATION}.items():
        own = slice(start, start + number)
        start += number
        parts = {
            "image": torch.from_numpy(image[own]).float(),
            "audio": torch.from_numpy(audio[own]).float()[:, None, None],
        }
        said = labels if split == "test" else drawn
        found[split] = Pairs(parts, torch.from_numpy(said[own]).long(), torch.from_numpy(labels[own]).long())
    return found, classes
