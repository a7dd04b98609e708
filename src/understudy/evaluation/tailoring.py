"""What a tailored data set is worth to a student: its examples in context, and answers with examples before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from understudy.curation import Checker, Funnel
from understudy.curation.drafts import DraftRationale, Probe
from understudy.curation.in_context import draw_shots, with_shots
from understudy.curation.item_response import fit_item_response, most_discriminating
from understudy.data.reasoning import completion
from understudy.generation import Request
from understudy.training.pipeline import PipelineContext
from understudy.training.solvers import Solver, solved

Records = Sequence[Mapping[str, Any]]


def discriminating(
    context: PipelineContext,
    solver: Solver,
    pool: Records,
    records: Records,
    shots: Sequence[int],
    number: int,
    checker: Checker,
) -> list[Probe]:
    """The `number` questions that tell able models best from others, or all where there are no more.

    The models are the student and the examinees of a procedure, with each number of examples before the question.

    Args:
        pool: solved questions for examples. records: the questions, with `answer`.
    """
    if len(records) <= number:
        return [Probe(question=i, discrimination=0.0) for i in range(len(records))]
    rows = []
    for few in shots:
        prompts = [
            with_shots(solver.prompt, draw_shots(pool, few, context.recipe["seed"], i), r["question"])
            for i, r in enumerate(records)
        ]
        rows.append([tries[0] for tries in solver.answers(context, prompts, f"probes-{few}")])
        asked = [Request(p, f"probes-{few}/{i}", 0, solver.max_tokens, 0.0) for i, p in enumerate(prompts)]
        rows += [context.ask(role, asked) for role in context.members("examinee")]
    golds = [checker.gold(r["answer"]) for r in records]
    right = [[solved(a, gold, checker) for a, gold in zip(row, golds, strict=True)] for row in rows]
    alpha = fit_item_response(right).discrimination.tolist()
    return [Probe(question=i, discrimination=alpha[i]) for i in most_discriminating(alpha, number, right)]


def tried(
    context: PipelineContext,
    solver: Solver,
    rationales: Sequence[DraftRationale],
    questions: Sequence[str],
    probes: Records,
    checker: Checker,
    funnel: Funnel,
) -> list[DraftRationale]:
    """Rationales with which of the probes a student answers, greedily, with each as the example before them. An example is
    tried once, whoever wrote it again.

    Args:
        questions: by their place, which rationales name. probes: with `question` and `answer`.
    """
    prompts = []
    for r in rationales:
        example = {"question": questions[r.draft], "completion": completion(r.rationale, r.answer)}
        prompts += [with_shots(solver.prompt, [example], p["question"]) for p in probes]
    golds = [checker.gold(p["answer"]) for p in probes]
    said, found = solver.answers(context, prompts, "in_context"), []
    reasons = (checker.parse(one[0].text).reason for one in said)
    problems = Counter(reason for reason in reasons if reason is not None)
    funnel.note("answers of the student that can be read", len(said), len(said) - problems.total(), problems)
    for i, r in enumerate(rationales):
        tries = said[i * len(probes) : (i + 1) * len(probes)]
        right = tuple(solved(one[0], gold, checker) for one, gold in zip(tries, golds, strict=True))
        found.append(r.model_copy(update={"id": "", "parents": (r.id,), "right": right}))
    return found


def few_shot_accuracy(
    context: PipelineContext, solver: Solver, pool: Records, records: Records, shots: int, checker: Checker, name: str
) -> float:
    """Greedy accuracy with examples of the pool before each question, drawn by its place."""
    prompts = [with_shots(solver.prompt, draw_shots(pool, shots, i), r["question"]) for i, r in enumerate(records)]
    said = solver.answers(context, prompts, name)
    golds = (checker.gold(r["answer"]) for r in records)
    return fmean(solved(tries[0], gold, checker) for tries, gold in zip(said, golds, strict=True))


def tailoring_report(sets: Mapping[str, Sequence[DraftRationale]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Mean usefulness as examples, and length, of sets of rationales; `NAME_score` of each, and their table."""
    metrics, rows = {}, []
    for name, rationales in sets.items():
        score = fmean(r.share for r in rationales)
        metrics[f"{name}_score"] = score
        length = fmean(len(r.rationale) for r in rationales)
        rows.append([name, len({r.draft for r in rationales}), len(rationales), f"{score:.3f}", f"{length:.1f}"])
    headings = ["written", "questions", "rationales", "the student's accuracy with one as example", "characters"]
    return metrics, {"title": "Rationales as examples for the student", "headings": headings, "rows": rows}
