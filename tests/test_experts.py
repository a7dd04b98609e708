"""Paper 03: routing, mimic distillation and preference distillation against golden vectors, and their limits."""

import math

import pytest
import torch
from torch import nn

from golden_vectors import close, golden, reduce
from understudy.data import Batch
from understudy.errors import InputError
from understudy.losses import cross_entropy, cross_entropy_soft, entropy, forward_kl
from understudy.losses.experts import expert_capacity, load_balance, top_k_gates, within_capacity
from understudy.losses.preference import dpo, kto_kl, kto_pair, rewards
from understudy.models.upcycling import MixtureOfExperts

SIDES = ("logp_pi_w", "logp_pi_l", "logp_ref_w", "logp_ref_l")


def batch_of(labels):
    return Batch({"input_ids": labels, "attention_mask": torch.ones_like(labels)}, labels, torch.arange(len(labels)))


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["shifted", "unshifted"])
def test_mimic(kind):
    g = golden("03-llava-mod")
    labels = g["labels"].masked_fill(g["labels"] == int(g["ignore_index"]), -100)
    counted = batch_of(labels).select if kind == "shifted" else (lambda x: x[labels != -100])
    student = g["student_logits"].clone().requires_grad_()
    rows, target = counted(student), counted(g["teacher_logits"])
    value = reduce(cross_entropy_soft(rows, target), "token_mean")
    close(value, g[f"mimic_ce_{kind}"], rtol=1e-9)
    close(reduce(entropy(target), "token_mean"), g[f"mimic_teacher_entropy_{kind}"], rtol=1e-9)
    kl = reduce(forward_kl(rows, target), "token_mean")
    close(kl, g[f"mimic_kl_{kind}"], rtol=1e-9)
    for loss in (value, kl):
        close(torch.autograd.grad(loss, student, retain_graph=True)[0], g[f"mimic_grad_{kind}"], rtol=1e-9)


@pytest.mark.golden
def test_labels_and_sequences():
    g = golden("03-llava-mod")
    labels = g["labels"].masked_fill(g["labels"] == int(g["ignore_index"]), -100)
    batch = batch_of(labels)
    close(
        reduce(cross_entropy(batch.select(g["student_logits"]), batch.row_labels), "token_mean"),
        g["lm_loss"],
        rtol=1e-9,
    )
    values = -cross_entropy(batch.select(g["seq_logits"]), batch.row_labels)
    close(values.new_zeros(len(labels)).index_add(0, batch.sequence, values), g["seq_logp"], rtol=1e-9)


@pytest.mark.golden
def test_preference_distillation():
    g = golden("03-llava-mod")
    beta = float(g["beta"])
    sides = [g[n].clone().requires_grad_(n.startswith("logp_pi")) for n in SIDES]
    values = dpo(*sides, beta=beta)
    close(values, g["pd_sigmoid_losses"], rtol=1e-9)
    close(reduce(values, "token_mean"), g["pd_sigmoid_loss"], rtol=1e-9)
    for ours, n in zip(torch.autograd.grad(reduce(values, "token_mean"), sides[:2]), "wl", strict=True):
        close(ours, g[f"pd_sigmoid_grad_{n}"], rtol=1e-9)
    for ours, n in zip(rewards("dpo", *sides, beta), "wl", strict=True):
        close(ours, g[f"pd_reward_{n}"], rtol=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize("detach", [False, True])
def test_kto_pair(detach):
    g = golden("03-llava-mod")
    sides = [g[n].clone().requires_grad_(n.startswith("logp_pi")) for n in SIDES]
    values = kto_pair(*sides, beta=float(g["beta"]), detach_kl=detach)
    close(values.T.flatten(), g["pd_kto_pair_losses"], rtol=1e-9)
    loss = reduce(values.mean(1), "token_mean")
    close(loss, g["pd_kto_pair_loss"], rtol=1e-9)
    for ours, n in zip(torch.autograd.grad(loss, sides[:2]), "wl", strict=True):
        close(ours, g[f"pd_kto_pair_grad_{n}{'_detached_kl' if detach else ''}"], rtol=1e-9)
    close(kto_kl(sides[0] - sides[2]), g["pd_kto_chosen_kl"])
    close(kto_kl(sides[1] - sides[3]), g["pd_kto_rejected_kl"], rtol=1e-9)


@pytest.mark.golden
def test_routing():
    g = golden("03-llava-mod")
    experts, k = int(g["num_experts"]), int(g["top_k"])
    logits = g["gate_logits"].clone().requires_grad_()
    weights, index = top_k_gates(logits, k)
    close(index.double(), g["topk_index"].double())
    close(weights, g["topk_weight"], rtol=1e-9)
    close(logits.softmax(-1), g["gate_probs"], rtol=1e-9)
    close(logits.softmax(-1).mean(0), g["gate_mean_prob"], rtol=1e-9)
    close(torch.bincount(index[:, 0], minlength=experts) / len(index), g["gate_frac_first"], rtol=1e-6)
    balance = reduce(load_balance(logits), "token_mean")
    close(balance, g["aux_loss"], rtol=1e-9)
    close(torch.autograd.grad(balance, logits)[0], g["aux_grad_gate_logits"], rtol=1e-9)
    assert expert_capacity(len(logits), experts, k, float(g["capacity_factor"])) == int(g["capacity_top2"])


def experts_of(g):
    """The mixture of the golden file, of networks W2 · SiLU(W1 x)."""
    number, hidden, width = g["moe_W1"].shape
    ffn = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, width, bias=False)).double()
    mixture = MixtureOfExperts(ffn, width, number, int(g["top_k"]))
    for expert, first, last in zip(mixture.experts, g["moe_W1"], g["moe_W2"], strict=True):
        expert[0].weight.data, expert[2].weight.data = first.clone(), last.clone()
    return mixture


