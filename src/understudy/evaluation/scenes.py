"""Quality of completed scenes: their distance from the true clouds, compared over steps of the sampler."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from understudy.data import Batch, NoiseBatch
from understudy.data.noise import normal
from understudy.data.scenes import SceneSet
from understudy.errors import InputError
from understudy.evaluation.clouds import chamfer_distance, voxel_iou, voxel_jsd
from understudy.evaluation.pictures import clouds
from understudy.models import evaluating
from understudy.models.scenes import SceneDenoiser

SHOWN = 4
"""Scenes that are drawn."""


def measure(samples: Tensor, truth: Tensor, *, voxel: float, radius: float) -> dict[str, float]:
    """Means over scenes of `chamfer`, `jsd` and `iou` of clouds `[scenes, points, dimensions]`.

    Args:
        voxel: side of the voxels of jsd and iou, in metres. radius: of the scenes, in metres.
    """
    pairs = list(zip(samples, truth, strict=True))
    return {
        "chamfer": fmean(chamfer_distance(a, b) for a, b in pairs),
        "jsd": fmean(voxel_jsd(a, b, voxel=voxel, reach=radius) for a, b in pairs),
        "iou": fmean(voxel_iou(a, b, voxel=voxel) for a, b in pairs),
    }


def _chamfer(samples: Tensor, truth: Tensor) -> float:
    return fmean(chamfer_distance(a, b) for a, b in zip(samples, truth, strict=True))


@torch.no_grad()
def evaluate_scenes(student: Any, teacher: Any, loader: DataLoader[Any]) -> dict[str, Any]:
    """Metrics of the student's clouds, `nfe` (network calls a cloud), and `input_chamfer`, the scan's own.

    With a teacher also its metrics, the Chamfer distance of both at every number of steps to compare, and pictures.
    """
    scenes: Any = loader.dataset
    while not isinstance(scenes, SceneSet):  # a subset of one
        scenes = scenes.dataset
    cells = {"voxel": scenes.measured.voxel, "radius": scenes.reduction.radius}
    batches = [Batch.from_dict(values) for values in loader]
    if not batches:
        raise InputError("The split has no scene to complete.")
    scan, truth = (torch.cat([b.inputs[name] for b in batches]) for name in ("scan", "clean"))
    with evaluating(*(m for m in (student, teacher) if m is not None)):
        samples = complete(student, batches)
        metrics = {**measure(samples, truth, **cells), "nfe": float(student.calls)}
        metrics["input_chamfer"] = _chamfer(scan, truth)
        if teacher is None:
            return {"rows": len(samples), "metrics": metrics}
        best = complete(teacher, batches)
        metrics |= {f"teacher_{name}": value for name, value in measure(best, truth, **cells).items()}
        metrics["teacher_nfe"] = float(teacher.calls)
        for name, model in (("student", student), ("teacher", teacher)):
            for steps in scenes.measured.steps:
                metrics[f"{name}_{steps}_chamfer"] = _chamfer(complete(model, batches, steps), truth)
    shown = {
        "Scans, as they come.": scan,
        "True clouds.": truth,
        f"Student: {student.calls} call(s).": samples,
        f"Teacher: {teacher.calls} calls from the same noise.": best,
    }
    pictures = {caption: clouds(list(v[:SHOWN]), scenes.reduction.radius) for caption, v in shown.items()}
    return {"rows": len(samples), "metrics": metrics, "pictures": pictures}


def complete(model: SceneDenoiser, batches: list[Any], steps: int | None = None) -> Tensor:
    """A cloud for every scene, always from the same noise: `[scenes, points, dimensions]`, on the CPU.

    Raises:
        InputError: a cloud has coordinates that are not finite.
    """
    home, parts = next(model.parameters()).device, []
    for batch in batches:
        assert isinstance(batch, NoiseBatch)
        eps = normal(batch.ids, model.shape, seed=0, step=0).float().to(home)
        parts.append(model.draw(batch.to(home), eps, steps).cpu().float())
    found = torch.cat(parts)
    if not bool(found.isfinite().all()):
        raise InputError("The model makes points that are not finite: it has diverged. Lower the learning rate.")
    return found
