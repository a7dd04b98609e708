"""Data pruning: scores of examples, and which of them are kept. Higher scores are kept first.

Scores are float64 and `[examples]`; nothing is random but `random_scores`, by seed and id. Histories are
`[epochs, examples, …]`, as a network gave them after each epoch of its training on all the data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.data.noise import uniform
from understudy.errors import InputError
from understudy.losses.checks import check_finite


def random_scores(ids: Tensor, seed: int) -> Tensor:
    """A number in (0, 1) for each example, by its id and the seed alone."""
    return uniform(ids, (1,), seed=seed, step=0)[:, 0].double()


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label has the largest logit, the lowest class of equals: `[epochs, examples]`.

    Raises:
        InputError: a logit is not finite.
    """
    check_finite(
        logits,
        lambda value, epoch, i, _: (
            f"The logits of example {i} in epoch {epoch + 1} of the history hold {value}: lower its rate."
        ),
    )
    top = logits.max(-1, keepdim=True).values
    return (logits == top).int().argmax(-1) == labels


def forgetting_scores(right: Tensor) -> Tensor:
    """How often an example was right after one epoch and wrong after the next; the number of epochs if never right.

    Args:
        right: bool `[epochs, examples]`, see `correct`.

    Raises:
        InputError: fewer than two epochs.

    Source: Toneva et al. 2019.
    """
    if len(right) < 2:
        raise InputError(f"Forgetting is seen between epochs, and the history has {len(right)}: record 2 or more.")
    events = (right[:-1] & ~right[1:]).sum(0)
    return torch.where(right.any(0), events, len(right)).double()


def el2n_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over epochs of ‖softmax(z) − one-hot(y)‖₂, between 0 and √2. Source: Paul et al. 2021 (EL2N)."""
    return _errors(logits, labels).norm(dim=-1).mean(0)


def grand_scores(logits: Tensor, labels: Tensor, feature_norms: Tensor) -> Tensor:
    """Mean over epochs of ‖softmax(z) − one-hot(y)‖₂ · ‖h‖₂, the norm of the gradient of the last layer's weights.

    Args:
        feature_norms: ‖h‖ `[epochs, examples]` of what the last layer reads.

    Source: Paul et al. 2021 (GraNd), for the last layer alone.
    """
    return (_errors(logits, labels).norm(dim=-1) * feature_norms.double()).mean(0)


def _errors(logits: Tensor, labels: Tensor) -> Tensor:
    p = torch.softmax(logits.double(), -1)
    return p - F.one_hot(labels, logits.shape[-1]).to(p)


def prototype_scores(features: Tensor, clusters: int, seed: int) -> Tensor:
    """Distance to the nearest k-means centre of the embeddings. Source: Sorscher et al. 2022, without labels.

    Args:
        features: `[examples, width]`. clusters: k, at most the number of examples.
    """
    from sklearn.cluster import KMeans

    if not 1 <= clusters <= len(features):
        raise InputError(f"{len(features)} examples cannot form {clusters} clusters: choose from 1 to that many.")
    x = features.double().cpu().numpy()
    found = KMeans(clusters, n_init=1, random_state=seed).fit(x)
    return torch.from_numpy(found.transform(x).min(1))


def moderate_scores(features: Tensor, labels: Tensor) -> Tensor:
    """−|d − median of d in the class|, with d the distance to the class mean. Source: Xia et al. 2023 (Moderate)."""
    scores = torch.empty(len(labels), dtype=torch.float64)
    for rows in _by_class(labels):
        x = features[rows].double()
        distance = (x - x.mean(0)).norm(dim=1)
        scores[rows] = -(distance - distance.quantile(0.5)).abs()
    return scores


def herding_scores(features: Tensor, labels: Tensor) -> Tensor:
    """−(place in the order of herding) / (examples of the class): the first ones of each class have its mean together.

    Costs examples² · width operations in each class. Source: Welling 2009; greedy, as Rebuffi et al. 2017.
    """
    scores = torch.empty(len(labels), dtype=torch.float64)
    for rows in _by_class(labels):
        x = features[rows].double()
        rounding = 1e-12 * x.square().sum(1).max()  # the first of equals
        wanted, taken = torch.zeros_like(x[0]), torch.zeros(len(rows), dtype=torch.float64)
        for place in range(len(rows)):
            wanted = wanted + x.mean(0)  # what brings the sum of those taken to the mean
            cost = (x - wanted).square().sum(1) + taken
            i = int((cost <= cost.min() + rounding).nonzero()[0])
            taken[i] = torch.inf
            wanted = wanted - x[i]
            scores[rows[i]] = -place / len(rows)
    return scores


def _by_class(labels: Tensor) -> list[Tensor]:
    return [(labels == c).nonzero()[:, 0] for c in labels.unique()]


def kept(scores: Tensor, fraction: float, labels: Tensor | None = None) -> Tensor:
    """The round(fraction · examples) examples of highest score, of equals those of lower index; indices in order.

    Smaller fractions keep subsets of what larger ones keep.

    Args:
        scores: `[examples]`. labels: `[examples]`, to keep of every class its best examples in proportion to its size, one at
            least; without, classes may lose all.

    Raises:
        InputError: a fraction outside (0, 1], a score that is nan, nothing to keep, or fewer kept than there are classes.
    """
    total, number = len(scores), round(fraction * len(scores)) if 0 < fraction <= 1 else 0
    if not 0 < fraction <= 1:
        raise InputError(f"The fraction of examples to keep is {fraction} and must be above 0 and at most 1.")
    if bool(scores.isnan().any()):
        raise InputError(
            f"The score of example {int(scores.isnan().nonzero()[0, 0])} is nan: examples cannot be ordered."
        )
    if number < 1:
        raise InputError(f"A fraction of {fraction} of {total} examples keeps none: keep more.")
    order = scores.sort(descending=True, stable=True).indices
    if labels is not None:
        classes = labels.unique()
        if number < len(classes):
            raise InputError(f"{number} kept examples cannot cover {len(classes)} classes: keep more of them.")
        share = torch.empty(total, dtype=torch.float64)
        for c in classes:
            own = order[labels[order] == c]
            share[own] = torch.arange(len(own), dtype=torch.float64) / len(own)
        order = share.sort(stable=True).indices
    return order[:number].sort().values


def kd_weight(fraction: float) -> float:
    """α(f) = clip(1.1 − 0.6 f, 0.5, 1): the fewer examples are kept, the more the teacher weighs.

    Source: Ben-Baruch et al. 2024, which gives the direction; the numbers are reconstructed.
    """
    return min(1.0, max(0.5, 1.1 - 0.6 * fraction))
