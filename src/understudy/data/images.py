"""Image sets in memory with their splits, limits and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.data.batch import IGNORE, UNLABELLED
from understudy.data.image_pools import read_pool
from understudy.data.image_set import ImageSet, training_order
from understudy.data.image_sources import Embedded, read_source
from understudy.data.noise import uniform
from understudy.errors import InputError, nearest

OPTIONS = {
    *("name", "limit", "image_column", "label_column", "for_teacher", "teacher_limit", "imbalance", "seed"),
    *("validation_size", "with_validation", "label_noise", "teacher_random_classes"),
    *("modulo", "label_map", "unlabelled", "labelled", "domain_column", "only", "size", "input_data_format", "pool"),
}


def collate_images(items: ImageSet | Sequence[tuple[Any, ...]], domains: Sequence[str] = ()) -> dict[str, Tensor]:
    """Tensors of a `Batch`, from examples or a part of a set; uint8 pixels become [0, 1], names of `domains` indices."""
    named: Iterable[Any] | None
    if isinstance(items, ImageSet):
        pixels, labels, ids, named = items.pixels, items.labels, items.ids, items.domains
    else:
        images, classes, numbers, *names = zip(*items, strict=True)
        pixels, labels, ids = torch.stack(images), torch.tensor(classes), torch.tensor(numbers)
        named = names[0] if names else None
    return {
        **({} if named is None else {"domains": torch.tensor([domains.index(str(d)) for d in named])}),
        "pixel_values": pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float(),
        "labels": labels,
        "ids": ids,
    }


@dataclass
class Splits:
    """Train, validation and test sets of one source, with the names of the classes and a content hash.

    `more_tests` are the source's further test sets, whose names begin with `test_`.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: list[str]
    teacher_train: ImageSet
    notes: list[str] = field(default_factory=list)
    hash: str = ""
    more_tests: dict[str, ImageSet] = field(default_factory=dict)
    domains: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.pixels.shape[1:])


