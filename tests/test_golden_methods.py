"""Golden vectors of papers 9, 19 and 40."""

import pytest
import torch

from golden_vectors import close, golden, reduce
from understudy import losses
from understudy.methods.dhkd import DHKD
from understudy.training.schedules import ProgressSchedule

pytestmark = pytest.mark.golden


def test_pld():
    g = golden("09-pld")
    tau = float(g["temperature"])
    close(losses.teacher_permutation(g["teacher_logits"], g["labels"]).double(), g["permutation"].double())
    student = g["student_logits"].clone().requires_grad_()
    values = losses.plackett_luce_distillation(student, g["teacher_logits"], g["labels"], temperature=tau)
    weights = torch.softmax(g["teacher_logits"] / tau, -1).gather(-1, g["permutation"])
    close(weights, g["weights"], rtol=1e-9)
    close(losses.plackett_luce(g["student_logits"], g["permutation"], g["weights"]), g["loss_per_sample"], rtol=1e-9)
    close(values, g["loss_per_sample"], rtol=1e-9)
    close(reduce(values, "token_mean"), g["loss"], rtol=1e-9)
    reduce(values, "token_mean").backward()
    close(student.grad, g["grad_student"], rtol=1e-9)


def test_pld_ignored_labels_and_variants():
    g = golden("09-pld")
    tau = float(g["temperature"])
    valid = g["labels_ignore"] != int(g["ignore_index"])
    student = g["student_logits"].clone().requires_grad_()
    values = losses.plackett_luce_distillation(
        student[valid], g["teacher_logits"][valid], g["labels_ignore"][valid], temperature=tau
    )
    mean = reduce(values, "token_mean")
    close(mean, g["loss_ignore"], rtol=1e-9)
    mean.backward()
    close(student.grad, g["grad_student_ignore"], rtol=1e-9)
    for weights, key in (("uniform", "uniform"), ("position", "position"), ("first", "first_only")):
        student = g["student_logits"].clone().requires_grad_()
        values = losses.plackett_luce_distillation(
            student, g["teacher_logits"], g["labels"], temperature=tau, weights=weights
        )
        close(values, g[f"loss_per_sample_{key}"], rtol=1e-9)
        if key == "uniform":
            reduce(values, "token_mean").backward()
            close(student.grad, g["grad_student_uniform"], rtol=1e-9)
    close(losses.position_weights(g["student_logits"].shape[1]), g["position_weights"])


def test_pld_ties_go_to_the_lower_class():
    g = golden("09-pld")
    s, t, y = g["tie_student_logits"][None], g["tie_teacher_logits"][None], g["tie_label"][None]
    close(losses.teacher_permutation(t, y)[0].double(), g["tie_permutation"].double())
    value = losses.plackett_luce_distillation(s, t, y, temperature=float(g["temperature"]))[0]
    close(value, g["tie_loss"], rtol=1e-9)


@pytest.mark.parametrize("variant", ["", "_linear", "_klsched"])
def test_taid_schedule(variant):
    g = golden("19-taid")
    schedule = ProgressSchedule(
        *(float(g[k]) for k in ("t_start", "t_end", "alpha", "beta")), adaptive=variant != "_linear"
    )
    pace = ProgressSchedule(
        schedule.start, schedule.end, schedule.alpha, schedule.beta
    )  # the momentum of the same losses
    mask = g["mask"].bool()
    for n in range(int(g["n_steps"])):
        assert schedule.value == pytest.approx(float(g[f"t_before{variant}"][n]), rel=1e-8)
        student = g["student_logits"][n].clone().requires_grad_()
        t = schedule.value
        both = {
            v: reduce(losses.interpolated_kl(student[mask], g["teacher_logits"][mask], t=t, value=v), "token_mean")
            for v in ("cross_entropy", "kl")
        }
        close(both["kl"], g[f"loss_kl{variant}"][n])
        if f"loss_ce{variant}" in g:
            close(both["cross_entropy"], g[f"loss_ce{variant}"][n])
        if variant == "" and n in (0, int(g["n_steps"]) - 1):
            both["cross_entropy"].backward()
            close(student.grad, g["grad_first" if n == 0 else "grad_last"])
        drive = both["kl" if variant == "_klsched" else "cross_entropy"]
        schedule.update(drive.item(), n, int(g["num_train_steps"]))
        assert schedule.value == pytest.approx(float(g[f"t_after{variant}"][n]), rel=1e-8)
        pace.update(drive.item(), n, int(g["num_train_steps"]))
        assert pace.momentum == pytest.approx(float(g[f"momentum{variant}"][n]), rel=1e-8, abs=1e-12)


