"""Talking Models: golden vectors, limits, positions of messages, bad input."""

import copy

import pytest
import torch
from torch import nn

from golden_vectors import close, golden
from understudy import InputError
from understudy.data import Batch
from understudy.losses.features import hint_mse
from understudy.losses.messages import Compared, RoundStates, mean_square, message_consistency, state_consistency
from understudy.methods.talking_models import TalkingModels
from understudy.models import ClassifierAdapter
from understudy.models.messages import as_output, states_of
from understudy.models.taps import entered
from understudy.teachers import LocalTeacher
from understudy.training.reduction import Counts
from understudy.training.shapes import probe
from understudy.training.train_module import TrainModule


class Net(nn.Module):
    """low, up = tanh(W ·), head = W ·."""

    def __init__(self, low, up, head):
        super().__init__()
        self.low, self.up = (nn.Sequential(self.linear(w), nn.Tanh()) for w in (low, up))
        self.head = self.linear(head)

    @staticmethod
    def linear(weight):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
        layer.weight.data = weight.clone()
        return layer

    def forward(self, pixels):
        return self.head(self.up(self.low(pixels.flatten(1))))


def talking(student, teacher, batch, **options):
    """The method in the engine's module, with both networks cut at `low` and `up`."""
    method = TalkingModels(
        **{"student_low": "low", "student_high": "up", "teacher_low": "low", "teacher_high": "up", **options}
    )
    classes = len(student.head.weight)
    sides = {
        "student": ClassifierAdapter(student, classes),
        "teacher": ClassifierAdapter(teacher, len(teacher.head.weight)),
    }
    taps = {side: method.taps(side, model, batch) for side, model in sides.items()}
    asked = LocalTeacher(sides["teacher"], "teacher", taps=taps["teacher"])
    tables = {"rectified": torch.zeros(4, dtype=torch.bool)}
    shapes = probe(method, classes, sides, taps, batch, tables)
    module = TrainModule(sides["student"], method, shapes, 1, taps=taps["student"], tables=tables).double()
    module.train_state.teacher = asked
    return module


def losses_of(module, batch):
    sums = module(batch, module.train_state.teacher(batch))
    count = Counts.of(batch, "token_mean", {})
    return {name: count.divide(name, value) for name, value in sums.values.items()}, sum(
        count.divide(name, value) for name, value in sums.losses.items()
    )


@pytest.fixture
def g():
    return golden("27-talking-models")


def golden_module(g, **options):
    weight = {name: g[f"param_{name}"] for name in ("s_low", "s_up", "s_head", "t_low", "t_up")}
    classes = len(weight["s_head"])
    student = Net(weight["s_low"], weight["s_up"], weight["s_head"])
    teacher = Net(weight["t_low"], weight["t_up"], torch.zeros(classes, len(weight["t_up"]), dtype=torch.float64))
    x = g["x"][:, :, None, None]
    batch = Batch({"pixel_values": x}, g["y"], torch.arange(len(x)))
    given = {
        "message_width": len(g["param_enc_s_low"]),
        "rounds": int(g["rounds"]),
        "interact_weight": float(g["w_interact"]),
        "message_weight": float(g["w_mc"]),
        "state_weight": float(g["w_sc"]),
    }
    module = talking(student, teacher, batch, **given | options)
    for name, part in module.own.items():
        way, side, place = name.split("_")
        part.weight.data = g[f"param_{way[:2]}c_{side[0]}_{place}"].clone()
        part.bias.data.zero_()
    return module, batch


@pytest.mark.golden
def test_golden_losses_and_gradients(g):
    module, batch = golden_module(g)
    found, total = losses_of(module, batch)
    close(found["ce"], g["loss_task"])
    for term, name in (("interact", "interact"), ("message", "mc"), ("state", "sc")):
        if g[f"w_{name}"]:
            close(found[term], g[f"loss_{name}"])
    close(total, g["loss_total"])
    total.backward()
    student = module.student.model
    for name, part in {"s_low": student.low[0], "s_up": student.up[0], "s_head": student.head}.items():
        close(part.weight.grad, g[f"grad_{name}"])
    for name, part in module.own.items():
        way, side, place = name.split("_")
        close(part.weight.grad, g[f"grad_{way[:2]}c_{side[0]}_{place}"])
    assert all(p.grad is None for p in module.train_state.teacher.model.parameters())