def load_images(
    spec: Mapping[str, Any], embedded: Mapping[str, Embedded] = MappingProxyType({}), *, unlabelled: bool = False
) -> Splits:
    """Read an image set.

    Args:
        spec: `name` (`digits`, one of `embedded`, a set in `UNDERSTUDY_DATA`, a folder or file, a Hub id), `limit` (training
            examples the student may use), `teacher_limit`, `for_teacher` (train on the teacher's part), `imbalance`
            (training examples of the first class for one of the last, falling by a constant factor between; the test
            examples of the rarest three in ten classes are the further test set `test_rare`),
            `validation_size` (examples to set aside where there is no validation split), `with_validation` (true: the
            student trains on the validation examples too, for a last fit), `label_noise` (share of the student's
            training labels that become random ones), `teacher_random_classes` (classes whose examples have random
            labels where the teacher is trained), `seed` (of such noise, and of made-up sets), `modulo` or `label_map` (coarser
            classes: the label modulo a number, or a new class for each; the old labels stay known as subclasses),
            `pool` (a set, or a list of them, whose images the student trains on without labels, in place of its part of
            the training examples; `limit` counts these), `unlabelled` (hide the student's training labels), `labelled` (hide all but so many of each class), `domain_column` (names each domain), `only` (drop the others),
            `size` (a side in pixels, or [height, width]: every image is resized to it),
            `input_data_format` (`channels_first` or `channels_last`, of arrays whose shape does not tell).
        embedded: sets that need no file, by name: from `spec` to the examples of each split and the classes' names.
        unlabelled: whether the set may do without classes (`label_column` is `None`).

    The first tenth of a seeded permutation of the training part becomes the validation split where there is none.
    A random label is any class, the right one included.
    """
    _check_keys(spec)
    name = str(spec["name"])
    notes: list[str] = []
    pools, classes = _coarser(*read_source(name, spec, embedded, notes), spec)
    pools, domains = _of_domains(name, pools, spec)
    train, test = pools["train"], pools.get("test")
    order = training_order(len(train))
    if test is None:
        cut = max(1, len(train) // 5)
        test, order = train.select(order[:cut]), order[cut:]
        notes.append(f"{name} has no test split: {cut} of its examples were set aside as one.")
    validation = pools.get("validation")
    if validation is None:
        cut = max(1, len(order) // 10)
        if spec.get("validation_size") is not None:
            cut = _count(spec, "validation_size", len(order) - 1)
        validation, order = train.select(order[:cut]), order[cut:]
        notes.append(f"{cut} training examples were set aside for validation.")
    elif spec.get("validation_size") is not None:
        raise InputError(f"{name} has a validation split of its own: leave data.validation_size out.")
    pool = train.select(order)
    if spec.get("imbalance") is not None:
        pool = _long_tailed(pool, spec["imbalance"], len(classes), notes)
        pools |= _rare(test, len(classes))
    limit, teacher_limit = _count(spec, "limit", len(pool)), _count(spec, "teacher_limit", len(pool))
    teacher_train = _mistaught(pool.select(slice(0, teacher_limit)), spec, classes)
    if spec.get("for_teacher"):
        student = teacher_train
    elif spec.get("pool") is not None:
        student, domains = read_pool(spec, embedded, train, notes)
    else:
        student = _students(pool.select(slice(0, limit)), validation, spec, len(classes), notes)
    parts = {"train": student, "validation": validation, "test": test}
    more = {split: part for split, part in pools.items() if split.startswith("test_")}
    for split, part in {**parts, **more}.items():
        _check(name, split, part, len(classes), unlabelled)
    digest = hashlib.sha256(json.dumps(dict(spec), default=str, sort_keys=True).encode())
    for part in (*parts.values(), teacher_train, *more.values()):
        digest.update(part.pixels.numpy().tobytes() + part.labels.numpy().tobytes())
    return Splits(student, validation, test, classes, teacher_train, notes, digest.hexdigest(), more, domains)


def _students(
    part: ImageSet, validation: ImageSet, spec: Mapping[str, Any], classes: int, notes: list[str]
) -> ImageSet:
    """The student's part of the training examples, with the labels that it may read."""
    part = _noisy(part, spec, classes)
    if spec.get("labelled") is not None:
        part = _few_labels(part, spec, classes, notes)
    if _flag(spec, "with_validation"):
        part = _joined(part, validation)
    if _flag(spec, "unlabelled"):
        part = part.relabelled(torch.full_like(part.labels, UNLABELLED))
        notes.append("The student's training part is used without its labels.")
    return part


def _check_keys(spec: Mapping[str, Any]) -> None:
    for key in spec:
        if key not in OPTIONS:
            raise InputError(f"Unknown key data.{key}.{nearest(key, OPTIONS)} Known: {', '.join(sorted(OPTIONS))}.")
    if type(spec.get("seed", 0)) is not int or not 0 <= spec.get("seed", 0) < 2**32:
        raise InputError(f"data.seed is {spec['seed']!r} and must be a whole number from 0 to {2**32 - 1}.")


def _of_domains(
    name: str, pools: dict[str, ImageSet], spec: Mapping[str, Any]
) -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    """The examples of the configured domain, or all, and the names of all domains."""
    column, only = spec.get("domain_column"), spec.get("only")
    lacks = [split for split, part in pools.items() if part.domains is None]
    if column is None and only is not None:
        raise InputError("data.only names a domain: say which column they are in with data.domain_column.")
    if column is None:
        return pools, ()
    if lacks:
        raise InputError(
            f"{name} has no columns, and data.domain_column requires {column!r}: give a table or a Hub set."
        )
    names = tuple(sorted({str(d) for part in pools.values() if part.domains is not None for d in part.domains}))
    if only is None:
        return pools, names
    if only not in names:
        raise InputError(f"Unknown domain data.only={only!r}.{nearest(str(only), names)} Known: {', '.join(names)}.")
    return {s: p.select(torch.from_numpy(p.domains == only)) for s, p in pools.items()}, names


def _coarser(
    pools: dict[str, ImageSet], classes: list[str], spec: Mapping[str, Any]
) -> tuple[dict[str, ImageSet], list[str]]:
    """Classes merged by `modulo` or `label_map`; ignored labels are unchanged."""
    modulo, chosen = spec.get("modulo"), spec.get("label_map")
    if modulo is None and chosen is None:
        return pools, classes
    if modulo is not None and chosen is not None:
        raise InputError("data.modulo and data.label_map both say what the classes are: give one.")
    if modulo is not None and not (type(modulo) is int and 2 <= modulo <= len(classes)):
        raise InputError(f"data.modulo is {modulo!r} and must be a whole number from 2 to the {len(classes)} classes.")
    new = [i % modulo for i in range(len(classes))] if modulo is not None else chosen
    if (
        not isinstance(new, list)
        or len(new) != len(classes)
        or any(type(c) is not int for c in new)
        or set(new) != set(range(len(set(new))))
    ):
        raise InputError(
            f"data.label_map must be a list of a new class for each of the {len(classes)} classes, numbered from 0 without gaps."
        )
    for split, part in pools.items():
        _check(str(spec["name"]), split, part, len(classes))
    into = torch.tensor(new)
    out = {}
    for split, part in pools.items():
        labels = torch.where(part.labels >= 0, into[part.labels.clamp(min=0)], part.labels)
        out[split] = ImageSet(
            part.pixels, labels, part.ids, parts=torch.stack([labels, part.labels], 1), domains=part.domains
        )
    return out, [str(i) for i in range(int(into.max()) + 1)]


def _long_tailed(pool: ImageSet, ratio: Any, classes: int, notes: list[str]) -> ImageSet:
    """Keep of class c a fraction ratio^(−c / (classes − 1)) of the number of the first class, the first examples in
    order."""
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not ratio >= 1:
        raise InputError(f"data.imbalance is {ratio!r} and must be a number of at least 1.")
    most = int((pool.labels == 0).sum())
    keep = torch.zeros(len(pool), dtype=torch.bool)
    for c in range(classes):
        number = max(1, round(most * float(ratio) ** (-c / max(1, classes - 1))))
        keep[(pool.labels == c).nonzero()[:number, 0]] = True
    notes.append(f"Long-tailed training part: {torch.bincount(pool.labels[keep]).tolist()} examples by class.")
    return pool.select(keep)


def _rare(test: ImageSet, classes: int) -> dict[str, ImageSet]:
    """The test examples of the last three in ten classes, at least one class, as a separate set."""
    few = test.labels >= classes - max(1, round(0.3 * classes))
    return {"test_rare": test.select(few)} if few.any() else {}


def _noisy(part: ImageSet, spec: Mapping[str, Any], classes: int) -> ImageSet:
    """Replace a fraction of a part's labels by random ones."""
    share = spec.get("label_noise")
    if share is None:
        return part
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share <= 1:
        raise InputError(f"data.label_noise is {share!r} and must be a share between 0 and 1.")
    drawn = _draw(part, spec, 1)
    chosen = torch.zeros(len(part), dtype=torch.bool)
    chosen[drawn.argsort()[: round(share * len(part))]] = True
    return _relabelled(part, chosen & (part.labels >= 0), _draw(part, spec, 2), classes)


def _mistaught(part: ImageSet, spec: Mapping[str, Any], classes: list[str]) -> ImageSet:
    """Random labels for all examples of some classes."""
    wrong = spec.get("teacher_random_classes")
    if wrong is None:
        return part
    numbers = wrong if isinstance(wrong, list) else [wrong]
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(classes):
            raise InputError(
                f"data.teacher_random_classes names {number!r} and must name class numbers in 0 … {len(classes) - 1}."
            )
    chosen = torch.isin(part.labels, torch.tensor(numbers).long())
    return _relabelled(part, chosen, _draw(part, spec, 3), len(classes))


def _draw(part: ImageSet, spec: Mapping[str, Any], stream: int) -> Tensor:
    """A random number in (0, 1) for each example, by its id."""
    return uniform(part.ids, (1,), seed=int(spec.get("seed", 0)), step=0, stream=stream)[:, 0]


def _relabelled(part: ImageSet, chosen: Tensor, drawn: Tensor, classes: int) -> ImageSet:
    labels = torch.where(chosen, (drawn * classes).long(), part.labels)
    return part.relabelled(labels, clean=part.labels)


def _few_labels(part: ImageSet, spec: Mapping[str, Any], classes: int, notes: list[str]) -> ImageSet:
    """The labels of the first examples of each class; the rest has none."""
    number = _count(spec, "labelled", len(part))
    labels = torch.full_like(part.labels, UNLABELLED)
    for c in range(classes):
        first = (part.labels == c).nonzero()[:number, 0]
        labels[first] = part.labels[first]
    notes.append(f"{int((labels >= 0).sum())} of the student's {len(part)} training examples have a label.")
    return part.relabelled(labels)


def _joined(a: ImageSet, b: ImageSet) -> ImageSet:
    """Both parts concatenated; the second's ids are offset, since they may come from another file."""
    clean = [part.labels if part.clean is None else part.clean for part in (a, b)]
    pixels, labels = torch.cat([a.pixels, b.pixels]), torch.cat([a.labels, b.labels])
    ids = torch.cat([a.ids, b.ids + a.ids.max() + 1])
    domains = np.concatenate([a.domains, b.domains]) if a.domains is not None and b.domains is not None else None
    return ImageSet(pixels, labels, ids, torch.cat(clean) if a.clean is not None else None, domains=domains)


def _flag(spec: Mapping[str, Any], key: str) -> bool:
    value = spec.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"data.{key} is {value!r} and must be true or false.")
    return value


def _count(spec: Mapping[str, Any], key: str, most: int) -> int:
    value = spec.get(key)
    if value is None:
        return most
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"data.{key} is {value!r} and must be a whole number of at least 1.")
    return min(value, most)


def _check(name: str, split: str, part: ImageSet, classes: int, unlabelled: bool = False) -> None:
    if len(part) == 0:
        raise InputError(f"{name}: the {split} split is empty.")
    labels = part.labels[part.labels != IGNORE]
    if len(labels) == 0:
        raise InputError(f"{name}: no example of the {split} split has a label.")
    if not classes and unlabelled:
        return
    if not classes:
        raise InputError(
            f"{name} has no classes, which this task learns: put the images into a folder for each class, or name the "
            "column of the classes with data.label_column."
        )
    if split == "train":
        labels = labels[labels != UNLABELLED]
    if labels.numel() == 0:
        return
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise InputError(f"{name}: label {wrong} in the {split} split is outside 0 … {classes - 1}.")
