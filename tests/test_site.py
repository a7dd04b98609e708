"""The pages of the site: every command and example as it is printed, messages that exist, and a build without warnings."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scoring_server import Scorer
from served_cases import sides
from test_readme_flows import NAMES, SHORT, call
from test_readme_flows import home as home
from test_readme_flows import there as there
from text_classes import as_csv, classifier, reviews
from understudy.runs.recipe import make

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("index", "quickstart")] + sorted((DOCS / "guides").glob("*.md"))
BLOCKS = [(page, *found) for page in PAGES for found in re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.DOTALL)]
COMMANDS = [
    (page.stem, line)
    for page, kind, block in BLOCKS
    if not kind
    for line in block.splitlines()
    if line not in ("pip install understudy", "understudy demo")
]
LINES = {"--seeds 3": "--seeds 1", "--methods sft,": "--methods ", "trainer.max_steps=300": "trainer.max_steps=2"}
SETTINGS = {"train.max_steps=300": "train.max_steps=2"}


@pytest.fixture(scope="module")
def reader(home):
    """What the guide of text classifiers takes for granted, beside what the README does."""
    classifier(home / "reader")
    classifier(home / "small", steps=0, hidden_size=8)
    as_csv(home / "reviews.csv", reviews(90))
    return home


def filled(command):
    names = dict(NAMES)
    if "text_classification" in command:
        names |= {"TEACHER": "reader", "STUDENT": "small"}
    for old, new in {**names, **LINES, **SETTINGS}.items():
        command = command.replace(old, new)
    return shlex.split(command)[1:]


def test_every_line_of_a_page_is_a_command():
    assert all(line.startswith("understudy ") for _, line in COMMANDS) and len(COMMANDS) >= 16
    assert {kind for _, kind, _ in BLOCKS} == {"", "python", "yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("page,command", COMMANDS)
def test_a_command_does_what_it_says(page, command, reader, there, capsys, tmp_path):
    words = filled(command)
    if words[0] in ("train", "compare"):
        words += SHORT
        if "digits" in command:
            words += ["teacher=mlp:8"]
        words = [f"output={tmp_path}/{w[7:]}" if w.startswith("output=") else w for w in words]
    if words[0] == "evaluate":
        call(["train", "task=image_classification", "data=digits", "method=sft", "output=runs/first", *SHORT], capsys)
    if words[0] == "cache":
        words = [w.replace("caches/teacher", str(tmp_path / "cache")) for w in words]
    cache = tmp_path / "cache"
    if words[:2] == ["cache", "info"] or any(w.startswith("teacher.cache=") for w in words):
        call(["cache", "capture", "recipe.yaml", "--output", str(cache)], capsys)
        words = [f"teacher.cache={cache}" if w.startswith("teacher.cache=") else w for w in words]
    if "endpoint" in command:
        with Scorer(*sides(there / "teacher")) as server:
            assert call([w.replace("http://HOST:8000/v1", server.url) for w in words], capsys)
    else:
        assert call(words, capsys)
    if words[0] == "train":
        output = Path(next(w for w in words if w.startswith("output=")).removeprefix("output="))
        assert (output / "report.html").is_file() and (output / "student").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("page,code", [(page.stem, block) for page, kind, block in BLOCKS if kind == "python"])
def test_an_example_runs(page, code, reader, there, tmp_path, monkeypatch, capsys):
    if "runs/reviews" in code:
        command = next(c for _, c in COMMANDS if "train task=text_classification" in c and "runs/reviews" in c)
        words = [f"output={tmp_path}/runs/reviews" if w.startswith("output=") else w for w in filled(command)]
        call([*words, *SHORT], capsys)
    monkeypatch.chdir(tmp_path)
    for old, new in {
        "seeds=3": "seeds=1",
        'data="digits",': 'data="digits", trainer={"max_steps": 2},',
        '"data": "digits",': '"data": "digits", "teacher": "mlp:8", "trainer": {"max_steps": 2},',
        'method="kd", data': 'teacher="mlp:8", method="kd", data' if "teacher=net" not in code else 'method="kd", data',
    }.items():
        code = code.replace(old, new)
    exec(code, {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("text", [block for _, kind, block in BLOCKS if kind == "yaml"])
def test_a_recipe_is_one(text, home, monkeypatch):
    monkeypatch.chdir(home)
    assert make(yaml.safe_load(text)).method


def test_every_message_of_the_list_is_one_of_ours():
    source = "\n".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
    spoken = re.sub(r'"\s*\n\s*f?"', "", source)
    for message in re.findall(r"^\| `(.*?)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE):
        parts = [part.strip() for part in message.split("…") if part.strip()]
        assert all(part in spoken for part in parts), message


def test_every_option_that_other_tools_users_are_told_of_exists():
    from understudy.methods import all_methods, resolve

    text = (DOCS / "coming_from.md").read_text()
    fields = {name for method in all_methods().values() for name in method.model_fields}
    assert set(re.findall(r"options\.(\w+)", text)) <= fields
    for name in re.findall(r"method=([\w-]+)", text):
        assert resolve(name), name


def test_the_navigation_names_pages_that_exist():
    text = (ROOT / "mkdocs.yml").read_text().split("nav:\n")[1]
    named = re.findall(r"([\w/]+\.md)", text)
    assert len(named) >= 15 and all((DOCS / name).is_file() for name in named)


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    if shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs the extra docs")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            str(ROOT / "mkdocs.yml"),
            "-d",
            str(tmp_path / "site"),
        ],
        capture_output=True,
        text=True,
        env={"PATH": "", "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "scoreboard" / "index.html").is_file()
