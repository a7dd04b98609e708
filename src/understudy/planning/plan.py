"""From a recipe to memory by component, operations by role, and hours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from understudy.errors import InputError
from understudy.planning.cost_trace import Answer, Seen, evaluation, head_calls, step
from understudy.planning.machine import CONTEXT, Machine, machine, resident
from understudy.planning.setting import Setting, answer_of, outlines, setting
from understudy.planning.sizes import Side, optimizer_bytes, side
from understudy.runs.recipe import Recipe, load, make, own_training
from understudy.teachers.cache.codecs import DEFAULT, Support, row_bytes
from understudy.training import Pipeline

Shard = Literal["none", "student", "both"]
DISK = 1e9
"""Read speed of a cache in bytes per second: an ordinary NVMe disk."""
SUPPORTS = (DEFAULT, "top_k:50", "hidden", "dense")


@dataclass(frozen=True)
class Plan:
    """Predicted memory, time and cost of a recipe on each device.

    Args:
        machine, gpus, shard: the devices, and what FSDP2 shards over them.
        sides: sizes of `student` and `teacher`.
        memory: bytes by component in a training step.
        phases: bytes of each phase, process included; the peak is the largest of them.
        limit: memory of the device, bytes.
        work: of one optimizer step on one device, by role: `flops`, `attention` (part of them), `bytes`, `seconds`,
            `floor`.
        step_seconds, floor_seconds: estimated time of a step, and operations ÷ peak.
        steps, rows: of the run; `rows` are tokens or images trained on, over all devices.
        unit: name of the rows.
        cache: by support: bytes per row, bytes on disk, and the number of passes over the data from which it is cheaper
            than a live teacher.
        speed_up: factor by which a cache shortens a step; `None` if no teacher is used in steps.
        first: the plan of a teacher that is trained before.
    """

    machine: Machine
    gpus: int
    shard: str
    sides: dict[str, Side]
    memory: dict[str, int]
    phases: dict[str, int]
    limit: int
    work: dict[str, dict[str, float]]
    step_seconds: float
    floor_seconds: float
    steps: int
    rows: int
    unit: str
    cache: dict[str, dict[str, float | None]] = field(default_factory=dict)
    speed_up: float | None = None
    first: Plan | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    @property
    def verdict(self) -> str:
        """The result as one line."""
        name = max(self.phases, key=lambda phase: self.phases[phase])
        fits = "Fits" if self.fits else "Does not fit"
        where = "a device" if self.machine.gpu else "this machine"
        return (
            f"{fits} in the {self.limit / 2**30:.1f} GiB of {where}: it takes {self.peak / 2**30:.2f} GiB "
            f"at its most ({name})."
        )

    @property
    def percent_of_floor(self) -> float:
        return 100 * self.floor_seconds / self.step_seconds

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    @property
    def device_hours(self) -> float:
        return self.hours * self.gpus

    def as_json(self) -> dict[str, Any]:
        """All values, derived ones too, as plain data."""
        values = dataclasses.asdict(dataclasses.replace(self, first=None))
        for name in ("peak", "fits", "verdict", "percent_of_floor", "hours", "device_hours"):
            values[name] = getattr(self, name)
        return values | {"first": self.first.as_json() if self.first is not None else None}


def plan(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    gpu: str | None = None,
    gpus: int = 1,
    peak: float | None = None,
    bandwidth: float | None = None,
    memory: float | None = None,
    shard: Shard | None = None,
    rows: float | None = None,
    support: str | None = None,
    generate: int = 0,
    **keys: Any,
) -> Plan:
    """Plan a recipe from configurations alone. No weights are read, and no data if the number of steps is given.

    Args:
        recipe: as in `distill`; `keys` override it.
        gpu: a GPU of `CARDS`; this machine's CPU if not given.
        gpus: number of devices; each processes its own batches.
        peak: TFLOP/s, overrides the data sheet.
        bandwidth: TB/s, overrides the data sheet.
        memory: GiB, overrides the data sheet.
        shard: what FSDP2 shards over the devices; by default from `trainer.fsdp` and `teacher.device=sharded`.
        rows: number of tokens or images to train on, instead of the trainer's steps.
        support: of a teacher's cache that is not captured yet (`sampled:38B`).
        generate: tokens that a student generates per example.

    Raises:
        InputError: a configuration that cannot be read, a task or method that cannot be planned, invalid numbers.
    """
    base = load(recipe) if isinstance(recipe, (str, Path)) else recipe
    made = make({**(base.dump() if isinstance(base, Recipe) else dict(base or {})), **keys})
    if gpus < 1:
        raise InputError(f"gpus is {gpus} and must be at least 1.")
    if shard not in (None, "none", "student", "both"):
        raise InputError(f"shard is {shard!r} and must be none, student or both.")
    support = str(Support.parse(support or DEFAULT))
    device = machine(gpu, peak, bandwidth, memory)
    return _plan(made, device, gpus, shard, rows, support, generate)


def _plan(
    recipe: Recipe, device: Machine, gpus: int, shard: str | None, rows: float | None, support: str, generate: int
) -> Plan:
    method = recipe.build_method()
    if isinstance(method, Pipeline):
        raise InputError(
            f"Method {recipe.method!r} is a procedure of several runs: plan the runs it makes, one by one."
        )
    asked = setting(recipe, device, gpus, shard, rows)
    student, teacher = outlines(recipe, asked)
    answer = answer_of(recipe, asked, teacher, support)
    sides = {"student": side(student)}
    if teacher is not None:
        assert recipe.teacher is not None
        sides["teacher"] = side(teacher, recipe.teacher.quantization)
    optimizer = optimizer_bytes(str(recipe.trainer.get("optim", "adamw")), student, asked.notes)
    # Gradients that are sharded or in a wider dtype than activations are counted separately.
    apart = asked.shard != "none" or asked.mixed
    seen = step(
        device,
        asked.as_computed(student),
        answer,
        asked.shape(asked.batch),
        head_calls(method),
        twice=asked.accumulation > 1,
        keep_gradients=not apart,
    )
    judged = evaluation(device, student, answer.model, asked.shape(asked.evaluation_batch))
    components = _components(recipe, asked, sides, answer, optimizer, seen)
    held = {k: v for k, v in components.items() if "gradients" not in k and k not in _TRANSIENT}
    phases = {"training step": sum(components.values())}
    phases[f"evaluation, {asked.evaluation_batch} at a time"] = sum(held.values()) + sum(judged.peak.values())
    if not device.gpu:  # writing a checkpoint copies it
        phases["checkpoint"] = sum(held.values()) + max(optimizer, sides["student"].weights)
    work, seconds, floor = _time(asked, sides, seen, optimizer, generate)
    if gpus > 1:
        asked.notes.append("Time on the wires between devices is not counted.")
    first = None
    if recipe.teacher is not None and recipe.teacher.train is not None and recipe.teacher.cache is None:
        first = _plan(own_training(recipe, "teacher", recipe.output), device, gpus, shard, None, support, 0)
    cache, speed_up = _caches(asked, teacher, answer.model is not None, work, seconds)
    return Plan(
        machine=device,
        gpus=gpus,
        shard=asked.shard,
        sides=sides,
        memory=components,
        phases=phases,
        limit=int(device.memory),
        work=work,
        step_seconds=seconds,
        floor_seconds=floor,
        steps=asked.steps,
        rows=asked.rows,
        unit=asked.unit,
        cache=cache,
        speed_up=speed_up,
        first=first,
        notes=asked.notes,
    )


_TRANSIENT = ("student activations", "head tiles", "teacher activations and targets")


def _components(
    recipe: Recipe, asked: Setting, sides: dict[str, Side], answer: Answer, optimizer: int, seen: Seen
) -> dict[str, int]:
    """Memory on one device in a training step, in bytes by component."""
    student, parts = sides["student"], asked.gpus if asked.shard != "none" else 1
    found = {"student weights": student.weights // parts, "optimiser": optimizer // parts}
    found["gradients"] = seen.peak.get("gradients", 0)
    if asked.shard != "none" or asked.mixed:
        found["gradients"] = student.trained_bytes // parts
    if parts > 1:  # the present and the next block, a gradient being reduced, and weights outside of blocks
        found["gathered blocks"] = 3 * student.largest + student.outside
    elif asked.gpus > 1:
        found["gradients, DDP's buckets"] = student.trained_bytes
    if asked.mixed:
        found["half-precision copies of weights"] = student.matrices * 2 // parts
    found["student activations"] = seen.peak.get("student", 0)
    found["head tiles"] = seen.peak.get("head", 0)
    if answer.model is not None and recipe.teacher is not None:
        place = recipe.teacher.device
        if asked.gpu and place == "cpu":
            asked.notes.append("The teacher lives on the host: its weights and products are not the card's.")
        else:
            divided = asked.gpus if asked.shard == "both" else 1
            found["teacher weights"] = sides["teacher"].weights // divided
            if divided > 1:
                found["teacher's gathered blocks"] = 2 * sides["teacher"].largest + sides["teacher"].outside
    if answer.head is not None and answer.model is None:
        found["teacher's head"] = answer.head.numel() * answer.head.itemsize
    if seen.peak.get("teacher"):
        found["teacher activations and targets"] = seen.peak["teacher"]
    found["process"] = CONTEXT if asked.gpu else resident()
    return found


def _time(
    asked: Setting, sides: dict[str, Side], seen: Seen, optimizer: int, generate: int
) -> tuple[dict[str, dict[str, float]], float, float]:
    """Work by role of one optimizer step on one device, its seconds and its floor."""
    scale = asked.accumulation
    work = {role: {k: v * scale for k, v in dataclasses.asdict(w).items()} for role, w in seen.work.items()}
    student, device = sides["student"], asked.machine
    if generate:  # decoding reads all weights once per token of the batch
        flops = 2.0 * student.active * asked.batch * generate * scale
        reads = float(student.weights) * generate * scale
        floor = flops / device.peak(asked.itemsize)
        work["generate"] = {
            "flops": flops,
            "attention": 0.0,
            "bytes": reads,
            "seconds": max(floor, reads / device.bandwidth),
            "floor": floor,
        }
    parts = asked.gpus if asked.shard != "none" else 1
    moved = (3 * student.trained_bytes + 2 * optimizer) / parts  # weights and state read and written, gradients read
    work["optimiser"] = {
        "flops": 0.0,
        "attention": 0.0,
        "bytes": moved,
        "seconds": moved / device.bandwidth,
        "floor": 0.0,
    }
    return work, sum(w["seconds"] for w in work.values()), sum(w["floor"] for w in work.values())


def _caches(
    asked: Setting, teacher: Any, live_teacher: bool, work: dict[str, dict[str, float]], seconds: float
) -> tuple[dict[str, dict[str, float | None]], float | None]:
    """Size on disk of a cache of the teacher, the number of passes from which it is cheaper, and the speed-up of a
    step.

    Capturing costs one live pass. p passes cost p · live without a cache and live + p · read with one.
    """
    if teacher is None:
        return {}, None
    live = work.get("teacher", {}).get("seconds", 0.0) if live_teacher else 0.0
    found: dict[str, dict[str, float | None]] = {}
    for support in SUPPORTS:
        width = asked.teacher_width
        if support == "hidden" and width is None:
            continue
        each = row_bytes(Support.parse(support), asked.classes, width or 0)
        read = each * asked.batch * asked.accumulation * asked.rows_each / DISK
        passes = live / (live - read) if live > read else None
        found[support] = {"bytes_per_row": each, "bytes": each * asked.distinct, "pays_after_passes": passes}
    return found, seconds / (seconds - live) if live else None
