"""A chain that looks two tokens back, for students that look back one: all distances between the two are exact (paper 7)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data.batch import IGNORE, Batch
from understudy.data.tokenize import TextSet
from understudy.models.adapters import ModelAdapter, ModelOutput
from understudy.synthetic.chains import Bigram, exact_value
from understudy.synthetic.policies import load_policy
from understudy.targets import Dense

TOKENS, LENGTH = 20, 10
"""Of the vocabulary, and tokens of a text after the two that it begins with."""


@dataclass(frozen=True)
class MarkovChain:
    """The truth, which is also the teacher.

    Args:
        log_p: `[tokens, tokens, tokens]`, log-probability of a token after the last two. texts: the splits as texts, and `clean`
            ones for a start. splits: as pairs of texts with one beginning, the better of which the chain finds likelier.
    """

    log_p: Tensor
    texts: dict[str, TextSet]
    splits: dict[str, TextSet]

    def value(self, log_q: Tensor) -> dict[str, float]:
        """Exact distances of a policy `[tokens, tokens]` a text, in nats, over all beginnings alike: `forward_kl` (chain ‖ policy),
        `reverse_kl`, and `true_log_prob`, the chain's mean log-probability of what the policy writes. `value` is minus the
        first."""
        p, q = self.log_p.exp(), log_q.exp()
        ahead = (p * (self.log_p - log_q)).sum(-1), (q * (log_q - self.log_p)).sum(-1), (q * self.log_p).sum(-1)
        truth = ours = torch.full(p.shape[:2], 1 / p[..., 0].numel(), dtype=p.dtype)
        forward, reverse, likely = 0.0, 0.0, 0.0
        for _ in range(LENGTH):
            forward += float((truth * ahead[0]).sum())
            reverse, likely = reverse + float((ours * ahead[1]).sum()), likely + float((ours * ahead[2]).sum())
            truth, ours = torch.einsum("ab,abc->bc", truth, p), torch.einsum("ab,bc->bc", ours, q)
        return {"forward_kl": forward, "reverse_kl": reverse, "true_log_prob": likely, "value": -forward}


def markov(seed: int, *, number: int = 2000, held_out: int = 500) -> MarkovChain:
    """A random chain with a few likely tokens after any two, `number` training texts or pairs and `held_out` others each."""
    chance = torch.Generator().manual_seed(seed)
    log_p = (2 * torch.randn(TOKENS, TOKENS, TOKENS, generator=chance, dtype=torch.float64)).log_softmax(-1)
    p = log_p.exp()

    def walk(first: Tensor) -> Tensor:
        steps = [*first.T]
        for _ in range(LENGTH):
            steps.append(torch.multinomial(p[steps[-2], steps[-1]], 1, generator=chance)[:, 0])
        return torch.stack(steps, 1)

    def likelihood(texts: Tensor) -> Tensor:
        return log_p[texts[:, :-2], texts[:, 1:-1], texts[:, 2:]].sum(1)

    texts: dict[str, TextSet] = {}
    pairs: dict[str, TextSet] = {}
    sizes, count = {"train": number, "validation": held_out, "test": held_out, "clean": number}, 0
    for split, size in sizes.items():
        first = torch.randint(TOKENS, (size, 2), generator=chance)
        one, other = walk(first), walk(first)
        ids, better = range(count, count + size), likelihood(one) - likelihood(other)
        texts[split] = TextSet([_text(i, row) for i, row in zip(ids, one, strict=True)])
        if split == "clean":  # texts to begin with, in the form of pairs
            other, better = one, torch.ones(size)
        told = zip(ids, one, other, better.tolist(), strict=True)
        pairs[split] = TextSet([_pair(i, a, b, gain > 0) for i, a, b, gain in told if gain])
        count += size
    return MarkovChain(log_p, texts, pairs)


def _text(number: int, ids: Tensor) -> dict[str, Any]:
    return {"id": number, "input_ids": ids, "labels": _labels(ids), "bytes": 0}  # tokens of no spelling


def _pair(number: int, a: Tensor, b: Tensor, first: bool) -> dict[str, Any]:
    sequences = [(ids, _labels(ids)) for ids in (a, b)]
    return {"id": number, "sequences": sequences, "scores": [float(first), float(not first)], "log_probs": None}


def _labels(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[:2] = IGNORE
    return labels


class ChainTable(nn.Module):
    """The chain as a model: logits of the next token at each place of a text."""

    def __init__(self, log_p: Tensor) -> None:
        super().__init__()
        self.log_p = nn.Parameter(log_p.float())

    def forward(self, ids: Tensor) -> Tensor:
        return self.log_p[ids.roll(1, -1), ids]  # the first place has no two tokens, and is no row


class ChainAdapter(ModelAdapter):
    """The next token's logits at the rows of a batch of texts, of a table or a `Bigram`.

    Args:
        world: measures policies of transitions.
    """

    def __init__(self, model: ChainTable | Bigram, world: MarkovChain) -> None:
        super().__init__()
        self.model, self.padding, self.world = model, 0, world

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        ids = batch.inputs["input_ids"]
        read = batch.select(self.model.into(ids)) if features and isinstance(self.model, Bigram) else None
        return ModelOutput(Dense(batch.select(self.model(ids))), read)

    def distances(self) -> dict[str, float]:
        """`MarkovChain.value` of a policy of transitions; nothing of the chain itself."""
        return exact_value(self.model, self.world) if isinstance(self.model, Bigram) else {}


def chain_adapter(name: str, source: Path | nn.Module | None, world: MarkovChain, *, table: bool) -> ChainAdapter:
    """A model of the world by name, folder or module: the chain itself where `table`, else a policy like `bigram:20`."""
    if source is None and table:
        return ChainAdapter(ChainTable(world.log_p), world)
    if isinstance(source, ChainTable):
        return ChainAdapter(source, world)
    return ChainAdapter(load_policy(Bigram, name, source, TOKENS), world)
