"""Studies: teachers, students, methods and temperatures on a grid, or runs there are, by gain and by fidelity (paper 14).

Each pair of a teacher and a student is a comparison of all arms in a folder of its own, so a study resumes as they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator

from understudy.errors import InputError
from understudy.files import write_json
from understudy.methods import get as get_method
from understudy.reporting import render_study
from understudy.reporting.study import assemble
from understudy.runs.comparison import compare, places, read_arm, train_shared
from understudy.runs.executors import PROCESSES, Slurm, executor_of
from understudy.runs.folder import held
from understudy.runs.measured import Place, family_of, measured, places_of
from understudy.runs.recipe import Recipe, make, read_values, validated
from understudy.runs.run import inputs, trained_first
from understudy.runs.specs import ModelSpec
from understudy.tasks import get as get_task

PAGE = {
    "when": "To know whether distillation pays for your teachers and students, which method and temperature, and whether what "
    "is gained is the teacher's way of answering. It reports the gain over training alone with its interval over seeds, "
    "agreement (of classes, tokens, or parsed answers), the KL divergence or the BLEU of rationales, and which of the "
    "differences are real: a t-test of gains, an ANOVA across methods, rank correlations with size, scores, agreement and "
    "fidelity. SeqKD is `understudy generate` and then `sft`; token-level KL on the data is the arm `forward_kl`, RevKD "
    "`reverse_kl`, GKD `jsd` with `on_policy` (each with `ce_weight: 0`), noise `teacher_noise`, a teacher that does not "
    "know the task one without `train`.",
    "not": "With fewer than three teacher-student-method points there is no test, and a point's runs need a run of the same "
    "student, data and seed without a teacher.",
    "deviations": "A gain is paired over seeds. The paper takes the best temperature before it tests; the same tests with the "
    "temperature fixed stand beside it. BLEU is BLEU itself, not the cosine that the paper's table calls so. The 1e-9 that the "
    "official code adds to probabilities is left out. Correlations with KL have the opposite sign of those with BLEU.",
}
EXAMPLE = """
task: image_classification
data: {name: digits, limit: 150, teacher_limit: 900}
teachers:
  knows: {model: "mlp:256", train: {max_steps: 800}}
  unaware: {model: "mlp:256"}
students: ["mlp:6", "mlp:16", "mlp:64"]
arms:
  sft: {}
  fkl: {method: forward_kl, options: {ce_weight: 0}}
  rkl: {method: reverse_kl, options: {ce_weight: 0}}
temperatures: [1, 2, 5]
output: runs/study
"""


@dataclass(frozen=True)
class Study:
    """Result of a study: `table` has one point per data, teacher, student, method and τ; `folder` holds `study.json` and
    `report.html`; `data` is the content of the former."""

    table: list[dict[str, Any]]
    data: dict[str, Any]
    folder: Path


class Grid(BaseModel):
    """What a study has beside the keys of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teachers: dict[str, ModelSpec] = Field({}, description="By name; as `teacher`.")
    students: dict[str, ModelSpec] = Field({}, description="By name; as `student`.")
    temperatures: list[FiniteFloat] = Field([], description="τ of every arm that does not say its own.")
    baseline: str | None = Field(None, description="The arm that gains are measured against.")

    @field_validator("teachers", "students", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, list):
            value = {str(one): one for one in value}
        if not isinstance(value, dict):
            return value
        return {name: {"model": one} if isinstance(one, str) else one for name, one in value.items()}


def study(
    source: Mapping[str, Any] | str | Path | Sequence[str | Path],
    seeds: int | Sequence[int] = 3,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    baseline: str | None = None,
    workers: int | None = None,
    executor: str = PROCESSES,
    overwrite: bool = False,
    progress: bool = False,
) -> Study:
    """Does a taught student do better than one trained alone, and does it do so in its teacher's way?

    Args:
        source: a recipe with `teachers` and `students` by name, `arms`, `temperatures` and `baseline`, as a mapping or the
            path of a YAML file: every arm is trained with every teacher, student and seed. Or folders of finished runs,
            comparisons or studies, to be read.
        seeds: their number, or a list. Folders have their own.
        overrides: `key=value` of a recipe in a file.
        output: folder of the study, in place of the recipe's `output`.
        baseline: the arm, or for folders the method, that gains are measured against; by default the task's method
            without a teacher, which is added if no arm has it.
        workers: number of parallel runs of a comparison. executor: as of `compare`. overwrite: replace runs in the output
            folder.

    Started again on the same folder it resumes.

    Raises:
        InputError: any problem that the caller can fix, in one line.
    """
    folders = _folders(source)
    if folders is None:
        values = dict(source) if isinstance(source, Mapping) else read_values(source, overrides)  # type: ignore[arg-type]
        values |= {k: v for k, v in (("output", output), ("baseline", baseline)) if v is not None}
        return _grown(values, seeds, workers, executor, overwrite, progress)
    if overrides or output is None:
        given = f"Folders of runs are read as they are: leave out {overrides[0]}." if overrides else ""
        raise InputError(given or "A study of run folders needs a folder of its own: --output runs/study.")
    out = Path(output)
    with held(out, folders, several=True):
        return _written(out, [place for folder in folders for place in places_of(folder)], baseline)


