"""Damaged run folders and caches: the right result or one line that is no traceback, and nothing of a user's is touched."""

import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine_cases import killed_run
from understudy import InputError, distill
from understudy.models import load_classifier, save_small
from understudy.reporting import render_run
from understudy.runs.capture import capture_recipe, verify_recipe
from understudy.runs.check import evaluate_run
from understudy.runs.recipe import make

RUN = {
    "task": "image_classification",
    "method": "kd",
    "data": {"name": "digits", "limit": 32},
    "student": "mlp:4",
    "options": {"temperature": 1.0},
    "trainer": {"max_steps": 4, "per_device_train_batch_size": 16, "save_steps": 2, "logging_steps": 1},
}
KINDS = ("flip", "flip early", "flip late", "truncate", "empty", "list", "binary")


def damage(file, kind, chance):
    held = bytearray(file.read_bytes())
    if kind.startswith("flip") and held:
        part = {
            "flip": (0, len(held)),
            "flip early": (0, min(200, len(held))),
            "flip late": (len(held) * 3 // 4, len(held)),
        }
        held[chance.randrange(*part[kind])] ^= 1 << chance.randrange(8)
    elif kind == "truncate":
        held = held[: len(held) // 2]
    else:
        held = {"empty": b"", "list": b"[1]"}.get(kind, bytes(range(256)) * 4)
    file.write_bytes(held)


def student(folder):
    return {k: v.tolist() for k, v in load_file(folder / "student" / "model.safetensors").items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run, one that was cut off, a cache of its teacher, and what is right."""
    home = tmp_path_factory.mktemp("world")
    save_small(load_classifier("mlp:4", classes=10, input_shape=(1, 8, 8)), home / "teacher")
    base = {**RUN, "teacher": {"model": str(home / "teacher")}}
    distill({**base, "output": str(home / "done")})
    assert killed_run({**base, "output": str(home / "cut")}, 3, "before")
    capture_recipe(make({**base, "output": str(home)}), home / "cache", "dense")
    cached = {**base, "teacher": {"model": str(home / "teacher"), "cache": str(home / "cache")}}
    distill({**cached, "output": str(home / "cached")})
    for name in ("done", "cut", "cache"):
        (home / name / "notes.txt").write_text("mine")
    return home, base, {"metrics": evaluate_run(home / "done")["metrics"], "cached": student(home / "cached")}


def cases(home):
    """Every file of the three folders with every kind of damage and all that reads it."""
    for name, actions in (
        ("done", ("evaluate", "report", "go on")),
        ("cut", ("go on", "report")),
        ("cache", ("verify", "train")),
    ):
        for file in sorted(p for p in (home / name).rglob("*") if p.is_file()):
            if file.name != "notes.txt":
                yield from ((name, file.relative_to(home / name), kind, action) for kind in KINDS for action in actions)


def act(action, folder, base, right, tmp_path):
    if action == "evaluate":
        assert evaluate_run(folder)["metrics"] == right["metrics"]
    elif action == "report":
        assert render_run(folder).is_file()
    elif action == "go on":
        distill({**base, "output": str(folder)})
        assert student(folder) == student(Path(base["teacher"]["model"]).parent / "done")
    elif action == "verify":
        found = verify_recipe(make({**base, "output": str(tmp_path)}), folder, sample=8)
        assert found["largest_difference"] < 1e-3
    else:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        cached = {**base["teacher"], "cache": str(folder)}
        distill({**base, "teacher": cached, "output": str(tmp_path / "out")})
        assert student(tmp_path / "out") == right["cached"]


def tried(world, chosen, tmp_path, chance):
    home, base, right = world
    refused = 0
    for name, file, kind, action in chosen:
        folder = tmp_path / name
        shutil.copytree(home / name, folder)
        damage(folder / file, kind, chance)
        try:
            act(action, folder, base, right, tmp_path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error), (name, file, kind, action, error)
        except BaseException as error:
            raise AssertionError(f"{action} of {name} with {file} damaged ({kind})") from error
        assert (folder / "notes.txt").read_text() == "mine"
        shutil.rmtree(folder)
    return refused


def test_some_damage(world, tmp_path):
    chance = random.Random(0)
    chosen = chance.sample(sorted(cases(world[0]), key=str), 40)
    assert tried(world, chosen, tmp_path, chance) > 10


@pytest.mark.slow
def test_much_damage(world, tmp_path):
    chance = random.Random(1)
    every = sorted(cases(world[0]), key=str)
    assert tried(world, chance.sample(every, min(400, len(every))), tmp_path, chance) > 100
