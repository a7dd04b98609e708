"""Privileged context: the teacher reads another prompt before the same completion."""

import json

import pytest
import torch

from own_texts import WORDS, recipe, rows, words
from understudy import distill
from understudy.data import Batch, collate_text, encode
from understudy.errors import InputError
from understudy.teachers import LocalTeacher

HINT = "nine ten one "


def records(number=8):
    found = []
    for i in range(number):
        asked = " ".join(WORDS[i % 6 : i % 6 + 1 + i % 3])
        found.append(
            {"id": i, "prompt": asked, "completion": " seven eight", "teacher_prompt": HINT * (1 + i % 2) + asked}
        )
    return found


def plain(found, prompt="prompt"):
    return [{"id": r["id"], "prompt": r[prompt], "completion": r["completion"]} for r in found]


def collated(found, tokenizer):
    items = encode(found, tokenizer, max_length=32, pack=False)[0]
    return Batch.from_dict(collate_text([items[i] for i in range(len(items))]))


def test_a_teacher_reads_its_prompt_and_a_student_the_other():
    tokenizer = words()
    model, given = rows(tokenizer, seed=2), records()
    batch = collated(given, tokenizer)
    told, own = collated(plain(given, "teacher_prompt"), tokenizer), collated(plain(given), tokenizer)
    teacher = LocalTeacher(model, "teacher")
    torch.testing.assert_close(teacher(batch).signal.hidden, teacher(told).signal.hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(batch).signal.hidden, model(own).signal.hidden)
    assert torch.equal(batch.for_teacher().row_labels, batch.row_labels) and own.for_teacher() is own
    assert torch.equal(
        batch.take(torch.tensor([3])).for_teacher().row_labels, collated(given[3:4], tokenizer).row_labels
    )
    for mine, theirs in zip(batch.contents, told.contents, strict=True):  # a cache asks about what the teacher reads
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_record_without_one_has_its_own_prompt():
    tokenizer = words()
    given = records(4)
    given[2].pop("teacher_prompt")
    batch = collated(given, tokenizer)
    kept = batch.for_teacher().inputs["attention_mask"].sum(1)
    longer = kept - batch.inputs["attention_mask"].sum(1)
    assert longer[2] == 0 and (longer[[0, 1, 3]] > 0).all()


@pytest.mark.parametrize(
    "method,policy",
    [
        ("forward_kl", None),
        ("gkd", {"fraction": 1.0, "max_new_tokens": 4}),
        ("seqkd", {"max_new_tokens": 4}),
    ],
)
def test_a_student_learns_what_its_teacher_does_with_the_prompt(method, policy, tmp_path):
    """On the data's texts, on its own, and on the teacher's. The student begins as its teacher, which stays apart."""
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        lines = [json.dumps({k: v for k, v in r.items() if k != "id"}) for r in records()]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    options = {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": 1.0} if method == "forward_kl" else {}
    trainer = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 0.01, "logging_steps": 1}
    values = recipe(str(folder), tmp_path / "run", method=method, options=options, on_policy=policy, trainer=trainer)
    result = distill({**values, "student": "teacher"})
    log = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert log[0] > 1e-3 and log[-1] < log[0] / 2
    assert result.metrics["kl"] > 0


@pytest.mark.parametrize(
    "change,says",
    [
        ({"prompt": None, "completion": None, "text": "one two"}, "there is none: give prompt and completion"),
        ({"teacher_prompt": 3}, "teacher_prompt is int"),
    ],
)
def test_bad_columns(change, says, tmp_path):
    given = [{k: v for k, v in {**r, **change}.items() if v is not None and k != "id"} for r in records(12)]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, given)))
    with pytest.raises(InputError, match=says):
        distill(recipe(str(tmp_path / "set.jsonl"), tmp_path / "run", on_policy=None))


def test_replay_mixes_prompts_and_is_refused(tmp_path):
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps(r) for r in records(12)))
    policy = {"max_new_tokens": 4, "replay": {}}
    with pytest.raises(InputError, match=r"leave out on_policy\.replay"):
        distill(recipe(str(tmp_path / "set.jsonl"), tmp_path / "run", on_policy=policy))
