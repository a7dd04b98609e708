"""11. Symbolic Knowledge Distillation: from General Language Models to Commonsense Models (2021).

heads h ~ teacher(few-shot prompt)      tails t ~ teacher(· | h, r), ten a relation
critic p(valid | h, r, t) from labels;  c: the smallest cutoff whose recall on validation labels is at most ρ
student: maximum likelihood on {(h, r, t): p > c}, which is min KL(teacher restricted to the accepted ‖ student)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from understudy.curation import (
    Funnel,
    above,
    binary_labels,
    cutoff_at_recall,
    cutoffs,
    first_occurrences,
    recall_curve,
    split_by_group,
)
from understudy.curation import triples as knowledge
from understudy.curation.triples import Triple, key
from understudy.data.knowledge import bracketed
from understudy.errors import InputError
from understudy.evaluation.corpus import corpus_report
from understudy.generation import LocalSource, Prompt, Request, limits_from, source_from
from understudy.models import is_new_causal_lm, load_tokenizer
from understudy.tasks import get as get_task
from understudy.training import Pipeline, PipelineContext
from understudy.training.critic import CriticOptions, Critics, fit_critics

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
    log: str | None = Field(None, description="Folder of the teacher's request log, to share it between runs.")

    @model_validator(mode="after")
    def _shares_sum(self) -> Self:
        if min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError(f"shares {self.shares} must be above 0 and sum to 1")
        return self

    def run(self, context: PipelineContext) -> dict[str, Any]:
        task: Any = get_task(context.recipe["task"])
        material = task.material(context.recipe)
        self._check(context, material)
        heads = context.once("heads", lambda: self._heads(context, material))
        written = context.once("tails", lambda: self._tails(context, material, heads["heads"]))
        triples: list[Triple] = written["triples"]
        found: dict[str, Any] = {"funnel": heads["funnel"] + written["funnel"]}
        if self._asks_critic:
            labels = context.once("labels", lambda: self._labels(context, material, triples))
            found["fits"] = context.once("critic", lambda: self._fit(context, material, labels))
            found["scores"] = context.once("scores", lambda: self._scores(context, material, triples, labels))
            found |= context.once("cutoff", lambda: self._cutoff(labels, found["scores"]))
            for triple, score in zip(triples, found["scores"]["corpus"], strict=True):
                triple["score"] = score
        kept = context.once("filter", lambda: self._filter(context, material, triples, found.get("cutoff")))
        found["funnel"] += kept["funnel"]
        self._write(context, material, triples, set(kept["kept"]))
        student = context.train("training", self._student(context, triples))
        answers = context.once("answers", lambda: self._answers(context, material, triples, student))
        good = context.once("judged", lambda: self._judged(context, material, triples, answers, found.get("cutoff")))
        report = corpus_report(
            triples, answers, good, found, context.recipe["eval_split"], known=material.is_valid is not None
        )
        cost = json.loads((student.folder / "evaluation.json").read_text())["cost"]
        return {"split": context.recipe["eval_split"], "cost": cost, **report, "notes": [*material.notes, _COST]}

    @property
    def _asks_critic(self) -> bool:
        return self.filter in ("critic", "random")

    def _check(self, context: PipelineContext, material: Any) -> None:
        """What can be known to fail before anything is written and paid for."""
        if self.filter == "oracle" and material.is_valid is None:
            raise InputError(
                "options.filter=oracle needs data whose truth is known (events_world): use critic or none."
            )
        if self._asks_critic and material.is_valid is None and material.labels is None:
            raise InputError(
                f"options.filter={self.filter} needs labels for the critic: set data.labels to a file of head, relation, "
                "tail and label. To get triples to label, run with options.filter=none first (to_label.jsonl), and set "
                "options.log to a folder in both runs, so that nothing is written twice."
            )
        if self._asks_critic and material.labels is not None:
            recall_curve(good := binary_labels([t["label"] for t in material.labels]), [0.0] * len(good))  # two classes
        relation = next(iter(material.relations.values()))
        knowledge.head_requests(Prompt.load(self.head_prompt), material.seeds, 1, 1, 0)
        knowledge.tail_requests(Prompt.load(self.tail_prompt), material.seeds[0], relation, 1, 0, "check")
        student = context.recipe["student"]
        if not is_new_causal_lm(student["model"]):
            load_tokenizer(student.get("tokenizer", student["model"]))

    # -- 1, 2: what the teacher writes ----------------------------------------------------------------------------

    def _ask(self, context: PipelineContext, material: Any, requests: Sequence[Request]) -> list[Any]:
        limits = limits_from(context.teacher) if material.source is None else {}
        source = material.source or source_from(context.teacher)
        return context.ask(source, requests, "teacher", Path(self.log) if self.log else None, **limits)

    def _heads(self, context: PipelineContext, material: Any) -> dict[str, Any]:
        how = {"top_p": self.head_top_p, "max_tokens": self.max_tokens, "log_probs": self.head_keep < 1}
        how |= {"presence_penalty": 0.5, "frequency_penalty": 0.5}
        item, seed, funnel = Prompt.load(self.head_prompt), context.recipe["seed"], Funnel()
        requests = knowledge.head_requests(item, material.seeds, self.head_samples, self.per_prompt, seed, **how)
        if self.head_keep < 1:
            self._check_log_probs(context, material, requests[:1])
        answers = self._ask(context, material, requests)
        heads = knowledge.sift_heads(answers, self.head_keep, self.per_token, self.shortest, funnel)
        if len(heads) < len(SPLITS):
            raise InputError(
                f"{len(heads)} of {len(requests)} written events are left and {len(SPLITS)} splits need one each "
                f"(dropped: {'; '.join(str(r['dropped']) for r in funnel.rows if r['dropped'])}). Ask for more "
                "(options.head_samples), or give another prompt or teacher."
            )
        return {"heads": heads, "funnel": funnel.rows}

    def _check_log_probs(self, context: PipelineContext, material: Any, first: Sequence[Request]) -> None:
        """Ask once before all, for not every server tells log-probabilities; the answer is in the log and not asked again."""
        says = "gives no log-probabilities"
        try:
            missing = self._ask(context, material, first)[0].log_prob is None
        except InputError as error:
            if "logprob" not in str(error).lower().replace("-", ""):
                raise
            missing, says = True, f"refuses log-probabilities ({error})"
        if missing:
            raise InputError(
                f"options.head_keep={self.head_keep} keeps the likeliest events, and teacher {context.recipe['teacher']['model']!r} {says}: "
                "set options.head_keep=1 to keep all, or have the server tell them."
            )

    def _tails(self, context: PipelineContext, material: Any, heads: list[str]) -> dict[str, Any]:
        """Triples, each with the split of its head."""
        item, seed, funnel = Prompt.load(self.tail_prompt), context.recipe["seed"], Funnel()
        requests: list[Request] = []
        asked = []
        for i, head in enumerate(heads):
            for name, relation in material.relations.items():
                how = {"top_p": self.tail_top_p, "max_tokens": self.max_tokens}
                place = f"tails/{i}/{name}"
                new, names = knowledge.tail_requests(item, head, relation, self.tail_samples, seed, place, **how)
                requests += new
                asked += [(head, name, names, r.id) for r in new]
        triples = knowledge.sift_tails(asked, self._ask(context, material, requests), funnel)
        parts = split_by_group(heads, dict(zip(SPLITS, self.shares, strict=True)), seed)
        split = {heads[i]: name for name, part in parts.items() for i in part}
        return {"triples": [{**t, "split": split[t["head"]]} for t in triples], "funnel": funnel.rows}

    # -- 3, 4: the critic and its cutoff --------------------------------------------------------------------------

    def _labels(self, context: PipelineContext, material: Any, triples: list[Triple]) -> dict[str, list[Triple]]:
        """Labelled triples of heads that no student is judged on, split by head: for the critic, for its cutoff, and
        for the official script's second cutoff."""
        seed, sizes = context.recipe["seed"], [self.labels, *[self.threshold_labels] * (1 + self.legacy_mean)]
        if material.labels is not None:
            held = {t["head"] for t in triples if t["split"] != "train"}
            pool = [t for t in material.labels if t["head"] not in held]
            pool = [pool[i] for i in first_occurrences(map(key, pool))]
            good = binary_labels([t["label"] for t in pool])
        else:
            pool = knowledge.draw(triples, "train", sum(sizes), seed, "labels")
            good = [int(material.is_valid(*key(t))) for t in pool]
        parts = dict(zip(SPLITS, [n / sum(sizes) for n in sizes], strict=False))
        chosen = split_by_group([t["head"] for t in pool], parts, seed)
        names = ("head", "relation", "tail")
        return {s: [{**{k: pool[i][k] for k in names}, "good": good[i]} for i in chosen[s]] for s in parts}

    def _fit(self, context: PipelineContext, material: Any, labels: dict[str, list[Triple]]) -> list[dict[str, Any]]:
        pairs = knowledge.text_pairs(labels, material.relations)
        good = {s: [t["good"] for t in part] for s, part in labels.items()}
        return fit_critics(
            self.critic, pairs, good, knowledge.naming, context.folder / "critic", context.recipe["seed"]
        )

    def _scores(
        self, context: PipelineContext, material: Any, triples: list[Triple], labels: dict[str, list[Triple]]
    ) -> dict[str, list[float]]:
        critics = Critics(self.critic, context.folder / "critic", knowledge.naming)
        pairs = knowledge.text_pairs({"corpus": triples, **labels}, material.relations)
        return {s: critics(part) for s, part in pairs.items()}

    def _cutoff(self, labels: dict[str, list[Triple]], scores: dict[str, list[float]]) -> dict[str, Any]:
        """The cutoff of the wanted recall, and those of the paper's grid for the report."""
        good = {s: [t["good"] for t in part] for s, part in labels.items()}
        found = cutoff_at_recall(good["validation"], scores["validation"], self.recall)
        value = found.value
        if self.legacy_mean:
            value = (value + cutoff_at_recall(good["test"], scores["test"], self.recall).value) / 2
        grid = cutoffs(good["validation"], scores["validation"], (0.5, 0.6, 0.7, 0.8, 0.9))
        return {"cutoff": value, "estimate": vars(found), "grid": [vars(c) for c in grid]}

    # -- 5: what stays, and who learns it -------------------------------------------------------------------------

    def _filter(
        self, context: PipelineContext, material: Any, triples: list[Triple], cutoff: float | None
    ) -> dict[str, Any]:
        kept = list(range(len(triples)))
        if self.filter == "oracle":
            kept = [i for i in kept if material.is_valid(*key(triples[i]))]
        elif cutoff is not None:
            kept = above([t["score"] for t in triples], cutoff)
        if self.filter == "random":  # as many of each split as the critic would keep
            numbers = {s: sum(triples[i]["split"] == s for i in kept) for s in SPLITS}
            seed = context.recipe["seed"]
            chosen = {key(t) for s, n in numbers.items() for t in knowledge.draw(triples, s, n, seed, "random")}
            kept = [i for i, t in enumerate(triples) if key(t) in chosen]
        stays, funnel = set(kept), Funnel()
        for split in SPLITS:
            mine = [i for i, t in enumerate(triples) if t["split"] == split]
            stay = [n for n, i in enumerate(mine) if i in stays]
            if not funnel.pick(f"kept for {split}", mine, stay, f"filter {self.filter}"):
                raise InputError(
                    f"The filter keeps none of {len(mine)} triples of the {split} split: raise options.recall, or write "
                    "more (options.head_samples)."
                )
        return {"kept": kept, "funnel": funnel.rows}

    def _write(self, context: PipelineContext, material: Any, triples: list[Triple], kept: set[int]) -> None:
        """The corpus as files: all triples with their provenance, the student's text, and what people could label."""
        for i, triple in enumerate(triples):
            triple["kept"] = i in kept
        knowledge.write_corpus(context.folder, triples, SPLITS)
        if material.is_valid is None and material.labels is None:
            some = knowledge.draw(
                triples, "train", self.labels + self.threshold_labels, context.recipe["seed"], "labels"
            )
            knowledge.write_to_label(context.folder / "to_label.jsonl", some)

    def _student(self, context: PipelineContext, triples: list[Triple]) -> dict[str, Any]:
        """The student's own run: language modelling on the kept triples. A new model gets a tokenizer of their words."""
        recipe, data = context.recipe, {"vocab_size": 1024, **context.recipe["data"]}
        if is_new_causal_lm(recipe["student"]["model"]) and "tokenizer" not in data:
            data["tokenizer"] = str(context.folder / "tokenizer")
            knowledge.save_tokenizer(context.folder / "tokenizer", triples, data["vocab_size"])
        passed = {k: data[k] for k in ("max_length", "vocab_size", "tokenizer") if k in data}
        passed |= {"name": str(context.folder / "corpus"), "pack": False}
        own = {k: recipe[k] for k in ("student", "trainer", "seed", "reduction", "eval_split")}
        return {"task": "language_modeling", "method": "sft", "data": passed, **own}

    def _answers(self, context: PipelineContext, material: Any, triples: list[Triple], student: Any) -> list[Triple]:
        """What the student says about held-out heads: one greedy tail and several samples for each question."""
        tokenizer = load_tokenizer(str(student.folder / "student"))
        source = LocalSource(student.student, tokenizer, "student", batch=64)
        heads = dict.fromkeys(t["head"] for t in triples if t["split"] == context.recipe["eval_split"])
        requests, asked = [], []
        for i, head in enumerate(heads):
            for relation in material.relations:
                for draw in range(1 + self.student_samples):
                    how = {"temperature": 0.0} if draw == 0 else {"top_p": self.student_top_p}
                    name = f"student/{i}/{relation}/{draw}"
                    prompt, most = bracketed(head, relation), self.max_tokens
                    requests.append(Request(prompt, name, draw, max_tokens=most, stop=(".", "\n"), **how))  # type: ignore[arg-type]
                    asked.append({"head": head, "relation": relation, "greedy": draw == 0})
        texts = [a.text for a in context.ask(source, requests, "student", concurrency=64)]
        return [{**a, "tail": knowledge.tidy(text)} for a, text in zip(asked, texts, strict=True)]

    def _judged(
        self,
        context: PipelineContext,
        material: Any,
        triples: list[Triple],
        answers: list[Triple],
        cutoff: float | None,
    ) -> dict[str, list[bool | None]]:
        """Whether triples and answers are good: by the known truth, else by the critic, else nobody knows."""
        if material.is_valid is not None:
            return {n: [material.is_valid(*key(t)) for t in x] for n, x in (("triples", triples), ("answers", answers))}
        if cutoff is None:
            return {"triples": [None] * len(triples), "answers": [None] * len(answers)}
        critics = Critics(self.critic, context.folder / "critic", knowledge.naming)
        scores = critics(knowledge.text_pairs({"answers": answers}, material.relations)["answers"])
        return {"triples": [t["score"] > cutoff for t in triples], "answers": [s > cutoff for s in scores]}
