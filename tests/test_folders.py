"""Run folders: nobody else's files, one writer, the same run going on, and files compared with what was written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine_cases import DIGITS, killed_run
from understudy import InputError, distill
from understudy.cli import main
from understudy.files import read_json
from understudy.reporting import render_comparison, render_run
from understudy.runs.check import evaluate_run
from understudy.runs.folder import held
from understudy.training import last_complete

SFT = {
    "task": "image_classification",
    "method": "sft",
    "data": {"name": "digits", "limit": 32},
    "student": "mlp:4",
    "teacher": "mlp:4",
    "trainer": {"max_steps": 4, "per_device_train_batch_size": 16, "save_steps": 2, "logging_steps": 1},
}


def recipe(folder, **changes):
    trainer = {**SFT["trainer"], **changes.pop("trainer", {})}
    return {**SFT, "output": str(folder), **changes, "trainer": trainer}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, to be copied."""
    folder = tmp_path_factory.mktemp("done") / "run"
    distill(recipe(folder))
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run that was killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    assert killed_run(recipe(folder), 3, "before")
    return folder


def copied(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "run"))


def flip(file, place):
    held = bytearray(file.read_bytes())
    held[place % len(held)] ^= 1
    file.write_bytes(held)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- somebody else's files


def test_a_folder_of_other_files_is_refused_untouched(tmp_path):
    mine = tmp_path / "mine"
    (mine / "student").mkdir(parents=True)
    (mine / "checkpoints" / "checkpoint-100").mkdir(parents=True)
    for name in (
        "run.json",
        "metrics.jsonl",
        "samples.jsonl",
        "student/a",
        "checkpoints/checkpoint-100/b",
        "recipe.yaml",
    ):
        (mine / name).write_text("[]")
    before = files(mine)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds files that are no run's .* left alone"):
            distill(recipe(mine), overwrite=overwrite)
    assert files(mine) == before


