"""Text sources: the request log under kills, the engine's budgets and failures, local models, prompts, the command."""

import multiprocessing
import os
import random
import signal
import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.errors import InputError
from understudy.generation import (
    BudgetSpent,
    Completion,
    FailedRequests,
    OracleSource,
    RefusedRequest,
    Request,
    RequestLog,
    SourceError,
    generate,
)
from understudy.generation.tree_search import TreeJournal

QUICK = {"backoff": 0.001, "longest_backoff": 0.01}
TEXTS = ["plain", "two\nlines", "\x00\x1b[31m", "日本 🙂", "\ud800", " \x85", "", '"}\n{"key": "x"}']


def asked(number, **keys):
    return [Request(f"prompt {i}", f"id/{i}", max_tokens=4, **keys) for i in range(number)]


def oracle(fail=None):
    """Writes the prompt back; `fail(request, attempt)` may raise."""
    tries, lock = {}, threading.Lock()

    def write(request, rng):
        with lock:
            tries[request.id] = tries.get(request.id, 0) + 1
        if fail is not None:
            fail(request, tries[request.id])
        return Completion(f"re {request.prompt} {rng.integers(1000)}", "stop", None, 2, 3)

    source = OracleSource("echo", write)
    source.tries = tries
    return source


# --- the log


def test_a_log_cut_at_any_byte_keeps_every_whole_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: None)  # a thousand openings
    path, records = tmp_path / "log", [(f"k{i}", Completion(t, "stop", -0.5, 1, i)) for i, t in enumerate(TEXTS)]
    with RequestLog(path, "s") as log:
        for key, completion in records:
            log.append(key, "id", completion)
    data = path.read_bytes()
    assert data.count(b"\n") == len(records) + 1
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = data[: cut + 1].count(b"\n") if cut < len(data) else data.count(b"\n")  # a newline is all that may lack
        with RequestLog(path, "s") as log:
            assert len(log) == max(0, whole - 1), cut
            for key, completion in records[len(log) :]:
                log.append(key, "id", completion)
            assert log.tokens == sum(range(len(records)))
        assert path.read_bytes() == data


@settings(max_examples=30, deadline=None)
@given(garbage=st.binary(max_size=40), seed=st.integers(0, 10**6))
def test_garbage_at_the_end_costs_nothing_else(garbage, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log"
    with RequestLog(path, "s") as log:
        log.append("a", "id", Completion("x", "stop"))
    whole = path.read_bytes()
    path.write_bytes(whole + garbage + random.Random(seed).randbytes(seed % 9))
    with RequestLog(path, "s") as log:
        assert log["a"] == Completion("x", "stop")
        log.append("b", "id", Completion("y", "length"))
    with RequestLog(path, "s") as log:
        assert log["b"].text == "y" and len(log) == 2


def test_a_log_refuses_other_sources_other_files_and_second_writers(tmp_path):
    with RequestLog(tmp_path / "log", "one") as log:
        with pytest.raises(InputError, match="another process"):
            RequestLog(tmp_path / "log", "one")
        with pytest.raises(InputError, match="open for source 'one'"):
            generate(oracle(), asked(1), log)
    with pytest.raises(InputError, match="belongs to source 'one' and the source is 'two'"):
        RequestLog(tmp_path / "log", "two")
    RequestLog(tmp_path / "log", "one").close()  # refusing left no lock behind
    (tmp_path / "text").write_text("hello\n")
    with pytest.raises(InputError, match="not a request log"):
        RequestLog(tmp_path / "text", "one")
    assert (tmp_path / "text").read_text() == "hello\n"
    with pytest.raises(InputError, match="is a folder"):
        RequestLog(tmp_path, "one")


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"my notes\nand more",
        b'{"text": "x"}\n{"text"',
        b"{",
        b'{"format": 1, "source": "another"}',
        b"\n\nx",
    ],
)
@pytest.mark.parametrize("kind", ["log", "journal"])
def test_a_file_that_is_no_log_is_refused_as_it_is(content, kind, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"notes\.txt") if content != b"{" else nullcontext():
        (RequestLog(path, "s") if kind == "log" else TreeJournal(path, {"seed": 0}))
    assert path.read_bytes() == content or content == b"{"  # the first byte of a log whose writer was killed


