"""Objects of the caller in a recipe's place: methods, factories, data in memory, callbacks; alone and in comparisons."""

import json

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image
from torch import nn
from transformers import TrainerCallback

from engine_cases import DIGITS, TEXT, weights
from understudy import InputError, Method, Term, compare, distill
from understudy.data import load_images
from understudy.data.memory import keep
from understudy.losses import cross_entropy, total_variation
from understudy.models.small import build_small
from understudy.streaming import rowwise
from understudy.training import Requirements

IMAGES = {"task": "image_classification", "teacher": "mlp:8", "student": "mlp:4"}
SHORT = {"max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1}


class Own(Method):
    """Cross-entropy, and total variation to the teacher."""

    name = "own-tv"
    share: float = 0.5

    def loss(self, student, teacher, batch, live):
        far = rowwise(total_variation, student.signal, teacher.signal)
        near = rowwise(cross_entropy, student.signal, None, batch.row_labels)
        return {"tv": Term(far, self.share), "ce": Term(near, 1 - self.share)}


class Alone(Method):
    """Cross-entropy."""

    name = "own-ce"

    @property
    def requires(self):
        return Requirements(teacher="none")

    def loss(self, student, teacher, batch, live):
        return {"ce": Term(rowwise(cross_entropy, student.signal, None, batch.row_labels))}


def net():
    return build_small("mlp:4", 10, (1, 8, 8))


def digits(output, **changes):
    base = {**DIGITS, "teacher": "mlp:8", "trainer": SHORT, "output": str(output)}
    return {**base, **changes}


def pictures(number, shift=0):
    rng = np.random.default_rng(shift)
    return [{"image": rng.integers(0, 256, (4, 4)).astype(np.uint8), "label": i % 2} for i in range(number)]


def recipe_of(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())


@pytest.mark.parametrize("method,share", [(Own, 0.5), (Own(share=0.25), 0.25)])
def test_a_method_of_the_callers_own(method, share, tmp_path):
    distill(digits(tmp_path / "run", method=method))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    terms = line["terms"]
    assert line["loss"] == pytest.approx(share * terms["tv"] + (1 - share) * terms["ce"], rel=1e-4)
    assert recipe_of(tmp_path / "run")["method"] == "own-tv"


def test_a_method_may_be_written_again_but_not_under_a_name_that_is_taken(tmp_path):
    again = type("Own", (Alone,), {"name": "own-tv", "__module__": __name__})
    distill(digits(tmp_path / "a", method=Own))
    distill(digits(tmp_path / "b", method=again))
    line = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[0])
    assert set(line["terms"]) == {"ce"}
    taken = type("Mine", (Alone,), {"name": "kd", "__module__": __name__})
    nameless = type("Nameless", (Method,), {"__module__": __name__})
    for method, says in (
        (taken, "There is a method 'kd' already"),
        (nameless, "Nameless has no name"),
        (3, "method is int: give a name"),
        (net, "method is function"),
    ):
        with pytest.raises(InputError, match=says):
            distill(digits(tmp_path / "c", method=method))
    with pytest.raises(InputError, match="options of its own"):
        distill(digits(tmp_path / "c", method=Own(share=0.1), options={"share": 0.2}))


@pytest.mark.parametrize("key", ["student", "model_init"])
def test_a_factory_makes_the_student_when_the_seed_is_set(key, tmp_path):
    base = {k: v for k, v in digits(tmp_path / "x", method="sft").items() if k != "student"}
    made = []

    def factory():
        made.append(net())
        return made[-1]

    for name in ("a", "b"):
        torch.manual_seed(len(made))  # whatever random numbers the caller has drawn
        distill({**base, key: factory, "output": str(tmp_path / name)})
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert len(made) == 2 and all(torch.equal(a[k], b[k]) for k in a)
    assert recipe_of(tmp_path / "a")["student"]["model"] == "module:factory"


def test_factories_that_are_none(tmp_path):
    for student, says in (
        (lambda: 3, "returns int, not a torch.nn.Module"),
        (lambda size: net(), "must take no argument"),
    ):
        with pytest.raises(InputError, match=says):
            distill(digits(tmp_path / "run", method="sft", student=student))
    with pytest.raises(InputError, match="model_init makes the student"):
        distill(digits(tmp_path / "run", method="sft", model_init=net))


