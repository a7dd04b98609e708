"""Paper 11 as a procedure: filters, kills between and inside stages, labels of people, the report, bad input."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from understudy import InputError, distill
from understudy.data.knowledge import load_relations
from understudy.data.text import write_records
from understudy.runs.check import check_recipe
from understudy.runs.recipe import make
from understudy.synthetic.events import TAILS, EventsWorld
from understudy.tasks import get
from understudy.tasks.text_generation import TextGeneration
from understudy.training import pipeline

TINY = {
    "method": "symbolic-kd",
    "task": "text_generation",
    "options": {
        "head_samples": 150,
        "tail_samples": 3,
        "tail_top_p": 1.0,
        "labels": 300,
        "threshold_labels": 150,
        "student_samples": 1,
        "shares": [0.8, 0.1, 0.1],
        "critic": {"epochs": 3},
    },
    "student": "llama:hidden=16,layers=1,heads=2,init=0.1",
    "trainer": {"max_steps": 12, "per_device_train_batch_size": 16, "save_steps": 4, "logging_steps": 4},
}


def tiny(output, **options):
    return {**TINY, "output": str(output), "options": {**TINY["options"], **options}}


COUNTED = """
import os, signal, sys
import understudy.synthetic.events as world
from understudy import distill
from understudy.training import DistillationTrainer, PipelineContext
recipe, calls, moment = eval(sys.argv[1]), sys.argv[2], sys.argv[3]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
write, once, step = world.EventsWorld.write, PipelineContext.stage, DistillationTrainer.training_step
def counting(self, *args):
    answer = write(self, *args)
    with open(calls, "a") as file:
        file.write("x")
    if moment == "tails" and os.path.getsize(calls) == 900:
        die()
    return answer
def staged(self, name, kind, make):
    def dying(funnel):
        value = make(funnel)
        if name == moment:
            die()
        return value
    return once(self, name, kind, dying)
def stepping(self, *args, **kwargs):
    if moment == "training" and self.state.global_step == 7:
        die()
    return step(self, *args, **kwargs)
