"""Hooks of the engine that a method may use: phases, columns, an epoch's sampling, modules that see both models."""

import shutil
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from engine_cases import DIGITS, killed_run, weights
from understudy import distill
from understudy.data import Batch, load_images
from understudy.data.numeric_columns import Column
from understudy.errors import InputError
from understudy.losses import cross_entropy, forward_kl
from understudy.models import find_head
from understudy.streaming import rowwise
from understudy.training import Method, Phase, Requirements, Term
from understudy.training.order import EpochSampler, Sampling
from understudy.training.phases import steps_of


class TwoPhases(Method):
    """First a projection on top of a frozen student, then the student; both read both models."""

    name = "two-phases"
    kinds = frozenset({"image"})

    @property
    def requires(self):
        return Requirements(features=True, teacher_features=True)

    def phases(self):
        return (
            Phase("projection", 0.25, train=("projection",), trainer={"learning_rate": 1e-2}),
            Phase("student", 0.75, train=("student",), split="even"),
        )

    def setup(self, context):
        context.splits["even"] = [context.splits["train"][i] for i in range(0, len(context.splits["train"]), 2)]
        ids = torch.cat([b.ids for b in context.batches("train")])
        context.add_column(Column.by_example("weight", ids, (ids % 3).float()))
        return {}

    def modules(self, shapes):
        assert shapes.student is not None and shapes.teacher is not None
        projection = nn.Linear(shapes.features, shapes.teacher_features)
        with torch.no_grad():
            projection.weight.copy_(0.1 * find_head(shapes.teacher).weight[:1].T.expand_as(projection.weight))
        return {"projection": projection}

    def loss(self, student, teacher, batch, state):
        if state.phase == "projection":
            seen = state.modules["projection"](student.features)
            return {"match": Term((seen - teacher.features).square().mean(-1) * state.columns["weight"].of_rows(batch))}
        return {"kd": Term(rowwise(forward_kl, student.signal, teacher.signal))}


class Steered(Method):
    """Draws from the examples that the student gets wrong as each epoch begins."""

    name = "steered"
    kinds = frozenset({"image"})

    @property
    def requires(self):
        return Requirements(teacher="none")

    @property
    def epoch_steps(self):
        return 3

    def sampling(self, state):
        wrong = []
        with torch.no_grad():
            for start, batch in enumerate(state.context.batches("train", 16)):
                found = state.student(batch).signal.logits.argmax(-1) != batch.row_labels
                wrong.append(16 * start + found.nonzero()[:, 0])
        return Sampling(indices=torch.cat(wrong))

    def loss(self, student, teacher, batch, state):
        return {"ce": Term(rowwise(cross_entropy, student.signal, None, batch.row_labels))}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    distill({**DIGITS, "method": TwoPhases, "output": str(folder), "trainer": {**DIGITS["trainer"], "max_steps": 4}})
    return folder / "teacher"


def recipe(folder, teacher, method=TwoPhases):
    shutil.copytree(teacher, folder / "teacher")
    return {**DIGITS, "method": method, "output": str(folder), "trainer": {**DIGITS["trainer"], "max_steps": 20}}


