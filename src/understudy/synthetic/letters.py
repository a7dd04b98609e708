"""Texts of fifteen letters whose true distribution is known: a random network writes them (paper 20)."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmno"


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter, and one for the end, which also pads."""
    core = Tokenizer(models.WordLevel({"</s>": 0, **{letter: i for i, letter in enumerate(LETTERS, 1)}}, "</s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>", unk_token="</s>")


def letter_oracle(vocabulary: int, chance: torch.Generator) -> LlamaForCausalLM:
    """A transformer with random weights: so large that the next letter depends on all before it, and so small that a few
    thousand texts tell a student how."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 1.0 if "embed" in name else 0.4 if "lm_head" in name else 0.17
            if parameter.dim() == 2:
                parameter.copy_(size * torch.randn(parameter.shape, generator=chance))
    return model
