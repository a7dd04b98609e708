"""Runs as jobs of a Slurm cluster, through submitit.

Jobs outlive the process that submitted them: started again, the same command waits for those that are queued or running,
reads what is finished, and submits the rest.
"""

from __future__ import annotations

import io
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from understudy.errors import InputError, nearest
from understudy.masking import masked, masked_text
from understudy.runs.recipe import validated
from understudy.workers import THREADS, Work

if TYPE_CHECKING:
    from submitit import SlurmExecutor, SlurmJob

PROCESSES, SLURM = "processes", "slurm"
log = logging.getLogger(__name__)


class Slurm(BaseModel):
    """What each job asks the cluster for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    partition: str | None = Field(None, description="The cluster's default unless given.")
    account: str | None = Field(None, description="Who is charged, where the cluster asks for it.")
    time: PositiveInt = Field(60, description="Minutes of a run.")
    memory: PositiveFloat | None = Field(None, description="GB of main memory.")
    gpus: PositiveInt | None = Field(None, description="None unless given.")


def executor_of(text: str) -> Slurm | None:
    """Read `processes` (`None`), `slurm`, or `slurm:partition=gpu,time=60`.

    Raises:
        InputError: another executor, or an unknown or bad option.
    """
    name, _, options = text.partition(":")
    if text == PROCESSES:
        return None
    if name != SLURM:
        raise InputError(
            f"No executor {text!r}.{nearest(name, (PROCESSES, SLURM))} Known: {PROCESSES}, and {SLURM} with options: "
            "slurm:partition=gpu,time=60."
        )
    pairs = [item.partition("=") for item in options.split(",") if item.strip()]
    found: Slurm = validated(Slurm, {key.strip(): value.strip() for key, _, value in pairs}, "option of slurm")
    return found


def submit(
    work: Work,
    jobs: Mapping[str, tuple[Any, ...]],
    slurm: Slurm,
    folder: Path,
    at_once: int | None = None,
    tracked: Callable[[Iterator[int]], Iterable[int]] = iter,
) -> list[Any]:
    """Run `work(*arguments)` for each job on the cluster, with one thread each; results are in the order of the jobs.

    Args:
        work: a function of an importable module.
        jobs: arguments by a name for messages; plain values, since they are written to `folder`.
        folder: of submissions, results and logs, on a disk that the cluster's machines see.
        at_once: so many jobs run at a time; by default as many as the cluster allows.
        tracked: called with the number of each finished job.

    Raises:
        InputError: a job failed, with its log; the others go on.
    """
    if masked(list(jobs.values())) != [list(job) for job in jobs.values()]:
        raise InputError(
            "The recipe holds a secret, and jobs are written to disk: leave it out and set it in the environment, "
            "which jobs inherit (HF_TOKEN for the Hub)."
        )
    executor = _cluster(slurm, folder, at_once)
    found = _under_way(folder, work, jobs)
    fresh = [name for name in jobs if name not in found]
    if fresh:
        found |= zip(fresh, _submitted(executor, [(work, jobs[name]) for name in fresh]), strict=True)
    names = {job.job_id: name for name, job in found.items()}
    results: dict[str, Any] = {}
    try:
        for _ in tracked(_finished(list(found.values()), names, results)):
            pass
    except KeyboardInterrupt:
        left = [job.job_id for name, job in found.items() if name not in results]
        log.warning("Jobs go on: %s. `scancel` with their numbers ends them.", " ".join(left))
        raise
    return [results[name] for name in jobs]


def _cluster(slurm: Slurm, folder: Path, at_once: int | None) -> SlurmExecutor:
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise InputError("The executor slurm needs the extra: pip install understudy[slurm].") from None
    try:
        executor = SlurmExecutor(folder)
    except RuntimeError:
        raise InputError(
            "The executor slurm finds no `srun` here: start from a machine of a Slurm cluster, or leave it out."
        ) from None
    asked = {
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time,
        "mem": None if slurm.memory is None else f"{round(slurm.memory * 1024)}MB",
        "gpus_per_node": slurm.gpus,
        "array_parallelism": at_once,
    }
    exports = [f"export {name}={value}" for name, value in THREADS.items()]
    executor.update_parameters(
        job_name="understudy", setup=exports, **{k: v for k, v in asked.items() if v is not None}
    )
    return executor


def _under_way(folder: Path, work: Work, jobs: Mapping[str, tuple[Any, ...]]) -> dict[str, SlurmJob[Any]]:
    """The jobs that an earlier call submitted, and that are queued or running."""
    from submitit import SlurmJob

    suffix = "_submitted.pkl"
    before: list[SlurmJob[Any]] = [SlurmJob(folder, p.name.removesuffix(suffix)) for p in folder.glob(f"*{suffix}")]
    found: dict[str, SlurmJob[Any]] = {}
    for job in before:
        if job.done() or job.state == "UNKNOWN":  # the cluster does not remember it
            continue
        given = job.submission().args
        found |= {name: job for name, arguments in jobs.items() if given == (work, arguments)}
    return found


def _submitted(executor: SlurmExecutor, calls: Sequence[tuple[Work, tuple[Any, ...]]]) -> list[SlurmJob[Any]]:
    """Submit the calls as one array of jobs."""
    from submitit.core.utils import FailedJobError

    said = io.StringIO()  # submitit repeats there what sbatch says
    try:
        with redirect_stderr(said), executor.batch():
            jobs: list[Any] = [executor.submit(_answer, *call) for call in calls]
    except FailedJobError:
        raise InputError(f"Slurm refused the jobs: {' '.join(said.getvalue().split())}") from None
    return jobs


def _answer(work: Work, arguments: tuple[Any, ...]) -> tuple[Any, str | None]:
    """In a job: the result, or one line on what went wrong, whose traceback is in the log."""
    try:
        return work(*arguments), None
    except Exception as error:
        traceback.print_exc()
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__} "
        return None, masked_text(kind + " ".join(str(error).split()))


def _finished(jobs: Sequence[SlurmJob[Any]], names: Mapping[str, str], results: dict[str, Any]) -> Iterator[int]:
    """Wait for the jobs and collect their results by name; yields how many are finished."""
    from submitit.helpers import as_completed

    for job in as_completed(jobs, poll_frequency=1):
        name = names[job.job_id]
        # Without an answer the job was stopped: by its limits, by scancel, or with its machine.
        answer, error = (None, f"it ended as {job.state}") if job.exception() is not None else job.result()
        if error is not None:
            raise InputError(
                f"Job {job.job_id} of {name} failed: {error.rstrip('.')}. Its log: {job.paths.stderr}. The same command runs "
                "it again, and waits for the others."
            )
        results[name] = answer
        yield len(results)
