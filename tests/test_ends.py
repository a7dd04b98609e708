"""Two sides that end a text, or write a conversation, in different ways are refused before anything is paid for."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_cases import TEXT
from understudy import distill
from understudy.errors import InputError
from understudy.runs.capture import capture_recipe
from understudy.runs.recipe import make


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """A teacher, and a student of the same tokens that another token ends."""
    home = tmp_path_factory.mktemp("sides")
    quick = {**TEXT["trainer"], "max_steps": 1}
    distill({**TEXT, "method": "sft", "teacher": None, "output": str(home / "one"), "trainer": quick})
    teacher = home / "one" / "student"
    tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(home / "other")
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(home / "other")
    tokenizer.eos_token = AutoTokenizer.from_pretrained(teacher).eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(home / "template")
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(home / "template")
    return {"teacher": str(teacher), "other": str(home / "other"), "template": str(home / "template")}


def recipe(sides, student, tmp_path, **changes):
    one = {"max_steps": 1, "per_device_train_batch_size": 2}
    return {
        **TEXT,
        "method": "kd",
        "options": {"temperature": 1.0},
        "teacher": sides["teacher"],
        "student": sides[student],
        "trainer": one,
        "output": str(tmp_path / "run"),
        **changes,
    }


def test_other_ends_are_refused_unless_somebody_chooses(sides, tmp_path):
    with pytest.raises(
        InputError, match=r"teacher ends a text with '</s>' and student with '<pad>': name the tokenizer"
    ):
        distill(recipe(sides, "other", tmp_path))
    chosen = {**TEXT["data"], "tokenizer": sides["teacher"]}
    assert distill(recipe(sides, "other", tmp_path, data=chosen, output=str(tmp_path / "chosen"))).metrics


def test_a_teacher_that_stops_elsewhere_than_its_tokenizer_is_refused(sides, tmp_path):
    mixed = {"model": sides["other"], "tokenizer": sides["teacher"]}
    with pytest.raises(InputError, match=r"The teacher ends a text with token .* would not learn to stop"):
        distill(recipe(sides, "teacher", tmp_path, teacher=mixed))


def test_other_templates_are_refused_where_there_are_conversations(sides, tmp_path):
    assert distill(recipe(sides, "template", tmp_path)).metrics  # plain text has no use for a template
    file = tmp_path / "talk.jsonl"
    turns = '[{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b a c"}]'
    file.write_text("".join(f'{{"messages": {turns}}}\n' for _ in range(40)))
    talk = {**TEXT["data"], "name": str(file), "pack": False}
    talk.pop("characters")
    with pytest.raises(InputError, match="different chat templates: name the tokenizer"):
        distill(recipe(sides, "template", tmp_path, data=talk, output=str(tmp_path / "talk")))


def test_a_cache_is_of_texts_that_end_alike(sides, tmp_path):
    capture_recipe(make(recipe(sides, "teacher", tmp_path)), tmp_path / "cache", "top_k:20")
    cached = {"model": sides["other"], "cache": str(tmp_path / "cache")}
    with pytest.raises(InputError, match="captured with ends '1 2' and the run has '1 0'"):
        distill(recipe(sides, "other", tmp_path, teacher=cached))
