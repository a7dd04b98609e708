"""Text and preference data as people have them: other tools' columns, repeated prompts, templates, ends, and bad records."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from understudy import InputError
from understudy.data import chat as chat_module
from understudy.data import encode, encode_lists, load_preferences, load_text, train_tokenizer
from understudy.data.chat import conversation_tokens, render
from understudy.data.knowledge import load_events, load_labels
from understudy.data.tokenize import completion_tokens
from understudy.generation import RefusedRequest, Request
from understudy.generation.local import LocalSource
from understudy.runs.recipe import make
from understudy.synthetic.word_order import word_order
from understudy.tasks import get as get_task

TEMPLATE = (
    "{% if tools %}[{{ tools | length }} tools]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


@pytest.fixture
def tokenizer():
    made = train_tokenizer(["the user asked and the assistant said hello world"] * 4, 300)
    made.chat_template = TEMPLATE
    return made


def jsonl(folder, rows, name="x.jsonl"):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / name)


def text_of(folder, record, number=12, **more):
    return load_text({"name": jsonl(folder, [record] * number), **more})


def pairs_of(folder, record, number=12, **more):
    return load_preferences({"name": jsonl(folder, [record] * number), **more})


def trained(tokenizer, ids, labels):
    return tokenizer.decode([i for i, t in zip(ids, labels, strict=True) if t != -100])


# -- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_reach_the_chat_template(tmp_path, tokenizer, as_text):
    tools = json.dumps([TOOL]) if as_text else [TOOL]
    record = {"messages": [user("the user"), assistant("hello")], "tools": tools}
    splits = text_of(tmp_path, record)
    rows, _ = encode(splits.train, tokenizer, max_length=99, pack=False)
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("[1 tools]<user>")
    pairs = pairs_of(tmp_path, {"prompt": [user("a")], "chosen": "b", "rejected": "c", "tools": tools})
    rows, _ = encode_lists(pairs.train, tokenizer, max_length=99)
    assert all(tokenizer.decode(ids).startswith("[1 tools]") for ids, _ in rows[0]["sequences"])
    single = {"prompt": [user("a")], "completion": [assistant("b")], "label": True, "tools": tools}
    assert pairs_of(tmp_path, single).train[0]["tools"] == [TOOL]


def test_columns_that_are_not_used_are_named_once(tmp_path):
    notes = text_of(tmp_path, {"text": "a", "source": "web", "score": 3}).notes
    assert [n for n in notes if "not used" in n] == [f"{tmp_path / 'x.jsonl'}: not used: columns score, source."]
    notes = pairs_of(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1}).notes
    assert sum("not used: column margin." in n for n in notes) == 1
    assert not any("not used" in n for n in text_of(tmp_path, {"text": "a", "source": None}).notes)


SHAREGPT = [{"from": "human", "value": "the user"}, {"from": "gpt", "value": "hello"}]
KNOWN = {
    "ShareGPT": ({"conversations": SHAREGPT}, {"messages": [user("the user"), assistant("hello")]}),
    "ShareGPT as text": (
        {"conversations": json.dumps(SHAREGPT)},
        {"messages": [user("the user"), assistant("hello")]},
    ),
    "ShareGPT with system": (
        {"conversations": SHAREGPT, "system": "brief"},
        {"messages": [system("brief"), user("the user"), assistant("hello")]},
    ),
    "ShareGPT under the other name": ({"messages": SHAREGPT}, {"messages": [user("the user"), assistant("hello")]}),
    "Alpaca": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"prompt": "Add\n1 2\n", "completion": "3"},
    ),
    "Alpaca without input": (
        {"instruction": "Add", "input": "", "output": "3"},
        {"prompt": "Add\n", "completion": "3"},
    ),
    "prompt and response": ({"prompt": "Add", "response": "3"}, {"prompt": "Add", "completion": "3"}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_formats_of_other_tools(name, tmp_path):
    given, wanted = KNOWN[name]
    splits = text_of(tmp_path, given)
    assert {k: v for k, v in splits.train[0].items() if k != "id"} == wanted
    assert not any("not used" in note for note in splits.notes)


KNOWN_PREFERENCES = {
    "ShareGPT pairs": (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "no"}},
        ([user("the user")], [[assistant("hello")], [assistant("no")]], [1.0, 0.0]),
    ),
    "Alpaca pairs": (
        {"instruction": "Add", "input": "1 2", "chosen": "3", "rejected": "4"},
        ("Add\n1 2\n", ["3", "4"], [1.0, 0.0]),
    ),
    "single answers in messages": (
        {"messages": [user("a"), assistant("b")], "label": False},
        ([user("a")], [[assistant("b")]], [0.0]),
    ),
    "prompt and response": ({"prompt": "a", "response": "b", "label": True}, ("a", ["b"], [1.0])),
}


@pytest.mark.parametrize("name", KNOWN_PREFERENCES)
def test_preferences_of_other_tools(name, tmp_path):
    given, wanted = KNOWN_PREFERENCES[name]
    record = pairs_of(tmp_path, given).train[0]
    assert (record["prompt"], record["completions"], record["scores"]) == wanted


def test_columns_are_mapped_by_the_recipe(tmp_path):
    columns = {"prompt": "question", "completion": "answer"}
    record = text_of(tmp_path, {"question": "a", "answer": "b", "prompt": "other"}, columns=columns).train[0]
    assert record == {"prompt": "a", "completion": "b", "id": 0}
    given = {"q": "a", "good": "b", "bad": "c"}
    pair = pairs_of(tmp_path, given, columns={"prompt": "q", "chosen": "good", "rejected": "bad"}).train[0]
    assert pair["prompt"] == "a" and pair["completions"] == ["b", "c"]
    given = {"q": "a", "answers": ["b", "c"], "marks": [1, 2]}
    listed = pairs_of(tmp_path, given, columns={"prompt": "q", "completions": "answers", "scores": "marks"}).train[0]
    assert listed["completions"] == ["b", "c"] and listed["scores"] == [1.0, 2.0]
    assert load_events(jsonl(tmp_path, [{"title": "it rains"}]), {"event": "title"}) == ["it rains"]
    recipe = make({"task": "language_modeling", "method": "sft", "data": {"name": "stdlib", "columns": columns}})
    assert recipe.dump()["data"]["columns"] == columns


@pytest.mark.parametrize(
    "columns,says",
    [
        ({"prompt": "qestion"}, "no column 'qestion', which data.columns.prompt names. Did you mean 'question'?"),
        ({"promt": "question"}, "Unknown key data.columns.promt. Did you mean 'prompt'?"),
        ({"prompt": 3}, "data.columns must map names of columns"),
        ("question", "data.columns must map names of columns"),
    ],
)
def test_a_mapping_that_fits_nothing(columns, says, tmp_path):
    for load in (text_of, pairs_of):
        with pytest.raises(InputError) as caught:
            load(tmp_path, {"question": "a", "completion": "b"}, columns=columns)
        assert says in str(caught.value)


# -- prompts that stand twice ----------------------------------------------------------------------------------------

TWICE = {
    "text": ("the user asked", "the user asked hello", "the user asked and", "the user asked", [" hello", " and"]),
    "text, trailing space": ("Human: hi ", "Human: hi yes", "Human: hi no", "Human: hi", [" yes", " no"]),
    "messages": (
        [user("a")],
        [user("a"), assistant("b")],
        [user("a "), assistant("c")],
        [user("a")],
        [[assistant("b")], [assistant("c")]],
    ),
    "system in front": (
        "a",
        [system("s"), user("a"), assistant("b")],
        [system("s"), user("a"), assistant("c")],
        [system("s"), user("a")],
        [[assistant("b")], [assistant("c")]],
    ),
    "system in the prompt alone": (
        [system("s"), user("a")],
        [user("a"), assistant("b")],
        [user("a"), assistant("c")],
        [system("s"), user("a")],
        [[assistant("b")], [assistant("c")]],
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_prompt_that_is_repeated_is_read_once(name, tmp_path):
    prompt, chosen, rejected, wanted, rests = TWICE[name]
    splits = pairs_of(tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert splits.train[0]["prompt"] == wanted and splits.train[0]["completions"] == rests
    assert any("12 records repeat the prompt" in note for note in splits.notes)
    listed = {"prompt": prompt, "completions": [chosen, rejected], "scores": [1, 0]}
    assert pairs_of(tmp_path, listed).train[0]["completions"] == rests
    assert pairs_of(tmp_path, {"prompt": prompt, "completion": chosen, "label": True}).train[0]["prompt"] == wanted
    one = text_of(tmp_path, {"prompt": prompt, "completion": chosen})
    assert one.train[0]["prompt"] == wanted and one.train[0]["completion"] == rests[0]
    assert any("12 records repeat the prompt" in note for note in one.notes)


@pytest.mark.parametrize(
    "prompt,chosen,rejected",
    [
        ("Hi", "Hi there", "Hi!"),
        ("the cat", "the cats run", "the cat sat"),
        ("a b", "a b c", "no"),
        ("a b", " a b", "a b c"),
    ],
)
def test_an_answer_that_only_begins_alike_is_left_alone(prompt, chosen, rejected, tmp_path):
    splits = pairs_of(tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert splits.train[0]["completions"] == [chosen, rejected] and splits.train[0]["prompt"] == prompt
    assert not any("repeat the prompt" in note for note in splits.notes)


@pytest.mark.parametrize(
    "bad",
    [
        {"chosen": "Human: a", "rejected": "Human: a b"},
        {"prompt": "x", "chosen": "", "rejected": "b"},
        {"prompt": "x", "completions": ["a", []], "scores": [1, 0]},
        {"prompt": "x", "completion": "", "label": True},
        {"prompt": "the user", "chosen": "the user", "rejected": "the user said"},
    ],
)
def test_an_empty_completion_is_left_out_counted_and_named(bad, tmp_path):
    good = {k: v for k, v in bad.items() if k in ("prompt", "label")} | {
        k: v
        for k, v in {
            "chosen": "Human: a yes",
            "rejected": "Human: a no",
            "completion": "b",
            "completions": ["a", "b"],
            "scores": [1, 0],
        }.items()
        if k in bad
    }
    splits = load_preferences({"name": jsonl(tmp_path, [good] * 17 + [bad] + [good] * 5)})
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 22
    assert any("1 records were left out: a completion is empty (record 17)" in note for note in splits.notes)


# -- templates and ends ----------------------------------------------------------------------------------------------


def test_a_token_that_reaches_into_the_answer_counts(tokenizer):
    """The generation prompt ends in a space, which the tokenizer joins to the first word."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ '</s>' if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    ids, labels = conversation_tokens([user("the user"), assistant("hello world")], tokenizer)
    assert trained(tokenizer, ids, labels) == " hello world</s>"


