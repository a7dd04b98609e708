"""Distillation-DPO on the engine: who is trained, any split alike, resume to the bit, its options, and that it learns."""

import copy
import json
from functools import partial

import pytest
import torch

from engine_cases import killed_run, weights
from split_cases import ends_alike, flat
from understudy import InputError, distill
from understudy.cli import main
from understudy.data import Batch, NoiseSet
from understudy.data.noise_sets import Reference, collate_noise
from understudy.methods.distillation_dpo import DistillationDPO
from understudy.models.denoisers import load_denoiser
from understudy.synthetic.ring8 import DEVIATION, ring_centres, ring_examples
from understudy.teachers import LocalTeacher
from understudy.training import DistillationTrainer, SetupContext, TrainModule
from understudy.training.arguments import training_arguments
from understudy.training.divergence import DivergenceGuard
from understudy.training.shapes import Shapes

RING = {
    "task": "image_generation",
    "method": "distillation-dpo",
    "data": {"name": "ring8", "size": 256, "samples": 200, "compare_steps": [1, 4], "teacher_steps": 8},
    "teacher": {"model": "denoiser:16,16", "train": {"max_steps": 20, "per_device_train_batch_size": 32}},
    "student": "teacher",
    "trainer": {"max_steps": 12, "per_device_train_batch_size": 16, "save_steps": 3, "logging_steps": 1},
}


def trainer_for(method, tmp_path, micro=12, accumulate=1, exact=False, **more):
    torch.manual_seed(1)
    teacher = load_denoiser("exact" if exact else "denoiser:8", shape=(2,), centres=ring_centres(), deviation=DEVIATION)
    teacher = teacher.double()
    student = load_denoiser("denoiser:8", shape=(2,)).double() if exact else copy.deepcopy(teacher)
    values = {
        "max_steps": 2,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "save_strategy": "no",
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        **more,
    }
    reference = Reference(lambda: ring_examples("train"), None, None, "key", (), 1)
    examples = NoiseSet(12, "train", 0, reference)
    context = SetupContext(student, teacher, {"train": examples}, collate_noise, 0, tmp_path / "store", "key")
    tables = method.setup(context)
    student = method.student(student, context)
    shapes = Shapes(0, student=student, teacher=teacher)
    module = TrainModule(student, method, shapes, 2, tables=tables).double()
    args = training_arguments(values, tmp_path, 0)
    return DistillationTrainer(module, args, examples, collate_noise, teacher=LocalTeacher(teacher, "teacher"))


OPTIONS = {"assistant_optimizer": "sgd", "assistant_rate": 0.1}
METHODS = {
    "paper": DistillationDPO(lambda_l=1.0, **OPTIONS),
    "steps-fresh-clip": DistillationDPO(steps=3, gamma=None, clip=0.05, **OPTIONS),
    "winners": DistillationDPO(lambda_l=0.0, **OPTIONS),
}


