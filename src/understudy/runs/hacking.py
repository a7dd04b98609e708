"""The distance of a run's student from an oracle and from its teacher, at every evaluation and at the end (paper 20)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from understudy.errors import InputError
from understudy.evaluation.hacking import HeldOut, curve_of, verdict
from understudy.models import ModelAdapter
from understudy.runs.recipe import Recipe
from understudy.runs.teachers import load_model, writing_teacher
from understudy.tasks import Prepared, Task
from understudy.teachers import LocalTeacher, Teacher
from understudy.training.arguments import training_arguments

PAGE = {
    "when": "To know whether a recipe brings the student nearer to the truth or to the teacher alone. Name a stronger model as "
    "`oracle` in any recipe of a language model with a live teacher: at every evaluation both continue held-out prompts, and "
    "`golden` (oracle to student) and `proxy` (teacher to student) are measured, drawn in the report and judged. Where the "
    "texts come from is `on_policy`: `teacher_share: 1` with `generations: m` is offline data of m texts a prompt, without "
    "`generations` it is online data of the teacher, `teacher_share: 0` online data of the student, and `fraction` or "
    "`replay` mix them. What helps, in this order: fresh texts, more prompts, more texts a prompt, an earlier end.",
    "not": "Without a model that is clearly better than the teacher: the golden distance would be one to another teacher. The "
    "power law alone, which needs no oracle, says only that training has changed its course.",
    "deviations": "The rule that names a curve hacking, and the band around the power law, are ours; the paper shows curves. "
    "Distances are forward KL of whole texts, along texts of the first side, over the whole vocabulary.",
}
EXAMPLE = """
task: language_modeling
method: forward_kl
options: {ce_weight: 0, kd_weight: 1, temperature: 1}
data: my_prompts
teacher: runs/teacher/student
student: runs/start/student
oracle: {model: stronger_model, prompts: 500, max_new_tokens: 128}
on_policy: {fraction: 1, teacher_share: 1, generations: 1}
trainer: {num_train_epochs: 50, eval_strategy: epoch, eval_on_start: true}
"""


class Hacking:
    """Does a student that nears its teacher near the truth? Both distances on held-out prompts, at every evaluation.

    Args:
        oracle: the model that `oracle_of` returned.
        teacher: of the run; an error if it cannot write.
        folder: of the run.
    """

    def __init__(
        self, recipe: Recipe, prepared: Prepared, oracle: ModelAdapter, teacher: Teacher | None, folder: Path
    ) -> None:
        assert recipe.oracle is not None
        place = recipe.oracle.device or training_arguments(recipe.trainer, folder, recipe.seed).device
        self.recipe, self.prepared, self.folder = recipe, prepared, folder
        self.oracle = writing_teacher(LocalTeacher(oracle, recipe.oracle.model, place))
        self.teacher = writing_teacher(teacher)
        self._held: dict[str, HeldOut] = {}

    def measure(self, student: ModelAdapter, split: str = "validation") -> dict[str, float]:
        """The distances on a split, whose texts are written when it is first asked for."""
        spec, prepared = self.recipe.oracle, self.prepared
        assert spec is not None
        if split not in self._held:
            data = prepared.split(split)
            self._held[split] = HeldOut(
                self.oracle,
                self.teacher,
                [data[i] for i in range(min(spec.prompts, len(data)))],
                prepared.tokenizer,
                prepared.collate,
                most=spec.max_new_tokens,
                seed=self.recipe.seed,
                batch=self.recipe.evaluation_batch,
            )
        return self._held[split].measure(student)

    def finish(self, student: ModelAdapter) -> dict[str, float]:
        """The distances on the evaluation's split, and what the curves of validation say."""
        found = self.measure(student, self.recipe.eval_split)
        curve = curve_of(self.folder)
        if curve is not None:
            said = verdict(curve.golden, curve.proxy, loss=curve.loss)
            found |= {"golden_rise": said.rise, "proxy_drop": said.proxy_drop, "hacking": float(said.hacking)}
        return found

    def notes(self) -> list[str]:
        """What share of the texts did not end."""
        shares = [
            f"{held.unended[name]:.0%} of the {writer}'s on {split}"
            for split, held in self._held.items()
            for name, writer in (("golden", "oracle"), ("proxy", "teacher"))
        ]
        return [f"Texts without an end within oracle.max_new_tokens: {', '.join(shares)}."]


def oracle_of(recipe: Recipe, task: Task, prepared: Prepared) -> ModelAdapter | None:
    """The recipe's oracle, or `None`."""
    if recipe.oracle is None:
        return None
    if prepared.aligner is not None:
        raise InputError(
            "oracle, teacher and student share one vocabulary, and this teacher has another: leave oracle out."
        )
    return load_model(task, recipe.oracle, prepared)


def with_distances(metrics: Mapping[str, float], hacking: Hacking | None, student: ModelAdapter) -> dict[str, float]:
    """The metrics of an evaluation during training, with the distances if they are measured."""
    return {**metrics, **(hacking.measure(student) if hacking is not None else {})}
