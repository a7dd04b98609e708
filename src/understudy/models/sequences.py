"""A causal LM as a scorer of completions: the log-probability of each candidate of a list, and of its tokens."""

from __future__ import annotations

import torch

from understudy.data import Batch, ListBatch
from understudy.losses import cross_entropy
from understudy.models.adapters import CausalLMAdapter, ModelOutput
from understudy.models.layouts import Packing
from understudy.models.modes import without_dropout
from understudy.streaming import rowwise
from understudy.targets import Scores


class SequenceAdapter(CausalLMAdapter):
    """Answers with `Scores`: log π(y | x) of each candidate, summed over its completion tokens with EOS, and by token.

    Features are the hidden states of the tokens' rows, `[tokens, width]`. The head is streamed over the tokens that count, so no `[tokens, vocabulary]` tensor exists, forward or backward.
    What the candidates of a list share at their beginning, the prompt above all, is computed once where `packing` allows.
    Dropout is off, as the log-ratio to a reference asks: at the start it is 0, not noise.
    """

    def __init__(self, model: torch.nn.Module, vocabulary: int, packing: Packing = "none") -> None:
        super().__init__(model, vocabulary, packing)
        without_dropout(model)

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        assert isinstance(batch, ListBatch)  # as the task's collator returns
        tokens = batch.tokens
        rows = self.token_rows(tokens, features, batch.groups)
        log_probs = -rowwise(cross_entropy, rows.signal, None, tokens.row_labels)
        found = Scores(batch.sum_tokens(log_probs), batch.candidates, log_probs, rows.signal)
        return rows._replace(signal=found)
