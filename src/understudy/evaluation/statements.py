"""Report of rounds of self-imitation: form, truth and number of the statements of each model, and the final corpus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.curation import precision
from understudy.curation.generics import Statement, perplexities
from understudy.evaluation.corpus import sample_table

Truth = Callable[[str, str, str], bool]


@dataclass(frozen=True)
class Round:
    """What a model wrote.

    Args:
        written: every text. distinct: those of the right form, once each. kept: those that the filter left.
    """

    written: Sequence[Statement]
    distinct: Sequence[Statement]
    kept: Sequence[Statement]

    def numbers(self, is_valid: Truth | None, held: str) -> dict[str, float | None]:
        """Shares and counts. What is true is counted among concepts of the split `held`, which no label is about.

        `well_formed` of all texts, `accepted` of distinct statements, `accuracy` of distinct statements before the filter,
        `kept_accuracy` behind it, `distinct_true` statements before it, `perplexity` mean of distinct statements.
        """
        ask = lambda items: [is_valid(*s.key) for s in items if s.split == held] if is_valid is not None else []  # noqa: E731
        values = perplexities([s.log_prob for s in self.distinct], [s.tokens for s in self.distinct])
        return {
            "well_formed": sum(s.wrong is None for s in self.written) / len(self.written),
            "distinct": float(len(self.distinct)),
            "accepted": len(self.kept) / max(1, len(self.distinct)),
            "accuracy": precision(ask(self.distinct)),
            "kept_accuracy": precision(ask(self.kept)),
            "distinct_true": float(sum(ask(self.distinct))) if is_valid is not None else None,
            "perplexity": sum(values) / len(values) if values else None,
        }


def statement_report(
    rounds: Sequence[Round], corpus: Sequence[Statement], is_valid: Truth | None, held: str, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Metrics and tables of all rounds and of the corpus; `accuracy` and the like are those of the last model.

    Args:
        corpus: of all rounds, each statement once. found: of a critic `fits` and `cutoff`.
    """
    numbers = [one.numbers(is_valid, held) for one in rounds]
    metrics = dict(numbers[-1])
    metrics |= {f"{name}_{i}": value for i, row in enumerate(numbers) for name, value in row.items()}
    metrics |= {"corpus_size": float(len(corpus)), **({"cutoff": found["cutoff"]} if "cutoff" in found else {})}
    if is_valid is not None:
        metrics["corpus_accuracy"] = precision([is_valid(*s.key) for s in corpus if s.split == held])
    show = lambda v: "–" if v is None else f"{v:.3f}" if v % 1 else int(v)  # noqa: E731
    table = {
        "title": "What the model wrote after so many rounds of self-imitation",
        "headings": ["rounds", *(name.replace("_", " ") for name in numbers[0])],
        "rows": [[i, *map(show, row.values())] for i, row in enumerate(numbers)],
    }
    return {
        "metrics": {name: value for name, value in metrics.items() if value is not None},
        "tables": [table, _samples(rounds[-1], {s.id for s in rounds[-1].kept})],
        **({"critic": [f.model_dump(mode="json") for f in found["fits"]]} if "fits" in found else {}),
    }


def _samples(last: Round, kept: set[str], number: int = 12) -> dict[str, Any]:
    some = last.distinct[:: max(1, len(last.distinct) // number)][:number]
    score = lambda s: f"{s.score:.3f}" if s.score is not None else "–"  # noqa: E731
    rows = [[f"{s.prompt} {s.tail}", score(s), "kept" if s.id in kept else "dropped"] for s in some]
    return sample_table("Statements of the last model", ["statement", "critic", "fate"], rows)
