"""The methods: one file a paper. This list and the entry points `understudy.methods` are the whole registry."""

from __future__ import annotations

from importlib.metadata import entry_points

from understudy.errors import InputError, nearest
from understudy.methods.dhkd import DHKD
from understudy.methods.kd import KD
from understudy.methods.pld import PLD
from understudy.methods.sft import SFT
from understudy.methods.taid import TAID
from understudy.methods.trg import TRG
from understudy.training import Method

BUILT_IN: tuple[type[Method], ...] = (SFT, KD, PLD, TAID, DHKD, TRG)


def all_methods() -> dict[str, type[Method]]:
    """Every method by name: the built-in ones, then those of installed plug-ins."""
    found = {method.name: method for method in BUILT_IN}
    for point in entry_points(group="understudy.methods"):
        loaded = point.load()
        if not (isinstance(loaded, type) and issubclass(loaded, Method)):
            raise InputError(f"Entry point {point.name!r} ({point.value}) is not a subclass of understudy.Method.")
        if loaded.name in found:
            raise InputError(f"Two methods are named {loaded.name!r}: the plug-in {point.value} must choose another.")
        found[loaded.name] = loaded
    return found


def get(name: str) -> type[Method]:
    """The method called `name`; an unknown name is an `InputError` with the nearest known one."""
    known = all_methods()
    if name not in known:
        raise InputError(f"Unknown method {name!r}.{nearest(name, known)} Known: {', '.join(sorted(known))}.")
    return known[name]


__all__ = ["BUILT_IN", "DHKD", "KD", "PLD", "SFT", "TAID", "TRG", "all_methods", "get"]