@pytest.mark.golden
def test_mixture():
    g = golden("03-llava-mod")
    close(experts_of(g).mix(g["moe_x"], g["gate_logits"]), g["moe_out"], rtol=1e-9)


def a_mixture(experts=4, k=2, **options):
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 6)).double()
    return ffn, MixtureOfExperts(ffn, 6, experts, k, **options)


def test_a_new_mixture_is_the_dense_network_for_any_router():
    ffn, mixture = a_mixture()
    x = torch.randn(3, 5, 6, dtype=torch.double)
    for scale in (0.0, 1.0, 50.0):
        nn.init.normal_(mixture.gate.weight, std=scale)
        close(mixture(x), ffn(x), rtol=1e-12)
    with torch.no_grad():
        ffn[0].weight.mul_(2)
    mixture.dense = True
    close(mixture(x), ffn(x), rtol=1e-12)
    mixture.dense = False
    assert not torch.allclose(mixture(x), ffn(x))
    mixture.spread()
    close(mixture(x), ffn(x), rtol=1e-12)


def test_a_dense_mixture_of_all_experts_is_continuous():
    _, mixture = a_mixture(k=4)
    for expert in mixture.experts[1:]:
        nn.init.normal_(expert[0].weight)
    x = torch.randn(8, 6, dtype=torch.double)
    logits = torch.zeros(8, 4, dtype=torch.double)
    nudged = logits.clone()
    nudged[:, 3] += 1e-9  # changes the order of the experts, and nothing else
    close(mixture.mix(x, nudged), mixture.mix(x, logits), rtol=1e-7, atol=1e-8)


def test_capacity_drops_what_is_beyond_it_in_the_order_of_choices():
    index = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    kept = within_capacity(index, 2, 2)
    assert kept.tolist() == [[True, True], [True, False], [False, False], [True, False]]
    _, mixture = a_mixture(capacity_factor=0.25)
    x, sure = torch.randn(8, 6, dtype=torch.double), torch.tensor([[9.0, 0.0, -9.0, -9.0]]).double().expand(8, 4)
    out = mixture.mix(x, sure)
    assert out[0].abs().sum() > 0  # ⌈2 · 8 / 4 · ¼⌉ = 1 token fits
    assert out[1:].abs().sum() == 0


def test_balance_is_one_where_uniform_and_tends_to_the_number_of_experts():
    uniform = torch.zeros(12, 4)
    close(load_balance(uniform).mean(), torch.tensor(1.0), rtol=1e-6)
    sure = torch.full((12, 4), -40.0)
    sure[:, 2] = 40.0
    close(load_balance(sure).mean(), torch.tensor(4.0), rtol=1e-6)
    mean_uniform = torch.eye(4).repeat(3, 1) * 5  # each expert is first as often
    close(load_balance(mean_uniform).mean(), torch.tensor(1.0), rtol=1e-6)


def test_groups_have_their_own_shares():
    logits = torch.randn(10, 4, dtype=torch.double)
    group = torch.tensor([0] * 4 + [1] * 6)
    apart = torch.cat([load_balance(logits[:4]), load_balance(logits[4:])])
    close(load_balance(logits, group), apart, rtol=1e-12)


def test_too_few_experts_are_refused():
    with pytest.raises(InputError, match="3 experts per token of 2 experts"):
        top_k_gates(torch.zeros(4, 2), 3)
    with pytest.raises(InputError, match="2 experts cannot use 3 per token"):
        a_mixture(experts=2, k=3)


def test_policy_equal_to_reference():
    w, l = torch.randn(5, dtype=torch.double), torch.randn(5, dtype=torch.double)  # noqa: E741
    close(dpo(w, l, w, l), torch.full((5,), math.log(2)).double(), rtol=1e-7)
    close(kto_pair(w, l, w, l), torch.full((5, 2), 0.5).double())


def test_swapping_the_sides_negates_the_logit_and_gradients_are_opposite():
    sides = [torch.randn(4, dtype=torch.double) for _ in range(4)]
    w, l, ref_w, ref_l = sides  # noqa: E741
    w.requires_grad_(), l.requires_grad_()
    h = 0.1 * ((w - ref_w) - (l - ref_l))
    values = dpo(w, l, ref_w, ref_l, beta=0.1)
    close(dpo(l, w, ref_l, ref_w, beta=0.1), values + h)  # softplus(h) = softplus(−h) + h
    up, down = torch.autograd.grad(values.mean(), (w, l))
    close(up, -(0.1 / 4) * torch.sigmoid(-h.detach()))
    close(down, -up)


def test_mimic_of_equal_logits_has_no_gradient():
    teacher = torch.randn(6, 9, dtype=torch.double)
    student = (teacher + torch.randn(6, 1, dtype=torch.double)).requires_grad_()
    value = cross_entropy_soft(student, teacher)
    close(value, entropy(teacher))
    assert torch.autograd.grad(value.sum(), student)[0].abs().max() < 1e-12
