"""The classifier's head: where it is, how to exchange it, and one that sums over subclasses."""

from __future__ import annotations

from torch import Tensor, nn


class SubclassHead(nn.Linear):
    """A linear layer with `subclasses` outputs a class; a class's logit is their log-sum-exp.

    Output `c · subclasses + s` is subclass s of class c. Called, it gives `[..., classes]` like any head, and the
    softmax of that is exactly the summed probability of the subclasses.
    """

    def __init__(self, inputs: int, classes: int, subclasses: int, bias: bool = True) -> None:
        super().__init__(inputs, classes * subclasses, bias)
        self.classes, self.subclasses = classes, subclasses

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).unflatten(-1, (self.classes, self.subclasses)).logsumexp(-1)


def head_name(model: nn.Module, classes: int) -> str | None:
    """The name of a classifier's head: its last linear layer of `classes` outputs, or of subclasses of them.

    For two classes a single output (a logit of the second class) will also do.
    """
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    outputs = [(name, m.classes if isinstance(m, SubclassHead) else m.out_features) for name, m in linear]
    found = [name for name, number in outputs if number == classes]
    if not found and classes == 2:
        found = [name for name, number in outputs if number == 1]
    return found[-1] if found else None


def put_head(model: nn.Module, name: str, head: nn.Module) -> None:
    """Put `head` where the layer called `name` is, on its device, in its dtype and mode."""
    old = model.get_submodule(name)
    weight = next(old.parameters())
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, head.to(weight.device, weight.dtype).train(old.training))
