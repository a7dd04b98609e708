"""Training a binary critic of text pairs, with early stopping on its precision at a given recall (paper 11)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from understudy.curation import Item, base_rate_bias, cutoff_at_recall, recall_curve, score
from understudy.errors import InputError
from understudy.losses import binary_cross_entropy
from understudy.models import evaluating
from understudy.models.fitting import minimise
from understudy.models.pairs import Pair, PairClassifier, is_new_pairs, load_pairs, new_pairs
from understudy.training.order import EpochSampler

View = Callable[[int, Pair], Pair]


@dataclass(frozen=True)
class Fit:
    """Hyperparameters of the training of a critic.

    Args:
        lr, weight_decay: of AdamW.
        batch: pairs per step.
        epochs: the largest number of epochs.
        warmup: steps of linear warm-up.
        patience: epochs without a better validation precision at `recall` before it stops.
        plateau: epochs without a better validation precision before the learning rate is divided by ten.
        seed: of the order of examples and of dropout.
    """

    lr: float
    batch: int = 128
    epochs: int = 50
    warmup: int = 1000
    patience: int = 10
    plateau: int = 5
    recall: float = 0.8
    weight_decay: float = 0.01
    seed: int = 0


class CriticFit(Item):
    """How the fit of a critic went.

    Args:
        epochs: done. best_epoch: whose weights were kept. history: validation precision after each.
    """

    epochs: int
    best_epoch: int
    best_precision: float
    history: list[float]
    seconds: float


def fit_critic(
    model: PairClassifier,
    train: tuple[Sequence[Pair], Sequence[int]],
    validation: tuple[Sequence[Pair], Sequence[int]],
    fit: Fit,
    view: Callable[[int], View],
) -> CriticFit:
    """Minimise binary cross-entropy from the base rate on; the model ends with the weights of its best epoch.

    Args:
        train, validation: text pairs and 0/1 labels.
        view: rewords a pair for an epoch; validation uses the wordings of the first three epochs.

    Returns:
        What happened.
    """
    pairs, labels = train
    checked, truth = validation
    _need_both("training", labels)
    _need_both("validation", truth)
    started = time.time()
    with torch.no_grad():
        model.output().bias.fill_(base_rate_bias(sum(labels) / len(labels)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.lr, weight_decay=fit.weight_decay)
    order = EpochSampler(len(pairs), fit.seed)
    history: list[float] = []
    best_state, rate, waiting = model.state_dict(), fit.lr, 0
    torch.manual_seed(fit.seed)
    wordings = [[worded(i, pair) for i, pair in enumerate(checked)] for worded in map(view, range(3))]
    views = [lambda i, pair, told=told: told[i] for told in wordings]  # type: ignore[misc]

    def losses(epoch: int, rate: float) -> Iterator[torch.Tensor]:
        order.begin(epoch)
        chosen, worded = list(order), view(1000 + epoch)  # wordings that scoring does not use
        starts = range(0, len(chosen), fit.batch)
        for step, start in enumerate(starts, epoch * len(starts) + 1):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, step / max(1, fit.warmup))
            rows = chosen[start : start + fit.batch]
            logits = model([worded(i, pairs[i]) for i in rows])
            targets = torch.tensor([float(labels[i]) for i in rows], device=logits.device)
            yield binary_cross_entropy(logits, targets).mean()

    for epoch in range(fit.epochs):
        model.train()
        minimise(losses(epoch, rate), optimizer)
        precision = precision_at_recall(truth, probabilities(model, checked, views), fit.recall)
        history.append(precision)
        waiting += 1
        if precision > max(history[:-1], default=-1.0):
            best_state, waiting = copy.deepcopy(model.state_dict()), 0
        elif waiting > fit.plateau:
            rate, waiting = rate / 10, 0
        best = history.index(max(history))
        if epoch - best >= fit.patience:
            break
    model.load_state_dict(best_state)
    taken = time.time() - started
    return CriticFit(epochs=len(history), best_epoch=best, best_precision=history[best], history=history, seconds=taken)


def _need_both(split: str, labels: Sequence[int]) -> None:
    if len(set(labels)) < 2:
        found = f"only label {labels[0]}" if len(labels) else "nothing"
        raise InputError(f"The critic's {split} labels hold {found}: it needs good and bad examples in both splits.")


@torch.no_grad()
def probabilities(model: PairClassifier, pairs: Sequence[Pair], views: Sequence[View], batch: int = 256) -> list[float]:
    """The critic's probability of each pair, averaged over views, in evaluation mode."""

    def logits(worded: Sequence[Pair]) -> torch.Tensor:
        parts = [model(worded[s : s + batch]).cpu() for s in range(0, len(worded), batch)]
        return torch.cat(parts)

    with evaluating(model):
        return score(pairs, logits, views)


