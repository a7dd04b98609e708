"""Checkpoints of the trainer that resume exactly: safetensors without pickle, sealed when whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from understudy.errors import InputError
from understudy.models.sharding import gathered, is_sharded, load_optimizer, load_state, together, whole_state
from understudy.training import checkpoint as ck
from understudy.training.ranks import OnRanks

STATE, OPTIMIZER, MODEL = "state.safetensors", "optimizer.safetensors", "model.safetensors"


def _best(folder: Path) -> str:
    """The checkpoint that was the best when this one was written; a run that goes on from here may end with it."""
    try:
        return f"checkpoint-{json.loads((folder / 'trainer_state.json').read_text())['best_global_step']}"
    except (OSError, ValueError, TypeError, KeyError):
        return ""


class ExactCheckpoints(OnRanks):
    """`Trainer` whose checkpoints hold all that the next step depends on, the method's state and players included.

    Model and optimiser are held in one piece whether they are sharded or not; random numbers are those of each rank.
    """

    meter: Any
    auxiliary: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = keep
        together()  # the seal covers the files of all ranks
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir)
        ck.seal(folder / f"checkpoint-{self.state.global_step}")
        # Older ones go only now that the newest is sealed, so a kill at any moment leaves a whole one.
        old = ck.numbered(folder)
        kept = old[-(keep or 2) :]
        best = {_best(path) for path in kept}
        for path in old[: -(keep or 2)]:
            if path.name not in best:
                shutil.rmtree(path, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The state of student and method; a sharded one is gathered, and the first rank writes."""
        state = whole_state(self.model) if is_sharded(self.model) else self.model.state_dict()
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            ck.save_tree(dict(state), folder / MODEL)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_state(self.model, ck.load_tree(Path(resume_from_checkpoint) / MODEL))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self.optimizer.state_dict()
        tree = {
            "optimizer": gathered(state) if is_sharded(self.model) else state,
            "scheduler": self.lr_scheduler.state_dict(),
        }
        if self.args.should_save:
            ck.save_tree(tree, Path(output_dir) / OPTIMIZER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if (
            self.rollouts is not None
        ):  # the first batches of a resumed run are taken before the rest of its state is read
            self.rollouts.load_state_dict(ck.load_tree(self._state_file(checkpoint))["rollouts"])
        tree = ck.load_tree(Path(checkpoint) / OPTIMIZER)
        load_optimizer(self.optimizer, tree["optimizer"])
        self.lr_scheduler.load_state_dict(tree["scheduler"])

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / (STATE if self.args.world_size == 1 else f"rank{self.args.process_index}-{STATE}")

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        state = self.model.train_state.method_state
        tree = {
            "rng": ck.rng_state(),
            "method": state.state_dict() if state is not None else None,
            "players": self.auxiliary.state_dict(),
            "meter": self.meter.state_dict() if self.meter is not None else None,
            "rollouts": self.rollouts.state_dict() if self.rollouts is not None else None,
        }
        ck.save_tree(tree, self._state_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        file = self._state_file(checkpoint)
        if not file.is_file():
            held = len(list(Path(checkpoint).glob(f"*{STATE}")))
            raise InputError(
                f"{checkpoint} was written by {held} process{'es' * (held > 1)} and is resumed by {self.args.world_size}: "
                "start as many, or choose another output."
            )
        tree = ck.load_tree(file)
        ck.set_rng_state(tree["rng"])
        if tree["method"] is not None:
            self.model.train_state.method_state.load_state_dict(tree["method"])
        self.auxiliary.load_state_dict(tree["players"])
        if self.meter is not None and tree["meter"] is not None:
            self.meter.load_state_dict(tree["meter"])
