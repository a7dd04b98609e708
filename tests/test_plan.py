"""Plans: arithmetic that can be done by hand, refusals, the command, parts of the data, and plans against runs."""

import importlib.util
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from engine_cases import TEXT
from understudy import InputError, plan
from understudy.cli import main
from understudy.methods import get
from understudy.models.weights import check_folder
from understudy.planning.cost_trace import head_calls
from understudy.planning.machine import CARDS
from understudy.runs.capture import capture_recipe
from understudy.runs.recipe import make
from understudy.targets import Dense, Projected
from understudy.teachers.cache.codecs import Support, encode, row_bytes
from understudy.teachers.cache.store import ShardStore

ROOT = Path(__file__).parent.parent
MACHINE = {"peak": 0.1, "bandwidth": 0.01}


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem + "_page", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def small(**trainer):
    return {
        **TEXT,
        "teacher": "llama:hidden=32,layers=2,heads=2",
        "trainer": {"max_steps": 10, "per_device_train_batch_size": 4, **trainer},
    }


def test_parameters_optimiser_and_floor_are_those_of_the_formula():
    found = plan(small(), **MACHINE)
    hidden, inner, vocabulary = 16, 16 * 8 // 3, 300
    block = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    assert found.sides["student"].parameters == vocabulary * hidden + block + hidden  # the head is tied: once
    assert found.memory["optimiser"] == 2 * found.sides["student"].trained_bytes
    rows, tokens = 4 * 31, 4 * 32
    # Forward and backward: 6 operations a parameter in a product and token, and 3.5 times the forward of attention.
    attention = 4 * tokens * 32 * hidden
    assert found.work["student"]["attention"] == 3.5 * attention
    matrices = 4 * hidden**2 + 3 * hidden * inner
    assert found.work["student"]["flops"] == pytest.approx(6 * tokens * matrices + 3.5 * attention)
    kd, ce = 6 * hidden * vocabulary + 2 * 32 * vocabulary, 6 * hidden * vocabulary
    assert found.work["head"]["flops"] == rows * (kd + ce)
    flops = sum(w["flops"] for w in found.work.values())
    assert found.floor_seconds == pytest.approx(flops / 0.1e12)
    assert found.rows == 10 * rows and found.percent_of_floor < 100


@pytest.mark.parametrize("optim,factor", [("sgd", 0), ("adamw_torch", 2), ("adamw_bnb_8bit", 0.508), ("rmsprop", 1)])
def test_optimisers_differ_by_their_state(optim, factor):
    found = plan(small(optim=optim), **MACHINE)
    assert found.memory["optimiser"] == pytest.approx(factor * found.sides["student"].trained_bytes, rel=1e-2)


def test_checkpointing_holds_less_and_computes_more():
    student = "llama:hidden=64,layers=6,heads=4"
    plain = plan(small(), student=student, **MACHINE)
    again = plan(small(gradient_checkpointing=True), student=student, **MACHINE)
    assert again.memory["student activations"] < 0.6 * plain.memory["student activations"]
    assert 1.2 < again.work["student"]["flops"] / plain.work["student"]["flops"] < 1.4


def test_adapters_train_little_and_a_cache_holds_no_teacher():
    adapters = {"model": "llama:hidden=64,layers=2,heads=4", "peft": {"r": 2, "target_modules": ["q_proj"]}}
    whole = plan(small(), student=adapters["model"], **MACHINE)
    found = plan(small(), student=adapters, teacher={"model": TEXT["student"], "cache": "nowhere"}, **MACHINE)
    assert found.sides["student"].trained == 2 * (2 * 64 * 2)
    assert found.memory["optimiser"] < whole.memory["optimiser"] / 50
    assert "teacher weights" not in found.memory and found.speed_up is None
    assert any("nowhere" in note for note in found.notes)


@pytest.mark.parametrize("support", ["sampled:38B", "sampled:12", "top_k:50", "sampled:400"])
@pytest.mark.parametrize("classes", [300, 5_000, 152_064])
def test_bytes_of_a_row_are_those_that_the_codec_writes(support, classes):
    kept = Support.parse(support)
    arrays = encode(Dense(torch.randn(2, classes)), kept, 1.0, 0)
    assert row_bytes(kept, classes) == sum(a.shape[1] * a.itemsize for a in arrays.values())
    hidden = encode(Projected(torch.randn(2, 24), torch.randn(9, 24)), Support.parse("hidden"), 1.0, 0)["hidden"]
    assert row_bytes(Support.parse("hidden"), 9, 24) == hidden.shape[1] * hidden.itemsize


def test_passes_over_the_head_are_read_off_the_loss():
    assert sorted(head_calls(get("kd")())) == [False, True]
    assert head_calls(get("kd")(ce_weight=0)) == [True]
    assert head_calls(get("sft")()) == [False]


def llama(folder, **more):
    pages = module(ROOT / "docs" / "scaling.py")
    pages.write_shapes(folder)
    return pages.recipe(folder, more)


@pytest.mark.slow
def test_a_large_pair_from_its_shapes_alone(tmp_path):
    found = plan(llama(tmp_path), gpu="h100", rows=1e6)
    assert found.sides["student"].parameters == 8_030_261_248
    assert found.sides["teacher"].weights == pytest.approx(141.1e9, rel=1e-3) and not found.fits
    both = plan(llama(tmp_path, trainer={"fsdp": "full_shard"}), gpu="h100", gpus=8, shard="both", rows=1e6)
    assert both.memory["student weights"] == found.memory["student weights"] // 8
    assert both.memory["optimiser"] == found.memory["optimiser"] // 8 and both.fits
    assert "gathered blocks" in both.memory and "gathered blocks" not in found.memory
    four = {"quantization": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}}
    packed = plan(llama(tmp_path, teacher=four), gpu="h100", rows=1e6)
    assert 0.25 < packed.sides["teacher"].weights / found.sides["teacher"].weights < 0.30