world.EventsWorld.write, PipelineContext.stage, DistillationTrainer.training_step = counting, staged, stepping
distill(recipe)
"""


def launched(recipe, calls, moment=""):
    return subprocess.run(
        [sys.executable, "-c", COUNTED, repr(recipe), str(calls), moment], capture_output=True, text=True
    )


@pytest.mark.slow
def test_killed_in_the_middle_of_stages_it_ends_alike_and_writes_nothing_twice(tmp_path, monkeypatch):
    whole, cut, calls = tiny(tmp_path / "whole"), tiny(tmp_path / "cut"), []
    write = EventsWorld.write
    monkeypatch.setattr(EventsWorld, "write", lambda self, *args: calls.append(1) or write(self, *args))
    distill(whole)
    asked = len(calls)
    for moment in ("tails", "critic", "training"):
        assert launched(cut, tmp_path / "calls", moment).returncode == -signal.SIGKILL, moment
        assert not (tmp_path / "cut" / "evaluation.json").exists()
    distill(cut)  # nothing is left for the teacher to write
    assert len(calls) == asked
    read = [json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("whole", "cut")]
    assert read[0]["metrics"] == read[1]["metrics"]
    for file in ("stages/kept.jsonl", "training/student/model.safetensors", "critic/0/model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file
    logged = len((tmp_path / "whole" / "logs" / "teacher.jsonl").read_text().splitlines()) - 1
    assert asked == logged
    assert logged <= os.path.getsize(tmp_path / "calls") <= logged + 8  # the answers in flight at the kill


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    """One run for each filter, on one log of the teacher."""
    root = tmp_path_factory.mktemp("filters")
    return {
        name: distill(tiny(root / name, filter=name, log=str(root / "log"), recall=0.6)).folder
        for name in ("none", "critic", "random", "oracle")
    }


def test_filters_keep_what_they_say(filtered):
    metrics = {n: json.loads((f / "evaluation.json").read_text())["metrics"] for n, f in filtered.items()}
    rows = {
        n: [json.loads(x) for x in (f / "stages" / "kept.jsonl").read_text().splitlines()] for n, f in filtered.items()
    }
    assert metrics["none"]["kept_share"] == 1 and all(t["kept"] for t in rows["none"])
    assert metrics["oracle"]["kept_precision"] == 1
    assert metrics["random"]["kept_size"] == metrics["critic"]["kept_size"] < metrics["none"]["kept_size"]
    assert metrics["random"]["kept_precision"] == pytest.approx(metrics["none"]["kept_precision"], abs=0.06)
    cutoff = metrics["critic"]["cutoff"]
    assert all(t["kept"] == (t["score"] > cutoff) for t in rows["critic"])
    assert metrics["critic"]["labels_strict_recall"] <= metrics["critic"]["labels_recall"] <= 0.6
    heads = {s: {t["head"] for t in rows["none"] if t["split"] == s} for s in ("train", "validation", "test")}
    assert not (
        heads["train"] & heads["test"] or heads["train"] & heads["validation"] or heads["validation"] & heads["test"]
    )
    labels = [json.loads(x) for x in (filtered["critic"] / "stages" / "labels.jsonl").read_text().splitlines()]
    used = {s: {t["head"] for t in labels if t["split"] == s} for s in ("train", "validation")}
    assert used["train"] | used["validation"] <= heads["train"] and not used["train"] & used["validation"]
    ids = {t["id"] for t in rows["critic"]}
    assert all(set(t["parents"]) <= ids for t in labels)
    one = json.loads((filtered["critic"] / "corpus" / "train.jsonl").read_text().splitlines()[0])
    assert one["prompt"].startswith("<head> PersonX ") and one["prompt"].endswith(" </relation> [GEN]")
    assert one["completion"].startswith(" ")


def test_the_report_shows_the_funnel_and_escapes_text(filtered):
    from understudy.reporting import render_run

    folder = filtered["critic"]
    page = (folder / "report.html").read_text()
    for text in (
        "What was kept at each step",
        "distinct triples",
        "Cutoffs of the critic",
        "nearly unique",
        "held-out heads",
    ):
        assert text in page
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["tables"][-1]["rows"][0][0] = "<script>alert(1)</script>"
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    facts = json.loads((folder / "run.json").read_text())
    del facts["files"]["evaluation.json"]  # it differs from what the run wrote, and would be refused
    (folder / "run.json").write_text(json.dumps(facts))
    assert "<script>alert" not in render_run(folder).read_text()


@pytest.fixture
def files(tmp_path):
    """Seeds, two relations and labels as files."""
    world = EventsWorld(0)
    words = dict(list(world.relations().items())[:2])
    relations = {n: {"text": r.text, "ask": r.ask, "examples": [list(e) for e in r.examples]} for n, r in words.items()}
    (tmp_path / "relations.yaml").write_text(yaml.safe_dump(relations))
    (tmp_path / "events.txt").write_text("\n".join(world.heads[::5]))
    labels = [
        {"head": head, "relation": name, "tail": tail, "label": 2 if world.valid(head, name, tail) else -9}
        for head in world.heads[::2]
        for name in words
        for tail in (TAILS[hash_of(head) % 200], *[t for t in TAILS if world.valid(head, name, t)][:2])
    ]
    write_records(tmp_path / "labels.jsonl", labels)
    return {
        "name": str(tmp_path / "events.txt"),
        "relations": str(tmp_path / "relations.yaml"),
    }, tmp_path / "labels.jsonl"


def hash_of(text):
    return sum(map(ord, text)) * 7919


@pytest.fixture
def other_teacher(monkeypatch):
    """A source that nobody knows the truth of stands for a model behind an endpoint."""
    found = TextGeneration().material({"data": {"name": "events_world"}, "teacher": {"model": "oracle"}, "seed": 0})
    monkeypatch.setattr(pipeline, "source_from", lambda spec: found.source)
    return {"model": "some-model", "endpoint": {"url": "http://localhost:1/v1"}}


@pytest.mark.slow
def test_labels_of_people_and_a_teacher_of_unknown_truth(tmp_path, files, other_teacher):
    """First without a filter, which gives triples to label, then with labels: the teacher is not asked again."""
    data, labels = files
    shared = {"teacher": other_teacher, "data": data}
    bare = distill(
        {**tiny(tmp_path / "bare", filter="none", log=str(tmp_path / "log"), labels=50, threshold_labels=10), **shared}
    )
    asked = (tmp_path / "log" / "teacher.jsonl").read_bytes()
    assert (
        "student_valid" not in bare.metrics
        and "corpus_precision" not in bare.metrics
        and bare.metrics["student_unique"] > 0
    )
    some = [json.loads(x) for x in (tmp_path / "bare" / "to_label.jsonl").read_text().splitlines()]
    assert len(some) == 60 and set(some[0]) == {"head", "relation", "tail", "label"} and some[0]["label"] is None
    recipe = {**tiny(tmp_path / "run", log=str(tmp_path / "log"), recall=0.8, legacy_mean=True), **shared}
    done = distill({**recipe, "data": {**data, "labels": str(labels)}})
    assert (tmp_path / "log" / "teacher.jsonl").read_bytes() == asked
    assert 0 < done.metrics["kept_share"] < 1 and 0 <= done.metrics["student_accepted"] <= 1
    assert "kept_precision" not in done.metrics  # a critic's verdict on its own choice says nothing
    rows = [json.loads(x) for x in (tmp_path / "run" / "stages" / "kept.jsonl").read_text().splitlines()]
    held = {t["head"] for t in rows if t["split"] != "train"}
    used = [json.loads(x) for x in (tmp_path / "run" / "stages" / "labels.jsonl").read_text().splitlines()]
    assert {t["split"] for t in used} == {"train", "validation", "test"} and held
    assert not held & {t["head"] for t in used}


def test_a_local_model_writes(tmp_path, files, filtered):
    """An untrained small model writes no event; what it wrote is kept, and the error says what was dropped."""
    recipe = tiny(tmp_path / "run", filter="none", head_samples=20, shortest=1)
    recipe |= {"teacher": str(filtered["none"] / "training" / "student"), "data": files[0]}
    with pytest.raises(InputError, match="of 20 written events are left and 3 splits need one each"):
        distill(recipe)
    assert len((tmp_path / "run" / "logs" / "teacher.jsonl").read_text().splitlines()) == 21


def test_bad_input_is_one_line_before_anything_is_written(tmp_path):
    events = tmp_path / "events.txt"
    events.write_text("PersonX runs home\n")
    (tmp_path / "labels.jsonl").write_text(json.dumps({"head": "h", "relation": "xNope", "tail": "t", "label": 1}))
    data = {"name": str(events)}

    def run(says, **keys):
        options = {**TINY["options"], **keys.pop("options", {})}
        with pytest.raises(InputError, match=says) as caught:
            distill({**TINY, "output": str(tmp_path / "bad"), **keys, "options": options})
        assert "\n" not in str(caught.value) and not (tmp_path / "bad" / "logs").exists()
        (tmp_path / "bad" / "recipe.yaml").unlink(missing_ok=True)

    run("needs a teacher that generates text", data=data)
    run("oracle knows nothing but events_world", data=data, teacher="oracle")
    run("needs labels for the critic", data=data, teacher="some/model")
    run("filter=oracle needs data whose truth", data=data, teacher="some/model", options={"filter": "oracle"})
    run("relation 'xNope' is none of", data={**data, "labels": str(tmp_path / "labels.jsonl")}, teacher="some/model")
    run(
        "data.labels '.*none.jsonl' is not a file",
        data={**data, "labels": str(tmp_path / "none.jsonl")},
        teacher="some/model",
    )
    run("Unknown key data.label.", data={"label": "x"})
    run("data.world_seed is -1", data={"world_seed": -1})
    run("Did you mean 'recall'", options={"recal": 0.5})
    run("critic.memberz", options={"critic": {"memberz": 5}})
    (tmp_path / "labels.jsonl").write_text(json.dumps({"head": "h", "relation": "xWant", "tail": "t", "label": 1}))
    run("only label 1", data={**data, "labels": str(tmp_path / "labels.jsonl")}, teacher="some/model")
    run("No tokenizer can be loaded", student="no/such-model")
    run("recall = 0", options={"recall": 0.0})
    run("must be above 0 and sum to 1", options={"shares": [0.5, 0.5, 0.5]})
    run("Prompt 'nope' is neither a file", options={"head_prompt": "nope"})
    with pytest.raises(InputError, match="works on generation tasks"):
        make({"method": "symbolic-kd", "task": "language_modeling"})


def test_the_task_checks_out_and_shows_its_seeds():
    recipe = make({"method": "symbolic-kd", "task": "text_generation"})
    prepared = get("text_generation").prepare(recipe)
    assert prepared.train[0].startswith("PersonX ") and prepared.hashes["data"]
    assert len(load_relations()) == 7
    said = check_recipe(recipe)[0].overview["teacher scores"]
    assert "every training batch" not in said and "stages of symbolic-kd" in said
