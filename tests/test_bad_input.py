"""Bad input: one clear line on stderr and exit code 2, never a traceback. The list is the test."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from engine_cases import DIGITS, TEXT
from understudy.cli import main


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def records(path, rows):
    return write(path, "".join(json.dumps(r) + "\n" for r in rows))


def archive(path, labels):
    np.savez(path, images=np.zeros((len(labels), 1, 4, 4), np.uint8), labels=np.array(labels))
    return path


def image_table(path, labels, column="label"):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    pq.write_table(pa.table({"image": [buffer.getvalue()] * len(labels), column: labels}), path)
    return path


def image(**changes):
    return {**DIGITS, "method": "sft", **changes}


def text(**changes):
    return {**TEXT, "method": "sft", **changes}


def text_data(path, **more):
    return {"name": str(path), "max_length": 16, "vocab_size": 300, **more}


ROWS = [{"prompt": "a b c d " * 20, "completion": "yes"}] * 30
CASES = {
    "missing recipe": (lambda t: ["train", str(t / "none.yaml")], "does not exist"),
    "recipe is not YAML": (lambda t: ["train", str(write(t / "r.yaml", "a: [1"))], "not valid YAML"),
    "recipe is a list": (lambda t: ["train", str(write(t / "r.yaml", "- a"))], "must be a mapping"),
    "unknown key": (lambda t: image(metod="kd"), "Did you mean 'method'"),
    "unknown trainer key": (lambda t: image(trainer={"max_step": 3}), "Did you mean 'max_steps'"),
    "unknown option": (lambda t: image(method="kd", options={"temprature": 2}), "Did you mean 'temperature'"),
    "option out of range": (lambda t: image(method="kd", options={"temperature": 0}), "temperature = 0"),
    "option of a bad type": (lambda t: image(method="taid", options={"alpha": "high"}), "alpha = 'high'"),
    "schedule that ends before it starts": (
        lambda t: image(method="taid", options={"t_start": 0.8, "t_end": 0.2}),
        "below t_start",
    ),
    "trainer value of a bad type": (
        lambda t: image(trainer={"lr_scheduler_type": "zigzag"}),
        "trainer.lr_scheduler_type = 'zigzag'",
    ),
    "a number that is none": (lambda t: image(trainer={"learning_rate": float("nan")}), "trainer.learning_rate is nan"),
    "a number without end": (lambda t: image(data={"name": "digits", "limit": float("inf")}), "data.limit is inf"),
    "negative seed": (lambda t: image(seed=-1), "seed = -1"),
    "unknown method": (lambda t: image(method="pldd"), "Did you mean 'pld'"),
    "unknown task": (lambda t: image(task="image_clasification"), "Did you mean 'image_classification'"),
    "method of another kind": (lambda t: text(method="dhkd"), "text task"),
    "override without a value": (lambda t: ["train", "method"], "does not exist"),
    "override into a number": (lambda t: ["train", "seed=1", "seed.x=2"], "has no keys inside"),
    "unknown data": (lambda t: image(data={"name": "digit"}), "Did you mean 'digits'"),
    "unknown data key": (lambda t: image(data={"name": "digits", "limits": 3}), "Did you mean 'limit'"),
    "bad limit": (lambda t: image(data={"name": "digits", "limit": 0}), "data.limit is 0"),
    "empty image folder": (lambda t: image(data={"name": str((t / "e").mkdir() or t / "e")}), "holds no images"),
    "unreadable image": (
        lambda t: image(data={"name": str(write(t / "i" / "cat" / "a.png", "no").parent.parent)}),
        "not a readable image",
    ),
    "wrong image columns": (
        lambda t: image(data={"name": str(image_table(t / "x.parquet", [0, 1], "class"))}),
        "expected image, label",
    ),
    "nan labels": (
        lambda t: image(data={"name": str(image_table(t / "x.parquet", [0.0, float("nan")]))}),
        "label of row 1 is nan",
    ),
    "labels that are words beside numbers": (
        lambda t: image(data={"name": str(image_table(t / "x.parquet", ["cat", "2"]))}),
        "must be class numbers",
    ),
    "labels of an archive that are words beside numbers": (
        lambda t: image(data={"name": str(archive(t / "x.npz", ["cat", "2"]))}),
        "must be class numbers, found 'cat'",
    ),
    "a negative label": (
        lambda t: image(data={"name": str(image_table(t / "x.parquet", [0, 1, -3] * 20))}),
        "label -3",
    ),
    "a corrupt parquet file": (
        lambda t: image(data={"name": str(write(t / "x.parquet", "PAR1nonsense"))}),
        "not a readable parquet",
    ),
    "a model that does not exist": (lambda t: image(student=str(t / "nowhere")), "cannot be loaded"),
    "a folder that holds no model": (lambda t: image(student=str(t)), "no config.json"),
    "an impossible depth": (lambda t: image(student="resnet9"), "6n + 2"),
    "a bad new model": (lambda t: text(student="llama:hiden=3"), "'hiden=3' is not one of"),
    "no teacher's tokenizer": (lambda t: text(method="kd", teacher=str(t)), "No tokenizer can be loaded"),
    "wrong text columns": (
        lambda t: text(data=text_data(records(t / "d.jsonl", [{"body": "x"}] * 20))),
        "columns body",
    ),
    "empty text": (lambda t: text(data=text_data(write(t / "d.jsonl", ""))), "is empty"),
    "broken JSON lines": (lambda t: text(data=text_data(write(t / "d.jsonl", "{"))), "cannot be read"),
    "text that is a number": (
        lambda t: text(data=text_data(records(t / "d.jsonl", [{"text": 3}] * 20))),
        "text is int",
    ),
    "zero rows that count": (lambda t: text(data=text_data(records(t / "d.jsonl", ROWS))), "zero tokens to train on"),
    "a record that is too long": (
        lambda t: text(data=text_data(records(t / "d.jsonl", ROWS), truncation="error")),
        "data.max_length is 16",
    ),
    "messages without a template": (
        lambda t: text(data=text_data(records(t / "d.jsonl", [{"messages": [{"role": "user", "content": "a"}]}] * 20))),
        "no chat template",
    ),
    "a bad length": (lambda t: text(data={**TEXT["data"], "max_length": 1}), "max_length is 1"),
    "a small vocabulary": (lambda t: text(data={**TEXT["data"], "vocab_size": 10}), "at least 260"),
    "output is a file": (lambda t: image(output=str(write(t / "out", ""))), "is a file, not a folder"),
    "output holds another run": (
        lambda t: image(
            output=str(write(write(t / "run" / "recipe.yaml", "method: pld\n").parent / ".understudy", "").parent)
        ),
        "data.limit: ",
    ),
    "evaluate no run": (lambda t: ["evaluate", str(t)], "is not a run folder"),
    "report of nothing": (lambda t: ["report", str(t)], "neither a run folder"),
    "show an unknown method": (lambda t: ["show", "tiad"], "Did you mean 'taid'"),
    "reproduce an unknown claim": (lambda t: ["reproduce", "pdl"], "Did you mean 'pld'"),
    "an unknown command": (lambda t: ["trian"], "No such command"),
    "an unknown flag": (lambda t: ["methods", "--jsn"], "No such option"),
    "a flag of other trainers": (lambda t: ["train", "--max-steps", "3"], "written as trainer.max_steps=VALUE"),
    "a folder that is no cache": (
        lambda t: ["cache", "verify", str(t / "none"), "task=image_classification"],
        "none is no cache",
    ),
    "zero seeds": (lambda t: ["compare", "task=image_classification", "--seeds", "0"], "--seeds"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_code_two(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = CASES[name]
    made = make(tmp_path)
    if isinstance(made, dict):
        made.setdefault("output", str(tmp_path / "out_run"))
        made = ["train", str(write(tmp_path / "recipe.yaml", yaml.safe_dump(made)))]
    with pytest.raises(SystemExit) as stop:
        main(made)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2, error
    assert error.count("\n") == 0, error
    assert message in error


def command(recipe, folder, **options):
    path = write(folder / "recipe.yaml", yaml.safe_dump(recipe))
    return subprocess.run(
        [sys.executable, "-m", "understudy", "train", str(path)], capture_output=True, text=True, **options
    )


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_named(tmp_path):
    run = image(output=str(tmp_path / "run"), teacher=None)
    run["trainer"] = {**run["trainer"], "max_steps": 10}
    from understudy import distill

    distill(run)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts | {"status": "interrupted"}))
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    (newest / "model.safetensors").write_bytes(b"damaged")
    done = command(run, tmp_path)
    assert done.returncode == 2 and "is corrupt: model.safetensors" in done.stderr and done.stderr.count("\n") == 1


def test_corrupt_weights_are_named(tmp_path):
    from understudy.errors import InputError
    from understudy.models import load_classifier, save_small

    save_small(load_classifier("mlp:4", classes=10, input_shape=(1, 8, 8)), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read"):
        load_classifier(str(tmp_path), classes=10, input_shape=(1, 8, 8))
    with pytest.raises(InputError, match="6n"):
        load_classifier("resnet7", classes=10, input_shape=(3, 8, 8))


def test_other_classes_are_named_on_both_sides(tmp_path):
    from understudy.errors import InputError
    from understudy.models import load_classifier, save_small

    save_small(load_classifier("mlp:4", classes=7, input_shape=(1, 8, 8)), tmp_path)
    with pytest.raises(InputError, match="7 classes and the data has 10"):
        load_classifier(str(tmp_path), classes=10, input_shape=(1, 8, 8))


def test_other_tokenizers_are_refused_by_content(tmp_path):
    from understudy.data import train_tokenizer
    from understudy.models import compare_tokenizers

    a, b = train_tokenizer(["hello hello world"] * 9, 280), train_tokenizer(["quite other words"] * 9, 280)
    assert compare_tokenizers(a, a) is None
    assert "differ" in compare_tokenizers(a, b)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("full").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "compare",
                "task=image_classification",
                "data=digits",
                "output=out",
                "--methods",
                "sft",
                "--seeds",
                "1",
                "trainer.max_steps=2",
                "--json",
                "full",
            ]
        )
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "No space left" in error[-1] and not any("Traceback" in e for e in error)


@pytest.mark.slow
def test_a_read_only_folder_is_one_line(tmp_path):
    target = tmp_path / "locked"
    target.mkdir(mode=0o500)
    if os.geteuid() == 0:
        unprivileged = shutil.which("setpriv")
        if not unprivileged:
            pytest.skip("root may write anywhere, and setpriv is not here")
        output = "/proc/understudy"  # a place where even root may not make a folder
    else:
        output = str(target / "run")
    done = command(image(output=output), tmp_path)
    assert done.returncode == 2 and "cannot be written" in done.stderr and done.stderr.count("\n") == 1
