"""Papers 2 and 39: preference losses against golden vectors, their limits, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden_vectors import close, golden
from understudy import InputError, losses
from understudy.losses import anchored, preference
from understudy.losses._pairs import softplus
from understudy.methods.adpo import ADPO
from understudy.training import TrainState


@pytest.fixture(scope="module")
def g():
    return golden("39-dpo-variants")


def pairs(g):
    """Token log-probs as a leaf, sequence sums of both sides, references, token counts."""
    token = g["token_logp"].clone().requires_grad_()
    mask = g["completion_mask"].bool()
    sums, counts = token.masked_fill(~mask, 0.0).sum(1), mask.sum(1)
    chosen, rejected = sums.chunk(2)
    assert torch.equal(counts, g["n_tokens"])
    close(chosen, g["policy_logp_chosen"], rtol=1e-9)
    close(rejected, g["policy_logp_rejected"], rtol=1e-9)
    return token, chosen, rejected, g["ref_logp_chosen"], g["ref_logp_rejected"], *counts.chunk(2)


def agrees(g, name, values, token):
    mean = values.mean()
    close(mean, g[f"loss_{name}"], rtol=1e-9)
    (gradient,) = torch.autograd.grad(mean, token, retain_graph=True)
    close(gradient, g[f"grad_{name}"], rtol=1e-8, atol=1e-11)


@pytest.mark.golden
def test_golden_with_reference(g):
    token, w, lo, rw, rl, nw, nl = pairs(g)
    beta, e = float(g["beta_dpo"]), float(g["label_smoothing"])
    ratios = (w, lo, rw, rl)
    means = tuple(preference.per_token(x, n) for x, n in zip(ratios, (nw, nl, nw, nl), strict=True))
    agrees(g, "dpo", preference.dpo(*ratios, beta=beta), token)
    close(preference.dpo(*ratios, beta=beta), g["per_pair_dpo"], rtol=1e-9)
    agrees(g, "hinge", preference.hinge(*ratios, beta=beta), token)
    close(preference.dpo(*ratios, beta=beta, label_smoothing=e), g["per_pair_cdpo"], rtol=1e-9)
    agrees(g, "cdpo", preference.dpo(*ratios, beta=beta, label_smoothing=e), token)
    agrees(g, "robust_dpo", preference.robust_dpo(*ratios, beta=beta, label_smoothing=e), token)
    agrees(g, "dpo_lengthnorm", preference.dpo(*means, beta=float(g["beta_simpo"])), token)
    agrees(g, "ipo_sum", preference.ipo(*ratios, beta=float(g["beta_ipo"])), token)
    agrees(g, "ipo_tokenmean", preference.ipo(*means, beta=float(g["beta_ipo"])), token)


@pytest.mark.golden
def test_golden_kto(g):
    token, w, lo, rw, rl, *_ = pairs(g)
    options = {"beta": float(g["beta_kto"]), "desirable_weight": float(g["kto_w_desirable"])}
    options["undesirable_weight"] = float(g["kto_w_undesirable"])
    zw, zl = preference.kto_kl(w - rw), preference.kto_kl(lo - rl)
    close(zw, g["kto_pair_kl_chosen"], rtol=1e-9)
    yes = torch.ones(len(w), dtype=torch.bool)
    close(zl, g["kto_pair_kl_rejected"], rtol=1e-9)
    beta = {"beta": options["beta"]}  # TRL's paired form has no weights
    sides = torch.cat([preference.kto(w - rw, yes, zl, **beta), preference.kto(lo - rl, ~yes, zw, **beta)])
    agrees(g, "kto_paired", sides, token)
    close(sides, g["kto_pair_per_example"], rtol=1e-9)
    for case in ("", "_negkl", "_onlydesirable"):
        logp = g["kto_logp"].clone().requires_grad_()
        ours, theirs = g["kto_mismatch_logp"], g["kto_mismatch_ref_logp"]
        if case == "_negkl":
            ours, theirs = theirs, ours
        label = torch.ones_like(g["kto_label"]).bool() if case == "_onlydesirable" else g["kto_label"].bool()
        z = preference.kto_kl(ours - theirs)
        close(z, g[f"kto_kl{case}"], rtol=1e-9)
        agrees(g, f"kto_unpaired{case}", preference.kto(logp - g["kto_ref_logp"], label, z, **options), logp)


@pytest.mark.golden
def test_golden_without_reference(g):
    token, w, lo, _, _, nw, nl = pairs(g)
    nll = -w.sum() / nw.sum()
    close(nll, g["nll_chosen"], rtol=1e-9)
    cpo = preference.cpo(w, lo, beta=float(g["beta_cpo"]))
    simpo = preference.simpo(w, lo, nw, nl, beta=float(g["beta_simpo"]), gamma=float(g["simpo_gamma"]))
    orpo = preference.odds_ratio(w, lo, nw, nl)
    alpha = float(g["cpo_alpha"])
    agrees(g, "cpo_prefonly", cpo, token)
    agrees(g, "cpo", cpo + alpha * nll, token)
    agrees(g, "simpo", simpo, token)
    agrees(g, "cpo_simpo", simpo + alpha * nll, token)
    agrees(g, "orpo", nll + float(g["beta_orpo"]) * orpo, token)
    close((nll + float(g["beta_orpo"]) * orpo).mean(), g["loss_orpo_trl_float32"], rtol=1e-5)


finite = st.lists(st.floats(-300, 300), min_size=3, max_size=3).map(lambda v: torch.tensor(v, dtype=torch.float64))


@given(finite, finite, finite, finite, st.floats(-50, 50))
def test_limits_of_pairs(w, lo, rw, rl, c):
    same = (w, lo, w, lo)
    close(preference.dpo(*same), torch.full_like(w, math.log(2)))
    close(preference.hinge(*same), torch.ones_like(w))
    close(preference.ipo(*same, beta=0.2), torch.full_like(w, 1 / (4 * 0.2**2)))
    close(preference.kto(w - w, w > 0, torch.zeros(())), torch.full_like(w, 0.5))
    close(preference.dpo(w + c, lo + c, rw, rl), preference.dpo(w, lo, rw, rl), atol=1e-9)
    close(preference.robust_dpo(w, lo, rw, rl, label_smoothing=0.0), preference.dpo(w, lo, rw, rl))
    close(preference.cpo(w, lo), preference.dpo(w, lo, rw, rw))
    n = torch.tensor([4, 4, 4])
    close(preference.simpo(w, lo, n, n, beta=2.0, gamma=0.0), preference.cpo(w, lo, beta=0.5))
    leaf = w.clone().requires_grad_()
    preference.dpo(leaf, lo, rw, rl, beta=0.3).sum().backward()
    close(leaf.grad, -0.3 * torch.sigmoid(-0.3 * ((w - rw) - (lo - rl))), atol=1e-12)


def test_extreme_margins_stay_finite():
    w = torch.tensor([1e5, -1e5], dtype=torch.float64, requires_grad=True)
    lo, r = torch.zeros(2).double(), torch.zeros(2).double()
    value = preference.dpo(w, lo, r, r).sum()
    value.backward()
    assert value.isfinite() and w.grad.tolist() == [0.0, -0.1]
    n = torch.tensor([1, 1])
    assert preference.odds_ratio(torch.zeros(2), -torch.ones(2), n, n).isfinite().all()
    at = torch.tensor([math.log(0.9 / 0.1) / 0.1], dtype=torch.float64, requires_grad=True)
    preference.dpo(at, lo[:1], r[:1], r[:1], label_smoothing=0.1).backward()
    assert at.grad.abs() < 1e-12


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda x: preference.dpo(x, x, x, x, beta=0.0), "beta is 0.0"),
        (lambda x: preference.dpo(x, x, x, x, label_smoothing=0.5), "label_smoothing is 0.5"),
        (lambda x: preference.robust_dpo(x, x, x, x, label_smoothing=-0.1), "label_smoothing is -0.1"),
        (lambda x: preference.dpo(x, x - math.inf, x, x), "log-probability 0 is -inf"),
        (lambda x: preference.per_token(x, torch.tensor([3, 0])), "Completion 1 of the batch has no tokens"),
        (
            lambda x: anchored.anchored_cross_entropy(x[None], x[None], torch.tensor([[0.5, 0.5]]), tau=0.0),
            "tau is 0.0",
        ),
        (lambda x: anchored.anchored_cross_entropy(x[None], x[None], torch.tensor([[0.5, 0.6]]), tau=1.0), "sum to 1"),
        (
            lambda x: anchored.anchored_cross_entropy(x[None], x[None] - math.inf, torch.tensor([[0.5, 0.5]]), tau=1.0),
            "anchor of list 0",
        ),
        (lambda x: anchored.softmax_advantage(x[None] * math.nan, beta=1.0), "reward of list 0, candidate 0 is nan"),
        (lambda x: anchored.best(x[None], torch.zeros(1, 2)), "List 0 has no valid candidate"),
        (lambda x: anchored.anchored_plackett_luce(x[None], x[None], strict=True), "List 0 has equal rewards"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call(torch.zeros(2))


@pytest.mark.golden
def test_golden_lists():
    g = golden("02-adpo")
    tau, beta, mask = float(g["tau_anc"]), float(g["beta_r"]), g["lw_mask"].bool()
    leaf = g["lw_logp"].clone().requires_grad_()
    q = anchored.softmax_advantage(g["lw_reward"], beta=beta, mask=mask)
    close(q, g["lw_q"], rtol=1e-9)
    close(anchored._advantage(g["lw_reward"], mask).masked_fill(~mask, 0.0), g["lw_adv"], rtol=1e-9)
    values = anchored.anchored_cross_entropy(leaf, g["lw_ref_logp"], q, tau=tau, mask=mask)
    close(values, g["lw_ce"], rtol=1e-9)
    close(values.mean(), g["lw_loss"], rtol=1e-9)
    if mask.all(1).any():  # the author's function knows no mask
        close(values[mask.all(1)].mean(), g["lw_official_loss_fullrows"], rtol=1e-9)
    close(values + torch.special.xlogy(q, q).sum(-1), g["lw_kl"], rtol=1e-9, atol=1e-9)
    values.mean().backward()
    close(leaf.grad, g["lw_grad_logp"], rtol=1e-9)
    p = q + tau * len(q) * leaf.grad  # the gradient of a list is (p̃ − q) / τ
    close(p, g["lw_ptilde"], rtol=1e-9)
    leaf = g["pl_score"].clone().requires_grad_()
    nll = anchored.anchored_plackett_luce(leaf, g["pl_reward"])
    close(nll * (leaf.shape[1] - 1), g["pl_nll_per_list"], rtol=1e-9)
    close(nll.mean(), g["pl_loss_mean_positions"], rtol=1e-9)
    nll.mean().backward()
    close(leaf.grad, g["pl_grad_score_mean_positions"], rtol=1e-9)
    smooth = anchored.anchored_plackett_luce(g["pl_score"], g["pl_reward"], top=2, label_smoothing=0.1, poly=1.0)
    close(smooth.mean(), g["pl_loss_poly1_top2_ls01"], rtol=1e-9)


def test_large_scores_at_places_that_do_not_count_leave_the_gradient_finite():
    """Card 2: log-ratios of ±100 stay finite; the last place of an order has no loss."""
    score = torch.tensor([[0.0, 100.0], [1e4, -1e4]], requires_grad=True)
    values = anchored.anchored_plackett_luce(score, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), poly=1.0)
    values.sum().backward()
    close(score.grad, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
    close(values, torch.tensor([101.0, 20001.0]))


def test_lists_in_half_precision_are_computed_in_single():
    reward, score = torch.tensor([[3.0, 1.0, 500.0]]), torch.tensor([[50.0, -50.0, 60.0]])
    close(anchored.kde_rank(reward.bfloat16(), beta=1.0), anchored.kde_rank(reward, beta=1.0))
    half, single = (s.clone().requires_grad_() for s in (score.bfloat16(), score))
    for leaf in (half, single):
        anchored.anchored_plackett_luce(leaf, reward).sum().backward()
    close(half.grad.float(), single.grad.bfloat16().float())


def test_a_target_by_a_temperature_that_is_not_positive_is_refused():
    rewards = torch.tensor([[1.0, 2.0]])
    for target in (anchored.softmax_advantage, anchored.kde_rank):
        with pytest.raises(InputError, match="beta is 0 and must be positive"):
            target(rewards, beta=0)
    with pytest.raises(InputError, match="beta is 0 and must be positive"):
        anchored.bradley_terry(*rewards[0], beta=0)


@pytest.mark.golden
def test_golden_pairs_as_lists():
    g = golden("02-adpo")
    leaves = [g[k].clone().requires_grad_() for k in ("pw_chosen_logp", "pw_rejected_logp")]
    p = g["pw_p"]
    anchor = torch.stack([g["pw_ref_chosen_logp"], g["pw_ref_rejected_logp"]], 1)
    q = torch.stack([p, 1 - p], 1)
    values = anchored.anchored_cross_entropy(torch.stack(leaves, 1), anchor, q, tau=float(g["tau_anc"]))
    close(values, g["pw_loss_per_pair"], rtol=1e-9, atol=1e-9)
    close(values.mean(), g["pw_loss"], rtol=1e-9)
    values.mean().backward()
    close(leaves[0].grad, g["pw_grad_chosen"], rtol=1e-9)
    close(leaves[1].grad, g["pw_grad_rejected"], rtol=1e-9)
    close(anchored.bradley_terry(*g["pw_bt_rewards"].T, beta=float(g["beta_r"])), g["pw_bt_p"], rtol=1e-9)


@pytest.mark.golden
def test_golden_targets_and_anchors():
    g = golden("02-adpo")
    reward, full = g["kde_reward"], torch.ones_like(g["kde_reward"], dtype=torch.bool)
    options = {"factor": float(g["kde_h_factor"]), "least": float(g["kde_h_min"]), "clip": float(g["kde_eps"])}
    close(anchored.kde_width(reward, full, options["factor"], options["least"]), g["kde_h"], rtol=1e-9)
    close(anchored.kde_logits(reward, full, *options.values()), g["kde_logit"], rtol=1e-9)
    close(anchored.kde_logits(reward, full, *options.values()).sigmoid(), g["kde_cdf"], rtol=1e-9)
    close(anchored.kde_rank(reward, beta=float(g["kde_beta"]), **options), g["kde_q"], rtol=1e-9)
    tau = float(g["tau_anc"])
    close(anchored.exact_teacher(g["tt_teacher_logp"][None], g["tt_ref_logp"][None], tau=tau)[0], g["tt_q"], rtol=1e-9)
    q, log_prob = g["opt_q"][None], g["opt_logp"][None]

    def value(x):
        return anchored.anchored_cross_entropy(x, g["opt_ref_logp"][None], q, tau=tau).sum()

    assert torch.autograd.functional.jacobian(value, log_prob).abs().max() < 1e-10
    close(torch.autograd.functional.hessian(value, log_prob)[0, :, 0], g["opt_hessian"], rtol=1e-8)


@pytest.mark.golden
def test_golden_adaptive_temperature():
    g = golden("02-adpo")
    found = anchored.adaptive_temperature(
        float(g["at_tau_base"]),
        g["at_H"],
        g["at_R"],
        by_entropy=float(g["at_alpha"]),
        by_reward=float(g["at_beta"]),
        least=float(g["at_tau_min"]),
        most=float(g["at_tau_max"]),
    )
    close(found, g["at_tau"], rtol=1e-9)


def moved(anchor, policy, method, step):
    """The anchor's parameters after a step."""
    sides = [torch.nn.Linear(1, len(anchor), bias=False, dtype=torch.float64) for _ in range(2)]
    for side, values in zip(sides, (anchor, policy), strict=True):
        side.weight.data = values[:, None].clone()
    method.on_step_end(TrainState(companions={"anchor": sides[0]}, student=sides[1], step=step))
    assert sides[1].weight.data[:, 0].equal(policy)
    return sides[0].weight.data[:, 0]


