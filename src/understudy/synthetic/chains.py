"""Chains of tokens with a reward for each transition, and the policy whose value there is exact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from understudy.data.batch import IGNORE, Batch
from understudy.data.lists import ListBatch
from understudy.data.noise import uniform
from understudy.data.tokenize import TextSet
from understudy.errors import InputError
from understudy.models.adapters import ModelAdapter, ModelOutput
from understudy.synthetic.policies import Policy, load_policy
from understudy.targets import Dense, Scores


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

    def returns(self, log_q: Tensor, begin: Tensor, chance: torch.Generator) -> Tensor:
        """`[sequences]`, the return of one sequence of a policy `[tokens, tokens]` from each first token."""
        at, total, q = begin, torch.zeros(len(begin), dtype=self.reward.dtype), log_q.exp()
        for _ in range(self.length):
            after = torch.multinomial(q[at], 1, generator=chance)[:, 0]
            at, total = after, total + self.reward[at, after]
        return total


class World(Protocol):
    """What measures a policy of transitions `[tokens, tokens]`."""

    def value(self, log_q: Tensor) -> dict[str, float]: ...


class WorldOfPolicies(World, Protocol):
    """One that knows two policies of that form."""

    @property
    def log_p(self) -> Tensor: ...
    def soft_optimal(self) -> Tensor: ...


def chains(
    seed: int,
    start: Literal["own", "mixture", "tuned"],
    *,
    pairs: int = 600,
    tokens: int = 16,
    length: int = 10,
    label_noise: float = 0.0,
) -> Chains:
    """The world of card 39: pairs from a chain, labelled with probability σ(difference of returns).

    Of the training pairs the share `label_noise`, drawn by seed and id, have the opposite label; all else is unchanged.

    `clean` holds 1,000 sequences for a start: of this chain (`own`), 85 % of another one (`mixture`), or of this chain after
    half the reward of each transition raised it (`tuned`).
    """
    if start not in ("own", "mixture", "tuned"):
        raise InputError(f"data.start is {start!r}; known: own, mixture, tuned.")
    if not isinstance(label_noise, int | float) or not 0 <= label_noise <= 1:
        raise InputError(f"data.label_noise is {label_noise!r} and must be a share between 0 and 1.")
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
        if split == "train":
            better ^= uniform(torch.arange(number), (), seed=seed, step=0) < label_noise
        splits[split] = TextSet([_pair(count + i, a[i], b[i], bool(better[i])) for i in range(number)])
        count += number
    tuned = (log_p + reward / 2).log_softmax(-1)
    own = walk(begin(1000), (tuned if start == "tuned" else log_p).exp())
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


class Bigram(Policy):
    """`bigram:16`: logits of the next token from the last one alone, of the given rank."""

    example = "bigram:16"

    def __init__(self, name: str, tokens: int) -> None:
        super().__init__(name, tokens)
        rank = int(name.partition(":")[2] or 16)
        self.into, self.out = nn.Embedding(tokens, rank), nn.Linear(rank, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.log_softmax(self.out(self.into(ids)).float(), -1)


class BigramAdapter(ModelAdapter):
    """Returns `Scores`: the log-probability of each candidate's transitions, and of each of them. Features are the embeddings
    of the tokens before them, `[tokens, rank]`.

    Args:
        world: measures it.
    """

    def __init__(self, model: Bigram, world: World | None = None) -> None:
        super().__init__()
        self.model, self.padding, self.world = model, 0, world

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        assert isinstance(batch, ListBatch)
        tokens = batch.tokens
        read = batch.inputs["input_ids"][:, :-1][tokens.mask]
        log_p = self.model(read)
        values = log_p.gather(-1, tokens.row_labels[:, None])[:, 0]
        found = Scores(batch.sum_tokens(values), batch.candidates, values, Dense(log_p))
        return ModelOutput(found, self.model.into(read) if features else None)


@torch.no_grad()
def transitions(policy: Bigram) -> Tensor:
    """`[tokens, tokens]`, log-probability of the next token, float64."""
    tokens = torch.arange(policy.into.num_embeddings, device=policy.into.weight.device)
    return policy(tokens).double().cpu()


def exact_value(policy: Bigram, world: World) -> dict[str, float]:
    """What a world says of a policy's transitions."""
    return world.value(transitions(policy))


def exact_policy(log_p: Tensor) -> Bigram:
    """A bigram of full rank with these log-probabilities, `[tokens, tokens]`."""
    model = Bigram(f"bigram:{len(log_p)}", len(log_p))
    with torch.no_grad():
        model.into.weight.copy_(torch.eye(len(log_p)))
        model.out.weight.copy_(log_p.T)
        model.out.bias.zero_()
    return model


def chain_policy(name: str, source: Path | nn.Module | None, world: WorldOfPolicies, size: int) -> Bigram:
    """A policy of transitions: as `load_policy`, or by name one that the world knows: `reference`, which samples the
    sequences, and `soft_optimal`."""
    if source is None and name in ("reference", "soft_optimal"):
        return exact_policy(world.log_p if name == "reference" else world.soft_optimal())
    return load_policy(Bigram, name, source, size)
