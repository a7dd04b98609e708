"""Classifiers of texts and of pairs of texts: any Auto sequence classifier, an encoder with a new head, or a new small one."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from understudy.data import Batch
from understudy.data.classified_batches import Reading
from understudy.data.folders import find, hub_id
from understudy.errors import InputError
from understudy.models.adapters import ClassifierAdapter
from understudy.models.encoders import bert_config, set_ends
from understudy.models.heads import head_name
from understudy.models.loading import ADAPTERS, auto_model, check_classes
from understudy.models.positions import positions
from understudy.models.ranker_loading import is_classifier
from understudy.models.sentence_folders import is_new_encoder

OPTIONS = {"freeze": ("true or false", "false", "Train the head alone: what the folder holds stays as it is.")}
"""Keys of `options`, with the type, default and meaning of each."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class TextClassifierAdapter(ClassifierAdapter):
    """A classifier of texts.

    Args:
        model: takes token ids and mask, returns an output with `logits`. classes: number of classes.
        reading: how its tokenizer reads the texts.
    """

    def __init__(self, model: nn.Module, classes: int, reading: Reading) -> None:
        super().__init__(model, classes)
        self.reading = reading
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        known = inspect.signature(inner.forward).parameters
        self.takes = [name for name in INPUTS if name in known]

    def logits(self, batch: Batch) -> Tensor:
        return self.checked(self.model(**self.inputs(batch)), len(batch.ids))

    def head_inputs(self, seen: Tensor, batch: Batch) -> Tensor:
        """Of a decoder, whose head reads every token: what it reads at the last token of each text."""
        if seen.dim() == 2:
            return seen
        mask = self.inputs(batch)["attention_mask"]
        last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)
        return seen[torch.arange(len(seen), device=seen.device), last]

    def text(self, batch: Batch) -> tuple[str, Tensor]:
        return self.reading.key, batch.inputs[f"{self.reading.key}/attention_mask"]

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        found = {name: batch.inputs.get(f"{self.reading.key}/{name}") for name in self.takes}
        return {name: value for name, value in found.items() if value is not None}


def load_text_classifier(
    name: str | Path | nn.Module,
    reading: Reading,
    *,
    classes: int,
    freeze: bool = False,
    dtype: str = "auto",
    quantization: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    exact: bool = True,
) -> nn.Module:
    """A text classifier.

    Args:
        name: a module, `embedding:32` (new: the mean of word vectors), `bert:hidden=64,layers=2,heads=4` (new), a folder or
            Hub id of a classifier, or of another model of transformers, which is given a new head.
        classes: number of classes. exact: refuse a model that has others.
        freeze: train the weights that are new, or the head where none are.
    """
    if isinstance(name, nn.Module):
        return name
    name = str(name)
    if is_new_encoder(name):
        if freeze:
            raise InputError(f"options.freeze keeps what a model has learned, and {name!r} is new: leave it out.")
        config = _bag(name, reading.tokenizer) if name.startswith("embedding") else bert_config(name, reading.tokenizer)
        config.num_labels = classes
        model: Any = AutoModelForSequenceClassification.from_config(config)
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    else:
        folder = find(name)
        kept = is_classifier(name, folder, trust_remote_code)
        kind, more = AutoModelForSequenceClassification, {} if kept else {"num_labels": classes}
        model = auto_model(kind, name, folder, dtype, quantization, trust_remote_code, new_head=True, **more)
    if exact:
        check_classes(name, model, classes)
    _check_fit(name, model, reading)
    set_ends(name, model, reading.tokenizer)
    if freeze:
        _freeze(name, model, classes)
    return model  # type: ignore[no-any-return]


def class_names(name: str, trust_remote_code: bool) -> list[str] | None:
    """The names that a saved classifier has for its classes, by number; `None` where it has none of its own."""
    folder = find(name)
    adapters = folder is not None and (folder / ADAPTERS).is_file()
    if adapters or not is_classifier(name, folder, trust_remote_code):
        return None
    config = AutoConfig.from_pretrained(str(folder or hub_id(name)), trust_remote_code=trust_remote_code)
    found = dict(config.id2label or {})
    if sorted(found) != list(range(len(found))) or all(v == f"LABEL_{k}" for k, v in found.items()):
        return None
    return [str(found[i]) for i in range(len(found))]


def _bag(name: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The mean of a text's word vectors and a head with one hidden layer: a EuroBERT without attention layers."""
    width = name.partition(":")[2] or "32"
    if not width.isdecimal() or not int(width):
        raise InputError(f"{name!r}: the width must be a whole number, for example embedding:32.")
    try:
        from transformers import EuroBertConfig
    except ImportError:
        raise InputError(
            f"{name!r} needs a version of transformers that has EuroBERT: use bert:... or upgrade."
        ) from None
    ids = {f"{t}_token_id": getattr(tokenizer, f"{t}_token_id") for t in ("pad", "bos", "eos", "mask")}
    return EuroBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=int(width),
        num_hidden_layers=0,
        num_attention_heads=1,
        num_key_value_heads=1,
        classifier_pooling="mean",
        **ids,
    )


def _check_fit(name: str, model: Any, reading: Reading) -> None:
    """Refuse texts longer than the model's positions, or a tokenizer with more tokens than it has embeddings."""
    tokens, size = len(reading.tokenizer), getattr(model.config, "vocab_size", None)
    if size is not None and size < tokens:
        raise InputError(
            f"{name} has {size} token embeddings and its tokenizer {tokens} tokens. Use the model's own tokenizer."
        )
    limit = min(positions(model) or 10**9, reading.tokenizer.model_max_length)
    if limit < reading.max_length:
        raise InputError(
            f"{name} reads {limit} tokens and data.max_length is {reading.max_length}. Lower data.max_length."
        )


def _freeze(name: str, model: Any, classes: int) -> None:
    new = set(getattr(model, "new_weights", ()))
    if not new:
        head = head_name(model, classes)
        if head is None:
            raise InputError(
                f"{name} has no linear head of {classes} classes to train alone: leave options.freeze out."
            )
        new = {f"{head}.{key}" for key, _ in model.get_submodule(head).named_parameters()}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in new)
