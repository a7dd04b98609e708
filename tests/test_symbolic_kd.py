"""Paper 11 as a procedure: what is asked and kept, kills between and inside stages, bad input, other teachers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from understudy import InputError, distill
from understudy.curation import Funnel
from understudy.curation import triples as knowledge
from understudy.data.knowledge import load_labels, load_relations
from understudy.data.knowledge_world import ADVERBS, RELATIONS, TAILS, VERBS, EventsWorld, choose
from understudy.generation import Completion, Prompt
from understudy.models.pairs import WordPairs, load_pairs
from understudy.recipe import make
from understudy.tasks import get
from understudy.training.critic import Fit, fit_critic, probabilities

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


def test_the_world_is_the_cards():
    world = EventsWorld(3)
    assert (len(VERBS), len(ADVERBS), len(TAILS), len(RELATIONS)) == (40, 8, 200, 5) and len(set(TAILS)) == 200
    assert (
        len(world.heads) == 320
        and world.valid_sets.sum(-1).eq(10).all()
        and set(world.types.tolist()) == set(range(16))
    )
    mass = [
        float(torch.softmax(world.preferences(h, r), 0)[world.valid_sets[world.types[h // 8], r]].sum())
        for h in range(0, 320, 7)
        for r in range(5)
    ]
    assert sum(mass) / len(mass) == pytest.approx(0.79, abs=0.03)
    relation = world.relations()["xWant"]
    assert all(world.valid(head, "xWant", tail) for head, tail in relation.examples)
    assert not world.valid("PersonX bakes bread", "xNeed", "lamp") and not world.valid("x", "xWant", "lamp")
    asked = {
        n: world.write(f"7. Robin bakes today. {r.ask.replace('PersonX', 'Robin')}", (0.0, 0.5), 1.0, 0.1)[0]
        for n, r in world.relations().items()
    }
    best = {
        n: TAILS[int(world.preferences(VERBS.index("bakes") * 8 + ADVERBS.index("today"), i).argmax())]
        for i, n in enumerate(RELATIONS)
    }
    assert asked == best
    assert world.write("11. Event:", (0.4, 0.5), 1.0, 1.0)[0] in world.heads


def test_choose_is_inversion_inside_the_nucleus():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log()
    assert [choose(logits, d, 1.0, 1.0)[0] for d in (0.1, 0.6, 0.85, 0.95)] == [0, 1, 2, 3]
    assert [choose(logits, d, 1.0, 0.6)[0] for d in (0.1, 0.8, 0.999999)] == [0, 1, 1]
    assert choose(logits, 0.9, 0.0, 1.0)[0] == 0 and choose(logits, 0.1, 1.0, 1.0)[1] == pytest.approx(
        -0.6931, abs=1e-3
    )


def test_prompts_hold_names_that_map_back():
    relation, item = load_relations()["xIntent"], Prompt.load("inference")
    requests, names = knowledge.tail_requests(item, "PersonX thanks PersonY", relation, 3, 0, "t", top_p=0.5)
    lines = requests[0].prompt.split("\n")
    assert len(lines) == 8 and "PersonX" not in requests[0].prompt and len({r.draw for r in requests}) == 3
    assert lines[-1] == f"8. {names['PersonX']} thanks {names['PersonY']}. Because {names['PersonX']} wanted:"
    _, others = knowledge.tail_requests(item, f"PersonX calls {names['PersonX']}", relation, 1, 0, "t")
    assert names["PersonX"] not in others.values()


def test_tails_are_tidied_and_empty_ones_skipped():
    names = {"PersonX": "Alex", "PersonY": "Sam"}
    texts = [" to meet Sam.", "", " . ", "to meet Sam", " Alexander's Alex", " ok"]
    asked = [("h", "xWant", names, f"id{i}") for i in range(len(texts))]
    funnel = Funnel()
    found = knowledge.sift_tails(asked, [Completion(t, "stop") for t in texts], funnel)
    assert [(t["tail"], t["times"], t["source"]) for t in found] == [
        ("to meet PersonY", 2, "id0"),
        ("Alexander's PersonX", 1, "id4"),
    ]
    assert funnel.rows[0]["dropped"] == {"empty": 2, "two characters or fewer": 1}


def test_heads_are_sifted_in_the_official_order():
    texts = [
        "PersonX runs far",
        "PersonX runs far",
        "PersonX",
        "Somebody runs",
        "PersonX <hides>",
        "PersonX swims home",
    ]
    log_probs = [-1.0, -9.0, -1.0, 0.0, -2.0, -3.0]
    answers = [Completion(f" {t}", "stop", p, 1, 3) for t, p in zip(texts, log_probs, strict=True)]
    answers.append(Completion(" PersonX is cut", "length", 0.0, 1, 12))
    funnel = Funnel()
    assert knowledge.sift_heads(answers, 1.0, False, 8, funnel) == ["PersonX runs far", "PersonX swims home"]
    assert knowledge.sift_heads(answers, 0.75, False, 8, Funnel()) == ["PersonX swims home"]  # the later −9 counts
    assert [r["after"] for r in funnel.rows] == [6, 5, 4, 4, 2]


def test_a_critic_learns_keeps_its_best_epoch_and_survives_the_disk(tmp_path):
    torch.manual_seed(0)
    pairs = [(f"PersonX {a}", f"wants {b}") for a in "abcdefgh" for b in "abcdefgh"] * 2
    labels = [int(p[0][-1] <= p[1][-1]) for p in pairs]
    model = WordPairs([w for p in pairs for w in " ".join(p).split()], 16, 32, 0.0)
    result = fit_critic(
        model, (pairs, labels), (pairs, labels), Fit(1e-2, 32, 40, warmup=5, patience=5), knowledge.naming
    )
    assert result["best_precision"] > 0.95 and result["epochs"] <= 40
    assert result["history"][result["best_epoch"]] == max(result["history"])
    model.save(tmp_path / "critic")
    views = [knowledge.naming(v) for v in range(3)]
    assert probabilities(load_pairs(tmp_path / "critic"), pairs, views) == probabilities(model, pairs, views)
    with pytest.raises(InputError, match="validation labels hold only label 1"):
        fit_critic(model, (pairs, labels), (pairs[:1], [1]), Fit(1e-2), knowledge.naming)


def test_any_sequence_classifier_is_a_critic(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    from understudy.data import train_tokenizer

    tokenizer = train_tokenizer(["PersonX wants to rest"], 300)
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    critic = load_pairs(tmp_path / "bert", dropout=0.2)
    pairs = [("PersonX runs", "wants to rest"), ("PersonX", "x")] * 2
    fit_critic(critic, (pairs, [1, 0, 1, 0]), (pairs, [1, 0, 1, 0]), Fit(1e-3, epochs=2, warmup=0), knowledge.naming)
    critic.save(tmp_path / "saved")
    views = [knowledge.naming(0)]
    again = probabilities(load_pairs(tmp_path / "saved"), pairs, views)
    assert (
        again == pytest.approx(probabilities(critic, pairs, views)) and critic.model.config.hidden_dropout_prob == 0.2
    )


COUNTED = """
import os, signal, sys
import understudy.data.knowledge_world as world
from understudy import distill
from understudy.training import Bench, DistillationTrainer
recipe, calls, moment = eval(sys.argv[1]), sys.argv[2], sys.argv[3]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
write, once, step = world.EventsWorld.write, Bench.once, DistillationTrainer.training_step
def counting(self, *args):
    answer = write(self, *args)
    with open(calls, "a") as file:
        file.write("x")
    if moment == "tails" and os.path.getsize(calls) == 900:
        die()
    return answer
