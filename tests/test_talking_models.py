"""Talking Models: golden vectors, limits, positions of messages, bad input."""

import pytest
import torch
from torch import nn

from golden_vectors import close, golden
from understudy.data import Batch
from understudy.losses.messages import Compared, RoundStates, mean_square, message_consistency, state_consistency
from understudy.methods.talking_models import TalkingModels
from understudy.models import ClassifierAdapter
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
    from understudy.models.messages import states_of

    taps = {f"{side}_{p}": out.taps[p] for side, (out, _) in outputs.items() for p in ("low", "high")}
    own = {name: states_of(tap, outputs[name.split("_")[0]][1], batch) for name, tap in taps.items()}
    for name, tap in taps.items():
        close(tap, g[name])
    close(outputs["student"][0].signal.logits, g["student_logits"])
    rounds = method._rounds(own, taps, batch, state)
    assert len(rounds) == int(g["rounds"])
    for i, states in enumerate(rounds):
        close(states.teacher_low.values[:, 0], g[f"r{i}_teacher_low_decoded"])
        close(states.teacher_high.values[:, 0], g[f"r{i}_teacher_high_response"])
        close(states.student_high.values[:, 0], g[f"r{i}_student_high_decoded"])
        messages = states.teacher_high.encoded(module.own["encode_teacher_high"])
        close(messages.values[:, 0], g[f"r{i}_msg_teacher"])
        answered = method._answered(states.student_high, taps["student_high"], batch, state)
        close(answered.mean(), g[f"r{i}_loss_interact"])
