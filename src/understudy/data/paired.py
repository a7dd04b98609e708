"""Examples with several modalities under their names: an image and a sound of one thing, two sensors, two views.

An example is one row of numbers, its modalities one after the other, so that everything that is known for images (splits,
limits, noise of labels) holds for it; the collator gives each modality its name and shape again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from understudy.data.batch import Batch
from understudy.data.image_set import ImageSet
from understudy.data.images import Splits, collate_images, load_images
from understudy.data.memory import MEMORY
from understudy.data.text import check_keys
from understudy.errors import InputError, nearest

OPTIONS = {
    *("name", "modalities", "label_column", "size", "input_data_format", "limit", "teacher_limit", "validation_size"),
    *("label_noise", "unlabelled", "labelled", "for_teacher", "seed"),
}
_HERE = ("modalities", "label_column", "size", "input_data_format")


class Pairs(NamedTuple):
    """The examples of one split.

    Args:
        parts: by modality, `[examples, channels, height, width]`, uint8 pixels or float; example i of each belongs together.
        labels: `[examples]`, int64.
        clean: `[examples]`, the labels before noise was added, if it was.
    """

    parts: Mapping[str, Tensor]
    labels: Tensor
    clean: Tensor | None = None


Source = Callable[[Mapping[str, Any]], tuple[dict[str, Pairs], list[str]]]
"""From the recipe's `data` to the examples of each split, and the names of the classes."""


@dataclass(frozen=True)
class Layout:
    """The shapes of the modalities in the order in which a row holds them: `(channels, height, width)` by name."""

    shapes: Mapping[str, tuple[int, ...]]

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """`[examples, 1, 1, numbers]`, float32; pixels of 8 bits become [0, 1]."""
        found = [parts[name].float() / (255 if parts[name].dtype == torch.uint8 else 1) for name in self.shapes]
        return torch.cat([part.flatten(1) for part in found], 1)[:, None, None]

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """The modalities of `[examples, 1, 1, numbers]`, each `[examples, channels, height, width]`."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        parts = rows.flatten(1).split(sizes, 1)
        return {n: p.unflatten(1, s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    def collate(self, items: list[tuple[Any, ...]]) -> dict[str, Tensor]:
        """Tensors of a `Batch`, whose inputs are the modalities by name."""
        found = collate_images(items)
        rows = found.pop("pixel_values")
        return {**found, **self.unpack(rows)}


def load_paired(spec: Mapping[str, Any], source: Source) -> tuple[Splits, Layout]:
    """Read examples with several modalities.

    Args:
        spec: `name`, `modalities` (those that are used, in this order), and the keys of images that `OPTIONS` has.
        source: reads all splits, with the modalities that `spec` names.

    Raises:
        InputError: modalities of different numbers of examples or whose shapes differ among the splits, or a name that
            cannot be one.
    """
    check_keys(spec, OPTIONS)
    name = str(spec["name"])
    check_names(spec.get("modalities"))
    splits, classes = source(spec)
    layout = _layout(name, splits, spec.get("modalities"))
    pools = {
        split: ImageSet(layout.pack(part.parts), part.labels, torch.arange(len(part.labels)), part.clean)
        for split, part in splits.items()
    }
    inside = "data" if name.startswith(MEMORY) else name
    rest = {**{k: v for k, v in spec.items() if k not in _HERE}, "name": inside}
    found = load_images(rest, {inside: lambda _: (pools, classes)})
    digest = hashlib.sha256(f"{found.hash} {list(layout.shapes.items())}".encode()).hexdigest()
    return dataclasses.replace(found, hash=digest), layout


def check_names(modalities: Any) -> None:
    """Raise an error for `data.modalities` that is no list of two or more names that inputs of a batch can have."""
    if modalities is None:
        return
    if not isinstance(modalities, Sequence) or isinstance(modalities, str) or len(modalities) < 2:
        raise InputError(
            f"data.modalities is {modalities!r} and must list two or more columns, as in data.modalities=[audio, image]."
        )
    taken = {f.name for kind in (Batch, *Batch.__subclasses__()) for f in fields(kind)}  # type: ignore[arg-type]
    for one in modalities:
        if not isinstance(one, str) or not re.fullmatch(r"[A-Za-z]\w*", one) or one in taken:
            raise InputError(
                f"data.modalities holds {one!r}: a name has letters, digits and _, and is none of {', '.join(sorted(taken))}. "
                "Rename the column."
            )
    if len(set(modalities)) < len(modalities):
        raise InputError(f"data.modalities names one column twice: {', '.join(modalities)}.")


def _layout(name: str, splits: Mapping[str, Pairs], wanted: Sequence[str] | None) -> Layout:
    if "train" not in splits:
        raise InputError(f"{name} has splits {', '.join(splits)} but no train split.")
    known = splits["train"].parts
    for one in wanted or ():
        if one not in known:
            raise InputError(f"{name} has no modality {one!r}.{nearest(one, known)} Known: {', '.join(known)}.")
    shapes = {m: tuple(known[m].shape[1:]) for m in wanted or known}
    for split, part in splits.items():
        for modality, shape in shapes.items():
            held = part.parts[modality]
            if len(held) != len(part.labels):
                raise InputError(
                    f"{name}, {split}: {len(held)} examples of {modality} and {len(part.labels)} labels: example i of each "
                    "must belong together."
                )
            if tuple(held.shape[1:]) != shape:
                raise InputError(
                    f"{name}: {modality} is {tuple(held.shape[1:])} (channels, height, width) in {split} and {shape} in "
                    "train. Convert one of them."
                )
    return Layout(shapes)
