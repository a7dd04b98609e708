"""Paper 37, dataset distillation: golden values and gradients of the matching losses, limits that must hold, bad input."""

import pytest
import torch
import torch.nn.functional as F

from golden_vectors import close, golden, reduce
from understudy import InputError
from understudy.curation import pruning
from understudy.losses import forward_kl
from understudy.losses.matching import (
    gradient_distance,
    kernel_ridge_error,
    kernel_ridge_prediction,
    mean_distance,
    mmd,
    trajectory_distance,
)
from understudy.training.unrolled import flat, gradients, unrolled_sgd

NAME = "37-survey-kd-dd"


def near(value, expected):
    close(value, expected, rtol=1e-10, atol=1e-10)


def softmax_regression(x, y):
    """Mean cross-entropy of a linear classifier, as a function of its parameters."""
    return lambda p: F.cross_entropy(F.linear(x, p["w"], p["b"]), y)


def unflat(vector, classes, width):
    return {"w": vector[: classes * width].reshape(classes, width), "b": vector[classes * width :]}


@pytest.mark.golden
@pytest.mark.parametrize("metric,key", [("layers", "ours"), ("mse", "mse"), ("cosine", "cos")])
def test_golden_gradient_distance(metric, key):
    g = golden(NAME)
    number = sum(name.startswith("gm_syn_") for name in g)
    synthetic, real = ([g[f"gm_{side}_{i}"] for i in range(number)] for side in ("syn", "real"))
    synthetic = [x.requires_grad_() for x in synthetic]
    value = gradient_distance(synthetic, real, metric=metric)
    near(value, g[f"gm_{key}"])
    found = torch.autograd.grad(value, synthetic, allow_unused=True, materialize_grads=True)
    for i, gradient in enumerate(found):
        close(gradient, g[f"gm_{key}_grad_{i}"])


@pytest.mark.golden
def test_golden_gradient_matching_through_a_classifier():
    g = golden(NAME)
    x, parameters = g["syn_x"].requires_grad_(), {"w": g["W"], "b": g["b"]}
    total = 0
    for c in g["syn_y"].unique():
        ours, theirs = g["syn_y"] == c, g["real_y"] == c
        slopes = gradients(softmax_regression(x[ours], g["syn_y"][ours]), parameters, differentiable=True)
        wanted = gradients(
            softmax_regression(g["real_x"][theirs], g["real_y"][theirs]), parameters, differentiable=False
        )
        total = total + gradient_distance(slopes, wanted)
    near(total, g["gm_softmax_loss"])
    close(torch.autograd.grad(total, x)[0], g["gm_softmax_grad_syn_x"])


@pytest.mark.golden
def test_golden_distributions():
    g = golden(NAME)
    x = g["syn_x"].requires_grad_()
    real, ours = (F.relu(v @ g["dm_proj"].T) for v in (g["real_x"], x))
    value = sum(mean_distance(ours[g["syn_y"] == c], real[g["real_y"] == c]) for c in g["syn_y"].unique())
    near(value, g["dm_loss"])
    close(torch.autograd.grad(value, x)[0], g["dm_grad_syn_x"])
    bandwidths = g["mmd_bandwidths"].tolist()
    value = mmd(x, g["real_x"], bandwidths)
    near(value, g["mmd2_biased"])
    close(torch.autograd.grad(value, x)[0], g["mmd2_biased_grad_syn_x"])
    near(mmd(x, g["real_x"], bandwidths, unbiased=True), g["mmd2_unbiased"])


@pytest.mark.golden
def test_golden_trajectory():
    g = golden(NAME)
    x, rate = g["syn_x"].requires_grad_(), g["tm_lr"].requires_grad_()
    start = unflat(g["tm_start"], *g["W"].shape)
    end = flat(unrolled_sgd(softmax_regression(x, g["syn_y"]), start, rate, int(g["tm_steps"])))
    near(end, g["tm_student_end"])
    value = trajectory_distance(end, g["tm_start"], g["tm_target"])
    near(value, g["tm_loss"])
    of_x, of_rate = torch.autograd.grad(value, (x, rate))
    close(of_x, g["tm_grad_syn_x"])
    close(of_rate, g["tm_grad_lr"])


@pytest.mark.golden
def test_golden_kernel_ridge():
    g = golden(NAME)
    classes = len(g["b"])
    x, y = g["syn_x"].requires_grad_(), F.one_hot(g["syn_y"], classes).double().requires_grad_()
    prediction = kernel_ridge_prediction(g["real_x"] @ x.T + 1, x @ x.T + 1, y, float(g["kip_ridge"]))
    near(prediction, g["kip_pred"])
    value = reduce(kernel_ridge_error(prediction, F.one_hot(g["real_y"], classes).double()), "token_mean")
    near(value, g["kip_loss"])
    of_x, of_y = torch.autograd.grad(value, (x, y))
    close(of_x, g["kip_grad_syn_x"])
    close(of_y, g["kip_grad_syn_y"])


