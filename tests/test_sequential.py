"""Intervals that may be looked at after every round: how often they are wrong, and how soon they decide."""

import numpy as np
import pytest
from scipy.stats import t as student_t

from understudy.reporting import interval, paired_sequence, sequence, verdict
from understudy.reporting.sequential import FIRST, limit, required_size, spent

LOOKS = (3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 20)


def decisions(effect, bar, draws, seed, level=0.95):
    """What each draw ends with, looked at until it is decided or 20 values are spent, and after how many values."""
    rng = np.random.default_rng(seed)
    for values in rng.normal(effect, 1.0, (draws, LOOKS[-1])):
        for n in LOOKS:
            said = verdict(sequence(values[:n], level), bar)
            if said != "inconclusive":
                break
        yield said, n


def test_an_effect_at_the_bar_is_rarely_decided():
    """1,000 draws with the effect exactly at the bar: any verdict is false, and looking eleven times does not add up."""
    wrong = [said for said, _ in decisions(0.3, 0.3, 1000, seed=0) if said != "inconclusive"]
    assert 0.02 <= len(wrong) / 1000 <= 0.05
    assert {"supported", "not supported"} == set(wrong)  # of either side


def test_looking_again_at_a_fixed_interval_does_add_up():
    """The case for it: Student's interval, asked at the same looks, is wrong three times as often as it says."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1000, LOOKS[-1]))
    wrong = sum(any(verdict(interval(v[:n])) != "inconclusive" for n in LOOKS) for v in values)
    assert wrong / 1000 > 0.12


def test_power_at_small_numbers():
    """In deviations of the paired difference from the bar: what is decided by 3, 5, 10 and 20 seeds."""
    expected = {0.5: (0.0, 0.03, 0.08, 0.17), 1.0: (0.03, 0.13, 0.38, 0.78), 2.0: (0.13, 0.52, 0.96, 1.0)}
    expected |= {4.0: (0.48, 0.96, 1.0, 1.0), 8.0: (0.92, 1.0, 1.0, 1.0)}
    for effect, least in expected.items():
        found = list(decisions(effect, 0.0, 400, seed=1))
        by = [sum(said == "supported" and n <= most for said, n in found) / 400 for most in (3, 5, 10, 20)]
        mean = np.mean([n for _, n in found])
        print(f"effect {effect:g}: decided by 3, 5, 10, 20 seeds: {by}; {mean:.1f} seeds on average")
        assert all(share >= floor for share, floor in zip(by, least, strict=True)), (effect, by)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_every_look_up_to_any_number_is_covered(level):
    """The bounds hold together, also where one looks at each number of values; a level is what it says."""
    rng = np.random.default_rng(7)
    values = rng.normal(size=(20_000, 40))
    missed = np.zeros(len(values), bool)
    for n in range(FIRST, 41):
        t = values[:, :n].mean(1) / values[:, :n].std(1, ddof=1) * np.sqrt(n)
        missed |= np.abs(t) > limit(n, level)
        assert missed.mean() == pytest.approx(spent(n, level), abs=0.006 if level > 0.9 else 0.012)
    assert missed.mean() <= 1 - level


def test_limits_are_as_they_must_be():
    assert limit(3) == pytest.approx(student_t.ppf(1 - 0.05 / 6, 2))  # the first look alone, at a third of the chance
    assert all(limit(n) > student_t.ppf(0.975, n - 1) for n in range(3, 60))
    assert limit(33) == pytest.approx(limit(32), rel=0.02)  # where the table is made longer
    assert [spent(n) for n in (1, 2)] == [0, 0] and spent(10**9) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="at least 3"):
        limit(2)


def test_the_interval_is_of_the_mean_scales_and_shifts():
    values = [1.0, 2.0, 4.0, 3.0]
    low, high = sequence(values)[1:]
    assert sequence(values).mean == 2.5 and low + high == pytest.approx(5.0)
    assert high - 2.5 == pytest.approx(limit(4) * np.std(values, ddof=1) / 2)
    moved = sequence([10 * v - 7 for v in values])
    assert moved[1:] == pytest.approx((10 * low - 7, 10 * high - 7))
    assert paired_sequence([v + 1 for v in values], [1.0] * 4) == sequence(values)
    assert sequence([1.0, 2.0])[1:] == (None, None) and verdict(sequence([1.0, 2.0])) == "inconclusive"
    assert sequence([0.5] * 3) == (0.5, 0.5, 0.5)  # no deviation, no doubt


def test_the_number_that_would_decide_is_the_first_that_does():
    """The same values, repeated, are decided at that number and not before."""
    rng = np.random.default_rng(3)
    values = rng.normal(0.8, 1.0, 6)
    values = (values - values.mean()) / values.std(ddof=1) + 0.8
    number = required_size(values, 0.1)
    assert number is not None and limit(number) / np.sqrt(number) < 0.7 <= limit(number - 1) / np.sqrt(number - 1)
    assert required_size(values, 0.1) == required_size(-values, -0.1) == required_size(10 * values, 1.0)
    assert required_size(values, -0.1) < number < required_size(values, 0.5)
    assert required_size(values, 0.8) is None and required_size(values, 0.7, most=50) is None
    assert required_size([1.0, 1.0]) == FIRST
