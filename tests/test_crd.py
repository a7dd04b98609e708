"""CRD: its loss by hand and in its limits, its memories, any split of a batch, runs on images, texts and own networks."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from engine_cases import DIGITS, killed_run, weights
from golden_vectors import close
from text_classes import as_csv, classifier, reviews
from understudy import InputError, distill
from understudy.losses.contrast import log_partition, memory_scores, noise_contrastive
from understudy.methods.crd import CRD
from understudy.runs.recipe import make
from understudy.runs.teachers import load_model
from understudy.tasks import get
from understudy.teachers import LocalTeacher
from understudy.training import SetupContext, TrainModule
from understudy.training.checkpoint import load_tree
from understudy.training.reduction import Counts
from understudy.training.shapes import probe

SMALL = {"width": 8, "negatives": 20}


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return torch.rand(5, 4, dtype=torch.float64) * 2 - 1


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_values_by_hand(scores):
    """As released: P / (P + K / N) of the positive, (K / N) / (P + K / N) of the others, with P = exp(score / τ) / Z."""
    z, examples, noise = torch.tensor(30.0, dtype=torch.float64), 50, 3 / 50
    p = (scores / 0.5).exp() / z
    expected = -(p[:, 0] / (p[:, 0] + noise)).log() - (noise / (p[:, 1:] + noise)).log().sum(1)
    close(noise_contrastive(scores, z.log(), examples, temperature=0.5), expected)
    close(log_partition(scores, 50, temperature=0.5).exp(), 50 * (scores / 0.5).exp().mean(1))


def test_scores_are_products_with_the_chosen_entries():
    torch.manual_seed(0)
    vectors, memory = torch.rand(2, 3).double(), torch.rand(4, 3).double()
    index = torch.tensor([[1, 0, 0], [3, 2, 1]])
    close(memory_scores(vectors, memory, index), (vectors[:, None] * memory[index]).sum(-1))


def test_gradients_agree_with_finite_differences(scores):
    z = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    memory, index = torch.randn(6, 3, dtype=torch.float64), torch.tensor([[0, 4, 4, 2]] * 5)
    assert torch.autograd.gradcheck(lambda x: noise_contrastive(x, z, 6), scores.clone().requires_grad_())
    vectors = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: noise_contrastive(memory_scores(x, memory, index), z, 6), vectors)


def test_limits(scores):
    even = torch.zeros(2, 4, dtype=torch.float64)  # p = 1 / Z = K / N
    close(
        noise_contrastive(even, torch.tensor(50 / 3, dtype=torch.float64).log(), 50),
        torch.full((2,), 4 * math.log(2.0)).double(),
    )
    constant = log_partition(scores + 0.3, 9, temperature=0.5) - log_partition(scores, 9, temperature=0.5)
    close(constant, torch.full((5,), 0.6, dtype=torch.float64))
    own = scores.clone()
    own[:, 0] += 1
    z = torch.zeros((), dtype=torch.float64)
    assert bool((noise_contrastive(own, z, 9) < noise_contrastive(scores, z, 9)).all())
    far = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], requires_grad=True)
    noise_contrastive(far, torch.tensor(0.0), 10**6, temperature=1e-3).sum().backward()
    assert far.grad.isfinite().all()


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda s: noise_contrastive(s[:, :1], torch.tensor(0.0), 9), "there is no negative"),
        (lambda s: noise_contrastive(s, torch.tensor(0.0), 9, temperature=0), "temperature is 0"),
    ],
)
def test_bad_input(scores, call, says):
    with pytest.raises(InputError, match=says):
        call(scores)


# -- the memories -----------------------------------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path):
    """A module and batches of 4 that are one update, in float64."""

    def made(**options):
        recipe = make({**DIGITS, "method": "crd", "options": {**SMALL, **options}})
        task, method = get(recipe.task), recipe.build_method()
        prepared = task.prepare(recipe)
        torch.manual_seed(0)
        student, teacher = (load_model(task, spec, prepared) for spec in (recipe.student, recipe.teacher))
        asked = LocalTeacher(teacher.double(), "teacher", features=True)
        splits = {name: prepared.split(name) for name in ("train", "validation", "test")}
        context = SetupContext(student, teacher, splits, prepared.collate, 10, tmp_path, "key", teacher=asked)
        tables = method.setup(context)
        batches = list(context.batches("train", 4))[:3]
        sides, nothing = {"student": student, "teacher": teacher}, {"student": {}, "teacher": {}}
        shapes = dataclasses.replace(probe_of(method, sides, nothing, batches[0], tables), student=student)
        module = TrainModule(student.double(), method, shapes, 10, tables=tables, context=context).double().train()
        for batch in batches:
            batch.inputs.update({k: v.double() for k, v in batch.inputs.items()})
        return module, asked, batches

    def probe_of(method, sides, taps, batch, tables):
        for model in sides.values():
            model.double()
        batch = dataclasses.replace(batch, inputs={k: v.double() for k, v in batch.inputs.items()})
        return probe(method, 10, sides, taps, batch, tables)

    return made


def update(module, teacher, batches):
    """The gradient of an update, after which the memories are written."""
    counts = Counts.total([Counts.of(b, "token_mean", {}) for b in batches], lambda v: v)
    module.zero_grad()
    for batch in batches:
        sum(counts.divide(n, v) for n, v in module(batch, teacher(batch)).losses.items()).backward()
    module.train_state.step += 1
    module.method.on_step_end(module.train_state)
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def joined(batches):
    inputs = {k: torch.cat([b.inputs[k] for b in batches]) for k in batches[0].inputs}
    rest = {n: torch.cat([getattr(b, n) for b in batches]) for n in ("labels", "ids")}
    return dataclasses.replace(batches[0], inputs=inputs, **rest)


def test_any_split_of_a_batch_gives_the_same_gradient_and_memories(build):
    """Also in the first update, which the constants are estimated in, and in the next, which reads what it wrote."""
    found = []
    for cut in (False, True):
        module, teacher, batches = build()
        parts = batches if cut else [joined(batches)]
        gradients = [update(module, teacher, parts) for _ in range(2)]
        memory = module.train_state.method_state
        found.append([*gradients, *memory.vectors.values(), torch.tensor(list(memory.log_z.values()))])
    for whole, parts in zip(*found, strict=True):
        close(whole, parts, rtol=0, atol=1e-10)
    assert not torch.equal(found[0][0], found[0][1])


def test_the_gradient_reaches_student_and_projections_and_never_the_teacher(build):
    module, teacher, batches = build(ce_weight=0)
    update(module, teacher, batches)
    reached = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {"own.student.weight", "own.teacher.weight", "student.model.body.1.weight"} <= reached
    assert not any("head" in n for n in reached) and all(p.grad is None for p in teacher.model.parameters())


def test_an_entry_moves_half_way_to_the_example_and_the_others_stay(build):
    module, teacher, batches = build()
    own, state = module.method, module.train_state
    before = own._filled(len(state.tables["size"]), state.seed)
    assert 0.5 < before["student"].norm(dim=1).mean() < 1.5
    with torch.no_grad():
        projected = nn.functional.normalize(
            state.modules["student"](module.student(batches[0], True).features.double())
        )
    places = state.columns["memory"].of_rows(batches[0])
    # An example that an update meets twice is written once.
    update(module, teacher, [batches[0], batches[0]])
    after = state.method_state.vectors["student"]
    close(after[places], nn.functional.normalize(0.5 * before["student"][places] + 0.5 * projected))
    rest = torch.ones(len(after), dtype=torch.bool)
    rest[places] = False
    close(after[rest], before["student"][rest])


def test_the_constants_are_those_of_the_first_update(build):
    module, teacher, batches = build()
    update(module, teacher, batches)
    memory = module.train_state.method_state
    first = dict(memory.log_z)
    # Of a random unit vector's products with random entries: log N + 1 / (2 · width · τ²).
    assert abs(first["teacher"] - math.log(len(memory.vectors["teacher"])) - 1 / (2 * 8 * 0.07**2)) < 10
    update(module, teacher, batches)
    assert memory.log_z == first


def test_negatives_are_all_examples_of_other_classes(build):
    module, _, batches = build(negatives=3000)
    state, train = module.train_state, module.train_state.context.splits["train"]
    labels = torch.tensor([int(train[i][1]) for i in range(len(train))])
    places = state.columns["memory"].of_rows(batches[0])
    drawn = module.method._drawn(batches[0].ids, places, state)
    for row, place in enumerate(places.tolist()):
        others = (labels != labels[place]).nonzero()[:, 0]
        assert torch.equal(drawn[row].unique(), others)
    state.step += 1
    assert not torch.equal(module.method._drawn(batches[0].ids, places, state), drawn)


# -- runs -------------------------------------------------------------------------------------------------------------

STEPS = {"max_steps": 200, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "save_strategy": "no"}


def learned(base, folder, **more):
    """The run without a weight of the labels' own that would explain it."""
    options = {"negatives": 128, "crd_weight": 0.1}
    return distill({**base, "method": "crd", "options": options, "output": str(folder), "trainer": STEPS} | more)


