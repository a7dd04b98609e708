"""The page of every method: its equation, an example that runs as printed, a learning curve, and its paper."""

import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

import pytest

import understudy
from understudy import distill
from understudy.catalogue import catalogue, find, reference
from understudy.cli.options import load_recipe
from understudy.methods import built_in
from understudy.pages import command, example, page
from understudy.runs.recipe import make
from understudy.training import Pipeline

DOCS = Path(__file__).parent.parent / "docs"
METHODS = {method.name: method for method in built_in()}
WITHOUT_PAPER = {"sft"}
spec = importlib.util.spec_from_file_location("curves", DOCS / "curves.py")
curves = importlib.util.module_from_spec(spec)
spec.loader.exec_module(curves)


def run(code, monkeypatch):
    """The keys that an example gives to `distill`."""
    given = {}

    def distill(**keys):
        given.update(keys)
        return understudy.runs.run.Result(None, {}, Path())

    monkeypatch.setattr(understudy, "distill", distill)
    exec(code, {})
    return given


@pytest.mark.parametrize("name", METHODS)
def test_a_page_has_an_equation_an_example_and_a_reference(name):
    text = page(find(name))
    formulas = re.findall(r"^    (\S.*)$", text.split("## Example")[0], re.MULTILINE)
    before = text.split("**Use it.**")[0]
    assert not re.search(r"^(loss|L|∇L) = ", before, re.MULTILINE), "an equation is an indented paragraph"
    assert formulas, "its docstring, or that of its module, has an indented paragraph"
    if not issubclass(METHODS[name], Pipeline):
        assert any(re.search(r"[=:∇~]", line) for line in formulas)
    assert ("```bibtex" in text) == (name not in WITHOUT_PAPER)
    assert f"method={name}" in text and len(example(METHODS[name]).splitlines()) <= 22


@pytest.mark.parametrize("name", METHODS)
def test_the_example_and_the_command_are_one_recipe(name, monkeypatch):
    keys = run(example(METHODS[name]), monkeypatch)
    keys["trainer"] = {k: v for k, v in keys.get("trainer", {}).items() if not k.startswith("eval_")}
    said = load_recipe(None, [*shlex.split(command(METHODS[name]))[2:], f"output={keys['output']}"])
    assert make(keys) == said


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not issubclass(method, Pipeline)])
def test_an_example_runs_as_printed_but_shorter(name, tmp_path, monkeypatch):
    """Procedures are run in tests of their own; `docs/curves.py` runs all examples whole."""
    if name == "ddk" and "UNDERSTUDY_DATA" not in os.environ:
        pytest.skip("needs UNDERSTUDY_DATA")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rationales.jsonl").write_text(curves.rationales())
    keys = make(run(example(METHODS[name]), monkeypatch)).dump()
    keys["trainer"] |= {"max_steps": 4, "eval_steps": 2}
    for side in ("teacher", "student"):
        spec = keys[side] if isinstance(keys.get(side), dict) else {}  # "none" without a teacher
        for part in (spec, *(spec.get("members") or {}).values()):
            if part.get("train"):
                part["train"] |= {"max_steps": 4}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    result = distill(keys)
    assert result.metrics and (result.folder / "validation.jsonl").is_file()


def test_every_method_has_a_learning_curve():
    found = json.loads((DOCS / "curves.json").read_text())
    assert set(found) == set(METHODS)
    for name, curve in found.items():
        if not curve:
            assert "no learning curve" in page(find(name), curve)
            continue
        assert len(curve["steps"]) == len(curve["values"]) and sorted(curve["steps"]) == curve["steps"], name
        drawn = len(curve["steps"]) > 1
        assert (DOCS / "methods" / f"{name}.svg").is_file() == drawn == (f"({name}.svg)" in page(find(name), curve)), (
            name
        )


def test_references_are_those_of_the_papers():
    for entry in catalogue():
        paper = reference(entry)
        if entry.number is None and entry.name not in METHODS:
            continue  # a plug-in, or a class of another test's
        if entry.number is None and entry.name in WITHOUT_PAPER:
            assert paper is None
            continue
        assert paper is not None and re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv), entry.name
        # Numbers on arXiv begin with year and month; a paper may be published later.
        assert 0 <= paper.year - (2000 + int(paper.arxiv[:2])) <= 2, entry.name
        assert all(re.fullmatch(r"[^,]+, [^,]+", who) for who in paper.authors.split(" and ")), entry.name
    kd = reference(find("kd"))
    assert kd.told == (
        "Geoffrey Hinton, Oriol Vinyals and Jeff Dean (2015). *Distilling the Knowledge in a Neural Network*, "
        "[arXiv 1503.02531](https://arxiv.org/abs/1503.02531)."
    )
    assert kd.bibtex.splitlines() == [
        "@misc{kd,",
        "  title = {{Distilling the Knowledge in a Neural Network}},",
        "  author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},",
        "  year = {2015},",
        "  eprint = {1503.02531},",
        "  archivePrefix = {arXiv},",
        "}",
    ]
    assert (
        reference(find("tpo-trees")) == reference(find("tpo"))
        and r"Multi-branch \& Multi" in reference(find("tpo")).bibtex
    )
