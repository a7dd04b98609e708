"""A claim as an experiment: arms of equal budget and equal tuning, tuned on validation, judged on test.

Without a number of seeds it goes on until the main check is decided or its budget is spent: seeds come in rounds, each a
quarter of those before, and the intervals hold at every look (`reporting.sequential`). Arms that only side claims compare
may stop earlier than the two of the main check.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from understudy.claims.claim import EMBEDDED, Arm, Check, Claim, Setting
from understudy.claims.result import assemble, checked, result_table
from understudy.errors import InputError
from understudy.files import read_json, write_json
from understudy.reporting.sequential import FIRST
from understudy.runs.comparison import run_all
from understudy.runs.executors import PROCESSES, executor_of
from understudy.runs.folder import finished

MAX_SEEDS = 20
SEARCHED = 3
"""Seeds on validation for each setting of the search that follows a verdict of *not supported*."""


def reproduce(
    claim: Claim,
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
    """Tune every arm over its candidates on one seed apart, then judge the chosen ones over seeds.

    Runs that are finished in `output` are read, not run again.

    Args:
        seeds: exactly so many, with intervals of that one look; `None`: rounds until the main check is decided.
        max_seeds: at most so many in rounds, 20 unless given.
        hours: begin no round that is not expected to end within so many; tuning and the first round are run in any case.
        side_seeds: arms that the main check does not compare stop after so many; side checks are then of these seeds.
        setting, data: see `Claim.at`. executor: see `runs.comparison.compare`.

    Returns:
        `{claim, arms, metric, difference, interval, verdict, budget, checks, …}`; also written to `claim.json`.
        `stopped` says why it ended, `looks` after how many seeds a verdict was asked for; `search` is what the claim's
        `knobs` reach on validation, where the verdict is *not supported*.
    """
    started = time.time()
    _check_budget(seeds, max_seeds, hours, side_seeds)
    executor_of(executor)
    claim = claim.at(setting, data)
    asked = _looks(claim, setting, output)  # a damaged file is told before anything is run
    chosen = _tune(claim, output, executor, progress)
    most = seeds or max_seeds or MAX_SEEDS
    ends = {label: most if label in claim.main else min(most, side_seeds or most) for label in claim.arms}
    number = seeds or min(most, max(FIRST, _done(claim, chosen, ends, output)))
    earlier = [n for n in asked if n < number] if seeds is None else []
    looks: list[int] = []
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in claim.arms}
    stopped = None
    while stopped is None:
        begun = time.time()
        further = [
            (label, n) for n in range(looks[-1] if looks else 0, number) for label, end in ends.items() if n < end
        ]
        _judge(claim, chosen, further, output, found, executor, progress)
        checks = [checked(check, found, sequential=seeds is None) for check in claim.checks]
        more = min(number + max(1, number // 4), most) - number
        runs = sum(min(end, number + more) - min(end, number) for end in ends.values())
        ahead = (time.time() - begun) * runs / len(further)
        looks.append(number)
        number += more
        late = hours is not None and time.time() + ahead > started + hours * 3600
        decided = checks[0]["verdict"] != "inconclusive"
        stopped = _reason(seeds is not None, decided, most if not more else None, hours if late else None)
    refuted = checks[0]["verdict"] == "not supported"
    result = {
        **assemble(claim, chosen, found, checks),
        **({"search": _search(claim, chosen, output, executor, progress)} if refuted and claim.knobs else {}),
        "setting": setting,
        **({"data": data} if data is not None else {}),
        "sequential": seeds is None,
        "looks": earlier + looks,
        "stopped": stopped,
        "command": _command(claim.name, seeds, max_seeds, hours, side_seeds, setting, data),
        "seconds": round(time.time() - started, 1),
    }
    write_json(output / "claim.json", result)
    return result


def _reason(fixed: bool, decided: bool, seeds: int | None, hours: float | None) -> str | None:
    """Why it ends here, if it does: `seeds` or `hours` are those that are spent."""
    if fixed:
        return "all seeds that were asked for"
    if decided:
        return "decided"
    if seeds is not None:
        return f"{seeds} seeds spent"
    return f"{hours:g} hours spent" if hours is not None else None


def _check_budget(seeds: int | None, max_seeds: int | None, hours: float | None, side_seeds: int | None) -> None:
    if seeds is not None and (max_seeds is not None or hours is not None):
        other = "--max-seeds" if max_seeds is not None else "--hours"
        raise InputError(f"--seeds asks for exactly {seeds} seeds, and {other} bounds rounds of them: leave one out.")
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds is {seeds}, and a claim is judged on at least 1.")
    if max_seeds is not None and max_seeds < FIRST:
        raise InputError(f"--max-seeds is {max_seeds}, and no verdict is possible below {FIRST} seeds.")
    if hours is not None and not hours > 0:
        raise InputError(f"--hours is {hours:g} and must be above 0.")
    if side_seeds is not None and side_seeds < FIRST:
        raise InputError(
            f"--side-seeds is {side_seeds}, and no verdict of a side claim is possible below {FIRST} seeds."
        )


def _tune(claim: Claim, output: Path, executor: str, progress: bool) -> dict[str, int]:
    """The best candidate of each arm on validation. What the search may try with it is checked first."""
    number = claim.candidates
    for knob in claim.knobs:
        for i in range(number):
            claim.trying(claim.checks[0].arm, i, knob, 0, output).build_method()
    if number == 1:  # nothing to choose
        return dict.fromkeys(claim.arms, 0)
    labels = [(label, i) for label in claim.arms for i in range(number)]
    plans = [claim.tuning(label, i, output) for label, i in labels]
    results = run_all(plans, output / "teacher", executor=executor, progress=progress)
    scores = dict(zip(labels, results, strict=True))
    metric, higher = claim.tuned_on
    best = max if higher else min
    return {a: best(range(number), key=lambda i: scores[a, i]["metrics"][metric]) for a in claim.arms}


def _judge(
    claim: Claim,
    chosen: Mapping[str, int],
    further: Iterable[tuple[str, int]],
    output: Path,
    found: Mapping[str, list[dict[str, Any]]],
    executor: str,
    progress: bool,
) -> None:
    """Add the results of further arms and seeds, numbered from the claim's first, to those of each arm."""
    runs = [(label, claim.judging(label, chosen[label], claim.first_seed + n, output)) for label, n in further]
    plans = [plan for _, plan in runs]
    results = run_all(plans, output / "teacher", executor=executor, progress=progress)
    for (label, _), result in zip(runs, results, strict=True):
        found[label].append(result)