def test_counts_that_no_model_has_are_damage(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    with RequestLog(path, "s") as log:
        log.append("a", "a", Completion("text", "stop", None, 3, 4))
    with path.open("a") as file:
        file.write(
            path.read_text().splitlines()[1].replace('"a"', '"b"').replace('"tokens": 4', f'"tokens": {10**30}') + "\n"
        )
    with RequestLog(path, "s") as log:
        assert len(log) == 1 and log.tokens == 4
    assert "1 damaged line is left out" in caplog.text


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    log = RequestLog(tmp_path / "log", "s")
    before = (tmp_path / "log").read_bytes()

    class Full:
        def __init__(self, file):
            self.file, self.truncate, self.fileno = file, file.truncate, file.fileno
            self.closed, self.close = False, file.close

        def write(self, data):
            if len(data) < 60:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:50])

    monkeypatch.setattr(log, "_file", Full(log._file))
    with pytest.raises(OSError, match="No space"):
        log.append("a", "id", Completion("x", "stop"))
    assert (tmp_path / "log").read_bytes() == before and "a" not in log
    log.close()


def test_a_hundred_thousand_records_are_quick(tmp_path):
    start = time.perf_counter()
    with RequestLog(tmp_path / "log", "s") as log:
        for i in range(100_000):
            log.append(f"{i:064x}", f"id/{i}", Completion("some text of a completion", "stop", -1.0, 10, 5))
    with RequestLog(tmp_path / "log", "s") as log:
        assert len(log) == 100_000 and log.tokens == 500_000
    assert time.perf_counter() - start < 60


# --- the engine


def test_answers_come_in_order_and_nothing_is_asked_twice(tmp_path):
    def slow_at_first(request, attempt):
        time.sleep(0.02 if request.id in ("id/0", "id/1") else 0)

    source, requests = oracle(slow_at_first), asked(60)
    twins = [Request(r.prompt, f"twin {r.id}", max_tokens=4) for r in requests]
    with RequestLog(tmp_path / "log", source.name) as log:
        answers = generate(source, requests + twins, log, concurrency=7)
        assert [a.text.rsplit(" ", 1)[0] for a in answers] == [f"re {r.prompt}" for r in requests + twins]
        assert answers[:60] == answers[60:] and sum(source.tries.values()) == 60
        assert generate(source, requests, log) == answers[:60] and sum(source.tries.values()) == 60
        assert generate(source, [], log) == []
    with RequestLog(tmp_path / "log", source.name) as log:
        assert generate(oracle(lambda *_: 1 / 0), requests, log) == answers[:60]
    assert [oracle().complete(r) for r in requests] == answers[:60]  # the generator is the request's


def test_concurrency_and_rate_are_kept(tmp_path):
    now, most, lock, times = 0, 0, threading.Lock(), []

    def write(request, rng):
        nonlocal now, most
        with lock:
            now, times[len(times) :] = now + 1, [time.monotonic()]
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return "x"

    source = OracleSource("busy", write)
    with RequestLog(tmp_path / "log", source.name) as log:
        generate(source, asked(30), log, concurrency=3)
        assert most == 3
        times.clear()
        generate(source, asked(20, draw=1), log, concurrency=10, rate=50)
    assert times[-1] - times[0] >= 19 / 50 - 0.01


def test_a_failing_request_waits_as_told_and_longer_each_time(tmp_path):
    moments = []

    def fail(request, attempt):
        moments.append(time.monotonic())
        if attempt <= 4:
            raise SourceError("busy", wait=0.2 if attempt == 1 else None)

    with RequestLog(tmp_path / "log", "echo") as log:
        generate(oracle(fail), asked(1), log, backoff=0.02, longest_backoff=0.05)
    gaps = np.diff(moments)
    assert gaps[0] >= 0.2 and gaps[1] >= 0.02 and gaps[2] >= 0.025 and gaps[3] >= 0.025
    with RequestLog(tmp_path / "log2", "echo") as log, pytest.raises(FailedRequests, match="asks to wait 86400 s"):
        generate(oracle(lambda *_: (_ for _ in ()).throw(SourceError("quota", wait=86400))), asked(1), log)


