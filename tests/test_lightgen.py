"""Paper 01, LightGen: golden vectors, limits that must hold, bad input of the losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_vectors import close, golden, reduce
from understudy import InputError
from understudy.evaluation.distances import detail_ratio
from understudy.losses import masked_diffusion as m
from understudy.losses.diffusion import noised
from understudy.losses.preference import dpo

GOLDEN = "01-lightgen"


def tiled(values, draws):
    """The flattened batch, repeated as a whole: `[images · L · draws, ...]`."""
    return values.flatten(0, 1).repeat(draws, *[1] * (values.dim() - 2))


def per_image(values, images, draws):
    """Token values in that order as `[images, draws, L]`."""
    return values.view(draws, images, -1).transpose(0, 1)


@pytest.mark.golden
def test_golden_masks_and_sampling():
    g = golden(GOLDEN)
    length = int(g["seq_len"])
    close(m.cosine_alphas(len(g["alphas_cumprod"])), g["alphas_cumprod"])
    ratio = m.mask_ratio(g["mask_u"], least=float(g["mask_ratio_min"]), deviation=float(g["mask_ratio_std"]))
    close(ratio, g["mask_ratio"])
    even = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    everywhere = m.mask_ratio(even, least=float(g["mask_ratio_min"]), deviation=float(g["mask_ratio_std"]))
    close(everywhere.mean(), g["mask_ratio_mean"], rtol=1e-4)
    assert torch.equal(m.masked_number(ratio, length), g["num_masked"])
    iterations = int(g["decode_iters"])
    after = m.masked_after(length, iterations)
    sampled = [a - b for a, b in zip([length, *after[:-1]], after, strict=True)]
    # The file lists the number masked after the clipping of the last iteration too, which samples all the same.
    assert after[:-1] == g["decode_still_masked_after"].tolist()[:-1]
    assert sampled == g["decode_num_predicted"].tolist()
    weights = [m.linear_guidance(float(g["cfg_scale"]), int(n), length) for n in g["decode_still_masked_after"]]
    close(torch.tensor(weights, dtype=torch.float64), g["cfg_linear"])


@pytest.mark.golden
def test_golden_loss():
    g = golden(GOLDEN)
    images, _, channels = g["tokens"].shape
    draws, table, t = int(g["diffusion_batch_mul"]), g["alphas_cumprod"], g["t"]
    x, mask = tiled(g["tokens"], draws), g["mask"]
    x_t = noised(x, g["noise"], table[t].sqrt(), (1 - table[t]).sqrt())
    close(x_t, g["x_t"])
    output = g["model_output"].clone().requires_grad_()
    predicted, value = output.split(channels, -1)
    mse = m.noise_error(predicted, g["noise"])
    vb = m.variance_error(predicted, value, x, x_t, t, table)
    close(mse, g["per_token_mse"])
    close(vb, g["per_token_vb"], rtol=1e-6, atol=1e-6)

    def loss(errors):
        return reduce(m.image_sums(per_image(errors, images, draws), mask), "token_mean", count=float(mask.sum()))

    both = loss(mse + vb)
    close(both, g["loss_masked"], rtol=1e-7)
    (gradient,) = torch.autograd.grad(both, output, retain_graph=True)
    close(gradient, g["grad_model_output"], rtol=1e-6, atol=1e-9)
    alone = loss(mse)
    close(alone, g["loss_masked_mse_only"])
    close(torch.autograd.grad(alone, output)[0][:, :channels], g["grad_eps_mse_only"])


def sides(g):
    """Predictions of the policy with gradient, and E of policy and reference, for winner and loser."""
    policy = {s: g[f"dpo_policy_eps_{s}"].clone().requires_grad_() for s in "wl"}
    mask, noise = g["dpo_mask"], {s: g[f"dpo_noise_{s}"] for s in "wl"}
    own = {s: m.image_errors(m.noise_error(policy[s], noise[s]), mask) for s in "wl"}
    ref = {s: m.image_errors(m.noise_error(g[f"dpo_ref_eps_{s}"], noise[s]), mask) for s in "wl"}
    return policy, own, ref


def preference(own, ref, beta):
    return dpo(-own["w"], -own["l"], -ref["w"], -ref["l"], beta=beta)


@pytest.mark.golden
def test_golden_preferences():
    g = golden(GOLDEN)
    beta = float(g["dpo_beta"])
    policy, own, ref = sides(g)
    for s in "wl":
        close(own[s] - ref[s], g[f"dpo_err_diff_{s}"])
    logits = beta * ((own["l"] - ref["l"]) - (own["w"] - ref["w"]))
    close(logits, g["dpo_logits"])
    close((logits > 0).double().mean(), g["dpo_implicit_acc"])
    rows = preference(own, ref, beta)
    close(rows, g["dpo_loss_per_pair"])
    loss = reduce(rows, "token_mean")
    close(loss, g["dpo_loss"])
    for s, gradient in zip("wl", torch.autograd.grad(loss, [policy["w"], policy["l"]]), strict=True):
        close(gradient, g[f"dpo_grad_policy_eps_{s}"])
    # The released function has one error for the whole batch, which couples its pairs.
    mask, noise = g["dpo_mask"], {s: g[f"dpo_noise_{s}"] for s in "wl"}

    def whole(values):
        return {s: (m.noise_error(values[s], noise[s]) * mask).sum()[None] / mask.sum() for s in "wl"}

    coupled = preference(whole(policy), whole({s: g[f"dpo_ref_eps_{s}"] for s in "wl"}), beta)
    close(coupled[0], g["dpo_loss_batch_aggregated"])


# -- limits of the card ----------------------------------------------------------------------------------------------


def errors(seed, pairs=5):
    """E of policy and reference for winner and loser, `[4, pairs]`."""
    torch.manual_seed(seed)
    return torch.rand(4, pairs, dtype=torch.float64)


def loss_of(e, beta):
    return preference({"w": e[0], "l": e[1]}, {"w": e[2], "l": e[3]}, beta)


def test_a_policy_at_its_reference_has_the_loss_of_a_coin():
    """Limit 1: ln 2, and half of beta as gradient, against the loser."""
    w, lo = errors(0)[:2]
    own = torch.stack([w, lo]).requires_grad_()
    rows = loss_of((own[0], own[1], w, lo), 3.0)
    close(rows, torch.full_like(rows, math.log(2)))
    (gradient,) = torch.autograd.grad(rows.sum(), own)
    close(gradient, torch.tensor([[1.5], [-1.5]], dtype=torch.float64).expand(2, 5))
    close(loss_of((w, lo, lo, w), 1e-12), rows.detach())  # as for no beta at all, which the loss refuses


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 20.0), st.floats(-3.0, 3.0))
def test_only_the_margin_of_a_pair_matters(seed, beta, shift):
    """Limits 2 and 3."""
    w, lo, wr, lr = errors(seed)
    logits = beta * ((lo - lr) - (w - wr))
    close(loss_of((w, lo, wr, lr), beta), torch.nn.functional.softplus(-logits))
    close(loss_of((lo, w, lr, wr), beta), torch.nn.functional.softplus(logits))
    for moved in ((w + shift, lo + shift, wr + shift, lr + shift), (w + shift, lo, wr + shift, lr)):
        close(loss_of(moved, beta), loss_of((w, lo, wr, lr), beta), rtol=1e-7, atol=1e-9)


def test_the_ends_of_beta():
    """Limit 4: only pairs in the wrong order count for a large beta; a small one is half of beta on every pair."""
    e = errors(3)
    own = e[:2].clone().requires_grad_()
    wrong = (own[1] - e[3]) < (own[0] - e[2])
    assert 0 < int(wrong.sum()) < len(wrong)
    large = torch.autograd.grad(loss_of((own[0], own[1], e[2], e[3]), 1e6).sum(), own)[0] / 1e6
    close(large, torch.stack([wrong.double(), -wrong.double()]), atol=1e-9)
    small = torch.autograd.grad(loss_of((own[0], own[1], e[2], e[3]), 1e-6).sum(), own)[0] / 1e-6
    close(small, torch.tensor([[0.5], [-0.5]], dtype=torch.float64).expand(2, 5), rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.data())
def test_every_iteration_samples_and_the_last_leaves_nothing(length, data):
    """Limit 6."""
    iterations = data.draw(st.integers(1, length))
    after = m.masked_after(length, iterations)
    sampled = [a - b for a, b in zip([length, *after[:-1]], after, strict=True)]
    assert len(after) == iterations and after[-1] == 0 and min(sampled) >= 1 and sum(sampled) == length


def test_guidance_grows_from_none_to_the_weight():
    assert m.linear_guidance(4.0, 16, 16) == 1 and m.linear_guidance(4.0, 0, 16) == 4
    assert m.linear_guidance(1.0, 5, 16) == 1


def test_more_draws_are_the_mean_of_single_ones():
    """Limit 7."""
    torch.manual_seed(0)
    e, mask = torch.rand(3, 4, 6, dtype=torch.float64), torch.rand(3, 6) < 0.8
    each = torch.stack([m.image_errors(e[:, i], mask) for i in range(4)])
    close(m.image_errors(e, mask), each.mean(0))


def test_the_variance_is_trained_alone_and_best_where_it_is_true():
    """The variational term has no gradient to the mean, and none to v where mean and variance are the posterior's."""
    table = m.cosine_alphas(50)
    torch.manual_seed(0)
    x, noise = torch.randn(2, 40, 3, dtype=torch.float64).clamp(-1, 1)
    t = torch.arange(40) + 2
    x_t = noised(x, noise, table[t].sqrt(), (1 - table[t]).sqrt())
    v = torch.full_like(x, -1.0).requires_grad_()
    exact = noise.clone().requires_grad_()
    rows = m.variance_error(exact, v, x, x_t, t, table)
    close(rows, torch.zeros_like(rows), atol=1e-12)
    to_v, to_noise = torch.autograd.grad(rows.sum(), (v, exact), allow_unused=True)
    assert float(to_v.abs().max()) < 1e-9 and to_noise is None


def test_detail_is_lost_by_a_blur():
    torch.manual_seed(0)
    sharp = torch.rand(4, 1, 8, 8)
    assert detail_ratio(sharp, sharp) == 1
    assert detail_ratio(torch.nn.functional.avg_pool2d(sharp, 3, 1, 1), sharp) < 0.3
    flat = torch.linspace(0, 1, 8).expand(4, 1, 8, 8)
    assert detail_ratio(flat, sharp) < 1e-10


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line():
    e, mask = torch.ones(2, 4), torch.ones(2, 4)
    with pytest.raises(InputError, match=r"4 tokens in 5 iterations.*Use 1 to 4"):
        m.masked_after(4, 5)
    with pytest.raises(InputError, match="Image 1 has no masked token"):
        m.image_errors(e, torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]))
    with pytest.raises(InputError, match="error of image 1 is nan"):
        m.image_errors(torch.tensor([[1.0] * 4, [math.nan] * 4]), mask)
    with pytest.raises(InputError, match=r"\(2, 3\) and noise \(2, 4\)"):
        m.noise_error(torch.ones(2, 3), torch.ones(2, 4))
