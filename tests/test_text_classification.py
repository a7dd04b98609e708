"""Text classification: data of all forms, models of all forms, and every method whose rows are classes."""

import json
import re

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine_cases import OPTIONS, killed_run, weights
from text_classes import as_csv, as_lines, classifier, reviews
from understudy import distill
from understudy.cli.main import main
from understudy.data import Batch
from understudy.data.classified_batches import Reading, TextClassBatch, TextClassCollator
from understudy.data.classified_texts import SETS, load_classified
from understudy.data.memory import keep
from understudy.errors import InputError
from understudy.methods import get
from understudy.models import load_tokenizer
from understudy.models.text_classifiers import TextClassifierAdapter, class_names, load_text_classifier
from understudy.runs.recipe import make
from understudy.tasks import get as get_task
from understudy.teachers.cache.teacher import example_keys
from understudy.training.reduction import Counts, sum_terms

TRAINER = {
    "max_steps": 12,
    "per_device_train_batch_size": 8,
    "save_steps": 4,
    "logging_steps": 4,
    "learning_rate": 1e-2,
}


def call(capsys, *words):
    """Run a command that must succeed."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, words)))
    assert stop.value.code == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("models") / "teacher")


def recipe(teacher, data, **more):
    return {
        "task": "text_classification",
        "data": {"name": str(data), "max_length": 16, "vocab_size": 300},
        "teacher": str(teacher),
        "student": "embedding:8",
        "trainer": TRAINER,
        "method": "kd",
    } | more


def test_a_saved_bert_is_distilled_from_a_csv_in_one_command(tmp_path, teacher, capsys):
    """What was saved by plain transformers comes back for plain transformers, smaller, with its label names."""
    from transformers import pipeline

    data, out = as_csv(tmp_path / "reviews.csv", reviews(300)), tmp_path / "run"
    words = [
        *(
            "task=text_classification",
            "method=kd",
            f"data={data}",
            f"teacher={teacher}",
            "student=bert:hidden=8,layers=1,heads=2",
        ),
        *(
            "data.max_length=16",
            "data.vocab_size=300",
            "trainer.max_steps=150",
            "trainer.learning_rate=0.01",
            f"output={out}",
        ),
    ]
    call(capsys, "train", *words)
    metrics = json.loads((out / "evaluation.json").read_text())["metrics"]
    assert metrics["teacher_accuracy"] == 1 and metrics["accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(out / "student")
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    assert model.config.id2label == {0: "good", 1: "bad"} and model.config.hidden_size == 8
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    said = [row["label"] for row in classify([r["text"] for r in reviews(40, seed=9)])]
    assert sum(a == r["label"] for a, r in zip(said, reviews(40, seed=9), strict=True)) >= 36


def test_word_vectors_load_in_plain_transformers_and_do_not_see_order(tmp_path, teacher):
    from transformers import pipeline

    data = as_lines(tmp_path / "reviews.jsonl", reviews(300))
    result = distill(recipe(teacher, data, trainer={**TRAINER, "max_steps": 100}), output=str(tmp_path / "run"))
    assert result.metrics["accuracy"] > 0.9
    classify = pipeline("text-classification", model=str(tmp_path / "run" / "student"))
    one, other = classify(["the film was superb and warm", "warm and superb was the film"])
    assert one["label"] == "good" and one["score"] == pytest.approx(other["score"], abs=1e-5)


HEADS = {"dhkd": {"head": "linear"}}  # the nonlinear one normalises over a batch, and the last has one record


@pytest.mark.parametrize(
    "method", ["sft", "kd", "pld", "taid", "dhkd", "lelp", "tgeo-kd", "dkd", "dist", "rkd", "ctkd", "dho"]
)
def test_every_method_of_classes_works(tmp_path, teacher, method):
    """Unchanged, with a teacher of other tokens."""
    data = as_csv(tmp_path / "d.csv", reviews(60))
    given = recipe(
        teacher,
        data,
        method=method,
        options=HEADS.get(method) or OPTIONS.get(method, {}),
        student="bert:hidden=8,layers=1,heads=2",
    )
    result = distill(given, output=str(tmp_path / "run"))
    assert 0 <= result.metrics["accuracy"] <= 1 and result.student.config.id2label == {0: "good", 1: "bad"}


@pytest.mark.parametrize("method", ["hard", "trg"])
def test_methods_of_images_say_so(teacher, method):
    with pytest.raises(InputError, match=rf"Method '{method}' works on image tasks and 'text_classification' is a"):
        make({"task": "text_classification", "method": method})
    assert make({"task": "image_classification", "method": method}).method == method


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["after", "saving"])
def test_a_killed_run_ends_in_the_same_weights(tmp_path, teacher, moment):
    data = as_csv(tmp_path / "d.csv", reviews(60))
    whole, broken = ({**recipe(teacher, data), "output": str(tmp_path / name)} for name in ("whole", "broken"))
    distill(whole)
    assert killed_run(broken, 8, moment)
    distill(broken)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_gradient_of_a_batch_is_that_of_any_split(tmp_path, teacher):
    """Padding differs from split to split, and teacher and student read other tokens."""
    rows = [{**r, "text": r["text"] + " very" * (i % 5), "id": i, "label": i % 2} for i, r in enumerate(reviews(12))]
    reading = Reading(load_tokenizer(str(teacher)), 16)
    collate, method = TextClassCollator([reading]), get("kd")()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        student = load_text_classifier("bert:hidden=8,layers=1,heads=2", reading, classes=2).double()
    ours = TextClassifierAdapter(student, 2, reading)
    theirs = TextClassifierAdapter(load_text_classifier(str(teacher), reading, classes=2).double(), 2, reading)

    def gradient(sizes):
        student.zero_grad()
        start, batches = 0, []
        for size in sizes:
            batches.append(Batch.from_dict(collate(rows[start : start + size])))
            start += size
        counts = Counts.total([Counts.of(b, "token_mean", {}) for b in batches], lambda values: values)
        for batch in batches:
            with torch.no_grad():
                taught = theirs(batch)
            sums = sum_terms(method.loss(ours(batch), taught, batch, None), batch, "token_mean")
            sum(counts.divide(name, total) for name, total in sums.losses.items()).backward()
        return torch.cat([p.grad.flatten() for p in student.parameters()])

    whole = gradient([12])
    assert whole.abs().max() > 1e-4
    for sizes in ([6, 6], [1, 4, 7], [1] * 12):
        torch.testing.assert_close(gradient(sizes), whole, rtol=1e-6, atol=1e-9)


def test_an_example_is_known_again_whatever_the_padding_and_the_student(teacher):
    rows = [{"text": "the film", "label": 0, "id": 0}, {"text": "a very quite dull story", "label": 1, "id": 1}]
    reading = Reading(load_tokenizer(str(teacher)), 16)
    both = Batch.from_dict(TextClassCollator([reading])(rows))
    alone = Batch.from_dict(TextClassCollator([Reading(load_tokenizer(str(teacher)), 16)])(rows[:1]))
    assert isinstance(both, TextClassBatch) and both.kind == "classification"
    assert example_keys(both)[0] == example_keys(alone)[0] != example_keys(both)[1]
    other = Batch.from_dict(TextClassCollator([Reading(load_tokenizer(str(teacher)), 3)])(rows[:1]))
    assert example_keys(other) != example_keys(alone)


def test_a_cache_answers_for_the_teacher(tmp_path, teacher, capsys):
    data = as_csv(tmp_path / "d.csv", reviews(60))
    live = recipe(teacher, data)
    first = distill(live, output=str(tmp_path / "live"))
    words = [
        f"teacher={teacher}",
        f"data.name={data}",
        "data.max_length=16",
        "student=embedding:4",
        "data.vocab_size=290",
    ]
    folder = tmp_path / "cache"
    call(
        capsys,
        "cache",
        "capture",
        "task=text_classification",
        "method=kd",
        *words,
        "--output",
        folder,
        "--support",
        "dense",
    )
    cached = {**live, "teacher": {"model": str(teacher), "cache": str(folder)}}
    second = distill(cached, output=str(tmp_path / "cached"))
    assert second.metrics["nll"] == pytest.approx(first.metrics["nll"], abs=5e-3)


PAIR = [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")] * 5
FORMS = {
    "text": [{"text": a, "label": i % 2} for i, (a, _) in enumerate(PAIR)],
    "sentence": [{"sentence": a, "label": i % 2} for i, (a, _) in enumerate(PAIR)],
    "text_pair": [{"text": a, "text_pair": b, "label": i % 2} for i, (a, b) in enumerate(PAIR)],
    "text_a": [{"text_a": a, "text_b": b, "label": i % 2} for i, (a, b) in enumerate(PAIR)],
    "premise": [{"premise": a, "hypothesis": b, "label": i % 2, "idx": i} for i, (a, b) in enumerate(PAIR)],
    "sentence1": [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in enumerate(PAIR)],
    "question": [{"question": a, "sentence": b, "label": i % 2} for i, (a, b) in enumerate(PAIR)],
}


@pytest.mark.parametrize("form", FORMS)
def test_columns_by_the_names_that_others_give_them(tmp_path, form):
    found = load_classified({"name": str(as_lines(tmp_path / "d.jsonl", FORMS[form]))})
    paired = form not in ("text", "sentence")
    assert all(("text_pair" in r) == paired for r in found.everything)
    assert sorted({(r["text"], r.get("text_pair")) for r in found.everything}) == sorted(
        {(a, b if paired else None) for a, b in PAIR}
    )
    assert found.classes == ["0", "1"] and len(found.train) + len(found.validation) + len(found.test) == 20
    assert any("idx" in note for note in found.notes) == (form == "premise")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder", "memory", "dataset"])
def test_files_folders_and_lists_hold_the_same(tmp_path, kind):
    rows = [{"review": r["text"], "mood": r["label"]} for r in reviews(40)]
    if kind == "csv":
        name = as_csv(tmp_path / "d.csv", rows)
    elif kind == "jsonl":
        name = as_lines(tmp_path / "d.jsonl", rows)
    elif kind == "parquet":
        name = tmp_path / "d.parquet"
        Dataset.from_list(rows).to_parquet(name)
    elif kind == "folder":
        name = tmp_path / "d"
        name.mkdir()
        as_csv(name / "train.csv", rows[:30])
        as_csv(name / "dev.csv", rows[30:])
    else:
        name = keep(rows if kind == "memory" else Dataset.from_list(rows))
    found = load_classified({"name": str(name), "columns": {"text": "review", "label": "mood"}})
    every = [*found.train, *found.validation, *found.test]
    assert sorted((r["text"], found.classes[r["label"]]) for r in every) == sorted(
        (r["review"], r["mood"]) for r in rows
    )
    assert len(found.validation) == (10 if kind == "folder" else len(found.validation)) and found.classes == [
        "bad",
        "good",
    ]


NUMBERING = {  # labels of the data, names that a model has, data.classes → classes and the numbers of the labels
    "names by alphabet": (["b", "a"], None, None, ["a", "b"], [1, 0]),
    "the model's order": (["good", "bad"], ["good", "bad"], None, ["good", "bad"], [0, 1]),
    "the model's order, in capitals": (["good", "bad"], ["GOOD", "BAD"], None, ["good", "bad"], [0, 1]),
    "a class that the data lack": (["good", "bad"], ["good", "so", "bad"], None, ["good", "so", "bad"], [0, 2]),
    "numbers under the model's names": ([1, 0], ["no", "yes"], None, ["no", "yes"], [1, 0]),
    "numbers as text": (["1", "0"], ["no", "yes"], None, ["no", "yes"], [1, 0]),
    "numbers under given names": ([0, 1], ["no", "yes"], ["nay", "aye"], ["nay", "aye"], [0, 1]),
    "given order": (["good", "bad"], ["good", "bad"], ["bad", "good"], ["bad", "good"], [1, 0]),
    "numbers from 1": ([1, 2, 10], None, None, ["1", "2", "10"], [0, 1, 2]),
    "whole numbers with a point": ([1.0, 0.0], None, None, ["0", "1"], [1, 0]),
    "truth values": ([True, False], None, None, ["false", "true"], [1, 0]),
    "other names than the model's": (["b", "a"], ["x", "y"], None, ["a", "b"], [1, 0]),
}


STARS = [f"{i} star" for i in range(1, 6)]
DIGITS = ["1", "2", "3", "4", "5"]
READINGS = {  # labels of the data, names of a model, data.classes → numbers of the labels, and what is said
    "numbers of names that are numbers": ([0, 1, 2, 3, 4], DIGITS, None, [0, 1, 2, 3, 4], "as numbers.*: 0 is '1'"),
    "names that are numbers": ([5, 1, 2], DIGITS, None, [4, 0, 1], "as names of the classes: 1 is '1'"),
    "numbers that begin names": ([1, 5], STARS, None, [0, 4], "as names of the classes: 1 is '1 star'"),
    "numbers of names that begin with numbers": ([0, 4], STARS, None, [0, 4], "as numbers, from 0.*: 0 is '1 star'"),
    "given as numbers": ([1, 4], STARS, [0, 1, 2, 3, 4], [1, 4], None),
    "given as names": ([1, 4], STARS, [1, 2, 3, 4, 5], [0, 3], "as names of the classes: 1 is '1'"),
    "given in order": ([1, 4], None, STARS, [1, 4], "as numbers, from 0.*: 1 is '2 star'"),
}


@pytest.mark.parametrize("case", READINGS)
def test_numbers_beside_names_that_are_numbers_are_read_as_said(tmp_path, case):
    labels, known, chosen, numbers, said = READINGS[case]
    rows = [{"text": str(label), "label": label} for label in labels] * 10
    spec = {"name": str(as_lines(tmp_path / "d.jsonl", rows))} | ({"classes": chosen} if chosen else {})
    found = load_classified(spec, known)
    given = {r["text"]: r["label"] for r in [*found.everything, *found.test]}
    assert [given[str(label)] for label in labels] == numbers and len(found.classes) == 5
    assert [n for n in found.notes if "are read as" in n] == [n for n in found.notes if said and re.search(said, n)]
    assert any("are read as" in n for n in found.notes) == (said is not None)


@pytest.mark.parametrize("known", [DIGITS, STARS])
def test_numbers_that_can_be_names_too_are_asked_about(tmp_path, known):
    name = as_lines(tmp_path / "d.jsonl", [{"text": str(i), "label": i % 4 + 1} for i in range(40)])
    says = r"the labels 1, 2, 3, 4 can be .*\[0, 1, 2, 3, 4\] if they are numbers, or \[1, 2, 3, 4, 5\]\."
    with pytest.raises(InputError, match=says):
        load_classified({"name": str(name)}, known)


@pytest.mark.parametrize("case", NUMBERING)
def test_classes_are_numbered_as_the_model_has_them(tmp_path, case):
    labels, known, chosen, classes, numbers = NUMBERING[case]
    rows = [{"text": str(label), "label": label} for label in labels] * 10
    spec = {"name": str(as_lines(tmp_path / "d.jsonl", rows))} | ({"classes": chosen} if chosen else {})
    found = load_classified(spec, known)
    assert found.classes == classes
    given = {r["text"]: r["label"] for r in [*found.everything, *found.test]}
    assert [given[str(label)] for label in labels] == numbers
    assert any("none of the model's classes" in n for n in found.notes) == (case == "other names than the model's")


def named(names, number):
    """A split whose classes have these names and numbers."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = [{"text": f"{names[i % len(names)]} {i}", "label": i % len(names)} for i in range(number)]
    return Dataset.from_list(rows, features=features)