def test_a_template_without_ends(tokenizer):
    """What follows an answer is its end: the next message's first token, or EOS."""
    tokenizer.chat_template = "{% for m in messages %}{{ '|' + m.role + '|' + m.content }}{% endfor %}{{ '|assistant|' if add_generation_prompt }}"
    messages = [user("the user"), assistant("hello"), user("and"), assistant("world")]
    ids, labels = conversation_tokens(messages, tokenizer)
    assert trained(tokenizer, ids, labels) == "hello|world</s>"
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    ids, labels = completion_tokens([user("a")], [assistant("world")], tokenizer)
    assert trained(tokenizer, ids, labels) == "world</s>"


def test_a_conversation_that_never_trains_a_special_token_is_warned_of(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    record = {"id": 0, "messages": [user("a"), assistant("b")]}
    _, counts = encode([record], tokenizer, max_length=99, pack=False)
    assert counts.endless == 1 and "may not learn to stop" in counts.warnings("train", 99)[0]
    pair = {"id": 0, "prompt": [user("a")], "completions": [[assistant("b")], [assistant("c")]], "scores": [1.0, 0.0]}
    assert encode_lists([pair], tokenizer, max_length=99)[1].endless == 1
    tokenizer.chat_template = TEMPLATE
    assert encode([record], tokenizer, max_length=99, pack=False)[1].endless == 0
    assert encode_lists([pair], tokenizer, max_length=99)[1].warnings("train", 99) == []


@pytest.mark.parametrize("first", ["hello", "a"])
def test_a_conversation_that_the_assistant_begins(first, tokenizer):
    messages = [assistant(first), user("the user"), assistant("world")]
    ids, labels = conversation_tokens(messages, tokenizer)
    assert trained(tokenizer, ids, labels) == f"{first}</s>world</s>"
    tokenizer.chat_template = "{{ raise_exception('') if messages[0].role == 'assistant' }}" + TEMPLATE
    with pytest.raises(InputError, match="refuses a conversation of assistant, user, assistant: TemplateError"):
        conversation_tokens(messages, tokenizer)


@pytest.mark.parametrize(
    "template,says",
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 0.2 seconds",
        ),
        ("{% for i in range(999999) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages[9].content }}", "refuses a conversation of user"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if %}", "refuses a conversation of user"),
    ],
)
def test_a_template_that_fails_or_never_ends(template, says, tokenizer, monkeypatch):
    monkeypatch.setattr(chat_module, "SECONDS", 0.2)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=says) as caught:
        render([user("a")], tokenizer)
    assert "\n" not in str(caught.value)
    record = {"id": 4, "messages": [user("a"), assistant("b")]}
    with pytest.raises(InputError, match="Record 4: "):
        encode([record], tokenizer, max_length=99, pack=False)


