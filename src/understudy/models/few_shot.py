"""A few-shot adapter of a zero-shot classifier: the labelled images vote, by how near they are (Tip-Adapter, Zhang et al. 2022).

    logits = zero-shot logits + α exp(−β (1 − f Aᵀ)) V

f is the embedding of an image, A are those of the labelled images, all of length 1, and V their classes, one-hot. Nothing is
trained. α and β are chosen on validation data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models.adapters import ClassifierAdapter
from understudy.models.modes import evaluating

OPTIONS = {
    "adapter": (
        "true, false, or numbers {alpha, beta}",
        "false",
        "Of a zero-shot model: the training images that have a label vote too; alpha and beta are chosen on validation data.",
    )
}
"""Keys of `options`, with the type, default and meaning of each."""
ALPHAS = (0.0, *(0.1 + i * 2.9 / 20 for i in range(20)))
BETAS = tuple(0.1 + i * 6.9 / 20 for i in range(20))
"""The ranges of the authors' search; α = 0 is the zero-shot classifier."""


class FewShotAdapter(nn.Module):
    """α exp(−β (1 − f Aᵀ)) V.

    Args:
        keys: A, `[labelled images, width]`, of length 1. labels: their classes `[labelled images]`. classes: their number.
        alpha: weight of the votes. beta: how fast a vote falls with distance.
    """

    keys: Tensor
    votes: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, keys: Tensor, labels: Tensor, classes: int, alpha: float, beta: float) -> None:
        super().__init__()
        self.register_buffer("keys", keys)
        self.register_buffer("votes", F.one_hot(labels, classes).to(keys))
        self.register_buffer("alpha", keys.new_tensor(alpha))
        self.register_buffer("beta", keys.new_tensor(beta))

    def forward(self, features: Tensor) -> Tensor:
        """What is added to the logits `[images, classes]` of images with these embeddings `[images, width]`."""
        return self.alpha * self.voted(features, self.beta)

    def voted(self, features: Tensor, beta: float | Tensor) -> Tensor:
        """The sums of the votes for each class, `[images, classes]`."""
        return (beta * (features @ self.keys.T - 1)).exp() @ self.votes


class Chosen(NamedTuple):
    """The best α and β of a grid.

    Args:
        alpha, beta: the first of highest accuracy. grid: accuracies `[betas, alphas]`. examples: that it was measured on.
    """

    alpha: float
    beta: float
    grid: Tensor
    examples: int


def given(adapter: Any) -> tuple[float, float] | None:
    """α and β as `options.adapter` gives them; `None` if they are to be chosen.

    Raises:
        InputError: neither true nor two numbers, α below 0, or β not above 0.
    """
    if adapter is True:
        return None
    both: list[Any] = [adapter.get(key) for key in ("alpha", "beta")] if isinstance(adapter, Mapping) else []
    if (
        len(both) != 2
        or len(adapter) != 2
        or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in both)
        or not (0 <= both[0] < float("inf") and 0 < both[1] < float("inf"))
    ):
        raise InputError(
            f"options.adapter is {adapter!r}: give true, or alpha of at least 0 and beta above 0 as in "
            "{alpha: 1.0, beta: 5.5}."
        )
    return float(both[0]), float(both[1])


@torch.no_grad()
def labelled_images(rows: ClassifierAdapter, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Embeddings `[images, width]` and classes of the images that have a label.

    Args:
        rows: of a zero-shot classifier.
    """
    seen = [(f, labels) for f, _, labels in _read(rows, batches)]
    return torch.cat([f for f, _ in seen]), torch.cat([labels for _, labels in seen])


@torch.no_grad()
def choose(
    rows: ClassifierAdapter,
    adapter: FewShotAdapter,
    batches: Iterable[Batch],
    *,
    alphas: Sequence[float] = ALPHAS,
    betas: Sequence[float] = BETAS,
) -> Chosen:
    """The α and β of highest accuracy on examples that are not among the adapter's.

    Every β in order, and for each every α; a later pair replaces the best so far if it is strictly better.

    Args:
        rows: of the zero-shot classifier, without the adapter. batches: with labels.
    """
    right, number = torch.zeros(len(betas), len(alphas), dtype=torch.float64), 0
    for features, logits, labels in _read(rows, batches):
        number += len(labels)
        for i, beta in enumerate(betas):
            votes = adapter.voted(features, beta)
            hits = [((logits + alpha * votes).argmax(-1) == labels).sum() for alpha in alphas]
            right[i] += torch.stack(hits).double().cpu()
    row, column = divmod(int(right.flatten().argmax()), len(alphas))  # the first of the largest
    return Chosen(alphas[column], betas[row], right / number, number)


def _read(rows: ClassifierAdapter, batches: Iterable[Batch]) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Embeddings, logits and classes of each batch, on the device of the model."""
    device = next(rows.parameters()).device
    with evaluating(rows):
        for batch in batches:
            here = batch.to(device)
            found = rows(here, features=True)
            assert found.features is not None
            yield found.features, found.signal.logits, here.row_labels
