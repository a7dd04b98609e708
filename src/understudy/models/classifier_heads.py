"""Replacing the head of a classifier: with other classes, with summed subclasses, or fitted to given probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models.adapters import ClassifierAdapter
from understudy.models.heads import MixtureHead, SubclassHead, TwoHeads, head_name, put_head
from understudy.models.modes import evaluating


def replace_head(rows: ClassifierAdapter, outputs: int, *, seed: int = 0) -> nn.Linear:
    """Give an image classifier a new linear head with `outputs` classes, in place, and return it.

    The new weights depend on `seed` alone. The model's own number of classes is updated (`rows.classes`, a small
    network's facts, `config.num_labels`); names of classes are restored when their number is.

    Raises:
        InputError: no linear head is found, or it has adapters, which could not be saved with another head.
    """
    name = head_name(rows.model, rows.classes)
    kind = type(rows.model).__name__
    if name is None or not name:
        raise InputError(f"{kind} has no linear head of {rows.classes} classes that could be replaced.")
    if hasattr(rows.model, "peft_config"):
        raise InputError("A student with adapters cannot get another head, for adapters would not save it: drop peft.")
    old = rows.model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed + 1) * 1_000_003)  # another stream than that of the body
        head = nn.Linear(old.in_features, outputs, old.bias is not None)
    put_head(rows.model, name, head)
    set_classes(rows, outputs)
    return head


@torch.no_grad()
def reorder_classes(rows: ClassifierAdapter, order: Sequence[int], batch: Batch) -> bool:
    """Number the classes of a classifier anew, in place: its output i is what output `order[i]` was.

    The rows of its last linear layer are permuted, or those of all that read as much (a model of two heads): whichever
    makes the logits of `batch` the permuted ones.

    Returns:
        False, with nothing changed, if neither does: the classifier has no plain linear head.
    """
    heads = [m for m in rows.model.modules() if type(m) is nn.Linear and m.out_features == len(order)]
    if not heads:
        return False
    if heads[-1].weight.is_meta:  # a plan, which has no values
        return True
    place, inputs = torch.tensor(order, device=heads[-1].weight.device), batch.to(heads[-1].weight.device)
    alike = [head for head in heads if head.in_features == heads[-1].in_features]
    with evaluating(rows.model):
        wanted = rows.logits(inputs)[:, place]
        for chosen in (heads[-1:], alike):
            _permute(chosen, place)
            if torch.allclose(rows.logits(inputs), wanted, rtol=1e-3, atol=1e-4):
                return True
            _permute(chosen, place.argsort())
    return False


def _permute(layers: Sequence[nn.Linear], place: Tensor) -> None:
    for parameter in (p for layer in layers for p in (layer.weight, layer.bias) if p is not None):
        parameter.copy_(parameter[place])


def set_classes(rows: ClassifierAdapter, classes: int) -> None:
    """Update a classifier's record of its number of classes."""
    rows.classes = classes
    facts: dict[str, Any] | None = getattr(rows.model, "understudy", None)
    if facts is not None:
        facts.pop("subclasses", None)
        facts.pop("mixture", None)
        facts["classes"] = classes
    config = getattr(rows.model, "config", None)
    if config is None or getattr(config, "num_labels", classes) == classes:
        return
    if rows.class_names is None:
        rows.class_names = dict(config.id2label), dict(config.label2id)
    config.num_labels = classes
    names, numbers = rows.class_names
    if len(names) == classes:
        config.id2label, config.label2id = names, numbers
    if hasattr(rows.model, "num_labels"):
        rows.model.num_labels = classes


def sum_subclasses(rows: ClassifierAdapter, classes: int) -> None:
    """Turn a small network's wide head into one with `classes` outputs that sums over subclasses: exactly the same
    function."""
    name = head_name(rows.model, rows.classes)
    facts: dict[str, Any] | None = getattr(rows.model, "understudy", None)
    if name is None or facts is None:
        raise InputError(
            f"Only the small networks can keep a head that sums over subclasses, and this is a {type(rows.model).__name__}: "
            "give it a linear one."
        )
    wide = rows.model.get_submodule(name)
    assert isinstance(wide, nn.Linear)
    subclasses = wide.out_features // classes
    head = SubclassHead(wide.in_features, classes, subclasses, wide.bias is not None)
    put_head(rows.model, name, head)
    head.load_state_dict(wide.state_dict())
    set_classes(rows, classes)
    facts["subclasses"] = subclasses


