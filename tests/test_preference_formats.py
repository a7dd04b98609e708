"""Preference data: TRL's formats as TRL reads them, chat templates, what is masked and cut, and bad records."""

import copy
import json

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from understudy import InputError
from understudy.data import encode_lists, load_preferences, train_tokenizer
from understudy.data.tokenize import completion_tokens

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKS = (  # as Qwen3 does: an empty thought before the last turn alone
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}(thought){% endif %}{{ m.content }}~\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate.') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def said(*contents):
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def answer(content):
    return [{"role": "assistant", "content": content}]


@pytest.fixture
def tokenizer():
    made = train_tokenizer(["the user asked and the assistant said hello world"] * 4, 300)
    made.chat_template = PLAIN
    return made


FORMATS = {
    "text": {"prompt": "the user asked", "chosen": " hello world", "rejected": " and"},
    "text, implicit": {
        "chosen": "Human: the sky?\nAssistant: It is blue.",
        "rejected": "Human: the sky?\nAssistant: It is not.",
    },
    "messages": {"prompt": said("the sky?"), "chosen": answer("blue"), "rejected": answer("it is green")},
    "messages, implicit": {"chosen": said("the sky?", "blue"), "rejected": said("the sky?", "it is green")},
    "several turns": {
        "prompt": said("hello", "world", "the sky?"),
        "chosen": answer("blue"),
        "rejected": answer("green"),
    },
    "several turns, implicit": {"chosen": said("a", "b", "c", "blue"), "rejected": said("a", "b", "c", "it is green")},
    "prompt column beside whole conversations": {
        "prompt": "the sky?",
        "chosen": said("the sky?", "blue"),
        "rejected": said("the sky?", "it is green"),
    },
}


def loaded(tmp_path, record, number=12):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for _ in range(number)))
    return load_preferences({"name": str(tmp_path / "x.jsonl")})


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_and_masks_are_those_of_trl(name, tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from understudy.models import load_causal_lm

    record = FORMATS[name]
    theirs = {k: v for k, v in record.items() if k != "prompt"} if name.startswith("prompt column") else record
    model = load_causal_lm("llama:hidden=16,layers=1,heads=2", tokenizer=tokenizer)
    args = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False)
    given = Dataset.from_list([trl.extract_prompt(theirs) if "prompt" not in theirs else theirs])
    wanted = trl.DPOTrainer(
        model, copy.deepcopy(model), args, train_dataset=given, processing_class=tokenizer
    ).train_dataset[0]
    examples, counts = encode_lists([loaded(tmp_path, record).train[0]], tokenizer, max_length=200)
    assert counts.truncated == counts.dropped == 0
    for (ids, labels), side in zip(examples.records[0]["sequences"], ("chosen_ids", "rejected_ids"), strict=True):
        assert ids[labels == -100].tolist() == wanted["prompt_ids"]
        assert ids[labels != -100].tolist() == wanted[side]
    assert sum(int((x != -100).sum()) for _, x in examples.records[0]["sequences"]) == counts.trained


def trained_text(tokenizer, prompt, completion):
    ids, labels = completion_tokens(prompt, completion, tokenizer)
    return tokenizer.decode([i for i, t in zip(ids, labels, strict=True) if t != -100])


def test_a_template_that_writes_the_last_turn_otherwise(tokenizer):
    """A turn that is not the last has no thought in the text; what is trained on is the turn as it is there, no more."""
    tokenizer.chat_template = THINKS
    assert trained_text(tokenizer, said("a", "b", "c"), answer("yes")) == "(thought)yes~\n"
    whole = said("first", "one answer", "second", "another")
    assert trained_text(tokenizer, [], whole) == "one answer~\n(thought)another~\n"


def test_a_template_that_cannot_be_followed_or_refuses(tokenizer):
    tokenizer.chat_template = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last else '...' }}")
    with pytest.raises(InputError, match=r"changes message 1 .* when others follow"):
        completion_tokens([], said("a", "b", "c", "d"), tokenizer)
    tokenizer.chat_template = ALTERNATES
    assert trained_text(tokenizer, said("a"), answer("b")) == "b\n"
    with pytest.raises(InputError, match="refuses a conversation of user, user: Roles must alternate") as caught:
        completion_tokens(said("a"), said("b"), tokenizer)
    assert "\n" not in str(caught.value)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        completion_tokens(said("a"), answer("b"), tokenizer)