SPLIT_NAMES = {"train": ["cat", "apple", "bear"], "val": ["apple", "bear", "cat"], "test": ["bear", "cat"]}


@pytest.mark.parametrize("kind", ["memory", "parquet", "saved"])
def test_splits_that_number_their_classes_otherwise_are_matched_by_name(tmp_path, kind):
    splits = DatasetDict({split: named(names, 12) for split, names in SPLIT_NAMES.items()})
    if kind == "parquet":
        for split, rows in splits.items():
            rows.to_parquet(tmp_path / f"{split}.parquet")
    elif kind == "saved":
        splits.save_to_disk(tmp_path)
    name = keep(splits) if kind == "memory" else str(tmp_path)
    for known, classes in ((None, SPLIT_NAMES["train"]), (["BEAR", "CAT", "APPLE"], ["bear", "cat", "apple"])):
        found = load_classified({"name": name}, known)
        every = [*found.train, *found.validation, *found.test]
        assert found.classes == classes and len(found.validation) == len(found.test) == 12
        assert all(found.classes[r["label"]] == r["text"].split()[0] for r in every)
    found = load_classified({"name": name, "classes": ["x", "y", "z"]})  # other names, in the order of the numbers
    assert {r["text"].split()[0]: r["label"] for r in found.test} == {"bear": 2, "cat": 0}
    with pytest.raises(InputError, match=r"is none of data.classes \(apple, pear, plum\)"):
        load_classified({"name": name, "classes": ["apple", "pear", "plum"]})


