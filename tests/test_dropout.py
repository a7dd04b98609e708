"""A scorer of completions has no dropout, in whatever form an architecture of transformers has it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

from understudy.models import SequenceAdapter

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "opt": OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16, layerdrop=0.5, **ENDS),  # 0.1 unless told
    "llama": LlamaConfig(**SIZES, intermediate_size=32, attention_dropout=0.3),
    "bloom": BloomConfig(
        hidden_size=16, n_head=2, n_layer=2, vocab_size=50, hidden_dropout=0.3, attention_dropout=0.3, **ENDS
    ),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=32, hidden_dropout=0.3, attention_dropout=0.3, **ENDS),
    "gpt2": GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=50, **ENDS),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_scorer_in_training_answers_the_same_twice(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    ids = torch.randint(3, 50, (2, 12))
    model.train()
    assert not torch.equal(*(model(input_ids=ids).logits for _ in range(2)))
    SequenceAdapter(model, 50).train()
    assert torch.equal(*(model(input_ids=ids).logits for _ in range(2)))
    assert model.config.to_dict() == CONFIGS[kind].to_dict()
