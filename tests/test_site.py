"""The pages of the site: every command and example as it is printed, messages that exist, and a build without warnings."""

import contextlib
import json
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
from understudy.cli import main
from understudy.runs.recipe import make
from understudy.runs.study import Grid

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("index", "quickstart", "coming_from")] + sorted(
    (DOCS / "guides").glob("*.md")
)
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
# Sizes alone differ from what is printed.
LINES = {"--seeds 3": "--seeds 1", "trainer.max_steps=300": "trainer.max_steps=2"}
SETTINGS = {
    **{"train.max_steps=300": "train.max_steps=2", "--evaluations 200": "--evaluations 3"},
    **{"unet:32,64": "unet:8,16", "image_size=32": "image_size=8"},
}
# What a reader fills in on the pages whose models are of other kinds.
MODELS = {
    "text_classification": {"TEACHER": "reader", "STUDENT": "small"},
    "vision_language": {"TEACHER": "seer", "STUDENT": "small_seer"},
    "task=ranking": {
        "CROSS": "cross",
        "LARGE": "large",
        "ENCODER": "encoder",
        "TEACHER": "encoder",
        "STUDENT": "encoder",
    },
    **{
        task: {"OTHER_TEACHER": "solver", "TEACHER": "solver", "STUDENT": "solver", "JUDGE": "solver"}
        for task in ("task=reasoning", "task=text_generation", "task=statement_generation", "task=conversation")
    },
    "data=answers": {"STUDENT": "solver"},
}
SMALL = {
    "image_generation": ["data.samples=8", "data.teacher_steps=2", "data.size=64"],
    "scene_completion": ["teacher.train.max_steps=2", "data.teacher_steps=2"],
    "vision_language": ["data.max_new_tokens=4"],
    "node_classification": ["teacher.train.max_steps=2"],
    "reasoning": ["data.max_new_tokens=12", "data.samples=1"],
}
FEW = {
    "frontier-synthetic": "options.max_tokens=24",
    "qcrd": "options.max_tokens=24 options.samples=2 options.iterations=1 options.discriminator_steps=1 "
    "options.discriminator=bytes:width=8,layers=1",
    "ded": "options.max_tokens=24 options.smoke_questions=4 options.smoke_steps=1 options.attempts=2 options.samples=2",
    "mcts-dpo": "options.rounds=1 options.simulations=2 options.questions=4 options.step_tokens=16",
    "tpo-trees": "options.simulations=4 options.questions=6 options.step_tokens=16",
}
"""Of commands that train: what is small beside the number of steps, by task and by method."""
SHARDS = [command for _, command in COMMANDS if "generate" in command and "--shard" in command]


@pytest.fixture(scope="module")
def reader(home):
    """What the guides take for granted, beside what the README does."""
    classifier(home / "reader")
    classifier(home / "small", steps=0, hidden_size=8)
    as_csv(home / "reviews.csv", reviews(90))
    guides(home)
    (home / "study.yaml").write_text(next(block for _, kind, block in BLOCKS if kind == "yaml" and "students" in block))
    with contextlib.chdir(home):
        exec(next(block for _, kind, block in BLOCKS if kind == "python" and "papers.npz" in block), {})
    return home


def filled(command):
    names = dict(NAMES)
    for task, models in MODELS.items():
        names |= models if task in command else {}
    longest = sorted(names.items(), key=lambda name: -len(name[0]))  # one name may hold another
    for old, new in [*longest, *LINES.items(), *SETTINGS.items()]:
        command = command.replace(old, new)
    return shlex.split(command)[1:]


def shortened(command):
    """The words of a command, with few steps and small models where it trains."""
    words = filled(command)
    if words[0] in ("train", "compare", "search"):
        # A graph is one batch.
        words += SHORT if "task=node_classification" not in words else ["trainer.max_steps=2"]
        words += [w for task, more in SMALL.items() if f"task={task}" in words for w in more]
        words += [w for method, more in FEW.items() if f"method={method}" in words for w in more.split()]
        if any(name in command for name in ("progressive", "llava-mod", "mst-distill")):
            words += ["trainer.max_steps=8"]  # methods with phases
        if "digits" in command:
            words += ["teacher=mlp:8"]
        if words[0] == "compare":
            words += ["--workers", "1"]
    if words[0] == "study":
        words += ["trainer.max_steps=2", "--seeds", "1", "--workers", "1"] if ".yaml" in command else []
    return words


