"""Distillation of linear models in closed form: what a student learns without training it. All in float64."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.errors import InputError

log = logging.getLogger(__name__)


class RidgeError(NamedTuple):
    """E ‖θ − θ*‖² over the noise, the expected squared error where inputs are isotropic, and its two parts."""

    bias_squared: float
    variance: float

    @property
    def total(self) -> float:
        """Bias² + variance."""
        return self.bias_squared + self.variance


def ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """θ = (X Xᵀ + λ I)⁻¹ X y, `[width]`.

    Args:
        x: X `[width, examples]`. y: `[examples]`. penalty: λ.
    """
    return torch.linalg.solve(_gram(x, penalty), x @ y)


def distilled_ridge(x: Tensor, y: Tensor, *, penalty: float, alpha: float, student: int, teacher: int) -> Tensor:
    """θ_s = (X_s X_sᵀ + λ I)⁻¹ X_s ((1 − α) y_s + α X_sᵀ θ_t), with θ_t the ridge of the teacher's examples: `[width]`.

    Args:
        x: X `[width, examples]`. y: `[examples]`. penalty: λ. alpha: weight of the teacher's answers.
        student, teacher: n_s ≤ n_t, each sees so many of the first examples.

    Source: Ben-Baruch et al. 2024, the linear model of their theorem.
    """
    return _student_of(x, penalty, alpha, student, teacher) @ y[:teacher]


def distilled_ridge_error(
    x: Tensor, truth: Tensor, *, noise: float, penalty: float, alpha: float, student: int, teacher: int
) -> RidgeError:
    """The error of `distilled_ridge` where y = Xᵀ θ* + η, η of standard deviation `noise`, in expectation over η.

    Args:
        truth: θ* `[width]`. The rest as of `distilled_ridge`.
    """
    m = _student_of(x, penalty, alpha, student, teacher)
    bias = m @ (x[:, :teacher].T @ truth) - truth
    return RidgeError(float(bias.square().sum()), noise**2 * float(m.square().sum()))


def _student_of(x: Tensor, penalty: float, alpha: float, student: int, teacher: int) -> Tensor:
    """M `[width, teacher]` with θ_s = M y_t: the student is linear in the labels."""
    if not 1 <= student <= teacher <= x.shape[1]:
        raise InputError(
            f"The student sees {student} examples and the teacher {teacher} of {x.shape[1]}: the student's are some of the "
            "teacher's."
        )
    x_s, x_t = x[:, :student], x[:, :teacher]
    answers = alpha * x_s.T @ torch.linalg.solve(_gram(x_t, penalty), x_t)
    answers[:, :student] += (1 - alpha) * torch.eye(student, dtype=x.dtype)
    return torch.linalg.solve(_gram(x_s, penalty), x_s @ answers)


def _gram(x: Tensor, penalty: float) -> Tensor:
    return x @ x.T + penalty * torch.eye(len(x), dtype=x.dtype)


class KernelDistillation:
    """Repeated self-distillation of kernel ridge regression with a weight α on the ground truth, exactly.

    With A = (K + λ I)⁻¹: Y_1 = K A Y, and Y_t = K A (α_t Y + (1 − α_t) Y_{t−1}). α = 1 repeats the first fit, α = 0 is pure
    self-distillation, which shrinks to 0. Computed in the eigenbasis of K, without refitting.

    Args:
        kernel: K `[examples, examples]`, symmetric and positive semi-definite. targets: Y `[examples, outputs]`.
        penalty: λ, above 0. center: fit the targets less their mean, so that predictions shrink to it.

    Raises:
        InputError: λ is not above 0, shapes that do not fit, or a kernel with an eigenvalue below 0.

    Source: Borup & Andersen 2021, Section 3 (α weighs the label).
    """

    def __init__(self, kernel: Tensor, targets: Tensor, *, penalty: float, center: bool = False) -> None:
        if not penalty > 0:
            raise InputError(f"The penalty is {penalty} and must be above 0.")
        if kernel.shape != (len(targets), len(targets)) or targets.dim() != 2:
            raise InputError(
                f"The kernel is {tuple(kernel.shape)} and the targets {tuple(targets.shape)}: [n, n] and [n, outputs] are "
                "expected."
            )
        k = kernel.double()
        values, self.vectors = torch.linalg.eigh((k + k.T) / 2)
        if not torch.allclose(k, k.T, rtol=1e-8, atol=1e-8 * float(k.abs().max())) or values[0] < -1e-8 * values[-1]:
            raise InputError(
                f"The kernel is not symmetric and positive semi-definite (smallest eigenvalue {float(values[0]):.3g})."
            )
        self.kernel, self.penalty, self.eigenvalues = k, float(penalty), values.clamp(min=0)
        self.mean = targets.double().mean(0) if center else targets.new_zeros(targets.shape[1]).double()
        self.targets = targets.double() - self.mean

    @property
    def shrinkage(self) -> Tensor:
        """a = w / (w + λ), `[examples]`: what one fit leaves of each eigendirection, by rising eigenvalue."""
        return self.eigenvalues / (self.eigenvalues + self.penalty)

    def factors(self, alphas: Sequence[float]) -> Tensor:
        """b_t `[steps, examples]`, with Y_t = V diag(b_t) Vᵀ Y. `alphas[0]` has no effect."""
        _warn(alphas)
        found = [self.shrinkage]
        for alpha in alphas[1:]:
            found.append(self.shrinkage * ((1 - alpha) * found[-1] + alpha))
        return torch.stack(found)

    def limit_factors(self, alpha: float) -> Tensor:
        """b_∞ = α w / (α w + λ) `[examples]`: ridge with the penalty λ / α; 0 for α = 0."""
        _warn((alpha,))
        return alpha * self.eigenvalues / (alpha * self.eigenvalues + self.penalty)

    def predictions(self, alphas: Sequence[float], kernel: Tensor | None = None) -> Tensor:
        """Predictions of every step, `[steps, points, outputs]`.

        Args:
            alphas: α_t of each step. kernel: k(points, examples) `[points, examples]`; at the examples themselves if `None`.
        """
        return torch.stack([self._at(target, kernel) for target in self._targets(self.factors(alphas))])

    def limit(self, alpha: float, kernel: Tensor | None = None) -> Tensor:
        """Predictions after infinitely many steps at a constant α, `[points, outputs]`; as `predictions`."""
        b = self.limit_factors(alpha)
        return self._at(alpha * self.targets + (1 - alpha) * self._fitted(b), kernel)

    def best_alphas(
        self, steps: int, kernel: Tensor, targets: Tensor, *, clip: bool = False, by_output: bool = False
    ) -> Tensor:
        """α of steps 2, 3, …, each the best on validation data after those before: `[steps − 1]`, or `[steps − 1, outputs]`.

        Args:
            kernel: k(validation, examples). targets: of the validation points. clip: to [0, 1].
            by_output: one α for each output in place of one for all.
        """
        first, truth = self._at(self.targets, kernel), targets.double()
        before, found = self._fitted(self.shrinkage), []
        for _ in range(steps - 1):
            alpha = best_alpha(first, self._at(before, kernel), truth, clip=clip, by_output=by_output)
            before = self._fit(alpha * self.targets + (1 - alpha) * before)
            found.append(alpha)
        return torch.stack(found)

    def left_out(self) -> Tensor:
        """The first fit's prediction of each example from all others, `[examples, outputs]`: (H Y − h Y) / (1 − h).

        Without centring alone: a mean over all examples would have seen the one that is left out.
        """
        if bool(self.mean.any()):
            raise InputError("Leave-one-out of centred targets is not the shortcut's: fit without center=True.")
        hat = (self.vectors * self.shrinkage) @ self.vectors.T
        h = hat.diagonal()[:, None]
        return (hat @ self.targets - h * self.targets) / (1 - h)

    def _fitted(self, factors: Tensor) -> Tensor:
        return self.vectors @ (factors[:, None] * (self.vectors.T @ self.targets))

    def _fit(self, target: Tensor) -> Tensor:
        return self.vectors @ (self.shrinkage[:, None] * (self.vectors.T @ target))

    def _targets(self, factors: Tensor) -> list[Tensor]:
        """What each step was fitted to: b_t / a of each eigendirection. Where a is 0 nothing of it is fitted."""
        a = self.shrinkage
        return [self._fitted(torch.where(a > 0, b / torch.where(a > 0, a, 1.0), 1.0)) for b in factors]

    def _at(self, target: Tensor, kernel: Tensor | None) -> Tensor:
        """The fit to `target` at points."""
        k = self.kernel if kernel is None else kernel.double()
        weights = self.vectors @ ((self.vectors.T @ target) / (self.eigenvalues + self.penalty)[:, None])
        return k @ weights + self.mean


def best_alpha(first: Tensor, pure: Tensor, truth: Tensor, *, clip: bool = False, by_output: bool = False) -> Tensor:
    """α* = ⟨p₁ − p₀, y − p₀⟩ / ‖p₁ − p₀‖², the best weight on the ground truth; 1 where the two do not differ.

    Args:
        first: p₁, validation predictions with α = 1. pure: p₀, with α = 0. truth: y. All `[points, outputs]`.
        clip: to [0, 1]. by_output: one for each output, `[outputs]`, in place of one for all, `[]`.

    Raises:
        InputError: no validation points.

    Source: Borup & Andersen 2021, Theorem 4.1 of the closed form, re-derived as a line search.
    """
    if not len(truth):
        raise InputError("There are no validation points to choose alpha on: give some, or use left_out().")
    difference = first - pure
    axes = (0,) if by_output else (0, 1)
    square = difference.square().sum(axes)
    if bool((square == 0).any()):
        log.warning("Both predictions are equal, so alpha has no effect: it is set to 1.")
    found = (difference * (truth - pure)).sum(axes) / torch.where(square > 0, square, 1.0)
    found = torch.where(square > 0, found, 1.0)
    return found.clamp(0, 1) if clip else found


def rbf_kernel(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    """exp(−γ ‖a_i − b_j‖²), `[a, b]`, float64."""
    return torch.exp(-gamma * (a.double()[:, None] - b.double()).square().sum(-1))


def _warn(alphas: Sequence[float]) -> None:
    if any(not 0 <= a <= 1 for a in alphas):
        log.warning("A weight of the ground truth outside [0, 1] extrapolates.")
