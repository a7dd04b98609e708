"""What the policies of the preference worlds share: a name, a folder format, and loading."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, TypeVar

from torch import nn

from understudy.errors import InputError
from understudy.models.small import load_weights
from understudy.models.weights import read_object, reason, write_model


class Policy(nn.Module):
    """A small policy that is built from its name, such as `example`."""

    example: ClassVar[str]

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        self.name = name

    def save_pretrained(self, folder: str) -> None:
        """Write `config.json` and `model.safetensors`."""
        write_model(self, Path(folder), {"policy": self.name})


P = TypeVar("P", bound=Policy)


def load_policy(kind: type[P], name: str, source: Path | nn.Module | None, size: int) -> P:
    """A policy of a world: new by its name, from a folder, or as it was handed over.

    Args:
        kind: the world's policies. source: folder or module; `None` for a new one. size: feature width or token count.

    Raises:
        InputError: no policy of this kind.
    """
    if isinstance(source, nn.Module):
        if not isinstance(source, kind):
            raise InputError(f"{type(source).__name__} is no policy of this world: give a {kind.__name__}.")
        return source
    if source is not None:
        name = str(read_object(source / "config.json").get("policy"))
    if name.partition(":")[0] != kind.example.partition(":")[0]:
        raise InputError(f"Model {name!r} is no policy of this world: give one like {kind.example}.")
    try:
        model = kind(name, size)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise InputError(f"Model {name!r} cannot be made: {reason(error)}") from None
    if source is not None:
        load_weights(model, source / "model.safetensors")
    return model