@pytest.mark.golden
def test_golden_parts_of_the_losses(g):
    def said(way, place, states):
        return torch.nn.functional.linear(states, g[f"param_{way}_{place}"])[:, None]

    def state(name):
        return g[name][:, None]

    low, high = (
        Compared(said("enc", f"s_{p}", g[f"student_{p}"]), said("enc", f"t_{p}", g[f"teacher_{p}"]))
        for p in ("low", "high")
    )
    close(mean_square(low).mean(), g["loss_mc_low"])
    close(mean_square(high).mean(), g["loss_mc_high"])
    close(message_consistency(low, high).mean(), g["loss_mc"])
    own, heard = (Compared(said("dec", "t_high", m[:, 0]), state("teacher_high")) for m in (high.wanted, high.found))
    close((mean_square(own) + mean_square(heard)).mean(), g["loss_sc_own"])
    rounds = []
    for i in range(int(g["rounds"])):
        found = {
            k: state(f"r{i}_{k}") for k in ("teacher_low_decoded", "teacher_high_response", "student_high_decoded")
        }
        pairs = zip(found.values(), ("teacher_low", "teacher_high", "student_high"), strict=True)
        rounds.append(RoundStates(*(Compared(f, state(w)) for f, w in pairs)))
        close(sum(mean_square(pair) for pair in rounds[-1]).mean(), g[f"r{i}_loss_sc"])
    close(state_consistency(own, heard, rounds).mean(), g["loss_sc"])


@pytest.mark.golden
def test_golden_states_of_each_round(g):
    module, batch = golden_module(g)
    state, method = module.train_state, module.method
    outputs = {"student": (module.student(batch, taps=state.taps), module.student)}
    outputs["teacher"] = (state.teacher(batch), state.teacher.model)
    taps = {f"{side}_{p}": out.taps[p] for side, (out, _) in outputs.items() for p in ("low", "high")}
    own = {name: states_of(tap, outputs[name.split("_")[0]][1], batch) for name, tap in taps.items()}
    for name, tap in taps.items():
        close(tap, g[name])
    close(outputs["student"][0].signal.logits, g["student_logits"])
    rounds = method._rounds(own, taps, batch, state)
    assert len(rounds) == int(g["rounds"])
    said = own["student_low"]
    for i, states in enumerate(rounds):
        close(said.encoded(module.own["encode_student_low"]).values[:, 0], g[f"r{i}_msg_student"])
        if i + 1 < len(rounds):
            again = states.student_high.encoded(module.own["encode_student_high"])
            said = again.decoded(module.own["decode_student_low"], own["student_low"])
        with entered(state.taps["high"], as_output(states.student_high, taps["student_high"]), module.student):
            close(module.student(batch).signal.logits, g[f"r{i}_logits_interact"])
        close(states.teacher_low.values[:, 0], g[f"r{i}_teacher_low_decoded"])
        close(states.teacher_high.values[:, 0], g[f"r{i}_teacher_high_response"])
        close(states.student_high.values[:, 0], g[f"r{i}_student_high_decoded"])
        messages = states.teacher_high.encoded(module.own["encode_teacher_high"])
        close(messages.values[:, 0], g[f"r{i}_msg_teacher"])
        answered = method._answered(states.student_high, taps["student_high"], batch, state)
        close(answered.mean(), g[f"r{i}_loss_interact"])


@pytest.fixture
def pair():
    """Student and teacher of unlike widths, and a batch of 6, in float64."""
    torch.manual_seed(0)

    def net(inputs, low, high, classes):
        return Net(*(torch.randn(o, i).double() for i, o in ((inputs, low), (low, high), (high, classes))))

    x = torch.randn(6, 5, 1, 1).double()
    return net(5, 4, 3, 2), net(5, 8, 7, 9), Batch({"pixel_values": x}, torch.tensor([0, 1] * 3), torch.arange(6) + 40)


def test_without_weights_it_is_training_on_labels(pair):
    student, teacher, batch = pair
    module = talking(student, teacher, batch, interact_weight=0, message_weight=0, state_weight=0)
    found, total = losses_of(module, batch)
    assert list(found) == ["ce"] and not len(module.own)
    close(total, nn.functional.cross_entropy(student(batch.inputs["pixel_values"]), batch.labels))


def test_gradient_reaches_the_student_through_the_frozen_teacher(pair):
    student, teacher, batch = pair
    module = talking(student, teacher, batch, message_weight=0, state_weight=0, interact_weight=1.0)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    found = module(batch, module.train_state.teacher(batch)).losses["interact"]
    parts = {"student": student.low, "encoder": module.own["encode_student_low"]}
    for name, part in parts.items():
        (gradient,) = torch.autograd.grad(
            found, part.parameters() if name == "student" else [part.weight], retain_graph=True
        )
        assert gradient.abs().max() > 1e-3, name
    found.backward()
    assert student.up[0].weight.grad is None  # a round enters the student above
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    torch.optim.Adam(module.parameters()).step()
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_lower_decoder_of_the_student_is_of_later_rounds(pair):
    one = talking(*pair)
    assert "decode_student_low" not in one.own
    two = talking(*pair, rounds=2)
    _, total = losses_of(two, pair[2])
    total.backward()
    assert two.own["decode_student_low"].weight.grad.abs().max() > 0
    # Every module that is made has a gradient, whatever is left out.
    for left in ("interact_weight", "message_weight", "state_weight"):
        module = talking(*pair, **{left: 0})
        losses_of(module, pair[2])[1].backward()
        assert all(p.grad is not None for p in module.parameters()), left


