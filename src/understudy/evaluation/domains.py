"""What a model makes of each domain of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from understudy.data import Batch
from understudy.errors import InputError
from understudy.evaluation.rows import row_statistics
from understudy.models import ModelOutput
from understudy.targets import Dense, Mixture, Projected


@torch.no_grad()
def domain_perplexities(answer: Callable[[Batch], ModelOutput], batches: Iterable[Batch], domains: int) -> Tensor:
    """Perplexity of each domain `[domains]`, float64: exp of the mean negative log-likelihood over its rows; nan without any.

    Args:
        answer: a model or a teacher. batches: with `domains`.

    Raises:
        InputError: answers that are no whole distributions.
    """
    sums, counts = torch.zeros(domains, dtype=torch.float64), torch.zeros(domains, dtype=torch.float64)
    for batch in batches:
        assert batch.domains is not None
        signal = answer(batch).signal
        if not isinstance(signal, (Dense, Projected, Mixture)):
            raise InputError(
                f"A perplexity needs whole distributions and the teacher's answers are {type(signal).__name__}: give a live "
                "teacher, or capture with support dense or hidden."
            )
        place = batch.domains[batch.sequence].cpu()
        nll = row_statistics(signal, None, batch.row_labels).nll.double()
        sums.index_add_(0, place, nll)
        counts.index_add_(0, place, torch.ones_like(nll))
    return (sums / counts).exp()
