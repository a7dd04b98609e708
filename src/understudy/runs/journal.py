"""The record of a run, `run.json`, while it is made."""

from __future__ import annotations

import time
from typing import Any

from understudy.files import write_json
from understudy.models.sharding import together
from understudy.runs.folder import clear, drop_replaced, facts, first_rank, put_back, same_inputs, take, written
from understudy.runs.preflight import Findings
from understudy.runs.recipe import Recipe


class Journal:
    """The content of `run.json` during a run. Nothing is written to the folder before the run begins."""

    def __init__(self, recipe: Recipe, overwrite: bool, lengthened: list[Any]) -> None:
        self.recipe, self.overwrite, self.lengthened = recipe, overwrite, lengthened
        self.folder, self.started = recipe.output, time.time()
        self.hashes: dict[str, str] = {}
        self.findings = Findings()

    def compare(self, hashes: dict[str, str]) -> None:
        """Record the hashes of the run's inputs; on resume compare them with the earlier ones."""
        self.hashes = hashes
        if not self.overwrite and written(self.folder) is not None:
            same_inputs(self.folder, hashes)

    def begin(self, keep: bool = False) -> None:
        """Write the recipe into the folder. keep: a run that is replaced stays at hand, for `fail`."""
        if first_rank() and self.overwrite:
            clear(self.folder, keep)
        self.findings.notes.extend(
            f"The run was to end at {length} ({key}) and goes on: from there on a learning rate that falls until the end "
            "follows the longer run."
            for key, length in self.lengthened
        )
        self.record("running")
        if first_rank():
            take(self.recipe)
        together()

    def fail(self) -> None:
        """The run ended with an error: bring back the one that it replaced, if it left nothing."""
        if first_rank() and self.overwrite:
            put_back(self.folder)

    def record(self, status: str) -> None:
        """Write `run.json`."""
        if first_rank():
            found = facts(self.recipe, self.hashes, self.findings, status, self.started, self.lengthened)
            write_json(self.folder / "run.json", found)
            if status == "done":
                drop_replaced(self.folder)
