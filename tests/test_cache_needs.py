"""A capture keeps what the recipe's method can learn from, or refuses before anything is captured."""

import pytest

from engine_cases import DIGITS, TEXT
from understudy import distill
from understudy.data.memory import keep
from understudy.errors import InputError
from understudy.runs.capture import capture_recipe, describe
from understudy.runs.check import check_recipe
from understudy.runs.recipe import make

UNTRAINED = "llama:hidden=16,layers=1,heads=2"


def recipe(tmp_path, **changes):
    base = {**TEXT, "teacher": UNTRAINED, "output": str(tmp_path / "run"), "options": {}}
    base["trainer"] = {**TEXT["trainer"], "max_steps": 2, "save_steps": 50}
    return {**base, **changes}


def from_cache(values, cache):
    return {**values, "teacher": {"model": UNTRAINED, "cache": str(cache)}}


@pytest.mark.parametrize("method,support,temperature", [("kd", "sampled:38B", 2.0), ("taid", "dense", 1.0)])
def test_a_captured_recipe_trains_from_its_cache(method, support, temperature, tmp_path):
    values = recipe(tmp_path, method=method, data={**TEXT["data"], "characters": 20_000})
    capture_recipe(make(values), tmp_path / "cache")
    facts = describe(tmp_path / "cache")
    assert (facts["support"], facts["temperature"]) == (support, temperature)
    check_recipe(make(from_cache(values, tmp_path / "cache")))
    assert distill(from_cache(values, tmp_path / "cache")).metrics["accuracy"] >= 0


@pytest.mark.parametrize(
    "method,support,temperature,says",
    [
        ("taid", "top_k:8", None, "keeps top_k:8: interpolated_kl is not defined for TopK.*Nothing was captured"),
        ("kd", None, 1.0, "taken at temperature 1.0 and the loss requires 2.0.*Nothing was captured"),
    ],
)
def test_what_the_method_cannot_learn_from_is_not_captured(method, support, temperature, says, tmp_path):
    with pytest.raises(InputError, match=says):
        capture_recipe(make(recipe(tmp_path, method=method)), tmp_path / "cache", support, temperature=temperature)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "method,says", [("trg", "reads inside the teacher"), ("tgeo-kd", "reads the teacher's own model before training")]
)
def test_methods_that_want_the_model_itself_are_refused_before_the_capture(method, says, tmp_path):
    values = {
        **DIGITS,
        "method": method,
        "teacher": "convnet:2",
        "student": "convnet:2",
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(InputError, match=says):
        capture_recipe(make(values), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_check_compares_a_cache_with_the_method_and_the_data(tmp_path):
    values = recipe(tmp_path, method="kd", data={**TEXT["data"], "characters": 20_000})
    capture_recipe(make(values), tmp_path / "cache")
    cached = from_cache(values, tmp_path / "cache")
    with pytest.raises(InputError, match=r"taken at temperature 2\.0 and the loss requires 1\.0"):
        check_recipe(make({**cached, "options": {"temperature": 1.0}}))
    with pytest.raises(InputError, match="interpolated_kl is not defined for Sampled"):
        check_recipe(make({**cached, "method": "taid"}))
    with pytest.raises(InputError, match="are not in cache"):
        check_recipe(make({**cached, "data": {**values["data"], "max_length": 24}}))


@pytest.mark.parametrize("method", ["gkd", "distillm", "minillm", "seqkd"])
def test_a_method_that_asks_about_new_texts_is_refused_before_the_capture(method, tmp_path):
    with pytest.raises(InputError, match=r"texts that are written during training.*Nothing was captured"):
        capture_recipe(make(recipe(tmp_path, method=method)), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "method,options",
    [("first", {}), ("swing", {"score": "detector"}), ("ddk", {"interval": 1, "samples": 4})],
)
def test_a_capture_holds_what_setup_asks_about(method, options, tmp_path):
    """Validation examples too where the method reads them; columns of numbers by token belong to whole examples."""
    rows = [{"text": f"text number {i} of {'ab'[i % 2]} is here", "topic": "ab"[i % 2]} for i in range(60)]
    data = {"name": keep(rows), "max_length": 32, "vocab_size": 300, "pack": False, "domain_column": "topic"}
    values = recipe(tmp_path, method=method, data=data, options=options)
    capture_recipe(make(values), tmp_path / "cache")
    assert distill(from_cache(values, tmp_path / "cache")).metrics["accuracy"] >= 0
