"""Bounds of endpoints, keys that are refused, shards of a sensible size, and lines of progress."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pydantic import ValidationError

from engine_cases import TEXT
from understudy.cli import main
from understudy.errors import InputError
from understudy.generation import Endpoint, Limits, OracleSource, Request, RequestLog, generate, progress
from understudy.models import ClassifierAdapter
from understudy.runs.recipe import load, make
from understudy.teachers.cache import store
from understudy.teachers.cache import teacher as cached
from understudy.teachers.cache.codecs import Support
from understudy.teachers.cache.store import ShardStore
from understudy.teachers.cache.teacher import capture

KEY = "sk-never-printed-1234"


@pytest.mark.parametrize("value", ["inf", "nan", "1e300", "-1", "0"])
def test_a_time_out_is_a_finite_number_of_seconds(value, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("x\n")
    with pytest.raises(SystemExit) as left:
        words = ["--model", "m", "--endpoint", "http://127.0.0.1:9", "--timeout", value]
        main(["generate", str(tmp_path / "p.txt"), *words, "--output", str(tmp_path / "o")])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and "timeout" in error


@pytest.mark.parametrize("name", ["rate", "backoff", "longest_backoff", "cost_budget", "price_in", "price_out"])
def test_limits_are_finite_and_can_be_waited_for(name):
    for value in (math.inf, math.nan, -1.0):
        with pytest.raises(ValidationError, match=name):
            Limits(**{name: value})
    for at in ({"rate": 1e-300}, {"backoff": 1e10}, {"longest_backoff": 1e10}):
        with pytest.raises(ValidationError, match=next(iter(at))):
            Limits(**at)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"api_key": KEY}, "name its variable with api_key_env"),
        ({"Authorization": f"Bearer {KEY}"}, "name its variable with api_key_env"),
        ({"day": {1, 2}}, "are JSON"),
        ({"top_k": math.nan}, "are JSON"),
    ],
)
def test_fields_of_the_body_are_json_without_a_key(extra, says):
    with pytest.raises(ValidationError, match=says):
        Endpoint(url="http://h", extra=extra)
    assert Endpoint(url="http://h", extra={"top_k": 5, "max_completion_tokens": 8}).extra["top_k"] == 5


def test_urls_that_no_client_takes_are_refused():
    for url in ("http://a\x00b/v1", "http://h/\x1b[31m", "http://h/a\nb"):
        with pytest.raises(ValidationError, match="names a host"):
            Endpoint(url=url)


@pytest.mark.parametrize(
    "endpoint",
    [
        {"url": "http://h", KEY: 1},
        {"url": "http://h", KEY: {"a": 1}},
        {KEY: "http://h"},
        {"url": "http://h", "api_key_env": {KEY: 1}},
        {"url": {KEY: 1}},
        {"url": ["http://h", KEY]},
        {"url": "http://h", "timeout": {KEY: {KEY: 2}}},
        {"url": "http://h", "extra": [KEY]},
        [KEY],
    ],
)
@pytest.mark.parametrize("member", [False, True])
def test_a_key_inside_a_key_of_an_endpoint_is_never_printed(endpoint, member):
    teacher = {"model": "m", "endpoint": endpoint}
    teacher = {"members": {"a": teacher, "b": "other"}} if member else teacher
    with pytest.raises(InputError) as caught:
        make({"task": "language_modeling", "teacher": teacher})
    assert KEY not in str(caught.value) and "endpoint" in str(caught.value)


def test_a_key_in_an_override_of_an_endpoint_is_never_printed():
    for item in (f"teacher.endpoint.{KEY}=1", f"teacher.endpoint.{KEY}.a=1", f"teacher.endpoint={{{KEY}: 1}}"):
        with pytest.raises(InputError) as caught:
            load(None, ["task=language_modeling", "teacher.model=m", "teacher.endpoint.url=http://h", item])
        assert KEY not in str(caught.value)


def rows_of(number, large=(), classes=8):
    """Batches of four images each, and a teacher of them."""
    from understudy.data import Batch

    torch.manual_seed(0)
    teacher = ClassifierAdapter(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, classes)), classes)
    images = torch.arange(number * 16.0).reshape(number, 4, 1, 2, 2) / 1e4
    images[large] *= 1e7  # whose logits float16 does not hold
    return teacher, [
        Batch({"pixel_values": some}, torch.zeros(4).long(), torch.arange(4) + 4 * i) for i, some in enumerate(images)
    ]


def captured(folder, number, large=(), **options):
    teacher, batches = rows_of(number, list(large))
    identity = {"format": 1, "classes": 8}
    return capture(teacher, iter(batches), folder, support=Support.parse("dense"), temperature=1.0, identity=identity, **options)  # fmt: skip


def files(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def test_a_capture_writes_few_files_whatever_a_batch_holds(tmp_path, monkeypatch):
    written = []
    append = ShardStore.append
    monkeypatch.setattr(ShardStore, "append", lambda *a, **k: written.append(len(a[1])) or append(*a, **k))
    captured(tmp_path / "whole", 50)
    assert written == [200] and len(files(tmp_path / "whole")) == 1
    written.clear()
    monkeypatch.setattr(cached, "SECONDS", 0.0)  # a teacher so slow that each example takes a minute
    assert captured(tmp_path / "slow", 5).examples == 20
    assert written == [1] * 20 + [20] and len(files(tmp_path / "slow")) == 1  # nothing waits, and all is merged
    monkeypatch.undo()
    for folder in ("whole", "slow"):
        held = ShardStore(tmp_path / folder)
        assert len(held) == held.rows == {"whole": 200, "slow": 20}[folder]


def test_examples_of_another_dtype_are_in_a_file_of_their_own(tmp_path, monkeypatch):
    captured(tmp_path, 20, large=range(0, 20, 2))
    shards = ShardStore(tmp_path).shards
    assert sorted((s["types"]["logits"], len(s["arrays"]["logits"])) for s in shards) == [("F16", 40), ("F32", 40)]
    monkeypatch.setattr(cached, "SECONDS", 0.0)
    captured(tmp_path, 26, large=range(0, 26, 2))
    shards = [s for s in ShardStore(tmp_path).shards if s]
    assert sorted((s["types"]["logits"], len(s["arrays"]["logits"])) for s in shards) == [("F16", 52), ("F32", 52)]


def test_a_file_is_no_larger_than_can_be_held(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "WHOLE_BYTES", 160)  # ten rows of eight float16 logits
    monkeypatch.setattr(store, "WHOLE_BYTES", 160)
    captured(tmp_path, 25)
    sizes = [len(shard["arrays"]["logits"]) for shard in ShardStore(tmp_path).shards]
    assert sizes == [10] * 10


def test_lines_of_progress_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    source = OracleSource("echo", lambda request, rng: "x")
    asked = [Request(f"p{i}", f"r/{i}") for i in range(3)]
    with RequestLog(tmp_path / "log", "echo") as log:
        generate(source, asked, log, progress=True)
        generate(source, [Request("q", "q")], log)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rsplit(",", 1)[0] for line in lines] == [f"completions: {i} of 3 done" for i in (1, 2, 3)]


def test_a_capture_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    folder = tmp_path / "cache"

    def capture_recipe(recipe, output, *args, tick, **options):
        return captured(output, 2, tick=tick)

    monkeypatch.setattr("understudy.runs.capture.capture_recipe", capture_recipe)
    with pytest.raises(SystemExit) as left:
        main(["cache", "capture", f"task={TEXT['task']}", "--output", str(folder)])
    assert not left.value.code
    lines = capsys.readouterr().err.splitlines()
    assert [line.rsplit(",", 1)[0] for line in lines] == ["examples: 4 done", "examples: 8 done"]


def test_threads_that_begin_together_share_one_event_loop(monkeypatch):
    """A connection of one loop fails in another, so the first requests of a process must not make a loop each."""
    from functools import cache
    from threading import Barrier

    from understudy.generation import transport

    made = []

    def slow():
        time.sleep(0.05)
        made.append(object())
        return made[-1]

    monkeypatch.setattr(transport, "_started", cache(slow))
    together = Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: together.wait() >= 0 and transport._loop(), range(4)))
    assert len(made) == 1 and set(found) == set(made)
