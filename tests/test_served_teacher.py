"""Runs with a served teacher: they learn, resume, share scores with caches; and each mismatch is one clear line."""

import json
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from engine_cases import killed_run, weights
from scoring_server import Scorer
from served_cases import DATA, made, opened, recipe, sides
from understudy import InputError, distill
from understudy.cli.main import app
from understudy.data import train_tokenizer
from understudy.runs.capture import capture_recipe, describe, verify_recipe
from understudy.runs.check import check_recipe, evaluate_run
from understudy.runs.recipe import make


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return made(tmp_path_factory.mktemp("teacher"), steps=80)


@pytest.fixture(scope="module")
def world(home):
    return sides(home)


def test_a_run_pays_once_a_cache_repeats_it_to_the_bit_and_it_nears_the_live_run(home, world, tmp_path):
    steps = {"trainer": {**recipe(home, "http://x")["trainer"], "max_steps": 40, "learning_rate": 1e-2}}
    with Scorer(*world) as server:
        values = recipe(home, server.url, **steps)
        found = distill({**values, "output": str(tmp_path / "served")})
        probe, paid = server.bodies[0]["prompt"][0], Counter(server.paid)
        assert all(n == 1 + (list(ids) == probe) for ids, n in paid.items())
        captured = capture_recipe(make(values), tmp_path / "cache")
        assert captured.new == captured.examples > 0
        assert capture_recipe(make(values), tmp_path / "cache").new == 0
        check = verify_recipe(make(values), tmp_path / "cache", sample=8)
        assert check["rows"] > 100 and check["largest_difference"] < 1e-5
        evaluate_run(tmp_path / "served")
        assert "The served teacher is known at" in " ".join(check_recipe(make(values))[0].notes)
    notes = json.loads((tmp_path / "served" / "evaluation.json").read_text())["notes"]
    assert "a lower bound of the full ones" in " ".join(notes)
    facts = describe(tmp_path / "cache")
    assert facts["score"] == "top_k:20" and facts["teacher"] == "served toy" and facts["support"] == "scored:20"
    teacher = {**values["teacher"], "cache": str(tmp_path / "cache")}  # the server is gone
    cached = distill({**values, "teacher": teacher, "output": str(tmp_path / "cached")})
    a, b = weights(tmp_path / "served"), weights(tmp_path / "cached")
    assert all(torch.equal(a[k], b[k]) for k in a) and found.metrics == cached.metrics
    live = {"model": str(home)}
    other = distill({**values, "teacher": live, "output": str(tmp_path / "live")})
    none = {**values, "teacher": live, "trainer": {**steps["trainer"], "max_steps": 1}}
    before = distill({**none, "output": str(tmp_path / "none")}).metrics["nll"]
    gain = before - other.metrics["nll"]
    assert gain > 0.5 and before - found.metrics["nll"] > 0.8 * gain


@pytest.mark.slow
@pytest.mark.parametrize("score,way,divergence", [("ids:6", "ids", "reverse_kl"), ("sampled", "vllm", "jsd")])
def test_a_run_that_is_killed_ends_the_same_and_asks_nothing_again(score, way, divergence, home, world, tmp_path):
    with Scorer(*world, way=way) as server:
        values = recipe(home, server.url, score, options={"temperature": 1.0, "divergence": divergence})
        whole = distill({**values, "output": str(tmp_path / "whole")})
        paid = Counter(json.dumps(body, sort_keys=True) for body in server.bodies[1:])
        assert whole.metrics["nll"] > 0 and max(paid.values()) == 1
        server.bodies.clear()
        assert killed_run({**values, "output": str(tmp_path / "cut")}, 5, "before")
        first = len(server.bodies)
        distill({**values, "output": str(tmp_path / "cut")})
        again = [json.dumps(body, sort_keys=True) for body in server.bodies]
        assert 0 < first < len(again)
        twice = [n for n in Counter(again).values() if n > 1]
        assert len(twice) == 1 and sorted(Counter(again)) == sorted({*paid, again[0]})  # the probe alone
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_each_mismatch_is_refused_with_one_line(home, world, tmp_path):
    model, words = world
    other = train_tokenizer(["other words make another tokenizer " * 50], 300)
    cases = [
        ({}, Scorer(model, other), "different tokenizers: the tokens of a text"),
        ({"score": "top_k:30"}, Scorer(model, words), "greater than max allowed: 20.*--max-logprobs 30"),
        ({}, Scorer(model, words, way="plain"), "gives no scores of a text's tokens"),
        ({}, Scorer(model, words, way="echo ids", shift=7, sharp=5.0), "guessing evenly"),
        ({"options": {"temperature": 2.0}}, Scorer(model, words), "set options.temperature=1.0"),
        (
            {"method": "taid", "options": {}},
            Scorer(model, words),
            "cannot learn from .* toy, which keeps scored:20: interpolated_kl is not defined for TopK",
        ),
        (
            {"task": "image_classification", "data": "digits", "student": "mlp:8"},
            Scorer(model, words),
            "for tokens of text",
        ),
    ]
    for i, (changes, server, says) in enumerate(cases):
        with server, pytest.raises(InputError, match=says) as caught:
            distill(recipe(home, server.url, output=tmp_path / f"run{i}", **changes))
        assert "\n" not in str(caught.value) and server.requests <= 8