@pytest.mark.parametrize("begins", [True, False])
def test_text_begins_and_ends_by_the_tokenizers_own_rule(begins, tokenizer):
    tokenizer.add_bos_token = begins
    tokenizer.update_post_processor()
    own = tokenizer("the user")["input_ids"]
    assert (own[0] == tokenizer.bos_token_id) == begins
    end = [tokenizer.eos_token_id]
    for pack in (True, False):
        rows, _ = encode([{"id": 0, "text": "the user"}], tokenizer, max_length=99, pack=pack)
        assert rows[0]["input_ids"].tolist() == own + end
        rows, _ = encode([{"id": 0, "text": "<s>the user</s>"}], tokenizer, max_length=99, pack=pack)
        assert rows[0]["input_ids"].tolist() == [tokenizer.bos_token_id, *own[begins:], *end]
    ids, _ = completion_tokens("the user", " hello</s>", tokenizer)
    assert ids[: len(own)] == own and ids.count(end[0]) == 1
    pair = {"id": 0, "prompt": "the user", "completions": [" hello", " world"], "scores": [1.0, 0.0]}
    rows, _ = encode_lists([pair], tokenizer, max_length=99)
    assert all(ids[: len(own)].tolist() == own for ids, _ in rows[0]["sequences"])
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=32))
    source = LocalSource(model, tokenizer, "m")
    assert source._encode(Request(id="0", prompt="the user", max_tokens=4)) == own
    tokenizer.chat_template = "{{ messages[7].role }}"
    with pytest.raises(RefusedRequest, match="refuses a conversation of user"):
        source._encode(Request(id="0", prompt=[user("a")], max_tokens=4))


