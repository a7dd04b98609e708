"""Divergences between two predictions of one example with gradient to both sides, for learning the example itself."""

from __future__ import annotations

from torch import Tensor

from understudy.errors import InputError
from understudy.losses._kernels import kl
from understudy.losses._pairs import check_temperature, log_softmax


def two_sided_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, tau_squared: bool = False) -> Tensor:
    """KL(p ‖ q) of `forward_kl` with a gradient to both sides, for methods that optimise the inputs of both networks.

    With p, q the softmaxes of teacher and student over the temperature τ (HARD, arXiv 2305.14890, D):

        ∂/∂s_k = (q_k − p_k) / τ,    ∂/∂t_k = p_k (log p_k − log q_k − KL(p ‖ q)) / τ

    Args:
        student: logits `[rows, classes]`.
        teacher: logits `[rows, classes]`; detach the side that is constant.
        temperature: τ.
        tau_squared: multiply by τ².

    Returns:
        `[rows]`, in nats. 0 with gradient 0 where both agree; a constant added to a side's logits changes nothing.
        Unlike
        in `forward_kl`, a row of nan stays nan: the auxiliary optimiser skips such an update.

    Raises:
        InputError: the sides differ in shape, or the temperature is not above 0.
    """
    check_temperature("two_sided_kl", temperature)
    if student.shape != teacher.shape:
        raise InputError(
            f"two_sided_kl: the student's logits are {list(student.shape)} and the teacher's {list(teacher.shape)}. "
            "Choose models of one class set and show them the same rows."
        )
    values = kl(log_softmax(teacher, temperature), log_softmax(student, temperature))
    return values * temperature**2 if tau_squared else values
