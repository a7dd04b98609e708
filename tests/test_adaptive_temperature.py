"""ADPO's temperature where it adapts to each list: what it is, its bounds, and strict orders before training."""

import math

import pytest
import torch

from golden_vectors import close
from test_preference_methods import listed, rows_of, staged
from test_preferences import lists, scorer
from test_preferences import tokenizer as tokenizer
from understudy import InputError, distill
from understudy.losses import anchored
from understudy.methods.adpo import ADPO
from understudy.models import ModelOutput
from understudy.targets import Dense, Scores
from understudy.training import SetupContext, TrainState

WORST_AND_BEST = {"rewards": torch.tensor([0.0, 2.0], dtype=torch.float64)}
REFERENCE = [[-3.0, -4.0]] * 3
VALUES = torch.tensor([[-0.02, -4.0], [-0.7, -0.7], [-1.5, -2.5]]).double()
SCORES = [[2.0, 2.0], [0.5, 0.5], [1.0, -1.0]]


def test_unsure_lists_are_soft_and_so_are_sure_ones_of_little_reward():
    batch, at = listed(SCORES, REFERENCE), TrainState(step=1, tables=WORST_AND_BEST)
    method = ADPO(target="given", tau=0.5, tau_entropy=0.5, tau_reward=1.0, tau_range=(0.1, 0.9))
    policy = Scores(VALUES, batch.candidates)
    h = (-(VALUES.exp() * VALUES).sum(1) / math.log(2)).clamp(0, 1)
    r = torch.tensor([1.0, 0.25, 0.0]).double()
    close(method._tau(policy, batch, at), (0.5 * (1 + 0.5 * h + (1 - h) * (1 - r))).clamp(0.1, 0.9))
    tokens = Dense(torch.zeros(12, 20).double())  # the vocabulary is of 20 tokens, and each candidate has two
    nats = -VALUES.sum(1) / 4 / math.log(20)
    found = method._tau(Scores(VALUES, batch.candidates, torch.zeros(12), tokens), batch, at)
    close(found, (0.5 * (1 + 0.5 * nats + (1 - nats) * (1 - r))).clamp(0.1, 0.9))
    assert ADPO(tau=0.5)._tau(policy, batch, at) == 0.5
    flat = TrainState(step=1, tables={"rewards": torch.ones(2).double()})
    close(method._tau(policy, batch, flat), (0.5 * (1 + 0.5 * h + (1 - h) * 0.5)).clamp(0.1, 0.9))


def test_each_list_has_its_own_and_none_has_a_gradient():
    batch, at = listed([[0.7, 0.3]] * 3, REFERENCE), TrainState(step=1, tables=WORST_AND_BEST)
    method, leaf = ADPO(target="given", tau_entropy=1.0, tau_reward=0.5), VALUES.clone().requires_grad_()
    values = method.loss(rows_of(leaf), None, batch, at)["adpo"].values
    tau = method._tau(Scores(VALUES, batch.candidates), batch, at)
    assert len(set(tau.tolist())) == 3
    fixed = anchored.anchored_cross_entropy(leaf, batch.reference, batch.scores, tau=tau)
    close(values, fixed)
    close(*(torch.autograd.grad(v.sum(), leaf, retain_graph=True)[0] for v in (values, fixed)))
    ranked = ADPO(target="plackett_luce", tau_entropy=1.0, tau_reward=0.5)
    apart = anchored.anchored_plackett_luce((VALUES - batch.reference) / tau[:, None], batch.scores)
    close(ranked.loss(rows_of(VALUES), None, batch, at)["adpo"].values, apart)


def test_rewards_are_compared_with_those_of_all_training_lists(tokenizer, tmp_path):
    examples, student = lists(tokenizer), scorer(tokenizer)
    for i, row in enumerate(examples.records):
        row["scores"] = [float(i), float(i) + 1]
    context = SetupContext(student, None, {"train": examples}, None, 300, tmp_path, "key")
    assert ADPO(anchor="uniform", tau_reward=1.0).setup(context)["rewards"].tolist() == [0.5, len(examples) - 0.5]
    assert ADPO(anchor="uniform").setup(context) == {}


def test_a_policy_learns_with_it(tmp_path):
    recipe = {"task": "preference_world", "method": "adpo", "data": {"name": "bandit"}, "trainer": {"max_steps": 60}}
    options = {"tau_entropy": 0.5, "tau_reward": 1.0, "target": "kde_rank"}
    start = distill({**recipe, "trainer": {"max_steps": 1}, "output": str(tmp_path / "start")}).metrics
    found = distill({**recipe, "options": options, "output": str(tmp_path / "run")}).metrics
    assert found["value"] > start["value"] + 0.01


def test_bad_input(tokenizer, tmp_path):
    for bounds in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="a bound above 0 and one that is no smaller"):
            ADPO(tau_entropy=1.0, tau_range=bounds)
    examples = lists(tokenizer)
    examples.records[2]["scores"] = [1.0, 1.0]
    with pytest.raises(InputError, match=r"train example \d+ has equal scores, and options.strict"):
        staged(ADPO(target="plackett_luce", strict=True), examples, scorer(tokenizer), tmp_path)
    with pytest.raises(InputError, match="score of list 0, candidate 1 is inf"):
        anchored.anchored_plackett_luce(torch.tensor([[0.0, math.inf]]), torch.tensor([[1.0, 0.0]]))
    with pytest.raises(InputError, match="must be positive"):
        anchored.anchored_cross_entropy(*[torch.full((1, 2), 0.5)] * 3, tau=torch.zeros(1))


def test_a_model_output_without_tokens_is_read_as_a_whole():
    one = ModelOutput(Scores(torch.zeros(1, 1).double(), torch.ones(1, 1, dtype=torch.bool)))
    batch = listed([[1.0]], [[-1.0]])
    method = ADPO(target="best", tau_entropy=0.5)
    assert method._tau(one.signal, batch, TrainState(step=1, tables=WORST_AND_BEST)).tolist() == [1.0]
