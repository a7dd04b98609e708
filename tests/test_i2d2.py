"""Paper 15 as a procedure: rounds that resume, filters, people's labels and own phrases, the report, bad input."""

import json

import pytest
import torch

from understudy import InputError, compare, distill
from understudy.curation.generics import Form, StatementPrompt, likeliest_prompts, statement_prompts
from understudy.data.knowledge import generic_words
from understudy.data.text import write_records
from understudy.generation import Prompt
from understudy.generation.constrained import BeamSettings
from understudy.generation.constrained_source import (
    ConstrainedRequest,
    ConstrainedSource,
    constraints,
    forms,
    found_texts,
    text_log_probs,
)
from understudy.models.pairs import words
from understudy.runs.recipe import make
from understudy.synthetic.generics import GenericsWorld
from understudy.tasks import get
from understudy.tasks import statement_generation as task
from understudy.training import DistillationTrainer, PipelineContext

TINY = {
    "method": "i2d2",
    "task": "statement_generation",
    "data": {"sentences": 1500},
    "student": "llama:hidden=16,layers=1,heads=2,init=0.1",
    "options": {
        "rounds": 2,
        "prompts": 2,
        "texts": 4,
        "num_beams": 4,
        "max_tokens": 5,
        "labels": 120,
        "threshold_labels": 60,
        "threshold": 0.0,
        "critic": {"epochs": 2, "views": 1},
    },
    "trainer": {"max_steps": 6, "per_device_train_batch_size": 16, "save_steps": 2, "logging_steps": 2},
}


def valid(world, concept, relation, completion):
    """A truth that a model which has hardly been trained hits now and then."""
    return (len(concept) + len(completion)) % 2 == 0


@pytest.fixture(scope="module", autouse=True)
def short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(task._START, "max_steps", 30)
        patch.setattr(GenericsWorld, "valid", valid)
        yield


def tiny(output, **options):
    return {**TINY, "output": str(output), "options": {**TINY["options"], **options}}


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def interrupt(monkeypatch, folder, moment, calls):
    """Raise `Killed` at the end of a stage before it is written, in the second batch of texts, or in a training's step 3."""
    write, once, step = ConstrainedSource.write, PipelineContext.stage, DistillationTrainer.training_step

    def writing(self, requests, prompts):
        answers = write(self, requests, prompts)
        calls.extend(r.key(self.name) for r in requests)
        if moment == "writing" and len(calls) > 16:
            raise Killed
        return answers

    def staged(self, name, kind, make):
        def made(funnel):
            value = make(funnel)
            if self.prefix + name == moment:
                raise Killed
            return value

        return once(self, name, kind, made)

    def stepping(self, *args, **kwargs):
        if str(self.args.output_dir).startswith(str(folder / str(moment))) and self.state.global_step == 3:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ConstrainedSource, "write", writing)
    monkeypatch.setattr(PipelineContext, "stage", staged)
    monkeypatch.setattr(DistillationTrainer, "training_step", stepping)


