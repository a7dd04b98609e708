"""Checkpoints of the trainer that resume exactly: safetensors without pickle, sealed when whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer

from understudy.training import checkpoint as ck

STATE, OPTIMIZER, MODEL = "state.safetensors", "optimizer.safetensors", "model.safetensors"


def _best(folder: Path) -> str:
    """The checkpoint that was the best when this one was written; a run that goes on from here may end with it."""
    try:
        return f"checkpoint-{json.loads((folder / 'trainer_state.json').read_text())['best_global_step']}"
    except (OSError, json.JSONDecodeError, KeyError):
        return ""


class ExactCheckpoints(Trainer):
    """`Trainer` whose checkpoints hold all that the next step depends on, the method's state and players included."""

    model: Any
    meter: Any
    players: Any
    rollouts: Any = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = keep
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir)
        ck.seal(folder / f"checkpoint-{self.state.global_step}")
        # Older ones go only now that the newest is sealed, so a kill at any moment leaves a whole one.
        old = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
        kept = old[-(keep or 2) :]
        best = {_best(path) for path in kept}
        for path in old[: -(keep or 2)]:
            if path.name not in best:
                shutil.rmtree(path, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        ck.save_tree(dict(state_dict or self.model.state_dict()), folder / MODEL)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        (model or self.model).load_state_dict(ck.load_tree(Path(resume_from_checkpoint) / MODEL))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            tree = {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()}
            ck.save_tree(tree, Path(output_dir) / OPTIMIZER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if (
            self.rollouts is not None
        ):  # the first batches of a resumed run are taken before the rest of its state is read
            self.rollouts.load_state_dict(ck.load_tree(self._state_file(checkpoint))["rollouts"])
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            tree = ck.load_tree(Path(checkpoint) / OPTIMIZER)
            self.optimizer.load_state_dict(tree["optimizer"])
            self.lr_scheduler.load_state_dict(tree["scheduler"])

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / (STATE if self.args.world_size == 1 else f"rank{self.args.process_index}-{STATE}")

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        state = self.model.live.state
        tree = {
            "rng": ck.rng_state(),
            "method": state.state_dict() if state is not None else None,
            "players": self.players.state_dict(),
            "meter": self.meter.state_dict() if self.meter is not None else None,
            "rollouts": self.rollouts.state_dict() if self.rollouts is not None else None,
        }
        ck.save_tree(tree, self._state_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tree = ck.load_tree(self._state_file(checkpoint))
        ck.set_rng_state(tree["rng"])
        if tree["method"] is not None:
            self.model.live.state.load_state_dict(tree["method"])
        self.players.load_state_dict(tree["players"])
        if self.meter is not None and tree["meter"] is not None:
            self.meter.load_state_dict(tree["meter"])
