"""Paper 25, BOOT: golden vectors, limits that must hold, bad input of the losses."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_vectors import close, golden
from understudy import InputError
from understudy.data import NoiseBatch
from understudy.losses import diffusion as d
from understudy.models.diffusion import (
    DenoiserAdapter,
    MixtureDenoiser,
    PointDenoiser,
    Sampler,
    trajectory,
    with_guidance,
)
from understudy.models.noise_levels import Cosine, Table

LEVELS = Cosine()


def gaussian(g):
    """The exact teacher of N(μ, diag τ²)."""

    def f(x, t):
        alpha, sigma = (d.over(v, x) for v in LEVELS.at(t))
        square = g["tau"] ** 2
        return g["mu"] + square * alpha / (alpha**2 * square + sigma**2) * (x - alpha * g["mu"])

    return f


def exact(g, eps, begin, t):
    """The teacher's flow from ε at `begin`, at t."""
    (a, s), (a_t, s_t) = LEVELS.at(begin), LEVELS.at(t)
    z = (eps - a * g["mu"]) / (a**2 * g["tau"] ** 2 + s**2).sqrt()
    return d.over(a_t, eps) * g["mu"] + (d.over(a_t, eps) ** 2 * g["tau"] ** 2 + d.over(s_t, eps) ** 2).sqrt() * z


def noise_batch(eps):
    ids = torch.arange(len(eps))
    return NoiseBatch({}, ids, ids, condition=torch.full_like(ids, -1))


def flow(f, eps, t_max, t_min, steps, levels=LEVELS):
    times = torch.linspace(float(t_max), float(t_min), steps + 1, dtype=torch.float64)
    return trajectory(lambda b: f(b.inputs["x"], b.inputs["t"]), levels, noise_batch(eps), eps, times)


@pytest.mark.golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(dtype):
    g = {k: v.to(dtype) if v.is_floating_point() else v for k, v in golden("25-boot").items()}
    exactly = dtype == torch.float64
    rtol, atol = (1e-10, 1e-12) if exactly else (1e-5, 1e-5)
    f, eps = gaussian(g), g["eps"]
    now, then = LEVELS.at(g["t"]), LEVELS.at(g["s"])
    c = d.ddim_coefficient(*now, *then)
    x_hat = d.noised(g["g_t"], eps, *now)
    clean = f(x_hat, g["t"])
    target = d.bootstrap_target(g["g_t"], clean, c)
    end = f(d.noised(target, eps, *then), g["s"])
    if not exactly:  # near pure noise the signal is x divided by a small alpha, and so is its rounding
        rtol = atol = 1e-5 * max(1.0, 0.03 / float(now[0].min()))
    found = {
        "alpha_t": now[0],
        "sigma_t": now[1],
        "alpha_s": then[0],
        "sigma_s": then[1],
        "lambda_t": (now[1] / now[0]).log(),
        "lambda_s": (then[1] / then[0]).log(),
        "coef": c,
        "x_hat": x_hat,
        "f_teacher": clean,
        "y_target": target,
        "x_s_ddim": d.ddim_step(x_hat, clean, *now, *then),
        "y_target_heun": d.bootstrap_target(g["g_t"], (clean + end) / 2, c),
        "y_exact_t": d.signal_of(exact(g, eps, g["t_max"], g["t"]), eps, *now),
        "y_exact_s": d.signal_of(exact(g, eps, g["t_max"], g["s"]), eps, *then),
        "exact_x_tmin": exact(g, eps, g["t_max"], g["t_min"].expand(len(eps))),
        "f_cfg": d.guided(g["f_cond"], g["f_uncond"], float(g["cfg_w"])),
    }
    at = g["t"].clone().requires_grad_()
    (rise,) = torch.autograd.grad((lambda alpha, sigma: (sigma / alpha).log().sum())(*LEVELS.at(at)), at)
    found["dlambda_dt"] = rise
    found["y_target_firstorder"] = d.bootstrap_target(g["g_t"], clean, g["delta"] * rise)
    y = flow(f, eps, g["t_max"], g["t_min"], int(g["ddim_steps"]))
    found["ddim_x_tmin"] = d.noised(y, eps, *LEVELS.at(g["t_min"].expand(len(eps))))
    last = g["t_max"].expand(len(eps))
    found["f_teacher_T"] = f(eps, last)
    for name, value in found.items():
        close(value, g[name], rtol=rtol, atol=atol)
    begun = g["g_T"].clone().requires_grad_()
    boundary = d.boundary(begun, found["f_teacher_T"]).mean()
    close(boundary, g["loss_bc"], rtol=rtol)
    close(torch.autograd.grad(boundary, begun)[0], g["grad_g_T"], rtol=rtol, atol=atol)
    for kind in ("uniform", "inv_delta", "inv_coef"):
        student = g["g_s"].clone().requires_grad_()
        weight = d.bootstrap_weight(kind, g["t"] - g["s"] if exactly else g["delta"].expand(len(eps)), c)
        loss = d.bootstrapping(student, target, weight).mean()
        close(loss, g[f"loss_bs_{kind}"], rtol=rtol if exactly else 1e-4)
        scale = float(g[f"grad_g_s_{kind}"].abs().max())
        close(torch.autograd.grad(loss, student)[0], g[f"grad_g_s_{kind}"], rtol=rtol, atol=atol * scale)
    close(loss.detach() + g["beta"] * boundary.detach(), g["loss_total_inv_coef"], rtol=rtol)


