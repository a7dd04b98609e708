"""Classification of examples with several modalities, where each model reads its own: a student that sees the image learns
from teachers that hear the sound as well. Embedded: noisy digits that are seen and heard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from understudy.data.paired import check_names, load_paired
from understudy.data.paired_sources import SPOKEN, SPOKEN_MODALITIES, read_paired
from understudy.errors import InputError
from understudy.models import ModelAdapter, load_classifier, normalisation
from understudy.models.modalities import OPTIONS, ModalitiesAdapter, read_by
from understudy.models.weights import notes_of
from understudy.synthetic.av_digits import MODALITIES, av_digits
from understudy.tasks.base import COPY, LabelledTask, Prepared, merged
from understudy.tasks.class_names import name_classes
from understudy.tasks.image_classification import processor_of

EMBEDDED = "av_digits"
_KNOWN = {EMBEDDED: MODALITIES, SPOKEN: SPOKEN_MODALITIES}
_TRAINER = {
    "max_steps": 800,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
}
_TEACHER = {**_TRAINER, "max_steps": 400}
_SMALL, _WIDE = ("mlp:32,32", "fusion:24,32,32"), ("mlp:128,64", "fusion:64,64,64")
"""A network of one modality and one of several: for the embedded data, and for others."""


class MultimodalClassification(LabelledTask):
    """Predict the class of an example from some of its modalities."""

    name = "multimodal_classification"
    kind = "classification"
    unit = "examples"
    metric = "accuracy"
    higher_is_better = True
    start_data: Mapping[str, Any] = MappingProxyType({"for_teacher": True, "unlabelled": False, "labelled": None})
    model_options = frozenset(OPTIONS)

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Default: a student of the first modality; a teacher for each other one, and one of all, trained first."""
        data = recipe.get("data") or {}
        data.setdefault("name", EMBEDDED)
        recipe["data"] = data
        known = data.get("modalities") or _KNOWN.get(data["name"])
        if known is None:
            raise InputError(
                f"Data {data['name']!r} have columns, and nothing says which are modalities: name them, the student's first, "
                "as in data.modalities=[image, audio]."
            )
        check_names(known)
        data["modalities"] = known = list(known)
        one, several = _SMALL if data["name"] == EMBEDDED else _WIDE
        if recipe.get("teacher") is None:
            train = {"train": dict(_TEACHER)}
            members = {m: {"model": one, "options": {"reads": m}, **train} for m in known[1:]}
            together = "_and_".join(known)
            recipe["teacher"] = {
                "model": " + ".join([*members, together]),
                "members": {**members, together: {"model": several, "options": {"reads": known}, **train}},
            }
        if recipe.get("student") is None:
            recipe["student"] = {"model": one}
        for model in (recipe["teacher"].get("members") or {"teacher": recipe["teacher"]}).values():
            _reads(model, known)
        if recipe["student"]["model"] != COPY:
            _reads(recipe["student"], known[0])
        recipe["trainer"] = merged(_TRAINER, recipe.get("trainer") or {})
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        notes: list[str] = []
        embedded = recipe.data["name"] == EMBEDDED
        splits, layout = load_paired(recipe.data, av_digits if embedded else partial(read_paired, notes=notes))
        said = ", ".join(f"{name} {' × '.join(map(str, shape))}" for name, shape in layout.shapes.items())
        return Prepared(
            train=splits.train,
            validation=splits.validation,
            test=splits.test,
            teacher_train=splits.teacher_train,
            collate=layout.collate,
            classes=len(splits.classes),
            notes=[*notes, *splits.notes, f"Modalities (channels × height × width): {said}."],
            hashes={"data": splits.hash},
            facts={"names": splits.classes, "shapes": layout.shapes},
        )

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        shapes: Mapping[str, tuple[int, ...]] = prepared.facts["shapes"]
        reads = read_by(spec.model, spec.options, list(shapes))
        model = load_classifier(
            spec.model if source is None else source,
            classes=prepared.classes,
            input_shape=_shape([shapes[name] for name in reads]),
            dtype=spec.dtype,
            quantization=spec.quantization,
            trust_remote_code=spec.trust_remote_code,
        )
        prepared.say(notes_of(model))
        alone, processor = len(reads) == 1, None
        if alone:
            name = "" if isinstance(source, nn.Module) else str(spec.model if source is None else source)
            processor = processor_of(name, model, shapes[reads[0]], prepared)
        normalise = normalisation(model) if alone else None
        rows = ModalitiesAdapter(model, prepared.classes, reads, normalise=normalise, processor=processor)
        rows.try_on(shapes)
        name_classes(rows, prepared, spec.model)
        return rows


def _reads(model: dict[str, Any], modalities: Any) -> None:
    """Write down what a model reads, if it is not given: a teacher that is trained first is the student of its own run."""
    model["options"] = {"reads": modalities, **(model.get("options") or {})}


def _shape(shapes: Sequence[tuple[int, ...]]) -> tuple[Any, ...]:
    """What a network is built for: the shape of one input, or those of several."""
    return shapes[0] if len(shapes) == 1 else tuple(shapes)