def test_what_is_too_long_loses_the_same_of_its_prompt_and_is_counted(tokenizer):
    word = len(tokenizer(" hello", add_special_tokens=False)["input_ids"])
    record = {"id": 0, "prompt": " hello" * 30, "completions": [" world", " and the user"], "scores": [1.0, 0.0]}
    whole, _ = encode_lists([record], tokenizer, max_length=10_000)
    lengths = [len(i) for i, _ in whole.records[0]["sequences"]]
    most = max(lengths) - 5 * word
    cut, counts = encode_lists([record], tokenizer, max_length=most)
    assert counts.truncated == 1 and counts.dropped == 0
    for (ids, labels), (full_ids, full_labels) in zip(
        cut.records[0]["sequences"], whole.records[0]["sequences"], strict=True
    ):
        assert ids.equal(full_ids[5 * word :]) and labels.equal(full_labels[5 * word :])
    long = {**record, "completions": [" world", " world" * 20]}
    _, counts = encode_lists([long, {**record, "prompt": "a", "completions": [" a", " b"]}], tokenizer, max_length=9)
    assert counts.dropped == 1 and counts.rows == 1


def test_equal_candidates_stay_and_are_counted(tmp_path):
    splits = loaded(tmp_path, {"prompt": "a", "chosen": " b", "rejected": " b"})
    assert len(splits.train) == 9 and "12 records have candidates that are all alike" in splits.notes[0]
    record = loaded(tmp_path, {"chosen": said("a", "b"), "rejected": said("a", "b")}).train[0]
    assert record["prompt"] == said("a") and record["completions"] == [answer("b")] * 2
    rows = [FORMATS["text, implicit"]] * 20 + [{"chosen": "same", "rejected": "same"}]
    (tmp_path / "y.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "1 records were left out: without a prompt column" in " ".join(
        load_preferences({"name": str(tmp_path / "y.jsonl")}).notes
    )


@pytest.mark.parametrize(
    "record,says",
    [
        ({"prompt": "a", "completion": " b", "label": 0.3}, "label is 0.3 and must be true or false"),
        ({"prompt": "a", "completion": " b", "label": "good"}, "label is 'good' and must be true or false"),
        ({"prompt": None, "chosen": " b", "rejected": " c"}, "the prompt is NoneType"),
        ({"prompt": ["hi"], "chosen": answer("b"), "rejected": answer("c")}, "the prompt holds 'hi', not a message"),
        ({"prompt": "a", "chosen": [{"content": "b"}], "rejected": answer("c")}, "not a message with role and content"),
        ({"chosen": "a b", "rejected": answer("c")}, "chosen is str and rejected list"),
        ({"chosen": "a b", "rejected": "a b c"}, "a completion is empty"),
    ],
)
def test_bad_records(record, says, tmp_path):
    with pytest.raises(InputError, match=says) as caught:
        loaded(tmp_path, record)
    assert "record 0" in str(caught.value) and "\n" not in str(caught.value)


def test_labels_may_be_booleans_or_numbers(tmp_path):
    for label in (True, 1, 1.0):
        assert loaded(tmp_path, {"prompt": "a", "completion": " b", "label": label}).train[0]["scores"] == [1.0]
    ids = torch.tensor([r["id"] for r in loaded(tmp_path, FORMATS["text"]).train])
    assert ids.unique().numel() == len(ids)


def test_numbered_labels_are_read_by_their_names(tmp_path):
    """`ClassLabel(names=["true", "false"])` stores true as 0."""
    said = {"prompt": ["a", "b"], "completion": ["c", "d"], "label": [0, 1]}
    for names, expected in ((["true", "false"], [1.0, 0.0]), (["False", "True"], [0.0, 1.0]), (["1", "0"], [1.0, 0.0])):
        kinds = Features({"prompt": Value("string"), "completion": Value("string"), "label": ClassLabel(names=names)})
        whole = Dataset.from_dict(said, features=kinds)
        DatasetDict(dict.fromkeys(("train", "validation", "test"), whole)).save_to_disk(str(tmp_path / names[0]))
        found = load_preferences({"name": str(tmp_path / names[0])}, {})
        assert [r["scores"] for r in found.train] == [[score] for score in expected]
    kinds["label"] = ClassLabel(names=["good", "bad"])
    Dataset.from_dict(said, features=kinds).save_to_disk(str(tmp_path / "good"))
    with pytest.raises(InputError, match=r"label is 'good' and must be true or false"):
        load_preferences({"name": str(tmp_path / "good")}, {})


