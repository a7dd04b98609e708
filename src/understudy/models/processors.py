"""The preprocessing of image models of transformers: their processor's steps, on pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from understudy.data.folders import hub_id
from understudy.errors import InputError
from understudy.models.weights import reason

FILES = ("preprocessor_config.json", "processor_config.json")
MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Interpolation modes by Pillow's number."""
CLOSE = 2 / 255
"""Mean difference of pixels that counts as rounding: the library resizes in integers of 0 … 255."""


class Processor:
    """Resize, centre crop, rescale and normalise like a processor of transformers, with gradients.

    The result for a random image is compared with that of the library. If they differ the library is used, image by
    image and without gradient (`exact` is false).

    Args:
        held: the processor.
        shape: of the data's images, `(channels, height, width)`.
        channels: number of channels that the model takes.
    """

    plain = False
    """Whether it stands for a model that has none."""

    def __init__(self, held: Any, shape: tuple[int, ...], channels: int) -> None:
        self.held, self.channels = held, channels
        if shape[0] not in (1, channels):
            raise InputError(f"The model takes images of {channels} channels and the data's have {shape[0]}.")
        self.exact = self._agrees(shape)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Preprocess `[images, channels, height, width]` in [0, 1] for the model."""
        pixels = pixels.expand(-1, self.channels, -1, -1)
        return self._steps(pixels) if self.exact else self._library(pixels)

    def save(self, folder: Path) -> None:
        """Write it beside the model, for `AutoImageProcessor` and pipelines."""
        self.held.save_pretrained(str(folder))

    def _is(self, name: str) -> bool:
        return bool(getattr(self.held, name, None))

    def _steps(self, pixels: Tensor) -> Tensor:
        if self._is("do_resize"):
            pixels = self._resized(pixels)
        if self._is("do_center_crop"):
            pixels = _centre(pixels, self.held.crop_size["height"], self.held.crop_size["width"])
        pixels = pixels * (255 * float(self.held.rescale_factor) if self._is("do_rescale") else 255.0)
        if self._is("do_normalize"):
            mean, deviation = (
                pixels.new_tensor(v).expand(pixels.shape[1])[:, None, None]
                for v in (self.held.image_mean, self.held.image_std)
            )
            pixels = (pixels - mean) / deviation
        return pixels

    def _resized(self, pixels: Tensor) -> Tensor:
        size, high, wide = self.held.size, *pixels.shape[-2:]
        edge, share = size["shortest_edge"], getattr(self.held, "crop_pct", None)
        crop: int | None = None
        target: tuple[int, ...]
        if edge is None:
            target = size["height"], size["width"]
        elif share is not None and edge >= 384:  # as in ConvNeXt
            target = edge, edge
        else:
            crop, short = (edge, int(edge / share)) if share is not None else (None, edge)
            target = tuple(int(short * side / min(high, wide)) for side in (high, wide))
        mode = MODES[int(self.held.resample)]
        smooth: dict[str, Any] = {} if mode == "nearest-exact" else {"antialias": True, "align_corners": False}
        if target != (high, wide):
            pixels = F.interpolate(pixels, target, mode=mode, **smooth).clamp(0, 1)
        return pixels if crop is None else _centre(pixels, crop, crop)

    def _library(self, pixels: Tensor) -> Tensor:
        whole = (pixels.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        found: Tensor = self.held(images=list(whole), return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ]
        return found.to(pixels)

    def _agrees(self, shape: tuple[int, ...]) -> bool:
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (1, *shape), generator=draw).float() / 255
        pixels = pixels.expand(-1, self.channels, -1, -1)
        try:
            wanted = self._library(pixels)
        except Exception as error:  # a processor's values may have any type
            raise InputError(
                f"{type(self.held).__name__} cannot prepare images of {list(shape)}: {reason(error)}. Correct the model's "
                "preprocessor_config.json."
            ) from error
        try:
            found = self._steps(pixels)
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError):  # it has other steps
            return False
        if found.shape != wanted.shape or not bool(wanted.isfinite().all()):
            return False
        unit = 255 * float(self.held.rescale_factor) if self._is("do_rescale") else 255.0
        deviation = torch.as_tensor(self.held.image_std if self._is("do_normalize") else 1.0).reshape(-1, 1, 1)
        return float(((found - wanted) * deviation / unit).abs().mean()) <= CLOSE


def _centre(pixels: Tensor, high: int, wide: int) -> Tensor:
    """Centre crop, with zeros around smaller images."""
    down, right = max(0, high - pixels.shape[-2]), max(0, wide - pixels.shape[-1])
    pixels = F.pad(pixels, ((right + 1) // 2, right // 2, (down + 1) // 2, down // 2))
    top, left = (pixels.shape[-2] - high) // 2, (pixels.shape[-1] - wide) // 2
    return pixels[..., top : top + high, left : left + wide]


def load_processor(name: str, path: Path | None) -> Any | None:
    """The image processor beside a model; `None` if it has none.

    Args:
        path: of the model's folder, `None` for a Hub id.
    """
    if path is not None and not any((path / file).is_file() for file in FILES):
        return None
    try:
        with _quietly():
            from transformers import AutoImageProcessor

            return AutoImageProcessor.from_pretrained(str(path or hub_id(name)))
    except Exception as error:  # many types, as for models
        if path is None and isinstance(error, OSError):
            return None
        raise InputError(f"The image processor of {name!r} cannot be loaded: {reason(error)}") from error


def plain_processor(shape: tuple[int, ...]) -> Any:
    """The processor of a model that is trained on pixels in [0, 1] of this shape."""
    with _quietly():
        from transformers import ViTImageProcessor

        return ViTImageProcessor(size={"height": shape[1], "width": shape[2]}, do_normalize=False)


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress the line that transformers logs for each processor if torchvision is not installed."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
