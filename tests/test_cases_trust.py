"""Files of a run and a command's own results: damaged on purpose, on a full disk, without a terminal."""

import json
import os
import resource
import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError
from torch import nn

from understudy import InputError, compare, distill
from understudy.cli import main, options
from understudy.data.knowledge import load_relations
from understudy.files import append_line
from understudy.generation import Endpoint
from understudy.generation.tree_search import TreeJournal
from understudy.models import onnx
from understudy.planning import plan
from understudy.reporting import render_run
from understudy.runs.folder import hashes_of, held, written
from understudy.teachers.server.teacher import _read_probe

RUN = {"task": "image_classification", "method": "kd", "data": {"name": "digits", "limit": 32}, "student": "mlp:4"}

UNFOLDED = "a: &a {k: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{x: *{chr(97 + i)}, y: *{chr(97 + i)}, z: *{chr(97 + i)}}}\n" for i in range(22)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [(UNFOLDED, "once its aliases are unfolded"), ("&a\nx: *a\n", "an alias holds itself"), ("a: !!python/name:os.system\n", "tag")],
)  # fmt: skip
def test_a_runs_own_recipe_is_read_as_any_other(text, says, tmp_path):
    """22 lines of aliases made `train` compare 3^22 keys."""
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"recipe.yaml is damaged: the recipe, line .*{says}"):
        written(tmp_path)