RECORDS = [{"text": f"the cat {i} sat on the mat and looked at {i * 7} birds"} for i in range(40)]
TEXTS = {
    "list": RECORDS,
    "dataset": Dataset.from_list(RECORDS),
    "splits": DatasetDict({"train": Dataset.from_list(RECORDS[:30]), "test": Dataset.from_list(RECORDS[30:])}),
    "lists by split": {"train": RECORDS[:30], "validation": RECORDS[30:35], "test": RECORDS[35:]},
}


@pytest.mark.parametrize("form", TEXTS)
def test_texts_in_memory(form, tmp_path):
    before = json.dumps(RECORDS)
    data = TEXTS[form]
    values = {**TEXT, "method": "sft", "teacher": TEXT["student"], "trainer": SHORT}
    options = {"max_length": 32, "vocab_size": 300}
    result = distill({**values, "data": {"name": data, **options}, "output": str(tmp_path / "run")})
    assert result.metrics["nll"] > 0 and json.dumps(RECORDS) == before
    name = recipe_of(tmp_path / "run")["data"]["name"]
    assert name.startswith("memory:")
    with pytest.raises(InputError, match="data"):  # known by content: one letter more is another set
        other = [{"text": RECORDS[0]["text"] + "!"}, *RECORDS[1:]]
        distill({**values, "data": {"name": other, **options}, "output": str(tmp_path / "run")})
    with pytest.raises(InputError, match="call again with the same data"):
        distill({**values, "data": {"name": "memory:0123", **options}, "output": str(tmp_path / "other")})


def test_a_set_of_records_has_one_name_whatever_holds_it():
    assert keep(RECORDS) == keep(Dataset.from_list(RECORDS)) == keep({"train": [dict(r) for r in RECORDS]})
    assert keep(RECORDS) != keep(RECORDS[::-1]) and keep(RECORDS) != keep({"test": RECORDS})
    assert keep(pictures(3)) != keep(pictures(3, shift=1))


PAIRS = [{"prompt": f"say {i}", "chosen": " yes please", "rejected": " no never"} for i in range(30)]
TABLES = {
    "arrays": pictures(40),
    "images": [{**r, "image": Image.fromarray(r["image"])} for r in pictures(40)],
    "dataset": Dataset.from_list([{**r, "image": Image.fromarray(r["image"])} for r in pictures(40)]),
}


@pytest.mark.parametrize("form", TABLES)
def test_images_in_memory(form, tmp_path):
    distill({**IMAGES, "method": "sft", "data": TABLES[form], "trainer": SHORT, "output": str(tmp_path / "run")})
    hashes = json.loads((tmp_path / "run" / "run.json").read_text())["hashes"]
    assert len(hashes["data"]) == 64


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (3, 4, 5)])
def test_arrays_in_memory_are_images_of_any_layout(shape):
    values = np.random.default_rng(0).integers(0, 256, (20, *shape), dtype=np.uint8)
    found = load_images({"name": keep([{"image": v, "label": i % 2} for i, v in enumerate(values)])})
    last = values.ndim == 4 and shape[0] != 3
    first = (np.moveaxis(values, 3, 1) if last else values.reshape(20, -1, 4, 5))[found.train.ids[0]]
    assert np.array_equal(found.train.pixels[0].numpy(), first)


def changed(record, **values):
    rows = pictures(30)
    rows[record] |= values
    return rows


@pytest.mark.parametrize(
    "rows,says",
    [
        (changed(7, label=None), "found 'None' at image 7"),
        (changed(7, label=float("nan")), "the label of row 7 is nan"),
        (changed(7, label="b"), "found 'b' at image 7"),
        ([{**r, "label": (1, "1", "b")[i % 3]} for i, r in enumerate(pictures(30))], "found 'b' at image 2"),
        (changed(7, label=[0, 1]), "labels are lists of several lengths|found '.0, 1.' at image 7"),
        (changed(7, image=np.zeros((4, 4))), r"row 7: its image is an array of float64 \(4, 4\); give uint8"),
        (changed(7, image=None), "row 7 has no image"),
    ],
)
def test_the_record_in_memory_that_is_wrong_is_named(rows, says):
    with pytest.raises(InputError, match=says) as error:
        load_images({"name": keep(rows)})
    assert "\n" not in str(error.value)


