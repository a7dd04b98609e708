"""41 Margin-MSE: copying differences of scores beats copying scores where the teacher's scale is foreign.

A synthetic world of retrieval with graded truth, noisy candidates and one labelled document a query among many as
relevant. The teacher orders almost perfectly, on its own scale and with an offset for each query. The control takes
offset and scale away: there pointwise regression must close most of the gap. The first check is the harder half of the
statement, so that the verdict stands for the whole of it. 1,600 steps, where the description of the experiment has
2,500; a first run of 800 steps, whose arms all chose the largest of two smaller rates, came out 2.3 points the other way.

On real data: the abstracts and judged queries of Cranfield, re-ranked; a cross-encoder that is trained on the judgements
first, whose scale is its own. There is no control.
"""

from understudy.claims.experiment import Arm, Check, Claim, Setting

_LR = tuple({"trainer": {"learning_rate": lr}} for lr in (3e-3, 1e-2, 3e-2))
_PLAIN = {"data": {"name": "world", "foreign": False}}
_REAL = Setting(
    statement="With a cross-encoder as teacher, Margin-MSE ranks abstracts better than pointwise regression and RankNet.",
    recipe={
        "task": "ranking",
        "data": {"name": "ranking", "negatives": 4, "document_length": 128},
        "teacher": {
            "model": "bert:hidden=64,layers=2,heads=4",
            "options": {"scorer": "cross"},
            "train": {"max_steps": 600, "per_device_train_batch_size": 16, "learning_rate": 5e-4},
        },
        "student": "embedding:64",
        "trainer": {"max_steps": 600, "per_device_train_batch_size": 32, "save_strategy": "no"},
    },
    needs=("ranking",),
    arms={
        "margin_mse": Arm("margin-mse", {}, _LR),
        "pointwise_mse": Arm("margin-mse", {"loss_type": "pointwise_mse"}, _LR),
        "weighted_ranknet": Arm("margin-mse", {"loss_type": "weighted_ranknet"}, _LR),
        "ranknet": Arm("margin-mse", {"loss_type": "ranknet"}, _LR),
    },
    checks=(
        Check("margin_mse", "ranknet", 0.0, "ndcg_10", True, "Margin-MSE beats RankNet on labels"),
        Check("margin_mse", "pointwise_mse", 0.0, "ndcg_10", True, "Margin-MSE beats pointwise MSE"),
        Check("margin_mse", "weighted_ranknet", 0.0, "ndcg_10", True, "Margin-MSE beats weighted RankNet"),
    ),
    caveat="18 queries are judged, the same for every seed: the interval is over students, not over queries.",
)

CLAIM = Claim(
    name="margin-mse",
    caveat="Steps and learning rates were raised once, for all arms alike, after a first run of 800 steps had shown "
    "its test figures on another world (2.3 points below RankNet, 11 above pointwise MSE). It is judged on worlds "
    "(seeds from 3 on) that no setting was chosen on.",
    new_data=True,
    first_seed=3,
    statement="With a teacher of foreign scale, Margin-MSE ranks better than pointwise regression and RankNet.",
    recipe={
        "task": "ranking",
        "data": {"name": "world"},
        "student": "embedding:24",
        "trainer": {"max_steps": 1600, "per_device_train_batch_size": 64, "save_strategy": "no"},
    },
    arms={
        "margin_mse": Arm("margin-mse", {}, _LR),
        "pointwise_mse": Arm("margin-mse", {"loss_type": "pointwise_mse"}, _LR),
        "weighted_ranknet": Arm("margin-mse", {"loss_type": "weighted_ranknet"}, _LR),
        "ranknet": Arm("margin-mse", {"loss_type": "ranknet"}, _LR),
        "margin_mse_no_offset": Arm("margin-mse", {}, _LR, _PLAIN),
        "pointwise_mse_no_offset": Arm("margin-mse", {"loss_type": "pointwise_mse"}, _LR, _PLAIN),
    },
    checks=(
        Check("margin_mse", "ranknet", 0.04, "ndcg_10", True, "Margin-MSE beats RankNet on labels by 4 points"),
        Check("margin_mse", "pointwise_mse", 0.02, "ndcg_10", True, "Margin-MSE beats pointwise MSE by 2 points"),
        Check("margin_mse", "weighted_ranknet", 0.0, "ndcg_10", True, "Margin-MSE beats weighted RankNet"),
        Check(
            "pointwise_mse_no_offset",
            "margin_mse_no_offset",
            -0.02,
            "ndcg_10",
            True,
            "without offset and foreign scale pointwise MSE is within 2 points",
        ),
    ),
    tuned_on=("ndcg_10", True),
    settings={"real": _REAL},
)