def test_experts_count_whole_in_memory_and_in_part_in_work(tmp_path):
    config = {"model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "num_local_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 2, "dtype": "float32"}))
    found = plan(small(), student=str(tmp_path), **MACHINE)
    side = found.sides["student"]
    assert side.parameters - side.active == 2 * 6 * 3 * 32 * 48


@pytest.mark.parametrize(
    "key,size",
    [
        *[("num_hidden_layers", n) for n in (1_000_000, 10**23, 0, -3)],
        *[("hidden_size", 0), ("hidden_size", 32_000_000), ("vocab_size", -5), ("vocab_size", 10**12)],
    ],
)
def test_sizes_that_no_model_has_are_one_line_before_anything_is_built(key, size, tmp_path):
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, key: size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    began = time.monotonic()
    with pytest.raises(InputError, match=f"{key} = {size}, and a model has 1 to"):
        plan(small(), student=str(tmp_path), **MACHINE)
    assert time.monotonic() - began < 30
    if size and size != -3:
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(InputError, match=f"{key} = {size}, and a model has 0 to"):
            check_folder(tmp_path)


@pytest.mark.parametrize("name", ["llama:layers=1000000", "llama:heads=0", "llama:layers=0", "llama:hidden=99000000"])
def test_sizes_of_a_new_model_are_bounded_too(name):
    with pytest.raises(InputError, match="and a model has 1 to"):
        plan(small(), student=name, **MACHINE)


@pytest.mark.parametrize(
    "keys,words",
    [
        ({"student": "nobody/no-such-model"}, "configuration of 'nobody/no-such-model'"),
        ({"task": "preferences", "method": "dpo", "student": None, "teacher": None}, "text or images"),
        ({"gpu": "h10"}, "Did you mean 'h100'"),
        ({"gpus": 0}, "at least 1"),
        ({"support": "best"}, "sampled:38B"),
        ({"shard": "all"}, "none, student or both"),
    ],
)
def test_what_cannot_be_planned_is_one_line(keys, words):
    base = small() if "task" not in keys else {}
    with pytest.raises(InputError, match=words):
        plan(base, **{**MACHINE, **keys})


def test_the_command_prints_tables_and_json(capsys, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(small()))
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            main(["plan", str(file), "--gpu", "a100", "--memory", "0.5", *more])
        assert stop.value.code == 0
    shown, values = capsys.readouterr().out.split("{", 1)
    assert "head tiles" in shown and "Does not fit in the 0.5 GiB" in shown
    values = json.loads("{" + values)
    assert not values["fits"] and values["machine"]["half"] == CARDS["a100"].half


@pytest.mark.slow
def test_parts_of_a_capture_are_the_whole_and_resume_alone(tmp_path):
    recipe = make(small())

    def captured(name, **options):
        torch.manual_seed(0)  # a new teacher, the same one each time
        return capture_recipe(recipe, tmp_path / name, "sampled:5", **options)

    whole = captured("whole")
    (tmp_path / "parts").mkdir()
    for i in range(3):
        part = captured(f"part{i}", shard=(i, 3))
        assert 0 < part.new < whole.examples
        assert captured(f"part{i}", shard=(i, 3)).new == 0
        for file in (tmp_path / f"part{i}").iterdir():
            shutil.copy(file, tmp_path / "parts")
    one, many = ShardStore(tmp_path / "whole"), ShardStore(tmp_path / "parts")
    assert one.places.keys() == many.places.keys()
    keys = list(one.places)
    assert all(torch.equal(v, many.read(keys)[n]) for n, v in one.read(keys).items())


def test_parts_of_requests_are_the_whole():
    from understudy.cli.options import shard_of

    everything = list(range(11))
    cut = [everything[i::n] for i, n in (shard_of(f"{k}/4") for k in range(1, 5))]
    assert sorted(i for part in cut for i in part) == everything and shard_of(None) == (0, 1)
    for bad in ("0/4", "5/4", "1", "a/b"):
        with pytest.raises(InputError, match="i/n"):
            shard_of(bad)


@pytest.mark.slow
def test_the_worked_plans_are_current():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert module(ROOT / "docs" / "scaling.py").current(page) == page, "run `make docs`"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux does")
def test_predicted_memory_is_within_a_tenth_of_measured(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    zoo = module(ROOT / "benchmarks" / "plan.py")
    errors = {name: zoo.cell(name) for name in ("text-8k", "text-1k", "text-64k")}
    assert statistics.median(abs(e["memory_error_percent"]) for e in errors.values()) <= 10, errors
    assert all(abs(e["flop_error_percent"]) <= 5 for e in errors.values()), errors


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (transformers.XLNetConfig, {"d_model": 16, "n_layer": 2, "n_head": 2}),
        (transformers.BertConfig, {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    ],
)
def test_what_the_run_refuses_for_reading_later_tokens_is_not_planned(config, sizes, tmp_path):
    config(**sizes, vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="LMHeadModel reads later tokens to predict earlier ones"):
        plan({**small(), "teacher": None, "method": "sft", "student": str(tmp_path)}, **MACHINE)


@pytest.mark.parametrize("config", [transformers.T5Config, transformers.BartConfig])
def test_encoder_decoders_are_not_counted_as_their_decoders(config, tmp_path):
    config(d_model=16, num_layers=2, vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="plan knows language models of a decoder alone"):
        plan({**small(), "teacher": None, "method": "sft", "student": str(tmp_path)}, **MACHINE)
