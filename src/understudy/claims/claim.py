"""What a claim is made of: arms, checks, and the settings that it is tried in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from understudy.data import find
from understudy.errors import InputError, nearest
from understudy.runs.recipe import Recipe, make

Overrides = Mapping[str, Any]

EMBEDDED = "embedded"
_TUNING_SEED = 1000


@dataclass(frozen=True)
class Arm:
    """One side of an experiment: a method with fixed options, the candidates to tune over, and own recipe keys, if any."""

    method: str
    options: Overrides
    candidates: Sequence[Overrides]
    recipe: Overrides = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """`arm` is better than `other` by more than `threshold` (negative: worse by less than that).

    With `other_metric` and `factor` it is compared with `factor · other_metric` of `other`, which may be itself: with
    what its teacher reaches, or with 0 by a factor of 0.
    """

    arm: str
    other: str
    threshold: float
    metric: str
    higher_is_better: bool
    says: str
    other_metric: str | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Setting:
    """Other data that a claim is tried on. What is not given is the claim's own.

    Args:
        recipe: all that the arms share, in place of the claim's. needs: the data and models of it, as `UNDERSTUDY_DATA`
            holds them. statement, arms, checks, tuned_on, caveat: as of a `Claim`.
    """

    recipe: Overrides
    needs: Sequence[str]
    statement: str | None = None
    arms: Mapping[str, Arm] | None = None
    checks: Sequence[Check] | None = None
    tuned_on: tuple[str, bool] | None = None
    caveat: str = ""


@dataclass(frozen=True)
class Claim:
    """A paper's main claim (`checks[0]`) with its side claims.

    Args:
        statement: one sentence. recipe: what all arms share. arms: by label; each has as many candidates.
        tuned_on: the validation metric candidates are chosen by, and whether higher is better.
        caveat: what a reader of its result must know, such as settings that were chosen after a look at test figures.
        first_seed: of those it is judged on; above 0 where a setting was chosen after a look at the test figures of the ones before.
        new_data: each seed draws data of its own (for built-in sets that take `data.seed`), and trains a teacher on it.
        knobs: other options of the main check's arm, tried on validation where its verdict is *not supported*.
        settings: other data to try it on, by name; the claim itself is the setting `embedded`.
    """

    name: str
    statement: str
    recipe: Overrides
    arms: Mapping[str, Arm]
    checks: Sequence[Check]
    tuned_on: tuple[str, bool]
    new_data: bool = False
    first_seed: int = 0
    caveat: str = ""
    knobs: Sequence[Overrides] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)

    @property
    def main(self) -> set[str]:
        """The arms that the main check compares."""
        return {self.checks[0].arm, self.checks[0].other}

    @property
    def candidates(self) -> int:
        """How many candidates each arm has to choose from."""
        numbers = {len(arm.candidates) for arm in self.arms.values()}
        if len(numbers) != 1:
            raise InputError(f"Claim {self.name}: arms must have equally many candidates, found {sorted(numbers)}.")
        return numbers.pop()

    def at(self, setting: str = EMBEDDED, data: str | None = None) -> Claim:
        """The claim as it is tried in a setting.

        Args:
            setting: `embedded`, or one of `settings`.
            data: a data set with the same columns in place of the setting's: a name, path or Hub id.

        Raises:
            InputError: there is no such setting, or its data are not there.
        """
        known = [EMBEDDED, *self.settings]
        if setting not in known:
            raise InputError(
                f"Claim {self.name!r} has no setting {setting!r}.{nearest(setting, known)} Known: {', '.join(known)}."
            )
        chosen, needs = replace(self, settings={}), []
        if setting != EMBEDDED:
            other = self.settings[setting]
            given = {k: getattr(other, k) for k in ("statement", "arms", "checks", "tuned_on")}
            named = {k: v for k, v in given.items() if v is not None}
            chosen = replace(chosen, recipe=other.recipe, caveat=other.caveat, new_data=False, first_seed=0, **named)
            needs = [n for n in other.needs if data is None or n != other.recipe["data"]["name"]]
        missing = [n for n in needs if find(n) is None]
        if missing:
            raise InputError(
                f"Claim {self.name!r} in the setting {setting!r} needs {' and '.join(needs)}, and {missing[0]} is not in "
                "UNDERSTUDY_DATA: set it to a folder that holds them, or choose --setting embedded or other --data."
            )
        return chosen if data is None else chosen._on(data)

    def held_by(self, folder: Path) -> bool:
        """Whether a folder holds what a setting needs, so that it may stand in for `UNDERSTUDY_DATA`."""
        needed = [setting.needs for setting in self.settings.values() if setting.needs]
        return any(all((folder / n).exists() for n in needs) for needs in needed)

    def _on(self, data: str) -> Claim:
        """The same experiment on other data: only their name changes."""

        def moved(recipe: Overrides) -> Overrides:
            return {**recipe, "data": {**recipe["data"], "name": data}} if "data" in recipe else recipe

        arms = {label: replace(arm, recipe=moved(arm.recipe)) for label, arm in self.arms.items()}
        return replace(self, recipe=moved({"data": {}, **self.recipe}), arms=arms)

    def tuning(self, label: str, candidate: int, output: Path) -> Recipe:
        """The run that tells how good a candidate is: on validation, with a seed that is not judged."""
        folder = output / "tuning" / f"{_file(label)}-{candidate}"
        return self._plan(label, self.arms[label].candidates[candidate], _TUNING_SEED, folder, "validation")

    def judging(self, label: str, candidate: int, seed: int, output: Path) -> Recipe:
        """The run of an arm that is judged, on test."""
        folder = output / "runs" / f"{_file(label)}-s{seed}"
        return self._plan(label, self.arms[label].candidates[candidate], seed, folder, "test")

    def trying(self, label: str, candidate: int, knob: Overrides, number: int, output: Path) -> Recipe:
        """The run of an arm with further options, on validation, with the `number`-th of the seeds that are not judged."""
        over = self.arms[label].candidates[candidate]
        over = {**over, "options": {**over.get("options", {}), **knob}}
        told = "-".join([_file(label), *(f"{k}={v}" for k, v in knob.items())])
        folder = output / "search" / f"{told}-{number}"
        return self._plan(label, over, _TUNING_SEED + number, folder, "validation")

    def _plan(self, label: str, over: Overrides, seed: int, output: Path, eval_split: str) -> Recipe:
        arm = self.arms[label]
        base = {**self.recipe, **arm.recipe}
        if self.new_data:
            base["data"] = {**base["data"], "seed": seed}
        return make(
            base
            | {
                "method": arm.method,
                "options": {**arm.options, **over.get("options", {})},
                "trainer": {**base.get("trainer", {}), **over.get("trainer", {})},
                "data": {**base.get("data", {}), **over.get("data", {})},
                "seed": seed,
                "output": str(output),
                "eval_split": eval_split,
            }
        )


def _file(label: str) -> str:
    return label.replace("/", "-")
