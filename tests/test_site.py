"""The pages of the site: every command and example as it is printed, messages that exist, and a build without warnings."""

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from guide_cases import Answers, guides, write_graph, write_rankings, write_reasoning
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
FENCE = re.compile(r'```(\w*)(?: title="([^"]*)")?\n(.*?)```', re.DOTALL)
FILES = [(page, *found[1:]) for page in PAGES for found in FENCE.findall(page.read_text()) if found[1]]
BLOCKS = [(page, kind, block) for page in PAGES for kind, name, block in FENCE.findall(page.read_text()) if not name]
COMMANDS = [
    (page.stem, line)
    for page, kind, block in BLOCKS
    if not kind
    for line in block.splitlines()
    if line not in ("pip install understudy", "understudy demo")
]
LINES = {"--seeds 3": "--seeds 1", "--methods sft,": "--methods ", "trainer.max_steps=300": "trainer.max_steps=2"}
SETTINGS = {"train.max_steps=300": "train.max_steps=2"}
# What a reader fills in on the pages whose models are of other kinds, and sizes of procedures.
MODELS = {
    "task=text_classification": {"TEACHER": "reader", "STUDENT": "small"},
    "task=ranking": {"CROSS": "cross", "LARGE": "large", "ENCODER": "encoder"},
    **{
        task: {"OTHER_TEACHER": "solver", "TEACHER": "solver", "STUDENT": "solver", "JUDGE": "solver"}
        for task in ("task=reasoning", "task=text_generation", "task=statement_generation", "task=conversation")
    },
    "data=answers": {"STUDENT": "solver"},
}
FEW = {
    "frontier-synthetic": "options.max_tokens=24",
    "qcrd": "options.max_tokens=24 options.samples=2 options.iterations=1 options.discriminator_steps=1 "
    "options.discriminator=bytes:width=8,layers=1",
    "ded": "options.max_tokens=24 options.smoke_questions=4 options.smoke_steps=1 options.attempts=2 options.samples=2",
    "mcts-dpo": "options.rounds=1 options.simulations=2 options.questions=4 options.step_tokens=16",
    "tpo-trees": "options.simulations=4 options.questions=6 options.step_tokens=16",
}
SHARDS = [command for _, command in COMMANDS if "generate" in command and "--shard" in command]


@pytest.fixture(scope="module")
def reader(home):
    """What the guides take for granted, beside what the README does."""
    classifier(home / "reader")
    classifier(home / "small", steps=0, hidden_size=8)
    as_csv(home / "reviews.csv", reviews(90))
    guides(home)
    with contextlib.chdir(home):
        exec(next(block for _, kind, block in BLOCKS if kind == "python" and "papers.npz" in block), {})
    return home


def filled(command):
    names = next((names for says, names in MODELS.items() if says in command), NAMES)
    for old, new in {**names, **LINES, **SETTINGS}.items():
        command = command.replace(old, new)
    return shlex.split(command)[1:]


def short(command):
    """The arguments that make a training one of seconds."""
    words = list(SHORT)
    method = next((w.removeprefix("method=") for w in command.split() if w.startswith("method=")), "")
    if "task=reasoning" in command:
        words += ["data.max_new_tokens=12", "data.samples=1", *FEW[method].split()]
    if "task=node_classification" in command:
        words = ["trainer.max_steps=2", "teacher.train.max_steps=2"]
    return words


@contextlib.contextmanager
def answering(words, there):
    """The words with addresses of servers that answer: a scoring one for recipes, else one that writes solutions."""
    with contextlib.ExitStack() as stack:
        for place in ("http://HOST:8000/v1", "http://OTHER:8000/v1"):
            if any(place in w for w in words):
                made = Scorer(*sides(there / "teacher")) if "recipe.yaml" in words else Answers()
                url = stack.enter_context(made).url
                words = [w.replace(place, url) for w in words]
        yield words


def test_every_line_of_a_page_is_a_command():
    assert all(line.startswith("understudy ") for _, line in COMMANDS) and len(COMMANDS) >= 16
    assert {kind for _, kind, _ in BLOCKS} == {"", "python", "yaml"}


def test_a_file_that_a_page_shows_is_one_that_its_commands_read(tmp_path):
    write_rankings(tmp_path)
    write_graph(tmp_path)
    write_reasoning(tmp_path, steps=0)
    assert {name for _, name, _ in FILES} >= {"helpdesk/corpus.jsonl", "papers.csv", "questions.jsonl", "solve.txt"}
    for _, name, block in FILES:
        assert (tmp_path / name).read_text().startswith(block), name


@pytest.mark.slow
@pytest.mark.parametrize("page,command", COMMANDS)
def test_a_command_does_what_it_says(page, command, reader, there, capsys, tmp_path):
    words = filled(command)
    if words[0] in ("train", "compare"):
        words += short(command)
        if "digits" in command:
            words += ["teacher=mlp:8"]
        words = [f"output={tmp_path}/{w[7:]}" if w.startswith("output=") else w for w in words]
    if "--shard" in words or "data=answers" in words:
        shutil.rmtree(there / "answers", ignore_errors=True)  # a log belongs to the server that wrote it
    if "data=answers" in words:
        for shard in SHARDS:
            with answering(filled(shard), there) as said:
                call(said, capsys)
    if words[0] == "evaluate":
        call(["train", "task=image_classification", "data=digits", "method=sft", "output=runs/first", *SHORT], capsys)
    if words[0] == "cache":
        words = [w.replace("caches/teacher", str(tmp_path / "cache")) for w in words]
    cache = tmp_path / "cache"
    if words[:2] == ["cache", "info"] or any(w.startswith("teacher.cache=") for w in words):
        call(["cache", "capture", "recipe.yaml", "--output", str(cache)], capsys)
        words = [f"teacher.cache={cache}" if w.startswith("teacher.cache=") else w for w in words]
    with answering(words, there) as said:
        assert call(said, capsys)
    if words[0] == "train":
        output = Path(next(w for w in words if w.startswith("output=")).removeprefix("output="))
        assert (output / "report.html").is_file()
        assert (output / "student").is_dir() or (output / "stages").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("page,code", [(page.stem, block) for page, kind, block in BLOCKS if kind == "python"])
def test_an_example_runs(page, code, reader, there, tmp_path, monkeypatch, capsys):
    for run in set(re.findall(r'"(runs/\w+)/[\w/]*student"', code)):
        command = next(c for p, c in COMMANDS if p == page and f"output={run}" in c.split())
        words = [f"output={tmp_path}/{run}" if w.startswith("output=") else w for w in filled(command)]
        call([*words, *short(command)], capsys)
    for name in ("papers.csv", "citations.csv"):
        shutil.copy(there / name, tmp_path)
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
