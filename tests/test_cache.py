"""Cached teachers: codecs and their sizes, unbiasedness, capture that resumes, refusals, cached against live."""

import json
import math
import os
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_cases import DIGITS, FORKED, TEXT, weights
from understudy import InputError, distill
from understudy.cli import main
from understudy.losses import forward_kl
from understudy.runs.capture import capture_recipe, describe, verify_recipe
from understudy.runs.recipe import make
from understudy.targets import Dense, Projected, Sampled, TopK, top_k
from understudy.teachers.cache import sampling
from understudy.teachers.cache.codecs import Support, decode, encode
from understudy.teachers.cache.sampling import pack_sampled, unpack_sampled
from understudy.teachers.cache.store import ShardStore, content_key
from understudy.teachers.cache.teacher import CachedTeacher

SIZES = [("sampled:38B", 38), ("sampled:12", 38), ("top_k:50", 130)]


@pytest.mark.parametrize("support,most", SIZES)
def test_bytes_a_token_at_a_real_vocabulary(support, most):
    logits = torch.randn(3, 152_064) * 4
    arrays = encode(Dense(logits), Support.parse(support), 1.0, seed=0)
    assert arrays["code"].dtype == torch.uint8 and arrays["code"].shape[1] <= most
    back = decode(arrays, Support.parse(support), 1.0, 152_064, None, [3])
    assert back.ids.max() < 152_064
    if isinstance(back, TopK):
        assert back.ids.shape == (3, 50)
    else:
        assert (back.weights > 0).sum() > 3 * 13


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 400), st.integers(1, 60), st.floats(0.05, 30), st.integers(0, 10_000))
def test_top_k_comes_back_as_a_distribution(classes, k, scale, seed):
    logits = torch.randn(4, classes, generator=torch.Generator().manual_seed(seed)) * scale
    support = Support("top_k", k)
    back = decode(encode(Dense(logits), support, 1.0, 0), support, 1.0, classes, None, [4])
    exact = top_k(logits, k)
    assert isinstance(back, TopK)
    assert torch.equal(back.ids.sort(-1).values, exact.ids.sort(-1).values)
    total = back.log_probs.exp().sum(-1) + back.log_tail.exp()[:, 0]
    torch.testing.assert_close(total, torch.ones(4), atol=1e-5, rtol=0)
    wanted = exact.log_probs.gather(-1, exact.ids.argsort(-1))
    span = (wanted.amax(-1) - wanted.amin(-1)).clamp(max=66)
    assert (
        (back.log_probs - wanted.clamp(min=wanted.amax(-1, keepdim=True) - 66)).abs().amax(-1) <= span / 100 + 0.05
    ).all()


def layout(code, classes):
    """Nats of the threshold, steps that kept probabilities are told apart in, and bands of classes, from an example's bytes."""
    (level, width, *_), _ = sampling._header(code.numpy(), classes)
    return sampling._nats(level), 2**width - 1, len(sampling._bands(classes, code.numel()))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(2, 300), st.integers(12, 60), st.floats(0.05, 10), st.integers(0, 10_000))
def test_the_sampled_support_comes_back_as_it_was_drawn(rows, classes, size, scale, seed):
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    log_p = logits.log_softmax(-1)
    code = pack_sampled(log_p, size, torch.Generator().manual_seed(seed))
    assert code.shape == (rows, size)
    again = pack_sampled(log_p, size, torch.Generator().manual_seed(seed + 1))
    both = unpack_sampled(torch.cat([code, again]), [rows, rows], classes, 1.0)
    back = both.select(slice(rows))
    alone = unpack_sampled(again, [rows], classes, 1.0)
    width = alone.ids.shape[1]
    assert torch.equal(both.weights[rows:, :width], alone.weights) and (both.weights[rows:, width:] == 0).all()
    weights, there = back.weights.double(), back.weights > 0
    assert there.any(-1).all()
    for ids, here in zip(back.ids, there, strict=True):
        assert ids[here].unique().numel() == here.sum()
    at = log_p.gather(-1, back.ids).clamp(min=-24)
    kept = there & ((weights.log() - back.log_probs).abs() < 1e-5)
    drawn = there & ~kept
    threshold = weights[drawn].min() if drawn.any() else at[kept].exp().min()
    level, steps, bands = layout(code, classes)
    step = level / steps
    assert ((at - back.log_probs).abs()[kept] <= step + 1e-5).all()
    assert torch.allclose(weights[drawn], threshold, rtol=1e-5) and (at.exp()[drawn] <= threshold * 1.02).all()
    assert (log_p.exp() > threshold * 1.02).sum() <= kept.sum()
    # whatever is drawn, a row's weights miss 1 by less than one draw a band, and the rounding of what is kept
    assert ((weights.sum(-1) - 1).abs() <= bands * threshold * 1.001 + math.expm1(step)).all()


