"""Phases: consecutive parts of a run, each with its own data, training arguments and frozen modules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from understudy.errors import InputError, nearest
from understudy.files import replacing
from understudy.models.sharding import is_sharded, load_state, whole_state
from understudy.training.checkpoint import load_tree, save_tree


@dataclass(frozen=True)
class Phase:
    """One part of a run, with its own optimiser, schedule and checkpoints.

    Args:
        name: letters, digits, - and _; the value of `state.phase` during the phase.
        share: fraction of the run's optimizer steps.
        train: what is trained: `"student"` and names from `Method.modules`. All other modules are frozen and in evaluation
            mode.
        parameters: regular expression that is found in the names of those of the student's parameters that are trained;
            all if not given.
        split: the split of `SetupContext.splits` to train on: `"train"` or one that `setup` added.
        trainer: training arguments that override those of the recipe (except `max_steps`, which follows from `share`).
        patience: end the phase after this many evaluations without improvement.
    """

    name: str
    share: float = 1.0
    train: tuple[str, ...] | None = None
    parameters: str | None = None
    split: str = "train"
    trainer: Mapping[str, Any] = field(default_factory=dict)
    patience: int | None = None


def steps_of(phases: Sequence[Phase], total: int) -> list[int]:
    """The optimizer steps of each phase: by share of `total`, at least one each, with sum `total`.

    Raises:
        InputError: shares that do not sum to 1, two phases of one name, or fewer steps than phases.
    """
    names = [p.name for p in phases]
    if len(set(names)) < len(names):
        raise InputError(f"Phases have distinct names, and these are {', '.join(names)}.")
    if any(p.share <= 0 for p in phases) or abs(sum(p.share for p in phases) - 1) > 1e-6:
        raise InputError(f"Shares of phases are above 0 and sum to 1; these sum to {sum(p.share for p in phases):g}.")
    if total < len(phases):
        raise InputError(
            f"{len(phases)} phases need as many optimizer steps and trainer.max_steps gives {total}: raise it."
        )
    ends, passed = [], 0.0
    for phase in phases:
        passed += phase.share
        ends.append(round(passed * total))
    steps = [b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    while min(steps) < 1:  # short runs: take a step from the longest phase
        steps[steps.index(max(steps))] -= 1
        steps[steps.index(min(steps))] += 1
    return steps


def save_phase(file: Path, module: Any, meter: Any) -> None:
    """Write weights, method state and cost at the end of a phase, as one file that is complete or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = module.train_state.method_state
    held = whole_state(module) if is_sharded(module) else module.state_dict()
    method = state.state_dict() if state is not None else None
    with replacing(file) as temporary:
        save_tree({"weights": dict(held), "method": method, "meter": meter.state_dict()}, temporary)


def load_phase(file: Path, module: Any, meter: Any) -> None:
    """Restore what `save_phase` wrote."""
    tree = load_tree(file)
    load_state(module, tree["weights"])
    meter.load_state_dict(tree["meter"])
    if tree["method"] is not None:
        module.train_state.method_state.load_state_dict(tree["method"])


def freeze_all_but(
    parts: Mapping[str, nn.Module], train: Sequence[str] | None, trainable: set[int], parameters: str | None = None
) -> list[nn.Module]:
    """Enable gradients of the modules that a phase trains, and freeze the others.

    Args:
        parts: `"student"` and the method's modules.
        train: names of those to train, or `None` for all.
        trainable: ids of the parameters that may be trained at all (only adapters, if there are any).
        parameters: as of a `Phase`.

    Returns:
        The frozen modules.

    Raises:
        InputError: a name that is not in `parts`, or no parameter of the student that `parameters` is found in.
    """
    if parameters is not None and not any(re.search(parameters, n) for n, _ in parts["student"].named_parameters()):
        raise InputError(f"A phase trains parameters called {parameters!r}, and the student has none.")
    for name in train or ():
        if name not in parts:
            raise InputError(
                f"A phase trains {name!r}, which is no part.{nearest(name, parts)} Parts: {', '.join(parts)}."
            )
    frozen = []
    for name, part in parts.items():
        active = train is None or name in train
        if not active:
            frozen.append(part)
        for own, parameter in part.named_parameters():
            chosen = name != "student" or parameters is None or re.search(parameters, own) is not None
            parameter.requires_grad_(active and chosen and id(parameter) in trainable)
    return frozen
