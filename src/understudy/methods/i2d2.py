"""15. I2D2: Inductive Knowledge Distillation with NeuroLogic and Self-Imitation (2022).

prompts    x = quantifier + concept + relational phrase, the likeliest under p₀
statements y = argmax log p_r(y | x) + λ Σ_i C_i(y): few function words, no connectives, neither concept nor phrase again
critic     c(x, y) from labels, fitted once;   kept: c ≥ threshold
imitation  p_{r+1}: maximum likelihood of p_r on its own kept statements;   r = 0 … rounds − 1
corpus     what is kept of all p_r, each statement once
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from understudy.curation import Funnel, at_least, cutoff_at_precision, generics, split_by_group
from understudy.curation import triples as knowledge
from understudy.curation.generics import Form, Statement, StatementPrompt
from understudy.curation.triples import LabelledTriple
from understudy.data.knowledge import generic_words
from understudy.errors import InputError
from understudy.evaluation.statements import Round, statement_report
from understudy.generation import LocalSource, Prompt, Request
from understudy.generation.constrained import BeamSettings
from understudy.generation.constrained_source import (
    ConstrainedRequest,
    ConstrainedSource,
    FoundText,
    found_texts,
    text_log_probs,
)
from understudy.models import is_new_causal_lm
from understudy.tasks import get as get_task
from understudy.training import Pipeline, PipelineContext, Requirements
from understudy.training.critic import CriticFit, CriticOptions, Critics, fit_critics

HELD = "test"
_STOP = (".", "\n")


def _as_written(view: int) -> Any:
    """The one wording of a statement for the critic."""
    return lambda position, pair: pair


class I2D2(Pipeline):
    """A small model writes statements under constraints, a critic filters them, and the model learns what is left."""

    name = "i2d2"
    paper = 15
    kinds = frozenset({"statements"})
    teacher_writes = False
    cost = "a beam search a prompt and round, K rows wide; one pass of the critic a statement; the model's training a round"
    page: ClassVar[dict[str, str]] = {
        "when": "A corpus of controlled form and high precision without a large teacher: what is valid can be said by words "
        "that must and must not occur, and by a critic that is trained from a few hundred labels.",
        "not": "Without labels for the critic: `filter=none` first writes `to_label.jsonl`. The critic's bias grows with every "
        "round. Decoding is the cost. Tight constraints hurt abstract concepts.",
        "deviations": "Concepts and phrases come from a file; the model proposes no related ones. Texts end at a period. A "
        "constraint is about the generated tokens alone, and the score within a group is divided by their number (official: "
        "prompt included). n-grams of the prompt may be repeated. The critic is the loaded classifier, or a small network. "
        "Statements of concepts whose labels the critic has seen are kept but not counted as accurate.",
    }

    rounds: int = Field(2, ge=0, description="Of self-imitation.")
    decoding: Literal["constrained", "beam", "sample"] = Field(
        "constrained", description="Controls: `beam` search without constraints, or plain `sample`s."
    )
    prompts: int = Field(10, ge=1, description="Of a concept, the likeliest.")
    texts: int = Field(10, ge=1, description="Statements that are taken from each prompt.")
    quantifiers: tuple[str, ...] | None = Field(None, description="Openings; the built-in ones, none in a world.")
    prompt: str = Field("generic", description="File with the slots `quantifier`, `concept` and `relation`.")
    form: Form = Field(Form(), description="Which words are counted; see `understudy.curation.generics.Form`.")
    num_beams: int = Field(20, ge=1, description="K.")
    max_tokens: int = Field(32, ge=1, description="Of a completion.")
    min_tokens: int = Field(1, ge=0, description="Before a completion may end. Official script: 5.")
    length_penalty: float = Field(0.2, ge=0, description="Power of the length that log-probabilities are divided by.")
    no_repeat_ngram_size: int = Field(3, ge=0, description="No n tokens twice; 0 allows all.")
    prune: int | None = Field(None, ge=1, description="α. Candidates below this rank are dropped.")
    tolerance: int = Field(2, ge=0, description="β. So many clauses fewer than the best candidate's are tolerated.")
    filter: Literal["critic", "none", "oracle"] = Field(
        "critic", description="`oracle` keeps what is true in an embedded world."
    )
    threshold: float = Field(0.5, ge=0, le=1, description="Least probability of a kept statement.")
    precision: float | None = Field(
        None, gt=0, le=1, description="Instead: the least threshold with this precision on validation labels."
    )
    labels: int = Field(1000, ge=2, description="Labels for the critic, where an oracle gives them; else their share.")
    threshold_labels: int = Field(300, ge=2, description="Labels for early stopping and for `precision`.")
    critic: CriticOptions = Field(CriticOptions(views=1), description="Its fit; see `understudy.training.critic`.")

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="none")

    def run(self, context: PipelineContext) -> dict[str, Any]:
        task: Any = get_task(context.recipe["task"])
        material = self.check(context)
        model = context.recipe["student"]["model"]
        if is_new_causal_lm(model):
            start = task.start_recipe(context.recipe, material, context.folder / "world")
            model = str(context.train("start", start).folder / "student")
        parts = split_by_group(material.seeds, {"train": 0.6, HELD: 0.4}, context.recipe["seed"])
        split = {material.seeds[i]: name for name, part in parts.items() for i in part}
        prompts = context.stage("prompts", StatementPrompt, partial(self._prompts, context, material, model))
        rounds: list[Round] = []
        found: dict[str, Any] = {}
        cost: dict[str, Any] = {}
        for number in range(self.rounds + 1):
            turn = context.round(number)
            written = turn.stage("written", Statement, partial(self._written, turn, model, prompts, split))
            distinct = turn.stage("distinct", Statement, partial(generics.well_formed, written))
            if self.filter == "critic":
                found = found or self._critic(context, material, distinct)
                distinct = turn.stage("scores", Statement, partial(self._scored, context, material, distinct))
            kept = turn.stage("kept", Statement, partial(self._kept, context, material, distinct, found, number))
            rounds.append(Round(written, distinct, kept))
            if number < self.rounds:
                corpus = context.folder / turn.prefix / "corpus"
                generics.write_statements(corpus, kept)
                trained = turn.train("training", task.student_recipe(context.recipe, model, corpus)).folder
                model, inner = str(trained / "student"), json.loads((trained / "evaluation.json").read_text())
                cost = {"cost": inner["cost"]}
        final = list({s.key: s for one in reversed(rounds) for s in reversed(one.kept)}.values())[::-1]
        generics.write_statements(context.folder / "corpus", final)
        report = statement_report(rounds, final, material.is_valid, HELD, found)
        return {"split": HELD, **cost, **report, "notes": material.notes}

    def check(self, context: PipelineContext) -> Any:
        """Refuse a recipe that cannot be carried out; returns its material."""
        task: Any = get_task(context.recipe["task"])
        material = task.material(context.recipe)
        if self.log is not None:
            raise InputError("options.log shares what other models write, and here the run's own does: leave it out.")
        material.check(self.filter, self.filter == "critic")
        generics.statement_prompts(Prompt.load(self.prompt), material.seeds[:1], list(material.relations)[:1], [""])
        return material

    # -- 1: prompts, the likeliest under the model before self-imitation -------------------------------------------

    def _prompts(self, context: PipelineContext, material: Any, model: str, funnel: Funnel) -> list[StatementPrompt]:
        own = ("",) if material.world is not None else generic_words()["quantifiers"]
        begins = own if self.quantifiers is None else self.quantifiers
        every = generics.statement_prompts(Prompt.load(self.prompt), material.seeds, list(material.relations), begins)
        scores = text_log_probs(*_load(context, model), [p.text for p in every])
        return generics.likeliest_prompts(every, scores, self.prompts, funnel)

    # -- 2: what the model writes -----------------------------------------------------------------------------------

    def _written(
        self,
        context: PipelineContext,
        model: str,
        prompts: Sequence[StatementPrompt],
        split: Mapping[str, str],
        _: Funnel,
    ) -> list[Statement]:
        lm, tokenizer = _load(context, model)
        plain = self.decoding == "sample"
        source = (LocalSource if plain else ConstrainedSource)(lm, tokenizer, "model", batch=64 if plain else 16)
        asked = [(p, r) for p in prompts for r in self._requests(p)]
        answers = context.ask_trained(source, [r for _, r in asked], "statements")
        texts = [
            [FoundText(a.text, a.log_prob or 0.0, a.tokens, a.finish == "stop")] if plain else found_texts(a)
            for a in answers
        ]
        return generics.statements([(p, r.id) for p, r in asked], texts, split, self.form)

    def _requests(self, prompt: StatementPrompt) -> list[Request]:
        """One search a prompt, or as many samples as it would give."""
        if self.decoding == "sample":
            how: dict[str, Any] = {"max_tokens": self.max_tokens, "stop": _STOP}
            return [Request(prompt.text, f"{prompt.id}/{draw}", draw, **how) for draw in range(self.texts)]
        limits = self.form.limits(prompt) if self.decoding == "constrained" else ()
        names = {"num_beams", "length_penalty", "no_repeat_ngram_size", "prune", "tolerance"}
        search = BeamSettings(min_new_tokens=self.min_tokens, **self.model_dump(include=names))
        how = {"max_tokens": self.max_tokens, "stop": _STOP, "limits": limits, "texts": self.texts}
        return [ConstrainedRequest(prompt.text, prompt.id, search=search, **how)]

    # -- 3: the critic, fitted once ---------------------------------------------------------------------------------

    def _critic(self, context: PipelineContext, material: Any, statements: Sequence[Statement]) -> dict[str, Any]:
        """Labels of statements of the first model, the critic's fit, and its threshold."""
        seed, sizes = context.recipe["seed"], {"train": self.labels, "validation": self.threshold_labels}

        def labelled(_: Funnel) -> list[LabelledTriple]:
            if material.labels is not None:
                pool = knowledge.from_files(material.labels, statements)
            else:
                some = knowledge.draw(statements, "train", sum(sizes.values()), seed, "labels")
                pool = knowledge.from_truth(some, material.is_valid)
            return knowledge.label_splits(pool, sizes, seed)

        labels = context.stage("labels", LabelledTriple, labelled)
        parts = {s: [t for t in labels if t.split == s] for s in sizes}
        pairs = {s: knowledge.text_pairs(part, material.relations) for s, part in parts.items()}
        good = {s: [t.good for t in part] for s, part in parts.items()}
        folder = context.folder / "critic"
        fit = lambda _: fit_critics(self.critic, pairs, good, _as_written, folder, seed)  # noqa: E731
        fits = context.stage("critic", CriticFit, fit)
        cutoff = self.threshold
        if self.precision is not None:
            scores = Critics(self.critic, folder, _as_written)(pairs["validation"])
            cutoff = cutoff_at_precision(good["validation"], scores, self.precision).value
        return {"fits": fits, "cutoff": cutoff}

    def _scored(
        self, context: PipelineContext, material: Any, statements: Sequence[Statement], _: Funnel
    ) -> list[Statement]:
        critics = Critics(self.critic, context.folder / "critic", _as_written)
        scores = critics(knowledge.text_pairs(statements, material.relations))
        return [s.model_copy(update={"score": score}) for s, score in zip(statements, scores, strict=True)]

    # -- 4: what is kept --------------------------------------------------------------------------------------------

    def _kept(
        self,
        context: PipelineContext,
        material: Any,
        statements: Sequence[Statement],
        found: Mapping[str, Any],
        number: int,
        funnel: Funnel,
    ) -> list[Statement]:
        chosen = list(range(len(statements)))
        if self.filter == "oracle":
            chosen = [i for i in chosen if material.is_valid(*statements[i].key)]
        elif self.filter == "critic":
            chosen = at_least([s.score for s in statements if s.score is not None], found["cutoff"])
        kept = funnel.pick("kept", statements, chosen, f"filter {self.filter}")
        if not kept:
            raise InputError(
                f"None of {len(statements)} well-formed statements of round {number} is kept (filter {self.filter}), and "
                "nothing can be learned from none: lower options.threshold, loosen the constraints, or label more."
            )
        if self.filter == "none" and number == 0:
            size = self.labels + self.threshold_labels
            some = knowledge.draw(statements, "train", size, context.recipe["seed"], "labels")
            knowledge.write_to_label(context.folder / "to_label.jsonl", some)
        return kept


def _load(context: PipelineContext, model: str) -> tuple[Any, Any]:
    """A causal LM, as the recipe has its student, and its tokenizer."""
    spec = context.models["student"]
    source = LocalSource.load(model, dtype=spec.dtype, device=spec.device, trust_remote_code=spec.trust_remote_code)
    return source.model, source.tokenizer
