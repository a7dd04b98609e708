"""Quality of generated samples: their distance from real ones, compared with the teacher's samples at several step
budgets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from understudy.data import Batch
from understudy.data.noise import normal
from understudy.data.noise_sets import APART, NoiseBatch, Reference
from understudy.errors import InputError
from understudy.evaluation.distances import coverage, energy_distance, frechet_distance
from understudy.evaluation.pictures import image_grid, scatter
from understudy.models import evaluating
from understudy.models.fitting import minimise
from understudy.models.small import build_small, load_weights, save_small

REACH = 4.0
"""A point further than this number of standard deviations from every mode belongs to none."""


ENTRIES = 1 << 16
"""Largest number of values (samples × size of a sample) in one call of a model."""


class SampleEvaluator:
    """Compares samples with a reference set: Fréchet distance of a classifier's features for images with classes,
    energy distance otherwise."""

    def __init__(self, reference: Reference | None, examples: Tensor, classes: Tensor | None) -> None:
        self.examples, self.reference, self.network = examples, reference, None
        self.expected: Tensor | None = None
        if reference is not None and classes is not None:
            number = int(classes.max()) + 1
            if reference.training is not None:
                self.network = feature_network(reference)
                number = max(number, int(self.network.understudy["classes"]))  # type: ignore[index, arg-type]
            self.expected = torch.bincount(classes, minlength=number).double() / len(classes)
        self.real = self._features(examples) if self.network is not None else examples

    @property
    def meaning(self) -> str:
        """A sentence that explains `distance`."""
        if self.network is None:
            return (
                "Energy distance of the samples to the reference; 0 where both have one distribution. Lower is better."
            )
        return (
            "Fréchet distance of the samples to real examples in the features of a small classifier of these data (the "
            "formula of FID, without its Inception network: not to be compared with published FIDs). Lower is better."
        )

    def distance(self, samples: Tensor) -> float:
        """Distance of the samples from the real examples."""
        if self.network is None:
            return energy_distance(samples, self.real)
        return frechet_distance(self._features(samples), self.real)

    def coverage(self, samples: Tensor) -> float | None:
        """Fraction of modes or classes that the samples cover, if they are known."""
        if self.expected is None:
            return None
        return coverage(self.modes(samples), self.expected)

    @torch.no_grad()
    def modes(self, samples: Tensor) -> Tensor:
        """The mode of each sample: its class, or the nearest centre; −1 for a point that is close to none."""
        if self.network is not None:
            return self.network(samples).argmax(-1)
        assert self.reference is not None and self.reference.centres is not None
        near = torch.cdist(samples.double(), self.reference.centres).min(-1)
        return near.indices.masked_fill(near.values > REACH * self.reference.deviation, -1)

    @torch.no_grad()
    def _features(self, samples: Tensor) -> Tensor:
        assert self.network is not None
        return torch.cat([self.network.body(part) for part in samples.split(256)])  # type: ignore[operator]


def feature_network(reference: Reference, steps: int = 400) -> nn.Module:
    """A small classifier trained on the real training examples; the layer before its head provides the features.

    It is trained once with a fixed seed and kept in the store.
    """
    assert reference.training is not None
    folder = reference.store / f"features-{reference.key[:16]}" if reference.store is not None else None
    pixels, labels = reference.training()
    network = build_small("convnet:16", int(labels.max()) + 1, tuple(pixels.shape[1:]))
    if folder is not None and (folder / "config.json").is_file():
        load_weights(network, folder / "model.safetensors")
        return network.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_small("convnet:16", int(labels.max()) + 1, tuple(pixels.shape[1:]))
        draws = (torch.randint(0, len(labels), (64,)) for _ in range(steps))
        losses = (nn.functional.cross_entropy(network(pixels[chosen]), labels[chosen]) for chosen in draws)
        with torch.enable_grad():
            minimise(losses, torch.optim.AdamW(network.parameters(), lr=3e-3))
    if folder is not None:
        save_small(network, folder)
    return network.eval()


@torch.no_grad()
def evaluate_generation(student: Any, teacher: Any, loader: DataLoader[Any], reference: Reference) -> dict[str, Any]:
    """Metrics of the student's samples, and of the teacher's.

    `distance` (its kind is in `explained`), `nfe` (network calls per sample), `coverage` of modes. With a teacher:
    `rmse` to its output of `reference.many` calls from the same noise, and `teacher_N_distance` of its sampler with N
    steps. Without data the reference is the teacher's samples of `many` calls from other noise.
    """
    models = [m for m in (student, teacher) if m is not None]
    with evaluating(*models):
        samples = draw(student, loader)
        taught = (
            {n: draw(teacher, loader, n) for n in {*reference.steps, reference.many}} if teacher is not None else {}
        )
        if reference.examples is not None:
            examples, labels = reference.examples()
            classes = labels if int(labels.max()) > 0 else None  # else nothing for a classifier to tell apart
        elif teacher is not None:
            examples, classes = draw(teacher, loader, reference.many, APART["reference"]), None
        else:
            raise InputError("data=noise has no reference for samples without a teacher: set `teacher` or `data`.")
    evaluator = SampleEvaluator(reference, examples, classes)
    metrics: dict[str, Any] = {"distance": evaluator.distance(samples)}
    metrics["nfe"] = float(student.calls)
    if evaluator.expected is not None:
        metrics["coverage"] = evaluator.coverage(samples)
    if taught:
        best = taught[reference.many]
        metrics["rmse"] = float((samples - best).square().mean().sqrt())
        metrics["teacher_distance"], metrics["teacher_nfe"] = (
            evaluator.distance(best),
            float(teacher.calls_for(reference.many)),
        )
        if evaluator.expected is not None:
            metrics["teacher_coverage"] = evaluator.coverage(best)
        metrics |= {f"teacher_{n}_distance": evaluator.distance(taught[n]) for n in sorted(taught)}
    shown = {f"Student: samples of {student.calls} call(s)": samples, "Real examples": examples}
    if taught:
        shown |= {f"Teacher: {n} steps from the same noise": taught[n] for n in sorted(taught)}
    explained = {"distance": evaluator.meaning}
    return {"rows": len(samples), "metrics": metrics, "pictures": pictures(shown), "explained": explained}


def draw(model: Any, loader: DataLoader[Any], steps: int | None = None, offset: int = 0) -> Tensor:
    """Samples for the loader's ids, always from the same noise; `offset` shifts the ids to get other noise."""
    home = next(model.parameters())
    batches = [Batch.from_dict(values) for values in loader]
    if not batches:
        raise InputError("The split has no example to draw.")
    ids, condition = (torch.cat([getattr(b, n) for b in batches]) for n in ("ids", "condition"))
    parts = []
    for chosen in torch.arange(len(ids)).split(max(1, ENTRIES // torch.Size(model.shape).numel())):
        batch = NoiseBatch({}, condition[chosen], ids[chosen], condition=condition[chosen])
        eps = normal(batch.ids + offset, model.shape, seed=0, step=0).float().to(home.device)
        parts.append(model.draw(batch.to(home.device), eps, steps).cpu().float())
    return torch.cat(parts)


def pictures(samples: dict[str, Tensor]) -> dict[str, Any]:
    """Each set as a picture, where that is possible: images with one or three channels, points of the plane."""
    first = next(iter(samples.values()))
    if first.dim() == 4:
        return {caption: image_grid(v[:96]) for caption, v in samples.items()}
    if first.dim() == 2 and first.shape[1] == 2:
        bound = 1.25 * max(1e-6, float(samples.get("Real examples", first).abs().max()))
        return {caption: scatter(v, bound) for caption, v in samples.items()}
    return {}