@pytest.mark.parametrize("name", METHODS)
def test_any_split_of_a_batch_gives_the_same_update(name, tmp_path):
    ends_alike(partial(trainer_for, METHODS[name], tmp_path), atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_their_own_networks(name, tmp_path):
    """Limit 5: the student's loss moves the student alone, and the assistants' loss the assistants alone."""
    trainer = trainer_for(METHODS[name], tmp_path)
    module, teacher = trainer.model, flat(trainer.teacher.model)
    parts = {"student": module.student, **module.own}
    assert set(parts) == {"student", *METHODS[name]._sides}
    for moved in ({"student"}, set(module.own)):
        trainer = trainer_for(METHODS[name], tmp_path, max_steps=1)
        module = trainer.model
        schedule = ("student",) if moved == {"student"} else ("assistants",)
        object.__setattr__(module.method, "update_schedule", lambda state, s=schedule: s)
        object.__setattr__(module.method, "on_pre_optimizer_step", lambda state, means: None)
        with torch.no_grad():
            for part in module.own.values():  # at the start they are the teacher, and there is nothing to follow
                next(part.parameters()).mul_(1.5)
        parts = {"student": module.student, **module.own}
        before = {n: flat(p) for n, p in parts.items()}
        trainer.train()
        assert {n for n, p in parts.items() if not torch.equal(before[n], flat(p))} == moved
        for hook in ("update_schedule", "on_pre_optimizer_step"):
            object.__delattr__(module.method, hook)
        assert torch.equal(flat(trainer.teacher.model), teacher)


def gradient(method, tmp_path, change=lambda module: None):
    """The student's gradient of one batch, with assistants that are not the teacher."""
    trainer = trainer_for(method, tmp_path)
    module = trainer.model
    with torch.no_grad():
        for i, part in enumerate(module.own.values()):
            next(part.parameters()).mul_(1.5 + i)
    change(module)
    batch = Batch.from_dict(collate_noise([trainer.train_dataset[i] for i in range(12)]))
    sums = module(method.transform_batch(batch, module.train_state), None)
    sum(sums.losses.values()).backward()
    return torch.cat([p.grad.flatten() for p in module.student.parameters()]), sums


def test_assistants_like_the_teacher_give_no_gradient(tmp_path):
    """Limit 1."""

    def same(module):
        for part in module.own.values():
            part.load_state_dict(module.train_state.teacher.model.state_dict())

    found, _ = gradient(METHODS["paper"], tmp_path, same)
    assert found.eq(0).all()
    assert gradient(METHODS["paper"], tmp_path)[0].ne(0).any()


def test_without_losers_it_is_score_distillation_of_the_winners(tmp_path):
    """Limit 2."""
    winners, sums = gradient(METHODS["winners"], tmp_path)
    assert set(sums.losses) == {"winner", "metric/winner", "metric/loser"}
    whole, both = gradient(METHODS["paper"], tmp_path)
    torch.testing.assert_close(sums.values["winner"], both.values["winner"])
    assert not torch.allclose(winners, whole)
    ten = gradient(DistillationDPO(lambda_l=10.0, **OPTIONS), tmp_path)[0]
    torch.testing.assert_close((ten - winners) / 10, whole - winners)


def test_the_released_gradient_is_zero(tmp_path):
    """Limit 7."""
    found, sums = gradient(DistillationDPO(surrogate="released", **OPTIONS), tmp_path)
    assert found.eq(0).all() and float(sums.values["winner"]) != 0


def test_winners_have_the_lower_metric_and_ties_count_for_nothing(tmp_path):
    class Signed(DistillationDPO):
        """Ranks by the first coordinate."""

        name = "signed"

        def costs(self, samples, batch, state):
            return samples[:, 0]

    class Equal(DistillationDPO):
        """Finds all samples alike."""

        name = "equal"

        def costs(self, samples, batch, state):
            return torch.zeros(len(samples))

    found, sums = gradient(Signed(gamma=None, **OPTIONS), tmp_path)
    assert float(sums.values["metric/winner"]) < float(sums.values["metric/loser"]) and found.ne(0).any()
    assert gradient(Equal(**OPTIONS), tmp_path)[0].eq(0).all()
    with pytest.raises(InputError, match="first candidate of row 0 is nan"):
        gradient(type("Broken", (Signed,), {"costs": lambda *a: torch.full((12,), torch.nan)})(**OPTIONS), tmp_path)


def test_assistants_of_a_closed_form_begin_as_the_student(tmp_path):
    module = trainer_for(METHODS["paper"], tmp_path, exact=True).model
    for part in module.own.values():
        assert torch.equal(flat(part), flat(module.student))
    taught = trainer_for(METHODS["paper"], tmp_path)
    for part in taught.model.own.values():
        assert torch.equal(flat(part), flat(taught.teacher.model)) and part.clip is None


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    recipe = {**RING, "options": {"steps": 2}}
    distill({**recipe, "output": str(tmp_path / "whole")})
    cut = {**recipe, "output": str(tmp_path / "cut")}
    for step, moment in ((2, "after"), (5, "before"), (9, "saving")):
        assert killed_run(cut, step, moment)
    distill(cut)
    a, b = (weights(tmp_path / f) for f in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [(tmp_path / f / "metrics.jsonl").read_text().splitlines() for f in ("whole", "cut")]
    assert [json.loads(x)["terms"] for x in lines[0]] == [json.loads(x)["terms"] for x in lines[1]]


def test_it_learns_to_draw_in_one_call(tmp_path):
    """The card's calibration, (i), on a ring: one call of the student beats one and two steps of its teacher."""
    taught = {"max_steps": 500, "learning_rate": 3e-3, "per_device_train_batch_size": 128}
    teacher = {"model": "denoiser:64,64", "train": taught}
    data = {"name": "ring8", "size": 6400, "samples": 500, "compare_steps": [1, 2], "teacher_steps": 8}
    words = {"task": "image_generation", "method": "distillation-dpo", "output": str(tmp_path), "student": "teacher"}
    words |= {"teacher": json.dumps(teacher), "data": json.dumps(data), "options.assistant_rate": 1e-3}
    words |= {f"trainer.{k}": v for k, v in {"max_steps": 150, "learning_rate": 2e-4, "save_strategy": "no"}.items()}
    words |= {"trainer.per_device_train_batch_size": 64, "trainer.lr_scheduler_type": "constant"}
    with pytest.raises(SystemExit) as stop:
        main(["train", *(f"{k}={v}" for k, v in words.items())])
    assert stop.value.code in (0, None)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    m = evaluation["metrics"]
    assert m["nfe"] == 1 and m["distance"] < m["teacher_2_distance"] < m["teacher_1_distance"], m
    assert evaluation["cost"]["forwards"] == {"student": 4 * 150 * 64, "teacher": 2 * 150 * 64}
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["terms"]["metric/winner"] < last["terms"]["metric/loser"] and "mean cost" in last["state"]


@pytest.mark.slow
def test_images_of_a_diffusers_network(tmp_path):
    pytest.importorskip("diffusers")
    recipe = {
        **RING,
        "data": {"name": "digits", "size": 32, "samples": 40, "compare_steps": [1], "teacher_steps": 2},
        "teacher": {"model": "unet:8,8", "train": {"max_steps": 3, "per_device_train_batch_size": 16}},
        "options": {"steps": 2},
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no"},
    }
    result = distill({**recipe, "output": str(tmp_path)})
    assert result.metrics["nfe"] == 2 and {"distance", "rmse", "teacher_1_distance"} <= result.metrics.keys()
    again = load_denoiser(tmp_path / "student")
    assert again.sampler.steps == 2 and type(again.model).__name__ == "UNet2DModel"


def test_the_guard_ends_a_run_that_the_losers_drive_off(tmp_path):
    """The card's calibration, (ii)."""
    options = {"lambda_l": 5.0, "assistant_rate": 1e-3}
    trainer = {"max_steps": 400, "learning_rate": 5e-3, "save_strategy": "no", "lr_scheduler_type": "constant"}
    with pytest.raises(
        InputError, match=r"the mean cost of its better samples rose .* Lower options.lambda_l \(now 5\)"
    ):
        distill({**RING, "options": options, "trainer": {**RING["trainer"], **trainer}, "output": str(tmp_path)})


def test_the_guard_remembers():
    guard = DivergenceGuard(2.0, "Stop.", decay=0.5)
    for cost in (1.0, 0.5, 0.6):
        guard.update(cost)
    again = DivergenceGuard(2.0, "Stop.", decay=0.5)
    again.load_state_dict(guard.state_dict())
    assert again.logs() == guard.logs() and guard.logs()["lowest cost"] == pytest.approx(0.675)
    with pytest.raises(InputError, match=r"from 0.675 to 1.\d+\. Stop\."):
        again.update(2.4)
    below = DivergenceGuard(2.0, "Stop.", decay=0.0)
    for cost in (-4.0, -0.5):
        below.update(cost)
    with pytest.raises(InputError, match="Stop"):
        below.update(0.5)


@pytest.mark.parametrize(
    "keys,says",
    [
        ({"options": {"metric": "chamfer"}}, "metric is 'chamfer', and samples of these data are ranked by nearest"),
        ({"options": {"lambda_l": -1}}, "lambda_l"),
        ({"options": {"t_min": 0.995}}, "samples begin at 0.99"),
        ({"teacher": "exact", "student": "exact"}, "nothing to train"),
        ({"task": "image_classification", "data": "digits", "teacher": "mlp:8", "student": "mlp:8"}, "noise"),
    ],
)
def test_bad_input(keys, says, tmp_path):
    with pytest.raises(InputError, match=says):
        distill({**RING, **keys, "output": str(tmp_path)})
