"""A claim as an experiment: arms of equal budget and equal tuning, tuned on validation, judged on test."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from understudy.errors import InputError
from understudy.reporting import interval, paired, verdict
from understudy.runs.comparison import run_all
from understudy.runs.recipe import Recipe, make

Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One side of an experiment: a method with fixed options, the candidates to tune over, and own recipe keys, if any."""

    method: str
    options: Overrides
    candidates: Sequence[Overrides]
    recipe: Overrides = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """`arm` is better than `other` by more than `threshold` (negative: worse by less than that).

    With `other_metric` and `factor` it is compared with `factor · other_metric` of `other`, which may be itself: with
    what its teacher reaches, or with 0 by a factor of 0.
    """

    arm: str
    other: str
    threshold: float
    metric: str
    higher_is_better: bool
    says: str
    other_metric: str | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Claim:
    """A paper's main claim (`checks[0]`) with its side claims.

    Args:
        statement: one sentence. recipe: what all arms share. arms: by label; each has as many candidates.
        tuned_on: the validation metric candidates are chosen by, and whether higher is better.
        caveat: what a reader of its result must know, such as settings that were chosen after a look at test figures.
        first_seed: of those it is judged on; above 0 where a setting was chosen after a look at the test figures of the ones before.
        new_data: each seed draws data of its own (for built-in sets that take `data.seed`), and trains a teacher on it.
    """

    name: str
    statement: str
    recipe: Overrides
    arms: Mapping[str, Arm]
    checks: Sequence[Check]
    tuned_on: tuple[str, bool]
    new_data: bool = False
    first_seed: int = 0
    caveat: str = ""


def reproduce(claim: Claim, seeds: int, output: Path, *, progress: bool = False) -> dict[str, Any]:
    """Tune every arm over its candidates on one seed apart, then judge the chosen ones over `seeds` seeds.

    Returns:
        `{claim, arms, metric, difference, interval, verdict, budget, checks, …}`; also written to `claim.json`.
    """
    started = time.time()
    trials = {len(arm.candidates) for arm in claim.arms.values()}
    if len(trials) != 1:
        raise InputError(f"Claim {claim.name}: arms must have equally many candidates, found {sorted(trials)}.")
    teacher = output / "teacher"
    tuned = trials != {1}  # one candidate leaves nothing to choose
    labels = [(label, i) for label, arm in claim.arms.items() for i in range(len(arm.candidates)) if tuned]
    tuning = [
        _plan(claim, label, i, 1000, output / "tuning" / f"{_file(label)}-{i}", "validation") for label, i in labels
    ]
    scores = dict(zip(labels, run_all(tuning, teacher, progress=progress) if tuning else [], strict=True))
    metric, higher = claim.tuned_on
    chosen = {}
    for label, arm in claim.arms.items():
        if not tuned:
            chosen[label] = 0
            continue
        values = [scores[label, i]["metrics"][metric] for i in range(len(arm.candidates))]
        chosen[label] = values.index(max(values) if higher else min(values))
    judged = range(claim.first_seed, claim.first_seed + seeds)
    runs = [(label, s) for label in claim.arms for s in judged]
    plans = [
        _plan(claim, label, chosen[label], s, output / "runs" / f"{_file(label)}-s{s}", "test") for label, s in runs
    ]
    results = run_all(plans, teacher, progress=progress)
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in claim.arms}
    for (label, _), result in zip(runs, results, strict=True):
        found[label].append(result)
    checks = [_check(check, found) for check in claim.checks]
    result = {
        "claim": claim.statement,
        "caveat": claim.caveat,
        "arms": {label: _arm(claim, label, chosen[label], found[label], checks) for label in claim.arms},
        **{k: checks[0][k] for k in ("metric", "difference", "interval", "verdict")},
        "checks": checks,
        "budget": _budget(claim, found, seeds),
        "command": f"understudy reproduce {claim.name} --seeds {seeds}",
        "commit": _commit(),
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "seconds": round(time.time() - started, 1),
    }
    (output / "claim.json").write_text(json.dumps(result, indent=1))
    return result


def _file(label: str) -> str:
    return label.replace("/", "-")


def _plan(claim: Claim, label: str, candidate: int, seed: int, output: Path, eval_split: str) -> Recipe:
    arm = claim.arms[label]
    over = arm.candidates[candidate]
    base = {**claim.recipe, **arm.recipe}
    if claim.new_data:
        base["data"] = {**base["data"], "seed": seed}
    return make(
        base
        | {
            "method": arm.method,
            "options": {**arm.options, **over.get("options", {})},
            "trainer": {**base.get("trainer", {}), **over.get("trainer", {})},
            "data": {**base.get("data", {}), **over.get("data", {})},
            "seed": seed,
            "output": str(output),
            "eval_split": eval_split,
        }
    )


def _check(check: Check, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    a = [r["metrics"][check.metric] for r in found[check.arm]]
    b = [check.factor * r["metrics"][check.other_metric or check.metric] for r in found[check.other]]
    difference = paired(a, b)
    return {
        "says": check.says,
        "arm": check.arm,
        "other": check.other,
        "metric": check.metric,
        **({"other_metric": check.other_metric} if check.other_metric else {}),
        **({"factor": check.factor} if check.factor != 1 else {}),
        "threshold": check.threshold,
        "difference": difference.mean,
        "interval": [difference.low, difference.high],
        "verdict": verdict(difference, check.threshold, check.higher_is_better),
    }


def _arm(
    claim: Claim, label: str, chosen: int, results: list[dict[str, Any]], checks: list[dict[str, Any]]
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


def _budget(claim: Claim, found: Mapping[str, list[dict[str, Any]]], seeds: int) -> dict[str, Any]:
    return {
        "seeds": seeds,
        "first_seed": claim.first_seed,
        "tuning_trials_per_arm": len(next(iter(claim.arms.values())).candidates),
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
        table.add_row(check["says"], check["metric"], span, f"{check['threshold']:+g}", check["verdict"])
    return table
