"""Local models as sources, prompts, recipes with endpoints, and the command."""

import json

import numpy as np
import pytest
import torch

from fault_server import KEY, KEY_ENV, Proxy, Upstream
from understudy.cli import main
from understudy.data import train_tokenizer
from understudy.errors import InputError
from understudy.generation import (
    FailedRequests,
    LocalSource,
    Prompt,
    Request,
    RequestLog,
    draw_names,
    few_shot,
    generate,
    name_people,
    restore_people,
    source_from,
)
from understudy.models import load_causal_lm
from understudy.runs.recipe import make
from understudy.runs.specs import ModelSpec

CHAT = ({"role": "user", "content": "the dog"},)


@pytest.fixture(scope="module")
def words():
    tokenizer = train_tokenizer(["the cat sat on the mat and the dog ran away. " * 40], 300)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}<s>assistant:"
    return tokenizer


@pytest.fixture(scope="module")
def model(words):
    torch.manual_seed(0)
    return load_causal_lm("llama:hidden=32,layers=2,heads=4,context=64", tokenizer=words).eval()


@torch.no_grad()
def log_probs(model, ids, start):
    """Log-probability of each token of `ids` from `start` on, by one plain forward pass."""
    values = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return values[torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])]


@torch.no_grad()
def greedy(model, ids, number):
    for _ in range(number):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_greedy_text_and_its_log_prob_are_the_models(model, words):
    source = LocalSource(model, words, "toy")
    for request, prompt in ((Request("the cat", "a", max_tokens=9, temperature=0.0), "<s>the cat"),
                            (Request(CHAT, "b", max_tokens=9, temperature=0.0), "<s>user: the dog<s>assistant:")):  # fmt: skip
        start = words(prompt, add_special_tokens=False)["input_ids"]
        ids = greedy(model, start, 9)
        answer = source.complete(request)
        assert (
            answer.text
            == words.decode(ids, skip_special_tokens=True)[len(words.decode(start, skip_special_tokens=True)) :]
        )
        assert (answer.finish, answer.prompt_tokens, answer.tokens) == ("length", len(start), 9)
        assert answer.log_prob == pytest.approx(float(log_probs(model, ids, len(start)).sum()), abs=1e-4)


def test_a_draw_is_the_requests_own_in_any_batch(model, words, tmp_path):
    model.train()
    model.generation_config.repetition_penalty = 3.0  # the request says how to write, not the model's settings
    requests = [
        Request("the cat " * (i % 4 + 1), str(i), draw=i % 5, max_tokens=3 + i % 6, top_p=0.5 + 0.1 * (i % 5),
                temperature=(0.0, 0.7, 1.3)[i % 3], stop=("e", "the")) for i in range(24)
    ]  # fmt: skip
    single = LocalSource(model, words, "toy", batch=1)
    alone = [single.complete(r) for r in requests]
    source = LocalSource(model, words, "toy", batch=8)
    sizes, write = [], source.write
    source.write = lambda some, ids: sizes.append(len(some)) or write(some, ids)
    with RequestLog(tmp_path / "log", source.name) as log:
        together = generate(source, requests, log, concurrency=8)
    assert [(a.text, a.finish, a.tokens) for a in together] == [(a.text, a.finish, a.tokens) for a in alone]
    assert max(sizes) > 1 and sum(sizes) == len({r.key(source.name) for r in requests})
    assert all("e" not in a.text and a.tokens <= r.max_tokens for a, r in zip(together, requests, strict=True))
    assert model.training and model.generation_config.repetition_penalty == 3.0
    model.eval()
    model.generation_config.repetition_penalty = None


