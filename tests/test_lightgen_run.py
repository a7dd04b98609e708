"""LightGen on the engine: the network, its samples, resume to the bit, any split alike, who is trained, bad input."""

import copy
import json
import math
from functools import partial

import pytest
import torch

from engine_cases import killed_run, weights
from golden_vectors import close
from split_cases import ends_alike
from understudy import InputError, distill
from understudy.data import Batch, NoiseBatch, NoiseSet
from understudy.data.noise_sets import Reference, collate_noise
from understudy.evaluation.generation import draw
from understudy.methods.lightgen import MASKED, PREFERENCE, LightGen
from understudy.models.denoisers import load_denoiser
from understudy.models.diffusion import Sampler
from understudy.training import DistillationTrainer, SetupContext, TrainModule
from understudy.training.arguments import training_arguments
from understudy.training.shapes import Shapes

SHAPE, CLASSES = (1, 4, 4), 3


def generator(seed=0, classes=CLASSES, answers=True):
    """A small generator in float64; `answers`: as after some training, since a new one answers 0."""
    torch.manual_seed(seed)
    rows = load_denoiser("mar:8,1,2", shape=SHAPE, classes=classes).double()
    if answers:
        for parameter in rows.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return rows


def batch_of(number, classes=CLASSES):
    ids = torch.arange(number)
    condition = ids % classes if classes else ids * 0 - 1
    return NoiseBatch({}, condition, ids, condition=condition)


# -- the network and its samples ------------------------------------------------------------------------------------------


def test_masked_patches_are_not_read_and_known_ones_are():
    """Limit 5: with all patches masked, a place is told only where it is and the condition."""
    net = generator().model
    images = torch.randn(2, 3, *SHAPE, dtype=torch.float64)
    a, b = (net.cut(v) for v in images)
    assert torch.equal(net.join(a), images[0])
    condition, every = torch.tensor([0, 1, 2]), torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(net(a, every, condition), net(b, every, condition))
    assert not torch.equal(net(a, every, condition), net(a, every, condition.roll(1)))
    some = torch.tensor([[True, True, False, True]]).expand(3, 4)
    mixed = torch.where(some[..., None], b, a)
    assert torch.equal(net(a, some, condition), net(mixed, some, condition))
    assert not torch.allclose(net(a, some, condition), net(b, some, condition))


@pytest.mark.parametrize("steps", [1, 3, 4, 99])
def test_samples_depend_on_their_id_and_class_alone(steps):
    rows, eps = generator(), torch.randn(6, *SHAPE, dtype=torch.float64)
    batch = batch_of(6)
    whole = rows.draw(batch, eps, steps)
    parts = [rows.draw(batch.take(i), eps[i], steps) for i in torch.arange(6).split(4)]
    close(torch.cat(parts), whole)
    assert whole.shape == (6, *SHAPE) and float(whole.abs().max()) <= 1
    assert rows.calls_for(steps) == min(steps, 4)


def test_guidance_of_one_is_the_conditional_model():
    """Limit 8."""
    rows, eps, batch = generator(), torch.randn(5, *SHAPE, dtype=torch.float64), batch_of(5)
    plain = rows.draw(batch, eps)
    for weight, same in ((1.0, True), (3.0, False)):
        rows.sampler = Sampler(steps=4, guidance=weight)
        assert torch.allclose(rows.draw(batch, eps), plain) is same
        assert rows.calls == 8


def test_a_saved_generator_draws_the_same(tmp_path):
    rows, eps = generator().float(), torch.randn(5, *SHAPE)
    rows.sampler = Sampler(steps=3, guidance=2.0)
    rows.save(tmp_path)
    again = load_denoiser(tmp_path)
    assert again.sampler == rows.sampler and again.classes == CLASSES
    assert torch.equal(again.draw(batch_of(5), eps), rows.draw(batch_of(5), eps))