def test_a_set_with_a_format_is_read_without_it():
    rows = TABLES["dataset"]
    plain, tensors = (load_images({"name": keep(r)}) for r in (rows, rows.with_format("torch")))
    assert torch.equal(plain.train.pixels, tensors.train.pixels) and plain.hash == tensors.hash


def test_records_that_have_no_name_are_one_line():
    deep, ring = {"text": "end"}, {"text": "a"}
    for _ in range(3000):
        deep = {"text": "s", "children": [deep]}
    ring["tree"] = ring
    for record, says in (
        ({1: "a", "text": "b"}, "train record 1 has a column 1, a name that is int"),
        ({"text": "a", "tree": {1: "a", "b": 2}}, "train record 1 cannot be read: '<' not supported"),
        ({"text": "a", "tree": deep}, "train record 1 cannot be read: its values are nested too deeply"),
        ({"text": "a", "tree": ring}, "train record 1 cannot be read: Circular reference"),
    ):
        with pytest.raises(InputError, match=says):
            keep([{"text": "first"}, record])


def test_pairs_in_memory(tmp_path):
    data = {"name": PAIRS, "max_length": 32, "vocab_size": 300}
    student = "llama:hidden=16,layers=1,heads=2"
    values = {"task": "preferences", "method": "dpo", "student": student, "data": data, "trainer": SHORT}
    assert "rewards/margins" in distill({**values, "output": str(tmp_path / "run")}).metrics


def test_data_that_are_none(tmp_path):
    stream = Dataset.from_list(RECORDS).to_iterable_dataset()
    cases = (
        ([], {}, "train split is empty"),
        ([1, 2], {}, "record 0 is int"),
        (stream, {}, "has no length"),
        (RECORDS, {"task": "node_classification"}, "Data of task .node_classification. are read from files"),
    )
    for data, changes, says in cases:
        with pytest.raises(InputError, match=says):
            distill({**IMAGES, "method": "sft", "data": data, "output": str(tmp_path / "run"), **changes})


class Seen(TrainerCallback):
    logs: list = []  # noqa: RUF012

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("given", [Seen, Seen()])
def test_callbacks_are_told_of_the_training(given, tmp_path, monkeypatch):
    monkeypatch.setattr(Seen, "logs", [])
    result = distill(digits(tmp_path / "run", method=Own), callbacks=[given])
    steps = [log for log in Seen.logs if "loss" in log]
    assert len(steps) == 3 and all({"terms/tv", "terms/ce", "learning_rate"} <= log.keys() for log in steps)
    assert Seen.logs[-1]["test_accuracy"] == result.metrics["accuracy"]
    with pytest.raises(InputError, match=r"no transformers\.TrainerCallback"):
        distill(digits(tmp_path / "other", method=Own), callbacks=[print])


@pytest.mark.parametrize("forks", [True, False])
def test_a_comparison_takes_them_too(forks, tmp_path, monkeypatch):
    from understudy.runs import comparison

    if not forks:
        monkeypatch.setattr(comparison, "_forked", lambda: None)
    data = [{**r, "image": Image.fromarray(r["image"])} for r in pictures(40)]
    net = lambda: build_small("mlp:4", 2, (1, 4, 4))  # noqa: E731
    teacher = build_small("mlp:8", 2, (1, 4, 4))
    values = {"task": "image_classification", "data": data, "student": net, "teacher": teacher, "trainer": SHORT}
    found = compare({**values, "output": str(tmp_path)}, ["sft", Own(share=1.0), Alone], seeds=[0])
    assert [row["method"] for row in found.table] == ["sft", "own-tv", "own-ce"]
    runs = {r["method"]: tmp_path / r["folder"] for r in found.data["runs"]}
    assert recipe_of(runs["own-tv"])["options"] == {"share": 1.0}
    a, b = weights(runs["sft"]), weights(runs["own-ce"])
    assert all(torch.equal(a[k], b[k]) for k in a)  # the same loss, from the same start


def test_what_a_comparison_cannot_take(tmp_path):
    with pytest.raises(InputError, match="give a function that makes one"):
        compare(digits(tmp_path, student=nn.Linear(2, 2)), ["sft"], seeds=1)
    with pytest.raises(InputError, match="is named twice"):
        compare(digits(tmp_path), [Own(share=0.1), Own(share=0.2)], seeds=1)
