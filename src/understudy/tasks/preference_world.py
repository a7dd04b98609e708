"""Preference worlds with a known truth: what a policy learned from noisy preferences is really worth, in seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from understudy.data import Batch, TextSet, collate_lists
from understudy.errors import InputError, nearest
from understudy.evaluation.answers import win_rate
from understudy.evaluation.preference import evaluate_preferences
from understudy.models import ModelAdapter, evaluating
from understudy.synthetic.bandit import ChoiceAdapter, ChoiceBatch, ChoicePolicy, bandit, collate_choices
from understudy.synthetic.chains import Bigram, BigramAdapter, Chains, chain_policy, chains, exact_value, transitions
from understudy.synthetic.markov import MarkovChain, markov
from understudy.synthetic.policies import load_policy
from understudy.synthetic.responses import Responses, responses
from understudy.tasks.base import Prepared, TaskDefaults, merged

_OPTIONS = {
    "bandit": {"name", "seed", "noise", "for_teacher", "limit"},
    "chains": {"name", "seed", "start", "label_noise", "for_teacher", "limit"},
    "markov": {"name", "seed", "for_teacher", "limit"},
    "responses": {"name", "seed", "rejected", "beta", "for_teacher", "limit"},
}
_BANDIT = {"max_steps": 400, "per_device_train_batch_size": 64, "learning_rate": 5e-4, "lr_scheduler_type": "constant"}
_RESPONSES = {
    "max_steps": 1000,
    "per_device_train_batch_size": 256,
    "learning_rate": 2e-2,
    "lr_scheduler_type": "linear",
}
_CHAINS = {"max_steps": 150, "per_device_train_batch_size": 32, "learning_rate": 2e-2, "lr_scheduler_type": "constant"}


class PreferenceWorld(TaskDefaults):
    """Learn from preferences in a world that knows which choice is best."""

    name = "preference_world"
    kind = "preference"
    unit = "lists"
    metric = "value"
    higher_is_better = True
    start_data: Mapping[str, Any] = MappingProxyType({"for_teacher": True})

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """The bandit with heavy-tailed noise, its policy started on 512 clean contexts; each seed is a world of its own. In
        `responses` the policy starts at the reference."""
        data = recipe.get("data") or {}
        data.setdefault("name", "bandit")
        data.setdefault("seed", recipe["seed"])
        recipe["data"] = data
        if data["name"] == "responses":
            recipe["student"] = recipe.get("student") or "reference"
            recipe["trainer"] = merged({**_RESPONSES, "weight_decay": 0.0}, recipe.get("trainer") or {})
            return recipe
        chain = data["name"] in ("chains", "markov")
        if data["name"] == "chains":
            data.setdefault("start", "own")
        elif not chain:
            data.setdefault("noise", "heavy")
        if recipe.get("student") is None:
            first = {**_BANDIT, "max_steps": 30} if not chain else {**_CHAINS, "max_steps": 400}
            recipe["student"] = {
                "model": ("bigram:20" if data["name"] == "markov" else "bigram:16") if chain else "policy:64,64",
                "train": {**first, "weight_decay": 0.0},
            }
        recipe["trainer"] = merged(
            {**(_CHAINS if chain else _BANDIT), "weight_decay": 0.0}, recipe.get("trainer") or {}
        )
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        data = dict(recipe.data)
        name = data["name"]
        if name not in _OPTIONS:
            raise InputError(f"No world {name!r}.{nearest(name, _OPTIONS)} Known: {', '.join(_OPTIONS)}.")
        for key in data:
            if key not in _OPTIONS[name]:
                known = _OPTIONS[name]
                raise InputError(f"Unknown key data.{key}.{nearest(key, known)} Known: {', '.join(sorted(known))}.")
        world: Chains | MarkovChain | Responses | None = None
        if name == "chains":
            world = chains(data["seed"], data["start"], label_noise=data.get("label_noise", 0.0))
        elif name == "markov":
            world = markov(data["seed"])
        elif name == "responses":
            world = responses(data["seed"], data.get("rejected", "optimal"), beta=data.get("beta", 0.5))
        splits = world.splits if world is not None else bandit(data["noise"], data["seed"])
        train = splits["clean" if data.get("for_teacher") else "train"]
        train.records = train.records[: data.get("limit")]
        return Prepared(
            train=train,
            validation=splits["validation"],
            test=splits["test"],
            collate=collate_lists if world is not None else collate_choices,
            classes=len(world.log_p) if world is not None else 24,
            hashes={"data": hashlib.sha256(repr(sorted(data.items())).encode()).hexdigest()},
            facts={"world": world},
            win_rate=self._win_rate(world, splits[recipe.eval_split]),
        )

    def _win_rate(self, world: Any, held_out: TextSet) -> Callable[[ModelAdapter, ModelAdapter], float] | None:
        """See `Prepared`: exact for the bandit, of 4,000 pairs of sequences for chains; other worlds have no reward."""
        if isinstance(world, Chains):
            return partial(_chain_wins, world)
        return partial(_choice_wins, held_out) if world is None else None

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        world = prepared.facts["world"]
        if world is None:
            return ChoiceAdapter(load_policy(ChoicePolicy, spec.model, source, prepared.classes))
        if isinstance(world, MarkovChain):
            return BigramAdapter(load_policy(Bigram, spec.model, source, prepared.classes), world)
        return BigramAdapter(chain_policy(spec.model, source, world, prepared.classes), world)

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """`value`: the mean probability of the truly best item (bandit), return minus KL to the chain, or minus the KL from the
        target (responses); the latter two are exact."""
        found = evaluate_preferences(student, loader)
        if isinstance(student, BigramAdapter):
            assert student.world is not None  # `model` gave it
            found["metrics"] |= exact_value(student.model, student.world)
            return found
        wins = []
        with torch.no_grad(), evaluating(student):
            for values in loader:
                batch = Batch.from_dict(values)
                assert isinstance(batch, ChoiceBatch)
                best = batch.truth.argmax(-1, keepdim=True)
                wins.append(student(batch).signal.values.exp().gather(1, best)[:, 0])
        found["metrics"]["value"] = float(torch.cat(wins).double().mean())
        return found


def _chain_wins(world: Chains, student: ModelAdapter, start: ModelAdapter, number: int = 4000) -> float:
    chance = torch.Generator().manual_seed(0)
    begin = torch.randint(len(world.log_p), (number,), generator=chance)
    ours, before = (world.returns(transitions(side.model), begin, chance) for side in (student, start))  # type: ignore[arg-type]
    return win_rate((ours - before).sign().int().tolist())


def _choice_wins(held_out: TextSet, student: ModelAdapter, start: ModelAdapter) -> float:
    """Σ π(i) π₀(j) of the items i and j where i is truly better, and half of it where they are equal."""
    shares = []
    with torch.no_grad(), evaluating(student), evaluating(start):
        for values in DataLoader(held_out, batch_size=64, collate_fn=collate_choices):
            batch = Batch.from_dict(values)
            assert isinstance(batch, ChoiceBatch)
            ours, before = (side(batch).signal.values.double().exp() for side in (student, start))
            better = (batch.truth[:, :, None] - batch.truth[:, None, :]).sign() / 2 + 0.5
            shares.append((ours[:, :, None] * better * before[:, None, :]).sum((1, 2)))
    return float(torch.cat(shares).mean())