def test_a_tokenizer_that_ends_texts_itself_ends_them_once(tokenizer):
    tokenizer.add_eos_token = True
    tokenizer.update_post_processor()
    own = tokenizer("the user")["input_ids"]
    rows, _ = encode([{"id": 0, "text": "the user"}], tokenizer, max_length=99, pack=False)
    assert rows[0]["input_ids"].tolist() == own and own.count(tokenizer.eos_token_id) == 1
    ids, _ = completion_tokens("the user", " hello", tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


# -- lengths ---------------------------------------------------------------------------------------------------------


def test_truncation_above_five_percent_warns_with_its_share(tokenizer):
    short = [{"prompt": "a", "completion": " b"}] * 18
    long = [{"prompt": "a", "completion": " hello" * 50}] * 2
    records = [{**r, "id": i} for i, r in enumerate(short + long)]
    _, counts = encode(records, tokenizer, max_length=20, pack=False)
    assert "train: 2 of 20 records (10%) are longer than data.max_length (20 tokens)" in counts.warnings("train", 20)[0]
    lists = [
        {"id": r["id"], "prompt": "a" * 40 if i > 17 else "a", "completions": [" b"], "scores": [1.0]}
        for i, r in enumerate(records)
    ]
    _, counts = encode_lists(lists, tokenizer, max_length=20)
    assert "2 of 20 records (10%)" in counts.warnings("train", 20)[0]
    _, counts = encode(records[:19], tokenizer, max_length=20, pack=False)
    assert counts.truncated == 1 and "(5%)" in counts.warnings("train", 20)[0]
    _, counts = encode(records[:18] * 2 + records[18:19], tokenizer, max_length=20, pack=False)
    assert counts.truncated == 1 and counts.warnings("train", 20) == []


LENGTHS = {
    "language_modeling": (
        {"prompt": "the user", "completion": " hello world" * 9},
        {"pack": False, "truncation": "end"},
    ),
    "preferences": ({"prompt": "the user" * 30, "chosen": " hello", "rejected": " world"}, {}),
}


@pytest.mark.parametrize("task", LENGTHS)
def test_defaults_warnings_and_positions_of_a_run(task, tmp_path):
    record, defaults = LENGTHS[task]
    name = jsonl(tmp_path, [record] * 30)
    method = {"language_modeling": "sft", "preferences": "dpo"}[task]
    values = {
        "task": task,
        "method": method,
        "data": {"name": name, **{k: v for k, v in defaults.items() if k == "pack"}},
    }
    recipe = make({**values, "student": "llama:hidden=8,layers=1,heads=1,context=16"})
    assert recipe.data["max_length"] in (128, 512) and defaults.items() <= recipe.dump()["data"].items()
    job = get_task(task)
    with pytest.raises(InputError, match=r"has 16 positions and the longest row has \d\d tokens .* data.max_length=16"):
        job.model(recipe.student, job.prepare(recipe))
    recipe = make(
        {
            **values,
            "data": {**values["data"], "max_length": 16},
            "student": "llama:hidden=8,layers=1,heads=1,context=16",
        }
    )
    prepared = job.prepare(recipe)
    assert sum("longer than data.max_length (16 tokens)" in w for w in prepared.warnings) == 3
    job.model(recipe.student, prepared)


def test_a_model_of_learned_positions_is_refused_before_training(tmp_path, tokenizer):
    name = jsonl(tmp_path, [{"text": "the user asked " * 40}] * 30)
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=32)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = make(
        {"task": "language_modeling", "method": "sft", "student": str(folder), "data": {"name": name, "max_length": 64}}
    )
    job = get_task("language_modeling")
    with pytest.raises(InputError, match="32 positions and the longest row has 64 tokens"):
        job.model(recipe.student, job.prepare(recipe))


