"""Contrast of an example's own vector with those of others: one value an example, unreduced.

`nt_xent` takes the others from a group `[images, width]`, whose images are coupled, so a batch may be cut between groups and
not inside one. `noise_contrastive` takes them from a memory, so rows are independent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import check_temperature, full, softplus, unit


def nt_xent(first: Tensor, second: Tensor, *, temperature: float = 0.3) -> Tensor:
    """Cross-entropy of finding an image's other view among all other vectors of both views, by cosine similarity.

    Args:
        first, second: the two views `[images, width]`; row i of both is the same image. Both get gradient. Scales do not
            matter.
        temperature: divides the similarities.

    Returns:
        `[images]`, the mean over both views of −log softmax over the other 2 · images − 1 vectors. At least 0, and 0 for
        a single image; log(2 · images − 1) where all vectors are equal.

    Raises:
        InputError: the shapes differ, or a temperature that is not above 0.

    Source: Chen et al. 2020 (SimCLR), Eq. 1; Tang et al. 2023 (KD³), as released.
    """
    check_temperature("nt_xent", temperature)
    if first.shape != second.shape:
        raise InputError(
            f"nt_xent: the first view is {tuple(first.shape)} and the second {tuple(second.shape)}: give two of one shape."
        )
    number = len(first)
    x = unit(torch.cat([first, second]))
    own = torch.eye(2 * number, dtype=torch.bool, device=x.device)
    log_p = (x @ x.T / temperature).masked_fill(own, -torch.inf).log_softmax(1)
    return -(log_p.diagonal(number) + log_p.diagonal(-number)) / 2


def memory_scores(vectors: Tensor, memory: Tensor, index: Tensor) -> Tensor:
    """Inner products of each row's vector with chosen entries of a memory, `[rows, chosen]`.

    Args:
        vectors: `[rows, width]`. memory: `[examples, width]`, no gradient. index: `[rows, chosen]`, entries of the memory.
    """
    return (full(vectors) @ memory.detach().to(full(vectors).dtype).T).gather(1, index)


def log_partition(scores: Tensor, examples: int, *, temperature: float = 0.07) -> Tensor:
    """log of Z = examples · mean exp(score / temperature), the estimate from each row's own scores: `[rows]`, detached.

    Args:
        scores: `[rows, chosen]`. examples: entries of the memory.
    """
    held = full(scores.detach()) / temperature
    return held.logsumexp(1) - math.log(held.shape[1]) + math.log(examples)


def noise_contrastive(scores: Tensor, log_z: Tensor, examples: int, *, temperature: float = 0.07) -> Tensor:
    """−log h(positive) − Σ over negatives of log(1 − h), with h = p / (p + K / N) and p = exp(score / temperature) / Z.

    h is the probability that an entry is the example's own, where K of N entries are drawn as noise.

    Args:
        scores: `[rows, 1 + K]`, the positive first.
        log_z: log Z, `[]` or `[rows]`; a constant. examples: N, entries of the memory. temperature: divides the scores.

    Returns:
        `[rows]`, above 0; (1 + K) log 2 where every p is K / N.

    Raises:
        InputError: there is no negative, or a temperature that is not above 0.

    Source: Tian et al. 2020 (CRD), Eqs. 9, 10 and 17 to 19, as released without its 1e−7 in the denominator.
    """
    check_temperature("noise_contrastive", temperature)
    negatives = scores.shape[1] - 1
    if negatives < 1:
        raise InputError("noise_contrastive: there is no negative: give each row a positive and one or more others.")
    odds = full(scores) / temperature - log_z.detach().reshape(-1, 1) - math.log(negatives / examples)
    return softplus(-odds[:, 0]) + softplus(odds[:, 1:]).sum(1)
