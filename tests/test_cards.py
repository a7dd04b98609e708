"""What was gained over the teacher, the model card, and its upload."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from engine_cases import DIGITS, TEXT
from text_classes import as_lines, classifier, reviews
from understudy import distill
from understudy.cli.main import main
from understudy.data import Batch
from understudy.errors import InputError
from understudy.evaluation.gain import sentence, sizes, speeds
from understudy.files import check_seal
from understudy.models import ModelAdapter
from understudy.models.adapters import ModelOutput
from understudy.reporting import write_card
from understudy.runs.capture import capture_recipe
from understudy.runs.pushing import prepare, push
from understudy.runs.recipe import make

SHORT = {"max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1}
DATA = {
    "image": DIGITS["data"],
    "text": {**TEXT["data"], "characters": 20_000},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short run of each kind; text classification learns from a teacher in a folder."""
    root = tmp_path_factory.mktemp("cards")
    teacher = str(classifier(root / "secret-place" / "a-teacher"))
    as_lines(root / "reviews.jsonl", reviews(120))
    recipes = {
        "image": {**DIGITS, "teacher": {"model": "mlp:64", "train": SHORT}},
        "text": {**TEXT, "teacher": {"model": "llama:hidden=32,layers=2,heads=2", "train": SHORT}},
        "classification": {
            "task": "text_classification",
            "data": {"name": str(root / "reviews.jsonl"), "max_length": 16, "vocab_size": 300},
            "teacher": teacher,
            "student": "embedding:8",
        },
    }
    return {
        name: distill(
            {**r, "data": DATA.get(name, r["data"]), "method": "kd", "trainer": SHORT, "output": str(root / name)}
        )
        for name, r in recipes.items()
    }


@pytest.fixture
def run(runs, tmp_path):
    return shutil.copytree(runs["image"].folder, tmp_path / "run")


def evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text())


def command(capsys, *words, code=0):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, words)))
    said = capsys.readouterr()
    assert stop.value.code == code, said.err
    return said.out + said.err


# -- what was gained


@pytest.mark.parametrize("name", ["image", "text", "classification"])
def test_a_run_records_sizes_speed_and_what_was_kept(runs, name):
    found, folder = evaluation(runs[name].folder), runs[name].folder
    gain, speed = found["gain"], found["cost"]["speed"]
    assert gain["student"]["parameters"] == sum(p.numel() for p in runs[name].student.parameters())
    metric = gain["kept"]["metric"]
    assert metric == ("bits_per_byte" if name == "text" else "accuracy")
    assert gain["kept"]["student"] == found["metrics"][metric]
    assert gain["kept"]["teacher"] == found["metrics"][f"teacher_{metric}"]
    assert all(v > 0 for part in ("latency_seconds", "examples_per_second") for v in speed[part].values())
    assert speed["examples_per_second"].keys() == {"student", "teacher"}
    said = sentence(gain, speed)
    assert "parameters" in said and "the speed" in said and metric in said
    html = (folder / "report.html").read_text()
    assert re.search(r'<p class="lead">([^<]*)', html)[1].replace("&#39;", "'") == said
    assert html.index('lead">') < html.index("<table")
    assert said in (folder / "student" / "README.md").read_text()


def test_sizes_are_those_of_the_file(runs):
    for name in ("image", "text"):
        found = evaluation(runs[name].folder)["gain"]["student"]
        written = (runs[name].folder / "student" / "model.safetensors").stat().st_size
        assert 0 <= written - found["bytes"] < 8192, name  # the header
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert sizes(tied) == {"parameters": 16, "bytes": 64}


class Waits(ModelAdapter):
    """A model that notes its calls, on a clock that moves by its own time."""

    def __init__(self, name, seconds, clock, calls):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.own, self.seconds, self.clock, self.calls = name, seconds, clock, calls

    def answer(self, batch, features):
        self.clock[0] += self.seconds * len(batch.ids)
        self.calls.append((self.own, len(batch.ids), self.training))
        return ModelOutput(None)


