"""Inner layers of a model during a forward pass: read their outputs (`tapped`), change them (`edited`), or run the
model from one layer on (`entered`). Every hook is removed afterwards, also after an exception."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import InputError, nearest
from understudy.models.modes import evaluating


@contextmanager
def tapped(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the output of each module during the block; the last call counts.

    Raises:
        InputError: a module was not called, so that its loss would silently train nothing.
    """
    seen: dict[str, Tensor] = {}
    hooks = [module.register_forward_hook(partial(_keep, seen, name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
    for name, module in modules.items():
        if name not in seen:
            raise _never_called(name, module)


def _never_called(name: str, module: nn.Module) -> InputError:
    return InputError(
        f"Tap {name!r} sits on a {type(module).__name__} that this forward pass never called. Choose a layer that the model "
        "runs."
    )


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _keep(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    seen[name] = _first(output)


def _replaced(output: Any, value: Tensor) -> Any:
    """The output of a layer with its tensor (the first, of a tuple) replaced."""
    if not isinstance(output, tuple):
        return value
    rest = output[1:]
    return type(output)(value, *rest) if hasattr(output, "_fields") else (value, *rest)


@contextmanager
def edited(edits: Mapping[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Change the outputs of inner layers during the block.

    Args:
        edits: by name, a module and a function from its output to a tensor of the same shape (the first of several
            outputs). Gradients flow through it.

    Raises:
        InputError: a module was not called, or an edit changes the shape.
    """
    called: set[str] = set()

    def edit(name: str, change: Callable[[Tensor], Tensor], module: nn.Module, inputs: Any, output: Any) -> Any:
        before = _first(output)
        after = change(before)
        if after.shape != before.shape:
            raise InputError(
                f"Edit {name!r} turns the output {tuple(before.shape)} of a {type(module).__name__} into "
                f"{tuple(after.shape)}: the layers after it expect the same shape."
            )
        called.add(name)
        return _replaced(output, after)

    hooks = [module.register_forward_hook(partial(edit, name, change)) for name, (module, change) in edits.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for name, (module, _) in edits.items():
        if name not in called:
            raise _never_called(name, module)


@contextmanager
def entered(module: nn.Module, value: Tensor, model: nn.Module | None = None) -> Iterator[None]:
    """Run a model from an inner layer on: during the block the output of `module` is `value`, with gradient to it.

    The layers before `module` run without gradient and their result is discarded, so the caller's forward pass takes
    its ordinary inputs. Freeze the parameters after `module` if only `value` is to get a gradient.

    Args:
        module: the layer whose output is replaced.
        value: of the shape of its output.
        model: the whole model, if it is being trained: its layers before `module` then run in evaluation mode, so that
            they neither draw dropout nor count the batch in their statistics.

    Raises:
        InputError: the module was not called, or `value` has another shape than its output.
    """
    called = False
    before = ExitStack()

    def enter(module: nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal called
        called = True
        if _first(output).shape != value.shape:
            raise InputError(
                f"A {type(module).__name__} gives {tuple(_first(output).shape)} here and {tuple(value.shape)} is to take its "
                "place: give a value of that shape."
            )
        before.close()
        return _replaced(output, value)

    hook = module.register_forward_hook(enter)
    try:
        with before:
            before.enter_context(torch.no_grad())
            if model is not None:
                before.enter_context(evaluating(model))
            yield
    finally:
        hook.remove()
    if not called:
        raise _never_called("entered", module)


def layer(model: nn.Module, name: str) -> nn.Module:
    """The layer called `name` (as in `named_modules`).

    Raises:
        InputError: an unknown name; the message names the nearest.
    """
    known = dict(model.named_modules())
    if name not in known:
        raise InputError(f"{type(model).__name__} has no layer {name!r}.{nearest(name, list(known))}")
    return known[name]


def called_layers(model: nn.Module, run: Any) -> list[tuple[nn.Module, Tensor]]:
    """The layers that `run()` calls and their outputs, in the order in which they end."""
    calls: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(_first(output), Tensor):
            calls.append((module, _first(output)))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def inner(calls: list[tuple[nn.Module, Tensor]], head: nn.Module, examples: int) -> list[tuple[nn.Module, Tensor]]:
    """The layers before the head whose output is a vector, tokens or a map of each example.

    Args:
        calls: as `called_layers` gives them. head: of the model. examples: in the batch.
    """
    at = [module is head for module, _ in calls]
    first = at.index(True) if True in at else len(calls) - 1
    return [
        (module, y) for module, y in calls[:first] if 2 <= y.dim() <= 4 and len(y) == examples and y.is_floating_point()
    ]


def first_block(model: nn.Module, calls: list[tuple[nn.Module, Tensor]]) -> nn.Module | None:
    """The first block of a network: the first member of a list of layers; else the first composite layer with weights, or
    the first activation behind a layer with weights; else the first layer with weights.

    Args:
        calls: of the layers to choose from.
    """
    lists = {id(m) for part in model.modules() if isinstance(part, nn.ModuleList) for m in part}
    weighted = [any(True for _ in module.parameters()) for module, _ in calls]
    own = [m for m, _ in calls[weighted.index(True) :]] if True in weighted else []
    listed = (m for m in own if id(m) in lists)
    blocks = (m for m in own if any(True for _ in m.children()) or not any(True for _ in m.parameters()))
    return next(listed, next(blocks, own[0] if own else None))


def stages(calls: list[tuple[nn.Module, Tensor]]) -> list[nn.Module]:
    """The last layer of each resolution, in order: where features of an image classifier are usually compared.

    Resolutions are those of maps `[images, channels, height, width]`, or of tokens `[images, tokens, width]` where the
    network ends in tokens. A network with neither has those of its vectors `[images, width]` before the logits.

    Args:
        calls: as `called_layers` gives them.
    """
    learned = [any(True for _ in module.parameters(recurse=False)) for module, _ in calls]
    own = calls[learned.index(True) if True in learned else 0 :]  # what is flattened or scaled before is the input
    seen = [(y.dim(), _place(y.shape), m) for m, y in own]
    last = next((axes for axes, place, _ in reversed(seen) if place is not None), None)
    found = [(place, m) for axes, place, m in seen if axes == last and place is not None]
    if last is None:
        found = [(tuple(y.shape[1:]), m) for m, y in own if y.dim() == 2 and y is not own[-1][1]]
    last_of: dict[Any, nn.Module] = {}
    for place, module in found:
        last_of.pop(place, None)  # a resolution that comes back takes its place behind those before
        last_of[place] = module
    return list(last_of.values())


def _place(shape: torch.Size) -> tuple[int, ...] | None:
    """The resolution of a layer's output; `None` of one that has a single position."""
    if len(shape) == 3 and shape[1] > 1 and shape[2] > 1:  # a pooled map [images, width, 1] has no tokens
        return (math.isqrt(shape[1]),)  # a class token more is the same grid
    return tuple(shape[2:]) if len(shape) == 4 and math.prod(shape[2:]) > 1 else None
