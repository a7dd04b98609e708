"""Streets of two walls and some cars, seen by a rotating LiDAR: sparse scans and the dense clouds behind them.

`street` is in space, `street2d` its plan. The sensor is at the origin, 1.73 m above the ground. Lengths are in metres.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from understudy.data.scenes import Maker, Scenes

Array = np.ndarray[Any, Any]
GROUND = -1.73
NEAREST, FARTHEST = 0.3, 12.0
"""Range of the sensor; below, elevation of its rings."""
LOWEST, HIGHEST = np.deg2rad(-24.8), np.deg2rad(2.0)
POSES = np.linspace(-5, 5, 11)
"""Where along the street the truth is seen from."""
_SPLITS = {"train": 0, "validation": 1, "test": 2}


@dataclass(frozen=True)
class Street:
    """What a ray can hit.

    Args:
        walls: `[2, 2]`, the place of each wall across the street, and the height of its top.
        boxes: `[boxes, 2, 3]`, the lower and the upper corner of each car.
    """

    walls: Array
    boxes: Array

    @classmethod
    def draw(cls, random: np.random.Generator) -> Street:
        """Walls 5 to 9 m to each side, and 3 to 6 cars, none of them on the sensor's way."""
        walls = np.stack([random.uniform(5, 9, 2) * [1, -1], GROUND + random.uniform(2, 4, 2)], 1)
        boxes: list[Array] = []
        number = random.integers(3, 7)
        while len(boxes) < number:
            x, y = random.uniform(-9, 9), np.clip(random.uniform(-9, 9), -5, 5)
            half = random.uniform([0.8, 0.6], [2.2, 1.0])
            if abs(x) < 6.5 and abs(y) < half[1] + 0.8:
                continue
            low = np.array([x - half[0], y - half[1], GROUND])
            boxes.append(np.stack([low, [x + half[0], y + half[1], GROUND + random.uniform(1.4, 2.0)]]))
        return cls(walls, np.stack(boxes))

    def cast(self, origin: Array, directions: Array, flat: bool) -> tuple[Array, Array]:
        """The first hit of each ray.

        Args:
            origin: `[3]`. directions: `[rays, 3]`, of length 1.
            flat: in the plan, without ground and heights.

        Returns:
            Range of each ray that hits something in the sensor's range, and which rays these are.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            ranges = [] if flat else [_ahead((GROUND - origin[2]) / directions[:, 2])]
            for place, top in self.walls:
                hit = _ahead((place - origin[1]) / directions[:, 1])
                ranges.append(hit if flat else np.where(origin[2] + hit * directions[:, 2] <= top, hit, np.inf))
            axes = 2 if flat else 3
            for low, high in self.boxes[..., :axes]:
                sides = np.stack([(low - origin[:axes]), (high - origin[:axes])])[:, None] / directions[:, :axes]
                enter, leave = sides.min(0).max(1), sides.max(0).min(1)
                ranges.append(np.where(enter <= leave, _ahead(enter), np.inf))
        first = np.min(ranges, 0)
        seen = (first > NEAREST) & (first < FARTHEST)
        return first[seen], np.flatnonzero(seen)


def _ahead(ranges: Array) -> Array:
    return np.where(ranges > 0, ranges, np.inf)


def _rays(azimuths: int, rings: int, flat: bool) -> tuple[Array, Array]:
    """Directions of all rays, and the ring of each."""
    around = np.arange(azimuths) * 2 * np.pi / azimuths
    up = np.zeros(1) if flat else np.linspace(LOWEST, HIGHEST, rings)
    ring, turn = (v.ravel() for v in np.meshgrid(np.arange(len(up)), around, indexing="ij"))
    high = up[ring]
    return np.stack([np.cos(high) * np.cos(turn), np.cos(high) * np.sin(turn), np.sin(high)], 1), ring


def street_scene(split: str, index: int, seed: int, flat: bool) -> tuple[Array, Array]:
    """Scan and truth of one scene.

    The scan: every second of 16 rings of 180 azimuths, range noise of 0.02 m, a tenth of the returns dropped. The truth:
    32 rings of 720 azimuths without noise, from 11 places along the street.
    """
    random = np.random.default_rng([seed, _SPLITS[split], index])
    street = Street.draw(random)
    directions, ring = _rays(180, 16, flat)
    ranges, rays = street.cast(np.zeros(3), directions, flat)
    ranges = ranges + 0.02 * random.standard_normal(len(ranges))
    kept = (random.random(len(ranges)) >= 0.1) & (ring[rays] % 2 == 0)
    scan = ranges[kept, None] * directions[rays[kept]]
    directions, _ = _rays(720, 32, flat)
    parts = []
    for x in POSES:
        origin = np.array([x, 0.0, 0.0])
        ranges, rays = street.cast(origin, directions, flat)
        parts.append(origin + ranges[:, None] * directions[rays])
    axes = 2 if flat else 3
    return scan[:, :axes], np.concatenate(parts)[:, :axes]


def streets(name: str, numbers: Mapping[str, int], seed: int) -> Scenes:
    """`street` or `street2d`, with so many scenes in each split."""
    flat = WORLDS[name]
    splits: dict[str, list[tuple[str, Maker]]] = {
        split: [
            (f"{name}, {split} scene {i}", partial(street_scene, split, i, seed, flat)) for i in range(numbers[split])
        ]
        for split in _SPLITS
    }
    return Scenes(splits, 2 if flat else 3, f"{name}-{seed}-{sorted(numbers.items())}")


WORLDS = MappingProxyType({"street": False, "street2d": True})
"""The worlds by name, and whether they are flat."""
