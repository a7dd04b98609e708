"""`understudy push`: upload the student of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from understudy.cli.options import AsJson, out, works_in

EPILOG = "Example: understudy push runs/taid OWNER/NAME --dry-run"


def push_command(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    repo: Annotated[str, typer.Argument(help="Id of the model repository: OWNER/NAME.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files and the card; nothing is uploaded, no network is used.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload the student of a finished run to the Hub, with its model card. The token is read from HF_TOKEN."""
    from understudy.runs.pushing import prepare, push

    works_in(run)
    upload = prepare(run, repo)
    address = None if dry_run else push(upload, private)
    if as_json:
        shown = {"repo": repo, "files": upload.files, "card": upload.card, "commit": address}
        sys.stdout.write(json.dumps(shown, indent=1) + "\n")
        return
    if address is not None:
        out.print(f"Uploaded: {address}")
        return
    table = Table("file", "bytes", title=f"To be uploaded to {repo}")
    for name, size in upload.files.items():
        table.add_row(name, f"{size:,}")
    out.print(table)
    out.print(upload.card, markup=False, highlight=False)
