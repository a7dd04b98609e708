"""Paper 22, KD³: golden vectors, and limits of its selection, weights, mixing and contrast."""

import math

import pytest
import torch

from golden_vectors import close, golden
from understudy import InputError
from understudy.curation.confident import chosen, confident, teacher_share
from understudy.data.augment import mix_statistics
from understudy.data.noise import beta
from understudy.losses.contrast import nt_xent
from understudy.losses.features import disagreement_weights, hint_mse

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.golden
def test_golden_selection_and_schedule():
    g = golden("22-kd3")
    found = confident(g["sel_logits_t"], g["sel_logits_s"], float(g["alpha"]), cutoff=float(g["p_cutoff"]))
    close(found.confidence, g["sel_conf"], **EXACT)
    close(found.thresholds, g["sel_class_threshold"], **EXACT)
    assert torch.equal(found.classes, g["sel_pred"]) and torch.equal(found.keep, g["sel_keep"])
    for epoch, wanted in zip(g["schedule_epochs"].tolist(), g["schedule_alpha"].tolist(), strict=True):
        assert teacher_share(epoch) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.golden
def test_golden_losses():
    g = golden("22-kd3")
    weights = disagreement_weights(g["logits_s"], g["logits_t"])
    close(weights, g["sample_weight"], **EXACT)
    features = g["feat_s"].requires_grad_()
    align = (weights * hint_mse(features, g["feat_t"])).mean()
    close(align, g["loss_align"], **EXACT)
    close(torch.autograd.grad(align, features)[0], g["grad_align_feat_s"], **EXACT)
    temperature, views = float(g["temp"]), [g["emb_s"].requires_grad_(), g["emb_s_aug"].requires_grad_()]
    ours = nt_xent(*views, temperature=temperature).mean()
    theirs = nt_xent(g["emb_t"], g["emb_t_aug"], temperature=temperature).mean()
    close(ours, g["loss_con_s"], **EXACT)
    close(theirs, g["loss_con_t"], **EXACT)
    for gradient, name in zip(torch.autograd.grad(ours, views), ("emb_s", "emb_s_aug"), strict=True):
        close(gradient, g[f"grad_con_{name}"], **EXACT)
    close(align + float(g["mix_weight"]) * (ours + theirs), g["loss_total"], **EXACT)


@pytest.mark.golden
def test_golden_mixing():
    g = golden("22-kd3")
    options = {"epsilon": float(g["mix_eps"])}
    close(mix_statistics(g["mix_x"], g["mix_lambda"], g["mix_perm"], **options), g["mix_out"], **EXACT)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.rand(5, 3, 4, 4, dtype=torch.float64)


def test_limits_of_mixing(x):
    order, own = torch.tensor([2, 0, 1, 4, 3]), torch.arange(5)
    share = torch.tensor([0.2, 0.7, 0.0, 1.0, 0.5]).double()
    close(mix_statistics(x, torch.ones(5), order), x)
    close(mix_statistics(x, share, own), x)
    mixed = mix_statistics(x, share, order).mean((2, 3))
    wanted = share[:, None] * x.mean((2, 3)) + (1 - share[:, None]) * x.mean((2, 3))[order]
    close(mixed, wanted)
    flat = x.clone()
    flat[0] = 0.5
    assert mix_statistics(flat, share, order).isfinite().all()
    with pytest.raises(InputError, match="one position"):
        mix_statistics(x[:, :, :1, :1], share, order)


def test_the_drawn_shares_are_a_beta():
    drawn = beta(torch.arange(20_000), 0.1, seed=1, step=3)
    assert torch.equal(drawn[7:9], beta(torch.tensor([7, 8]), 0.1, seed=1, step=3))
    # Of Beta(α, α): mean ½ and variance 1 / (4 (2α + 1)).
    assert abs(float(drawn.mean()) - 0.5) < 0.01 and abs(float(drawn.var()) - 1 / 4.8) < 0.005


