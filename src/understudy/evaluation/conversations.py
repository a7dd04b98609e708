"""Report of conversations that were answered with and without a library of strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from understudy.curation import Item
from understudy.curation.strategies import Strategy, transcript
from understudy.evaluation.answers import Gain, paired_gain
from understudy.evaluation.corpus import sample_table
from understudy.evaluation.cost import CostMeter
from understudy.generation import Spent


class Judged(Item):
    """One conversation, answered twice. `parents` are the strategies that were in the prompt.

    Args:
        plain, advised: answers without and with the library. base, score: of them, 1 to 10; `None` if unreadable.
        type, found_type: of the conversation, and of the first strategy's scenario, where the data say it.
    """

    scenario: str
    plain: str
    advised: str
    base: float | None
    score: float | None
    type: str | None = None
    found_type: str | None = None

    @classmethod
    def of(
        cls,
        record: Mapping[str, Any],
        found: Sequence[Strategy],
        plain: str,
        advised: str,
        base: float | None,
        score: float | None,
    ) -> Judged:
        """A record of the data with what was found for it, said and judged."""
        return cls(
            scenario=transcript(record["conversation"]),
            parents=tuple(entry.id for entry in found),
            plain=plain,
            advised=advised,
            base=base,
            score=score,
            type=record.get("type"),
            found_type=found[0].type if found else None,
        )

    def problem(self) -> str | None:
        """Why it cannot be counted, or `None`."""
        return "no readable judgement" if self.base is None or self.score is None else None


def conversation_report(
    judged: Mapping[str, Sequence[Judged]],
    library: Sequence[Strategy],
    spent: Mapping[str, Spent],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The evaluation of a run.

    Args:
        judged: by student: `student`, and others that use the same library (`transfer`, `transfer.NAME`), whose metrics have
            that name before them. library: its entries. spent: answers by role.
    """
    metrics: dict[str, float] = {}
    rows = []
    for role, items in judged.items():
        gain, own = _gain(items), _metrics(items)
        prefix = "" if role == "student" else f"{role.replace('.', '_')}_"
        metrics |= {f"{prefix}{name}": value for name, value in own.items()}
        shown = [f"{own[n]:.3f}" for n in ("baseline_satisfaction", "satisfaction", "gain")]
        rows.append([role, *shown, f"{gain.p:.3g}", gain.win, gain.tie, gain.loss, f"{gain.sign_p:.3g}"])
    metrics["entries"] = float(len(library))
    entries = [
        [e.status, e.scenario, e.strategy, *map(_shown, (e.base_score, e.score, e.teacher_score))] for e in library
    ]
    samples = [[j.scenario, j.plain, _shown(j.base), j.advised, _shown(j.score)] for j in judged["student"]]
    return {
        "metrics": metrics,
        "cost": {**CostMeter("answers").summary(), "forwards": {role: s.requests for role, s in spent.items()}},
        "tables": [
            {"title": "With the library and without, on the same conversations", "headings": _HEADINGS, "rows": rows},
            sample_table(
                "Strategies", ["status", "scenario", "strategy", "before", "with it", "teacher"], entries[:20]
            ),
            sample_table("Answers", ["conversation", "without", "score", "with the library", "score"], samples[:12]),
        ],
        "notes": list(notes),
    }


_HEADINGS = ["student", "without", "with", "gain", "p (t-test)", "better", "equal", "worse", "p (sign test)"]


def _gain(items: Sequence[Judged]) -> Gain:
    pairs = [(j.base, j.score) for j in items if j.base is not None and j.score is not None]
    return paired_gain([b for b, _ in pairs], [s for _, s in pairs])


def _metrics(items: Sequence[Judged]) -> dict[str, float]:
    gain, advised = _gain(items), [j for j in items if j.parents]
    base = sum(j.base or 0.0 for j in items) / len(items)
    typed = [j for j in advised if j.type is not None and j.found_type is not None]
    found = {"satisfaction": base + gain.mean, "baseline_satisfaction": base, "gain": gain.mean, "paired_p": gain.p}
    found |= {"sign_p": gain.sign_p, "advised": len(advised) / len(items)}
    return found | ({"right_type": sum(j.type == j.found_type for j in typed) / len(typed)} if typed else {})


def _shown(score: float | None) -> str:
    return "–" if score is None else f"{score:.2f}"
