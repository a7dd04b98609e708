"""8 TRG: relations among patches help where classes are of very different size.

Long-tailed digits (20 of the first class for one of the last), judged on balanced test data. Every arm has the same
three learning rates to choose from.
"""

from understudy.claims.experiment import Arm, Check, Claim

_LR = tuple({"trainer": {"learning_rate": lr}} for lr in (1e-3, 3e-3, 1e-2))
_KD = {"temperature": 4.0, "ce_weight": 1.0, "kd_weight": 1.0}
_TRG = {"group": 16, "k": 5}

CLAIM = Claim(
    name="trg",
    statement="On long-tailed classes, token relations beside KD reach a higher accuracy than KD alone.",
    recipe={
        "task": "image_classification",
        "data": {"name": "digits", "imbalance": 20},
        "teacher": {
            "model": "convnet:16",
            "train": {"max_steps": 600, "per_device_train_batch_size": 32, "learning_rate": 3e-3},
        },
        "student": "convnet:4",
        "trainer": {"max_steps": 400, "per_device_train_batch_size": 32},
    },
    arms={
        "sft": Arm("sft", {}, _LR),
        "kd": Arm("kd", _KD, _LR),
        "trg": Arm("trg", _TRG, _LR),
        "instance_graph": Arm("trg", {**_TRG, "grid": 1, "alpha": 0.0}, _LR),
        "no_inner": Arm("trg", {**_TRG, "alpha": 0.0}, _LR),
        "no_local": Arm("trg", {**_TRG, "beta": 0.0}, _LR),
        "no_global": Arm("trg", {**_TRG, "gamma": 0.0}, _LR),
    },
    checks=(
        Check("trg", "kd", 0.0, "accuracy", True, "TRG is above KD"),
        Check("trg", "sft", 0.0, "accuracy", True, "TRG is above cross-entropy"),
        Check("trg", "instance_graph", 0.0, "accuracy", True, "tokens say more than whole images"),
        Check("trg", "no_local", 0.0, "accuracy", True, "the neighbour graph helps"),
        Check("trg", "no_global", 0.0, "accuracy", True, "the contrast helps"),
        Check("trg", "no_inner", 0.0, "accuracy", True, "the pattern inside images helps"),
    ),
    tuned_on=("accuracy", True),
)
