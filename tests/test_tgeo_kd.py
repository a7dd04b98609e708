"""Paper 35, TGeo-KD: golden vectors, the outer gradient, limits that must hold."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from golden_vectors import close, golden
from understudy.data import Batch
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.geometry import class_means, class_sums, triangle_features
from understudy.methods.kd import KD
from understudy.methods.tgeo_kd import TGeoKD
from understudy.models import ClassifierRows, Rows, evaluating
from understudy.targets import Dense
from understudy.training import Live, Scene, Shapes
from understudy.training.bilevel import weight_gradients
from understudy.training.players import Players

HERE = Path(__file__).parent


class Told:
    """A teacher whose logits are known by example id."""

    def __init__(self, logits):
        self.logits = logits

    def rows(self, batch):
        return Rows(Dense(self.logits[batch.ids]))


def batch_of(x, y, ids=None):
    return Batch({"pixel_values": x[:, None, None]}, y, torch.arange(len(y)) if ids is None else ids)


def cut(batch, size):
    pixels = batch.inputs["pixel_values"]
    return [
        Batch({"pixel_values": pixels[i : i + size]}, batch.labels[i : i + size], batch.ids[i : i + size])
        for i in range(0, len(batch.ids), size)
    ]


def scene_of(student, teacher, batches, validation):
    count = float(sum(b.rows for b in batches))
    return Scene(student, teacher, batches, count, lambda number: validation, list)


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


class World:
    """A small problem: an MLP student with dropout and batch normalisation, a teacher, validation data."""

    def __init__(self, seed=0, classes=3, rows=8, body=None, dtype=torch.float64, **options):
        torch.manual_seed(seed)
        x, y = torch.randn(rows, 4, dtype=dtype), torch.randint(0, classes, (rows,))
        self.batch, self.teacher = batch_of(x, y), Told(2 * torch.randn(rows, classes, dtype=dtype))
        self.validation = batch_of(torch.randn(11, 4, dtype=dtype), torch.randint(0, classes, (11,)))
        middle = body or [nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(6)]
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), *middle, nn.Linear(6, classes))
        self.student = ClassifierRows(net.to(dtype), classes).train()
        self.method = TGeoKD(**options)
        modules = nn.ModuleDict(self.method.modules(Shapes(classes))).to(dtype)
        means = class_means(*class_sums(self.teacher.logits, y, classes))
        self.live = Live(modules=dict(modules.items()), tables={"means": means}, student=self.student)
        self.players = Players(self.method.players(), self.live.modules)

    def scene(self, size=100):
        return scene_of(self.student, self.teacher, cut(self.batch, size), self.validation)

    def move(self, size=100):
        scene = self.scene(size)
        return self.players.move("ratio", lambda: self.method.play("ratio", scene, self.live), scene)

    def alpha(self):
        with torch.no_grad(), evaluating(self.student):
            rows = self.student(self.batch), self.teacher.rows(self.batch)
            return self.method._alpha(*rows, self.batch, self.live)

    def slopes(self, size=100, **options):
        """∂J/∂α and J."""
        batches, alpha = cut(self.batch, size), self.alpha()
        gradients, outer = weight_gradients(
            self.student,
            batches,
            lambda rows, i: torch.stack(self.method._losses(rows, self.teacher.rows(batches[i]), batches[i]), -1),
            [torch.stack([a, 1 - a], -1) for a in alpha.split(size)],
            lambda ask: cross_entropy(ask(self.validation).signal.logits, self.validation.labels).mean(),
            **{"rate": self.method.virtual_rate, "count": len(alpha), "part": self.method.virtual} | options,
        )
        joined = torch.cat(gradients)
        return joined[:, 0] - joined[:, 1], outer

    def ratio(self):
        return torch.cat([p.detach().flatten() for p in self.live.modules["ratio"].parameters()])


@pytest.mark.golden
def test_golden():
    g = golden("35-tgeo-kd")
    close_to = {"rtol": 1e-7, "atol": 1e-9}
    classes, tau = len(g["student_b"]), float(g["tau"])
    means = class_means(*class_sums(g["teacher_logits_full"], g["labels_full"], classes))
    close(means, g["tbar"], **close_to)
    train, validation = batch_of(g["x_train"], g["y_train"]), batch_of(g["x_val"], g["y_val"])
    student = ClassifierRows(nn.Sequential(nn.Flatten(), linear(g["student_W"], g["student_b"])), classes)
    teacher = Told(g["teacher_logits"])
    parts = [linear(g[f"ctrl_W{i}"], g[f"ctrl_b{i}"]) for i in (1, 2, 3)]
    leaky = nn.LeakyReLU(float(g["leaky_slope"]))
    ratio = nn.Sequential(parts[0], leaky, parts[1], leaky, parts[2])
    method = TGeoKD(temperature=tau, virtual_rate=float(g["inner_lr"]))
    live = Live(modules={"ratio": ratio}, tables={"means": means}, student=student)
    rows, taught = student(train), teacher.rows(train)
    logits = rows.signal.logits
    close(triangle_features(logits, teacher.logits, train.labels, means), g["state"], **close_to)
    alpha = method._alpha(rows, taught, train, live)
    close(alpha, g["alpha"], **close_to)
    close(forward_kl(logits, teacher.logits, temperature=tau), g["kd_per_sample"], **close_to)
    close(cross_entropy(logits, train.labels), g["ce_per_sample"], **close_to)
    close(cross_entropy(logits.softmax(-1), train.labels), g["ce_per_sample_released_code"], **close_to)
    terms = method.loss(rows, taught, train, live)
    lower = sum(t.weight * t.values.mean() for t in terms.values())
    close(lower, g["lower_loss"], **close_to)
    for found, name in zip(torch.autograd.grad(lower, student.parameters()), ("W", "b"), strict=True):
        close(found, g[f"grad_student_{name}"], **close_to)
    for size in (len(alpha), 3):
        batches = cut(train, size)
        gradients, outer = weight_gradients(
            student,
            batches,
            lambda said, i: torch.stack(method._losses(said, teacher.rows(batches[i]), batches[i]), -1),  # noqa: B023
            [torch.stack([a, 1 - a], -1) for a in alpha.split(size)],
            lambda ask: cross_entropy(ask(validation).signal.logits, validation.labels).mean(),
            rate=method.virtual_rate,
            count=len(alpha),
        )
        both = torch.cat(gradients)
        close(outer, g["outer_loss"], **close_to)
        close(both[:, 0] - both[:, 1], g["grad_alpha"], **close_to)
        scene = scene_of(student, teacher, batches, validation)
        total = sum(t["outer"].values.sum() for t in method.play("ratio", scene, live)) / scene.count
        for i, layer in enumerate(parts, 1):
            weight, bias = torch.autograd.grad(total, (layer.weight, layer.bias), retain_graph=True)
            close(weight, g[f"grad_ctrl_W{i}"], **close_to)
            close(bias, g[f"grad_ctrl_b{i}"], **close_to)


def virtual_loss(world, alpha):
    """J after the virtual step, written out once more: weights as an argument, one step of plain gradient descent."""
    net, (x, y) = world.student.model, (world.batch.inputs["pixel_values"], world.batch.labels)
    kl = forward_kl(net(x), world.teacher.logits, temperature=world.method.temperature, tau_squared=True)
    lower = (alpha * kl + (1 - alpha) * cross_entropy(net(x), y)).mean()
    names, values = zip(*net.named_parameters(), strict=True)
    grads = torch.autograd.grad(lower, values)
    ahead = {n: p - world.method.virtual_rate * q for n, p, q in zip(names, values, grads, strict=True)}
    said = torch.func.functional_call(net, ahead, (world.validation.inputs["pixel_values"],))
    return float(cross_entropy(said.detach(), world.validation.labels).mean())


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 999), st.sampled_from([2, 3, 7]), st.floats(0.01, 2), st.floats(0.5, 5))
def test_the_outer_gradient_is_that_of_finite_differences(seed, classes, rate, tau):
    world = World(seed, classes, temperature=tau, virtual_rate=rate)
    alpha = world.alpha()
    slopes, outer = world.slopes()
    with evaluating(world.student):
        assert float(outer) == pytest.approx(virtual_loss(world, alpha), abs=1e-10)
        for i in range(len(alpha)):
            shift = torch.zeros_like(alpha)
            shift[i] = 1e-4
            wanted = (virtual_loss(world, alpha + shift) - virtual_loss(world, alpha - shift)) / 2e-4
            assert float(slopes[i]) == pytest.approx(wanted, rel=1e-5, abs=1e-8)


def test_the_cut_of_an_update_changes_nothing():
    whole, slopes = World(), World().slopes()[0]
    whole.move()
    for size in (1, 3, 5):
        part = World()
        close(part.slopes(size)[0], slopes, atol=1e-14)
        part.move(size)
        close(part.ratio(), whole.ratio(), atol=1e-12)


def trainer_of(folder, micro, accumulate):
    from test_engine import trainer_for

    trainer = trainer_for(TGeoKD(validation=7, every=1), folder, micro, accumulate)
    trainer.model.live.tables = {"means": torch.eye(5).double() * 0.5 + 0.1}
    trainer.validation = [(p.flip(-1), y, i) for p, y, i in trainer.train_dataset]
    return trainer


def test_any_split_and_two_ranks_give_the_same_update(tmp_path):
    def end(trainer):
        start = torch.cat([p.detach().flatten() for p in trainer.model.own.parameters()]).clone()
        trainer.train()
        moved = torch.cat([p.detach().flatten() for p in trainer.model.own.parameters()]) - start
        assert moved.abs().max() > 1e-3
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    whole = end(trainer_of(tmp_path, 12, 1))
    for micro, accumulate in ((4, 3), (1, 12)):
        torch.testing.assert_close(end(trainer_of(tmp_path, micro, accumulate)), whole, rtol=0, atol=1e-6)
    script = tmp_path / "ranks.py"
    script.write_text(
        f"import sys, torch\nfrom pathlib import Path\nsys.path.insert(0, {str(HERE)!r})\n"
        "from test_tgeo_kd import trainer_of\n"
        "trainer = trainer_of(Path(sys.argv[1]), 6, 1)\ntrainer.train()\n"
        "if trainer.args.process_index == 0:\n"
        "    torch.save(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), sys.argv[1] + '/two.pt')\n"
        "torch.distributed.barrier()\ntorch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "two.pt"), whole, rtol=0, atol=1e-6)


class Counter(nn.Module):
    """Writes to its buffer whatever its mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


