"""Symbolic distillation from a teacher that is not the embedded world's own."""

from dataclasses import replace

import pytest

from test_symbolic_kd import tiny
from understudy import InputError, distill
from understudy.generation import OracleSource
from understudy.runs.recipe import make
from understudy.tasks.text_generation import TextGeneration
from understudy.training import pipeline

SERVED = {"model": "some-model", "endpoint": {"url": "http://localhost:1/v1"}}


@pytest.fixture
def server(monkeypatch):
    """The world's source behind an endpoint, and what is changed of its answers."""
    found = TextGeneration().material({"data": {"name": "events_world"}, "teacher": {"model": "oracle"}, "seed": 0})
    asked = []

    def serve(change):
        def write(request, generator):
            asked.append(request)
            return change(found.source.write(request, generator))

        monkeypatch.setattr(pipeline, "source_from", lambda spec: OracleSource("server", write))
        return asked

    return serve


def test_a_made_up_truth_judges_its_own_teacher_alone(tmp_path, server):
    asked = server(lambda answer: answer)
    recipe = {**tiny(tmp_path / "run", filter="none"), "teacher": SERVED}
    assert make(recipe).data["name"] == "events"
    assert make({**recipe, "teacher": "oracle"}).data["name"] == make(tiny(tmp_path)).data["name"] == "events_world"
    metrics = distill({**recipe, "data": "events_world"}).metrics
    assert not any(name.endswith(("_valid", "_precision")) for name in metrics) and metrics["student_unique"] > 0
    with pytest.raises(InputError, match="needs data whose truth is known"):
        distill({**tiny(tmp_path / "two", filter="oracle"), "teacher": SERVED, "data": "events_world"})
    assert asked


def test_a_teacher_without_log_probabilities_is_told_the_option_at_the_first_answer(tmp_path, server):
    asked = server(lambda answer: replace(answer, log_prob=None))
    recipe = {**tiny(tmp_path / "run", filter="none"), "teacher": SERVED}
    with pytest.raises(InputError, match=r"some-model' gives no log-probabilities: set options\.head_keep=1"):
        distill({**recipe, "data": "events_world"})
    assert len(asked) == 1


def test_a_server_that_refuses_log_probabilities_too(tmp_path, server):
    def refuse(answer):
        raise InputError("http://localhost:1/v1: 400 logprobs are not supported")

    server(refuse)
    recipe = {**tiny(tmp_path / "run", filter="none"), "teacher": SERVED}
    with pytest.raises(InputError, match=r"400 logprobs are not supported.*options\.head_keep=1"):
        distill({**recipe, "data": "events_world"})
