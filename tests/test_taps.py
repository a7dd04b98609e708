"""Inner layers read, edited and entered; no hook is left, also after an exception."""

import pytest
import torch
from torch import nn

from understudy.errors import InputError
from understudy.models.taps import edited, entered, tapped


class Pair(nn.Module):
    """A layer with two outputs, as attention layers have."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x), "weights"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last, self.idle = nn.Linear(3, 4), Pair(), nn.Linear(4, 2), nn.Linear(1, 1)

    def forward(self, x):
        return self.last(self.middle(self.first(x).tanh())[0].tanh())


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


@pytest.fixture
def net():
    return Net().double()


def test_an_edit_reaches_what_follows_and_has_a_gradient(net):
    x, shift = torch.randn(5, 3).double(), torch.zeros(4).double().requires_grad_()
    plain = net(x)
    with edited({"middle": (net.middle, lambda h: h + shift)}):
        same = net(x)
    torch.testing.assert_close(same, plain)
    (slope,) = torch.autograd.grad(same.sum(), shift)
    hidden = net.middle(net.first(x).tanh())[0].detach().requires_grad_()
    (expected,) = torch.autograd.grad(net.last(hidden.tanh()).sum(), hidden)
    torch.testing.assert_close(slope, expected.sum(0))
    with edited({"middle": (net.middle, torch.zeros_like)}):
        torch.testing.assert_close(net(x), net.last(torch.zeros(5, 4).double()))
    assert hooks(net) == 0


def test_entering_runs_the_rest_and_only_the_rest_has_a_gradient(net):
    x, value = torch.randn(5, 3).double(), torch.randn(5, 4).double().requires_grad_()
    with entered(net.middle, value):
        out = net(x)
    torch.testing.assert_close(out, net.last(value.tanh()))
    out.sum().backward()
    assert value.grad is not None and net.last.weight.grad is not None
    assert net.first.weight.grad is None and net.middle.linear.weight.grad is None
    assert hooks(net) == 0 and torch.is_grad_enabled()
    with torch.no_grad(), entered(net.middle, value.detach()):
        assert not net(x).requires_grad
    net.requires_grad_(False)
    with entered(net.middle, value):  # frozen: the gradient reaches the value alone
        assert torch.autograd.grad(net(x).sum(), value)[0].abs().sum() > 0


def test_layers_before_the_entry_neither_count_the_batch_nor_draw(net):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).double()
    x, value = torch.randn(8, 3).double(), torch.randn(8, 4).double()
    random = torch.get_rng_state()
    with entered(model[2], value, model):
        out = model(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert [model[0].num_batches_tracked.item(), model[3].num_batches_tracked.item()] == [0, 1]
    torch.testing.assert_close(out, (value - value.mean(0)) / (value.var(0, correction=0) + 1e-5).sqrt())
    assert all(m.training for m in model.modules()) and hooks(model) == 0
    with pytest.raises(RuntimeError, match="elements"), entered(model[3], value, model):
        model(x[:, :2])  # an exception before the entry
    assert all(m.training for m in model.modules()) and hooks(model) == 0 and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (lambda n, x: edited({"a": (n.idle, lambda h: h)}), "'a' sits on a Linear that this forward pass never called"),
        (
            lambda n, x: edited({"a": (n.first, lambda h: h[:, :2])}),
            r"turns the output \(5, 4\) of a Linear into \(5, 2\)",
        ),
        (lambda n, x: entered(n.idle, x), "never called"),
        (
            lambda n, x: entered(n.middle, x),
            r"a Pair gives \(5, 4\) here and \(5, 3\) is to take its place".replace("a P", "A P"),
        ),
        (lambda n, x: tapped({"a": n.idle}), "never called"),
    ],
)
def test_bad_use_is_one_line_and_leaves_no_hook(net, inside, message):
    x = torch.randn(5, 3).double()
    with pytest.raises(InputError, match=message), inside(net, x):
        net(x)
    assert hooks(net) == 0 and torch.is_grad_enabled()


def test_an_exception_leaves_no_hook(net):
    for context in (
        edited({"a": (net.first, lambda h: h)}),
        entered(net.middle, torch.zeros(1)),
        tapped({"a": net.first}),
    ):
        with pytest.raises(RuntimeError, match="stop"), context:
            raise RuntimeError("stop")
        assert hooks(net) == 0 and torch.is_grad_enabled()
