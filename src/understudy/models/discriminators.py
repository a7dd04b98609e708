"""Discriminators of text pairs: a small new network that reads bytes, or any sequence classifier of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from understudy.data.folders import find
from understudy.errors import InputError
from understudy.models.pairs import Pair, PairClassifier, load_pairs
from understudy.models.small import load_weights
from understudy.models.weights import read_object, write_model

NEW = "bytes"
_PAD, _BETWEEN, _SYMBOLS = 256, 257, 258


class BytePairs(PairClassifier):
    """A transformer over the bytes of both texts, the maximum over places, two linear layers (paper 21's discriminator).

    Args:
        width: of an embedding. layers: of the transformer. length: most bytes of a pair; the beginning is left out.
    """

    def __init__(self, width: int = 64, layers: int = 2, length: int = 512) -> None:
        super().__init__()
        self.sizes = {"width": width, "layers": layers, "length": length}
        self.length = length
        self.symbols, self.places = nn.Embedding(_SYMBOLS, width), nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        rows = [torch.tensor([*a.encode(), _BETWEEN, *b.encode()][-self.length :]) for a, b in pairs]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_PAD).to(self.places.weight.device)
        empty = ids == _PAD
        seen = self.body(self.symbols(ids) + self.places.weight[: ids.shape[1]], src_key_padding_mask=empty)
        logits: Tensor = self.head(seen.masked_fill(empty[..., None], -torch.inf).amax(1))[:, 0]
        return logits

    def save(self, folder: Path) -> None:
        write_model(self, folder, {"understudy_bytes": self.sizes})


def load_discriminator(name: str | Path) -> PairClassifier:
    """A discriminator: `bytes` (new), `bytes:width=64,layers=2,length=512`, a folder, or any sequence classifier by Hub id.

    Raises:
        InputError: an unknown size, or a model that cannot be loaded.
    """
    kind, _, sizes = str(name).partition(":")
    folder = find(str(name))
    if folder is None and kind == NEW:
        values = {"width": 64, "layers": 2, "length": 512}
        for item in filter(None, sizes.split(",")):
            key, _, value = item.partition("=")
            if key not in values or not value.isdecimal() or int(value) < 1:
                raise InputError(f"{str(name)!r}: {item!r} is not one of {', '.join(f'{k}=N' for k in values)}.")
            values[key] = int(value)
        if values["width"] % 4:
            raise InputError(f"{str(name)!r}: the width is divided among 4 heads: give a multiple of 4.")
        return BytePairs(**values)
    config = folder / "config.json" if folder is not None else None
    facts = read_object(config) if config is not None and config.is_file() else {}
    if folder is None or "understudy_bytes" not in facts:
        return load_pairs(name)
    model = BytePairs(**facts["understudy_bytes"])
    load_weights(model, folder / "model.safetensors")
    return model
