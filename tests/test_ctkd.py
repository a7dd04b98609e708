"""CTKD: the slope in the temperature, its reversed gradient and schedule, limits, splits, resume, runs, bad input."""

import json
import math
from functools import partial

import pytest
import torch

from engine_cases import DIGITS, TEXT, killed_run, weights
from golden_vectors import close
from split_cases import ends_alike
from test_engine import trainer_for
from understudy import InputError, distill
from understudy.data import Batch
from understudy.losses import forward_kl
from understudy.losses.temperature import temperature_slope
from understudy.methods.ctkd import CTKD, LearnedTemperature
from understudy.methods.kd import KD
from understudy.models import ModelOutput
from understudy.runs.recipe import make
from understudy.streaming import plain, rowwise
from understudy.targets import Dense, Projected, sample, top_k
from understudy.training import TrainState

F64 = torch.float64


def sides(rows=6, classes=9, scale=3.0):
    g = torch.Generator().manual_seed(0)
    return scale * torch.randn(2, rows, classes, generator=g, dtype=F64)


def by_autograd(s, t, tau):
    """∂/∂τ of τ² KL for each row."""
    taus = torch.full((len(s),), tau, dtype=F64, requires_grad=True)
    p, q = ((x / taus[:, None]).log_softmax(-1) for x in (t, s))
    return torch.autograd.grad((taus**2 * (p.exp() * (p - q)).sum(-1)).sum(), taus)[0]


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, 20.0])
def test_the_slope_is_the_derivative(tau):
    s, t = sides()
    exact = by_autograd(s, t, tau)
    close(temperature_slope(s, t, temperature=tau), exact)
    found = temperature_slope(s.float(), t.float(), temperature=tau)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)
    assert not temperature_slope(s.requires_grad_(), t, temperature=tau).requires_grad
    close(temperature_slope(s + 5, t - 7, temperature=tau), exact)
    assert temperature_slope(t + 2, t, temperature=tau).abs().max() < 1e-12


def test_the_slope_goes_to_zero_and_is_that_of_the_allowed_classes():
    s, t = sides()
    assert temperature_slope(s, t, temperature=1e4).abs().max() < 1e-3
    without = temperature_slope(s, t, temperature=2.0)
    pad = torch.full((6, 1), -math.inf, dtype=F64)
    close(temperature_slope(torch.cat([s, pad], 1), torch.cat([t, pad], 1), temperature=2.0), without)
    alone = torch.cat([s, torch.zeros(6, 1, dtype=F64)], 1)  # forbidden by the teacher: finite
    low = torch.cat([t, torch.full((6, 1), -2000.0, dtype=F64)], 1)
    found = temperature_slope(alone, torch.cat([t, pad], 1), temperature=2.0)
    close(found, temperature_slope(alone, low, temperature=2.0))
    s[0, 1] = -math.inf  # by the student alone: the KL is infinite
    found = temperature_slope(s, t, temperature=2.0)
    assert found[0] == math.inf and found[1:].isfinite().all()


def test_tiles_give_the_slope_of_the_whole():
    g = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=g, dtype=F64)
    student, teacher = Projected(draw(13, 8).requires_grad_(), draw(29, 8)), Projected(draw(13, 5), draw(29, 5))
    how = {"temperature": 3.0}
    found = rowwise(temperature_slope, student.detach(), teacher, **how, tile_bytes=29 * 8 * 4)
    close(found, plain(temperature_slope, student, teacher, **how))


def batch_of(rows):
    return Batch({}, torch.arange(rows), torch.arange(rows))


def test_the_temperature_goes_up_the_loss_by_the_reversed_gradient():
    """Two updates by hand in float64, with autograd through the temperature: θ moves by +μ λ times the gradient."""
    s, t = sides()
    method = CTKD(temperature=4.0, temperature_rate=0.3, momentum=0.5, ramp=1.0, lambda_max=2.0)
    state = TrainState(method_state=method.init_state(10), total=10)
    theta, velocity = math.log(3 / 17), 0.0
    assert state.method_state.value == pytest.approx(4.0)
    for step in (0, 3, 4):
        state.step = step
        leaf = torch.tensor(theta, dtype=F64, requires_grad=True)
        tau = 1 + 20 * torch.sigmoid(leaf)
        p, q = ((x / tau).log_softmax(-1) for x in (t, s))
        (gradient,) = torch.autograd.grad(0.9 * (tau**2 * (p.exp() * (p - q)).sum(-1)).mean(), leaf)
        terms = method.loss(ModelOutput(Dense(s)), ModelOutput(Dense(t)), batch_of(6), state)
        method.on_pre_optimizer_step(state, {name: float(term.values.mean()) for name, term in terms.items()})
        weight = 2.0 * (1 - math.cos(math.pi * step / 10)) / 2
        velocity = 0.5 * velocity + weight * float(gradient)
        theta += 0.3 * velocity
        assert state.method_state.theta == pytest.approx(theta, rel=1e-9)
        assert state.method_state.logs() == pytest.approx({"temperature": state.method_state.value, "lambda": weight})
    assert velocity != 0 and terms["slope"].weight == 0.0


def test_the_student_descends_at_the_temperature_as_it_is():
    s, t = sides()
    method, leaf = CTKD(temperature=4.0, ce_weight=0.0), s.clone().requires_grad_()
    state = TrainState(method_state=method.init_state(10), total=10)
    terms = method.loss(ModelOutput(Dense(leaf)), ModelOutput(Dense(t)), batch_of(6), state)
    assert not terms["slope"].values.requires_grad
    (found,) = torch.autograd.grad(terms["kd"].values.sum(), leaf)
    again = s.clone().requires_grad_()
    (expected,) = torch.autograd.grad(forward_kl(again, t, temperature=4.0, tau_squared=True).sum(), again)
    close(found, expected)


