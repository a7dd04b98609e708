"""A study of many runs: does a taught student do better than one trained alone, and does it do so in its teacher's way?

Generalisation (the gain over training alone) and fidelity (agreement with the teacher) are two measures of a run; neither is
derived from the other (paper 14).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from understudy.errors import InputError
from understudy.reporting.significance import SignificanceTest, anova, gains_above_zero, rank_correlation
from understudy.reporting.statistics import interval
from understudy.reporting.table import span

LEVEL = 0.05
"""Of a test that is called significant."""
VARIABLES = {
    "student_size": "the student's size",
    "teacher_score": "the teacher's score",
    "alone": "the student's score when trained alone",
    "agreement": "agreement with the teacher",
    "fidelity": "fidelity to the teacher",
}
"""What gains are correlated with, by the key of a point."""
FIDELITY = {
    "kl": "KL divergence from the teacher (smaller is closer)",
    "rationale_bleu": "BLEU of rationales against the teacher's",
}
"""What the measures of fidelity are."""


@dataclass(frozen=True)
class Record:
    """One trained student.

    Args:
        data, teacher, student, method: names. `teacher` is `None` for a run without one.
        temperature: τ, `None` for a method without it. seed: of the run.
        score: its metric. teacher_score: the teacher's, on the same split. student_size: parameters.
        agreement: with the teacher, a share. fidelity: how it gets there, by the task's measure. `None` where not known.
        folder: of the run.
    """

    data: str
    teacher: str | None
    student: str
    method: str
    temperature: float | None
    seed: int
    score: float
    teacher_score: float | None = None
    student_size: float | None = None
    agreement: float | None = None
    fidelity: float | None = None
    folder: str = ""


def points(records: Sequence[Record], baseline: str, higher_is_better: bool = True) -> list[dict[str, Any]]:
    """One point for each (data, teacher, student, method, τ): means over seeds, and the gain over the baseline.

    The gain is paired: each run against the run of the baseline with the same student, data and seed, where possible beside
    the same teacher. It is above 0 where the taught student is better, also if lower values of the metric are.

    Raises:
        InputError: a run has no run of the baseline to be compared with, or there is no other run.
    """
    _check_apart(records)
    alone = _Alone([r for r in records if r.method == baseline])
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        if r.method != baseline:
            groups.setdefault((r.data, r.teacher, r.student, r.method, r.temperature), []).append(r)
    if not groups:
        raise InputError(
            f"Every run is of {baseline!r}, which gains are measured against: add runs of another method, or name another "
            "baseline."
        )
    found = []
    for (data, teacher, student, method, temperature), runs in groups.items():
        others = [alone.of(r, baseline) for r in runs]
        sign = 1 if higher_is_better else -1
        gain = interval([sign * (r.score - o.score) for r, o in zip(runs, others, strict=True)])
        point = {
            "data": data,
            "teacher": teacher,
            "student": student,
            "method": method,
            "temperature": temperature,
            "gain": gain.mean,
            "gain_interval": [gain.low, gain.high],
            "score": fmean(r.score for r in runs),
            "alone": fmean(o.score for o in others),
            "seeds": len(runs),
        }
        for name in ("teacher_score", "student_size", "agreement", "fidelity"):
            point[name] = _mean([getattr(r, name) for r in runs])
        beside = [o for o in others if o.teacher == teacher]
        for name in ("agreement", "fidelity"):
            point[f"{name}_alone"] = _mean([getattr(o, name) for o in beside])
        found.append(point)
    _rank(found)
    return found


def _check_apart(records: Sequence[Record]) -> None:
    """Raise an error for two runs that a point would take for one, which differ in what a study does not compare."""
    seen: dict[tuple[Any, ...], Record] = {}
    for r in records:
        key = (r.data, r.teacher, r.student, r.method, r.temperature, r.seed)
        if key in seen:
            raise InputError(
                f"Runs {seen[key].folder} and {r.folder} have the same data, teacher, student, method, temperature and seed: "
                "leave one out."
            )
        seen[key] = r


class _Alone:
    """The runs of the baseline, by student, data and seed."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.known: dict[tuple[str, str, int], list[Record]] = {}
        for r in records:
            self.known.setdefault((r.data, r.student, r.seed), []).append(r)

    def of(self, run: Record, baseline: str) -> Record:
        candidates = self.known.get((run.data, run.student, run.seed), [])
        if len({c.temperature for c in candidates}) > 1:
            raise InputError(
                f"The baseline {baseline!r} has several temperatures: choose one that gains are measured against."
            )
        if not candidates:
            raise InputError(
                f"{run.folder or run.method}: there is no run of {baseline!r} with student {run.student}, data {run.data} and "
                f"seed {run.seed} to measure its gain against: add one, or name another baseline."
            )
        return next((c for c in candidates if c.teacher == run.teacher), candidates[0])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _rank(found: Sequence[dict[str, Any]]) -> None:
    """Add each point's place among those with the same data and teacher, by gain and by agreement, 1 first."""
    for point in found:
        peers = [p for p in found if (p["data"], p["teacher"]) == (point["data"], point["teacher"])]
        for name in ("gain", "agreement"):
            known = [p[name] for p in peers if p[name] is not None]
            value = point[name]
            point[f"{name}_rank"] = 1 + sum(v > value for v in known) if value is not None else None


