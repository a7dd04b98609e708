"""ADPO and DPO as methods: unpaired KTO, soft labels, the start, options without effect, and probabilities of zero."""

import json
import math

import pytest
import torch

from engine_cases import killed_run, weights
from golden_vectors import close
from split_cases import ends_alike
from test_preferences import PAIRS, SMALL, lists, scorer
from test_preferences import anchored as trainer_over
from test_preferences import tokenizer as tokenizer
from understudy import InputError, distill
from understudy.data import Batch, collate_lists, encode_lists, mismatched
from understudy.losses import anchored, preference
from understudy.methods.adpo import ADPO
from understudy.methods.dpo import DPO
from understudy.models import ModelOutput
from understudy.targets import Scores
from understudy.training import SetupContext, TrainState

SINGLES = [
    {"prompt": "the quick", "completion": " brown fox jumps", "label": True},
    {"prompt": "the quick", "completion": " dog lazy", "label": False},
    {"prompt": "hello world", "completion": " foo", "label": True},
    {"prompt": "again", "completion": " fox and again and again", "label": False},
]


def singles(tokenizer, records=SINGLES):
    rows = [
        {"id": 10 + i, "prompt": r["prompt"], "completions": [r["completion"]], "scores": [float(r["label"])]}
        for i, r in enumerate(records)
    ]
    return encode_lists(rows, tokenizer, max_length=64)[0]


def staged(method, examples, student, tmp_path, teacher=None):
    context = SetupContext(student, teacher, {"train": examples}, collate_lists, 300, tmp_path / "store", "key")
    method.check_data(context)  # as a run does
    method.setup(context)
    return Batch.from_dict(collate_lists(list(examples.records)))


def test_mismatched_answers_are_those_of_other_prompts(tokenizer):
    examples = singles(tokenizer)
    found = mismatched(examples)
    for i, partner in enumerate((3, 3, 1, 2)):  # the second of a prompt's two answers looks further back
        ids, labels = found.records[i]["sequences"][0]
        own, own_labels = examples.records[i]["sequences"][0]
        other, other_labels = examples.records[partner]["sequences"][0]
        said = other[other_labels != -100]
        assert ids[labels != -100].equal(said) and found.records[i]["id"] == 10 + i
        asked, prompt = ids[labels == -100], own[own_labels == -100]
        assert len(asked) and asked.equal(prompt[len(prompt) - len(asked) :])
        assert len(ids) <= max(len(row["sequences"][0][0]) for row in examples.records)
    assert len(mismatched(singles(tokenizer, SINGLES[:1])).records) == 1  # alone with its own answer


def test_unpaired_kto_is_the_papers(tokenizer, tmp_path):
    student, reference, method = scorer(tokenizer, 0), scorer(tokenizer, 1), DPO(loss_type="kto", reference="teacher")
    examples = singles(tokenizer)
    batch = staged(method, examples, student, tmp_path, reference)
    assert batch.candidates.all() and batch.strays.num_items == 4
    values = method.loss(student(batch), None, batch, TrainState(student=student, step=1))["kto"].values
    with torch.no_grad():
        others = Batch.from_dict(collate_lists(list(mismatched(examples).records)))
        z = (student(others).signal.values - reference(others).signal.values).mean().clamp(min=0)
        ratio = (student(batch).signal.values - reference(batch).signal.values)[:, 0]
    good = torch.tensor([True, False, True, False])
    wanted = torch.where(good, 1 - torch.sigmoid(0.1 * (ratio - z)), 1 - torch.sigmoid(0.1 * (z - ratio)))
    close(values, wanted, rtol=1e-9)
    parameters = list(student.parameters())
    gradient = torch.autograd.grad(values.sum(), parameters)
    slope = torch.where(good, -1.0, 1.0).double() * 0.1 * wanted * (1 - wanted)
    alone = torch.autograd.grad((student(batch).signal.values[:, 0] * slope).sum(), parameters)
    for a, b in zip(gradient, alone, strict=True):  # z has no gradient
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_labels_that_outweigh_the_others_are_said(tokenizer, tmp_path, caplog):
    rows = [{**SINGLES[i % 4], "label": i < 6} for i in range(8)]
    for weight, said in ((1.0, "3.00 times the 2 others"), (1 / 3, ""), (0.25, "0.75 times"), (0.4, "")):
        caplog.clear()
        method = DPO(loss_type="kto", desirable_weight=weight)
        staged(method, singles(tokenizer, rows), scorer(tokenizer), tmp_path)
        assert said in caplog.text and bool(caplog.text) == bool(said)
    caplog.clear()
    staged(DPO(loss_type="kto"), singles(tokenizer, rows[:6]), scorer(tokenizer), tmp_path)  # one label alone is fine
    assert not caplog.text


