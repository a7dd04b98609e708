"""The run folder: the recipe, facts of the run, and whether it is finished."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from understudy.errors import InputError
from understudy.files import differing, digest, read_json, replacing, writing
from understudy.generation import Limits
from understudy.reading import parse_yaml
from understudy.runs.recipe import Recipe
from understudy.training.arguments import fields as training_fields
from understudy.training.arguments import is_default
from understudy.training.checkpoint import numbered

LOCK = ".understudy"
"""The file that a process locks while it writes to a folder; its content identifies the process."""
BEFORE = {"teacher", "start", "members", "store", "runs", "tuning", "logs", "stages"}
"""Folders that are created before a run begins, or that contain runs."""
RESULTS = (
    *("recipe.yaml", "run.json", "evaluation.json", "report.html", "metrics.jsonl", "validation.jsonl"),
    *("student", "pictures", "stages", "phases", "tensorboard", "export"),
)
"""Files of a run other than checkpoints and samples."""
REPLACED = ".replaced"
"""Where a pipeline's run lies that is to be replaced, until the new one is complete."""
LENGTHS = ("trainer.max_steps", "trainer.num_train_epochs")
FREE = {"output"} | {
    f"trainer.{key}"
    for key in (
        *("logging_steps", "logging_strategy", "logging_first_step", "logging_dir", "log_level", "log_level_replica"),
        *("log_on_each_node", "report_to", "run_name", "project", "trackio_space_id", "disable_tqdm", "save_steps"),
        *("save_strategy", "save_total_limit", "dataloader_num_workers", "dataloader_pin_memory"),
        *("dataloader_persistent_workers", "dataloader_prefetch_factor", "torch_empty_cache_steps"),
        *("skip_memory_metrics", "include_num_input_tokens_seen"),
        "per_device_eval_batch_size",  # for want of memory, after training; the numbers are the same but for rounding
    )
}
"""Keys that do not affect results and may differ on resume."""
BOUNDS = (*Limits.model_fields, "timeout", "api_key_env", "url")
"""Keys of an endpoint that change when and where texts are asked for, and how many before a run stops, but not of which
model."""