@pytest.mark.golden
def test_golden_soft_labels_and_scores():
    g = golden(NAME)
    student, tau = g["kd_student_logits"].requires_grad_(), float(g["kd_tau"])
    rows = forward_kl(student, g["kd_teacher_logits"], temperature=tau)
    near(rows, g["kd_kl_per"])
    value = reduce(tau**2 * rows, "token_mean")
    near(value, g["kd_loss"])
    close(torch.autograd.grad(value, student)[0], g["kd_grad_student_logits"])
    herded = pruning.herding_scores(g["real_x"], torch.zeros(len(g["real_x"]), dtype=torch.long))
    assert torch.equal(herded.argsort(descending=True)[: len(g["herding"])], g["herding"])
    logits = F.linear(g["real_x"], g["W"], g["b"])
    near(pruning.el2n_scores(logits[None], g["real_y"]), g["el2n"])


def sets(seed=0):
    torch.manual_seed(seed)
    return torch.randn(9, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)


def test_equal_sets_are_matched():
    x, z = sets()
    weights = [torch.randn(3, 4).double(), torch.randn(3).double()]
    assert 0 <= gradient_distance(weights, weights) < 3e-6
    assert (
        gradient_distance(weights, weights, metric="mse")
        == 0
        == mean_distance(x, x[torch.randperm(9)]).round(decimals=20)
    )
    assert mmd(x, x, [1.0]).abs() < 1e-14 and mmd(z, x, [0.5, 2.0]) > 0
    assert trajectory_distance(z[0], z[1], z[0]) == 0 and trajectory_distance(z[1], z[1], z[0]) == 1


def test_what_gradient_distances_do_not_see():
    a, b = ([torch.randn(3, 4).double(), torch.randn(3).double()] for _ in range(2))
    scaled = [10 * g for g in a]
    for metric in ("layers", "cosine"):
        close(gradient_distance(scaled, b, metric=metric), gradient_distance(a, b, metric=metric), rtol=1e-5)
    assert not torch.isclose(*(gradient_distance(s, b, metric="mse") for s in (scaled, a)))
    opposite = gradient_distance([-a[0], a[1]], a)
    close(opposite, torch.tensor(6.0), rtol=1e-5)  # 2 a row, and the bias is left out
    zero = [torch.zeros_like(a[0]), a[1]]
    assert gradient_distance(a, zero) == 3
    (slope,) = torch.autograd.grad(gradient_distance([a[0].requires_grad_()], [zero[0]]), a[0])
    assert not slope.any()


def test_a_ridge_near_zero_interpolates():
    x, _ = sets()
    y = F.one_hot(torch.arange(9) % 3).double()
    kernel = torch.exp(-torch.cdist(x, x).square())
    close(kernel_ridge_prediction(kernel, kernel, y, 1e-12), y, atol=1e-8)


def test_gradients_of_the_synthetic_set_are_finite_differences():
    x, z = sets()
    y, labels, start = torch.arange(9) % 2, torch.arange(5) % 2, torch.randn(10).double()
    wanted = gradients(softmax_regression(x, y), unflat(start, 2, 4), differentiable=False)

    def matched(s):
        return gradient_distance(
            gradients(softmax_regression(s, labels), unflat(start, 2, 4), differentiable=True), wanted
        )

    def followed(s, rate):
        end = unrolled_sgd(softmax_regression(s, labels), unflat(start, 2, 4), rate, 3)
        return trajectory_distance(flat(end), start, torch.zeros(10).double())

    assert torch.autograd.gradcheck(matched, z.requires_grad_())
    assert torch.autograd.gradcheck(followed, (z, torch.tensor(0.1).double().requires_grad_()))


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: gradient_distance([torch.rand(2, 3)], [torch.rand(3, 2)]), "differ in shape"),
        (lambda: gradient_distance([torch.rand(2)], [torch.rand(2)]), "no parameter has two axes"),
        (lambda: mean_distance(torch.rand(0, 2), torch.rand(2, 2)), "synthetic side has 0 items"),
        (
            lambda: mmd(torch.rand(3, 2), torch.rand(1, 2), [1.0], unbiased=True),
            "real side has 1 items and needs at least 2",
        ),
        (lambda: trajectory_distance(*torch.ones(3, 4)), "take times further apart"),
        (lambda: kernel_ridge_prediction(torch.eye(2), torch.ones(2, 2), torch.eye(2), 0.0), "ridge is 0.0"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()
