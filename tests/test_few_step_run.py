"""Progressive and consistency distillation, DMD and Diffusion-DPO on the engine: limits, splits, resume, and that they learn."""

import copy
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from engine_cases import killed_run, weights
from split_cases import ends_alike, flat
from understudy import InputError, distill
from understudy.cli import main
from understudy.data import Batch, NoiseSet
from understudy.data.images import load_images
from understudy.data.noise_sets import NoiseBatch, Reference, collate_noise, load_source
from understudy.losses.diffusion import ddim_step
from understudy.methods.consistency import Consistency
from understudy.methods.diffusion_dpo import DiffusionDPO
from understudy.methods.dmd import DMD
from understudy.methods.progressive import Progressive
from understudy.models import DenoiserAdapter, ModelOutput, Sampler, draw_samples
from understudy.models.denoisers import load_denoiser
from understudy.models.diffusion import ddim
from understudy.models.noise_levels import Cosine, Table
from understudy.runs.check import evaluate_run
from understudy.synthetic.ring8 import DEVIATION, ring_centres, ring_examples
from understudy.targets import Clean
from understudy.teachers import LocalTeacher
from understudy.training import DistillationTrainer, SetupContext, TrainModule
from understudy.training.arguments import training_arguments
from understudy.training.denoising import sampled_like
from understudy.training.shapes import Shapes

RING = {
    "task": "image_generation",
    "data": {"name": "ring8", "size": 256, "samples": 100, "compare_steps": [1, 2], "teacher_steps": 4},
    "teacher": {"model": "denoiser:16,16", "train": {"max_steps": 20, "per_device_train_batch_size": 32}},
    "student": "teacher",
    "trainer": {"max_steps": 12, "per_device_train_batch_size": 16, "save_steps": 3, "logging_steps": 1},
}
METHODS = {
    "progressive": Progressive(start_steps=8, steps=2),
    "consistency": Consistency(intervals=4, ema=0.5),
    "consistency-ddim": Consistency(intervals=4, solver="ddim", distance="l1", ema=0),
    "dmd": DMD(pairs=12, fake_rate=0.01),
    "dmd-scores-alone": DMD(regression=0, fake_rate=0.01),
    "diffusion-dpo": DiffusionDPO(pairs=12, beta=2.0),
}
OPTIONS = {
    "progressive": {"start_steps": 4, "steps": 1},
    "consistency": {"intervals": 4, "ema": 0.9, "steps": 2},
    "dmd": {"pairs": 64},
    "diffusion-dpo": {"pairs": 64, "beta": 5.0},
}


def trainer_for(method, tmp_path, micro=12, accumulate=1, phase=0, exact=False, **more):
    torch.manual_seed(1)
    teacher = load_denoiser("exact" if exact else "denoiser:8", shape=(2,), centres=ring_centres(), deviation=DEVIATION)
    teacher = teacher.double()
    teacher.sampler = Sampler(steps=3)
    student = load_denoiser("denoiser:8", shape=(2,)).double() if exact else copy.deepcopy(teacher)
    values = {
        "max_steps": 2,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "save_strategy": "no",
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        **more,
    }

    def twelve():
        points, modes = ring_examples("train", 12)
        return points.double(), modes

    examples = NoiseSet(12, "train", 0, Reference(twelve, None, None, "key", (), 1))
    context = SetupContext(student, teacher, {"train": examples}, collate_noise, 0, tmp_path / "store", "key")
    tables = method.setup(context)
    student = method.student(student, context)
    shapes = Shapes(0, student=student, teacher=teacher)
    module = TrainModule(student, method, shapes, 2, tables=tables, context=context).double()
    now = method.phases()[phase]
    args = training_arguments(values, tmp_path, 0)
    asked = LocalTeacher(teacher, "teacher")
    trainer = DistillationTrainer(module, args, context.splits[now.split], collate_noise, teacher=asked)
    module.begin_phase(now, 2, {id(p) for p in module.parameters() if p.requires_grad})
    return trainer


