"""Vectors of texts for retrieval: counts of words, or any text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from understudy.models.encoders import load_encoder
from understudy.models.sentence_folders import located, transformer_of, view_of
from understudy.models.tokenizers import load_tokenizer

WORDS = "words"
"""Name of the encoder that needs no model."""
_WIDTH = 4096


def text_vectors(name: str = WORDS, *, length: int = 256, batch: int = 64) -> Callable[[Sequence[str]], Tensor]:
    """A function from texts to vectors `[texts, width]`.

    Args:
        name: `words` for hashed counts of words, English stop words left out; otherwise an encoder: a
            `sentence-transformers` folder or package, or any Auto encoder.
        length: most tokens of a text; longer ones are cut. batch: texts of one forward pass.

    Raises:
        InputError: the encoder cannot be loaded, or reads fewer tokens.
    """
    if name == WORDS:
        return _word_counts
    place = located(name)
    view = view_of(name, load_tokenizer(transformer_of(name)), (length, length), [])
    encoder = load_encoder(place, view, {}, "float32", False)

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), batch):
            rows = view.tensors(texts[start : start + batch], "query")
            ids, mask = rows["query_ids"], rows["query_mask"]
            parts.append(encoder.pooled(encoder(ids, mask), mask))
        return torch.cat(parts)

    return encode


def _word_counts(texts: Sequence[str]) -> Tensor:
    from sklearn.feature_extraction.text import HashingVectorizer

    counter = HashingVectorizer(n_features=_WIDTH, alternate_sign=False, norm=None, stop_words="english")
    return torch.from_numpy(counter.transform(texts).toarray())
