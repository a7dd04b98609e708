"""Paper 4, Distillation-DPO: golden vectors, limits that must hold, bad input of the losses and metrics."""

import math

import pytest
import torch

from golden_vectors import close, golden
from understudy import InputError
from understudy.evaluation.clouds import chamfer_distance, earth_mover_distance, voxel_iou, voxel_jsd
from understudy.losses.diffusion import epsilon_from, noised, over, squared_error, x0_from
from understudy.losses.score_distillation import rank_pairs, score_difference, score_distillation


def exactly(actual, expected):
    close(actual, expected, rtol=1e-9, atol=1e-9)


def metric(function, ours, theirs, **options):
    return torch.tensor([function(a, b, **options) for a, b in zip(ours, theirs, strict=True)], dtype=torch.float64)


@pytest.mark.golden
def test_golden_pairs_and_metrics():
    g = golden("04-distillation-dpo")
    begun = g["partial"].repeat(1, int(g["repeat"]), 1)
    exactly(begun + g["noise0"], g["x_start_a"])
    exactly(begun + g["gamma"] * g["noise0"], g["x_start_b"])
    costs = [metric(chamfer_distance, g[f"cand_{c}"], g["gt"]) for c in "ab"]
    for c, cost in zip("ab", costs, strict=True):
        exactly(cost, g[f"cd_{c}"])
    ranking = rank_pairs(*costs)
    assert torch.equal(ranking.first_wins, g["a_wins"]) and torch.equal(ranking.tie, g["tie"])
    cells = {"voxel": float(g["jsd_voxel"]), "reach": float(g["jsd_range"])}
    exactly(metric(voxel_jsd, g["cand_a"], g["gt"], **cells), g["jsd_a"])
    exactly(metric(voxel_jsd, g["cand_a"], g["gt"], **cells, flat=True), g["jsd_bev_a"])
    for name in (n for n in g if n.startswith("iou_a_")):
        voxel = float(name.removeprefix("iou_a_").replace("p", "."))
        exactly(metric(voxel_iou, g["cand_a"], g["gt"], voxel=voxel), g[name])


@pytest.mark.golden
def test_golden_generator_gradient():
    g = golden("04-distillation-dpo")
    ranking = rank_pairs(g["cd_a"], g["cd_b"])
    winner, loser = (x.requires_grad_() for x in ranking.order(g["cand_a"], g["cand_b"]))
    betas = torch.linspace(
        float(g["beta_start"]), float(g["beta_end"]), int(g["num_train_timesteps"]), dtype=torch.float64
    )
    sigma = (1 - (1 - betas).cumprod(0)).sqrt()[g["t"]]
    exactly(sigma, g["sqrt_one_minus_abar"])
    values, released = {}, {}
    for side, x in (("w", winner), ("l", loser)):
        x_t = noised(x, g["noise"], torch.ones_like(sigma), sigma)
        exactly(x_t, g[f"x_t_{side}"])
        d = score_difference(g[f"eps_teacher_{side}"], g[f"eps_assist_{side}"])
        values[side], released[side] = score_distillation(x, d), score_distillation(x_t - x, d)
    loss = values["w"].mean() - values["l"].mean()
    exactly(loss, g["loss_surrogate"])
    for x, name in zip((winner, loser), ("grad_x_w", "grad_x_l"), strict=True):
        exactly(torch.autograd.grad(loss, x, retain_graph=True)[0], g[name])
    kept = ~ranking.tie
    exactly(values["w"][kept].mean() - values["l"][kept].mean(), g["loss_surrogate_ties_dropped"])
    nothing = released["w"].mean() - released["l"].mean()
    exactly(nothing, g["loss_released_value"])
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(nothing, (winner, loser)))  # Limit 7


@pytest.mark.golden
def test_golden_assistants():
    g = golden("04-distillation-dpo")
    total = 0.0
    for side in "wl":
        said = g[f"aux_pred_{side}"].clone().requires_grad_()
        loss = squared_error(said, g[f"aux_noise_{side}"]).mean()
        exactly(loss, g[f"loss_aux_{side}"])
        exactly(torch.autograd.grad(loss, said)[0], g[f"grad_aux_pred_{side}"])
        total = total + loss
    exactly(total, g["loss_aux"])


