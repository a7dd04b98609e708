"""27. Talking Models: Distill Pre-trained Knowledge to Downstream Models via Interactive Communication (2023).

Student and frozen teacher exchange messages. Encoders E turn a model's states into messages, decoders D turn messages into
states of the listener, at a lower layer l and a higher layer h of each model. In a round the teacher gets the student's
message, computes with its own layers from l to h, and answers:

    g_l = D_T,l(E_S,l(a)),   g_h = upper_T(g_l),   s_h = D_S,h(E_T,h(g_h)),   a = h_S,l, and D_S,l(E_S,h(s_h)) from then on
    loss = CE(head_S(h_S,h)) + w_I mean over rounds of CE(head_S(s_h)) + w_MC L_MC + w_SC L_SC
    L_MC = mse(E_S,l(h_S,l), E_T,l(h_T,l)) + mse(E_S,h(h_S,h), E_T,h(h_T,h))
    L_SC = mse(D_T,h(E_T,h(h_T,h)), h_T,h) + mse(D_T,h(E_S,h(h_S,h)), h_T,h)
           + mean over rounds of [mse(g_l, h_T,l) + mse(g_h, h_T,h) + mse(s_h, h_S,h)]
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.losses import cross_entropy
from understudy.losses.checks import check_finite
from understudy.losses.messages import Compared, RoundStates, message_consistency, state_consistency
from understudy.models import ModelAdapter, ModelOutput, find_head
from understudy.models.messages import States, as_output, compared, states_of
from understudy.models.taps import called_layers, entered, first_block, inner, layer
from understudy.streaming import rowwise
from understudy.teachers import LocalTeacher
from understudy.training import Method, Requirements, SetupContext, Shapes, Term, TrainState
from understudy.training.shapes import look

log = logging.getLogger(__name__)

Side = Literal["student", "teacher"]
CONSTANT = 1e-6
"""Variance below which messages say nothing."""
PLACES = ("student_low", "student_high", "teacher_low", "teacher_high")


class _Round(NamedTuple):
    """States after a round: what the teacher decodes, what it makes of that, and what the student decodes."""

    teacher_low: States
    teacher_high: States
    student_high: States


class TalkingModels(Method):
    """Messages to a frozen teacher, which computes with its own layers, and back."""

    name = "talking-models"
    paper = 27
    kinds = frozenset({"classification"})
    cost = (
        "as kd, and a round one more forward of the student and a forward and backward of the teacher's upper layers; eight "
        "linear layers of width × message width at most"
    )
    page: ClassVar[dict[str, str]] = {
        "when": "A teacher that was trained for another task or on other data, of any width: its states are read, and its "
        "classes are not. The student is used alone.",
        "not": "Where the teacher knows the task's classes and `kd` is possible, which reaches as much for less. When only "
        "the teacher's outputs are known.",
        "deviations": "The paper's text and abstract leave the two consistency losses, weights, layers and message width open; "
        "those here are ours. Encoders and decoders are linear and apply to each position; a decoder ends in ReLU where the "
        "layer that it stands for has no negative state. Positions that differ are averaged or repeated (`models/messages.py`). "
        "The teacher is frozen and its states are computed anew, not stored. It reads the student's own input, in the form "
        "that its processor or tokenizer gives it. Ratings, the paper's other task, are classes here.",
    }

    message_width: int = Field(32, ge=1, description="m, numbers in a message.")
    rounds: int = Field(1, ge=1, description="N, rounds of messages.")
    interact_weight: float = Field(0.3, ge=0, description="w_I, of the cross-entropy after a round.")
    message_weight: float = Field(1.0, ge=0, description="w_MC, of how far messages of both models are apart.")
    state_weight: float = Field(1.0, ge=0, description="w_SC, of how far decoded states are from the listener's.")
    student_low: str | None = Field(None, description="Layer l of the student; its first block if not given.")
    student_high: str | None = Field(None, description="Layer h; the last before the head if not given.")
    teacher_low: str | None = Field(None, description="Likewise, of the teacher.")
    teacher_high: str | None = Field(None, description="Likewise, of the teacher.")

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher_layers=True, teacher_classes=False)

    @property
    def _talks(self) -> bool:
        """Whether there are rounds."""
        return bool(self.interact_weight or self.state_weight)

    # -- before training --------------------------------------------------------------------------------------------

    def taps(self, side: Side, model: ModelAdapter, batch: Batch) -> Mapping[str, nn.Module]:
        head = find_head(model)
        if head is None:
            raise InputError(
                f"The {side}, a {type(model.model).__name__}, has no linear head that its states are read by: method "
                f"{self.name!r} needs one."
            )
        calls = inner(called_layers(model.model, lambda: look(model, batch)), head, len(batch.ids))
        names = {"low": getattr(self, f"{side}_low"), "high": getattr(self, f"{side}_high")}
        chosen = {place: layer(model.model, name) for place, name in names.items() if name is not None}
        if calls:
            chosen.setdefault("high", calls[-1][0])
        order = [module for module, _ in calls]
        end = order.index(chosen["high"]) if chosen.get("high") in order else 0
        # What has the same output as the higher layer, such as its container, is no lower one.
        below = [(module, y) for module, y in calls[:end] if y is not calls[end][1]]
        first = first_block(model.model, below)
        if first is not None:
            chosen.setdefault("low", first)
        if chosen.get("low") not in [module for module, _ in below]:
            known = {module: name for name, module in model.model.named_modules()}
            cuts = ", ".join(known[m] for m in dict.fromkeys(order) if known.get(m))
            raise InputError(
                f"Method {self.name!r} needs a layer {side}_low before a layer {side}_high of the {side}, and these are "
                f"{names['low'] or 'the first block'} and {names['high'] or 'the last before the head'}. In order, it has: {cuts}."
            )
        return {place: chosen[place] for place in ("low", "high")}

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        """Which of the four layers have no negative state on a batch of the training data."""
        assert context.teacher is not None
        batch = next(context.batches("train"))
        ours = look(context.student, batch, taps=self.taps("student", context.student, batch)).taps
        theirs = context.teacher(batch).taps
        return {"rectified": torch.tensor([bool((t[p] >= 0).all()) for t in (ours, theirs) for p in ("low", "high")])}

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        outputs = {
            f"{side}_{place}": taps[place]
            for side, taps in (("student", shapes.taps), ("teacher", shapes.teacher_taps))
            for place in ("low", "high")
        }
        widths = {name: shape[0] if len(shape) == 3 else shape[-1] for name, shape in outputs.items()}
        rectified = dict(zip(PLACES, shapes.tables["rectified"].tolist(), strict=True))
        heard, told, again = self._talks, bool(self.message_weight), self._talks and self.rounds > 1
        used = {
            "encode_student_low": heard or told,
            "encode_student_high": told or bool(self.state_weight) or again,
            "encode_teacher_low": told,
            "encode_teacher_high": heard or told,
            "decode_student_low": again,
            "decode_student_high": heard,
            "decode_teacher_low": heard,
            "decode_teacher_high": bool(self.state_weight),
        }
        found: dict[str, nn.Module] = {}
        for name in (name for name, needed in used.items() if needed):
            way, place = name.split("_", 1)
            ends = (widths[place], self.message_width)
            found[name] = nn.Linear(*ends) if way == "encode" else nn.Linear(*ends[::-1])
            if way == "decode" and rectified[place]:
                found[name] = nn.Sequential(found[name], nn.ReLU())
        return found

    # -- the loss ---------------------------------------------------------------------------------------------------

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None and isinstance(state.teacher, LocalTeacher) and state.student is not None
        terms = {"ce": Term(rowwise(cross_entropy, student.signal, None, batch.row_labels))}
        if not state.modules:
            return terms
        sides = {"student": (student, state.student), "teacher": (teacher, state.teacher.model)}
        taps = {f"{side}_{p}": out.taps[p] for side, (out, _) in sides.items() for p in ("low", "high")}
        own = {name: states_of(tap, sides[name.split("_")[0]][1], batch) for name, tap in taps.items()}
        _check_teacher(own, batch)
        modules = state.modules
        if self.message_weight:
            pairs = [
                compared(*(own[f"{side}_{p}"].encoded(modules[f"encode_{side}_{p}"]) for side in sides))
                for p in ("low", "high")
            ]
            terms["message"] = Term(batch.select(message_consistency(*pairs)), self.message_weight)
        # All examples take part, also those that do not count: ranks call sharded models equally often.
        rounds = self._rounds(own, taps, batch, state) if self._talks else []
        if self.interact_weight:
            values = [self._answered(r.student_high, taps["student_high"], batch, state) for r in rounds]
            terms["interact"] = Term(torch.stack(values).mean(0), self.interact_weight)
        if self.state_weight:
            terms["state"] = Term(batch.select(self._state_consistency(own, rounds, modules)), self.state_weight)
        return terms

    def _rounds(
        self, own: Mapping[str, States], taps: Mapping[str, Tensor], batch: Batch, state: TrainState
    ) -> list[_Round]:
        """The states of each round."""
        modules, teacher = state.modules, state.teacher
        assert isinstance(teacher, LocalTeacher)
        found: list[_Round] = []
        said = own["student_low"]
        for _ in range(self.rounds):
            if found:
                again = found[-1].student_high.encoded(modules["encode_student_high"])
                said = again.decoded(modules["decode_student_low"], own["student_low"])
            question = said.encoded(modules["encode_student_low"])
            low = question.decoded(modules["decode_teacher_low"], own["teacher_low"])
            output = teacher.resumed(batch, "low", as_output(low, taps["teacher_low"])).taps["high"]
            high = states_of(output, teacher.model, batch)
            answer = high.encoded(modules["encode_teacher_high"])
            found.append(_Round(low, high, answer.decoded(modules["decode_student_high"], own["student_high"])))
        return found

    def _answered(self, heard: States, like: Tensor, batch: Batch, state: TrainState) -> Tensor:
        """Cross-entropy of the student's own head on what the student decoded, `[rows]`."""
        assert state.student is not None
        with entered(state.taps["high"], as_output(heard, like), state.student):
            signal = state.student(batch).signal
        return rowwise(cross_entropy, signal, None, batch.row_labels)

    def _state_consistency(self, own: Mapping[str, States], rounds: list[_Round], modules: Any) -> Tensor:
        def against(found: States, name: str) -> Compared:
            return Compared(found.values, own[name].values, own[name].mask)

        decoded = [
            own[f"{side}_high"]
            .encoded(modules[f"encode_{side}_high"])
            .decoded(modules["decode_teacher_high"], own["teacher_high"])
            for side in ("teacher", "student")
        ]
        first, second = (against(d, "teacher_high") for d in decoded)
        each = [RoundStates(*(against(found, name) for name, found in r._asdict().items())) for r in rounds]
        return state_consistency(first, second, each)

    # -- the report -------------------------------------------------------------------------------------------------

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """How much the teacher's messages vary over examples: constant ones say nothing."""
        if "encode_teacher_high" not in state.modules:
            return {}
        assert isinstance(state.teacher, LocalTeacher)
        messages = []
        with torch.no_grad():
            for batch in context.batches(context.eval_split):
                states = states_of(state.teacher(batch).taps["high"], state.teacher.model, batch)
                messages.append(states.encoded(state.modules["encode_teacher_high"]).mean()[:, 0])
        variance = float(torch.cat(messages).var(0).mean())
        if variance < CONSTANT:
            log.warning(
                "The teacher's messages hardly differ between examples (variance %.1e): they say nothing. Raise "
                "options.state_weight, or name other layers.",
                variance,
            )
        return {"metrics": {"message_variance": variance}}


def _check_teacher(own: Mapping[str, States], batch: Batch) -> None:
    """Raise an error for an example for which the teacher has a state that is no number."""
    for name in ("teacher_low", "teacher_high"):
        values, _, text = own[name]
        counts = batch.mask[:, None].expand(values.shape[:2])
        check_finite(
            values.abs().amax(2),
            lambda value, row, position, name=name: (
                f"The teacher's states at its {name.split('_')[1]} layer are {value} for example {int(batch.ids[row])}: its "
                "weights are damaged, or dtype is too small."
            ),
            counts if text is None else counts & text,
        )
