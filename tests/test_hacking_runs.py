"""Runs with an oracle: what they measure and show; where the texts come from; the world whose truth is known."""

import json

import pytest
import torch

from engine_cases import killed_run, weights
from own_texts import batches, examples, rows, words
from understudy import distill
from understudy.data import Batch, collate_text
from understudy.errors import InputError
from understudy.evaluation.hacking import Curve
from understudy.generation.decoding import sample
from understudy.reporting.hacking import judged
from understudy.runs.recipe import make
from understudy.training import OnPolicy, Rollouts

NEW = "llama:hidden=16,layers=1,heads=2,context=32"
KD = {"divergence": "forward_kl", "temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0}
OFFLINE = {"fraction": 1.0, "teacher_share": 1.0, "generations": 1, "steps": 1, "max_new_tokens": 8}


def world(output, **keys):
    base = {
        "task": "text_world",
        "options": KD,
        "data": {"name": "letters", "prompts": 8, "texts": 64, "held_out": 12},
        "teacher": {"model": NEW, "train": {"max_steps": 4, "per_device_train_batch_size": 16}},
        "student": NEW,
        "oracle": {"model": "oracle", "prompts": 10, "max_new_tokens": 8},
        "on_policy": OFFLINE,
        "trainer": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "eval_on_start": True,
            "save_steps": 2,
            "logging_steps": 1,
        },
        "output": str(output),
    }
    return {**base, **keys}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = distill(world(folder))
    torch.set_num_threads(threads)
    return folder, result


def test_a_run_with_an_oracle_measures_and_draws_both_distances(done):
    folder, result = done
    seen = lines(folder / "validation.jsonl")
    assert [line["step"] for line in seen] == [0, 2, 4, 6]
    assert all(line["golden"] > 0 and line["proxy"] > 0 for line in seen)
    assert len({line["teacher_golden"] for line in seen}) == 1
    assert seen[-1]["proxy"] < seen[0]["proxy"]
    metrics = result.metrics
    assert metrics["golden"] > 0 and metrics["hacking"] in (0.0, 1.0) and metrics["golden_rise"] >= 0
    report = (folder / "report.html").read_text()
    assert "Golden against proxy" in report and "teacher hacking" in report.lower()
    assert "without an end within oracle.max_new_tokens" in report
    assert json.loads((folder / "run.json").read_text())["hashes"]["oracle"]


@pytest.mark.slow
def test_killed_and_resumed_measures_and_keeps_the_same(done, tmp_path):
    """Texts that are kept for all epochs are in the checkpoint."""
    folder, _ = done
    cut = world(tmp_path / "cut")
    assert killed_run(cut, 3, "after") and killed_run(cut, 5, "before")
    distill(cut)
    ours, theirs = weights(folder), weights(tmp_path / "cut")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert lines(folder / "validation.jsonl") == lines(tmp_path / "cut" / "validation.jsonl")
    written = [len(lines(f / "samples.jsonl")) for f in (folder, tmp_path / "cut")]
    assert written == [8, 8]  # one text a prompt, whatever the epochs


def test_a_teacher_that_is_the_truth_cannot_be_hacked(tmp_path):
    result = distill(world(tmp_path / "run", teacher="oracle"))
    for line in lines(tmp_path / "run" / "validation.jsonl"):
        assert line["golden"] == line["proxy"] and line["teacher_golden"] == pytest.approx(0, abs=1e-5)
    assert result.metrics["golden"] == result.metrics["proxy"] and result.metrics["hacking"] == 0


@pytest.mark.parametrize(
    "golden,proxy,says",
    [
        ([2.0, 1.0, 1.5], [2.0, 1.5, 1.0], "Teacher hacking: golden ends 50% above its least, 1.000 at step 1"),
        ([2.0, 1.0, 1.5], [2.0, 1.5, 1.6], "No teacher hacking: golden ends 50.0% above"),
        ([3.0, 2.0, 1.0], [3.0, 2.0, 1.0], "No teacher hacking: golden is at its least, 1.000 at step 2"),
    ],
)
def test_what_the_report_says(golden, proxy, says):
    said = judged(Curve([0, 1, 2], golden, proxy, [None] * 3, 0.5))
    assert said.startswith(says) and "power law" not in said
    steps = list(range(1, 30))
    falling = [s**-0.5 for s in steps]
    longer = Curve(steps, falling, falling, [None] * 29, 0.5)
    assert "follows the power law" in judged(longer)
    stuck = longer._replace(proxy=[max(v, 0.4) for v in falling])
    assert "has left, by step" in judged(stuck)


# -- where the texts come from ------------------------------------------------------------------------------------------


