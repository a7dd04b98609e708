"""Paper 13, Swing Distillation: golden vectors, limits of temperatures, noise and exposure, bad input, and a run that resumes."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine_cases import DIGITS, TEXT, killed_run, weights
from golden_vectors import close, golden, reduce
from text_classes import as_csv, classifier, reviews
from understudy import InputError, distill, losses
from understudy.curation.private import detector, private_tokens
from understudy.data import Batch
from understudy.data.noise import laplace
from understudy.evaluation.leakage import canaries, exposure, plant, text_exposures
from understudy.losses.privacy import clipped_whole, noisy_forward_kl, perturbed, private_temperature
from understudy.methods.swing import Swing
from understudy.streaming import rowwise
from understudy.targets import Dense, Projected, top_k
from understudy.training.shares import WatchedShare


@pytest.mark.golden
@pytest.mark.parametrize("form", ["clean", "clean_tau2", "noisy", "noisy_tau2"])
def test_golden(form):
    g = golden("13-swing")
    mask, student = g["labels"] >= 0, g["student_logits"].clone().requires_grad_()
    tau = private_temperature(g["private_score"], float(g["t_base"]), float(g["t_max"]))
    close(tau[mask], g["tau"][mask])
    clean = torch.softmax(g["teacher_logits"] / tau[..., None], -1)
    close(clean[mask], g["soft_target_clean"][mask])
    noise = float(g["noise_scale"]) * g["unit_laplace"]
    assert float(g["noise_scale"]) == pytest.approx(float(g["sensitivity"] / g["privacy_budget"]))
    forced = ~torch.isclose(g["noisy_raw"], clean + noise).all(-1)  # the file's case of a row that is clipped whole
    assert bool((g["noisy_raw"][forced & mask] < 0).all())
    noise[forced] = (g["noisy_raw"] - clean)[forced]
    close((clean + noise)[mask], g["noisy_raw"][mask])
    close(perturbed(clean[mask], noise[mask]), g["soft_target_noisy"][mask])
    values = noisy_forward_kl(
        student[mask],
        g["teacher_logits"][mask],
        tau[mask],
        noise[mask] if "noisy" in form else None,
        tau_squared=form.endswith("tau2"),
    )
    close(values, g[f"tok_{form}"][mask], rtol=1e-9)
    kd = reduce(values, "token_mean")
    close(kd, g[f"kd_{form}"], rtol=1e-9)
    ce = reduce(losses.cross_entropy(student[mask], g["labels"][mask]), "token_mean")
    close(ce, g["ce"], rtol=1e-9)
    share = float(g["kd_weight"])
    total = share * kd + (1 - share) * ce
    close(total, g[f"loss_{form}"], rtol=1e-9)
    total.backward()
    close(student.grad, g[f"grad_{form}"])


@pytest.mark.golden
def test_golden_exposure():
    g = golden("13-swing")
    for value, rank, size, expected in zip(
        g["canary_logppl"].tolist(),
        g["canary_rank"].tolist(),
        g["space_size"].tolist(),
        g["exposure"].tolist(),
        strict=True,
    ):
        found = exposure(value, g["candidate_logppl"])
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert found == pytest.approx(math.log2(size) - math.log2(rank), abs=1e-12)
        known = g["candidate_logppl"]
        assert size == len(known) + (value not in known.tolist())


def test_a_temperature_of_each_row():
    s, t = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    tau = torch.tensor([0.5, 1.0, 2.0, 1.0, 7.0, 3.0], dtype=torch.float64)
    for name, options in (
        ("forward_kl", {}),
        ("reverse_kl", {}),
        ("jsd", {"beta": 0.3}),
        ("skew_kl", {}),
        ("total_variation", {}),
        ("alpha_beta", {"alpha": 0.2, "beta": 0.7}),
    ):
        loss = getattr(losses, name)
        for squared in (False, True):
            found = loss(s, t, temperature=tau, tau_squared=squared, **options)
            each = [
                loss(s[i : i + 1], t[i : i + 1], temperature=float(tau[i]), tau_squared=squared, **options)
                for i in range(6)
            ]
            torch.testing.assert_close(found, torch.cat(each))
    hidden, head = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 9))
    streamed = rowwise(losses.forward_kl, Projected(hidden, head), Dense(t), tile_bytes=150, temperature=tau)
    plain = losses.forward_kl(hidden @ head.T, t, temperature=tau)
    torch.testing.assert_close(streamed, plain)
    grads = [torch.autograd.grad(v.sum(), (hidden, head), retain_graph=True) for v in (streamed, plain)]
    torch.testing.assert_close(*grads)
    with pytest.raises(InputError, match=r"temperature of row 2 is 0\.0"):
        losses.forward_kl(s, t, temperature=tau * (tau != 2))
    with pytest.raises(InputError, match="needs the teacher's logits"):
        losses.forward_kl(s, top_k(t, 3), temperature=tau)


def test_limits_of_the_temperature():
    s, t = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    score = torch.tensor([0.0, 0.2, 0.5, 1.0, 1.0], dtype=torch.float64)
    plain = losses.forward_kl(s, t)
    torch.testing.assert_close(noisy_forward_kl(s, t, private_temperature(score * 0, 1.0, 8.0)), plain)
    torch.testing.assert_close(noisy_forward_kl(s, t, private_temperature(score, 1.0, 1.0)), plain)
    slopes = []
    for most in (1e3, 1e4):
        leaf = s.clone().requires_grad_()
        (grad,) = torch.autograd.grad(noisy_forward_kl(leaf, t, private_temperature(score, 1.0, most)).sum(), leaf)
        slopes.append(grad[3:].norm())
    assert float(slopes[0] / slopes[1]) == pytest.approx(100, rel=0.01)
    one = t[:1].expand(5, -1)
    entropies = torch.distributions.Categorical(logits=one / private_temperature(score, 1.0, 8.0)[:, None]).entropy()
    assert bool((entropies.diff() >= -1e-12).all())
    torch.testing.assert_close(noisy_forward_kl(s + 3, t - 2, 2.0), noisy_forward_kl(s, t, 2.0))


def test_limits_of_the_noise():
    p = torch.softmax(torch.randn(2000, 7, dtype=torch.float64) * 2, -1)
    ids = torch.arange(2000)
    drawn = laplace(ids, (7,), seed=1, step=0)
    assert torch.equal(drawn, laplace(ids, (7,), seed=1, step=0)) and not torch.equal(drawn[0], drawn[1])
    assert float(drawn.abs().mean()) == pytest.approx(1, abs=0.03) and float(drawn.mean()) == pytest.approx(0, abs=0.03)
    assert not torch.equal(drawn, laplace(ids, (7,), seed=1, step=ids + 1))
    for scale in (0.1, 10.0):
        found = perturbed(p, scale * drawn)
        torch.testing.assert_close(found.sum(-1), torch.ones(2000, dtype=p.dtype))
        assert bool((found >= 0).all())
    torch.testing.assert_close(perturbed(p, 1e-12 * drawn), p, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(perturbed(p[:1], torch.full((1, 7), -2.0)), torch.full((1, 7), 1 / 7, dtype=p.dtype))
    even = torch.full_like(p, 1 / 7)  # endless noise drowns what p was
    torch.testing.assert_close(perturbed(p, 1e12 * drawn), perturbed(even, 1e12 * drawn), rtol=1e-6, atol=1e-9)
    alone = torch.randn(2000, 1)
    assert not noisy_forward_kl(alone, -alone, 2.0, drawn[:, :1].float()).any()
    barred = torch.tensor([[0.0, 1.0, 0.0]])
    assert perturbed(barred, torch.ones(1, 3), keep_support=True).tolist() == [[0.0, 1.0, 0.0]]


def test_exposure_at_its_ends():
    r = torch.arange(16.0)
    assert exposure(0.0, r) == 4 and exposure(15.0, r) == 0
    assert exposure(1.0, torch.ones(16)) == 0 and exposure(1.0, torch.ones(1)) == 0
    assert exposure(math.exp(3.0), r.exp()) == exposure(3.0, r)
    for secret, candidates in ((math.nan, r), (1.0, r.log() - math.inf + math.inf)):  # a model that has diverged
        with pytest.raises(InputError, match="is not a number"):
            exposure(secret, candidates)
    assert sum(exposure(float(v), torch.arange(4096.0)) for v in range(4096)) / 4096 == pytest.approx(1.44, abs=0.01)


def test_what_looks_private():
    pieces = [b"Call", b" Ada", b" at", b" 55", b"5", b"-12", b" or", b" a", b"@b", b".org", b"!"]
    found = private_tokens(pieces, detector(names=["ada"]))
    assert found == [False, True, False, True, True, True, False, True, True, True, False]
    cut = [b" Jos", b"\xc3", b"\xa9", b" \xc3", b"\xa9t\xc3", b"\xa9", b"\xff", b" 7"]  # "José été", and no character
    assert private_tokens(cut, detector(names=["José"])) == [True, True, True, *[False] * 4, True]
    with pytest.raises(InputError, match="no regular expression"):
        detector(["("])
    with pytest.raises(InputError, match="nothing to look for"):
        detector([])


def words_behind_spaces():
    """A tokenizer as Llama's and T5's: a token begins with the space before its word, and decoded alone it loses it."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "▁Call": 1, "▁Ada": 2, "▁at": 3, "▁55": 4, "▁Adam": 5}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_names_are_found_whatever_marks_the_spaces():
    tokenizer = words_behind_spaces()
    ids = torch.tensor([tokenizer("Call Ada at 55 Adam Ada")["input_ids"]])
    batch = Batch({"input_ids": ids}, ids, torch.tensor([0]))
    found = Swing(names=("ada",))._scores(batch, SimpleNamespace(tokenizer=tokenizer))
    assert found.tolist() == [1, 0, 1, 0, 1]
    with pytest.raises(InputError, match="take a fast one"):
        Swing()._scores(batch, SimpleNamespace(tokenizer=SlowTokenizer()))