def test_any_split_of_a_batch_of_unpaired_kto_gives_the_same_update(tokenizer, tmp_path):
    """Its KL is that of the whole update."""
    examples = singles(tokenizer)
    student = scorer(tokenizer, 0)
    method = DPO(loss_type="kto", beta=5.0, reference="teacher")
    staged(method, examples, student, tmp_path, scorer(tokenizer, 1))
    state = TrainState(student=student)
    sums = [method.update_sums(Batch.from_dict(collate_lists([row])), state)["strays"] for row in examples.records]
    whole = method.update_sums(Batch.from_dict(collate_lists(list(examples.records))), state)["strays"]
    close(torch.stack(sums).sum(0), whole, rtol=1e-6)
    assert whole[0] > 0 and len({float(s[0] > 0) for s in sums}) == 2, "a micro-batch by itself has another KL"

    def trainer_of(micro, accumulate):
        return trainer_over(method, tokenizer, tmp_path / f"{micro}", micro, accumulate, examples=singles(tokenizer))

    ends_alike(trainer_of, ((4, 1), (2, 2), (1, 4)))


def test_supervised_training_imitates_no_answer_that_is_labelled_false(tokenizer):
    from understudy.methods.sft import SFT

    student, examples = scorer(tokenizer, 0), singles(tokenizer)
    batch = Batch.from_dict(collate_lists(list(examples.records)))
    values = SFT().loss(student(batch), None, batch, TrainState())["ce"].values
    assert values[[1, 3]].tolist() == [0, 0] and (values[[0, 2]] > 0).all()
    right = Batch.from_dict(collate_lists([examples.records[i] for i in (0, 2)]))
    assert SFT().counts(batch) == SFT().counts(right)


def test_unpaired_kto_in_one_command_starts_at_a_half(tmp_path):
    rows = [{**SINGLES[i % 4], "prompt": f"{SINGLES[i % 4]['prompt']} {i}"} for i in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"name": str(tmp_path / "x.jsonl"), "max_length": 64, "vocab_size": 300}
    recipe = {**SMALL, "data": data, "method": "dpo", "output": str(tmp_path / "run")}
    distill({**recipe, "options": {"loss_type": "kto"}})
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] <= 0.5 + 1e-6 and first["loss"] == pytest.approx(0.5, abs=0.02)
    recorded = [{**r, "log_probs": [-3.0]} for r in rows]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in recorded))
    with pytest.raises(InputError, match=r"options\.reference to start or teacher"):
        distill({**recipe, "options": {"loss_type": "kto", "reference": "recorded"}, "output": str(tmp_path / "other")})
    mixed = [*rows, {"prompt": "a", "completions": [" b", " c"], "scores": [1, 0]}] * 2
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in mixed))
    with pytest.raises(InputError, match=r"2 candidates and .* others have one"):
        distill({**recipe, "options": {"loss_type": "kto"}, "output": str(tmp_path / "third")})