def test_models_are_timed_in_turns_on_the_same_batches(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr("understudy.evaluation.gain.time.perf_counter", lambda: clock[0])
    student, teacher = (Waits(n, s, clock, calls) for n, s in (("student", 0.002), ("teacher", 0.008)))

    def batch(n):
        return {"x": torch.zeros(n, 2), "labels": torch.zeros(n, dtype=torch.long), "ids": torch.arange(n)}

    found = speeds({"student": student, "teacher": teacher}, batch(1), batch(5))
    assert found["latency_seconds"] == pytest.approx({"student": 0.002, "teacher": 0.008})
    assert found["examples_per_second"] == pytest.approx({"student": 500, "teacher": 125})
    assert (found["examples"], found["rounds"]) == (5, 3)  # one round takes 0.05 s
    assert [c[0] for c in calls] == ["student", "teacher"] * (len(calls) // 2)
    assert not any(c[2] for c in calls) and student.training  # timed in evaluation mode
    assert Batch.from_dict(batch(2)).ids.tolist() == [0, 1]


def gains(student, teacher, ours, theirs, higher=True):
    kept = {"metric": "m", "higher_is_better": higher, "student": ours, "teacher": theirs}
    return {"student": {"parameters": student}, "teacher": {"parameters": teacher}, "kept": kept}


def pace(student, teacher):
    return {"examples_per_second": {"student": student, "teacher": teacher}}


def test_the_sentence_says_also_what_was_lost():
    assert sentence(gains(10, 80, 0.96, 1.0), pace(340, 100)) == (
        "The student keeps 96 % of its teacher's m, at 1/8 of the parameters and 3.4 times the speed."
    )
    assert "0.5 times the speed (it is slower)" in sentence(gains(10, 80, 0.96, 1.0), pace(50, 100))
    assert "reaches 110 % of its teacher's m, at 1.5 times the parameters." in sentence(gains(15, 10, 1.1, 1.0), None)
    assert "36 % of the parameters" in sentence(gains(36, 100, 1.0, 1.0), None)
    assert "m is 1.25 times its teacher's (lower is better)" in sentence(gains(1, 2, 2.5, 2.0, higher=False), None)
    assert "m is -1, its teacher's 0.5" in sentence(gains(1, 2, -1.0, 0.5), None)
    assert sentence({"student": {"parameters": 3}}, None) == ""


def test_without_a_teacher_beside_it_nothing_is_compared(runs, tmp_path):
    alone = distill(
        {**DIGITS, "method": "sft", "teacher": "mlp:16", "trainer": SHORT, "output": str(tmp_path / "alone")}
    )
    cache = tmp_path / "cache"
    saved = str(runs["image"].folder / "teacher" / "student")
    base = {**DIGITS, "method": "kd", "trainer": SHORT, "output": str(tmp_path / "cached")}
    capture_recipe(make({**base, "teacher": saved}), cache)
    cached = distill({**base, "teacher": {"model": saved, "cache": str(cache)}})
    found = evaluation(cached.folder)
    assert "teacher" not in found["gain"] and "speed" not in found["cost"]
    assert "stored or served" in (cached.folder / "report.html").read_text()
    assert "teacher" in evaluation(alone.folder)["gain"]


# -- the card


@pytest.mark.parametrize("name", ["image", "text", "classification"])
def test_a_card_is_one_of_the_hub(runs, name):
    folder, found = runs[name].folder, evaluation(runs[name].folder)
    card = ModelCard.load(folder / "student" / "README.md")
    assert "knowledge-distillation" in card.data.tags and "kd" in card.data.tags
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results == {k: v for k, v in found["metrics"].items() if not k.startswith("teacher_")}
    assert list(results) == card.data.metrics
    wanted = {"image": "image-classification", "text": "text-generation", "classification": "text-classification"}
    assert card.data.pipeline_tag == wanted[name] and card.data.base_model is None  # a new small model has none
    assert card.data.library_name == ("understudy" if name == "image" else "transformers")
    assert "*Distilling the Knowledge in a Neural Network*" in card.text and "@misc{kd," in card.text
    assert "## Cost" in card.text
    panels = re.findall(r"\]\((panels/[^)]*)\)", card.text)
    assert panels and all("var(--" not in (folder / "student" / p).read_text() for p in panels)
    row = re.search(r"\| accuracy \| ([\d.]+) \| (.*?) \|", card.text)
    if name == "text":
        assert row[2] == "–"
    else:
        low, high = map(float, row[2].strip("[]").split(", "))
        assert 0 <= low < float(row[1]) < high <= 1


def test_a_card_names_no_folder_of_this_machine(runs):
    text = (runs["classification"].folder / "student" / "README.md").read_text()
    assert "a-teacher" in text and "reviews.jsonl" in text
    assert "secret-place" not in text and str(runs["classification"].folder.parent) not in text


def test_hub_names_are_base_model_and_dataset(run):
    for name in ("run.json", "recipe.yaml"):
        file = run / name
        file.write_text(file.read_text().replace("mlp:8", "org/small-1b").replace("name: digits", "name: org/images"))
    data = ModelCard.load(write_card(run)).data
    assert data.base_model == "org/small-1b" and data.datasets == ["org/images"]


def test_a_card_may_be_edited_and_weights_may_not(run):
    (run / "student" / "README.md").write_text("My own words.\n")
    check_seal(run / "student")
    assert prepare(run, "me/model").card == "My own words.\n"
    (run / "student" / "README.md").unlink()
    assert "## Metrics" in prepare(run, "me/model").card


# -- the upload


def test_a_dry_run_lists_files_and_card_without_network_or_token(run, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("the network was used"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    said = json.loads(command(capsys, "push", run, "me/model", "--dry-run", "--json"))
    student = run / "student"
    assert said["files"] == {
        p.relative_to(student).as_posix(): p.stat().st_size for p in student.rglob("*") if p.is_file()
    }
    assert said["card"] == (student / "README.md").read_text() and said["commit"] is None
    shown = command(capsys, "push", run, "me/model", "--dry-run")
    assert "model.safetensors" in shown and "What was gained" in shown


@pytest.mark.parametrize(
    "damage,says",
    [
        (
            lambda run: (run / "student" / "model.safetensors").write_bytes(b"x"),
            "not as it was saved: model.safetensors",
        ),
        (lambda run: (run / "evaluation.json").write_text("{}"), "evaluation.json is missing or differs"),
        (lambda run: (run / "run.json").write_text('{"status": "running"}'), "is not finished (running)"),
        (lambda run: (run / "run.json").unlink(), "is not a run folder"),
        (lambda run: shutil.rmtree(run / "student"), "has no student of its own"),
    ],
)
def test_what_is_not_as_it_was_written_is_refused(run, damage, says, capsys):
    damage(run)
    assert says in command(capsys, "push", run, "me/model", "--dry-run", code=2)


def test_a_bad_name_and_a_missing_token_are_refused(run, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "no id of the Hub" in command(capsys, "push", run, "a b/c", "--dry-run", code=2)
    assert "set the environment variable HF_TOKEN" in command(capsys, "push", run, "me/model", code=2)


def test_the_token_is_used_and_never_shown(run, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wordthatishidden")
    asked = []

    def create(self, repo, private, exist_ok):
        asked.append((self.token, repo, private))

    def refuse(self, **given):
        asked.append(sorted(given["allow_patterns"]))
        raise OSError(f"refused with {self.token}")

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    said = command(capsys, "push", run, "me/model", "--private", code=2)
    assert "could not be uploaded: refused with" in said and "hidden" not in said
    assert asked[0] == ("hf_wordthatishidden", "me/model", True) and "README.md" in asked[1]


def test_an_upload_returns_its_commit(run, monkeypatch):
    class Commit:
        commit_url = "https://hub/me/model/commit/1"

    monkeypatch.setenv("HF_TOKEN", "hf_wordthatishidden")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **more: None)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: Commit())
    assert push(prepare(run, "me/model")) == Commit.commit_url
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: (_ for _ in ()).throw(ValueError("bad file")))
    with pytest.raises(InputError, match="bad file"):
        push(prepare(run, "me/model"))
