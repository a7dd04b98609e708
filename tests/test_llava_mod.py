"""Paper 03, LLaVA-MoD: phases, what is frozen, saved students, splits, resume, bad input."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3MoeForCausalLM,
)

from engine_cases import killed_run, weights
from golden_vectors import close
from understudy import distill
from understudy.data import TextSet, collate_lists
from understudy.errors import InputError
from understudy.methods.llava_mod import LLaVAMoD
from understudy.models import SequenceAdapter
from understudy.models.expert_files import as_transformers, load_experts, save_experts
from understudy.models.loading import load_causal_lm
from understudy.models.upcycling import decoder_layers, mixtures, upcycle
from understudy.runs.recipe import make
from understudy.training import SetupContext
from understudy.training.phases import Phase, freeze_all_but
from vision_cases import SCENES, tiny_qwen2_vl

MOD = {**SCENES, "method": "llava-mod", "data": {**SCENES["data"], "unpaired": True}}
MOD["trainer"] = {**SCENES["trainer"], "max_steps": 9, "warmup_steps": 0, "learning_rate": 1e-2}
MOD["options"] = {"shares": [1 / 3, 1 / 3, 1 / 3]}
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all three phases."""
    folder = tmp_path_factory.mktemp("mod")
    return distill({**MOD, "output": str(folder / "run")}), folder / "run"


def test_each_phase_has_its_terms_and_the_experts_are_reported(finished):
    result, folder = finished
    found = lines(folder)
    assert [line["phase"] for line in found] == ["dense"] * 3 + ["sparse"] * 3 + ["preference"] * 3
    assert set(found[0]["terms"]) == {"mimic"}
    assert set(found[4]["terms"]) == {"mimic", "lm", "balance"}
    assert {"sigmoid", "balance", "rewards/accuracies"} <= set(found[8]["terms"])
    assert result.metrics["expert_balance"] >= 0.99
    evaluation = json.loads((folder / "evaluation.json").read_text())
    table = next(t for t in evaluation["tables"] if "experts" in t["title"])
    assert {row[1] for row in table["rows"]} == {"image", "prompt", "completion"}
    for row in table["rows"]:
        assert sum(map(float, row[2:])) == pytest.approx(1, abs=0.01)
    report = (folder / "report.html").read_text()
    assert "Use of the experts" in report and "Experts (columns) by router" in report


