"""Classifiers of text pairs with one logit: a small network over words, or any sequence classifier of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from understudy.data.folders import find, hub_id
from understudy.errors import InputError
from understudy.models.small import load_weights
from understudy.models.tokenizers import load_tokenizer
from understudy.models.weights import check_folder, check_weights, read_object, reason, write_model

Pair = tuple[str, str]


class PairClassifier(nn.Module):
    """Base class: from text pairs to logits `[pairs]`."""

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        raise NotImplementedError

    def output(self) -> nn.Linear:
        """The last layer, whose bias may be set to a base rate."""
        layers = [m for m in self.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        if not layers or layers[-1].bias is None:
            raise InputError(f"{type(self).__name__} has no output layer of one logit with a bias.")
        return layers[-1]

    def save(self, folder: Path) -> None:
        """Write config and weights, as `load_pairs` reads them."""
        raise NotImplementedError


class WordPairs(PairClassifier):
    """Sums of word embeddings of both texts and their product, then one hidden layer.

    Args:
        vocabulary: known words; all others share one embedding.
        width: of an embedding.
        hidden: width of the hidden layer.
    """

    def __init__(self, vocabulary: Iterable[str], width: int = 64, hidden: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.vocabulary = sorted(set(vocabulary))
        self.sizes = {"width": width, "hidden": hidden, "dropout": dropout}
        self.index = {word: i + 1 for i, word in enumerate(self.vocabulary)}
        self.words = nn.EmbeddingBag(len(self.vocabulary) + 1, width, mode="sum")
        self.body = nn.Sequential(nn.Linear(3 * width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 1))

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        first, second = (self._sum([pair[side] for pair in pairs]) for side in (0, 1))
        logits: Tensor = self.body(torch.cat([first, second, first * second], -1))[:, 0]
        return logits

    def _sum(self, texts: Sequence[str]) -> Tensor:
        ids = [[self.index.get(w, 0) for w in words(text)] for text in texts]
        starts = torch.tensor([0, *map(len, ids)]).cumsum(0)[:-1]
        device = self.words.weight.device
        flat = torch.tensor([i for row in ids for i in row], dtype=torch.long)
        total: Tensor = self.words(flat.to(device), starts.to(device))
        return total

    def save(self, folder: Path) -> None:
        write_model(self, folder, {"understudy_pairs": self.sizes, "vocabulary": self.vocabulary})


class AutoPairs(PairClassifier):
    """A sequence classifier of transformers on tokenized pairs.

    Args:
        model: with one label.
        tokenizer: of the model.
        max_length: most tokens of a pair; longer ones are truncated.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int = 128) -> None:
        super().__init__()
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        first, second = map(list, zip(*pairs, strict=True))
        limit = min(self.max_length, self.tokenizer.model_max_length)
        inputs = self.tokenizer(first, second, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        logits: Tensor = self.model(**inputs.to(self.model.device)).logits[:, 0]
        return logits

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))


def words(text: str) -> list[str]:
    """Lower-case words without the punctuation around them."""
    return [w for w in (part.strip(".,;:!?\"'()").lower() for part in text.split()) if w]


def is_new_pairs(name: str) -> bool:
    """Whether `name` is a new small network: `pairs`, `pairs:width=64,hidden=128`."""
    return name.split(":", 1)[0] == "pairs" and find(name) is None


def new_pairs(name: str, texts: Iterable[str], dropout: float) -> WordPairs:
    """A new small network whose vocabulary is the words of `texts`."""
    values = {"width": 64, "hidden": 128}
    for item in filter(None, name.partition(":")[2].split(",")):
        key, _, value = item.partition("=")
        if key not in values or not value.isdigit() or int(value) < 1:
            raise InputError(f"{name!r}: {item!r} is not one of {', '.join(f'{k}=N' for k in values)}.")
        values[key] = int(value)
    return WordPairs((w for text in texts for w in words(text)), **values, dropout=dropout)


def load_pairs(name: str | Path, dropout: float = 0.1) -> PairClassifier:
    """A pair classifier from a folder that `save` wrote, or any sequence classifier (folder or Hub id).

    A model with another number of labels gets a new output layer with one.
    """
    path = find(str(name))
    config = path / "config.json" if path is not None else None
    facts = read_object(config) if config is not None and config.is_file() else {}
    if path is not None and "understudy_pairs" in facts:
        try:
            model = WordPairs(map(str, facts["vocabulary"]), **facts["understudy_pairs"])
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{config} describes no classifier of pairs: {reason(error)}") from None
        load_weights(model, path / "model.safetensors")
        return model
    if path is not None:
        check_folder(path)
    source = str(path or hub_id(str(name)))
    try:
        settings = AutoConfig.from_pretrained(source, num_labels=1)
        for key in ("hidden_dropout_prob", "classifier_dropout", "dropout"):
            if isinstance(getattr(settings, key, None), float):
                setattr(settings, key, dropout)
        inner, found = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=settings,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # loaders raise many types, all fixed by another model name
        raise InputError(f"Critic {str(name)!r} cannot be loaded: {reason(error)}") from error
    check_weights(str(name), inner, found, new_head=True)
    tokenizer = load_tokenizer(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        inner.config.pad_token_id = tokenizer.pad_token_id
    return AutoPairs(inner, tokenizer)
