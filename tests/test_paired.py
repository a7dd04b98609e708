"""Examples with several modalities: files of columns, records in memory, recordings, and models that read their own."""

import csv
import json
import wave

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from torch import nn

from engine_cases import DIGITS
from understudy import InputError, distill
from understudy.data import Batch
from understudy.data.audio import read_wave, spectrogram
from understudy.data.memory import keep
from understudy.data.paired import Layout, Pairs, load_paired
from understudy.data.paired_sources import read_paired
from understudy.models.modalities import ModalitiesAdapter
from understudy.models.small import build_small, load_small, save_small
from understudy.runs.recipe import make, own_training
from understudy.synthetic.av_digits import av_digits
from understudy.tasks import get

TASK = get("multimodal_classification")
NAMES = ["picture", "sound"]


def read(name, **more):
    return load_paired({"name": str(name), "modalities": NAMES, **more}, lambda spec: read_paired(spec, []))


def arrays(rows=30, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    return {
        "picture": rng.integers(0, 256, (rows, 4, 4), dtype=np.uint8),
        "sound": (labels[:, None] + rng.normal(size=(rows, 6))).astype(np.float32),
        "label": labels,
    }


def tone(path, rate=8000, hertz=440.0, seconds=0.3, width=2):
    samples = (8000 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


def table(folder, rows, name="train.csv", columns=(*NAMES, "label")):
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder / name


@pytest.fixture
def files(tmp_path):
    """A folder with a table that names 12 pictures and 12 recordings of two classes."""
    rows = []
    for i in range(12):
        kind = ("low", "high")[i % 2]
        Image.fromarray(np.full((6, 6), 40 + 100 * (i % 2), np.uint8)).save(tmp_path / f"{i}.png")
        tone(tmp_path / f"{i}.wav", hertz=(300, 2500)[i % 2], seconds=0.2 + 0.02 * i)
        rows.append((f"{i}.png", f"{i}.wav", kind))
    table(tmp_path, rows)
    return tmp_path, rows


def test_a_packed_row_gives_each_modality_back():
    layout = Layout({"a": (1, 2, 3), "b": (2, 1, 4)})
    parts = {"b": torch.randn(5, 2, 1, 4), "a": torch.randint(0, 256, (5, 1, 2, 3), dtype=torch.uint8)}
    found = layout.unpack(layout.pack(parts))
    assert torch.equal(found["b"], parts["b"]) and torch.equal(found["a"], parts["a"].float() / 255)
    with pytest.raises(InputError, match="data: b is"):
        splits = {
            "train": Pairs(parts, torch.zeros(5).long()),
            "test": Pairs({**parts, "b": parts["b"][:, :1]}, torch.zeros(5).long()),
        }
        load_paired({"name": "data"}, lambda spec: (splits, ["0", "1"]))


def test_an_archive_has_an_array_a_modality(tmp_path):
    found = arrays()
    np.savez(tmp_path / "all.npz", **found)
    splits, layout = read(tmp_path / "all.npz")
    assert layout.shapes == {"picture": (1, 4, 4), "sound": (1, 1, 6)} and splits.classes == ["0", "1", "2"]
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 30
    batch = Batch.from_dict(layout.collate([splits.train[i] for i in range(3)]))
    at = batch.ids.tolist()  # of the training part, from which test was set aside
    close = torch.testing.assert_close
    close(batch.inputs["sound"][:, 0, 0], torch.from_numpy(found["sound"][at]))
    close(batch.inputs["picture"][:, 0] * 255, torch.from_numpy(found["picture"][at]).float())
    assert batch.labels.tolist() == found["label"][at].tolist()
    assert read(tmp_path / "all.npz", modalities=NAMES[::-1])[0].hash != splits.hash
    (tmp_path / "split").mkdir()
    for split in ("train", "validation", "test"):
        np.savez(tmp_path / "split" / f"{split}.npz", **found)
    assert len(read(tmp_path / "split")[0].train) == 30


def test_a_table_names_pictures_and_recordings_beside_it(files):
    folder, _ = files
    splits, layout = read(folder, size=4)
    assert layout.shapes == {"picture": (1, 4, 4), "sound": (1, 32, 32)} and splits.classes == ["high", "low"]
    whole = layout.collate(
        [part[i] for part in (splits.train, splits.validation, splits.test) for i in range(len(part))]
    )
    high = whole["labels"] == 0
    assert torch.equal(high, whole["picture"].mean((1, 2, 3)) > 0.4)
    assert torch.equal(high, whole["sound"].mean((1, 3)).argmax(1) > 16)


def test_splits_that_number_their_classes_otherwise_are_matched_by_name():
    sounds = {"low": 1.0, "high": 2.0, "none": 3.0}

    def split(names):
        rows = [{"picture": [1.0, 2.0], "sound": [sounds[n]] * 3, "label": n} for n in names * 6]
        numbered = ClassLabel(names=names)
        return Dataset.from_list(rows).cast_column("label", numbered)

    sets = {"train": split(["none", "low", "high"]), "val": split(["high", "low", "none"]), "test": split(["high"])}
    splits, layout = read(keep(DatasetDict(sets)))
    assert splits.classes == ["none", "low", "high"]
    for part in (splits.train, splits.validation, splits.test):
        whole = layout.collate([part[i] for i in range(len(part))])
        assert [sounds[splits.classes[i]] for i in whole["labels"]] == whole["sound"].flatten(1)[:, 0].tolist()


def test_records_in_memory_hold_arrays(tmp_path):
    found = arrays(60)
    rows = [{k: v[i] for k, v in found.items()} for i in range(60)]
    trainer = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "save_strategy": "no"}
    result = distill(
        task="multimodal_classification",
        method="sft",
        data={"name": rows, "modalities": ["sound", "picture"]},
        student="mlp:16",
        teacher="none",
        trainer=trainer,
        output=str(tmp_path),
    )
    assert result.metrics["accuracy"] > 0.45  # chance is 1/3; the student reads the sound


@pytest.mark.parametrize(
    "change,says",
    [
        (lambda rows: rows[2].__setitem__(1, ""), "row 2 .*train.csv line 4.* has no sound"),
        (lambda rows: rows[2].__setitem__(2, ""), "row 2 .*has no label"),
        (lambda rows: rows[2].__setitem__(1, "missing.wav"), "missing.wav is not a readable"),
        (lambda rows: rows[2].__setitem__(1, "2.png"), "all of one kind"),
        (lambda rows: [r.__setitem__(1, "0.5") for r in rows], "names no file of numbers"),
    ],
)
def test_a_table_that_cannot_be_read_is_told(files, change, says):
    folder, rows = files
    rows = [list(row) for row in rows]
    change(rows)
    table(folder, rows)
    with pytest.raises(InputError, match=says) as error:
        read(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", [*NAMES, "label"])
def test_a_cell_that_is_no_number_is_no_class_and_no_example(column):
    rows = [{"picture": [1.0, 2.0], "sound": [3.0], "label": ("cat", "dog")[i % 2]} for i in range(20)]
    rows[7][column] = float("nan")
    with pytest.raises(InputError, match=f"data, row 7 has no {column}: every example needs"):
        read(keep(rows))


@pytest.mark.parametrize("channels,cut", [(1, 1), (2, 2)])
def test_a_recording_that_was_cut_off_is_named(channels, cut, tmp_path):
    with wave.open(str(tmp_path / "cut.wav"), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:-cut])
    with pytest.raises(InputError, match=r"cut\.wav ends within a sample"):
        read_wave(tmp_path / "cut.wav")


def test_labels_are_names_or_whole_numbers(tmp_path):
    found = arrays()
    for labels, says in ((np.eye(3)[found["label"]], "is no class"), (found["label"] / 2, "row 1 is 0.5, not a class")):
        np.savez(tmp_path / "all.npz", **{**found, "label": labels})
        with pytest.raises(InputError, match=says):
            read(tmp_path / "all.npz")
    np.savez(tmp_path / "all.npz", **{**found, "label": found["label"].astype(float)})
    assert read(tmp_path / "all.npz")[0].classes == ["0", "1", "2"]


def test_a_cell_of_a_file_without_bytes_and_path_is_missing(tmp_path):
    row = '{"picture": {"bytes": null, "path": null}, "sound": [1.0], "label": 0}\n'
    (tmp_path / "train.jsonl").write_text(row)
    with pytest.raises(InputError, match=r"row 0 .* has no picture"):
        read(tmp_path)


def test_a_batch_holds_the_modalities_alone(tmp_path):
    np.savez(tmp_path / "all.npz", **arrays())
    splits, layout = read(tmp_path / "all.npz")
    assert set(Batch.from_dict(layout.collate([splits.train[0], splits.train[1]])).inputs) == set(NAMES)


def test_columns_that_do_not_belong_together_are_refused(tmp_path):
    found = arrays()
    np.savez(tmp_path / "short.npz", **{**found, "sound": found["sound"][:20]})
    with pytest.raises(InputError, match="20 examples of sound and 30 labels"):
        read(tmp_path / "short.npz")
    np.savez(tmp_path / "nan.npz", **{**found, "sound": np.full((30, 6), np.nan)})
    with pytest.raises(InputError, match="image 0 that are not finite"):
        read(tmp_path / "nan.npz")
    np.savez(tmp_path / "other.npz", **found)
    with pytest.raises(InputError, match=r"no column 'sonud'\. Did you mean 'sound'"):
        read(tmp_path / "other.npz", modalities=["picture", "sonud"])
    with pytest.raises(InputError, match=r"no modality 'sond'\. Did you mean 'sound'"):
        load_paired(
            {"name": "av_digits", "modalities": ["image", "sond"]},
            lambda s: (
                {"train": Pairs(dict.fromkeys(("image", "sound"), torch.zeros(1, 1, 1, 1)), torch.zeros(1))},
                ["0"],
            ),
        )
    for names, says in ((["sound"], "two or more"), (["sound", "labels"], "is none of"), (["sound", "sound"], "twice")):
        with pytest.raises(InputError, match=says):
            make({"task": "multimodal_classification", "data": {"name": "x.npz", "modalities": names}})
    with pytest.raises(InputError, match="nothing says which are modalities"):
        make({"task": "multimodal_classification", "data": {"name": "x.npz"}})


def test_a_spectrogram_shows_frequencies_whatever_the_loudness_and_length(tmp_path):
    tone(tmp_path / "a.wav", hertz=1000.0)
    samples, rate = read_wave(tmp_path / "a.wav")
    found = spectrogram(samples, rate)
    assert found.shape == (1, 32, 32) and int(found[0].mean(1).argmax()) == 7  # bands are 125 Hz wide
    torch.testing.assert_close(spectrogram(samples / 9, rate), found, rtol=1e-3, atol=1e-3)
    assert spectrogram(samples[:40], rate).shape == (1, 32, 32)
    assert spectrogram(torch.zeros(500), rate).abs().max() == 0
    tone(tmp_path / "b.wav", width=1)
    with pytest.raises(InputError, match="8-bit samples"):
        read_wave(tmp_path / "b.wav")
    (tmp_path / "c.wav").write_bytes(b"no sound")
    with pytest.raises(InputError, match=r"not a readable \.wav"):
        read_wave(tmp_path / "c.wav")


def test_the_world_of_digits_is_drawn_from_its_seed_and_wrong_in_training_alone():
    splits, classes = av_digits({"seed": 3})
    again, _ = av_digits({"seed": 3})
    assert {s: len(p.labels) for s, p in splits.items()} == {"train": 600, "validation": 200, "test": 997}
    assert torch.equal(splits["train"].parts["audio"], again["train"].parts["audio"]) and len(classes) == 10
    assert not torch.equal(splits["train"].labels, av_digits({})[0]["train"].labels)
    wrong = (splits["train"].labels != splits["train"].clean).float().mean()
    assert wrong == pytest.approx(0.18, abs=0.04) and torch.equal(splits["test"].labels, splits["test"].clean)
    quiet, _ = av_digits({}, audio_noise=0.0)
    code, label = quiet["test"].parts["audio"][:, 0, 0], quiet["test"].labels
    assert torch.equal(code[:, :8].argmax(1), 2 * (label // 4)) and torch.equal(code[:, 8:].argmax(1), 2 * (label % 4))


def test_a_model_reads_its_own_modalities_alone():
    batch = Batch({"a": torch.randn(4, 1, 2, 2), "b": torch.randn(4, 1, 1, 3)}, torch.zeros(4).long(), torch.arange(4))
    one = ModalitiesAdapter(build_small("mlp:5", 3, (1, 2, 2)), 3, ["a"])
    both = ModalitiesAdapter(build_small("fusion:4,6", 3, ((1, 1, 3), (1, 2, 2))), 3, ["b", "a"])
    before = [m(batch).signal.logits for m in (one, both)]
    batch.inputs["b"] = batch.inputs["b"] + 1
    after = [m(batch).signal.logits for m in (one, both)]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert both(batch, features=True).features.shape == (4, 6)


def test_a_fusion_is_saved_and_read_again(tmp_path):
    model = build_small("fusion:4,6", 3, ((1, 1, 3), (1, 2, 2)))
    save_small(model, tmp_path)
    x = torch.randn(2, 1, 1, 3), torch.randn(2, 1, 2, 2)
    assert torch.equal(load_small(tmp_path)(*x), model(*x))
    with pytest.raises(InputError, match="'mlp:8' reads one input"):
        build_small("mlp:8", 3, ((1, 1, 3), (1, 2, 2)))
    with pytest.raises(InputError, match="reads several inputs"):
        build_small("fusion:8", 3, (1, 2, 2))


class Own(nn.Module):
    """A module of the caller that reads a sound and a picture."""

    def __init__(self, inputs=6):
        super().__init__()
        self.sound, self.head = nn.Linear(inputs, 5), nn.Linear(21, 3)

    def forward(self, sound, picture):
        return self.head(torch.cat([self.sound(sound.flatten(1)).relu(), picture.flatten(1)], 1))


def test_the_callers_own_model_reads_its_modalities_in_order(tmp_path):
    np.savez(tmp_path / "all.npz", **arrays())
    values = {
        "task": "multimodal_classification",
        "data": {"name": str(tmp_path / "all.npz"), "modalities": NAMES},
        "trainer": {**DIGITS["trainer"], "max_steps": 2, "save_strategy": "no"},
        "method": "sft",
        "teacher": "none",
    }
    reads = {"model": "module:Own", "options": {"reads": ["sound", "picture"]}}
    recipe = make({**values, "student": reads})
    prepared = TASK.prepare(recipe)
    assert TASK.model(recipe.student, prepared, Own()).reads == ("sound", "picture")
    with pytest.raises(InputError, match=r"Own cannot read sound \[1, 1, 6\], picture"):
        TASK.model(recipe.student, prepared, Own(7))
    for given, says in (("sond", "Did you mean 'sound'"), ([], "must name modalities"), (["sound"] * 2, "each once")):
        spec = make({**values, "student": {"model": "mlp:4", "options": {"reads": given}}}).student
        with pytest.raises(InputError, match=says):
            TASK.model(spec, prepared)


def test_models_read_the_first_modality_as_student_and_all_as_teacher_also_where_they_are_trained_first(tmp_path):
    data = {"name": "av_digits", "modalities": ["audio", "image"]}
    teacher = {"model": "fusion:4,6", "train": {"max_steps": 1}}
    values = {"task": "multimodal_classification", "method": "kd", "data": data, "student": "mlp:4", "teacher": teacher}
    recipe = make(values)
    assert (recipe.student.options, recipe.teacher.options) == ({"reads": "audio"}, {"reads": ["audio", "image"]})
    assert own_training(recipe, "teacher", tmp_path).student.options == {"reads": ["audio", "image"]}
    members = make({k: v for k, v in values.items() if k != "teacher"}).teacher.members
    assert {name: m.options["reads"] for name, m in members.items()} == {
        "image": "image",
        "audio_and_image": ["audio", "image"],
    }


def test_spoken_digits_have_an_image_of_their_digit(data_folder):
    found, layout = read("spoken_digits", modalities=["audio", "image"])
    assert layout.shapes == {"audio": (1, 32, 32), "image": (1, 28, 28)} and len(found.test) == 300
    assert read("spoken_digits", modalities=["audio", "image"], seed=1)[0].hash != found.hash
    means = {}
    for split in (found.train, found.test):
        held = layout.collate([split[i] for i in range(len(split))])
        means[split] = torch.stack([held["image"][held["labels"] == c].mean(0) for c in range(10)]).flatten(1)
    apart = torch.cdist(means[found.train], means[found.test])
    assert apart.argmin(1).tolist() == list(range(10))  # the images of a label show one digit


def test_recordings_of_two_rates_are_refused(tmp_path):
    rows = []
    for i in range(12):
        tone(tmp_path / f"{i}.wav", rate=16000 if i == 7 else 8000)
        rows.append({"picture": [[0.0, 1.0]], "sound": f"{i}.wav", "label": i % 2})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(InputError, match=r"7\.wav has 16000 samples a second and 0\.wav 8000"):
        read(tmp_path / "train.jsonl")


@pytest.mark.parametrize("names", [["x", "y", "z"], [0, 1, 2]])
def test_a_class_that_train_lacks_is_refused(names, tmp_path):
    held = arrays(classes=2)
    for split, labels in (("train", held["label"]), ("test", held["label"] * 2)):
        np.savez(tmp_path / f"{split}.npz", **{**held, "label": np.array(names)[labels]})
    with pytest.raises(InputError, match=f"the test split has a class '{names[2]}' that train lacks"):
        read(tmp_path)
