"""The panels of a run with an oracle: does the student near the truth, or its teacher alone (paper 20)?"""

from __future__ import annotations

import math
from pathlib import Path

from understudy.evaluation.hacking import Curve, curve_of, leaves_power_law, verdict
from understudy.reporting import plots


def hacking_panels(folder: Path) -> list[tuple[str, str, str]]:
    """Title, drawing and caption of each panel; none without distances in the folder's validation log."""
    curve = curve_of(folder)
    if curve is None:
        return []
    constant = [curve.teacher_golden] * len(curve.steps)
    sides = {"golden": curve.golden, "proxy": curve.proxy, "oracle to teacher": constant}
    over_steps = plots.curves({name: (curve.steps, values) for name, values in sides.items()}, "nats a text")
    path = plots.path(
        list(zip(curve.proxy, curve.golden, strict=True)), "proxy: teacher to student", "golden: oracle to student"
    )
    return [
        ("Distances of held-out texts", over_steps, f"Forward KL, lower is better. {judged(curve)}"),
        (
            "Golden against proxy",
            path,
            "Each point is an evaluation, from the ring to the dot. A path to the lower left is healthy: with its teacher the "
            "student nears the truth. One that turns up while it goes left is teacher hacking: the student learns what is the "
            "teacher's alone. Up and right is overfitting to the texts: take fresh ones.",
        ),
    ]


def judged(curve: Curve) -> str:
    """One or two sentences on what the curve says, with the oracle and without it."""
    found = verdict(curve.golden, curve.proxy, loss=curve.loss)
    best = f"its least, {curve.golden[found.best]:.3f} at step {curve.steps[found.best]}"
    if found.hacking:
        said = (
            f"Teacher hacking: golden ends {found.rise:.0%} above {best}, while the student still nears its teacher. End there, "
            "or have fresh texts written (on_policy)."
        )
    elif found.rise > 0:
        said = f"No teacher hacking: golden ends {found.rise:.1%} above {best}."
    else:
        said = f"No teacher hacking: golden is at {best}, where training ends."
    return " ".join([said, *_power_law(curve)])


def _power_law(curve: Curve) -> list[str]:
    """Where the proxy leaves the power law of its first evaluations, which is seen without an oracle."""
    points = [(s, v) for s, v in zip(curve.steps, curve.proxy, strict=True) if s > 0 and 0 < v < math.inf]
    if len(points) < 4:
        return []
    steps, values = zip(*points, strict=True)
    place = leaves_power_law(steps, values, first=min(8, len(points) // 2 + 1))
    where = "follows the power law" if place is None else f"has left, by step {steps[place]}, the power law"
    return [f"Without an oracle one sees: the proxy {where} of its first evaluations."]