def test_limits_of_the_generator_gradient():
    """Limits 1, 3 and 4, and the clip."""
    torch.manual_seed(0)
    x_w, x_l, teacher, first, second, field = torch.randn(6, 5, 7, 2, dtype=torch.float64)

    def gradients(a, b, eps_a, eps_b, eps_t):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        terms = (score_distillation(x, score_difference(eps_t, eps)) for x, eps in ((a, eps_a), (b, eps_b)))
        return torch.autograd.grad(next(terms).mean() - next(terms).mean(), (a, b))

    plain = gradients(x_w, x_l, first, second, teacher)
    assert all(grad.eq(0).all() for grad in gradients(x_w, x_l, teacher, teacher, teacher))
    swapped = gradients(x_l, x_w, second, first, teacher)
    close(swapped[0], -plain[1])
    close(swapped[1], -plain[0])
    for ours, theirs in zip(gradients(x_w, x_l, first + field, second + field, teacher + field), plain, strict=True):
        close(ours, theirs)
    wide = score_difference(100 * teacher, first, clip=0.5)
    close(wide.square().flatten(1).mean(1).sqrt(), torch.full((5,), 0.5).double())
    close(score_difference(teacher, first, clip=1e3), teacher - first)


def test_the_noise_is_read_back():
    torch.manual_seed(1)
    x0, eps = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    alpha, sigma = torch.rand(2, 6, dtype=torch.float64) + 0.1
    x = noised(x0, eps, alpha, sigma)
    close(epsilon_from(x0, x, alpha, sigma), eps)
    close(x0_from(epsilon_from(x0, x, alpha, sigma), x, alpha, sigma, "epsilon"), x0)
    assert over(alpha, x).shape == (6, 1, 1)


def test_limits_of_the_metrics():
    """Limit 6."""
    torch.manual_seed(2)
    a, b = torch.randn(40, 3), torch.randn(40, 3) + 1
    same = a[torch.randperm(len(a))]
    cells = {"voxel": 0.5, "reach": 6.0}
    for distance, options in ((chamfer_distance, {}), (earth_mover_distance, {}), (voxel_jsd, cells)):
        assert distance(a, same, **options) == pytest.approx(0, abs=1e-12)
        assert distance(a, b, **options) == pytest.approx(distance(b, a, **options)) and distance(a, b, **options) > 0.1
    assert chamfer_distance(a, a + torch.tensor([1e-3, 0, 0])) == pytest.approx(1e-3, rel=1e-3)
    assert voxel_jsd(a, a + 20, voxel=0.5, reach=30.0) == pytest.approx(math.sqrt(math.log(2)))
    assert voxel_iou(a, same, voxel=0.2) == 1 and voxel_iou(a, a + 20, voxel=0.2) == 0
    assert voxel_iou(a[:0], b[:0], voxel=0.2) == 1 and 0 < voxel_iou(a, a[:20], voxel=0.2) < 1
    assert chamfer_distance(torch.zeros(9, 2), torch.zeros(1, 2)) == 0  # duplicates and other sizes


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: rank_pairs(torch.tensor([1.0, math.nan]), torch.ones(2)), "first candidate of row 1 is nan"),
        (lambda: rank_pairs(torch.ones(2), torch.tensor([math.inf, 1.0])), "second candidate of row 0 is inf"),
        (lambda: score_difference(torch.ones(2, 3), torch.ones(2, 4)), "differ in shape"),
        (lambda: score_distillation(torch.ones(2, 3), torch.ones(2, 4)), "differ in shape"),
        (lambda: chamfer_distance(torch.ones(2, 3), torch.ones(2, 2)), "cannot be compared"),
        (lambda: chamfer_distance(torch.ones(0, 3), torch.ones(2, 3)), "first of two clouds .* no point"),
        (lambda: chamfer_distance(torch.ones(2, 3), torch.full((2, 3), math.nan)), "second .* not finite"),
        (lambda: earth_mover_distance(torch.ones(2, 3), torch.ones(3, 3)), "one to one"),
        (lambda: voxel_jsd(torch.ones(2, 3), 9 * torch.ones(2, 3), voxel=0.5, reach=2.0), "second cloud lies within 2"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()