@pytest.mark.golden
def test_golden_moving_anchor():
    g = golden("02-adpo")
    method = ADPO(anchor="ema", decay=float(g["ema_decay"]))
    close(moved(g["ema_anchor"], g["ema_policy"], method, 1), g["ema_new_anchor"], rtol=1e-9)


def test_limits_of_moving_anchors():
    old, new = torch.arange(3.0).double(), torch.arange(3.0).double() + 0.1
    assert moved(old, new, ADPO(anchor="ema", decay=1.0), 1).equal(old)  # fixed
    for method in (ADPO(anchor="ema", decay=0.0), ADPO(anchor="dynamic", every=1)):
        assert moved(old, new, method, 1).equal(new)
    waits = ADPO(anchor="dynamic", every=3)
    assert [moved(old, new, waits, step).equal(new) for step in (1, 2, 3, 4, 6)] == [False, False, True, False, True]


def test_softplus_is_exact_where_that_of_torch_is_cut_off():
    x = torch.tensor([-800.0, -40, -21, -1, 0, 1, 19, 20.5, 25, 36, 800], dtype=torch.float64, requires_grad=True)
    value = softplus(x)
    wanted = [max(v, 0.0) + math.log1p(math.exp(-abs(v))) for v in x.tolist()]
    close(value, torch.tensor(wanted, dtype=torch.float64), rtol=1e-15, atol=0)
    value.sum().backward()
    close(x.grad, torch.sigmoid(x.detach()), rtol=1e-14, atol=0)
    assert abs(float(torch.nn.functional.softplus(x.detach()[7])) - wanted[7]) > 1e-9