BAD = {
    "no domain": (
        [{"text": "a", "label": "x", "from": float("nan")}],
        "record 0 .*has no 'from' to name its domain",
        {"domain_column": "from"},
    ),
    "no label": ([{"text": "a", "label": None}], "record 0 .*the label is None; give one class"),
    "an empty label": ([{"text": "a", "label": " "}], "the label is ' '"),
    "part of a class": ([{"text": "a", "label": 0.5}], "the label is 0.5"),
    "several classes": ([{"text": "a", "label": [0, 1]}], r"the label is \[0, 1\]"),
    "no text": ([{"text": 3, "label": 0}], "text is int, not text"),
    "one class": ([{"text": "a", "label": "x"}] * 20, r"has 1 class \(x\)\. Give records of at least two"),
    "no known column": ([{"body": "a", "label": 0}], "has columns body, label; expected one of: .*premise"),
    "texts and pairs": (
        [{"text": "a", "label": 0}, {"text_a": "a", "text_b": "b", "label": 1}],
        "holds single texts and pairs",
    ),
    "a foreign name": (
        [{"text": "a", "label": "god"}, {"text": "b", "label": "bad"}],
        "label 'god' is none of data.classes.*Did you mean 'good'",
        {"classes": ["good", "bad"]},
    ),
    "no label at all": ([{"text": "a", "label": -1}] * 20, "every record has the label -1, which is none"),
    "classes twice": (
        [{"text": "a", "label": 0}],
        "data.classes is .* list of different names",
        {"classes": ["a", "a"]},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_one_line(tmp_path, case):
    rows, message, *more = BAD[case]
    spec = {"name": str(as_lines(tmp_path / "d.jsonl", rows)), **(more[0] if more else {})}
    with pytest.raises(InputError, match=message) as error:
        load_classified(spec)
    assert "\n" not in str(error.value)


def test_a_split_without_labels_is_left_out(tmp_path):
    folder = tmp_path / "glue"
    folder.mkdir()
    as_lines(folder / "train.jsonl", FORMS["sentence"])
    as_lines(folder / "test.jsonl", [{"sentence": "z", "label": -1}] * 5)
    found = load_classified({"name": str(folder)})
    assert any("the test split has no labels (-1)" in n for n in found.notes)
    assert all(r["text"] != "z" for r in found.test) and len(found.test) == 2


def test_the_students_part_is_a_fixed_draw(tmp_path):
    """Of a file that is sorted by class both classes are drawn; a teacher that is trained first sees all."""
    rows = sorted(reviews(100), key=lambda r: r["label"])
    spec = {"name": str(as_lines(tmp_path / "d.jsonl", rows)), "limit": 20}
    found = load_classified(spec)
    assert len(found.train) == 20 and {r["label"] for r in found.train} == {0, 1}
    assert found.train == load_classified(spec).train
    assert (
        load_classified({**spec, "for_teacher": True}).train
        == found.everything
        == load_classified({**spec, "limit": 9}).everything
    )
    hidden = load_classified({**spec, "unlabelled": True})
    assert {r["label"] for r in hidden.train} == {-1} and {r["label"] for r in hidden.test} == {0, 1}


def test_few_labels_are_left_or_come_so(tmp_path):
    """`labelled` keeps the first of each class of the student's part; a record of label −1 has none, and is never set aside."""
    rows = reviews(100)
    spec = {"name": str(as_lines(tmp_path / "d.jsonl", rows)), "limit": 40, "labelled": 3}
    found, whole = load_classified(spec), load_classified({**spec, "labelled": None})
    labels = [r["label"] for r in found.train]
    assert [labels.count(c) for c in (0, 1, -1)] == [3, 3, 34]
    assert all(r["label"] in (-1, w["label"]) for r, w in zip(found.train, whole.train, strict=True))
    firsts = [next(i for i, w in enumerate(whole.train) if w["label"] == c) for c in (0, 1)]
    assert all(labels[i] >= 0 for i in firsts) and found.hash != whole.hash
    assert load_classified({**spec, "for_teacher": True}).train == whole.everything
    with pytest.raises(InputError, match=r"data\.labelled is 0"):
        load_classified({**spec, "labelled": 0})
    bare = [{**r, "label": -1} if i >= 40 else r for i, r in enumerate(rows)]
    own = load_classified({"name": str(as_lines(tmp_path / "own.jsonl", bare))}, ["good", "bad"])
    assert own.classes == ["good", "bad"] and len(own.everything) == 60 + len(own.taught())
    assert {r["label"] for r in [*own.validation, *own.test, *own.taught()]} == {0, 1}
    assert len(own.validation) + len(own.test) + len(own.taught()) == 40
    assert any("60 of 92 training records have no label (-1)" in note for note in own.notes), own.notes
    alone = load_classified({"name": str(tmp_path / "own.jsonl"), "for_teacher": True})
    assert alone.train == alone.taught() and len(alone.train) == len(own.taught())
    folder = tmp_path / "set"
    folder.mkdir()
    as_lines(folder / "train.jsonl", bare)
    as_lines(folder / "test.jsonl", bare[30:50])
    with pytest.raises(InputError, match=r"test record 10 .*the label is -1; give one class"):
        load_classified({"name": str(folder)})


def test_two_heads_learn_from_few_labels_and_a_teacher_of_texts(tmp_path, teacher):
    """DHO: the saved student is an ordinary classifier with the names of the classes, and learns what the labels cannot tell."""
    rows = as_lines(tmp_path / "d.jsonl", reviews(240))
    base = recipe(
        teacher,
        rows,
        method="dho",
        student="bert:hidden=16,layers=1,heads=2",
        options={"labelled_batch": 4, "unlabelled_batch": 12},
        trainer={**TRAINER, "max_steps": 60, "per_device_train_batch_size": 16, "save_strategy": "no"},
    )
    base["data"]["labelled"] = 4
    found = distill(base, output=str(tmp_path / "run"))
    assert found.metrics["accuracy"] > 0.9  # chance is 0.5
    assert {"mix_alpha", "mix_beta"} <= found.metrics.keys()
    plain = AutoModelForSequenceClassification.from_pretrained(found.folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(found.folder / "student")
    assert plain.config.num_labels == 2 and set(plain.config.id2label.values()) == {"good", "bad"}
    shown = tokenizer(["the film was superb", "the film was awful"], padding=True, return_tensors="pt")
    with torch.no_grad():
        said = [plain.config.id2label[i] for i in plain(**shown).logits.argmax(-1).tolist()]
    assert said == ["good", "bad"]


def test_sets_of_the_data_folder_have_their_names(monkeypatch):
    monkeypatch.delenv("UNDERSTUDY_DATA", raising=False)
    with pytest.raises(InputError, match="'sst2' lies in UNDERSTUDY_DATA"):
        load_classified({"name": "sst2"})
    monkeypatch.undo()
    from understudy.data import find

    if find("text_classification") is None:
        pytest.skip("UNDERSTUDY_DATA is not set")
    for name, (_, classes) in SETS.items():
        found = load_classified({"name": name, "limit": 50})
        assert tuple(found.classes) == classes and {r["label"] for r in found.everything} == set(range(len(classes)))
        assert all(("text_pair" in r) == (name == "rte") for r in found.test)


def test_a_classifier_of_other_classes_is_refused(tmp_path, teacher):
    rows = [{"text": "a", "label": str(i % 3) + "x"} for i in range(30)]
    with pytest.raises(InputError, match="has 2 classes and the data has 3"):
        distill(recipe(teacher, as_csv(tmp_path / "d.csv", rows)), output=str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"reads 8 tokens and data.max_length is 16"):
        short = classifier(tmp_path / "short", steps=0, max_position_embeddings=8)
        distill(recipe(short, as_csv(tmp_path / "e.csv", reviews(30))), output=str(tmp_path / "other"))


def test_an_encoder_is_frozen_and_its_new_head_learns(tmp_path, teacher):
    from transformers import BertForSequenceClassification

    encoder = tmp_path / "encoder"
    BertForSequenceClassification.from_pretrained(teacher).bert.save_pretrained(encoder)
    tokenizer = load_tokenizer(str(teacher))
    tokenizer.save_pretrained(encoder)
    assert class_names(str(encoder), False) is None
    data = as_csv(tmp_path / "d.csv", reviews(80))
    student = {"model": str(encoder), "options": {"freeze": True}}
    given = {**recipe(teacher, data, method="sft", student=student), "teacher": None}
    result = distill({**given, "trainer": {**TRAINER, "max_steps": 60}}, output=str(tmp_path / "run"))
    assert result.metrics["accuracy"] > 0.9
    before, after = BertForSequenceClassification.from_pretrained(teacher).state_dict(), result.student.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name].cpu())}
    assert same == {name for name in before if name.startswith("bert.")}
    with pytest.raises(InputError, match="freeze keeps what a model has learned"):
        load_text_classifier("embedding:8", Reading(tokenizer, 16), classes=2, freeze=True)