def test_a_move_touches_the_ratio_network_alone():
    world = World(body=[nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(6)])
    before, ratio = {k: v.clone() for k, v in world.student.state_dict().items()}, world.ratio().clone()
    world.move()
    assert all(torch.equal(v, before[k]) for k, v in world.student.state_dict().items())
    assert all(p.grad is None for p in world.student.parameters()) and all(m.training for m in world.student.modules())
    assert not torch.equal(world.ratio(), ratio)
    counting = World(body=[nn.Tanh(), Counter()])
    alpha = counting.alpha()
    calls = counting.student.model[3].calls.clone()
    batches = [counting.batch]
    weights = [torch.stack([alpha, 1 - alpha], -1)]
    weight_gradients(
        counting.student,
        batches,
        lambda rows, i: torch.stack(counting.method._losses(rows, counting.teacher.rows(batches[i]), batches[i]), -1),
        weights,
        lambda ask: cross_entropy(ask(counting.validation).signal.logits, counting.validation.labels).mean(),
        rate=0.1,
        count=8,
    )
    assert torch.equal(counting.student.model[3].calls, calls)


def test_the_students_step_does_not_differentiate_alpha():
    world = World()
    world.live.modules["ratio"].requires_grad_(True)
    terms = world.method.loss(world.student(world.batch), world.teacher.rows(world.batch), world.batch, world.live)
    sum(t.weight * t.values.sum() for t in terms.values()).backward()
    assert all(p.grad is None for p in world.live.modules["ratio"].parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in world.student.model[-1].parameters())


