"""Paper 37, item 5: the examples are G(z) of a frozen autoencoder, and their latents z are what is matched."""

import pytest
import torch
from torch import nn

from engine_cases import DIGITS, killed_run, weights
from test_dataset_distillation import BASE, FEW, images, run
from understudy import InputError, distill
from understudy.methods.dataset_distillation import DatasetDistillation
from understudy.models.autoencoders import Autoencoder, load_autoencoder
from understudy.runs.recipe import make
from understudy.training.latents import Generator
from understudy.training.set_matching import ITERATIONS, Examples, Matching

LATENTS = {**FEW, "space": "latents", "autoencoder_steps": 30, "alpha": 0, "others": []}


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def matching(match, generator=None, seed=0):
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    real = Examples(2 * torch.randn(3, 1, 1, 12)[y] + torch.randn(60, 1, 1, 12), y)
    options = DatasetDistillation(match=match, expert_steps=10, experts=1, span=4, student_steps=3, outer=2)
    return Matching(options, real, torch.arange(3), 3, "mlp:8", seed, generator)


def losses(matched, z, trajectories):
    return matched._losses(z, torch.tensor(0.1), 0, torch.Generator().manual_seed(0), trajectories)


@pytest.mark.parametrize("match", ITERATIONS)
def test_the_gradient_of_latents_is_the_chain_rule_through_the_generator(match, float64):
    plain = matching(match)
    torch.manual_seed(1)
    seen = plain.real.x * 3 + 1
    generator = Generator(Autoencoder((1, 1, 12), 4, 8), seen, torch.tensor(1.0), torch.tensor(3.0))
    trajectories = plain._experts()["flat"] if match == "trajectory" else None
    z = torch.randn(3, 4, requires_grad=True)
    loss = next(losses(matching(match, generator), z, trajectories))
    (found,) = torch.autograd.grad(loss, z)
    x = generator(z).detach().requires_grad_()
    (slope,) = torch.autograd.grad(next(losses(plain, x, trajectories)), x)
    jacobian = torch.autograd.functional.jacobian(generator, z.detach())  # [3, 1, 1, 12, 3, 4]
    torch.testing.assert_close(found, torch.tensordot(slope, jacobian, 4), rtol=1e-10, atol=1e-13)
    assert found.abs().max() > 1e-6
    step = 1e-6  # and finite differences
    for entry in ((0, 0), (2, 3)):
        moved = []
        for sign in (1, -1):
            at = z.detach().clone()
            at[entry] += sign * step
            moved.append(float(next(losses(matching(match, generator), at.requires_grad_(), trajectories)).detach()))
        assert abs((moved[0] - moved[1]) / (2 * step) - found[entry]) < 1e-6 * max(1, abs(float(found[entry])))


class Same(nn.Module):
    def forward(self, z):
        return z


@pytest.mark.parametrize("match", ITERATIONS)
def test_the_identity_is_matching_of_the_examples_bit_for_bit(match):
    torch.set_num_threads(1)
    plain, same = matching(match), matching(match, Same())
    trajectories = plain._experts()["flat"] if match == "trajectory" else None
    start = {"x": torch.randn(3, 1, 1, 12), "rate": torch.tensor(0.1), "optimizer": None}
    ends = [m._advance(start, 0, 8, trajectories) for m in (plain, same)]
    assert torch.equal(ends[0]["x"], ends[1]["x"]) and torch.equal(ends[0]["rate"], ends[1]["rate"])
    assert not torch.equal(ends[0]["x"], start["x"])


def test_networks_are_trained_on_the_examples_after_the_step():
    """The second loss of gradient matching sees a network that was trained on G of the moved latents."""
    matched = matching("gradient", Same())
    z = torch.randn(3, 1, 1, 12, requires_grad=True)
    steps = losses(matched, z, None)
    next(steps)
    with torch.no_grad():
        z.add_(1.0)
    moved = float(next(steps))
    steps = losses(matched, z, None)  # the same network, trained on the same examples
    next(steps)
    assert float(next(steps)) == moved


