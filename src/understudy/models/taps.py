"""Taps: what inner layers say during one forward pass. Every hook is gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from understudy.errors import InputError, nearest


@contextmanager
def tapped(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the output of each module during the block; the last call counts.

    Raises:
        InputError: a module was not called. A tap that never fires would train nothing, silently.
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
            raise InputError(
                f"Tap {name!r} sits on a {type(module).__name__} that this forward pass never called. Choose a layer "
                "that the model runs."
            )


def _keep(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    first = output if isinstance(output, Tensor) else output[0]
    seen[name] = first


def layer(model: nn.Module, name: str) -> nn.Module:
    """The layer called `name` (as in `named_modules`); an unknown one is an `InputError` with the nearest."""
    known = dict(model.named_modules())
    if name not in known:
        raise InputError(f"{type(model).__name__} has no layer {name!r}.{nearest(name, list(known))}")
    return known[name]


def called_layers(model: nn.Module, run: Any) -> list[tuple[nn.Module, Tensor]]:
    """The layers that `run()` calls and their outputs, in the order in which they end."""
    calls: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            calls.append((module, first))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls
