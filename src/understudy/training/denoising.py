"""What methods that distil denoisers share: the two models, the examples to noise, and the teacher's own outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from understudy.data import NoiseBatch
from understudy.data.noise import normal, uniform
from understudy.data.noise_sets import ExampleSet
from understudy.errors import InputError
from understudy.models import DenoiserAdapter, ModelAdapter, evaluating
from understudy.models.diffusion import MixtureDenoiser, trajectory
from understudy.training.method import TrainState
from understudy.training.setup import SetupContext
from understudy.training.shapes import Shapes

EXAMPLES = "examples"
"""The split of `with_examples`."""


def denoiser(model: Any) -> DenoiserAdapter:
    """`model`, if it is a denoiser.

    Raises:
        InputError: it is none.
    """
    if not isinstance(model, DenoiserAdapter):
        raise InputError(
            "This method distils a denoiser into a denoiser: use task=image_generation or scene_completion, and models for these."
        )
    return model


def student_denoiser(student: ModelAdapter, context: SetupContext) -> DenoiserAdapter:
    """The student, if it is a denoiser that can be trained, of examples like the live teacher's.

    Raises:
        InputError: it is not.
    """
    model, teacher = denoiser(student), denoiser(context.live_teacher())
    if model.shape != teacher.shape:
        raise InputError(f"The student makes examples of {model.shape} and the teacher of {teacher.shape}.")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("The student has nothing to train: a closed form is a teacher only. Name a network.")
    return model


def sampled_like(student: ModelAdapter, context: SetupContext, steps: int, grid: int) -> DenoiserAdapter:
    """The student as `student_denoiser` has it, with the sampler of the teacher, in `steps` steps and without guidance.

    Args:
        grid: number of steps of the teacher whose times training uses.

    Raises:
        InputError: as `student_denoiser`; a schedule with fewer times than the grid; or two schedules.
    """
    model, teacher = student_denoiser(student, context), denoiser(context.live_teacher())
    times = teacher.levels.snap(teacher.times(grid))
    if not bool((times.diff() < 0).all()):
        raise InputError(f"{grid} steps are more than the teacher's schedule has times: lower their number in options.")
    for ours, theirs in zip(model.levels.at(times), teacher.levels.at(times), strict=True):
        if not torch.allclose(ours, theirs, rtol=0, atol=1e-4):
            raise InputError(
                "Student and teacher have noise schedules that differ, and both see the same noisy examples: name "
                "student=teacher, or a student with the teacher's scheduler."
            )
    model.clip = None  # a bound of x_0 stops the gradient
    guided = teacher.sampler.guided or teacher.sampler.guidance is not None
    model.sampler = replace(teacher.sampler, steps=steps, guidance=None, guided=guided)
    return model


def teacher_denoiser(state: TrainState) -> DenoiserAdapter:
    """The model of the teacher that the training steps ask."""
    teacher: Any = state.teacher
    return denoiser(teacher.model)


def ask_teacher(state: TrainState) -> Callable[[NoiseBatch], Tensor]:
    """The teacher's x_0 of a batch, detached, guided as its own sampler is."""
    teacher: Any = state.teacher
    model = denoiser(teacher.model)
    return lambda batch: model.guide(lambda b: teacher(b).signal.values, batch)


def score_network(shapes: Shapes) -> DenoiserAdapter:
    """A trainable copy of the teacher, or of the student where the teacher is a closed form, to learn other scores."""
    closed = shapes.teacher is not None and isinstance(shapes.teacher.model, MixtureDenoiser)
    found = copy.deepcopy(denoiser(shapes.student if closed else shapes.teacher)).requires_grad_(True)
    found.clip = None  # a bound of x_0 stops the gradient
    return found


@torch.no_grad()
def teacher_outputs(context: SetupContext, examples: Any, times: Tensor) -> Tensor:
    """The teacher's samples for `examples`, along `times` from the noise that an id and the run's seed give at step 0."""
    teacher = denoiser(context.live_teacher())
    home, parts = next(teacher.parameters()), []
    with evaluating(teacher):
        for batch in context.collated(examples, 256):
            assert isinstance(batch, NoiseBatch)
            eps, batch = normal(batch.ids, teacher.shape, seed=context.seed, step=0).to(home), batch.to(home.device)
            x = teacher.initial(batch, eps)
            parts.append(trajectory(teacher.denoise, teacher.levels, batch, x, times, eps).cpu())
    return torch.cat(parts)


def with_examples(context: SetupContext, samples: int) -> None:
    """Add the split `EXAMPLES`, whose batches hold `clean` examples: the training data's, or without data the teacher's samples.

    Args:
        samples: of the teacher, at most one for each training id.
    """
    train = context.splits["train"]
    if "clean" in next(context.batches("train", 1)).inputs:
        context.splits[EXAMPLES] = train
        return
    reference = train.reference
    if reference is not None and reference.examples is not None:
        clean, labels = reference.examples()
        context.splits[EXAMPLES] = ExampleSet(clean, labels if context.classes else torch.full_like(labels, -1))
        return
    teacher = denoiser(context.live_teacher())
    chosen = Subset(train, range(min(samples, len(train))))
    sampler = teacher.sampler
    settings = {"samples": len(chosen), "seed": context.seed, "steps": sampler.steps, "guidance": sampler.guidance}
    times = teacher.times(sampler.steps)
    taught = context.once("examples", lambda: {"x": teacher_outputs(context, chosen, times)}, **settings)
    context.splits[EXAMPLES] = ExampleSet(taught["x"], torch.tensor([chosen[i][1] for i in range(len(chosen))]))


def noise_for(batch: NoiseBatch, like: Tensor, state: TrainState, stream: int = 0) -> Tensor:
    """Noise of the shape and type of `like` for each example of an update."""
    return normal(batch.ids, like.shape[1:], seed=state.seed, step=state.step, stream=stream).to(like)


def time_for(batch: NoiseBatch, state: TrainState, stream: int) -> Tensor:
    """A uniform number in (0, 1) for each example of an update, float64."""
    return uniform(batch.ids, (), seed=state.seed, step=state.step, stream=stream)
