"""Encoder-decoder language models, such as T5 and BART: the encoder reads the prompt, the decoder writes the completion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from understudy.data import IGNORE, Batch
from understudy.errors import InputError
from understudy.models.adapters import ModelAdapter, ModelOutput
from understudy.targets import Dense


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder for the prompt."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _read(prompt: Tensor, model: Any) -> Tensor:
    """A prompt's ids as an encoder reads them: with the ending token behind."""
    end = model.config.eos_token_id
    return prompt if end is None else torch.cat([prompt, prompt.new_tensor([end])])


class EncoderDecoderAdapter(ModelAdapter):
    """Rows are the completion's tokens, the same as those of a causal LM that reads prompt and completion.

    A completion begins at the first label of a text. Features are the decoder's last hidden states.

    Args:
        model: an encoder-decoder of transformers.
        vocabulary: number of tokens; further rows of the head (padding) are left out.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        super().__init__()
        self.model, self.vocabulary = model, vocabulary
        self.padding = max(0, model.get_output_embeddings().weight.shape[0] - vocabulary)

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        starts = (batch.labels != IGNORE).int().argmax(1)
        if not bool((starts > 0).all()):
            raise InputError(
                f"{type(self.model).__name__} has an encoder that reads a prompt, and a text here has none: use data with prompt "
                "and completion, or a decoder."
            )
        lengths = batch.inputs["attention_mask"].sum(1)
        first = self.model.config.decoder_start_token_id
        read, written = [], []
        for ids, start, length in zip(batch.inputs["input_ids"], starts.tolist(), lengths.tolist(), strict=True):
            read.append(_read(ids[:start], self.model))
            written.append(torch.cat([ids.new_tensor([first]), ids[start : length - 1]]))
        found = self.model(
            input_ids=pad_sequence(read, batch_first=True),
            attention_mask=pad_sequence([torch.ones_like(ids) for ids in read], batch_first=True),
            decoder_input_ids=pad_sequence(written, batch_first=True),
            use_cache=False,
            output_hidden_states=features,
        )
        example, position = batch.mask.nonzero(as_tuple=True)
        place = position + 1 - starts[example]
        logits = found.logits[example, place, : self.vocabulary]
        return ModelOutput(Dense(logits.float()), found.decoder_hidden_states[-1][example, place] if features else None)