def test_draws_follow_the_models_distribution_and_the_nucleus(model, words):
    source = LocalSource(model, words, "toy", batch=500)
    start = words("<s>the", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        p = (model(torch.tensor([start])).logits[0, -1].double() * 8).softmax(-1)  # temperature 1/8
    requests = [Request("the", str(i), draw=i, max_tokens=1, temperature=0.125) for i in range(2000)]
    counts = torch.zeros_like(p)
    for i in range(0, 2000, 500):
        for answer in source.write(requests[i : i + 500], [start] * 500):
            counts[(log_probs_of(model, start) - answer.log_prob).abs().argmin()] += 1
    likely = p > 0.01
    deviation = (2000 * p * (1 - p)).sqrt()
    assert ((counts - 2000 * p).abs() < 5 * deviation)[likely].all()
    narrow = [Request("the", str(i), draw=i, max_tokens=1, temperature=0.125, top_p=0.3) for i in range(300)]
    order = p.sort(descending=True)
    nucleus = set(order.indices[: int((order.values.cumsum(0) < 0.3).sum()) + 1].tolist())
    drawn = {int((log_probs_of(model, start) - a.log_prob).abs().argmin()) for a in source.write(narrow, [start] * 300)}
    assert drawn <= nucleus and len(drawn) > 1


@torch.no_grad()
def log_probs_of(model, ids):
    return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def test_penalties_and_stops(model, words):
    source = LocalSource(model, words, "toy")
    plain = source.complete(Request("the", "a", max_tokens=12, temperature=0.0))
    assert len(set(plain.text)) < 6  # an untrained model repeats itself
    varied = Request("the", "b", max_tokens=12, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert source.complete(varied).log_prob < plain.log_prob
    end = plain.text[3]
    cut = source.complete(Request("the", "c", max_tokens=12, temperature=0.0, stop=(end,)))
    assert cut.finish == "stop" and cut.text == plain.text[: plain.text.index(end)] and cut.tokens < 12


def test_requests_that_a_model_cannot_take_are_refused_alone(model, words, tmp_path):
    bare = train_tokenizer(["the cat sat. " * 20], 280)
    source = LocalSource(model, bare, "toy")
    requests = [
        Request("the cat", "good", max_tokens=4),
        Request("x" * 100, "long", max_tokens=4),
        Request(CHAT, "chat"),
    ]
    with RequestLog(tmp_path / "log", source.name) as log:
        with pytest.raises(FailedRequests) as caught:
            generate(source, requests, log)
        assert set(caught.value.failed) == {"long", "chat"} and len(log) == 1
    assert "64 positions" in caught.value.failed["long"] and "chat template" in caught.value.failed["chat"]
    assert LocalSource(model, words, "toy").name != source.name  # another template, another log


# --- prompts


def test_prompts_name_missing_and_unknown_slots(tmp_path):
    (tmp_path / "p.txt").write_text("Event: {{ head }}\n{% if tail %}{{ tail }}{% endif %}\n")
    prompt = Prompt.load(tmp_path / "p.txt")
    assert prompt.render(head="<b>{{ x }}</b>", tail="t") == "Event: <b>{{ x }}</b>\nt"
    assert prompt.hash == Prompt(prompt.text).hash != Prompt("other").hash
    for values, says in (
        ({"head": "a"}, "needs slot 'tail'"),
        ({"head": "a", "tail": "b", "tial": "c"}, "no slot 'tial'. Did you mean 'tail'"),
        ({"heda": "a", "tail": "b"}, "needs slot 'head'; given: heda, tail. Did you mean 'heda'"),
    ):
        with pytest.raises(InputError, match=says):
            prompt.render(values)
    for text, says in (("{{ a", "not a valid template"), ("{{ ''.__class__.__mro__ }}", "cannot be filled")):
        with pytest.raises(InputError, match=says):
            Prompt(text).render()
    with pytest.raises(InputError, match="neither a file"):
        Prompt.load(tmp_path / "none.txt")


def test_few_shot_lists_are_numbered_and_left_open():
    item = Prompt("{{ number }}. Event: {{ event }}")
    heads = few_shot(item, [{"event": "X eats"}, {"event": "X runs"}], {}, open_slot="event", instruction="Events.")
    assert heads == "Events.\n1. Event: X eats\n2. Event: X runs\n3. Event:"
    pair = Prompt("{{ head }}. So {{ tail }}.")
    assert (
        few_shot(pair, [{"head": "a", "tail": "b"}], {"head": "c"}, open_slot="tail", separator="\n\n")
        == "a. So b.\n\nc. So"
    )
    with pytest.raises(InputError, match=r"no slot 'tial' to leave open\. Did you mean 'tail'"):
        few_shot(pair, [], {"head": "c"}, open_slot="tial")


def test_names_go_in_and_out_by_whole_words():
    names = {"PersonX": "Alex", "PersonY": "Kim"}
    text = "PersonX gives PersonY's hat to PersonXavier"
    named = name_people(text, names)
    assert named == "Alex gives Kim's hat to PersonXavier" and restore_people(named, names) == text
    assert restore_people("Alexander met Alex. Alex-and-Kim", names) == "Alexander met PersonX. PersonX-and-PersonY"
    with pytest.raises(InputError, match="holds the name 'Kim' already"):
        name_people("PersonX meets Kim", names)
    with pytest.raises(InputError, match="share a name"):
        name_people("PersonX", {"PersonX": "Kim", "PersonY": "Kim"})
    drawn = draw_names(["PersonX", "PersonY"], ["Kim", "Al", "Bo", "Al"], np.random.default_rng(0), avoid="Kim's")
    assert set(drawn.values()) == {"Al", "Bo"}
    with pytest.raises(InputError, match="larger pool"):
        draw_names(["PersonX", "PersonY"], ["Kim", "Al"], np.random.default_rng(0), avoid="Kim")


# --- recipes and the command


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ({"url": f"http://me:{KEY}@host/v1"}, "user, password"),
        ({"url": f"http://host/v1?key={KEY}"}, "user, password or query"),
        ({"url": "localhost:8000"}, "begins with http"),
        ({"url": "http://host", "api_key_env": KEY}, "never the key itself"),
        ({"url": "http://host", "api_key": "X"}, "Did you mean 'api_key_env'"),
        ({"url": "http://host", "cost_budget": 1}, "needs price_in"),
    ],
)
def test_bad_endpoints_are_one_line_without_the_key(endpoint, says):
    with pytest.raises(InputError, match=says) as caught:
        make({"task": "language_modeling", "teacher": {"model": "m", "endpoint": endpoint}})
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_names_an_endpoint_and_methods_that_need_outputs_refuse_it(tmp_path, monkeypatch):
    from understudy import distill

    recipe = make(
        {
            "task": "language_modeling",
            "teacher": {"model": "m", "endpoint": "http://h:1"},
            "output": str(tmp_path / "r"),
        }
    )
    assert recipe.teacher.endpoint.url == "http://h:1/v1" and make(recipe.dump()) == recipe
    monkeypatch.delenv(KEY_ENV, raising=False)
    with pytest.raises(InputError, match=f"variable {KEY_ENV} is not set"):
        source_from(ModelSpec(model="m", endpoint={"url": "http://h", "api_key_env": KEY_ENV}))
    with pytest.raises(InputError, match=r"teacher\.endpoint only gives text"):
        distill(recipe, data={"name": "stdlib", "characters": 30_000, "max_length": 32, "vocab_size": 300})


