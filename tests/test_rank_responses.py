"""RRHF and PRO: golden vectors of the survey (paper 07), limits, masked candidates, splits, and learning."""

import math

import pytest
import torch

from golden_vectors import close, golden
from understudy import distill
from understudy.losses.hidden import hidden_distance
from understudy.losses.preference import dpo
from understudy.losses.responses import pro, rrhf

LIST = torch.tensor([[0.3, -1.2, 2.0, 0.1]], dtype=torch.float64)


@pytest.fixture(scope="module")
def g():
    return golden("07-survey-llm-kd")


@pytest.mark.golden
def test_golden_rankings(g):
    scores = g["rank_scores"].clone().requires_grad_()
    values = rrhf(scores, g["rank_rewards"])
    close(values, g["rrhf"], atol=1e-10)
    values.sum().backward()
    close(scores.grad, g["rrhf_grad_sum"], atol=1e-10)
    close(pro(g["rank_scores"], g["rank_rewards"]), g["pro"], atol=1e-10)
    told = g["rank_scores"].gather(1, g["pro_order"])
    falling = torch.arange(told.shape[1], 0, -1.0).expand_as(told)
    close(pro(told, falling), g["pro"], atol=1e-10)


@pytest.mark.golden
def test_golden_features_and_pairs(g):
    for norm in ("l2", "l1"):
        close(hidden_distance(g["student_feat"], g["teacher_feat"], distance=norm), g[f"feat_{norm}"], atol=1e-10)
    sides = [g[f"dpo_{who}_{side}"] for who in ("policy", "ref") for side in "wl"]
    close(dpo(*sides, beta=float(g["dpo_beta"])).mean(), g["dpo_loss"], atol=1e-10)
    both = torch.stack([g["rm_chosen"], g["rm_rejected"]], -1)
    close(pro(both, torch.tensor([1.0, 0.0]).expand_as(both)).mean(), g["rm_loss"], atol=1e-10)  # Bradley and Terry


def test_order_as_rewarded_costs_nothing_and_equal_rewards_teach_nothing():
    assert rrhf(LIST, LIST).item() == 0
    scores = LIST.clone().requires_grad_()
    rrhf(scores, torch.zeros_like(LIST)).backward()
    assert (scores.grad == 0).all()
    assert pro(LIST[:, :1], LIST[:, :1]).item() == 0


def test_a_masked_candidate_may_hold_anything():
    rewards = torch.tensor([[1.0, 3.0, 2.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True]])
    kept = torch.tensor([0, 1, 3])
    for loss in (rrhf, pro):
        for value in (0.0, 1e6, -math.inf, math.nan):
            scores, graded = LIST.clone(), rewards.clone()
            scores[0, 2] = graded[0, 2] = value
            leaf = scores.requires_grad_()
            found = loss(leaf, graded, mask=mask)
            torch.testing.assert_close(found, loss(LIST[:, kept], rewards[:, kept]))
            (grad,) = torch.autograd.grad(found.sum(), leaf)
            assert grad.isfinite().all() and grad[0, 2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["rrhf", "pro"])
def test_a_policy_learns_the_order(loss_type, tmp_path):
    recipe = {"task": "preference_world", "data": {"name": "chains"}, "output": str(tmp_path / "run")}
    start = distill({**recipe, "method": "sft", "trainer": {"max_steps": 1, "learning_rate": 1e-9}}).metrics
    trainer = {"max_steps": 150, "learning_rate": 0.02}
    found = distill({**recipe, "method": loss_type, "trainer": trainer, "output": str(tmp_path / loss_type)}).metrics
    assert found["return"] > start["return"] + 0.5 and found["accuracy"] > 0.6
