"""Text classification: passages of the standard library by default; any labelled texts or pairs of texts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase

from understudy.data import Batch, find
from understudy.data.classified_batches import Reading, TextClassCollator
from understudy.data.classified_texts import EMBEDDED, ClassifiedTexts, load_classified
from understudy.data.retrieval_batches import train_encoder_tokenizer
from understudy.errors import InputError
from understudy.models import ModelAdapter, load_tokenizer, own_classes, tokenizer_hashes
from understudy.models.sentence_folders import is_new_encoder, transformer_of
from understudy.models.text_classifiers import OPTIONS, TextClassifierAdapter, class_names, load_text_classifier
from understudy.models.weights import notes_of
from understudy.tasks.base import COPY, MODULE, LabelledTask, Prepared, merged
from understudy.tasks.class_names import name_classes

_TRAINER = {"lr_scheduler_type": "linear", "warmup_steps": 20, "weight_decay": 0.01}
_EMBEDDED = {"max_steps": 300, "per_device_train_batch_size": 32}
_REAL = {"max_steps": 1000, "per_device_train_batch_size": 32}
_NEW = 3e-3
"""Learning rate of a model that knows no word yet; a pretrained one takes smaller steps."""
_PRETRAINED = 5e-5
_MEASURED = 1000
"""How many training texts are measured to say how many are cut."""


class _TextClassData(Prepared):
    """With the reading of each model."""

    readings: dict[tuple[str, str | None], Reading]


class TextClassification(LabelledTask):
    """Predict the class of a text, or of a pair of texts."""

    name = "text_classification"
    kind = "classification"
    unit = "texts"
    metric = "accuracy"
    start_data: Mapping[str, Any] = MappingProxyType({"for_teacher": True, "unlabelled": False, "labelled": None})
    higher_is_better = True
    model_options = frozenset(OPTIONS)

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Passages by subject with a small BERT as teacher and word vectors as student; other data with two BERTs."""
        data = recipe.get("data") or {}
        data.setdefault("name", EMBEDDED)
        embedded = data["name"] == EMBEDDED
        data.setdefault("max_length", 80 if embedded else 128)
        if embedded:
            data.setdefault("limit", 200)
        recipe["data"] = data
        if recipe.get("teacher") is None:
            name = "bert:hidden=64,layers=1,heads=2" if embedded else "bert:hidden=128,layers=4,heads=4"
            train = {**_TRAINER, **(_EMBEDDED if embedded else _REAL), "learning_rate": _NEW}
            recipe["teacher"] = {"model": name, "train": train}
        if recipe.get("student") is None:
            recipe["student"] = {"model": "embedding:32" if embedded else "bert:hidden=64,layers=2,heads=4"}
        rate = _NEW if is_new_encoder(recipe["student"]["model"]) else _PRETRAINED
        defaults = {**_TRAINER, **(_EMBEDDED if embedded else _REAL), "learning_rate": rate}
        recipe["trainer"] = merged(defaults, recipe.get("trainer") or {})
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        data = dict(recipe.data)
        length, vocabulary, own = data.pop("max_length"), data.pop("vocab_size", 2000), data.pop("tokenizer", None)
        texts = load_classified(data, _known(recipe))
        readings: dict[tuple[str, str | None], Reading] = {}
        trained: list[PreTrainedTokenizerBase] = []
        for spec in (s for s in _specs(recipe) if s.cache is None and s.endpoint is None):
            found = self._tokenizer(spec, own, texts, vocabulary, trained)
            readings[spec.model, spec.tokenizer] = Reading(found, length)
        same = {reading.key: reading for reading in reversed(readings.values())}
        readings = {name: same[reading.key] for name, reading in readings.items()}
        if recipe.student.model == COPY:
            taught = next(spec for spec in _specs(recipe))
            readings[COPY, recipe.student.tokenizer] = readings[taught.model, taught.tokenizer]
        mine = readings[recipe.student.model, recipe.student.tokenizer]
        prepared = _TextClassData(
            train=texts.train,
            validation=texts.validation,
            test=texts.test,
            teacher_train=texts.taught(),
            collate=TextClassCollator(list(same.values()), texts.domains),
            domains=texts.domains,
            classes=len(texts.classes),
            tokenizer=mine.tokenizer,
            notes=list(texts.notes),
            hashes={
                "data": texts.hash,
                "student_tokenizer": tokenizer_hashes(mine.tokenizer)["tokenizer"],
                "class_names": ", ".join(texts.classes),
            },
            facts={"names": texts.classes},
            show=lambda batch: show_texts(batch, mine, texts.classes),
        )
        prepared.readings = readings
        measured = texts.everything[:_MEASURED]
        cut = mine.longer(measured)
        if cut:
            prepared.notes.append(
                f"{cut} of the first {len(measured)} training texts are longer than {length} tokens and are cut: "
                "data.max_length."
            )
        return prepared

    def _tokenizer(
        self,
        spec: Any,
        own: str | None,
        texts: ClassifiedTexts,
        vocabulary: int,
        trained: list[PreTrainedTokenizerBase],
    ) -> PreTrainedTokenizerBase:
        """A model's own tokenizer; new models share `data.tokenizer`, or one learned from all training texts."""
        module = spec.model.startswith(MODULE)
        if module and spec.tokenizer is None and own is None:
            raise InputError("A model that is handed over as a module needs a tokenizer: name it with data.tokenizer.")
        if spec.tokenizer is not None or not (module or is_new_encoder(spec.model)):
            return load_tokenizer(
                spec.tokenizer or transformer_of(spec.model), trust_remote_code=spec.trust_remote_code
            )
        if not trained:
            named = load_tokenizer(own) if own is not None else None
            trained.append(named or train_encoder_tokenizer(texts.texts(), vocabulary))
        found = copy.deepcopy(trained[0])
        if spec.model.startswith("embedding"):  # whoever loads the saved tokenizer gets what the model takes
            found.model_input_names = ["input_ids", "attention_mask"]
        return found

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        assert isinstance(prepared, _TextClassData)
        reading = prepared.readings[spec.model, spec.tokenizer]
        model = load_text_classifier(
            transformer_of(spec.model) if source is None else source,
            reading,
            classes=prepared.classes,
            freeze=bool((spec.options or {}).get("freeze")) and source is None,
            dtype=spec.dtype,
            quantization=spec.quantization,
            trust_remote_code=spec.trust_remote_code,
            exact=prepared.exact,
        )
        prepared.say(notes_of(model))
        rows = TextClassifierAdapter(model, prepared.classes if prepared.exact else own_classes(model), reading)
        name_classes(rows, prepared, spec.model)
        return rows