def test_latents_and_examples_are_less_their_mean_and_divided_by_their_deviation():
    torch.manual_seed(0)
    x = 5 + 2 * torch.randn(300, 1, 2, 3)
    mean, deviation = x.mean(), x.std()
    coder = Autoencoder((1, 2, 3), 4, 8)
    generator = Generator(coder, x, mean, deviation)
    scaled = (x - mean) / deviation
    z = generator.latents(scaled)
    assert abs(float(z.mean())) < 1e-5 and abs(float(z.std()) - 1) < 1e-5
    expected = (coder.decode(coder.encode(x)) - mean) / deviation
    torch.testing.assert_close(generator(z), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("match", ITERATIONS)
def test_the_images_are_those_of_the_decoder_which_is_unchanged(match, tmp_path):
    torch.manual_seed(0)
    Autoencoder((1, 8, 8), 3, 8).save(tmp_path / "coder")
    before = (tmp_path / "coder" / "model.safetensors").read_bytes()
    coder = load_autoencoder(str(tmp_path / "coder"), (1, 8, 8))
    kept = []
    made = Generator.__init__

    def watched(self, *args):
        made(self, *args)
        kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "__init__", watched)
        options = {**LATENTS, "match": match, "autoencoder": str(tmp_path / "coder"), "initial": "noise"}
        del options["autoencoder_steps"]
        pixels = torch.tensor(images(run(tmp_path / "run", **options))[1]["image"])
    assert (tmp_path / "coder" / "model.safetensors").read_bytes() == before
    state = kept[0].autoencoder.state_dict()
    assert all(torch.equal(state[k], v) for k, v in coder.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in kept[0].parameters())
    # Of three latents with a hidden layer of 8: the images lie in the 8 directions of the last layer.
    away = pixels.flatten(1) - coder.decoder[-1].bias
    basis = coder.decoder[-1].weight
    fitted = (basis @ torch.linalg.lstsq(basis, away.T).solution).T
    torch.testing.assert_close(fitted, away, rtol=1e-3, atol=1e-4)


def test_an_autoencoder_is_trained_once_and_another_one_is_another_set(tmp_path):
    torch.set_num_threads(1)
    first = run(tmp_path / "a", match="distribution", **LATENTS)
    assert len(list((first.folder / "store").glob("autoencoder-*"))) == 1
    again = run(tmp_path / "b", match="distribution", **LATENTS)
    assert (images(first)[1]["image"] == images(again)[1]["image"]).all() and first.metrics == again.metrics
    a, b = weights(first.folder), weights(again.folder)
    assert all(torch.equal(a[k], b[k]) for k in a)
    more = {**LATENTS, "autoencoder_steps": 40}
    other = run(tmp_path / "c", match="distribution", **more)
    assert images(other)[0].name != images(first)[0].name


def test_bad_input(tmp_path):
    Autoencoder((1, 9, 9), 4, 8).save(tmp_path / "other")
    with pytest.raises(InputError, match=r"Autoencoder .*other does not give back inputs of shape \[1, 8, 8\]"):
        run(tmp_path / "a", space="latents", autoencoder=str(tmp_path / "other"), alpha=0, others=[])
    with pytest.raises(InputError, match=r"is not a folder with a config\.json"):
        run(tmp_path / "b", space="latents", autoencoder=str(tmp_path / "none"), alpha=0, others=[])
    for options, says in (
        ({"space": "latents", "match": "herding"}, "space has no effect with match=herding"),
        ({"autoencoder": "folder"}, "autoencoder has no effect with space=examples"),
        ({"latent": 8}, "latent has no effect with space=examples"),
    ):
        with pytest.raises(InputError, match=says):
            make({**BASE, "options": options})


def test_an_autoencoder_that_was_changed_is_refused_when_the_run_goes_on(tmp_path):
    torch.manual_seed(0)
    Autoencoder((1, 8, 8), 4, 8).save(tmp_path / "coder")
    asked = {**BASE, "teacher": None, "output": str(tmp_path / "run")}
    asked["options"] = {**FEW, "alpha": 0, "others": [], "space": "latents", "autoencoder": str(tmp_path / "coder")}
    asked["trainer"] = {**asked["trainer"], "save_steps": 2}
    assert killed_run(asked, 5, "before")
    Autoencoder((1, 8, 8), 4, 8).save(tmp_path / "coder")
    with pytest.raises(InputError, match=r"The options\.autoencoder of run .* changed since it began"):
        distill(asked)


def test_a_flipped_bit_of_what_setup_stored_is_refused(tmp_path):
    asked = {**BASE, "teacher": None, "output": str(tmp_path / "run"), "options": {**FEW, "alpha": 0, "others": []}}
    asked["trainer"] = {**asked["trainer"], "save_steps": 2}
    assert killed_run(asked, 5, "before")
    for file in (tmp_path / "run" / "store").glob("distilled-*.safetensors"):
        held = bytearray(file.read_bytes())
        held[8 + int.from_bytes(held[:8], "little")] ^= 1  # the last digit of a number
        file.write_bytes(held)
    with pytest.raises(InputError, match=r"distilled-\w+\.safetensors differs from what was written"):
        distill(asked)


def test_images_of_latents_train_better_than_random_ones(tmp_path):
    """Fresh networks, trained on one image a class with hard labels."""
    recipe = {**DIGITS, "method": "dataset-distillation", "data": {"name": "digits", "limit": 600}, "teacher": None}
    recipe["trainer"] = {**DIGITS["trainer"], "max_steps": 2}
    shared = {"alpha": 0, "network": "mlp:64,64", "evaluations": 2}
    found = {
        name: distill(recipe, output=str(tmp_path / name), options={**shared, **options}).metrics
        for name, options in {
            "random": {"match": "random"},
            "latents": {"match": "distribution", "space": "latents", "iterations": 200, "autoencoder_steps": 500},
        }.items()
    }
    assert found["latents"]["fresh_accuracy_mlp:64,64"] > found["random"]["fresh_accuracy_mlp:64,64"] + 0.15
