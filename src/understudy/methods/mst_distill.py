"""18. MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge Distillation (2025, arXiv 2507.07015).

The student S sees one modality, each teacher another or several. No teacher is best for every example, and what teachers of
other modalities know drifts away from what the student can learn. Three parts of training, with KD = τ² KL(source ‖ learner):

    co-training     Σ_u [ CE(z_u, y) + Σ_{v≠u} KD(z_u, z_v) ]                       over student and teachers
    specialising    KD(z_w, SG[z_S]) of each way w: a teacher with one layer masked, h ← m_w(h) · h; the masks learn
    routing         CE(z_S, y) + w_kd · mean over the k ways of KD(z_S, SG[z_w]) + w_lb · L_lb(p),   p = softmax(router(z_S))

The k ways of an example are those with the largest p. This choice has no gradient: the router learns from the balance L_lb.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError, nearest
from understudy.losses import cross_entropy
from understudy.losses.routing import balance, kl_by_way, mutual_kl, top_ways
from understudy.models import ModelAdapter, ModelOutput, evaluating
from understudy.models.masks import MaskNet, mask_layers, mask_width
from understudy.streaming import rowwise
from understudy.teachers import Ensemble
from understudy.training import Method, Phase, Requirements, SetupContext, Shapes, Term, TrainState
from understudy.training.order import Sampling

_COTRAIN, _SPECIALISE, _ROUTE = "cotrain", "specialise", "route"


@dataclass
class Course:
    """Where a phase is: epochs, the weights that decay with them, and the best masks so far.

    Args:
        phase, epoch: the phase, and its epochs that have ended. kd, balance: factors of the weights of both terms.
        least: the smallest validation loss of the masks; `None` before the first. best: their weights there.
    """

    phase: str = ""
    epoch: int = 0
    kd: float = 1.0
    balance: float = 1.0
    least: float | None = None
    best: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in vars(self):
            setattr(self, name, state[name])

    def logs(self) -> dict[str, float]:
        return {"kd_factor": self.kd, "balance_factor": self.balance} if self.phase == _ROUTE else {}


class MSTDistill(Method):
    """Teachers of other modalities, trained with the student, masked towards it, and chosen for each example by a router."""

    name = "mst-distill"
    paper = 18
    kinds = frozenset({"classification"})
    cost = (
        "co-training: a forward and backward of every model a row; specialising: a teacher forward and backward a mask; "
        "routing: a teacher forward a mask, and one student forward and backward"
    )
    example: ClassVar[dict[str, Any]] = {"task": "multimodal_classification"}
    page: ClassVar[dict[str, str]] = {
        "when": "Examples with several modalities in training and one in deployment (task `multimodal_classification`; "
        "`options.reads` of each model says what it sees), and two or more teachers in `teacher.members`. Your own data are a "
        "file, or a folder with one for each of train, validation and test, that has a column for each modality and one for "
        "the label; a row is one example. It is an .npz archive of arrays, or a table (.csv, .jsonl, .json, .parquet) of lists "
        "of numbers, of images, or of names of files beside it: images, .npy arrays, .wav recordings. "
        "`data.modalities=[image, audio]` names the columns, the student's first. A row that lacks a modality is refused.",
        "not": "With one modality and one good teacher: `kd` is simpler. The router of `router_grad=released` learns to use "
        "all ways evenly and not which one is good; `soft` lets the quality of a way reach it. A mask of C channels has "
        "about C³/2 weights: mask narrow layers. Long specialising turns every teacher into the student.",
        "deviations": "Defaults are those for small data; the released code takes 1, 1 and 100 epochs at 1e-4. Teachers are "
        "trained from the weights they have, new ones or those of `train`. The ways' own optimisers are one Adam without "
        "clipping, which is the same since no weight is shared. Clipping of co-training and routing is "
        "`trainer.max_grad_norm`. The balance is taken over `group` consecutive rows, so that a batch may be cut between "
        "groups; the released code takes the batch. A batch normalisation of masks of maps couples the rows too. Teachers are "
        "used as they are in evaluation mode. `trainer.load_best_model_at_end` keeps the best student of the routing part. "
        "Dense outputs and layers of tokens are not masked. The router sees raw logits: a constant added to all logits of an "
        "example changes its route.",
    }

    shares: tuple[float, float, float] = Field(
        (20.0, 5.0, 60.0),
        description="Parts of the run's steps: co-training, specialising (0: no masks, a way for each teacher), routing.",
    )
    temperature: float = Field(4.0, gt=0, description="τ of all KD terms.")
    detach: bool = Field(False, description="Co-training: a model learns from its own terms only.")
    layers_per_teacher: int = Field(2, ge=1, description="J, masked layers of each teacher: each is a way of its own.")
    layers: dict[str, list[str]] | None = Field(
        None,
        description="Names of the masked layers by teacher, as in {audio: [body.1, body.3]}; the last if not given.",
    )
    mask_heads: int = Field(3, ge=1, description="Heads of a mask's attention.")
    mask_factor: int = Field(2, ge=1, description="f, narrows the mask networks.")
    mask_rate: float | None = Field(None, gt=0, description="Learning rate of the masks; the recipe's if not given.")
    k: int = Field(1, ge=1, description="Ways that an example is routed to.")
    router_grad: Literal["released", "soft"] = Field(
        "released",
        description="`soft` weighs all ways by the router's probabilities instead, which then learn from KD.",
    )
    detach_router_input: bool = Field(False, description="Keep the balance's gradient from the student.")
    balance: Literal["kl", "cv"] = Field("kl", description="L_lb: KL from even use, or the coefficient of variation.")
    group: int = Field(64, ge=1, description="Consecutive rows whose use of the ways is balanced.")
    ce_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy in routing.")
    kd_weight: float = Field(1.0, ge=0, description="w_kd at the start.")
    balance_weight: float = Field(1.0, ge=0, description="w_lb at the start.")
    kd_decay: float = Field(0.5, gt=0, le=1, description="Factor of w_kd at the end of epochs 0, `kd_every`, …")
    kd_every: int = Field(30, ge=1, description="Epochs between these.")
    balance_decay: float = Field(
        0.9, gt=0, le=1, description="Factor of w_lb at the end of epochs 0, `balance_every`, …"
    )
    balance_every: int = Field(10, ge=1, description="Epochs between these.")

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="calls", teacher_model=True)

    @model_validator(mode="after")
    def _is_defined(self) -> Self:
        if min(self.shares) < 0 or not self.shares[2]:
            raise ValueError(f"shares is {list(self.shares)}: parts are 0 or more, and the last (routing) above 0")
        return self

    # -- teachers, masks, router ------------------------------------------------------------------------------------

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """The masked layers: for each way the place of its layer among the teacher's modules, and the shape it shows."""
        if context.classes < 2:
            raise InputError(f"Method 'mst-distill' routes by class logits, and the data has {context.classes} class.")
        teachers = _teachers(context.live_teacher())
        for name in self.layers or {}:
            if name not in teachers:
                raise InputError(
                    f"options.layers names teacher {name!r}.{nearest(name, teachers)} Teachers: {', '.join(teachers)}."
                )
        found: dict[str, Tensor] = {}
        for name, model in teachers.items() if self.shares[1] else ():
            chosen = (self.layers or {}).get(name)
            shown = mask_layers(name, model, next(context.batches("train", 2)), self.layers_per_teacher, chosen)
            order = [n for n, _ in model.model.named_modules()]
            for one, shape in shown.items():
                found[f"{name}.{one}"] = torch.tensor([order.index(one), *shape])
        ways = len(found) or len(teachers)
        if self.k > ways:
            raise InputError(f"options.k is {self.k} and there are {ways} ways: give at most so many.")
        return found

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        assert shapes.teacher is not None
        teachers = _teachers(shapes.teacher)
        masks = {name: nn.ModuleList() for name in teachers}
        for key, value in shapes.tables.items():
            name = next(n for n in teachers if key.startswith(f"{n}."))
            index, channels, *positions = value.tolist()
            place = [n for n, _ in teachers[name].model.named_modules()][index]
            width = mask_width(channels, self.mask_heads, self.mask_factor)
            masks[name].append(MaskNet(channels, width, self.mask_heads, maps=bool(positions), place=place))
        ways = sum(len(own) for own in masks.values()) or len(teachers)
        classes = shapes.classes
        return {
            "teachers": nn.ModuleDict(teachers).requires_grad_(True),
            "masks": nn.ModuleDict(masks),
            "router": nn.Sequential(nn.Linear(classes, 2 * classes), nn.Linear(2 * classes, ways)),
        }

    def phases(self) -> Sequence[Phase]:
        total = sum(self.shares)
        rate = {} if self.mask_rate is None else {"learning_rate": self.mask_rate}
        # The student does not change while masks learn, and their best epoch is kept by their own loss.
        alone = {"eval_strategy": "no", "max_grad_norm": 0.0, "load_best_model_at_end": False, **rate}
        parts = (
            Phase(_COTRAIN, train=("student", "teachers"), trainer={"load_best_model_at_end": False}),
            Phase(_SPECIALISE, train=("masks",), trainer=alone),
            Phase(_ROUTE, train=("student", "router")),
        )
        return [
            Phase(p.name, share / total, p.train, trainer=p.trainer)
            for p, share in zip(parts, self.shares, strict=True)
            if share > 0
        ]

    def init_state(self, total: int) -> Course:
        return Course()

    # -- the loss of each part --------------------------------------------------------------------------------------

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        if state.phase == _COTRAIN:
            return self._cotraining(student, batch, state)
        if state.phase == _SPECIALISE:
            losses = self._mask_losses(student, batch, state)
            return {f"mask/{way}": Term(values) for way, values in losses.items()}
        return self._routing(student, batch, state)

    def _cotraining(self, student: ModelOutput, batch: Batch, state: TrainState) -> dict[str, Term]:
        """Every model learns from the labels and from every other one."""
        teachers: Any = state.modules["teachers"]
        signals = {"student": student.signal, **{f"teacher_{n}": m(batch).signal for n, m in teachers.items()}}
        mutual = mutual_kl(
            torch.stack([s.logits for s in signals.values()]), temperature=self.temperature, detach=self.detach
        )
        ce = {f"{n}_ce": Term(rowwise(cross_entropy, s, None, batch.row_labels)) for n, s in signals.items()}
        return ce | {f"{n}_kd": Term(values) for n, values in zip(signals, mutual, strict=True)}

    def _mask_losses(self, student: ModelOutput, batch: Batch, state: TrainState) -> dict[str, Tensor]:
        """How far each masked teacher is from the student, `[rows]` by way."""
        source = student.signal.logits.detach()[None]
        return {
            way: kl_by_way(signal.logits, source, temperature=self.temperature)[:, 0]
            for way, signal in _ways(batch, state).items()
        }

    def _routing(self, student: ModelOutput, batch: Batch, state: TrainState) -> dict[str, Term]:
        """Labels, the ways that the router chooses, and the balance of its choices."""
        past, logits = state.method_state, student.signal.logits
        with torch.no_grad():
            ways = _ways(batch, state)
        p = self._gates(logits, state)
        by_way = kl_by_way(logits, torch.stack([w.logits for w in ways.values()]), temperature=self.temperature)
        chosen = top_ways(p, self.k)
        kd = (p * by_way).sum(1) if self.router_grad == "soft" else by_way.gather(1, chosen).mean(1)
        even = [balance(part, mode=self.balance) for part in p.split(self.group)]
        terms = {
            "ce": Term(rowwise(cross_entropy, student.signal, None, batch.row_labels), self.ce_weight),
            "kd": Term(kd, self.kd_weight * past.kd),
            "balance": Term(torch.cat(even), self.balance_weight * past.balance),
        }
        used = [(chosen == w).any(1).to(kd.dtype) for w in range(len(ways))]
        return terms | {f"routed/{way}": Term(rows, 0.0) for way, rows in zip(ways, used, strict=True)}

    def _gates(self, logits: Tensor, state: TrainState) -> Tensor:
        """p, `[rows, ways]`."""
        router = state.modules["router"]
        seen = logits.detach() if self.detach_router_input else logits
        found: Tensor = router(seen.to(next(router.parameters()).dtype)).softmax(-1)
        return found

    # -- epochs -----------------------------------------------------------------------------------------------------

    def sampling(self, state: TrainState) -> Sampling | None:
        """All examples. Each new epoch decays the weights of routing, and measures the masks."""
        past: Course = state.method_state
        if past.phase != state.phase:
            past.phase, past.epoch = state.phase, 0
        else:
            past.epoch += 1
        if state.phase == _SPECIALISE and past.epoch:
            self._keep_best(state)
        past.kd = self.kd_decay ** -(-past.epoch // self.kd_every)
        past.balance = self.balance_decay ** -(-past.epoch // self.balance_every)
        return None

    def on_train_end(self, state: TrainState) -> None:
        """At the end of specialising the masks of the best epoch return."""
        if state.phase == _SPECIALISE:
            self._keep_best(state)
            state.modules["masks"].load_state_dict(state.method_state.best)

    @torch.no_grad()
    def _keep_best(self, state: TrainState) -> None:
        """Remember the masks if their validation loss is the smallest: the sum over teachers of the mean over ways."""
        assert state.context is not None and state.student is not None
        masks: Any = state.modules["masks"]
        rows, sums = 0, dict.fromkeys(_names(state), 0.0)
        with evaluating(state.student, *state.modules.values()):
            for batch in state.context.batches("validation"):
                rows += batch.num_items
                for way, values in self._mask_losses(state.student(batch), batch, state).items():
                    sums[way] += float(values.sum())
        means = iter(value / max(1, rows) for value in sums.values())
        loss = sum(sum(next(means) for _ in own) / len(own) for own in masks.values())
        past: Course = state.method_state
        if past.least is None or loss < past.least:
            past.least, past.best = loss, {k: v.detach().clone() for k, v in masks.state_dict().items()}

    # -- the report -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """How often each way is used, by class too, and how accurate it is; the accuracy of each teacher."""
        assert state.student is not None
        teachers: Any = state.modules["teachers"]
        gates, labels, right = [], [], []
        names = [*_names(state), *teachers]
        with evaluating(state.student, *state.modules.values()):
            for batch in context.batches(context.eval_split):
                gates.append(self._gates(state.student(batch).signal.logits, state).cpu())
                labels.append(batch.row_labels.cpu())
                signals = [*_ways(batch, state).values(), *(t(batch).signal for t in teachers.values())]
                right.append(torch.stack([s.logits.argmax(-1) == batch.row_labels for s in signals], 1).cpu())
        p, label, accuracy = torch.cat(gates), torch.cat(labels), torch.cat(right).double().mean(0).tolist()
        ways = names[: p.shape[1]]
        used = torch.zeros_like(p, dtype=torch.double).scatter_(1, top_ways(p, self.k), 1 / self.k)
        metrics = {f"accuracy_of_{n}": a for n, a in zip(names[len(ways) :], accuracy[len(ways) :], strict=True)}
        if len(ways) > 1:
            metrics["routing_entropy"] = float(torch.special.entr(used.mean(0)).sum()) / math.log(len(ways))
        return {"metrics": metrics, "tables": [_use(ways, used, p, accuracy), _use_by_class(ways, used, label)]}


def _teachers(model: ModelAdapter) -> dict[str, ModelAdapter]:
    """The members of an ensemble by name, or the one teacher."""
    if not isinstance(model, Ensemble):
        return {"teacher": model}
    if model.domains is not None:
        raise InputError("Method 'mst-distill' routes examples itself: leave teacher.route out.")
    return {name: model.model[name] for name in model.names}


def _names(state: TrainState) -> list[str]:
    """The ways: `TEACHER.LAYER` where a layer is masked, else the teachers."""
    masks: Any = state.modules["masks"]
    return [f"{name}.{mask.place}" for name, own in masks.items() for mask in own] or list(masks)


def _ways(batch: Batch, state: TrainState) -> dict[str, Any]:
    """What each way says about the rows of a batch: a teacher with one layer masked, or as it is."""
    teachers: Any = state.modules["teachers"]
    masks: Any = state.modules["masks"]
    found = [mask.signal(teachers[name], batch) for name, own in masks.items() for mask in own]
    return dict(zip(_names(state), found or [t(batch).signal for t in teachers.values()], strict=True))


def _use(ways: Sequence[str], used: Tensor, p: Tensor, accuracy: Sequence[float]) -> dict[str, Any]:
    """A table of the ways."""
    columns = zip(ways, used.mean(0).tolist(), p.mean(0).tolist(), accuracy, strict=False)
    return {
        "title": "What the trained student's examples are routed to",
        "headings": ["teacher, with its masked layer", "share of routes", "mean probability", "accuracy"],
        "rows": [[way, f"{share:.1%}", f"{mean:.3f}", f"{right:.3f}"] for way, share, mean, right in columns],
    }


def _use_by_class(ways: Sequence[str], used: Tensor, labels: Tensor) -> dict[str, Any]:
    """A table of the routes of each class."""
    classes = [int(c) for c in labels.unique() if c >= 0]
    rows = [[str(c), *(f"{share:.1%}" for share in used[labels == c].mean(0).tolist())] for c in classes]
    return {"title": "Routes by class", "headings": ["class", *ways], "rows": rows}
