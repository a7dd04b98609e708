"""Limits of TAID's schedule (card 19, limits 5 and 6, and bad input)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.methods.taid import TAID
from understudy.training import TrainState
from understudy.training.schedules import ProgressSchedule


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=40), st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 0.99))
def test_t_never_falls_and_never_lags_the_line(losses, start, alpha, beta):
    schedule, total = ProgressSchedule(start, 1.0, alpha, beta), len(losses)
    before = schedule.value
    for n, loss in enumerate(losses):
        schedule.update(loss, n, total)
        assert before <= schedule.value <= 1.0
        assert n == 0 or schedule.value >= schedule.linear(n, total)
        before = schedule.value


def test_without_alpha_or_adaptivity_it_is_linear():
    for schedule in (ProgressSchedule(0.2, 0.9, 0.0, 0.9), ProgressSchedule(0.2, 0.9, 0.5, 0.9, adaptive=False)):
        for n in range(10):
            schedule.update(3.0 / (n + 1), n, 10)
            assert n == 0 or schedule.value == pytest.approx(0.2 + 0.7 * n / 10)
    assert schedule.linear(10, 10) == pytest.approx(0.9)


def test_an_adaptive_step_that_is_never_taken_is_said(caplog):
    """Card 19, pitfall 1: then the schedule is linear to the last digit."""

    def run(total, steps=1, **options):
        caplog.clear()
        method = TAID(**options)
        state = TrainState(method_state=method.init_state(total), total=total)
        for step in range(steps):
            state.step = step
            method.on_pre_optimizer_step(state, {"taid": 0.9**step})
            assert step == 0 or state.method_state.value == state.method_state.linear(step, total) or total > 2000
        return caplog.text.count("is never above the linear pace")

    assert run(2000, 2000) == 1 and run(2010, 2) == 0
    assert [run(300, **options) for options in ({"adaptive": False}, {"alpha": 0.0}, {"alpha": 8 / 300})] == [0] * 3


def test_a_constant_loss_still_drifts():
    schedule = ProgressSchedule(0.0, 1.0, 0.1, 0.9)
    for _ in range(6):
        schedule.update(2.0, 0, 1000)
    assert 1 - schedule.value == pytest.approx((1 - 0.05) ** 5)


def test_a_loss_of_0_is_no_progress():
    """`drive=kl` with `t_start=0`: the first target is the student itself."""
    schedule = ProgressSchedule(0.0, 1.0, 0.1, 0.9)
    for loss in (0.0, 0.0, 1e-3, 1e-3):
        schedule.update(loss, 0, 1000)
    assert schedule.momentum == 0 and 1 - schedule.value == pytest.approx((1 - 0.05) ** 3)


def test_a_loss_that_is_not_finite_is_skipped_and_steps_are_checked():
    schedule = ProgressSchedule(0.2, 1.0, 0.5, 0.9)
    schedule.update(2.0, 0, 10)
    for bad in (math.nan, math.inf):
        schedule.update(bad, 0, 10)
    assert schedule.state_dict() == {"value": 0.2, "momentum": 0.0, "previous": 2.0}
    with pytest.raises(ValueError, match="not within a run"):
        schedule.update(1.0, 11, 10)
    with pytest.raises(ValueError, match="not within a run"):
        schedule.linear(0, 0)
