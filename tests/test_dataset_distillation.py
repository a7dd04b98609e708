"""Paper 37 as a method: images are matched to the data, kept as a data set, and train the student and other networks."""

import numpy as np
import pytest
import torch

from engine_cases import DIGITS, FORKED, weights
from understudy import InputError, distill
from understudy.data import load_images
from understudy.methods.dataset_distillation import DatasetDistillation
from understudy.runs.recipe import make
from understudy.training.set_matching import Examples, Matching

BASE = {
    **DIGITS,
    "method": "dataset-distillation",
    "data": {"name": "digits", "limit": 200},
    "trainer": {**DIGITS["trainer"], "max_steps": 10},
}
FEW = {"iterations": 20, "evaluations": 1, "experts": 1, "expert_steps": 6, "span": 3, "student_steps": 2}


def run(output, **options):
    keys = {"teacher": None} if options.get("alpha") == 0 else {}
    return distill({**BASE, **keys}, output=str(output), options={**FEW, **options})


def images(result):
    (folder,) = (result.folder / "store").glob("distilled-set-*")
    return folder, dict(np.load(folder / "train.npz"))


def start(folder, **options):
    """What the matching starts from: a run of as many random images."""
    return images(run(folder, match="random", **options))[1]["image"]


@pytest.mark.parametrize("match", ["gradient", "distribution", "trajectory", "kernel"])
def test_matching_lowers_its_own_loss(match):
    torch.manual_seed(0)
    centres = 2 * torch.randn(3, 1, 1, 12)
    y = torch.arange(90) % 3
    real = Examples(centres[y] + torch.randn(90, 1, 1, 12), y)
    options = DatasetDistillation(match=match, expert_steps=20, experts=2, span=8, student_steps=3)
    matching = Matching(options, real, torch.arange(3), 3, "mlp:16", 0)
    trajectories = matching._experts()["flat"] if match == "trajectory" else None
    first = {"x": torch.randn(3, 1, 1, 12), "rate": torch.tensor(0.5), "optimizer": None}
    last = matching._advance(first, 0, 100, trajectories)

    def loss(state):
        found = []
        for i in range(1000, 1010):  # networks and draws that were not matched on
            generator = torch.Generator().manual_seed(i)
            x = state["x"].clone().requires_grad_()
            found.append(
                next(iter(matching._losses(x, state["rate"].clone().requires_grad_(), i, generator, trajectories)))
            )
        return float(torch.stack(found).mean().detach())

    assert loss(last) < 0.9 * loss(first)


def test_the_set_is_an_ordinary_data_set_that_trains_another_student(tmp_path):
    done = run(tmp_path / "run", match="distribution", per_class=2)
    folder, arrays = images(done)
    assert arrays["image"].shape == (20, 8, 8) and arrays["label"].tolist() == sorted([*range(10)] * 2)
    assert arrays["teacher_logits"].shape == (20, 10)
    own, whole = load_images({"name": str(folder)}), load_images(BASE["data"])
    assert len(own.train) == 20 and torch.equal(own.test.labels, whole.test.labels)
    assert torch.allclose(own.test.pixels, whole.test.pixels / 255) and len(own.validation) == len(whole.validation)
    other = distill(
        task="image_classification",
        method="sft",
        data=str(folder),
        student="convnet:2",
        output=str(tmp_path / "other"),
        trainer={"max_steps": 2},
    )
    assert 0 <= other.metrics["accuracy"] <= 1
    assert done.metrics["distilled_images"] == 20 and 0 <= done.metrics["fresh_accuracy_mlp:64,64"] <= 1
    assert done.metrics["distilled_norm"] != done.metrics["initial_norm"]
    page = (done.folder / "report.html").read_text()
    assert "Fresh networks" in page and "Distilled images" in page


@pytest.mark.parametrize("match", ["gradient", "trajectory", "kernel"])
def test_each_matching_runs_without_a_teacher(match, tmp_path):
    done = run(tmp_path / "run", match=match, alpha=0, others=[])
    arrays = images(done)[1]
    assert set(arrays) == {"image", "label"} and np.isfinite(arrays["image"]).all()
    assert not np.allclose(arrays["image"], start(tmp_path / "random", alpha=0, others=[]))


