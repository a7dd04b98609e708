"""Images of one to three handwritten digits in a grid, with captions and questions whose truth is known.

A caption says which digit is in which cell: `there is a 3 at a1 and a 7 at c2 .`. Digits come in pairs (0 with 1, 2 with 3,
…), and training captions sometimes name the partner of a digit that is not in the image, so that models learn to make
things up as they do from real captions. Digits of test images are never those of training images.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from understudy.data.records import Record
from understudy.data.text import whole

CELL, GRID = 8, 3
NAMES = tuple(f"{column}{row + 1}" for row in range(GRID) for column in "abc")
DESCRIBE = "describe"
MOST_HELD = 200
"""Scenes of validation, and of test; fewer if a quarter of the training scenes is less."""
TOGETHER, MADE_UP = 0.6, 0.15
"""How often the partner of a digit is in the image too; how often a training caption names one that is not."""


def scenes(spec: Mapping[str, Any]) -> dict[str, list[Record]]:
    """Records of each split: a caption and a question of each training scene, pairs of better and worse captions, and for
    validation and test true captions with a worse one. `facts` say what an answer is judged by.

    Args:
        spec: `size` (training scenes), `pairs` (training pairs), `seed`.
    """
    size, number = whole(spec, "size", 4000), whole(spec, "pairs", 1500)
    chance = random.Random(whole(spec, "seed", 0, 0))
    train = [record for _ in range(size) for record in _told(chance, "train")]
    aside = min(MOST_HELD, -(-size // 4))
    held = {split: [_pair(chance, split) for _ in range(aside)] for split in ("validation", "test")}
    return {"train": train + [_pair(chance, "train") for _ in range(number)], **held}


def caption(digits: Mapping[str, int]) -> str:
    """The caption of digits by cell, in the order of the cells."""
    return f" there is {' and '.join(f'a {digits[cell]} at {cell}' for cell in NAMES if cell in digits)} ."


def question(digit: int) -> str:
    """The question whether a digit is in the image."""
    return f"is there a {digit} ?"


def named(text: str) -> dict[str, int]:
    """The digits that a caption names, by cell; what is not in its form names nothing."""
    words = text.split()
    spots = [(words[i + 2], words[i]) for i in range(len(words) - 2) if words[i + 1] == "at"]
    return {cell: int(digit) for cell, digit in spots if cell in NAMES and digit.isdigit() and len(digit) == 1}


def absent(digits: Mapping[str, int], chance: random.Random) -> int:
    """A digit that is not in the image: the partner of one that is, if there is such."""
    there = set(digits.values())
    partners = sorted({d ^ 1 for d in there} - there)
    return chance.choice(partners or sorted(set(range(10)) - there))


def _drawn(chance: random.Random, split: str) -> tuple[dict[str, int], Image.Image]:
    """The digits of a scene by cell, and its image."""
    number = chance.randint(1, 3)
    digits: list[int] = []
    while len(digits) < number:
        partner = digits and chance.random() < TOGETHER
        digits.append(digits[-1] ^ 1 if partner else chance.randrange(10))
    cells = chance.sample(NAMES, number)
    canvas = np.zeros((GRID * CELL, GRID * CELL), dtype=np.uint8)
    for cell, digit in zip(cells, digits, strict=True):
        row, column = divmod(NAMES.index(cell), GRID)
        pool = _pools()[split][digit]
        canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = pool[chance.randrange(len(pool))]
    return dict(zip(cells, digits, strict=True)), Image.fromarray(canvas).convert("RGB")


@cache
def _pools() -> dict[str, list[Any]]:
    """The images of each digit that each split draws from."""
    from sklearn.datasets import load_digits

    held = load_digits()
    pixels, start = (held.images * 255 / 16).astype(np.uint8), {"train": 0, "validation": 7, "test": 8}
    pools: dict[str, list[Any]] = {}
    for split, first in start.items():
        mine = np.arange(len(pixels)) % 9
        part = mine < 7 if split == "train" else mine == first
        pools[split] = [pixels[part & (held.target == digit)] for digit in range(10)]
    return pools


def _told(chance: random.Random, split: str) -> list[Record]:
    """A caption, which may make up a digit, and a question with its answer."""
    digits, image = _drawn(chance, split)
    said = dict(digits)
    if chance.random() < MADE_UP:
        said[chance.choice([c for c in NAMES if c not in digits])] = absent(digits, chance)
    yes = chance.random() < 0.5
    about = chance.choice(list(digits.values())) if yes else absent(digits, chance)
    return [
        {"image": image, "prompt": DESCRIBE, "completion": caption(said)},
        {"image": image, "prompt": question(about), "completion": " yes" if yes else " no"},
    ]


def _pair(chance: random.Random, split: str) -> Record:
    """The true caption, and one with a digit made up or mistaken; with a balanced question for evaluation."""
    digits, image = _drawn(chance, split)
    worse = dict(digits)
    free = [c for c in NAMES if c not in digits]
    cell = chance.choice(free) if chance.random() < 0.5 else chance.choice(list(digits))
    worse[cell] = absent(digits, chance)
    yes = chance.random() < 0.5
    about = chance.choice(list(digits.values())) if yes else absent(digits, chance)
    facts = {"digits": digits, "question": question(about), "answer": " yes" if yes else " no"}
    record = {"image": image, "prompt": DESCRIBE, "chosen": caption(digits), "rejected": caption(worse)}
    return {**record, "facts": facts}
