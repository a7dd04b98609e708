"""Report of a generated corpus and of the student trained on it: precision, size, diversity, filtering counts, sample
texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from understudy.curation import precision, summary
from understudy.curation.triples import Answer, Triple
from understudy.generation import Spent

Table = dict[str, Any]


def funnel_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Number of items at each filter step, with the reasons for dropping."""
    cells = [
        [r["step"], r["before"], r["after"], "; ".join(f"{n} {reason}" for reason, n in r["dropped"].items()) or "–"]
        for r in rows
    ]
    return {"title": "What was kept at each step", "headings": ["step", "before", "after", "dropped"], "rows": cells}


def spent_table(spent: Mapping[str, Spent]) -> Table:
    """What each model was asked, by role, and all of them together."""
    total = {"all": sum(spent.values(), Spent())} if len(spent) > 1 else {}
    rows = [
        [role, s.requests, s.prompt_tokens, s.tokens, f"{s.cost:.4g}" if s.cost else "–"]
        for role, s in {**spent, **total}.items()
    ]
    headings = ["model", "answers", "prompt tokens", "written tokens", "cost"]
    return {"title": "What the models were asked", "headings": headings, "rows": rows}


def cutoff_table(points: Sequence[Mapping[str, float]]) -> Table:
    """Precision and recall on the labels that the cutoff was chosen on, as estimated (≥) and as applied (>)."""
    names = ("value", "precision", "recall", "strict_precision", "strict_recall")
    headings = ["cutoff", "precision (≥)", "recall (≥)", "precision (>)", "recall (>)"]
    return {
        "title": "Cutoffs of the critic on its validation labels",
        "headings": headings,
        "rows": [[f"{p[name]:.3f}" for name in names] for p in points],
    }


def corpus_table(corpora: Mapping[str, Mapping[str, Any]]) -> Table:
    """Size, diversity and precision of several corpora, as `understudy.curation.summary` gives them."""
    names = ("size", "groups", "unique", "soft_unique", "most_common", "precision")
    show = lambda v: "–" if v is None else f"{v:.3f}" if isinstance(v, float) else v  # noqa: E731
    return {
        "title": "Corpora",
        "headings": [
            "corpus",
            "triples",
            "heads",
            "unique tails",
            "nearly unique",
            "share of the commonest",
            "precision",
        ],
        "rows": [[label, *(show(one[name]) for name in names)] for label, one in corpora.items()],
    }


def sample_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Examples of text; the HTML page escapes them."""
    return {"title": title, "headings": list(headings), "rows": [list(row) for row in rows]}


def corpus_report(
    triples: Sequence[Triple],
    answers: Sequence[Answer],
    good: Mapping[str, Sequence[bool | None]],
    found: Mapping[str, Any],
    split: str,
    *,
    known: bool,
) -> dict[str, Any]:
    """Metrics and tables of a corpus of triples, and of the answers of a student trained on it for held-out heads.

    Args:
        good: verdicts on `triples` and `answers`. found: of a critic `fits`, `cutoff`, `estimate` and `grid`.
        split: whose heads the student is asked about.
        known: verdicts are the truth (metrics `…_valid`, `…_precision`), not a critic's (`…_accepted`).
    """
    word = "valid" if known else "accepted"
    train = [i for i, t in enumerate(triples) if t.split == "train"]
    sets = {"corpus": train, "kept": [i for i in train if triples[i].kept]}
    corpora = {
        name: _summary([triples[i] for i in at], [good["triples"][i] for i in at], known) for name, at in sets.items()
    }
    sampled = [i for i, a in enumerate(answers) if not a.greedy]
    greedy = [i for i, a in enumerate(answers) if a.greedy]
    corpora["student"] = _summary([answers[i] for i in sampled], [good["answers"][i] for i in sampled], known)
    held = [(len(t.requests), g) for t, g in zip(triples, good["triples"], strict=True) if t.split == split]
    metrics: dict[str, float | None] = {
        f"student_{word}": precision([good["answers"][i] for i in sampled]),
        f"student_greedy_{word}": precision([good["answers"][i] for i in greedy]),
        f"teacher_{word}": precision([g for times, g in held for _ in range(times)]),
        "kept_share": corpora["kept"]["size"] / corpora["corpus"]["size"],
        "corpus_precision": corpora["corpus"]["precision"],
        "kept_precision": corpora["kept"]["precision"],
    }
    metrics |= {f"{n}_{k}": float(c[k]) for n, c in corpora.items() for k in ("size", "unique", "soft_unique")}
    if "estimate" in found:
        metrics |= {
            "cutoff": found["cutoff"],
            **{f"labels_{k}": v for k, v in found["estimate"].items() if k != "value"},
        }
    tables = [corpus_table(corpora)]
    tables += [cutoff_table(found["grid"])] if "grid" in found else []
    tables += [_kept_samples(triples, good["triples"]), _answer_samples(answers, good["answers"])]
    kept = {k: v for k, v in metrics.items() if v is not None}
    return {
        "metrics": kept,
        "tables": tables,
        **({"critic": [f.model_dump(mode="json") for f in found["fits"]]} if "fits" in found else {}),
    }


def _summary(items: Sequence[Triple], good: Sequence[bool | None], known: bool) -> dict[str, Any]:
    is_valid = good.__getitem__ if known else None  # a critic's verdict on what it chose itself says nothing
    return summary([t.tail for t in items], [t.head for t in items], is_valid)


def _verdict(good: bool | None) -> str:
    return {True: "good", False: "bad", None: "–"}[good]


def _kept_samples(triples: Sequence[Triple], good: Sequence[bool | None], number: int = 6) -> Table:
    rows = []
    for kept in (True, False):
        some = [i for i, t in enumerate(triples) if t.kept == kept]
        for i in some[:: max(1, len(some) // number)][:number]:
            t = triples[i]
            score = f"{t.score:.3f}" if t.score is not None else "–"
            rows.append([t.head, t.relation, t.tail, score, "kept" if kept else "dropped", _verdict(good[i])])
    return sample_table("Triples", ["head", "relation", "tail", "critic", "fate", "judged"], rows)


def _answer_samples(answers: Sequence[Answer], good: Sequence[bool | None], number: int = 12) -> Table:
    first = [i for i, a in enumerate(answers) if a.greedy]
    some = first[:: max(1, len(first) // number)][:number]
    rows = [[answers[i].head, answers[i].relation, answers[i].tail, _verdict(good[i])] for i in some]
    return sample_table("The student on held-out heads, greedy", ["head", "relation", "tail", "judged"], rows)
