"""Image classification: scikit-learn's digits by default, CIFAR and MNIST from `UNDERSTUDY_DATA`, any folder or set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from understudy.data import Batch, collate_images, find, load_images
from understudy.data.image_set import ImageSet
from understudy.errors import InputError
from understudy.models import ClassifierAdapter, ModelAdapter, few_shot, load_classifier, normalisation, own_classes
from understudy.models.processors import Processor, load_processor, plain_processor
from understudy.models.weights import notes_of
from understudy.models.zero_shot import OPTIONS, ZeroShotClassifier, is_zero_shot, load_tower, load_zero_shot
from understudy.synthetic.images import IMAGES
from understudy.tasks.base import LabelledTask, Prepared, merged
from understudy.tasks.class_names import name_classes

log = logging.getLogger(__name__)

_SMALL = {
    "max_steps": 1000,
    "per_device_train_batch_size": 32,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
}
_REAL = {
    "max_steps": 1000,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "weight_decay": 0.01,
}
_TEACHER = {"max_steps": 1500, "per_device_train_batch_size": 32, "learning_rate": 1e-3}


class ImageClassification(LabelledTask):
    """Predict the class of an image."""

    name = "image_classification"
    kind = "image"
    kinds = frozenset({"image", "classification"})
    unit = "images"
    metric = "accuracy"
    start_data: Mapping[str, Any] = MappingProxyType(
        {"for_teacher": True, "unlabelled": False, "labelled": None, "pool": None}
    )
    higher_is_better = True
    model_options = frozenset({**OPTIONS, **few_shot.OPTIONS})

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Default: digits with a trained MLP teacher; CIFAR-10 with the pretrained ResNet-56."""
        data = recipe.get("data") or {}
        data.setdefault("name", "digits")
        embedded = data["name"] in ("digits", *IMAGES)
        if data["name"] == "digits" and data.get("pool") is None:
            data.setdefault("limit", 200)
        if data["name"] == "clusters":
            data.setdefault("limit", 1600)
        if data["name"] == "digits_shift":
            data.setdefault("limit", 150)
            data.setdefault("validation_size", 100)
        if data["name"] == "subclusters":
            data.setdefault("limit", 100)
            data.setdefault("teacher_limit", 6000)
        recipe["data"] = data
        if recipe.get("teacher") is None:
            if embedded:
                small = "circular:32" if data["name"] == "templates" else "mlp:256,256"
                recipe["teacher"] = {"model": small, "train": dict(_TEACHER)}
            elif data["name"] == "cifar10":
                recipe["teacher"] = {"model": "cifar10_resnets/resnet56"}
            else:
                recipe["teacher"] = {"model": "convnet:32", "train": dict(_TEACHER)}
        if recipe.get("student") is None:
            students = {
                "digits": "mlp:24",
                "digits_shift": "mlp:24,24",
                "clusters": "mlp:48,48",
                "subclusters": "mlp:16",
                "templates": "mlp:256,256",
            }
            recipe["student"] = {"model": students.get(data["name"], "resnet8")}
        recipe["trainer"] = merged(_SMALL if embedded else _REAL, recipe.get("trainer") or {})
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        data = dict(recipe.data)
        augment = data.pop("augment", data["name"] in ("cifar10", "cifar100"))
        splits = load_images(data, IMAGES)
        return Prepared(
            train=splits.train,
            validation=splits.validation,
            test=splits.test,
            teacher_train=splits.teacher_train,
            collate=partial(collate_images, domains=splits.domains),
            domains=splits.domains,
            classes=len(splits.classes),
            input_shape=splits.shape,
            augmentation={} if augment else None,
            notes=list(splits.notes),
            more_tests=splits.more_tests,
            hashes={"data": splits.hash},
            facts={
                "names": splits.classes,
                "prompted": splits.classes,  # also where a method does not read the teacher's classes, and `names` are none
                "student": recipe.student,
                "with_validation": bool(data.get("with_validation")),
            },
        )

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        how: dict[str, Any] = {
            "dtype": spec.dtype,
            "quantization": spec.quantization,
            "trust_remote_code": spec.trust_remote_code,
        }
        options = dict(spec.options or {})
        adapter = options.pop("adapter", False)
        zero_shot = source is None and is_zero_shot(spec.model, spec.trust_remote_code)
        if zero_shot and spec is prepared.facts["student"]:
            if spec.options:
                raise InputError(
                    f"student.options.{next(iter(spec.options))} is of zero-shot teachers: as a student {spec.model} gets a new "
                    "head. Leave it out."
                )
            model: nn.Module = load_tower(spec.model, prepared.classes, **how)
        elif zero_shot:
            model = load_zero_shot(spec.model, prepared.facts["prompted"], **options, **how)
        elif spec.options:
            raise InputError(
                f"{spec.model} has classes of its own: options.{next(iter(spec.options))} is of zero-shot models, such as CLIP."
            )
        else:
            of: dict[str, Any] = {
                "classes": prepared.classes,
                "input_shape": prepared.input_shape,
                "exact": prepared.exact,
            }
            model = load_classifier(spec.model if source is None else source, **of, **how)
        prepared.say(notes_of(model))
        name = str(spec.model if source is None else source) if not isinstance(source, nn.Module) else ""
        processor = processor_of(name, model, prepared.input_shape, prepared)
        classes = prepared.classes if prepared.exact else own_classes(model)
        rows = ClassifierAdapter(model, classes, normalise=normalisation(model), processor=processor)
        if rows.normalise is not None or (processor is not None and not processor.plain):
            _check_pixels(spec.model, prepared.train.pixels)
        rows.try_on(prepared.input_shape)
        if adapter is not False:
            add_adapter(spec.model, rows, prepared, adapter)
        name_classes(rows, prepared, spec.model)
        return rows