times = st.floats(0.02, 0.98)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), times, times, st.sampled_from(["cosine", "table"]))
def test_the_target_is_one_ddim_step(seed, a, b, kind):
    """Limit 1, on both kinds of schedule; and limit 3."""
    levels = LEVELS if kind == "cosine" else Table(torch.linspace(0.999, 0.0, 200, dtype=torch.float64))
    t, s = (levels.snap(torch.tensor([v], dtype=torch.float64)) for v in (max(a, b), min(a, b)))
    if bool(t - s < 1e-3):
        return
    torch.manual_seed(seed)
    eps, y, f = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    now, then = levels.at(t), levels.at(s)
    c = d.ddim_coefficient(*now, *then)
    target = d.bootstrap_target(y, f, c)
    close(d.signal_of(d.ddim_step(d.noised(y, eps, *now), f, *now, *then), eps, *then), target, rtol=1e-9, atol=1e-9)
    assert bool((c > 0).all() & (c <= 1).all())


def test_the_coefficient_at_its_ends():
    at = lambda *t: LEVELS.at(torch.tensor(t, dtype=torch.float64))  # noqa: E731
    assert d.ddim_coefficient(*at(1.0), *at(0.5)) == 1 and d.ddim_coefficient(*at(0.5), *at(0.0)) == 1
    near = d.ddim_coefficient(*at(0.5), *at(0.5 - 1e-6))
    close(near, torch.tensor([1e-6 * math.pi], dtype=torch.float64), rtol=1e-4)  # δ λ'(½), λ'(t) = π / sin(πt)
    for t, s in ((0.5, 0.5), (0.4, 0.6), (0.3, 1.0)):
        with pytest.raises(InputError, match="s >= t"):
            d.ddim_coefficient(*at(t), *at(s))


def test_a_constant_teacher_is_a_fixed_point_and_gradients_stop():
    """Limits 2 and 4."""
    m = torch.tensor([[0.3, -1.0]], dtype=torch.float64).repeat(4, 1)
    t = torch.linspace(0.2, 0.9, 4, dtype=torch.float64)
    c = d.ddim_coefficient(*LEVELS.at(t), *LEVELS.at(t - 0.1))
    y_t, y_s, f = (m.clone().requires_grad_() for _ in range(3))
    loss = d.bootstrapping(y_s, d.bootstrap_target(y_t, f, c), 1 / c.square()).sum() + d.boundary(y_s, f).sum()
    assert loss.eq(0)
    grads = torch.autograd.grad(loss, (y_s, y_t, f), allow_unused=True)
    assert grads[0].eq(0).all() and grads[1] is None and grads[2] is None


def test_ddim_meets_the_exact_flow_linearly():
    """Limit 5."""
    torch.manual_seed(1)
    g = {"mu": torch.randn(3).double(), "tau": torch.rand(3).double() + 0.5}
    eps = torch.randn(64, 3, dtype=torch.float64)
    begin, end = torch.tensor(0.98).double(), torch.tensor(0.02).double()
    y = d.signal_of(exact(g, eps, begin, end.expand(64)), eps, *LEVELS.at(end.expand(64)))
    errors = [(flow(gaussian(g), eps, begin, end, n) - y).square().mean().sqrt() for n in (50, 100, 200)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.8 < coarse / fine < 2.2


def test_predictions_agree_and_an_error_costs_the_same():
    torch.manual_seed(2)
    x0, eps, wrong = torch.randn(3, 5, 4, dtype=torch.float64)
    alpha, sigma = LEVELS.at(torch.linspace(0.1, 0.9, 5, dtype=torch.float64))
    x = d.noised(x0, eps, alpha, sigma)
    a, s = d.over(alpha, x), d.over(sigma, x)
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0}
    for kind, output in outputs.items():
        close(d.x0_from(output, x, alpha, sigma, kind), x0)
        clean = d.x0_from(output + wrong, x, alpha, sigma, kind)
        close(d.denoising_loss(clean, x0, alpha, sigma, kind), wrong.square().mean(1))


