"""A small problem for weights that are judged after a virtual step."""

import torch
from torch import nn

from understudy.data import Batch
from understudy.losses import cross_entropy
from understudy.losses.geometry import class_means, class_sums
from understudy.methods.tgeo_kd import TGeoKD
from understudy.models import ClassifierAdapter, ModelOutput, evaluating
from understudy.targets import Dense
from understudy.training import AuxiliaryContext, Shapes, TrainState
from understudy.training.auxiliary import AuxiliaryOptimizers
from understudy.training.bilevel import weight_gradients
from understudy.training.reduction import Counts


class Told:
    """A teacher whose logits are known by example id."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, batch):
        return ModelOutput(Dense(self.logits[batch.ids]))


def batch_of(x, y, ids=None):
    return Batch({"pixel_values": x[:, None, None]}, y, torch.arange(len(y)) if ids is None else ids)


def cut(batch, size):
    pixels = batch.inputs["pixel_values"]
    return [
        Batch({"pixel_values": pixels[i : i + size]}, batch.labels[i : i + size], batch.ids[i : i + size])
        for i in range(0, len(batch.ids), size)
    ]


def scene_of(student, teacher, batches, validation):
    count = float(sum(b.num_items for b in batches))
    return AuxiliaryContext(student, teacher, batches, Counts(count, count), lambda number: validation, list)


def slopes(student, method, teacher, batches, validation, alpha, **options):
    """∂J/∂α `[rows]` over all micro-batches, and J."""
    gradients, outer = weight_gradients(
        student,
        batches,
        lambda rows, i: torch.stack(method._losses(rows, teacher(batches[i]), batches[i]), -1),
        [torch.stack([a, 1 - a], -1) for a in alpha.split([len(b.ids) for b in batches])],
        lambda ask: cross_entropy(ask(validation).signal.logits, validation.labels).mean(),
        count=len(alpha),
        **options,
    )
    joined = torch.cat(gradients)
    return joined[:, 0] - joined[:, 1], outer


class World:
    """A small problem: an MLP student with dropout and batch normalisation, a teacher, validation data."""

    def __init__(self, seed=0, classes=3, rows=8, body=None, dtype=torch.float64, **options):
        torch.manual_seed(seed)
        x, y = torch.randn(rows, 4, dtype=dtype), torch.randint(0, classes, (rows,))
        self.batch, self.teacher = batch_of(x, y), Told(2 * torch.randn(rows, classes, dtype=dtype))
        self.validation = batch_of(torch.randn(11, 4, dtype=dtype), torch.randint(0, classes, (11,)))
        middle = body or [nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(6)]
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), *middle, nn.Linear(6, classes))
        self.student = ClassifierAdapter(net.to(dtype), classes).train()
        self.method = TGeoKD(**options)
        modules = nn.ModuleDict(self.method.modules(Shapes(classes))).to(dtype)
        means = class_means(*class_sums(self.teacher.logits, y, classes))
        self.train_state = TrainState(modules=dict(modules.items()), tables={"means": means}, student=self.student)
        self.auxiliary = AuxiliaryOptimizers(self.method.auxiliary_optimizers(), self.train_state.modules)

    def context(self, size=100):
        return scene_of(self.student, self.teacher, cut(self.batch, size), self.validation)

    def move(self, size=100):
        context = self.context(size)
        return self.auxiliary.step(
            "ratio", lambda: self.method.auxiliary_loss("ratio", context, self.train_state), context
        )

    def alpha(self):
        with torch.no_grad(), evaluating(self.student):
            rows = self.student(self.batch), self.teacher(self.batch)
            return self.method._alpha(*rows, self.batch, self.train_state)

    def slopes(self, size=100, **options):
        """∂J/∂α and J."""
        known = {"rate": self.method.virtual_rate, "part": self.method.virtual} | options
        return slopes(
            self.student, self.method, self.teacher, cut(self.batch, size), self.validation, self.alpha(), **known
        )

    def ratio(self):
        return torch.cat([p.detach().flatten() for p in self.train_state.modules["ratio"].parameters()])
