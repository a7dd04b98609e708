"""The notebooks of `examples/notebooks/`: each runs from top to bottom, and the site shows what it holds.

Their code is plain Python, so it is run in one namespace as a kernel would; none of them asks for IPython.
"""

import ast
import json
from pathlib import Path

import pytest

from understudy.pages import notebook_page

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
PRINTS = {"classifier": "read: [", "language_model": "bits per byte", "own_method": "brier", "preferences": "margin"}


def code(path):
    cells = json.loads(path.read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def test_each_is_a_short_notebook_without_outputs():
    assert [path.stem for path in NOTEBOOKS] == sorted(PRINTS)
    for path in NOTEBOOKS:
        found = json.loads(path.read_text())
        assert (found["nbformat"], found["nbformat_minor"]) == (4, 5) and 8 <= len(found["cells"]) <= 12
        assert len({c["id"] for c in found["cells"]}) == len(found["cells"])
        for cell in found["cells"]:
            assert cell["cell_type"] in ("markdown", "code") and cell["metadata"] == {} and cell["source"]
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None
                ast.parse("".join(cell["source"]))  # no magic commands


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("understudy.methods._adopted", {})
    namespace = {"__name__": "__main__"}
    for cell in code(path):
        exec(compile(cell, path.name, "exec"), namespace)
    assert PRINTS[path.stem] in capsys.readouterr().out
    assert list(tmp_path.glob(f"runs/{path.stem}/*/report.html"))


def test_the_pages_of_the_site_are_current():
    nav = (ROOT / "mkdocs.yml").read_text()
    for path in NOTEBOOKS:
        page = ROOT / "docs" / "notebooks" / f"{path.stem}.md"
        assert page.read_text() == notebook_page(path) + "\n", "run `make docs`"
        assert f"notebooks/{path.stem}.md" in nav
