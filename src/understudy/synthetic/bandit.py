"""A contextual bandit whose rewards are noisy and whose truth is known, with the policy that chooses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from understudy.data.batch import Batch
from understudy.data.lists import ListBatch
from understudy.data.tokenize import TextSet
from understudy.errors import InputError
from understudy.models.adapters import ModelAdapter, ModelOutput
from understudy.synthetic.policies import Policy
from understudy.targets import Scores

Noise = Literal["heavy", "outlier", "adversarial", "shift", "none"]


@dataclass(kw_only=True)
class ChoiceBatch(ListBatch):
    """Lists whose candidates are described by features instead of text.

    Args:
        features: `[lists, candidates, width]`. truth: `[lists, candidates]`, the noiseless utility, for judging alone.
    """

    features: Tensor
    truth: Tensor

    @cached_property
    def lengths(self) -> Tensor:
        """Every candidate counts as one token."""
        return self.candidates.long()


def bandit(noise: Noise, seed: int, *, train: int = 2000, test: int = 2000, items: int = 6) -> dict[str, TextSet]:
    """Contexts x and items a in R⁸ with utility xᵀWa + 1.5 tanh(xᵀW₂a), and one noisy reward an item.

    `train` has noisy rewards, `clean` (512 contexts, for a start) and the other splits have true ones. Noise, in units of
    the utility's deviation: `heavy` 0.5 Cauchy; `outlier` 0.5 normal and 10 normal in 15 % of cases; `adversarial` 0.5
    normal with the sign flipped in a quarter; `shift` 0.5 normal and 1.05 times the item's first feature.
    """
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance, dtype=torch.float64)

    first, second = normal(8, 8) / 8**0.5, normal(8, 8) / 8**0.5
    number = {"train": train, "clean": 512, "validation": 500, "test": test}
    splits, start = {}, 0
    for split, size in number.items():
        x, a = normal(size, 1, 8), normal(size, items, 8)
        utility = (x @ first * a).sum(-1) + 1.5 * torch.tanh((x @ second * a).sum(-1))
        reward = _noisy(utility, a, noise, normal, chance) if split == "train" else utility
        features = torch.cat([x.expand_as(a), a, x * a], -1).float()
        rows = [
            {
                "id": start + i,
                "sequences": [(features[i, j], torch.empty(0)) for j in range(items)],
                "scores": reward[i].tolist(),
                "truth": utility[i].tolist(),
                "log_probs": None,
            }
            for i in range(size)
        ]
        splits[split], start = TextSet(rows), start + size
    return splits


def _noisy(utility: Tensor, items: Tensor, noise: Noise, normal: Any, chance: torch.Generator) -> Tensor:
    unit, shape = utility.std(), utility.shape
    if noise == "none":
        return utility
    if noise == "heavy":
        return utility + 0.5 * unit * normal(*shape) / normal(*shape)
    noisy = utility + 0.5 * unit * normal(*shape)
    rare = torch.rand(shape, generator=chance)
    if noise == "outlier":
        return torch.where(rare < 0.15, utility + 10 * unit * normal(*shape), noisy)
    if noise == "adversarial":
        return torch.where(rare < 0.25, -noisy, noisy)
    if noise == "shift":
        return noisy + 1.05 * unit * items[..., 0]
    raise InputError(f"data.noise is {noise!r}; known: heavy, outlier, adversarial, shift, none.")


def collate_choices(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The tensors of a `ChoiceBatch`; all lists have equally many candidates."""
    features = torch.stack([torch.stack([f for f, _ in item["sequences"]]) for item in items])
    lists, number = features.shape[:2]
    known = [c for c in ("reference", "taught") if all(item.get(c) is not None for item in items)]
    return {
        "features": features,
        "labels": torch.zeros(lists, 1, dtype=torch.long),
        "ids": torch.tensor([item["id"] for item in items]),
        "slots": torch.arange(lists * number).view(lists, number),
        "scores": torch.tensor([item["scores"] for item in items], dtype=torch.float64),
        "truth": torch.tensor([item["truth"] for item in items], dtype=torch.float64),
        **{c: torch.tensor([item[c] for item in items], dtype=torch.float64) for c in known},
    }


class ChoicePolicy(Policy):
    """`policy:64,64`: an MLP that scores each item by its features."""

    example = "policy:64,64"

    def __init__(self, name: str, inputs: int) -> None:
        super().__init__(name, inputs)
        widths = [inputs, *(int(v) for v in name.partition(":")[2].split(","))]
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.body(features).squeeze(-1)


class ChoiceAdapter(ModelAdapter):
    """Answers with `Scores`: the log-probability with which the policy picks each item."""

    def __init__(self, model: ChoicePolicy) -> None:
        super().__init__()
        self.model, self.padding = model, 0

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        assert isinstance(batch, ChoiceBatch)
        scores = self.model(batch.features.to(next(self.model.parameters()).dtype))
        log_p = torch.log_softmax(scores.masked_fill(~batch.candidates, -torch.inf), -1)
        return ModelOutput(Scores(log_p.masked_fill(~batch.candidates, 0.0), batch.candidates))