def test_a_runs_own_recipe_keeps_text_that_looks_like_a_number(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": {"name": "1e5"}}))
    assert written(tmp_path) == {"data": {"name": "1e5"}}


@pytest.mark.parametrize("held", ["[]", "", '{"support": 5, "sha256": "0"}', "{}"])
def test_a_plan_reads_a_damaged_cache_as_training_does(held, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "identity.json").write_text(held)
    with pytest.raises(InputError, match=r"identity.json is damaged|Support 'None'"):
        plan({**RUN, "teacher": {"model": "mlp:4", "cache": str(tmp_path / "cache")}})


def test_a_plan_says_the_whole_reason_why_a_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": "x"}')
    with pytest.raises(InputError, match=r"'n_layer': \S+"):
        plan({"task": "language_modeling", "method": "kd", "student": str(tmp_path), "teacher": str(tmp_path)})


@pytest.mark.parametrize(
    "text", ["[]", '{"ids": [1, 2]}', '{"ids": [1, 2], "log_probs": ["x"]}', '{"ids": 3, "log_probs": []}']
)
def test_a_damaged_probe_of_a_served_teacher_is_refused(text, tmp_path):
    (tmp_path / "probe.json").write_text(text)
    with pytest.raises(InputError, match=r"probe.json is damaged"):
        _read_probe(tmp_path / "probe.json")


def test_a_search_journal_nested_without_end_is_damaged(tmp_path):
    (tmp_path / "nodes.jsonl").write_text('{"format": 1, "settings": {}}\n' + "[" * 100_000 + "\n")
    with pytest.raises(InputError, match=r"nodes.jsonl is damaged in line 2"):
        TreeJournal(tmp_path / "nodes.jsonl", {})


def test_relations_that_unfold_without_end_are_refused(tmp_path):
    (tmp_path / "relations.yaml").write_text(UNFOLDED)
    with pytest.raises(InputError, match=r"relations.yaml, line .*once its aliases are unfolded"):
        load_relations(str(tmp_path / "relations.yaml"))


@pytest.mark.parametrize(
    "extra",
    [
        {"headers": {"Authorization": "Bearer sk-1234567"}},
        {"providers": [{"x-api-key": "sk-1234567"}]},
        {"openai_api_key": "sk-1234567"},
    ],
)
def test_no_key_is_in_any_field_of_a_body(extra):
    """What is in the body names the log of answers, which would hold the key."""
    with pytest.raises(ValidationError, match="a key is no field of the body"):
        Endpoint(url="http://h/v1", extra=extra)
    assert Endpoint(url="http://h/v1", extra={"prompt_cache_key": "a", "stop_token_ids": [1]})


@pytest.fixture
def full():
    """No file may grow, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_names_the_log_and_the_lock(tmp_path, full):
    with pytest.raises(InputError, match=r"metrics.jsonl cannot be written: File too large"):
        append_line(tmp_path / "metrics.jsonl", {"step": 1})
    with pytest.raises(InputError, match=r"\.understudy cannot be written: File too large"), held(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_fault_on_a_full_disk_is_still_one_line(tmp_path, monkeypatch, capsys, request):
    """The traceback could not be kept, which was a traceback."""

    def fault(*_):
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr("understudy.keys.matching", fault)
    request.getfixturevalue("full")
    with pytest.raises(SystemExit) as stop:
        main(["keys"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "could not be written to a file" in error


def test_a_quantisation_that_fails_names_its_file(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime.quantization")

    def fault(*_, **__):
        raise RuntimeError("Wire format was corrupt")  # of a scratch file that a full disk has cut

    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", fault)
    with pytest.raises(InputError, match=r"model.int8.onnx: Wire format was corrupt. Free space"):
        onnx.write_int8(tmp_path / "model.onnx", tmp_path / "model.int8.onnx")


def test_a_result_replaces_no_pipe_and_no_link(tmp_path):
    (tmp_path / "link.json").symlink_to("file.json")
    options.write_result(tmp_path / "link.json", {"api_key": "sk-123456"})
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "file.json").read_text() == '{\n "api_key": "***"\n}'
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    options.write_result(tmp_path / "pipe", {"a": 1})
    assert os.read(reader, 99) == b'{\n "a": 1\n}'
    options.write_result(tmp_path / "new" / "out.json", {})  # its folder is made
    assert (tmp_path / "new" / "out.json").is_file()


@pytest.mark.slow
def test_a_command_needs_no_output_to_write_to():
    """As under a service that closes both."""
    line = [sys.executable, "-c", "import sys; from understudy.cli import main; main(['keys', 'seed'])"]
    closed = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *line])
    assert closed.returncode == 0


# -- calls from Python that cannot be meant


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": [0, 1, 0]}, "Seed 0 is given twice"),
        ({"seeds": "3"}, "seeds is '3'"),
        ({"seeds": 1.5}, "seeds is 1.5"),
        ({"workers": -1}, "-1 workers"),
        ({"arms": {"a": 5}}, "arms.a = 5"),
        ({"arms": ["a"]}, "arms = "),
        ({"recipe": 5}, "int is neither"),
    ],
)
def test_a_comparison_that_cannot_be_meant_is_one_line(changes, says, tmp_path):
    """Two runs of one seed are one run: their interval was that of two."""
    with pytest.raises(InputError, match=says):
        compare(**{"recipe": {**RUN, "output": str(tmp_path / "runs")}, "methods": ["sft"], **changes})
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student": nn.Identity()}, "given as student, Identity, has no weights"),
        ({"teacher": lambda: nn.Flatten()}, "given as teacher, Flatten, has no weights"),
        ({"trainer": {"torch_compile_backend": "nope"}}, "torch_compile_backend=nope is none of accelerate's: no, eager"),
        ({"trainer": {"per_device_train_batch_size": 64, "dataloader_drop_last": True}}, "32 training examples fill none of 64"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_meant_is_one_line(changes, says, tmp_path):
    """A run without a whole batch took no step, and said that it was stopped and would go on."""
    with pytest.raises(InputError, match=says):
        distill({**RUN, "teacher": "mlp:4", "output": str(tmp_path / "run"), **changes})


def test_a_recipe_is_a_mapping():
    with pytest.raises(InputError, match="int is neither"):
        distill(5)


# -- files of a run that were edited into another shape


@pytest.mark.parametrize(
    "changes",
    [
        {"tables": "x"},
        {"tables": [{"title": "t", "headings": ["a"], "rows": [5]}]},
        {"pictures": ["a.png"]},
        {"metrics": {"accuracy": "high"}},
        {"metrics": {"accuracy": [1]}},
        {"cost": "x"},
        {"notes": 5},
        {"gain": "x"},
    ],
)
def test_a_report_of_an_edited_evaluation_is_one_line(changes, tmp_path):
    whole = {"metrics": {"accuracy": 0.5, "nll": 1.0}, "notes": []}
    (tmp_path / "run.json").write_text('{"method": "kd", "task": "image_classification"}')
    (tmp_path / "evaluation.json").write_text(json.dumps(whole))
    assert render_run(tmp_path).is_file()
    (tmp_path / "evaluation.json").write_text(json.dumps({**whole, **changes}))
    with pytest.raises(InputError, match=r"run.json or .*evaluation.json is damaged: \w+Error"):
        render_run(tmp_path)


def test_hashes_of_another_shape_are_none(tmp_path):
    (tmp_path / "run.json").write_text('{"hashes": ["x"]}')
    assert hashes_of(tmp_path) == {}
