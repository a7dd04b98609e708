"""Comparisons in processes of their own: from any caller, and never longer than the caller lives."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from understudy import InputError
from understudy.workers import carry_out, processes

pytestmark = pytest.mark.slow

CALL = """
from understudy.runs.comparison import compare
recipe = {{"task": "image_classification", "data": {{"name": "digits", "limit": 32}}, "student": "mlp:4",
    "teacher": "mlp:4", "output": {output!r}, "trainer": {{"max_steps": 2, "save_steps": 2}}}}
found = compare(recipe, ["sft", "kd"], 1, workers=1)
print("rows", len(found.table))
"""
LONG = """
from understudy.workers import carry_out, processes

loading = "(d := iter(__import__('torch').utils.data.DataLoader(range(4), num_workers=1)))"
told = "open({pid!r}, 'w').write(str([__import__('os').getpid(), d._workers[0].pid]))"
work = f"{{loading}}, next(d), {{told}}, __import__('time').sleep(600)"
carry_out(eval, [(work,)], 1, processes())
"""


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().split(") ")[1][0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("way", ["script", "stdin"])
def test_a_script_without_a_main_guard_compares(way, tmp_path):
    text = CALL.format(output=str(tmp_path / "out"))
    (tmp_path / "script.py").write_text(text)
    given = {"input": text} if way == "stdin" else {}
    words = [sys.executable, "-"] if way == "stdin" else [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(words, capture_output=True, text=True, **given)
    assert done.returncode == 0 and done.stdout.count("rows 2") == 1, done.stderr
    assert {r["method"] for r in json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"]} == {
        "sft",
        "kd",
    }


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", LONG.format(pid=str(tmp_path / "pid"))])
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.1)
    pids = json.loads((tmp_path / "pid").read_text())  # the worker, and that of its data loader
    assert all(map(alive, pids))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_results_keep_their_order_and_errors_come_back():
    context = processes()
    assert carry_out(divmod, [(7, 2), (9, 3), (5, 4)], 2, context) == [(3, 1), (3, 0), (1, 1)]
    with pytest.raises(ZeroDivisionError) as error:
        carry_out(divmod, [(1, 0), (3, 2)], 1, context)
    assert "Traceback" in error.value.__notes__[0]
    with pytest.raises(InputError, match="ended with exit code 3"):
        carry_out(os._exit, [(3,)], 1, context)


def test_each_worker_sees_one_gpu(monkeypatch):
    from understudy import workers

    monkeypatch.setattr(workers.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers._places() == 2
    assert [workers._gpu(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a")
    assert [workers._gpu(i)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["5", "GPU-a"]