def test_limits_of_lists():
    torch.manual_seed(0)
    x, ref = torch.randn(3, 5, dtype=torch.float64) * 40, torch.randn(3, 5, dtype=torch.float64) * 40
    q = torch.softmax(torch.randn(3, 5, dtype=torch.float64), -1)
    base = anchored.anchored_cross_entropy(x, ref, q, tau=0.7)
    close(anchored.anchored_cross_entropy(x + 7.0, ref - 3.0, q, tau=0.7), base, atol=1e-9)
    first = torch.tensor([[1.0, 0.0]]).double()
    dpo = preference.dpo(x[:1, 0], x[:1, 1], ref[:1, 0], ref[:1, 1], beta=1 / 0.7)
    close(anchored.anchored_cross_entropy(x[:1, :2], ref[:1, :2], first, tau=0.7), dpo, atol=1e-12)
    two = anchored.anchored_plackett_luce((x - ref)[:1, :2] / 0.7, torch.tensor([[1.0, 0.0]]))
    close(two, dpo, atol=1e-12)
    leaf = ref.clone().requires_grad_()
    anchored.anchored_cross_entropy(leaf, ref, q, tau=0.7).mean().backward()
    close(leaf.grad, (1 / 5 - q) / (0.7 * 3))  # a policy at its anchor
    whole = torch.log_softmax(x, -1)
    taught = anchored.tempered(ref, temperature=2.0)
    kd = losses.cross_entropy_soft(whole, ref, temperature=2.0)
    close(anchored.anchored_cross_entropy(whole, torch.zeros_like(x), taught, tau=2.0), kd, atol=1e-9)
    one_hot = anchored.best(ref)
    sft = losses.cross_entropy(x, ref.argmax(-1))
    close(anchored.anchored_cross_entropy(x, torch.zeros_like(x), one_hot, tau=1.0), sft, atol=1e-9)
    each = torch.tensor([0.3, 0.7, 2.0]).double()
    apart = [
        anchored.anchored_cross_entropy(*(v[i : i + 1] for v in (x, ref, q)), tau=float(each[i])) for i in range(3)
    ]
    close(anchored.anchored_cross_entropy(x, ref, q, tau=each), torch.cat(apart), atol=1e-9)
    tied = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]]).expand(3, 5)  # of equals the first goes first
    told = torch.tensor([[3.0, 4.0, 2.0, 0.0, 1.0]]).expand(3, 5)
    close(anchored.anchored_plackett_luce(x, tied), anchored.anchored_plackett_luce(x, told, strict=True), atol=1e-12)
    one = anchored.anchored_cross_entropy(x[:, :1], ref[:, :1], torch.ones(3, 1), tau=1.0)
    assert one.eq(0).all()
    poisoned, mask = x.clone(), torch.ones(3, 5).bool()
    mask[:, 3:] = False
    poisoned[:, 3], poisoned[:, 4] = math.nan, -math.inf
    half = q[:, :3] / q[:, :3].sum(-1, keepdim=True)
    padded = torch.cat([half, torch.full((3, 2), math.nan)], 1)
    leaf = poisoned.requires_grad_()
    value = anchored.anchored_cross_entropy(leaf, poisoned.detach(), padded, tau=1.0, mask=mask)
    value.sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad[:, 3:].eq(0).all()


