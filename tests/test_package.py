"""The package as it is published: a wheel and a source distribution with every file that the code reads, and an installed copy."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import understudy

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution, built without network."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("dist")
    code = f"from setuptools import build_meta as b; b.build_sdist({str(folder)!r}); b.build_wheel({str(folder)!r})"
    copy = tmp_path_factory.mktemp("copy") / "understudy"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("needs the repository")
    for name in filter(None, files.stdout.split("\0")):
        if not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    (source,) = folder.glob("*.tar.gz")
    return wheel, source


def test_everything_that_the_code_reads_is_in_it(built):
    wheel, source = built
    package = ROOT / "src" / "understudy"
    kept = {p.relative_to(package.parent).as_posix() for p in package.rglob("*") if p.is_file()}
    kept = {name for name in kept if "__pycache__" not in name}
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert not kept - inside, sorted(kept - inside)
    with tarfile.open(source) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/understudy/papers.csv"} <= names


@pytest.mark.timeout(600)
def test_an_installed_copy_works_without_the_sources(built, tmp_path):
    alone = ["--quiet", "--no-index", "--no-deps"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *alone, "--target", str(tmp_path), str(built[0])], check=True
    )

    def say(*words):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "understudy", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert say("--version") == f"understudy {understudy.__version__}\n"
    assert "Choice-Theoretic" in say("show", "pld")
    assert (tmp_path / "bin" / "understudy").is_file()
    say("train", "method=sft", "data=digits", "trainer.max_steps=2", f"output={tmp_path / 'run'}")
    assert (tmp_path / "run" / "report.html").is_file()


def test_versions_and_extras_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == understudy.__version__
    assert f"## {understudy.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    (everything,) = [d for d in PROJECT["optional-dependencies"]["dev"] if d.startswith("understudy[")]
    assert set(everything.split("[")[1].rstrip("]").split(",")) == set(PROJECT["optional-dependencies"]) - {"dev"}