def read_as_cosines(rows: ClassifierAdapter, scale: float = 100.0) -> TwoHeads:
    """Turn a head of two classifiers side by side into one whose second half reads features of length `scale`."""
    name = head_name(rows.model, rows.classes)
    assert name is not None
    wide = rows.model.get_submodule(name)
    assert isinstance(wide, nn.Linear)
    head = TwoHeads(wide.in_features, wide.out_features // 2, wide.bias is not None, scale)
    put_head(rows.model, name, head)
    head.load_state_dict(wide.state_dict())
    return head


def mix_heads(rows: ClassifierAdapter, classes: int, alpha: float, beta: float) -> bool:
    """Turn a head of 2 · `classes` outputs into one that mixes its halves as `MixtureHead`: the same function, exactly.

    Returns:
        Whether that was possible: for the small networks always, for others where α is 0 or 1 and the half that is left over
        is linear.
    """
    name = head_name(rows.model, rows.classes)
    facts: dict[str, Any] | None = getattr(rows.model, "understudy", None)
    if name is None:
        return False
    wide = rows.model.get_submodule(name)
    assert isinstance(wide, nn.Linear)
    bias, scale = wide.bias is not None, wide.scale if isinstance(wide, TwoHeads) else None
    linear = alpha == 1 or (alpha == 0 and scale is None)
    if facts is None and not linear:
        return False
    if not linear:
        head: nn.Linear = MixtureHead(wide.in_features, classes, alpha, beta, bias, scale)
        state = wide.state_dict()
    else:
        head = nn.Linear(wide.in_features, classes, bias)
        half, scale = (slice(0, classes), 1.0) if alpha == 1 else (slice(classes, 2 * classes), 1 / beta)
        state = {k: scale * v[half] for k, v in wide.state_dict().items()}
    put_head(rows.model, name, head)
    head.load_state_dict(state)
    set_classes(rows, classes)
    if facts is not None and isinstance(head, MixtureHead):
        facts["mixture"] = [alpha, beta, *([] if scale is None else [scale])]
    return True


def linear_readout(
    features: Tensor, probabilities: Tensor, *, bias: bool = True, ridge: float = 1e-6, steps: int = 500
) -> nn.Linear:
    """The linear head whose softmax has the smallest KL(given ‖ head) to given probabilities, mean over rows.

    Convex and deterministic: L-BFGS from zero in float64 on standardised features.

    Args:
        features: `[rows, width]`.
        probabilities: `[rows, classes]`.
        ridge: weight of half the squared weights, which bounds them if the rows can be fitted exactly.
    """
    x, p = features.detach().double(), probabilities.detach().double()
    mean = x.mean(0) if bias else x.new_zeros(x.shape[1])  # without a bias the shift could not be undone
    deviation = (x - mean).square().mean(0).sqrt()
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    standard = (x - mean) / deviation
    weight = x.new_zeros(p.shape[1], x.shape[1]).requires_grad_()
    shift = x.new_zeros(p.shape[1]).requires_grad_(bias)
    solver = torch.optim.LBFGS(
        [weight, shift] if bias else [weight],
        max_iter=steps,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        log_q = torch.log_softmax(standard @ weight.T + shift, -1)
        loss = -(p * log_q).sum(-1).mean() + ridge / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[no-untyped-call]
    head = nn.Linear(x.shape[1], p.shape[1], bias, dtype=torch.float64, device=x.device)
    with torch.no_grad():
        head.weight.copy_(weight / deviation)
        if bias:
            head.bias.copy_(shift - (weight / deviation) @ mean)
    return head.requires_grad_(False)
