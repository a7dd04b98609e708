"""A small problem for weights that are judged after a virtual step."""

import torch
from torch import nn

from understudy.data import Batch
from understudy.losses import cross_entropy
from understudy.losses.geometry import class_means, class_sums
from understudy.methods.tgeo_kd import TGeoKD
from understudy.models import ClassifierRows, Rows, evaluating
from understudy.targets import Dense
from understudy.training import Live, Scene, Shapes
from understudy.training.bilevel import weight_gradients
from understudy.training.players import Players


class Told:
    """A teacher whose logits are known by example id."""

    def __init__(self, logits):
        self.logits = logits

    def rows(self, batch):
        return Rows(Dense(self.logits[batch.ids]))


def batch_of(x, y, ids=None):
    return Batch({"pixel_values": x[:, None, None]}, y, torch.arange(len(y)) if ids is None else ids)


def cut(batch, size):
    pixels = batch.inputs["pixel_values"]
    return [
        Batch({"pixel_values": pixels[i : i + size]}, batch.labels[i : i + size], batch.ids[i : i + size])
        for i in range(0, len(batch.ids), size)
    ]


def scene_of(student, teacher, batches, validation):
    count = float(sum(b.rows for b in batches))
    return Scene(student, teacher, batches, count, lambda number: validation, list)


def slopes(student, method, teacher, batches, validation, alpha, **options):
    """∂J/∂α `[rows]` over all micro-batches, and J."""
    gradients, outer = weight_gradients(
        student,
        batches,
        lambda rows, i: torch.stack(method._losses(rows, teacher.rows(batches[i]), batches[i]), -1),
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
        self.student = ClassifierRows(net.to(dtype), classes).train()
        self.method = TGeoKD(**options)
        modules = nn.ModuleDict(self.method.modules(Shapes(classes))).to(dtype)
        means = class_means(*class_sums(self.teacher.logits, y, classes))
        self.live = Live(modules=dict(modules.items()), tables={"means": means}, student=self.student)
        self.players = Players(self.method.players(), self.live.modules)

    def scene(self, size=100):
        return scene_of(self.student, self.teacher, cut(self.batch, size), self.validation)

    def move(self, size=100):
        scene = self.scene(size)
        return self.players.move("ratio", lambda: self.method.play("ratio", scene, self.live), scene)

    def alpha(self):
        with torch.no_grad(), evaluating(self.student):
            rows = self.student(self.batch), self.teacher.rows(self.batch)
            return self.method._alpha(*rows, self.batch, self.live)

    def slopes(self, size=100, **options):
        """∂J/∂α and J."""
        known = {"rate": self.method.virtual_rate, "part": self.method.virtual} | options
        return slopes(
            self.student, self.method, self.teacher, cut(self.batch, size), self.validation, self.alpha(), **known
        )

    def ratio(self):
        return torch.cat([p.detach().flatten() for p in self.live.modules["ratio"].parameters()])