@pytest.mark.parametrize("place", ["/", "~", "data", "above"])
def test_a_root_a_home_and_the_data_are_no_output(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    run = tmp_path / "run"
    distill(recipe(run))  # a folder of ours all the same
    data = run / "set"
    data.mkdir()
    for name in ("train", "test"):
        shutil.copy(Path(__file__), data / f"{name}.py")
    where = {"/": Path("/"), "~": tmp_path / "home", "data": data, "above": run}[place]
    before = files(run)
    with pytest.raises(InputError, match=r"is no place for|which the run reads"):
        distill(recipe(where, data={"name": str(data)}), overwrite=True)
    assert files(run) == before and not list((tmp_path / "home").iterdir())


def test_a_refused_run_takes_no_folder(tmp_path):
    with pytest.raises(InputError, match="has 7 classes"):
        distill(recipe(tmp_path / "run", student=str(_student_of(7, tmp_path / "seven"))))
    assert not (tmp_path / "run").exists()
    assert distill(recipe(tmp_path / "run")).metrics


def _student_of(classes, folder):
    from understudy.models import load_classifier, save_small

    save_small(load_classifier("mlp:4", classes=classes, input_shape=(1, 8, 8)), folder)
    return folder


# -- one writer


@pytest.mark.slow
def test_a_second_process_is_told_who_writes(tmp_path, capsys):
    with held(tmp_path / "run"):
        with pytest.raises(InputError, match=f"being written by process {os.getpid()} on"):
            distill(recipe(tmp_path / "run"))
        script = f"from understudy.runs.folder import held\nwith held(__import__('pathlib').Path({str(tmp_path / 'run')!r})): pass"
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert other.returncode == 1 and f"process {os.getpid()} on" in other.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_lock_of_a_dead_process_is_taken_over(cut, tmp_path):
    folder = copied(cut, tmp_path)
    assert (folder / ".understudy").read_text().startswith("process ")
    assert distill(recipe(folder)).metrics


# -- the same run going on


def test_differences_are_named_by_key(done, tmp_path):
    folder = copied(done, tmp_path)
    changed = recipe(folder, seed=1, trainer={"learning_rate": 0.01, "max_steps": 3})
    said = r"seed: 0 → 1; trainer\.learning_rate: .* → 0\.01; trainer\.max_steps: 4 → 3\. .*--overwrite"
    with pytest.raises(InputError, match=said):
        distill(changed)
    assert read_json(folder / "run.json")["status"] == "done"
    assert distill(changed, overwrite=True).metrics
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["seed"] == 1


def test_keys_that_change_no_result_may_change(cut, tmp_path):
    a, b = copied(cut, tmp_path / "a"), copied(cut, tmp_path / "b")
    distill(recipe(a))
    distill(recipe(b, trainer={"logging_steps": 2, "save_total_limit": 1, "save_steps": 1}))
    a, b = (load_file(f / "student" / "model.safetensors") for f in (a, b))
    assert all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize("state", ["done", "cut"])
def test_more_steps_go_on(state, request, tmp_path):
    folder = copied(request.getfixturevalue(state), tmp_path)
    constant = {"lr_scheduler_type": "constant"}
    whole = distill(recipe(tmp_path / "whole", trainer={"max_steps": 7, **constant}))
    shutil.rmtree(folder)
    distill(recipe(folder, trainer=constant))
    distill(recipe(folder, trainer={"max_steps": 7, **constant}))
    assert [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()] == list(range(1, 8))
    a, b = (load_file(f / "student" / "model.safetensors") for f in (folder, whole.folder))
    assert all(a[k].equal(b[k]) for k in a)
    assert any("was to end at 4" in note for note in read_json(folder / "evaluation.json")["notes"])


def test_a_teacher_of_other_steps_is_not_taken_for_the_one_asked_for(tmp_path):
    base = {**DIGITS, "method": "kd", "output": str(tmp_path / "run"), "trainer": {"max_steps": 1}}
    for model, train in (("mlp:16", 2), ("mlp:8", 2)):
        asked = {**base, "teacher": {"model": model, "train": {"max_steps": train}}}
        if model == "mlp:16":
            distill(asked)
            (tmp_path / "run" / "recipe.yaml").unlink()  # as if the run had not begun yet
            (tmp_path / "run" / "run.json").unlink()
            continue
        with pytest.raises(InputError, match=r"teacher holds another run: student\.model: mlp:16 → mlp:8"):
            distill(asked)
        distill(asked, overwrite=True)
    assert "mlp:8" in (tmp_path / "run" / "teacher" / "student" / "config.json").read_text()


# -- files compared with what was written


def test_data_that_were_changed_are_refused_on_resume(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"one two three {i} " * 20}) + "\n" for i in range(40)))
    text = {
        "task": "language_modeling",
        "method": "sft",
        "data": {"name": str(texts), "max_length": 16, "vocab_size": 280},
        "student": "llama:hidden=8,layers=1,heads=2",
        "teacher": "llama:hidden=8,layers=1,heads=2",
    }
    asked = {**text, "output": str(tmp_path / "run"), "trainer": SFT["trainer"]}
    assert killed_run(asked, 3, "before")
    before = read_json(tmp_path / "run" / "run.json")
    texts.write_text(texts.read_text().replace("two", "2"))
    with pytest.raises(InputError, match=rf"The data of run .* SHA-256 {before['hashes']['data']} then, \w{{64}} now"):
        distill(asked)
    assert read_json(tmp_path / "run" / "run.json") == before


@pytest.mark.parametrize("name", ["student/model.safetensors", "student/config.json", "recipe.yaml", "evaluation.json"])
def test_a_flipped_byte_of_a_finished_run_is_refused(name, done, tmp_path):
    folder = copied(done, tmp_path)
    flip(folder / name, -20)
    for read in (evaluate_run, lambda f: distill(recipe(f))):
        with pytest.raises(InputError, match=Path(name).name):
            read(folder)


def test_a_teacher_with_a_flipped_byte_is_refused(done, tmp_path):
    folder = copied(done, tmp_path)
    flip(folder / "student" / "model.safetensors", -20)
    with pytest.raises(InputError, match=r"is not as it was saved: model\.safetensors"):
        distill(recipe(tmp_path / "next", method="kd", teacher=str(folder / "student")))
    (folder / "student" / "complete.json").unlink()  # the change is meant
    assert distill(recipe(tmp_path / "next", method="kd", teacher=str(folder / "student"))).metrics


def test_other_folders_beside_the_checkpoints_are_left_alone(cut, tmp_path):
    folder = copied(cut, tmp_path)
    best = folder / "checkpoints" / "checkpoint-best"
    best.mkdir()
    (best / "complete.json").write_text("{}")
    distill(recipe(folder))
    assert best.is_dir() and last_complete(folder / "checkpoints").name == "checkpoint-4"


