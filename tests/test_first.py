"""Paper 33, FIRST: its golden vectors, limits, bad input, and the same training from a live and a cached teacher."""

import math
from types import SimpleNamespace

import pytest
import torch

from engine_cases import DIGITS, killed_run, weights
from golden_vectors import close, golden, reduce
from understudy import InputError, distill, losses
from understudy.data import Batch
from understudy.evaluation.calibration import calibrate_probabilities, expected_calibration_error, reliability
from understudy.losses._pairs import bucketed
from understudy.losses.calibration import most_probable, recalibrate, top_k_kl
from understudy.methods.first import FIRST
from understudy.models import ModelOutput
from understudy.runs.capture import capture_recipe, describe
from understudy.runs.recipe import make
from understudy.streaming import rowwise
from understudy.targets import Dense, Projected, Sampled, TopK, top_k

FORMS = {
    "ts_linear": {},
    "ls_linear": {"recalibration": "label_smoothing"},
    "linear_linear": {"recalibration": "none"},
    "softmax_softmax": {"student_c": 1.0},
    "other": {"recalibration": "none", "truncation": "tail"},
}


def settings(g):
    numbers = {"c": float(g["c_teacher"]), "delta": float(g["delta"]), "epsilon": float(g["norm_eps"])}
    return {"k": int(g["k"]), **numbers}


@pytest.mark.golden
def test_golden_targets():
    g = golden("33-first")
    mask, options = g["mask"].bool(), settings(g)
    k = options.pop("k")
    found = most_probable(g["teacher_logits"][mask], k, g["teacher_logits"].shape[-1])
    assert torch.equal(found.ids, g["topk_ids"][mask])
    probs = found.log_probs.exp()
    close(probs, g["topk_probs"][mask])
    close(probs.sum(-1), g["coverage"][mask])
    close(torch.cat([probs, found.log_tail.exp()], -1), g["target_other"][mask])
    for how, key in (("temperature", "ts"), ("label_smoothing", "ls_clipped"), ("none", "linear")):
        close(recalibrate(probs, how, **options).exp(), g[f"target_{key}"][mask])
    valid = g["ls_valid"][mask]  # what is not has a negative entry, which is clipped
    close(recalibrate(probs, "label_smoothing", **options).exp()[valid], g["target_ls"][mask][valid])
    student = bucketed(g["student_logits"][mask].log_softmax(-1), found.ids, "tail")
    close(student[:, :-1].exp(), g["student_topk_probs"][mask])


@pytest.mark.golden
@pytest.mark.parametrize("form", list(FORMS))
def test_golden_losses(form):
    g = golden("33-first")
    mask, student = g["mask"].bool(), g["student_logits"].clone().requires_grad_()
    options = settings(g) | FORMS[form]
    if "student_c" in options:
        options["student_c"] = float(g["c_student"])
    values = top_k_kl(student[mask], g["teacher_logits"][mask], **options)
    sequence = torch.arange(len(mask))[:, None].expand(mask.shape)[mask]
    total = reduce(values, "sequence_sum", sequence=sequence, count=len(mask))
    total.backward()
    if form != "other":
        close(total, g[f"loss_sum_over_B_{form}"])
        close(reduce(values, "token_mean"), g[f"loss_token_mean_{form}"])
        close(values, g[f"tok_{form}"][mask])
        close(student.grad, g[f"grad_sum_over_B_{form}"])
        return
    ids = most_probable(g["teacher_logits"], options["k"], student.shape[-1]).ids
    buckets = bucketed(student.detach().log_softmax(-1), ids, "tail")
    keep = mask & (buckets > math.log(1e-10)).all(
        -1
    )  # the file floors log-probabilities at log 1e-12; a spike is below
    assert keep.any() or options["k"] >= student.shape[-1]  # nothing is left for the bucket of all classes
    close(values[keep[mask]], g[f"tok_{form}"][keep], rtol=1e-6, atol=1e-6)
    close(student.grad[keep], g[f"grad_sum_over_B_{form}"][keep], rtol=1e-6, atol=1e-6)
    floored = g[f"tok_{form}"].masked_scatter(keep, values.detach()[keep[mask]])[mask]
    total = reduce(floored, "sequence_sum", sequence=sequence, count=len(mask))
    close(total, g[f"loss_sum_over_B_{form}"], rtol=1e-6, atol=1e-6)
    close(reduce(floored, "token_mean"), g[f"loss_token_mean_{form}"], rtol=1e-6, atol=1e-6)