def command(*arguments):
    with pytest.raises(SystemExit) as left:
        main(["generate", *map(str, arguments)])
    return left.value.code


def test_the_command_writes_resumes_and_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(KEY_ENV, KEY)
    (tmp_path / "t.txt").write_text("say {{ word }}\n")
    (tmp_path / "rows.csv").write_text("id,word,other\na,one,1\nb,two,2\n")
    with Upstream() as up, Proxy(up, share=0.3) as proxy:
        base = [
            tmp_path / "rows.csv",
            "--template",
            tmp_path / "t.txt",
            "--model",
            "toy",
            "--endpoint",
            proxy.url,
            "--json",
        ]
        base += [
            "--api-key-env",
            KEY_ENV,
            "--draws",
            3,
            "--chat",
            "--output",
            tmp_path / "out.jsonl",
            "--concurrency",
            1,
        ]
        assert command(*base, "--token-budget", 130) == 2
        assert "Raise the budget" in capsys.readouterr().err
        some = (tmp_path / "out.jsonl").read_text().splitlines()
        assert 0 < len(some) < 6
        assert command(*base, "--token-budget", 2000, "--price-in", 1, "--price-out", 2) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["answered"] == facts["requests"] == 6 and facts["from_log"] == len(some)
        assert facts["cost"] == pytest.approx((facts["prompt_tokens"] + 2 * facts["tokens"]) / 1e6)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"{i}/{d}" for i in "ab" for d in range(3)]
    assert lines[0]["prompt"] == [{"role": "user", "content": "say one"}]
    assert lines[0]["completion"] == [{"role": "assistant", "content": "answer to say one"}]
    assert all(KEY.encode() not in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2: not valid JSON"),
        ("p.jsonl", '{"promt": "a"}\n', "Did you mean 'promt'"),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n', "'1' stands there twice"),
        ("p.jsonl", "[1]\n", "a row is list"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("none.txt", None, "do not exist"),
    ],
)
def test_bad_prompts_are_one_line(name, text, says, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert command(tmp_path / name, "--model", "no-such-model", "--output", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