def test_more_bytes_leave_less_noise_and_one_threshold_serves_all_rows():
    logits = torch.randn(16, 500) * torch.linspace(0.5, 8, 16)[:, None]
    noise = []
    for size in (12, 24, 48):
        code = [encode(Dense(logits), Support("sampled", size=size), 1.0, seed)["code"] for seed in range(40)]
        found = [unpack_sampled(c, [16], 500, 1.0) for c in code]
        dense = torch.stack([torch.zeros(16, 500).scatter_add_(1, f.ids, f.weights) for f in found])
        noise.append((dense - logits.softmax(-1)).square().sum(-1).mean().item())
    assert noise[0] > 2 * noise[1] > 4 * noise[2]
    number = (found[0].weights > 0).sum(-1)
    assert number[0] > 2 * number[-1]  # an even row needs more classes than a sure one


@pytest.mark.parametrize("examples", [1, 4000])
def test_the_gradient_of_a_sampled_cache_is_unbiased(examples):
    """Over many captures the mean gradient is that of the dense teacher, far within what chance allows; and so is the value."""
    torch.manual_seed(1)
    classes, draws = 40, 4000
    teacher, student = torch.randn(1, classes) * 2, torch.randn(1, classes)
    support, count = Support("sampled", 6), draws // examples
    code = [encode(Dense(teacher.expand(count, -1)), support, 1.0, seed)["code"] for seed in range(examples)]
    many = decode({"code": torch.cat(code)}, support, 1.0, classes, None, [count] * examples)
    assert isinstance(many, Sampled)
    leaf = student.expand(draws, -1).clone().requires_grad_()
    values = forward_kl(leaf, many)
    values.sum().backward()
    exact = student.clone().requires_grad_()
    truth = forward_kl(exact, Dense(teacher))
    truth.sum().backward()
    mean, error = leaf.grad.double().mean(0), leaf.grad.double().std(0) / draws**0.5
    assert ((mean - exact.grad[0]).abs() < 5 * error + 2e-3).all()
    assert abs(values.mean() - truth) < 5 * values.std() / draws**0.5 + 0.02
    assert many.weights.sum(-1).sub(1).abs().mean() < 0.1


@pytest.mark.parametrize("support", ["sampled:38B", "top_k:5", "dense"])
def test_a_teacher_without_numbers_is_one_line(support):
    with pytest.raises(InputError, match="logits hold nan"):
        encode(Dense(torch.full((2, 50), torch.nan)), Support.parse(support), 1.0, 0)
    hidden = torch.tensor([[0.0] * 49 + [-torch.inf], [1.0] * 50])  # a class that cannot be is no nan
    encode(Dense(hidden), Support.parse(support), 1.0, 0)


def test_too_few_bytes_and_a_code_of_before_are_one_line(tmp_path):
    with pytest.raises(InputError, match="3 bytes a row do not hold one class of 5000 for each of 2 rows"):
        encode(Dense(torch.randn(2, 5000)), Support.parse("sampled:3B"), 1.0, 0)
    (tmp_path / "identity.json").write_text(json.dumps({"support": "sampled:12", "temperature": 1.0, "classes": 9}))
    with pytest.raises(InputError, match="version 1 of the sampled code, which is read in version 3: capture it again"):
        CachedTeacher(tmp_path)


def test_hidden_states_and_dense_logits():
    hidden, weight = torch.randn(5, 8), torch.randn(30, 8)
    arrays = encode(Projected(hidden, weight), Support("hidden"), 1.0, 0)
    back = decode(
        arrays, Support("hidden"), 1.0, 30, {"weight": weight, "bias": None, "scale": 1.0, "softcap": None}, [5]
    )
    assert isinstance(back, Projected) and (back.hidden - hidden).abs().max() < 0.02
    for scale, dtype in ((0.1, torch.float16), (1000.0, torch.float32)):
        logits = torch.randn(5, 30) * scale
        arrays = encode(Dense(logits), Support("dense"), 1.0, 0)
        assert arrays["logits"].dtype == dtype
        assert (decode(arrays, Support("dense"), 1.0, 30, None, [5]).logits - logits).abs().max() <= 1e-3