def epochs(number, tokenizer, student, teacher, **policy):
    """The tokens of every example in each epoch of four updates."""
    mine = Rollouts(
        OnPolicy(**{"fraction": 1.0, "max_new_tokens": 6, "steps": 2, "teacher_share": 1.0, **policy}),
        student,
        tokenizer,
        collate_text,
        seed=7,
        total=4 * number,
        teacher=teacher,
    )
    items, found = examples(tokenizer), []
    for epoch in range(number):
        mine.epoch = epoch
        stream = batches(items, 4)
        taken = [Batch.from_dict(mine.take(stream, 1, 4 * epoch + i)[0]) for i in range(4)]
        found.append([ids.tolist() for batch in taken for ids, _ in batch.contents])
        assert all((batch.row_labels >= 0).all() and batch.source.all() for batch in taken)
    return found, mine.logs()["on_policy"]["written"]


@pytest.fixture(scope="module")
def sides():
    tokenizer = words()
    return tokenizer, rows(tokenizer, seed=3), rows(tokenizer, seed=8)


def test_offline_online_and_in_between(sides):
    """The first epoch of all is one; then one text is used again, or two in turn, or a new one is written."""
    offline, few = epochs(4, *sides, generations=1)
    twice, more = epochs(4, *sides, generations=2)
    online, most = epochs(4, *sides)
    kept, _ = epochs(4, *sides, generations=4)
    assert offline == [offline[0]] * 4 and (few, more, most) == (16, 32, 64)
    assert twice[0] == twice[2] == online[0] == offline[0] and twice[1] == twice[3] == online[1] != online[0]
    assert kept == online  # a text for every epoch is online data, bit for bit


def test_texts_of_the_teacher_are_its_own_and_labels(sides):
    tokenizer, student, teacher = sides
    first = epochs(1, tokenizer, student, teacher, temperature=0.0)[0][0]
    prompts = [
        item["input_ids"][: int((item["labels"] != -100).int().argmax())].tolist() for item in examples(tokenizer)
    ]
    settings = {"most": 6, "vocabulary": len(tokenizer), "ends": {tokenizer.eos_token_id}, "pad": 0}
    wanted = sample(teacher.model, prompts, torch.arange(16), temperature=0.0, **settings)
    assert first == [p + t for p, t in zip(prompts, wanted, strict=True)]
    assert first != epochs(1, tokenizer, student, student, temperature=0.0)[0][0]


def test_mixed_tokens_follow_the_mixture(sides):
    """At every place α p + (1 − α) q, with caches of both sides and prompts of any length."""
    tokenizer, student, teacher = sides
    prompts, share = [[1, 20, 7], [1, 30]] * 4000, 0.3
    texts = sample(
        student.model,
        prompts,
        torch.arange(len(prompts)),
        most=2,
        vocabulary=len(tokenizer),
        ends=set(),
        pad=0,
        in_flight=8000,
        teacher=teacher.model,
        teacher_share=share,
    )
    for start in (0, 1):
        told = prompts[start]
        first = torch.tensor([text[0] for text in texts[start::2]])
        top = int(first.mode().values)
        second = torch.tensor([text[1] for text in texts[start::2] if text[0] == top])
        for prefix, drawn in ((told, first), ([*told, top], second)):
            p, q = (
                m.model(input_ids=torch.tensor([prefix])).logits[0, -1].detach().softmax(-1) for m in (teacher, student)
            )
            wanted = share * p + (1 - share) * q
            shares = drawn.bincount(minlength=len(tokenizer)) / len(drawn)
            assert (shares - wanted).abs().max() < 4 * (0.25 / len(drawn)) ** 0.5


@pytest.mark.parametrize(
    "keys,says",
    [
        ({"on_policy": {"generations": 2}}, "set teacher_share=1"),
        ({"on_policy": {**OFFLINE, "replay": {}}}, "leave one of them out"),
        ({"on_policy": {"teacher_share": 0.2, "engine": "continuous"}}, "engine=padded alone"),
        ({"oracle": {"model": "oracle", "train": {"max_steps": 3}}}, "train: an oracle is one model"),
        ({"oracle": {"model": "oracle", "promts": 3}}, "Did you mean 'prompts'"),
        (
            {"method": "sft", "options": {}, "teacher": None, "on_policy": None},
            "method 'sft' has no teacher in its steps",
        ),
        (
            {
                "task": "image_classification",
                "data": "digits",
                "on_policy": None,
                "student": "mlp:4",
                "teacher": "mlp:4",
            },
            "task: leave it out",
        ),
        ({"data": {"name": "words"}}, "No world 'words'"),
    ],
)
def test_what_is_refused(keys, says, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        distill(make({k: v for k, v in world(tmp_path / "run", **keys).items() if v is not None}))
    assert "\n" not in str(error.value)
