"""Image files, and tables and archives of images, as one array of pixels: rotated by EXIF, on white, with one size."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from understudy.data.batch import UNLABELLED
from understudy.data.class_labels import by_name, parquet_names, places_of, spell, text_classes
from understudy.data.folders import files_below, split_folders, visible
from understudy.data.image_set import ImageSet
from understudy.data.records import absent
from understudy.data.tables import cells, class_numbers, columns_of, in_single, read_npz, read_parquet
from understudy.errors import InputError
from understudy.files import replacing

UNREAD = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow lists but cannot read itself; some would start another program."""
MOST_PIXELS = 2**26
CHANNELS = (1, 3, 4)
LAYOUTS = ("channels_first", "channels_last")


@cache
def formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """The supported image formats, and the suffixes of their files."""
    Image.init()
    known = tuple(sorted(set(Image.OPEN) - UNREAD))
    return known, frozenset(end for end, kind in Image.registered_extensions().items() if kind in known)


def decode(cells: Iterable[Any], source: str, counts: Counter[str], size: Any = None) -> Tensor:
    """Decode images to uint8 `[images, channels, height, width]`: one channel if all are gray, else three.

    Args:
        cells: bytes, paths, PIL images or arrays.
        counts: incremented for each kind of change to an image.
        size: as in `load_images`.

    Raises:
        InputError: an image that cannot be read, or images of several sizes and no `size`.
    """
    into = wanted_size(size)
    out: list[Tensor] = []
    places: list[str] = []
    for i, cell in enumerate(cells):
        places.append(str(cell) if isinstance(cell, Path) else f"{source}, row {i}")
        cell = of_array(places[-1], cell) if isinstance(cell, np.ndarray) else cell
        pixels = torch.from_numpy(_pixels(places[-1], cell, counts))
        out.append(pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1))
    if not out:
        raise InputError(f"{source} holds no images.")
    if len({len(x) for x in out}) > 1:
        counts["gray images beside coloured ones were given three equal channels"] += sum(len(x) == 1 for x in out)
        out = [x.expand(3, -1, -1) for x in out]
    if into is not None:
        out = [resized(x[None], into, counts)[0] for x in out]
    odd = next((i for i, x in enumerate(out) if x.shape != out[0].shape), None)
    if odd is not None:
        first, other = (" × ".join(map(str, x.shape[1:])) for x in (out[0], out[odd]))
        raise InputError(
            f"{places[odd]} is {other} pixels (height × width) and {places[0]} is {first}: set data.size, say "
            f"data.size={min(out[0].shape[1:])}, and each is resized to it."
        )
    return torch.stack(out)


