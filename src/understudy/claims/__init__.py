"""Claims: one file a paper, its main claim as an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from understudy.claims import dhkd, pld, taid, trg
from understudy.claims.experiment import Claim, result_table
from understudy.claims.experiment import reproduce as _reproduce
from understudy.errors import InputError, nearest

CLAIMS: dict[str, Claim] = {"pld": pld.CLAIM, "taid": taid.CLAIM, "dhkd": dhkd.CLAIM, "trg": trg.CLAIM}


def reproduce(name: str, seeds: int, output: Path, *, progress: bool = False) -> dict[str, Any]:
    """Try the claim of `name`; see `understudy.claims.experiment.reproduce`."""
    if name not in CLAIMS:
        raise InputError(f"No claim for {name!r}.{nearest(name, CLAIMS)} Known: {', '.join(CLAIMS)}.")
    return _reproduce(CLAIMS[name], seeds, output, progress=progress)


__all__ = ["CLAIMS", "Claim", "reproduce", "result_table"]
