"""The head of a classifier: finding it, replacing it, and a head that sums over subclasses."""

from __future__ import annotations

from torch import Tensor, nn

from understudy.losses.two_heads import mixed_log_probabilities


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


class MixtureHead(nn.Linear):
    """A linear layer of two heads, the first outputs one's and the last the other's, called as their mixture.

    It gives log(α softmax(first) + (1 − α) softmax(second / β)), `[..., classes]`, like any head.
    """

    def __init__(self, inputs: int, classes: int, alpha: float, beta: float, bias: bool = True) -> None:
        super().__init__(inputs, 2 * classes, bias)
        self.classes, self.alpha, self.beta = classes, alpha, beta

    def forward(self, features: Tensor) -> Tensor:
        first, second = super().forward(features).chunk(2, -1)
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