def test_it_learns_digits_and_leaves_its_projections_behind(tmp_path):
    teacher = {"model": "mlp:16", "train": {"max_steps": 200, "learning_rate": 1e-2}}
    found = learned({**DIGITS, "data": {"name": "digits", "limit": 300}, "teacher": teacher}, tmp_path)
    assert found.metrics["accuracy"] > 0.4  # chance is 0.1
    assert {n.split(".")[0] for n in weights(tmp_path)} == {"body", "head"}


def test_it_learns_texts(tmp_path):
    data = {"name": str(as_csv(tmp_path / "reviews.csv", reviews(120))), "max_length": 16, "vocab_size": 300}
    teacher = classifier(tmp_path / "teacher")
    base = {"task": "text_classification", "data": data, "teacher": str(teacher), "student": "embedding:8"}
    assert learned(base, tmp_path / "run", trainer={**STEPS, "max_steps": 60}).metrics["accuracy"] > 0.8


class Net(nn.Module):
    """A classifier of the caller's own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU())
        self.classifier = nn.Linear(6, 10)

    def forward(self, pixel_values):
        return self.classifier(self.body(pixel_values))


def test_it_takes_the_callers_own_networks(tmp_path):
    found = learned(DIGITS, tmp_path, student=Net(), trainer={**STEPS, "max_steps": 4})
    assert isinstance(found.student, Net)


def test_data_of_one_class_are_refused(tmp_path):
    rows = [{"image": torch.rand(8, 8).mul(255).byte().numpy(), "label": 0} for _ in range(24)]
    with pytest.raises(InputError, match="'crd' contrasts examples with those of other classes, and all"):
        learned({**DIGITS, "data": {"train": rows, "test": [rows[0]]}}, tmp_path)


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights_and_memories(tmp_path):
    trainer = {**DIGITS["trainer"], "max_steps": 10, "save_steps": 2}
    recipes = [
        {**DIGITS, "method": "crd", "options": SMALL, "trainer": trainer, "output": str(tmp_path / way)}
        for way in ("whole", "cut")
    ]
    distill(recipes[0])
    assert killed_run(recipes[1], 5, "after")
    distill(recipes[1])
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)
    states = []
    for way in ("whole", "cut"):
        (file,) = (tmp_path / way / "checkpoints" / "checkpoint-10").glob("state*.safetensors")
        states.append(load_tree(file)["method"])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert CRD.name == "crd" and states[0]["vectors"]["student"].shape[1] == 8