def test_failures_are_told_together_and_the_others_are_kept(tmp_path):
    def fail(request, attempt):
        if request.id in ("id/3", "id/40"):
            raise SourceError("always down")
        if request.id == "id/7":
            raise RefusedRequest("too long")
        if attempt < 3 and request.id.endswith("5"):
            raise SourceError("once")

    source = oracle(fail)
    with RequestLog(tmp_path / "log", source.name) as log:
        with pytest.raises(FailedRequests, match="3 requests failed") as caught:
            generate(source, asked(50), log, retries=4, **QUICK)
        assert set(caught.value.failed) == {"id/3", "id/7", "id/40"} and len(log) == 47
        assert source.tries["id/3"] == 5 and source.tries["id/7"] == 1 and source.tries["id/5"] == 3
        assert "47 of 50" in str(caught.value) and "\n" not in str(caught.value)
        assert len(generate(oracle(), asked(50), log)) == 50


def test_a_bug_in_a_worker_is_raised_and_loses_no_answer(tmp_path):
    def fail(request, attempt):
        time.sleep(0.005)
        if request.id == "id/9":
            raise KeyError("a bug")

    source = oracle(fail)
    with RequestLog(tmp_path / "log", source.name) as log, pytest.raises(KeyError, match="a bug"):
        generate(source, asked(1000), log, concurrency=4)
    with RequestLog(tmp_path / "log", source.name) as log:
        assert len(log) == sum(source.tries.values()) - 1 < 40


@settings(max_examples=15, deadline=None)
@given(budget=st.integers(1, 900), crew=st.integers(1, 9))
def test_a_budget_is_never_overrun_and_is_used(budget, crew, tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    need = len("prompt 00") + 16 + 4  # the most that a request may use; it does use 5
    alike = [
        Request(f"prompt {i:02}", f"id/{i}", max_tokens=4) for i in range(99)
    ]  # a shorter one may fit where one did not
    with RequestLog(folder / "log", "echo") as log:
        try:
            generate(oracle(), alike, log, concurrency=crew, token_budget=budget)
            assert len(log) == 99
        except BudgetSpent as error:
            assert "Raise the budget" in str(error) and f"{len(log)} of 99" in str(error)
            assert budget - (log.tokens + log.prompt_tokens) < need
        assert log.tokens + log.prompt_tokens <= budget
    with RequestLog(folder / "log", "echo") as log:  # the budget is the log's, not the run's
        before = len(log)
        if before < 99:
            with pytest.raises(BudgetSpent):
                generate(oracle(), alike, log, token_budget=budget)
            assert len(log) == before
            assert len(generate(oracle(), alike, log, token_budget=10_000)) == 99


def test_a_cost_budget_counts_both_prices_and_bad_limits_are_one_line(tmp_path):
    with RequestLog(tmp_path / "log", "echo") as log:
        prices = {"price_in": 1.0, "price_out": 10.0}
        with pytest.raises(BudgetSpent, match=r"cost budget of 0\.001"):
            generate(oracle(), asked(99), log, cost_budget=0.001, **prices)
        assert 0.0009 < log.prompt_tokens * 1e-6 + log.tokens * 1e-5 <= 0.001
        for limits, says in (
            ({"cost_budget": 1.0}, "needs price_in"),
            ({"concurency": 3}, "Did you mean 'concurrency'"),
            ({"rate": 0}, "rate = 0"),
            ({"token_budget": 0}, "token_budget = 0"),
        ):
            with pytest.raises(InputError, match=says):
                generate(oracle(), asked(1), log, **limits)


def _interrupted(path, event):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    source = oracle(lambda *_: (event.set(), time.sleep(0.05)))
    with RequestLog(path, source.name) as log:
        generate(source, asked(1000), log, concurrency=4)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_in_flight(tmp_path):
    context = multiprocessing.get_context("forkserver")
    event = context.Event()
    process = context.Process(target=_interrupted, args=(tmp_path / "log", event))
    process.start()
    assert event.wait(60)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 1
    with RequestLog(tmp_path / "log", "echo") as log:
        assert 4 <= len(log) < 1000 and len(log) == len((tmp_path / "log").read_text().splitlines()) - 1