def staged(self, name, make):
    def dying():
        value = make()
        if name == moment:
            die()
        return value
    return once(self, name, dying)
def stepping(self, *args, **kwargs):
    if moment == "training" and self.state.global_step == 7:
        die()
    return step(self, *args, **kwargs)
world.EventsWorld.write, Bench.once, DistillationTrainer.training_step = counting, staged, stepping
distill(recipe)
"""


def launched(recipe, calls, moment=""):
    return subprocess.run(
        [sys.executable, "-c", COUNTED, repr(recipe), str(calls), moment], capture_output=True, text=True
    )


def test_killed_in_the_middle_of_stages_it_ends_alike_and_writes_nothing_twice(tmp_path):
    whole, cut = tiny(tmp_path / "whole"), tiny(tmp_path / "cut")
    done = launched(whole, tmp_path / "calls-whole")
    assert done.returncode == 0, done.stderr
    for moment in ("tails", "critic", "training", "judged"):
        assert launched(cut, tmp_path / "calls-cut", moment).returncode == -signal.SIGKILL, moment
        assert not (tmp_path / "cut" / "evaluation.json").exists()
    assert launched(cut, tmp_path / "calls-cut").returncode == 0
    read = [json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("whole", "cut")]
    assert read[0]["metrics"] == read[1]["metrics"]
    for file in ("triples.jsonl", "training/student/model.safetensors", "critic/0/model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file
    sizes = [os.path.getsize(tmp_path / f"calls-{n}") for n in ("whole", "cut")]
    logged = len((tmp_path / "whole" / "logs" / "teacher.jsonl").read_text().splitlines()) - 1
    assert sizes[0] == logged and logged <= sizes[1] <= logged + 8  # the answers in flight at the kill


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
    rows = {n: [json.loads(x) for x in (f / "triples.jsonl").read_text().splitlines()] for n, f in filtered.items()}
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
    labels = json.loads((filtered["critic"] / "stages" / "labels.json").read_text())
    assert {t["head"] for part in labels.values() for t in part} <= heads["train"]
    assert not {t["head"] for t in labels["train"]} & {t["head"] for t in labels["validation"]}
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
    assert "<script>alert" not in render_run(folder).read_text()


def test_labels_of_people_and_a_local_teacher(tmp_path, filtered):
    """Files instead of the world: seeds, relations, labels, and a causal LM from a folder that writes."""
    words = EventsWorld(0).relations()
    relations = {n: {"text": r.text, "ask": r.ask, "examples": [list(e) for e in r.examples]} for n, r in words.items()}
    (tmp_path / "relations.yaml").write_text(yaml.safe_dump(dict(list(relations.items())[:2])))
    (tmp_path / "events.txt").write_text("\n".join(EventsWorld(0).heads[:40]))
    labels = [
        {"head": h, "relation": n, "tail": t, "label": v}
        for n in list(words)[:2]
        for h, t in words[n].examples
        for v in (2, -9)
    ]
    rows = [{**row, "tail": row["tail"] + ("" if row["label"] > 0 else " x")} for row in labels]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(load_labels(str(tmp_path / "labels.jsonl"), words)) == 28
    source = tmp_path / "teacher.py"  # a teacher of the `module` kind: the trained student of another run writes here
    assert not source.exists()
    teacher = str(Path(filtered["none"]) / "training" / "student")
    recipe = tiny(tmp_path / "run", head_keep=1.0, head_samples=40, shortest=1, labels=20, threshold_labels=8)
    recipe |= {
        "teacher": teacher,
        "data": {
            "name": str(tmp_path / "events.txt"),
            "relations": str(tmp_path / "relations.yaml"),
            "labels": str(tmp_path / "labels.jsonl"),
        },
    }
    with pytest.raises(InputError, match="written events are left and 3 splits need one each"):
        distill(recipe)  # an untrained teacher writes no event that ends and begins with PersonX
    log = (tmp_path / "run" / "logs" / "teacher.jsonl").read_text().splitlines()
    assert len(log) == 41  # what it wrote is kept


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

    run("needs a teacher that writes", data=data)
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
