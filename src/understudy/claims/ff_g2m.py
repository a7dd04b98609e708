"""30 FF-G2M: what differs between neighbours, taught beside what they share, makes a better student without a graph.

The embedded graph, or Cora with its public split; `--data graphs/citeseer.npz` moves it to CiteSeer. Every arm runs 200
epochs, keeps its best epoch on validation, and has the same two weight decays to choose from.
"""

from understudy.claims.experiment import Arm, Check, Claim, Setting

_DECAY = tuple({"trainer": {"weight_decay": decay}} for decay in (0.05, 0.5))
_FF = {"lam": 0.4, "tau": 1.5}
_EPOCHS = {"max_steps": 200, "learning_rate": 1e-2}
_RECIPE = {
    "task": "node_classification",
    "data": {"name": "topics"},
    "teacher": {
        "model": "gcn:hidden=128,layers=2,dropout=0.5",
        "train": {**_EPOCHS, "weight_decay": 0.5, "metric_for_best_model": "nll", "greater_is_better": False},
    },
    "student": "mlp:hidden=128,layers=2,dropout=0.5",
    "trainer": _EPOCHS,
    "patience": 200,
}

CLAIM = Claim(
    name="ff-g2m",
    statement="Low- and high-frequency distillation beat node-wise distillation (GLNN) by at least 0.8 points of accuracy.",
    recipe=_RECIPE,
    arms={
        "mlp": Arm("sft", {}, _DECAY),
        "glnn": Arm("kd", {"temperature": 1.0, "ce_weight": 0.4, "kd_weight": 0.6}, _DECAY),
        "low": Arm("ff-g2m", {**_FF, "high": 0.0}, _DECAY),
        "high": Arm("ff-g2m", {**_FF, "low": 0.0}, _DECAY),
        "ff_g2m": Arm("ff-g2m", _FF, _DECAY),
    },
    checks=(
        Check("ff_g2m", "glnn", 0.008, "accuracy", True, "FF-G2M is 0.8 points above GLNN"),
        Check("ff_g2m", "low", 0.0, "accuracy", True, "the high-frequency term adds accuracy to the low one"),
        Check("ff_g2m", "mlp", 0.0, "accuracy", True, "FF-G2M is above an MLP on the labels"),
        Check("low", "high", 0.05, "accuracy", True, "the high-frequency term alone is weak, by 5 points"),
        Check("ff_g2m", "glnn", 0.0, "high_frequency_cosine", True, "neighbours differ more like the teacher's: GLNN"),
        Check(
            "ff_g2m", "low", 0.0, "high_frequency_cosine", True, "neighbours differ more like the teacher's: low only"
        ),
    ),
    tuned_on=("accuracy", True),
    settings={"real": Setting({**_RECIPE, "data": {"name": "graphs/cora.npz"}}, needs=("graphs/cora.npz",))},
)