def _stopped(output):
    """A run that is killed in the second half of the matching."""
    torch.set_num_threads(1)
    advance = Matching._advance

    def until(self, state, first, last, trajectories):
        if first >= 10:
            raise SystemExit(7)
        return advance(self, state, first, last, trajectories)

    Matching._advance = until
    run(output, match="trajectory")


@pytest.mark.slow
def test_stopped_while_matching_it_resumes_to_the_same_bits(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    whole = run(tmp_path / "whole", match="trajectory")
    process = FORKED.Process(target=_stopped, args=(tmp_path / "cut",))
    process.start()
    process.join()
    assert process.exitcode == 7
    before, made = Matching._advance, []
    monkeypatch.setattr(Matching, "_advance", lambda self, *a: made.append(a[1:3]) or before(self, *a))
    done = run(tmp_path / "cut", match="trajectory")
    assert made[0] == (10, 12) and done.metrics == whole.metrics
    assert (images(done)[1]["image"] == images(whole)[1]["image"]).all()
    a, b = weights(whole.folder), weights(done.folder)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_statistics_of_batch_normalisation_are_those_of_real_images(tmp_path):
    done = run(tmp_path / "run", match="distribution", network="convnet:2", alpha=0, others=["convnet:2"])
    assert np.isfinite(images(done)[1]["image"]).all()
    torch.manual_seed(0)
    real = Examples(3 + torch.randn(40, 1, 8, 8), torch.arange(40) % 2)
    net = Matching(DatasetDistillation(), real, torch.arange(2), 2, "convnet:2", 0)._new_network(0, torch.Generator())
    conv, norm = net.body[0], net.body[1]
    assert torch.allclose(norm.running_mean, conv(real.x).mean((0, 2, 3)), atol=1e-5) and not norm.training


def test_it_starts_from_real_images_or_noise(tmp_path):
    real = start(tmp_path / "real", per_class=2, alpha=0, others=[])
    train = load_images(BASE["data"]).train
    for image in real:
        assert (np.abs(train.pixels[:, 0].numpy() / 255 - image).max((1, 2)) < 1e-6).any()
    options = {"per_class": 2, "alpha": 0, "others": [], "initial": "noise", "match": "distribution"}
    noise = images(run(tmp_path / "noise", **options))[1]["image"]
    assert noise.shape == real.shape and noise.min() < 0


@pytest.mark.parametrize(
    "options,says",
    [
        ({"per_class": 1000}, "Class 0 has .* options.per_class=1000 starts from as many"),
        ({"span": 6}, "span=6 steps of an expert are matched and options.expert_steps=6"),
        ({"network": "gpt2"}, "'gpt2' is none: set options.network"),
        ({"match": "trajectory", "network": "convnet:2"}, "convnet:2 has batch normalisation"),
        ({"image_rate": 1e18}, "not finite after iteration .*: lower options.image_rate"),
        ({"others": ["bert"]}, "options.others has 'bert'"),
    ],
)
def test_bad_input(options, says, tmp_path):
    match = {"match": "trajectory"} if "span" in options else {}
    with pytest.raises(InputError, match=says):
        run(tmp_path / "run", alpha=0, **match, **options)


def test_images_without_labels_and_a_cached_teacher_are_refused(tmp_path):
    with pytest.raises(InputError, match="has no label, and examples are kept for each class"):
        distill(
            {**BASE, "teacher": None},
            output=str(tmp_path / "a"),
            options={"alpha": 0},
            data={"name": "digits", "labelled": 3},
        )
    with pytest.raises(InputError, match="works on classification tasks"):
        make({"method": "dataset-distillation", "task": "language_modeling"})


@pytest.mark.slow
@pytest.mark.parametrize("match,gain", [("gradient", 0.1), ("distribution", 0.2), ("trajectory", 0.1), ("kernel", 0.1)])
def test_matched_images_train_better_than_random_ones(match, gain, tmp_path):
    """Fresh networks, trained on one image a class with hard labels."""
    recipe = {**BASE, "data": {"name": "digits", "limit": 1200}, "teacher": None}
    found = {
        m: distill(recipe, output=str(tmp_path / m), options={"match": m, "alpha": 0, "network": "mlp:64,64"}).metrics
        for m in ("random", match)
    }
    assert found[match]["fresh_accuracy_mlp:64,64"] > found["random"]["fresh_accuracy_mlp:64,64"] + gain