@pytest.mark.golden
def test_golden_calibration():
    g = golden("33-first")
    confidence, correct, bins = g["ece_conf"], g["ece_correct"], int(g["n_bins"])
    ece = expected_calibration_error(confidence, correct, bins)
    assert ece == pytest.approx(float(g["ece"]), rel=1e-9)
    found = reliability(confidence, correct, bins)
    assert found["count"] == g["ece_bin_count"].tolist()
    for key, column in (("acc", "accuracy"), ("conf", "confidence")):
        means = [math.nan if value is None else value for value in found[column]]  # of empty bins
        assert means == pytest.approx(g[f"ece_bin_{key}"].tolist(), nan_ok=True)
    assert float(correct.mean()) == pytest.approx(float(g["accuracy"]))
    assert float(correct.mean()) - ece == pytest.approx(float(g["trust"]))
    grid = calibrate_probabilities(g["grid_val_topk_probs"], g["grid_val_correct"], bins)
    for part, name in ((grid.coarse, "coarse"), (grid.fine, "fine")):
        assert [c for c, _ in part] == pytest.approx(g[f"grid_{name}_c"].tolist())
        assert [e for _, e in part] == pytest.approx(g[f"grid_{name}_ece"].tolist())
    assert grid.best == pytest.approx(float(g["grid_best_c"]))


def rows(number=6, classes=12):
    return [torch.randn(number, classes, dtype=torch.float64) * 2 for _ in range(2)]


def test_gradient_stays_inside_the_classes():
    s, t = rows()
    ids = top_k(t, 4).ids
    s.requires_grad_()
    for truncation, inside in (("renorm", True), ("tail", False)):
        (grad,) = torch.autograd.grad(
            top_k_kl(s, t, k=4, recalibration="none", epsilon=0, truncation=truncation).sum(), s
        )
        outside = grad.scatter(-1, ids, 0.0)
        assert bool((outside.abs() < 1e-12).all()) == inside
        if inside:
            q = torch.softmax(s.detach().gather(-1, ids), -1)
            p = torch.softmax(t.gather(-1, ids), -1)
            torch.testing.assert_close(grad.gather(-1, ids), q - p)
    shifted = s.detach().scatter_add(-1, ids, torch.full_like(ids, 1, dtype=s.dtype))
    same = [top_k_kl(x, t, k=4, epsilon=0) for x in (s.detach(), shifted)]
    torch.testing.assert_close(*same)
    matched = t.scatter(-1, ids, t.gather(-1, ids) + 3)  # the same ratios inside
    assert float(top_k_kl(matched, t, k=4, recalibration="none", epsilon=0).abs().max()) < 1e-12


def test_limits_of_the_temperature():
    p = torch.tensor([[0.5, 0.3, 0.1, 0.05, 0.02], [0.4, 0.4, 0.1, 0.05, 0.02]], dtype=torch.float64)
    torch.testing.assert_close(recalibrate(p, "temperature", c=1e9).exp(), torch.full_like(p, 0.2))
    sharp = recalibrate(p, "temperature", c=1e-30).exp()
    torch.testing.assert_close(sharp, torch.tensor([[1.0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0]], dtype=p.dtype))
    for c in (0.05, 0.3, 1.0, 7.0):
        found = recalibrate(p[:1], "temperature", c=c)
        assert bool((found.diff() < 0).all()) and float(found[0, 0] - found[0, -1]) <= 1 / c
    smooth = recalibrate(p, "label_smoothing", delta=0.1).exp()
    torch.testing.assert_close(smooth.sum(-1), torch.ones(2, dtype=p.dtype))
    torch.testing.assert_close(recalibrate(p, "label_smoothing", delta=0, epsilon=0).exp(), p / p.sum(-1, keepdim=True))
    clipped = recalibrate(p, "label_smoothing", delta=0.9).exp()
    assert bool((clipped[:, 0] == 0).all()) and float(clipped.sum()) == pytest.approx(2)


