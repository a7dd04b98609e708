"""Paper 35, TGeo-KD: golden vectors, limits that must hold, bad input."""

import pytest
import torch
from torch import nn

from golden_vectors import close, golden
from tgeo_world import Told, World, batch_of, cut, scene_of, slopes
from understudy import InputError
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.geometry import class_means, class_sums, triangle_features
from understudy.methods.kd import KD
from understudy.methods.tgeo_kd import TGeoKD
from understudy.models import ClassifierAdapter
from understudy.training import Shapes, TrainState


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


@pytest.mark.golden
def test_golden():
    g = golden("35-tgeo-kd")
    close_to = {"rtol": 1e-7, "atol": 1e-9}
    classes, tau = len(g["student_b"]), float(g["tau"])
    means = class_means(*class_sums(g["teacher_logits_full"], g["labels_full"], classes))
    close(means, g["tbar"], **close_to)
    train, validation = batch_of(g["x_train"], g["y_train"]), batch_of(g["x_val"], g["y_val"])
    student = ClassifierAdapter(nn.Sequential(nn.Flatten(), linear(g["student_W"], g["student_b"])), classes)
    teacher = Told(g["teacher_logits"])
    parts = [linear(g[f"ctrl_W{i}"], g[f"ctrl_b{i}"]) for i in (1, 2, 3)]
    leaky = nn.LeakyReLU(float(g["leaky_slope"]))
    ratio = nn.Sequential(parts[0], leaky, parts[1], leaky, parts[2])
    method = TGeoKD(temperature=tau, virtual_rate=float(g["inner_lr"]))
    state = TrainState(modules={"ratio": ratio}, tables={"means": means}, student=student)
    rows, taught = student(train), teacher(train)
    logits = rows.signal.logits
    close(triangle_features(logits, teacher.logits, train.labels, means), g["state"], **close_to)
    alpha = method._alpha(rows, taught, train, state)
    close(alpha, g["alpha"], **close_to)
    close(forward_kl(logits, teacher.logits, temperature=tau), g["kd_per_sample"], **close_to)
    close(cross_entropy(logits, train.labels), g["ce_per_sample"], **close_to)
    close(cross_entropy(logits.softmax(-1), train.labels), g["ce_per_sample_released_code"], **close_to)
    terms = method.loss(rows, taught, train, state)
    lower = sum(t.weight * t.values.mean() for t in terms.values())
    close(lower, g["lower_loss"], **close_to)
    for found, name in zip(torch.autograd.grad(lower, student.parameters()), ("W", "b"), strict=True):
        close(found, g[f"grad_student_{name}"], **close_to)
    for size in (len(alpha), 3):
        batches = cut(train, size)
        found, outer = slopes(student, method, teacher, batches, validation, alpha, rate=method.virtual_rate)
        close(outer, g["outer_loss"], **close_to)
        close(found, g["grad_alpha"], **close_to)
        context = scene_of(student, teacher, batches, validation)
        total = sum(t["outer"].values.sum() for t in method.auxiliary_loss("ratio", context, state)) / context.count
        for i, layer in enumerate(parts, 1):
            weight, bias = torch.autograd.grad(total, (layer.weight, layer.bias), retain_graph=True)
            close(weight, g[f"grad_ctrl_W{i}"], **close_to)
            close(bias, g[f"grad_ctrl_b{i}"], **close_to)


def test_the_students_step_does_not_differentiate_alpha():
    world = World()
    world.train_state.modules["ratio"].requires_grad_(True)
    terms = world.method.loss(world.student(world.batch), world.teacher(world.batch), world.batch, world.train_state)
    sum(t.weight * t.values.sum() for t in terms.values()).backward()
    assert all(p.grad is None for p in world.train_state.modules["ratio"].parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in world.student.model[-1].parameters())


@pytest.mark.parametrize("bias", [-2000.0, 2000.0, 0.3])
def test_a_constant_weight_is_classical_distillation(bias):
    world = World(temperature=2.0)
    with torch.no_grad():
        for p in world.train_state.modules["ratio"].parameters():
            p.zero_()
        world.train_state.modules["ratio"][-1].bias.fill_(bias)
    alpha = float(torch.sigmoid(torch.tensor(bias).double()))
    rows = world.student.eval()(world.batch), world.teacher(world.batch), world.batch
    mine = world.method.loss(*rows, world.train_state)
    fixed = KD(temperature=2.0, kd_weight=alpha, ce_weight=1 - alpha).loss(*rows, TrainState())
    totals = [sum(t.weight * t.values for t in terms.values()) for terms in (mine, fixed)]
    close(totals[0], totals[1], atol=1e-12)
    world.move()  # a saturated weight has a gradient of 0, not nan
    assert world.ratio().isfinite().all()