def teach(base, folder, **changes):
    """The base recipe with its teacher trained into `folder`, named as a folder from then on."""
    if not (folder / "teacher").exists():
        distill({**base, "method": "kd", "output": str(folder), "trainer": {**base["trainer"], "max_steps": 1}})
    teacher = {"model": str(folder / "teacher" / "student")}
    return {**base, "teacher": teacher, **changes}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize(
    "name,base,support", [("digits", DIGITS, "dense"), ("text", TEXT, "hidden"), ("text", TEXT, "top_k:300")]
)
def test_cached_equals_live(name, base, support, home, tmp_path):
    recipe = teach(base, home / name, method="kd", options={"temperature": 1.0})
    live = distill({**recipe, "output": str(tmp_path / "live")})
    capture_recipe(make({**recipe, "output": str(tmp_path)}), tmp_path / "cache", support)
    cached = {**recipe, "teacher": {**recipe["teacher"], "cache": str(tmp_path / "cache")}}
    again = distill({**cached, "output": str(tmp_path / "cached")})
    assert again.metrics["accuracy"] == pytest.approx(live.metrics["accuracy"], abs=0.02)
    a, b = weights(tmp_path / "live"), weights(tmp_path / "cached")
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)
    cost = json.loads((tmp_path / "cached" / "evaluation.json").read_text())["cost"]
    assert cost["forwards"]["teacher"] == 0


