"""Weights judged after a virtual step: the gradient against finite differences, cuts, ranks, what must not move."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from golden_vectors import close
from tgeo_world import World, slopes
from two_ranks import two_ranks
from understudy.losses import cross_entropy, forward_kl
from understudy.methods.tgeo_kd import TGeoKD
from understudy.models import evaluating
from understudy.training.bilevel import along

HERE = Path(__file__).parent


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
    found, outer = world.slopes()
    with evaluating(world.student):
        assert float(outer) == pytest.approx(virtual_loss(world, alpha), abs=1e-10)
        for i in range(len(alpha)):
            shift = torch.zeros_like(alpha)
            shift[i] = 1e-3
            near, far = (
                virtual_loss(world, alpha + n * shift) - virtual_loss(world, alpha - n * shift) for n in (1, 2)
            )
            assert float(found[i]) == pytest.approx((8 * near - far) / 12e-3, rel=1e-7, abs=1e-8)


def test_the_cut_of_an_update_changes_nothing():
    whole, wanted = World(), World().slopes()[0]
    whole.move()
    for size in (1, 3, 5):
        part = World()
        close(part.slopes(size)[0], wanted, atol=1e-14)
        part.move(size)
        close(part.ratio(), whole.ratio(), atol=1e-12)


def trainer_of(folder, micro, accumulate):
    from test_engine import trainer_for

    trainer = trainer_for(TGeoKD(validation=7, every=1), folder, micro, accumulate)
    trainer.model.train_state.tables = {"means": torch.eye(5).double() * 0.5 + 0.1}
    trainer.validation_dataset = [(p.flip(-1), y, i) for p, y, i in trainer.train_dataset]
    return trainer


@pytest.mark.slow
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
        "from test_bilevel import trainer_of\n"
        "trainer = trainer_of(Path(sys.argv[1]), 6, 1)\ntrainer.train()\n"
        "if trainer.args.process_index == 0:\n"
        "    torch.save(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), sys.argv[1] + '/two.pt')\n"
        "torch.distributed.barrier()\ntorch.distributed.destroy_process_group()\n"
    )
    done = two_ranks(script, tmp_path)
    assert done.returncode == 0, done.stderr
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
    counting.alpha()
    calls = counting.student.model[3].calls.clone()
    alpha = torch.full((8,), 0.5)
    given = counting.student, counting.method, counting.teacher, [counting.batch], counting.validation, alpha
    slopes(*given, rate=0.1)
    assert torch.equal(counting.student.model[3].calls, calls)


def test_no_virtual_step_no_gradient():
    world = World(virtual_rate=0.0)
    found, _ = world.slopes()
    before = world.ratio().clone()
    world.move()
    assert (found == 0).all() and torch.equal(world.ratio(), before)


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


class Attention(nn.Module):
    """Over two tokens of three; `fused` leaves the choice of kernel to torch."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def forward(self, x):
        t = x.unflatten(-1, (1, 2, 3))
        if self.fused:
            return nn.functional.scaled_dot_product_attention(t, t, t).flatten(1)
        return ((t @ t.transpose(-1, -2) / 3**0.5).softmax(-1) @ t).flatten(1)


def test_fused_attention_is_differentiated_exactly(caplog):
    fused, plain = (World(body=[Attention(f)]).slopes()[0] for f in (True, False))
    close(fused, plain, atol=1e-14)
    assert not caplog.records


def test_other_failures_are_not_hidden():
    def broken(parameters):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        along(broken, {"w": torch.ones(2)}, {"w": torch.ones(2)})
    found = along(lambda p: p["w"] ** 3, {"w": torch.arange(3.0)}, {"w": torch.tensor([1.0, 2.0, 0.0])})
    close(found, torch.tensor([0.0, 6.0, 0.0]))
    still = along(lambda p: torch.ones(2), {"w": torch.ones(2)}, {"w": torch.ones(2)})
    assert still.eq(0).all()


def test_a_half_precision_student_is_judged_in_float32():
    world = World(body=[nn.Tanh()], dtype=torch.float32)
    world.student.to(torch.bfloat16)
    half, _ = world.slopes()
    world.student.float()  # the same rounded weights
    assert half.dtype == torch.float32
    close(half, world.slopes()[0], rtol=1e-2, atol=1e-6)  # the ratio network sees bfloat16 logits