@pytest.mark.parametrize("prediction", d.PREDICTIONS)
def test_a_student_of_one_call_is_read_as_at_its_noise(prediction):
    """At t_max it begins as its teacher; at t_min the network still decides, and not the noise it was shown."""
    torch.manual_seed(3)
    teacher = DenoiserAdapter(PointDenoiser(2, [8]).double(), LEVELS, prediction, (2,), clip=5.0)
    student = copy.deepcopy(teacher).one_call(0.01, 0.99)
    eps = torch.randn(4, 2, dtype=torch.float64)
    batch = noise_batch(eps).at(eps, 0.99)
    with torch.no_grad():
        if prediction != "epsilon":
            close(student(batch).signal.values, teacher(batch).signal.values)
        before = student.draw(noise_batch(eps), eps)
        student.model.body[-1].bias += 1
        moved = (student.draw(noise_batch(eps), eps) - before).abs()
    assert student.calls == 1 and student.clip is None and bool((moved > 0.99).all() & (moved < 1.01).all())


def test_guidance_has_its_corners():
    """Limit 6, through the mixture: asked for a mode it knows one Gaussian, asked for none all of them."""
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    model = MixtureDenoiser(centres.double(), 0.2, LEVELS)
    batch = noise_batch(torch.zeros(3)).at(torch.randn(3, 2).double(), 0.6, torch.tensor([0, 1, 0]))
    ask = lambda b: model(b.inputs["x"], b.inputs["t"], b.condition.masked_fill(b.condition < 0, 2))  # noqa: E731
    none = ask(batch.at(batch.inputs["x"], 0.6, torch.full((3,), -1)))
    close(with_guidance(ask, batch, 1.0), ask(batch))
    close(with_guidance(ask, batch, 0.0), none)
    close(with_guidance(ask, batch, 3.0), none + 3 * (ask(batch) - none))
    close(none, model(batch.inputs["x"], batch.inputs["t"]))
    alpha, sigma = LEVELS.at(batch.inputs["t"])
    x, a, s = batch.inputs["x"], alpha[:, None], sigma[:, None]
    centre = centres.double()[batch.condition]
    close(ask(batch), centre + 0.04 * a / (a**2 * 0.04 + s**2) * (x - a * centre))


def test_guidance_stays_within_the_bound_of_the_teacher():
    """Guidance reaches beyond both answers; a bound of x_0 is part of f."""
    torch.manual_seed(4)
    model = PointDenoiser(2, [8], classes=3).double()
    batch = noise_batch(torch.zeros(16)).at(torch.randn(16, 2).double(), 0.6, torch.arange(16) % 3)
    free, bound = (
        DenoiserAdapter(model, LEVELS, "sample", (2,), classes=3, clip=clip, sampler=Sampler(guidance=500.0))
        for clip in (None, 0.5)
    )
    with torch.no_grad():
        model.body[-1].weight.mul_(0.1)  # each answer lies within the bound
        wide, held = free.denoise(batch), bound.denoise(batch)
    assert float(wide.abs().max()) > 0.5 and float(held.abs().max()) == 0.5
    inside = wide.abs() < 0.5
    close(held[inside], wide[inside])


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: d.x0_from(torch.ones(1, 2), torch.ones(1, 2), *LEVELS.at(torch.ones(1)), "epsilon"), "alpha = 0"),
        (lambda: d.x0_from(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), torch.ones(1), "epsilom"), "'epsilon'"),
        (lambda: d.boundary(torch.ones(2, 3), torch.ones(2, 4)), "differ in shape"),
        (lambda: d.bootstrap_weight("delta", torch.ones(1), torch.ones(1)), "inv_delta"),
        (lambda: Table(torch.tensor([0.1, 0.9])), "falling"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_v_is_read_where_only_noise_is_left():
    x = torch.randn(2, 3, dtype=torch.float64)
    x0 = d.x0_from(-x, x, *LEVELS.at(torch.ones(2)), "v_prediction")
    assert x0.isfinite().all() and math.isclose(float(LEVELS.at(torch.ones(1))[0]), 0)
