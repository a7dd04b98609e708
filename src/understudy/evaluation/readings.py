"""How a language model reads texts that it did not write: how sure it is of each token, its hidden states, and how likely they
become by a step of training on another text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from understudy.data import Batch
from understudy.data.tokenize import collate_text, encode
from understudy.losses import cross_entropy, entropy
from understudy.models import CausalLMAdapter, evaluating
from understudy.streaming import rowwise
from understudy.training.unrolled import Parameters, sgd_step

Records = Sequence[Mapping[str, str]]


class Readings(NamedTuple):
    """What a model says of completions.

    Args:
        entropy: mean over their tokens of the entropy of its prediction, nats.
        hidden: the mean hidden state before the head over each one's tokens, `[texts, width]`.
    """

    entropy: float
    hidden: Tensor


@torch.no_grad()
def read_texts(model: Any, tokenizer: Any, records: Records, max_length: int, batch: int = 32) -> Readings:
    """Read completions after their prompts, in evaluation mode.

    Args:
        model: a causal LM. records: with `prompt` and `completion`. max_length: in tokens; longer ones lose their beginning.
    """
    reader = CausalLMAdapter(model, len(tokenizer))
    entropies, states = [], []
    with evaluating(reader):
        for part in _batches(model, tokenizer, records, max_length, batch):
            out = reader(part, features=True)
            entropies.append(rowwise(entropy, out.signal, None).double().cpu())
            hidden = out.features.double().cpu()
            counts = torch.bincount(part.sequence.cpu(), minlength=len(part.ids)).clamp(min=1)
            sums = hidden.new_zeros(len(part.ids), hidden.shape[1]).index_add(0, part.sequence.cpu(), hidden)
            states.append(sums / counts[:, None])
    return Readings(float(torch.cat(entropies).mean()), torch.cat(states))


class Likelihood(NamedTuple):
    """What a model gives a completion: the sum of its tokens' log-probabilities, in nats, and their number."""

    log_prob: float
    tokens: int


class StepReader:
    """Reads completions with the weights that a supervised step θ − η ∇ CE on one other text leads to.

    The model itself is not written to, so that nothing has to be restored; the step is in float32 at least. Both passes are in
    evaluation mode.

    Args:
        model: a causal LM. records: with `prompt` and `completion`, which are read. max_length: in tokens; longer texts lose
            their beginning. rate: η, of a step of gradient descent on the mean over the tokens of a completion.
    """

    def __init__(
        self, model: Any, tokenizer: Any, records: Records, max_length: int, rate: float, batch: int = 32
    ) -> None:
        self.reader, self.rate = CausalLMAdapter(model, len(tokenizer)), rate
        self._encode = lambda some: _batches(model, tokenizer, some, max_length, batch)
        self.batches = self._encode(records)
        self.weights = {name: _single(p.detach()) for name, p in self.reader.named_parameters()}
        self.buffers = {name: b.detach().clone() for name, b in self.reader.named_buffers()}

    def read(self, example: Mapping[str, str] | None) -> list[Likelihood]:
        """The likelihood of each completion after a step on `example`, or with the weights as they are."""
        with evaluating(self.reader):
            weights: Parameters = self.weights
            if example is not None:
                (shown,) = self._encode([example])
                weights = sgd_step(lambda at: self._losses(at, shown).mean(), weights, self.rate)
            with torch.no_grad():
                return [found for part in self.batches for found in self._summed(weights, part)]

    def _losses(self, weights: Parameters, part: Batch) -> Tensor:
        """−log p of each token of the completions."""
        found = functional_call(self.reader, {**weights, **self.buffers}, (part,))
        return rowwise(cross_entropy, found.signal, None, part.row_labels)

    def _summed(self, weights: Parameters, part: Batch) -> list[Likelihood]:
        losses, of = self._losses(weights, part).double().cpu(), part.sequence.cpu()
        sums = losses.new_zeros(len(part.ids)).index_add(0, of, -losses)
        counts = torch.bincount(of, minlength=len(part.ids))
        return [Likelihood(s, n) for s, n in zip(sums.tolist(), counts.tolist(), strict=True)]


def _single(x: Tensor) -> Tensor:
    """In float32, if it is of half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _batches(model: Any, tokenizer: Any, records: Records, max_length: int, size: int) -> list[Batch]:
    """Prompts with completions, on the model's device."""
    texts: Any = [{"id": i, "prompt": r["prompt"], "completion": r["completion"]} for i, r in enumerate(records)]
    rows, _ = encode(texts, tokenizer, max_length=max_length, pack=False, truncation="start")
    home, pad = next(model.parameters()).device, tokenizer.pad_token_id or 0
    parts = [rows.records[start : start + size] for start in range(0, len(rows), size)]
    return [Batch.from_dict(collate_text(items, pad_id=pad)).to(home) for items in parts]