def shown(trainer):
    """A batch as the student sees it, and the state."""
    data = trainer.train_dataset
    batch = Batch.from_dict(collate_noise([data[i] for i in range(len(data))]))
    return trainer.model.method.transform_batch(batch, trainer.model.train_state), trainer.model.train_state


@pytest.mark.parametrize("name", METHODS)
def test_any_split_of_a_batch_gives_the_same_update(name, tmp_path):
    ends_alike(partial(trainer_for, METHODS[name], tmp_path), atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_the_student_alone(name, tmp_path):
    trainer = trainer_for(METHODS[name], tmp_path)
    module, teacher = trainer.model, flat(trainer.teacher.model)
    with torch.no_grad():
        for part in module.own.values():  # at the start it is the teacher, and there is nothing to follow
            next(part.parameters()).mul_(1.5)
    sum(module(shown(trainer)[0], None).losses.values()).backward()
    found = {n: p.grad is not None and bool(p.grad.ne(0).any()) for n, p in module.named_parameters()}
    assert all(v == n.startswith("student.") for n, v in found.items()), found
    trainer.train()
    assert torch.equal(flat(trainer.teacher.model), teacher)


@pytest.mark.parametrize("phase", [0, 1])
def test_progressive_is_done_where_one_step_is_two_of_the_teacher(phase, tmp_path):
    """The loss is 0 for a student that says the target, and its step then ends where the teacher's two do."""
    method = METHODS["progressive"]
    trainer = trainer_for(method, tmp_path, phase=phase)
    with torch.no_grad():  # in the second phase the run's teacher has no part
        next(trainer.teacher.model.parameters()).mul_(1.0 if phase == 0 else math.nan)
    batch, state = shown(trainer)
    model = trainer.teacher.model if phase == 0 else state.student
    target = method.target(batch, state)
    loss = method.loss(ModelOutput(Clean(target)), None, batch, state)["progressive"].values
    assert loss.eq(0).all() and len(loss) == 12
    grid = model.times(2 * int(state.phase.split("-")[0]))
    for i in range(12):
        one = NoiseBatch({}, batch.labels[i : i + 1], batch.ids[i : i + 1], condition=batch.condition[i : i + 1])
        at = int((grid - batch.inputs["t"][i]).abs().argmin())
        assert at % 2 == 0
        x = batch.inputs["x"][i : i + 1]
        two = ddim(lambda b: model(b).signal.values, model.levels, one, x, grid[at : at + 3])
        levels = [v.expand(1) for t in (grid[at], grid[at + 2]) for v in model.levels.at(t)]
        torch.testing.assert_close(ddim_step(x, target[i : i + 1], *levels), two)


def test_progressive_halves_until_the_end():
    assert [p.name for p in Progressive().phases()] == ["8-steps", "4-steps", "2-steps", "1-steps"]
    assert [p.name for p in METHODS["progressive"].phases()] == ["4-steps", "2-steps"]


def test_consistency_ends_at_the_teacher_where_the_earlier_time_is_the_smallest(tmp_path):
    """With one interval the target is the teacher's own step, whatever the average says: f is the identity there."""
    method = Consistency(intervals=1, solver="ddim")
    trainer = trainer_for(method, tmp_path)
    batch, state = shown(trainer)
    assert batch.inputs["t"].eq(0.99).all()
    with torch.no_grad():
        next(state.companions["target"].parameters()).mul_(1e6)
    teacher = trainer.teacher.model
    step = ddim(lambda b: teacher(b).signal.values, teacher.levels, batch, batch.inputs["x"], teacher.times(1))
    assert torch.equal(method.target(batch, state), step)
    # the student is the teacher, and that is what its one step does
    assert method.loss(state.student(batch), None, batch, state)["consistency"].values.abs().max() < 1e-20


def test_the_average_is_the_target_and_the_slower_one_is_saved(tmp_path):
    trainer = trainer_for(Consistency(intervals=4, target_decay=0.0, ema=0.5), tmp_path, save_strategy="no")
    student = trainer.model.student
    trainer.train()
    target, average = (trainer.model.companions[n] for n in ("target", "average"))
    assert torch.equal(flat(average), flat(student)) and not torch.equal(flat(target), flat(student))


def test_more_calls_of_a_consistency_model_renoise():
    """Of one point x_0 is known, and any number of calls returns the point."""
    adapter = load_denoiser("exact", shape=(2,), centres=torch.tensor([[0.3, -0.4]]), deviation=0.0)
    adapter.sampler = Sampler(steps=3, renoise=True)
    ids = torch.arange(4)
    batch = NoiseBatch({}, ids, ids, condition=torch.full_like(ids, -1))
    found = adapter.draw(batch, torch.randn(4, 2))
    torch.testing.assert_close(found, adapter.model.centres.expand(4, 2), rtol=0, atol=1e-5)
    ring = load_denoiser("exact", shape=(2,), centres=ring_centres(), deviation=DEVIATION)
    eps, drawn = torch.randn(4, 2), {}
    for fresh in (False, True):
        ring.sampler = Sampler(steps=3, renoise=fresh)
        drawn[fresh] = [ring.draw(batch, eps, steps) for steps in (1, 3)]
    assert torch.equal(drawn[True][0], drawn[False][0]) and not torch.allclose(drawn[True][1], drawn[False][1])


def test_scores_that_agree_give_no_gradient(tmp_path):
    """The fake score starts as the teacher, and then there is nothing to follow but the pairs."""
    trainer = trainer_for(METHODS["dmd-scores-alone"], tmp_path)
    sums = trainer.model(shown(trainer)[0], None)
    sums.losses["dmd"].backward()
    assert set(sums.losses) == {"dmd"} and float(sums.values["dmd"]) == 0
    assert all(p.grad.eq(0).all() for p in trainer.model.student.parameters())
    closed = trainer_for(METHODS["dmd"], tmp_path / "exact", exact=True).model
    assert torch.equal(flat(closed.own["fake"]), flat(closed.student))


@pytest.mark.parametrize("method", ["diffusion-dpo", "dmd"])
def test_a_teacher_that_networks_start_from_runs_in_their_precision(method, tmp_path):
    trainer = {**RING["trainer"], "bf16": True, "max_steps": 1}
    options = {"beta": 500.0} if method == "diffusion-dpo" else {"pairs": 16, "fake_rate": 1e-9}
    distill({**RING, "method": method, "options": options, "trainer": trainer, "output": str(tmp_path / "run")})
    terms = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["terms"]
    name, value = ("dpo", math.log(2)) if method == "diffusion-dpo" else ("dmd", 0.0)
    assert terms[name] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_preferences_begin_at_log_two(clip, tmp_path):
    """Also where the teacher bounds x_0 as it samples, which the student does not as it learns."""
    trainer = trainer_for(METHODS["diffusion-dpo"], tmp_path)
    trainer.teacher.model.clip = clip
    batch, _ = shown(trainer)
    sums = trainer.model(batch, None)
    assert float(sums.values["dpo"]) / batch.num_items == pytest.approx(math.log(2), abs=1e-12)
    assert float(sums.values["rewards/accuracies"]) == 0
    trainer.train()
    assert float(trainer.model(batch, None).values["dpo"]) / batch.num_items < math.log(2)
    assert trainer.teacher.model.clip == clip and trainer.model.student.clip is None


class ByFirst(DiffusionDPO):
    """Prefers samples to the left."""

    name = "by-first"

    def costs(self, samples, batch, context):
        return samples[:, 0]


class Alike(DiffusionDPO):
    """Finds all samples alike."""

    name = "alike"

    def costs(self, samples, batch, context):
        return torch.zeros(len(samples))


def test_pairs_are_ranked_by_costs_of_any_kind(tmp_path):
    trainer = trainer_for(ByFirst(pairs=12), tmp_path)
    tables = trainer.model.train_state.tables
    assert bool((tables["chosen"][:, 0] < tables["rejected"][:, 0]).all()) and len(trainer.train_dataset) == 12
    with pytest.raises(InputError, match="Every pair is a tie"):
        trainer_for(Alike(pairs=12), tmp_path)
    with pytest.raises(InputError, match="first candidate of row 0 is nan"):
        trainer_for(type("Bad", (ByFirst,), {"costs": lambda *a: torch.full((12,), torch.nan)})(pairs=12), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_killed_and_resumed_ends_in_the_same_weights(method, tmp_path):
    recipe = {**RING, "method": method, "options": OPTIONS[method]}
    distill({**recipe, "output": str(tmp_path / "whole")})
    cut = {**recipe, "output": str(tmp_path / "cut")}
    inside = (("2", "after"), ("5", "before"), ("4", "saving")) if method == "progressive" else None
    for step, moment in inside or (("2", "after"), ("5", "before"), ("9", "saving")):
        assert killed_run(cut, int(step), moment)
    distill(cut)
    a, b = (weights(tmp_path / f) for f in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [(tmp_path / f / "metrics.jsonl").read_text().splitlines() for f in ("whole", "cut")]
    assert [json.loads(x)["terms"] for x in lines[0]] == [json.loads(x)["terms"] for x in lines[1]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A diffusion model of the ring."""
    folder = tmp_path_factory.mktemp("teacher")
    steps = {"max_steps": 500, "learning_rate": 3e-3, "per_device_train_batch_size": 128, "save_strategy": "no"}
    recipe = {"task": "image_generation", "method": "denoise", "student": "denoiser:64,64", "options": {"ema": 0.99}}
    distill({**recipe, "data": RING["data"], "trainer": steps, "output": str(folder)})
    return str(folder / "student")


LEARNS = {
    "progressive": ({"start_steps": 8}, 2e-3),
    "consistency": ({"ema": 0.99}, 1e-3),
    "dmd": ({"pairs": 2000}, 1e-3),
}


@pytest.mark.parametrize("method", LEARNS)
def test_one_call_of_the_student_is_better_than_two_of_the_teacher(method, teacher, tmp_path):
    options, rate = LEARNS[method]
    data = {"name": "ring8", "size": 6400, "samples": 500, "compare_steps": [1, 2], "teacher_steps": 8}
    words = {"task": "image_generation", "method": method, "output": str(tmp_path), "student": "teacher"}
    words |= {"teacher": teacher, "data": json.dumps(data), "options": json.dumps(options)}
    words |= {f"trainer.{k}": v for k, v in {"max_steps": 240, "learning_rate": rate, "save_strategy": "no"}.items()}
    words |= {"trainer.per_device_train_batch_size": 80}  # an epoch of 4,000 examples is even
    with pytest.raises(SystemExit) as stop:
        main(["train", *(f"{k}={v}" for k, v in words.items())])
    assert stop.value.code in (0, None)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    m = evaluation["metrics"]
    assert m["nfe"] == 1 and m["distance"] < m["teacher_2_distance"] < m["teacher_1_distance"] / 2, m
    calls = {"progressive": 2 * 80 * 80, "consistency": 2 * 240 * 80, "dmd": 240 * 80}
    forwards = evaluation["cost"]["forwards"]
    assert forwards["teacher"] == calls[method]  # of progressive, in the first of three phases alone
    assert forwards["student"] == 240 * 80 * (3 if method == "dmd" else 1)
    again = load_denoiser(tmp_path / "student")
    assert again.sampler.steps == 1 and again.sampler.renoise == (method == "consistency")


@pytest.mark.parametrize("beta", [20.0, DiffusionDPO().beta])
def test_preferences_lower_the_cost_of_samples(beta, teacher, tmp_path):
    recipe = {**RING, "method": ByFirst, "teacher": teacher}
    steps = {"max_steps": 150, "learning_rate": 3e-4, "per_device_train_batch_size": 64, "save_strategy": "no"}
    options = {"beta": beta, "pairs": 256}
    m = distill({**recipe, "options": options, "trainer": steps, "output": str(tmp_path)}).metrics
    assert m["nfe"] == m["teacher_nfe"] == 4 and m["cost"] < m["reference_cost"] - 0.1, m
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["terms"]
    assert last["dpo"] < math.log(2) and last["rewards/accuracies"] > 0.5


@pytest.mark.parametrize("method", OPTIONS)
def test_a_teacher_without_data(method, teacher, tmp_path):
    data = {"name": "noise", "size": 64, "samples": 50, "compare_steps": [1], "teacher_steps": 2}
    chosen = ByFirst if method == "diffusion-dpo" else method
    options = {**OPTIONS[method], **({"samples": 32} if method in ("progressive", "consistency") else {})}
    recipe = {**RING, "method": chosen, "teacher": teacher, "data": data, "options": options}
    assert {"distance", "rmse"} <= distill({**recipe, "output": str(tmp_path)}).metrics.keys()


@pytest.mark.parametrize("method", ["progressive", "consistency", "dmd"])
def test_classes_and_guidance_of_a_closed_form(method, tmp_path):
    data = {**RING["data"], "conditional": True, "guidance": 1.5}
    trainer = {**RING["trainer"], "max_steps": 4, "save_strategy": "no"}
    recipe = {**RING, "method": method, "data": data, "teacher": "exact", "student": "denoiser:16"}
    result = distill({**recipe, "trainer": trainer, "options": OPTIONS[method], "output": str(tmp_path)})
    assert result.metrics["teacher_nfe"] == 8
    assert result.metrics["nfe"] == OPTIONS[method].get("steps", 1)  # guidance is learned, and not added
    again = evaluate_run(tmp_path)["metrics"]
    assert again == pytest.approx({name: result.metrics[name] for name in again})


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_scenes(method, tmp_path):
    recipe = {
        "task": "scene_completion",
        "method": method,
        "data": {"name": "street2d", "size": 12, "samples": 4, "points": 8, "compare_steps": [1], "teacher_steps": 4},
        "teacher": {"model": "pointnet:8,8", "train": {"max_steps": 3, "per_device_train_batch_size": 4}},
        "student": "teacher",
        "options": OPTIONS[method],
        "trainer": {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no"},
    }
    m = distill({**recipe, "output": str(tmp_path)}).metrics
    assert math.isfinite(m["chamfer"]) and ("reference_cost" in m) == (method == "diffusion-dpo")


def pairs(path, number=60):
    generator = np.random.default_rng(0)
    better = generator.integers(0, 128, (number, 8, 8), dtype=np.uint8)
    worse = np.where(np.arange(number)[:, None, None] % 6 == 0, better, 255 - better)  # every sixth is a tie
    np.savez(path, images=better, rejected=worse, labels=np.arange(number) % 3)


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_images_of_a_diffusers_network(method, tmp_path):
    pytest.importorskip("diffusers")
    pairs(tmp_path / "pairs.npz")
    told = {"rejected_column": "rejected"} if method == "diffusion-dpo" else {}
    recipe = {
        **RING,
        "method": method,
        "data": {
            **{"name": str(tmp_path / "pairs.npz"), "size": 32, "samples": 20, "compare_steps": [1]},
            **{"teacher_steps": 2, **told},
        },
        "teacher": {"model": "unet:8,8", "train": {"max_steps": 3, "per_device_train_batch_size": 16}},
        "options": OPTIONS[method],
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no"},
    }
    metrics = distill({**recipe, "output": str(tmp_path / "run")}).metrics
    assert math.isfinite(metrics["distance"]) and "cost" not in metrics
    again = load_denoiser(tmp_path / "run" / "student")
    assert type(again.model).__name__ == "UNet2DModel"


def test_pairs_are_columns_of_the_data(tmp_path):
    pairs(tmp_path / "pairs.npz")
    for spec in (str(tmp_path / "pairs.npz"), records()):
        name = spec if isinstance(spec, str) else held(spec)
        columns = {} if isinstance(spec, str) else {"image_column": "chosen"}
        source = load_source({"name": name, **columns}, {}, "rejected")
        for split in ("train", "test"):
            better, labels = source.examples(split)
            worse = source.rejected(split)
            assert better.shape == worse.shape and len(labels) == len(better)
            same = (better == worse).flatten(1).all(1)
            torch.testing.assert_close(worse[~same], -better[~same])  # of the same row, on [−1, 1]
    context = SetupContext(None, None, {}, collate_noise, 0, tmp_path, "key")
    context.splits["train"] = NoiseSet(
        4, "train", 0, Reference(lambda: source.examples("train"), None, None, "k", (), 1)
    )
    context.splits["train"].reference.rejected = lambda: source.rejected("train")
    tables = DiffusionDPO().setup(context)
    kept = [int(context.splits["pairs"][i][0]) for i in range(len(context.splits["pairs"]))]
    assert 0 < len(kept) < len(tables["chosen"])
    assert all(not torch.equal(tables["chosen"][i], tables["rejected"][i]) for i in kept)


def loose(folder, number=24, sides=(16, 12)):
    """Images of two sizes in one folder, without classes."""
    folder.mkdir(parents=True)
    for i in range(number):
        side = sides[i % 2]
        Image.fromarray(np.full((side, side), 9 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


def test_a_folder_of_images_without_classes_is_generated_from(tmp_path):
    name = str(loose(tmp_path / "photos"))
    with pytest.raises(InputError, match=r"set data\.image_size, say data\.image_size=16"):
        load_source({"name": name})
    source = load_source({"name": name, "image_size": 8})
    pixels, labels = source.examples("train")
    assert source.classes == 0 and pixels.shape[1:] == (1, 8, 8) and labels.eq(-1).all()
    parts = [source.examples(split)[0] for split in ("train", "validation", "test")]
    shades = [set(part[:, 0, 0, 0].tolist()) for part in parts]
    assert sum(map(len, shades)) == len(set.union(*shades)) == 24  # no image is in two splits
    for split in ("train", "test"):
        loose(tmp_path / "split" / split, 12, (8, 8))
    apart = load_source({"name": str(tmp_path / "split")})
    assert len(apart.examples("test")[0]) == 12 and len(apart.examples("train")[0]) == 11
    with pytest.raises(InputError, match=r"data\.image_size is of images, and noise has none"):
        load_source({"name": "noise", "image_size": 8})
    with pytest.raises(InputError, match="has no classes, which this task learns"):
        load_images({"name": name, "size": 8, "label_column": None})


def test_a_generator_of_images_without_classes_is_trained_and_drawn_from(tmp_path):
    pytest.importorskip("diffusers")
    data = {"name": str(loose(tmp_path / "photos")), "image_size": 8, "samples": 6, "compare_steps": [1]}
    recipe = {
        **{
            "task": "image_generation",
            "method": "denoise",
            "student": "unet:8,8",
            "data": {**data, "teacher_steps": 3},
        },
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"},
    }
    found = distill({**recipe, "output": str(tmp_path / "run")})
    assert math.isfinite(found.metrics["distance"]) and "coverage" not in found.metrics
    student = tmp_path / "run" / "student"
    drawn = draw_samples(student, 5)
    assert drawn.shape == (5, 1, 8, 8)
    torch.testing.assert_close(draw_samples(student, 3, first=2), drawn[2:])  # a sample depends on its id alone
    assert not torch.allclose(draw_samples(student, 5, steps=1), drawn)
    with pytest.raises(InputError, match="0 samples were asked for"):
        draw_samples(student, 0)
    with pytest.raises(InputError, match="Give classes or scans"):
        draw_samples(student, classes=[0], scans=torch.zeros(1, 4, 3))
    with pytest.raises(InputError, match=r"data\.conditional needs classes, and data=.*photos has none"):
        distill({**recipe, "data": {**recipe["data"], "conditional": True}, "output": str(tmp_path / "told")})


def test_classes_and_scans_are_told_to_the_model(tmp_path):
    torch.manual_seed(0)
    points = load_denoiser("denoiser:16", shape=(2,), classes=3, sampler=Sampler(4))
    both = draw_samples(points, classes=[0, 2])
    torch.testing.assert_close(both[:1], draw_samples(points, classes=[0]))
    assert both.shape == (2, 2) and not torch.allclose(both[1:], draw_samples(points, classes=[0, 1])[1:])
    scenes = load_denoiser("pointnet:8,8", shape=(16, 3), sampler=Sampler(2, t_min=0.0, t_max=1.0))
    scans = torch.randn(2, 4, 3)
    assert draw_samples(scenes, scans=scans).shape == (2, 16, 3)
    with pytest.raises(InputError, match="This denoiser completes scans"):
        draw_samples(scenes, 2)


def records():
    generator = np.random.default_rng(0)
    better = generator.integers(0, 128, (60, 8, 8), dtype=np.uint8)
    return [{"chosen": x, "rejected": x if i % 6 == 0 else 255 - x, "label": i % 3} for i, x in enumerate(better)]


def held(rows):
    from understudy.data.memory import keep

    return keep(rows)


@pytest.mark.parametrize(
    "keys,says",
    [
        ({"method": "progressive", "options": {"start_steps": 6}}, "each phase halves it"),
        ({"method": "progressive", "options": {"start_steps": 4, "steps": 4}}, "must be steps .4. times 2, 4"),
        ({"method": "progressive", "options": {"weight": "snr+1"}}, "weight"),
        ({"method": "progressive", "trainer": {"max_steps": 2}}, "4 phases need as many optimizer steps"),
        ({"method": "consistency", "options": {"distance": "lpips"}}, "distance"),
        ({"method": "dmd", "options": {"t_min": 0.99}}, "must lie below t_max"),
        ({"method": "dmd", "teacher": "exact", "student": "exact"}, "nothing to train"),
        ({"method": "dmd", "student": "mar:8,1,2"}, "clouds|square|points|images"),
        ({"method": "diffusion-dpo", "teacher": "exact", "student": "denoiser:8"}, "set student=teacher"),
        ({"method": "diffusion-dpo", "options": {"metric": "chamfer"}}, "samples of these data are ranked by nearest"),
        ({"method": "diffusion-dpo", "data": {"name": "ring8", "rejected_column": "worse"}}, "ring8 has none"),
        ({"method": "consistency", "task": "image_classification", "data": "digits", "teacher": "mlp:8"}, "noise"),
    ],
)
def test_bad_input(keys, says, tmp_path):
    with pytest.raises(InputError, match=says):
        distill({**RING, **keys, "output": str(tmp_path)})


def test_schedules_that_cannot_be_used_are_refused(tmp_path):
    table = Table(Cosine().at(torch.linspace(0.001, 0.999, 10, dtype=torch.float64))[0].square())
    student = load_denoiser("denoiser:8", shape=(2,))
    teacher = DenoiserAdapter(copy.deepcopy(student.model), table, "sample", (2,))
    context = SetupContext(student, teacher, {}, collate_noise, 0, tmp_path, "key")
    with pytest.raises(InputError, match="more than the teacher's schedule has times"):
        sampled_like(student, context, 1, 16)
    with pytest.raises(InputError, match="noise schedules that differ"):
        sampled_like(student, context, 1, 4)


def test_pairs_without_examples_to_rank_by(teacher, tmp_path):
    data = {"name": "noise", "size": 64, "samples": 50, "compare_steps": [1], "teacher_steps": 2}
    with pytest.raises(InputError, match="these data have none"):
        distill({**RING, "method": "diffusion-dpo", "teacher": teacher, "data": data, "output": str(tmp_path)})


def test_errors_that_are_not_finite_end_a_run(tmp_path):
    trainer = trainer_for(METHODS["diffusion-dpo"], tmp_path)
    with torch.no_grad():
        next(trainer.model.student.parameters()).fill_(math.nan)
    with pytest.raises(InputError, match="error of the chosen side of pair 0 is nan"):
        trainer.train()
