"""The structure of the package: import order, sizes of files and functions, the catalogue and the generated pages."""

import ast
import json
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

from engine_cases import DIGITS
from understudy.catalogue import STUDIES, catalogue, find, papers
from understudy.errors import InputError
from understudy.methods import all_methods
from understudy.pages import drawing, findings, page, rooms, table

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "understudy"
ROOMS = (
    "masking errors stopping reading files targets losses streaming data models synthetic generation curation teachers training evaluation architectures tasks methods "
    "catalogue reporting workers runs planning claims keys pages scoreboard cli"
).split()

TAXONOMY = {
    "kind": "method survey study theory",
    "elicitation": "labeling expansion curation feature feedback self_knowledge all",
    "algorithm": "sft divergence_similarity rl rank_optimization none_prompting all",
    "access": "white gray black self any",
    "vertical": "medical misc none all",
    "skill": "context_following alignment agent nlp_task multimodality general_model_compression vision graph all",
}


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(a.name.split(".")[0] == "understudy" for a in node.names), f"{path}: write `from … import`"
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import hides its subpackage"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("understudy"):
            parts = node.module.split(".")
            yield from ([parts[1]] if len(parts) > 1 else [a.name for a in node.names if a.name in ROOMS])


def test_imports_go_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        here = room(path)
        if here.startswith("__"):
            continue
        assert here in ROOMS, f"{here} has no place in the order"
        wrong += [f"{here} imports {i}" for i in imports(path) if ROOMS.index(i) > ROOMS.index(here)]
    assert not wrong, wrong


def needs(path, modules):
    """The modules of `modules` that a file imports as it is loaded, or for its annotations."""
    body = list(ast.parse(path.read_text()).body)
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            body += node.body
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from {inner if inner in modules else node.module} & set(modules)


def test_no_circle_inside_a_room():
    for folder in filter(Path.is_dir, PACKAGE.iterdir()):
        modules = {}
        for path in folder.rglob("*.py"):
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            modules[name.removesuffix(".__init__")] = path
        try:
            tuple(TopologicalSorter({name: set(needs(path, modules)) for name, path in modules.items()}).static_order())
        except CycleError as error:
            raise AssertionError(" → ".join(error.args[1])) from None


def test_files_and_functions_keep_their_size():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 460, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 70, f"{path}: {node.name}"
                assert (
                    node.name.startswith("_")
                    or path.name.startswith("_")
                    or ast.get_docstring(node)
                    or room(path) != "losses"
                ), node.name


def test_the_catalogue_has_all_papers_once():
    entries = [e for e in catalogue() if e.number is not None]
    assert [e.number for e in entries] == list(range(1, 42))
    assert {e.name for e in catalogue() if e.status == "works" and e.number not in STUDIES} == set(all_methods())
    assert {e.number for e in entries if e.access == "black"} == {1, 11, 16, 21, 24, 28, 34, 36}
    for column, known in TAXONOMY.items():  # no word that the survey lacks, and each of its words at least once
        assert {v for r in papers() for v in r[column].split(";")} == set(known.split()), column
    assert find("19").name == "taid" and find("taid").number == 19
    with pytest.raises(InputError, match="Did you mean 'dhkd'"):
        find("dhkdd")


def test_committed_pages_are_current(monkeypatch):
    monkeypatch.setattr("understudy.methods._adopted", {})  # classes that other tests made known
    docs = ROOT / "docs"
    trained = json.loads((docs / "curves.json").read_text())
    for entry in catalogue():
        if entry.status == "works":
            made = page(entry, trained.get(entry.name)) + "\n"
            assert (docs / "methods" / f"{entry.name}.md").read_text() == made, "run `make docs`"
    assert table() in (docs / "catalogue.md").read_text()
    assert table() in (ROOT / "README.md").read_text()
    assert findings(docs / "claims") in (docs / "claims" / "README.md").read_text(), "run `make docs`"
    assert drawing() in (docs / "architecture.md").read_text(), "run `make docs`"


def test_the_drawing_knows_every_import():
    found = rooms()
    assert set(found) | {"errors", "masking"} == set(ROOMS)
    assert "losses" in found["methods"] and not found["losses"] & {"methods", "training", "models"}


def test_a_drawing_without_implied_arrows_says_the_same():
    edges = [line.split(" --> ") for line in drawing().splitlines() if " --> " in line]
    reach = {}
    for room in ROOMS:  # in order, so what a room imports is known before it
        own = {b.strip() for a, b in edges if a.strip() == room}
        reach[room] = own | {r for b in own for r in reach[b]}
    assert all(asked <= reach[room] for room, asked in rooms().items())


PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "mine"
version = "1"
[project.entry-points."understudy.methods"]
mine = "mine:TV"
[tool.setuptools]
py-modules = ["mine"]
"""


@pytest.mark.slow
def test_a_users_method_needs_no_edit(tmp_path):
    """The example of CONTRIBUTING.md in a package of its own, installed by pip: the command line lists and trains it."""
    pytest.importorskip("setuptools")
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    example = (ROOT / "CONTRIBUTING.md").read_text().split("```python\n")[1].split("```")[0]
    (source / "mine.py").write_text(example)
    alone = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", "pip", "install", *alone, "--target", str(site), str(source)], check=True)
    path = os.pathsep.join(filter(None, [str(site), str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))

    def command(*words):
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-m", "understudy", *words], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = {e["name"]: e for e in json.loads(command("methods", "--json"))}
    assert listed["tv"]["status"] == "works" and "L1 distance" in listed["tv"]["title"]
    recipe = {**DIGITS, "method": "tv", "output": str(tmp_path / "run")}
    recipe["trainer"] = {"max_steps": 200, "learning_rate": 1e-2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command("train", str(tmp_path / "recipe.yaml"))
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["metrics"]["accuracy"] > 0.2
