"""Generation of images or points: 8 × 8 digits by default, the world `ring8`, any image set, or no data at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from understudy.data.images import OPTIONS as IMAGE_OPTIONS
from understudy.data.noise_sets import ExampleSet, NoiseSet, Reference, Source, collate_noise, load_source
from understudy.errors import InputError, nearest
from understudy.evaluation.generation import evaluate_generation
from understudy.losses.diffusion import check_prediction
from understudy.models import ModelAdapter
from understudy.models.denoisers import is_new_denoiser, load_denoiser
from understudy.models.diffusion import Sampler
from understudy.synthetic.ring8 import ring8
from understudy.tasks.base import Prepared, TaskDefaults, merged

_POINTS = {
    "max_steps": 4000,
    "per_device_train_batch_size": 256,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
    "save_steps": 1000,
    "logging_steps": 50,
}
_IMAGES = {
    "max_steps": 1000,
    "per_device_train_batch_size": 64,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
}
_TEACHER = {"max_steps": 2000, "per_device_train_batch_size": 64, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}

_OWN = {
    "name": None,
    "size": 64_000,
    "samples": None,
    "conditional": False,
    "guidance": None,
    "null_class": False,
    "prediction": None,
    "compare_steps": [1, 2, 4, 16],
    "teacher_steps": None,
    "rejected_column": None,
}
"""Keys of `data` beside those of image sets, with their defaults."""
LEAST, SHARE = 64, 50
"""Unless told otherwise an evaluation draws so many samples at least, and one for so many examples trained on: a sample
costs as many calls of the networks as all samplers take that are compared."""
WORLDS = {"ring8": ring8()}


class ImageGeneration(TaskDefaults):
    """Generate samples like the data, or like the teacher's samples if there are no data."""

    name = "image_generation"
    kind = "noise"
    unit = "samples"
    metric = "distance"
    higher_is_better = False
    baseline = "denoise"
    preflight_examples = 32

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Default: digits, with a small U-Net that is trained as teacher and copied into the student; `ring8` with its
        closed form. A trained teacher named without data needs no data."""
        data = recipe.get("data") or {}
        teacher = recipe.get("teacher") or {}
        knows = "model" in teacher and teacher.get("train") is None and not is_new_denoiser(teacher["model"])
        # A trained teacher's samples have their own shape, and nothing else is needed of data.
        data.setdefault("name", "noise" if knows and recipe.get("method") != self.baseline else "digits")
        world = data["name"] in WORLDS
        learns = recipe.get("method") == self.baseline
        if recipe.get("teacher") is None and not learns:
            if data["name"] == "noise":
                raise InputError("data=noise is generation without data: name the teacher that knows how (`teacher`).")
            recipe["teacher"] = {"model": "exact"} if world else {"model": "unet:16,32", "train": dict(_TEACHER)}
        if recipe.get("student") is None:
            network = "denoiser:128,128,128" if world else ("unet:16,32" if learns else "teacher")
            recipe["student"] = {"model": network}
        recipe["data"] = data
        recipe["trainer"] = merged(_POINTS if world else _IMAGES, recipe.get("trainer") or {})
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        given = dict(recipe.data)
        known = {*_OWN, *IMAGE_OPTIONS, "image_size"}
        for key in given:
            if key not in known:
                raise InputError(f"Unknown key data.{key}.{nearest(key, known)} Known: {', '.join(sorted(known))}.")
        own = {key: given.pop(key, default) for key, default in _OWN.items() if key != "name"}
        source = load_source(given, WORLDS, own["rejected_column"])
        world = given["name"] in WORLDS
        for key in ("size", "samples", "teacher_steps"):
            _positive(f"data.{key}", own[key], optional=key != "size")
        if not isinstance(own["compare_steps"], list) or not own["compare_steps"]:
            raise InputError(f"data.compare_steps is {own['compare_steps']!r} and must be a list of whole numbers.")
        for value in own["compare_steps"]:
            _positive("data.compare_steps", value)
        weight = own["guidance"]
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 <= weight < math.inf
        if weight is not None and not (number and own["conditional"]):
            raise InputError(f"data.guidance is {weight!r}: a number of at least 0, with data.conditional=true.")
        if own["prediction"] is not None:
            check_prediction(str(own["prediction"]))
        classes = source.classes if own["conditional"] else 0
        if own["conditional"] and not source.classes:
            raise InputError(
                f"data.conditional needs classes, and data={given['name']} has none. Name data with classes."
            )
        many = own["teacher_steps"] or (200 if world else 32)
        references = {s: _reference(source, s, own, many) for s in ("train", "validation", "test")}
        samples, notes = own["samples"], list(source.notes)
        if samples is None:
            most = 4000 if world else 600
            samples = min(most, max(LEAST, _drawn(recipe.trainer, own["size"]) // SHARE))
            if samples < most:
                notes.append(
                    f"A run this short is evaluated on {samples} samples instead of {most}: set data.samples for more."
                )
        sets: dict[str, Any] = {s: NoiseSet(samples, s, classes, references[s]) for s in ("validation", "test")}
        if recipe.build_method().requires.needs_teacher:
            sets["train"] = NoiseSet(own["size"], "train", classes, references["train"])
        else:  # a method without a teacher learns from the examples
            sets["train"] = _examples(source, bool(classes))

        def keep(store: Path) -> None:
            for reference in references.values():
                reference.store = store

        return Prepared(
            **sets,
            collate=collate_noise,
            classes=classes,
            input_shape=source.shape,
            notes=notes,
            hashes={"data": source.key},
            facts={
                "centres": source.centres,
                "deviation": source.deviation,
                "steps": many,
                **{k: own[k] for k in ("prediction", "null_class", "guidance")},
            },
            stored=keep,
        )

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        facts = prepared.facts
        rows = load_denoiser(
            spec.model if source is None else source,
            shape=prepared.input_shape,
            classes=prepared.classes,
            centres=facts["centres"],
            deviation=facts["deviation"],
            sampler=Sampler(steps=facts["steps"], guidance=facts["guidance"]),
            prediction=facts["prediction"],
            null=facts["null_class"],
        )
        # one-call samplers use no guidance
        if facts["guidance"] is not None and rows.sampler.steps and not rows.sampler.guided:
            rows.sampler = replace(rows.sampler, guidance=facts["guidance"])
        if spec.quantization is not None:
            raise InputError("Denoisers are not quantised here: leave the model's quantization out.")
        if spec.dtype != "auto":
            rows.model.to(getattr(torch, spec.dtype))
        if prepared.input_shape and rows.shape != prepared.input_shape:
            raise InputError(
                f"{spec.model} makes examples of shape {rows.shape}, and the data's are {prepared.input_shape}."
            )
        if prepared.classes and rows.classes != prepared.classes:
            raise InputError(
                f"{spec.model} can be asked for {rows.classes} classes, and the data has {prepared.classes}."
            )
        return rows

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """Distance from the real examples with one call, and that of the teacher at several step budgets."""
        examples: Any = loader.dataset
        while not isinstance(examples, NoiseSet):  # a subset of one
            examples = examples.dataset
        assert examples.reference is not None  # evaluation splits have one
        return evaluate_generation(student, teacher, loader, examples.reference)


def _reference(source: Source, split: str, own: dict[str, Any], many: int) -> Reference:
    read, worse = source.examples, source.rejected
    image = source.centres is None
    return Reference(
        (lambda: read(split)) if read is not None else None,
        (lambda: read("train")) if read is not None and image else None,
        source.centres,
        source.key,
        tuple(own["compare_steps"]),
        many,
        source.deviation,
        rejected=(lambda: worse(split)) if worse is not None else None,
    )


def _examples(source: Source, conditional: bool) -> ExampleSet:
    if source.examples is None:
        raise InputError("A denoiser learns from examples, and data=noise has none. Name data.")
    clean, labels = source.examples("train")
    return ExampleSet(clean, labels if conditional else labels.new_full(labels.shape, -1))


def _drawn(trainer: Mapping[str, Any], size: int) -> int:
    """Approximate number of examples that a run trains on, from its trainer options."""
    batch = int(trainer.get("per_device_train_batch_size", 8)) * int(trainer.get("gradient_accumulation_steps", 1))
    steps = int(trainer.get("max_steps", 0))
    return steps * batch if steps > 0 else int(size * float(trainer.get("num_train_epochs", 3)))


def _positive(key: str, value: Any, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{key} is {value!r} and must be a whole number of at least 1.")