def test_further_splits_are_named_and_not_read(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(30)]
    parts = {"train": Dataset.from_list(rows), "unlabelled": Dataset.from_list([{"text": "x"}])}
    DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    found = load_preferences({"name": str(tmp_path / "set")}, {})
    assert any("not used are its further splits, unlabelled" in note for note in found.notes)


def test_pairs_of_one_prompt_stay_in_one_split(tmp_path):
    file = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"question {i % 40}", "chosen": f" yes {i}", "rejected": " no"} for i in range(200)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    splits = load_preferences({"name": str(file)})
    asked = [{r["prompt"] for r in part} for part in (splits.train, splits.validation, splits.test)]
    assert sum(len(part) for part in asked) == 40 == len(set.union(*asked))
    assert len(splits.test) == len(splits.validation) == 20 and len(splits.train) == 160
    file.write_text("".join(json.dumps(line | {"prompt": "always the same"}) + "\n" for line in lines))
    splits = load_preferences({"name": str(file)})
    assert len(splits.test) == 20 and any("too few to be split by" in note for note in splits.notes)


def test_a_completion_is_encoded_after_its_prompt():
    """SentencePiece begins whatever it is given with a space; a completion is no beginning."""
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    model.train_from_iterator(["the capital of France is Paris", "a:b"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )
    for prompt, completion in [("the capital of France is", " Paris"), ("the capital of France is:", "Paris")]:
        ids, labels = completion_tokens(prompt, completion, tokenizer)
        assert ids[1:-1] == tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        kept = [t for t in labels if t != -100]
        assert tokenizer.decode(ids[: -len(kept)], skip_special_tokens=True) == prompt
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion
    # a token that reaches over the end of the prompt is not what a model that was given the prompt writes
    ids, labels = completion_tokens("the capital of France is Par", "is", tokenizer)
    asked = tokenizer("the capital of France is Par", add_special_tokens=False)["input_ids"]
    assert ids[1 : 1 + len(asked)] == asked and labels[: 1 + len(asked)] == [-100] * (1 + len(asked))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the capital of France is Paris"


def test_parts_of_answers_have_no_end_and_pairs_their_own_smoothing(tmp_path, tokenizer):
    record = {"prompt": "the user", "completions": [" asked", " said"], "scores": [1, 0]}
    step = {**record, "ended": [False, True], "label_smoothing": 0.25}
    (row,) = encode_lists(loaded(tmp_path, step).train[:1], tokenizer, max_length=40)[0].records
    last = [int(labels[-1]) for _, labels in row["sequences"]]
    assert row["label_smoothing"] == 0.25
    assert last[0] != tokenizer.eos_token_id and last[1] == tokenizer.eos_token_id
    whole = encode_lists(loaded(tmp_path, record).train[:1], tokenizer, max_length=40)[0].records[0]
    assert torch.equal(whole["sequences"][1][0], row["sequences"][1][0]) and "label_smoothing" not in whole
    assert torch.equal(whole["sequences"][0][0][:-1], row["sequences"][0][0])
    for keys, says in (
        ({"ended": [True]}, "ended must be a list of 2 booleans"),
        ({"ended": [1, 0]}, "ended must be a list of 2 booleans"),
        ({"label_smoothing": 0.6}, r"label_smoothing is 0\.6 and must lie in \[0, 0\.5\]"),
    ):
        with pytest.raises(InputError, match=says):
            loaded(tmp_path, {**record, **keys})
    with pytest.raises(InputError, match="ended is false for messages"):
        loaded(tmp_path, {**record, "prompt": said("the sky?"), "ended": [False, True]})


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("column", ["question", "query", "input"])
def test_a_prompt_under_another_name_is_asked_about_and_not_left_out(column, tmp_path):
    rows = [{"system": "brief", column: f"why {i}?", "chosen": f"so {i}", "rejected": "no"} for i in range(30)]
    name = _lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        InputError, match=rf"has '{column}' beside chosen and rejected, .*data\.columns=.prompt: {column}."
    ):
        load_preferences({"name": name})
    found = load_preferences({"name": name, "columns": {"prompt": column}}).train[0]
    assert found["prompt"] == "why 1?" and found["completions"] == ["so 1", "no"]
    held = [{column: f"why {i}?", "chosen": f"why {i}? so", "rejected": f"why {i}? no"} for i in range(30)]
    assert (
        load_preferences({"name": _lines(tmp_path / "b.jsonl", held)}).train[0]["prompt"] == "why 1?"
    )  # both sides hold it
