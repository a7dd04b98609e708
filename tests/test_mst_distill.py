"""Paper 18, MST-Distill: golden vectors, and limits of its losses and mask networks."""

import math

import pytest
import torch
from torch import nn

from golden_vectors import close, golden, reduce
from understudy import InputError
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.routing import balance, kl_by_way, mutual_kl, top_ways
from understudy.models.masks import MaskNet, mask_width

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODELS = ("s", "mm", "cm")


def mean(values):
    return reduce(values, "token_mean")


@pytest.mark.golden
def test_golden_cotraining():
    g = golden("18-mst-distill")
    logits = [g[f"logits_{m}"].requires_grad_() for m in MODELS]
    kd = mutual_kl(torch.stack(logits), temperature=float(g["temperature"]))
    parts = [mean(cross_entropy(z, g["labels"])) + mean(k) for z, k in zip(logits, kd, strict=True)]
    for name, part in zip(MODELS, parts, strict=True):
        close(part, g[f"stage1_loss_{name}"], **EXACT)
    close(sum(parts), g["stage1_loss"], **EXACT)
    for name, grad in zip(MODELS, torch.autograd.grad(sum(parts), logits), strict=True):
        close(grad, g[f"stage1_grad_{name}"], **EXACT)
    kd = mutual_kl(torch.stack(logits), temperature=float(g["temperature"]), detach=True)
    own = sum(mean(cross_entropy(z, g["labels"])) + mean(k) for z, k in zip(logits, kd, strict=True))
    close(torch.autograd.grad(own, logits[0])[0], g["stage1_grad_s_detached"], **EXACT)


@pytest.mark.golden
def test_golden_mask():
    g = golden("18-mst-distill")
    net = MaskNet(g["mask_feat"].shape[1], int(g["mask_hidden"]), int(g["mask_heads"])).double()
    net.load_state_dict({k.removeprefix("masknet."): v for k, v in g.items() if k.startswith("masknet.")})
    close(net(g["mask_feat"]), g["mask"], **EXACT)
    close(net.masked(g["mask_feat"]), g["masked_feat"], **EXACT)


@pytest.mark.golden
def test_golden_specialising():
    g = golden("18-mst-distill")
    z = g["stage2_teacher_logits"].requires_grad_()
    loss = mean(kl_by_way(z, g["stage2_student_logits"][None], temperature=float(g["temperature"]))[:, 0])
    close(loss, g["stage2_loss"], **EXACT)
    close(torch.autograd.grad(loss, z)[0], g["stage2_grad_teacher_logits"], **EXACT)


def router_of(g):
    router = nn.Sequential(nn.Linear(*g["gate_w1"].T.shape), nn.Linear(*g["gate_w2"].T.shape)).double()
    names = {"0.weight": "gate_w1", "0.bias": "gate_b1", "1.weight": "gate_w2", "1.bias": "gate_b2"}
    router.load_state_dict({name: g[key] for name, key in names.items()})
    return router


@pytest.mark.golden
def test_golden_routing():
    g = golden("18-mst-distill")
    z, router, k = g["stage3_student_logits"].requires_grad_(), router_of(g), int(g["top_k"])
    p = router(z).softmax(-1)
    close(p, g["gate_probs"], **EXACT)
    assert torch.equal(top_ways(p, k), g["topk_index"])
    by_way = kl_by_way(z, g["stage3_teacher_logits"], temperature=float(g["temperature"]))
    kd, task = mean(by_way.gather(1, top_ways(p, k)).mean(1)), mean(cross_entropy(z, g["labels"]))
    lb = mean(balance(p))
    close(task, g["loss_task"], **EXACT)
    close(kd, g["loss_kd"], **EXACT)
    close(lb, g["loss_lb_kl"], **EXACT)
    close(mean(balance(p, mode="cv")), g["loss_lb_cv"], **EXACT)
    total = float(g["w_task"]) * task + float(g["w_kd"]) * kd + float(g["w_lb"]) * lb
    close(total, g["stage3_loss"], **EXACT)
    parameters = {"student_logits": z, "gate_w1": router[0].weight, "gate_w2": router[1].weight}
    parameters["gate_b2"] = router[1].bias
    for name, grad in zip(parameters, torch.autograd.grad(total, parameters.values(), retain_graph=True), strict=True):
        close(grad, g[f"stage3_grad_{name}"], **EXACT)
    grads = torch.autograd.grad(kd, [z, router[1].weight], allow_unused=True, retain_graph=True)
    close(grads[0], g["kd_grad_student_logits"], **EXACT)
    assert (grads[1] is None) == bool(g["grad_gate_from_kd_is_none"])
    close(by_way, g["soft_per_teacher_kl"], **EXACT)
    soft = mean((p * by_way).sum(1))
    close(soft, g["soft_kd_loss"], **EXACT)
    close(torch.autograd.grad(soft, router[1].weight)[0], g["soft_grad_gate_w2"], **EXACT)


