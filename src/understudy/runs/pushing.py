"""Uploading the student of a finished run to the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from understudy.errors import InputError
from understudy.files import CARD, check_seal, read_json
from understudy.masking import masked_text, remember
from understudy.reporting import write_card
from understudy.runs.folder import finished

TOKEN = "HF_TOKEN"
"""The environment variable with the Hub's token."""


@dataclass(frozen=True)
class Upload:
    """What is to be uploaded.

    Args:
        repo: id of the model repository.
        folder: the student's folder.
        files: names inside the folder, with their sizes in bytes.
        card: the text of the model card.
    """

    repo: str
    folder: Path
    files: dict[str, int]
    card: str


def prepare(run: Path, repo: str) -> Upload:
    """Check the student of a run and list its files, without network. A missing card is written again.

    Raises:
        InputError: the run is not finished, has no student of its own, or a file differs from what the run wrote (the
            card may be edited); or the repository's name is invalid.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise InputError(f"Repository {repo!r} is no id of the Hub: give OWNER/NAME or NAME.") from None
    facts = read_json(run / "run.json")
    if facts is None:
        raise InputError(f"{run} is not a run folder: run.json is missing.")
    if finished(run) is None:  # compares the hashes in run.json
        raise InputError(
            f"{run} is not finished ({facts.get('status')}): wait if it is being trained, else run `understudy train` on it again."
        )
    folder = run / "student"
    if not folder.is_dir():
        raise InputError(f"{run} has no student of its own: a procedure's models are in the runs below it.")
    check_seal(folder)
    if not (folder / CARD).is_file():
        write_card(run)
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    return Upload(repo, folder, files, (folder / CARD).read_text(encoding="utf-8"))


def push(upload: Upload, private: bool = False) -> str:
    """Create the repository if there is none, and upload the files in one commit. The token is that of `HF_TOKEN`.

    Args:
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        InputError: there is no token, or the Hub refuses or cannot be reached.
    """
    token = os.environ.get(TOKEN)
    if not token:
        raise InputError(f"No token for the Hub: set the environment variable {TOKEN}, or look first with --dry-run.")
    remember({"token": token})
    api = HfApi(token=token)
    try:
        api.create_repo(upload.repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=upload.repo,
            folder_path=upload.folder,
            allow_patterns=list(upload.files),
            commit_message="Upload a student with its card",
        )
    except (OSError, ValueError) as error:  # also every error of the Hub and of its connection
        said = masked_text(" ".join(str(error).split()))[:300] or type(error).__name__
        raise InputError(f"{upload.repo} could not be uploaded: {said}") from None
    return str(commit.commit_url)
