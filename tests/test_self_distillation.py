"""Paper 38, self-distillation with ground truth: the exact path of kernel ridge regression, its limits and bad input."""

import pytest
import torch
import torch.nn.functional as F

from golden_vectors import close, golden, reduce
from understudy import InputError
from understudy.curation.closed_forms import KernelDistillation, best_alpha, rbf_kernel
from understudy.losses.classification import probability_mse


@pytest.mark.golden
def test_golden():
    g = golden("38-ground-truth-self-distillation")
    steps, alpha, gamma = int(g["steps"]), float(g["alpha"]), float(g["rbf_gamma"])
    kernel, points = rbf_kernel(g["X"], g["X"], gamma), rbf_kernel(g["X_test"], g["X"], gamma)
    found = KernelDistillation(kernel, g["Y"], penalty=float(g["lam"]))
    schedules = {"": [alpha] * steps, "_alpha0": [0.0] * steps, "_schedule": g["alpha_schedule"].tolist()}
    for name, alphas in schedules.items():
        close(found.predictions(alphas), g[f"train_pred{name}"], rtol=1e-7, atol=1e-9)
        close(found.predictions(alphas, points), g[f"test_pred{name}"], rtol=1e-7, atol=1e-9)
    best = found.best_alphas(steps, points, g["Y_test"])
    errors = (found.predictions([1.0, *best.tolist()], points) - g["Y_test"]).square().mean((1, 2))
    for value, name in (
        (kernel, "K"),
        (found.limit(alpha), "limit_train_pred"),
        (found.limit(alpha, points), "limit_test_pred"),
        (found.eigenvalues, "eigvals"),
        (found.factors([alpha] * steps), "B_diag"),
        (found.limit_factors(alpha), "B_limit"),
        (best, "alpha_star"),
        (errors, "alpha_star_test_mse"),
        (found.left_out(), "loo_pred_first_fit"),
    ):
        close(value, g[name], rtol=1e-7, atol=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.35])
