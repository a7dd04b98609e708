"""Candidates: what a network costs and scores, within a budget, recorded so that nothing is scored twice."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from understudy.data.text import write_records
from understudy.errors import InputError
from understudy.evaluation.cost import Operations
from understudy.files import read_log, writing
from understudy.models import ClassifierAdapter, normalisation
from understudy.models.small import build_small, is_small
from understudy.models.weights import reason

COSTS = ("parameters", "operations")
_WARM, _TIMED = 3, 15


class Candidate(BaseModel):
    """One network of a space.

    Args:
        student: its name. parameters: their number. operations: floating-point operations of the products in the forward
            pass of one image. latency: milliseconds of that pass, if it was measured.
        fits: whether it is within the budget; others have no scores.
        scores: by name, higher is better; `None` where a score is not finite.
        why: why it was left out. seconds: that it took to score. key: of what the scores depend on.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    student: str
    parameters: int = 0
    operations: float = 0.0
    latency: float | None = None
    fits: bool = False
    scores: dict[str, float | None] = {}
    why: str = ""
    seconds: float = 0.0
    key: str = ""

    def score(self, name: str) -> float | None:
        """A score, or a cost taken as one."""
        return float(getattr(self, name)) if name in COSTS else self.scores[name]


@dataclass(frozen=True)
class Budget:
    """Bounds of a candidate, both included: parameters, operations of an image, milliseconds of an image."""

    parameters: int | None = None
    min_parameters: int = 0
    operations: float | None = None
    latency: float | None = None

    def excess(self, found: Candidate) -> str:
        """What of a candidate is beyond the budget, or an empty string."""
        if found.parameters < self.min_parameters:
            return f"{found.parameters} parameters, fewer than {self.min_parameters}"
        if self.parameters is not None and found.parameters > self.parameters:
            return f"{found.parameters} parameters, more than {self.parameters}"
        if self.operations is not None and found.operations > self.operations:
            return f"{found.operations:.3g} operations, more than {self.operations:.3g}"
        if self.latency is not None and found.latency is not None and found.latency > self.latency:
            return f"{found.latency:.3g} ms, more than {self.latency:.3g}"
        return ""


def ranked(candidates: Iterable[Candidate], score: str) -> list[Candidate]:
    """The best first. Ties go to fewer parameters, then to the name; candidates without a score are last."""

    def order(candidate: Candidate) -> tuple[float, int, str]:
        value = candidate.score(score)
        return (-value if value is not None else torch.inf, candidate.parameters, candidate.student)

    return sorted(candidates, key=order)


class CandidateLog:
    """Candidates by name, in a file of JSON lines that is read when a search resumes.

    Args:
        key: of what scores depend on; candidates of another key are dropped.
    """

    def __init__(self, file: Path, key: str) -> None:
        records, _ = read_log(file, lambda record: record.get("key") == key)
        self.file, self.key = file, key
        self.known: dict[str, Candidate] = {}
        for record in records:
            try:
                self.known[record["student"]] = Candidate(**record)
            except (ValidationError, KeyError):  # damaged: it is scored again
                continue
        write_records(file, [self._record(i, c) for i, c in enumerate(self.known.values())])

    def add(self, candidate: Candidate) -> Candidate:
        """Append a candidate."""
        candidate = candidate.model_copy(update={"key": self.key})
        line = json.dumps(self._record(len(self.known), candidate)) + "\n"
        with writing(self.file), self.file.open("a", encoding="utf-8") as file:
            file.write(line)
        self.known[candidate.student] = candidate
        return candidate

    @staticmethod
    def _record(step: int, candidate: Candidate) -> dict[str, object]:
        return {"step": step, **candidate.model_dump(mode="json")}


class Examiner:
    """Measures candidates, and scores those within the budget; each once.

    Args:
        classes, shape: of the data. budget: of a candidate. log: where candidates are recorded.
        score: from a new network to its scores by name.
        seed: of the initial weights that networks give themselves.
    """

    def __init__(
        self,
        classes: int,
        shape: tuple[int, ...],
        budget: Budget,
        log: CandidateLog,
        score: Callable[[str, ClassifierAdapter], Mapping[str, float | None]],
        seed: int = 0,
    ) -> None:
        self.classes, self.shape, self.budget = classes, shape, budget
        self.log, self.score, self.seed = log, score, seed

    def __call__(self, name: str) -> Candidate:
        """The candidate called `name`. A network that cannot be built, or fails on the images, does not fit."""
        if name in self.log.known:
            return self.log.known[name]
        begun = time.perf_counter()
        try:
            found = self._examined(name)
        except (InputError, RuntimeError, ValueError) as error:
            found = Candidate(student=name, why=reason(error))
        return self.log.add(found.model_copy(update={"seconds": time.perf_counter() - begun}))

    def _examined(self, name: str) -> Candidate:
        if not is_small(name):
            raise InputError(f"{name!r} names no small network: mlp, convnet, cnn, resnet or circular with their sizes")
        with torch.device("meta"):  # a network beyond the budget may be larger than the memory
            outline = build_small(name, self.classes, self.shape)
            size, operations = sum(p.numel() for p in outline.parameters()), _operations(outline, self.shape)
        found = Candidate(student=name, parameters=size, operations=operations)
        if excess := self.budget.excess(found):
            return found.model_copy(update={"why": excess})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = build_small(name, self.classes, self.shape)
        if self.budget.latency is not None:
            found = found.model_copy(update={"latency": latency(model, self.shape)})
        if excess := self.budget.excess(found):
            return found.model_copy(update={"why": excess})
        scores = self.score(name, ClassifierAdapter(model, self.classes, normalise=normalisation(model)))
        return found.model_copy(update={"fits": True, "scores": dict(scores)})


@torch.no_grad()
def _operations(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Floating-point operations of the products in the forward pass of one image."""
    with Operations() as counted:
        model.eval()(torch.empty(1, *shape))
    return counted.total


@torch.no_grad()
def latency(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Milliseconds of the forward pass of one image on this CPU: the median of several."""
    image, taken = torch.zeros(1, *shape), []
    training = model.training
    model.eval()
    for _ in range(_WARM + _TIMED):
        begun = time.perf_counter()
        model(image)
        taken.append(1000 * (time.perf_counter() - begun))
    model.train(training)
    return statistics.median(taken[_WARM:])
