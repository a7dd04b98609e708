"""The head of a classifier: finding it, replacing it, and a head that sums over subclasses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from understudy.losses.two_heads import cosine_logits, mixed_log_probabilities


class SubclassHead(nn.Linear):
    """A linear layer with `subclasses` outputs per class; the logit of a class is their log-sum-exp.

    Output `c · subclasses + s` is subclass s of class c. `forward` returns `[..., classes]` like any head; its softmax
    is exactly the summed probability of the subclasses.
    """

    def __init__(self, inputs: int, classes: int, subclasses: int, bias: bool = True) -> None:
        super().__init__(inputs, classes * subclasses, bias)
        self.classes, self.subclasses = classes, subclasses

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).unflatten(-1, (self.classes, self.subclasses)).logsumexp(-1)


class TwoHeads(nn.Linear):
    """A linear layer of two heads, the first outputs one's and the last the other's: `[..., 2 · classes]`.

    Args:
        scale: the second head reads features of this length (`cosine_logits`); as they are if `None`.
    """

    def __init__(self, inputs: int, classes: int, bias: bool = True, scale: float | None = None) -> None:
        super().__init__(inputs, 2 * classes, bias)
        self.scale = scale

    def both(self, features: Tensor) -> Tensor:
        """The logits of both heads."""
        if self.scale is None:
            return super().forward(features)
        first, second = self.weight.chunk(2)
        own, other = self.bias.chunk(2) if self.bias is not None else (None, None)
        return torch.cat([F.linear(features, first, own), cosine_logits(features, second, other, scale=self.scale)], -1)

    def forward(self, features: Tensor) -> Tensor:
        return self.both(features)


class MixtureHead(TwoHeads):
    """Two heads that are called as their mixture.

    It gives log(α softmax(first) + (1 − α) softmax(second / β)), `[..., classes]`, like any head.
    """

    def __init__(
        self, inputs: int, classes: int, alpha: float, beta: float, bias: bool = True, scale: float | None = None
    ) -> None:
        super().__init__(inputs, classes, bias, scale)
        self.classes, self.alpha, self.beta = classes, alpha, beta

    def forward(self, features: Tensor) -> Tensor:
        first, second = self.both(features).chunk(2, -1)
        return mixed_log_probabilities(first, second, alpha=self.alpha, beta=self.beta)


def head_name(model: nn.Module, classes: int) -> str | None:
    """The name of a classifier's head: its last linear layer with `classes` outputs, or with outputs for their
    subclasses.

    With two classes a single output (the logit of the second class) is accepted too.
    """
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    outputs = [
        (name, m.classes if isinstance(m, (SubclassHead, MixtureHead)) else m.out_features) for name, m in linear
    ]
    found = [name for name, number in outputs if number == classes]
    if not found and classes == 2:
        found = [name for name, number in outputs if number == 1]
    return found[-1] if found else None


def put_head(model: nn.Module, name: str, head: nn.Module) -> None:
    """Replace the layer `name` by `head`, on its device, in its dtype and mode."""
    old = model.get_submodule(name)
    weight = next(old.parameters())
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, head.to(weight.device, weight.dtype).train(old.training))
