"""Baselines of white-box distillation of language models: GKD, SeqKD, DistiLLM, MiniLLM."""

import itertools
import json
import math

import pytest
import torch

from own_texts import examples, recipe, rows, words, write_set
from understudy import distill
from understudy.data import Batch, collate_text
from understudy.data.samples import Sample, sampled_row
from understudy.errors import InputError
from understudy.generation.decoding import sample
from understudy.losses import reverse_kl
from understudy.losses.policy_gradient import future_rewards, importance_weights, long_part
from understudy.methods import get
from understudy.models import ModelOutput, load_causal_lm, load_tokenizer
from understudy.runs.recipe import make
from understudy.targets import Dense
from understudy.training import OnPolicy, TrainState

V, T = 3, 3


# -- GKD ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gkd_has_the_values_and_gradients_of_trl(beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd")
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(3, 5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 7, (3, 5), generator=g)
    labels[:, 0], labels[2, 3:] = -100, -100
    batch = Batch({"input_ids": labels.clamp(min=0)}, labels, torch.arange(3))
    mine, theirs = (student.clone().requires_grad_() for _ in range(2))
    method = get("gkd")(beta=beta, temperature=temperature)
    sides = [ModelOutput(Dense(batch.select(side))) for side in (mine, teacher)]
    found = method.loss(*sides, batch, TrainState())["jsd"].values.mean()
    wanted = gkd.GKDTrainer.generalized_jsd_loss(
        theirs[:, :-1], teacher[:, :-1], labels=labels[:, 1:], beta=beta, temperature=temperature
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    found.backward(), wanted.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


# -- MiniLLM ------------------------------------------------------------------------------------------------------------


def every_text(logits):
    """All texts of T tokens with log-probabilities `[texts, T, V]` under a model that reads the whole beginning."""
    texts = list(itertools.product(range(V), repeat=T))
    starts = {start: i for i, start in enumerate(s for n in range(T) for s in itertools.product(range(V), repeat=n))}
    at = torch.tensor([[starts[text[:t]] for t in range(T)] for text in texts])
    return torch.tensor(texts), logits.log_softmax(-1)[at]


@pytest.fixture
def sides():
    g = torch.Generator().manual_seed(3)
    number = sum(V**n for n in range(T))
    return [torch.randn(number, V, generator=g, dtype=torch.float64) for _ in range(2)]


def surrogate(log_q, log_p, texts, alpha, normalised=False):
    """What MiniLLM minimises, one value a token, for all texts of the mixture, `[texts, T]`."""
    said_q, said_p = (side.gather(-1, texts[..., None])[..., 0] for side in (log_q, log_p))
    weights = importance_weights(said_q.detach().flatten(), said_p.flatten(), alpha)
    which = torch.arange(len(texts))[:, None].expand(-1, T).flatten()
    future = future_rewards((said_p - said_q.detach()).flatten(), which, normalised)
    single = reverse_kl(log_q.flatten(0, 1), log_p.flatten(0, 1))
    return (weights * single).view(-1, T), long_part(said_q.flatten(), weights, future).view(-1, T)


def test_both_parts_together_are_the_gradient_of_the_texts_reverse_kl(sides):
    """In expectation over the student's texts, exactly: all of them are enumerated."""
    mine, teacher = sides
    student = mine.clone().requires_grad_()
    texts, log_q = every_text(student)
    log_p = every_text(teacher)[1]
    whole_q, whole_p = (side.gather(-1, texts[..., None])[..., 0].sum(1) for side in (log_q, log_p))
    (wanted,) = torch.autograd.grad((whole_q.exp() * (whole_q - whole_p)).sum(), student, retain_graph=True)
    single, later = surrogate(log_q, log_p, texts, alpha=0.0)
    chance = whole_q.exp().detach()
    (found,) = torch.autograd.grad((chance * (single + later).sum(1)).sum(), student, retain_graph=True)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    (short,) = torch.autograd.grad((chance * single.sum(1)).sum(), student)
    assert (short - wanted).abs().max() > 0.01  # the later tokens count


def test_the_first_token_is_unbiased_under_the_mixture(sides):
    """Its weight is exact: over texts of α p + (1 − α) q the first token's part has the student's expectation."""
    mine, teacher = sides
    texts, log_q = every_text(mine)
    log_p = every_text(teacher)[1]
    alpha = 0.4
    mixture = torch.logaddexp(log_p + math.log(alpha), log_q + math.log(1 - alpha))
    chance, own = (side.gather(-1, texts[..., None])[..., 0].sum(1).exp() for side in (mixture, log_q))
    weighted, plain = (surrogate(log_q, log_p, texts, a)[0][:, 0] for a in (alpha, 0.0))
    torch.testing.assert_close((chance * weighted).sum(), (own * plain).sum(), rtol=1e-9, atol=1e-12)


def test_weights_and_rewards_of_later_tokens():
    log_q, log_p = torch.tensor([0.5, 0.2]).log(), torch.tensor([0.1, 0.8]).log()
    assert importance_weights(log_q, log_p, 0.0).tolist() == [1.0, 1.0]
    expected = [0.5 / (0.2 * 0.1 + 0.8 * 0.5), 0.2 / (0.2 * 0.8 + 0.8 * 0.2)]
    assert importance_weights(log_q, log_p, 0.2).tolist() == pytest.approx(expected)
    rewards, text = torch.tensor([1.0, 2.0, 4.0, 5.0, 7.0]), torch.tensor([0, 0, 0, 1, 3])
    assert future_rewards(rewards, text).tolist() == [3.0, 4.0, 0.0, 0.0, 0.0]
    assert future_rewards(rewards, text, normalised=False).tolist() == [6.0, 4.0, 0.0, 0.0, 0.0]
    assert future_rewards(rewards[:0], text[:0]).tolist() == []


def minillm_terms(student, teacher, items, source, **options):
    batch = Batch.from_dict({**collate_text(items), "source": source, "sampled": source - 1})
    state = TrainState(on_policy=OnPolicy(teacher_share=0.2))
    return get("minillm")(**options).loss(student(batch), teacher(batch), batch, state), batch


def test_minillm_learns_from_written_texts_and_keeps_the_datas(tmp_path):
    tokenizer = words()
    student, teacher = rows(tokenizer, seed=3), rows(tokenizer, seed=8)
    items = [examples(tokenizer, 3)[i] for i in range(3)]
    own = [sampled_row(Sample(i, 0, 2, tuple(items[i]["input_ids"].tolist())), tokenizer) for i in (1, 2)]
    terms, batch = minillm_terms(student, teacher, [items[0], *own], torch.tensor([0, 1, 1]))
    counts = get("minillm")().counts(batch)
    assert counts["reverse_kl"] == counts["long"] == len(terms["long"].values) == batch.num_items - counts["ce"]
    assert len(terms["ce"].values) == counts["ce"] > 0
    parts = [
        minillm_terms(student, teacher, [row], torch.tensor([s]))[0]
        for row, s in zip([items[0], *own], (0, 1, 1), strict=True)
    ]
    for name in terms:  # a batch is the sum of its splits
        split = torch.cat([part[name].values for part in parts])
        torch.testing.assert_close(terms[name].values, split, rtol=1e-4, atol=1e-5)
    same = minillm_terms(teacher, teacher, own, torch.ones(2, dtype=torch.long))[0]
    assert all(same[name].values.abs().max() < 1e-4 for name in ("reverse_kl", "long"))


# -- by name ------------------------------------------------------------------------------------------------------------


def short(data, output, method, **keys):
    base = recipe(data, output, method=method, options={}, on_policy={"max_new_tokens": 6})
    base["teacher"]["train"]["max_steps"] = 4
    return {**base, "trainer": {**base["trainer"], "max_steps": 6}, **keys}


def test_a_methods_defaults_are_overridden_by_the_recipes(tmp_path):
    data = write_set(tmp_path / "set")
    found = make(short(data, tmp_path / "run", "distillm"))
    assert found.on_policy.fraction == 0 and found.on_policy.replay.size == 1000 and found.on_policy.adaptive.by == 0.1
    assert found.on_policy.max_new_tokens == 6 and found.trainer["eval_strategy"] == "epoch"
    own = make(short(data, tmp_path / "run", "gkd", on_policy={"fraction": 0.9}))
    assert own.on_policy.fraction == 0.9 and make(own.dump()) == own
    assert make(short(data, tmp_path / "run", "gkd", on_policy=None)).on_policy.fraction == 0.5


@pytest.mark.parametrize("method", ["gkd", "distillm", "minillm"])
def test_each_runs_by_its_name(method, tmp_path):
    result = distill(short(write_set(tmp_path / "set"), tmp_path / "run", method))
    assert result.metrics["nll"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6 and all(line["loss"] == line["loss"] for line in lines)
    if method != "distillm":
        assert (tmp_path / "run" / "samples.jsonl").is_file()


def test_seqkd_learns_to_write_what_its_teacher_writes(tmp_path):
    """A student of its size ends with the teacher's greedy texts."""
    values = short(write_set(tmp_path / "set"), tmp_path / "run", "seqkd")
    values["trainer"] = {"max_steps": 120, "per_device_train_batch_size": 16, "learning_rate": 0.02}
    student = distill(values).student
    tokenizer = load_tokenizer(str(tmp_path / "run" / "student"))
    teacher = load_causal_lm(str(tmp_path / "run" / "teacher" / "student"), tokenizer=tokenizer)
    prompts = [[1, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in ("one", "two three", "four")]
    settings = {"most": 6, "vocabulary": len(tokenizer), "ends": {tokenizer.eos_token_id}, "pad": 0, "temperature": 0.0}
    said = [sample(side, prompts, torch.arange(3), **settings) for side in (student, teacher)]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "method,keys,says",
    [
        (
            "seqkd",
            {"on_policy": {"teacher_share": 0.0, "generations": None, "max_new_tokens": 6}},
            "teacher_share at 1",
        ),
        ("minillm", {"on_policy": {"teacher_share": 1.0, "max_new_tokens": 6}}, "teacher_share below 1"),
        ("gkd", {"options": {"beta": 1.5}}, "beta = 1.5"),
    ],
)
def test_what_is_refused(method, keys, says, tmp_path):
    with pytest.raises(InputError, match=says):
        distill(short(write_set(tmp_path / "set"), tmp_path / "run", method, **keys))