@pytest.mark.parametrize(
    "name,shape,says",
    [
        ("mar:8,1,3", SHAPE, "must be square with a side that the patch divides"),
        ("mar:8,1,2", (1, 4, 6), "must be square"),
        ("mar:8,1,2", (2,), "must be square"),
        ("mar:6,1,2", SHAPE, "multiple of 4"),
        ("mar:8,0,2", SHAPE, "a layer is needed"),
        ("mar:8,1", SHAPE, "mar:WIDTH,LAYERS,PATCH"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(name, shape, says):
    with pytest.raises(InputError, match=says):
        load_denoiser(name, shape=shape)


def test_an_unknown_class_is_refused():
    with pytest.raises(InputError, match="Class 4 was asked of a generator that has 3"):
        generator().draw(batch_of(5, 5), torch.randn(5, *SHAPE, dtype=torch.float64))


# -- on the engine ----------------------------------------------------------------------------------------------------


def real_images():
    torch.manual_seed(7)
    return torch.rand(9, *SHAPE, dtype=torch.float64) * 2 - 1, torch.arange(9) % CLASSES


def context_for(student, tmp_path, real=real_images):
    torch.manual_seed(3)
    teacher = load_denoiser("denoiser:8", shape=SHAPE, classes=CLASSES).double()
    test = NoiseSet(4, "test", CLASSES, Reference(real, real, None, "real", (1,), 2))
    splits = {"train": NoiseSet(24, "train", CLASSES), "test": test}
    return SetupContext(student, teacher, splits, collate_noise, CLASSES, tmp_path / "store", "key")


def trainer_for(method, phase, tmp_path, micro=9, accumulate=1, context=None):
    student = generator()
    context = context or context_for(student, tmp_path)
    tables = method.setup(context)
    module = TrainModule(student, method, Shapes(CLASSES), 2, tables=tables, context=context).double()
    chosen = next(p for p in method.phases() if p.name == phase)
    module.begin_phase(chosen, 2, {id(p) for p in student.parameters()})
    values = {
        "max_steps": 2,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "save_strategy": "no",
        "learning_rate": 0.01,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    return DistillationTrainer(
        module, training_arguments(values, tmp_path, 0), context.splits[chosen.split], collate_noise
    )


def method_of(**options):
    used = {"none": {}, "sft": {"pairs": 9}}.get(options.get("refine", "dpo"), {"pairs": 9, "beta": 50.0})
    return LightGen(**{"samples": 9, "ema": 0.5, **used, **options})


CASES = [(method_of(), MASKED), (method_of(), PREFERENCE), (method_of(refine="sft", ema=0), PREFERENCE)]
CASES.append((method_of(refine="none"), PREFERENCE))


@pytest.mark.parametrize("method,phase", CASES, ids=["masked", "dpo", "sft", "none"])
def test_any_split_of_a_batch_gives_the_same_update(method, phase, tmp_path):
    ends_alike(partial(trainer_for, method, phase, tmp_path), ((9, 1), (3, 3), (1, 9)), 1e-8)


def test_the_pair_is_a_real_image_and_an_own_sample_of_its_class(tmp_path):
    trainer = trainer_for(method_of(pairs=7), PREFERENCE, tmp_path)
    pairs, student = trainer.train_dataset, trainer.model.student
    images, classes = real_images()
    found = [next(i for i in range(9) if torch.equal(images[i], v)) for v in pairs.clean]
    assert len(set(found)) == 7 and torch.equal(classes[found], pairs.condition)
    loader = torch.utils.data.DataLoader(pairs, 7, collate_fn=collate_noise)
    assert not torch.equal(draw(student, loader), pairs.rejected)  # other noise than evaluations draw from
    assert float(pairs.rejected.abs().max()) <= 1


def test_at_the_first_step_the_loss_is_that_of_a_coin_and_only_the_student_gets_a_gradient(tmp_path):
    trainer = trainer_for(method_of(), PREFERENCE, tmp_path)
    module, method = trainer.model, trainer.model.method
    batch = Batch.from_dict(collate_noise([trainer.train_dataset[i] for i in range(9)]))
    sums = module(method.transform_batch(batch, module.train_state), None)
    assert math.isclose(float(sums.values["dpo"]), 9 * math.log(2), rel_tol=1e-9)
    assert float(sums.values["rewards/accuracies"]) == 0
    sums.losses["dpo"].backward()
    assert any(bool(p.grad.abs().sum() > 0) for p in module.student.parameters() if p.grad is not None)
    assert all(p.grad is None and not p.requires_grad for p in module.companions.parameters())
    own = {p.data_ptr() for p in module.student.parameters()}
    assert not own & {p.data_ptr() for p in module.companions.parameters()}


def test_both_sides_of_a_pair_have_one_mask_time_and_noise(tmp_path):
    """A pair of equal images has equal errors, so its margin is 0 whatever the student is."""
    trainer = trainer_for(method_of(), PREFERENCE, tmp_path)
    module, data = trainer.model, trainer.train_dataset
    data.rejected = data.clean.clone()
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.add_(0.1)
    batch = Batch.from_dict(collate_noise([data[i] for i in range(9)]))
    values = module(module.method.transform_batch(batch, module.train_state), None).values
    assert values["error/chosen"] == values["error/rejected"]
    assert math.isclose(float(values["dpo"]), 9 * math.log(2), rel_tol=1e-9)


def test_masks_are_drawn_anew_for_each_step_and_of_one_size_in_an_update(tmp_path):
    trainer = trainer_for(method_of(least=0.3), MASKED, tmp_path)
    state, method = trainer.model.train_state, trainer.model.method
    batch = Batch.from_dict(collate_noise([trainer.train_dataset[i] for i in range(9)]))
    seen = []
    for state.step in range(12):
        mask = method.transform_batch(batch, state).inputs["mask"]
        assert mask.sum(1).unique().numel() == 1 and int(mask.sum(1)[0]) >= 2
        seen.append(mask)
    assert len({int(mask.sum()) for mask in seen}) > 1
    assert not all(torch.equal(seen[0], mask) for mask in seen[1:])


def test_equal_pairs_are_left_out_with_a_count(tmp_path, caplog, monkeypatch):
    def own(student, loader, offset=0):
        drawn = -torch.stack([loader.dataset[i][2] for i in range(9)])
        drawn[:2] *= -1
        return drawn

    student = generator()
    context = context_for(student, tmp_path)
    method_of().setup(context)  # the teacher's images are stored
    monkeypatch.setattr("understudy.methods.lightgen.draw", own)
    trainer = trainer_for(method_of(), PREFERENCE, tmp_path, context=context)
    assert len(trainer.train_dataset) == 7 and "2 pairs of equal images" in caplog.text


def test_fewer_real_images_than_pairs_are_said(tmp_path, caplog):
    context = context_for(generator(), tmp_path)
    method_of(pairs=10).setup(context)
    assert len(context.splits["pairs"]) == 9 and "options.pairs is 10 and there are 9 real images" in caplog.text
    caplog.clear()
    method_of(pairs=9).setup(context)
    assert not caplog.text


def test_what_the_method_cannot_use_is_one_line(tmp_path):
    student = generator()
    context = context_for(student, tmp_path)
    with pytest.raises(InputError, match=r"options\.samples is 99 and data\.size 24"):
        method_of(samples=99).setup(context)
    context.splits["test"].reference.training = None
    with pytest.raises(InputError, match="needs real images to prefer"):
        method_of().setup(context)
    method_of(preference=0).setup(context)
    method_of(refine="none").setup(context)
    assert "pairs" not in context.splits
    other = context_for(load_denoiser("denoiser:8", shape=SHAPE), tmp_path)
    with pytest.raises(InputError, match="student=mar:WIDTH,LAYERS,PATCH"):
        method_of().setup(other)
    broken = context_for(student, tmp_path / "broken")
    with torch.no_grad():
        next(broken.teacher_model.parameters()).fill_(math.nan)
    with pytest.raises(InputError, match="Sample 0 of the teacher is not finite"):
        method_of().setup(broken)


def test_the_average_ends_a_phase(tmp_path):
    trainer = trainer_for(method_of(), MASKED, tmp_path)
    trainer.train()
    module = trainer.model
    average = copy.deepcopy(module.companions["average"].state_dict())
    assert all(torch.equal(v, average[k]) for k, v in module.student.state_dict().items())


def test_it_learns_two_images(tmp_path):
    """After some hundred steps on images that are black or white by class, samples are as the class says."""
    student = load_denoiser("mar:16,1,2", shape=SHAPE, classes=2)
    torch.manual_seed(0)
    method = method_of(draws=8, drop_condition=0.0, ema=0)
    clean = torch.tensor([-0.8, 0.8]).repeat(8)[:, None, None, None].expand(16, *SHAPE).contiguous()
    values = {"clean": clean, "ids": torch.arange(16), "labels": torch.arange(16) % 2}
    batch = Batch.from_dict({**values, "condition": values["labels"]})
    module = TrainModule(student, method, Shapes(2), 2)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    module.train_state.phase = MASKED
    for module.train_state.step in range(150):
        optimizer.zero_grad()
        losses = module(method.transform_batch(batch, module.train_state), None).losses
        (sum(losses.values()) / 16).backward()
        optimizer.step()
    eps = torch.randn(16, *SHAPE)
    samples = student.draw(batch_of(16, 2), eps)
    assert float((samples - clean).abs().mean()) < 0.25


RUN = {
    "task": "image_generation",
    "method": "lightgen",
    "data": {
        "name": "digits",
        "size": 64,
        "conditional": True,
        "samples": 32,
        "compare_steps": [2],
        "teacher_steps": 3,
    },
    "teacher": {"model": "unet:8,8", "train": {"max_steps": 3, "per_device_train_batch_size": 16}},
    "student": "mar:8,1,4",
    "options": {"samples": 32, "pairs": 16, "preference": 0.5, "ema": 0.9},
    "trainer": {"max_steps": 12, "per_device_train_batch_size": 8, "save_steps": 2, "logging_steps": 1},
}


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    whole = distill({**RUN, "output": str(tmp_path / "whole")})
    assert {"distance", "nfe", "detail", "class_accuracy"} <= whole.metrics.keys()
    cut = {**RUN, "output": str(tmp_path / "cut")}
    # The second phase counts its own steps, from 0: 1 and 3 of it come after the phase before it has ended.
    for step, moment in ((5, "after"), (3, "before"), (4, "saving")):
        assert killed_run(cut, step, moment)
    distill(cut)
    a, b = (weights(tmp_path / f) for f in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [(tmp_path / f / "metrics.jsonl").read_text().splitlines() for f in ("whole", "cut")]
    assert [json.loads(x)["loss"] for x in lines[0]] == [json.loads(x)["loss"] for x in lines[1]]
    assert {json.loads(x)["phase"] for x in lines[0]} == {MASKED, PREFERENCE}