def test_a_decoder_classifies_from_its_last_token(tmp_path):
    """Its head reads every token; logits and features are those of the last, whatever the padding."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    reading = Reading(load_tokenizer(str(classifier(tmp_path / "words", steps=0))), 16)
    reading.tokenizer.padding_side = "left"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(reading.tokenizer), num_labels=3, pad_token_id=0, **sizes)
    model = LlamaForSequenceClassification(config).eval()
    rows = TextClassifierAdapter(model, 3, reading)
    items = [{"text": t, "label": 0, "id": i} for i, t in enumerate(["the film", "a very dull story"])]
    both = rows(Batch.from_dict(TextClassCollator([reading])(items)), features=True)
    assert both.features.shape == (2, 8)
    torch.testing.assert_close(model.score(both.features), both.signal.logits)
    alone = rows(Batch.from_dict(TextClassCollator([reading])(items[:1])), features=True)
    torch.testing.assert_close(alone.signal.logits[0], both.signal.logits[0])


def test_the_task_has_both_kinds_of_methods():
    """What works on classes works on both tasks of classes; what needs images on the one that has them."""
    image, text = get_task("image_classification"), get_task("text_classification")
    assert image.kinds == {"image", "classification"} and text.kinds == {"classification"}
    assert get_task("language_modeling").kinds == {"text"}
    assert "classification" in get("kd").kinds and "image" in get("hard").kinds


def test_a_class_that_train_lacks_is_refused_unless_the_classes_are_named(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    for split, more in (("train", []), ("test", [{"text": "other", "label": "c"}])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows + more))
    with pytest.raises(InputError, match=r"the test split has a class 'c' that train lacks; its classes are a, b\."):
        load_classified({"name": str(tmp_path)})
    assert load_classified({"name": str(tmp_path), "classes": ["a", "b", "c"]}).classes == ["a", "b", "c"]


MIXED = {
    "truth beside numbers": ([False, 1, 0, 1], "False and 1 stand beside"),
    "a truth value in two spellings": ([True, "false", "True", "true"], "'True' stand beside|'true' stand beside"),
    "numbers beside names": (["good", 1, "bad", 0], "'good' and 1 stand beside"),
    "one number written in two ways": (["1", "0", "01", "0"], "'1' and '01' stand beside"),
    "one number with a point": (["1", "0", "1.0", "0"], "'1' and '1.0' stand beside"),
    "truth as text beside numbers": (["true", "0", "true", "1"], "'true' and '0' stand beside"),
}


@pytest.mark.parametrize("case", MIXED)
def test_one_class_does_not_become_two_by_how_it_is_written(case, tmp_path):
    labels, says = MIXED[case]
    rows = [{"text": f"the film {i}", "label": labels[i % 4]} for i in range(40)]
    with pytest.raises(InputError, match=says):
        load_classified({"name": str(as_lines(tmp_path / "a.jsonl", rows))})


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([True, False], ["false", "true"]),
        ([1.0, 0], ["0", "1"]),
        ([1, "0"], ["0", "1"]),
        (["1", "3+"], ["1", "3+"]),
        (["nan", "1e3"], ["1e3", "nan"]),
    ],
)
def test_labels_of_one_kind_are_classes_as_before(labels, classes, tmp_path):
    rows = [{"text": f"the film {i}", "label": labels[i % 2]} for i in range(40)]
    assert load_classified({"name": str(as_lines(tmp_path / "a.jsonl", rows))}).classes == classes


def test_a_teacher_that_numbers_the_classes_otherwise_teaches_the_same(tmp_path, teacher):
    other = classifier(tmp_path / "other", labels=("bad", "good"))
    data = str(as_csv(tmp_path / "a.csv", reviews(60)))
    recipe = make(
        {"task": "text_classification", "method": "kd", "teacher": str(other), "student": str(teacher), "data": data}
    )
    recipe = recipe.model_copy(update={"data": {**recipe.data, "classes": ["good", "bad"]}})
    task = get_task("text_classification")
    prepared = task.prepare(recipe)
    batch = Batch.from_dict(prepared.collate([prepared.test[i] for i in range(4)]))
    for spec in (recipe.teacher, recipe.student):
        rows = task.model(spec, prepared).eval()
        assert rows(batch).signal.logits.argmax(1).tolist() == batch.labels.tolist()