def needed(words, capsys):
    """Run what a command reads: folders of runs that other commands of the pages write, each once."""
    for found in re.findall(r"(?<!output=)\bruns/\w+", " ".join(w for w in words if not w.startswith("output="))):
        before = next((c for _, c in COMMANDS if f"output={found}" in shlex.split(c) and " check " not in c), None)
        if before is not None and not Path(found).exists():
            first = shortened(before)
            needed(first, capsys)
            call(first, capsys)


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
    assert all(line.startswith("understudy ") for _, line in COMMANDS) and len(COMMANDS) >= 40
    assert {kind for _, kind, _ in BLOCKS} == {
        "",
        "python",
        "yaml",
        "text",
        "json",
        "py",
        "yml",
    }  # the last two: of other tools


def test_a_file_that_a_page_shows_is_one_that_its_commands_read(tmp_path):
    write_rankings(tmp_path)
    write_graph(tmp_path)
    write_reasoning(tmp_path, steps=0)
    assert {name for _, name, _ in FILES} >= {"helpdesk/corpus.jsonl", "papers.csv", "questions.jsonl", "solve.txt"}
    for _, name, block in FILES:
        assert (tmp_path / name).read_text().startswith(block), name


def test_files_that_are_shown_are_those_that_the_commands_read(reader):
    shown = [line for _, kind, block in BLOCKS if kind == "text" for line in block.splitlines()]
    assert len(shown) >= 10 and all((reader / line).is_file() for line in shown)
    held = [line for file in reader.glob("*.jsonl") for line in file.read_text().splitlines()]
    records = [json.loads(block) for _, kind, block in BLOCKS if kind == "json"]
    assert len(records) >= 3 and all(record in map(json.loads, held) for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("page,command", COMMANDS)
def test_a_command_does_what_it_says(page, command, reader, there, capsys, tmp_path, monkeypatch):
    words = shortened(command)
    if words[0] == "reproduce":
        return asked_for(words, monkeypatch)
    needed(words[1:2] if words[0] in ("study", "evaluate", "report", "export", "push") else words, capsys)
    if words[0] == "study" and "--output" in words:
        words = [str(tmp_path / w) if words[i - 1] == "--output" else w for i, w in enumerate(words)]
    words = [f"output={tmp_path}/{w[7:]}" if w.startswith("output=") else w for w in words]
    if words[0] == "cache":
        words = [w.replace("caches/teacher", str(tmp_path / "cache")) for w in words]
    cache = tmp_path / "cache"
    if words[:2] == ["cache", "info"] or any(w.startswith("teacher.cache=") for w in words):
        call(["cache", "capture", "recipe.yaml", "--output", str(cache)], capsys)
        words = [f"teacher.cache={cache}" if w.startswith("teacher.cache=") else w for w in words]
    if "--shard" in words or "data=answers" in words:
        shutil.rmtree(there / "answers", ignore_errors=True)  # a log belongs to the server that wrote it
    if "data=answers" in words:
        for shard in SHARDS:
            with answering(filled(shard), there) as said:
                call(said, capsys)
    with answering(words, there) as said:
        assert call(said, capsys)
    if words[0] == "train":
        output = Path(next(w for w in words if w.startswith("output=")).removeprefix("output="))
        assert (output / "report.html").is_file()
        assert (output / "student").is_dir() or (output / "stages").is_dir()


def asked_for(words, monkeypatch):
    from understudy import InputError, claims

    asked = []

    def reproduce(name, seeds, *args, **options):
        asked.append((name, options["max_seeds"]))
        raise InputError("no further")

    monkeypatch.setattr(claims, "reproduce", reproduce)
    with pytest.raises(SystemExit):
        main(words)
    assert asked == [(words[1], int(words[3]))]


@pytest.mark.slow
@pytest.mark.parametrize("page,code", [(page.stem, block) for page, kind, block in BLOCKS if kind == "python"])
def test_an_example_runs(page, code, reader, there, tmp_path, monkeypatch, capsys):
    read = re.findall(r"(?<!output=)\"(runs/\w+)", code)
    read = [run for run in read if f'output": "{run}"' not in code]
    needed(read, capsys)
    for name in ("papers.csv", "citations.csv"):
        shutil.copy(there / name, tmp_path)
    for run in {run for run in read if (there / run).exists()}:
        shutil.copytree(there / run, tmp_path / run)
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
    study = {*Grid.model_fields, "arms"}
    assert make({k: v for k, v in yaml.safe_load(text).items() if k not in study}).method


@pytest.mark.slow
@pytest.mark.parametrize("text", [block for _, kind, block in BLOCKS if kind == "yaml" and "students" not in block])
def test_a_recipe_runs(text, reader, there, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(text)
    call(["train", str(tmp_path / "recipe.yaml"), f"output={tmp_path / 'run'}"], capsys)
    assert (tmp_path / "run" / "report.html").is_file()


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
