"""Paper 40, DHKD: students of half precision, and the end of the auxiliary loss."""

import pytest
import torch

from understudy.data import Batch
from understudy.methods.dhkd import DHKD
from understudy.models import ModelOutput
from understudy.targets import Dense
from understudy.training import Shapes, TrainState


def parts(dtype=torch.float32, **options):
    """A method, and the arguments of its loss for six rows of five classes."""
    torch.manual_seed(0)
    method = DHKD(**options)
    state = TrainState(modules=method.modules(Shapes(5, features=8)), total=10)
    student = ModelOutput(Dense(torch.randn(6, 5, dtype=dtype)), torch.randn(6, 8, dtype=dtype, requires_grad=True))
    batch = Batch({}, torch.arange(6) % 5, torch.arange(6))
    return method, (student, ModelOutput(Dense(torch.randn(6, 5))), batch, state)


@pytest.mark.parametrize("head", ["linear", "nonlinear", "shared"])
def test_a_student_in_half_precision_has_a_head_in_float32(head):
    method, arguments = parts(torch.bfloat16, head=head)
    terms = method.loss(*arguments)
    assert all(t.values.dtype == torch.float32 and t.values.isfinite().all() for t in terms.values())
    if head != "shared":
        terms["kd"].values.sum().backward()
        assert arguments[0].features.grad.abs().sum() > 0


def test_the_logit_loss_ends_where_it_is_told_to():
    method, (*rows, state) = parts(alpha=0.5, until=0.4)
    weights = []
    for state.step in range(10):
        weights.append(method.loss(*rows, state)["kd"].weight)
    assert weights == [0.5] * 4 + [0.0] * 6
    with pytest.raises(ValueError, match="until"):
        DHKD(until=0.0)