def test_limits_of_selection():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 200, 6).double()
    teacher[:, 2] += 1
    a = confident(teacher, student, 1.0, cutoff=0.9)
    numbers = torch.bincount(a.classes, minlength=6)
    assert a.thresholds[2] == pytest.approx(0.9) and int(numbers.argmax()) == 2
    order = numbers.argsort()
    assert (a.thresholds[order].diff() >= 0).all()
    # The student alone decides at a = 0, the teacher alone at a = 1.
    for share, pair in ((0.0, (teacher.flip(0), student)), (1.0, (teacher, student.flip(0)))):
        same, other = confident(teacher, student, share), confident(*pair, share)
        assert torch.equal(same.keep, other.keep)
    equal = confident(torch.zeros(3, 4), torch.zeros(3, 4), 0.5)
    assert equal.classes.tolist() == [0, 0, 0] and equal.confidence.tolist() == [0.25] * 3
    # A class that is predicted once passes at nearly any confidence, unless there is a floor.
    rare = torch.tensor([[9.0, 0.0]] * 99 + [[0.0, 0.1]])
    assert confident(rare, rare, 1.0).keep[-1] and not confident(rare, rare, 1.0, min_threshold=0.6).keep[-1]


def test_limits_of_the_schedule():
    shares = [teacher_share(e) for e in range(1, 241)]
    assert all(b <= a for a, b in zip(shares, shares[1:], strict=False)) and min(shares) >= 0 and max(shares) < 1
    assert shares[0] == pytest.approx(0.992, abs=1e-3) and shares[118] > 0 and set(shares[119:]) == {0.0}


def test_a_pool_that_nothing_of_passes():
    flat = torch.zeros(25, 4)
    flat[3] += torch.tensor([0.1, 0, 0, 0])
    found = confident(flat, flat, 1.0)
    kept, replaced = chosen(found)
    assert replaced and kept.tolist() == [0, 1, 3]
    assert chosen(found._replace(keep=torch.arange(25) > 20))[0].tolist() == [21, 22, 23, 24]
    with pytest.raises(InputError, match="two at least"):
        chosen(confident(flat[:1], flat[:1], 1.0))


def test_limits_of_the_weights():
    z = torch.randn(4, 9, dtype=torch.float64)
    close(disagreement_weights(z, z), torch.full((4,), 1e-6 * 3, dtype=torch.float64).sigmoid())
    weights = disagreement_weights(z.requires_grad_(), z.flip(0))
    assert (weights >= 0.5).all() and (weights <= 1).all() and not weights.requires_grad


def test_limits_of_the_contrast():
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 5, dtype=torch.float64)
    value = nt_xent(a, b)
    assert (value > 0).all()
    close(nt_xent(b, a), value)
    close(nt_xent(7 * a, b * torch.rand(6, 1).double().add(0.1)), value)
    one = torch.ones(6, 5)
    close(nt_xent(one, one), torch.full((6,), math.log(11)), rtol=1e-6)
    assert nt_xent(a[:1], b[:1]).tolist() == [0.0]
    zero = torch.zeros(3, 5, requires_grad=True)
    assert torch.autograd.grad(nt_xent(zero, torch.ones(3, 5)).sum(), zero)[0].isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nt_xent(torch.rand(2, 3), torch.rand(3, 3)), "of one shape"),
        (lambda: nt_xent(torch.rand(2, 3), torch.rand(2, 3), temperature=0.0), "above 0"),
        (lambda: disagreement_weights(torch.rand(2, 3), torch.rand(2, 4)), "differ in shape"),
        (lambda: confident(torch.rand(2, 3), torch.rand(2, 4), 1.0), "a row for each image"),
        (lambda: confident(torch.rand(0, 3), torch.rand(0, 3), 1.0), "one image at least"),
        (lambda: confident(torch.full((2, 3), torch.inf), torch.rand(2, 3), 1.0), "image 0 of the pool are not finite"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()