def _capture(recipe, folder, after):
    """Capture in a process that kills itself when a shard is about to be renamed for the `after`-th time."""
    from understudy.teachers.cache import store as module
    from understudy.teachers.cache import teacher as cached

    torch.set_num_threads(1)
    replace, seen = os.replace, [0]

    def counting(*args):
        seen[0] += 1
        if seen[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    module.os.replace = counting
    original = cached.capture
    import understudy.runs.capture as caching

    caching.capture = lambda *a, **k: original(*a, **{**k, "shard": 64})
    capture_recipe(make(recipe), folder, "sampled:8")


@pytest.mark.slow
def test_a_capture_that_is_killed_goes_on_and_doubles_nothing(home, tmp_path):
    recipe = teach(TEXT, home / "text", output=str(tmp_path))
    for after in (1, 2, 5, 9):
        child = FORKED.Process(target=_capture, args=(recipe, tmp_path / "cut", after))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    found = capture_recipe(make(recipe), tmp_path / "cut", "sampled:8")
    whole = capture_recipe(make(recipe), tmp_path / "whole", "sampled:8")
    assert 0 < found.new < whole.new and found.rows == whole.rows and found.examples == whole.examples
    a, b = ShardStore(tmp_path / "cut"), ShardStore(tmp_path / "whole")
    for key in b.places:
        assert torch.equal(a.read([key])["code"], b.read([key])["code"])
    again = capture_recipe(make(recipe), tmp_path / "whole", "sampled:8")
    assert again.new == 0 and again.bytes == whole.bytes
    more = capture_recipe(make(recipe), tmp_path / "whole", "sampled:8", splits=["train", "validation"])
    assert more.new > 0 and more.examples > whole.examples


def test_info_and_verify(home, tmp_path):
    recipe = teach(TEXT, home / "text", output=str(tmp_path))
    capture_recipe(make(recipe), tmp_path / "cache", "top_k:20")
    facts = describe(tmp_path / "cache")
    assert facts["support"] == "top_k:20" and facts["rows"] > 100 and facts["bytes_per_row"] < 60
    found = verify_recipe(make(recipe), tmp_path / "cache", sample=8)
    assert found["rows"] > 0 and found["mean_difference"] < 0.05


def test_refusals(home, tmp_path, capsys):
    recipe = teach(TEXT, home / "text", method="kd", output=str(tmp_path / "run"))
    cache = tmp_path / "cache"
    at_one = {**recipe, "options": {"temperature": 1.0}}
    capture_recipe(make(at_one), cache, "top_k:20")
    with pytest.raises(InputError, match="was made with support 'top_k:20' and 'sampled:12'"):
        capture_recipe(make(at_one), cache, "sampled:12")
    with pytest.raises(InputError, match=r"was made with temperature 1\.0 and 2\.0"):
        capture_recipe(make(recipe), cache, "top_k:20")
    other = {**recipe, "teacher": {"model": "llama:hidden=16,layers=1,heads=2"}}
    with pytest.raises(InputError, match="teacher"):
        verify_recipe(make(other), cache)
    cached = {**recipe, "teacher": {**recipe["teacher"], "cache": str(cache)}}
    cases = {
        "temperature": ({"options": {"temperature": 2.0}}, "taken at temperature 1.0 and the loss requires 2.0"),
        "length": ({"options": {"temperature": 1.0}, "data": {**TEXT["data"], "max_length": 24}}, "are not in cache"),
        "tokenizer": (
            {
                "options": {"temperature": 1.0},
                "teacher": {"model": "llama:hidden=16,layers=1,heads=2", "cache": str(cache)},
                "data": {**TEXT["data"], "vocab_size": 280},
            },
            "captured with tokenizer",
        ),
        "ranking of all classes": ({"method": "pld"}, "TopK"),
        "missing": ({"teacher": {**recipe["teacher"], "cache": str(tmp_path / "none")}}, "does not exist"),
    }
    for i, (change, says) in enumerate(cases.values()):
        with pytest.raises(InputError, match=says):
            distill({**cached, **change, "output": str(tmp_path / f"run{i}")})
    next(cache.glob("*.safetensors")).write_bytes(b"\x10" + bytes(7) + b"damaged")
    with pytest.raises(SystemExit) as stop:
        main(["cache", "info", str(cache)])
    assert stop.value.code == 2 and "cannot be read" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no cache"):
        describe(tmp_path / "empty")
    with pytest.raises(InputError, match="top_k:N"):
        Support.parse("topk:5")


def test_methods_that_read_inside_the_teacher_are_refused(home, tmp_path):
    from engine_cases import CONV

    recipe = teach(CONV, home / "conv", output=str(tmp_path / "run"), method="trg", options={"group": 4, "k": 3})
    capture_recipe(make({**recipe, "method": "kd", "options": {}}), tmp_path / "cache", "dense")
    with pytest.raises(InputError, match="reads the teacher's own model"):
        distill({**recipe, "teacher": {**recipe["teacher"], "cache": str(tmp_path / "cache")}})


DENOISERS = ("boot", "distillation-dpo", "progressive", "consistency", "dmd", "diffusion-dpo")


@pytest.mark.parametrize("method", ["lelp", "hard", "tgeo-kd", "ff-g2m", *DENOISERS])
def test_methods_that_read_the_teacher_before_training_want_its_model(method, tmp_path):
    """A cache that stands in for the model is refused in one line, before anything is trained."""
    ring = {"task": "image_generation", "data": "ring8"}
    base = {"ff-g2m": {"task": "node_classification"}, **dict.fromkeys(DENOISERS, ring)}
    recipe = {**base.get(method, DIGITS), "teacher": {"model": "mlp:8", "cache": str(tmp_path)}, "method": method}
    with pytest.raises(InputError, match="reads the teacher's own model before training"):
        distill({**recipe, "output": str(tmp_path / "run")})


@pytest.mark.parametrize(
    "support,kept", [("top_k:8", "TopK"), ("sampled:8", "Sampled"), ("dense", None), ("hidden", None)]
)
def test_a_loss_that_is_not_defined_for_what_is_kept_is_refused_before_the_first_step(support, kept, home, tmp_path):
    recipe = teach(TEXT, home / "text", output=str(tmp_path / "run"), method="taid", options={})
    capture_recipe(make({**recipe, "method": "kd"}), tmp_path / "cache", support)
    with_cache = {**recipe, "teacher": {**recipe["teacher"], "cache": str(tmp_path / "cache")}}
    if kept is None:
        distill(with_cache)
        return
    with pytest.raises(InputError, match=f"keeps {support}: interpolated_kl is not defined for {kept}"):
        distill(with_cache)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_keys_depend_on_content_alone():
    a, b = torch.tensor([1, 2, 3]), torch.tensor([1, 2, -100])
    assert content_key(a, b) == content_key(a.clone().int(), b)
    assert len({content_key(a, b), content_key(b, a), content_key(a), content_key(a, b, salt="x")}) == 4
