"""Rounds of a policy that learns from its own text: generate and score, build pairs, train, refresh the anchor, repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from understudy.data.text import write_records
from understudy.errors import InputError
from understudy.models import is_new_causal_lm
from understudy.training.pipeline import PipelineContext

HELD_OUT = 10
"""Every so-many-th pair of a round is held out to evaluate its training."""
_LOADED = ("dtype", "device", "trust_remote_code")
_DATA = ("max_length", "packing", "vocab_size", "tokenizer")


@dataclass(frozen=True)
class PreferenceRounds:
    """Trains the recipe's student in rounds, each a run of its own from the student of the one before.

    Args:
        context: of the pipeline. Its recipe's `trainer` covers all rounds: each takes a share of `max_steps`.
        rounds: at most so many. options: of the method.
        anchor: the reference model of a round: the student before the first round, or before this one.
        method: that learns from the records, with an option `reference`.
    """

    context: PipelineContext
    rounds: int
    options: Mapping[str, Any] = field(default_factory=dict)
    anchor: Literal["start", "round"] = "start"
    method: str = "dpo"

    def check(self) -> None:
        """Refuse recipes that cannot be carried out.

        Raises:
            InputError: fewer steps than rounds, or adapters over several rounds.
        """
        recipe, steps = self.context.recipe, self._steps
        if steps < self.rounds:
            raise InputError(
                f"trainer.max_steps is {steps} and options.rounds {self.rounds}: give each at least one step."
            )
        student = recipe["student"]
        if student.get("peft") and (self.rounds > 1 or student.get("train") is not None):
            raise InputError(
                "student.peft is for one round of a trained model: set options.rounds=1 without student.train, or train all weights."
            )

    def start(self) -> str:
        """The model that the first round begins with: the recipe's student, after supervised training on the task's labels where
        it is new or has `student.train` (otherwise as the recipe's `trainer` says)."""
        recipe = self.context.recipe
        student = dict(recipe["student"])
        trainer = student.pop("train", None)
        if trainer is None and not is_new_causal_lm(student["model"]):
            return str(student["model"])
        shared = {k: recipe[k] for k in ("task", "data", "seed", "eval_split")}
        values = {**shared, "method": "sft", "student": student, "trainer": trainer or recipe["trainer"]}
        return str(self.context.train("start", values).folder / "student")

    def run(self, start: str, collect: Callable[[PipelineContext, int, str], Sequence[Mapping[str, Any]]]) -> list[str]:
        """Carry out the rounds.

        Args:
            start: the policy of the first round.
            collect: from a round's context, its number and the present policy to preference records; what it asks models for
                resumes by itself.

        Returns:
            The policies: `start`, and that after each round. The rounds end early once there are no pairs.

        Raises:
            InputError: no pairs in the first round.
        """
        policies = [start]
        for number in range(self.rounds):
            inner = self.context.round(number)
            records = collect(inner, number, policies[-1])
            if number and not records:
                break
            self.write(number, records)
            policies.append(str(inner.train("training", self._recipe(number, policies)).folder / "student"))
        return policies

    @property
    def _steps(self) -> int:
        return int(self.context.recipe["trainer"].get("max_steps", 0))

    def write(self, number: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the round's corpus; a round of few records is evaluated on those that it trains on.

        Raises:
            InputError: there are none.
        """
        if not records:
            raise InputError(
                "The first round has no pair: where all answers have one value nothing is better. Ask for more candidates, a "
                "higher temperature, or harder questions."
            )
        corpus = self.context.folder / f"round-{number}" / "corpus"
        held = records[::HELD_OUT] if len(records) >= 2 * HELD_OUT else records
        train = [r for i, r in enumerate(records) if i % HELD_OUT] if len(records) >= 2 * HELD_OUT else records
        for split, part in (("train", train), ("validation", held), ("test", held)):
            write_records(corpus / f"{split}.jsonl", part)

    def _recipe(self, number: int, policies: Sequence[str]) -> dict[str, Any]:
        """A round of training, from the last policy."""
        recipe, model = self.context.recipe, policies[-1]
        student, data = recipe["student"], recipe["data"]
        loaded = {k: student[k] for k in _LOADED if k in student}
        own = {k: v for k, v in student.items() if k != "train"} if model == student["model"] else loaded
        anchored = self.anchor == "start" and number > 0
        return {
            "task": "preferences",
            "method": self.method,
            "options": {**self.options, "reference": "teacher" if anchored else "start"},
            "data": {
                **{k: data[k] for k in _DATA if k in data},
                "name": str(self.context.folder / f"round-{number}" / "corpus"),
            },
            "student": {**own, "model": model},
            "teacher": {**loaded, "model": policies[0]} if anchored else None,
            "trainer": {
                **recipe["trainer"],
                "max_steps": (number + 1) * self._steps // self.rounds - number * self._steps // self.rounds,
            },
            "seed": (recipe["seed"] + 1_000_003 * number) % 2**32,
            "eval_split": recipe["eval_split"],
        }
