"""What a frozen model says of the tokens of candidates, computed once before training and kept by content."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from understudy.data.numeric_columns import Column
from understudy.models import ModelAdapter
from understudy.targets import Scores
from understudy.teachers.cache.scores import ScoreStore, score_tokens
from understudy.training.setup import SetupContext


def add_token_columns(
    context: SetupContext,
    model: ModelAdapter,
    read: Callable[[Scores], Mapping[str, Tensor]],
    *,
    kind: str,
    split: str = "train",
    autocast: torch.dtype | None = None,
) -> None:
    """Give every completion token of a split what `read` takes of the model's answer, as columns by the names of `read`.

    The loss reads them with `state.columns[name].of_tokens(batch)`.

    Args:
        read: from the answer to finite numbers, `[tokens, …]` by name.
        kind: of what is read with its settings: answers are kept by model, candidate and this.
        autocast: compute in mixed precision of this dtype: `context.autocast` for what the student is compared with.
    """
    examples = context.examples(split)
    store = ScoreStore(context.store / "tokens" / kind, kind)
    found = score_tokens(model, examples, context.collate, store, read, autocast=autocast)
    ids = torch.tensor([row["id"] for row in examples.records])
    for name in found[0]:
        context.add_column(Column.by_token(name, ids, [arrays[name] for arrays in found]))
