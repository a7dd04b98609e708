"""Preference worlds whose truth is known, for experiments that take seconds: a contextual bandit, and chains of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.data.batch import IGNORE
from understudy.data.lists import ListBatch
from understudy.data.tokenize import TextSet
from understudy.errors import InputError

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


@dataclass(frozen=True)
class Chains:
    """A Markov chain over tokens with a reward for each transition.

    Args:
        log_p: `[tokens, tokens]`, log-probability of the next token under the reference chain. reward: `[tokens, tokens]`.
        length: transitions of a sequence. splits: pairs sampled from the chain and labelled by their return.
    """

    log_p: Tensor
    reward: Tensor
    length: int
    splits: dict[str, TextSet]

    def soft_optimal(self) -> Tensor:
        """`[tokens, tokens]`, log-probabilities of the policy whose return minus KL is highest, as it begins a sequence."""
        ahead = torch.zeros(len(self.reward), dtype=self.reward.dtype)
        for _ in range(self.length):
            scores = self.log_p + self.reward + ahead
            ahead = scores.logsumexp(-1)
        return scores.log_softmax(-1)

    def value(self, log_q: Tensor) -> dict[str, float]:
        """Exact return, KL to the reference chain and their difference for a policy `[tokens, tokens]`, per sequence."""
        q = log_q.exp()
        at = torch.full((len(q),), 1 / len(q), dtype=q.dtype)
        gain, kl = (q * self.reward).sum(-1), (q * (log_q - self.log_p)).sum(-1)
        total, distance = 0.0, 0.0
        for _ in range(self.length):
            total, distance = total + float(at @ gain), distance + float(at @ kl)
            at = at @ q
        return {"return": total, "kl_to_reference": distance, "value": total - distance}


def chains(
    seed: int, start: Literal["own", "mixture"], *, pairs: int = 600, tokens: int = 16, length: int = 10
) -> Chains:
    """The world of card 39: pairs from a chain, labelled with probability σ(difference of returns).

    `clean` holds 1,000 sequences for a start: of this chain (`own`), or 85 % of another one (`mixture`).
    """
    if start not in ("own", "mixture"):
        raise InputError(f"data.start is {start!r}; known: own, mixture.")
    chance = torch.Generator().manual_seed(seed)

    def matrix(scale: float) -> Tensor:
        return scale * torch.randn(tokens, tokens, generator=chance, dtype=torch.float64)

    log_p, other, reward = matrix(1.0).log_softmax(-1), matrix(1.0).log_softmax(-1), matrix(0.5)

    def walk(first: Tensor, p: Tensor) -> Tensor:
        steps = [first]
        for _ in range(length):
            steps.append(torch.multinomial(p[steps[-1]], 1, generator=chance)[:, 0])
        return torch.stack(steps, 1)

    def begin(number: int) -> Tensor:
        return torch.randint(tokens, (number,), generator=chance)

    splits, count = {}, 0
    for split, number in {"train": pairs, "validation": 200, "test": 200}.items():
        first = begin(number)
        a, b = walk(first, log_p.exp()), walk(first, log_p.exp())
        gain = [reward[s[:, :-1], s[:, 1:]].sum(1) for s in (a, b)]
        better = torch.rand(number, generator=chance) < torch.sigmoid(gain[0] - gain[1])
        splits[split] = TextSet([_pair(count + i, a[i], b[i], bool(better[i])) for i in range(number)])
        count += number
    own = walk(begin(1000), log_p.exp())
    if start == "mixture":
        own[:850] = walk(begin(850), other.exp())
    splits["clean"] = TextSet([_pair(count + i, s, s, True) for i, s in enumerate(own)])
    return Chains(log_p, reward, length, splits)


def _pair(number: int, a: Tensor, b: Tensor, first: bool) -> dict[str, Any]:
    sequences = []
    for ids in (a, b):
        labels = ids.clone()
        labels[0] = IGNORE
        sequences.append((ids, labels))
    return {"id": number, "sequences": sequences, "scores": [float(first), float(not first)], "log_probs": None}