def test_all_classes_are_the_whole_divergence_and_a_bucket_is_less():
    s, t = rows()
    whole = losses.forward_kl(s, t)
    torch.testing.assert_close(top_k_kl(s, t, k=50, recalibration="none", epsilon=0), whole)
    assert bool((top_k_kl(s, t, k=3, recalibration="none", truncation="tail") <= whole + 1e-12).all())


@pytest.mark.parametrize("bins", [10, 25, 49])
def test_a_confidence_on_an_edge_is_in_the_lower_bin(bins):
    edges = torch.arange(1, bins + 1, dtype=torch.float64) / bins
    assert reliability(edges, torch.ones(bins), bins)["count"] == [1] * bins
    assert reliability(edges + 1e-6, torch.ones(bins), bins)["count"] == [0] + [1] * (bins - 2) + [2]


def test_a_teacher_that_says_nan_is_not_calibrated():
    batch = Batch({}, torch.zeros(4).long(), torch.arange(4))
    logits = torch.randn(4, 12)
    logits[2, 3] = math.nan
    teacher = lambda _: ModelOutput(Dense(logits))  # noqa: E731
    context = SimpleNamespace(teacher=teacher, batches=lambda split, size: [batch], classes=12)
    with pytest.raises(InputError, match="on the validation split, and its output for row 2 of a batch is nan"):
        FIRST().setup(context)
    context.batches = lambda split, size: [Batch({}, torch.full((4,), -100), torch.arange(4))]
    with pytest.raises(InputError, match="the validation split, which has no label"):
        FIRST().setup(context)


def test_equal_errors_go_to_the_largest_c():
    p = torch.full((10, 4), 0.25, dtype=torch.float64)  # every c says 1/4
    assert calibrate_probabilities(p, torch.ones(10)).best == 1.0


def test_a_stored_target_is_the_live_one():
    s, t = rows()
    stored = top_k(t, 8)
    order = torch.randperm(8)
    mixed = TopK(stored.ids[:, order], stored.log_probs[:, order], stored.log_tail)
    for options in FORMS.values():
        torch.testing.assert_close(top_k_kl(s, mixed, k=5, **options), top_k_kl(s, t, k=5, **options))
    few = TopK(torch.tensor([[3, 1, -1]]), torch.tensor([[-0.1, -3.0, -torch.inf]]), torch.tensor([[-4.0]]))
    two = TopK(few.ids[:, :2], few.log_probs[:, :2], few.log_tail)
    for options in FORMS.values():
        torch.testing.assert_close(top_k_kl(s[:1], few, k=3, **options), top_k_kl(s[:1], two, k=2, **options))


