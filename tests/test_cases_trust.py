"""Files of a run and a command's own results: damaged on purpose, on a full disk, without a terminal."""

import os
import resource
import subprocess
import sys

import pytest
import yaml

from understudy import InputError
from understudy.cli import main, options
from understudy.files import append_line
from understudy.models import onnx
from understudy.runs.folder import held, written

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


@pytest.mark.parametrize("command", [["compare", "task=ranking"], ["reproduce", "kd"], ["study", "x.yaml"]])
@pytest.mark.parametrize(("name", "says"), [("none/out.json", "is no folder"), (".", "is a folder")])
def test_where_a_result_goes_is_checked_before_it_is_paid_for(command, name, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*command, "--json", name])
    assert stop.value.code == 2 and says in capsys.readouterr().err and not os.listdir(tmp_path)


def test_a_result_replaces_no_pipe_and_no_link(tmp_path):
    (tmp_path / "link.json").symlink_to("file.json")
    options.write_result(tmp_path / "link.json", {"api_key": "sk-123456"})
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "file.json").read_text() == '{\n "api_key": "***"\n}'
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    options.write_result(tmp_path / "pipe", {"a": 1})
    assert os.read(reader, 99) == b'{\n "a": 1\n}'


@pytest.mark.slow
def test_a_command_needs_no_output_to_write_to():
    """As under a service that closes both."""
    line = [sys.executable, "-c", "import sys; from understudy.cli import main; main(['keys', 'seed'])"]
    closed = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *line])
    assert closed.returncode == 0