@pytest.mark.parametrize("bias", [-2000.0, 2000.0, 0.3])
def test_a_constant_weight_is_classical_distillation(bias):
    world = World(temperature=2.0)
    with torch.no_grad():
        for p in world.live.modules["ratio"].parameters():
            p.zero_()
        world.live.modules["ratio"][-1].bias.fill_(bias)
    alpha = float(torch.sigmoid(torch.tensor(bias).double()))
    rows = world.student.eval()(world.batch), world.teacher.rows(world.batch), world.batch
    mine = world.method.loss(*rows, world.live)
    fixed = KD(temperature=2.0, kd_weight=alpha, ce_weight=1 - alpha).loss(*rows, Live())
    totals = [sum(t.weight * t.values for t in terms.values()) for terms in (mine, fixed)]
    close(totals[0], totals[1], atol=1e-12)
    world.move()  # a saturated weight has a gradient of 0, not nan
    assert world.ratio().isfinite().all()


def test_no_virtual_step_no_gradient():
    world = World(virtual_rate=0.0)
    slopes, _ = world.slopes()
    before = world.ratio().clone()
    world.move()
    assert (slopes == 0).all() and torch.equal(world.ratio(), before)


def test_where_teacher_and_label_say_the_same_nothing_pulls():
    world = World(temperature=1.0)
    world.teacher.logits[:4] = 2000.0 * nn.functional.one_hot(world.batch.labels[:4], 3)
    slopes, _ = world.slopes()
    assert slopes[:4].abs().max() < 1e-15 < slopes[4:].abs().min()


