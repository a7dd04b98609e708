"""Comparisons as jobs of a Slurm cluster, whose commands are stand-ins: the bits of `processes`, stops, failures."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from engine_cases import DIGITS
from slurm_stand_in import installed, states
from understudy import InputError, compare
from understudy.cli.main import main
from understudy.runs.executors import Slurm, executor_of, submit

submitit = pytest.importorskip("submitit")
OURS = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "src"))
SMALL = {**DIGITS, "teacher": {"model": "mlp:8", "train": {"max_steps": 4}}, "trainer": {"max_steps": 4}}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([OURS, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    submitit.SlurmJob.watcher.clear()  # it remembers the jobs of other tests, with the same numbers
    return installed(tmp_path / "cluster", monkeypatch)


def scripts(cluster):
    return [path.read_text() for path in sorted(cluster.glob("*.sh"))]


def weights(folder):
    files = sorted([*folder.glob("runs/*/student/*.safetensors"), *folder.glob("teacher/**/student/*.safetensors")])
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def wait_for(condition):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    "text,found",
    [
        ("processes", None),
        ("slurm", Slurm()),
        ("slurm:partition=gpu, time=90,memory=1.5,gpus=2", Slurm(partition="gpu", time=90, memory=1.5, gpus=2)),
    ],
)
def test_an_executor_is_read(text, found):
    assert executor_of(text) == found


@pytest.mark.parametrize(
    "text,says",
    [
        ("slrum", "No executor 'slrum'. Did you mean 'slurm'"),
        ("slurm:tme=5", "Unknown option of slurm: 'tme'. Did you mean 'time'"),
        ("slurm:time=long", "Bad option of slurm: time"),
        ("slurm:gpus=0", "Bad option of slurm: gpus"),
    ],
)
def test_a_bad_executor_is_one_line_before_anything_runs(text, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "task=image_classification", f"output={tmp_path / 'out'}", "--executor", text])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_travel_is_said(cluster, tmp_path):
    from torch import nn

    recipe = {**SMALL, "teacher": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "output": str(tmp_path / "out")}
    with pytest.raises(InputError, match="cannot travel to a Slurm job"):
        compare(recipe, ["sft", "kd"], 1, executor="slurm")
    with pytest.raises(InputError, match="holds a secret"):
        submit(divmod, {"run": ({"hub_token": "hf_abcdefgh"}, 2)}, Slurm(), tmp_path / "jobs")
    assert not scripts(cluster) and not (tmp_path / "jobs").exists()


def test_no_cluster_and_a_refusal_are_one_line(cluster, tmp_path, monkeypatch, capsys):
    with pytest.raises(
        InputError, match=r"^Slurm refused the jobs: sbatch: error: invalid partition specified: closed"
    ):
        submit(divmod, {"run": (7, 2)}, Slurm(partition="closed"), tmp_path / "jobs")
    assert not capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="finds no `srun` here"):
        submit(divmod, {"run": (7, 2)}, Slurm(), tmp_path / "jobs")


@pytest.mark.slow
def test_jobs_end_in_the_bits_of_processes(cluster, tmp_path):
    found = {}
    for name, executor in (("here", "processes"), ("there", "slurm:partition=gpu,time=7,memory=1.5")):
        recipe = {**SMALL, "output": str(tmp_path / name)}
        found[name] = compare(recipe, ["sft", "kd"], 1, executor=executor, workers=2)
    metrics = {name: [run["metrics"] for run in one.data["runs"]] for name, one in found.items()}
    assert metrics["here"] == metrics["there"] and len(metrics["here"]) == 2
    assert weights(tmp_path / "here") == weights(tmp_path / "there") and len(weights(tmp_path / "here")) == 3
    # One job for the teacher, then an array of the two runs.
    wait_for(lambda: set(states(cluster).values()) == {"COMPLETED"})
    assert len(states(cluster)) == 3
    assert all(
        f"#SBATCH --{x}\n" in scripts(cluster)[1] for x in ("partition=gpu", "time=7", "mem=1536MB", "array=0-1%2")
    )
    # What is finished is read.
    again = compare({**SMALL, "output": str(tmp_path / "there")}, ["sft", "kd"], 1, executor="slurm")
    assert again.table == found["there"].table and len(scripts(cluster)) == 2


@pytest.mark.slow
def test_a_failed_job_is_one_line_with_its_log_and_the_others_go_on(cluster, tmp_path):
    jobs = {"first": (7, 2), "second": (1, 0)}
    with pytest.raises(InputError, match="Job 1_1 of second failed: ZeroDivisionError") as error:
        submit(divmod, jobs, Slurm(), tmp_path / "jobs")
    log = tmp_path / "jobs" / "1_1_0_log.err"
    assert f"Its log: {log}." in str(error.value) and "\n" not in str(error.value)
    wait_for(lambda: "Traceback" in log.read_text() and states(cluster)["1_0"] == "COMPLETED")


@pytest.mark.slow
def test_a_job_that_is_ended_by_the_cluster_is_said(cluster, tmp_path):
    def cancel():
        wait_for(lambda: states(cluster).get("1") == "RUNNING")
        subprocess.run(["scancel", "1"], check=True)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(InputError, match="Job 1 of long failed: it ended as CANCELLED"):
        submit(eval, {"long": ("__import__('time').sleep(600)",)}, Slurm(), tmp_path / "jobs")
    canceller.join()


CALL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from pathlib import Path
from understudy.runs.executors import Slurm, submit
wait = f"[__import__('time').sleep(0.1) for _ in iter(lambda: __import__('os').path.exists({sys.argv[1] + '/go'!r}), True)]"
print(submit(eval, {"long": (f"({wait}, 'ended')[1]",)}, Slurm(), Path(sys.argv[1]) / "jobs"))
"""


@pytest.mark.slow
def test_a_submitter_that_is_stopped_leaves_jobs_and_finds_them_again(cluster, tmp_path):
    command = [sys.executable, "-c", CALL, str(tmp_path)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: states(cluster).get("1") == "RUNNING" and (cluster / "asked").exists())  # it waits for the job
    first.send_signal(signal.SIGINT)
    assert "Jobs go on: 1." in first.communicate(timeout=100)[1] and states(cluster)["1"] == "RUNNING"
    (cluster / "asked").unlink()
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for((cluster / "asked").exists)
    (tmp_path / "go").touch()
    assert "ended" in second.communicate(timeout=200)[0]
    assert len(scripts(cluster)) == 1 and set(states(cluster)) == {"1"}