def _search(
    claim: Claim, chosen: Mapping[str, int], output: Path, executor: str, progress: bool
) -> list[dict[str, Any]]:
    """The main check with other options of its arm, on validation, over seeds that are not judged; first as it was judged."""
    check, numbers = claim.checks[0], range(SEARCHED)
    tried: list[dict[str, Any]] = []
    for knob in ({}, *claim.knobs):
        plans = [claim.trying(check.arm, chosen[check.arm], knob, n, output) for n in numbers]
        if check.other != check.arm:
            plans += [claim.trying(check.other, chosen[check.other], {}, n, output) for n in numbers]
        results = run_all(plans, output / "teacher", executor=executor, progress=progress)
        arms = {check.arm: results[:SEARCHED], check.other: results[-SEARCHED:]}
        difference = checked(check, arms, sequential=False)
        tried.append(
            {"options": dict(knob), **{k: difference[k] for k in ("metric", "threshold", "difference", "interval")}}
        )
    return tried


def _looks(claim: Claim, setting: str, output: Path) -> list[int]:
    """After how many seeds earlier calls with this folder asked for a verdict; another claim may have been there too."""
    before = read_json(output / "claim.json") or {}
    same = before.get("claim") == claim.statement and before.get("setting") == setting
    return list(before["looks"]) if same and before.get("sequential") else []


def _done(claim: Claim, chosen: Mapping[str, int], ends: Mapping[str, int], output: Path) -> int:
    """How many seeds, from the first on, all arms have finished, each as far as it goes."""
    most = max(ends.values())
    for number in range(most):
        seed = claim.first_seed + number
        plans = [claim.judging(label, i, seed, output) for label, i in chosen.items() if number < ends[label]]
        if any(finished(plan.output) is None for plan in plans):
            return number
    return most


def _command(
    name: str,
    seeds: int | None,
    max_seeds: int | None,
    hours: float | None,
    side_seeds: int | None,
    setting: str,
    data: str | None,
) -> str:
    given = {"seeds": seeds, "max-seeds": max_seeds, "hours": hours, "side-seeds": side_seeds, "data": data}
    options = [("setting", setting)] if setting != EMBEDDED else []
    options += [(k, v) for k, v in given.items() if v is not None]  # type: ignore[misc]
    return shlex.join(["understudy", "reproduce", name, *(w for k, v in options for w in (f"--{k}", f"{v}"))])


__all__ = ["Arm", "Check", "Claim", "Setting", "reproduce", "result_table"]
