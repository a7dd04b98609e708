"""18 MST-Distill: a student of one modality learns more from several teachers of others than from any one of them.

Noisy digits that are seen and heard, a fifth of the training labels wrong; the student sees. Each seed draws its own world. Every
arm takes as many steps, of which MST-Distill trains its student in 80 of 85, and keeps the student of the least validation
loss. On real data: spoken digits with images of the same digit; the student hears.
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim, Setting

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (2e-3, 5e-3))
_KEEP: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "nll",
    "greater_is_better": False,
}
_TRAIN = {**_KEEP, "max_steps": 800, "learning_rate": 2e-3}
_MST = {"mask_rate": 1e-3}


def _recipe(data: dict[str, Any], own: str, other: str, one: str, several: str) -> dict[str, Any]:
    return {
        "task": "multimodal_classification",
        "data": {**data, "modalities": [own, other]},
        "teacher": {
            "members": {other: {"model": one, "options": {"reads": other}}, "both": {"model": several}},
        },
        "student": one,
        "trainer": {**_KEEP, "max_steps": 850},
    }


def _arms(other: str, one: str, several: str) -> dict[str, Arm]:
    def kd(model: str, **options: Any) -> Arm:
        weights = {"ce_weight": 1.0, "kd_weight": 1.0, "temperature": 4.0}
        return Arm("kd", weights, _RATES, {"teacher": {"model": model, "train": _TRAIN, **options}})

    return {
        "sft": Arm("sft", {}, _RATES),
        "kd/both": kd(several),
        f"kd/{other}": kd(one, options={"reads": other}),
        "mst": Arm("mst-distill", _MST, _RATES),
        "mst/unmasked": Arm("mst-distill", {"shares": [20, 0, 65]}, _RATES),
        "mst/soft": Arm("mst-distill", {**_MST, "router_grad": "soft"}, _RATES),
    }


def _checks(other: str) -> tuple[Check, ...]:
    return (
        Check("mst", "sft", 0.0, "accuracy", True, "it is above training on the labels alone"),
        Check("mst", "kd/both", 0.015, "accuracy", True, "it is 1.5 points above KD from a teacher of both modalities"),
        Check(
            "mst", f"kd/{other}", 0.015, "accuracy", True, "it is 1.5 points above KD from one of the other modality"
        ),
        Check("sft", "kd/both", 0.0, "accuracy", True, "KD from a single teacher of both modalities hurts"),
        Check("mst", "mst/unmasked", 0.0, "accuracy", True, "masks help"),
        Check("mst/soft", "mst", 0.0, "accuracy", True, "a router that learns from KD is above one that does not"),
    )


_SMALL, _WIDE = ("mlp:32,32", "fusion:24,32,32"), ("mlp:64,64", "fusion:64,64,64")

CLAIM = Claim(
    name="mst-distill",
    statement="With teachers of other modalities, MST-Distill is above training without a teacher, where KD from one may hurt.",
    recipe=_recipe({"name": "av_digits"}, "image", "audio", *_SMALL),
    arms=_arms("audio", *_SMALL),
    checks=_checks("audio"),
    tuned_on=("nll", False),
    new_data=True,
    settings={
        "real": Setting(
            recipe=_recipe({"name": "spoken_digits", "limit": 300, "teacher_limit": 300}, "audio", "image", *_WIDE),
            needs=("spoken_digits", "mnist10k"),
            arms=_arms("image", *_WIDE),
            checks=_checks("image"),
        )
    },
)
