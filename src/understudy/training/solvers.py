"""Students of procedures that answer questions: their first training, their corpora, and what they answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from understudy.curation import Checker
from understudy.data.text import write_records
from understudy.generation import Completion, LocalSource, Prompt, Request
from understudy.training.pipeline import PipelineContext

WORLD_KEYS = frozenset({"digits", "size", "seed", "limit", "columns", "teacher_error", "systematic_error", "styles"})
"""Keys of `data` that choose its questions, and have done so where a procedure has written a corpus of its own."""
_LOADED = ("dtype", "device", "quantization", "trust_remote_code")
"""How a model is loaded. Its tokenizer may lie elsewhere until it is trained, which saves it beside the weights."""


def first_trained(context: PipelineContext, role: str, other: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    """The specification of a role's model; where it says `train`, after that training, as a run `first/ROLE` on the answers of
    the data.

    Args:
        other: keys of the recipe's `data` that differ in that training. keys: replace others of its recipe.
    """
    recipe = context.recipe
    spec = {k: v for k, v in recipe[role].items() if k != "train"}
    if "train" not in recipe[role]:
        return spec
    values = {
        "task": recipe["task"],
        "method": "sft",
        "data": other_data(recipe["data"], other),
        "seed": recipe["seed"],
    }
    run = context.train(f"first/{role}", {**values, "student": spec, "trainer": recipe[role]["train"], **keys})
    return student_of(run, spec)


def student_of(run: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The specification of the model that a run has trained from that of `spec`: it is loaded in the same way."""
    return {"model": str(run.folder / "student"), **{k: spec[k] for k in _LOADED if k in spec}}


def other_data(data: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the keys of `other`. If that names another set, what chooses questions of the first is left out."""
    moved = other.get("name", data["name"]) != data["name"]
    return {**{k: v for k, v in data.items() if not (moved and k in WORLD_KEYS)}, **other}


def write_corpus(folder: Path, solutions: Iterable[Mapping[str, Any]], splits: Any) -> None:
    """A corpus that a student trains on: questions with rationale and answer; the other splits are the data's own."""
    columns = ("question", "rationale", "answer", "level")
    parts = {"train": solutions, "validation": splits.validation, "test": splits.test}
    for name, records in parts.items():
        write_records(folder / f"{name}.jsonl", [{k: r[k] for k in columns if k in r} for r in records])


def corpus_run(
    recipe: Mapping[str, Any], student: Mapping[str, Any], folder: Path, checker: Checker, **keys: Any
) -> dict[str, Any]:
    """The recipe of a student's supervised training on a corpus. `keys` replace those of the recipe."""
    data = {k: v for k, v in recipe["data"].items() if k not in WORLD_KEYS}
    data |= {"name": str(folder), "answers": checker.kind, **keys.pop("data", {})}
    own = {k: recipe[k] for k in ("trainer", "seed", "reduction", "eval_split")}
    return {"task": "reasoning", "method": "sft", "data": data, "student": dict(student), **own, **keys}


def load_source(spec: Mapping[str, Any], name: str) -> LocalSource:
    """The model of a specification as a source. Its draws depend on `name` and its weights, and not on its folder."""
    loaded = LocalSource.load(spec["model"], **{k: spec[k] for k in ("tokenizer", *_LOADED) if k in spec})
    return LocalSource(loaded.model, loaded.tokenizer, name, batch=64)


@dataclass(frozen=True)
class Solver:
    """A student that is asked questions as it was trained to be.

    Args:
        source: the model. prompt: with the slot `question`. max_tokens: of an answer with its rationale.
    """

    source: LocalSource
    prompt: Prompt
    max_tokens: int

    @classmethod
    def load(cls, spec: Mapping[str, Any], data: Mapping[str, Any]) -> Self:
        """Of a model's specification, asked as `data` says."""
        return cls(load_source(spec, "student"), Prompt.load(data["prompt"]), int(data["max_new_tokens"]))

    def answers(
        self, context: PipelineContext, prompts: Sequence[str], name: str, draws: int = 1, temperature: float = 0.0
    ) -> list[list[Completion]]:
        """What it writes after each prompt, `[prompts][draws]`, through the request log `logs/NAME.jsonl`."""
        how: Any = {"max_tokens": self.max_tokens, "temperature": temperature}
        requests = [
            Request(text, f"{name}/{i}/{draw}", draw, **how) for i, text in enumerate(prompts) for draw in range(draws)
        ]
        said = context.ask_trained(self.source, requests, name)
        return [said[s : s + draws] for s in range(0, len(said), draws)]

    def right(
        self,
        context: PipelineContext,
        records: Sequence[Mapping[str, Any]],
        checker: Checker,
        name: str,
        draws: int = 1,
        temperature: float = 0.0,
    ) -> list[list[bool]]:
        """Which of its answers to each question end by themselves and are right, `[questions][draws]`."""
        prompts = [self.prompt.render(question=r["question"]) for r in records]
        said = self.answers(context, prompts, name, draws, temperature)
        pairs = zip(said, (checker.gold(r["answer"]) for r in records), strict=True)
        return [[solved(a, gold, checker) for a in tries] for tries, gold in pairs]


def solved(said: Completion, gold: str, checker: Checker) -> bool:
    """Whether a text ended by itself and its answer is `gold`."""
    return said.finish == "stop" and checker.correct(said.text, gold)