def test_a_report_that_is_missing_is_made(done, tmp_path):
    folder = copied(done, tmp_path)
    (folder / "report.html").unlink()
    distill(recipe(folder))
    assert "accuracy" in (folder / "report.html").read_text()


def test_a_kill_while_a_report_or_a_log_is_written_leaves_the_one_before(done, cut, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    write = Path.write_text

    def half(self, text, *args, **keys):
        write(self, text[: len(text) // 2], *args, **keys)
        raise Killed

    finished, begun = copied(done, tmp_path / "a"), copied(cut, tmp_path / "b")
    report, log = (finished / "report.html").read_text(), (begun / "metrics.jsonl").read_text()
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(Killed):
        render_run(finished)
    monkeypatch.setattr(
        Path, "write_text", lambda self, *a, **k: (half if "metrics" in self.name else write)(self, *a, **k)
    )
    with pytest.raises(Killed):
        distill(recipe(begun))
    assert (finished / "report.html").read_text() == report and (begun / "metrics.jsonl").read_text() == log


def test_damaged_lines_are_counted_and_said(cut, tmp_path, caplog):
    folder = copied(cut, tmp_path)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"step": NaN, "loss": 1}\n[1]\n{"step": -3}\n')
    distill(recipe(folder))
    assert "4 damaged lines are left out" in caplog.text
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + '{"step": 9, "loss": "low"}\n')
    (folder / "validation.jsonl").write_text('{"step": 1, "accuracy": 0.5}\nnot JSON\n')
    report = render_run(folder).read_text()
    assert "1 damaged line of metrics.jsonl is left out" in report and "1 damaged line of validation.jsonl" in report


def test_pictures_and_runs_are_of_the_folder(tmp_path):
    (tmp_path / "secret").write_text("do not show")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"method": "sft"}))
    (run / "evaluation.json").write_text(json.dumps({"pictures": {"a": "../secret"}}))
    with pytest.raises(InputError, match="which is not in the run folder"):
        render_run(run)
    (run / "comparison.json").write_text("[1]")
    with pytest.raises(InputError, match=r"comparison\.json is damaged"):
        render_comparison(run)


# -- a full disk, a signal


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left")])
@pytest.mark.parametrize("where", ["checkpoint", "student"])
def test_a_full_disk_is_one_line_and_resumes(error, where, tmp_path, monkeypatch):
    from understudy.models import weights
    from understudy.training import checkpoint

    def full(*args, **kwargs):
        raise error

    module = checkpoint if where == "checkpoint" else weights
    with monkeypatch.context() as patched:
        for name in ("save_file", "save_model"):
            patched.setattr(module, name, full, raising=False)
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(InputError, match=r"cannot be written: .*No space left"):
            distill(recipe(tmp_path / "run"))
        assert signal.getsignal(signal.SIGINT) is before
    assert distill(recipe(tmp_path / "run")).metrics


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["teacher", "outside"])
def test_a_signal_outside_training_is_130_and_resumes(signal_number, moment, tmp_path, monkeypatch, capsys):
    from understudy.runs import run
    from understudy.training import DistillationTrainer

    step = DistillationTrainer.training_step

    def stepping(self, *args, **kwargs):
        if "teacher" in self.args.output_dir and self.state.global_step == 1:
            os.kill(os.getpid(), signal_number)
        return step(self, *args, **kwargs)

    def evaluating(*args, **kwargs):
        os.kill(os.getpid(), signal_number)
        for _ in range(500):  # the handler runs a moment later if another thread got the signal
            time.sleep(0.01)
        raise AssertionError

    monkeypatch.setattr(
        *(
            (DistillationTrainer, "training_step", stepping)
            if moment == "teacher"
            else (run, "evaluate_split", evaluating)
        )
    )
    train = {"max_steps": 4, "per_device_train_batch_size": 16}
    asked = recipe(tmp_path / "run", method="kd", teacher={"model": "mlp:4", "train": train})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main(["train", str(tmp_path / "recipe.yaml")])
    signal.signal(signal.SIGINT, ours)
    assert signal.getsignal(signal.SIGTERM) == before
    assert stop.value.code == 130 and "The same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert distill(asked).metrics


# -- caches and logs


