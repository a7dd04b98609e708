"""Images beside texts: read and prepared when a batch is collated, so that a data set in memory holds no pixels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from understudy.data.batch import COUNT
from understudy.data.image_files import of_array, read_image
from understudy.errors import InputError

SMALL = 1 << 16
"""Most bytes of prepared images that stay in memory, for each example."""


@dataclass(frozen=True)
class Pictures:
    """The images of one example.

    Args:
        cells: paths, bytes or PIL images, in the order of their places in the prompt.
        where: of the example, for messages.
        text: the prompt with a placeholder for each image. processor: of transformers, which prepares both.
        key: SHA-256 of the images' content.
    """

    cells: tuple[Any, ...]
    where: str
    text: str = ""
    processor: Any = field(default=None, compare=False, repr=False)
    key: bytes = b""
    _kept: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, where: str, values: Any, folder: Path | None) -> Pictures:
        """From a record's `image` column: a path, bytes, PIL image, array or `datasets` cell, or a list of these.

        Args:
            folder: that relative paths start from.

        Raises:
            InputError: a file that is not there, or a value that is no image.
        """
        listed = values if isinstance(values, (list, tuple)) else [values]
        cells = tuple(_cell(where, value, folder) for value in listed)
        digest = hashlib.sha256()
        for cell in cells:
            content = cell.read_bytes() if isinstance(cell, Path) else cell if isinstance(cell, bytes) else None
            digest.update(f"{cell.mode}{cell.size}".encode() + cell.tobytes() if content is None else content)
        return cls(cells, where, key=digest.digest())

    def __str__(self) -> str:
        return self.key.hex()

    def read(self) -> list[Image.Image]:
        """The images in RGB."""
        return [read_image(str(c) if isinstance(c, Path) else self.where, c, Counter()) for c in self.cells]

    def prepared(self) -> Mapping[str, Tensor]:
        """Everything that the processor makes of prompt and images.

        Raises:
            InputError: the processor refuses them.
        """
        try:
            found = self.processor(text=[self.text], images=self.read(), return_tensors="pt")
        except InputError:
            raise
        except Exception as error:  # processors raise any type
            said = " ".join(str(error).split())
            raise InputError(f"{self.where}: {type(self.processor).__name__} refuses its images: {said}") from error
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def fields(self) -> dict[str, Tensor]:
        """The inputs that belong to the images alone (`pixel_values`, `image_grid_thw`, …). Small ones are kept."""
        if self._kept:
            return dict(self._kept)
        found = self.prepared()
        length = found["input_ids"].shape
        fields = {name: value for name, value in found.items() if value.shape != length}
        if sum(value.nbytes for value in fields.values()) <= SMALL:
            self._kept.update(fields)
        return fields


def _cell(where: str, value: Any, folder: Path | None) -> Any:
    if isinstance(value, dict):
        held = value.get("bytes") or value.get("path")
        if held is None:
            raise InputError(
                f"{where}: image has {', '.join(map(str, value)) or 'nothing'}, and neither bytes nor a path."
            )
        value = held
    if isinstance(value, np.ndarray):
        value = of_array(where, value)
    if isinstance(value, str):
        value = Path(value)
    if isinstance(value, Path):
        value = value if value.is_absolute() or folder is None else folder / value
        if not value.is_file():
            raise InputError(f"{where}: its image {value} is not there: paths start from the folder of the data file.")
    if not isinstance(value, (Path, bytes, Image.Image)):
        raise InputError(f"{where}: image is {type(value).__name__}, not a path, bytes or an image.")
    return value


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a row that belongs to its images: `pictures`, and `token_fields`, the inputs with a value for each token
    of the prompt."""
    return {name: row[name] for name in ("pictures", "token_fields") if name in row}


def picture_inputs(items: Sequence[Mapping[str, Any]], width: int, right: bool = True) -> dict[str, Tensor]:
    """The inputs of a batch beside its texts; none if no item has images.

    Args:
        items: with `pictures` and `token_fields`, if they have images.
        width: of the padded texts.
        right: whether padding is on the right.
    """
    if not any(shown(item) for item in items):
        return {}
    read: dict[int, dict[str, Tensor]] = {}  # the candidates of a list share their images
    for item in items:
        pictures = item.get("pictures")
        if pictures is not None and id(pictures) not in read:
            read[id(pictures)] = pictures.fields()
    parts = [read.get(id(item.get("pictures")), {}) for item in items]
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        if len({v.shape[1:] for v in values}) > 1:
            shapes = " and ".join(sorted({str(tuple(v.shape[1:])) for v in values})[:2])
            raise InputError(
                f"The processor prepares images of one batch with {name} of {shapes}, which do not go together: use images "
                "of one size, or per_device_train_batch_size=1 and evaluation_batch=1."
            )
        found[name] = torch.cat(values)
        found[COUNT + name] = torch.tensor([len(part[name]) if name in part else 0 for part in parts])
    for name in dict.fromkeys(name for item in items for name in item.get("token_fields", {})):
        column = torch.zeros(len(items), width, dtype=torch.long)
        for row, item in enumerate(items):
            values = item.get("token_fields", {}).get(name, column[0, :0])
            start = 0 if right else width - len(item["input_ids"])
            column[row, start : start + len(values)] = values
        found[name] = column
    return found
