"""Names that are no path go to the Hub; where it has no address they fail at once, and its cache is still read."""

import logging
import time

import pytest
from huggingface_hub import constants

from understudy.data import folders
from understudy.data.text import load_text
from understudy.errors import InputError
from understudy.models import load_causal_lm
from understudy.models.tokenizers import load_tokenizer


@pytest.fixture
def unreachable(monkeypatch):
    """A Hub whose host has no address, and this process as it was afterwards."""
    import datasets

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")  # RFC 6761: never resolved
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    folders._look_up.cache_clear()
    yield
    folders._look_up.cache_clear()


def load_model(name):
    return load_causal_lm(name, tokenizer=None)


def load_data(name):
    return load_text({"name": name})


@pytest.mark.parametrize("load", [load_tokenizer, load_model, load_data])
def test_a_hub_without_address_is_not_asked_again_and_again(load, unreachable, caplog):
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match="nobody/nothing"):
        load("nobody/nothing")
    assert time.monotonic() - begun < 10
    assert [r.message for r in caplog.records if "only its cache is read" in r.message] == [
        "https://hub.invalid cannot be reached: until this process ends, only its cache is read."
    ]


def test_a_proxy_looks_names_up_itself(unreachable, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert folders.hub_id("nobody/nothing") == "nobody/nothing" and not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["lama:hidden=3", "/no/where", "a/b/c"])
def test_what_no_name_of_the_hub_looks_like_is_told_without_asking_it(name, monkeypatch):
    monkeypatch.setattr(folders, "_look_up", lambda endpoint: pytest.fail("asked"))
    with pytest.raises(
        InputError, match=r"is no path that exists, and no name on the Hub \(owner/name\) has this form"
    ):
        load_model(name)