def test_golden_toy(alpha):
    """The published table, to its five decimals."""
    g = golden("38-ground-truth-self-distillation")
    gamma, grid = float(g["toy_rbf_gamma"]), torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    points = rbf_kernel(grid, g["toy_X"], gamma)
    found = KernelDistillation(rbf_kernel(g["toy_X"], g["toy_X"], gamma), g["toy_Y"], penalty=float(g["toy_lam"]))
    wanted = g[f"toy_loss_a{round(100 * alpha):03d}"]
    steps = found.predictions([alpha] * (len(wanted) - 1), points)
    errors = (torch.cat([steps, found.limit(alpha, points)[None]]) - torch.sin(2 * torch.pi * grid)).square()
    close(errors.mean((1, 2)), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.golden
def test_golden_loss():
    g = golden("38-ground-truth-self-distillation")
    student, alpha = g["net_student_logits"].clone().requires_grad_(), float(g["alpha"])
    labels = F.one_hot(g["net_labels"], student.shape[1]).double()
    rows = alpha * probability_mse(student, labels)
    rows = rows + (1 - alpha) * probability_mse(student, g["net_teacher_logits"].softmax(-1))
    value = reduce(rows, "token_mean")
    close(value, g["net_loss"], rtol=1e-7, atol=1e-9)
    close(torch.autograd.grad(value, student)[0], g["net_grad_student"], rtol=1e-7, atol=1e-9)


def fitted(penalty=0.3, **options):
    torch.manual_seed(0)
    x, v = torch.randn(20, 3).double(), torch.randn(15, 3).double()
    y, truth = (torch.stack([p.sin().sum(1), p.square().sum(1) / 3], 1) for p in (x, v))
    y = y + 0.3 * torch.randn_like(y)
    kernel = rbf_kernel(x, x, 0.5)
    return KernelDistillation(kernel, y, penalty=penalty, **options), kernel, y, rbf_kernel(v, x, 0.5), truth


def test_steps_are_those_of_refitting():
    found, kernel, y, points, _ = fitted()
    inverse = torch.linalg.inv(kernel + 0.3 * torch.eye(20).double())
    alphas, before = [0.9, 0.2, 0.5, -0.4], y
    for step, alpha in enumerate(alphas):
        target = y if step == 0 else alpha * y + (1 - alpha) * before
        before = kernel @ inverse @ target
        close(found.predictions(alphas)[step], before, rtol=1e-9, atol=1e-9)
        close(found.predictions(alphas, points)[step], points @ inverse @ target, rtol=1e-9, atol=1e-9)


def test_limits():
    found, kernel, y, points, _ = fitted()
    first = found.predictions([0.5], points)[0]
    for prediction in found.predictions([0.0, 1.0, 1.0, 1.0], points):  # the first step has no alpha
        close(prediction, first)
    a, b = found.shrinkage, found.factors([0.0] * 5)
    close(b, torch.stack([a**t for t in range(1, 6)]))
    norms = found.predictions([0.0] * 5).flatten(1).norm(dim=1)
    assert (norms[1:] < norms[:-1]).all() and found.limit(0.0, points).eq(0).all()
    for alpha in (0.2, 0.7):
        wider = KernelDistillation(kernel, y, penalty=0.3 / alpha)
        close(found.limit(alpha, points), wider.predictions([1.0], points)[0])
        b = found.limit_factors(alpha)
        close(b, a * ((1 - alpha) * b + alpha))
        close(found.predictions([alpha] * 400, points)[-1], found.limit(alpha, points), rtol=1e-6, atol=1e-8)
        steps = found.factors([alpha] * 6)
        assert (steps >= 0).all() and (steps <= a + 1e-12).all() and (steps[1:] <= steps[:-1] + 1e-12).all()
    assert (found.limit_factors(0.7) >= found.limit_factors(0.2)).all()
    close(fitted(penalty=1e-10)[0].predictions([0.5] * 4)[-1], y, rtol=1e-4, atol=1e-4)
    assert fitted(penalty=1e12)[0].predictions([0.5] * 4, points).abs().max() < 1e-8
    double = KernelDistillation(kernel, 2 * y, penalty=0.3)
    close(double.predictions([0.5] * 3, points), 2 * found.predictions([0.5] * 3, points))
    centred = fitted(penalty=1e12, center=True)[0].predictions([0.5] * 3, points)
    close(centred, y.mean(0).expand_as(centred), rtol=1e-6)


def test_the_best_alpha_is_the_minimum_on_its_line():
    found, _, y, points, truth = fitted()
    (best,) = found.best_alphas(2, points, truth)
    error = lambda alpha: float((found.predictions([1.0, alpha], points)[1] - truth).square().sum())  # noqa: E731
    grid = torch.linspace(-3, 3, 601).tolist()
    nearest = min(grid, key=error)
    assert (
        abs(nearest - float(best)) <= 0.01 and error(float(best)) <= min(error(0.0), error(1.0), error(nearest)) + 1e-12
    )
    assert 0 <= float(found.best_alphas(2, points, truth, clip=True)[0]) <= 1
    apart = found.best_alphas(3, points, truth, by_output=True)
    assert apart.shape == (2, 2)
    one = KernelDistillation(found.kernel, y[:, :1], penalty=0.3)
    close(apart[:, 0], one.best_alphas(3, points, truth[:, :1]))


def test_leaving_one_out_is_brute_force():
    found, kernel, y, _, _ = fitted()
    for i in (0, 7):
        rest = torch.arange(20) != i
        weights = torch.linalg.solve(kernel[rest][:, rest] + 0.3 * torch.eye(19).double(), y[rest])
        close(found.left_out()[i], kernel[i, rest] @ weights)


def test_limits_of_the_loss():
    torch.manual_seed(0)
    s = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    value = probability_mse(s, s.detach().softmax(-1)).sum()
    assert value.abs() < 1e-15 and torch.autograd.grad(value, s)[0].abs().max() < 1e-15
    target = torch.rand(4, 5, dtype=torch.float64)
    close(probability_mse(s + 9, target), probability_mse(s, target))
    assert torch.autograd.gradcheck(lambda x: probability_mse(x, target), s)


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: fitted(penalty=0.0), "penalty is 0.0 and must be above 0"),
        (lambda: KernelDistillation(torch.eye(3), torch.rand(2, 1), penalty=1.0), r"kernel is \(3, 3\)"),
        (lambda: KernelDistillation(-torch.eye(3), torch.rand(3, 1), penalty=1.0), "not symmetric and positive"),
        (lambda: KernelDistillation(torch.rand(3, 3) + torch.eye(3), torch.rand(3, 1), penalty=1.0), "not symmetric"),
        (lambda: best_alpha(*torch.rand(3, 0, 2)), "no validation points"),
        (lambda: fitted(center=True)[0].left_out(), "without center=True"),
        (lambda: probability_mse(torch.rand(2, 3), torch.rand(2, 4)), "differ in shape"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_equal_predictions_leave_alpha_at_one(caplog):
    same = torch.rand(4, 2)
    assert float(best_alpha(same, same, torch.rand(4, 2))) == 1.0 and "set to 1" in caplog.text
    fitted()[0].predictions([1.0, -0.5])
    assert "extrapolates" in caplog.text
