"""The pages of the site: every command and example as it is printed, messages that exist, and a build without warnings."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from scoring_server import Scorer
from served_cases import made, sides
from test_readme_flows import NAMES, SHORT, call
from test_readme_flows import home as home
from test_readme_flows import there as there
from text_classes import as_csv, as_lines, classifier, reviews
from understudy.cli import main
from understudy.data import train_tokenizer
from understudy.models.vision_language import load_vision_language, new_processor
from understudy.runs.recipe import make
from understudy.runs.study import Grid

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("index", "quickstart", "coming_from")] + sorted(
    (DOCS / "guides").glob("*.md")
)
BLOCKS = [(page, *found) for page in PAGES for found in re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.DOTALL)]
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
MODELS = {
    "text_classification": {"TEACHER": "reader", "STUDENT": "small"},
    "vision_language": {"TEACHER": "seer", "STUDENT": "small_seer"},
    "task=ranking": {"TEACHER": "encoder", "STUDENT": "small_encoder"},
}
SMALL = {
    "image_generation": ["data.samples=8", "data.teacher_steps=2", "data.size=64"],
    "scene_completion": ["teacher.train.max_steps=2", "data.teacher_steps=2"],
    "vision_language": ["data.max_new_tokens=4"],
}
"""Of commands that train: what is small beside the number of steps."""


@pytest.fixture(scope="module")
def reader(home):
    """What the guide of text classifiers takes for granted, beside what the README does."""
    classifier(home / "reader")
    classifier(home / "small", steps=0, hidden_size=8)
    as_csv(home / "reviews.csv", reviews(90))
    pictures(home)
    made(home / "oracle")
    for name in ("encoder", "small_encoder"):
        classifier(home / f"{name}_with_head", steps=0)
        for part in (AutoModel, AutoTokenizer):
            part.from_pretrained(home / f"{name}_with_head").save_pretrained(home / name)
    words = [w for row in reviews(60) for w in row["text"].split()]
    triples = [
        {"query": w, "positive": f"a {w} film", "negative": f"a {words[i - 1]} film"} for i, w in enumerate(words)
    ]
    as_lines(home / "triples.jsonl", triples[:60])
    rng = np.random.default_rng(0)
    for split, number in (("train", 4), ("validation", 2), ("test", 2)):
        (home / "scans" / split).mkdir(parents=True)
        for i in range(number):
            points = rng.uniform(-9, 9, (300, 4)).astype("<f4")  # x, y, z and how much came back
            points.tofile(home / "scans" / split / f"{i:06d}.bin")
    (home / "study.yaml").write_text(next(block for _, kind, block in BLOCKS if kind == "yaml" and "students" in block))
    return home


def pictures(home):
    """What the guides of generation, of images with text and of modalities take for granted."""
    for name in ("photos", "pictures"):
        (home / name).mkdir()
    rows, sounds = [], np.sin(np.arange(1600) / np.array([[2], [9]]))
    for i in range(30):
        shade = Image.fromarray(np.full((24, 24, 3), 8 * i, np.uint8))
        shade.save(home / "photos" / f"{i + 1:04d}.png")
        shade.save(home / "pictures" / f"{i}.png")
        with wave.open(str(home / "pictures" / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes((9000 * sounds[i % 2]).astype("<i2").tobytes())
        rows.append({"image": f"pictures/{i}.png", "prompt": "Which shade is this?", "completion": f" shade {i}"})
    as_lines(home / "questions.jsonl", rows)
    better = [{k: row[k] for k in ("image", "prompt")} | {"chosen": row["completion"]} for row in rows]
    as_lines(home / "better.jsonl", [{**row, "rejected": f" shade {i + 1}"} for i, row in enumerate(better)])
    heard = [{"image": row["image"], "audio": f"pictures/{i}.wav"} for i, row in enumerate(rows)]
    as_lines(home / "machines.jsonl", [{**row, "label": ("low", "high")[i % 2]} for i, row in enumerate(heard)])
    encoded = [(home / "photos" / f"{i + 1:04d}.png").read_bytes() for i in range(30)]
    pq.write_table(pa.table({"image": encoded, "worse": encoded[1:] + encoded[:1]}), home / "rated.parquet")
    processor = new_processor(train_tokenizer([r["prompt"] + r["completion"] for r in rows], 300), image=24, patch=8)
    for name, width in (("seer", 32), ("small_seer", 16)):
        torch.manual_seed(0)
        model = load_vision_language(f"llava:hidden={width},layers=2,heads=2,vision=16", processor=processor)
        model.save_pretrained(home / name)
        processor.save_pretrained(home / name)


def filled(command):
    names = dict(NAMES)
    for task, models in MODELS.items():
        names |= models if task in command else {}
    for old, new in {**names, **LINES, **SETTINGS}.items():
        command = command.replace(old, new)
    return shlex.split(command)[1:]


def shortened(command):
    """The words of a command, with few steps and small models where it trains."""
    words = filled(command)
    if words[0] in ("train", "compare", "search"):
        words += SHORT
        words += [w for task, more in SMALL.items() if f"task={task}" in words for w in more]
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
    if "endpoint" in command:
        with Scorer(*sides(there / "teacher")) as server:
            assert call([w.replace("http://HOST:8000/v1", server.url) for w in words], capsys)
    else:
        assert call(words, capsys)
    if words[0] == "train":
        output = Path(next(w for w in words if w.startswith("output=")).removeprefix("output="))
        assert (output / "report.html").is_file() and (output / "student").is_dir()


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
    needed(re.findall(r"(?<!output=)\"(runs/\w+)", code), capsys)
    if (there / "runs").exists():
        shutil.copytree(there / "runs", tmp_path / "runs")
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
