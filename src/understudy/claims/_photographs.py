"""Photographs as the claims' settings have them: CIFAR, a ResNet-8 as student, batches of 64, training in bfloat16."""

from __future__ import annotations

from typing import Any

from understudy.claims.claim import Overrides, Setting

RESNET20: Overrides = {"model": "cifar10_resnets/resnet20", "dtype": "bfloat16"}
"""A pretrained teacher of ten kinds of photographs."""
CONVNET: Overrides = {
    "model": "convnet:16",
    "train": {"max_steps": 400, "per_device_train_batch_size": 32, "learning_rate": 3e-3},
}
"""A teacher that is trained first, for data that give it few examples."""


def photographs(
    data: Overrides | None = None, teacher: Overrides | None = RESNET20, steps: int = 600, **setting: Any
) -> Setting:
    """A setting of real data.

    Args:
        data: keys of a recipe's `data`; CIFAR-10 where they name no other. teacher: `None` where the method has none.
        steps: of every arm. setting: what else differs from the claim (see `Setting`); `needs` adds to the photographs.
    """
    data = {"name": "cifar10", **(data or {})}
    recipe: dict[str, Any] = {
        "task": "image_classification",
        "data": data,
        "student": "resnet8",
        "trainer": {"max_steps": steps, "per_device_train_batch_size": 64, "bf16": True, "save_strategy": "no"},
    }
    needs = [data["name"], *setting.pop("needs", ())]
    if teacher is not None:
        recipe["teacher"] = teacher
    if teacher == RESNET20:
        needs.append(f"{RESNET20['model']}.safetensors")
    return Setting(recipe=recipe, needs=needs, **setting)
