"""Texts by continuous batching: those of padded writing, and everything else as it was."""

import gc
import weakref

import pytest
import torch
import transformers
from transformers.generation.continuous_batching import cache as paged

from own_texts import model, words
from understudy.errors import InputError
from understudy.generation.continuous import sample_continuously
from understudy.generation.decoding import sample

PROMPTS = [[1, 20 + i, 7, 9, 30, 31, 12][: 1 + (i * 3) % 7] for i in range(13)]
KEYS = torch.arange(13) * 991 + 5
BASE = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return words()


def settings(tokenizer, **more):
    return {"most": 9, "vocabulary": len(tokenizer), "ends": set(range(2, 60)), **more}


def both(own, tokenizer, **more):
    chosen = settings(tokenizer, **more)
    return sample(own, PROMPTS, KEYS, pad=0, **chosen), sample_continuously(own, PROMPTS, KEYS, **chosen)


@pytest.mark.parametrize("in_flight", [1, 4, 64])
@pytest.mark.parametrize(
    "draw", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 9}, {"temperature": 1.3, "top_p": 0.8}]
)
def test_the_texts_are_those_of_padded_writing(draw, in_flight, tokenizer):
    """Token for token, of texts that end early and of texts that do not, whoever writes beside them."""
    padded, continuous = both(model(tokenizer, seed=3), tokenizer, in_flight=in_flight, **draw)
    assert continuous == padded
    lengths = {len(text) for text in padded}
    assert len(lengths) > 2 and max(lengths) == 9 and min(lengths) < 4


def test_long_prompts_are_read_in_parts(tokenizer):
    """More tokens of prompts than one step reads."""
    own = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE, max_position_embeddings=1024)).eval()
    prompts = [
        torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (700, 5, 290, 3)
    ]
    chosen = {"most": 6, "vocabulary": 90, "ends": set(), "in_flight": 3}
    keys = torch.arange(4)
    assert sample_continuously(own, prompts, keys, **chosen) == sample(own, prompts, keys, pad=0, **chosen)


@pytest.mark.parametrize(
    "kind,options",
    [
        ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
        ("Gemma3", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "num_hidden_layers": 7}),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    ],
)
def test_other_kinds_of_attention(kind, options):
    """Grouped heads, windows, windows in some layers, learned positions."""
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    sizes = {"vocab_size": 90} if kind == "GPT2" else BASE
    torch.manual_seed(0)
    own = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(
        config(**sizes | options)
    )
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)  # so that what was said matters
    chosen = {"most": 14, "vocabulary": 90, "ends": set(range(40)), "in_flight": 4}
    texts = sample(own.eval(), PROMPTS, KEYS, pad=0, **chosen)
    assert sample_continuously(own, PROMPTS, KEYS, **chosen) == texts and len({tuple(t) for t in texts}) > 8


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_numbers_are_as_before(attention, fails, tokenizer, monkeypatch):
    own = model(tokenizer, seed=1).train()
    own.set_attn_implementation(attention)
    own.model.layers[0].eval()  # a part that somebody froze stays frozen
    own.generation_config.repetition_penalty = 3.0  # the model's own recipe has no part in it
    modes, config, random = [m.training for m in own.modules()], own.generation_config, torch.get_rng_state()
    caches, make = [], paged.PagedAttentionCache.__init__

    def noted(self, *args, **kwargs):
        caches.append(weakref.ref(self))
        make(self, *args, **kwargs)
        if fails:
            raise MemoryError("no room\nat all")

    monkeypatch.setattr(paged.PagedAttentionCache, "__init__", noted)
    if fails:
        with pytest.raises(InputError, match=r"fails with LlamaForCausalLM: no room\. Set on_policy\.engine") as error:
            sample_continuously(own, PROMPTS, KEYS, **settings(tokenizer))
        assert "\n" not in str(error.value)
        del error
    else:
        padded, continuous = both(own, tokenizer, temperature=0.0)
        assert continuous == padded
    assert [m.training for m in own.modules()] == modes and own.generation_config is config
    assert own.config._attn_implementation == attention and own.model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.requires_grad for p in own.parameters())
    gc.collect()
    assert len(caches) == 1 and caches[0]() is None


def test_it_writes_with_the_weights_of_the_moment(tokenizer):
    own = model(tokenizer, seed=3)
    first = both(own, tokenizer)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    second = both(own, tokenizer)
    assert first[0] == first[1] != second[1] == second[0]


def test_the_cache_has_room_for_what_is_asked_and_no_more(tokenizer, monkeypatch):
    sizes, make = [], paged.PagedAttentionCache.__init__

    def noted(self, *args, **kwargs):
        make(self, *args, **kwargs)
        sizes.append(self.cache_tensor.numel())

    monkeypatch.setattr(paged.PagedAttentionCache, "__init__", noted)
    own = model(tokenizer, seed=3)
    for in_flight in (2, 8):
        sample_continuously(own, PROMPTS, KEYS, **settings(tokenizer, in_flight=in_flight))
    position = 2 * own.config.hidden_size * 4  # keys and values of the one layer
    assert [size // (32 * position) for size in sizes] == [2 * 3 + 2, 8 * 3 + 2]  # pages, and two that nobody owns


def test_what_cannot_write_so_is_refused_in_one_line(tokenizer, monkeypatch):
    """One with attention of its own would write without its context; one with layers of another kind cannot at all."""
    own = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=90, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64)
    )
    mixed = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**BASE, num_key_value_heads=2, full_attn_idxs=[1]))
    mixed.set_attn_implementation("eager")  # which the manager changes before it looks at the layers
    for wrong, said in ((own, "GPTJForCausalLM has attention of its own"), (mixed, "Invalid layer type: conv")):
        with pytest.raises(InputError) as error:
            sample_continuously(wrong, PROMPTS, KEYS, **settings(tokenizer))
        assert said in str(error.value) and "on_policy.engine=padded" in str(error.value)
        assert "\n" not in str(error.value) and wrong.config._attn_implementation == "eager" and wrong.training
    monkeypatch.delattr(transformers.ContinuousBatchingConfig, "page_size")
    with pytest.raises(InputError, match=r"needs transformers 5\.17 and there is"):
        sample_continuously(model(tokenizer), PROMPTS, KEYS, **settings(tokenizer))
