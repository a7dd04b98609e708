"""Lean batches: the same rows, values and gradients without padding and with prompts computed once; refused elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from engine_cases import weights
from understudy import InputError, distill
from understudy.data import Batch, ListBatch, collate_lists, collate_text
from understudy.data.packing import Tree, fill, lay_out, waste
from understudy.losses import cross_entropy
from understudy.models import CausalLMAdapter, SequenceAdapter
from understudy.models.layouts import Layouts, obstacle
from understudy.streaming import rowwise

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # so that positions matter
}
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, "bos_token_id": 1}
PACKED = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, eos_token_id=2)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8)),
}
STATEFUL = {
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**SMALL, state_size=4, num_heads=4, head_dim=16, n_groups=1)),
    "rwkv": lambda: RwkvForCausalLM(RwkvConfig(**SMALL)),
    "lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)),
}


def model_of(kind, dtype=torch.float64, attention="sdpa"):
    torch.manual_seed(0)
    model = {**PACKED, **STATEFUL}[kind]().to(dtype).eval()
    if kind in PACKED:
        model.set_attn_implementation(attention)
    if dtype is torch.float64:  # the models' own norms round to float32
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                model.set_submodule(name, torch.nn.RMSNorm(module.weight.shape, 1e-6, dtype=dtype))
    return model


def texts(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(1, 61, (length,), generator=draw)
        labels = ids.clone()
        labels[: length // 3] = -100
        rows.append({"input_ids": ids, "labels": labels, "id": number, "bytes": 0})
    return Batch.from_dict(collate_text(rows))


def lists(shapes, seed=0):
    """Lists of candidates: `shapes` holds the length of each prompt and of its completions."""
    draw = torch.Generator().manual_seed(seed)
    items = []
    for number, (prompt, answers) in enumerate(shapes):
        start = torch.randint(1, 61, (prompt,), generator=draw)
        sequences = []
        for answer in answers:
            said = torch.randint(1, 61, (answer,), generator=draw)
            sequences.append((torch.cat([start, said]), torch.cat([torch.full_like(start, -100), said])))
        items.append({"id": number, "sequences": sequences, "scores": [float(i) for i in range(len(answers))]})
    batch = Batch.from_dict(collate_lists(items))
    assert isinstance(batch, ListBatch)
    return batch


def gradients(rows, values):
    rows.zero_grad()
    (values * torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).view_as(values)).sum().backward()
    return {n: p.grad.clone() for n, p in rows.named_parameters() if p.grad is not None}


def agree(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * max(1.0, float(value.abs().max())))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", PACKED)
def test_without_padding_loss_and_gradient_are_the_same(kind, attention):
    tolerance = 1e-10 if attention == "sdpa" else 1e-6  # eager attention takes its softmax in float32
    model, batch = model_of(kind, attention=attention), texts([20, 3, 7, 12, 5, 19])
    answers = {}
    for packing in ("none", "free", "auto"):
        rows = CausalLMAdapter(model, 61, packing)
        assert packing == "none" or rows.layouts.reason is None
        values = rowwise(cross_entropy, rows(batch).signal, None, batch.row_labels)
        answers[packing] = values.detach(), gradients(rows, values)
    for packing in ("free", "auto"):
        torch.testing.assert_close(answers[packing][0], answers["none"][0], rtol=tolerance, atol=tolerance)
        agree(answers[packing][1], answers["none"][1], tolerance)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prompts_are_computed_once_and_nothing_changes(kind, dtype):
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    model, batch = model_of(kind, dtype), lists([(9, (4, 6, 2)), (5, (3,)), (1, (8, 8)), (12, (1, 5))])
    answers = {}
    for packing in ("none", "free"):
        rows = SequenceAdapter(model, 61, packing)
        values = rows(batch).signal.values
        answers[packing] = values.detach(), gradients(rows, values)
    torch.testing.assert_close(answers["free"][0], answers["none"][0], rtol=tolerance, atol=tolerance)
    agree(answers["free"][1], answers["none"][1], tolerance)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_lists_of_any_shape_keep_their_scores(shapes, seed):
    model, batch = model_of("llama"), lists(shapes, seed)
    with torch.no_grad():
        wanted, found = (SequenceAdapter(model, 61, p)(batch).signal.values for p in ("none", "free"))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_equal_candidates_and_one_that_begins_another():
    model, start = model_of("llama"), torch.arange(1, 9)
    sequences = [torch.cat([start, start[:n]]) for n in (3, 3, 5)]
    masked = [torch.cat([torch.full_like(start, -100), x[8:]]) for x in sequences]
    item = {"id": 0, "sequences": list(zip(sequences, masked, strict=True)), "scores": [1.0, 1.0, 0.0]}
    batch = Batch.from_dict(collate_lists([item]))
    wanted, found = (SequenceAdapter(model, 61, p)(batch).signal.values for p in ("none", "free"))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert found[0, 0] == found[0, 1]


def test_fewer_tokens_go_through_the_layers():
    model, batch = model_of("llama"), lists([(30, (5, 5, 5, 5))] * 3)
    seen = []
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].numel()), with_kwargs=True)
    rows = {packing: SequenceAdapter(model, 61, packing) for packing in ("none", "free", "auto")}
    seen.clear()
    for packing in rows:
        rows[packing](batch)
    assert seen == [12 * 40, 3 * 56, 3 * 56]


@pytest.mark.parametrize("kind", STATEFUL)
def test_models_that_let_state_leak_are_refused_in_one_line(kind):
    model = model_of(kind, torch.float32)
    assert obstacle(model)
    with pytest.raises(InputError, match=r"data\.packing=free would change what .* Set data\.packing=none") as error:
        Layouts("free", model)
    assert "\n" not in str(error.value)
    batch = texts([9, 4, 6])
    auto, none = (CausalLMAdapter(model, 61, p)(batch).signal for p in ("auto", "none"))
    torch.testing.assert_close(auto.hidden, none.hidden, rtol=0, atol=0)


def test_a_leak_that_is_small_is_found():
    """An attention layer that averages a little of the whole row into each token."""
    model = model_of("llama", torch.float32)
    assert obstacle(model) is None
    layer = model.model.layers[0].self_attn
    layer.register_forward_hook(lambda m, i, out: (out[0] + 1e-3 * out[0].mean(1, keepdim=True), *out[1:]))
    assert "hidden states" in obstacle(model)


def test_beyond_a_sliding_window_the_models_own_mask_is_kept():
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).double().eval()
    for lengths in ([8, 3, 5], [20, 3, 5]):
        batch = texts(lengths)
        free, none = (CausalLMAdapter(model, 61, p)(batch).signal.hidden for p in ("auto", "none"))
        torch.testing.assert_close(free, none, rtol=1e-9, atol=1e-9)


def test_a_batch_that_is_padded_on_the_left_is_left_alone():
    model, batch = model_of("llama"), texts([6, 6])
    batch.inputs["attention_mask"] = batch.inputs["attention_mask"].flip(1)
    given = Layouts("free", model).lay(model, batch)
    assert given.place is None and given.inputs["attention_mask"] is batch.inputs["attention_mask"]


def test_tapped_layers_see_the_batch_as_collated():
    model, batch = model_of("llama"), texts([20, 3, 7, 2])
    rows = CausalLMAdapter(model, 61, "free")
    seen = rows(batch, taps={"layer": model.model.layers[0].mlp}).taps["layer"]
    assert seen.shape[:2] == batch.labels.shape
    assert rows.layouts.packing == "free"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_rows_hold_everything_once_and_never_overflow(sizes):
    rows = fill(sizes, 30)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 30 for row in rows)
    assert len(rows) <= 2 * -(-sum(sizes) // 30)


def test_a_token_sees_its_prompt_and_itself():
    layout = lay_out([3, 4], [Tree((0, 1), 2)], 8)
    assert layout.source.tolist() == [[0, 1, 2, 10, 11, -1, -1, -1]]
    assert layout.positions[0, :5].tolist() == [0, 1, 2, 2, 3]
    assert layout.place[:, :4].tolist() == [[0, 1, 2, 0], [0, 1, 3, 4]]
    seen = layout.mask()[0, 0, :5, :5].long().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]


def test_one_row_for_kernels_of_any_length():
    layout = lay_out([3, 1, 4], [Tree((i,)) for i in range(3)], 8, one_row=True)
    assert layout.positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]] and layout.starts() == [0, 3, 4, 8]


def test_waste_counts_padding_and_tokens():
    padded, packed, share = waste([([16, 8, 8], [Tree((0,)), Tree((1,)), Tree((2,))])])
    assert (padded, packed, share) == (pytest.approx(1 / 3), 0.0, pytest.approx(2 / 3))


RUN = {
    "task": "preferences",
    "method": "dpo",
    "data": {"name": "word_order", "characters": 30_000, "max_length": 96, "vocab_size": 300},
    "student": {"model": "llama:hidden=16,layers=1,heads=2"},
    "trainer": {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 1},
}


def test_a_run_ends_in_the_same_student_and_says_what_it_saved(tmp_path):
    found = {}
    for packing in ("none", "free"):
        result = distill({**RUN, "data": {**RUN["data"], "packing": packing}, "output": str(tmp_path / packing)})
        found[packing] = weights(result.folder)
        report = (result.folder / "evaluation.json").read_text()
        assert "fewer tokens" in report and "padding" in report
    for name, value in found["none"].items():
        torch.testing.assert_close(found["free"][name], value, rtol=0, atol=2e-5)


def test_an_unknown_packing_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"data\.packing is True: .*'auto', 'free' or 'none'"):
        distill({**RUN, "data": {**RUN["data"], "packing": True}, "output": str(tmp_path)})
