"""Paper 20: distances of whole texts, and what their curves say."""

import pytest
import torch

from golden_vectors import close, golden
from understudy.errors import InputError
from understudy.evaluation.hacking import leaves_power_law, power_law, sequence_kl, sequence_log_ratio, verdict


def along(g, side, samples):
    """Log-probabilities of every next token along samples of a Markov world, 0 ending a text."""
    first = g[f"{side}_init"].log().expand(len(samples), 1, -1)
    rest = g[f"{side}_trans"].log()[samples[:, :-1].clamp(min=0)]
    return torch.cat([first, rest], 1)


@pytest.mark.golden
@pytest.mark.parametrize("name,writer", [("golden", "oracle"), ("proxy", "teacher")])
def test_golden_distances(name, writer):
    g = golden("20-teacher-hacking")
    samples = g[f"{writer}_samples"]
    mask = samples >= 0
    log_p, log_q = along(g, writer, samples), along(g, "student", samples)
    found = sequence_kl(log_p, log_q, mask)
    close(found, g[f"{name}_est_seq"], rtol=1e-9)
    ratio = sequence_log_ratio(log_p, log_q, samples, mask)
    close(ratio, g[f"{name}_est_logratio"], rtol=1e-9)
    close(mask.sum(1), g[f"{name}_len"])
    close(found.mean(), g[f"{name}_est_mean"], rtol=1e-9)
    close(ratio.mean(), g[f"{name}_est_logratio_mean"], rtol=1e-9)
    close(found.sum() / mask.sum(), g[f"{name}_est_token_mean"], rtol=1e-9)
    close((found / mask.sum(1)).mean(), g[f"{name}_est_len_norm_mean"], rtol=1e-9)


@pytest.mark.golden
def test_golden_curves():
    g = golden("20-teacher-hacking")
    proxy, epochs = g["curve_proxy"].tolist(), g["curve_epoch"].tolist()
    for name in ("hack", "ok"):
        found = verdict(g[f"curve_golden_{name}"].tolist(), proxy, delta=0.01)
        assert found.best == int(g[f"argmin_golden_{name}"])
        assert found.rise == pytest.approx(float(g[f"rise_{name}"]), rel=1e-9)
        assert found.proxy_drop == pytest.approx(float(g[f"proxy_after_min_drop_{name}"]), rel=1e-9)
        assert found.hacking == (name == "hack")
    for name in ("proxy", "golden_hack", "golden_ok"):
        line = power_law(epochs, g[f"curve_{name}"].tolist())
        close(torch.tensor([line.intercept, line.slope]).double(), g[f"powerlaw_{name}"], rtol=1e-6)
        close(line.residuals, g[f"powerlaw_residual_{name}"], rtol=1e-6, atol=1e-9)
    hacked = g["curve_golden_hack"]
    place = leaves_power_law(epochs, hacked.tolist())
    assert place is not None and place == leaves_power_law(epochs, (7 * hacked).tolist())


def test_limits():
    log_p = torch.randn(5, 4, 6, dtype=torch.float64).log_softmax(-1)
    log_q = torch.randn(5, 4, 6, dtype=torch.float64).log_softmax(-1)
    mask = torch.tensor([[1, 1, 1, 1]] * 4 + [[1, 0, 0, 0]])
    assert bool((sequence_kl(log_p, log_q, mask) >= 0).all())
    torch.testing.assert_close(sequence_kl(log_p, log_p, mask), torch.zeros(5, dtype=torch.float64))
    spoilt = log_q.clone()
    spoilt[4, 1:] = float("nan")
    torch.testing.assert_close(sequence_kl(log_p, spoilt, mask), sequence_kl(log_p, log_q, mask))
    barred = log_q.clone()
    barred[0, 0, 0] = -torch.inf
    assert sequence_kl(log_p, barred, mask)[0] == torch.inf
    constant = verdict([1.0, 1.0, 1.0], [3.0, 2.0, 1.0])
    assert not constant.hacking and constant.best == 0
    assert not verdict([0.0, 0.0], [0.0, 0.0]).hacking
    exact = [2 * e**-0.5 for e in range(1, 20)]
    assert leaves_power_law(range(1, 20), exact) is None


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: verdict([1.0], []), "1 golden and 0 proxy"),
        (lambda: power_law([1, 2], [1, 2]), "three points"),
        (lambda: power_law([0, 1, 2], [1, 1, 1]), "count epochs from 1"),
        (lambda: sequence_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.ones(1, 2)), "one vocabulary"),
    ],
)
def test_bad_curves(call, says):
    with pytest.raises(InputError, match=says):
        call()