@pytest.mark.slow
def test_interrupted_at_every_stage_it_ends_alike_and_writes_nothing_twice(tmp_path):
    whole, cut, calls = tiny(tmp_path / "whole"), tiny(tmp_path / "cut"), []
    distill(whole)
    moments = ("start", "prompts", "writing", "round-0/distinct", "labels", "critic", "round-0/scores", "round-0/kept")
    for moment in (*moments, "round-0/training", "round-1/written", "round-1/training", "round-2/kept"):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, tmp_path / "cut", moment, calls)
            with pytest.raises(Killed):
                distill(cut)
        assert not (tmp_path / "cut" / "evaluation.json").exists()
    distill(cut)
    read = [json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("whole", "cut")]
    # Texts are written in batches that an interruption cuts: the last bit of a log-probability may depend on the batch.
    assert read[0]["metrics"] == pytest.approx(read[1]["metrics"], rel=1e-6)
    assert read[0]["tables"] == read[1]["tables"]  # the funnel and the samples too
    for file in ("corpus/train.jsonl", "critic/0/model.safetensors", "round-1/training/student/model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file
    logs = [(tmp_path / f"cut/logs/round-{n}/statements.jsonl").read_text().splitlines()[1:] for n in range(3)]
    assert [len({json.loads(x)["key"] for x in log}) for log in logs] == [len(log) for log in logs] == [120] * 3
    assert len(calls) - len(set(calls)) <= 64  # at most what was in flight in `ask_trained`


@pytest.fixture(scope="module")
def filtered(tmp_path_factory, short):
    root = tmp_path_factory.mktemp("filters")
    runs = {
        "critic": tiny(root / "critic", rounds=1, threshold=0.3),
        "none": tiny(root / "none", rounds=0, filter="none"),
        "sample": tiny(root / "sample", rounds=0, filter="none", decoding="sample"),
        "oracle": tiny(root / "oracle", rounds=0, filter="oracle", texts=8, num_beams=8, prompts=6),
    }
    return {name: distill(recipe).folder for name, recipe in runs.items()}


def lines(folder, name):
    return [json.loads(x) for x in (folder / "stages" / f"{name}.jsonl").read_text().splitlines()]


def metrics(folder):
    return json.loads((folder / "evaluation.json").read_text())["metrics"]


def test_filters_and_constraints_keep_what_they_say(filtered):
    folder = filtered["critic"]
    written, scored, kept = (lines(folder, f"round-1/{n}") for n in ("written", "scores", "kept"))
    form, own = Form(), generic_words()
    for row in written:
        tail = words(row["tail"])
        assert row["wrong"] is not None or (
            sum(w in own["function_words"] for w in tail) <= form.most_function
            and not set(tail) & set(own["connectives"])
        )
    assert {s["id"] for s in kept} == {s["id"] for s in scored if s["score"] >= 0.3}
    assert len({(s["head"], s["relation"], s["tail"]) for s in scored}) == len(scored)
    found = metrics(folder)
    assert found["cutoff"] == 0.3 and found["accepted_1"] == len(kept) / len(scored)
    world = GenericsWorld(0)
    held = [s for s in scored if s["split"] == "test"]
    true = [world.valid(s["head"], s["relation"], s["tail"]) for s in held]
    assert found["accuracy"] == pytest.approx(sum(true) / len(true)) and found["distinct_true"] == sum(true)
    labels = {t["head"] for t in lines(folder, "labels")}
    assert labels and not labels & {s["head"] for s in held}
    assert metrics(filtered["oracle"])["kept_accuracy"] == 1
    corpus = [json.loads(x) for x in (folder / "corpus/train.jsonl").read_text().splitlines()]
    both = {(s["head"], s["relation"], s["tail"]) for n in (0, 1) for s in lines(folder, f"round-{n}/kept")}
    assert len(corpus) == len(both) == found["corpus_size"]
    assert all(row["completion"].startswith(" ") and row["completion"].endswith(".") for row in corpus)
    assert metrics(filtered["sample"])["well_formed"] < metrics(filtered["none"])["well_formed"]
    assert "What the model wrote after so many rounds" in (folder / "report.html").read_text()


def test_labels_of_people_a_pretrained_model_and_own_phrases(filtered, tmp_path):
    """What a run without critic writes for labelling is what a run with one reads."""
    model = str(filtered["critic"] / "start" / "student")
    (tmp_path / "concepts.txt").write_text("\n".join(GenericsWorld(0).concepts[::4]))
    (tmp_path / "phrases.txt").write_text("need\nlike\n")
    data = {"name": str(tmp_path / "concepts.txt"), "relations": str(tmp_path / "phrases.txt")}
    shared = {"student": model, "data": data}
    quick = {"quantifiers": [""], "prompts": 2}
    bare = distill({**tiny(tmp_path / "bare", rounds=0, filter="none", **quick), **shared})
    assert "accuracy" not in bare.metrics and bare.metrics["corpus_size"] > 0
    rows = [json.loads(x) for x in (tmp_path / "bare" / "to_label.jsonl").read_text().splitlines()]
    assert rows and all(r["label"] is None for r in rows)
    write_records(tmp_path / "labels.jsonl", [{**r, "label": i % 2} for i, r in enumerate(rows)])
    labelled = {**data, "labels": str(tmp_path / "labels.jsonl")}
    done = distill({**tiny(tmp_path / "run", rounds=1, **quick), **shared, "data": labelled})
    assert done.metrics["well_formed_0"] == bare.metrics["well_formed"] and "accepted_1" in done.metrics
    strict = {**tiny(tmp_path / "strict", rounds=1, threshold=1.0, **quick), **shared, "data": labelled}
    with pytest.raises(InputError, match="well-formed statements of round 0 is kept"):
        distill(strict)
    assert not (tmp_path / "strict" / "round-0").exists()  # nothing was trained on nothing


def test_a_source_answers_with_texts_under_constraints(filtered):
    model = str(filtered["critic"] / "start" / "student")
    source = ConstrainedSource.load(model)
    settings = BeamSettings(num_beams=6, min_new_tokens=0, no_repeat_ngram_size=0)
    how = {"max_tokens": 8, "stop": (".",), "search": settings, "texts": 3}
    request = ConstrainedRequest(
        "young owls need", "x", clauses=((("apple", True), ("anchor", True)), (("the", False),)), **how
    )
    found = found_texts(source.complete(request))
    assert len(found) == 3 and all(
        {"apple", "anchor"} & set(words(t.text)) and "the" not in words(t.text) and not t.unmet for t in found
    )
    assert found == found_texts(source.complete(request)) and "." not in found[0].text
    assert request.key("s") != ConstrainedRequest("young owls need", "x", **how).key("s")
    asked = constraints(source.tokenizer, request)
    assert {x.positive for x in asked.clauses[0]} == {True} and {x.positive for x in asked.clauses[1]} == {False}
    decoded = {source.tokenizer.decode(f) for f in forms(source.tokenizer, "need")}
    assert decoded == {" need", " Need"}
    (value, number), *_ = text_log_probs(source.model, source.tokenizer, ["young owls need", "old"])
    ids = torch.tensor([source.tokenizer("young owls need")["input_ids"]])
    ids = ids[:, :-1] if int(ids[0, -1]) == source.tokenizer.eos_token_id else ids
    with torch.no_grad():
        expected = source.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    assert value == pytest.approx(float(expected), abs=1e-4) and number == ids.shape[1] - 1


def test_prompts_are_ranked_by_perplexity():
    from understudy.curation import Funnel

    every = statement_prompts(Prompt.load("generic"), ["dogs", "to rest"], ["can", "need"], ["", "Usually,"])
    assert [p.text for p in every[:3]] == ["dogs can", "Usually, dogs can", "dogs need"] and len(every) == 8
    scores = [(-4.0, 2), (-3.0, 3), (-1.0, 1), (-2.0, 2)] + [(-1.0, 1)] * 4
    funnel = Funnel()
    best = likeliest_prompts(every, scores, 2, funnel)
    assert [p.text for p in best] == ["Usually, dogs can", "dogs need", "to rest can", "Usually, to rest can"]
    assert isinstance(best[0], StatementPrompt) and best[0].perplexity == pytest.approx(2.718281828)
    assert funnel.rows == [{"step": "likely prompts", "before": 8, "after": 4, "dropped": {"less likely": 4}}]


def test_imitating_own_samples_moves_nothing_in_expectation():
    """Limit 8: with all samples accepted, the expected gradient of their log-likelihood is zero."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=draw, dtype=torch.float64).requires_grad_()
    own = torch.multinomial(logits.detach().softmax(0), 200_000, replacement=True, generator=draw)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits.expand(len(own), 5), own), logits)
    assert gradient.abs().max() < 5e-3
    kept = own[own < 2]  # a filter moves it towards what is kept
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits.expand(len(kept), 5), kept), logits)
    assert (gradient[:2] < -1e-2).all() and (gradient[2:] > 1e-3).all()


def test_bad_input_is_one_line_before_anything_is_written(tmp_path):
    (tmp_path / "concepts.txt").write_text("dogs\ncats\nbirds\n")
    (tmp_path / "labels.jsonl").write_text(json.dumps({"head": "h", "relation": "nope", "tail": "t", "label": 1}))
    data = {"name": str(tmp_path / "concepts.txt")}

    def run(says, **keys):
        options = {**TINY["options"], **keys.pop("options", {})}
        with pytest.raises(InputError, match=says) as caught:
            distill({**TINY, "output": str(tmp_path / "bad"), **keys, "options": options})
        assert "\n" not in str(caught.value) and not (tmp_path / "bad" / "stages").exists()
        (tmp_path / "bad" / "recipe.yaml").unlink(missing_ok=True)

    run("needs labels for the critic: set data.labels", data=data)
    run("is new and knows nothing", data=data, options={"filter": "none"})
    run("filter=oracle needs data whose truth", data=data, options={"filter": "oracle"})
    run("relation 'nope' is none of", data={**data, "labels": str(tmp_path / "labels.jsonl")})
    run("data.sentences belongs to generics_world", data={**data, "sentences": 5})
    run("data.relations has no effect on generics_world", data={"relations": "x"})
    run(r"data.relations '.*nope' is not a file", data={**data, "relations": str(tmp_path / "nope")})
    run("Did you mean 'sentences'", data={"sentence": 5})
    run("Prompt 'nope' is neither a file", options={"prompt": "nope"})
    run("Did you mean 'num_beams'", options={"num_beam": 5})
    run("options.log shares", options={"log": "x"})
    run("form.most_functions", options={"form": {"most_functions": 5}})
    with pytest.raises(InputError, match="works on statements tasks"):
        make({"method": "i2d2", "task": "language_modeling"})


def test_the_task_checks_out_and_shows_its_concepts():
    recipe = make({"method": "i2d2", "task": "statement_generation"})
    prepared = get("statement_generation").prepare(recipe)
    assert prepared.train[0] == "young wolves" and prepared.hashes["data"] and recipe.teacher is None
    for call in ("model", "evaluate"):
        with pytest.raises(InputError, match="statement_generation are"):
            getattr(get("statement_generation"), call)(None, None, None)


@pytest.mark.slow
def test_arms_that_train_nothing_are_compared(tmp_path):
    """No round is no training: the run has no cost of its own, and the report no bar of where time went."""
    still = {"rounds": 0, "filter": "none"}
    arms = {
        name: {"method": "i2d2", "options": {**TINY["options"], **still, "decoding": name}}
        for name in ("beam", "sample")
    }
    found = compare({**tiny(tmp_path), "options": {}}, seeds=1, arms=arms, workers=1)
    assert [row["cost"]["steps"] for row in found.data["runs"]] == [0, 0]
    assert "Where the time goes" not in (tmp_path / "report.html").read_text()


def test_a_pretrained_student_is_not_judged_by_the_made_up_world():
    recipe = {"method": "i2d2", "task": "statement_generation"}
    assert make(recipe).data["name"] == "generics_world"
    assert make({**recipe, "student": "llama:hidden=32,layers=1,heads=2"}).data["name"] == "generics_world"
    pretrained = {**recipe, "student": "org/model"}
    assert make({**pretrained, "options": {"filter": "none"}}).data["name"] == "generics"
    assert make({**pretrained, "data": "generics_world"}).data["name"] == "generics_world"  # who asks for it has it
