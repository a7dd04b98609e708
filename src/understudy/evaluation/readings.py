"""How a language model reads texts that it did not write: how sure it is of each token, and its hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from understudy.data import Batch
from understudy.data.tokenize import collate_text, encode
from understudy.losses import entropy
from understudy.models import CausalLMAdapter, evaluating
from understudy.streaming import rowwise


class Readings(NamedTuple):
    """What a model says of completions.

    Args:
        entropy: mean over their tokens of the entropy of its prediction, nats.
        hidden: the mean hidden state before the head over each one's tokens, `[texts, width]`.
    """

    entropy: float
    hidden: Tensor


@torch.no_grad()
def read_texts(
    model: Any, tokenizer: Any, records: Sequence[Mapping[str, str]], max_length: int, batch: int = 32
) -> Readings:
    """Read completions after their prompts, in evaluation mode.

    Args:
        model: a causal LM. records: with `prompt` and `completion`. max_length: in tokens; longer ones lose their beginning.
    """
    texts: Any = [{"id": i, "prompt": r["prompt"], "completion": r["completion"]} for i, r in enumerate(records)]
    rows, _ = encode(texts, tokenizer, max_length=max_length, pack=False, truncation="start")
    reader = CausalLMAdapter(model, len(tokenizer))
    home = next(model.parameters()).device
    entropies, states = [], []
    with evaluating(reader):
        for start in range(0, len(rows), batch):
            items = rows.records[start : start + batch]
            part = Batch.from_dict(collate_text(items, pad_id=tokenizer.pad_token_id or 0)).to(home)
            out = reader(part, features=True)
            entropies.append(rowwise(entropy, out.signal, None).double().cpu())
            hidden = out.features.double().cpu()
            counts = torch.bincount(part.sequence.cpu(), minlength=len(items)).clamp(min=1)
            sums = hidden.new_zeros(len(items), hidden.shape[1]).index_add(0, part.sequence.cpu(), hidden)
            states.append(sums / counts[:, None])
    return Readings(float(torch.cat(entropies).mean()), torch.cat(states))