# -- records ---------------------------------------------------------------------------------------------------------

DEEP = "[" * 5000 + "]" * 5000
BAD_MESSAGES = {
    "an empty conversation": ([], "messages is empty"),
    "a number": ([user(3)], "content is int, not text"),
    "nothing": ([assistant(None)], "content is NoneType, not text"),
    "an image": ([user([{"type": "image", "url": "x"}])], "a part of a message that is no text ('image')"),
    "half of a character": ([user("a\ud800b")], "'\\ud800', half of a character"),
    "a role that is none": ([{"role": 3, "content": "a"}], "whose role is int"),
    "no role": ([{"content": "a"}], "not a message with role and content"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_conversations_are_named_by_record_and_line(name, tmp_path):
    messages, says = BAD_MESSAGES[name]
    good = {"messages": [user("a"), assistant("b")]}
    with pytest.raises(InputError) as caught:
        load_text({"name": jsonl(tmp_path, [good, {"messages": messages}, good])})
    assert says in str(caught.value) and "record 1 (x.jsonl line 2)" in str(caught.value)
    if messages:
        pair = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": messages}
        for record in (pair, {"prompt": messages, "completion": "b", "label": 1}):
            with pytest.raises(InputError) as caught:
                load_preferences({"name": jsonl(tmp_path, [record] * 3)})
            assert says in str(caught.value) and "record 0 (x.jsonl line 1)" in str(caught.value)


def test_contents_of_parts_and_calls_of_tools_are_read(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "user"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}
    record = text_of(tmp_path, {"messages": [user(parts), call, assistant("hello")]}).train[0]
    assert record["messages"][0]["content"] == "the user" and record["messages"][1]["content"] == ""
    assert record["messages"][1]["tool_calls"] == [{"function": {"name": "f", "arguments": {}}}]
    rows, _ = encode([record], tokenizer, max_length=99, pack=False)
    kept = rows[0]["labels"][rows[0]["labels"] != -100]
    assert tokenizer.decode(kept) == "</s>hello</s>"


LINES = {
    "broken JSON": ('{"text": "a"}\n\n{"text": ', "line 3 cannot be read as JSON"),
    "a list": ('{"text": "a"}\n[1]', "line 2: a record is list"),
    "nested": ('{"text": "a"}\n{"text": ' + DEEP + "}", "line 2 cannot be read: its values are nested too deeply"),
    "a long number": ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 1 cannot be read"),
    "half of a character": ('{"text": "a"}\n{"text": "\\ud83d"}', "(x.jsonl line 2): text holds '\\ud83d', half of"),
    "a number for text": ('{"text": "a"}\n\n{"text": 3}', "record 1 (x.jsonl line 3): text is int, not text"),
    "a list for text": ('{"text": ["a"]}', "record 0 (x.jsonl line 1): text is list, not text"),
}


@pytest.mark.parametrize("name", LINES)
def test_json_errors_name_the_line_of_the_file(name, tmp_path):
    text, says = LINES[name]
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(InputError) as caught:
        load_text({"name": str(tmp_path / "x.jsonl")})
    assert says in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "y.json").write_text("[\n" + DEEP + "]")
    for load in (load_text, load_preferences):
        with pytest.raises(InputError, match="nested too deeply"):
            load({"name": str(tmp_path / "y.json")})
    (tmp_path / "z.json").write_text('[{"text": "a"},\n{"text": }]')
    with pytest.raises(InputError, match="line 2 column"):
        load_text({"name": str(tmp_path / "z.json")})


def test_json_lines_hold_other_line_separators_and_may_be_named_json(tmp_path):
    rows = [{"text": f"a\u2028b\x85c {i}"} for i in range(20)]
    for name in ("x.jsonl", "x.json"):
        (tmp_path / name).write_text("\ufeff" + "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        splits = load_text({"name": str(tmp_path / name)})
        found = [r["text"] for r in splits.train + splits.validation + splits.test]
        assert sorted(found) == sorted(r["text"] for r in rows)


def test_csv_cells_hold_line_breaks_and_stay_text(tmp_path):
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "label"])
        writer.writerows([[f'line {i}\nand "more"', "007", i % 2 == 0] for i in range(20)])
    record = load_text({"name": str(tmp_path / "x.csv")}).train[0]
    assert record["prompt"] == 'line 1\nand "more"' and record["completion"] == "007"
    assert load_preferences({"name": str(tmp_path / "x.csv")}).train[0]["scores"] == [0.0]
    (tmp_path / "y.csv").write_text('prompt,completion\n"a\nb",c\nd,e,f\n')
    with pytest.raises(InputError, match="line 4: 3 cells and 2 columns"):
        load_text({"name": str(tmp_path / "y.csv")})
    (tmp_path / "z.csv").write_text("text,text\na,b\n")
    with pytest.raises(InputError, match="2 columns named 'text'"):
        load_text({"name": str(tmp_path / "z.csv")})