def best_temperature(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each (data, teacher, student, method) the point with the largest gain over τ, as the paper takes it.

    The choice is made on the split that is reported, so gains are optimistic.
    """
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for p in found:
        key = (p["data"], p["teacher"], p["student"], p["method"])
        if key not in best or p["gain"] > best[key]["gain"]:
            best[key] = p
    return list(best.values())


def tested(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The paper's tests of points: gains above 0, over all and by method; methods against each other; rank correlations."""
    methods: dict[str, list[float]] = {}
    for p in found:
        methods.setdefault(p["method"], []).append(p["gain"])
    return {
        "gains": gains_above_zero([p["gain"] for p in found]).as_json(),
        "by_method": {name: gains_above_zero(gains).as_json() for name, gains in methods.items()},
        "anova": anova(methods).as_json(),
        "spearman": {name: _correlated(found, name, what).as_json() for name, what in VARIABLES.items()},
    }


def _correlated(found: Sequence[Mapping[str, Any]], name: str, what: str) -> SignificanceTest:
    known = [p for p in found if p[name] is not None]
    if not known and found:
        return SignificanceTest(float("nan"), float("nan"), 0, f"no run has {what}")
    return rank_correlation([p[name] for p in known], [p["gain"] for p in known], f"values of {what}")


def assemble(
    records: Sequence[Record],
    *,
    baseline: str,
    metric: str,
    higher_is_better: bool = True,
    measures: Sequence[str] = ("agreement", "kl"),
) -> dict[str, Any]:
    """The whole study as plain values: points, tests with the best τ, and the same with τ fixed.

    Args:
        records: of all runs, the baseline's among them. baseline: the method that gains are measured against.
        metric: the name of scores. measures: the names of agreement and fidelity.
    """
    found = points(records, baseline, higher_is_better)
    temperatures = sorted({p["temperature"] for p in found if p["temperature"] is not None})
    fixed = {f"{t:g}": tested([p for p in found if p["temperature"] in (t, None)]) for t in temperatures}
    known = [p for p in found if p["agreement"] is not None and p["agreement_alone"] is not None]
    return {
        "baseline": baseline,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "measures": list(measures),
        "points": found,
        "best_temperature": tested(best_temperature(found)),
        "fixed_temperature": fixed if len(fixed) > 1 else {},
        "gains_with_less_agreement": [
            sum(p["gain"] > 0 > p["agreement"] - p["agreement_alone"] for p in known),
            len(known),
        ],
        "runs": [vars(r) for r in records],
    }


def headings(study: Mapping[str, Any]) -> list[str]:
    """The headings of `rows`."""
    agreement, fidelity = study["measures"]
    first = ["teacher", "student", "method", "τ"]
    named = [f"{study['metric']}", "alone", "gain [95 %]", agreement, "alone", fidelity, "rank by gain", "by agreement"]
    return [*(["data"] if _several(study) else []), *first, *named]


def _several(study: Mapping[str, Any]) -> bool:
    return len({p["data"] for p in study["points"]}) > 1


def rows(study: Mapping[str, Any]) -> list[list[str]]:
    """The table of points."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    found = []
    for p in study["points"]:
        tau = "–" if p["temperature"] is None else f"{p['temperature']:g}"
        gain = span(p["gain"], p["gain_interval"])
        ranks = ["–" if p[f"{n}_rank"] is None else str(p[f"{n}_rank"]) for n in ("gain", "agreement")]
        names = [*([p["data"]] if _several(study) else []), p["teacher"] or "–", p["student"], p["method"], tau]
        scores = [number(p["score"]), number(p["alone"]), gain, number(p["agreement"]), number(p["agreement_alone"])]
        found.append([*names, *scores, number(p["fidelity"]), *ranks])
    return found


ANSWERED = ["question", "test", "p", "points", "answer"]


def answers(tests: Mapping[str, Any], measures: Sequence[str]) -> list[list[str]]:
    """The tests as questions with their answers."""
    named = {**VARIABLES, "fidelity": FIDELITY.get(measures[1], measures[1])}
    asked: list[tuple[str, str, Mapping[str, Any], Callable[[Mapping[str, Any]], str]]]
    asked = [("Is the student better than alone?", "t", tests["gains"], _yes)]
    asked += [(f"… with {name}?", "t", test, _yes) for name, test in tests["by_method"].items()]
    asked.append(("Do the methods differ?", "F", tests["anova"], _yes))
    for key, test in tests["spearman"].items():
        asked.append((f"Do gains go with {named[key]}?", "ρ", test, _direction))
    found = []
    for question, sign, test, say in asked:
        if test["reason"] is not None:
            found.append([question, "–", "–", str(test["n"]), f"no test: {test['reason']}"])
        else:
            numbers = [f"{sign} = {test['statistic']:.4g}", f"{test['p']:.2g}", str(test["n"])]
            found.append([question, *numbers, say(test)])
    return found


def _yes(test: Mapping[str, Any]) -> str:
    return "yes" if test["p"] < LEVEL else "not shown"


def _direction(test: Mapping[str, Any]) -> str:
    if test["p"] >= LEVEL:
        return "not shown"
    return "larger gains where it is larger" if test["statistic"] > 0 else "larger gains where it is smaller"


def notes(study: Mapping[str, Any]) -> list[str]:
    """What a reader of the tests must know."""
    fewer, known = study["gains_with_less_agreement"]
    said = [
        f"A gain is the {study['metric']} of a student less that of the same student trained by {study['baseline']} with the "
        "same data and seed; above 0 is better.",
        "Agreement and gain are measured apart: ranks among the students of one teacher may differ.",
        "Points that share a teacher or a student are not independent, and the tests take them as if they were.",
    ]
    if study["fixed_temperature"]:
        said.append(
            "The best τ is chosen by the gain that is tested, which is optimistic; tests with τ fixed are beside it."
        )
    if known:
        said.append(
            f"{fewer} of {known} points gain and yet agree less with the teacher than the student trained alone."
        )
    return [*said, *study.get("notes", [])]


def study_tables(study: Mapping[str, Any]) -> list[Table]:
    """The study for the terminal: the points, and the tests."""
    table = Table(title=f"{study['metric']} and agreement with the teacher")
    for heading in headings(study):
        table.add_column(heading, justify="left" if heading in ("data", "teacher", "student", "method") else "right")
    for row in rows(study):
        table.add_row(*row)
    asked = Table(*ANSWERED, title="Tests, with the best τ" if study["fixed_temperature"] else "Tests")
    for row in answers(study["best_temperature"], study["measures"]):
        asked.add_row(*row)
    return [table, asked]
