"""A causal LM that scores whole completions: one log-probability for each candidate of a list."""

from __future__ import annotations

import torch

from understudy.data import Batch, ListBatch
from understudy.losses import cross_entropy
from understudy.models.adapters import CausalLMAdapter, ModelOutput
from understudy.models.layouts import Packing
from understudy.streaming import rowwise
from understudy.targets import Scores


class SequenceAdapter(CausalLMAdapter):
    """Returns `Scores`: log π(y | x) of each candidate, summed over its completion tokens with EOS.

    The head is streamed over the tokens that count, so no `[tokens, vocabulary]` tensor exists, forward or backward.
    The common prefix of a list's candidates, which is mostly the prompt, is computed once if `packing` allows. Dropout
    is off, so that the log-ratio to a reference model is exactly 0 at the start.
    """

    def __init__(self, model: torch.nn.Module, vocabulary: int, packing: Packing = "none") -> None:
        super().__init__(model, vocabulary, packing)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        assert isinstance(batch, ListBatch)  # as the task's collator returns
        tokens = batch.tokens
        rows = self.token_rows(tokens, groups=batch.groups)
        log_probs = -rowwise(cross_entropy, rows.signal, None, tokens.row_labels)
        sums = log_probs.new_zeros(len(batch.labels)).index_add(0, tokens.sequence, log_probs)
        return ModelOutput(Scores(batch.by_candidate(sums), batch.candidates))