def test_transformers_loads_the_student_and_it_is_the_one_that_was_trained(finished):
    result, folder = finished
    model = AutoModelForImageTextToText.from_pretrained(folder / "student").eval()
    assert model.config.text_config.model_type == "qwen2_moe"
    assert model.config.text_config.mlp_only_layers == [1]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        close(model(input_ids=ids).logits, result.student.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    assert distill({**MOD, "output": str(folder)}).metrics == result.metrics


def kept(folder, name):
    from understudy.training.checkpoint import load_tree

    found = load_tree(folder / "phases" / name)["weights"]
    return {k: v for k, v in found.items() if k.startswith("student.")}


def test_frozen_parameters_are_bit_identical_after_each_phase(finished):
    _, folder = finished
    dense, sparse, last = (
        kept(folder, f"{i}-{n}.safetensors") for i, n in enumerate(("dense", "sparse", "preference"))
    )
    start = distill(
        {**MOD, "trainer": {**MOD["trainer"], "max_steps": 3, "learning_rate": 0.0}, "output": str(folder / "0")}
    )
    assert start.metrics
    first = kept(folder / "0", "0-dense.safetensors")
    for name in first:
        vision, ffn = "vision_tower" in name, ".mlp." in name and "vision_tower" not in name
        if vision:
            assert torch.equal(first[name], dense[name]), name
        for before, after in ((dense, sparse), (sparse, last)):
            assert ffn or torch.equal(before[name], after[name]), name
    moved = {n for n in first if not torch.equal(first[n], dense[n])}
    assert any("self_attn" in n for n in moved) and any("multi_modal_projector" in n for n in moved)
    assert not any(".gate.weight" in n and ".mlp.gate" in n for n in moved)
    trained = {n for n in dense if not torch.equal(dense[n], sparse[n])}
    assert any("mlp.gate.weight" in n for n in trained) and any("mlp.experts.3" in n for n in trained)
    assert any("layers.1.mlp" in n for n in trained)


def test_the_experts_start_as_copies_of_the_network_of_the_dense_phase(tmp_path):
    """With a learning rate of 0 from then on, the sparse phase leaves what the dense phase gave."""
    method = LLaVAMoD()
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    adapter = SequenceAdapter(model, 60)
    method.student(adapter, None)
    state = type("State", (), {"student": adapter, "companions": {}, "phase": "dense"})()
    method.on_phase_begin(state)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        for mixture in mixtures(model):
            mixture.experts[0].up_proj.weight.mul_(1.5)
        dense = model(ids).logits
        state.phase = "sparse"
        method.on_phase_begin(state)
        close(model(ids).logits, dense, rtol=1e-4, atol=1e-5)
        mixtures(model)[0].experts[2].up_proj.weight.zero_()
        state.phase = "preference"
        before = model(ids).logits
        method.on_phase_begin(state)  # a phase that follows the sparse one leaves the experts
        assert torch.equal(model(ids).logits, before)


def test_a_run_that_is_resumed_after_the_dense_phase_has_its_copies_too():
    """The process that goes on has read the weights at the end of that phase, and has not been in it."""
    method, model = LLaVAMoD(), LlamaForCausalLM(LlamaConfig(**SIZES))
    adapter = SequenceAdapter(model, 60)
    method.student(adapter, None)
    state = type("State", (), {"student": adapter, "companions": {}, "phase": "sparse"})()
    with torch.no_grad():
        for mixture in mixtures(model):
            mixture.experts[0].up_proj.weight.mul_(1.5)
    method.on_phase_begin(state)
    for mixture in mixtures(model):
        assert not mixture.dense
        for expert in mixture.experts:
            assert torch.equal(expert.up_proj.weight, mixture.experts[0].up_proj.weight)


@pytest.mark.slow
def test_killed_in_the_sparse_phase_before_its_first_checkpoint(tmp_path):
    recipe = {**MOD, "trainer": {**MOD["trainer"], "max_steps": 9, "save_steps": 100}}
    recipe["options"] = {"shares": [2 / 9, 3 / 9, 4 / 9]}
    distill({**recipe, "output": str(tmp_path / "whole")})
    cut = {**recipe, "output": str(tmp_path / "cut")}
    assert killed_run(cut, 2, "before")  # the dense phase has two steps
    distill(cut)
    ours, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[k], whole[k]) for k in whole)


@pytest.mark.slow
def test_killed_and_resumed_in_any_phase_ends_in_the_same_weights(tmp_path):
    """Phases of 2, 3 and 5 steps, so that each kill is in another one."""
    options = {"shares": [0.2, 0.3, 0.5], "reference": "start", "balance": "sequence"}
    recipe = {**MOD, "options": options, "trainer": {**MOD["trainer"], "max_steps": 10, "save_steps": 1}}
    distill({**recipe, "output": str(tmp_path / "whole")})
    cut = {**recipe, "output": str(tmp_path / "cut")}
    for step, moment in ((1, "after"), (2, "after"), (3, "saving"), (4, "after"), (5, "saving")):
        assert killed_run(cut, step, moment)
    distill(cut)
    ours, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[k], whole[k]) for k in whole)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"reference": "start"}])
