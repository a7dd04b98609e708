"""Scenes for completion: a sparse scan and the dense cloud that it should become, both with a fixed number of points.

A source is a world that makes scenes, or files: `.npz` with `scan` and `truth` (one scene), `.npz` with `xyz_cm` and
`offsets` (a sequence of scans, in centimetres), `.npy` `[points, 3 or more]` and `.bin` of KITTI (one scan each). A scan
without a truth of its own is the truth, and a sparse part of it the scan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from understudy.data.folders import files_below, find, split_files, split_of, visible
from understudy.data.noise_sets import APART
from understudy.data.tables import in_single, read_npy, read_npz
from understudy.errors import InputError

Array = np.ndarray[Any, Any]
Maker = Callable[[], tuple[Array, Array]]
"""Makes or reads one scene: scan and truth `[points, dimensions]` in metres, before they are reduced."""
Scene = tuple[str, Maker]
SUFFIXES = (".npz", ".npy", ".bin")
CELL = 0.1
"""Side of the voxels of which the truth keeps one point each, in metres."""
_COORDINATES, _FEATURES = 4, 16
"""Most rows of an array that has its points along the second axis, and most columns of one that has them along the first."""


@dataclass(frozen=True)
class Reduction:
    """How a scene is reduced.

    Args:
        points: M, points of a scan, chosen far from one another.
        repeat: r, points of the truth for one of the scan.
        radius: in metres around the origin, outside of which points are left out.
        seed: of the choice of the truth's points.
    """

    points: int
    repeat: int
    radius: float
    seed: int = 0

    def __call__(self, name: str, scan: Array, truth: Array, index: int) -> tuple[Tensor, Tensor]:
        """Scan `[M, dimensions]` and truth `[M · r, dimensions]` of the scene, float32.

        Raises:
            InputError: a coordinate is not finite, or too few points lie within the radius.
        """
        near = []
        for part, cloud, least in (("scan", scan, self.points), ("truth", truth, 1)):
            if not in_single(cloud).all():
                raise InputError(f"{name}: the {part} has coordinates that are not finite. Remove these points.")
            kept = cloud[np.linalg.norm(cloud, axis=1) < self.radius]
            if len(kept) < least:
                raise InputError(
                    f"{name}: {len(kept)} of {len(cloud)} points of the {part} lie within data.radius={self.radius:g} m, and "
                    f"at least {least} are needed: raise data.radius, or lower data.points."
                )
            near.append(kept)
        dense, number = voxel_points(near[1], CELL), self.points * self.repeat
        random = np.random.default_rng([self.seed, index])
        chosen = random.choice(len(dense), number, replace=len(dense) < number)
        found = farthest_points(near[0], self.points), dense[chosen]
        return torch.from_numpy(found[0]).float(), torch.from_numpy(found[1]).float()


def voxel_points(points: Array, voxel: float) -> Array:
    """The first of the points `[points, dimensions]` in every voxel, in their order."""
    cells = np.floor((points - points.min(0)) / voxel)
    sizes = cells.max(0) + 1
    if sizes.prod() < 2**62:  # one number each, which is faster to sort, unless a point lies very far away
        cells = np.ravel_multi_index(tuple(cells.astype(np.int64).T), tuple(sizes.astype(np.int64)))
    return points[np.sort(np.unique(cells, axis=0, return_index=True)[1])]


def farthest_points(points: Array, number: int) -> Array:
    """`number` of the points `[points, dimensions]`, from the first one on each the farthest from those before it."""
    chosen, distance = [0], np.full(len(points), np.inf)
    for _ in range(number - 1):
        distance = np.minimum(distance, np.square(points - points[chosen[-1]]).sum(1))
        chosen.append(int(distance.argmax()))
    return points[chosen]


@dataclass(frozen=True)
class Measured:
    """How completed scenes are compared with true ones.

    Args:
        voxel: side of a voxel, in metres.
        steps: numbers of steps of the sampler to compare.
    """

    voxel: float = 0.5
    steps: tuple[int, ...] = (1, 2, 4, 8)


class SceneSet(Dataset[tuple[int, Tensor, Tensor]]):
    """Scenes with ids, made when they are first asked for.

    Args:
        makers: name and maker of each.
        split: determines the ids.
        measured: of evaluations.
    """

    def __init__(
        self, makers: Sequence[Scene], reduction: Reduction, split: str, measured: Measured = Measured()
    ) -> None:
        self.makers, self.reduction, self.start, self.measured = list(makers), reduction, APART[split], measured
        self.made: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.makers)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        if index not in self.made:
            name, make = self.makers[index]
            self.made[index] = self.reduction(name, *make(), self.start + index)
        return self.start + index, *self.made[index]


def collate_scenes(items: list[tuple[int, Tensor, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a `NoiseBatch`: `scan`, the truth as `clean`, and the condition 0, "the scan is shown"."""
    ids, scan, clean = zip(*items, strict=True)
    shown = torch.zeros(len(items), dtype=torch.long)
    return {
        "ids": torch.tensor(ids),
        "labels": shown,
        "condition": shown,
        "scan": torch.stack(scan),
        "clean": torch.stack(clean),
    }


@dataclass(frozen=True)
class Scenes:
    """The makers of each split, the number of dimensions, a content hash, and what a reader should know."""

    splits: dict[str, list[Scene]]
    dimensions: int
    key: str
    notes: tuple[str, ...] = ()