def test_dhkd_losses():
    g = golden("40-dhkd")
    tau, gamma, alpha = (float(g[k]) for k in ("tau", "gamma", "alpha"))
    main, aux = (g[k].clone().requires_grad_() for k in ("main_logits", "aux_logits"))
    ce = reduce(losses.cross_entropy(main, g["labels"]), "token_mean")
    norm = reduce(losses.binary_kl_norm(aux, g["teacher_logits"], temperature=tau), "token_mean")
    close(ce, g["loss_ce"])
    close(norm, g["loss_binarykl_norm"])
    total = gamma * ce + alpha * norm
    close(total, g["loss_total"])
    total.backward()
    close(main.grad, g["grad_main"], atol=1e-9)
    close(aux.grad, g["grad_aux"], atol=1e-9)
    leaf = g["aux_logits"].clone().requires_grad_()
    plain = reduce(losses.binary_kl(leaf, g["teacher_logits"], temperature=tau), "token_mean")
    close(plain, g["loss_binarykl"])
    plain.backward()
    close(leaf.grad, g["grad_aux_binarykl"], atol=1e-9)
    large = g["large_aux_logits"].clone().requires_grad_()
    value = reduce(losses.binary_kl_norm(large, g["large_teacher_logits"], temperature=tau), "token_mean")
    close(value, g["large_loss_binarykl_norm"])
    value.backward()
    close(large.grad, g["large_grad_aux_binarykl_norm"], atol=1e-9)


@pytest.mark.parametrize("world", ["conflict", "agree"])
def test_dhkd_alignment(world):
    g = golden("40-dhkd")
    tau, gamma, alpha = (float(g[k]) for k in ("tau", "gamma", "alpha"))
    parameters = [g[f"net_{k}"].clone().requires_grad_() for k in ("W0", "W1", "b1", "W2", "b2")]
    w0, w1, b1, w2, b2 = parameters
    features = torch.tanh(g["net_x"] @ w0.T)
    ce = gamma * losses.cross_entropy(features @ w1.T + b1, g["labels"]).mean()
    kd = alpha * losses.binary_kl_norm(features @ w2.T + b2, g[f"{world}_teacher_logits"], temperature=tau).mean()
    for loss, name in ((ce, "ce"), (kd, "kd")):
        if f"{world}_loss_{name}" in g:
            close(loss, g[f"{world}_loss_{name}"])
    grads = {
        name: list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        for name, loss in (("ce", ce), ("kd", kd))
    }

    def flat(gs):
        return torch.cat(
            [(x if x is not None else torch.zeros_like(p)).flatten() for x, p in zip(gs, parameters, strict=True)]
        )

    close(flat(grads["ce"]), g[f"{world}_g_ce"], atol=1e-9)
    close(flat(grads["kd"]), g[f"{world}_g_kd"], atol=1e-9)
    owners = ["backbone", "head", "head", "auxiliary", "auxiliary"]
    close(flat(DHKD(align="all").merge(grads, owners)), g[f"{world}_merged"], atol=1e-9)
    if f"{world}_merged_backbone_only" in g:
        close(flat(DHKD(align="shared").merge(grads, owners)), g[f"{world}_merged_backbone_only"], atol=1e-9)
