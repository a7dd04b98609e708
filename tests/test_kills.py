"""Capture and training, killed at twenty random moments: nothing is lost, nothing is doubled, the end is the same."""

import json
import os
import random
import signal
import threading
import time

import pytest

from engine_cases import FORKED, TEXT, weights
from understudy import distill
from understudy.runs.capture import capture_recipe
from understudy.runs.recipe import make
from understudy.teachers.cache.store import ShardStore

pytestmark = pytest.mark.slow

KILLS = 20


def _die_after(seconds):
    def die():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die, daemon=True).start()


def _capture(recipe, folder, seconds):
    import torch

    from understudy.runs import capture as caching
    from understudy.teachers.cache import teacher as cached

    torch.set_num_threads(1)
    original = cached.capture

    def clocked(*args, **kwargs):
        _die_after(seconds)
        return original(*args, **{**kwargs, "shard": 64})

    caching.capture = clocked
    capture_recipe(make(recipe), folder, "sampled:8")


def _train(recipe, folder, seconds):
    import torch

    from understudy.training import DistillationTrainer

    torch.set_num_threads(1)
    train = DistillationTrainer.train

    def clocked(self, *args, **kwargs):
        _die_after(seconds)
        return train(self, *args, **kwargs)

    DistillationTrainer.train = clocked
    distill({**recipe, "output": str(folder)})


def _killed(target, *args):
    process = FORKED.Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    distill({**TEXT, "method": "kd", "output": str(home), "trainer": {**TEXT["trainer"], "max_steps": 1}})
    data = {**TEXT["data"], "characters": 40_000}
    return {**TEXT, "method": "kd", "data": data, "teacher": {"model": str(home / "teacher" / "student")}}


def _cut_down(target, recipe, folders, longest, chance):
    """Kill and start again, twenty times; one that got through begins anew in another folder. The folders used."""
    kills = used = 0
    for _ in range(4 * KILLS):
        died = _killed(target, recipe, folders / f"cut{used}", chance.uniform(0, longest))
        kills, used = kills + died, used + (not died)
        if kills == KILLS:
            return [folders / f"cut{number}" for number in range(used + 1)]
    raise AssertionError(f"{kills} kills in {4 * KILLS} starts")


def test_a_capture_killed_at_twenty_random_moments(recipe, tmp_path):
    recipe = {**recipe, "output": str(tmp_path)}
    start = time.perf_counter()
    capture_recipe(make(recipe), tmp_path / "whole", "sampled:8")
    length = time.perf_counter() - start
    for folder in _cut_down(_capture, recipe, tmp_path, 0.5 * length, random.Random(0)):
        capture_recipe(make(recipe), folder, "sampled:8")
        cut, whole = ShardStore(folder), ShardStore(tmp_path / "whole")
        assert cut.places.keys() == whole.places.keys() and cut.rows == whole.rows  # rows that are doubled would add
        for key in whole.places:
            assert cut.read([key])["code"].equal(whole.read([key])["code"])


def test_a_run_killed_at_twenty_random_moments(recipe, tmp_path):
    recipe = {**recipe, "trainer": {**recipe["trainer"], "max_steps": 100, "save_steps": 7, "save_total_limit": 2}}
    start = time.perf_counter()
    distill({**recipe, "output": str(tmp_path / "whole")})
    length = time.perf_counter() - start
    lines = {}
    for folder in [tmp_path / "whole", *_cut_down(_train, recipe, tmp_path, 0.3 * length, random.Random(1))]:
        distill({**recipe, "output": str(folder)})
        a, b = weights(tmp_path / "whole"), weights(folder)
        assert all(a[k].equal(b[k]) for k in a)
        logged = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        lines[folder] = [(line["step"], line["loss"]) for line in logged if "loss" in line]
        assert lines[folder] == lines[tmp_path / "whole"] and len(lines[folder]) == 100


def test_a_run_killed_after_its_last_step_takes_no_further_one(recipe, tmp_path):
    """The moment between the last checkpoint and the saved student."""
    from understudy.training import last_complete

    recipe = {**recipe, "trainer": {**recipe["trainer"], "max_steps": 6, "save_steps": 3}}
    distill({**recipe, "output": str(tmp_path / "whole")})
    process = FORKED.Process(target=_die_when_saving, args=({**recipe, "output": str(tmp_path / "cut")},))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "cut" / "student").exists()
    distill({**recipe, "output": str(tmp_path / "cut")})
    assert last_complete(tmp_path / "cut" / "checkpoints").name == "checkpoint-6"
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(a[k].equal(b[k]) for k in a)


def _die_when_saving(recipe):
    import torch

    from understudy.models import CausalLMAdapter

    torch.set_num_threads(1)
    CausalLMAdapter.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    distill(recipe)
