"""Paper 29, HARD: golden vectors, limits that must hold, turns, bad input, learning."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden_vectors import close, golden
from hard_cases import EAGER, net, played, signals, trainer
from split_cases import ends_alike
from understudy import InputError, distill
from understudy.data import Batch
from understudy.losses import forward_kl
from understudy.losses.consistency import two_sided_kl
from understudy.methods.hard import HARD
from understudy.models.augmentors import Shift1d, circular_shift
from understudy.runs.recipe import make
from understudy.training import Shapes, TrainState
from understudy.training.update_schedule import AlternatingSchedule


@pytest.mark.golden
def test_golden_losses():
    g = golden("29-hard")
    names = ("logits_t_aug", "logits_s_aug", "logits_s_clean")
    t_aug, s_aug, s_clean = (g[n].clone().requires_grad_() for n in names)
    options = {"temperature": float(g["T"]), "tau_squared": True}
    st_aug = two_sided_kl(s_aug, t_aug, **options).mean()
    tt = two_sided_kl(t_aug, g["logits_t_clean"], **options).mean()
    objective = float(g["lambda_s"]) * st_aug - float(g["lambda_t"]) * tt
    wanted = {"loss_st": st_aug, "loss_tt": tt, "augmentor_objective": objective}
    wanted["loss_st_clean"] = forward_kl(s_clean, g["logits_t_clean"], **options).mean()
    wanted["student_loss"] = 0.5 * (forward_kl(s_aug, t_aug, **options).mean() + wanted["loss_st_clean"])
    for name, value in wanted.items():
        close(value, g[name], rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(objective, [t_aug, s_aug], retain_graph=True)
    found += torch.autograd.grad(wanted["student_loss"], [s_aug, s_clean])
    for gradient, name in zip(
        found, ("obj_logits_t_aug", "obj_logits_s_aug", "student_logits_s_aug", "student_logits_s_clean"), strict=True
    ):
        close(gradient, g[f"grad_{name}"], rtol=1e-9, atol=1e-9)
    assert found[1].sum(-1).abs().max() < 1e-12


@pytest.mark.golden
def test_golden_turns():
    g = golden("29-hard")
    turns, phases = AlternatingSchedule(float(g["ctrl_l_min"]), float(g["ctrl_l_max"]), 10**9), []
    for loss in g["ctrl_loss_st"].tolist():
        phases.append(int(turns.auxiliary))
        turns.update(loss)
    assert phases == g["ctrl_phase"].tolist()


@pytest.mark.golden
def test_golden_shift():
    g = golden("29-hard")
    by = g["shift"].clone().requires_grad_()
    out = circular_shift(g["shift_x"], by)
    close(out, g["shift_out"], rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad((out * g["shift_cotangent"]).sum(), by)
    inside = g["shift"] != g["shift"].round()  # at a whole shift the derivative is one-sided
    close(gradient[inside], g["shift_grad"][inside], rtol=1e-9, atol=1e-9)


@given(st.integers(2, 50), st.integers(-120, 120), st.integers(0, 1000))
def test_whole_shifts_are_rolls(length, by, seed):
    x = torch.randn(2, 1, 1, length, generator=torch.Generator().manual_seed(seed))
    out = circular_shift(x, torch.tensor([float(by), float(length)]))
    assert torch.equal(out[0], x[0].roll(by, -1)) and torch.equal(out[1], x[1])


FAMILIES = ("shift1d", "affine", "mix")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_change_it_is_plain_kd(family):
    student, teacher, batch = net(), net(seed=1), signals()
    terms, _, student_terms = played(HARD(augmentor=family, spread=1e-12), student, teacher, batch)
    plain = forward_kl(student(batch).signal.logits, teacher(batch).signal.logits, temperature=2.0, tau_squared=True)
    assert terms["consistency"].values.abs().max() < 1e-9
    close(terms["augmented"].values, plain.detach(), rtol=0, atol=1e-6)
    close(sum(t.weight * t.values for t in student_terms.values()), plain.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_is_the_teacher_leaves_nothing_to_gain(family):
    student, teacher, batch = net(), net(), signals()
    terms, grads, _ = played(HARD(augmentor=family, spread=0.4, lambda_t=0.0), student, teacher, batch)
    assert terms["augmented"].values.abs().max() < 1e-12 and all(g.abs().max() < 1e-12 for g in grads)
    terms, _, _ = played(HARD(augmentor=family, spread=0.4), student, teacher, batch)
    assert (terms["consistency"].values >= 0).all() and terms["consistency"].values.max() > 0


def test_a_teacher_that_ignores_shifts_gives_no_pull():
    """Whole shifts: between samples a signal is smoothed, which no teacher ignores."""

    class Whole(Shift1d):
        def forward(self, x, noise):
            by = self.mu + noise
            return circular_shift(x, by + (by.round() - by).detach())

    batch = signals()
    method = HARD(augmentor="shift1d", lambda_s=0.0)
    terms, grads, _ = played(method, net(), net("circular:6"), batch, Whole(1.0).double())
    assert terms["consistency"].values.abs().max() < 1e-12 and all(g.abs().max() < 1e-12 for g in grads)
    terms, _, _ = played(method, net(), net("circular:6,flat"), batch, Whole(1.0).double())
    assert terms["consistency"].values.max() > 1e-6


def test_constants_on_logits_change_nothing():
    s, t = torch.randn(2, 6, 5, dtype=torch.float64)
    shift = torch.randn(6, 1, dtype=torch.float64) * 30
    close(two_sided_kl(s + shift, t - shift, temperature=2.0), two_sided_kl(s, t, temperature=2.0), atol=1e-12)
    assert two_sided_kl(s * math.nan, t).isnan().all()


@given(st.lists(st.floats(0.1, 0.5), max_size=40))
def test_between_the_thresholds_nobody_hands_over(losses):
    for auxiliary in (False, True):
        turns = AlternatingSchedule(0.1, 0.5, 100)
        turns.auxiliary = auxiliary
        assert not any(turns.update(loss) for loss in losses) and turns.auxiliary == auxiliary


def test_turns_end_at_the_latest_and_nan_decides_nothing():
    turns = AlternatingSchedule(0.1, 0.5, 3)
    ends = [turns.update(loss) for loss in (math.nan, 0.05, 0.2, math.nan, 0.2, 0.3)]
    assert ends == [False] * 4 + [True, False]
    assert not turns.auxiliary and turns.saturated == 1 and turns.steps == {"student": 3, "auxiliary": 3}
    slow = AlternatingSchedule(0.1, 0.5, 9, decay=0.5)
    slow.update(0.3)
    slow.update(0.01)
    assert not slow.auxiliary and slow.mean == pytest.approx(0.155)
    copies = AlternatingSchedule(0.1, 0.5, 9, memory=2)
    for i in range(4):
        copies.remember({"mu": torch.tensor(float(i))})
    back = AlternatingSchedule(0.1, 0.5, 9, memory=2)
    back.load_state_dict(copies.state_dict())
    assert [c["mu"].item() for c in back.copies] == [1.0, 2.0, 3.0] and back.state_dict() == copies.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_of_a_batch_gives_the_same_update(family, tmp_path):
    def alternated(made):
        assert made.model.train_state.method_state.steps == {"student": 3, "auxiliary": 2}

    method = HARD(augmentor=family, **EAGER, augmentor_memory=1)
    ends_alike(partial(trainer, method, tmp_path, steps=5), done=alternated)


def test_each_moves_its_own_parameters_alone(tmp_path):
    """To the bit: the student and its batch statistics in the augmentor's turn, the augmentor in the student's."""
    made = trainer(HARD(augmentor="affine", **EAGER), tmp_path, steps=4, shape=(1, 8, 8), teacher="convnet:2")
    made.model.student.model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), made.model.student.model).double()
    made.optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    parts = {"student": made.model.student, "augmentor": made.model.own, "teacher": made.teacher.model}
    step, moved = made.training_step, []

    def state():
        return {n: {k: v.clone() for k, v in p.state_dict().items()} for n, p in parts.items()}

    def stepping(*args, **kwargs):
        moved.append((made.model.method.update_schedule(made.model.train_state)[0], state()))
        return step(*args, **kwargs)

    made.training_step = stepping
    made.train()
    snapshots = [s for _, s in moved] + [state()]
    assert [who for who, _ in moved] == ["student", "augmentor"] * 2
    for (who, before), after in zip(moved, snapshots[1:], strict=True):
        for name in parts:
            same = all(torch.equal(before[name][k], after[name][k]) for k in before[name])
            assert same == (name != who), (who, name)


def test_memory_and_a_fixed_augmentor(tmp_path):
    """Without learning no step is the augmentor's; with copies to draw from, the student becomes another."""
    found = {}
    for name, options in {"fixed": {"learn": False}, "none": {}, "two": {"augmentor_memory": 2}}.items():
        made = trainer(HARD(augmentor="shift1d", **EAGER, **options), tmp_path / name, steps=8)
        made.train()
        found[name] = made.model
    start = Shift1d(0.5).double().state_dict()
    for name, still in {"fixed": True, "none": False, "two": False}.items():
        assert torch.equal(found[name].own["augmentor"].rho, start["rho"]) == still
    assert [c["mu"].shape for c in found["two"].train_state.method_state.copies] == [()] * 3
    now = found["two"].own["augmentor"].state_dict()
    assert all(torch.equal(v, now[k]) for k, v in found["two"].train_state.method_state.copies[-1].items())
    student = [torch.cat([p.detach().flatten() for p in found[n].student.parameters()]) for n in ("none", "two")]
    assert not torch.equal(*student)