def _folders(source: Any) -> list[Path] | None:
    """The folders of runs to read; `None` if `source` is a recipe."""
    if isinstance(source, Mapping):
        return None
    given = [Path(source)] if isinstance(source, (str, Path)) else [Path(one) for one in source]
    if len(given) == 1 and not given[0].is_dir():
        return None if isinstance(source, (str, Path)) or given[0].suffix in (".yaml", ".yml") else given
    return given


def _grown(
    values: Mapping[str, Any],
    seeds: int | Sequence[int],
    workers: int | None,
    executor: str,
    overwrite: bool,
    progress: bool,
) -> Study:
    """Train what is missing of a grid, and study it."""
    slurm = executor_of(executor)
    own = {key: values[key] for key in Grid.model_fields if values.get(key) is not None}
    grid: Grid = validated(Grid, own, "study key")
    for side in ("teacher", "student"):
        if side in values and getattr(grid, f"{side}s"):
            raise InputError(f"The study names {side} and {side}s: list all of them below {side}s.")
    rest = {k: v for k, v in values.items() if k not in Grid.model_fields and k != "arms"}
    given = values.get("arms") or {}
    if not isinstance(given, Mapping):
        raise InputError(f"arms is {given!r} and must map names to methods and their options.")
    base = make(rest)
    arms, families, baseline = _arms(base, given, grid)
    teachers = grid.teachers or {spec.model: spec for spec in (base.teacher,) if spec is not None}
    students = grid.students or {spec.model: spec for spec in (base.student,) if spec is not None}
    if not teachers or not students:
        raise InputError("A study needs a teacher and a student: name them below teachers and students.")
    folder = base.output
    pairs = {f"{t}, {s}": (t, s) for t in teachers for s in students}
    homes, cells = places(pairs, "Pairs"), {}
    for name, (teacher, student) in pairs.items():
        output = folder / "runs" / homes[name]
        sides = {"teacher": _plain(teachers[teacher]), "student": _plain(students[student])}
        cells[name] = make(rest | sides | {"output": str(output)})
        for arm in arms.values():  # what is wrong is said before anything is trained
            make(cells[name].dump() | arm)
    with held(folder, inputs(base), several=True):
        found: list[Place] = []
        for name, (teacher, student) in pairs.items():
            home = folder / "teachers" / places(teachers, "Teachers")[teacher]
            cell = _taught(cells[name], home, slurm, overwrite, progress)
            done = compare(
                cell,
                list(arms),
                seeds,
                arms=arms,
                workers=workers,
                executor=executor,
                overwrite=overwrite,
                progress=progress,
            )
            found += [
                Place(done.folder / r["folder"], teacher, student, families[r["method"]]) for r in done.data["runs"]
            ]
        return _written(folder, found, baseline)


def _plain(spec: ModelSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_none=True)


def _arms(base: Recipe, given: Mapping[str, Any], grid: Grid) -> tuple[dict[str, dict[str, Any]], dict[str, str], str]:
    """The arms with their temperatures, the method that each is called by in the study, and that of the baseline."""
    alone = get_task(base.task).baseline
    read = {name: read_arm(name, values) for name, values in (given or {"kd": {"method": "kd"}}).items()}
    first = grid.baseline or next((name for name, arm in read.items() if arm["method"] == alone), alone)
    if first == alone and first not in read:
        read = {alone: {"method": alone, "options": {}}, **read}
    if first not in read:
        raise InputError(f"Baseline {first!r} is not among the arms {', '.join(read)}.")
    arms: dict[str, dict[str, Any]] = {}
    families: dict[str, str] = {}
    for name, arm in read.items():
        takes = "temperature" in get_method(arm["method"]).model_fields and "temperature" not in arm["options"]
        several = grid.temperatures if takes and name != first else []
        more = {f"{name} τ={t:g}": {**arm, "options": {**arm["options"], "temperature": t}} for t in several}
        arms |= more or {name: arm}
        families |= dict.fromkeys(more, name) or {name: family_of(name, arm)}
    return arms, families, families[first]


def _taught(cell: Recipe, home: Path, slurm: Slurm | None, overwrite: bool, progress: bool) -> Recipe:
    """The recipe of a pair with its teacher trained, once for all students."""
    assert cell.teacher is not None
    if cell.teacher.train is None:
        return cell
    first = next(r for r in trained_first(cell, home) if r.output == home / "teacher")
    train_shared([first], home, slurm, overwrite, progress)
    taught = {**_plain(cell.teacher), "model": str(first.output / "student")}
    return make(cell.dump() | {"teacher": {k: v for k, v in taught.items() if k not in ("train", "tokenizer")}})


def _written(folder: Path, found: Sequence[Place], baseline: str | None) -> Study:
    """Write the study of finished runs."""
    records, task, notes = measured(found, folder)
    data = assemble(
        records,
        baseline=baseline or task.baseline,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        measures=task.fidelity,
    )
    data |= {"title": f"Generalisation and fidelity: {task.name}", "notes": notes}
    write_json(folder / "study.json", data)
    render_study(folder)
    return Study(data["points"], data, folder)
