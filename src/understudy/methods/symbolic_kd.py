"""11. Symbolic Knowledge Distillation: from General Language Models to Commonsense Models (2021).

heads h ~ teacher(few-shot prompt)      tails t ~ teacher(· | h, r), ten a relation
critic p(valid | h, r, t) from labels;  c: the smallest cutoff whose recall on validation labels is at most ρ
student: maximum likelihood on {(h, r, t): p > c}, which is min KL(teacher restricted to the accepted ‖ student)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from understudy.curation import Funnel, above, cutoff_at, cutoff_at_recall, cutoffs, split_by_group
from understudy.curation import triples as knowledge
from understudy.curation.triples import Answer, Event, LabelledTriple, Triple
from understudy.errors import InputError
from understudy.evaluation.corpus import corpus_report
from understudy.generation import LocalSource, Prompt
from understudy.models import is_new_causal_lm, load_tokenizer
from understudy.tasks import get as get_task
from understudy.training import Pipeline, PipelineContext
from understudy.training.critic import CriticFit, CriticOptions, Critics, fit_critics

T = TypeVar("T", bound=Triple)
SPLITS = ("train", "validation", "test")
_COST = "Cost is that of the student's training; what the teacher wrote is in the request log, with its tokens."


class SymbolicKD(Pipeline):
    """A teacher writes a knowledge graph as text, a critic filters it, a small model learns what is left."""

    name = "symbolic-kd"
    paper = 11
    kinds = frozenset({"generation"})
    cost = (
        "head_samples completions, then heads × relations × tail_samples; one pass of the critic a triple and view; "
        "the student's training"
    )
    page: ClassVar[dict[str, str]] = {
        "when": "One narrow ability of a black-box model is wanted as a data set and as a small model, with a dial between "
        "precision and size (`recall`) and text that can be read in between.",
        "not": "Without a few hundred labels for the critic: `filter=none` first writes `to_label.jsonl`. Filtering lowers "
        "diversity: read the unique counts. A critic of one mix of relations does not carry over to another.",
        "deviations": "The cutoff comes from validation labels alone; `legacy_mean` averages it with that of test labels, as "
        "the official script does. Tails keep what a critic of other names sees: names are mapped back as whole words, and "
        "empty completions are skipped. The critic's output layer is the loaded model's own (paper: a dense layer of 512). "
        "Prompts and examples are our own words. The official repository holds no student training: its epochs and "
        "optimiser are reconstructed, as is the student's text.",
    }

    head_samples: int = Field(1000, ge=1, description="Completions that are asked for events.")
    per_prompt: int = Field(100, ge=1, description="Of these, from one draw of ten seed events.")
    head_top_p: float = Field(0.9, gt=0, le=1, description="Nucleus of the events' sampling.")
    head_keep: float = Field(0.8, gt=0, le=1, description="Share of distinct events kept by log-probability.")
    per_token: bool = Field(
        False, description="Log-probability as a mean a token; the official sum prefers short events."
    )
    shortest: int = Field(7, ge=1, description="Least characters of an event.")
    tail_samples: int = Field(10, ge=1, description="Completions for each event and relation.")
    tail_top_p: float = Field(0.5, gt=0, le=1, description="Nucleus of the tails' sampling.")
    max_tokens: int = Field(12, ge=1, description="Of an event and of a tail.")
    head_prompt: str = Field("event", description="File of one numbered example, with slots `number` and `event`.")
    tail_prompt: str = Field("inference", description="File of one, with `number`, `head`, `ask` and `tail`.")
    shares: tuple[float, float, float] = Field((0.8, 0.1, 0.1), description="Of events: train, validation, test.")
    filter: Literal["critic", "none", "random", "oracle"] = Field(
        "critic", description="`random` keeps as many as the critic would, `oracle` what is true in an embedded world."
    )
    recall: float = Field(0.5, gt=0, le=1, description="ρ. The paper's critic-high is 0.5, critic-low 0.8.")
    legacy_mean: bool = Field(False, description="Average the cutoff with that of test labels. It leaks test labels.")
    labels: int = Field(1500, ge=2, description="Labels for the critic, where an oracle gives them; else their share.")
    threshold_labels: int = Field(400, ge=2, description="Labels for the cutoff.")
    critic: CriticOptions = Field(
        CriticOptions(), description="Its model, fit, members and views; see `understudy.training.critic`."
    )
    student_samples: int = Field(10, ge=1, description="Tails the trained student writes for each held-out question.")
    student_top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of the student's sampling when it is judged.")

    @model_validator(mode="after")
    def _shares_sum(self) -> Self:
        if min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError(f"shares {self.shares} must be above 0 and sum to 1")
        return self

    def run(self, context: PipelineContext) -> dict[str, Any]:
        task: Any = get_task(context.recipe["task"])
        material = self.check(context)
        events = context.stage("events", Event, partial(self._events, context, material))
        triples = context.stage("triples", Triple, partial(self._triples, context, material, events))
        found: dict[str, Any] = {}
        if self._asks_critic:
            labels = context.stage("labels", LabelledTriple, partial(self._labels, context, material, triples))
            found["fits"] = context.stage("critic", CriticFit, lambda _: self._fit(context, material, labels))
            labels = context.stage("label_scores", LabelledTriple, lambda _: self._scored(context, material, labels))
            triples = context.stage("scores", Triple, lambda _: self._scored(context, material, triples))
            found |= self._cutoff(labels)
        triples = context.stage(
            "kept", Triple, partial(self._filtered, context, material, triples, found.get("cutoff"))
        )
        corpus, tokenizer = context.folder / "corpus", context.folder / "tokenizer"
        knowledge.write_corpus(corpus, triples, SPLITS)
        knowledge.save_tokenizer(tokenizer, triples, task.vocabulary(context.recipe))
        student = context.train("training", task.student_recipe(context.recipe, corpus, tokenizer))
        answers = context.stage("answers", Answer, lambda _: self._answers(context, material, triples, student))
        known, split = material.is_valid is not None, context.recipe["eval_split"]
        good = {n: self._judged(context, material, x, found) for n, x in (("triples", triples), ("answers", answers))}
        report = corpus_report(triples, answers, good, found, split, known=known)
        cost = json.loads((student.folder / "evaluation.json").read_text())["cost"]
        return {"split": split, "cost": cost, **report, "notes": [*material.notes, _COST]}

    @property
    def _asks_critic(self) -> bool:
        return self.filter in ("critic", "random")

    def check(self, context: PipelineContext) -> Any:
        """Refuse a recipe that cannot be carried out; returns its material."""
        task: Any = get_task(context.recipe["task"])
        material = task.material(context.recipe)
        material.check(self.filter, self._asks_critic)
        relation = next(iter(material.relations.values()))
        knowledge.head_requests(Prompt.load(self.head_prompt), material.seeds, 1, 1, 0)
        knowledge.tail_requests(Prompt.load(self.tail_prompt), material.seeds[0], relation, 1, 0, "check")
        student = context.recipe["student"]
        if not is_new_causal_lm(student["model"]):
            load_tokenizer(student.get("tokenizer", student["model"]))
        return material

    # -- 1, 2: what the teacher writes ----------------------------------------------------------------------------

    def _events(self, context: PipelineContext, material: Any, funnel: Funnel) -> list[Event]:
        how = {"top_p": self.head_top_p, "max_tokens": self.max_tokens, "log_probs": self.head_keep < 1}
        how |= {"presence_penalty": 0.5, "frequency_penalty": 0.5}
        item, seed = Prompt.load(self.head_prompt), context.recipe["seed"]
        requests = knowledge.head_requests(item, material.seeds, self.head_samples, self.per_prompt, seed, **how)
        if self.head_keep < 1:
            context.check_log_probs(
                "teacher",
                requests[0],
                f"options.head_keep={self.head_keep} keeps the likeliest events",
                "set options.head_keep=1 to keep all",
            )
        answers = context.ask("teacher", requests)
        events = knowledge.sift_heads(requests, answers, self.head_keep, self.per_token, self.shortest, funnel)
        if len(events) < len(SPLITS):
            raise InputError(
                f"{len(events)} of {len(requests)} written events are left and {len(SPLITS)} splits need one each "
                f"(dropped: {'; '.join(str(r['dropped']) for r in funnel.rows if r['dropped'])}). Ask for more "
                "(options.head_samples), or give another prompt or teacher."
            )
        return events

    def _triples(
        self, context: PipelineContext, material: Any, events: Sequence[Event], funnel: Funnel
    ) -> list[Triple]:
        """Each with the split of its head."""
        item, seed = Prompt.load(self.tail_prompt), context.recipe["seed"]
        how = {"top_p": self.tail_top_p, "max_tokens": self.max_tokens}
        requests, asked = [], []
        for i, event in enumerate(events):
            for name, relation in material.relations.items():
                place = f"tails/{i}/{name}"
                new, names = knowledge.tail_requests(item, event.text, relation, self.tail_samples, seed, place, **how)
                requests += new
                asked += [(event, name, names, r.id) for r in new]
        triples = knowledge.sift_tails(asked, context.ask("teacher", requests), funnel)
        parts = split_by_group([e.text for e in events], dict(zip(SPLITS, self.shares, strict=True)), seed)
        split = {events[i].text: name for name, part in parts.items() for i in part}
        return [t.model_copy(update={"split": split[t.head]}) for t in triples]

    # -- 3, 4: the critic and its cutoff --------------------------------------------------------------------------

    def _labels(
        self, context: PipelineContext, material: Any, triples: Sequence[Triple], funnel: Funnel
    ) -> list[LabelledTriple]:
        """Labelled triples of heads that no student is judged on, split by head: for the critic, for its cutoff, and
        for the official script's second cutoff."""
        seed, sizes = context.recipe["seed"], [self.labels, *[self.threshold_labels] * (1 + self.legacy_mean)]
        if material.labels is not None:
            pool = knowledge.from_files(material.labels, triples)
        else:
            pool = knowledge.from_truth(knowledge.draw(triples, "train", sum(sizes), seed, "labels"), material.is_valid)
        return knowledge.label_splits(pool, dict(zip(SPLITS, sizes, strict=False)), seed)

    def _fit(self, context: PipelineContext, material: Any, labels: Sequence[LabelledTriple]) -> list[CriticFit]:
        parts = {s: [t for t in labels if t.split == s] for s in SPLITS}
        pairs = {s: knowledge.text_pairs(part, material.relations) for s, part in parts.items()}
        good = {s: [t.good for t in part] for s, part in parts.items()}
        return fit_critics(
            self.critic, pairs, good, knowledge.naming, context.folder / "critic", context.recipe["seed"]
        )

    def _scored(self, context: PipelineContext, material: Any, triples: Sequence[T]) -> list[T]:
        critics = Critics(self.critic, context.folder / "critic", knowledge.naming)
        scores = critics(knowledge.text_pairs(triples, material.relations))
        return [t.model_copy(update={"score": score}) for t, score in zip(triples, scores, strict=True)]

    def _cutoff(self, labels: Sequence[LabelledTriple]) -> dict[str, Any]:
        """The cutoff of the wanted recall, and those of the paper's grid for the report."""
        good = {s: [t.good for t in labels if t.split == s] for s in SPLITS}
        scores = {s: [t.score for t in labels if t.split == s and t.score is not None] for s in SPLITS}
        value = cutoff_at_recall(good["validation"], scores["validation"], self.recall).value
        if self.legacy_mean:
            value = (value + cutoff_at_recall(good["test"], scores["test"], self.recall).value) / 2
        found = cutoff_at(good["validation"], scores["validation"], value)
        grid = cutoffs(good["validation"], scores["validation"], (0.5, 0.6, 0.7, 0.8, 0.9))
        return {"cutoff": value, "estimate": vars(found), "grid": [vars(c) for c in grid]}

    # -- 5: what stays, and who learns it -------------------------------------------------------------------------

    def _filtered(
        self, context: PipelineContext, material: Any, triples: Sequence[Triple], cutoff: float | None, funnel: Funnel
    ) -> list[Triple]:
        seed, kept = context.recipe["seed"], list(triples)
        if self.filter == "oracle":
            kept = [t for t in triples if material.is_valid(*t.key)]
        elif cutoff is not None:
            kept = [triples[i] for i in above([t.score for t in triples if t.score is not None], cutoff)]
        stay = {t.id for t in kept}
        if self.filter == "random":  # as many of each split as the critic would keep
            stay = knowledge.same_number(triples, kept, SPLITS, seed)
        if material.is_valid is None and material.labels is None:
            some = knowledge.draw(triples, "train", self.labels + self.threshold_labels, seed, "labels")
            knowledge.write_to_label(context.folder / "to_label.jsonl", some)
        return knowledge.sift_triples(triples, lambda t: t.id in stay, SPLITS, f"filter {self.filter}", funnel)

    def _answers(
        self, context: PipelineContext, material: Any, triples: Sequence[Triple], student: Any
    ) -> list[Answer]:
        """What the student says about held-out heads: one greedy tail and several samples for each question."""
        source = LocalSource(student.student, load_tokenizer(str(student.folder / "student")), "student", batch=64)
        heads = dict.fromkeys(t.head for t in triples if t.split == context.recipe["eval_split"])
        asked = knowledge.student_requests(
            heads, material.relations, self.student_samples, self.max_tokens, self.student_top_p
        )
        texts = [a.text for a in context.ask_trained(source, [request for request, _ in asked], "student")]
        return [a.model_copy(update={"tail": knowledge.tidy(t)}) for (_, a), t in zip(asked, texts, strict=True)]

    def _judged(
        self, context: PipelineContext, material: Any, triples: Sequence[Triple], found: Mapping[str, Any]
    ) -> list[bool | None]:
        """Whether triples are good: by the known truth, else by the critic, else nobody knows."""
        if material.is_valid is not None:
            return [material.is_valid(*t.key) for t in triples]
        if "cutoff" not in found:
            return [None] * len(triples)
        scored = triples if triples and triples[0].score is not None else self._scored(context, material, triples)
        return [t.score is not None and t.score > found["cutoff"] for t in scored]
