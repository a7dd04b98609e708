"""Paper 8, TRG: golden vectors, limits that must hold, bad input."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from golden_vectors import close, golden
from understudy import InputError
from understudy.data import collate_images, load_images
from understudy.losses.relations import (
    affinity_kl,
    contextual_mse,
    grid_tokens,
    knn_affinity,
    median_squared_distance,
    neighbour_overlap,
    paired_info_nce,
    self_similarity,
)
from understudy.methods.trg import TRG
from understudy.models import ModelOutput
from understudy.targets import Dense
from understudy.training.schedules import anneal
from understudy.training.shapes import Shapes


@pytest.mark.golden
def test_golden():
    g = golden("08-trg")
    k, sigma, tau = int(g["k"]), float(g["sigma"]), float(g["tau_global"])
    index, number = g["token_idx"], len(g["token_idx"])
    student, projector = g["feat_s"].clone().requires_grad_(), g["proj"].clone().requires_grad_()
    s, t = student.flatten(0, 1)[index], g["feat_t"].flatten(0, 1)[index]
    ours, theirs = (knn_affinity(x, k=k, sigma=sigma) for x in (s, t))
    close(ours, g["A_s"], rtol=1e-9)
    close(theirs, g["A_t"], rtol=1e-9)
    local, inner = affinity_kl(ours, theirs).sum(), contextual_mse(student, g["feat_t"]).mean()
    contrast = paired_info_nce(s @ projector, t, temperature=tau).sum()
    reverse = affinity_kl(ours, theirs, direction="teacher_student").sum()
    alpha, beta, gamma = (float(g[n]) for n in ("alpha", "beta", "gamma"))
    total = alpha * inner + beta * local / number + gamma * contrast / number
    for value, name in (
        (local, "loss_local_sum"),
        (reverse, "loss_local_reverse_sum"),
        (contrast, "loss_global_sum"),
        (inner, "loss_inner"),
        (total, "loss_aux_mean"),
    ):
        close(value, g[name], rtol=1e-9)
    for value, wanted in (
        (local, {"grad_local_feat_s": student}),
        (contrast, {"grad_global_feat_s": student, "grad_global_proj": projector}),
        (inner, {"grad_inner_feat_s": student}),
        (total, {"grad_aux_feat_s": student}),
    ):
        found = torch.autograd.grad(value, list(wanted.values()), retain_graph=True)
        for gradient, name in zip(found, wanted, strict=True):
            close(gradient, g[name], rtol=1e-8, atol=1e-12)


@pytest.fixture
def tokens():
    torch.manual_seed(3)
    return torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(2, 9, 7, dtype=torch.float64)


def test_equal_tokens_cost_nothing(tokens):
    s = tokens[0].clone().requires_grad_()
    near = knn_affinity(s, k=3, sigma=2.0)
    value = affinity_kl(near, knn_affinity(tokens[0], k=3, sigma=2.0)).sum() + contextual_mse(s, tokens[0]).sum()
    (gradient,) = torch.autograd.grad(value, s)
    assert value.abs() < 1e-14 and gradient.abs().max() < 1e-14


def test_relations_ignore_rotation_shift_and_order(tokens):
    s, t = tokens
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    theirs = knn_affinity(t, k=3, sigma=2.0)
    local = affinity_kl(knn_affinity(s, k=3, sigma=2.0), theirs)
    close(affinity_kl(knn_affinity(s @ rotation + 3.0, k=3, sigma=2.0), theirs), local)
    close(contextual_mse(s @ rotation, t), contextual_mse(s, t))
    order = torch.randperm(9)
    close(
        affinity_kl(knn_affinity(s[:, order], k=3, sigma=2.0), knn_affinity(t[:, order], k=3, sigma=2.0)),
        local[:, order],
    )
    w = torch.randn(5, 7, dtype=torch.float64)
    contrast = paired_info_nce(s @ w, t, temperature=0.3)
    close(paired_info_nce((s @ w)[:, order], t[:, order], temperature=0.3), contrast[:, order])
    close(paired_info_nce(4.0 * s @ w, t, temperature=0.3), contrast)


def test_limits_of_the_widths(tokens):
    s, t = tokens
    wide, narrow = knn_affinity(s, k=3, sigma=1e12), knn_affinity(s, k=3, sigma=1e-6)
    close(wide, wide.round(), atol=1e-9)
    assert (wide.sum(-2).round() == 3).all() and wide.diagonal(dim1=-2, dim2=-1).eq(0).all()
    assert narrow.eq(0).all() and affinity_kl(narrow, knn_affinity(t, k=3, sigma=1e-6)).abs().max() < 1e-15
    far = paired_info_nce(torch.randn_like(t), t, temperature=1e9)
    close(far, torch.full_like(far, math.log(9)), atol=1e-6)
    assert affinity_kl(torch.rand(4, 9, 9), torch.rand(4, 9, 9)).max() <= 1 / 2


def test_duplicates_outliers_and_zeros_stay_finite():
    s = torch.randn(6, 4, dtype=torch.float64)
    s[1] = s[0]
    s[5] = 500.0
    s[3] = 0.0
    s.requires_grad_()
    near = knn_affinity(s, k=2, sigma=1.0)
    assert near[1, 0] == 1 and near[5].eq(0).all()
    value = affinity_kl(near, torch.rand(6, 6, dtype=torch.float64)).sum()
    value = value + paired_info_nce(s, torch.randn(6, 4, dtype=torch.float64), temperature=0.1).sum()
    value.backward()
    assert s.grad.isfinite().all()
    one = torch.randn(1, 4)
    assert paired_info_nce(one, one, temperature=0.1).item() == pytest.approx(0, abs=1e-6)
    assert contextual_mse(torch.randn(3, 1, 4), torch.randn(3, 1, 8)).eq(0).all()
    close(self_similarity(torch.zeros(1, 3, 4)), torch.full((1, 3, 3), 1 / 3), rtol=1e-6)


def test_grids():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    close(grid_tokens(maps, 2)[0, :, 0], torch.tensor([2.5, 4.5, 10.5, 12.5]))
    patches = maps.flatten(2).transpose(1, 2)
    close(grid_tokens(patches, 2), grid_tokens(maps, 2))
    with_class = torch.cat([torch.full((1, 1, 1), 99.0), patches], 1)
    close(grid_tokens(with_class, 2), grid_tokens(maps, 2))


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: knn_affinity(torch.rand(4, 2), k=4, sigma=1.0), "k is 4 and there are 4"),
        (lambda: knn_affinity(torch.rand(4, 2), k=0, sigma=1.0), "k is 0"),
        (lambda: knn_affinity(torch.rand(4, 2), k=1, sigma=0.0), "sigma is 0.0"),
        (lambda: paired_info_nce(torch.rand(4, 2), torch.rand(4, 2), temperature=0.0), "temperature is 0.0"),
        (lambda: paired_info_nce(torch.rand(4, 2), torch.rand(3, 2), temperature=1.0), "differ in shape"),
        (lambda: affinity_kl(torch.rand(4, 4), torch.rand(3, 3)), "differ in shape"),
        (lambda: contextual_mse(torch.rand(1, 4, 2), torch.rand(1, 5, 2)), "differ in tokens"),
        (lambda: grid_tokens(torch.rand(1, 3, 1, 1), 2), "2 × 2 grid"),
        (lambda: grid_tokens(torch.rand(1, 7, 3), 2), "7 tokens are no square grid"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_paces():
    assert anneal(1.0, 0.1, 0.0, "cosine") == 1.0 and anneal(1.0, 0.1, 1.0, "cosine") == pytest.approx(0.1)
    assert anneal(1.0, 0.0, 0.25, "linear") == 0.75 and anneal(1.0, 0.0, 0.9, "constant") == 1.0


def test_it_learns_long_tailed_digits_and_the_projector_stays_behind(tmp_path):
    from safetensors.torch import load_file

    from understudy import distill

    result = distill(
        task="image_classification",
        method="trg",
        data={"name": "digits", "imbalance": 5},
        teacher={"model": "convnet:8", "train": {"max_steps": 150, "learning_rate": 1e-2}},
        student="convnet:4",
        output=str(tmp_path),
        trainer={"max_steps": 150, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "save_strategy": "no"},
    )
    assert result.metrics["accuracy"] > 0.7  # chance is 0.1
    # The three rarest of ten classes are a test set of their own, and held-out images say how alike the graphs are.
    rare = load_images({"name": "digits", "imbalance": 5}).more_tests["test_rare"]
    assert set(rare.labels.tolist()) == {7, 8, 9} and 0 < result.metrics["accuracy_rare"] < result.metrics["accuracy"]
    assert 0 < result.metrics["affinity_kl"] < 0.5 and 0.3 < result.metrics["neighbour_overlap"] < 1  # chance is 0.08
    assert not any("projector" in key for key in load_file(tmp_path / "student" / "model.safetensors"))
    terms = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"global"' in line]
    assert terms and all(f'"{name}"' in terms[0] for name in ("ce", "kd", "inner", "local"))


def test_a_network_without_maps_is_refused(tmp_path):
    from understudy import distill

    values = {"task": "image_classification", "method": "trg", "output": str(tmp_path), "trainer": {"max_steps": 1}}
    teacher = {"model": "convnet:4", "train": {"max_steps": 1}}
    with pytest.raises(InputError, match="student has no layer with a 2 × 2 map"):
        distill(values, student="mlp:8", teacher=teacher)
    with pytest.raises(InputError, match=r"no layer 'bdy.0'. Did you mean"):
        distill(
            values | {"output": str(tmp_path / "b")},
            student="convnet:4",
            teacher=teacher,
            options={"student_layer": "bdy.0"},
        )
    with pytest.raises(InputError, match=r"data.imbalance is 0"):
        distill(values | {"output": str(tmp_path / "c")}, data={"name": "digits", "imbalance": 0})


def test_neighbours_in_common_by_hand():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # nearest two: 1 2, 0 2, 1 0, 2 1
    bent = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.5, 0.5]])  # 3 1, 3 0, 1 3, 0 1 (of equals the lower)
    assert neighbour_overlap(bent, line, k=2).tolist() == [0.5, 0.5, 0.5, 0.5]
    assert neighbour_overlap(line, line, k=2).tolist() == [1.0] * 4
    # Each side by its own distances: another scale and a common shift change nothing.
    assert neighbour_overlap(5 * line + 2, line, k=1).tolist() == [1.0] * 4
    with pytest.raises(InputError, match=r"\(4, 1\) and teacher \(3, 1\)"):
        neighbour_overlap(line, line[:3], k=1)
    with pytest.raises(InputError, match="more than k, which is 4"):
        neighbour_overlap(line, line, k=4)


def test_a_student_that_is_its_teacher_has_the_same_graph():
    from understudy.models import ClassifierAdapter, load_classifier
    from understudy.training import SetupContext

    net = ClassifierAdapter(load_classifier("convnet:4", classes=10, input_shape=(1, 8, 8)), 10)
    examples = [(torch.rand(1, 8, 8), 0, i) for i in range(35)]  # two groups, and three images
    context = SetupContext(net, net, {"test": examples}, collate_images, 10, Path("nowhere"), "key")
    found = TRG(group=16).finish(SimpleNamespace(student=net), context)["metrics"]
    assert found == {"affinity_kl": 0.0, "neighbour_overlap": 1.0}
    assert TRG(group=1, k=3).finish(SimpleNamespace(student=net), context)["metrics"]["neighbour_overlap"] == 1.0
    assert TRG(group=1, beta=0.0, grid=1).finish(SimpleNamespace(student=net), context)["metrics"] == {}


def test_without_its_own_terms_it_is_kd_to_the_bit(tmp_path):
    from understudy import distill
    from understudy.models import state_hash

    ends = {}
    plain = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0}
    for method, options in (("trg", plain), ("kd", {"temperature": 4.0, "ce_weight": 1.0, "kd_weight": 1.0})):
        result = distill(
            task="image_classification",
            method=method,
            options=options,
            teacher={"model": "convnet:4", "train": {"max_steps": 5}},
            student="convnet:4",
            output=str(tmp_path / method),
            trainer={"max_steps": 8, "save_strategy": "no"},
        )
        ends[method] = state_hash(result.student)
    assert ends["trg"] == ends["kd"]


@pytest.mark.parametrize("patches", [1, 4])
def test_a_last_group_of_one_image_takes_the_neighbours_it_has(patches):
    method, live = TRG(gamma=0.0, k=5, sigma=1.0), SimpleNamespace(step=0, total=9, modules={}, seed=0)
    ours, theirs = torch.randn(1, patches, 6, requires_grad=True), torch.randn(1, patches, 6)
    local = method._group(ours, theirs, torch.tensor([3]), live)["local"]
    assert local.shape == (1,) and local.isfinite().all()
    local.sum().backward()
    assert ours.grad.isfinite().all() and bool((ours.grad != 0).any()) == (patches > 1)


def test_a_whole_group_that_is_too_small_for_k_is_refused():
    method, live = TRG(gamma=0.0, k=5, sigma=1.0, group=2), SimpleNamespace(step=0, total=9, modules={}, seed=0)
    with pytest.raises(InputError, match="k is 5 and there are 4 tokens"):
        method._group(torch.randn(2, 2, 6), torch.randn(2, 2, 6), torch.tensor([3, 4]), live)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_relations_are_computed_in_float32_at_least(dtype):
    torch.manual_seed(0)
    ours, theirs = (torch.randn(8, w, 4, 4).to(dtype) for w in (6, 10))
    method, projector = TRG(group=8, kd_weight=0.0), torch.nn.Linear(6, 10, bias=False)
    found = []
    for cast in (False, True):
        batch = SimpleNamespace(mask=torch.ones(8, dtype=torch.bool), ids=torch.arange(8), row_labels=torch.arange(8))
        rows = [
            ModelOutput(Dense(torch.randn(8, 8)), taps={"tokens": x.float() if not cast else x}) for x in (ours, theirs)
        ]
        live = SimpleNamespace(step=0, total=9, modules={"projector": projector}, seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            found.append(method.loss(rows[0], rows[1], batch, live))
    for name in ("inner", "local", "global"):
        assert found[1][name].values.dtype in (torch.float32, torch.float64)
        close(found[1][name].values, found[0][name].values, rtol=1e-5, atol=1e-6)


def test_a_teacher_keeps_its_precision_beside_a_student_in_bfloat16():
    """Tokens of the teacher that bfloat16 cannot tell apart still have the neighbours that float32 gives them."""
    torch.manual_seed(0)
    ours, theirs = torch.randn(4, 6, 2, 2), 8 + 0.01 * torch.randn(4, 10, 2, 2)
    method, found = TRG(group=4, gamma=0.0, kd_weight=0.0), []
    for dtype in (torch.float32, torch.bfloat16):
        batch = SimpleNamespace(mask=torch.ones(4, dtype=torch.bool), ids=torch.arange(4), row_labels=torch.arange(4))
        rows = [ModelOutput(Dense(torch.zeros(4, 8)), taps={"tokens": x}) for x in (ours.bfloat16().to(dtype), theirs)]
        found.append(method.loss(*rows, batch, SimpleNamespace(step=0, total=9, modules={}, seed=0)))
    for name in ("inner", "local"):
        close(found[1][name].values, found[0][name].values, rtol=1e-5, atol=1e-7)


def test_a_run_in_bfloat16(tmp_path):
    from understudy import distill

    result = distill(
        task="image_classification",
        method="trg",
        teacher={"model": "convnet:4", "train": {"max_steps": 20, "learning_rate": 1e-2}},
        student="convnet:2",
        output=str(tmp_path),
        trainer={"max_steps": 2, "bf16": True, "save_strategy": "no", "logging_steps": 1},
    )
    assert math.isfinite(result.metrics["nll"])


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_named_layer_without_tokens_is_refused_before_training(side, gamma):
    shapes = {"student": {"tokens": (6, 4, 4)}, "teacher": {"tokens": (9, 4, 4)}}
    assert set(TRG().modules(Shapes(3, taps=shapes["student"], teacher_taps=shapes["teacher"]))) == {"projector"}
    for bad in ((10,), (6, 1, 1), (7, 3)):
        found = shapes | {side: {"tokens": bad}}
        with pytest.raises(InputError, match=f"tokens of the {side} at layer 'head'"):
            TRG(gamma=gamma, **{f"{side}_layer": "head"}).modules(
                Shapes(3, taps=found["student"], teacher_taps=found["teacher"])
            )


@pytest.mark.parametrize(
    "options,says",
    [
        ({"k": 64}, "k is 64 and a group has 64 tokens"),
        ({"k": 5, "group": 1}, "k is 5 and a group has 4 tokens"),
        ({"k": 20, "tokens": 20}, "k is 20 and a group has 16 tokens"),
        ({"tokens": 3}, "tokens is 3 and a group has 16 images"),
    ],
)
def test_a_graph_that_cannot_be_is_refused_with_the_options(options, says):
    with pytest.raises(ValueError, match=says):
        TRG(**options)


def test_k_is_free_where_there_is_no_graph():
    assert TRG(k=64, beta=0.0).k == 64


def test_a_token_of_norm_zero_has_no_say_in_the_gradient():
    torch.manual_seed(0)
    s, t = torch.randn(5, 4), torch.randn(5, 4)
    s[2] = 0.0
    s.requires_grad_()
    value = paired_info_nce(s, t, temperature=0.1)
    assert value[2].item() == pytest.approx(math.log(5))
    value.sum().backward()
    assert s.grad[2].eq(0).all() and s.grad.abs().max() < 100


def test_the_median_survives_a_mean_that_all_tokens_share():
    torch.manual_seed(0)
    tokens = torch.randn(64, 8) * 0.1 + 300
    exact = (tokens.double()[:, None] - tokens.double()).square().sum(-1)[~torch.eye(64, dtype=torch.bool)].median()
    assert median_squared_distance(tokens).item() == pytest.approx(exact.item(), rel=1e-4)


def test_each_group_has_its_own_sigma():
    tokens, sigma = torch.randn(3, 9, 4), torch.tensor([1.0, 2.0, 300.0])
    apart = [knn_affinity(x, k=3, sigma=s) for x, s in zip(tokens, sigma, strict=True)]
    close(knn_affinity(tokens, k=3, sigma=sigma), torch.stack(apart))
