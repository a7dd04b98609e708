"""Paper 29, HARD, as runs: what they report and cost, what is learned, autoencoders, the templates."""

import base64
import json

import numpy as np
import pytest
import torch

from engine_cases import DIGITS
from understudy import InputError, distill
from understudy.data import collate_images, load_images
from understudy.evaluation.pictures import picture_grid
from understudy.methods.hard import HARD
from understudy.models import ClassifierAdapter
from understudy.models.augmentors import Affine, Latent, Mix, warp
from understudy.models.autoencoders import Autoencoder, load_autoencoder
from understudy.models.small import build_small, load_small, save_small
from understudy.synthetic.images import IMAGES
from understudy.training import SetupContext, Shapes

TEMPLATES = {
    "task": "image_classification",
    "data": {"name": "templates"},
    "teacher": {
        "model": "circular:8",
        "train": {"max_steps": 300, "per_device_train_batch_size": 64, "learning_rate": 5e-3},
    },
    "student": "mlp:64",
    "trainer": {"max_steps": 400, "per_device_train_batch_size": 64, "learning_rate": 5e-3, "save_strategy": "no"},
}

HASTY = {"augmentor": "shift1d", "l_min": 0.4, "l_max": 1.0}


@pytest.mark.slow
def test_it_carries_over_what_the_teacher_ignores(tmp_path):
    """More of the moved signals than plain KD gets, in as many steps; the report shows inputs and costs."""
    found = {}
    for name, options in {"hard": HASTY, "kd": {"ce_weight": 0.0, "kd_weight": 1.0}}.items():
        recipe = {**TEMPLATES, "method": name, "options": options, "output": str(tmp_path / name)}
        if name == "kd":
            (tmp_path / name).mkdir()
            (tmp_path / "hard" / "teacher").rename(tmp_path / name / "teacher")
        found[name] = distill(recipe).metrics
    hard, kd = found["hard"], found["kd"]
    assert hard["accuracy"] > kd["accuracy"] + 0.1
    assert hard["accuracy_clean"] > 0.9 and kd["accuracy_clean"] > 0.9
    assert hard["augmentor_spread"] > 0.5  # where it started
    evaluation = json.loads((tmp_path / "hard" / "evaluation.json").read_text())
    cost, moves = evaluation["cost"], evaluation["cost"]["moves"]
    assert sum(moves.values()) == 400 and moves["augmentor"] == hard["augmentor_steps"] > 0
    assert moves["student"] == hard["student_steps"]
    # Batches of 64, the last of each of the epochs with 16.
    per_student, per_teacher = (cost["forwards"][side] for side in ("student", "teacher"))
    shown = per_teacher / 2
    assert per_teacher % 2 == 0 and 16 * 400 < shown <= 64 * 400
    assert 16 * moves["augmentor"] <= per_teacher - per_student <= 64 * moves["augmentor"]
    page = (tmp_path / "hard" / "report.html").read_text()
    (picture,) = evaluation["pictures"].values()
    assert base64.b64encode((tmp_path / "hard" / picture).read_bytes()).decode() in page
    assert "Augmented inputs" in page


@pytest.mark.slow
@pytest.mark.parametrize("family", ["affine", "mix", "latent"])
def test_every_family_learns_digits(family, tmp_path):
    options = {"augmentor": family, "l_min": 0.6, "l_max": 1.0, "max_augmentor_steps": 20, "autoencoder_steps": 300}
    trainer = {"max_steps": 300, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "save_strategy": "no"}
    teacher = {"model": "mlp:64", "train": {"max_steps": 300, "learning_rate": 3e-3}}
    recipe = {**DIGITS, "data": {"name": "digits", "limit": 300}, "teacher": teacher, "student": "mlp:32"}
    metrics = distill(
        {**recipe, "method": "hard", "options": options, "trainer": trainer, "output": str(tmp_path)}
    ).metrics
    assert metrics["accuracy"] > 0.8 and metrics["augmentor_steps"] > 0  # chance is 0.1


def test_the_latent_family_freezes_its_autoencoder(tmp_path):
    coder = Autoencoder((1, 8, 8), latent=4, hidden=8)
    coder.save(tmp_path / "coder")
    again = load_autoencoder(str(tmp_path / "coder"), (1, 8, 8))
    module = Latent(again, (1, 8, 8), 0.1)
    assert sorted(n for n, _ in module.named_parameters()) == ["mu", "rho"] and module.noise_shape == (4,)
    x, noise = torch.rand(3, 1, 8, 8), torch.randn(3, 4)
    expected = coder.decode(coder.encode(x) + module.mu + torch.nn.functional.softplus(module.rho) * noise)
    torch.testing.assert_close(module(x, noise), expected)
    with pytest.raises(InputError, match=r"does not give back inputs of shape \[1, 9, 9\]"):
        load_autoencoder(str(tmp_path / "coder"), (1, 9, 9))
    for number, facts in enumerate(("[]", '{"understudy_autoencoder": [4, 8]}')):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(facts)
        with pytest.raises(InputError, match=r"describes no autoencoder|holds a list"):
            load_autoencoder(str(tmp_path / str(number)), (1, 8, 8))
    options = {"augmentor": "latent", "autoencoder": str(tmp_path / "none")}
    with pytest.raises(InputError, match=r"none' is not a folder with a config.json"):
        distill({**DIGITS, "method": "hard", "options": options, "output": str(tmp_path / "run")})
    method = HARD(augmentor="latent", autoencoder=str(tmp_path / "coder"))
    made = method.modules(Shapes(10, inputs={"pixel_values": (1, 8, 8)}))["augmentor"]
    assert all(torch.equal(made.autoencoder.state_dict()[k], v) for k, v in coder.state_dict().items())
    assert not made.train().autoencoder.training


