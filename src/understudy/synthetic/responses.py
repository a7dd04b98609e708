"""Responses to one prompt, with a reference, a target and the policy that rejected answers come from, all known exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.data.batch import IGNORE
from understudy.data.tokenize import TextSet
from understudy.errors import InputError
from understudy.losses.differential_information import entropy_of, log_ratio_distribution, rejected_distribution

Rejected = Literal["optimal", "perturbed", "target"]


@dataclass(frozen=True)
class Responses:
    """A finite set of responses, each a sequence of one token after a first token 0.

    Args:
        log_reference, log_target: `[responses]`, log-probabilities. splits: pairs, chosen from the reference.
    """

    log_reference: Tensor
    log_target: Tensor
    splits: dict[str, TextSet]

    @property
    def log_p(self) -> Tensor:
        """The reference as transitions, `[responses, responses]`."""
        return self.log_reference.expand(len(self.log_reference), -1)

    def soft_optimal(self) -> Tensor:
        """The target as transitions, `[responses, responses]`."""
        return self.log_target.expand(len(self.log_target), -1)

    def value(self, log_q: Tensor) -> dict[str, float]:
        """Of a policy `[tokens, tokens]`, at token 0. `value`: −KL(target ‖ policy); `start_value`: that of the reference;
        `did_entropy`: of the differential information from the reference to the policy."""
        policy, target = log_q[0], self.log_target.exp()
        return {
            "value": -float((target * (self.log_target - policy)).sum()),
            "start_value": -float((target * (self.log_target - self.log_reference)).sum()),
            "did_entropy": float(entropy_of(log_ratio_distribution(policy, self.log_reference))),
        }


def responses(seed: int, rejected: Rejected, *, beta: float = 0.5, pairs: int = 20_000, number: int = 32) -> Responses:
    """The world of card 32: reference softmax(1.2 N), target ∝ reference · exp(N), chosen answers from the reference.

    `rejected` answers come from the optimal distribution for DPO at `beta`, from a random perturbation of the reference, or from
    the target. `clean` holds 1,000 sequences of the reference; pairs carry its log-probabilities.
    """
    if rejected not in ("optimal", "perturbed", "target"):
        raise InputError(f"data.rejected is {rejected!r}; known: optimal, perturbed, target.")
    chance = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(number, generator=chance, dtype=torch.float64)

    reference = (1.2 * normal()).log_softmax(-1)
    target, perturbed = (reference + normal()).log_softmax(-1), (reference + normal()).log_softmax(-1)
    found = {
        "optimal": rejected_distribution(reference, target, beta=beta),
        "perturbed": perturbed,
        "target": target,
    }[rejected]

    def draw(log_p: Tensor, size: int) -> list[int]:
        return torch.multinomial(log_p.exp(), size, replacement=True, generator=chance).tolist()

    splits, count = {}, 0
    for split, size in {"train": pairs, "validation": 200, "test": 200, "clean": 1000}.items():
        chosen = draw(reference, size)
        other = chosen if split == "clean" else draw(found, size)
        both = enumerate(zip(chosen, other, strict=True), start=count)
        splits[split] = TextSet([_pair(i, a, b, reference) for i, (a, b) in both])
        count += size
    return Responses(reference, target, splits)


def _pair(number: int, chosen: int, rejected: int, reference: Tensor) -> dict[str, Any]:
    sequences = [(torch.tensor([0, token]), torch.tensor([IGNORE, token])) for token in (chosen, rejected)]
    log_probs = [float(reference[token]) for token in (chosen, rejected)]
    return {"id": number, "sequences": sequences, "scores": [1.0, 0.0], "log_probs": log_probs}