def _lock(file: Path) -> Any:
    """An open and locked file, or `None` if another process holds the lock. Killed processes release their locks."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return file.open("a+")
    while True:
        opened = file.open("a+")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(opened.fileno()), file.stat()):
                return opened
        except BlockingIOError:
            opened.close()
            return None
        opened.close()  # its last owner has just removed the locked file


@contextmanager
def held(folder: Path, inputs: Iterable[Path] = (), several: bool = False) -> Iterator[Path]:
    """Create a folder for one or several runs and lock it against other processes.

    A folder that nothing was written to is removed at the end.

    Args:
        inputs: paths that are read; a folder that is or contains one of them is refused.
        several: it is for several runs, so one of a single run is refused, and the other way round.

    Raises:
        InputError: the folder is not a run folder and not empty or one of the other kind, another process writes to it, or it is not writable.
    """
    if not first_rank():
        yield folder
        return
    file = folder / LOCK
    try:
        _refuse_foreign(folder, inputs)
        fresh = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied", str(folder))
        lock = _lock(file)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"Output {folder} is a file, not a folder. Choose another output.") from None
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"Output folder {str(folder)!a} cannot be written: {reason}. Choose another output.") from None
    if lock is None:
        owner = file.read_text(errors="replace").strip() or "another process"
        raise InputError(
            f"Output folder {folder} is being written by {owner}. Wait for it, stop it, or choose another output."
        )
    with lock:
        try:
            _refuse_other_kind(folder, several)
            with writing(file):
                lock.truncate(0)
                os.write(lock.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
            yield folder
        finally:
            if os.listdir(folder) == [LOCK]:
                file.unlink()
                if fresh:
                    folder.rmdir()


def _refuse_foreign(folder: Path, inputs: Iterable[Path]) -> None:
    """Raise an error for a folder with other files, before anything is written to it."""
    place = folder.resolve()
    if place in (Path(place.anchor), Path.home().resolve()):
        raise InputError(f"Output {folder} is {place}, which is no place for a run's files: choose a folder below it.")
    for path in inputs:
        if place == path.resolve() or place in path.resolve().parents:
            raise InputError(f"Output {folder} is or holds {path}, which the run reads: choose another output.")
    if not folder.is_dir() or ours(folder):
        return
    others = sorted(p.name for p in folder.iterdir() if not (p.name in BEFORE and p.is_dir()))
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise InputError(
            f"Output {folder} holds files that are no run's ({shown}): they are left alone. Choose a new or empty folder."
        )


def _refuse_other_kind(folder: Path, several: bool) -> None:
    """Raise an error if a single run would write over the report of several, or they over its own."""
    kind, others = "single run", ["run.json", "recipe.yaml"]
    if not several:
        kind, others = "comparison or study", ["comparison.json", "study.json", "runs"]  # the last if it was cut off
    name = next((name for name in others if (folder / name).exists()), None)
    if name is not None:
        wanted = "several runs" if several else "one run"
        raise InputError(
            f"Output {folder} holds a {kind} ({name}), and {wanted} would mix with it: choose another output."
        )


def ours(folder: Path) -> bool:
    """Whether the folder holds runs."""
    if (folder / LOCK).is_file() or (folder / "comparison.json").is_file():
        return True
    try:
        return {"format", "status"} <= (read_json(folder / "run.json") or {}).keys()
    except InputError:  # damaged, or another tool's
        return False


def differences(folder: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """The keys that differ between a recipe and that of a folder, with both values, limited to those that results
    depend on."""
    before, now = _flat(written(folder) or {}), _flat(yaml.safe_load(yaml.safe_dump(recipe.shown())))
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    changed = [k for k in changed if not ((k in before) != (k in now) and _says_the_default(k, {**before, **now}[k]))]
    return {k: (before.get(k), now.get(k)) for k in changed if not _free(k)}


def _says_the_default(key: str, value: Any) -> bool:
    """Whether a key of the trainer that one recipe leaves out asks for what happens without it."""
    where, _, name = key.partition(".")
    return where == "trainer" and name in training_fields() and is_default(name, value)


def _free(key: str) -> bool:
    """Whether a key may differ on resume: a run that has spent its budget goes on with a larger one."""
    where, _, name = key.rpartition(".")
    return key in FREE or "budget" in (key, where) or (where.endswith(".endpoint") and name in BOUNDS)


def written(folder: Path) -> dict[str, Any] | None:
    """The recipe in a folder, or `None`."""
    file = folder / "recipe.yaml"
    try:
        values = parse_yaml(file.read_bytes().decode(), "the recipe", yaml.SafeLoader)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # InputError among them
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"{file} is damaged: {reason}. Put it back, or start again with --overwrite.") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{file} is damaged: it holds a {type(values).__name__}, not a recipe. Put it back, or start anew with "
            "--overwrite."
        )
    return values


def _flat(values: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{where}{key}.") if isinstance(value, dict) and value else {f"{where}{key}": value}
    return found


def agree(recipe: Recipe) -> list[tuple[str, Any]]:
    """Compare a recipe with that of its folder.

    Returns:
        Key and value of the previous length of the folder's run, if it is to be continued with more steps; else
        nothing.

    Raises:
        InputError: the folder holds another run; every difference is named.
    """
    folder = recipe.output
    if written(folder) is None:
        return []
    changed = differences(folder, recipe)
    longer = [(key, old) for key, (old, new) in changed.items() if key in LENGTHS and _more(old, new)]
    if not changed or (len(longer) == len(changed) == 1):
        return longer
    said = "; ".join(f"{key}: {_said(old)} → {_said(new)}" for key, (old, new) in changed.items())
    raise InputError(
        f"Folder {folder} holds another run: {said}. Choose another output, or replace the run with --overwrite "
        "(overwrite=True in Python)."
    )


def _more(old: Any, new: Any) -> bool:
    numbers = all(isinstance(v, (int, float)) and v > 0 for v in (old, new))
    return numbers and bool(new > old)


def _said(value: Any) -> str:
    return "not set" if value is None else str(value)


def take(recipe: Recipe) -> None:
    """Write the recipe into its folder, which then belongs to this run."""
    if first_rank():
        with replacing(recipe.output / "recipe.yaml") as temporary:  # another rank may read it at any time
            temporary.write_text(yaml.safe_dump(recipe.shown(), sort_keys=False))


def clear(folder: Path, keep: bool = False) -> None:
    """Remove the files of a run that a new run would write. Trained teachers and paid completions stay.

    Args:
        keep: move them aside, from where `put_back` brings them if the new run fails before a stage of it is complete.
    """
    aside = folder / REPLACED
    if keep:
        put_back(folder)
    for path in [
        *(folder / name for name in RESULTS),
        *folder.glob("samples*.jsonl"),
        *numbered(folder / "checkpoints"),
        *(path for inner in folder.glob("checkpoints/*") for path in numbered(inner)),
    ]:
        if keep and (path.exists() or path.is_symlink()):
            moved = aside / path.relative_to(folder)
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moved)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def put_back(folder: Path) -> None:
    """Bring back the run that `clear` moved aside, unless a stage of the new one is complete, which its seal says."""
    aside = folder / REPLACED
    if aside.is_dir() and not any((folder / "stages").rglob("*.json")):
        clear(folder)
        shutil.copytree(aside, folder, symlinks=True, dirs_exist_ok=True)
    drop_replaced(folder)


def drop_replaced(folder: Path) -> None:
    """Remove the run that was moved aside."""
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def hashes_of(folder: Path) -> dict[str, Any]:
    """Those that the `run.json` of a folder holds; none if it is missing, or holds something else in their place."""
    held: Any = (read_json(folder / "run.json") or {}).get("hashes")
    return held if isinstance(held, dict) else {}


def same_inputs(folder: Path, hashes: Mapping[str, str]) -> None:
    """Compare data, tokenizer and models with those at the start of the folder's run.

    Raises:
        InputError: one of them has changed.
    """
    before = hashes_of(folder)
    for key, now in hashes.items():
        if key in before and before[key] != now and key != "student_initial":  # checkpoints hold the whole student
            raise InputError(
                f"The {key if '.' in key else key.replace('_', ' ')} of run {folder} changed since it began: SHA-256 {before[key]} then, {now} "
                "now. Put back what it began with, choose another output, or start again with --overwrite."
            )


def finished(folder: Path) -> dict[str, Any] | None:
    """The evaluation of a finished run, or `None`.

    Raises:
        InputError: a file of the run is damaged, or differs from what was written.
    """
    facts = read_json(folder / "run.json")
    if facts is None or facts.get("status") != "done":
        return None
    files = facts.get("files", {})
    name = differing(folder, files if isinstance(files, dict) else {})
    if name is not None:
        raise InputError(
            f"{folder / name} is missing or differs from what the run wrote. Put it back, or start the run again with "
            "--overwrite."
        )
    evaluation = read_json(folder / "evaluation.json")
    if evaluation is not None and not isinstance(evaluation.get("metrics"), dict):
        raise InputError(f"{folder / 'evaluation.json'} is damaged: it has no metrics.")
    return evaluation


def facts(
    recipe: Recipe,
    hashes: Mapping[str, str],
    findings: Any,
    status: str,
    started: float,
    lengthened: Sequence[Any],
) -> dict[str, Any]:
    """The content of `run.json`. For a finished run it includes the hashes of recipe and evaluation."""
    files = ("recipe.yaml", "evaluation.json") if status == "done" and first_rank() else ()
    packages = ("understudy", "torch", "transformers", "accelerate", "numpy")
    return {
        "format": 1,
        "method": recipe.method,
        "task": recipe.task,
        "teacher": recipe.teacher.model if recipe.teacher else None,
        "student": recipe.student.model if recipe.student else None,
        "seed": recipe.seed,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "hashes": dict(hashes),
        "preflight": dataclasses.asdict(findings),
        "lengthened": list(lengthened),
        "status": status,
        "files": {name: digest(recipe.output / name) for name in files},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 2),
    }


def first_rank() -> bool:
    """Whether this is the first rank of those that `torchrun` or `accelerate launch` started; it writes the files."""
    return int(os.environ.get("RANK", "0")) == 0


def save_pictures(folder: Path, pictures: Mapping[str, Any]) -> dict[str, str]:
    """Write arrays `[height, width, 3]` of uint8 as PNG; returns caption → file name inside the folder."""
    from PIL import Image

    names: dict[str, str] = {}
    for i, (caption, pixels) in enumerate(pictures.items()):
        names[caption] = f"pictures/{i}.png"
        if first_rank():
            (folder / "pictures").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / names[caption])
    return names
