"""Paper 20: distances of whole texts, and what their curves say."""

import math

import pytest
import torch

from golden_vectors import close, golden
from own_texts import examples, rows, words
from understudy.data import IGNORE, Batch, collate_text
from understudy.errors import InputError
from understudy.evaluation.hacking import HeldOut, leaves_power_law, power_law, text_distances, verdict
from understudy.losses import forward_kl
from understudy.targets import Dense
from understudy.teachers import LocalTeacher


def along(g, side, samples):
    """What a Markov world says about every token of samples, 0 ending a text and −1 after it."""
    first = g[f"{side}_init"].log().expand(len(samples), 1, -1)
    rest = g[f"{side}_trans"].log()[samples[:, :-1].clamp(min=0)]
    return Dense(torch.cat([first, rest], 1)[samples >= 0])


def texts(samples):
    labels = torch.cat([torch.full((len(samples), 1), IGNORE), samples.where(samples >= 0, IGNORE)], 1)
    return Batch({}, labels, torch.arange(len(samples)))


def steps(g, p, q, length, ended):
    """E KL(p_t ‖ q_t) of each step of a Markov world, exactly; a text that has ended says no more."""
    at, found = g[f"{p}_init"], [forward_kl(g[f"{q}_init"].log()[None], g[f"{p}_init"].log()[None])[0]]
    by_state = forward_kl(g[f"{q}_trans"].log(), g[f"{p}_trans"].log())
    for _ in range(length - 1):
        on = at.clone()
        on[: int(ended)] = 0.0
        found.append((on * by_state).sum())
        at = on @ g[f"{p}_trans"]
    return torch.stack(found)