class SlowTokenizer:
    is_fast = False


def test_canaries_are_planted():
    secrets = canaries(14, digits=2, seed=1)
    assert len({c.prefix for c in secrets}) == 14 and all(c.secret in c.space and len(c.space) == 100 for c in secrets)
    texts = [{"text": str(i)} for i in range(20)]
    planted = plant(texts, secrets[:2], 3)
    assert [r for r in planted if r in texts] == texts
    assert sum(r["text"] == secrets[0].text for r in planted) == 3
    with pytest.raises(InputError, match="needs the slots"):
        canaries(1, sentence="{name} has none.")


class Reader(torch.nn.Module):
    """A language model of characters that knows one sentence."""

    def __init__(self, text):
        super().__init__()
        self.text, self.scale = text, torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, 128)
        for i in range(min(input_ids.shape[1], len(self.text) - 1)):
            logits[:, i, ord(self.text[i + 1])] = 5.0
        return SimpleNamespace(logits=logits)


def test_a_model_exposes_what_it_knows():
    first, second = canaries(2, digits=2, seed=3)

    def tokenizer(text):
        return {"input_ids": [ord(c) for c in text]}

    known, unknown = text_exposures(Reader(first.text), tokenizer, [first, second], batch=30)
    assert known == pytest.approx(math.log2(100)) and unknown < known