@pytest.mark.slow
def test_phases_train_what_they_say_and_resume_exactly(teacher, tmp_path):
    whole = distill(recipe(tmp_path / "whole", teacher))
    assert whole.metrics["accuracy"] > 0.1
    lines = [line for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines() if '"phase"' in line]
    assert len(lines) == 20 and sum('"projection"' in line for line in lines) == 5
    assert sorted(p.name for p in (tmp_path / "whole" / "phases").iterdir()) == [
        "0-projection.safetensors",
        "1-student.safetensors",
    ]
    for step, moment in ((3, "after"), (9, "before")):
        cut = recipe(tmp_path / f"{step}", teacher)
        assert killed_run(cut, step, moment)
        distill(cut)
        torch.testing.assert_close(weights(tmp_path / f"{step}"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_a_steered_epoch_resumes_with_the_choice_it_began_with(teacher, tmp_path):
    values = {**recipe(tmp_path / "whole", teacher, Steered)}
    del values["teacher"]
    values["trainer"] |= {"save_steps": 2, "learning_rate": 1e-2}
    distill(values)
    cut = {**values, "output": str(tmp_path / "cut")}
    assert killed_run(cut, 5, "after")  # the second epoch's third step, its choice made two steps before
    distill(cut)
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)


class EvenOnly(Steered):
    """Draws every other example, and notes what it is shown."""

    name = "even-only"
    shown: ClassVar[set] = set()

    def sampling(self, state):
        return Sampling(indices=torch.arange(0, len(state.context.splits["train"]), 2))

    def loss(self, student, teacher, batch, state):
        self.shown.update(batch.ids.tolist())
        return super().loss(student, teacher, batch, state)


def test_batches_hold_what_the_method_draws(tmp_path):
    trainer = {**DIGITS["trainer"], "max_steps": 9, "save_strategy": "no"}
    distill({**DIGITS, "method": EvenOnly, "teacher": None, "trainer": trainer, "output": str(tmp_path)})
    assert EvenOnly.shown == set(load_images(DIGITS["data"]).train.ids[::2].tolist())


def test_shares_of_steps():
    phases = [Phase("a", 0.5), Phase("b", 0.3), Phase("c", 0.2)]
    assert steps_of(phases, 10) == [5, 3, 2] and steps_of(phases, 3) == [1, 1, 1]
    assert sum(steps_of(phases, 7)) == 7
    for bad, total, message in (
        ([Phase("a"), Phase("a")], 9, "distinct names"),
        ([Phase("a", 0.5)], 9, "sum to 1"),
        (phases, 2, "3 phases need as many"),
    ):
        with pytest.raises(InputError, match=message):
            steps_of(bad, total)


def test_what_an_epoch_draws():
    sampler = EpochSampler(10, seed=3)
    plain = list(sampler)
    assert sorted(plain) == list(range(10)) and list(sampler) == plain
    sampler.begin(1, Sampling(indices=torch.tensor([2, 5, 7])))
    drawn = list(sampler)
    assert len(drawn) == 10 and {drawn.count(i) for i in (2, 5, 7)} == {3, 4}
    state = sampler.state_dict()
    again = EpochSampler(10, seed=3)
    again.load_state_dict(state)
    assert list(again) == drawn
    streams = EpochSampler(10, seed=0, length=12)
    streams.begin(0, Sampling(streams=[(torch.tensor([0, 1]), 1), (torch.arange(2, 10), 3)]))
    blocks = [list(streams)[i : i + 4] for i in range(0, 12, 4)]
    assert all(b[0] in (0, 1) and min(b[1:]) > 1 for b in blocks)
    weighted = EpochSampler(4, seed=0, length=4000)
    weighted.begin(0, Sampling(weights=torch.tensor([0.0, 1.0, 1.0, 2.0])))
    found = torch.bincount(torch.tensor(list(weighted)), minlength=4)
    assert found[0] == 0 and abs(int(found[3]) - 2000) < 150
    for bad, message in (
        (Sampling(indices=torch.tensor([10])), "draws from 1 of 10"),
        (Sampling(indices=torch.tensor([], dtype=torch.long)), "draws from 0 of 10"),
        (Sampling(weights=torch.zeros(10)), "not all 0"),
        (Sampling(weights=torch.ones(3)), "one number"),
    ):
        with pytest.raises(InputError, match=message):
            sampler.begin(0, bad)


def text(lengths, ids):
    labels = torch.full((len(ids), 1 + max(lengths)), -100)
    for row, n in zip(labels, lengths, strict=True):
        row[1 : 1 + n] = 1
    return Batch({"input_ids": labels.clamp(min=0)}, labels, torch.tensor(ids))


def test_columns_find_their_rows():
    column = Column.by_token("s", torch.tensor([7, 3]), [torch.tensor([0.1, 0.2]), torch.tensor([0.3])])
    torch.testing.assert_close(column.of_rows(text([1, 2], [3, 7])), torch.tensor([0.3, 0.1, 0.2]))
    same = Column.from_tensors("s", column.tensors())
    torch.testing.assert_close(same.of_rows(text([2, 1], [7, 3])), torch.tensor([0.1, 0.2, 0.3]))
    whole = Column.by_example("w", torch.tensor([7, 3]), torch.tensor([1.0, 2.0]))
    written = replace(text([1, 2], [3, 7]), source=torch.tensor([0, 1]))  # as many tokens, and not those of the data
    for batch in (text([1, 2], [3, 7]), written):
        torch.testing.assert_close(whole.of_rows(batch), torch.tensor([2.0, 1.0, 1.0]))
    for make, message in (
        (lambda: column.of_rows(text([2], [3])), "has 1 numbers for example 3, which has 2 rows"),
        (lambda: column.of_rows(text([1], [9])), "has nothing for example 9"),
        (lambda: column.of_rows(written), "texts written during training have none"),
        (lambda: column.of_examples(text([1], [3])), "read it with `of_rows`"),
        (lambda: Column.by_example("w", torch.tensor([1, 1]), torch.ones(2)), "two entries"),
        (lambda: Column.by_example("w", torch.tensor([1]), torch.tensor([float("nan")])), "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            make()
