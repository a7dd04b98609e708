"""Generation on the engine: resume to the bit, any split alike, no data touched, who is trained, what is saved."""

import json
import math
from functools import partial

import pytest
import torch

from engine_cases import killed_run, weights
from split_cases import ends_alike
from understudy import InputError, distill
from understudy.cli import main
from understudy.data import Batch, NoiseSet
from understudy.data.noise_sets import ExampleSet, collate_noise
from understudy.evaluation.distances import coverage, energy_distance, frechet_distance
from understudy.methods.boot import BOOT
from understudy.methods.denoise import Denoise
from understudy.models.denoisers import load_denoiser
from understudy.models.diffusion import Sampler
from understudy.runs import fitting
from understudy.synthetic.ring8 import DEVIATION, ring_centres
from understudy.teachers import LocalTeacher
from understudy.training import DistillationTrainer, SetupContext, TrainModule
from understudy.training.arguments import training_arguments
from understudy.training.saving import load_weights
from understudy.training.shapes import Shapes

RING = {
    "task": "image_generation",
    "method": "boot",
    "data": {"name": "ring8", "size": 256, "samples": 300, "compare_steps": [1, 4], "teacher_steps": 20},
    "student": "denoiser:16,16",
    "trainer": {"max_steps": 20, "per_device_train_batch_size": 16, "save_steps": 5, "logging_steps": 1},
}


def ring(output, **keys):
    merged = {
        k: {**RING[k], **v} if isinstance(v, dict) and isinstance(RING.get(k), dict) else v for k, v in keys.items()
    }
    return distill({**RING, **merged, "output": str(output)})


