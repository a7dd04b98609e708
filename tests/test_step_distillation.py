"""Losses of few-step distillation: closed forms, float64, limits that must hold, bad input."""

import math

import pytest
import torch

from understudy import InputError
from understudy.losses import diffusion as d
from understudy.losses import step_distillation as s
from understudy.losses.preference import dpo
from understudy.losses.score_distillation import distribution_matching
from understudy.models.noise_levels import Cosine

LEVELS = Cosine()


def rows(seed=0, number=5):
    """x, and two predictions of x_0, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(number, 3, 2, generator=generator, dtype=torch.float64) for _ in range(3)]


def levels(*times, number=5):
    return [LEVELS.at(torch.full((number,), t, dtype=torch.float64)) for t in times]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("times", [(0.99, 0.75, 0.5), (0.3, 0.2, 0.1), (0.5, 0.25, 0.0), (1.0, 0.5, 0.01)])
def test_one_step_to_the_target_ends_where_two_steps_do(times, dtype):
    x, first, second = rows()
    start, middle, end = levels(*times)
    half = d.ddim_step(x, first, *start, *middle)
    there = d.ddim_step(half, second, *middle, *end)
    found = s.two_step_target(first.to(dtype), second.to(dtype), start, middle, end)
    ratio = d.over(end[1] / start[1], x)
    paper = (there - ratio * x) / d.over(end[0] - start[0] * end[1] / start[1], x)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), paper, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(d.ddim_step(x, paper, *start, *end), there)


def test_a_student_that_is_the_target_has_no_loss():
    """Equal predictions are their own target, so a teacher that is right at both times is matched by itself."""
    _, first, second = rows()
    start, middle, end = levels(0.8, 0.6, 0.4)
    assert torch.equal(s.two_step_target(first, first, start, middle, end), first)
    target = s.two_step_target(first, second, start, middle, end)
    weight = s.snr_weight("truncated_snr", *start)
    assert s.progressive(target.clone(), target, weight).eq(0).all()
    last = s.two_step_target(first, second, *levels(0.8, 0.4, 0.0))
    assert torch.equal(last, second)  # no noise is left, and the last prediction is the result


def test_weights_are_the_errors_of_other_predictions():
    clean, x0, _ = rows()
    alpha, sigma = LEVELS.at(torch.linspace(0.05, 0.95, 5, dtype=torch.float64))
    error = d.squared_error(clean, x0)
    for kind, prediction in (("snr", "epsilon"), ("snr_plus_one", "v_prediction")):
        torch.testing.assert_close(
            s.snr_weight(kind, alpha, sigma) * error, d.denoising_loss(clean, x0, alpha, sigma, prediction)
        )
    largest = torch.maximum(error, d.denoising_loss(clean, x0, alpha, sigma, "epsilon"))
    torch.testing.assert_close(s.progressive(clean, x0, s.snr_weight("truncated_snr", alpha, sigma)), largest)
    assert s.snr_weight("truncated_snr", *LEVELS.at(torch.ones(1))).item() == 1


@pytest.mark.parametrize("smallest", [0.0, 0.01, 0.1])
def test_the_consistency_function_is_the_identity_at_the_smallest_time(smallest):
    x, clean, _ = rows()
    (end,) = levels(smallest)
    skip, out = s.consistency_scalings(end, end)
    assert skip.eq(1).all() and out.eq(0).all()
    assert torch.equal(s.consistency_function(x, clean, end, end), x)


def test_the_consistency_function_is_one_step_to_the_smallest_time():
    x, clean, _ = rows()
    now, end = levels(0.7, 0.02)
    torch.testing.assert_close(s.consistency_function(x, clean, now, end), d.ddim_step(x, clean, *now, *end))


def test_the_right_denoiser_of_a_point_is_consistent_at_all_times():
    """Of data that are one point, x_0 is known, and every x_t of a trajectory has one end."""
    point, eps, _ = rows()
    end = levels(0.05)[0]
    ends = [s.consistency_function(d.noised(point, eps, *now), point, now, end) for now in levels(0.99, 0.6, 0.2, 0.05)]
    for other in ends:
        torch.testing.assert_close(other, d.noised(point, eps, *end))


def test_distances_and_their_gradients():
    a, b, _ = rows()
    for kind, expected in (("l2", (a - b).square()), ("l1", (a - b).abs())):
        values, target = a.clone().requires_grad_(), b.clone().requires_grad_()
        found = s.consistency(values, target, kind)
        torch.testing.assert_close(found, expected.flatten(1).mean(1))
        found.sum().backward()
        assert values.grad.ne(0).any() and target.grad is None
    assert s.consistency(a, a, "l1").eq(0).all()


def test_distribution_matching_is_the_formula():
    x, real, fake = rows()
    x.requires_grad_()
    value = distribution_matching(x, real, fake)
    d_ = (fake - real) / (x - real).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(value, 0.5 * d_.square().mean((1, 2)))
    value.sum().backward()
    torch.testing.assert_close(x.grad, d_.detach() / 6)
    torch.testing.assert_close(distribution_matching(x, real, real), torch.zeros(5, dtype=torch.float64))
    single = distribution_matching(x.detach().float(), real.float(), fake.float())
    torch.testing.assert_close(single.double(), value.detach(), rtol=1e-5, atol=0)


def test_distribution_matching_is_the_gradient_of_a_divergence():
    """Of Gaussians N(m, 1) and a teacher N(0, 1) the KL is m² / 2, and its gradient leads to 0."""
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (alpha, sigma), mean = LEVELS.at(torch.tensor(0.5)), 0.7
    x = mean + noise
    x_t = alpha * x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    real, fake = alpha * x_t, mean + alpha * (x_t - alpha * mean)  # E[x | x_t], with α² + σ² = 1
    torch.testing.assert_close(fake - real, (sigma**2 * mean).expand_as(real))
    samples = x.clone().requires_grad_()
    distribution_matching(samples, real, fake).sum().backward()
    assert bool((samples.grad > 0).all())  # every sample moves down, as their mean must


def test_agreeing_scores_give_zero_even_at_a_perfect_sample():
    x = torch.ones(2, 3, requires_grad=True)
    value = distribution_matching(x, x.detach(), x.detach())
    value.sum().backward()
    assert value.eq(0).all() and x.grad.eq(0).all()


def test_preferences_of_errors_are_equation_14():
    generator = torch.Generator().manual_seed(2)
    chosen, rejected, chosen_ref, rejected_ref = torch.rand(4, 6, generator=generator, dtype=torch.float64)
    expected = -torch.sigmoid(-3.0 * ((chosen - chosen_ref) - (rejected - rejected_ref))).log()
    torch.testing.assert_close(dpo(-chosen, -rejected, -chosen_ref, -rejected_ref, beta=3.0), expected)
    same = dpo(-chosen, -rejected, -chosen, -rejected, beta=3.0)
    torch.testing.assert_close(same, torch.full_like(same, math.log(2)))


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda x, a: s.two_step_target(x, x, a, a, a), "take fewer steps than"),
        (lambda x, a: s.snr_weight("snr+1", *a), "Unknown weight 'snr.1'"),
        (lambda x, a: s.consistency(x, x, "lpips"), "Unknown distance 'lpips'"),
        (lambda x, a: s.consistency(x, x[:, :2], "l1"), "differ in shape"),
        (lambda x, a: s.consistency(x, x[:, :2]), "differ in shape"),
        (lambda x, a: distribution_matching(x, x, x[:2]), "differ in shape"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call(rows()[0], levels(0.5)[0])