def add_adapter(name: str, rows: ClassifierAdapter, prepared: Prepared, adapter: Any) -> None:
    """Give a zero-shot classifier an adapter of the training images that have a label, in place.

    Args:
        adapter: `options.adapter`: true to choose α and β on validation data, or both.

    Raises:
        InputError: no image has a label, or α and β cannot be chosen because no validation image has one or they are trained
            on.
    """
    numbers = few_shot.given(adapter)
    train, validation = (part.select(part.labels >= 0) for part in (prepared.train, prepared.validation))
    if not len(train):
        raise InputError(
            "options.adapter: the training images that have a label vote, and none has one. Label some, without "
            "data.unlabelled and data.pool, or leave options.adapter out."
        )
    if numbers is None and (prepared.facts["with_validation"] or not len(validation)):
        said = "are trained on (data.with_validation)" if len(validation) else "have no labels"
        raise InputError(
            f"options.adapter: alpha and beta are chosen on the validation images, and these {said}. Give both, as in "
            "options.adapter={alpha: 1.0, beta: 5.5}."
        )
    moved = torch.cuda.is_available() and next(rows.parameters()).device.type == "cpu"
    if moved:
        rows.cuda()
    held = few_shot.labelled_images(rows, _batches(train, prepared))
    votes = few_shot.FewShotAdapter(*held, prepared.classes, *(numbers or (0.0, 1.0)))
    if numbers is None:
        found = few_shot.choose(rows, votes, _batches(validation, prepared))
        votes.alpha.fill_(found.alpha)
        votes.beta.fill_(found.beta)
        note = (
            f"{name}: {len(train)} labelled images vote with α = {found.alpha:.4g} and β = {found.beta:.4g}, chosen on "
            f"{found.examples} validation images, where accuracy is {float(found.grid.max()):.4f} ({float(found.grid[0, 0]):.4f} "
            "without votes)."
        )
        log.info("%s", note)
        prepared.say([note])
    rows.model.adapter = votes
    if moved:
        rows.cpu()


def _batches(part: ImageSet, prepared: Prepared, size: int = 64) -> Iterator[Batch]:
    for start in range(0, len(part), size):
        chosen = part.select(slice(start, start + size))
        yield Batch.from_dict(prepared.collate(chosen))


def _check_pixels(name: str, pixels: Tensor) -> None:
    """Refuse numbers that a model's own preprocessing, which is of pixels in [0, 1], would take for pixels."""
    if not pixels.is_floating_point():
        return
    low, high = (float(v) for v in pixels.aminmax())
    if low < -1e-3 or high > 1 + 1e-3:
        raise InputError(
            f"{name} scales pixels in [0, 1] by itself, and the data's are floats from {low:.4g} to {high:.4g}: give pixels as "
            "whole numbers (0 to 255) or as floats in [0, 1]."
        )


def processor_of(name: str, model: nn.Module, shape: tuple[int, ...], prepared: Prepared) -> Processor | None:
    """The processor of a model of transformers for images of `shape`; a plain one if its folder has none."""
    config = getattr(model.body if isinstance(model, ZeroShotClassifier) else model, "config", None)
    if not isinstance(config, PreTrainedConfig) or len(shape) != 3:
        return None
    held = load_processor(name, find(name)) if name else None
    if held is None:
        said = f"{name} has" if name else f"A module ({type(model).__name__}) comes with"
        prepared.say([f"{said} no preprocessor_config.json: it is shown pixels in [0, 1] at their size."])
    channels = getattr(getattr(config, "vision_config", config), "num_channels", shape[0])
    found = Processor(held or plain_processor(shape), shape, channels)
    found.plain = held is None
    if not found.exact:
        prepared.say(
            [
                f"{name}: its {type(held).__name__} is called for each image, which is slow and lets no gradient to the pixels."
            ]
        )
    return found