def test_the_side_that_helps_validation_gains_weight():
    """Two examples: the first has a wrong label and a right teacher, the second the other way round."""
    world = World(rows=2, classes=2, virtual_rate=1.0)
    world.batch.labels.copy_(torch.tensor([1, 0]))
    world.teacher.logits.copy_(torch.tensor([[4.0, -4.0], [-4.0, 4.0]]))
    world.validation = batch_of(world.batch.inputs["pixel_values"].flatten(1), torch.tensor([0, 0]))
    slopes, _ = world.slopes()
    assert slopes[0] < 0 < slopes[1]
    before = world.alpha()
    for _ in range(60):
        world.move()
    assert world.alpha()[0] > before[0] and world.alpha()[1] < before[1]


def test_the_head_alone_is_the_whole_with_the_body_frozen():
    head = World(virtual="head").slopes()[0]
    frozen = World()
    frozen.student.model[1].requires_grad_(False)
    frozen.student.model[4].requires_grad_(False)
    close(head, frozen.slopes()[0], atol=1e-15)
    assert (head - World().slopes()[0]).abs().max() > 1e-6


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Kernel(nn.Module):
    def forward(self, x):
        return _Custom.apply(x)


def test_kernels_without_second_derivatives_fall_back_and_say_so(caplog):
    from understudy.training import bilevel

    bilevel._WARNED.clear()
    with caplog.at_level(logging.WARNING):
        found = World(body=[Kernel(), nn.BatchNorm1d(6)]).slopes()[0]
    assert "central differences" in caplog.text
    close(found, World(body=[nn.Tanh(), nn.BatchNorm1d(6)]).slopes()[0], rtol=1e-6, atol=1e-9)


def test_a_half_precision_student_is_judged_in_float32():
    world = World(body=[nn.Tanh()], dtype=torch.float32)
    world.student.to(torch.bfloat16)
    half, _ = world.slopes()
    world.student.float()  # the same rounded weights
    assert half.dtype == torch.float32
    close(half, world.slopes()[0], rtol=1e-2, atol=1e-6)  # the ratio network sees bfloat16 logits


def test_order_and_constants_change_nothing():
    world = World()
    labels, means = world.batch.labels, world.live.tables["means"]
    s, t = torch.randn(8, 3).double(), world.teacher.logits
    order = torch.randperm(8)
    found = triangle_features(s, t, labels, means, angles=True)
    close(triangle_features(s[order], t[order], labels[order], means, angles=True), found[order])
    close(triangle_features(s + 7.0, t - 3.0, labels, means, angles=True), found, atol=1e-12)
