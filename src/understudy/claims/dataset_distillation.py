"""37 Dataset distillation: of ten images, one a class, optimised ones train networks better than real ones, most of all those
that follow training; soft labels add to either.

Digits, hard labels unless an arm says kd. Judged on five fresh networks that are trained on the images alone. On real data: the
same of larger handwritten digits. The setting text is about passages of five subjects, two a class, read as the mean of untrained
word vectors.
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim, Setting

_FRESH = "fresh_accuracy_mlp:64,64"
_OTHER = "fresh_accuracy_convnet:16"
_ONLY: tuple[dict[str, Any], ...] = ({},)


def _arm(match: str, alpha: float = 0.0, **options: Any) -> Arm:
    recipe = {"teacher": None} if not alpha else {}
    return Arm("dataset-distillation", {"match": match, "alpha": alpha, **options}, _ONLY, recipe)


_DIGITS: dict[str, Any] = {"network": "mlp:64,64", "others": ["mlp:64,64", "convnet:16"]}
_TEXT: dict[str, Any] = {"per_class": 2}

_RECIPE: dict[str, Any] = {
    "task": "image_classification",
    "data": {"name": "digits", "limit": 1200},
    "teacher": {
        "model": "mlp:64,64",
        "train": {"max_steps": 400, "per_device_train_batch_size": 32, "learning_rate": 3e-3},
    },
    "student": "mlp:64,64",
    "trainer": {"max_steps": 50, "per_device_train_batch_size": 10, "save_strategy": "no"},
}

CLAIM = Claim(
    name="dataset-distillation",
    statement="Networks trained on one image a class are at least 20 points more accurate where these are optimised by "
    "distribution matching than where they are real.",
    recipe=_RECIPE,
    arms={
        "random": _arm("random", **_DIGITS),
        "herding": _arm("herding", **_DIGITS),
        "gradient": _arm("gradient", **_DIGITS),
        "distribution": _arm("distribution", **_DIGITS),
        "trajectory": _arm("trajectory", **_DIGITS),
        "random/kd": _arm("random", 1.0, **_DIGITS),
        "distribution/kd": _arm("distribution", 1.0, **_DIGITS),
    },
    checks=(
        Check("distribution", "random", 0.2, _FRESH, True, "distribution matching is 20 points above random images"),
        Check("gradient", "random", 0.1, _FRESH, True, "gradient matching is 10 points above them"),
        Check("trajectory", "distribution", 0.02, _FRESH, True, "trajectory matching is 2 points above distribution"),
        Check("distribution", "herding", 0.0, _FRESH, True, "distribution matching is above the chosen image"),
        Check("random/kd", "random", 0.05, _FRESH, True, "soft labels add 5 points to random images"),
        Check("distribution/kd", "distribution", 0.0, _FRESH, True, "and something to optimised ones"),
        Check("distribution", "random", 0.0, _OTHER, True, "in another kind of network, optimised ones are above too"),
    ),
    knobs=({"iterations": 2000}, {"image_rate": 0.1}, {"image_rate": 1.0}, {"initial": "noise"}),
    tuned_on=(_FRESH, True),
    settings={
        "real": Setting({**_RECIPE, "data": {"name": "mnist10k"}}, needs=("mnist10k",)),
        "text": Setting(
            recipe={
                "task": "text_classification",
                "data": {"name": "subjects", "limit": 1000},
                "teacher": None,
                "student": "embedding:128",
                "trainer": {"max_steps": 2, "per_device_train_batch_size": 32, "save_strategy": "no"},
            },
            needs=(),
            statement="Networks trained on two embeddings a class are more accurate where these are optimised by trajectory matching "
            "than where they are those of random texts.",
            arms={
                rule: _arm(rule, **_TEXT)
                for rule in ("random", "herding", "k-center", "pursuit", "distribution", "trajectory")
            },
            checks=(
                Check("trajectory", "random", 0.0, _FRESH, True, "trajectory matching is above random texts"),
                Check("distribution", "random", 0.0, _FRESH, True, "distribution matching is above them"),
                Check("herding", "random", 0.0, _FRESH, True, "texts chosen by means are above them"),
                Check("k-center", "random", 0.0, _FRESH, True, "farthest texts are above them"),
                Check("pursuit", "random", 0.0, _FRESH, True, "texts chosen by gradients are above them"),
                Check(
                    "trajectory",
                    "random",
                    0.0,
                    f"{_FRESH}_texts",
                    True,
                    "after projection to real texts, trajectory matching is above random ones",
                    other_metric=_FRESH,
                ),
            ),
        ),
    },
)