def read_scenes(name: str) -> Scenes:
    """Scenes of a file or folder, or of a name in the data folder.

    Files and folders that are named after splits are these splits. Of others the smallest sequence or folder of files is the
    test split; of one alone the last tenth is. The tenth before it is the validation split.

    Raises:
        InputError: there are no scenes, fewer than three, or a file that cannot be read.
    """
    path, notes = find(name), list[str]()
    folder = path if path is not None and path.is_dir() else None
    below = sorted(files_below(folder)) if folder is not None else [path] if path is not None else []
    files = [f for f in below if f.suffix.lower() in SUFFIXES]
    named = _named(folder) if folder is not None else {}
    if 0 < len(named) < len(files):
        notes.append(f"{name}: {len(files) - len(named)} files that no split is named after were left out.")
    if not files:
        raise InputError(
            f"data={name!r} holds no scans: name street, street2d, or a file or folder of {', '.join(SUFFIXES)}."
        )
    digest, groups = hashlib.sha256(), dict[Any, list[Scene]]()
    for file in sorted(named, key=lambda f: (named[f], f)) or files:
        digest.update(named.get(file, "").encode() + file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        for label, maker, sequence in _scans(file):
            groups.setdefault(named.get(file, file if sequence else file.parent), []).append((label, maker))
    parts = groups if named else _apart(list(groups.values()))
    number, train = sum(map(len, parts.values())), parts.get("train", [])
    tenth = max(1, len(train) // 10)
    for split in ("test", "validation"):
        if split not in parts:
            train, parts[split] = train[:-tenth], train[-tenth:]
    validation, test = parts["validation"], parts["test"]
    if not train:
        raise InputError(
            f"data={name!r} holds {number} scenes, and three splits need at least 3: the train split one, and one more for "
            "each other split that no file or folder is named after."
        )
    note = f"{name}: {len(train)} scenes train, {len(validation)} validate and {len(test)} test; no scene is in two splits."
    (first, make), *_ = train
    dimensions = make()[1].shape[1]
    splits = {
        split: [(label, _alike(label, maker, first, dimensions)) for label, maker in makers]
        for split, makers in (("train", train), ("validation", validation), ("test", test))
    }
    return Scenes(splits, dimensions, digest.hexdigest(), (note, *notes))


def _named(folder: Path) -> dict[Path, str]:
    """The split of each file that has one, if files or folders are named after splits."""
    if not any(split_of(entry.name if entry.is_dir() else entry.stem) for entry in visible(folder)):
        return {}
    return {file: split for split, files in split_files(folder, SUFFIXES, []).items() for file in files}


def _apart(groups: list[list[Scene]]) -> dict[Any, list[Scene]]:
    """The smallest of several groups for test, all others for training."""
    *others, least = sorted(groups, key=len, reverse=True)
    return {"train": [s for group in others for s in group], "test": least} if others else {"train": least}


def _alike(name: str, make: Maker, first: str, dimensions: int) -> Maker:
    """A maker that raises an error if its scene has not the dimensions of the first one."""

    def made() -> tuple[Array, Array]:
        scene = make()
        for part, cloud in zip(("scan", "truth"), scene, strict=True):
            if cloud.shape[1] != dimensions:
                raise InputError(
                    f"{name}: the {part} has points of {cloud.shape[1]} coordinates, and the truth of {first} has points of "
                    f"{dimensions}: give all scenes equally many."
                )
        return scene

    return made


def _scans(file: Path) -> Iterator[tuple[str, Maker, bool]]:
    """Name and maker of every scene of a file, and whether the file is a sequence of scans."""
    if file.suffix.lower() != ".npz":
        yield file.name, lambda: _alone(_cloud(file, _read(file))), False
        return
    arrays = read_npz(file)
    if {"scan", "truth"} <= arrays.keys():
        scan, truth = (_cloud(file, arrays[k]) for k in ("scan", "truth"))
        yield file.name, lambda: (scan, truth), False
        return
    if not {"xyz_cm", "offsets"} <= arrays.keys():
        raise InputError(
            f"{file} holds {', '.join(sorted(arrays)) or 'nothing'}: a scene has scan and truth, a sequence of scans xyz_cm "
            "and offsets."
        )
    offsets, points = arrays["offsets"], _cloud(file, arrays["xyz_cm"])
    if (
        offsets.dtype.kind not in "iu"
        or offsets.ndim != 1
        or not len(offsets)
        or offsets[0] != 0
        or offsets[-1] != len(points)
        or (np.diff(offsets) < 0).any()
    ):
        raise InputError(
            f"{file}: offsets must be whole numbers that rise from 0 to the number of points, {len(points)}."
        )

    def frame(start: int, end: int) -> Maker:
        return lambda: _alone(points[start:end] / 100)

    for i, (start, end) in enumerate(zip(offsets.tolist(), offsets[1:].tolist(), strict=False)):
        yield f"{file.name}, scan {i}", frame(start, end), True


def _alone(cloud: Array) -> tuple[Array, Array]:
    """Scan and truth of a cloud without a truth of its own."""
    return cloud[::2], cloud


def _read(file: Path) -> Array:
    if file.suffix.lower() == ".npy":
        return read_npy(file)
    try:
        if file.stat().st_size % 16:
            raise InputError(f"{file} ends within a point of four numbers of 32 bits: put it back as it was written.")
        return np.fromfile(file, dtype="<f4").reshape(-1, 4)
    except InputError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} is no readable cloud of points: {str(error).splitlines()[0]}") from None


def _cloud(file: Path, values: Array) -> Array:
    """The coordinates of `[points, 2]`, or the first three columns of more; an array with its points along the second axis,
    `[3, points]`, is turned."""
    if values.ndim == 2 and 2 <= values.shape[0] <= _COORDINATES < _FEATURES < values.shape[1]:
        values = values.T
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "fiu":
        raise InputError(f"{file}: a cloud has numbers [points, 2] or [points, 3 or more], not {list(values.shape)}.")
    return values[:, :3].astype(np.float64)
