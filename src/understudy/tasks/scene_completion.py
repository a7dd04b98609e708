"""Completion of sparse scans to dense clouds: the worlds `street2d` and `street`, or LiDAR scans of the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from understudy.data.scenes import Measured, Reduction, SceneSet, collate_scenes, read_scenes
from understudy.errors import InputError
from understudy.evaluation.scenes import evaluate_scenes
from understudy.models import ModelAdapter
from understudy.models.denoisers import load_denoiser
from understudy.models.diffusion import Sampler
from understudy.models.scenes import SceneDenoiser
from understudy.synthetic.street import WORLDS, streets
from understudy.tasks.base import Prepared, TaskDefaults, merged

_TRAINER = {
    "max_steps": 240,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.05,
    "weight_decay": 0.0,
}
_TEACHER = {"max_steps": 2500, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
_MOST_VOXELS = 2.0**28
"""Of the grid that jsd counts points in: 2 GiB a cloud."""


class SceneCompletion(TaskDefaults):
    """Complete the scan of a scene to a cloud with several times its points."""

    name = "scene_completion"
    kind = "noise"
    unit = "scenes"
    metric = "chamfer"
    higher_is_better = False
    baseline = "denoise"
    preflight_examples = 8

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Default: `street2d`, with a small network that is trained as teacher and copied into the student."""
        data = recipe.get("data") or {}
        data.setdefault("name", "street2d")
        learns = recipe.get("method") == self.baseline
        if recipe.get("teacher") is None and not learns:
            recipe["teacher"] = {"model": "pointnet:64,64,64", "train": dict(_TEACHER)}
        if recipe.get("student") is None:
            recipe["student"] = {"model": "pointnet:64,64,64" if learns else "teacher"}
        recipe["data"] = data
        recipe["trainer"] = merged(
            {**_TEACHER, "weight_decay": 0.0} if learns else _TRAINER, recipe.get("trainer") or {}
        )
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        given = recipe.data
        name, seed = given["name"], given.get("seed", 0)
        if name in WORLDS:
            samples = given.get("samples", 100)
            numbers = {"train": given.get("size", 600), "validation": samples, "test": samples}
            scenes = streets(name, numbers, seed)
        else:
            scenes = read_scenes(name)
        points = given.get("points") or (32 if scenes.dimensions == 2 else 128)
        reduction = Reduction(points, given.get("repeat", 8), given.get("radius", 10.0), seed)
        measured = Measured(given.get("voxel", 0.5), tuple(given.get("compare_steps", (1, 2, 4, 8))))
        cells = (2 * reduction.radius / measured.voxel) ** scenes.dimensions
        if cells > _MOST_VOXELS:
            raise InputError(
                f"data.radius={reduction.radius:g} m in voxels of data.voxel={measured.voxel:g} m makes {cells:.3g} of them, and "
                f"the metric jsd counts at most {_MOST_VOXELS:.3g}: lower data.radius, or raise data.voxel."
            )
        sets: dict[str, Any] = {s: SceneSet(makers, reduction, s, measured) for s, makers in scenes.splits.items()}
        return Prepared(
            **sets,
            collate=collate_scenes,
            classes=0,
            input_shape=(points * reduction.repeat, scenes.dimensions),
            notes=list(scenes.notes),
            hashes={"data": f"{scenes.key}-{reduction}"},
            facts={"steps": given.get("teacher_steps", 50), "guidance": given.get("guidance")},
        )

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        facts = prepared.facts
        sampler = Sampler(facts["steps"], t_min=0.0, t_max=1.0, guidance=facts["guidance"])
        named = spec.model if source is None else source
        model = load_denoiser(named, shape=prepared.input_shape, sampler=sampler)
        if not isinstance(model, SceneDenoiser):
            raise InputError(
                f"{spec.model} completes no scans: name pointnet:64,64, its folder, or give a SceneDenoiser."
            )
        if spec.quantization is not None or spec.dtype != "auto":
            raise InputError("Denoisers of scenes run as they are: leave the model's quantization and dtype out.")
        if model.shape != prepared.input_shape:
            raise InputError(
                f"{spec.model} makes clouds of {list(model.shape)}, and the data's are {list(prepared.input_shape)} (data.points "
                "times data.repeat): choose these alike."
            )
        if facts["guidance"] is not None and not model.sampler.guided:
            model.sampler = replace(model.sampler, guidance=facts["guidance"])
        return model

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """Distance of the completed clouds from the true ones, and that of student and teacher at several step budgets."""
        return evaluate_scenes(student, teacher, loader)