def test_parquet_with_lists_where_text_belongs(tmp_path):
    table = pa.table(
        {"text": [["a", "b"]] * 20, "prompt": [["a"]] * 20, "completion": ["b"] * 20, "event": [["a"]] * 20}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"record 0 \(x.parquet row 0\): text is list, not text"):
        load_text({"name": str(tmp_path / "x.parquet")})
    with pytest.raises(InputError, match=r"record 0 \(y.parquet row 0\): prompt holds 'a', not a message"):
        pq.write_table(table.select(["prompt", "completion"]), tmp_path / "y.parquet")
        load_text({"name": str(tmp_path / "y.parquet")})
    with pytest.raises(InputError, match=r"record 0 \(x.parquet row 0\): the event is list, not text"):
        load_events(str(tmp_path / "x.parquet"))


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"text": f"a {i}"} for i in range(30)])
    rows.save_to_disk(tmp_path / "one")
    assert len(load_text({"name": str(tmp_path / "one")}).train) == 24
    pairs = Dataset.from_list([{"prompt": f"p {i}", "chosen": "a", "rejected": "b"} for i in range(30)])
    DatasetDict({"train": pairs, "test": pairs.select(range(5))}).save_to_disk(tmp_path / "two")
    splits = load_preferences({"name": str(tmp_path / "two")})
    assert len(splits.test) == 5 and len(splits.train) == 27
    (tmp_path / "one" / "state.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_text({"name": str(tmp_path / "one")})
    assert "\n" not in str(caught.value)


PARTS = {
    "completions as text": ({"completions": "ab", "scores": [1, 0]}, "completions is str, not a list"),
    "scores as text": ({"completions": ["a", "b"], "scores": "10"}, "scores is str, not a list of numbers"),
    "scores that are too few": ({"completions": ["a", "b"], "scores": [1]}, "2 completions and 1 scores"),
    "log_probs that are too few": (
        {"completions": ["a", "b"], "scores": [1, 0], "log_probs": [-1.0]},
        "2 completions and 1 log_probs",
    ),
    "log_probs as a number": ({"completions": ["a"], "scores": [1], "log_probs": 3}, "log_probs is int, not a list"),
    "a completion that is a number": ({"completions": ["a", 3], "scores": [1, 0]}, "a completion is int"),
    "a score of 400 digits": ({"completions": ["a", "b"], "scores": [10**400, 0]}, "is not a finite number"),
    "a score that is none": ({"completions": ["a", "b"], "scores": [None, 0]}, "which is not a number"),
    "a label of 400 digits": ({"completion": "a", "label": 10**400}, "is not a finite number"),
    "tools that are text": ({"completion": [assistant("a")], "label": 1, "tools": "many"}, "tools must be a list"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_preferences_that_do_not_fit(name, tmp_path):
    record, says = PARTS[name]
    with pytest.raises(InputError) as caught:
        pairs_of(tmp_path, {"prompt": "a", **record})
    assert says in str(caught.value) and "record 0 (x.jsonl line 1)" in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("label,says", [("1.5", "not a whole number"), ("x", "not a whole number"), (10**400, "whole")])
def test_labels_of_triples(label, says, tmp_path):
    row = {"head": "a", "relation": "xNeed", "tail": "b", "label": label}
    with pytest.raises(InputError, match=says):
        load_labels(jsonl(tmp_path, [row]), {"xNeed": None})
    assert load_labels(jsonl(tmp_path, [{**row, "label": "2"}]), {"xNeed": None})[0]["label"] == 2


def load_word_order(spec):
    return load_preferences(spec, {"word_order": word_order})


@pytest.mark.parametrize("key", ["limit", "characters"])
@pytest.mark.parametrize("value", ["many", 0, 1.5, True])
def test_numbers_of_the_recipe(key, value, tmp_path):
    for load, name in ((load_text, "stdlib"), (load_word_order, "word_order")):
        with pytest.raises(InputError, match=f"data.{key} is .* whole number of at least 1"):
            load({"name": name, "characters": 50_000, key: value})


def test_real_sets_of_other_tools(data_folder, tokenizer):
    tools = load_text({"name": "instructions/toolcall_dialogues.parquet", "limit": 3})
    rows, _ = encode(tools.train, tokenizer, max_length=5000, pack=False)
    assert len(rows) == 3 and any(record.get("tools") for record in tools.train)
    for record, row in zip(tools.train, rows.records, strict=True):
        said = len(record.get("tools", []))
        assert tokenizer.decode(row["input_ids"]).startswith(f"[{said} tools]<user>" if said else "<user>")
    assert load_text({"name": "instructions/alpaca_gpt4_demo.parquet"}).train[0].keys() == {
        "prompt",
        "completion",
        "id",
    }
    kto = load_preferences({"name": "preferences/kto_en_demo.parquet"}).train[0]
    assert kto["prompt"][-1]["role"] == "user" and kto["completions"][0][0]["role"] == "assistant"
    assert torch.tensor(kto["scores"]).shape == (1,)


# -- weights of messages ---------------------------------------------------------------------------------------------


def test_messages_of_weight_zero_are_read_and_not_learned(tmp_path, tokenizer):
    bad, good = {**assistant("hello"), "weight": 0}, {**assistant("world"), "weight": 1}
    found = text_of(tmp_path, {"messages": [user("a"), bad, user("b"), good]})
    record = found.train[0]
    (row,) = encode([record], tokenizer, max_length=99, pack=False)[0]
    assert trained(tokenizer, row["input_ids"].tolist(), row["labels"].tolist()) == "world</s>"
    assert "hello" in tokenizer.decode(row["input_ids"])
    shared = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "hello", "weight": 0},
        {"from": "gpt", "value": "b"},
    ]
    assert [m.get("weight") for m in text_of(tmp_path, {"conversations": shared}).train[0]["messages"]] == [
        None,
        0,
        None,
    ]
    for weight in (0.5, "0", [0]):
        with pytest.raises(InputError, match="holds a message of weight"):
            text_of(tmp_path, {"messages": [user("a"), {**assistant("b"), "weight": weight}]})