@pytest.mark.golden
def test_golden_chain_rule():
    """The KL of whole texts is the sum over steps of the expected KL of the next token."""
    g = golden("20-teacher-hacking")
    length = int(g["L"])
    for name, p, q in (
        ("golden", "oracle", "student"),
        ("proxy", "teacher", "student"),
        ("teacher_gap", "oracle", "teacher"),
    ):
        found = steps(g, p, q, length, ended=False)
        close(found, g[f"{name}_steps"], rtol=1e-9)
        close(found.sum(), g[f"{name}_exact"], rtol=1e-9)
        if name != "teacher_gap":
            close(found.mean(), g[f"{name}_len_norm"], rtol=1e-9)
            close(steps(g, p, q, length, ended=True).sum(), g[f"{name}_exact_eos"], rtol=1e-9)
    close(steps(g, "student", "teacher", length, ended=False).sum(), g["proxy_reverse_exact"], rtol=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize("name,writer", [("golden", "oracle"), ("proxy", "teacher")])
def test_golden_distances(name, writer):
    g = golden("20-teacher-hacking")
    samples = g[f"{writer}_samples"]
    found = text_distances(along(g, writer, samples), along(g, "student", samples), texts(samples))
    close(found.kl, g[f"{name}_est_seq"], rtol=1e-9)
    close(found.log_ratio, g[f"{name}_est_logratio"], rtol=1e-9)
    close(found.lengths, g[f"{name}_len"].double())
    close(found.kl.mean(), g[f"{name}_est_mean"], rtol=1e-9)
    close(found.log_ratio.mean(), g[f"{name}_est_logratio_mean"], rtol=1e-9)
    close(found.kl.sum() / found.lengths.sum(), g[f"{name}_est_token_mean"], rtol=1e-9)
    close((found.kl / found.lengths).mean(), g[f"{name}_est_len_norm_mean"], rtol=1e-9)


@pytest.mark.golden
def test_golden_curves():
    g = golden("20-teacher-hacking")
    proxy, epochs = g["curve_proxy"].tolist(), g["curve_epoch"].tolist()
    for name in ("hack", "ok"):
        found = verdict(g[f"curve_golden_{name}"].tolist(), proxy)
        assert found.best == int(g[f"argmin_golden_{name}"])
        assert found.rise == pytest.approx(float(g[f"rise_{name}"]), rel=1e-9)
        assert found.proxy_drop == pytest.approx(float(g[f"proxy_after_min_drop_{name}"]), rel=1e-9)
        assert found.hacking == (found.rise > 0.02 and found.proxy_drop > 0)
    for name in ("proxy", "golden_hack", "golden_ok"):
        line = power_law(epochs, g[f"curve_{name}"].tolist())
        close(g[f"powerlaw_{name}"].new_tensor([line.intercept, line.slope]), g[f"powerlaw_{name}"], rtol=1e-9)
        close(line.residuals, g[f"powerlaw_residual_{name}"], rtol=1e-9)
        scaled = (7 * g[f"curve_{name}"]).tolist()  # limit 6
        assert leaves_power_law(epochs, scaled) == leaves_power_law(epochs, g[f"curve_{name}"].tolist())


def test_limits():
    samples = torch.tensor([[1, 2, 3, 4]] * 4 + [[1, -1, -1, -1]])
    batch = texts(samples)
    p, q = (Dense(torch.randn(17, 6, dtype=torch.float64).log_softmax(-1)) for _ in range(2))
    found = text_distances(p, q, batch)
    assert bool((found.kl >= 0).all()) and found.lengths.tolist() == [4, 4, 4, 4, 1]
    assert text_distances(p, p, batch).kl.abs().max() < 1e-12
    barred = q.logits.clone()
    barred[0, 0] = -torch.inf
    assert text_distances(p, Dense(barred), batch).kl[0] == torch.inf  # and no nan


def test_the_two_estimators_agree_and_the_whole_vocabulary_varies_less():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    samples = torch.multinomial(p.exp(), 40_000, replacement=True, generator=g).view(10_000, 4)
    found = text_distances(*(Dense(side.expand(40_000, 5)) for side in (p, q)), texts(samples))
    assert float(found.log_ratio.mean()) == pytest.approx(float(found.kl.mean()), rel=0.05)
    assert found.kl.var() < found.log_ratio.var()


def test_curves_that_say_nothing():
    constant = verdict([1.0, 1.0, 1.0], [3.0, 2.0, 1.0])
    assert not constant.hacking and constant.best == 0
    assert not verdict([0.0, 0.0], [0.0, 0.0]).hacking
    exact = [2 * e**-0.5 for e in range(1, 20)]
    assert leaves_power_law(range(1, 20), exact) is None
    turned = [*exact[:12], *[1.02**e * exact[11] for e in range(1, 8)]]
    assert leaves_power_law(range(1, 20), turned) == 14
    ruled_out = verdict([math.inf, math.inf], [3.0, 2.0])  # infinitely far all the time is no rise
    assert not ruled_out.hacking and ruled_out.rise == 0


def test_a_student_that_leaves_the_truth_is_hacking_its_teacher_by_however_little():
    """From a golden distance of 0 every rise is more than δ of it."""
    found = verdict([0.5, 0.0, 0.5], [1.0, 0.8, 0.4])
    assert found.hacking and found.best == 1 and found.rise == math.inf


def test_a_proxy_that_has_stalled_is_replaced_by_the_training_loss():
    golden, proxy = [1.0, 0.8, 0.9], [1.0, 0.7, 0.71]
    assert not verdict(golden, proxy).hacking
    assert verdict(golden, proxy, loss=[None, 0.5, 0.4]).hacking
    assert not verdict(golden, proxy, loss=[None, 0.5, 0.6]).hacking


def test_a_student_that_leaves_its_teacher_too_is_not_hacking_it():
    falling = [None, 0.5, 0.4, 0.3]
    for curve in (
        [1.0, 0.8, 0.82, 0.9],
        [1.0, 1.2, 1.3, 1.5],
    ):  # with the truth as teacher both curves are one (limit 2)
        assert not verdict(curve, curve, loss=falling).hacking and verdict(curve, curve).rise > 0.02
    diverging = verdict([1.0, 1.5], [1.0, 1.6], loss=[None, 3.0])
    assert not diverging.hacking and diverging.best == 0
    assert verdict([1.0, 1.1, 1.2], [1.0, 1.0, 1.01], loss=[None, 0.5, 0.4]).hacking


def test_distances_to_oracle_and_teacher_on_held_out_prompts():
    """A student that is its teacher has no proxy and the teacher's gap; with the oracle as teacher the two are one."""
    tokenizer = words()
    oracle, teacher, student = (rows(tokenizer, seed=s) for s in (1, 2, 3))
    items = examples(tokenizer, 6)

    def held(first, second):
        sides = LocalTeacher(first, "oracle"), LocalTeacher(second, "teacher")
        return HeldOut(*sides, [items[i] for i in range(6)], tokenizer, collate_text, most=5, seed=0, batch=4)

    one = held(oracle, teacher)
    found, copied = one.measure(student), one.measure(teacher)
    assert min(found.values()) > 0 and found["golden"] == pytest.approx(5 * found["golden_per_token"], rel=0.3)
    assert copied["proxy"] == pytest.approx(0, abs=1e-5) and copied["golden"] == copied["teacher_golden"]
    assert one.measure(student) == found  # the texts stay
    same = held(oracle, oracle).measure(student)
    assert same["golden"] == same["proxy"] > 0 and same["teacher_golden"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: verdict([1.0], []), "1 golden and 0 proxy"),
        (lambda: power_law([1, 2], [1, 2]), "three points"),
        (lambda: power_law([0, 1, 2], [1, 1, 1]), "count epochs from 1"),
        (lambda: power_law([1, 2, 3], [1, math.inf, 1]), "above 0 and finite"),
        (lambda: verdict([1.0, math.nan], [1.0, 1.0]), "value is nan"),
        (
            lambda: text_distances(
                Dense(torch.zeros(2, 3)), Dense(torch.zeros(2, 4)), texts(torch.zeros(1, 2, dtype=torch.long))
            ),
            "3 tokens and the other 4",
        ),
    ],
)
def test_bad_curves(call, says):
    with pytest.raises(InputError, match=says):
        call()