def test_a_tokenizer_that_is_not_the_students_is_refused(home, world, tmp_path):
    own, words = tmp_path / "own", train_tokenizer(["quite other words " * 50], 300)
    words.save_pretrained(own)
    with Scorer(*world) as server, pytest.raises(InputError, match="a server scores the student's tokens"):
        distill(recipe(home, server.url, output=tmp_path / "run", data={**DATA, "tokenizer": str(own)}))


def test_members_of_an_ensemble_may_be_served(home, world, tmp_path):
    """Two domains, each asked of the server under a member's name: the run is that of the one teacher."""
    rows = [
        {"text": t, "domain": d}
        for t, d in [("def f(x): return x\n" * 8, "code"), ("import os, sys\n" * 8, "talk")] * 8
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {k: v for k, v in DATA.items() if k not in ("name", "characters", "limit")} | {"name": str(file)}
    with Scorer(*world) as server:
        one = recipe(home, server.url, data={**data, "domain_column": "domain"}, output=tmp_path / "one")
        distill(one)
        members = {"members": {name: one["teacher"] for name in ("code", "talk")}, "route": "domain"}
        distill({**one, "teacher": members, "output": str(tmp_path / "two")})
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_ends_and_templates_are_compared_where_the_server_tells(home, world, tmp_path):
    model, _ = world
    theirs, ours = sides(home)[1], sides(home)[1]
    ours.eos_token = "<s>"  # an id of its own: the base model's end beside the instruct model's
    with Scorer(model, theirs) as server:
        teacher, _ = opened(recipe(home, server.url), tmp_path / "a")
        teacher.tokenizer = ours
        teacher._same_tokenizer(False)  # the same spelling has the same id
        theirs.chat_template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
        ours.chat_template = "{% for m in messages %}</s>{{ m.content }}{% endfor %}"
        with pytest.raises(InputError, match="a conversation"):
            teacher._same_tokenizer(True)


def test_another_model_under_the_same_name_and_another_store_are_refused(home, world, tmp_path):
    model, words = world
    stranger = type(model)(model.config)
    with Scorer(model, words) as server:
        opened(recipe(home, server.url), tmp_path / "store")
        with pytest.raises(InputError, match="made with score 'top_k:20' and 'top_k:5'"):
            opened(recipe(home, server.url, "top_k:5"), tmp_path / "store")
        named = recipe(home, server.url)
        with pytest.raises(InputError, match="made with teacher"):
            opened({**named, "teacher": {**named["teacher"], "model": "other"}}, tmp_path / "store")
    with Scorer(stranger, words) as server, pytest.raises(InputError, match="another model under this name"):
        opened(recipe(home, server.url), tmp_path / "store")


def test_recipes_say_what_fits_together(home, tmp_path):
    at = {"model": "toy", "endpoint": "http://127.0.0.1:9/v1"}
    base = {"task": "language_modeling", "data": DATA, "output": str(tmp_path)}
    for teacher, says in [
        ({"model": "toy", "score": "top_k:5"}, "name it with endpoint"),
        ({**at, "score": "topk:5"}, "top_k:N, ids:N, sampled"),
        ({**at, "score": "top_k:5", "train": {"max_steps": 1}}, "is not trained here"),
    ]:
        with pytest.raises(InputError, match=says):
            make({**base, "teacher": teacher})
    with pytest.raises(InputError, match=r"teacher\.score"):
        distill({**base, "method": "kd", "teacher": {**at, "tokenizer": str(home)}})
    with pytest.raises(InputError, match=r"set teacher\.tokenizer"):
        distill({**base, "method": "kd", "teacher": {**at, "score": "top_k:5"}, "output": str(tmp_path / "x")})
    with pytest.raises(InputError, match="leave support and temperature out"):
        capture_recipe(make(recipe(home, "http://127.0.0.1:9/v1")), tmp_path / "c", "top_k:20")


def test_the_command_captures_from_a_server(home, world, tmp_path):
    with Scorer(*world) as server:
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(home, server.url, "sampled")))
        found = CliRunner().invoke(
            app, ["cache", "capture", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "cache"), "--json"]
        )
        assert found.exit_code == 0 and json.loads(found.stdout)["rows"] > 100
        with pytest.raises(InputError, match="cannot be captured ahead"):
            values = recipe(home, server.url, "ids:5")
            server.way = "ids"
            capture_recipe(make(values), tmp_path / "ids")