def test_equal_models_that_pass_on_their_states_agree(pair):
    batch = pair[2]
    square = Net(torch.randn(5, 5).double(), torch.randn(5, 5).double(), torch.randn(2, 5).double())
    module = talking(square, copy.deepcopy(square), batch, message_width=5)
    for part in module.own.values():
        part.weight.data, part.bias.data = torch.eye(5).double(), torch.zeros(5).double()
    found, _ = losses_of(module, batch)
    assert found["message"].abs() < 1e-20 and found["state"].abs() < 1e-20
    close(found["interact"], found["ce"])


def test_one_term_alone_is_feature_regression_through_two_linear_layers():
    h, t = torch.randn(4, 1, 3).double(), torch.randn(4, 1, 5).double()
    encoder, decoder = torch.randn(3, 2).double(), torch.randn(2, 5).double()
    projected = (h @ encoder @ decoder).requires_grad_()
    same = Compared(t, t)
    found = state_consistency(same, Compared(projected, t), [RoundStates(same, same, same)])
    close(found, hint_mse(projected[:, 0], t[:, 0]))


def test_equal_rounds_count_as_one_and_what_is_wanted_has_no_gradient():
    states = [torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    compared = [Compared(a, b) for a, b in zip(states, states[1:] + states[:1], strict=True)]
    one = RoundStates(*compared[:3])
    close(state_consistency(compared[0], compared[1], [one] * 3), state_consistency(compared[0], compared[1], [one]))
    wanted = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    pair = Compared(states[0], wanted)
    state_consistency(pair, pair, [RoundStates(pair, pair, pair)]).sum().backward()
    assert wanted.grad is None and states[0].grad.abs().max() > 0
    message_consistency(pair, pair).sum().backward()
    assert wanted.grad.abs().max() > 0


def test_positions_that_do_not_count_leak_into_neither_value_nor_gradient():
    a, b = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, True, False], [False, False, False]])
    a[~mask], b[~mask] = torch.inf, torch.nan
    a.requires_grad_()
    values = mean_square(Compared(a, b, mask))
    close(values[0], (a[0, :2] - b[0, :2]).square().mean())
    assert values[1] == 0
    values.sum().backward()
    assert a.grad.isfinite().all() and a.grad[~mask].eq(0).all()
    assert torch.autograd.gradcheck(lambda x: mean_square(Compared(x, b[:1, :2])), a[:1, :2].detach().requires_grad_())


@pytest.mark.parametrize("ignored", [False, True])
def test_the_gradient_of_a_batch_is_that_of_its_parts(pair, ignored):
    student, teacher, batch = pair
    if ignored:
        batch.labels[1] = -100
        batch.inputs["pixel_values"][1] = 1e3
    module = talking(student, teacher, batch, rounds=2)
    ends = []
    kept = [i for i in range(6) if not ignored or i != 1]
    for parts in ([range(6)], [range(2), range(2, 3), range(3, 6)], [kept]):
        module.zero_grad()
        for part in (batch.take(torch.tensor(list(p))) for p in parts):
            sum(module(part, module.train_state.teacher(part)).losses.values()).backward()
        ends.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    close(ends[0], ends[1], atol=1e-9)
    close(ends[0], ends[2], atol=1e-9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"student_low": "up", "student_high": "low"},
            "student_low before a layer student_high .* are up and low. In order, it",
        ),
        ({"teacher_high": "uup"}, "no layer 'uup'. Did you mean 'up'"),
        ({"teacher_low": "head"}, "needs a layer teacher_low before .* has: low.0, low.1, low, up.0, up.1, up."),
    ],
)
def test_layers_that_cannot_be_cut_are_refused(pair, options, says):
    with pytest.raises(InputError, match=says):
        talking(*pair, **options)


def test_bad_input(pair):
    student, teacher, batch = pair
    for options in ({"rounds": 0}, {"message_weight": -0.1}, {"message_width": 0}):
        with pytest.raises(ValueError, match="greater than or equal to"):
            TalkingModels(**options)
    with pytest.raises(InputError, match="no round to compare"):
        state_consistency(Compared(*torch.zeros(2, 1, 1, 1)), Compared(*torch.zeros(2, 1, 1, 1)), [])
    with pytest.raises(InputError, match=r"\(1, 1, 2\) is compared with \(1, 3, 2\)"):
        mean_square(Compared(torch.zeros(1, 1, 2), torch.zeros(1, 3, 2)))
    module = talking(student, teacher, batch)
    teacher.up[0].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="teacher's states at its high layer are nan for example 40"):
        losses_of(module, batch)
    with pytest.raises(InputError, match="has no linear head"):
        TalkingModels().taps("student", ClassifierAdapter(nn.Flatten(), 5), batch)