def test_an_autoencoder_is_trained_on_the_examples_that_count(tmp_path):
    """The others may hold anything."""
    tables = []
    for garbage in (0.5, 1e6):
        x, labels = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 10
        x[3], labels[3] = garbage, -100
        items = [(a, int(b), i) for i, (a, b) in enumerate(zip(x, labels, strict=True))]
        model = ClassifierAdapter(build_small("mlp:4", 10, (1, 8, 8)), 10)
        context = SetupContext(model, model, {"train": items}, collate_images, 10, tmp_path / str(garbage), "")
        tables.append(HARD(augmentor="latent", autoencoder_steps=20).setup(context))
    assert all(torch.equal(tables[1][name], value) for name, value in tables[0].items())


def test_an_autoencoder_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(4,), latent_channels=2, norm_num_groups=2, layers_per_block=1
    )
    vae.save_pretrained(tmp_path)
    module = Latent(load_autoencoder(str(tmp_path), (1, 8, 8)), (1, 8, 8), 0.1)
    assert sum(1 for _ in module.parameters()) == 2
    out = module(torch.rand(2, 1, 8, 8), torch.randn(2, *module.noise_shape))
    assert out.shape == (2, 1, 8, 8) and out.requires_grad
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(InputError, match="not an autoencoder of diffusers"):
        load_autoencoder(str(tmp_path), (1, 8, 8))


def test_affine_maps_move_by_pixels():
    x = torch.rand(1, 2, 6, 8)
    moved = warp(x, torch.tensor([[[0.0, 0, 2 * 2 / 8], [0, 0, 2 / 6]]]), "zeros")  # the view moves 2 right, 1 down
    torch.testing.assert_close(moved[:, :, :-1, :-2], x[:, :, 1:, 2:])
    assert moved[:, :, -1].abs().max() < 1e-5 and moved[:, :, :, -2:].abs().max() < 1e-5
    edge = warp(x, torch.tensor([[[0.0, 0, 2 * 2 / 8], [0, 0, 0]]]), "border")
    torch.testing.assert_close(edge[..., -1], x[..., -1])
    same = Affine(1e-12, "zeros")(x, torch.randn(1, 6))
    torch.testing.assert_close(same, x)


@pytest.mark.parametrize("shape", [(1, 1, 40), (1, 8, 8), (3, 8, 8)])
def test_a_mixture_is_convex_and_learnable(shape):
    x = torch.rand(4, *shape)
    module = Mix(shape, 0.3, "border")
    facts = module.facts()
    assert sum(facts.values()) == pytest.approx(1) and facts["share_nothing"] == pytest.approx(0.7)
    noise = torch.randn(4, *module.noise_shape)
    calm = noise.clone()
    calm[:, :, 1:] = 0.0  # no operation does anything: any mixture of the input with itself is the input
    torch.testing.assert_close(module(x, calm), x, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(module(x, noise).square().sum(), module.weight)
    assert (gradient != 0).all() and gradient.sum().abs() < 1e-3


def test_templates_and_further_test_sets(tmp_path):
    splits = load_images({"name": "templates"}, IMAGES)
    sizes = [len(s) for s in (splits.train, splits.validation, splits.test, splits.more_tests["test_clean"])]
    assert sizes == [2000, 500, 2000, 2000] and splits.shape == (1, 1, 40)
    clean = splits.more_tests["test_clean"]
    assert clean.pixels[..., 24:].std() == pytest.approx(0.35, abs=0.01)  # noise alone, where no template is
    assert splits.test.pixels[..., 24:].std() > 0.6
    rng = np.random.default_rng(0)
    for name in ("train", "test", "test_moved"):
        images = rng.integers(0, 255, (40, 1, 4, 4), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(40) % 2)
    recipe = {"method": "sft", "data": {"name": str(tmp_path)}, "student": "mlp:4", "trainer": {"max_steps": 2}}
    teacher = {"model": "mlp:4", "train": {"max_steps": 2}}
    metrics = distill({**recipe, "teacher": teacher, "output": str(tmp_path / "run")}).metrics
    assert {"accuracy", "accuracy_moved", "nll_moved"} <= metrics.keys()
    judged = distill(
        {**recipe, "teacher": teacher, "eval_split": "validation", "output": str(tmp_path / "other")}
    ).metrics
    assert "accuracy_moved" not in judged


def test_circular_networks_do_not_see_shifts(tmp_path):
    x = torch.rand(3, 1, 1, 40)
    model = build_small("circular:6", 5, (1, 1, 40))
    torch.testing.assert_close(model(x), model(x.roll(7, -1)))
    flat = build_small("circular:6,flat", 5, (2, 6, 4))
    y = torch.rand(3, 2, 6, 4)
    assert not torch.allclose(flat(y), flat(y.roll(2, -1)))
    save_small(flat, tmp_path)
    torch.testing.assert_close(load_small(tmp_path)(y), flat(y))


def test_pictures_of_images_and_signals():
    images = picture_grid([torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)])
    assert images.shape == (2 * 68, 3 * 68, 3) and images.dtype == np.uint8
    colour = torch.zeros(1, 3, 64, 64)
    colour[:, 0] = 1.0
    assert picture_grid([colour])[2:-2, 2:-2].reshape(-1, 3).tolist() == [[255, 0, 0]] * 64**2
    line = picture_grid([torch.linspace(0, 1, 5).view(1, 1, 1, 5), torch.zeros(1, 1, 1, 5)])
    ink = (line[2:66, 2:15] == (0, 60, 120)).all(-1)
    assert ink.any(0).all() and ink[:, 0].nonzero()[0].max() == 63 and ink[:, -1].nonzero()[0].min() == 0