SHORT = {**TEXT["trainer"], "max_steps": 9}
RECIPE = {**TEXT, "method": "swing", "trainer": SHORT}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swing")
    return folder, distill(RECIPE, output=str(folder)), {"model": str(folder / "teacher" / "student")}


def test_a_run_tells_private_tokens_from_others_and_resumes(taught, tmp_path):
    _, result, teacher = taught
    assert {"private_nll", "public_nll"} <= result.metrics.keys()
    values = {**RECIPE, "teacher": teacher}
    distill(values, output=str(tmp_path / "whole"))
    assert killed_run({**values, "output": str(tmp_path / "cut")}, 5, "after")
    distill(values, output=str(tmp_path / "cut"))
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)
    split = {**SHORT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    distill(values, output=str(tmp_path / "split"), trainer=split)
    torch.testing.assert_close(weights(tmp_path / "split"), weights(tmp_path / "whole"), rtol=1e-3, atol=1e-5)


def test_without_noise_and_flat_targets_it_is_kd(tmp_path):
    base = {**DIGITS, "trainer": {**DIGITS["trainer"], "max_steps": 5, "save_strategy": "no"}}
    plain = distill(
        base, method="kd", options={"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5}, output=str(tmp_path / "kd")
    )
    assert plain.metrics
    options = {"score": "memorisation", "most": 1.0, "privacy_budget": None, "mask_labels": False}
    teacher = {"model": str(tmp_path / "kd" / "teacher" / "student")}
    distill(base, method="swing", options=options, teacher=teacher, output=str(tmp_path / "swing"))
    torch.testing.assert_close(weights(tmp_path / "swing"), weights(tmp_path / "kd"), rtol=1e-4, atol=1e-6)


def test_which_targets_noise_makes_uniform():
    """Where every entry is at or below 0, of classes that may have one; there the target is uniform, and nowhere else."""
    logits = torch.randn(4000, 3, dtype=torch.float64)
    logits[:5, 0] = -torch.inf
    noise = 2 * laplace(torch.arange(4000), (3,), seed=0, step=0)
    noise[0] = torch.tensor([1.0, -5.0, -5.0])  # only what the teacher forbids is left
    tau = torch.full((4000,), 2.0, dtype=torch.float64)
    p = torch.softmax(logits / 2, -1)
    for keep in (False, True):
        found = clipped_whole(logits, tau, noise, keep_support=keep)
        allowed = (p > 0) | (not keep)
        assert torch.equal(found, ((p + noise <= 0) | ~allowed).all(-1))
        even = allowed / allowed.sum(-1, keepdim=True, dtype=p.dtype)
        assert torch.equal(found, (perturbed(p, noise, keep_support=keep) == even).all(-1))
        assert 0.01 < float(found.double().mean()) < 0.2
        assert bool(found[0]) == keep
    assert not bool(clipped_whole(logits, tau, torch.zeros_like(noise)).any())


@pytest.mark.parametrize("projected", [False, True])
def test_uniform_targets_are_counted_as_the_loss_is_computed(projected):
    """In tiles and strips too; the share is that of the noise which the loss drew."""
    ids, hidden, head = torch.arange(40), torch.randn(40, 4), torch.randn(3, 4)
    teacher, method = torch.randn(40, 3), Swing(privacy_budget=0.3)
    student = Projected(hidden.requires_grad_(), head) if projected else Dense(hidden @ head.T)
    uniform, private = torch.zeros(40, dtype=torch.bool), torch.ones(40, dtype=torch.bool)
    rows = (torch.full((40,), 2.0), ids, torch.zeros_like(ids), private, uniform)
    values = rowwise(
        method._noisy, student, Dense(teacher), *rows, seed=3, **({"tile_bytes": 100} if projected else {})
    )
    noise = method.scale * laplace(ids, (3,), seed=3, step=torch.zeros_like(ids), stream=0x513)
    assert torch.equal(uniform, clipped_whole(teacher, 2.0, noise)) and 0 < int(uniform.sum()) < 40
    even = losses.forward_kl(hidden @ head.T, torch.zeros(40, 3), temperature=torch.tensor([1.0]).expand(40))
    own = losses.forward_kl(hidden @ head.T / 2, torch.zeros(40, 3))
    assert not torch.allclose(values, even)
    torch.testing.assert_close(values[uniform], own[uniform])


def test_a_share_is_judged_after_some_updates_or_at_the_end_and_once(caplog):
    def watched(*shares, total=20):
        caplog.clear()
        watch = WatchedShare("uniform", 0.01, "noise made {share:.1%} uniform")
        for i, share in enumerate(shares):
            other = WatchedShare("uniform", 0.01, "noise made {share:.1%} uniform")
            other.load_state_dict(watch.state_dict())
            watch = other
            watch.update(share, i + 1 == total)
        assert watch.logs() == {"uniform": pytest.approx(sum(shares) / len(shares))}
        return [record.message for record in caplog.records]

    assert watched(*[0.5] * 9) == [] and watched(*[0.005] * 20) == []
    assert watched(*[0.5] * 20) == ["noise made 50.0% uniform"]
    assert watched(0.0, 0.04, total=2) == ["noise made 2.0% uniform"]
    assert watched(0.05, *[0.0] * 19) == []  # one update of few rows is no share of the run


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """Of two classes noise of a small budget clips both in one target of five."""
    folder = tmp_path_factory.mktemp("two")
    data = as_csv(folder / "reviews.csv", reviews(200))
    return {
        "task": "text_classification",
        "data": {"name": str(data), "max_length": 16, "vocab_size": 300},
        "teacher": str(classifier(folder / "teacher")),
        "student": "embedding:8",
        "trainer": {"max_steps": 12, "per_device_train_batch_size": 8, "save_steps": 4, "logging_steps": 1},
        "method": "swing",
    }


def test_a_run_counts_uniform_targets_and_warns_once(two_classes, tmp_path, caplog, monkeypatch):
    def run(name, budget, **more):
        caplog.clear()
        options = {"score": "memorisation", "privacy_budget": budget}
        found = distill(two_classes, options=options, output=str(tmp_path / name), **more).metrics
        return found.get("uniform_targets"), [r.message for r in caplog.records if "swing" in r.message]

    share, said = run("whole", 0.2)
    assert 0.1 < share < 0.3 and len(said) == 1
    assert "options.privacy_budget=0.2 (of scale 5) clips every class" in said[0] and "Raise options.privacy" in said[0]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["terms"]["uniform"] for line in lines) / 12 == pytest.approx(share)
    assert lines[-1]["state"] == {"uniform_targets": pytest.approx(share)}
    assert run("quiet", 100.0) == (0.0, []) and run("none", None) == (None, [])
    split = {**two_classes["trainer"], "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert run("split", 0.2, trainer=split)[0] == pytest.approx(share)

    def fail(self, state, context):
        raise RuntimeError("killed after training")

    with monkeypatch.context() as patch:
        patch.setattr(Swing, "finish", fail)
        with pytest.raises(RuntimeError, match="killed after training"):
            run("ended", 0.2)
    assert run("ended", 0.2)[0] == share  # resumed where no step is left


def test_a_killed_run_has_the_same_share_of_uniform_targets(two_classes, tmp_path):
    recipe = {**two_classes, "options": {"score": "memorisation", "privacy_budget": 0.2}}
    whole = distill(recipe, output=str(tmp_path / "whole"))
    assert killed_run({**recipe, "output": str(tmp_path / "cut")}, 6, "after")
    assert distill(recipe, output=str(tmp_path / "cut")).metrics == whole.metrics
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options,says",
    [
        ({"most": 0.5}, "below base"),
        ({"privacy_budget": 0}, "greater than 0"),
        ({"score": "domains"}, "needs private_domains"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        Swing(**options)


def test_bad_scores():
    for score in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="score of row 1"):
            private_temperature(torch.tensor([0.0, score]), 1.0, 8.0)
