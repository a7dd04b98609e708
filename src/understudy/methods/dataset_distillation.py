"""37. Knowledge Distillation and Dataset Distillation of Large Language Models: Emerging Trends (2025).

A few synthetic examples x_S of each class are optimised so that training on them does what training on the data T does:

gradient (DC):      Σ_c D(∇L(x_S, c), ∇L(x_T, c)) at random networks, and along their training on x_S
distribution (DM):  Σ_c ‖mean φ(x_S, c) − mean φ(x_T, c)‖², φ a random network without its head
trajectory (MTT):   ‖θ_n − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖², θ_n: n steps on x_S from an expert's θ*_t, step size learned
kernel (KIP):       mean ½ ‖y_T − K_TS (K_SS + λ I)⁻¹ y_S‖²

Then the student trains on them: (1 − α) CE + α τ² KL(teacher_τ ‖ student_τ).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from understudy.data import Batch
from understudy.data.image_files import write_image_split
from understudy.data.image_set import ImageSet
from understudy.errors import InputError
from understudy.evaluation.pictures import picture_grid
from understudy.files import COMPLETE, seal
from understudy.losses import cross_entropy, forward_kl
from understudy.models import ModelOutput
from understudy.models.fitting import minimise
from understudy.models.small import is_small
from understudy.streaming import rowwise
from understudy.streaming.plain import logits_of
from understudy.targets import Dense
from understudy.teachers import LocalTeacher
from understudy.training import Method, Phase, Requirements, SetupContext, Term, TrainState
from understudy.training.image_matching import Examples, Matching, MatchingOptions, new_network

log = logging.getLogger(__name__)


class DatasetDistillation(MatchingOptions, Method):
    """A few synthetic images of each class, optimised to train networks like all the data, and a student of them."""

    name = "dataset-distillation"
    paper = 37
    kinds = frozenset({"image"})
    cost = (
        "as kd, on the few images; once, `iterations` of matching: gradient takes a forward and a double backward of a network "
        "on real_batch images of each class, distribution a forward of them, trajectory `student_steps` differentiable steps "
        "and the experts' training and memory (experts · expert_steps · parameters), kernel a ridge regression"
    )
    page: ClassVar[dict[str, str]] = {
        "when": "Many networks are to be trained on the same data, or data must be small to be kept or sent: search over "
        "architectures, continual learning. A teacher's soft labels (`alpha`) add to any of the matchings. "
        "`match=random` is the baseline: real images of the same number. The set is an ordinary data set: "
        "`data.name=FOLDER`, with the folder that the report names, trains any other student on it.",
        "not": "When one network is to be trained: synthesis costs more than that. With more than some tens of images a class, "
        "selection (data-pruning-kd) is as good and cheaper. Text is discrete, and embeddings that are optimised lie off its "
        "manifold: for text see frontier-synthetic.",
        "deviations": "A survey: the methods are those of the works it reviews, with step sizes that suit small data (the "
        "released ones are 0.1 for gradient, 1 for distribution, 1000 without Adam for trajectory, and 1,000 to 20,000 "
        "iterations). Too large a step size makes gradient matching worse than random images, as the cosine does not see "
        "norms: watch `distilled_norm` beside `initial_norm`. Kernel is Gaussian with labels held fixed. Batch normalisation has "
        "statistics of real images; trajectory needs a network without it. No augmentation during matching. Results do not carry "
        "over to every network: `others` trains fresh ones on the images.",
    }

    alpha: float = Field(1.0, ge=0, le=1, description="α, weight of the teacher's soft labels.")
    temperature: float = Field(4.0, gt=0, description="τ of both sides.")
    others: tuple[str, ...] = Field(("mlp:64,64",), description="Small networks that are trained afresh on the images.")
    evaluations: int = Field(5, ge=1, description="Fresh networks of each kind.")

    @property
    def requires(self) -> Requirements:
        taught = self.alpha > 0
        return Requirements(teacher="outputs" if taught else "none", teacher_model=taught, temperature=self.temperature)

    def phases(self) -> Sequence[Phase]:
        return (Phase("distilled", split="distilled"),)

    # -- the images ---------------------------------------------------------------------------------------------------

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        if self.match == "trajectory" and self.span >= self.expert_steps:
            raise InputError(
                f"options.span={self.span} steps of an expert are matched and options.expert_steps={self.expert_steps} are "
                "made: make more, or match fewer."
            )
        raw = _labelled(context, "train", every=True)
        mean, deviation = raw.x.mean(), raw.x.std().clamp(min=1e-8)
        real = Examples((raw.x - mean) / deviation, raw.y)
        start = self._initial(context, real)
        name = self._network_name(context)
        asked = self.model_dump(exclude={"alpha", "temperature", "others", "evaluations"})
        settings = {**asked, "network": name, "seed": context.seed}
        matching = Matching(self, real, start.y, context.classes, name, context.seed)
        x = matching.run(start.x, context, settings).to(real.x)
        pixels = (x * deviation + mean).float().cpu()
        labels = start.y.cpu()
        made = ImageSet(pixels, labels, torch.arange(len(labels)))
        context.splits["distilled"] = made
        tables = {"x": x, "labels": start.y, "mean": mean, "deviation": deviation, "initial": start.x}
        if self.alpha:
            teacher = LocalTeacher(context.live_teacher(), "teacher", freeze=False)
            batch = Batch.from_dict(context.collate([made[i] for i in range(len(made))])).to(real.x.device)
            tables["teacher_logits"] = logits_of(teacher(batch).signal).detach()
        self._save(context, made, tables, _folder(context, settings))
        return tables

    def _initial(self, context: SetupContext, real: Examples) -> Examples:
        """`per_class` images of each class, in the order of the classes."""
        parts = []
        generator = torch.Generator().manual_seed(context.seed)
        for label in range(context.classes):
            own = real.of(label)
            needed = self.per_class if self.initial == "real" else 1
            if len(own.y) < needed:
                raise InputError(
                    f"Class {label} has {len(own.y)} training images and options.per_class={self.per_class} starts from as "
                    "many: lower it, give the class more, or set options.initial=noise, which needs one."
                )
            parts.append(own.some(self.per_class, generator).x)
            if self.initial == "noise":
                shape = (self.per_class, *real.x.shape[1:])
                parts[-1] = torch.randn(shape, generator=generator).to(real.x)
        labels = torch.arange(context.classes, device=real.y.device).repeat_interleave(self.per_class)
        return Examples(torch.cat(parts), labels)

    def _network_name(self, context: SetupContext) -> str:
        model: Any = getattr(context.student, "model", None)
        name = self.network or getattr(model, "understudy", {}).get("understudy_model", "")
        if not is_small(name) or name.startswith(("gcn", "sage", "gat")):
            raise InputError(
                f"Images are matched in new small networks and {name or type(model).__name__!r} is none: set options.network "
                "to one, for example convnet:32 or mlp:64,64."
            )
        return str(name)

    def _save(self, context: SetupContext, made: ImageSet, tables: Mapping[str, Tensor], folder: Path) -> None:
        """Write the images, with the validation and test examples, as a data set that `data.name` reads."""
        if (folder / COMPLETE).is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        more = {k: tables[k].cpu().numpy() for k in ("teacher_logits",) if k in tables}
        write_image_split(folder / "train.npz", made.pixels, made.labels, **more)
        for split in ("validation", "test"):
            write_image_split(folder / f"{split}.npz", *(v.cpu() for v in _labelled(context, split)))
        seal(folder)
        log.info("The distilled images are a data set: data.name=%s", folder)

    # -- the student --------------------------------------------------------------------------------------------------

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        signal = teacher.signal if teacher is not None else None
        return self._terms(student.signal, signal, batch.row_labels)

    def _terms(self, student: Any, teacher: Any, labels: Tensor) -> dict[str, Term]:
        terms = {}
        if self.alpha:
            kd = rowwise(forward_kl, student, teacher, temperature=self.temperature, tau_squared=True)
            terms["kd"] = Term(kd, self.alpha)
        if self.alpha < 1:
            terms["ce"] = Term(rowwise(cross_entropy, student, None, labels), 1 - self.alpha)
        return terms

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """The images, their norms, and what fresh networks reach that are trained on them."""
        x, initial, pixels = state.tables["x"], state.tables["initial"], context.splits["distilled"].pixels
        metrics = {
            "distilled_images": float(len(x)),
            "initial_norm": float(initial.flatten(1).norm(dim=1).mean()),
            "distilled_norm": float(x.flatten(1).norm(dim=1).mean()),
        }
        rows = []
        for name in self.others:
            found = [self._fresh(name, state.tables, context, n) for n in range(self.evaluations)]
            metrics[f"fresh_accuracy_{name}"] = sum(found) / len(found)
            rows.append([name, f"{sum(found) / len(found):.4f}", f"{min(found):.4f} to {max(found):.4f}", len(found)])
        shown = [row[:12] for row in pixels.split(self.per_class)]
        headings = ["network", "accuracy", "range", "networks"]
        table = {"title": "Fresh networks, trained on the distilled images", "headings": headings, "rows": rows}
        return {
            "metrics": metrics,
            "pictures": {"Distilled images, a row for each class": picture_grid(shown)},
            "tables": [table] if rows else [],
        }

    def _fresh(self, name: str, tables: Mapping[str, Tensor], context: SetupContext, number: int) -> float:
        """Accuracy of a new network after 300 steps on all the images."""
        if not is_small(name):
            raise InputError(
                f"options.others has {name!r}, and a small network is meant: mlp:64,64, convnet:32, resnet8."
            )
        x, labels = tables["x"], tables["labels"]
        net = (
            new_network(name, context.classes, tuple(x.shape[1:]), context.seed + 1000 * (number + 1))
            .to(x.device)
            .train()
        )
        signal = Dense(tables["teacher_logits"]) if self.alpha else None
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

        def losses() -> Iterator[Tensor]:
            for _ in range(300):
                terms = self._terms(Dense(net(x)), signal, labels)
                yield torch.stack([t.weight * t.values.mean() for t in terms.values()]).sum()

        minimise(losses(), optimizer)
        net.eval()
        real = _labelled(context, context.eval_split)
        with torch.no_grad():
            parts = ((real.x - tables["mean"]) / tables["deviation"]).split(256)
            return float((torch.cat([net(part) for part in parts]).argmax(1) == real.y).double().mean())


def _labelled(context: SetupContext, split: str, every: bool = False) -> Examples:
    """Pixels and classes of the labelled examples of a split.

    Args:
        every: whether an example without a label is an error.
    """
    pairs = [(batch.inputs["pixel_values"], batch.labels) for batch in context.batches(split)]
    x, y = (torch.cat(column) for column in zip(*pairs, strict=True))
    if every and bool((y < 0).any()):
        raise InputError(
            f"Training example {int((y < 0).nonzero()[0, 0])} has no label, and images are made for each class: leave it out."
        )
    return Examples(x[y >= 0], y[y >= 0])


def _folder(context: SetupContext, settings: Mapping[str, Any]) -> Path:
    """Where the images are kept as a data set."""
    asked = hashlib.sha256(json.dumps([context.key, settings], sort_keys=True, default=str).encode()).hexdigest()
    return context.store / f"distilled-set-{asked[:16]}"
