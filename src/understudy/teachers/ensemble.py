"""Several teachers as one: their mixture, or one teacher for each domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError, nearest
from understudy.models import ModelAdapter, ModelOutput
from understudy.streaming import logits_of
from understudy.targets import Dense, Mixture, Projected, Sampled, Target, TopK
from understudy.teachers.cache.teacher import CachedTeacher
from understudy.teachers.local import LocalTeacher, Teacher


class Ensemble(ModelAdapter):
    """An ensemble of teachers.

    Without `domains` every member runs on every example, and the output is the mixture p = Σ w_m p_m (with `geometric`,
    log p = Σ w_m z_m + constant). With `domains` each example goes to the member with its domain's name. The output is
    `Dense` if all members return logits; for hidden states it is a `Mixture`, which a loss projects tile by tile. A
    loss applies its temperature to the mixture, not to the members.

    Args:
        members: by name: models, or teachers without a model here (a cache, a server).
        weights: by name, above 0, divided by their sum; equal if not given.
        geometric: average logits instead of probabilities.
        domains: names of the domains, indexed by `Batch.domains`; each must be a member's name.
        devices: by name, the device of a model that does not move with the others.
    """

    weights: Tensor
    setting: Tensor

    def __init__(
        self,
        members: Mapping[str, ModelAdapter | Teacher],
        *,
        weights: Mapping[str, float] | None = None,
        geometric: bool = False,
        domains: Sequence[str] | None = None,
        devices: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if not members:
            raise InputError("An ensemble needs at least one member.")
        self.names, self.devices, self.geometric = tuple(members), dict(devices or {}), geometric
        self.model = nn.ModuleDict({n: m for n, m in members.items() if isinstance(m, ModelAdapter)})
        self.elsewhere = {n: m for n, m in members.items() if not isinstance(m, ModelAdapter)}
        self.domains = tuple(domains) if domains is not None else None
        if domains is not None and weights:
            raise InputError("A routed ensemble uses one member for each example: leave the weights out.")
        for domain in domains or ():
            if domain not in members:
                raise InputError(
                    f"The data have a domain {domain!r} and the ensemble has {', '.join(members)}."
                    f"{nearest(domain, members)} Add a member of that name, or leave the domain out."
                )
        self.register_buffer("weights", _shares(self.names, weights))
        routed = [self.names.index(d) for d in self.domains or ()]
        self.register_buffer("setting", torch.tensor([int(geometric), *routed]))  # part of its hash

    @property
    def complete(self) -> bool:
        """Whether it can be run on any example: a cache only holds the captured ones."""
        return not self.elsewhere

    def to(self, device: Any) -> Ensemble:  # type: ignore[override]
        """Move the models; one with its own device goes to that."""
        for name, model in self.model.items():
            model.to(self.devices.get(name, device))
        return self

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        """`Dense`, `Mixture`, or the outputs of routed members."""
        if features:
            raise InputError(
                "An ensemble only has outputs, and no features or inner layers of its own: choose a method that learns "
                "from outputs, or one teacher."
            )
        if self.domains is None:
            place = torch.arange(batch.num_items, device=batch.labels.device)[:, None].expand(-1, len(self.names))
            return ModelOutput(self._mixed([self._ask(name, batch) for name in self.names], place, self.weights))
        if batch.domains is None:
            raise InputError("A routed ensemble needs the examples' domains, and this batch has none.")
        member_of = self.setting[1:].to(batch.labels.device)[batch.domains]
        signals, places = [], []
        for m in member_of.unique().tolist():
            mine = (member_of == m).nonzero()[:, 0]
            here = torch.isin(batch.sequence, mine)
            signals.append(self._ask(self.names[m], batch.take(mine)))
            places.append(torch.where(here, here.cumsum(0) - 1, -1))
        return ModelOutput(self._mixed(signals, torch.stack(places, -1), self.weights.new_ones(len(signals))))

    def imagined(self, batch: Batch) -> ModelOutput:
        """An output in which every member takes part, with placeholders for caches and servers, for trying out a loss."""
        number, signals = len(self.names), []
        for name in self.names:
            kept = self.elsewhere.get(name)
            signals.append(kept.imagined(batch).signal if isinstance(kept, CachedTeacher) else self._ask(name, batch))
        row = torch.arange(batch.num_items, device=batch.labels.device)[:, None].expand(-1, number)
        if self.domains is None:
            return ModelOutput(self._mixed(signals, row, self.weights))
        mine = row % number == torch.arange(number, device=row.device)
        return ModelOutput(self._mixed(signals, torch.where(mine, row, -1), self.weights.new_ones(number)))

    def _ask(self, name: str, batch: Batch) -> Any:
        home = batch.labels.device
        if name in self.elsewhere:
            teacher = self.elsewhere[name]
            ask: Callable[[Batch], ModelOutput] = teacher.through if torch.is_grad_enabled() else teacher
            return ask(batch).signal
        return LocalTeacher(self.model[name], name, freeze=False).through(batch).to(home).signal

    def _mixed(self, signals: Sequence[Any], place: Tensor, weights: Tensor) -> Target:
        if all(isinstance(s, (Dense, Projected, Mixture)) for s in signals):
            mixture = Mixture(tuple(signals), place, weights.to(place.device), self.geometric)
            return Dense(logits_of(mixture)) if all(isinstance(s, Dense) for s in signals) else mixture
        kinds = sorted({type(s).__name__ for s in signals})
        if self.domains is None and len(signals) > 1:
            raise InputError(
                f"Members that answer with {' and '.join(kinds)} cannot be mixed: a mixture needs whole distributions. "
                "Capture them with support dense or hidden, or route each example to one member."
            )
        if len({(type(s), s.ids.shape[-1] if hasattr(s, "ids") else 0) for s in signals}) > 1:
            raise InputError(
                f"Routed members answer with {' and '.join(kinds)}, of different sizes: capture all with one support."
            )
        return _joined(signals, place)


def _joined(signals: Sequence[TopK | Sampled], place: Tensor) -> Target:
    """The rows of several outputs of one kind, in the order of the batch."""
    first = signals[0]
    if any(s.temperature != first.temperature for s in signals):
        raise InputError("Routed members were captured at different temperatures: capture all at one.")
    starts = torch.tensor([0, *(s.rows for s in signals[:-1])], device=place.device).cumsum(0)
    at = torch.where(place >= 0, place + starts, -1).amax(-1)
    names = first._per_row
    whole = {n: torch.cat([getattr(s, n).to(place.device) for s in signals])[at] for n in names}
    return type(first)(**whole, temperature=first.temperature)


def _shares(names: Sequence[str], weights: Mapping[str, float] | None) -> Tensor:
    """Weights in the order of the members, with sum 1."""
    if weights is None:
        return torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    for name in weights:
        if name not in names:
            raise InputError(f"Unknown member {name!r} in weights.{nearest(name, names)} Known: {', '.join(names)}.")
    for name in names:
        value = weights.get(name)
        if value is None:
            raise InputError(f"Member {name!r} has no weight: give every member one, or none.")
        if not (math.isfinite(value) and value > 0):
            raise InputError(
                f"The weight of member {name!r} is {value} and must be above 0: leave the member out for 0."
            )
    values = torch.tensor([float(weights[n]) for n in names], dtype=torch.float64)
    return values / values.sum()