def test_a_store_deletes_no_file_but_shards(tmp_path):
    from safetensors.torch import save_file

    from understudy.teachers.cache.store import ShardStore

    keep = tmp_path / "precious"
    keep.write_text("mine")
    store = ShardStore(tmp_path / "cache", {"format": 1})
    for i in range(3):
        store.append([bytes([i]) * 32], [1], {"score": torch.zeros(1)})
    arrays = {"keys": torch.zeros(1, 32, dtype=torch.uint8), "counts": torch.ones(1, dtype=torch.int32)}
    bad = tmp_path / "cache" / f"shard-{'0' * 32}.safetensors"
    for name in (str(keep), "../precious", "identity.json"):
        save_file({**arrays, "score": torch.zeros(1)}, str(bad), {"merged": name})
        with pytest.raises(InputError, match="which is no shard"):
            ShardStore(tmp_path / "cache").compact()
    bad.unlink()
    store.compact()
    assert keep.read_text() == "mine" and len(ShardStore(tmp_path / "cache")) == 3


def test_a_shard_is_compared_with_its_checksum(tmp_path):
    from understudy.teachers.cache.store import ShardStore

    store = ShardStore(tmp_path, {"format": 1})
    store.append([b"k" * 32], [2], {"code": torch.arange(2000).view(2, 1000)[:, :4].to(torch.uint8)})
    (shard,) = tmp_path.glob("shard-*")
    for place in (-1, len(shard.read_bytes()) // 2):
        flip(shard, place)
        with pytest.raises(InputError, match="cannot be read"):
            ShardStore(tmp_path).check()
        with pytest.raises(InputError, match="cannot be read"):
            ShardStore(tmp_path).read([b"k" * 32])
        flip(shard, place)
    ShardStore(tmp_path).check()


def test_a_cache_leaves_a_folder_of_other_files_alone(tmp_path):
    from understudy.teachers.cache.store import ShardStore

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files that are no cache's"):
        ShardStore(tmp_path, {"format": 1})


@pytest.mark.parametrize("change", [{"tokens": -1}, {"log_prob": float("nan")}, {"prompt_tokens": 1.5}, {"text": None}])
def test_a_completion_that_cannot_be_is_damage(change, tmp_path, caplog):
    from understudy.generation import Completion, RequestLog

    with RequestLog(tmp_path / "log", "s") as log:
        log.append("a", "1", Completion("x", "stop", -1.0, 2, 3))
        log.append("b", "2", Completion("y", "stop", -1.0, 2, 3))
    head, first, second = (tmp_path / "log").read_text().splitlines()
    (tmp_path / "log").write_text("\n".join([head, json.dumps({**json.loads(first), **change}), second, ""]))
    with RequestLog(tmp_path / "log", "s") as log:
        assert log.get("a") is None and log["b"].text == "y" and log.tokens == 3
    assert "1 damaged line" in caplog.text


def test_generate_replaces_nothing_that_it_did_not_write(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("hello\n")
    (tmp_path / "mine.jsonl").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for output, says in (
        ("mine.jsonl", "is there already"),
        ("pipe", "no regular file"),
        ("/dev/null", "no regular file"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["generate", str(tmp_path / "p.txt"), "--model", "none", "--output", str(tmp_path / output)])
        assert stop.value.code == 2 and says in capsys.readouterr().err
    assert (tmp_path / "mine.jsonl").read_text() == "mine" and Path("/dev/null").is_char_device()


@pytest.mark.parametrize("command", ["compare", "reproduce", "study"])
def test_a_file_of_results_that_cannot_be_written_is_refused_before_anything_starts(command, tmp_path, capsys):
    """`--json`: a folder where a file belongs; one that is not there is made when there is a result."""
    (tmp_path / "file").touch()
    (tmp_path / "recipe.yaml").write_text("task: image_classification\nmethod: sft\n")
    words = {"reproduce": ["pld", "--seeds", "1", "--output", str(tmp_path / "runs")]}
    given = words.get(command, [str(tmp_path / "recipe.yaml"), f"output={tmp_path / 'runs'}"])
    for path, says in ((tmp_path, "is a folder"), (tmp_path / "file" / "out.json", "its folder cannot be made")):
        with pytest.raises(SystemExit) as ended:
            main([command, *given, "--json", str(path)])
        assert ended.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    wrong = ["nonsense", *given[1:]] if command == "reproduce" else ["nonsense.yaml"]
    with pytest.raises(SystemExit):
        main([command, *wrong, "--json", str(tmp_path / "new" / "out.json")])
    assert not (tmp_path / "new").exists()
