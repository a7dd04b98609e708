"""Matching of hidden states, and the α-β and adaptive divergences as options of kd."""

import pytest
import torch

from engine_cases import DIGITS, killed_run, weights
from understudy import InputError, distill, losses
from understudy.data import Batch
from understudy.losses.hidden import hidden_distance
from understudy.methods import resolve
from understudy.methods.kd import KD
from understudy.models import ModelOutput
from understudy.targets import Dense
from understudy.training import TrainState


def test_distances():
    s, t = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(hidden_distance(s, t), (s - t).pow(2).sum(-1) / 6)
    torch.testing.assert_close(hidden_distance(3 * t, t, distance="cosine"), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(hidden_distance(-t, t, distance="cosine"), torch.full((4,), 2.0, dtype=torch.float64))
    leaf = t.clone().requires_grad_()
    (grad,) = torch.autograd.grad(hidden_distance(leaf, t).sum(), leaf)
    assert float(grad.abs().max()) == 0
    with pytest.raises(InputError, match="project them to one width"):
        hidden_distance(s, t[:, :5])


def test_alpha_beta_and_adaptive_kl_are_options_of_kd():
    assert resolve("alpha_beta") == ("kd", {"divergence": "alpha_beta"})
    s, t = torch.randn(5, 7), torch.randn(5, 7)
    batch = Batch({}, torch.arange(5), torch.arange(5))
    sides = ModelOutput(Dense(s)), ModelOutput(Dense(t))

    def values(**options):
        return KD(temperature=1.0, **options).loss(*sides, batch, TrainState())["kd"].values

    torch.testing.assert_close(values(divergence="alpha_beta", ab=(1.0, 0.0)), values(divergence="forward_kl"))
    torch.testing.assert_close(values(divergence="adaptive_kl"), losses.adaptive_kl(s, t))
    torch.testing.assert_close(values(divergence="adaptive_kl", mu=0.9), losses.adaptive_kl(s, t, mu=0.9))
    with pytest.raises(ValueError, match="mu has no effect"):
        KD(mu=0.9)
    torch.testing.assert_close(values(divergence="alpha_beta"), losses.alpha_beta(s, t, alpha=0.2, beta=0.7))


def test_it_learns_leaves_its_projection_behind_and_resumes(tmp_path):
    trainer = {**DIGITS["trainer"], "max_steps": 80, "learning_rate": 1e-2, "save_steps": 20}
    base = {**DIGITS, "method": "hidden-match", "student": "mlp:24", "trainer": trainer}
    base["teacher"] = {"model": "mlp:32", "train": {**DIGITS["teacher"]["train"], "max_steps": 100}}
    whole = distill(base, output=str(tmp_path / "whole"))
    assert whole.metrics["accuracy"] > 0.5  # chance is 0.1
    assert all(k.startswith(("body", "head")) for k in weights(tmp_path / "whole"))
    again = {**base, "teacher": {"model": str(tmp_path / "whole" / "teacher" / "student")}}
    assert killed_run({**again, "output": str(tmp_path / "cut")}, 47, "after")
    distill(again, output=str(tmp_path / "cut"))
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)
