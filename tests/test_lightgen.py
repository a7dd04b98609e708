"""Paper 01, LightGen: golden vectors, limits that must hold, bad input of the losses."""

import pytest
import torch

from golden_vectors import close, golden, reduce
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