@pytest.fixture
def z():
    torch.manual_seed(0)
    return 2 * torch.randn(3, 5, 4, dtype=torch.float64)


def test_mutual_distillation_is_symmetric_and_0_where_all_agree(z):
    z = z.requires_grad_()
    order = torch.tensor([2, 0, 1])
    close(mutual_kl(z[order]).sum(), mutual_kl(z).sum())
    close(mutual_kl(z[order])[0], mutual_kl(z)[2])
    same = z[:1].detach().expand(3, -1, -1).clone().requires_grad_()
    found = mutual_kl(same)
    close(found, torch.zeros_like(found))
    grad = torch.autograd.grad(found.sum(), same)[0]
    close(grad, torch.zeros_like(grad))
    assert mutual_kl(z[:1]).abs().max() == 0
    close(mutual_kl(z + 7), mutual_kl(z))
    with pytest.raises(InputError, match="must be"):
        mutual_kl(z[0])
    with pytest.raises(InputError, match="row 1"):
        mutual_kl(z.detach().index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(math.nan).double()))


def test_the_gradient_of_a_routed_kl_is_the_difference_of_the_probabilities(z):
    student = z[0].clone().requires_grad_()
    grad = torch.autograd.grad(kl_by_way(student, z[1:], temperature=4.0)[:, 1].sum(), student)[0]
    close(grad, 4 * ((student / 4).softmax(-1) - (z[2] / 4).softmax(-1)))
    with pytest.raises(InputError, match="ways are"):
        kl_by_way(z[0], z[1])


def test_all_ways_chosen_is_their_average_and_one_way_is_distillation(z):
    by_way, p = kl_by_way(z[0], z[1:]), torch.rand(5, 2)
    close(by_way.gather(1, top_ways(p, 2)).mean(1), by_way.mean(1))
    one = kl_by_way(z[0], z[1:2])
    wanted = forward_kl(z[0], z[1], temperature=4.0, tau_squared=True)
    close(one.gather(1, top_ways(torch.ones(5, 1), 1)).mean(1), wanted)
    for k in (0, 3):
        with pytest.raises(InputError, match=f"k is {k} and must lie in 1 … 2"):
            top_ways(p, k)


def test_the_lowest_way_wins_where_two_are_equal():
    p = torch.tensor([[0.2, 0.4, 0.4], [1 / 3, 1 / 3, 1 / 3]])
    assert top_ways(p, 1).tolist() == [[1], [0]] and top_ways(p, 2).tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("mode", ["kl", "cv"])
def test_balance_is_0_for_even_use_alone(mode):
    even = torch.eye(3).double().requires_grad_()
    value = balance(even, mode=mode)
    close(value, torch.zeros_like(value), atol=1e-9)
    assert torch.autograd.grad(value.sum(), even)[0].isfinite().all()
    odd = torch.tensor([[0.9, 0.1, 0.0]]).double().expand(4, -1).clone().requires_grad_()
    found = balance(odd, mode=mode)
    assert found.shape == (4,) and (found > 0.1).all() and found.isfinite().all()
    assert torch.autograd.grad(found.mean(), odd)[0].isfinite().all()
    assert balance(torch.ones(4, 1), mode=mode).abs().max() == 0 and balance(torch.ones(0, 3), mode=mode).shape == (0,)


def test_masks_of_1_leave_a_layer_as_it_is_and_maps_have_a_mask_a_channel():
    torch.manual_seed(0)
    vectors, maps = MaskNet(12, mask_width(12, 3, 2), 3), MaskNet(12, mask_width(12, 3, 2), 3, maps=True)
    for net, x in ((vectors, torch.randn(2, 12)), (maps, torch.randn(2, 12, 5, 5))):
        mask = net(x)
        assert mask.shape == (2, 12, *[1] * (x.dim() - 2)) and (mask > 0).all() and (mask < 1).all()
        nn.init.zeros_(net.fc.weight)
        nn.init.constant_(net.fc.bias, 100.0)
        assert torch.equal(net.masked(x), x)
    with pytest.raises(InputError, match="5 channels has no width left with 3 heads and factor 2"):
        mask_width(5, 3, 2)
