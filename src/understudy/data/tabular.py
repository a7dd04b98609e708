"""The forms that records in memory may have, as lists of records or `datasets` sets: data frames, columns, torch data sets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, IterableDatasetDict
from torch import Tensor
from torch.utils import data as torch_data

from understudy.data.folders import own_names
from understudy.errors import InputError

SPLITS = ("train", "validation", "test")


def is_table(value: Any) -> bool:
    """Whether a value holds records of one split."""
    return (
        isinstance(value, (Dataset, list, tuple, torch_data.Dataset))
        or _frame(value) is not None
        or isinstance(value, (IterableDataset, Iterator))
    )


def is_data(value: Any, keys: Collection[str] = ()) -> bool:
    """Whether `value` is a data set: a table, a mapping from splits to these, or one from columns to their values.

    Args:
        keys: of a recipe's `data`, whose mapping is none.
    """
    if not isinstance(value, Mapping):
        return is_table(value) or isinstance(value, IterableDatasetDict)
    if not value or set(value) <= set(keys):
        return False
    return (_are_splits(value) and all(map(is_table, value.values()))) or _are_columns(value)


def tables_of(data: Any) -> dict[str, Dataset | list[Any]]:
    """The tables of each split; one without splits is the train split.

    Raises:
        InputError: the set is streaming, or its columns have different lengths.
    """
    if isinstance(data, Mapping) and not _are_columns(data):
        return {split: _rows(data[name]) for split, name in own_names("data", data).items()}
    return {"train": _rows(data)}


def _are_splits(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping's keys are names of splits; those of a `DatasetDict` may be any."""
    if all(isinstance(one, Dataset) for one in value.values()):
        return True
    names = own_names("data", map(str, value))
    return all(split in SPLITS or split.startswith("test_") for split in names)


def _are_columns(value: Any) -> bool:
    """Whether a mapping is from names of columns to their values."""
    if not isinstance(value, Mapping) or not value or _are_splits(value):
        return False
    return all(isinstance(column, (list, tuple, np.ndarray, Tensor)) for column in value.values())


def _rows(value: Any) -> Dataset | list[Any]:
    if isinstance(value, (IterableDataset, IterableDatasetDict, Iterator)):
        raise InputError(
            f"data is {_a(type(value).__name__)}, which has no length: give a Dataset or a list of records, as "
            "list(itertools.islice(data, 1000)) of the first thousand."
        )
    if isinstance(value, (Dataset, list)):
        return value
    frame = _frame(value)
    if frame is not None:
        return frame
    if isinstance(value, tuple):
        return list(value)
    return _of_columns(value) if isinstance(value, Mapping) else _of_torch(value)


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _frame(value: Any) -> list[Any] | None:
    """The records of a frame of pandas or polars, or of a table of pyarrow; `None` of anything else."""
    kind = type(value).__module__.partition(".")[0], type(value).__name__
    read = {("pandas", "DataFrame"): "to_dict", ("polars", "DataFrame"): "to_dicts", ("pyarrow", "Table"): "to_pylist"}
    if kind not in read:
        return None
    return list(value.to_dict("records") if kind[0] == "pandas" else getattr(value, read[kind])())


def _of_columns(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"data: its columns have different lengths ({said}): give each one value for each record.")
    held = [c.detach().cpu().numpy() if isinstance(c, Tensor) else c for c in columns.values()]
    return [dict(zip(columns, map(_value, cells), strict=True)) for cells in zip(*held, strict=True)]


def _of_torch(value: torch_data.Dataset[Any]) -> list[Any]:
    """The items of a map-style data set of torch: records, or images with classes as those of torchvision."""
    if not hasattr(value, "__len__") or isinstance(value, torch_data.IterableDataset):
        raise InputError(
            f"data is {_a(type(value).__name__)} without a length: give a map-style data set or a list of records."
        )
    items = [value[i] for i in range(len(value))]
    names = getattr(value, "classes", None)
    rows: list[Any] = []
    scaled = all(isinstance(item, (tuple, list)) and _in_unit(item[0]) for item in items)
    for i, item in enumerate(items):
        if isinstance(item, Mapping):
            rows.append({key: _value(cell) for key, cell in item.items()})
        elif isinstance(item, (tuple, list)) and len(item) == 2:
            image, label = _value(_image(item[0], scaled)), _value(item[1])
            label = names[label] if isinstance(names, list) and isinstance(label, int) and label < len(names) else label
            rows.append({"image": image, "label": label})
        else:
            raise InputError(
                f"data, record {i} of its {type(value).__name__} is {type(item).__name__}: give mappings of columns, or pairs "
                "of an image and its class."
            )
    return rows


def _in_unit(image: Any) -> bool:
    """Whether an image is a tensor of fractions from 0 to 1, as `ToTensor` of torchvision makes them."""
    return isinstance(image, Tensor) and image.is_floating_point() and bool((image.min() >= 0) & (image.max() <= 1))


def _image(image: Any, scaled: bool) -> Any:
    """An image with its channels last, which torch has first; `scaled` ones as uint8."""
    if not isinstance(image, Tensor):
        return image
    image = (image * 255).round().to(torch.uint8) if scaled else image
    return image.permute(1, 2, 0) if image.dim() == 3 else image


def _value(cell: Any) -> Any:
    """A value of a record as Python or NumPy has it."""
    if isinstance(cell, Tensor):
        cell = cell.detach().cpu().numpy()
    return cell.item() if isinstance(cell, np.generic) or (isinstance(cell, np.ndarray) and not cell.ndim) else cell