def test_where_teacher_and_label_say_the_same_nothing_pulls():
    world = World(temperature=1.0)
    world.teacher.logits[:4] = 2000.0 * nn.functional.one_hot(world.batch.labels[:4], 3)
    found, _ = world.slopes()
    assert found[:4].abs().max() < 1e-15 < found[4:].abs().min()


def test_the_side_that_helps_validation_gains_weight():
    """Two examples: the first has a wrong label and a right teacher, the second the other way round."""
    world = World(rows=2, classes=2, virtual_rate=1.0)
    world.batch.labels.copy_(torch.tensor([1, 0]))
    world.teacher.logits.copy_(torch.tensor([[4.0, -4.0], [-4.0, 4.0]]))
    world.validation = batch_of(world.batch.inputs["pixel_values"].flatten(1), torch.tensor([0, 0]))
    found, _ = world.slopes()
    assert found[0] < 0 < found[1]
    before = world.alpha()
    for _ in range(60):
        world.move()
    assert world.alpha()[0] > before[0] and world.alpha()[1] < before[1]


def test_order_and_constants_change_nothing():
    world = World()
    labels, means = world.batch.labels, world.train_state.tables["means"]
    s, t = torch.randn(8, 3).double(), world.teacher.logits
    order = torch.randperm(8)
    found = triangle_features(s, t, labels, means, angles=True)
    close(triangle_features(s[order], t[order], labels[order], means, angles=True), found[order])
    close(triangle_features(s + 7.0, t - 3.0, labels, means, angles=True), found, atol=1e-12)


def test_the_network_and_its_features_have_the_papers_shapes():
    ratio = TGeoKD().modules(Shapes(5))["ratio"]
    assert [tuple(p.shape) for p in ratio.parameters()] == [(32, 45), (32,), (16, 32), (16,), (1, 16), (1,)]
    widths = {
        TGeoKD(**o).modules(Shapes(5))["ratio"][0].in_features // 5: o
        for o in (
            {"features": "vertices", "inter": False},
            {"features": "vertices"},
            {"features": "edges"},
            {"inter": False},
            {"features": "edges", "angles": True},
            {"angles": True},
        )
    }
    assert list(widths) == [3, 4, 5, 6, 7, 11]


def test_features_at_the_corners():
    logits, labels = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 2])
    means = class_means(*class_sums(logits, labels, 3))
    close(means.sum(-1), torch.ones(3).double(), atol=1e-15)
    s, p, _, _, ts, gs, ps, _, _ = triangle_features(logits, logits, labels, means).unflatten(-1, (9, 3)).unbind(1)
    assert ps.eq(0).all() and torch.equal(s, p)
    close(ts[:2], ps[:2], atol=1e-30)  # alone in their classes, they are their averages
    assert ts[2:].sum() > 0
    close(gs, (nn.functional.one_hot(labels, 3) - s).square())
    perfect = 2000.0 * nn.functional.one_hot(labels, 3).double()
    assert triangle_features(perfect, logits, labels, means, vertices=False).unflatten(-1, (5, 3))[:, 1].eq(0).all()
    halves = [class_sums(logits[i], labels[i], 3) for i in (slice(0, 2), slice(2, 4))]
    close(class_means(halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]), means)
    close(class_means(*class_sums(logits[:1], labels[:1], 3))[1:], torch.full((2, 3), 1 / 3, dtype=torch.float64))


def test_extreme_teachers_stay_finite():
    world = World()
    world.teacher.logits.mul_(50)
    world.teacher.logits[0, 0] = -torch.inf
    world.move()
    assert world.ratio().isfinite().all()


def test_mixed_precision_does_not_round_the_weights():
    world = World(dtype=torch.float32)
    rows = world.student.eval()(world.batch), world.teacher(world.batch), world.batch
    wanted = world.method.loss(*rows, world.train_state)
    with torch.autocast("cpu", torch.bfloat16):
        found = world.method.loss(*rows, world.train_state)
    assert all(torch.equal(found[name].values, wanted[name].values) for name in wanted)


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: class_sums(torch.rand(4, 3), torch.tensor([0, 1, 2, 3]), 3), "label 3 is outside 0 … 2"),
        (lambda: class_sums(torch.rand(4, 3), torch.zeros(4).long(), 5), "5 classes and the teacher 3"),
        (lambda: triangle_features(*[torch.rand(2, 3)] * 2, torch.zeros(2).long(), torch.rand(4, 4)), "3 classes and"),
        (lambda: triangle_features(*[torch.rand(2, 3)] * 2, torch.tensor([0, 7]), torch.rand(3, 3)), "label 7 is outs"),
        (
            lambda: triangle_features(
                *[torch.rand(2, 3)] * 2, torch.zeros(2).long(), torch.rand(3, 3), vertices=False, edges=False
            ),
            "no feature is left",
        ),
    ],
)
def test_bad_tensors(call, says):
    with pytest.raises(InputError, match=says):
        call()