def precision_at_recall(labels: Sequence[int], scores: Sequence[float], recall: float) -> float:
    """Precision at the cutoff with the given recall; of the strictest cutoff if ties leave no such cutoff."""
    curve = recall_curve(labels, scores)
    return cutoff_at_recall(labels, scores, recall).precision if curve[-1].recall <= recall else curve[-1].precision


class CriticOptions(BaseModel):
    """Options of the critic. What `None` stands for depends on whether the critic is a new small network or a
    pretrained model (then the values are those of paper 11)."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(default="pairs", description="`pairs:width=N,hidden=N` (new), or any sequence classifier.")
    lr: float | None = Field(default=None, gt=0, description="5e-6; of a new one 1e-2.")
    warmup: int | None = Field(default=None, ge=0, description="Steps: 1000; of a new one 20.")
    dropout: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float | None = Field(default=None, ge=0, description="0.01; of a new one 0.3.")
    batch: int = Field(default=128, ge=1)
    epochs: int = Field(default=100, ge=1, description="At most.")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Epochs without better validation precision at 80 % recall: 10; of a new one 30.",
    )
    plateau: int | None = Field(
        default=None, ge=0, description="Such epochs before the rate is divided by ten: 5; of a new one 15."
    )
    members: int = Field(default=1, ge=1, description="Critics whose probabilities are averaged.")
    views: int = Field(default=5, ge=1, description="Wordings whose probabilities are averaged.")

    def fit(self, seed: int) -> Fit:
        """The hyperparameters of one member of the ensemble."""
        new = is_new_pairs(self.model)
        pick = lambda value, fresh, tuned: value if value is not None else fresh if new else tuned  # noqa: E731
        return Fit(
            pick(self.lr, 1e-2, 5e-6),
            self.batch,
            self.epochs,
            pick(self.warmup, 20, 1000),
            pick(self.patience, 30, 10),  # with a few hundred labels an epoch has only a few steps
            pick(self.plateau, 15, 5),
            weight_decay=pick(self.weight_decay, 0.3, 0.01),
            seed=seed,
        )

    def build(self, texts: Iterable[str]) -> PairClassifier:
        """A member of the ensemble before training. The vocabulary of a new network is the words of `texts`."""
        if is_new_pairs(self.model):
            return new_pairs(self.model, texts, self.dropout)
        return load_pairs(self.model, self.dropout)


def fit_critics(
    options: CriticOptions,
    pairs: Mapping[str, Sequence[Pair]],
    labels: Mapping[str, Sequence[int]],
    view: Callable[[int], View],
    folder: Path,
    seed: int,
) -> list[CriticFit]:
    """Fit every member and save it below `folder`; see `fit_critic` for what is returned of each.

    Args:
        pairs, labels: of `train` and `validation`.
    """
    worded = [view(v)(i, pair) for v in range(options.views) for i, pair in enumerate(pairs["train"])]
    train, validation = ((pairs[s], labels[s]) for s in ("train", "validation"))
    fits = []
    for member in range(options.members):
        torch.manual_seed(seed * 1000 + member)
        model = options.build(text for pair in worded for text in pair).to(
            "cuda" if torch.cuda.is_available() else "cpu"
        )
        fits.append(fit_critic(model, train, validation, options.fit(seed * 1000 + member), view))
        model.save(folder / str(member))
    return fits


class Critics:
    """Trained critics loaded from their folder; they return the mean probability over members and views."""

    def __init__(self, options: CriticOptions, folder: Path, view: Callable[[int], View]) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.members = [load_pairs(folder / str(i)).to(device) for i in range(options.members)]
        self.views = [view(v) for v in range(options.views)]

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """One probability per pair."""
        found = [probabilities(member, pairs, self.views) for member in self.members]
        return [sum(values) / len(values) for values in zip(*found, strict=True)]
