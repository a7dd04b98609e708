"""Methods that hold more than a student, on two processes: taps, projectors, companions, auxiliary optimisers, heads, adapters."""

import json
from pathlib import Path

import pytest
import torch

import ranks_methods as cases
from ranks_cases import METHODS, trainer_of
from two_ranks import two_ranks
from understudy import distill
from understudy.errors import InputError
from understudy.methods.dhkd import DHKD
from understudy.methods.lelp import LELP
from understudy.models.sharding import fill, outline
from understudy.training.checkpoint import load_tree
from understudy.training.ranks import check_sharding

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow
WAYS = [(way, name) for way in ("ddp", "fsdp") for name in cases.CASES if way == "ddp" or name not in cases.AUXILIARY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs of one process, and of two in one launch; some of those with FSDP2 are cut and resumed."""
    root = tmp_path_factory.mktemp("methods")
    cases.prepare(root)
    try:
        for name in cases.CASES:
            cases.run(root, name, "one", 1)
    finally:
        torch.set_default_dtype(torch.float32)
    done = two_ranks(HERE / "ranks_methods.py", root)
    assert done.returncode == 0, done.stderr
    return root


def held(folder, step=4):
    """Student, own modules and companions of a checkpoint."""
    return load_tree(folder / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")


def apart(a, b):
    assert a.keys() == b.keys()
    return {name: float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel()}


@pytest.mark.parametrize("way,name", WAYS)
def test_two_ranks_end_in_student_modules_and_companions_of_one(folder, way, name):
    alone, tolerance = folder / f"{name}-one", cases.TOLERANCE.get(name, 1e-9)
    moved = apart(held(alone), held(alone, 2))
    for part in {name.split(".")[0] for name in moved}:
        assert max(v for k, v in moved.items() if k.startswith(part)) > 100 * tolerance, f"{part} stood still"
    found = apart(held(folder / f"{name}-{way}"), held(alone))
    assert max(found.values()) <= tolerance, max(found, key=found.get)


@pytest.mark.parametrize("way,name", WAYS)
def test_the_saved_student_is_an_ordinary_whole_model(folder, way, name):
    """A finished run is read from its folder, by `from_pretrained` where the model is one of transformers."""
    alone, ranks = folder / f"{name}-one", folder / f"{name}-{way}"
    assert {p.name for p in (ranks / "student").rglob("*")} == {p.name for p in (alone / "student").rglob("*")}
    mine, theirs = (distill(cases.recipe(folder, name, w, s)).student.state_dict() for w, s in ((way, 2), ("one", 1)))
    assert max(apart(mine, theirs).values()) <= cases.TOLERANCE.get(name, 1e-9)
    assert (name == "kd") == any("lora_B" in k and v.abs().max() > 1e-3 for k, v in mine.items())
    metrics = [json.loads((f / "evaluation.json").read_text())["metrics"] for f in (ranks, alone)]
    for metric, value in metrics[1].items():
        assert metrics[0][metric] == pytest.approx(value, rel=1e-4, abs=1e-6), metric


def test_what_cannot_be_sharded_is_one_line(folder):
    lines = json.loads((folder / "refused.json").read_text())
    for name in cases.AUXILIARY:
        assert repr(name) in lines[name] and "trainer.fsdp" in lines[name] and "DDP" in lines[name]
    assert "cpu_ram_efficient_loading" in lines["lean"] and "false" in lines["lean"]
    assert lines["offload"] is None or "no GPU" in lines["offload"]
    assert not any("\n" in line for line in lines.values() if line)


def test_a_method_that_cannot_be_sharded_is_refused_before_its_teacher_is_trained(tmp_path):
    teacher = {"model": "mlp:8", "train": {"max_steps": 1}}
    run = {**cases.DIGITS, "teacher": teacher, "trainer": {"fsdp": True}, "output": str(tmp_path / "run")}
    with pytest.raises(InputError, match=r"'hard' has auxiliary optimisers.*trainer\.fsdp.*DDP"):
        distill({**run, "method": "hard"})
    with pytest.raises(InputError, match="'dhkd' merges gradients"):
        distill({**run, "method": "dhkd", "options": {"align": "all"}, "output": str(tmp_path / "other")})
    assert not (tmp_path / "run" / "teacher").exists()


def test_launchers_and_deepspeed_are_heard_before_a_model_is_loaded(monkeypatch):
    check_sharding(LELP(), {"fsdp": True})
    with pytest.raises(InputError, match=r"'lelp' changes the head .* trainer\.fsdp=true"):
        check_sharding(LELP(), {"deepspeed": "zero3.json"})
    check_sharding(DHKD(align="all"), {})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="'dhkd' merges"):
        check_sharding(DHKD(align="all"), {})
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(InputError, match="cpu_ram_efficient_loading"):
        check_sharding(METHODS["sft"], {})


def test_quantised_weights_without_adapters_are_refused(tmp_path):
    """As bitsandbytes leaves a model: it says so by `is_quantized`. What is left of it would be trained, silently."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    model.is_quantized = True
    recipe = {**cases.DIGITS, "method": "sft", "student": model, "output": str(tmp_path)}
    with pytest.raises(InputError, match=r"student's weights are quantised.* student\.peft"):
        distill(recipe)


def test_an_outline_holds_no_weights_and_is_filled_with_shared_ones_shared(tmp_path):
    student = trainer_of(tmp_path, METHODS["sft"], 4, 1, 8).model.student
    blank = outline(student)
    assert all(p.is_meta for p in blank.parameters()) and not any(b.is_meta for b in blank.buffers())
    assert not any(p.is_meta for p in student.parameters())
    fill(blank, student)
    assert blank.model.lm_head.weight is blank.model.model.embed_tokens.weight
    assert max(apart(blank.state_dict(), student.state_dict()).values()) == 0
    assert not {id(p) for p in blank.parameters()} & {id(p) for p in student.parameters()}