@pytest.mark.slow
def test_unpaired_kto_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    rows = [{**SINGLES[i % 4], "prompt": f"{SINGLES[i % 4]['prompt']} {i}"} for i in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"name": str(tmp_path / "x.jsonl"), "max_length": 64, "vocab_size": 300}
    recipe = {**SMALL, "data": data, "method": "dpo", "options": {"loss_type": "kto"}}
    distill({**recipe, "output": str(tmp_path / "whole")})
    cut = {**recipe, "output": str(tmp_path / "cut")}
    assert killed_run(cut, 5, "after")
    distill(cut)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_moving_anchor_shows_collapse_too():
    state = TrainState(companions={"anchor": lambda batch: rows_of(torch.tensor([[-4.0, -4.0]]).double())}, step=1)
    batch, values = listed([[1.0, 0.0]], [None]), torch.tensor([[-5.0, -6.0]]).double()
    terms = ADPO(anchor="ema").loss(rows_of(values), None, batch, state)
    assert [terms[f"rewards/{side}"].values.item() for side in ("chosen", "rejected")] == [-1.0, -2.0]


def rows_of(values):
    return ModelOutput(Scores(values, torch.ones_like(values, dtype=torch.bool)))


def listed(scores, reference):
    rows = [
        {
            "id": 7 + i,
            "scores": s,
            "reference": r,
            "sequences": [(torch.tensor([1, 5, 6]), torch.tensor([-100, 5, 6]))] * len(s),
        }
        for i, (s, r) in enumerate(zip(scores, reference, strict=True))
    ]
    return Batch.from_dict(collate_lists(rows))


def test_smoothing_of_zero_is_dpo():
    batch, values = listed([[1.0, 0.0]], [[-3.0, -4.0]]), torch.tensor([[-2.0, -6.0]]).double()
    at = TrainState(step=1)
    plain = DPO().loss(rows_of(values), None, batch, at)["dpo"].values
    for name in ("cdpo", "robust"):
        none = DPO(loss_type=name, label_smoothing=0.0).loss(rows_of(values), None, batch, at)[name].values
        some = DPO(loss_type=name).loss(rows_of(values), None, batch, at)[name].values
        close(none, plain)
        assert (some - plain).abs() > 1e-3


def test_soft_labels_and_the_distance_to_the_target():
    q = torch.tensor([[0.7, 0.2, 0.1]]).double()
    batch, values = listed(q.tolist(), [[-3.0, -4.0, -5.0]]), torch.tensor([[-2.0, -6.0, -4.0]]).double()
    terms = ADPO(target="given", tau=0.5).loss(rows_of(values), None, batch, TrainState(step=1))
    close(terms["adpo"].values, anchored.anchored_cross_entropy(values, batch.reference, q, tau=0.5))
    assert terms["kl"].weight == 0 and terms["kl"].values.requires_grad is False
    close(terms["kl"].values, terms["adpo"].values + (q * q.log()).sum(-1))
    best = batch.reference + 0.5 * q.log()
    close(
        ADPO(target="given", tau=0.5).loss(rows_of(best), None, batch, TrainState(step=1))["kl"].values,
        torch.zeros(1).double(),
    )


def test_scores_keep_their_order_beyond_single_precision():
    batch = listed([[16777217.0, 16777216.0]], [[-3.0, -3.0]])
    assert batch.best.tolist() == [0] and batch.worst.tolist() == [1] and batch.scores[0, 0] > batch.scores[0, 1]


