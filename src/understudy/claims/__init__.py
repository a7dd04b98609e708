"""Claims: one file a paper, its main claim as an experiment in `CLAIM`. The files of this folder are the list."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from understudy.claims.claim import EMBEDDED
from understudy.claims.experiment import Claim, result_table
from understudy.claims.experiment import reproduce as _reproduce
from understudy.errors import InputError, nearest
from understudy.runs.executors import PROCESSES
from understudy.runs.folder import held


@cache
def claims() -> dict[str, Claim]:
    """Every claim by the name of its method."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    return {m.CLAIM.name: m.CLAIM for m in modules if hasattr(m, "CLAIM")}


def get(name: str) -> Claim:
    """The claim of the method `name`."""
    known = claims()
    if name not in known:
        raise InputError(f"No claim for {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
    return known[name]


def reproduce(
    name: str,
    seeds: int | None,
    output: Path,
    *,
    max_seeds: int | None = None,
    hours: float | None = None,
    side_seeds: int | None = None,
    setting: str = EMBEDDED,
    data: str | None = None,
    executor: str = PROCESSES,
    progress: bool = False,
) -> dict[str, Any]:
    """Try the claim of `name`; see `understudy.claims.experiment.reproduce`."""
    budget: dict[str, Any] = {"max_seeds": max_seeds, "hours": hours, "side_seeds": side_seeds}
    claim = get(name)
    with held(output, several=True):
        return _reproduce(
            claim, seeds, output, **budget, setting=setting, data=data, executor=executor, progress=progress
        )


__all__ = ["EMBEDDED", "Claim", "claims", "get", "reproduce", "result_table"]
