"""One trainer for every method, on `transformers.Trainer`.

What it adds: the teacher's targets, the one division (by the count over the whole update and all ranks), term means
for the method's state, gradients of terms apart where a method merges them, and checkpoints that resume exactly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from understudy.data import Batch, augment
from understudy.errors import InputError
from understudy.losses.reduction import row_weights
from understudy.teachers import Teacher
from understudy.training import checkpoint as ck
from understudy.training.apprentice import Apprentice
from understudy.training.order import EpochShuffle

STATE, OPTIMIZER, MODEL = "state.safetensors", "optimizer.safetensors", "model.safetensors"


class _Follow(TrainerCallback):
    """Tells the trainer which epoch begins; at its first call it is also the place a resumed run lands in."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_epoch(int((state.epoch or 0) + 1e-9))


class DistillationTrainer(Trainer):
    """Trains an `Apprentice` against a teacher.

    Args:
        apprentice: student and method.
        teacher: gives targets, or `None` for a method that needs none.
        args: the training arguments of `transformers`.
        train_dataset, collate: examples, and how they become the tensors of a `Batch`.
        augmentation: keyword options of `understudy.data.augment`, or `None`.
        meter: a cost meter with contexts `teacher()`, `student()`, `head()` and `step()`, or `None`.
        metrics_file: JSON lines, one per log.
    """

    model: Apprentice

    def __init__(
        self,
        apprentice: Apprentice,
        args: TrainingArguments,
        train_dataset: Dataset[Any],
        collate: Any,
        *,
        teacher: Teacher | None = None,
        augmentation: Mapping[str, Any] | None = None,
        meter: Any = None,
        metrics_file: Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if "teacher" in apprentice.method.needs and teacher is None:
            raise InputError(f"Method {apprentice.method.name!r} needs a teacher and none was given: set `teacher`.")
        args.remove_unused_columns = False
        super().__init__(
            model=apprentice, args=args, train_dataset=train_dataset, data_collator=collate, callbacks=callbacks
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_Follow(self))
        self.loss_is_scaled_for_ga = True  # `compute_loss` already divides by the count of the whole update
        self.teacher, self.meter, self.metrics_file = teacher, meter, metrics_file
        self.augmentation = augmentation
        self._epoch = 0
        self._count = torch.tensor(1.0)
        self._left = 0
        self._sums: dict[str, Tensor] = {}
        self._means: dict[str, float] = {}
        self._term_gradients: dict[str, list[Tensor | None]] = {}
        if apprentice.method.merges_gradients and args.fp16:
            raise InputError(f"Method {apprentice.method.name!r} merges gradients and cannot run under fp16: use bf16.")

    # -- data ---------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self._sampler = EpochShuffle(len(self.train_dataset), seed)
        return self._sampler

    def begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._sampler.set_epoch(epoch)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        """Collect the micro-batches of one update and count what the update divides by, over all ranks."""
        samples = []
        for _ in range(num_batches):
            try:
                samples.append(next(epoch_iterator))
            except StopIteration:
                break
        count = sum((self._units(Batch.from_dict(s)) for s in samples), torch.zeros((), dtype=torch.float64))
        count = count.to(self.args.device, torch.float32)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, "sum")
        self._count, self._left = count.clamp(min=1.0), len(samples)
        return samples, count

    def _units(self, batch: Batch) -> Tensor:
        _, unit = row_weights(self.model.reduction, batch.sequence)
        number = batch.rows if unit == "rows" else (batch.sequence.unique().numel() if unit == "sequences" else 1)
        return torch.tensor(float(number), dtype=torch.float64)

    # -- the step -----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch: this is the one place that divides."""
        self._sums_of_batch = self._terms(model, inputs)
        # DDP averages gradients over ranks; the count is already global, so the average is undone here.
        scale = self.accelerator.num_processes / self._count
        return sum(v for k, v in self._sums_of_batch.items() if not k.endswith("/value")) * scale

    def _terms(self, model: Any, inputs: Any) -> dict[str, Tensor]:
        batch = Batch.from_dict(inputs).to(self.args.device)
        if self.augmentation is not None:
            batch.inputs["pixel_values"] = augment(
                batch.inputs["pixel_values"], batch.ids, seed=self.args.seed, epoch=self._epoch, **self.augmentation
            )
        self.model.live.step = self.state.global_step
        meter = self.meter
        if meter is not None:
            self.model.head_timer = meter.head
        target = None
        if self.teacher is not None:
            with meter.teacher() if meter is not None else nullcontext():
                target = self.teacher.rows(batch)
        sums: dict[str, Tensor] = model(batch, target)
        for name, value in sums.items():
            if name.endswith("/value"):
                key = name.removesuffix("/value")
                self._sums[key] = self._sums.get(key, torch.zeros_like(value)) + value
        if meter is not None:
            meter.rows += batch.rows
            meter.forwards["student"] += len(batch.ids)
            meter.forwards["teacher"] += len(batch.ids) if self.teacher is not None else 0
        return sums

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        with self.meter.step() if self.meter is not None else nullcontext():
            if self.model.method.merges_gradients:
                loss = self._apart_step(model, inputs)
            else:
                loss = super().training_step(model, inputs, num_items_in_batch)
        self._left -= 1
        if self._left == 0:
            self._close_update()
        return loss

    def _close_update(self) -> None:
        names = sorted(self._sums)
        if names:
            sums = torch.stack([self._sums[n].float() for n in names])
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums, "sum")
            self._means = dict(zip(names, (sums / self._count).tolist(), strict=True))
        self._sums = {}
        if self._term_gradients:
            self._merge()
        self.model.method.updated(self.model.live, self._means)

    def _apart_step(self, model: Any, inputs: Any) -> Tensor:
        """Backward of each term apart, accumulated over the update; `merge` then writes the gradients."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            sums = self._terms(self.model, inputs)
        owners = [p for _, p in self.model.owners()]
        names = [n for n in sums if not n.endswith("/value")]
        total = torch.zeros((), device=self.args.device)
        for i, name in enumerate(names):
            loss = sums[name] / self._count
            total = total + loss.detach()
            grads = torch.autograd.grad(loss, owners, retain_graph=i + 1 < len(names), allow_unused=True)
            held = self._term_gradients.setdefault(name, [None] * len(owners))
            for j, grad in enumerate(grads):
                if grad is not None:
                    held[j] = grad if held[j] is None else held[j] + grad  # type: ignore[operator]
        return total * self.accelerator.num_processes

    def _merge(self) -> None:
        named = self.model.owners()
        if self.args.world_size > 1:
            for grads in self._term_gradients.values():
                for i, (_, parameter) in enumerate(named):
                    grad = grads[i] if grads[i] is not None else torch.zeros_like(parameter)
                    grads[i] = self.accelerator.reduce(grad, "sum")
        merged = self.model.method.merge(self._term_gradients, [owner for owner, _ in named])
        for (_, parameter), gradient in zip(named, merged, strict=True):
            parameter.grad = gradient
        self._term_gradients = {}

    # -- logs ---------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.metrics_file is None or not self.args.should_save or "loss" not in logs:
            return
        state = self.model.live.state
        line = {
            "step": self.state.global_step,
            "epoch": round(self.state.epoch or 0.0, 6),
            "loss": logs["loss"],
            "terms": self._means,
            "lr": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "state": state.logs() if state is not None else {},
        }
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    # -- checkpoints --------------------------------------------------------------------------------------------

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
        for path in old[: -(keep or 2)]:
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
            "meter": self.meter.state_dict() if self.meter is not None else None,
        }
        ck.save_tree(tree, self._state_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tree = ck.load_tree(self._state_file(checkpoint))
        ck.set_rng_state(tree["rng"])
        if tree["method"] is not None:
            self.model.live.state.load_state_dict(tree["method"])
        if self.meter is not None and tree["meter"] is not None:
            self.meter.load_state_dict(tree["meter"])
