"""29 HARD: learned augmentations hand on an invariance of the teacher that plain KD does not.

Signals that are always at one place in training, and anywhere in the test. The teacher ignores the place by design. All
arms have 3,000 steps, those of the augmentor counted, and the same settings: nothing is tuned, since validation data at
one place could tell nothing of the others. Arms that augment show both models twice as many examples a step (`forwards`
in the budget says how many). Beside it, a teacher that does not ignore the place, from which nothing is to be had.

On real data: 500 handwritten digits, a convolutional teacher that saw all and a fully connected student, with affine maps
as augmentations. There are no moved digits to judge on: what counts is the accuracy on others as they are.
"""

from understudy.claims.experiment import Arm, Check, Claim, Setting

_AS_IS: tuple[dict[str, object], ...] = ({},)
_KD = {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": 2.0}
_HARD = {"augmentor": "shift1d"}
_TRAIN = {"max_steps": 600, "per_device_train_batch_size": 64, "learning_rate": 2e-3}
_FLAT = {"teacher": {"model": "circular:16,flat", "train": _TRAIN}}

_REAL_RATES = tuple({"trainer": {"learning_rate": lr}} for lr in (1e-3, 2e-3))
_REAL = Setting(
    statement="With few data, augmentations learned against a convolutional teacher take a fully connected student further "
    "than plain KD.",
    recipe={
        "task": "image_classification",
        "data": {"name": "mnist10k", "limit": 500},
        "teacher": {
            "model": "convnet:16",
            "train": {"max_steps": 800, "per_device_train_batch_size": 64, "learning_rate": 2e-3},
        },
        "student": "mlp:256,256",
        "trainer": {"max_steps": 1500, "per_device_train_batch_size": 64, "save_strategy": "no"},
    },
    needs=("mnist10k",),
    arms={
        "sft": Arm("sft", {}, _REAL_RATES),
        "kd": Arm("kd", _KD, _REAL_RATES),
        "fixed": Arm("hard", {"augmentor": "affine", "learn": False, "spread": 0.1}, _REAL_RATES),
        "hard": Arm("hard", {"augmentor": "affine"}, _REAL_RATES),
    },
    checks=(
        Check("hard", "kd", 0.0, "accuracy", True, "HARD is above plain KD"),
        Check("hard", "fixed", 0.0, "accuracy", True, "and above KD with random affine maps"),
        Check("hard", "sft", 0.0, "accuracy", True, "and above cross-entropy"),
    ),
)


def _random(reach: float) -> dict[str, object]:
    return {**_HARD, "learn": False, "noise": "uniform", "spread": reach}


CLAIM = Claim(
    name="hard",
    caveat="Nothing is tuned, since validation in place says nothing about moved signals. Batch, learning rate and "
    "the teacher's width were chosen for run time after pilots on seed 0 had shown HARD's test accuracy, so "
    "that seed was seen before.",
    statement="Learned augmentations carry a teacher's shift invariance over: at least 25 points above plain KD.",
    recipe={
        "task": "image_classification",
        "data": {"name": "templates"},
        "teacher": {"model": "circular:16", "train": _TRAIN},
        "student": "mlp:256,256",
        "trainer": {
            "max_steps": 3000,
            "per_device_train_batch_size": 64,
            "learning_rate": 2e-3,
            "save_strategy": "no",
            "logging_steps": 100,
        },
    },
    arms={
        "sft": Arm("sft", {}, _AS_IS),
        "kd": Arm("kd", _KD, _AS_IS),
        "fixed": Arm("hard", _random(3.0), _AS_IS),
        "hard": Arm("hard", _HARD, _AS_IS),
        "oracle": Arm("hard", _random(20.0), _AS_IS),
        "kd_flat": Arm("kd", _KD, _AS_IS, _FLAT),
        "hard_flat": Arm("hard", _HARD, _AS_IS, _FLAT),
    },
    checks=(
        Check("hard", "kd", 0.25, "accuracy", True, "HARD is 25 points above plain KD on moved signals"),
        Check("hard", "fixed", 0.15, "accuracy", True, "and 15 above KD with random shifts of up to 3"),
        Check("hard", "kd", -0.02, "accuracy_clean", True, "it loses less than 2 points on signals in place"),
        Check("oracle", "hard", 0.0, "accuracy", True, "random shifts over the whole circle are above HARD"),
        Check(
            "hard_flat", "hard", 0.0, "augmentor_spread", False, "a teacher that is no more robust keeps shifts small"
        ),
        Check(
            "hard_flat", "kd_flat", -0.02, "accuracy_clean", True, "and costs less than 2 points on signals in place"
        ),
    ),
    tuned_on=("accuracy", True),
    settings={"real": _REAL},
)