@pytest.mark.parametrize("method", [DPO(), DPO(loss_type="kto"), ADPO()])
def test_a_student_that_is_not_its_reference_at_the_start_is_refused(method):
    batch, values = listed([[1.0, 0.0]], [[-3.0, -4.0]]), torch.tensor([[-3.0, -4.5]]).double()
    with pytest.raises(InputError, match=r"differ from their stored reference by 12.5% before the first step"):
        method.loss(rows_of(values), None, batch, TrainState(step=0))
    method.loss(rows_of(values), None, batch, TrainState(step=1))  # later it is what training does
    start = method.loss(rows_of(batch.reference.clone()), None, batch, TrainState(step=0))
    first = next(iter(start.values())).values
    if method.name == "dpo":
        close(first, torch.full((1,), math.log(2) if method.loss_type == "dpo" else 0.5, dtype=torch.float64))
    else:
        close(first, torch.full((1,), math.log(2), dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("method", [DPO(), DPO(loss_type="kto"), DPO(loss_type="orpo"), ADPO()])
def test_a_probability_of_zero_is_named_by_its_example(method):
    batch = listed([[1.0, 0.0], [1.0, 0.0]], [[-3.0, -4.0]] * 2)
    values = torch.tensor([[-3.0, -4.0], [-3.0, -math.inf]]).double()
    with pytest.raises(InputError, match=r"candidate 1 of example 8 the log-probability -inf"):
        method.loss(rows_of(values), None, batch, TrainState(step=1))


def test_a_reference_that_gives_probability_zero_is_named(tokenizer, tmp_path, monkeypatch):
    from understudy.models import SequenceAdapter

    answer = SequenceAdapter.answer

    def broken(self, batch, features):
        rows = answer(self, batch, features)
        return ModelOutput(Scores(rows.signal.values.masked_fill(batch.ids[:, None] == 2, -math.inf), rows.signal.mask))

    monkeypatch.setattr(SequenceAdapter, "answer", broken)
    with pytest.raises(InputError, match="The reference gives candidate 0 of train example 2 the log-probability -inf"):
        staged(DPO(), lists(tokenizer), scorer(tokenizer), tmp_path)


def test_a_reference_that_nothing_reads_is_said(tokenizer, tmp_path, caplog):
    staged(DPO(loss_type="simpo", reference="recorded"), lists(tokenizer), scorer(tokenizer), tmp_path)
    assert "simpo has no reference: options.reference=recorded is ignored" in caplog.text
    caplog.clear()
    staged(DPO(loss_type="simpo"), lists(tokenizer), scorer(tokenizer), tmp_path)
    assert not caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 1.0},
        {"nll_weight": 0.5, "loss_type": "simpo"},
        {"desirable_weight": 2.0},
        {"length": "mean", "loss_type": "kto"},
        {"label_smoothing": 0.0},
    ],
)
def test_options_without_effect_are_refused(options):
    with pytest.raises(ValueError, match="has no effect with loss_type"):
        DPO(**options)


ONE = [{"prompt": "a", "completion": f" {i}", "label": i % 2} for i in range(20)]
THREE = [{"prompt": "a", "completions": [" b", " c", " d"], "scores": [0.5, 0.2, 0.1]}] * 20
SAME = [{"prompt": "a", "completions": [" b", " c"], "scores": [1, 1]}] * 20
BAD = {
    "one candidate": (ONE, "adpo", {}, "every training example has one candidate"),
    "pairs alone": (THREE, "adpo", {"target": "bradley_terry"}, "is for pairs and train example 0 has 3 candidates"),
    "no distribution": (THREE, "adpo", {"target": "given"}, r"are \[0.5, 0.2, 0.1\]: they must be ≥ 0 and sum to 1"),
    "no better side": (SAME, "dpo", {"loss_type": "kto"}, "no better and worse"),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_do_not_fit_are_refused_before_training(case, tmp_path):
    records, method, options, says = BAD[case]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    data = {"name": str(tmp_path / "x.jsonl"), "max_length": 64, "vocab_size": 300}
    with pytest.raises(InputError, match=says) as caught:
        distill({**SMALL, "data": data, "method": method, "options": options, "output": str(tmp_path / "run")})
    assert "\n" not in str(caught.value)


def test_equal_candidates_teach_dpo_nothing_and_cost_ln_two(tokenizer, tmp_path):
    examples = lists(tokenizer, [{**PAIRS[0], "rejected": PAIRS[0]["chosen"]}])
    student = scorer(tokenizer)
    batch = staged(DPO(), examples, student, tmp_path)
    value = DPO().loss(student(batch), None, batch, TrainState(student=student))["dpo"].values
    close(value, torch.full((1,), math.log(2), dtype=torch.float64))
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(value.sum(), list(student.parameters())))
    ipo = preference.ipo(*[torch.zeros(1)] * 4, beta=0.2)
    close(ipo, torch.full((1,), 1 / (4 * 0.2**2)))
