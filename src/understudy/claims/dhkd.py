"""40 DHKD: a head of its own for the logit loss protects the classifier where the teacher's logits mislead.

The card's World B: 40 classes in 8 super-clusters, a teacher that saw 400 examples, a student that sees 1,600.

On real data: photographs, a teacher that saw 1,000, a student that sees 5,000.
"""

from understudy.claims._photographs import CONVNET, photographs
from understudy.claims.experiment import Arm, Check, Claim

_LR = tuple({"trainer": {"learning_rate": lr}} for lr in (1e-3, 2e-3, 4e-3))

CLAIM = Claim(
    name="dhkd",
    statement="With a weak teacher, a second head beats both losses on one head by at least 3 points of accuracy.",
    recipe={
        "task": "image_classification",
        "data": {"name": "clusters", "limit": 1600, "teacher_limit": 400},
        "teacher": {
            "model": "mlp:128,128",
            "train": {"max_steps": 800, "per_device_train_batch_size": 64, "learning_rate": 1e-3},
        },
        "student": "mlp:48,48",
        "trainer": {"max_steps": 1000, "per_device_train_batch_size": 64},
    },
    arms={
        "sft": Arm("sft", {}, _LR),
        "single": Arm("dhkd", {"head": "shared"}, _LR),
        "dual_linear": Arm("dhkd", {"head": "linear"}, _LR),
        "dual_nonlinear": Arm("dhkd", {"head": "nonlinear"}, _LR),
    },
    checks=(
        Check("dual_nonlinear", "single", 0.03, "accuracy", True, "two heads (non-linear) beat one by 3 points"),
        Check("dual_linear", "single", 0.02, "accuracy", True, "two heads (linear) beat one by 2 points"),
        Check("dual_nonlinear", "sft", 0.0, "accuracy", True, "two heads beat cross-entropy alone"),
    ),
    tuned_on=("accuracy", True),
    settings={"real": photographs({"limit": 5000, "teacher_limit": 1000}, CONVNET, 500)},
)
