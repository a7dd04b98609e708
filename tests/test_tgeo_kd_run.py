"""Paper 35, TGeo-KD: runs, and the data that it refuses or warns of."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from understudy import InputError, distill
from understudy.data import load_images

RECIPE = {
    "task": "image_classification",
    "method": "tgeo-kd",
    "data": {"name": "digits", "limit": 300, "validation_size": 100, "label_noise": 0.3},
    "teacher": {"model": "mlp:32", "train": {"max_steps": 250, "learning_rate": 3e-3}},
    "student": "mlp:16",
    "trainer": {
        "max_steps": 250,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 10,
    },
}


def test_it_learns_whom_to_trust(tmp_path):
    result = distill(RECIPE, output=str(tmp_path), options={"temperature": 2.0, "virtual": "head"})
    assert result.metrics["accuracy"] > 0.8  # chance is 0.1
    assert result.metrics["alpha_teacher_right"] > result.metrics["alpha_agreed"]
    assert all(k.startswith(("body", "head")) for k in load_file(tmp_path / "student" / "model.safetensors"))
    terms = [json.loads(line)["terms"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert terms[-1]["validation_ce"] < terms[0]["validation_ce"] and 0 < terms[-1]["alpha"] < 1


def test_weights_that_no_longer_learn_are_named(tmp_path, caplog):
    short = {**RECIPE["trainer"], "max_steps": 20}
    teacher = {"model": "mlp:8", "train": {"max_steps": 2}}
    distill(RECIPE, output=str(tmp_path), options={"ratio_learning_rate": 5.0}, trainer=short, teacher=teacher)
    assert "ended at 0 or 1" in caplog.text


def quick(folder, **keys):
    short = {"max_steps": 2, "per_device_train_batch_size": 16, "save_strategy": "no"}
    values = {
        **RECIPE,
        "output": str(folder),
        "trainer": short,
        "teacher": {"model": "mlp:8", "train": {"max_steps": 2}},
    }
    return distill(values, **keys)


@pytest.mark.parametrize(
    "keys,says",
    [
        ({"options": {"temperature": 0}}, "temperature = 0"),
        ({"options": {"virtual_rate": -1}}, "virtual_rate = -1"),
        ({"options": {"validation": 0}}, "validation = 0"),
        ({"data": {"name": "digits", "label_noise": 1.5}}, "data.label_noise is 1.5"),
        ({"data": {"name": "digits", "teacher_random_classes": [10]}}, "teacher_random_classes names 10"),
        ({"data": {"name": "digits", "validation_size": 0}}, "data.validation_size is 0"),
        ({"data": {"name": "digits", "with_validation": 1}}, "data.with_validation is 1"),
        ({"task": "language_modeling", "data": {"name": "stdlib"}}, "works on classification tasks"),
    ],
)
def test_bad_recipes(keys, says, tmp_path):
    with pytest.raises(InputError, match=says):
        quick(tmp_path, **keys)


def table(folder, labels, validation, told=1):
    """Image files with a validation split of their own."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    images = rng.integers(0, 255, (len(labels), 8, 8), dtype=np.uint8)
    np.savez(folder / "train.npz", images=images, labels=labels)
    np.savez(folder / "test.npz", images=images[:4], labels=[0, 1, 2, 0])
    np.savez(
        folder / "validation.npz", images=images[validation], labels=np.broadcast_to(told, len(images[validation]))
    )
    (folder / "classes.json").write_text('["a", "b", "c", "d"]')
    return {"name": str(folder)}


def test_bad_sets(tmp_path, caplog):
    twelve = [0, 1, 2] * 4
    quick(tmp_path / "a", data=table(tmp_path / "overlap", twelve, slice(0, 3)))
    assert "ended at 0 or 1" not in caplog.text
    assert "No training example has label 3" in caplog.text and "3 validation examples are also" in caplog.text
    with pytest.raises(InputError, match=r"validation.npz: images is empty"):
        quick(tmp_path / "b", data=table(tmp_path / "empty", twelve, slice(0, 0)))
    with pytest.raises(InputError, match="example 5 has none"):
        quick(tmp_path / "c", data=table(tmp_path / "unlabelled", [*twelve[:5], -100, *twelve[6:]], slice(0, 3)))
    with pytest.raises(InputError, match="a validation split of its own"):
        quick(tmp_path / "d", data={**table(tmp_path / "own", twelve, slice(0, 3)), "validation_size": 4})
    one = {**table(tmp_path / "one", [0] * 12, slice(0, 0))}
    (tmp_path / "one" / "validation.npz").unlink()
    (tmp_path / "one" / "test.npz").unlink()
    (tmp_path / "one" / "classes.json").write_text('["a"]')
    with pytest.raises(InputError, match="the data has 1 class"):
        quick(tmp_path / "e", data=one)


def test_validation_examples_have_labels_and_are_not_few(tmp_path, caplog):
    labels = [0, 1, 2, 3] * 30
    with pytest.raises(InputError, match="for every validation example, and example 2 has none: leave out"):
        quick(tmp_path / "a", data=table(tmp_path / "bare", labels, slice(0, 4), [0, 1, -100, 3]))
    nine = table(tmp_path / "nine", labels, slice(0, 39), labels[:39])
    quick(tmp_path / "b", data=nine)
    assert "sees about 9 validation examples of label 3" in caplog.text and ": add validation examples." in caplog.text
    caplog.clear()
    quick(tmp_path / "c", data=nine, options={"every": 0})  # nothing is judged
    enough = table(tmp_path / "enough", labels, slice(0, 48), labels[:48])
    quick(tmp_path / "d", data=enough)
    assert "sees about" not in caplog.text
    quick(tmp_path / "e", data=enough, options={"validation": 24})
    assert "sees about 6 validation examples" in caplog.text and "set options.validation higher" in caplog.text


def test_noise_of_labels_is_where_it_was_asked_for():
    base = {"name": "digits", "limit": 500, "validation_size": 150}
    plain, noisy = load_images(base), load_images({**base, "label_noise": 0.3, "teacher_random_classes": [7, 8, 9]})
    assert len(noisy.validation) == 150 and torch.equal(noisy.validation.labels, plain.validation.labels)
    assert torch.equal(noisy.test.labels, plain.test.labels) and torch.equal(noisy.train.clean, plain.train.labels)
    assert 0.22 < (noisy.train.labels != plain.train.labels).float().mean() < 0.31  # one random label in ten is right
    teacher, whole = noisy.teacher_train, plain.teacher_train
    assert torch.equal(teacher.labels[whole.labels < 7], whole.labels[whole.labels < 7])
    assert 0.8 < (teacher.labels != whole.labels)[whole.labels >= 7].float().mean() < 0.98
    again = load_images({**base, "label_noise": 0.3, "teacher_random_classes": [7, 8, 9]})
    assert again.hash == noisy.hash != plain.hash and torch.equal(again.train.labels, noisy.train.labels)
    other = load_images({**base, "label_noise": 0.3, "seed": 1})
    assert not torch.equal(other.train.labels, noisy.train.labels)
    joined = load_images({**base, "label_noise": 0.3, "with_validation": True}).train
    assert (
        len(joined) == 650 and len(joined.ids.unique()) == 650 and torch.equal(joined.labels[:500], noisy.train.labels)
    )
    assert torch.equal(joined.clean[500:], plain.validation.labels)
