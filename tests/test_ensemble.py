"""Several teachers as one: mixtures against their closed form, routing by a column, refusals, runs from recipes."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_cases import TEXT, killed_run, weights
from understudy import InputError, distill, losses
from understudy.data import Batch
from understudy.models import ModelOutput
from understudy.models.adapters import ModelAdapter
from understudy.runs.recipe import make
from understudy.streaming import logits_of, plain, rowwise
from understudy.targets import Dense, Mixture, Projected, TopK, top_k
from understudy.teachers import Ensemble, LocalTeacher

F64 = torch.float64


class Stub(ModelAdapter):
    """A teacher that gives each row a hidden state of its input and label; it notes which examples it was shown."""

    def __init__(self, classes=7, hidden=3, dense=False, seed=0):
        super().__init__()
        chance = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(classes, hidden, dtype=F64, generator=chance))
        self.into = torch.nn.Parameter(torch.randn(50, hidden, dtype=F64, generator=chance))
        self.dense, self.shown = dense, []

    def answer(self, batch, features):
        self.shown.append(batch.ids.tolist())
        hidden = batch.select(self.into[batch.inputs["input_ids"]])
        return ModelOutput(Dense(hidden @ self.weight.T) if self.dense else Projected(hidden, self.weight))


def texts(domains=None, rows=5, length=6):
    ids = torch.randint(0, 50, (rows, length))
    labels = torch.where(torch.rand(rows, length) < 0.3, -100, ids % 7)
    numbers = torch.tensor(domains) if domains is not None else None
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, labels, torch.arange(rows), domains=numbers)


def log_p(model, batch):
    return logits_of(model(batch).signal).log_softmax(-1)


@pytest.mark.parametrize("dense", [False, True])
def test_a_mixture_is_the_mean_of_probabilities(dense):
    batch, a, b = texts(), Stub(dense=dense), Stub(seed=1, dense=dense)
    signal = LocalTeacher(Ensemble({"a": a, "b": b}, weights={"a": 3, "b": 1}), "both")(batch).signal
    assert isinstance(signal, Dense if dense else Mixture)
    wanted = 0.75 * log_p(a, batch).exp() + 0.25 * log_p(b, batch).exp()
    torch.testing.assert_close(logits_of(signal).exp(), wanted)
    mean = Ensemble({"a": a, "b": b}, geometric=True)(batch).signal
    wanted = (log_p(a, batch) + log_p(b, batch)) / 2
    torch.testing.assert_close(logits_of(mean).log_softmax(-1), wanted.log_softmax(-1))


def test_one_member_and_equal_members_are_the_teacher_itself():
    batch, a = texts(), Stub()
    student = Projected(torch.randn(batch.num_items, 4, dtype=F64), torch.randn(7, 4, dtype=F64))
    alone = rowwise(losses.reverse_kl, student, a(batch).signal, temperature=2.0)
    for ensemble in (Ensemble({"a": a}), Ensemble({"a": a, "b": a}), Ensemble({"a": a, "b": a}, geometric=True)):
        values = rowwise(losses.reverse_kl, student, ensemble(batch).signal, temperature=2.0)
        torch.testing.assert_close(values, alone)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.booleans(), st.booleans())
def test_streaming_a_mixture_equals_plain_and_dense(seed, members, geometric, routed):
    torch.manual_seed(seed)
    rows, classes = 11, 9
    parts = tuple(
        Projected(torch.randn(rows, 2 + m, dtype=F64), torch.randn(classes, 2 + m, dtype=F64)) for m in range(members)
    )
    place = torch.stack([torch.randperm(rows) for _ in range(members)], -1)
    if routed:
        place = torch.where(torch.nn.functional.one_hot(torch.randint(0, members, (rows,)), members) > 0, place, -1)
    target = Mixture(parts, place, torch.rand(members, dtype=F64) + 0.1, geometric)
    student = Projected(
        torch.randn(rows, 3, dtype=F64).requires_grad_(), torch.randn(classes, 3, dtype=F64).requires_grad_()
    )
    found = []
    for function, signal, extra in (
        (rowwise, target, {"tile_bytes": classes * 8 * 3}),
        (plain, target, {}),
        (rowwise, Dense(logits_of(target)), {}),
    ):
        values = function(losses.jsd, student, signal, **extra)
        found.append((values, *torch.autograd.grad(values.sum(), (student.hidden, student.weight))))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_each_member_reads_its_own_examples_alone():
    batch = texts(domains=[1, 0, 0, 1, 1])
    law, math, idle = Stub(seed=1), Stub(seed=2, hidden=5), Stub(seed=3)
    ensemble = Ensemble({"math": math, "idle": idle, "law": law}, domains=["law", "math"])
    values = logits_of(ensemble(batch).signal).log_softmax(-1)
    assert law.shown == [[1, 2]] and math.shown == [[0, 3, 4]] and idle.shown == []
    wanted = torch.where((batch.domains[batch.sequence] == 0)[:, None], log_p(law, batch), log_p(math, batch))
    torch.testing.assert_close(values, wanted)
    parts = [logits_of(ensemble(batch.take(torch.tensor(i))).signal).log_softmax(-1) for i in ([0, 1], [2], [3, 4])]
    torch.testing.assert_close(torch.cat(parts), values)  # however a batch is cut


class Stored:
    """Answers from elsewhere: top-k."""

    name = "stored"

    def __init__(self, model, k=3):
        self.model, self.k = model, k

    def __call__(self, batch):
        return ModelOutput(top_k(logits_of(self.model(batch).signal), self.k))


@torch.no_grad()
def test_answers_from_elsewhere_are_routed_and_not_mixed():
    batch, a, b = texts(domains=[0, 1, 1, 0, 1]), Stub(seed=1), Stub(seed=2)
    signal = Ensemble({"a": Stored(a), "b": Stored(b)}, domains=["a", "b"])(batch).signal
    whole = torch.where((batch.domains[batch.sequence] == 0)[:, None], log_p(a, batch), log_p(b, batch))
    assert isinstance(signal, TopK)
    torch.testing.assert_close(signal.log_probs, top_k(whole, 3).log_probs)
    with pytest.raises(InputError, match="a mixture needs whole distributions"):
        Ensemble({"a": Stored(a), "b": b})(batch)
    with pytest.raises(InputError, match="capture all with one support"):
        Ensemble({"a": Stored(a), "b": Stored(b, 2)}, domains=["a", "b"])(batch)
    with pytest.raises(InputError, match="capture all with one support"):
        Ensemble({"a": Stored(a), "b": Stored(b, 2)}, domains=["a", "b"]).imagined(
            batch.take(batch.domains.eq(0).nonzero()[:, 0])
        )
    assert isinstance(Ensemble({"a": Stored(a), "b": Stored(b)}, domains=["a", "b"]).imagined(batch).signal, TopK)
    assert not Ensemble({"a": Stored(a)}).complete


def test_forbidden_classes_leave_no_nan():
    one = Projected(
        torch.zeros(1, 1, dtype=F64), torch.zeros(3, 1, dtype=F64), torch.tensor([0.0, 1.0, -torch.inf], dtype=F64)
    )
    hidden = torch.zeros(1, 1, dtype=F64, requires_grad=True)
    two = Projected(hidden, torch.ones(3, 1, dtype=F64), torch.tensor([1.0, 0.0, -torch.inf], dtype=F64))
    values = logits_of(Mixture((one, two), torch.zeros(1, 2, dtype=torch.long), torch.ones(2, dtype=F64)))
    assert values[0, 2] == -torch.inf and values[0, :2].isfinite().all()
    (grad,) = torch.autograd.grad(values[0, :2].sum(), hidden)
    assert grad.isfinite().all()


def test_bad_ensembles_are_one_line():
    a, b = Stub(), Stub(seed=1)
    for options, says in [
        ({"weights": {"a": 1, "b": -1}}, "weight of member 'b' is -1"),
        ({"weights": {"a": 1, "b": float("nan")}}, "weight of member 'b' is nan"),
        ({"weights": {"a": 1}}, "Member 'b' has no weight"),
        ({"weights": {"a": 1, "bb": 1}}, "Did you mean 'b'"),
        ({"domains": ["a", "law"]}, "domain 'law' and the ensemble has a, b"),
        ({"domains": ["a"], "weights": {"a": 1, "b": 1}}, "leave the weights out"),
    ]:
        with pytest.raises(InputError, match=says):
            Ensemble({"a": a, "b": b}, **options)
    with pytest.raises(InputError, match="has none"):
        Ensemble({"a": a, "b": b}, domains=["a", "b"])(texts())
    with pytest.raises(InputError, match="no features"):
        Ensemble({"a": a})(texts(), features=True)
    with pytest.raises(InputError, match="6, 7 classes"):
        Ensemble({"a": a, "b": Stub(classes=6)})(texts())


# -- runs ----------------------------------------------------------------------------------------------------------

MEMBER = {
    "model": "llama:hidden=16,layers=1,heads=2",
    "train": {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
}


@pytest.fixture
def domains(tmp_path):
    """Texts of two domains in which the same letters go on differently."""
    file = tmp_path / "data.jsonl"
    up, down = "abcdefgh" * 12, "hgfedcba" * 12
    rows = [{"text": (up if i % 2 else down)[i % 5 :], "field": "up" if i % 2 else "down"} for i in range(80)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def recipe(data, output, **teacher):
    spec = {"members": {"up": MEMBER, "down": MEMBER}, **teacher}
    data = {"name": data, "max_length": 32, "vocab_size": 264}
    return {**TEXT, "data": data, "teacher": spec, "output": str(output), "options": {"temperature": 1.0}}


@pytest.mark.slow
def test_a_routed_run_asks_the_right_expert_and_resumes_exactly(tmp_path, domains):
    """Each expert knows its own domain alone: the column says whom to ask."""
    routed = distill(recipe(domains, tmp_path / "routed", route="field"))
    assert routed.metrics["teacher_accuracy"] > 0.9
    for name in ("up", "down"):
        alone = json.loads((tmp_path / "routed" / "members" / name / "teacher" / "evaluation.json").read_text())
        assert alone["metrics"]["accuracy"] > 0.9
    again = {**recipe(domains, tmp_path / "again", route="field")}
    assert killed_run(again, 7, "before")
    distill(again)
    one, two = weights(tmp_path / "routed"), weights(tmp_path / "again")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_images_are_routed_and_mixed(tmp_path):
    import numpy as np

    chance = np.random.default_rng(0)
    labels = chance.integers(0, 3, 300)
    images = (chance.random((300, 4, 4)) * 60 + labels[:, None, None] * 60).astype("uint8")
    (tmp_path / "set").mkdir()
    np.savez(tmp_path / "set" / "train.npz", images=images, labels=labels, place=np.where(labels > 0, "b", "a"))
    member = {"model": "mlp:8", "train": {"max_steps": 60, "per_device_train_batch_size": 32}}
    values = {
        "task": "image_classification",
        "data": {"name": str(tmp_path / "set"), "augment": False},
        "student": "mlp:4",
        "trainer": {"max_steps": 10, "per_device_train_batch_size": 16},
    }
    for method, spec in (("kd", {"route": "place"}), ("taid", {"weights": {"a": 1, "b": 2}, "mix": "logits"})):
        teacher = {"members": {"a": member, "b": member}, **spec}
        made = distill({**values, "method": method, "teacher": teacher, "output": str(tmp_path / method)})
        assert "teacher_accuracy" in made.metrics
    for changes, says in [
        ({"teacher": {"members": {"a": member, "b": member}, "route": "plce"}}, "plce"),
        ({"teacher": {"members": {"a": member}, "route": "place"}}, "domain 'b'"),
        (
            {
                "method": "ff-g2m",
                "task": "node_classification",
                "data": {},
                "teacher": {"members": {"a": "x"}, "route": "y"},
            },
            "domain_column",
        ),
        ({"method": "dhkd", "student": "teacher", "teacher": {"members": {"a": "mlp:4"}}}, "copy of one model"),
    ]:
        with pytest.raises(InputError, match=says):
            distill({**values, "output": str(tmp_path / "bad"), **changes, "trainer": {"max_steps": 1}})
        import shutil

        shutil.rmtree(tmp_path / "bad", ignore_errors=True)


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"teacher": {"members": {"a": "x"}, "route": "f", "weights": {"a": 1}}}, "leave teacher.weights out"),
        ({"teacher": {"members": {"a": "x"}, "cache": "c"}}, "teacher.members.NAME.cache"),
        ({"teacher": {"members": {"a": {"members": {"b": "x"}}}}}, "has members itself"),
        ({"teacher": {"model": "x", "route": "f"}}, "name them in teacher.members"),
        ({"teacher": {"members": {"a/b": "x"}}}, "letters, digits"),
        ({"teacher": {"members": {"a": "x"}, "route": "f"}, "data": {"domain_column": "g"}}, "one column"),
        ({"student": {"members": {"a": "x"}}}, "a student is one model"),
        ({"teacher": {"members": {"a": {"model": "x", "trian": {}}}}}, "Did you mean 'train'"),
        ({"task": "preferences", "method": "dpo", "teacher": {"members": {"a": "x"}}}, "name one teacher"),
        ({"teacher": {"members": {"a": {"model": "x", "train": {"max_step": 1}}}}}, "Did you mean 'max_steps'"),
    ],
)
def test_bad_recipes_are_one_line(changes, says):
    with pytest.raises(InputError, match=says):
        make({"task": "language_modeling", "method": "kd", **changes})


def test_a_missing_column_is_named(tmp_path, domains):
    with pytest.raises(InputError, match="has no 'topic' to name its domain: its columns are field, text"):
        distill(recipe(domains, tmp_path / "x", route="topic"))
