"""The result of a claim: its checks, its arms, what it cost and where it ran."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from understudy.claims.claim import Check, Claim
from understudy.reporting import interval, paired, paired_sequence, verdict
from understudy.reporting.sequential import required_size

Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""The results of each arm, seed by seed."""


def checked(check: Check, found: Found, sequential: bool) -> dict[str, Any]:
    """What was found of a check: the paired difference, its interval and the verdict.

    Args:
        sequential: the interval holds at every look; otherwise it is of the one number of seeds that was asked for.
    """
    seeds = min(len(found[check.arm]), len(found[check.other]))  # arms of side checks may have fewer
    a = [r["metrics"][check.metric] for r in found[check.arm][:seeds]]
    b = [check.factor * r["metrics"][check.other_metric or check.metric] for r in found[check.other][:seeds]]
    difference = paired_sequence(a, b) if sequential else paired(a, b)
    return {
        "says": check.says,
        "arm": check.arm,
        "other": check.other,
        "metric": check.metric,
        **({"other_metric": check.other_metric} if check.other_metric else {}),
        **({"factor": check.factor} if check.factor != 1 else {}),
        "threshold": check.threshold,
        "seeds": seeds,
        "difference": difference.mean,
        "interval": [difference.low, difference.high],
        "verdict": verdict(difference, check.threshold, check.higher_is_better),
    }


def difference_told(check: Mapping[str, Any]) -> str:
    """The difference with its interval and metric: `+0.041 [+0.038, +0.044] accuracy`."""
    given = (check["difference"], *(v for v in check["interval"] if v is not None))
    found, *ends = (f"{round(v, 12) + 0.0:+.3g}" for v in given)  # what rounding leaves of no difference is 0
    return " ".join([found, *([f"[{', '.join(ends)}]"] if ends else []), str(check["metric"])])


def verdict_told(result: Mapping[str, Any], check: Mapping[str, Any]) -> str:
    """The verdict of a check, and of one that is open, how many seeds would decide it if mean and deviation stay."""
    found = str(check["verdict"])
    if found != "inconclusive":
        return found
    a = result["arms"][check["arm"]]["values"].get(check["metric"], [])
    b = result["arms"][check["other"]]["values"].get(check.get("other_metric", check["metric"]), [])
    if min(len(a), len(b)) < 2:
        return found
    number = required_size([x - check.get("factor", 1) * y for x, y in zip(a, b, strict=False)], check["threshold"])
    about = f"about {float(f'{number:.2g}'):,.0f}" if number else "more than 10,000"
    return f"{found}; {about} seeds would decide"


def assemble(
    claim: Claim, chosen: Mapping[str, int], found: Found, checks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The result of a claim but for how it was asked for."""
    return {
        "claim": claim.statement,
        "caveat": claim.caveat,
        "arms": {label: _arm(claim, label, chosen[label], found[label], checks) for label in claim.arms},
        **{k: checks[0][k] for k in ("metric", "difference", "interval", "verdict")},
        "checks": list(checks),
        "budget": _budget(claim, found),
        "commit": _commit(),
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
    }


def _arm(
    claim: Claim, label: str, chosen: int, results: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    asked = dict.fromkeys(m for c in checks for m in (c["metric"], c.get("other_metric")) if m is not None)
    metrics = [m for m in asked if all(m in r["metrics"] for r in results)]  # some are of a method's own
    own = {m: interval([r["metrics"][m] for r in results]) for m in metrics}
    arm = claim.arms[label]
    return {
        "method": arm.method,
        "options": dict(arm.options),
        "chosen": dict(arm.candidates[chosen]),
        "metrics": {m: {"mean": i.mean, "interval": [i.low, i.high]} for m, i in own.items()},
        "values": {m: [r["metrics"][m] for r in results] for m in metrics},
    }


def _budget(claim: Claim, found: Found) -> dict[str, Any]:
    return {
        "seeds": max(map(len, found.values())),
        "first_seed": claim.first_seed,
        "tuning_trials_per_arm": claim.candidates,
        "micro_batches": {label: rs[0]["cost"]["steps"] for label, rs in found.items()},
        "forwards": {label: rs[0]["cost"]["forwards"] for label, rs in found.items()},
        "seconds": {label: round(sum(r["cost"]["seconds"] for r in rs), 1) for label, rs in found.items()},
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def result_table(result: Mapping[str, Any]) -> Table:
    """The checks of a claim for a terminal."""
    table = Table("what is claimed", "metric", "difference [95 %]", "threshold", "verdict", title=str(result["claim"]))
    for check in result["checks"]:
        low, high = check["interval"]
        span = f"{check['difference']:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if low is not None else "")
        fewer = f" ({check['seeds']} seeds)" if check["seeds"] < result["budget"]["seeds"] else ""
        told = verdict_told(result, check)
        table.add_row(check["says"] + fewer, check["metric"], span, f"{check['threshold']:+g}", told)
    if "stopped" in result:
        table.caption = f"{result['budget']['seeds']} seeds, {result['setting']}: {result['stopped']}"
    return table