def _specs(recipe: Any) -> Iterator[Any]:
    """The models that the recipe names: the teacher or its members, and the student unless it begins as a copy."""
    if recipe.teacher is not None:
        yield from recipe.teacher.parts("teacher").values()
    if recipe.student.model != COPY:
        yield recipe.student


def _known(recipe: Any) -> list[str] | None:
    """The names of the classes by number as the first model has them that has names of its own."""
    alike = recipe.build_method().requires.teacher_classes
    for spec in _specs(recipe) if alike else [recipe.student]:
        absent = spec.cache is not None and find(spec.model) is None  # its answers are there without it
        if not absent and spec.endpoint is None and not spec.model.startswith(MODULE):
            found = class_names(transformer_of(spec.model), spec.trust_remote_code)
            if found is not None:
                return found
    return None


def show_texts(batch: Batch, reading: Reading, names: list[str]) -> Text:
    """The texts of a batch as the model reads them, each with its class."""
    out = Text()
    ids, masks = (batch.inputs[f"{reading.key}/{name}"] for name in ("input_ids", "attention_mask"))
    for text, mask, label in zip(ids, masks, batch.labels.tolist(), strict=True):
        out.append(f"{names[label] if label >= 0 else 'no label'}  ", style="bold")
        out.append(reading.tokenizer.decode(text[mask.bool()]) + "\n", style="green" if label >= 0 else "dim")
    return out