@pytest.mark.slow
@pytest.mark.parametrize("target", ["bootstrap", "regression"])
def test_killed_and_resumed_ends_in_the_same_weights(target, tmp_path):
    options = {"target": target, "ema": 0.9, "steps": 4}
    ring(tmp_path / "whole", options=options)
    cut = {**RING, "options": options, "output": str(tmp_path / "cut")}
    for step, moment in ((3, "after"), (8, "before"), (15, "saving")):
        assert killed_run(cut, step, moment)
    distill(cut)
    a, b = (weights(tmp_path / f) for f in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [(tmp_path / f / "metrics.jsonl").read_text() for f in ("whole", "cut")]
    assert [json.loads(x)["loss"] for x in lines[0].splitlines()] == [
        json.loads(x)["loss"] for x in lines[1].splitlines()
    ]


class Raises:
    """A data set that may not be touched."""

    def __len__(self):
        raise AssertionError("the data set was touched")

    __getitem__ = __len__


def trainer_for(method, tmp_path, micro=12, accumulate=1, learning_rate=0.1):
    torch.manual_seed(1)
    classes = 8 if getattr(method, "solver", "ddim") == "heun" else 0
    student = load_denoiser("denoiser:8", shape=(2,), classes=classes).double()
    teacher = load_denoiser("exact", shape=(2,), classes=classes, centres=ring_centres(), deviation=DEVIATION).double()
    teacher.sampler = Sampler(guidance=2.0 if classes else None)
    values = {
        "max_steps": 2,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "save_strategy": "no",
        "learning_rate": learning_rate,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    examples = NoiseSet(12, "train", classes)
    if isinstance(method, Denoise):
        examples = ExampleSet(torch.randn(12, 2).double(), torch.full((12,), -1))
    splits = {"train": examples, "validation": Raises(), "test": Raises()}
    context = SetupContext(student, teacher, splits, collate_noise, classes, tmp_path / "store", "key")
    tables = method.setup(context)
    student = method.student(student, context)
    train_module = TrainModule(student, method, Shapes(classes), 2, tables=tables).double()
    args = training_arguments(values, tmp_path, 0)
    return DistillationTrainer(
        train_module, args, examples, collate_noise, teacher=LocalTeacher(teacher, "exact"), validation=Raises()
    )


METHODS = [
    BOOT(weight="uniform"),
    BOOT(weight="inv_coef", solver="heun", beta=0.5),
    BOOT(target="boundary", ema=0),
    BOOT(target="regression", steps=3, ema=0.5),
    Denoise(ema=0.5),
]
NAMES = ["bootstrap", "heun-guided", "boundary", "regression", "denoise"]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_any_split_of_a_batch_gives_the_same_update(method, tmp_path):
    ends_alike(partial(trainer_for, method, tmp_path, learning_rate=0.01))  # no example of any data is there to be read


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_gradients_reach_the_student_alone(method, tmp_path):
    trainer = trainer_for(method, tmp_path)
    seen = {}
    trainer.optimizer = torch.optim.SGD(trainer.model.student.parameters(), lr=0.0)
    step = trainer.optimizer.step

    def record(*args, **kwargs):
        seen.update(
            {n: p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in trainer.model.named_parameters()}
        )
        return step(*args, **kwargs)

    trainer.optimizer.step = record
    trainer.train()
    assert seen and all(v == n.startswith("student.") for n, v in seen.items()), seen
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher.model.parameters())


def test_only_the_second_value_of_the_student_has_a_gradient(tmp_path):
    """With beta=0 the loss's gradient is that of g(ε, s) against a constant."""
    method = BOOT(beta=0.0, ema=0)
    trainer = trainer_for(method, tmp_path)
    state, student = trainer.model.train_state, trainer.model.student
    batch = method.transform_batch(Batch.from_dict(collate_noise([trainer.train_dataset[i] for i in range(12)])), state)
    trainer.model(batch, None).losses["bootstrap"].backward()
    whole = torch.cat([p.grad.flatten() for p in student.parameters()])
    target, weight = method._target(batch, state)
    student.zero_grad()
    (weight * (student(batch).signal.values - target).square().mean(1)).sum().backward()
    torch.testing.assert_close(whole, torch.cat([p.grad.flatten() for p in student.parameters()]))


def test_the_average_is_what_is_saved(tmp_path):
    trainer = trainer_for(BOOT(weight="uniform", ema=0.9), tmp_path, learning_rate=0.01)
    start = [p.detach().clone() for p in trainer.model.student.parameters()]
    trainer.train()
    average = trainer.model.companions["average"].parameters()
    for old, mean, now in zip(start, average, trainer.model.student.parameters(), strict=True):
        assert torch.equal(mean, now) and not torch.equal(old, now)


@pytest.mark.parametrize("method", ["boot", "denoise"])
@pytest.mark.parametrize(
    "ends", [{"patience": 1}, {"trainer": {"load_best_model_at_end": True}}], ids=["early", "best"]
)
def test_the_average_is_what_is_judged_and_saved_however_training_ends(method, ends, tmp_path, monkeypatch):
    """Also where it ends early, or the weights of the best evaluation are kept: here each is worse than the one before."""
    seen, validation = [], fitting._validation

    def worse(*args):
        seen.append(validation(*args)["distance"])
        return {"distance": 1e3 * len(seen)}

    monkeypatch.setattr(fitting, "_validation", worse)
    steps = {"eval_strategy": "steps", "eval_steps": 5, "max_steps": 15, "learning_rate": 0.1}
    data = {"samples": 64, "compare_steps": [1], "teacher_steps": 2}
    ends = {**ends, "trainer": {**steps, **ends.get("trainer", {})}}
    m = ring(tmp_path, method=method, data=data, options={"ema": 0.99}, eval_split="validation", **ends).metrics
    kept, step = (1, 10) if "patience" in ends else (0, 5)
    state = load_weights(tmp_path / "checkpoints" / f"checkpoint-{step}")
    for name, value in weights(tmp_path).items():
        average, student = (state[f"{part}.model.{name}"] for part in ("companions.average", "student"))
        assert torch.equal(value, average) and not torch.equal(value, student)
    assert len(seen) == (2 if "patience" in ends else 3) and seen[kept] == pytest.approx(m["distance"])


def test_it_learns_to_draw_in_one_call_from_noise_alone(tmp_path):
    data = {"size": 6400, "samples": 1000}
    steps = {"max_steps": 500, "per_device_train_batch_size": 128, "learning_rate": 3e-3, "save_strategy": "no"}
    result = ring(tmp_path, data=data, student="denoiser:64,64", trainer={**steps, "lr_scheduler_type": "cosine"})
    m = result.metrics
    assert m["nfe"] == 1 and m["coverage"] == 1
    assert m["distance"] < m["teacher_1_distance"] / 4 and m["rmse"] < 0.5, m
    assert m["teacher_20_distance"] < m["teacher_4_distance"] < m["teacher_1_distance"]
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    forwards = evaluation["cost"]["forwards"]
    assert forwards == {"student": 3 * 500 * 128, "teacher": 2 * 500 * 128}
    assert len(evaluation["pictures"]) == 5 and "base64" in (tmp_path / "report.html").read_text()
    from understudy.runs.check import evaluate_run

    assert evaluate_run(tmp_path)["metrics"] == pytest.approx(m)


def test_the_boundary_alone_draws_as_one_step_of_the_teacher(tmp_path):
    steps = {"max_steps": 400, "learning_rate": 3e-3, "per_device_train_batch_size": 64, "save_strategy": "no"}
    m = ring(tmp_path, options={"target": "boundary"}, student="denoiser:32", trainer=steps).metrics
    assert m["distance"] == pytest.approx(m["teacher_1_distance"], rel=0.1)


def test_from_nothing_but_noise_to_no_noise_at_all(tmp_path):
    """λ is infinite at both ends, and nothing else is; an ε says nothing of x_0 where α = 0."""
    options = {"t_min": 0.0, "t_max": 1.0, "solver": "heun", "weight": "inv_coef", "refine": 2}
    words = {"task": "image_generation", "method": "boot", "output": tmp_path, "student": "denoiser:8"}
    words |= {"data": json.dumps(RING["data"]), "options": json.dumps(options), "trainer.max_steps": 5}
    with pytest.raises(SystemExit) as stop:
        main(["train", *(f"{k}={v}" for k, v in words.items())])
    assert stop.value.code in (0, None)
    m = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert all(math.isfinite(v) for v in m.values()) and m["refined_nfe"] == 3
    trainer = trainer_for(BOOT(t_max=1.0), tmp_path / "eps")
    trainer.teacher.model.prediction = "epsilon"
    with pytest.raises(InputError, match="lower options"):
        trainer.train()


def test_classes_guidance_and_refinement(tmp_path):
    m = ring(
        tmp_path,
        data={"conditional": True, "guidance": 1.5},
        options={"refine": 2, "refine_from": 0.4, "solver": "heun"},
    ).metrics
    assert (
        m["refined_nfe"] == 5
        and m["teacher_nfe"] == 40
        and m["refined_rmse"] < m["rmse"]
        and m["refined_distance"] < m["distance"]
    )


TINY = {
    "task": "image_generation",
    "method": "boot",
    "data": {"size": 64, "samples": 40, "compare_steps": [1], "teacher_steps": 2},
    "teacher": {"model": "unet:8,8", "train": {"max_steps": 3, "per_device_train_batch_size": 16}},
    "trainer": {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no"},
}


@pytest.mark.slow
def test_images_a_copied_student_and_a_teacher_without_any_data(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    result = distill({**TINY, "output": str(tmp_path / "a")})
    assert {"distance", "coverage", "teacher_distance"} <= result.metrics.keys()
    assert (tmp_path / "a" / "store").is_dir()  # the feature network
    teacher = tmp_path / "a" / "teacher" / "student"
    pipeline = diffusers.DDPMPipeline(
        diffusers.UNet2DModel.from_pretrained(teacher), diffusers.DDPMScheduler.from_pretrained(teacher)
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    found = {}
    for name in (teacher, tmp_path / "pipeline"):
        rows = load_denoiser(name, sampler=Sampler(steps=2))
        assert rows.shape == (1, 8, 8) and rows.prediction == "v_prediction"
        found[str(name)] = {k: v for k, v in rows.state_dict().items()}
    a, b = found.values()
    assert all(torch.equal(a[k], b[k]) for k in a)
    free = distill(
        {**TINY, "data": {**TINY["data"], "name": "noise"}, "teacher": str(teacher), "output": str(tmp_path / "b")}
    )
    assert free.metrics.keys() >= {"distance", "rmse"} and "coverage" not in free.metrics


def test_a_saved_denoiser_draws_as_before_and_a_damaged_one_is_refused(tmp_path):
    rows = load_denoiser("denoiser:8", shape=(2,), classes=3).one_call(0.02, 0.99)
    rows.save(tmp_path)
    again = load_denoiser(tmp_path)
    assert again.sampler == rows.sampler and again.read_at == 0.99 and again.calls == 1 and again.classes == 3
    (tmp_path / "sampler.json").write_text('{"steps": 1}')
    with pytest.raises(InputError, match="damaged"):
        load_denoiser(tmp_path)


def test_a_denoiser_learns_the_ring_itself(tmp_path):
    steps = {"max_steps": 400, "learning_rate": 3e-3, "per_device_train_batch_size": 128, "save_strategy": "no"}
    m = ring(tmp_path, method="denoise", options={"ema": 0.99}, student="denoiser:64,64", trainer=steps).metrics
    assert m["nfe"] == 20 and m["distance"] < 0.05  # an untrained one is beyond 1


def test_distances_of_sets():
    torch.manual_seed(0)
    x, y = torch.randn(3000, 2), torch.randn(3000, 2)
    assert abs(energy_distance(x, y)) < 5e-3 and frechet_distance(x, y) < 5e-3
    assert frechet_distance(x, x + 2) == pytest.approx(8, rel=1e-6)
    assert frechet_distance(x, 2 * x) == pytest.approx(2, rel=0.1) and energy_distance(x, x + 2) > 1
    shares = torch.tensor([0.5, 0.5, 0.0])
    assert coverage(torch.tensor([0, 0, 0, -1]), shares) == 0.5 and coverage(torch.tensor([0, 1]), shares) == 1
    with pytest.raises(InputError, match="not finite"):
        energy_distance(x * float("nan"), y)


@pytest.mark.parametrize(
    "keys,says",
    [
        ({"options": {"delta": 0.0}}, "delta"),
        ({"options": {"t_min": 0.98}}, "must not exceed t_max"),
        ({"options": {"target": "bootstrop"}}, "target"),
        ({"student": "exact"}, "nothing to train"),
        ({"student": "unet:8"}, "square images"),
        ({"student": "mlp:8"}, "cannot be loaded"),
        ({"data": {"compare_steps": [0]}}, "compare_steps"),
        ({"data": {"sizes": 3}}, "Did you mean 'size'"),
        ({"data": {"prediction": "eps"}}, "Unknown prediction type 'eps'"),
        *(({"data": {"conditional": True, "guidance": g}}, "data.guidance is") for g in (-1, True, math.nan, math.inf)),
        ({"teacher": {"model": "exact", "cache": "kept"}}, "without teacher.cache"),
        ({"data": {"name": "noise"}}, "without data"),
        ({"data": {"name": "noise"}, "method": "denoise", "teacher": None}, "learns from examples"),
        ({"method": "kd"}, "noise task"),
        ({"method": "denoise", "student": "teacher"}, "copy of the teacher"),
    ],
)
def test_bad_input(keys, says, tmp_path):
    with pytest.raises(InputError, match=says):
        ring(tmp_path, **keys)


def test_a_network_read_as_what_it_is_not_is_refused(tmp_path):
    rows = load_denoiser("denoiser:8", shape=(2,))
    batch = Batch.from_dict(collate_noise([(0, -1), (1, -1)]))
    with pytest.raises(InputError, match="takes examples of shape"):
        rows(batch.at(torch.randn(2, 3), 0.5))
    rows.model = torch.nn.Sequential(*[torch.nn.Linear(2, 3)])
    rows.model.forward = lambda x, t, c: torch.zeros(2, 3)
    with pytest.raises(InputError, match="gives back its input's shape"):
        rows(batch.at(torch.randn(2, 2), 0.5))
    rows.model.forward = lambda x, t, c: torch.cat([x, x], 1)  # a learned variance
    assert rows(batch.at(torch.ones(2, 2), 0.5)).signal.values.eq(1).all()
    trainer = trainer_for(BOOT(), tmp_path)
    with torch.no_grad():
        trainer.model.student.model.body[0].weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite for t from"):
        trainer.train()