def test_limits_of_rank_smoothing():
    outlier = torch.tensor([[0.0, 1, 2, 3, 500.0]]).double()
    worse = torch.tensor([[0.0, 1, 2, 3, 5e6]]).double()
    close(anchored.kde_rank(outlier, beta=0.5), anchored.kde_rank(worse, beta=0.5), atol=1e-12)
    equal = torch.full((1, 5), 3.0).double()
    close(anchored.kde_rank(equal, beta=0.5), torch.full((1, 5), 0.2, dtype=torch.float64))
    close(anchored.softmax_advantage(equal, beta=0.5), torch.full((1, 5), 0.2, dtype=torch.float64))
    influence = anchored.kde_logits(worse, torch.ones_like(worse, dtype=torch.bool))
    close(influence[0, 4], torch.tensor(math.log(2 * 5 - 1), dtype=torch.float64))  # of an outlier, however far
    narrow = anchored.kde_logits(outlier, torch.ones_like(outlier, dtype=torch.bool), factor=0.0, least=1e-9)
    close(narrow.sigmoid(), (torch.arange(1, 6).double() - 0.5)[None] / 5)  # mid-ranks
    some = torch.tensor([[0.3, -1.0, 2.0, 0.9]]).double()
    close(anchored.kde_rank(3 * some + 2, beta=0.5), anchored.kde_rank(some, beta=0.5), atol=1e-9)


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: preference.dpo(a, b, a - 1, b + 1),
        lambda a, b: preference.kto_pair(a, b, a - 1, b + 1),
        lambda a, b: preference.kto(a, a > -20, b.mean()),
        preference.cpo,
        lambda a, b: preference.simpo(a, b, torch.tensor([3, 4]), torch.tensor([5, 6])),
        lambda a, b: preference.odds_ratio(a, b, torch.tensor([3, 4]), torch.tensor([5, 6])),
        lambda a, b: preference.signed_likelihood(torch.stack([a, b], 1), torch.tensor([1.0, -0.5]), gamma=0.1),
    ],
)
def test_half_precision_log_probabilities_are_compared_in_single(loss):
    a, b = torch.tensor([-20.0, -31.5]).bfloat16(), torch.tensor([-25.0, -30.0]).bfloat16()
    found = loss(a, b)
    assert found.dtype == torch.float32
    close(found, loss(a.float(), b.float()))
