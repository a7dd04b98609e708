"""What a tailored data set is worth to a student: its examples in context or as a step of training, and answers with examples
before them."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from understudy.curation import Checker, Funnel
from understudy.curation.drafts import DraftRationale, Probe
from understudy.curation.in_context import draw_shots, with_shots
from understudy.curation.item_response import fit_item_response, most_discriminating
from understudy.data.reasoning import completion
from understudy.errors import InputError
from understudy.evaluation.readings import Likelihood, StepReader
from understudy.generation import Completion, Request, RequestLog
from understudy.training.pipeline import PipelineContext
from understudy.training.solvers import Solver, solved

Records = Sequence[Mapping[str, Any]]
_SCORES = {
    "in_context": "the student's accuracy with one as example",
    "sft_step": "the probes' gain by a step on one (nats a token)",
}


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


def stepped(
    context: PipelineContext,
    solver: Solver,
    rationales: Sequence[DraftRationale],
    questions: Sequence[str],
    probes: Records,
    max_length: int,
    rate: float,
    funnel: Funnel,
) -> list[DraftRationale]:
    """Rationales with what a supervised step on each brings the probes: what their own solutions gain in log-probability, in
    nats a token. A step is made once, whoever wrote its example again, and is in the log `logs/sft_step.jsonl`.

    Args:
        questions: by their place, which rationales name. probes: with `prompt` and `completion`. max_length: in tokens.
        rate: η of the step.

    Raises:
        InputError: after a step the probes have no finite likelihood.
    """
    model, name = solver.source, f"{solver.source.name}, steps of {rate!r}"
    reader = StepReader(model.model, model.tokenizer, probes, max_length, rate)
    examples = [
        {"prompt": solver.prompt.render(question=questions[r.draft]), "completion": completion(r.rationale, r.answer)}
        for r in rationales
    ]
    with RequestLog(context.folder / "logs" / f"{context.prefix}sft_step.jsonl", name) as log:
        before, *after = (_read_once(reader, log, name, example, probes) for example in (None, *examples))
    found = []
    for r, likely in zip(rationales, after, strict=True):
        gains = tuple((b.log_prob - a.log_prob) / b.tokens for a, b in zip(before, likely, strict=True))
        found.append(r.model_copy(update={"id": "", "parents": (r.id,), "gains": gains}))
    helpful = sum(r.score > 0 for r in found)
    lost = Counter("makes them less so" for r in found if not r.score > 0)
    funnel.note("rationales that make the probes likelier by a step", len(found), helpful, lost)
    return found


def _read_once(
    reader: StepReader, log: RequestLog, source: str, example: Mapping[str, str] | None, probes: Records
) -> list[Likelihood]:
    """The likelihood of the probes after a step on `example`, from the log if it is there."""
    texts = [[source, example, p["prompt"], p["completion"]] for p in probes]
    keys = [hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest() for text in texts]
    known = [log.get(key) for key in keys]
    if None in known:
        found = _finite(reader, example)
        for i, (key, f) in enumerate(zip(keys, found, strict=True)):
            log.append(key, f"sft_step/{i}", Completion("", "stop", f.log_prob, 0, f.tokens))
        known = [log[key] for key in keys]
    return [Likelihood(float(c.log_prob or 0.0), c.tokens) for c in known if c is not None]


def _finite(reader: StepReader, example: Mapping[str, str] | None) -> list[Likelihood]:
    try:
        found = reader.read(example)
        if all(math.isfinite(f.log_prob) for f in found):
            return found
        problem = "a probe has probability 0."
    except InputError as error:  # logits that are not finite
        problem = str(error)
    made = f"After a step on {dict(example)!r}" if example is not None else "Before any step"
    raise InputError(f"{made} the student reads no probe: {problem} Lower options.step_rate ({reader.rate:g}).")


def few_shot_accuracy(
    context: PipelineContext, solver: Solver, pool: Records, records: Records, shots: int, checker: Checker, name: str
) -> float:
    """Greedy accuracy with examples of the pool before each question, drawn by its place."""
    prompts = [with_shots(solver.prompt, draw_shots(pool, shots, i), r["question"]) for i, r in enumerate(records)]
    said = solver.answers(context, prompts, name)
    golds = (checker.gold(r["answer"]) for r in records)
    return fmean(solved(tries[0], gold, checker) for tries, gold in zip(said, golds, strict=True))


def tailoring_report(
    sets: Mapping[str, Sequence[DraftRationale]], scorer: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """Mean score, and length, of sets of rationales; `NAME_score` of each, and their table.

    Args:
        scorer: what made the scores, `in_context` or `sft_step`.
    """
    metrics, rows = {}, []
    for name, rationales in sets.items():
        mean = fmean(r.score for r in rationales)
        metrics[f"{name}_score"] = mean
        length = fmean(len(r.rationale) for r in rationales)
        rows.append([name, len({r.draft for r in rationales}), len(rationales), f"{mean:.3f}", f"{length:.1f}"])
    headings = ["written", "questions", "rationales", _SCORES[scorer], "characters"]
    return metrics, {"title": "Rationales as examples for the student", "headings": headings, "rows": rows}