def resized(pixels: Tensor, size: tuple[int, int], counts: Counter[str]) -> Tensor:
    """`[images, channels, height, width]` resized: bilinear with antialiasing, as image processors do."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    counts[f"images were resized to {size[0]} × {size[1]}"] += len(pixels)
    kept = pixels if pixels.dtype == torch.uint8 else pixels.float()
    return F.interpolate(kept, size, mode="bilinear", antialias=True)


def wanted_size(size: Any) -> tuple[int, int] | None:
    """Height and width of `data.size`."""
    if size is None:
        return None
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    if len(sides) != 2 or not all(type(s) is int and 1 <= s <= 4096 for s in sides):
        raise InputError(f"data.size is {size!r} and must be a number of pixels, or [height, width], each up to 4096.")
    return int(sides[0]), int(sides[1])


def of_array(where: str, values: np.ndarray[Any, Any]) -> Image.Image:
    """The image that an array of uint8 holds: gray `[height, width]` or `[height, width, 1]`, colours with their channels
    last, or first where the last axis cannot hold them.

    Raises:
        InputError: another type or shape.
    """
    shape = values.shape
    if values.ndim == 3 and shape[2] not in CHANNELS and shape[0] in CHANNELS:
        values = np.moveaxis(values, 0, 2)
    if (
        values.dtype != np.uint8
        or 0 in shape
        or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in CHANNELS))
    ):
        raise InputError(
            f"{where}: its image is an array of {values.dtype} {shape}; give uint8 of 0 … 255, (height, width), (height, width, "
            "channels) or (channels, height, width) with 1, 3 or 4 channels."
        )
    return Image.fromarray(
        np.ascontiguousarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)
    )


def read_image(where: str, cell: Any, counts: Counter[str]) -> Image.Image:
    """One image in RGB, rotated by EXIF and on white.

    Args:
        where: for messages. cell: bytes, a path or a PIL image.
        counts: incremented for each kind of change.
    """
    return Image.fromarray(_pixels(where, cell, counts)).convert("RGB")


def _pixels(where: str, cell: Any, counts: Counter[str]) -> np.ndarray[Any, Any]:
    """One image as uint8 `[height, width]` or `[height, width, 3]`."""
    if absent(cell):
        raise InputError(f"{where} has no image. Give it one, or remove the row.")
    try:
        given = io.BytesIO(cell) if isinstance(cell, bytes) else cell
        opened = given if isinstance(given, Image.Image) else Image.open(given, formats=formats()[0])
        width, height = opened.size
        if width * height > MOST_PIXELS:  # before decompressing
            raise InputError(
                f"{where} is {height} × {width} pixels, and at most {MOST_PIXELS} are read. Make it smaller."
            )
        counts["images hold several pictures, of which the first is used"] += getattr(opened, "n_frames", 1) > 1
        turned = opened.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        counts["photographs were turned upright, as their EXIF data says"] += turned
        upright = ImageOps.exif_transpose(opened)
        return _eight_bit(where, upright, counts)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{where} says that it has more than {MOST_PIXELS:,} pixels. Make it smaller.") from None
    except Exception as error:  # Pillow raises many types; the image cannot be read
        raise InputError(f"{where} is not a readable image ({type(error).__name__}).") from None


def _eight_bit(where: str, image: Image.Image, counts: Counter[str]) -> np.ndarray[Any, Any]:
    """The upper eight of 16 bits; transparent pixels on white; gray stays gray, other colours become RGB."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{where} has values outside 0 … 65535: save it with 8 or 16 bits.")
        counts["images of 16 bits were scaled to 8"] += 1
        return (values // 256).astype(np.uint8)
    if image.mode == "F":
        raise InputError(f"{where} holds fractions, whose range nothing says: save it with 8 or 16 bits, or as .npz.")
    gray = image.mode in ("L", "1", "LA", "La")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        if np.asarray(layers)[..., 3].min() < 255:
            counts["images have transparent pixels, which were laid on white"] += 1
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return np.array(image.convert("L" if gray else "RGB"))


def class_folders(path: Path, spec: Mapping[str, Any], counts: Counter[str]) -> tuple[dict[str, ImageSet], list[str]]:
    """`CLASS/IMAGE`, optionally below folders named after splits."""
    splits = split_folders(path)
    if splits and "train" not in splits:
        raise InputError(f"{path} has {', '.join(sorted(splits))} but no train folder.")
    if splits:
        counts["entries beside the splits' folders were left out"] += len(visible(path)) - len(splits)
    splits = splits or {"train": path}
    classes = [folder.name for folder in visible(splits["train"]) if folder.is_dir()]
    parts = {}
    for split, root in splits.items():
        images = {folder.name: _images(folder, counts) for folder in visible(root) if folder.is_dir()}
        strange = next((c for c in images if c not in classes), None)
        if strange is not None and classes:
            raise InputError(
                f"{root} has a class {strange!r} that {splits['train']} lacks; its classes are {', '.join(classes)}."
            )
        files = [(f, classes.index(c)) for c, found in images.items() for f in found]
        if not files:
            raise InputError(f"{root} holds no images. Expected {root}/CLASS/IMAGE with a .png, .jpg, .tif, .gif, ….")
        bare = [c for c, found in images.items() if not found]
        if bare and split == "train":
            raise InputError(f"{root / bare[0]} holds no images: give the class some, or remove its folder.")
        counts["files beside the classes' folders were left out"] += sum(e.is_file() for e in visible(root))
        pixels = decode([f for f, _ in files], str(root), counts, spec.get("size"))
        parts[split] = ImageSet(pixels, torch.tensor([i for _, i in files]), torch.arange(len(files)))
    return parts, classes


def _images(folder: Path, counts: Counter[str]) -> list[Path]:
    every = visible(folder)
    images = [f for f in every if f.is_file() and f.suffix.lower() in formats()[1]]
    counts["entries of the classes' folders are no images and were left out"] += len(every) - len(images)
    return images


def are_loose(path: Path) -> bool:
    """Whether images lie in a folder, or in each folder of its splits, without folders of classes."""
    inside = [visible(root) for root in split_folders(path).values() or [path]]
    return not any(entry.is_dir() for entries in inside for entry in entries) and all(
        any(entry.suffix.lower() in formats()[1] for entry in entries) for entries in inside
    )


def loose_images(path: Path, spec: Mapping[str, Any], counts: Counter[str]) -> ImageSet:
    """All images below a folder, without labels."""
    images = [f for f in files_below(path) if f.suffix.lower() in formats()[1]]
    if not images:
        raise InputError(f"{path} holds no images: give a folder with a .png, .jpg, .tif, .gif, … in it.")
    pixels = decode(images, str(path), counts, spec.get("size"))
    return ImageSet(pixels, torch.full((len(images),), UNLABELLED), torch.arange(len(images)))


def image_table(
    files: list[Path], spec: Mapping[str, Any], counts: Counter[str], classes: Sequence[str] = ()
) -> ImageSet:
    """The images of one split from its parquet or .npz files, concatenated.

    Args:
        classes: names by number, if they are known: labels of a file with names of its own are numbered as these are.
    """
    read = {".npz": _archive, ".parquet": _parquet}
    for path in files:
        if path.suffix.lower() not in read:
            raise InputError(
                f"{path} is not an image set: give a folder class/image, a .parquet or .npz file, or a .csv or .jsonl of files."
            )
    parts = [read[path.suffix.lower()](path, spec, counts, classes) for path in files]
    for path, (pixels, labels, domains) in zip(files, parts, strict=True):
        if not len(pixels) == len(labels) or any(len(d) != len(labels) for d in domains):
            raise InputError(
                f"{path} has {len(pixels)} images and {len(labels)} labels. Give one label for each image."
            )
        first = parts[0][0]
        if (pixels.shape[1:], pixels.dtype) != (first.shape[1:], first.dtype):
            raise InputError(
                f"{path} has images of {pixels.dtype} {tuple(pixels.shape[1:])} and {files[0].name} of {first.dtype} "
                f"{tuple(first.shape[1:])}: shards of one split must be alike. Set data.size, or convert them."
            )
    labels = torch.cat([p[1] for p in parts])
    domains = [np.concatenate(column) for column in zip(*(p[2] for p in parts), strict=True)]
    return ImageSet(torch.cat([p[0] for p in parts]), labels, torch.arange(len(labels)), None, None, *domains)


Columns = tuple[Tensor, Tensor, list[np.ndarray[Any, Any]]]


def _parquet(path: Path, spec: Mapping[str, Any], counts: Counter[str], classes: Sequence[str]) -> Columns:
    label, table = label_column(spec), read_parquet(path)
    image = image_column(spec, table.column_names)
    need_columns(path, set(table.column_names), {image, *label, *domain_column(spec)})
    found = [_cell(path, c) for c in cells(path, table, image)]
    pixels = decode(found, str(path), counts, spec.get("size"))
    labels = labels_in(str(path), [cells(path, table, column) for column in label], len(pixels), classes)
    names = parquet_names(path)
    if label:
        labels = torch.tensor(by_name(str(path), labels.tolist(), names.get(label[0]), classes), dtype=torch.int64)
    domains = [domains_in(str(path), c, spell(cells(path, table, c), names.get(c))) for c in domain_column(spec)]
    return pixels, labels, domains


def _cell(path: Path, cell: Any) -> Any:
    """The bytes of an image of `datasets`, or the file it refers to."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    return path.parent / cell if isinstance(cell, str) else cell


def label_values(path: Path, column: str) -> list[Any]:
    """The labels of a parquet or .npz file as they are written; nothing without the column."""
    if path.suffix.lower() == ".npz":
        have = columns_of(path)
        column = "labels" if "labels" in have else column
        return list(read_npz(path, [column])[column].ravel().tolist()) if column in have else []
    table = read_parquet(path)
    return cells(path, table, column) if column in table.column_names else []


def _archive(path: Path, spec: Mapping[str, Any], counts: Counter[str], classes: Sequence[str]) -> Columns:
    have = columns_of(path)
    image, label = image_column(spec, have), label_column(spec)
    image = "images" if "images" in have and "image_column" not in spec else image
    label = ["labels"] if label and "labels" in have else label
    need_columns(path, have, {image, *label, *domain_column(spec)})
    arrays = read_npz(path, [image, *label, *domain_column(spec)])
    pixels = array_pixels(path, image, arrays[image], spec, counts)
    labels = labels_in(str(path), [arrays[column] for column in label], len(pixels), classes)
    return pixels, labels, [arrays[column].astype(str) for column in domain_column(spec)]


def array_pixels(
    path: Path, column: str, raw: np.ndarray[Any, Any], spec: Mapping[str, Any], counts: Counter[str]
) -> Tensor:
    """`[images, channels, height, width]` of an array: uint8 unchanged, other integers by their range, or floats."""
    if raw.ndim and not len(raw):
        raise InputError(f"{path}: {column} is empty: {raw.dtype} {raw.shape}. Give images, or remove the file.")
    if raw.dtype.kind not in "fiub" or not 2 <= raw.ndim <= 4 or 0 in raw.shape:
        raise InputError(
            f"{path}: {column} is {raw.dtype} {raw.shape}; give numbers, (images, height, width, channels), (images, "
            "channels, height, width), (images, height, width) or (images, features)."
        )
    if raw.dtype.kind == "f":
        wrong = np.flatnonzero(~in_single(raw).reshape(len(raw), -1).all(1))
        if len(wrong):
            raise InputError(f"{path}: {column} has values of image {wrong[0]} that are not finite. Remove the image.")
        raw = raw.astype(np.float32 if raw.dtype.itemsize > 8 else raw.dtype.newbyteorder("="))
    elif raw.dtype != np.uint8:
        low, high = int(raw.min()), int(raw.max())
        if low < 0 or high > 65535:
            raise InputError(
                f"{path}: {column} is {raw.dtype} from {low} to {high}; give pixels of 8 or 16 bits, or floats."
            )
        counts[f"images were given as {raw.dtype} and {'scaled' if high > 255 else 'taken'} as pixels of 8 bits"] += (
            len(raw)
        )
        raw = (raw.astype(np.uint16) * (255 if raw.dtype == bool else 1) // (256 if high > 255 else 1)).astype(np.uint8)
    pixels = torch.from_numpy(np.ascontiguousarray(raw))
    if pixels.dim() == 2:
        pixels = pixels[:, None, None]
    elif pixels.dim() == 3:
        pixels = pixels[:, None]
    elif _layout(path, column, raw.shape, spec) == "channels_last":
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    into = wanted_size(spec.get("size"))
    return pixels if into is None else resized(pixels, into, counts)


def _layout(path: Path, column: str, shape: tuple[int, ...], spec: Mapping[str, Any]) -> str:
    """The axis of channels: from `data.input_data_format`, else the axis of size 1, 3 or 4 if the others are square."""
    given = spec.get("input_data_format")
    if given is not None:
        if given not in LAYOUTS:
            raise InputError(f"data.input_data_format is {given!r} and must be {' or '.join(LAYOUTS)}.")
        return str(given)
    _, a, b, c = shape
    first, last = (a in (1, 3, 4)) + (b == c > 1), (c in (1, 3, 4)) + (a == b > 1)
    if first == last:
        raise InputError(
            f"{path}: {column} is {shape}, which may have its channels first or last: set data.input_data_format to "
            f"{' or '.join(LAYOUTS)}."
        )
    return LAYOUTS[first < last]


def label_column(spec: Mapping[str, Any]) -> list[str]:
    """The column of labels; none where `label_column` is given as `None`, for images without labels."""
    return [] if spec.get("label_column", "") is None else [str(spec.get("label_column", "label"))]


def image_column(spec: Mapping[str, Any], have: Iterable[str]) -> str:
    """The column of images among those of a table: the configured one, `image`, or `file_name` as `imagefolder` has it."""
    given = spec.get("image_column")
    return str(given) if given is not None else "file_name" if "file_name" in have and "image" not in have else "image"


def labels_in(where: str, columns: list[Any], number: int, classes: Sequence[str] = ()) -> Tensor:
    """The labels of so many images in their column, by number or by the names of `classes`, or `UNLABELLED` without one."""
    if not columns:
        return torch.full((number,), UNLABELLED)
    labels = columns[0].tolist() if isinstance(columns[0], np.ndarray) else list(columns[0])
    if text_classes(labels):
        return torch.tensor(places_of(where, labels, classes, "image"), dtype=torch.int64)
    return torch.from_numpy(class_numbers(where, columns[0], "image"))


def domain_column(spec: Mapping[str, Any]) -> list[str]:
    """The column of domains, if one is configured."""
    return [str(spec["domain_column"])] if spec.get("domain_column") is not None else []


def domains_in(where: str, column: str, values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """The names of domains in their column."""
    row = next((i for i, value in enumerate(values) if absent(value)), None)
    if row is not None:
        raise InputError(
            f"{where}: {column} of image {row} is {values[row]} and names no domain: fill it, or choose another column "
            "(data.domain_column)."
        )
    return np.asarray([str(value) for value in values])


def need_columns(path: Path | str, have: set[str], want: set[str]) -> None:
    """Raise an error for a table that lacks a column."""
    if not want <= have:
        raise InputError(
            f"{path} has columns {', '.join(sorted(have)) or 'none'}; expected {', '.join(sorted(want))}. "
            "Name yours with data.image_column, data.label_column and data.domain_column."
        )


def write_image_split(file: Path, pixels: Tensor, labels: Tensor, **more: Any) -> None:
    """Write `[images, channels, height, width]` and classes as an `.npz` that `image_table` reads, whole or not at all.

    Axes of one channel or one row are left out, so that nothing has to say which axis is which.

    Args:
        more: further arrays, which are not read.
    """
    shape = [n for i, n in enumerate(pixels.shape) if i in (0, 3) or n > 1]
    with replacing(file) as temporary, temporary.open("wb") as opened:
        np.savez_compressed(opened, image=pixels.numpy().reshape(shape), label=labels.numpy(), **more)