def test_through_hidden_states_and_in_pieces():
    t, hidden, head = torch.randn(7, 12), torch.randn(7, 4, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    found = rowwise(top_k_kl, Projected(hidden, head), Dense(t), tile_bytes=200)
    plain = top_k_kl(hidden @ head.T, t)
    torch.testing.assert_close(found, plain)
    grads = [torch.autograd.grad(v.sum(), (hidden, head), retain_graph=True) for v in (found, plain)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "target,says",
    [
        (lambda t: Sampled(*[torch.zeros(6, 3)] * 3), "not in Sampled targets: capture with support scored:5"),
        (lambda t: top_k(t, 3), "keeps 3 classes a row and k is 5"),
        (lambda t: top_k(t, 5, temperature=2.0), "taken at temperature 2.0"),
        (lambda t: top_k(torch.cat([t, t + 9], -1), 5), "and the student has 12 classes"),
        (lambda t: TopK(torch.zeros(6, 5).long(), torch.full((6, 5), -2.0), torch.zeros(6, 1)), "one class twice"),
        (lambda t: TopK(torch.arange(5).expand(6, 5), torch.full((6, 5), -1.0), torch.zeros(6, 1)), "more than 1"),
        (lambda t: t[:, :11], "12 classes and the teacher 11"),
    ],
)
def test_bad_targets(target, says):
    s, t = rows()
    with pytest.raises(InputError, match=says):
        top_k_kl(s, target(t))


def test_smoothing_is_exact_in_double_precision():
    probs = torch.tensor([[0.24, 0.22, 0.2, 0.18, 0.16]], dtype=torch.float64)
    expected = probs + torch.tensor([-0.1, 0.025, 0.025, 0.025, 0.025], dtype=torch.float64)
    close(recalibrate(probs, "label_smoothing", delta=0.1, epsilon=0.0).exp(), expected, rtol=1e-14)


@pytest.mark.parametrize("probs", [[0.2, 0.3], [0.9, 0.2], [0.5, -0.1]])
def test_what_are_not_the_largest_probabilities_in_order_is_refused(probs):
    with pytest.raises(InputError, match="are no probabilities, the largest first"):
        recalibrate(torch.tensor([probs]), "label_smoothing")


@pytest.mark.parametrize(
    "options,says",
    [
        ({"k": 1}, "nothing to learn"),
        ({"truncation": "tail"}, "recalibrates nothing"),
        ({"c": 0}, "greater than 0"),
        ({"c": 0.3, "recalibration": "label_smoothing"}, "c has no effect with recalibration=label_smoothing"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        FIRST(**options)


RECIPE = {**DIGITS, "method": "first", "data": {"name": "digits", "limit": 300}, "student": "mlp:32"}
RECIPE["trainer"] = {**DIGITS["trainer"], "learning_rate": 1e-2, "max_steps": 100, "save_strategy": "no"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    trained = {"model": "mlp:64", "train": {"max_steps": 300, "per_device_train_batch_size": 32, "learning_rate": 5e-3}}
    live = distill(RECIPE, teacher=trained, output=str(folder / "live"))
    return {"model": str(folder / "live" / "teacher" / "student")}, live.metrics


def test_a_calibrated_teacher_is_learnt(teacher):
    _, found = teacher
    assert found["accuracy"] > 0.6  # chance is 0.1
    assert found["calibration_ece_after"] <= found["calibration_ece_before"] and 0 < found["calibration_c"] <= 1
    assert found["calibration_coverage"] > 0.9


def test_a_cache_teaches_the_same(teacher, tmp_path):
    spec, _ = teacher
    values = {**RECIPE, "teacher": spec, "output": str(tmp_path / "run")}
    distill(values)
    capture_recipe(make(values), tmp_path / "cache", splits=("train", "validation"))
    assert describe(tmp_path / "cache")["support"] == "scored:5"
    cached = {**values, "teacher": {**spec, "cache": str(tmp_path / "cache")}, "output": str(tmp_path / "cached")}
    distill(cached)
    torch.testing.assert_close(weights(tmp_path / "cached"), weights(tmp_path / "run"), rtol=1e-5, atol=1e-6)
    capture_recipe(make(values), tmp_path / "part", splits=("train",))
    short = {**cached, "teacher": {**spec, "cache": str(tmp_path / "part")}}
    with pytest.raises(InputError, match=r"calibrates the teacher on the validation split .*not in cache"):
        distill(short, output=str(tmp_path / "short"))
    distill(short, output=str(tmp_path / "train"), options={"calibrate_on": "train"})


def test_smoothing_that_takes_the_first_place_is_told(teacher, tmp_path, caplog):
    spec, _ = teacher
    options = {"recalibration": "label_smoothing", "delta": 0.9}
    short = {**RECIPE["trainer"], "max_steps": 1}
    distill(RECIPE, teacher=spec, output=str(tmp_path), options=options, trainer=short)
    assert "takes the first place" in caplog.text and "raises the calibration error" in caplog.text


@pytest.mark.slow
def test_killed_and_resumed(teacher, tmp_path):
    spec, _ = teacher
    base = {**RECIPE, "teacher": spec, "trainer": {**DIGITS["trainer"], "max_steps": 12}}
    distill(base, output=str(tmp_path / "whole"))
    assert killed_run({**base, "output": str(tmp_path / "cut")}, 7, "after")
    distill(base, output=str(tmp_path / "cut"))
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)