def test_the_weight_begins_at_zero_and_ends_at_its_maximum():
    found = []
    for ramp in (1.0, 0.2):
        method = CTKD(lambda_max=0.7, ramp=ramp)
        state = TrainState(method_state=method.init_state(100), total=100)
        for step in range(101):
            state.step = step
            method.on_pre_optimizer_step(state, {"slope": 0.0})
            found.append(state.method_state.weight)
    slow, fast = found[:101], found[101:]
    assert slow[0] == fast[0] == 0 and slow[-1] == fast[-1] == pytest.approx(0.7)
    assert slow == sorted(slow) and fast[20:] == pytest.approx([0.7] * 81)
    assert slow[50] == fast[10] == pytest.approx(0.35)


def test_the_temperature_stays_within_its_bounds():
    for slope in (1e6, -1e6):
        state = LearnedTemperature.at(4.0, 1.0, 21.0)
        for _ in range(20):
            state.ascend(slope, 1.0, 1.0, 0.9)
            assert 1.0 <= state.value <= 21.0 and math.isfinite(state.value)
        assert state.value == pytest.approx(21.0 if slope > 0 else 1.0)
    method = CTKD()
    state = TrainState(method_state=method.init_state(10), total=10, step=9)
    before = state.method_state.value
    assert before == pytest.approx(1 + 20 / (1 + math.exp(-1)), abs=0.01)  # the released code's start
    for slope in (math.nan, math.inf):
        method.on_pre_optimizer_step(state, {"slope": slope})
    assert state.method_state.value == before


@pytest.mark.parametrize("fixed", [{"lambda_max": 0.0}, {"temperature_rate": 0.0}])
def test_without_the_adversary_it_is_kd(fixed, tmp_path):
    ends = []
    for method in (CTKD(temperature=4.0, **fixed), KD(temperature=4.0)):
        trainer = trainer_for(method, tmp_path, 4, 3)
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.student.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("text", [False, True])
def test_any_split_of_a_batch_gives_the_same_update(text, tmp_path):
    found = []

    def done(trainer):
        state = trainer.model.train_state.method_state
        found.append((state.theta, state.velocity))
        assert abs(state.value - 4.0) > 1e-4

    method = CTKD(temperature=4.0, temperature_rate=200.0 if text else 2.0)  # a new language model is nearly flat
    ends_alike(partial(trainer_for, method, tmp_path, text=text), atol=1e-9, done=done)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-9)


def last_log(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights_and_temperature(tmp_path):
    trainer = {**DIGITS["trainer"], "max_steps": 10, "save_steps": 2}
    options = {"temperature": 4.0, "temperature_rate": 1.0, "ramp": 0.5}
    whole, cut = (
        {**DIGITS, "method": "ctkd", "options": options, "trainer": trainer, "output": str(tmp_path / way)}
        for way in ("whole", "cut")
    )
    distill(whole)
    assert killed_run(cut, 5, "after")
    distill(cut)
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)
    ends = [last_log(tmp_path / way)["state"] for way in ("whole", "cut")]
    assert ends[0] == ends[1] and ends[0]["lambda"] == 1.0 and abs(ends[0]["temperature"] - 4.0) > 1e-3


def test_it_learns_digits_against_a_temperature_that_makes_it_harder(tmp_path):
    trainer = {"max_steps": 200, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "save_strategy": "no"}
    recipe = {**DIGITS, "method": "ctkd", "data": {"name": "digits", "limit": 300}, "output": str(tmp_path)}
    teacher = {"model": "mlp:16", "train": {"max_steps": 200, "learning_rate": 1e-2}}
    result = distill({**recipe, "teacher": teacher, "trainer": {**trainer, "logging_steps": 1}})
    assert result.metrics["accuracy"] > 0.4  # chance is 0.1
    assert last_log(tmp_path)["state"]["temperature"] != pytest.approx(15.62, abs=0.01)


def test_a_language_model_learns_with_it(tmp_path):
    result = distill({**TEXT, "method": "ctkd", "options": {"temperature": 2.0}, "output": str(tmp_path / "run")})
    assert math.isfinite(result.metrics["nll"]) and 1.0 < last_log(tmp_path / "run")["state"]["temperature"] < 21.0


@pytest.mark.parametrize("target", [lambda t: top_k(t, 3), lambda t: sample(t, 4)])
def test_targets_of_one_temperature_are_refused(target):
    s, t = sides()
    with pytest.raises(InputError, match=r"temperature_slope is not defined for .* it accepts Dense"):
        temperature_slope(s, target(t), temperature=1.0)


def test_bad_input(tmp_path):
    s, t = sides()
    with pytest.raises(InputError, match="temperature is 0"):
        temperature_slope(s, t, temperature=0)
    with pytest.raises(InputError, match="9 classes and the teacher 8"):
        temperature_slope(s, t[:, :8], temperature=1.0)
    with pytest.raises(InputError, match="row 0 is not a distribution: the teacher has nan"):
        temperature_slope(s, t * math.nan, temperature=1.0)
    for options in ({"temperature": 25.0}, {"temperature": 1.0}, {"bounds": (0.0, 21.0)}, {"bounds": (30.0, 21.0)}):
        with pytest.raises(InputError, match="must lie between the bounds"):
            make({**DIGITS, "method": "ctkd", "options": options, "output": str(tmp_path)})
    with pytest.raises(InputError, match="ramp"):
        make({**DIGITS, "method": "ctkd", "options": {"ramp": 0.0}, "output": str(tmp_path)})
    assert not tmp_path.joinpath("run.json").exists()