def test_a_batch_gives_the_weights_of_any_split_of_it(options, tmp_path):
    trainer = {**MOD["trainer"], "max_steps": 3, "optim": "sgd", "learning_rate": 0.5}
    options = {**MOD["options"], **options, "balance": "sequence", "balance_weight": 0.1}
    found = []
    for size in (4, 2):
        own = {**trainer, "per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        distill({**MOD, "options": options, "trainer": own, "output": str(tmp_path / str(size))})
        found.append(weights(tmp_path / str(size)))
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type, value", [("sigmoid", math.log(2)), ("kto_pair", 0.5)])
def test_a_reference_that_is_the_student_itself_starts_at_zero(loss_type, value, tmp_path):
    options = {"shares": [0, 0.5, 0.5], "reference": "start", "loss_type": loss_type}
    trainer = {**MOD["trainer"], "max_steps": 4}
    distill({**MOD, "options": options, "trainer": trainer, "output": str(tmp_path)})
    first = lines(tmp_path)[2]
    assert first["phase"] == "preference" and first["terms"][loss_type] == pytest.approx(value, abs=1e-5)
    assert lines(tmp_path)[3]["terms"]["rewards/chosen"] != 0


def perturbed(model, **options):
    upcycle(model, experts=4, k=2, **options)
    with torch.no_grad():
        for mixture in mixtures(model):
            for parameter in mixture.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    "config, every, kind",
    [
        (LlamaConfig(**SIZES), 1, MixtralForCausalLM),
        (LlamaConfig(**SIZES, num_key_value_heads=2), 2, Qwen2MoeForCausalLM),
        (Qwen2Config(**SIZES, num_key_value_heads=2), 2, Qwen2MoeForCausalLM),
        (Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8), 2, Qwen3MoeForCausalLM),
    ],
)
def test_text_models_become_architectures_of_transformers(config, every, kind, tmp_path):
    torch.manual_seed(0)
    model = perturbed(AutoModelForCausalLM.from_config(config), every=every)
    plain = as_transformers(model)
    assert type(plain) is kind
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("which", ["gpt2", "capacity"])
def test_other_models_are_saved_in_a_form_of_their_own(which, tmp_path):
    torch.manual_seed(0)
    if which == "gpt2":
        model = perturbed(GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2)))
    else:
        model = perturbed(LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)), capacity_factor=1.5)
    assert as_transformers(model) is None
    save_experts(model, tmp_path)
    tokenizer = list(range(60))
    loaded = load_causal_lm(str(tmp_path), tokenizer=tokenizer)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="holds experts that cannot be loaded"):
        load_experts(AutoModelForCausalLM, tmp_path, {"experts": 2, "k": 2, "every": 2, "capacity_factor": None})


def test_the_layers_of_a_vision_language_model_are_those_of_its_text(tmp_path):
    from understudy.data import train_tokenizer
    from vision_cases import qwen2_vl_processor

    processor = qwen2_vl_processor(train_tokenizer(["a b c"], 270))
    model = tiny_qwen2_vl(processor.tokenizer)
    layers, name = decoder_layers(model)
    assert len(layers) == 2 and name == "mlp" and layers is model.model.language_model.layers
    upcycle(model)
    assert as_transformers(model) is None  # its class has one text model alone
    save_experts(model, tmp_path)
    loaded = load_experts(AutoModelForImageTextToText, tmp_path, model.config.understudy_experts)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    adapter = SequenceAdapter(model, len(processor.tokenizer))
    LLaVAMoD(shares=(0, 0.5, 0.5)).student(adapter, None)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(n.startswith("model.visual.") and "merger" not in n for n in frozen)
    assert any("merger" in n for n, _ in model.named_parameters())


def test_a_text_student_learns_from_preferences(tmp_path):
    recipe = {
        "task": "preferences",
        "method": "llava-mod",
        "data": {"name": "word_order", "characters": 30_000, "max_length": 64, "vocab_size": 300},
        "teacher": "llama:hidden=32,layers=1,heads=2",
        "student": "llama:hidden=24,layers=2,heads=2",
        "options": {**MOD["options"], "every": 1},
        "trainer": {"max_steps": 6, "per_device_train_batch_size": 4},
        "output": str(tmp_path),
    }
    result = distill(recipe)
    assert type(result.student) is MixtralForCausalLM
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "student")) is MixtralForCausalLM


