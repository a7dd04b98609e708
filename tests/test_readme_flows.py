"""Every command and example of the README as it is printed; small models and few steps stand in for large ones."""

import contextlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from scoring_server import Scorer
from served_cases import made, sides
from understudy import InputError
from understudy.cli import main
from understudy.runs.recipe import make

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split(" #")[0].strip()
    for kind, block in BLOCKS
    if not kind
    for line in block.splitlines()
    if line.startswith("understudy ")
]
# Names that a reader fills in, and sizes: nothing else of a command is changed.
NAMES = {"TEACHER": "teacher", "STUDENT": "student", "MODEL": "student", "data=cifar10": "data=images.npz"}
SIZES = {"trainer.max_steps=2000": "trainer.max_steps=2", "--seeds 3": "--seeds 1"}
SHORT = ["trainer.max_steps=2", "trainer.per_device_train_batch_size=4"]
RECIPE = {
    "task": "language_modeling",
    "method": "kd",
    "teacher": "teacher",
    "student": "student",
    "data": {"name": "my.jsonl", "max_length": 32, "pack": False},
    "trainer": {"max_steps": 2, "per_device_train_batch_size": 4},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with what the README takes for granted: two models, data, and a recipe."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("teacher", "student"):
        made(folder / name)
        file = folder / name / "tokenizer_config.json"
        template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    lines = {
        "my.jsonl": [{"text": f"line {i} of a text that counts to {i * i}"} for i in range(40)],
        "pairs.jsonl": [{"prompt": f"say {i}", "chosen": " yes please", "rejected": " no never"} for i in range(40)],
        "chats.jsonl": [
            {"messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": "a number"}]}
            for i in range(40)
        ],
    }
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    chance = np.random.default_rng(0)
    np.savez(
        folder / "images.npz",
        images=chance.integers(0, 256, (40, 3, 8, 8)).astype(np.uint8),
        labels=np.arange(40) % 4,
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture
def there(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def call(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr()
    assert stop.value.code == 0, said.err
    return said.out


def filled(command):
    for old, new in {**NAMES, **SIZES}.items():
        command = command.replace(old, new)
    return shlex.split(command)[1:]


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.split()[1] in ("check", "train", "plan", "generate", "evaluate")]
)
def test_a_command_does_what_it_says(command, there, capsys):
    words = filled(command)
    name = re.sub(r"\W+", "-", command)
    with contextlib.ExitStack() as stack:
        if words[0] == "train":
            words += SHORT
            if not any(w.startswith("output=") for w in words):
                words.append(f"output=runs/{name[:60]}")
        if "images.npz" in command or "cifar10" in command:
            words += ["teacher=convnet:2"]
        if "endpoint" in command:
            url = stack.enter_context(Scorer(*sides(there / "teacher"))).url
            words = [w.replace("http://HOST:8000/v1", url) for w in words]
        if "teacher.cache" in command and not (there / "caches").exists():
            call(["cache", "capture", "recipe.yaml", "--output", "caches/teacher"], capsys)
        if words[0] == "evaluate" and not (there / "runs" / "cifar").exists():
            test_a_command_does_what_it_says(next(c for c in COMMANDS if "runs/cifar" in c), there, capsys)
        said = call(words, capsys)
    if words[0] == "train":
        output = next(w for w in words if w.startswith("output=")).removeprefix("output=")
        assert (there / output / "report.html").is_file() and (there / output / "student").is_dir()
    if words[0] == "evaluate":
        assert json.loads(said)["metrics"]["accuracy"] >= 0
    assert said


def test_a_capture_keeps_what_it_says(there, capsys):
    command = next(c for c in COMMANDS if "cache capture" in c)
    said = call([w.replace("caches/", "captured/") for w in filled(command)], capsys)
    facts = json.loads(call(["cache", "info", "captured/teacher", "--json"], capsys))
    assert "examples" in said and facts["support"] == "sampled:38B"


def test_a_comparison(there, capsys):
    words = filled(next(c for c in COMMANDS if " compare " in c))
    said = call([*words, "output=runs/compared"], capsys)
    assert {r["method"] for r in json.loads((there / "out.json").read_text())["table"]} == {"sft", "kd", "pld"}
    assert "report.html" in said


def test_reproduce_asks_for_the_claim(there, capsys, monkeypatch):
    from understudy import claims

    asked = []

    def reproduce(name, seeds, *args, **options):
        asked.append((name, seeds))
        raise InputError("no further")

    monkeypatch.setattr(claims, "reproduce", reproduce)
    with pytest.raises(SystemExit):
        main(shlex.split(next(c for c in COMMANDS if " reproduce " in c))[1:])
    assert asked == [("dhkd", 3)]


def test_every_command_has_a_test_here():
    tried = {"check", "train", "plan", "generate", "evaluate", "cache", "compare", "reproduce"}
    assert {c.split()[1] for c in COMMANDS} == tried and len(COMMANDS) >= 12


def test_the_python_example(there, capsys):
    code = next(block for kind, block in BLOCKS if kind == "python")
    stands_for = {
        "Qwen/Qwen3-1.7B": "teacher",
        "Qwen/Qwen3-0.6B": "student",
        "trl-lib/Capybara": "chats.jsonl",
        '"max_steps": 1000': '"max_steps": 2, "per_device_train_batch_size": 4',
        "seeds=5": "seeds=1",
        '"output": "runs/compare"': '"output": "runs/compare", "teacher": "mlp:8", "trainer": {"max_steps": 2}',
    }
    for old, new in stands_for.items():
        assert old in code
        code = code.replace(old, new)
    spoken = {}
    exec(code, spoken)
    assert spoken["result"].metrics["nll"] > 0 and (there / "runs" / "taid" / "student").is_dir()
    assert [row["method"] for row in spoken["found"].table] == ["sft", "kd", "pld", "dhkd"]
    assert Path(capsys.readouterr().out.split()[-1]).is_file()


def test_the_recipe_is_one(monkeypatch):
    recipe = make(yaml.safe_load(next(block for kind, block in BLOCKS if kind == "yaml")))
    assert recipe.method == "taid" and recipe.build_method().alpha == 0.008


def test_the_teacher_of_several_members_is_one():
    text = re.search(r"`teacher: (\{members: .*?\})`", README)[1]
    recipe = {
        "task": "language_modeling",
        "method": "kd",
        "data": {"name": "my.jsonl"},
        "teacher": yaml.safe_load(text),
    }
    assert set(make(recipe).teacher.members) == {"math", "code"} and make(recipe).data["domain_column"] == "domain"


def test_the_samples_of_the_student_are_asked_for_as_printed():
    text = re.search(r"`on_policy: (\{.*?\})`", README)[1]
    recipe = {"task": "language_modeling", "method": "kd", "on_policy": yaml.safe_load(text)}
    assert make(recipe).on_policy.fraction == 0.5
