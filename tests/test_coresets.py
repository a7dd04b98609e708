"""Coresets of paper 37: golden indices, and what greedy choices keep to."""

import pytest
import torch

from golden_vectors import close, golden
from understudy import InputError
from understudy.curation import pruning
from understudy.curation.coresets import k_center, matching_pursuit

NAME = "37-survey-kd-dd"


@pytest.mark.golden
def test_golden_selections():
    g = golden(NAME)
    found = k_center(g["real_x"], len(g["kcenter"]), start=int(g["kcenter"][0]))
    assert torch.equal(found.chosen, g["kcenter"])
    close(torch.tensor(found.radius, dtype=torch.float64), g["kcenter_radius"])
    pursued = matching_pursuit(g["omp_features"], g["omp_target"], len(g["omp_index"]))
    assert torch.equal(pursued.chosen, g["omp_index"])
    close(pursued.weights, g["omp_weights"])
    close(torch.tensor(pursued.residual, dtype=torch.float64), g["omp_residual"])
    logits = torch.nn.functional.linear(g["real_x"], g["W"], g["b"])
    norms = (g["real_x"].square().sum(1) + 1).sqrt()  # with the bias
    close(pruning.grand_scores(logits[None], g["real_y"], norms[None]), g["grand_lastlayer"])


def test_radius_and_residual_never_rise():
    torch.manual_seed(0)
    x, target = torch.randn(12, 5).double(), torch.randn(5).double()
    radii = [k_center(x, n, start=3).radius for n in range(1, 13)]
    assert all(b <= a for a, b in zip(radii, radii[1:], strict=False)) and radii[-1] == 0
    residuals = [matching_pursuit(x, target, n).residual for n in range(1, 6)]
    assert all(b <= a + 1e-12 for a, b in zip(residuals, residuals[1:], strict=False))
    assert residuals[-1] < 1e-9  # as many as there are dimensions reach any target


def test_ties_equal_items_and_zero_gradients():
    assert k_center(torch.tensor([[0.0], [1.0], [-1.0], [1.0]]), 4).chosen.tolist() == [0, 1, 2, 3]
    equal = matching_pursuit(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([2.0, 0.0]), 3)
    assert equal.chosen.tolist() == [1] and equal.weights.tolist() == [2.0] and equal.residual == 0
    nothing = matching_pursuit(torch.zeros(2, 3), torch.ones(3), 2)
    assert nothing.chosen.tolist() == [0] and nothing.residual == pytest.approx(3**0.5)


@pytest.mark.parametrize("number", [0, 4])
def test_more_than_there_are_and_none_are_refused(number):
    for select in (k_center, lambda x, n: matching_pursuit(x, x[0], n)):
        with pytest.raises(InputError, match=f"{number} of 3 items are wanted"):
            select(torch.eye(3), number)
