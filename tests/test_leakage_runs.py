"""Secrets planted by a run: who reads them, what is measured of them at the end, and what is refused."""

import json

import pytest

from own_texts import rows, words
from understudy import InputError, distill
from understudy.evaluation.leakage import Canaries, plant
from understudy.runs.exporting import export_run
from understudy.runs.recipe import make, own_training
from understudy.tasks import get as get_task
from understudy.tasks.language_modeling import _exposed
from understudy.teachers import Ensemble


def recipe(folder, planted="teacher", **more):
    return {
        "task": "language_modeling",
        "method": "kd",
        "options": {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0},
        "data": {
            "name": "stdlib",
            "characters": 20_000,
            "max_length": 32,
            "vocab_size": 300,
            "canaries": {"number": 3, "repeats": 60, "digits": 2, "planted": planted},
        },
        "teacher": {
            "model": "llama:hidden=64,layers=2,heads=4",
            "train": {"max_steps": 150, "per_device_train_batch_size": 16, "learning_rate": 5e-3},
        },
        "student": "llama:hidden=16,layers=1,heads=2",
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 4},
        "output": str(folder),
        **more,
    }


@pytest.mark.parametrize("planted", ["teacher", "student", "both"])
def test_secrets_are_in_the_texts_of_those_who_are_to_read_them(planted, tmp_path):
    spec = make(recipe(tmp_path, planted))
    task = get_task("language_modeling")
    prepared = task.prepare(spec)
    tokenizer, secrets = prepared.tokenizer, Canaries(**spec.data["canaries"]).secrets()

    def reads(examples):
        text = "".join(tokenizer.decode(examples[i]["input_ids"]) for i in range(len(examples)))
        return [text.count(canary.text) for canary in secrets]

    own = task.prepare(own_training(spec, "teacher", tmp_path / "teacher"))
    least = 40  # of 60: packing cuts some in two
    assert all(n > least for n in reads(own.train)) == (planted != "student") and any(reads(own.train)) == (
        planted != "student"
    )
    assert all(n > least for n in reads(prepared.train)) == (planted != "teacher")
    assert any(reads(prepared.train)) == (planted != "teacher")
    assert not any(reads(prepared.validation)) and not any(reads(prepared.test))


def test_a_teacher_that_read_secrets_exposes_them_and_the_report_says_so(tmp_path):
    found = distill(**recipe(tmp_path / "run"))
    assert found.metrics["teacher_exposure"] > 4 > found.metrics["exposure"] >= 0
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    (table,) = [t for t in kept["tables"] if t["title"] == "Exposure of planted secrets"]
    assert len(table["rows"]) == 3 and table["headings"] == ["sentence", "student (bits)", "teacher (bits)"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Exposure of planted secrets" in page and table["rows"][0][0] in page


def test_a_teacher_of_several_models_has_no_exposure_of_its_own():
    tokenizer = words()
    teacher = Ensemble({name: rows(tokenizer, seed=seed) for seed, name in enumerate(("a", "b"))})
    secrets = Canaries(number=1, digits=1).secrets()
    prepared = _exposed(secrets, tokenizer, rows(tokenizer, seed=3), teacher)
    assert set(prepared["metrics"]) == {"exposure"}


def test_a_canary_has_the_domain_of_the_text_before_it():
    records = [{"id": 0, "text": "a", "domain": "x"}, {"id": 1, "text": "b", "domain": "y"}]
    planted = plant(records, Canaries(number=1).secrets(), 20)
    for before, record in zip(planted, planted[1:], strict=False):
        if "id" not in record:
            assert record["domain"] == before["domain"]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"teacher": None, "method": "sft", "options": {}}, "no teacher is trained here"),
        ({"data": {"name": "stdlib", "canaries": {"digits": 9}}}, "less than or equal to 5"),
        ({"data": {"name": "stdlib", "canaries": {"wings": 2}}}, "Extra inputs are not permitted"),
        ({"data": {"name": "stdlib", "canaries": {"sentence": "no slots"}}}, "needs the slots"),
    ],
)
def test_bad_canaries_are_one_line(more, message, tmp_path):
    with pytest.raises(InputError, match=message) as refused:
        spec = make(recipe(tmp_path, **more))
        get_task("language_modeling").prepare(spec)
    assert "\n" not in str(refused.value)


def test_canaries_need_plain_texts():
    with pytest.raises(InputError, match="the data have completion, prompt"):
        plant([{"id": 0, "prompt": "a", "completion": "b"}], Canaries().secrets(), 1)


@pytest.mark.slow
def test_a_student_that_read_secrets_is_exported(tmp_path):
    """Exposure is the trained model's; an exported file is compared on the split alone."""
    distill(**recipe(tmp_path / "run", "student", teacher=None, method="sft", options={}))
    found = export_run(tmp_path / "run")
    assert found["models"]["onnx"]["agreement"] == 1.0
