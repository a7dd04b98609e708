"""Training sets of generation: noise by id for a student that needs no data, examples for a model trained on data.

The noise of an example is a function of its id (`data.noise`), so a data set of noise is a list of ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from understudy.data.batch import Batch, WholeExamples
from understudy.data.folders import find
from understudy.data.image_files import are_loose
from understudy.data.image_records import has_tables
from understudy.data.images import Splits, load_images
from understudy.errors import InputError

APART = {"train": 0, "validation": 1 << 40, "test": 2 << 40, "reference": 3 << 40}
"""First id of each split, so that no two splits share noise."""


@dataclass(kw_only=True)
class NoiseBatch(WholeExamples, Batch):
    """A batch of generation. Its rows are examples.

    Args:
        inputs: inputs of a denoiser, `x` and the time `t` in [0, 1]; before these are set `clean`, if the set has
            examples, and `rejected`, if each has a worse one.
        labels: the same as `condition`.
        condition: `[examples]`, the class to generate, −1 for none.
    """

    condition: Tensor

    @property
    def kind(self) -> str:
        return "noise"

    @cached_property
    def row_labels(self) -> Tensor:
        return self.condition

    def at(self, x: Tensor, t: Tensor | float, condition: Tensor | None = None) -> NoiseBatch:
        """The same examples with `x` as input at time `t` (`[examples]`, or one time for all)."""
        times = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x))
        inputs = {**self.inputs, "x": x, "t": times}
        return replace(self, inputs=inputs, condition=self.condition if condition is None else condition)


@dataclass
class Reference:
    """The reference that samples are compared with.

    Args:
        examples: reads the real examples of a split and their classes; `None` without data.
        training: reads those that a feature network is trained on; `None` for points, which need none.
        centres, deviation: of the modes of a world, `[modes, dimensions]`, if they are known.
        key: content hash.
        steps: step budgets of the teacher's own sampler to report.
        many: number of calls of the sampler that serves as the teacher's reference.
        rejected: reads the worse examples beside those of `examples`, if the data are pairs.
        store: folder for results that are expensive to compute.
    """

    examples: Callable[[], tuple[Tensor, Tensor]] | None
    training: Callable[[], tuple[Tensor, Tensor]] | None
    centres: Tensor | None
    key: str
    steps: tuple[int, ...]
    many: int
    deviation: float = 0.0
    store: Path | None = None
    rejected: Callable[[], Tensor] | None = None


class NoiseSet(Dataset[tuple[int, int]]):
    """`size` ids, with a class for each in turn if there are classes. It reads no data.

    Args:
        split: determines the ids.
        classes: 0 for none.
        reference: what samples of this split are compared with, if anything.
    """

    def __init__(self, size: int, split: str, classes: int = 0, reference: Reference | None = None) -> None:
        self.size, self.start, self.classes, self.reference = size, APART[split], classes, reference

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.start + index, index % self.classes if self.classes else -1


class ExampleSet(Dataset[tuple[Any, ...]]):
    """Examples `[examples, ...]` in the range of the model's inputs, with ids and classes (−1 without).

    Args:
        clean: real examples, or a teacher's samples.
        condition: `[examples]`.
        rejected: a worse example of the same condition for each, if there is one.
    """

    def __init__(self, clean: Tensor, condition: Tensor, rejected: Tensor | None = None) -> None:
        self.clean, self.condition, self.rejected = clean, condition, rejected

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = index, int(self.condition[index]), self.clean[index]
        return item if self.rejected is None else (*item, self.rejected[index])


def collate_noise(items: list[Any]) -> dict[str, Tensor]:
    """The tensors of a `NoiseBatch`, with `clean` and `rejected` if items have them."""
    ids, condition = (torch.tensor([item[i] for item in items]) for i in (0, 1))
    found = {"ids": ids, "labels": condition, "condition": condition}
    names = ("clean", "rejected")[: len(items[0]) - 2]
    return found | {name: torch.stack([item[i] for item in items]) for i, name in enumerate(names, 2)}


@dataclass
class Source:
    """The data of a generation task.

    Args:
        examples: reads the examples of a split and their classes on demand; `None` without examples.
        shape: of an example.
        classes: 0 for none.
        key: content hash.
        centres, deviation: of the modes, `[modes, dimensions]`, if they are known.
        rejected: reads the worse examples of a split, one for each, if the data are pairs.
    """

    examples: Callable[[str], tuple[Tensor, Tensor]] | None
    shape: tuple[int, ...] = ()
    classes: int = 0
    centres: Tensor | None = None
    key: str = "noise"
    deviation: float = 0.0
    notes: list[str] = field(default_factory=list)
    rejected: Callable[[str], Tensor] | None = None


def _sized(spec: dict[str, Any]) -> Splits:
    """Images, whose side is `image_size` here, where `size` is the number of noises; they may have no classes."""
    own = {k: v for k, v in spec.items() if k != "image_size"}
    try:
        return load_images({**own, "size": spec.get("image_size")}, unlabelled=True)
    except InputError as error:
        raise InputError(str(error).replace("data.size", "data.image_size")) from None


def load_source(
    spec: dict[str, Any], embedded: Mapping[str, Source] = MappingProxyType({}), rejected: str | None = None
) -> Source:
    """`noise` (no data), one of `embedded`, or an image set of `load_images` with pixels in [−1, 1], which may be a folder of
    images without classes.

    Args:
        rejected: column of a table with a worse image for each, if the set holds pairs.
    """
    name = str(spec["name"])
    if rejected is not None and (name == "noise" or name in embedded):
        raise InputError(f"data.rejected_column names a column of a table of pairs, and {name} has none.")
    if spec.get("image_size") is not None and (name == "noise" or name in embedded):
        raise InputError(f"data.image_size is of images, and {name} has none: leave it out.")
    if name == "noise":
        return Source(None)
    if name in embedded:
        return embedded[name]
    path = find(name)
    if path is not None and path.is_dir() and are_loose(path) and not has_tables(path, spec):
        spec = {"label_column": None, **spec}
    splits = _sized(spec)
    if rejected is None:
        worse = None
    else:  # the same rows with another column: the splits follow from their number
        worse = _sized({**spec, "image_column": rejected})
        if worse.shape != splits.shape:
            raise InputError(
                f"{name}: better images have shape {splits.shape} and those of data.rejected_column={rejected} {worse.shape}: "
                "give both one size."
            )

    def pixels(of: Splits, split: str) -> tuple[Tensor, Tensor]:
        part = getattr(of, split)
        if part.pixels.dtype != torch.uint8:
            raise InputError(
                f"{name} holds features, not pixels: image_generation takes images, {', '.join(embedded)}, or noise."
            )
        return part.pixels.float() / 127.5 - 1, part.labels

    found = Source(
        partial(pixels, splits), splits.shape, len(splits.classes), None, splits.hash, notes=list(splits.notes)
    )
    if worse is not None:
        found.key += worse.hash
        found.rejected = lambda split: pixels(worse, split)[0]
    return found