def test_an_uncounted_example_may_hold_anything(tmp_path):
    batch, method = signals(), HARD(augmentor="affine", spread=0.3)
    batch.labels[3] = -100
    _, clean, _ = played(method, net(), net(seed=1), dataclasses.replace(batch))
    batch.inputs["pixel_values"][3] = math.nan
    _, poisoned, _ = played(method, net(), net(seed=1), dataclasses.replace(batch))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("reduction", ["token_mean", "sum"])
def test_the_mean_of_the_examples_that_count_decides(reduction, tmp_path):
    """Whatever an update is divided by; one in which none counts says nothing, and nobody hands over."""
    made = trainer(HARD(augmentor="shift1d", l_min=1e3, l_max=1e4), tmp_path, micro=4, steps=3)
    made.model.reduction = reduction
    order = made._get_train_sampler()
    uncounted = set(list(order)[:4])  # the first update
    items = [(x, -100 if i in uncounted else label, i) for x, label, i in made.train_dataset]
    made.train_dataset, state = items, made.model.train_state.method_state
    x, labels, ids = zip(*[items[i] for i in list(order)[4:8]], strict=True)
    batch = Batch({"pixel_values": torch.stack(x)}, torch.tensor(labels), torch.tensor(ids))
    made.model.train_state.step = 1
    wanted = made.model.method.loss(made.model.student(batch), made.teacher(batch), batch, made.model.train_state)
    losses, update = [], state.update
    state.update = lambda loss: losses.append(loss) or update(loss)
    made.train()
    assert len(losses) == 2 and state.steps == {"student": 1, "auxiliary": 1}
    assert losses[0] == pytest.approx(wanted["augmented"].values.mean().item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_does_not_reach_the_augmented_inputs(family):
    """The student and the augmentor see the same ones: the student's update is under autocast, and the augmentor's is not."""
    batch = signals(shape=(1, 56, 56))
    batch.inputs["pixel_values"] = batch.inputs["pixel_values"].float()
    method = HARD(augmentor=family)
    module = method.modules(Shapes(5, inputs={"pixel_values": (1, 56, 56)}))["augmentor"]
    copy = dict(module.named_parameters())
    plain = method._augmented(batch, TrainState({"augmentor": module}), None).inputs["pixel_values"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for remembered in (None, copy):
            shown = method._augmented(batch, TrainState({"augmentor": module}), remembered)
            assert torch.equal(shown.inputs["pixel_values"], plain)


def test_a_runaway_is_skipped_then_told(tmp_path):
    made = trainer(HARD(augmentor="shift1d", l_min=1e3, l_max=1e4, max_augmentor_steps=99), tmp_path, steps=20)
    made.model.own["augmentor"].mu.data.fill_(math.inf)
    with pytest.raises(InputError, match=r"'augmentor' was not finite 10 times"):
        made.model.train_state.method_state.update(0.0)
        made.train()
    assert made.auxiliary.optimizers["augmentor"].param_groups[0]["lr"] == pytest.approx(0.1 / 2**9)


def test_bad_options_and_models():
    for options, message in (
        ({"l_min": 0.5}, "l_max = 0.5: it must be above l_min, which is 0.5"),
        ({"l_min": 0.0}, "l_min = 0.0"),
        ({"lambda_t": -1}, "lambda_t = -1"),
        ({"augmentor": "mix", "spread": 1.0}, "spread = 1.0: of augmentor 'mix'"),
        ({"augmenter": "mix"}, "Did you mean 'augmentor'"),
    ):
        with pytest.raises(InputError, match=message):
            make({"method": "hard", "options": options})
    with pytest.raises(ValueError, match="l_min"):
        HARD(l_min=2.0)

    class Rounded(Shift1d):
        def forward(self, x, noise):
            return circular_shift(x, (self.mu + noise).round().detach())

    with pytest.raises(InputError, match="have no gradient to the augmentor"):
        played(HARD(augmentor="shift1d"), net(), net(seed=1), signals(), Rounded(1.0).double())


class Restless(torch.nn.Module):
    """Dropout that no mode switches off."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.inner(torch.nn.functional.dropout(x.flatten(1), 0.5, training=True))


def test_a_teacher_with_dropout_on_is_refused(tmp_path):
    with pytest.raises(InputError, match="answers the same inputs differently"):
        distill(
            {"method": "hard", "data": {"name": "digits", "limit": 64}, "output": str(tmp_path)}, teacher=Restless()
        )
