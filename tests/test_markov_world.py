"""The world of paper 7: its distances are exact, its teacher is the truth, and each way of teaching keeps what it is for."""

import itertools

import pytest
import torch

from golden_vectors import close
from understudy import InputError, distill
from understudy.data import Batch, collate_text
from understudy.synthetic import markov as markov_world
from understudy.synthetic.chains import Bigram, exact_policy
from understudy.synthetic.markov import LENGTH, TOKENS, ChainAdapter, ChainTable, markov

KD = {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0}


def recipe(tmp_path, **values):
    trainer = {"max_steps": 150, "save_strategy": "no"}
    data = {"name": "markov", "texts": 1000, "held_out": 200}
    return {"task": "text_world", "data": data, "trainer": trainer, "output": str(tmp_path / "run"), **values}


def test_distances_are_those_of_all_texts(monkeypatch):
    """Against a sum over every text of a small world."""
    monkeypatch.setattr(markov_world, "TOKENS", 3)
    monkeypatch.setattr(markov_world, "LENGTH", 4)
    world = markov(0, number=2, held_out=2)
    log_q = torch.randn(3, 3, dtype=torch.float64).log_softmax(-1)
    texts = torch.tensor(list(itertools.product(range(3), repeat=6)))
    log_p = world.log_p[texts[:, :-2], texts[:, 1:-1], texts[:, 2:]].sum(1)
    ours = log_q[texts[:, 1:-1], texts[:, 2:]].sum(1)
    p, q = log_p.exp() / 9, ours.exp() / 9  # each of the 9 beginnings is as likely
    close(p.sum(), torch.ones((), dtype=torch.float64))
    found = world.value(log_q)
    assert found["forward_kl"] == pytest.approx(float((p * (log_p - ours)).sum()), abs=1e-10)
    assert found["reverse_kl"] == pytest.approx(float((q * (ours - log_p)).sum()), abs=1e-10)
    assert found["true_log_prob"] == pytest.approx(float((q * log_p).sum()), abs=1e-10)
    assert found["value"] == -found["forward_kl"]


def test_a_chain_that_looks_back_once_is_reached_exactly():
    one = torch.randn(TOKENS, TOKENS, dtype=torch.float64).log_softmax(-1)
    world = markov_world.MarkovChain(one.expand(TOKENS, -1, -1), {}, {})
    found = world.value(one)
    assert found["forward_kl"] == pytest.approx(0, abs=1e-12) and found["reverse_kl"] == pytest.approx(0, abs=1e-12)


def test_texts_and_pairs_are_of_the_chain():
    world = markov(1, number=4000, held_out=50)
    texts = torch.stack([row["input_ids"] for row in world.texts["train"].records])
    assert texts.shape == (4000, LENGTH + 2)
    counts = torch.zeros(TOKENS, TOKENS, TOKENS, dtype=torch.double)
    counts.index_put_((texts[:, :-2], texts[:, 1:-1], texts[:, 2:]), torch.ones(1, dtype=torch.double), accumulate=True)
    seen, chain = counts / counts.sum(), counts.sum(-1, keepdim=True) / counts.sum() * world.log_p.exp()
    assert (seen - chain).abs().sum() < 0.25
    for row in world.splits["test"].records:
        likely = [float(world.log_p[ids[:-2], ids[1:-1], ids[2:]].sum()) for ids, _ in row["sequences"]]
        assert (likely[0] > likely[1]) == (row["scores"] == [1.0, 0.0])
        assert torch.equal(row["sequences"][0][0][:2], row["sequences"][1][0][:2])
    ids = [row["id"] for split in world.texts.values() for row in split.records]
    assert len(set(ids)) == len(ids)


def test_the_teacher_is_the_truth_at_every_row():
    world = markov(2, number=5, held_out=2)
    batch = Batch.from_dict(collate_text(world.texts["train"].records))
    assert batch.num_items == 5 * LENGTH
    logits = ChainAdapter(ChainTable(world.log_p), world)(batch).signal.logits
    texts = torch.stack([row["input_ids"] for row in world.texts["train"].records])
    close(logits.double(), world.log_p[texts[:, :-2], texts[:, 1:-1]].flatten(0, 1).float().double())
    policy = exact_policy(torch.randn(TOKENS, TOKENS).log_softmax(-1))
    assert (
        isinstance(policy, Bigram)
        and ChainAdapter(policy, world).distances().keys() == world.value(torch.zeros(TOKENS, TOKENS)).keys()
    )


def test_each_divergence_ends_nearer_by_its_own_measure(tmp_path):
    found = {}
    for divergence in ("forward_kl", "reverse_kl"):
        values = recipe(tmp_path / divergence, method="kd", options={**KD, "divergence": divergence})
        found[divergence] = distill(values).metrics
    forward, reverse = found.values()
    assert forward["forward_kl"] < reverse["forward_kl"] and reverse["reverse_kl"] < forward["reverse_kl"]
    assert reverse["true_log_prob"] > forward["true_log_prob"]
    assert forward["teacher_nll"] < forward["nll"]


def test_pairs_have_a_world_of_the_same_truth(tmp_path):
    trainer = {"max_steps": 20, "save_strategy": "no"}
    student = {"model": "bigram:20", "train": {"max_steps": 50}}
    values = {"task": "preference_world", "data": {"name": "markov"}, "student": student, "trainer": trainer}
    metrics = distill({**values, "method": "dpo", "output": str(tmp_path / "run")}).metrics
    assert metrics["value"] == -metrics["forward_kl"] and metrics["accuracy"] > 0.5


@pytest.mark.parametrize(
    "change,says",
    [
        ({"data": {"name": "markov", "prompts": 5}}, "data.prompts belongs to letters"),
        ({"data": {"name": "markof"}}, "No world 'markof'. Known: letters, markov"),
        ({"student": "llama:hidden=8,layers=1,heads=1"}, "no policy of this world: give one like bigram"),
        ({"task": "preference_world", "student": "reference", "method": "dpo"}, "no policy of this world"),
    ],
)
def test_bad_input(tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        distill({**recipe(tmp_path, method="sft"), "data": {"name": "markov"}, **change})
