"""Runs with a teacher of another tokenizer: what is said before training, what is learnt, what is refused."""

import json
import logging

import pytest
import torch

from engine_cases import killed_run, weights
from test_alignment import tokenizer
from understudy import InputError, distill
from understudy.runs.check import check_recipe, evaluate_run
from understudy.runs.recipe import make

WORDS = ["the cat sat on the mat", "日本語の猫 🙂 sat on the mat", "naïvely the 🙃 cat sat there"]


@pytest.fixture
def world(tmp_path):
    """Texts, a tokenizer for each side, and a recipe whose student learns from its teacher alone."""
    for side in ("small", "unigram", "bytes"):
        tokenizer(side).save_pretrained(str(tmp_path / side))
    texts = [WORDS[i % 3] + ". " + WORDS[(i // 3) % 3] for i in range(90)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train = {"max_steps": 120, "per_device_train_batch_size": 8, "learning_rate": 1e-2}

    def recipe(name, steps=120, teacher=train, other="bytes", **changes):
        trained = {"train": teacher} if teacher else {}
        return {
            "task": "language_modeling",
            "data": {"name": str(tmp_path / "data.jsonl"), "max_length": 48, "tokenizer": str(tmp_path / "small")},
            "teacher": {"model": "llama:hidden=32,layers=1,heads=2", "tokenizer": str(tmp_path / other), **trained},
            "student": "llama:hidden=32,layers=1,heads=2",
            "options": {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0},
            "trainer": {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_steps": 3},
            "output": str(tmp_path / name),
            **changes,
        }

    return recipe


def test_a_student_learns_from_a_teacher_of_other_tokens_alone(world, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        made = distill(world("good"))
    told = [r.message for r in caplog.records if "different tokenizers" in r.message]
    assert told and "of the bytes are in groups of one token to one" in told[0]
    assert any(
        "different tokenizers" in n for n in json.loads((tmp_path / "good" / "evaluation.json").read_text())["notes"]
    )
    untaught = distill(world("bad", teacher=None)).metrics["bits_per_byte"]
    taught = made.metrics["bits_per_byte"]
    teacher = json.loads((tmp_path / "good" / "teacher" / "evaluation.json").read_text())["metrics"]["bits_per_byte"]
    assert taught < 0.5 * untaught and taught < teacher + 1.0
    again = evaluate_run(tmp_path / "good")
    assert again["metrics"]["bits_per_byte"] == pytest.approx(taught)


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights(world, tmp_path):
    few = {"max_steps": 5, "per_device_train_batch_size": 8}
    distill(world("one", steps=8, teacher=few, other="unigram"))
    assert killed_run(world("two", steps=8, teacher=few, other="unigram"), 5, "before")
    distill(world("two", steps=8, teacher=few, other="unigram"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"options": {}}, "set options.temperature=1 .it is 2.0"),
        ({"method": "taid", "options": {}}, "not defined for TopK targets; it accepts Dense"),
        ({"student": "teacher"}, "name a student"),
    ],
)
def test_methods_that_cannot_use_it_refuse_in_one_line(world, changes, says):
    with pytest.raises(InputError, match=says):
        distill(world("x", steps=1, teacher=None, **changes))


def test_a_check_tells_the_share_and_one_tokenizer_needs_none(world):
    findings, _ = check_recipe(make(world("x", teacher=None)))
    assert any("aligned by byte offsets" in w for w in findings.warnings)
    findings, _ = check_recipe(make(world("x", teacher=None, other="small")))
    assert not findings.warnings or "aligned" not in " ".join(findings.warnings)
    assert "teacher_nll" in findings.scores


def test_a_member_of_an_ensemble_has_the_students_tokens(world, tmp_path):
    members = {"a": {"model": "llama:hidden=32,layers=1,heads=2", "tokenizer": str(tmp_path / "bytes")}}
    with pytest.raises(InputError, match=r"teacher.members.a have different tokenizers"):
        distill({**world("x"), "teacher": {"members": members}})