@pytest.mark.slow
def test_it_mimics_and_then_orders_the_pairs(tmp_path):
    trainer = {**MOD["trainer"], "max_steps": 90, "save_strategy": "no"}
    trained = {**MOD["teacher"], "train": {**MOD["teacher"]["train"], "max_steps": 60, "learning_rate": 1e-2}}
    distill({**MOD, "teacher": trained, "trainer": trainer, "output": str(tmp_path)})
    found = lines(tmp_path)

    def mean(name, part):
        values = [line["terms"][name] for line in part]
        return sum(values) / len(values)

    assert mean("mimic", found[50:60]) < 0.5 * mean("mimic", found[:10])
    assert mean("rewards/accuracies", found[-10:]) > 0.8
    assert mean("rewards/margins", found[-10:]) > mean("rewards/margins", found[60:63])


def row(number, first, second, scores=(1.0, 0.0)):
    pairs = [(torch.tensor([1, *x]), torch.tensor([-100, *x])) for x in (first, second)]
    return {"id": number, "scores": list(scores), "log_probs": None, "sequences": pairs}


def context(rows):
    adapter = SequenceAdapter(LlamaForCausalLM(LlamaConfig(**SIZES)), 60)
    return SetupContext(adapter, None, {"train": TextSet(rows)}, collate_lists, 60, None, "")


def test_the_best_is_mimicked_and_pairs_without_order_are_left_out(caplog):
    found = context(
        [row(0, [4, 5], [6]), row(1, [4], [4]), row(2, [7], [8, 9], (0.0, 2.0)), row(3, [7], [8], (1.0, 1.0))]
    )
    with caplog.at_level(logging.WARNING):
        LLaVAMoD().setup(found)
    assert "1 pairs of equal completions" in caplog.text
    mimicked, pairs = found.splits["mimic"].records, found.splits["pairs"].records
    assert [r["id"] for r in mimicked] == [0, 1, 2, 3] and [r["id"] for r in pairs] == [0, 2]
    assert mimicked[2]["sequences"][0][0].tolist() == [1, 8, 9]
    assert pairs[1]["sequences"][0][0].tolist() == [1, 8, 9] and pairs[1]["scores"] == [2.0, 0.0]
    with pytest.raises(InputError, match="no training record has a better and a worse completion"):
        LLaVAMoD().setup(context([row(1, [4], [4])]))
    LLaVAMoD(shares=(0.5, 0.5, 0.0)).setup(context([row(1, [4], [4])]))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"experts": 2, "top_k": 3}, "top_k is 3 and there are 2 experts"),
        ({"shares": [0.5, 0.2, 0.2]}, "at least 0 and sum to 1"),
        ({"shares": [1, 0, 0]}, "shares leave no step to the experts"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        make({**MOD, "options": options})


def test_students_that_cannot_be_up_cycled_are_refused():
    adapter = context([]).student
    LLaVAMoD().student(adapter, None)
    with pytest.raises(InputError, match="has experts already"):
        LLaVAMoD().student(adapter, None)
    LLaVAMoD(shares=(0, 0.5, 0.5)).student(adapter, None)
    with pytest.raises(InputError, match="no decoder layers with a feed-forward network"):
        decoder_layers(torch.nn.Linear(2, 2))
    other = replace(context([row(0, [4], [5])]), student=torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="reads tokens of completions"):
        LLaVAMoD().setup(other)


def test_a_phase_trains_the_parameters_it_names():
    parts = {"student": torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})}
    trainable = {id(p) for p in parts["student"].parameters()}
    freeze_all_but(parts, None, trainable, Phase("x", parameters="^b").parameters)
    assert {n for n, p in parts["student"].named_parameters() if p.requires_grad} == {"b.weight", "b.bias"}
    with pytest.raises(InputError, match="trains parameters called 'c'"):
        freeze_all_but(parts, None, trainable, "c")
