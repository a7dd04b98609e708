"""How the distillation loss changes with its temperature."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.losses._kernels import kl, weighted
from understudy.losses._pairs import check_temperature, checked, log_softmax, need_dense
from understudy.targets import Target


@torch.no_grad()
def temperature_slope(student: Tensor, target: Target | Tensor, *, temperature: float) -> Tensor:
    """∂/∂τ [τ² KL(p ‖ q)] with p = softmax(U/τ) and q = softmax(S/τ), values `[rows]` without gradient.

    It is τ [2 KL − Cov_p(log p, log p/q) + E_p log q − E_q log q], and goes to 0 as τ → ∞. Of equal rows it is 0. Both sides'
    temperature moves, so the target must be `Dense`: other targets hold probabilities at one temperature. It is +inf
    where KL is.

    Args:
        student: logits S `[rows, classes]`. target: the teacher's U.

    Raises:
        InputError: another target, no positive temperature, or a row that is no distribution.
    """
    check_temperature("temperature_slope", temperature)
    teacher = need_dense("temperature_slope", target, student.shape[-1])
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    values = kl(log_p, log_q)
    checked("temperature_slope", values, student, target)
    ahead = log_p - log_q
    own = log_p - weighted(log_p, log_p)[:, None]
    # Centred, for all log q are near −log V at a high temperature, and their mean cancels.
    other = log_q - weighted(log_q, log_q)[:, None]
    slope = 2 * values - weighted(log_p, own * ahead) + weighted(log_p, other)
    return torch.where(values.isinf(), values, temperature * slope)
